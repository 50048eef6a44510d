"""Which implementation of each family of ops a model's layers ask for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any

AUTO, FUSED, TORCH, REFERENCE = "auto", "fused", "torch", "reference"
_SDPA = "sdpa"  # torch's attention


@dataclass(frozen=True)
class Backends:
    """By family one of `auto` (the native op where it takes the tensors, else torch's), `fused` (the native op, or a
    KernelError), `torch` (torch's own op) and `reference` (plain torch as `kernels/reference.py` states it).
    """

    norm: str = AUTO
    activation: str = AUTO
    rotary: str = AUTO
    attention: str = AUTO
    dropout: str = AUTO
    cross_entropy: str = AUTO
    optimizer: str = AUTO


DEFAULT = Backends()


def chosen(kernels: Any) -> Backends:
    """The config section `kernels` by family: `backend` where a family's own key is null."""
    own = {field.name: getattr(kernels, field.name) or kernels.backend for field in fields(Backends)}
    return Backends(**{name: TORCH if value == _SDPA else value for name, value in own.items()})


def native_families(backends: Backends) -> frozenset[str]:
    """The families that run natively on CPU tensors, on a machine like this one."""
    if not _is_built():
        return frozenset()
    return frozenset(name for name, value in asdict(backends).items() if value in (AUTO, FUSED))


def _is_built() -> bool:
    """Whether the native library is there. It is not loaded for that: planning needs no torch, and torch comes first."""
    try:
        return find_spec("trilith._kernels") is not None
    except ImportError:  # whoever looks for modules refuses this one
        return False
