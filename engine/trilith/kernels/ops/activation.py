"""Activations of the MLP."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError


def gelu(x: Tensor, kind: str) -> Tensor:
    """x Phi(x), exact where `kind` is `gelu`, by the tanh formula where it is `gelu_tanh`; same shape and dtype.

    Raises KernelError for another kind.
    """
    if kind not in ("gelu", "gelu_tanh"):
        raise KernelError(f"gelu: kind = {kind!r}: must be 'gelu' or 'gelu_tanh'")
    return functional.gelu(x, approximate="none" if kind == "gelu" else "tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(gate) up; `gate` and `up` of one shape and dtype, which are the result's."""
    return functional.silu(gate) * up
