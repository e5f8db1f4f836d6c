"""What can be learnt: one file a task, one line in the registry."""
