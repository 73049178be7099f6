"""blueberry-video: exact video models, one training loop, one experiment folder."""

__version__ = "0.1.0"
