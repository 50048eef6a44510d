"""What a schedule costs before it runs: its timeline, its bubbles and its peak of live microbatches. No torch.

The model is that of the executor: sends do not hold the sender, messages of one channel (directed pair of ranks) follow
one another, an action starts when its rank is free and its inputs are there. Event driven, deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trilith.errors import ScheduleError
from trilith.pipeline.action import (
    COMPUTE,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Kind,
    Schedule,
    Token,
    consumer,
    gives,
    needs,
)


@dataclass(frozen=True)
class Costs:
    """Seconds per stage of forward, input gradient and weight gradient; a whole backward takes the sum of the last two.

    `transfer_s` is the time a message spends between two ranks. `overlapped_s[stage]` is the time of an overlapped pair
    whose forward is that stage's; without it, a pair takes the sum of its two. Any unit will do where only ratios matter.
    """

    forward_s: tuple[float, ...]
    backward_input_s: tuple[float, ...]
    backward_weight_s: tuple[float, ...]
    transfer_s: float = 0.0
    overlapped_s: tuple[float, ...] | None = None

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        forward_s: float = 1.0,
        backward_input_s: float = 1.0,
        backward_weight_s: float = 1.0,
        transfer_s: float = 0.0,
        overlapped_s: float | None = None,
    ) -> Costs:
        """The same costs for every stage; by default F = B = W = 1 and free transfers."""
        return cls(
            (forward_s,) * num_stages,
            (backward_input_s,) * num_stages,
            (backward_weight_s,) * num_stages,
            transfer_s,
            None if overlapped_s is None else (overlapped_s,) * num_stages,
        )

    def of(self, action: Action) -> float:
        """Seconds of a compute action."""
        if action.pair is not None:
            if self.overlapped_s is not None:
                return self.overlapped_s[action.stage]
            return sum(self.of(part) for part in action.pair)
        if action.kind is Kind.FORWARD:
            return self.forward_s[action.stage]
        if action.kind is Kind.BACKWARD_INPUT:
            return self.backward_input_s[action.stage]
        if action.kind is Kind.BACKWARD_WEIGHT:
            return self.backward_weight_s[action.stage]
        assert action.kind is Kind.BACKWARD, action
        return self.backward_input_s[action.stage] + self.backward_weight_s[action.stage]


@dataclass(frozen=True, slots=True)
class Bar:
    """One action of a rank on the time axis."""

    rank: int
    kind: Kind
    stage: int
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """A simulated step. Fractions are of 1.

    `span_s`: the longest time between a rank's first start and its last end. `bubble`: 1 - work / span, where work is
    the mean busy time of a rank (what the papers quote). `bubble_makespan`: 1 - work / makespan of the whole step.
    `peak_chunks[rank]`: most (stage, microbatch) live at once (`peak_chunks`). `peak_microbatches[rank]`: the same in
    units of the rank's whole share of the model, that is, divided by its number of stages.
    """

    bars: tuple[Bar, ...]
    makespan_s: float
    span_s: float
    bubble: float
    bubble_makespan: float
    peak_microbatches: tuple[float, ...]
    peak_chunks: tuple[int, ...]


Times = list[list[tuple[Action, float, float]]]


def action_times(schedule: Schedule, costs: Costs) -> Times:
    """(action, start, end) of every compute action, per rank in order.

    Raises ScheduleError naming the first action that can never run and what it waits for.
    """
    queues = [[a for a in actions if a.kind in COMPUTE] for actions in schedule.actions]
    times: Times = [[] for _ in queues]
    free = [0.0] * schedule.num_ranks
    channel_free: dict[tuple[int, int], float] = {}
    ready: dict[tuple[Token, int], float] = {}  # (token, rank that can read it) -> when
    waiting: dict[tuple[Token, int], int] = {}
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        queue, done = queues[rank], times[rank]
        while len(done) < len(queue):
            action = queue[len(done)]
            start = free[rank]
            missing = None
            for token in needs(action, schedule.num_stages):
                at = ready.get((token, rank))
                if at is None:
                    missing = (token, rank)
                    break
                start = max(start, at)
            if missing is not None:
                waiting[missing] = rank
                break
            end = free[rank] = start + costs.of(action)
            done.append((action, start, end))
            for token in gives(action):
                for key, at in _arrivals(schedule, costs, rank, token, end, channel_free):
                    ready[key] = at
                    if key in waiting:
                        runnable.append(waiting.pop(key))
    if waiting:
        raise _never_runs(schedule, queues, times, waiting)
    return times


@dataclass(frozen=True)
class Stuck:
    """A rank that cannot go on: its next action, what that waits for in words, and the rank that owes it, if any."""

    action: Action
    wanted: str
    owed_by: int | None


def stuck_error(schedule: Schedule, stuck: Mapping[int, Stuck], how: str) -> ScheduleError:
    """The error for ranks that wait for each other, or for what nobody does: names the first action that cannot run.

    Follows the waits from the lowest stuck rank to their root: the first rank of a cycle, or the one that waits for an
    action nobody will run.
    """
    trail: list[int] = []
    rank: int | None = min(stuck)
    while rank is not None and rank in stuck and rank not in trail:
        trail.append(rank)
        rank = stuck[rank].owed_by
    cycle = trail[trail.index(rank) :] if rank in trail else trail[-1:]
    waits = [f"rank {r} cannot run {stuck[r].action.describe()}: it waits for {stuck[r].wanted}" for r in cycle]
    return ScheduleError(f"schedule {schedule.name} {how}: " + "; ".join(waits))


def _never_runs(
    schedule: Schedule,
    queues: list[list[Action]],
    times: Times,
    waiting: dict[tuple[Token, int], int],
) -> ScheduleError:
    stuck = {}
    for (token, _), rank in waiting.items():
        owners = [r for r, queue in enumerate(queues) if any(token in gives(a) for a in queue[len(times[r]) :])]
        owner = owners[0] if owners else None
        place = f"rank {owner} has it too late" if owners else "no rank has it"
        action = queues[rank][len(times[rank])]
        stuck[rank] = Stuck(action, f"{Action(*token).describe()}; {place}", owner)
    return stuck_error(schedule, stuck, "cannot run to its end")


def _arrivals(
    schedule: Schedule,
    costs: Costs,
    rank: int,
    token: Token,
    end: float,
    channel_free: dict[tuple[int, int], float],
) -> list[tuple[tuple[Token, int], float]]:
    """Where and when a token made on `rank` at `end` can be read; its message takes its place on the channel."""
    arrivals = [((token, rank), end)]
    reader = consumer(token, schedule.num_stages)
    if reader is not None and schedule.placement[reader] != rank:
        channel = (rank, schedule.placement[reader])
        at = max(end, channel_free.get(channel, 0.0)) + costs.transfer_s
        channel_free[channel] = at
        arrivals.append(((token, channel[1]), at))
    return arrivals


def _stages_without_backward(schedule: Schedule) -> frozenset[int]:
    """Stages of which nothing outlives the forward."""
    backward = {part.stage for _, part in schedule.parts() if part.kind in INPUT_GRADIENT}
    return frozenset(range(schedule.num_stages)) - backward


def _ends_life(schedule: Schedule, part: Action) -> bool:
    """Whether a backward is the last that a microbatch needs its activations for."""
    return part.kind in WEIGHT_GRADIENT or (part.kind is Kind.BACKWARD_INPUT and part.stage in schedule.frozen)


def peak_chunks(schedule: Schedule) -> tuple[int, ...]:
    """Most (stage, microbatch) live at once on each rank; a rank is sequential, so the order alone decides.

    A microbatch is live on a stage from the start of its forward to the end of its backward, of its weight gradient
    where that is apart, of its input gradient on a frozen stage; on a stage without backward, while its forward runs.
    """
    passing = _stages_without_backward(schedule)
    peaks = []
    for actions in schedule.actions:
        live = peak = 0
        for action in actions:
            for part in action.parts():
                if part.kind is Kind.FORWARD:
                    live += 1
                    peak = max(peak, live)
                    live -= part.stage in passing
                elif _ends_life(schedule, part):
                    live -= 1
        peaks.append(peak)
    return tuple(peaks)


def peak_bytes(
    schedule: Schedule, after_forward_bytes: Sequence[float], after_input_gradient_bytes: Sequence[float]
) -> tuple[float, ...]:
    """Most bytes of activations held at once on each rank, looked at after each action.

    Summed over (stage, microbatch): `after_forward_bytes[stage]` from the forward to the backward or the input
    gradient, then, where the backward is split, `after_input_gradient_bytes[stage]` to the weight gradient. A stage
    without backward keeps nothing, a frozen one nothing beyond its input gradient.
    """
    passing = _stages_without_backward(schedule)
    change: dict[tuple[Kind, int], float] = {}
    for stage, (forward, gradient) in enumerate(zip(after_forward_bytes, after_input_gradient_bytes, strict=True)):
        change[Kind.FORWARD, stage] = 0 if stage in passing else forward
        change[Kind.BACKWARD, stage] = -forward
        change[Kind.BACKWARD_INPUT, stage] = (0 if stage in schedule.frozen else gradient) - forward
        change[Kind.BACKWARD_WEIGHT, stage] = -gradient
    peaks = []
    for actions in schedule.actions:
        live = peak = 0.0
        for action in actions:
            for part in action.parts():
                live += change.get((part.kind, part.stage), 0.0)
                peak = max(peak, live)
        peaks.append(peak)
    return tuple(peaks)


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run the compute actions of a schedule on paper, with or without its communication actions.

    Raises ScheduleError where it cannot run to its end.
    """
    times = action_times(schedule, costs)
    bars = tuple(
        Bar(rank, action.kind, action.stage, action.microbatch, start, end)
        for rank, row in enumerate(times)
        for action, start, end in row
    )
    work = sum(bar.end_s - bar.start_s for bar in bars) / schedule.num_ranks
    makespan = max((row[-1][2] for row in times if row), default=0.0)
    span = max((row[-1][2] - row[0][1] for row in times if row), default=0.0)
    chunks = peak_chunks(schedule)
    return Simulation(
        bars=bars,
        makespan_s=makespan,
        span_s=span,
        bubble=1.0 - work / span if span else 0.0,
        bubble_makespan=1.0 - work / makespan if makespan else 0.0,
        peak_microbatches=tuple(count / max(1, len(schedule.stages_of(rank))) for rank, count in enumerate(chunks)),
        peak_chunks=chunks,
    )
