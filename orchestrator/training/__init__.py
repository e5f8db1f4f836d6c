"""Inside a worker: data, model, engine, loop and checkpoints. Imports torch, deepspeed, transformers; not ray."""
