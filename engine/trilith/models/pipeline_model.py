"""A user's own model as a list of layers: what every rank must know of all of them, before any rank builds its own.

    model = PipelineModel([LayerSpec(nn.Embedding, 1000, 64), Block(64), nn.Linear(64, 1000)], loss_fn,
                          ties=[("0.weight", "2.weight")])

A layer takes what the one before it returned, as one argument. Parameters have whole-model names, `<layer>.<name in the
layer>`. Names and roles follow DeepSpeed's PipelineModule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trilith.errors import TrilithError

Layer = Callable[[Any], Any]
# Methods that change a tensor's values only.
_WRITES = frozenset(
    [
        "normal_",
        "uniform_",
        "random_",
        "bernoulli_",
        "exponential_",
        "log_normal_",
        "cauchy_",
        "geometric_",
        "fill_",
        "zero_",
        "copy_",
        "fill_diagonal_",
        "add_",
        "sub_",
        "mul_",
        "div_",
        "pow_",
        "neg_",
        "clamp_",
        "erfinv_",
        "round_",
        "__setitem__",
    ]
)


class LayerSpec:
    """How to build a layer, on the rank that holds it only: `cls(*args, **kwargs)`.

    Every rank builds it once more, without storage, to learn its parameters. Its random numbers are drawn from a
    generator of its own, so initial values do not depend on the layout.
    """

    def __init__(self, cls: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.cls, self.args, self.kwargs = cls, args, kwargs

    def build(self) -> Layer:
        """A new layer."""
        return self.cls(*self.args, **self.kwargs)

    def call(self, layer: Layer, value: Any) -> Any:
        """The output of a layer that `build` made."""
        return layer(value)


class TiedLayerSpec(LayerSpec):
    """A layer that shares the parameters `tied_weight_attr` with all others of the same `key`.

    The other parameters are its own. `forward_fn(layer, value)` takes the place of calling the layer: an embedding can
    serve as the output projection.
    """

    def __init__(
        self,
        key: str,
        cls: Callable[..., Any],
        *args: Any,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        **kwargs: Any,
    ) -> None:
        super().__init__(cls, *args, **kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = (tied_weight_attr,) if isinstance(tied_weight_attr, str) else tuple(tied_weight_attr)

    def call(self, layer: Layer, value: Any) -> Any:
        """The output of a layer that `build` made."""
        return layer(value) if self.forward_fn is None else self.forward_fn(layer, value)


@dataclass(frozen=True)
class ParameterOfLayer:
    """One parameter: `name` is its own in the whole model, `canonical` that of the first copy, where it is tied."""

    name: str
    canonical: str
    shape: tuple[int, ...]
    trains: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class DeclaredLayer:
    """What all ranks know of a layer: `kind` is its class's name."""

    index: int
    kind: str
    parameters: tuple[ParameterOfLayer, ...]


class PipelineModel:
    """Layers in a row, and the loss at their end; a description, of which `trilith.initialize` makes an engine.

    `layers`: nn.Modules, any callables, LayerSpecs. `loss_fn(output, labels)` is a scalar mean over the microbatch.
    `ties`: groups of whole-model names of parameters that are one, e.g. `("0.weight", "5.weight")`; a module that is in
    the list twice is tied with itself. `partition`: `uniform`, `parameters`, `type:<regex>` (layers whose class has a
    matching name are dealt evenly), or the number of layers of each stage; None: as `pipeline.partition` says. No layer
    may change what it is given in place: where a stage begins, torch refuses it. A layer may be run more often than it is
    trained (to find shapes, to begin a step anew): what it keeps between calls must be buffers, what it draws must come
    from torch's default generators, and both are then put back.
    """

    def __init__(
        self,
        layers: Iterable[Layer | LayerSpec],
        loss_fn: Callable[[Any, Any], Tensor],
        ties: Iterable[Sequence[str]] = (),
        partition: str | Sequence[int] | None = None,
    ) -> None:
        self.layers, self.loss_fn, self.partition = tuple(layers), loss_fn, partition
        self.ties = tuple(tuple(group) for group in ties)
        for index, layer in enumerate(self.layers):
            if not callable(layer) and not isinstance(layer, LayerSpec):
                raise TrilithError(
                    f"PipelineModel: layer {index} is a {type(layer).__name__}; it must be an nn.Module, a callable or a "
                    "LayerSpec"
                )

        if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
            raise TrilithError(
                f"PipelineModel: loss_fn {type(loss_fn).__name__} has parameters: what trains must be a layer of the list"
            )

    @cached_property
    def declared(self) -> tuple[DeclaredLayer, ...]:
        """Every layer with its floating-point parameters, the same on all ranks.

        Raises TrilithError for a tie that names no parameter, or parameters that differ in shape or in being trained.
        """
        modules = [_without_storage(layer) for layer in self.layers]
        named = {
            f"{index}.{name}": parameter
            for index, module in enumerate(modules)
            for name, parameter in (module.named_parameters() if isinstance(module, nn.Module) else ())
            if parameter.is_floating_point()
        }
        canonical = _canonical_names(named, [*_same_objects(named), *self._keyed_ties(), *self.ties])
        return tuple(
            DeclaredLayer(
                index,
                type(module).__name__,
                tuple(
                    ParameterOfLayer(name, canonical.get(name, name), tuple(parameter.shape), parameter.requires_grad)
                    for name, parameter in named.items()
                    if name.partition(".")[0] == str(index)
                ),
            )
            for index, module in enumerate(modules)
        )

    def _keyed_ties(self) -> list[list[str]]:
        """The groups of names that TiedLayerSpecs make."""
        groups: dict[tuple[str, str], list[str]] = {}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, TiedLayerSpec):
                for attribute in layer.tied_weight_attr:
                    groups.setdefault((layer.key, attribute), []).append(f"{index}.{attribute}")
        return list(groups.values())


class _NoValues(TorchFunctionMode):
    """Leaves out random numbers and changes in place: for some, on the meta device, torch would import its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        name, tensor = getattr(func, "__name__", ""), args[0] if args else kwargs.get("tensor")
        writes = name in _WRITES or getattr(func, "__module__", "") == nn.init.__name__
        if writes and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        if func in (torch.randn, torch.rand):
            func, kwargs = torch.empty, {key: value for key, value in kwargs.items() if key != "generator"}
        return func(*args, **kwargs)


def _without_storage(layer: Layer | LayerSpec) -> Layer:
    """The layer itself, or one built on the meta device; where a class cannot be built there, a real one."""
    if not isinstance(layer, LayerSpec):
        return layer
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"), _NoValues():
                return layer.build()
        except RuntimeError:  # NotImplementedError, for an op without a meta form, is one
            return layer.build()


def _same_objects(named: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The groups of names of one and the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in named.items():
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _canonical_names(named: Mapping[str, nn.Parameter], groups: Iterable[Sequence[str]]) -> Mapping[str, str]:
    """Tied name -> the first name of its group, in the order of the model; groups that overlap are one."""
    place = {name: index for index, name in enumerate(named)}
    first: dict[str, str] = {}
    for group in groups:
        for name in group:
            if name not in named:
                raise TrilithError(
                    f"PipelineModel: tie {tuple(group)}: there is no parameter {name!r}. Names are <layer>.<name in the "
                    f"layer>; there are {', '.join(list(named)[:20])}{', ...' if len(named) > 20 else ''}"
                )
        roots = {first.get(name, name) for name in group}
        least = min(roots, key=place.__getitem__)
        for name in named:
            if first.get(name, name) in roots and (name in first or name in group):
                first[name] = least
    for name, root in first.items():
        _require_alike(name, named[name], root, named[root])
    return MappingProxyType(first)


def _require_alike(name: str, parameter: nn.Parameter, other_name: str, other: nn.Parameter) -> None:
    for what, mine, others in (
        ("shape", tuple(parameter.shape), tuple(other.shape)),
        ("dtype", parameter.dtype, other.dtype),
        ("requires_grad", parameter.requires_grad, other.requires_grad),
    ):
        if mine != others:
            raise TrilithError(
                f"PipelineModel: {name} is tied to {other_name}, but its {what} is {mine} and not {others}: tied "
                "parameters must be alike"
            )
