"""What a driver decides: pure functions of what it saw."""
