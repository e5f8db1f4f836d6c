"""The chaos suite: real faults on a real local cluster, and what became of the training (`make chaos`)."""
