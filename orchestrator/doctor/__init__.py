"""Whether a machine can run what it is asked to."""
