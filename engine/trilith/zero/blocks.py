"""Recompute for the blocks of any module: hooks around a block's call let it keep nothing for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trilith.errors import TrilithError
from trilith.layers.recompute import Surroundings, forgetting
from trilith.models.structure import map_tensors


class BlockRecompute:
    """Makes blocks run again in backward, with the random numbers and the autocast of their forward (`layers.recompute`).

    Tensors among a block's arguments are kept, also in tuples, lists and dicts; all else is handed in again as it is.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], device: torch.device) -> None:
        self._device = device
        self._running: list[AbstractContextManager[Any] | None] = []
        self._num_again = 0
        self._hooks: list[RemovableHandle] = []
        for name, block in blocks.items():
            self._attach(name, block)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def _attach(self, name: str, block: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            context: AbstractContextManager[Any] | None = None
            if torch.is_grad_enabled() and not self._num_again:
                tensors, rebuild = _taken_apart((args, kwargs))
                context = forgetting(self._again(name, module, rebuild), *tensors)
                context.__enter__()
            self._running.append(context)

        def after(module: nn.Module, args: object, output: object) -> None:
            context = self._running.pop() if self._running else None
            if context is not None:
                context.__exit__(None, None, None)

        self._hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(block.register_forward_hook(after, always_call=True))

    def _again(self, name: str, block: nn.Module, rebuild: Callable[..., Any]) -> Callable[..., Any]:
        surroundings = Surroundings(self._device)

        def run(*tensors: Tensor) -> Any:
            args, kwargs = rebuild(*tensors)
            self._num_again += 1
            try:
                with surroundings.again():
                    return block(*args, **kwargs)
            except AssertionError as error:
                raise TrilithError(
                    f"activation_checkpointing.recompute = 'full': block {name} did not do in backward what it did in "
                    f"forward ({error}). Does it change something, such as a key/value cache? Switch that off while "
                    "training (use_cache=False), or recompute off"
                ) from error
            finally:
                self._num_again -= 1

        return run


def _taken_apart(value: Any) -> tuple[list[Tensor], Callable[..., Any]]:
    """The tensors of a value in order, and what makes the value of such tensors again."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    form = map_tensors(take, value)  # type: ignore[arg-type]
    return tensors, lambda *others: _filled(form, others)


class _Place:
    """Where a tensor was."""

    def __init__(self, number: int) -> None:
        self.number = number


def _filled(form: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(form, _Place):
        return tensors[form.number]
    if type(form) in (tuple, list):
        return type(form)(_filled(member, tensors) for member in form)
    if type(form) is dict:
        return {key: _filled(member, tensors) for key, member in form.items()}
    return form
