"""Which units are whole when: the gather plan of ZeRO-3, computed before anything runs. Pure, no torch.

A rank's step is a sequence of uses: a forward or a backward of one unit, in the order that the schedule fixes. With the
future known, the best set of units to keep whole under a cap is known, too: whoever must make room lets go of the unit
that is used again last (Belady 1966). That is best for units of one size; among others letting go of the oldest may be
better, so the better of both is taken. What is not kept is let go right after its use, and gathered again ahead of the
next one, as far ahead as the prefetch bucket and the cap allow; one unit may be larger than the bucket.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from trilith.pipeline.action import INPUT_GRADIENT, Action, Kind


@dataclass(frozen=True)
class Use:
    """A computation that needs the weights of `units` (numbers), all at once."""

    units: tuple[int, ...]
    backward: bool = False


@dataclass(frozen=True)
class GatherLimits:
    """`max_live`, `max_reuse`, `prefetch` in elements; the keys `stage3_max_live_parameters`, `stage3_max_reuse_distance`,
    `stage3_prefetch_bucket_size`. `after_backward`: ask for the next unit after a backward, not before. `reads`: units that
    are read from disk ahead of their gathers."""

    max_live: int
    max_reuse: int
    prefetch: int
    after_backward: bool = False
    reads: int = 1


def gather_limits(zero: Any) -> GatherLimits:
    """The limits that the config section `zero_optimization` sets."""
    return GatherLimits(
        max_live=zero.stage3_max_live_parameters,
        max_reuse=zero.stage3_max_reuse_distance,
        prefetch=zero.stage3_prefetch_bucket_size,
        after_backward=zero.stage3_backward_prefetch == "post",
        reads=zero.offload_param.buffer_count,
    )


@dataclass(frozen=True)
class GatherPlan:
    """What happens at each use, by its index: `before` and `after` it gathers are launched, in this order, and at its end
    the units in `releases` are let go. `sizes`: elements of each unit."""

    uses: tuple[Use, ...]
    sizes: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    releases: tuple[tuple[int, ...], ...]
    peak_numel: int

    @property
    def num_gathers(self) -> int:
        """All-gathers of a step."""
        return sum(map(len, self.before)) + sum(map(len, self.after))

    @property
    def gathered_numel(self) -> int:
        """Elements that are gathered in a step."""
        return sum(self.sizes[unit] for units in (*self.before, *self.after) for unit in units)


@dataclass
class _Stay:
    """A unit is whole from its use `first` to its use `last`; its gather is launched at `slot`: 2 i before use i, 2 i + 1
    after it."""

    unit: int
    first: int
    last: int
    slot: int = 0


def plan_gathers(uses: Sequence[Use], sizes: Sequence[int], limits: GatherLimits) -> GatherPlan:
    """The plan of a sequence of uses; `sizes[unit]` in elements. At most `max_live` of them are whole at one time, or as
    many as the use at hand needs."""
    choices = [_stays(uses, sizes, limits, oldest_first=oldest_first) for oldest_first in (False, True)]
    stays = min(choices, key=lambda stays: sum(sizes[stay.unit] for stay in stays))
    occupied = [0] * len(uses)
    for stay in stays:
        for index in range(stay.first, stay.last + 1):
            occupied[index] += sizes[stay.unit]
    stays = _prefetch(stays, uses, sizes, limits, occupied)
    before: list[list[int]] = [[] for _ in uses]
    after: list[list[int]] = [[] for _ in uses]
    releases: list[list[int]] = [[] for _ in uses]
    for stay in stays:
        (after if stay.slot % 2 else before)[stay.slot // 2].append(stay.unit)
        releases[stay.last].append(stay.unit)
    return GatherPlan(
        tuple(uses),
        tuple(sizes),
        tuple(map(tuple, before)),
        tuple(map(tuple, after)),
        tuple(map(tuple, releases)),
        max(occupied, default=0),
    )


def _stays(uses: Sequence[Use], sizes: Sequence[int], limits: GatherLimits, *, oldest_first: bool) -> list[_Stay]:
    """Which unit is whole from when to when, gathered where it is used, in the order of their beginnings.

    Room is made by the unit that is used again last, or, `oldest_first`, by the one that was used longest ago.
    """
    places: dict[int, list[int]] = {}
    for index, use in enumerate(uses):
        for unit in use.units:
            places.setdefault(unit, []).append(index)
    travelled = _travelled(uses, sizes)
    # What is kept leaves room for one unit that is fetched ahead: gathers that nobody waits for beat fewer gathers.
    kept = limits.max_live
    if limits.prefetch and sum(sizes) > kept:
        kept -= max(sizes)
    live: dict[int, _Stay] = {}
    stays: list[_Stay] = []
    live_numel = 0

    def next_use(unit: int, index: int) -> int:
        later = bisect_right(places[unit], index)
        return places[unit][later] if later < len(places[unit]) else len(uses)

    def worthlessness(unit: int, index: int) -> tuple[int, int]:
        if not oldest_first:
            return next_use(unit, index), 0
        last = live[unit].last
        return -last, -uses[last].units.index(unit)

    for index, use in enumerate(uses):
        missing = [unit for unit in use.units if unit not in live]
        wanted = sum(sizes[unit] for unit in missing)
        others = sorted((unit for unit in live if unit not in use.units), key=lambda unit: worthlessness(unit, index))
        while others and live_numel + wanted > kept:
            live_numel -= sizes[others[-1]]
            del live[others.pop()]
        for unit in missing:
            live[unit] = _Stay(unit, index, index)
            stays.append(live[unit])
        live_numel += wanted
        for unit in use.units:
            live[unit].last = index
            again = next_use(unit, index)
            if again == len(uses) or travelled[again] - travelled[index + 1] > limits.max_reuse:
                live_numel -= sizes[unit]
                del live[unit]
    return stays


def _travelled(uses: Sequence[Use], sizes: Sequence[int]) -> list[int]:
    """The elements used before each use, and before the end."""
    return [0, *accumulate(sum(sizes[unit] for unit in use.units) for use in uses)]


def _prefetch(
    stays: Sequence[_Stay], uses: Sequence[Use], sizes: Sequence[int], limits: GatherLimits, occupied: list[int]
) -> list[_Stay]:
    """Move gathers ahead, one after the other and none past the one before; `occupied` is kept up to date.

    A unit that would be gathered again as soon as it is let go is not let go: two stays become one.
    """
    travelled = _travelled(uses, sizes)
    ahead = [0] * len(uses)  # elements on their way, or waiting to be used, during each use
    earliest = 0
    before: dict[int, _Stay] = {}  # unit -> its stay before
    kept: list[_Stay] = []
    for stay in stays:
        size, slot, last = sizes[stay.unit], 2 * stay.first, before.get(stay.unit)
        for index in range(stay.first - 1, -1, -1):
            late = limits.after_backward and uses[index].backward
            if not limits.prefetch or (last and index <= last.last) or 2 * index + late < earliest:
                break
            if late:  # what use `index` lets go makes room for what is launched at its end
                slot = 2 * index + 1
                break
            if occupied[index] + size > limits.max_live or (ahead[index] and ahead[index] + size > limits.prefetch):
                break
            slot = 2 * index
        for index in range(-(-slot // 2), stay.first):
            occupied[index] += size
            ahead[index] += size
        if (
            last
            and slot == 2 * (last.last + 1)
            and travelled[stay.first] - travelled[last.last + 1] <= limits.max_reuse
        ):
            last.last = stay.last
            continue
        stay.slot = earliest = slot
        before[stay.unit] = stay
        kept.append(stay)
    return kept


@dataclass(frozen=True)
class StageUses:
    """The uses of one forward and of one backward of a stage, in order."""

    forward: tuple[Use, ...]
    backward: tuple[Use, ...]


def uses_of(
    actions: Sequence[Action], stages: Mapping[int, StageUses]
) -> tuple[tuple[Use, ...], tuple[tuple[int, int, int], ...]]:
    """The uses of a rank's actions, and (index of the action, first use, end) for each that has some.

    Forwards and both kinds of backward read the weights; the second half of a split one needs none.
    """
    uses: list[Use] = []
    spans: list[tuple[int, int, int]] = []
    for index, action in enumerate(actions):
        first = len(uses)
        for part in action.parts():
            if part.kind is Kind.FORWARD:
                uses += stages[part.stage].forward
            elif part.kind in INPUT_GRADIENT:
                uses += stages[part.stage].backward
        if len(uses) > first:
            spans.append((index, first, len(uses)))
    return tuple(uses), tuple(spans)


def gather_marks(plan: GatherPlan, spans: Sequence[tuple[int, int, int]]) -> dict[int, tuple[bool, bool]]:
    """For `pipeline.passes.insert_gathers`: by index of an action with uses (`spans`, of `uses_of`), whether it begins
    with weights to be fetched, and whether it lets some go."""
    return {index: (bool(plan.before[lo]), any(plan.releases[lo:hi])) for index, lo, hi in spans}
