"""How a model is adapted: one file a method, one line in the registry."""
