"""A search: its trials, and which of them go on."""
