"""Providers, and a subscriber, that can be had on one machine: each speaks its real wire protocol and fails when told to."""

# of `channels.simulators.registry`, without importing all of them
PROTOCOLS = ("smtp", "smpp", "twilio", "fcm", "apns", "webpush", "webhook")
