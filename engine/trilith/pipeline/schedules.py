"""The pipeline schedules by name, and the looped ones among them: GPipe, 1F1B, interleaved 1F1B, forward only.

A looped schedule deals stages to ranks in turn: stage s lies on rank s % num_ranks. In every schedule both gradients of
a stage are made in microbatch order, so that weight gradients are summed in one order and schedules are comparable bit
for bit. A generator is a pure function that returns compute actions only; `passes.complete` adds the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from types import MappingProxyType

from trilith.errors import ScheduleError, Violation
from trilith.pipeline.action import Action, Kind, Schedule
from trilith.pipeline.delayed import pipedream, pipedream_2bw
from trilith.pipeline.v_shape import v_half, v_min, zb_v
from trilith.pipeline.zero_bubble import dualpipe_v, zb_h1, zb_h2


def _looped(name: str, num_ranks: int, num_stages: int, num_microbatches: int, per_rank: Iterable) -> Schedule:
    """A schedule whose stage s lies on rank s % num_ranks."""
    placement = tuple(stage % num_ranks for stage in range(num_stages))
    actions = tuple(tuple(actions) for actions in per_rank)
    return Schedule(name, num_ranks, num_stages, num_microbatches, placement, actions)


def _merge(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    order = list(forwards[:warmup])
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    return order + list(backwards[len(forwards) - warmup :])


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """GPipe (Huang et al. 2019, arXiv 1811.06965): all forwards, then all backwards.

    The paper runs the backwards last in, first out; here they run in microbatch order as everywhere else, which has the
    same bubble, (p-1)/(m+p-1), and the same peak, m microbatches.
    """
    return _looped(
        "gpipe",
        num_ranks,
        num_ranks,
        num_microbatches,
        (
            [Action(kind, rank, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(num_microbatches)]
            for rank in range(num_ranks)
        ),
    )


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B, also called PipeDream-Flush (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    Bubble as GPipe, (p-1)/(m+p-1); stage s holds at most min(p-s, m) microbatches.
    """
    return _one_f_one_b("1f1b", num_ranks, num_microbatches)


def _one_f_one_b(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    def of_rank(rank: int) -> list[Action]:
        forwards = [Action(Kind.FORWARD, rank, m) for m in range(num_microbatches)]
        backwards = [Action(Kind.BACKWARD, rank, m) for m in range(num_microbatches)]
        return _merge(forwards, backwards, min(num_ranks - 1 - rank, num_microbatches))

    return _looped(name, num_ranks, num_ranks, num_microbatches, map(of_rank, range(num_ranks)))


def _groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """Consecutive microbatches that pass a chunk together: as many groups of at least `num_ranks` as there can be.

    A group smaller than the number of ranks would stall: its first microbatch comes back to rank 0 only after
    `num_ranks` slots. So a remainder is spread over the groups instead of forming one of its own. The first are the
    larger ones.
    """
    count = max(1, num_microbatches // num_ranks)
    size, extra = divmod(num_microbatches, count)
    starts = [index * size + min(index, extra) for index in range(count + 1)]
    return [range(lo, hi) for lo, hi in pairwise(starts)]


def interleaved_1f1b(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473, section 2.2), for any number of microbatches.

    Each rank holds v = `virtual_stages` chunks. Microbatches go through the chunks in groups, of p where p divides m
    (then the order is Megatron's), else of p to 2p-1 (`_groups`), so no group stalls. With equal stages of forward time
    f and backward time b the makespan is max(v m + p - 1, v p + m - 1) (f + b). That is a lower bound of any order of
    these stages: the last rank cannot start before (p-1) f and (p-1) b must follow its last action; the last stage
    cannot start before (v p - 1) f and (v p - 1) b must follow it. So for m >= p the bubble is (p-1) / (v m + p - 1),
    remainders included. With g the largest group, rank s holds at most min(v m, 2 (p-1-s) + (v-1) g + 1) chunks.
    """
    if virtual_stages == 1:
        return _one_f_one_b("interleaved_1f1b", num_ranks, num_microbatches)
    groups = _groups(num_ranks, num_microbatches)
    largest = max(len(group) for group in groups)
    chunks = range(virtual_stages)

    def of_rank(rank: int) -> list[Action]:
        forwards = [
            Action(Kind.FORWARD, chunk * num_ranks + rank, m) for group in groups for chunk in chunks for m in group
        ]
        backwards = [
            Action(Kind.BACKWARD, chunk * num_ranks + rank, m)
            for group in groups
            for chunk in reversed(chunks)
            for m in group
        ]
        warmup = 2 * (num_ranks - 1 - rank) + (virtual_stages - 1) * largest
        return _merge(forwards, backwards, min(warmup, len(forwards)))

    num_stages = num_ranks * virtual_stages
    return _looped("interleaved_1f1b", num_ranks, num_stages, num_microbatches, map(of_rank, range(num_ranks)))


def forward_only(placement: Sequence[int], num_microbatches: int) -> Schedule:
    """Forwards without backwards (evaluation, generation) on the stages of any schedule.

    `placement[stage]` is the rank of a stage. Each rank runs, whenever it is free, the most urgent forward whose input is
    there, at one slot per forward. Two rules of urgency are tried and the shorter result is taken, the first if equal:
    a group of microbatches (`_groups`) passes one visit of a rank (consecutive stages on it) after the other; or the
    oldest microbatch goes first. The makespan is the shortest there is for looped placements, max(v m + p - 1,
    v p + m - 1) slots, for V-shaped ones, 2 (m + p - 1), and for p blocks of v consecutive stages, v (m + p - 1).
    """
    group_of = [index for index, group in enumerate(_groups(max(placement) + 1, num_microbatches)) for _ in group]
    visit_of = [0]
    for before, after in pairwise(placement):
        visit_of.append(visit_of[-1] + (before != after))
    by_group = _play_forwards(placement, num_microbatches, lambda stage, m: (group_of[m], visit_of[stage], m))
    by_age = _play_forwards(placement, num_microbatches, lambda stage, m: (m,))
    _, rows = min(by_group, by_age, key=lambda played: played[0])
    return Schedule("forward_only", len(rows), len(placement), num_microbatches, tuple(placement), rows)


def _play_forwards(
    placement: Sequence[int], num_microbatches: int, urgency: Callable[[int, int], tuple[int, ...]]
) -> tuple[int, tuple[tuple[Action, ...], ...]]:
    """(slots, actions per rank) where each rank runs in each slot the possible forward of least `urgency`, if any."""
    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    possible: list[list[tuple[tuple[int, ...], int, int]]] = [[] for _ in rows]
    arriving = [(0, m) for m in range(num_microbatches)]
    slots = 0
    while arriving or any(possible):
        for stage, m in arriving:
            heappush(possible[placement[stage]], (urgency(stage, m), stage, m))
        arriving = []
        for row, choices in zip(rows, possible, strict=True):
            if choices:
                _, stage, m = heappop(choices)
                row.append(Action(Kind.FORWARD, stage, m))
                if stage + 1 < len(placement):
                    arriving.append((stage + 1, m))
        slots += 1
    return slots, tuple(map(tuple, rows))


def _any_count(num_ranks: int) -> int:
    """The least number of microbatches of a schedule that has no minimum."""
    return 1


@dataclass(frozen=True)
class Recipe:
    """How a schedule is made and what it asks for.

    `make(num_ranks, stages_per_rank, num_microbatches)` returns its compute actions. `stages_per_rank` is None where any
    number will do. `min_microbatches(num_ranks)` is the least it admits. `splits_backward`: weight gradients are actions
    of their own, at least in part. `asynchronous`: it changes the mathematics (updates with gradients of older weights).
    """

    make: Callable[[int, int, int], Schedule]
    stages_per_rank: int | None = 1
    min_microbatches: Callable[[int], int] = _any_count
    splits_backward: bool = False
    asynchronous: bool = False


def _fixed(generator: Callable[[int, int], Schedule]) -> Callable[[int, int, int], Schedule]:
    """A generator whose number of stages per rank is fixed, in the form of `Recipe.make`."""
    return lambda num_ranks, _, num_microbatches: generator(num_ranks, num_microbatches)


SCHEDULES: MappingProxyType[str, Recipe] = MappingProxyType(
    {
        "gpipe": Recipe(_fixed(gpipe)),
        "1f1b": Recipe(_fixed(one_f_one_b)),
        "interleaved_1f1b": Recipe(interleaved_1f1b, stages_per_rank=None),
        "zb_h1": Recipe(_fixed(zb_h1), splits_backward=True),
        "zb_h2": Recipe(_fixed(zb_h2), min_microbatches=lambda p: 2 * p - 1, splits_backward=True),
        "zb_v": Recipe(_fixed(zb_v), stages_per_rank=2, splits_backward=True),
        "v_half": Recipe(_fixed(v_half), stages_per_rank=2, splits_backward=True),
        "v_min": Recipe(_fixed(v_min), stages_per_rank=2, splits_backward=True),
        "dualpipe_v": Recipe(
            _fixed(dualpipe_v), stages_per_rank=2, min_microbatches=lambda p: 2 * p, splits_backward=True
        ),
        "pipedream": Recipe(_fixed(pipedream), asynchronous=True),
        "pipedream_2bw": Recipe(_fixed(pipedream_2bw), min_microbatches=lambda p: p, asynchronous=True),
    }
)


def schedule_problems(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> list[Violation]:
    """Every rule that these arguments of `make_schedule` break; empty where the schedule can be made."""
    problems = []
    if name not in SCHEDULES:
        problems.append(Violation("pipeline.schedule", name, f"must be one of {', '.join(SCHEDULES)}"))
    for path, value in (
        ("parallel.pipeline", num_ranks),
        ("pipeline.virtual_stages", virtual_stages),
        ("gradient_accumulation_steps", num_microbatches),
    ):
        if value < 1:
            problems.append(Violation(path, value, "must be at least 1"))
    return problems or _recipe_problems(name, num_ranks, virtual_stages, num_microbatches)


def _recipe_problems(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> list[Violation]:
    """What the recipe of a schedule asks for and does not get."""
    recipe = SCHEDULES[name]
    problems = []
    if recipe.stages_per_rank not in (None, virtual_stages):
        count = recipe.stages_per_rank
        rule = f"schedule {name} runs {'one stage' if count == 1 else f'{count} stages'} per rank"
        fix = f'Set it to {count}, or set pipeline.schedule to "interleaved_1f1b"'
        problems.append(Violation("pipeline.virtual_stages", virtual_stages, rule, fix))
    least = recipe.min_microbatches(num_ranks)
    if num_microbatches < least:
        rule = f"schedule {name} on {num_ranks} pipeline ranks needs at least {least} microbatches"
        fix = f'Set it to {least} or more, or set pipeline.schedule to "1f1b"'
        problems.append(Violation("gradient_accumulation_steps", num_microbatches, rule, fix))
    return problems


def make_schedule(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """The compute actions of schedule `name`; `virtual_stages` counts the stages of one rank.

    Raises ScheduleError with rule and fix for a name that is not in `SCHEDULES` or arguments it does not admit.
    """
    problems = schedule_problems(name, num_ranks, virtual_stages, num_microbatches)
    if problems:
        raise ScheduleError("\n".join(str(problem) for problem in problems))
    return SCHEDULES[name].make(num_ranks, virtual_stages, num_microbatches)
