"""What we decide: pure functions from a record and state to effects. Nothing here awaits, sends or reads a clock."""
