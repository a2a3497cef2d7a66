"""Faust made fast and exactly-once: batches in (`reader`), transactions out (`writer`), tables in bulk (`changelog`).

Faust keeps what it does well: the worker command, group membership and the assignor, agents, tables, web. The records
themselves travel through librdkafka (docs/adr/0001-transport.md). `faust_parts` holds every subclass of Faust's classes.
"""
