"""Decoding and frame sampling, usable alone."""
