"""Planning, reconstruction and visualization with trained models."""
