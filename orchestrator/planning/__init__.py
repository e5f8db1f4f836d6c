"""How to run a spec: model shape, memory, time and money, and the plan. Pure: no torch, no ray, no mlflow."""
