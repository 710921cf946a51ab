"""The algorithms, one file per collective: pure functions from a problem and a topology to one rank's steps."""
