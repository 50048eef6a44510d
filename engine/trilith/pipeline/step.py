"""What an executor holds while a step runs: activations, messages, deferred weight gradients, losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge

from trilith.kernels.weight_queue import Deferred
from trilith.pipeline.action import Kind
from trilith.pipeline.timeline import Record
from trilith.pipeline.transport import Boundary, Inbox, Outbox

Recorder = list[Record]
Tensors = dict[str, torch.Tensor]
Key = tuple[int, int]  # (stage, microbatch)
Seed = torch.Tensor | float
LossSeed = Seed | Callable[[int], Seed]


class Microbatches(Protocol):
    """Microbatches by number; a long window may make each when it is asked for."""

    def __getitem__(self, microbatch: int, /) -> Any:
        """The rank's own data of a microbatch."""


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
class Kept:
    """What a forward leaves for its backward. Edges, not outputs: an output's memory is free once it is sent."""

    inputs: Tensors
    edges: dict[str, GradientEdge]
    loss: torch.Tensor | None


@dataclass(frozen=True)
class Request:
    """What one run was asked to do; see `Executor.run`. `boundaries[s]` lies between stages s and s + 1."""

    microbatches: Microbatches
    boundaries: Sequence[Boundary]
    loss_seed: LossSeed
    validate: Callable[[], bool] | None
    recorder: Recorder | None


@dataclass
class Step:
    """The state of one run. `next_action` counts the actions of the rank that are done.

    `offset` is what a microbatch of the schedule must be counted up by to get its true number (`rewind`).
    """

    request: Request
    inbox: Inbox
    outbox: Outbox
    next_action: int = 0
    offset: int = 0
    kept: dict[Key, Kept] = field(default_factory=dict)
    deferred: dict[Key, list[Deferred]] = field(default_factory=dict)
    outgoing: dict[tuple[Kind, int, int], Tensors] = field(default_factory=dict)  # made, its send comes next
    handed: dict[tuple[Kind, int, int], Tensors] = field(default_factory=dict)  # for a stage on the same rank
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensors] = field(default_factory=dict)

    def rewind(self, position: int, microbatches: int, done: int) -> None:
        """See `Executor.rewind`: what is kept under a microbatch is now kept under one `microbatches` earlier."""
        self.losses = {number: loss for number, loss in self.losses.items() if number >= self.offset + done}
        self.next_action, self.offset = position, self.offset + microbatches
        self.kept = {(stage, m - microbatches): kept for (stage, m), kept in self.kept.items()}
        self.deferred = {(stage, m - microbatches): items for (stage, m), items in self.deferred.items()}
        self.outgoing = {(kind, stage, m - microbatches): made for (kind, stage, m), made in self.outgoing.items()}
        self.handed = {(kind, stage, m - microbatches): made for (kind, stage, m), made in self.handed.items()}

    def assert_empty(self) -> None:
        """Nothing outlives a run."""
        held = (self.kept, self.deferred, self.outgoing, self.handed)
        assert not any(held), [list(left) for left in held]
        assert self.inbox.is_empty and self.outbox.is_empty


class StartAnew(Exception):
    """The weights of this step were wrong and are corrected now: what was computed must be thrown away."""
