"""The web: queries over the tables, health and metrics, answered by whichever worker owns the user's partition."""
