"""What the executors of a step measured: costs to simulate it with, its bubbles, and which actions cost the difference.

Records of several ranks must be on one clock (`comm.clock_offset_s`). No torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median

from trilith.pipeline.action import COMPUTE, Action, Kind, Schedule, Token, gives, needs
from trilith.pipeline.simulate import Bar, Costs, simulate
from trilith.pipeline.timeline import Record

Records = Mapping[int, Sequence[Record]]  # pipeline rank -> what its executor recorded, in order
_HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
_Cost = tuple[Kind, int]  # (FORWARD | BACKWARD_INPUT | BACKWARD_WEIGHT, stage)


@dataclass(frozen=True, slots=True)
class Timed:
    """An action as it ran, and when its rank was free for the next one.

    `made_by` is the computation on another rank that it had waited for, as (rank, place in that rank's row), if any.
    """

    action: Action
    start_s: float
    end_s: float
    free_s: float
    made_by: tuple[int, int] | None


_Row = Sequence[tuple[Action, Record]]
_Made = Mapping[Token, tuple[float, int, int]]  # when a token was there, on which rank, at which place in its row


def timed_actions(records: Records, num_stages: int) -> dict[int, list[Timed]]:
    """Every computation of every rank, in the order in which it ran.

    Between two computations a rank launches messages, frees memory, reduces: that belongs to the first. Where the second
    then waits for another rank, it is taken to last as long as that rank's other pauses, at the median. A rank waits
    where a message, at the median of their times, was still under way when it was done with what it did before.
    """
    rows = {
        rank: [(Action(r.kind, r.stage, r.microbatch), r) for r in row if r.kind in COMPUTE]
        for rank, row in records.items()
    }
    made: dict[Token, tuple[float, int, int]] = {}
    for rank, row in rows.items():
        for index, (action, record) in enumerate(row):
            made.update((token, (record.end_s, rank, index)) for token in gives(action))
    late_s = [
        record.start_s - source[0]
        for rank, row in rows.items()
        for source, (_, record) in zip(_sources(rank, row, made, num_stages, 0.0), row, strict=True)
        if source is not None
    ]
    message_s = median(late_s) if late_s else 0.0
    return {rank: _timed_row(row, _sources(rank, row, made, num_stages, message_s)) for rank, row in rows.items()}


def _sources(
    rank: int, row: _Row, made: _Made, num_stages: int, message_s: float
) -> list[tuple[float, int, int] | None]:
    """For each computation what it waited for on another rank; None where it followed the one before on its own."""
    found: list[tuple[float, int, int] | None] = []
    before_s = float("-inf")
    for action, record in row:
        inputs = [made[token] for token in needs(action, num_stages) if token in made]
        inputs = [source for source in inputs if source[1] != rank and source[0] + message_s > before_s]
        found.append(max(inputs, default=None))
        before_s = record.end_s
    return found


def _timed_row(row: _Row, sources: Sequence[tuple[float, int, int] | None]) -> list[Timed]:
    pauses = [
        b.start_s - a.end_s for ((_, a), (_, b)), source in zip(pairwise(row), sources[1:], strict=True) if not source
    ]
    pause_s = median(pauses) if pauses else 0.0
    found = []
    for index, ((action, record), source) in enumerate(zip(row, sources, strict=True)):
        free_s = record.end_s
        if index + 1 < len(row):
            next_s = row[index + 1][1].start_s
            free_s = next_s if sources[index + 1] is None else min(next_s, record.end_s + pause_s)
        found.append(Timed(action, record.start_s, record.end_s, free_s, source and source[1:]))
    return found


# ------------------------------------------------------------------------------------------------------------- costs


def measured_costs(records: Records, num_stages: int) -> Costs:
    """Costs to simulate a recorded step with: per stage the mean time of forward, input gradient, weight gradient.

    A whole backward of a stage that also splits its backwards is shared among the two halves, in proportion to their
    means where they run alone, so that the costs of a step add up to the time measured for its actions. A stage whose
    backwards are all whole has them in `backward_input_s`.

    `transfer_s` is the median time from when a rank was free after a computation to the start of the one on another
    rank that was waiting for it.
    """
    timed = timed_actions(records, num_stages)
    alone: dict[_Cost, list[float]] = defaultdict(list)
    whole: dict[int, list[float]] = defaultdict(list)
    for row in timed.values():
        for item in row:
            kind, stage, seconds = item.action.kind, item.action.stage, item.free_s - item.start_s
            (whole[stage] if kind is Kind.BACKWARD else alone[kind, stage]).append(seconds)
    for stage, times in whole.items():
        halves = [mean(alone[kind, stage]) if alone[kind, stage] else 0.0 for kind in _HALVES]
        share = halves[0] / sum(halves) if sum(halves) else 1.0
        alone[Kind.BACKWARD_INPUT, stage] += [seconds * share for seconds in times]
        if share < 1.0:
            alone[Kind.BACKWARD_WEIGHT, stage] += [seconds * (1.0 - share) for seconds in times]

    def of(kind: Kind) -> tuple[float, ...]:
        return tuple(mean(alone[kind, stage]) if alone[kind, stage] else 0.0 for stage in range(num_stages))

    forward_s, backward_input_s, backward_weight_s = map(of, (Kind.FORWARD, *_HALVES))
    waited = [
        max(0.0, item.start_s - timed[item.made_by[0]][item.made_by[1]].free_s)
        for row in timed.values()
        for item in row
        if item.made_by is not None
    ]
    return Costs(forward_s, backward_input_s, backward_weight_s, median(waited) if waited else 0.0)


# ----------------------------------------------------------------------------------------------------------- figures


def measured_bars(records: Records, schedule: Schedule | None = None) -> tuple[Bar, ...]:
    """Bars from what each pipeline rank's executor recorded. Time 0 is the start of the first computation.

    With `schedule`, the forward and the backward of an overlapped pair are one bar, as in the schedule.
    """
    starts = [r.start_s for row in records.values() for r in row if r.kind in COMPUTE]
    zero = min(starts, default=0.0)
    pairs = {} if schedule is None else _pairs(schedule)
    bars: list[Bar] = []
    for rank, row in sorted(records.items()):
        open_pair: Action | None = None
        for r in row:
            action = Action(r.kind, r.stage, r.microbatch)
            if open_pair is not None and action == open_pair:
                bars[-1] = replace(bars[-1], kind=Kind.OVERLAPPED, end_s=r.end_s - zero)
            else:
                bars.append(Bar(rank, r.kind, r.stage, r.microbatch, r.start_s - zero, r.end_s - zero))
            open_pair = pairs.get(action)
    return tuple(bars)


def _pairs(schedule: Schedule) -> dict[Action, Action]:
    """The backward of each overlapped pair, by its forward."""
    return {a.pair[0]: a.pair[1] for row in schedule.actions for a in row if a.pair is not None}


@dataclass(frozen=True)
class Measured:
    """A measured step, comparable with a `Simulation`: pauses between computations count as work, waits do not.

    `bubble` is by span, `bubble_makespan` by the whole step, fractions of 1.
    """

    makespan_s: float
    bubble: float
    bubble_makespan: float


def measured_step(records: Records, num_stages: int) -> Measured:
    """Makespan and bubbles of a recorded step."""
    rows = [row for row in timed_actions(records, num_stages).values() if row]
    if not rows:
        return Measured(0.0, 0.0, 0.0)
    work_s = sum(item.free_s - item.start_s for row in rows for item in row) / len(records)
    span_s = max(row[-1].free_s - row[0].start_s for row in rows)
    makespan_s = max(row[-1].free_s for row in rows) - min(row[0].start_s for row in rows)
    return Measured(makespan_s, 1.0 - work_s / span_s, 1.0 - work_s / makespan_s)


# ------------------------------------------------------------------------------------------------------- attribution


@dataclass(frozen=True, slots=True)
class Delay:
    """Time that one thing on the critical path of a measured step took beyond what the simulation takes for it.

    `what` is `ran` (the action itself), `message` (what it waited for took longer to arrive than messages do) or `order`
    (the simulated step has another critical path; rank -1 and no action).
    """

    rank: int
    action: Action | None
    what: str
    seconds: float

    def describe(self) -> str:
        """In words, with microseconds."""
        beyond = f"{self.seconds * 1e6:+,.0f} µs"
        if self.action is None:
            return f"{beyond}: the simulated step has another critical path"
        name = self.action.describe()
        if self.what == "message":
            return f"{beyond}: rank {self.rank} in the wait for the message to {name}, against the usual transfer"
        return f"{beyond}: rank {self.rank} in {name}, against the mean of its stage and kind"


def delays(records: Records, schedule: Schedule, costs: Costs) -> list[Delay]:
    """Where a measured step differs from the simulated one, the largest first; their sum is the difference in makespan.

    The critical path of the measured step is followed back from its last end: to the computation whose message an
    action waited for, else to the one before it on its rank. Every action on it is held against its simulated time,
    every message against `costs.transfer_s`.
    """
    timed = timed_actions(records, schedule.num_stages)
    rows = {rank: row for rank, row in timed.items() if row}
    if not rows:
        return []
    found: list[Delay] = []
    rank = max(rows, key=lambda r: rows[r][-1].free_s)
    index = len(rows[rank]) - 1
    expected_s = 0.0
    followed: set[tuple[int, int]] = set()
    while index >= 0:
        assert (rank, index) not in followed, f"rank {rank}: the records of more than one step"
        followed.add((rank, index))
        item = rows[rank][index]
        usual_s = costs.of(item.action)
        found.append(Delay(rank, item.action, "ran", item.free_s - item.start_s - usual_s))
        expected_s += usual_s
        if item.made_by is None:
            index -= 1
            continue
        source = rows[item.made_by[0]][item.made_by[1]]
        found.append(Delay(rank, item.action, "message", item.start_s - source.free_s - costs.transfer_s))
        expected_s += costs.transfer_s
        rank, index = item.made_by
    idle_s = rows[rank][0].start_s - min(row[0].start_s for row in rows.values())
    simulated_s = simulate(schedule, costs).makespan_s
    found.append(Delay(-1, None, "order", expected_s + idle_s - simulated_s))
    return sorted(found, key=lambda delay: -abs(delay.seconds))
