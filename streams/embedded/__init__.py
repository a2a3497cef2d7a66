"""A Kafka broker, a schema registry and a mail server of our own, so that `notify up` and the tests need no Docker."""
