"""Model families: each declares its parameters as torch-free data, and builds the modules of any stage from them."""
