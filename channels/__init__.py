"""How a notification leaves: one module a provider protocol, one small contract (`channels.base`)."""
