"""Training: objective (model and loss as one module), optimizer, one step, the loop, checkpoints."""
