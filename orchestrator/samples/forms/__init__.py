"""What the samples of a task are: one file a form, one line in the registry."""
