"""The CUDA kernels as Python sees them. Addresses and streams are integers, 0 for what is absent; csrc/cuda/ops.h says what
each function does. Call them through `kernels/library.py` and `kernels/ops`."""

def why_not(device: int) -> str: ...
