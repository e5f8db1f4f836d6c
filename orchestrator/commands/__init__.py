"""One file a command: what `cli` parses, done and shown."""
