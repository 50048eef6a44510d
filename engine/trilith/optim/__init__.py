"""Optimizers over flat slices, clipping, learning rates. Importing this package alone does not import torch."""
