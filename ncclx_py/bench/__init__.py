"""``ncclx bench``: collectives timed side by side, checked in the same run, against their lower bound."""
