"""What a collective would do on a cluster that is not there: plans played as events, at any scale. Pure: nothing is sent."""
