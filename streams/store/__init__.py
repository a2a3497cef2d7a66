"""The projection in PostgreSQL: every notification of the past months, for pages beyond the tables and for SQL by support."""
