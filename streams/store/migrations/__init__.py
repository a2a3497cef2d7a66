"""How the tables came to be, step by step. Alembic reads the scripts; `streams.store.migrate` runs them."""
