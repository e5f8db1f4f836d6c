"""How to run a spec: memory, time and money, and the plan. Pure: no torch, no ray, no mlflow."""
