"""A stage of a user's model: a run of its layers as one module, with its parameters declared as ZeRO wants them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trilith.errors import TrilithError
from trilith.layers.recompute import Surroundings, recomputed
from trilith.models.base import LocalParameter
from trilith.models.pipeline_model import DeclaredLayer, LayerSpec, ParameterOfLayer, PipelineModel, TiedLayerSpec
from trilith.models.structure import (
    Form,
    put_together,
    scalars_from_tensor,
    scalars_to_tensor,
    take_apart,
)
from trilith.rng import stream_key
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole

Holders = Mapping[str, tuple[int, ...]]  # canonical name of a tied parameter -> the stages that hold a copy, ascending
SCALARS = "scalars"  # the name, at a boundary, of the numbers among what a stage hands on


@dataclass(frozen=True)
class LayerBatch:
    """One microbatch: `inputs` for the first stage, `labels` for the last, None elsewhere.

    `forms[s]` is the form of what stage s hands to the next, `loss_weight` the microbatch's share of the step's loss.
    """

    inputs: Any
    labels: Any
    forms: Sequence[Form]
    loss_weight: float


class LayerCall(nn.Module):
    """A layer as its stage calls it, which need not be `layer(value)`: what wants to know when it is used hooks this."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, value: Any) -> Any:
        """The output of the layer."""
        return self._function(value)


class LayerStage(nn.Module):
    """Layers in a row, children named by their index in the model; the last stage computes the loss.

    `local_parameters` describes each floating-point parameter, in the order of layers.
    """

    def __init__(self, index: int, model: PipelineModel, layers: Mapping[int, Any], holders: Holders) -> None:
        """`layers`: by index in the model, built; `holders`: where tied parameters have copies."""
        super().__init__()
        self.index, self.recompute = index, False
        self._specs = {i: model.layers[i] for i in layers}
        self._functions = {i: layer for i, layer in layers.items() if not isinstance(layer, nn.Module)}
        for i, layer in layers.items():
            if isinstance(layer, nn.Module):
                self.add_module(str(i), layer)
        # In no module's list of children: parameters have one name.
        self._calls = {i: LayerCall(partial(self._run_layer, i)) for i in layers}
        is_last = max(layers) == len(model.layers) - 1
        self._loss_fn = model.loss_fn if is_last else None
        declared = {p.name: p for i in layers for p in model.declared[i].parameters}
        self._tie(declared)
        self.local_parameters = tuple(
            _local_parameter(declared[name], self.index, holders)
            for name, parameter in self.named_parameters()
            if parameter.is_floating_point()
        )

    def forward(self, inputs: Mapping[str, Tensor], batch: LayerBatch) -> dict[str, Tensor]:
        """Run the layers on a microbatch. `inputs`: what the stage before handed on, by name; none for the first.

        Returns what goes to the next stage, by name; on the last stage `loss`, a scalar. Raises TrilithError where a
        layer returned something of another form than was agreed for the step.
        """
        value = batch.inputs
        if self.index:
            form = batch.forms[self.index - 1]
            tensors = [inputs[name] for name in inputs if name != SCALARS]
            scalars = scalars_from_tensor(inputs[SCALARS], form) if SCALARS in inputs else []
            value = put_together(form, tensors, scalars)
        value = self.run(value)
        if self._loss_fn is not None:
            return {"loss": self._loss(value, batch)}
        outputs, form = self.handed_on(value)
        if form != batch.forms[self.index]:
            raise TrilithError(
                f"{self.last_layer}: returned {form}; the first microbatch like it made it return "
                f"{batch.forms[self.index]}. What a layer returns must follow from the shapes of the step's inputs"
            )
        return outputs

    def run(self, value: Any) -> Any:
        """The output of the stage's layers."""
        for index in self._specs:
            if self.recompute and torch.is_grad_enabled():
                value = _recomputed_layer(self, index, value)
            else:
                value = self.call(index, value)
        return value

    def call(self, index: int, value: Any) -> Any:
        """The output of one layer."""
        return self._calls[index](value)

    def _run_layer(self, index: int, value: Any) -> Any:
        layer, spec = self._layer(index), self._specs[index]
        return spec.call(layer, value) if isinstance(spec, LayerSpec) else layer(value)

    def layers(self) -> dict[str, nn.Module]:
        """Its layers that are modules, by their index in the model."""
        return {name: layer for name, layer in self._modules.items() if name.isdigit() and layer is not None}

    def home_of(self, name: str) -> str:
        """The path of the layer that the parameter called `name` lies in."""
        return name.partition(".")[0]

    def homes(self) -> tuple[str, ...]:
        """The layers in the order of forward."""
        return tuple(map(str, self._specs))

    def home(self, path: str) -> nn.Module:
        """What calls the layer at `path`."""
        return self._calls[int(path)]

    def weightless_backwards(self) -> tuple[str, ...]:
        """Layers whose backward reads no weights."""
        plain = {
            name: layer for name, layer in self.layers().items() if type(self._specs[int(name)]) is not TiedLayerSpec
        }
        return tuple(name for name, layer in plain.items() if is_lookup(layer))

    def handed_on(self, value: Any) -> tuple[dict[str, Tensor], Form]:
        """What goes to the next stage, by name, and its form."""
        tensors, scalars, form = take_apart(value, self.last_layer)
        outputs = {str(i): tensor for i, tensor in enumerate(tensors)}
        if scalars:
            device = tensors[0].device if tensors else torch.device("cpu")
            outputs[SCALARS] = scalars_to_tensor(scalars, device)
        return outputs, form

    @property
    def last_layer(self) -> str:
        """The layer whose output leaves the stage, in words."""
        index = max(self._specs)
        layer = self._layer(index)
        return f"layer {index} ({getattr(layer, '__name__', type(layer).__name__)})"

    def _layer(self, index: int) -> Any:
        return self._functions[index] if index in self._functions else self.get_submodule(str(index))

    def _loss(self, output: Any, batch: LayerBatch) -> Tensor:
        """The microbatch's share of the step's loss; in 16 bits a small weight would round it."""
        assert self._loss_fn is not None
        loss = self._loss_fn(output, batch.labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TrilithError(f"loss_fn returned {shape}: it must return a scalar, the mean over the microbatch")
        wide = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
        return wide.reshape(()) * batch.loss_weight

    def _tie(self, declared: Mapping[str, ParameterOfLayer]) -> None:
        """Let tied parameters of this stage be one object."""
        named = {
            f"{index}.{name}": (layer, parameter)
            for index, layer in self.layers().items()
            for name, parameter in layer.named_parameters()
            if parameter.is_floating_point()
        }
        found = {name: tuple(parameter.shape) for name, (_, parameter) in named.items()}
        expected = {name: p.shape for name, p in declared.items()}
        if found != expected:
            name = min(name for name in {**found, **expected} if found.get(name) != expected.get(name))
            raise TrilithError(
                f"parameter {name}: has shape {found.get(name)}, in the declaration {expected.get(name)}: a LayerSpec "
                "must build the same layer every time"
            )
        first: dict[str, nn.Parameter] = {}
        for name, (layer, parameter) in named.items():
            kept = first.setdefault(declared[name].canonical, parameter)
            if kept is not parameter:
                _replace(layer, parameter, kept)


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in another one's place, under every name that it has."""
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter is old:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, new)


def _local_parameter(parameter: ParameterOfLayer, stage: int, holders: Holders) -> LocalParameter:
    """The parameter whole on its rank. Tied ones are units of their own: their copies must have one layout."""
    shape, canonical = parameter.shape, parameter.canonical
    copies = holders.get(canonical)
    piece = Piece(whole(shape), 0, contiguous_strides(shape), copies.index(stage) if copies else 0)
    spec = ShardSpec(canonical, shape, (piece,))
    unit = canonical if copies else unit_of(int(parameter.name.partition(".")[0]))
    # Norm weights and biases are vectors: decay is for matrices, unless a parameter group says otherwise.
    return LocalParameter(parameter.name, shape, (spec,), (), unit, len(shape) > 1, (), 0)


def is_lookup(module: nn.Module) -> bool:
    """Whether a module only looks up rows of its weight, which its backward does not read."""
    return type(module) is nn.Embedding and module.max_norm is None


def unit_of(layer: int) -> str:
    """The flat unit of what a layer does not share."""
    return f"layers.{layer}"


def holders_of(declared: Sequence[DeclaredLayer], cuts: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The stages that hold each tied parameter, also where that is but one: a layout must not change the units."""
    names: dict[str, list[str]] = {}
    stages: dict[str, set[int]] = {}
    for stage, (lo, hi) in enumerate(cuts):
        for layer in declared[lo:hi]:
            for parameter in layer.parameters:
                names.setdefault(parameter.canonical, []).append(parameter.name)
                stages.setdefault(parameter.canonical, set()).add(stage)
    return {name: tuple(sorted(stages[name])) for name, members in names.items() if len(members) > 1}


def build_layer_stages(
    model: PipelineModel, cuts: Sequence[tuple[int, int]], here: Sequence[int], holders: Holders, seed: int
) -> dict[int, LayerStage]:
    """The stages `here` of a rank, their layers built on the CPU: the layer i of each from a generator seeded by i.

    A module that two stages of the rank hold is copied for the second: each stage has storage of its own.
    """
    stages: dict[int, LayerStage] = {}
    taken: set[int] = set()
    for stage in here:
        layers = {index: _built(model.layers[index], index, seed, taken) for index in range(*cuts[stage])}
        stages[stage] = LayerStage(stage, model, layers, holders)
        taken |= {id(parameter) for parameter in stages[stage].parameters()}
    return stages


def _built(layer: Any, index: int, seed: int, taken: set[int]) -> Any:
    if isinstance(layer, LayerSpec):
        low, high = stream_key(seed, "layer", index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(low | high << 32)
            return layer.build()
    if isinstance(layer, nn.Module) and any(id(parameter) in taken for parameter in layer.parameters()):
        return copy.deepcopy(layer)
    return layer


def _recomputed_layer(stage: LayerStage, index: int, value: Any) -> Any:
    """The output of a layer that keeps nothing for backward; it draws the same random numbers twice."""
    tensors, scalars, form = take_apart(value, f"the input of layer {index}")
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    surroundings, is_again = Surroundings(device), False

    def run(*inputs: Tensor) -> Any:
        nonlocal is_again
        again, is_again = is_again, True
        with surroundings.again() if again else nullcontext():
            return stage.call(index, put_together(form, inputs, scalars))

    return recomputed(run, *tensors)
