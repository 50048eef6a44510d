"""A pipeline in one process: ranks as threads over strict in-memory channels, stages of plain layers."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from trilith.kernels import ops
from trilith.kernels.weight_queue import WeightQueue
from trilith.pipeline.action import Schedule
from trilith.pipeline.executor import Executor
from trilith.pipeline.stage import NullParameters, PipelineStage
from trilith.pipeline.step import LossSeed, StepResult

B, H = 3, 5
BOUNDARY = {"hidden": ((B, H), torch.float64)}
TIMEOUT_S = 20.0


@dataclass
class Meeting:
    """A handle of one end of a message: over when both ends have come (a send is not buffered)."""

    event: threading.Event
    finish: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        return self.event.is_set()

    def wait(self) -> None:
        assert self.event.wait(TIMEOUT_S), "deadlock"
        self.finish()


@dataclass
class Wire:
    """A directed channel in memory: the n-th send meets the n-th receive, nothing is buffered."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: list[torch.Tensor] = field(default_factory=list)
    received: list[torch.Tensor] = field(default_factory=list)
    events: defaultdict[int, threading.Event] = field(default_factory=lambda: defaultdict(threading.Event))

    def join(self, tensor: torch.Tensor, ends: list[torch.Tensor]) -> Meeting:
        with self.lock:
            ends.append(tensor)
            index = len(ends) - 1
            if min(len(self.sent), len(self.received)) > index:
                assert self.sent[index].shape == self.received[index].shape
                self.received[index].copy_(self.sent[index])
                self.events[index].set()
            return Meeting(self.events[index])


class MemoryChannels:
    """`Channels` of one rank among threads."""

    device = torch.device("cpu")

    def __init__(self, wires: dict[tuple[int, int], Wire], rank: int) -> None:
        self.wires, self.rank = wires, rank
        self.most_open = 0

    def send(self, tensor: torch.Tensor, peer: int) -> Meeting:
        wire = self.wires[self.rank, peer]
        meeting = wire.join(tensor.detach(), wire.sent)
        self.most_open = max(self.most_open, len(wire.sent) - len(wire.received))
        return meeting

    def receive(self, tensor: torch.Tensor, peer: int) -> Meeting:
        return self.wires[peer, self.rank].join(tensor, self.wires[peer, self.rank].received)


class Layers:
    """Stage `index` of `num_stages`: its share of eight square layers, a loss at the end."""

    def __init__(self, index: int, num_stages: int, queue: WeightQueue | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(H, H, generator=generator, dtype=torch.float64) for _ in range(8)]
        size = 8 // num_stages
        self.weights = [w.requires_grad_() for w in weights[index * size : (index + 1) * size]]
        self.is_last = index == num_stages - 1
        self.queue = queue

    def __call__(self, inputs: dict[str, torch.Tensor], microbatch: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = inputs.get("hidden", microbatch)
        for weight in self.weights:
            hidden = torch.tanh(ops.linear(hidden, weight, queue=self.queue))
        return {"loss": hidden.square().sum()} if self.is_last else {"hidden": hidden}


class Calls(NullParameters):
    """Writes down what the executor asks of a stage's parameters."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin_forward(self, microbatch: int) -> None:
        self.calls.append(f"forward {microbatch}")

    def begin_backward(self, microbatch: int, final: bool) -> None:
        self.calls.append(f"{'final' if final else 'backward'} {microbatch}")

    def begin_input_gradients(self, microbatch: int) -> None:
        self.calls.append(f"backward {microbatch}")

    def begin_weight_gradients(self, microbatch: int, weights: Sequence[torch.Tensor], final: bool) -> None:
        self.calls.append(f"{'final weights' if final else 'weights'} {len(weights)}")

    def reduce(self, microbatch: int) -> None:
        self.calls.append("reduce")

    def tie_reduce(self, microbatch: int) -> None:
        self.calls.append("tie_reduce")


def stages_of(schedule: Schedule, rank: int) -> dict[int, PipelineStage]:
    """The stages of a rank, with queues where the schedule splits backwards."""
    count, found = schedule.num_stages, {}
    for index in schedule.stages_of(rank):
        queue = WeightQueue() if schedule.splits_backward else None
        module = Layers(index, count, queue)
        if index in schedule.frozen:
            module.weights = [weight.detach() for weight in module.weights]
        found[index] = PipelineStage(index, module, Calls(), index == 0, index == count - 1, queue)
    return found


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, generator=generator, dtype=torch.float64) for _ in range(count)]


def run_threads(schedule: Schedule, work: Callable[[int, Executor, dict[int, PipelineStage]], Any]) -> list[Any]:
    """`work` on every rank of the schedule, each a thread."""
    wires = {pair: Wire() for pair in schedule.channels()}

    def rank_main(rank: int) -> Any:
        stages = stages_of(schedule, rank)
        return work(rank, Executor(schedule, stages, MemoryChannels(wires, rank)), stages)

    with ThreadPoolExecutor(schedule.num_ranks) as pool:
        return [future.result(TIMEOUT_S) for future in [pool.submit(rank_main, r) for r in range(schedule.num_ranks)]]


def train(schedule: Schedule, loss_seed: LossSeed = 1.0) -> tuple[StepResult, list[torch.Tensor]]:
    """(result of the last rank, gradients of the eight layers)."""

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Any:
        return executor.run(batches(schedule.num_microbatches), BOUNDARY, loss_seed), stages

    by_stage: dict[int, PipelineStage] = {}
    for result, stages in run_threads(schedule, work):
        by_stage.update(stages)
        if result.losses:
            last = result
    return last, [w.grad for _, stage in sorted(by_stage.items()) for w in stage.module.weights]


def one_process(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    model, losses = Layers(0, 1), []
    for batch in batches(count):
        losses.append(model({}, batch)["loss"])
        losses[-1].backward()
    return [loss.detach() for loss in losses], [w.grad for w in model.weights]
