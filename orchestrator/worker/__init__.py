"""Inside a worker of Ray Train: model, engine, loop, evaluation, export."""
