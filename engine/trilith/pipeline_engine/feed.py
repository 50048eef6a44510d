"""Microbatches from a user's iterator, and what crosses between stages for them: agreed once a step.

Shapes may change from step to step, but only the rank of the first stage sees them before the step begins. It numbers
the kinds of input that it meets and tells the other ranks of its pipeline the number: one integer a step. A new number
makes them find all boundaries, by one chain of forwards without gradients; the others they know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilith import comm
from trilith.errors import TrilithError
from trilith.models.layer_stage import SCALARS, Form, LayerBatch, LayerStage
from trilith.models.structure import map_tensors, put_together, take_apart
from trilith.pipeline.stage import PipelineStage
from trilith.pipeline.transport import Boundary
from trilith.stepping.base import StepBatch
from trilith.topology import Topology

_NO_MORE_DATA = -1
_ENDED = "data_iter: ended before the step; it must yield gradient_accumulation_steps microbatches for each"


@dataclass(frozen=True)
class Crossing:
    """What crosses for one kind of input: `forms[s]` and `boundaries[s]` lie between stages s and s + 1."""

    forms: tuple[Form, ...]
    boundaries: tuple[Boundary, ...]


class Agreement:
    """One pipeline's knowledge of what crosses; all its ranks must make the same calls."""

    def __init__(self, stages: Mapping[int, PipelineStage], placement: tuple[int, ...], topology: Topology) -> None:
        self._stages, self._placement, self._topology = stages, placement, topology
        self._numbers: dict[str, int] = {}  # on the rank of the first stage: kind of input -> its number
        self._known: list[Crossing] = []
        self._sending: tuple[Tensor, comm.Handle] | None = None

    def agree(self, kind: str | None, inputs: Any) -> Crossing:
        """What crosses for a step whose inputs are of `kind`; the rank of the first stage gives it (None: no data left).

        `inputs`: those of a microbatch, there. Raises TrilithError on every rank where no data is left.
        """
        source = self._placement[0]
        number = torch.empty(1, dtype=torch.int64, device=self._topology.device)
        if 0 in self._stages:
            if self._sending is not None:
                self._sending[1].wait()
            number.fill_(_NO_MORE_DATA if kind is None else self._numbers.setdefault(kind, len(self._numbers)))
            self._sending = (number, comm.broadcast(number, source, self._topology.pp, async_op=True))
        else:
            comm.broadcast(number, source, self._topology.pp)
        found = int(number)
        if found == _NO_MORE_DATA:
            raise TrilithError(_ENDED)
        if found == len(self._known):
            self._known.append(self._discover(inputs))
        return self._known[found]

    def _discover(self, inputs: Any) -> Crossing:
        """Pass one microbatch through all stages, with zeros for the floating-point tensors between them."""
        forms: list[Form] = []
        boundaries: list[Boundary] = []
        device, value = self._topology.device, inputs
        for stage, owner in enumerate(self._placement[:-1]):
            tensors: list[Tensor] = []
            message: Any = None
            if stage in self._stages:
                outputs, form, tensors, scalars = _probe(self._stages[stage], value, device)
                specs = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in outputs.items()}
                message = {"form": form, "specs": specs, "scalars": scalars}
            message = comm.broadcast_object(message, owner, self._topology.pp, device)
            boundary = {
                name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in message["specs"].items()
            }
            tensors = tensors or [
                torch.zeros(shape, dtype=dtype, device=device)
                for name, (shape, dtype) in boundary.items()
                if name != SCALARS
            ]
            for index, tensor in enumerate(tensors):
                if tensor.is_floating_point():
                    tensors[index] = torch.zeros_like(tensor)
                else:  # an index, a length or a mask: zeros might fit nowhere
                    tensors[index] = tensor.contiguous()
                    comm.broadcast(tensors[index], owner, self._topology.pp)
            forms.append(message["form"])
            boundaries.append(boundary)
            value = put_together(message["form"], tensors, message["scalars"])
        return Crossing(tuple(forms), tuple(boundaries))


def _probe(
    stage: PipelineStage, value: Any, device: torch.device
) -> tuple[dict[str, Tensor], Form, list[Tensor], list[Any]]:
    """What a stage makes of an input, taken apart; random generators and buffers stay as they were."""
    module = stage.module
    assert isinstance(module, LayerStage)
    stage.parameters.gather()
    with torch.no_grad(), _unchanged(module, device):
        made = module.run(value)
    stage.parameters.release()
    outputs, form = module.handed_on(made)
    tensors, scalars, _ = take_apart(made, module.last_layer)
    return outputs, form, tensors, scalars


@contextmanager
def _unchanged(module: LayerStage, device: torch.device) -> Iterator[None]:
    """Give random generators and the module's buffers back as they were (running statistics, counters)."""
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    for owner, name, buffer, before in buffers:
        buffer.copy_(before)
        owner._buffers[name] = buffer


class BatchFeed:
    """Reads each step's microbatches, (inputs, labels) each, on the ranks of the first and the last stage."""

    def __init__(self, stages: Mapping[int, PipelineStage], placement: tuple[int, ...], topology: Topology) -> None:
        self._topology, self._num_microbatches = topology, 0
        self._is_first, self._is_last = 0 in stages, len(placement) - 1 in stages
        self._agreement = Agreement(stages, placement, topology)
        self._source: Iterator[Any] | None = None
        self._trains = True
        self._fixed: tuple[str | None, Crossing] | None = None
        self._is_span = False

    def begin(self, source: Any, num_microbatches: int, *, trains: bool, is_span: bool = False) -> None:
        """Read from `source` from now on, so many microbatches a step.

        `is_span`: no rank waits for others between steps, so all have the boundaries that are agreed for the first.

        Raises TrilithError on a rank that must read and got nothing to read from.
        """
        if (self._is_first or self._is_last) and source is None:
            raise TrilithError(
                "data_iter = None: the ranks of the first and of the last stage read microbatches (inputs, labels) from it"
            )
        self._source = None if source is None else iter(source)
        self._num_microbatches, self._trains = num_microbatches, trains
        self._is_span, self._fixed = is_span, None

    def step(self, index: int, *, per_microbatch: bool = False) -> StepBatch:
        """The next microbatches; see `Feed`. There are no tokens to count."""
        pairs = self._read()
        kind = self._kind(pairs) if self._is_first else None
        fixed = self._fixed
        if fixed is None:
            crossing = self._agreement.agree(kind, pairs[0][0] if pairs and self._is_first else None)
            self._fixed = (kind, crossing) if self._is_span else None
        else:
            crossing = fixed[1]
        if pairs is None and (self._is_first or self._is_last):
            raise TrilithError(_ENDED)
        if fixed is not None and kind != fixed[0]:
            raise TrilithError(
                f"step {index + 1}: inputs are {kind}, in the step before they were {fixed[0]}: an asynchronous schedule "
                "has steps of one shape until the pipeline is drained"
            )
        weight = 1.0 / (self._topology.dp.size * (1 if per_microbatch else self._num_microbatches))
        batches = [
            LayerBatch(inputs, labels, crossing.forms, weight)
            for inputs, labels in pairs or [(None, None)] * self._num_microbatches
        ]
        return StepBatch(batches, crossing.boundaries, 0)

    def _read(self) -> list[tuple[Any, Any]] | None:
        """This rank's parts of the step's microbatches, on its device; None where it reads none or none are left."""
        if not (self._is_first or self._is_last):
            return None
        assert self._source is not None, "begin comes first"
        pairs = []
        for _ in range(self._num_microbatches):
            try:
                pair = next(self._source)
            except StopIteration:
                return None
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TrilithError(
                    f"data_iter: yielded a {type(pair).__name__}"
                    + (f" of {len(pair)}" if isinstance(pair, (tuple, list)) else "")
                    + "; a microbatch is (inputs, labels)"
                )
            inputs = map_tensors(self._place, pair[0]) if self._is_first else None
            pairs.append((inputs, map_tensors(self._place, pair[1]) if self._is_last else None))
        return pairs

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._topology.device, non_blocking=True)

    def _kind(self, pairs: list[tuple[Any, Any]] | None) -> str | None:
        """What the boundaries of a step may depend on, as text. Raises TrilithError where microbatches differ in it."""
        if pairs is None:
            return None
        kinds = [self._kind_of(inputs) for inputs, _ in pairs]
        for number, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise TrilithError(
                    f"data_iter: microbatch {number} of the step has inputs {kind}, the first has {kinds[0]}: shapes may "
                    "change from step to step, not within one (drop_last=True leaves out a smaller last batch)"
                )
        return kinds[0]

    def _kind_of(self, inputs: Any) -> str:
        tensors, scalars, form = take_apart(inputs, "the inputs")
        specs = [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors]
        numbers = [s for s in scalars if not isinstance(s, float)]  # shapes may depend on these
        return json.dumps({"form": form, "tensors": specs, "numbers": numbers, "trains": self._trains})
