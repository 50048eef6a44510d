"""Pipeline schedules as pure generators: GPipe, 1F1B, interleaved 1F1B, forward only, for any number of microbatches.

Stages are dealt to ranks in a loop: stage s lies on rank s % num_ranks. In every schedule the backwards of a stage run
in microbatch order, so that weight gradients are summed in one order and schedules are comparable bit for bit. A
generator returns compute actions only; `passes.complete` adds communication and reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from types import MappingProxyType

from trilith.errors import ScheduleError, Violation
from trilith.pipeline.action import Action, Kind, Schedule

Generator = Callable[[int, int, int], Schedule]


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


def gpipe(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """GPipe (Huang et al. 2019, arXiv 1811.06965): all forwards, then all backwards.

    The paper runs the backwards last in, first out; here they run in microbatch order as everywhere else, which has the
    same bubble, (p-1)/(m+p-1), and the same peak, m microbatches.
    """
    _require("gpipe", num_ranks, virtual_stages, num_microbatches)
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


def one_f_one_b(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """1F1B, also called PipeDream-Flush (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    Bubble as GPipe, (p-1)/(m+p-1); stage s holds at most min(p-s, m) microbatches.
    """
    _require("1f1b", num_ranks, virtual_stages, num_microbatches)
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
    _require("interleaved_1f1b", num_ranks, virtual_stages, num_microbatches)
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


def forward_only(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """Forwards without backwards (evaluation, generation), on the stages of any looped schedule."""
    _require("forward_only", num_ranks, virtual_stages, num_microbatches)
    groups = _groups(num_ranks, num_microbatches)
    return _looped(
        "forward_only",
        num_ranks,
        num_ranks * virtual_stages,
        num_microbatches,
        (
            [
                Action(Kind.FORWARD, chunk * num_ranks + rank, m)
                for group in groups
                for chunk in range(virtual_stages)
                for m in group
            ]
            for rank in range(num_ranks)
        ),
    )


SCHEDULES: MappingProxyType[str, Generator] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved_1f1b": interleaved_1f1b,
        "forward_only": forward_only,
    }
)
ONE_STAGE_PER_RANK = frozenset(("gpipe", "1f1b"))


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
    if name in ONE_STAGE_PER_RANK and virtual_stages > 1:
        rule = f"schedule {name} runs one stage per rank"
        fix = 'Set it to 1, or set pipeline.schedule to "interleaved_1f1b"'
        problems.append(Violation("pipeline.virtual_stages", virtual_stages, rule, fix))
    return problems


def _require(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> None:
    problems = schedule_problems(name, num_ranks, virtual_stages, num_microbatches)
    if problems:
        raise ScheduleError("\n".join(str(problem) for problem in problems))


def make_schedule(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """The compute actions of schedule `name`; `virtual_stages` counts the stages of one rank.

    Raises ScheduleError with rule and fix for a name that is not in `SCHEDULES` or arguments it does not admit.
    """
    _require(name, num_ranks, virtual_stages, num_microbatches)
    return SCHEDULES[name](num_ranks, virtual_stages, num_microbatches)
