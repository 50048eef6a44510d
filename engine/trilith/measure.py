"""Measures what each unit of a model costs on this machine, so that a schedule can be chosen before training begins.

A pipeline is built in which every unit is a stage of its own. It runs a few times through the executor with random tokens
and with both halves of the backward apart; nothing of it outlives the measurement: no optimizer exists, the gradients are
thrown away. `decide` turns the costs into a plan by simulating every schedule (`pipeline/search.py`).
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from trilith import build, comm, preflight
from trilith.kernels.weight_queue import WeightQueue
from trilith.models.activations import ActivationBytes
from trilith.models.base import UnitDecl
from trilith.models.batch import Microbatch
from trilith.models.stage import StageModel
from trilith.monitor.activations import ActivationMeter
from trilith.pipeline.action import Action, Kind, Schedule
from trilith.pipeline.executor import Executor
from trilith.pipeline.partition import partition
from trilith.pipeline.passes import complete
from trilith.pipeline.search import Measured, UnitCost
from trilith.pipeline.stage import NullParameters, PipelineStage
from trilith.pipeline.timeline import Record
from trilith.pipeline.transport import Boundary, Channels, GroupChannels
from trilith.precision import PrecisionPolicy
from trilith.preflight import Plan
from trilith.process_groups import build_topology
from trilith.topology import Topology
from trilith.trainer import Place

MICROBATCHES = 2
TIMED_RUNS = 3
ROUND_TRIPS = 8
Row = tuple[float, float, float, int, int]  # a unit's seconds of F, I and W, and its bytes after F and after I


def decide(plan: Plan, place: Place, say: Callable[[str], None]) -> Plan:
    """The plan with schedule and partition chosen by measured costs, where it leaves them open; else the plan itself.

    Every rank of the world must call it, before it makes its trainer; all come to the same plan. Rank 0 says the ranking.
    Raises ConfigError where no schedule fits `pipeline.memory_limit_bytes`.
    """
    if not plan.is_provisional:
        return plan
    measured = measure(plan, place)
    decided = preflight.plan(plan.resolved.to_json()["config"], world_size=plan.world_size, measured=measured)
    assert decided.ranking is not None
    if place.rank == 0:
        say(decided.ranking.table())
    return decided


def measure(plan: Plan, place: Place) -> Measured:
    """The costs of every unit and of a message between neighbouring ranks, the same on every rank.

    A unit's times are the least of several, because a busy machine only adds to them, and the largest of its data and
    tensor ranks. Every rank of the world must call it; process groups are made here.
    """
    schedule = measuring_schedule(plan.units, plan.degrees.pipeline)
    timeout_s = plan.config.parallel.timeout_s
    shared_memory = plan.config.run.shared_memory
    topology = build_topology(
        plan.degrees, place.device, timeout_s, channels=schedule.channels(), shared_memory=shared_memory
    )
    rows, transfer_s = _Measurement(plan, schedule, topology).run()
    everyone = comm.gather_objects((list(rows.items()), transfer_s), topology.control)
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    units = []
    for index in range(len(plan.units)):
        found = [row for rows, _ in everyone for unit, row in rows if unit == index]
        forward, backward_input, backward_weight, after_forward, after_input = map(max, zip(*found, strict=True))
        kept = ActivationBytes(int(after_forward), int(after_input))
        units.append(UnitCost(forward, backward_input, backward_weight, kept))
    return Measured(tuple(units), max(transfer_s for _, transfer_s in everyone))


def measuring_schedule(units: Sequence[UnitDecl], num_ranks: int) -> Schedule:
    """Every unit a stage, dealt to ranks by FLOPs: all forwards, all input gradients, then all weight gradients."""
    placement = tuple(rank for rank, (lo, hi) in enumerate(partition(units, num_ranks, "cost")) for _ in range(lo, hi))
    rows = []
    for rank in range(num_ranks):
        stages = [stage for stage, owner in enumerate(placement) if owner == rank]
        orders = ((Kind.FORWARD, stages), (Kind.BACKWARD_INPUT, stages[::-1]), (Kind.BACKWARD_WEIGHT, stages))
        rows.append(tuple(Action(kind, s, m) for kind, order in orders for m in range(MICROBATCHES) for s in order))
    return complete(Schedule("measuring", num_ranks, len(units), MICROBATCHES, placement, tuple(rows)))


class _Stopwatch(list[Record]):
    """A recorder whose times are those of the device: it waits for it before an action begins and when it is over."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._start_s = 0.0

    def start(self) -> None:
        """An action begins."""
        _synchronise(self._device)
        self._start_s = time.perf_counter()

    def append(self, record: Record) -> None:
        """The action is over."""
        _synchronise(self._device)
        super().append(record._replace(start_s=self._start_s, end_s=time.perf_counter()))


class _Timed(NullParameters):
    """Starts the stopwatch when the executor comes to a stage."""

    def __init__(self, stopwatch: _Stopwatch) -> None:
        self._stopwatch = stopwatch

    def begin_forward(self, microbatch: int) -> None:
        """A forward begins."""
        self._stopwatch.start()

    def begin_input_gradients(self, microbatch: int) -> None:
        """The first half of a backward begins."""
        self._stopwatch.start()

    def begin_weight_gradients(self, microbatch: int, weights: Sequence[torch.Tensor], final: bool) -> None:
        """The second half begins."""
        self._stopwatch.start()


class _Scales(list[Record]):
    """A recorder that notes by how many live bytes each action changed what is kept."""

    def __init__(self, meter: ActivationMeter) -> None:
        super().__init__()
        self._meter = meter
        self._before = 0
        self.changes: dict[tuple[Kind, int, int], int] = {}

    def append(self, record: Record) -> None:
        """The action is over."""
        live = self._meter.live_bytes
        self.changes[record.kind, record.stage, record.microbatch] = live - self._before
        self._before = live


class _Measurement:
    """One rank's part: its units as stages, and their runs."""

    def __init__(self, plan: Plan, schedule: Schedule, topology: Topology) -> None:
        policy, self._config = PrecisionPolicy.from_config(plan.config), plan.config
        self._topology = topology
        self._rank = topology.coordinate("pp")
        self._channels: Channels = GroupChannels(topology)
        self._stopwatch = _Stopwatch(topology.device)
        alone = [(unit,) for unit in plan.units]
        self._stages = build.build_stages(plan.config, alone, schedule, topology, policy)
        for stage in self._stages.values():
            _materialise(stage, topology.device, plan.config.training.seed)
        ends = (0, schedule.num_stages - 1)
        pipeline = {
            index: PipelineStage(
                index, stage, _Timed(self._stopwatch), index == ends[0], index == ends[1], queue=stage.queue
            )
            for index, stage in self._stages.items()
        }
        self._executor = Executor(schedule, pipeline, self._channels)
        self._microbatches = [self._microbatch()] * MICROBATCHES

    def run(self) -> tuple[dict[int, Row], float]:
        """The costs of this rank's units by index, and the seconds of a message to a neighbour (0: it has none)."""
        self._run([])  # what happens at a first call only is over with it
        changes = self._measured_bytes()
        for _ in range(TIMED_RUNS):
            self._run(self._stopwatch)
        times: dict[tuple[Kind, int], list[float]] = defaultdict(list)
        for record in self._stopwatch:
            times[record.kind, record.stage].append(record.end_s - record.start_s)
        kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        rows: dict[int, Row] = {}
        for index in self._stages:
            forward, backward_input, backward_weight = (min(times[kind, index]) for kind in kinds)
            after_forward, queued = changes[Kind.FORWARD, index, 0], -changes[Kind.BACKWARD_WEIGHT, index, 0]
            rows[index] = (forward, backward_input, backward_weight, after_forward, queued)
        return rows, self._transfer_s()

    def _run(self, recorder: list[Record]) -> None:
        self._executor.run(self._microbatches, self._boundary(), recorder=recorder)
        for stage in self._stages.values():
            stage.zero_grad(set_to_none=True)

    def _measured_bytes(self) -> Mapping[tuple[Kind, int, int], int]:
        """A run in which every tensor that is kept is counted."""
        queues: list[WeightQueue] = [stage.queue for stage in self._stages.values() if stage.queue is not None]
        with ActivationMeter(p for stage in self._stages.values() for p in stage.parameters()) as meter:
            for queue in queues:
                queue.tracker = meter.track
            scales = _Scales(meter)
            self._run(scales)
        for queue in queues:
            queue.tracker = None
        return scales.changes

    def _microbatch(self) -> Microbatch:
        """Random tokens, in the shape of a training microbatch."""
        model, size, device = self._config.model, self._config.train_micro_batch_size_per_gpu, self._topology.device
        generator = torch.Generator().manual_seed(self._config.training.seed)
        shape = (size, model.sequence_length)
        tokens = torch.randint(0, model.vocab_size, shape, generator=generator).to(device)
        positions, samples = torch.arange(model.sequence_length), torch.arange(size)
        weight = 1.0 / tokens.numel()
        return Microbatch(tokens, tokens.clone(), None, positions.to(device), samples.to(device), weight)

    def _boundary(self) -> Boundary:
        model, stage = self._config.model, next(iter(self._stages.values()))
        return stage.boundary(self._config.train_micro_batch_size_per_gpu, model.sequence_length)

    def _transfer_s(self) -> float:
        """Half of the quickest round trip of a boundary's tensors, to the slower of the two neighbours."""
        times = [0.0]
        for turn in (0, 1):
            leads = self._rank % 2 == turn
            peer = self._rank + 1 if leads else self._rank - 1
            if 0 <= peer < self._topology.degrees.pipeline:
                times.append(self._round_trips(peer, leads))
        return max(times)

    def _round_trips(self, peer: int, leads: bool) -> float:
        device = self._topology.device
        tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in self._boundary().values()]
        times = []
        for _ in range(ROUND_TRIPS):
            start_s = time.perf_counter()
            for sends in (leads, not leads):
                move = self._channels.send if sends else self._channels.receive
                for handle in [move(tensor, peer) for tensor in tensors]:
                    handle.wait()
            _synchronise(device)
            times.append(time.perf_counter() - start_s)
        return min(times) / 2


def _materialise(stage: StageModel, device: torch.device, seed: int) -> None:
    """Give a stage from the meta device storage, and its parameters their initial values."""
    buffers = dict(stage.named_buffers())
    stage.to_empty(device=device)
    for name, buffer in stage.named_buffers():
        buffer.copy_(buffers[name])
    found = dict(stage.named_parameters())
    with torch.no_grad():
        for local in stage.local_parameters:
            parameter = found[local.name]
            parameter.copy_(build.initial_value(local, torch.float32, seed, device))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
