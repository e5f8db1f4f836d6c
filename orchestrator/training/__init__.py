"""Inside a worker: data, model, engine, loop and checkpoints. Imports torch, deepspeed, transformers, datasets; not ray."""
