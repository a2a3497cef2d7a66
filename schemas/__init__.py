"""What messages say: Avro schemas, the frozen dataclasses beside them, codec, ids, statuses, errors, sealing."""
