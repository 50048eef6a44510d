"""GPT-2 (Radford et al. 2019): `declaration` is torch-free, `model` holds the modules."""
