"""Models: one folder per family, and the backbones and heads that several families share."""
