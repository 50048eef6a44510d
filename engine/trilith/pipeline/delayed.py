"""Asynchronous schedules: steps follow one another without a flush, so gradients are late by a known delay. No torch.

A schedule here is a window of several steps, one long 1F1B that is drained only at its end; its span bubble,
(p-1) / (steps m + p - 1), tends to 0. `segments` says where one step ends and the next begins.
"""

from __future__ import annotations

from trilith.errors import ScheduleError
from trilith.pipeline.action import COMPUTE, INPUT_GRADIENT, MESSAGES, Action, Kind, Schedule, Token, message_of
from trilith.pipeline.simulate import Costs, action_times


def pipedream(num_ranks: int, num_microbatches: int, num_steps: int = 1) -> Schedule:
    """PipeDream with weight stashing (Harlap et al. 2018, arXiv 1806.03377): an optimizer step after every microbatch.

    A window of `num_steps` steps of `num_microbatches`. Stage s of p runs F(k), and with the weights stashed then also
    B(k), after max(0, k-(p-1-s)) updates of its own; it holds at most p-s microbatches, each with weights of its own.
    """
    return _window("pipedream", num_ranks, num_microbatches * num_steps, update_every=1, updates=True)


def pipedream_2bw(num_ranks: int, num_microbatches: int, num_steps: int = 1) -> Schedule:
    """PipeDream-2BW (Narayanan et al. 2021, arXiv 2006.09503): two versions of the weights, a delay of one step.

    A window of `num_steps` steps of `num_microbatches`. The update of a step is taken at the end of its segment
    (`segments`), by all ranks, so it is no action of the schedule. It is first used two steps later: at the end of
    a segment, forwards of the next step have begun, none of the one after it.

    Raises ScheduleError for fewer microbatches than ranks: two versions would not be enough.
    """
    if num_microbatches < num_ranks:
        raise ScheduleError(
            f"schedule pipedream_2bw: {num_microbatches} microbatches on {num_ranks} ranks; it needs at least "
            f"{num_ranks}, one per rank"
        )
    return _window("pipedream_2bw", num_ranks, num_microbatches * num_steps, update_every=num_microbatches)


def _window(name: str, num_ranks: int, num_microbatches: int, update_every: int, updates: bool = False) -> Schedule:
    """1F1B over all microbatches, with an UPDATE behind every backward where `updates` are asked for."""

    def of_rank(rank: int) -> tuple[Action, ...]:
        ahead = min(num_ranks - 1 - rank, num_microbatches)
        row = [Action(Kind.FORWARD, rank, m) for m in range(ahead)]
        for m in range(num_microbatches):
            if m + ahead < num_microbatches:
                row.append(Action(Kind.FORWARD, rank, m + ahead))
            row.append(Action(Kind.BACKWARD, rank, m))
            if updates:
                row.append(Action(Kind.UPDATE, rank, m))
        return tuple(row)

    actions = tuple(of_rank(rank) for rank in range(num_ranks))
    placement = tuple(range(num_ranks))
    return Schedule(name, num_ranks, num_ranks, num_microbatches, placement, actions, update_every=update_every)


def segments(schedule: Schedule, microbatches_per_step: int) -> tuple[tuple[int, ...], ...]:
    """Per step of a completed window, per rank: the index into its actions up to which the rank goes for that step.

    The cut is one moment for all ranks, on the time axis on which `passes.insert_communication` laid out the messages:
    when all backwards of the step's microbatches are done everywhere, that is, stage 0's last one with its reductions
    and its update. What a rank has begun by then, it ends; a message that is made later is neither sent nor received
    before the cut. So all ranks may wait for each other at every cut. The last segment ends at the end.
    """
    assert schedule.placement == tuple(range(schedule.num_ranks)), schedule.placement
    assert schedule.num_microbatches % microbatches_per_step == 0, (schedule.num_microbatches, microbatches_per_step)
    starts, ends = _moments(schedule)
    cuts = []
    done = [0] * schedule.num_ranks
    for last in range(microbatches_per_step - 1, schedule.num_microbatches - 1, microbatches_per_step):
        cut = ends[Kind.BACKWARD, 0, last]
        done = [_begun(row, first, starts, ends, cut) for row, first in zip(schedule.actions, done, strict=True)]
        cuts.append(tuple(done))
    return (*cuts, tuple(len(actions) for actions in schedule.actions))


def _moments(schedule: Schedule) -> tuple[dict[Token, float], dict[Token, float]]:
    """When each computation of the window starts and ends, by what it makes, were all its stages to train.

    Frozen stages lost backwards, but what is left of the window keeps its place among them.
    """
    whole = _window(schedule.name, schedule.num_ranks, schedule.num_microbatches, schedule.update_every)
    starts: dict[Token, float] = {}
    ends: dict[Token, float] = {}
    for row in action_times(whole, Costs.uniform(whole.num_stages)):
        for action, start, end in row:
            made = (action.kind, action.stage, action.microbatch)
            starts[made], ends[made] = start, end
    return starts, ends


def _begun(
    actions: tuple[Action, ...], first: int, starts: dict[Token, float], ends: dict[Token, float], cut: float
) -> int:
    """How many actions of a rank come before the moment `cut`, `first` of them known to.

    What is no computation and no message comes with the one before it.
    """
    for index in range(first, len(actions)):
        action = actions[index]
        kind, stage, m = action.kind, action.stage, action.microbatch
        if kind in COMPUTE:
            if starts[Kind.BACKWARD if kind in INPUT_GRADIENT else Kind.FORWARD, stage, m] >= cut:
                return index
        elif kind in MESSAGES:
            if ends[message_of(action)] > cut:
                return index
    return len(actions)
