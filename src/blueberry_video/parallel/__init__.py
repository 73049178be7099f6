"""Training of one model on several devices: sharded parameters and sharded checkpoints."""
