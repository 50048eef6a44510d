"""Llama (Touvron et al. 2023): `declaration` is torch-free, `model` holds the modules."""
