"""WHAT to do: data, base model and budget in, a recommendation with its evidence out. Pure: no torch, ray or mlflow."""
