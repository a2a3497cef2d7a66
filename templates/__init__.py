"""What recipients read: one folder a template, one file a channel part, compiled once and sandboxed."""
