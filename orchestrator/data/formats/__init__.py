"""One file a format: bytes -> the text that stands in each field."""
