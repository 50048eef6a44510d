"""The form of an op that torch.compile, fake and meta tensors take: a schema, an implementation, shapes, a backward.

Eager calls do not come through here, because the dispatcher costs three times what an autograd.Function does. Schemas live
in the namespace `trilith`; a `torch.library.Library` must live as long as its ops do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("trilith", "DEF")


def define(schema: str, run: Callable[..., Any], like: Callable[..., Any]) -> Any:
    """Define an op: `run` computes natively, `like` makes empty results of the same shapes, dtypes and devices.

    Returns the op as a callable, to which `differentiate` may give a backward.
    """
    name = _LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"trilith::{name}", like, lib=_LIBRARY)
    return getattr(torch.ops.trilith, name)


def differentiate(name: str, remember: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give the op `name` a backward: `remember(ctx, inputs, output)` saves, `backward(ctx, *gradients)` uses ops only."""
    torch.library.register_autograd(f"trilith::{name}", backward, setup_context=remember, lib=_LIBRARY)
