"""Providers that can be had on one machine: each speaks its real wire protocol and fails when told to."""

PROTOCOLS = ("smtp", "smpp", "twilio", "fcm", "apns", "webpush")  # of `channels.simulators.registry`, without importing all of them
