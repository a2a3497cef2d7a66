"""One module a step. A released one is never edited."""
