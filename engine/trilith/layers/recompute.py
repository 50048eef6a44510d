"""Recompute: forget a part's activations in forward and compute them again in backward (Chen et al. 2016).

`full` forgets each block, `selective` only the attention core, whose activations are large and cheap to make again
(Korthikanti et al. 2022, section 5). Random streams are counted, not drawn (`kernels/stream.py`), so the second forward
equals the first bit for bit without saving generator states. A recomputed part repeats its communication, in the same
order on all ranks of a group, because their graphs are the same.

It works as torch.utils.checkpoint does without reentrance: hooks on saved tensors keep a number in place of a tensor,
and the first that is asked for makes all of them again. That function itself would import torch's compiler in each
rank, at the first call and for seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SELECTIVE, FULL = "selective", "full"


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` without keeping what it saves for backward, but for tensors among `arguments`.

    `function` is called again, in backward, until it has saved the same tensors; it must be deterministic and change
    nothing. Gradients reach arguments and whatever parameters it uses.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    with forgetting(function, *arguments):
        return function(*arguments)


def forgetting(function: Callable[..., Any], *arguments: Any) -> saved_tensors_hooks:
    """The context in which `function(*arguments)` is to be called to be `recomputed`."""
    part = _Part(function, arguments)
    return saved_tensors_hooks(part.forget, part.remember)


class Surroundings:
    """What a user's module depends on besides its arguments, as it is now: torch's random generators and autocast."""

    def __init__(self, device: torch.device | None = None) -> None:
        """`device`: whose generator counts, too, if it is a GPU."""
        self._device = device if device is not None and device.type == "cuda" else None
        self._on_cpu = torch.get_rng_state()
        self._on_device = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._kind = "cpu" if self._device is None else "cuda"
        self._autocast = (torch.is_autocast_enabled(self._kind), torch.get_autocast_dtype(self._kind))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within it everything is as it was; afterwards as before."""
        enabled, dtype = self._autocast
        with (
            torch.random.fork_rng(devices=[] if self._device is None else [self._device]),
            torch.autocast(self._kind, dtype=dtype, enabled=enabled),
        ):
            torch.set_rng_state(self._on_cpu)
            if self._on_device is not None and self._device is not None:
                torch.cuda.set_rng_state(self._on_device, self._device)
            yield


class _Keep(torch.autograd.Function):
    """Saves tensors in its node, as autograd saves them: outer hooks see them and changes in place are noticed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("no gradient flows here")


class _Complete(Exception):
    """All that forward saved is there again; the rest of the function need not run."""


class _Part:
    """One call: what it saved, by number, and how to make it again."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._others = [None if isinstance(a, Tensor) else a for a in arguments]
        self._places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        self._needs_gradient = [arguments[i].requires_grad for i in self._places]
        anchor = torch.empty(0, requires_grad=True)
        # The result is kept for the sake of its node, which torch 2.11 empties as soon as no tensor comes from it.
        self._kept: Any = _Keep.apply(anchor, *(arguments[i] for i in self._places))
        self._saved: list[tuple[torch.Size, torch.dtype]] = []
        self._tensors: dict[int, Tensor] = {}

    def forget(self, tensor: Tensor) -> int:
        """A number in place of a tensor that is saved in forward."""
        self._saved.append((tensor.shape, tensor.dtype))
        return len(self._saved) - 1

    def remember(self, number: int) -> Tensor:
        """The tensor again. It is let go at once: what backward has used needs no memory until the end of the part."""
        if number not in self._tensors:
            self._recompute()
        return self._tensors.pop(number)

    def _recompute(self) -> None:
        arguments = list(self._others)
        tensors = zip(self._places, self._kept.grad_fn.saved_tensors, self._needs_gradient, strict=True)
        for place, tensor, needs_gradient in tensors:
            arguments[place] = tensor.detach().requires_grad_(needs_gradient)
        made: list[Tensor] = []

        def collect(tensor: Tensor) -> None:
            expected = self._saved[len(made)]
            assert (tensor.shape, tensor.dtype) == expected, f"{tensor.shape} {tensor.dtype}, in forward {expected}"
            made.append(tensor.detach())
            if len(made) == len(self._saved):
                raise _Complete

        try:
            with torch.enable_grad(), saved_tensors_hooks(collect, _never):
                self._function(*arguments)
        except _Complete:
            pass
        assert len(made) == len(self._saved), f"{len(made)} tensors were saved, in forward {len(self._saved)}"
        self._tensors = dict(enumerate(made))


def _never(packed: Any) -> Tensor:
    raise AssertionError("the graph of a recomputation is not used")
