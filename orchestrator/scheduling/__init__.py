"""Where it runs: the only place that imports ray."""
