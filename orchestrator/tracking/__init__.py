"""What came out: the only place that imports mlflow."""
