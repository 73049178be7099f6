"""Training and sampling of diffusion transformers."""
