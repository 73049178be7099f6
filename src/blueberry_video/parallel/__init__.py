"""Training of one model on several devices: sharded parameters and checkpoints, and clips split over processes."""
