"""torch.compile of one module's forward."""

from __future__ import annotations

from types import FunctionType, MethodType

import torch
from torch import nn


def compile_forward(module: nn.Module, backend: str, mode: str) -> None:
    """Compile `module.forward` as one graph for fixed shapes. Hooks of the module run outside of it, as before.

    Each module has code of its own: one of many equal blocks, whose constants differ (streams of dropout), would otherwise
    be compiled again and again under the name of the first, until torch gives up.
    """
    plain = type(module).forward
    assert isinstance(plain, FunctionType)
    code = plain.__code__.replace()
    own = FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    # The default mode has no name: with one, torch asks the backend for its options.
    named = None if mode == "default" else mode
    compiled = torch.compile(own, backend=backend, mode=named, fullgraph=True, dynamic=False)
    module.forward = MethodType(compiled, module)  # type: ignore[method-assign]
