"""Microbatches from a user's iterator, and what crosses between stages for them: agreed once a step.

Shapes may change from step to step, but only the rank of the first stage sees them before the step begins. It numbers
the kinds of input that it meets and tells the other ranks of its pipeline the number: one integer a step. A new number
makes them find all boundaries, by one chain of forwards without gradients; the others they know.

At ZeRO stage 3 these forwards need weights that are gathered over the data ranks, and each data rank's pipeline meets its
own kinds of input. So the data ranks tell each other once a step whether one of them finds boundaries: then all have whole
weights while it does, whether they find any themselves or not.

What is wrong with the data one rank alone can see. The first step of a span begins on an empty pipeline: there all ranks
of the world tell each other whether they have it, and all raise where one has not. Later steps wait for nobody: there the
rank of the first stage tells its pipeline (at stage 3 with it those of all data ranks), and the error of another rank is
its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
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
from trilith.pipeline_engine.keeper import StateKeeper
from trilith.stepping.base import StepBatch
from trilith.topology import Topology
from trilith.zero.sharded import ShardedModel

KINDS_KEPT = 256  # kinds of input whose boundaries are remembered; one that was forgotten is found out again
_NO_MORE_DATA, _FAILED = -1, -2
_ENDED = "data_iter: ended before the step; it must yield gradient_accumulation_steps microbatches for each"


@dataclass(frozen=True)
class Crossing:
    """What crosses for one kind of input: `forms[s]` and `boundaries[s]` lie between stages s and s + 1."""

    forms: tuple[Form, ...]
    boundaries: tuple[Boundary, ...]


class Agreement:
    """One pipeline's knowledge of what crosses; all its ranks must make the same calls, and so must the data ranks of
    `sharded` where weights are parted.

    Kinds are numbered as they come; of the last `KINDS_KEPT` numbers all ranks remember what crosses.
    """

    def __init__(
        self,
        stages: Mapping[int, PipelineStage],
        placement: tuple[int, ...],
        topology: Topology,
        sharded: ShardedModel | None = None,
    ) -> None:
        self._stages, self._placement, self._topology, self._sharded = stages, placement, topology, sharded
        self._numbers: dict[str, int] = {}  # on the rank of the first stage: kind of input -> its number
        self._known: dict[int, Crossing] = {}
        self._next_number = 0
        self._sending: tuple[Tensor, comm.Handle] | None = None

    def agree(self, kind: str | None, inputs: Any, problem: Exception | None = None) -> Crossing:
        """What crosses for a step whose inputs are of `kind`; the rank of the first stage gives it.

        `inputs`: those of a microbatch, there. `problem`: why this rank has no data. It is raised once the others have
        been told, if this is the rank of the first stage; a TrilithError is raised on all that are told.
        """
        found = self._number_of(kind, problem)
        others, gathers = self._ask_data_ranks(found)
        if problem is not None:
            raise problem
        if found < 0:
            raise TrilithError(_told(found, "the rank of the first stage"))
        if others < 0:
            raise TrilithError(_told(others, "a rank of the first stage"))
        with gathers:
            if found == self._next_number:
                self._remember(kind, self._discover(inputs))
        return self._known[found]

    def _number_of(self, kind: str | None, problem: Exception | None) -> int:
        """The number of this pipeline's kind, from the rank of the first stage, or the code of its problem."""
        source = self._placement[0]
        number = torch.empty(1, dtype=torch.int64, device=self._topology.device)
        if 0 in self._stages:
            if self._sending is not None:
                self._sending[1].wait()
            if problem is None:
                assert kind is not None
                number.fill_(self._numbers.get(kind, self._next_number))
            else:
                number.fill_(_code_of(problem))
            self._sending = (number, comm.broadcast(number, source, self._topology.pp, async_op=True))
        else:
            comm.broadcast(number, source, self._topology.pp)
        return int(number)

    def _ask_data_ranks(self, found: int) -> tuple[int, AbstractContextManager[None]]:
        """The worst problem (a code; 0: none) of any data rank, and what to find boundaries in.

        Only at stage 3 does anybody ask; then every rank of the pipeline, also one that has no parted weights itself.
        """
        sharded = self._sharded
        if sharded is None:
            return 0, nullcontext()
        says = -found if found < 0 else 0
        answers = torch.tensor([says, found == self._next_number], dtype=torch.int64, device=self._topology.device)
        comm.all_reduce(answers, self._topology.dp, op="max").wait()
        problem, discovers = answers.tolist()
        return -problem, sharded.gathered() if discovers and not problem else nullcontext()

    def _remember(self, kind: str | None, crossing: Crossing) -> None:
        """Give the next number, and forget that of long ago: every rank the same one."""
        number = self._next_number
        self._next_number += 1
        self._known[number] = crossing
        self._known.pop(number - KINDS_KEPT, None)
        if kind is not None:
            self._numbers[kind] = number
            self._numbers = {kind: n for kind, n in self._numbers.items() if n > number - KINDS_KEPT}

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
    keeper = StateKeeper([module], device)
    keeper.save()
    with torch.no_grad():
        made = module.run(value)
    keeper.restore()
    outputs, form = module.handed_on(made)
    tensors, scalars, _ = take_apart(made, module.last_layer)
    return outputs, form, tensors, scalars


class _Ended(TrilithError):
    """The user's iterator has no more."""


def _code_of(problem: Exception | None) -> int:
    """What other ranks are told of it; 0: nothing."""
    return 0 if problem is None else _NO_MORE_DATA if isinstance(problem, _Ended) else _FAILED


def _told(code: int, who: str) -> str:
    """The error of a rank that was told of another one's."""
    if code == _NO_MORE_DATA:
        return _ENDED
    return f"data_iter: {who} could not read its microbatches; its own error says why. Mend what data_iter yields there"


class BatchFeed:
    """Reads each step's microbatches, (inputs, labels) each, on the ranks of the first and the last stage."""

    def __init__(
        self,
        stages: Mapping[int, PipelineStage],
        placement: tuple[int, ...],
        topology: Topology,
        sharded: ShardedModel | None = None,
    ) -> None:
        """`sharded`: the rank's weights at ZeRO stage 3; None on all ranks at others, where they are always whole."""
        self._topology, self._num_microbatches = topology, 0
        self._is_first, self._is_last = 0 in stages, len(placement) - 1 in stages
        self._agreement = Agreement(stages, placement, topology, sharded)
        self._given: Any = None
        self._source: Iterator[Any] | None = None
        self.has_begun = False  # whether a step was given since `begin`
        self._trains = True
        self._fixed: tuple[str | None, Crossing] | None = None
        self._is_span = False

    def begin(self, source: Any, num_microbatches: int, *, trains: bool, is_span: bool = False) -> None:
        """Read from `source` from now on, so many microbatches a step; the pipeline is empty.

        `is_span`: no rank waits for others between steps, so all have the boundaries that are agreed for the first.
        """
        self._given, self._source = source, None
        self._num_microbatches, self._trains = num_microbatches, trains
        self._is_span, self._fixed = is_span, None
        self.has_begun = False

    def step(self, index: int, *, per_microbatch: bool = False) -> StepBatch:
        """The next microbatches; see `Feed`. There are no tokens to count.

        Raises TrilithError where there are none or they do not fit, on the ranks that this module's text says; an error
        of the user's iterator is raised as it is, on its rank.
        """
        pairs, problem = self._try_to_read()
        if not self.has_begun:
            self._tell_everyone(problem)
        crossing = self._crossing(index, pairs, problem)
        if problem is not None:
            raise problem
        self.has_begun = True
        weight = 1.0 / (self._topology.data_size * (1 if per_microbatch else self._num_microbatches))
        batches = [
            LayerBatch(inputs, labels, crossing.forms, weight)
            for inputs, labels in pairs or [(None, None)] * self._num_microbatches
        ]
        return StepBatch(batches, crossing.boundaries, 0)

    def _crossing(self, index: int, pairs: list[tuple[Any, Any]] | None, problem: Exception | None) -> Crossing:
        """What crosses in the step: agreed with the pipeline, or as it was agreed for the span."""
        inputs = [inputs for inputs, _ in pairs or ()] if self._is_first else []
        kind = self._kind_of(inputs[0]) if inputs else None
        fixed = self._fixed
        if fixed is None:
            crossing = self._agreement.agree(kind, inputs[0] if inputs else None, problem if self._is_first else None)
            self._fixed = (kind, crossing) if self._is_span else None
            return crossing
        if kind != fixed[0] and problem is None:
            raise TrilithError(
                f"step {index + 1}: inputs are {kind}, in the step before they were {fixed[0]}: an asynchronous schedule "
                "has steps of one shape until the pipeline is drained. Give steps of another shape to another call"
            )
        return fixed[1]

    def _tell_everyone(self, problem: Exception | None) -> None:
        """Raise on every rank where one has a problem: its own there, elsewhere a word of it."""
        codes = torch.zeros(self._topology.world_size, dtype=torch.int64)
        mine = torch.tensor([_code_of(problem)])
        comm.all_gather(codes, mine, self._topology.control).wait()
        if problem is not None:
            raise problem
        found = codes.tolist()
        if any(found):
            rank = found.index(min(found))
            raise TrilithError(_told(found[rank], f"rank {rank}"))

    def _try_to_read(self) -> tuple[list[tuple[Any, Any]] | None, Exception | None]:
        """This rank's parts of the step's microbatches, on its device, or why there are none; (None, None): reads none."""
        if not (self._is_first or self._is_last):
            return None, None
        try:
            return self._read(), None
        except Exception as error:  # whatever the user's iterator raises: the others must hear of it first
            return None, error

    def _read(self) -> list[tuple[Any, Any]]:
        if self._source is None:
            if self._given is None:
                raise TrilithError(
                    "data_iter = None: the ranks of the first and of the last stage read microbatches (inputs, labels) "
                    "from it. Give it there"
                )
            self._source = iter(self._given)
        pairs = []
        for _ in range(self._num_microbatches):
            try:
                pair = next(self._source)
            except StopIteration:
                raise _Ended(_ENDED) from None
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TrilithError(
                    f"data_iter: yielded a {type(pair).__name__}"
                    + (f" of {len(pair)}" if isinstance(pair, (tuple, list)) else "")
                    + "; a microbatch is (inputs, labels)"
                )
            inputs = map_tensors(self._place, pair[0]) if self._is_first else None
            pairs.append((inputs, map_tensors(self._place, pair[1]) if self._is_last else None))
        if self._is_first:
            self._require_one_kind([inputs for inputs, _ in pairs])
        return pairs

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._topology.device, non_blocking=True)

    def _require_one_kind(self, inputs: list[Any]) -> None:
        """Raises TrilithError where microbatches differ in what the boundaries of a step may depend on."""
        kinds = [self._kind_of(value) for value in inputs]
        for number, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise TrilithError(
                    f"data_iter: microbatch {number} of the step has inputs {kind}, the first has {kinds[0]}: shapes may "
                    "change from step to step, not within one (drop_last=True leaves out a smaller last batch)"
                )

    def _kind_of(self, inputs: Any) -> str:
        """What the boundaries of a step may depend on, as text.

        Whole numbers are part of it, for a layer may make a shape of them: one that is different in every step makes
        every step find its boundaries anew.
        """
        tensors, scalars, form = take_apart(inputs, "the inputs")
        specs = [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors]
        numbers = [s for s in scalars if not isinstance(s, float)]  # shapes may depend on these
        return json.dumps({"form": form, "tensors": specs, "numbers": numbers, "trains": self._trains})
