"""Parallelism of one model over processes: sequence parallelism, which splits each clip over a group of them."""
