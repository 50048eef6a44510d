"""Runs any checked schedule: one table from action kind to method, and the activations in flight.

Sends are asynchronous and receives are posted ahead (`transport`), so a rank waits only in front of a computation whose
inputs have not arrived. Neighbouring stages on one rank hand their tensors over without communication. Between runs
the executor is empty: no activation, gradient or message outlives a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from trilith.errors import ScheduleError
from trilith.pipeline.action import Action, Kind, Schedule
from trilith.pipeline.passes import check
from trilith.pipeline.stage import PipelineStage
from trilith.pipeline.timeline import Record
from trilith.pipeline.transport import Boundary, Channels, Inbox, Outbox, carried

Recorder = list[Record]
Tensors = dict[str, torch.Tensor]
Key = tuple[int, int]  # (stage, microbatch)


@dataclass(frozen=True)
class StepResult:
    """What a run gives back on the rank of the last stage; empty lists on all others.

    `losses`: per microbatch, in order, a detached fp64 scalar on the rank's device (nothing was waited for on a GPU).
    `outputs`: per microbatch what the last stage returned, in forward-only schedules.
    """

    losses: list[torch.Tensor]
    outputs: list[Tensors]

    def loss(self) -> float:
        """The sum of the losses, added in microbatch order in fp64; 0 without losses. Waits for the device once."""
        total = 0.0
        for value in torch.stack(self.losses).tolist() if self.losses else ():
            total += value
        return total


@dataclass(frozen=True)
class _Kept:
    """What a forward leaves for its backward. Edges, not outputs: an output's memory is free once it is sent."""

    inputs: Tensors
    edges: dict[str, GradientEdge]
    loss: torch.Tensor | None


@dataclass
class _Step:
    """The state of one run."""

    microbatches: Sequence[Any]
    boundary: Boundary
    loss_seed: torch.Tensor | float
    inbox: Inbox
    outbox: Outbox
    kept: dict[Key, _Kept] = field(default_factory=dict)
    outgoing: dict[tuple[Kind, int, int], Tensors] = field(default_factory=dict)  # made, its send comes next
    handed: dict[tuple[Kind, int, int], Tensors] = field(default_factory=dict)  # for a stage on the same rank
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensors] = field(default_factory=dict)


class Executor:
    """Runs the actions of one pipeline rank, step after step.

    `schedule` must be complete (`passes.complete`); it is checked here once more. `stages` are all the stages of one
    pipeline rank, by index. `recorder`, where given, collects a `Record` of every computation and reduction, timed with
    a monotonic clock on the host: on a GPU these are the times of launching, not of running.

    Raises ScheduleError where the schedule does not pass `check`, or splits or overlaps backwards.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, PipelineStage],
        channels: Channels,
        recorder: Recorder | None = None,
    ) -> None:
        self._table: Mapping[Kind, Callable[[Action], None]] = MappingProxyType(
            {
                Kind.FORWARD: self._forward,
                Kind.BACKWARD: self._backward,
                Kind.SEND_FORWARD: self._send,
                Kind.SEND_BACKWARD: self._send,
                Kind.RECEIVE_FORWARD: self._receive,
                Kind.RECEIVE_BACKWARD: self._receive,
                Kind.GATHER: lambda action: self._stages[action.stage].parameters.gather(),
                Kind.RELEASE: lambda action: self._stages[action.stage].parameters.release(),
                Kind.REDUCE: self._reduce,
                Kind.TIE_REDUCE: self._tie_reduce,
            }
        )
        check(schedule)
        self._schedule = schedule
        self._stages = dict(stages)
        self._channels = channels
        self._recorder = recorder
        self._rank = schedule.placement[min(self._stages)]
        self._actions = schedule.actions[self._rank]
        self._trains = not schedule.is_forward_only
        self._step: _Step | None = None
        self._current: Action | None = None
        self._waits_for: Action | None = None
        self._check_stages()

    def _check_stages(self) -> None:
        for action in self._actions:
            if action.kind not in self._table:
                raise ScheduleError(
                    f"schedule {self._schedule.name}: rank {self._rank}: {action.describe()}: this executor runs whole "
                    "backwards only, neither split nor overlapped. Use gpipe, 1f1b or interleaved_1f1b"
                )
        assert tuple(sorted(self._stages)) == self._schedule.stages_of(self._rank), sorted(self._stages)
        for index, stage in self._stages.items():
            ends = (index == 0, index == self._schedule.num_stages - 1)
            assert (stage.index, stage.is_first, stage.is_last) == (index, *ends), stage

    def position(self) -> str:
        """What the rank is doing, in words, for error reports: the action, and the message it waits for.

        Another thread may call it (a watchdog).
        """
        action, waits_for = self._current, self._waits_for
        if action is None:
            return "between steps"
        text = action.describe()
        if waits_for is not None:
            text += f", waiting for {waits_for.describe()} from pipeline rank {waits_for.peer}"
        return text

    def run(
        self,
        microbatches: Sequence[Any],
        boundary: Boundary,
        loss_seed: torch.Tensor | float = 1.0,
    ) -> StepResult:
        """Run all actions of this rank once; every rank of the pipeline must call it with the same counts and shapes.

        `microbatches[m]` is handed to every stage's module. `boundary` gives name, local shape and dtype of the tensors
        between stages; those of floating dtype get gradients. `loss_seed` is the gradient of the loss (the loss scale).
        Gradients are left to the modules' parameters. A forward-only schedule runs without gradients.

        An exception inside carries a note that names rank, action, stage and microbatch; `position` still tells it.
        """
        if self._step is not None:
            raise ScheduleError(
                f"the run before broke off in {self.position()}; its messages may still be under way. Start the ranks "
                "anew"
            )
        assert len(microbatches) == self._schedule.num_microbatches, (
            len(microbatches),
            self._schedule.num_microbatches,
        )
        inbox = Inbox(self._channels, self._actions, boundary)
        step = self._step = _Step(microbatches, boundary, loss_seed, inbox, Outbox(self._channels))
        try:
            with torch.set_grad_enabled(self._trains):
                for action in self._actions:
                    self._current = action
                    self._table[action.kind](action)
                step.outbox.drain()
        except Exception as error:
            error.add_note(f"on pipeline rank {self._rank}, in {self.position()}")
            raise
        self._assert_empty(step)
        self._step = self._current = None
        return StepResult(
            losses=[step.losses[m] for m in sorted(step.losses)],
            outputs=[step.outputs[m] for m in sorted(step.outputs)],
        )

    @staticmethod
    def _assert_empty(step: _Step) -> None:
        left = {"kept": [*step.kept], "outgoing": [*step.outgoing], "handed": [*step.handed]}
        assert not any(left.values()), left
        assert step.inbox.is_empty and step.outbox.is_empty

    # ------------------------------------------------------------------------------------------------- computations

    def _forward(self, action: Action) -> None:
        step, stage, at = self._now, self._stages[action.stage], (action.stage, action.microbatch)
        inputs = {} if stage.is_first else self._take(Kind.RECEIVE_FORWARD, action)
        if self._trains:
            for tensor in inputs.values():
                tensor.requires_grad_(tensor.is_floating_point())
        start_s = time.perf_counter()
        outputs = stage.module(inputs, step.microbatches[action.microbatch])
        self._record(action, start_s)
        if stage.is_last:
            loss = self._finish(action, outputs)
            if self._trains:
                step.kept[at] = _Kept(inputs, {}, loss)
            return
        self._check_outputs(action, outputs)
        if self._trains:
            edges = {
                name: get_gradient_edge(tensor)
                for name, tensor in outputs.items()
                if tensor.requires_grad and name in carried(Kind.SEND_BACKWARD, step.boundary)
            }
            step.kept[at] = _Kept(inputs, edges, None)
        self._pass_on(Kind.SEND_FORWARD, action, {name: outputs[name].detach() for name in step.boundary})

    def _finish(self, action: Action, outputs: Tensors) -> torch.Tensor | None:
        """Collect what the last stage returned; the loss, with its graph, where there is one."""
        step, loss = self._now, outputs.get("loss")
        if loss is not None:
            step.losses[action.microbatch] = loss.detach().to(torch.float64)
        if not self._trains:
            step.outputs[action.microbatch] = outputs
        elif loss is None or loss.numel() != 1:
            raise ScheduleError(
                f"{action.describe()}: the last stage returned {_shapes(outputs)}; to train it must return the "
                "microbatch's loss, a scalar, as 'loss'"
            )
        return loss

    def _check_outputs(self, action: Action, outputs: Tensors) -> None:
        """Shapes were agreed before the step: a stage that returns others would leave its neighbour waiting."""
        expected = {name: (tuple(shape), dtype) for name, (shape, dtype) in self._now.boundary.items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in outputs.items()}
        if found != expected:
            raise ScheduleError(
                f"{action.describe()}: the stage returned {_shapes(outputs)}; the boundary of the step is {expected}"
            )

    def _backward(self, action: Action) -> None:
        step, stage = self._now, self._stages[action.stage]
        kept = step.kept.pop((action.stage, action.microbatch))
        gradients = {} if stage.is_last else self._take(Kind.RECEIVE_BACKWARD, action)
        start_s = time.perf_counter()
        stage.parameters.begin_backward(final=action.microbatch == self._schedule.num_microbatches - 1)
        if kept.loss is not None:
            if kept.loss.requires_grad:
                torch.autograd.backward([kept.loss], [self._seed(kept.loss)])
        elif kept.edges:
            torch.autograd.backward(list(kept.edges.values()), [gradients[name] for name in kept.edges])
        self._record(action, start_s)
        if not stage.is_first:
            names = carried(Kind.SEND_BACKWARD, step.boundary)
            self._pass_on(Kind.SEND_BACKWARD, action, {name: _take_grad(kept.inputs[name]) for name in names})

    def _seed(self, loss: torch.Tensor) -> torch.Tensor:
        """The gradient of the loss, in its shape, dtype and device."""
        seed = self._now.loss_seed
        if isinstance(seed, torch.Tensor):
            return seed.detach().to(loss).reshape(loss.shape)
        return torch.full_like(loss, seed, requires_grad=False)

    def _reduce(self, action: Action) -> None:
        start_s = time.perf_counter()
        self._stages[action.stage].parameters.reduce()
        self._record(action, start_s)

    def _tie_reduce(self, action: Action) -> None:
        start_s = time.perf_counter()
        self._stages[action.stage].parameters.tie_reduce()
        self._record(action, start_s)

    # ---------------------------------------------------------------------------------------------------- messages

    def _send(self, action: Action) -> None:
        assert action.peer is not None
        tensors = self._now.outgoing.pop((action.kind, action.stage, action.microbatch))
        self._now.outbox.send(tensors, action.peer)

    def _receive(self, action: Action) -> None:
        self._now.inbox.reach(action)

    def _pass_on(self, kind: Kind, action: Action, tensors: Tensors) -> None:
        """Give what a computation made to the neighbouring stage: here at once, elsewhere by the send that follows."""
        neighbour = action.stage + (1 if kind is Kind.SEND_FORWARD else -1)
        if neighbour in self._stages:
            self._now.handed[kind, neighbour, action.microbatch] = tensors
        else:
            self._now.outgoing[kind, action.stage, action.microbatch] = tensors

    def _take(self, kind: Kind, action: Action) -> Tensors:
        """What the neighbouring stage made for a computation; waits for its message."""
        forward = kind is Kind.RECEIVE_FORWARD
        neighbour = action.stage + (-1 if forward else 1)
        if neighbour in self._stages:
            made_by = Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD
            return self._now.handed.pop((made_by, action.stage, action.microbatch))
        peer = self._schedule.placement[neighbour]
        self._waits_for = Action(kind, action.stage, action.microbatch, peer)
        tensors = self._now.inbox.take(self._waits_for)
        self._waits_for = None
        return tensors

    @property
    def _now(self) -> _Step:
        assert self._step is not None
        return self._step

    def _record(self, action: Action, start_s: float) -> None:
        if self._recorder is not None:
            record = Record(action.kind, action.stage, action.microbatch, start_s, time.perf_counter())
            self._recorder.append(record)


def _take_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient that a backward left on a stage input; zeros where the stage did not use it."""
    gradient = tensor.grad
    tensor.grad = None
    return torch.zeros_like(tensor, requires_grad=False) if gradient is None else gradient


def _shapes(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
