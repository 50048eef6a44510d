"""Who talks to whom: degrees, rank arithmetic and the groups of a run. Pure, no torch, so that `trilith check` can ask.

The same ranks are seen in two views. Dense: (pp, replicate, shard, cp, tp), as in Megatron-LM (Narayanan et al. 2021)
with the data axis split in two for hybrid sharding (Zhao et al. 2023, PyTorch FSDP). Expert: (pp, edp, ep, etp), as in
parallel folding (Liu et al. 2025). Ranks are row-major, the last axis fastest, so that tensor ranks are neighbours.
Gradients reduce, and ZeRO partitions, over `dp` = shard x cp. `process_groups.py` makes the groups listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trilith.errors import TopologyError

if TYPE_CHECKING:
    import torch

Ties = Mapping[str, tuple[int, ...]]  # name of a shared flat unit -> the pipeline ranks that hold it, ascending
NO_TIES: Ties = MappingProxyType({})


@dataclass(frozen=True)
class View:
    """One way to lay the ranks out: axes with their degrees, row-major, the last axis fastest."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes)

    def size(self, axis: str) -> int:
        """Degree of `axis`."""
        return self.sizes[self._place(axis)]

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Coordinate of `rank` on every axis, in the order of `axes`."""
        assert 0 <= rank < self.world_size, (rank, self)
        found = []
        for size in reversed(self.sizes):
            rank, coordinate = divmod(rank, size)
            found.append(coordinate)
        return tuple(reversed(found))

    def coordinate(self, rank: int, axis: str) -> int:
        """Coordinate of `rank` on `axis`."""
        return self.coordinates(rank)[self._place(axis)]

    def rank_of(self, coordinates: Sequence[int]) -> int:
        """The rank at `coordinates`, given in the order of `axes`."""
        rank = 0
        for size, coordinate in zip(self.sizes, coordinates, strict=True):
            assert 0 <= coordinate < size, (coordinates, self)
            rank = rank * size + coordinate
        return rank

    def ranks_along(self, rank: int, axes: Sequence[str]) -> tuple[int, ...]:
        """All ranks, ascending, whose coordinates equal those of `rank` on every axis that is not in `axes`."""
        places = sorted(self._place(axis) for axis in axes)
        here = list(self.coordinates(rank))
        found = []
        for values in product(*(range(self.sizes[place]) for place in places)):
            for place, value in zip(places, values, strict=True):
                here[place] = value
            found.append(self.rank_of(here))
        return tuple(found)

    def _place(self, axis: str) -> int:
        assert axis in self.axes, f"no axis {axis!r}; there are {self.axes}"
        return self.axes.index(axis)


@dataclass(frozen=True)
class Degrees:
    """How many ranks each axis has. Data parallelism is replicate x shard; ZeRO partitions over shard x context.

    `expert` ranks hold different experts of a layer; `expert_tensor` ranks share one expert (0: as many as `tensor`).
    Experts fold over the ranks that the dense layers use, so these two add none.

    Raises TopologyError if a degree is not a positive integer or the expert degrees do not divide the ranks of a stage.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 0

    def __post_init__(self) -> None:
        for axis, degree in vars(self).items():
            least = 0 if axis == "expert_tensor" else 1
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < least:
                raise TopologyError(
                    f"degree of axis {axis!r} = {degree!r}: must be an integer of at least {least}. "
                    f"Set it to 1 to leave the axis unused"
                )
        stage, folded = self.world_size // self.pipeline, self.expert * self.etp
        if stage % folded != 0:
            raise TopologyError(
                f"expert {self.expert} x expert_tensor {self.etp} = {folded}: must divide the {stage} ranks of a "
                f"pipeline stage (replicate {self.replicate} x shard {self.shard} x context {self.context} x "
                f"tensor {self.tensor}). Choose expert degrees whose product divides {stage}"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def etp(self) -> int:
        """Ranks that share one expert."""
        return self.expert_tensor or self.tensor

    @property
    def dense(self) -> View:
        """The layout that dense layers, data and ZeRO use."""
        sizes = (self.pipeline, self.replicate, self.shard, self.context, self.tensor)
        return View(("pp", "replicate", "shard", "cp", "tp"), sizes)

    @property
    def folded(self) -> View:
        """The layout that expert layers use: the same ranks, (pp, edp, ep, etp)."""
        edp = self.world_size // (self.pipeline * self.expert * self.etp)
        return View(("pp", "edp", "ep", "etp"), (self.pipeline, edp, self.expert, self.etp))

    def view(self, name: str) -> View:
        """The view called `dense` or `expert`."""
        assert name in ("dense", "expert"), f"no view {name!r}; there are 'dense' and 'expert'"
        return self.dense if name == "dense" else self.folded

    def check_world_size(self, world_size: int) -> None:
        """Raise TopologyError unless these degrees fill `world_size` ranks exactly."""
        if world_size == self.world_size:
            return
        others = self.world_size // self.shard
        text = " x ".join(f"{axis} {degree}" for axis, degree in vars(self).items() if not axis.startswith("expert"))
        fix = f"start {self.world_size} ranks"
        if world_size % others == 0:
            fix += f", or set the data degree so that shard = {world_size // others}"
        raise TopologyError(
            f"{text} = {self.world_size} ranks, but the world size is {world_size}: they must be equal. "
            f"To mend it, {fix}"
        )


@dataclass(frozen=True)
class PlannedGroup:
    """A process group that will be made: its name and its ranks, ascending, or (source, target) for a channel.

    `uses`: the name of an earlier group with the same ranks, which serves for this one too.
    """

    name: str
    ranks: tuple[int, ...]
    uses: str = ""


def channel_name(source: int, target: int) -> str:
    """The name of the group that carries messages from pipeline rank `source` to pipeline rank `target`."""
    return f"channel {source}->{target}"


def tie_name(pipeline_ranks: Sequence[int]) -> str:
    """The name of the group over the pipeline ranks that share a tied unit."""
    return f"tie {','.join(map(str, pipeline_ranks))}"


def _axis_groups(degrees: Degrees) -> Iterator[tuple[str, View, tuple[str, ...]]]:
    """(name, view, axes) of the groups over whole axes that a run uses: every rank is in one of each name."""
    dense, experts = degrees.dense, degrees.folded
    yield "tp", dense, ("tp",)
    yield "cp", dense, ("cp",)
    yield "dp", dense, ("shard", "cp")
    if degrees.context > 1:
        yield "shard", dense, ("shard",)  # otherwise it is dp
    yield "replicate", dense, ("replicate",)
    yield "pp", dense, ("pp",)
    if degrees.expert > 1:
        yield "etp", experts, ("etp",)
        yield "ep", experts, ("ep",)
        yield "edp", experts, ("edp",)


def _rounds(members: Iterable[PlannedGroup]) -> list[list[PlannedGroup]]:
    """Deal groups of pipeline ranks out to rounds in which no rank comes twice: each to the first that is free."""
    rounds: list[list[PlannedGroup]] = []
    for group in members:
        for dealt in rounds:
            if not any(set(group.ranks) & set(other.ranks) for other in dealt):
                dealt.append(group)
                break
        else:
            rounds.append([group])
    return rounds


def _pipeline_groups(degrees: Degrees, ties: Ties, channels: Iterable[tuple[int, int]]) -> Iterator[PlannedGroup]:
    """The groups over some ranks of a pipeline, in pipeline ranks: channels, then one for each set of tied ranks."""
    for pair in sorted(set(channels)):
        yield PlannedGroup(channel_name(*pair), pair)
    for ranks in sorted(set(ties.values())):
        if len(ranks) < degrees.pipeline:  # otherwise it is pp
            yield PlannedGroup(tie_name(ranks), ranks)


def steps_of(
    degrees: Degrees, rank: int, *, ties: Ties = NO_TIES, channels: Iterable[tuple[int, int]] = ()
) -> tuple[PlannedGroup | None, ...]:
    """What one rank makes, step by step: a group, or nothing (None) where only others make one.

    Work does not grow with the world. `ties`: the pipeline ranks, two or more, that share each tied unit. `channels`:
    (source, target) pipeline ranks that send activations or gradients; each is a group of its own, so it waits for no
    other. All ranks have the same number of steps, and in a step the groups are disjoint: ranks that make their groups
    one by one, each waiting for all members of the next, always come to an end.
    """
    steps: list[PlannedGroup | None] = []
    first: dict[tuple[int, ...], str] = {}
    for name, view, axes in _axis_groups(degrees):
        ranks = view.ranks_along(rank, axes)
        if len(ranks) > 1:
            steps.append(PlannedGroup(name, ranks, first.get(ranks, "")))
            first.setdefault(ranks, name)
    here, column = degrees.dense.coordinate(rank, "pp"), degrees.dense.ranks_along(rank, ("pp",))
    for members in _rounds(_pipeline_groups(degrees, ties, channels)):
        mine = [group for group in members if here in group.ranks]
        steps.append(PlannedGroup(mine[0].name, tuple(column[p] for p in mine[0].ranks)) if mine else None)
    return tuple(steps)


def groups_of(
    degrees: Degrees, rank: int, *, ties: Ties = NO_TIES, channels: Iterable[tuple[int, int]] = ()
) -> tuple[PlannedGroup, ...]:
    """The groups of one rank, in the order in which it makes them."""
    steps = steps_of(degrees, rank, ties=ties, channels=channels)
    return tuple(group for group in steps if group is not None)


def group_plan(
    degrees: Degrees, *, ties: Ties = NO_TIES, channels: Iterable[tuple[int, int]] = ()
) -> tuple[PlannedGroup, ...]:
    """Every group of the run beside the control group, in the order of making. For `check`; no rank needs the whole."""
    check_channels(degrees, channels := tuple(channels))
    check_ties(degrees, ties)
    step_of: dict[PlannedGroup, int] = {}
    for rank in range(degrees.world_size):
        for step, group in enumerate(steps_of(degrees, rank, ties=ties, channels=channels)):
            if group is not None:
                step_of[group] = step
    return tuple(sorted(step_of, key=lambda group: (step_of[group], group.ranks)))


def check_channels(degrees: Degrees, channels: Iterable[tuple[int, int]]) -> None:
    """Raise TopologyError for a channel that does not join two different pipeline ranks."""
    for source, target in channels:
        if source == target or not (0 <= source < degrees.pipeline and 0 <= target < degrees.pipeline):
            raise TopologyError(
                f"channel ({source}, {target}): must join two different pipeline ranks of 0..{degrees.pipeline - 1}. "
                f"Raise the pipeline degree or choose a schedule for {degrees.pipeline} pipeline ranks"
            )


def check_ties(degrees: Degrees, ties: Ties) -> None:
    """Raise TopologyError for a tied unit that does not lie on two or more pipeline ranks, listed ascending."""
    for unit, ranks in ties.items():
        if len(ranks) < 2 or list(ranks) != sorted(set(ranks)) or min(ranks) < 0 or max(ranks) >= degrees.pipeline:
            raise TopologyError(
                f"tied unit {unit!r} on pipeline ranks {ranks}: must be two or more of 0..{degrees.pipeline - 1}, "
                "ascending. A tie between stages of one rank needs no group"
            )


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, as one of them sees it.

    `index` is this rank's place in `ranks` (ascending, but (source, target) for a channel). `handle` is the torch
    process group, None when the group has one rank: then there is no communication. `backend`: gloo or nccl.
    `transport`: where the ranks share memory, what carries their CPU tensors instead of gloo (a `comm.ring.Ring`).
    `meanwhile`: what a rank that waits for gloo does for the groups that share memory; false if that is nothing.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    handle: Any | None = None
    backend: str = "gloo"
    transport: Any | None = field(default=None, compare=False, repr=False)
    meanwhile: Callable[[], bool] | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class Topology:
    """This rank's place and its groups: made once by `process_groups.build_topology`, passed to constructors.

    `ties`: the pipeline ranks that share each tied unit.
    """

    degrees: Degrees
    rank: int
    device: torch.device
    control: Group
    groups: Mapping[str, Group]
    channels: Mapping[tuple[int, int], Group]
    ties: Ties = field(default_factory=lambda: NO_TIES)

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return self.degrees.world_size

    def coordinate(self, axis: str) -> int:
        """This rank's coordinate on `pp`, `replicate`, `shard`, `cp` or `tp`."""
        return self.degrees.dense.coordinate(self.rank, axis)

    def expert(self, axis: str) -> int:
        """This rank's coordinate on `pp`, `edp`, `ep` or `etp`, the view of expert layers."""
        return self.degrees.folded.coordinate(self.rank, axis)

    def group(self, name: str) -> Group:
        """The group called `name`; of size 1 where this run or this rank uses none."""
        return self.groups.get(name) or Group(name, (self.rank,), 0)

    @property
    def tp(self) -> Group:
        """Ranks that share each layer's matrices (tensor parallelism)."""
        return self.group("tp")

    @property
    def cp(self) -> Group:
        """Ranks that share each sequence (context parallelism)."""
        return self.group("cp")

    @property
    def dp(self) -> Group:
        """Ranks over which gradients are reduced and ZeRO partitions: shard x cp, flattened."""
        return self.group("dp")

    @property
    def replicate(self) -> Group:
        """Ranks that hold the same ZeRO partition (hybrid sharding)."""
        return self.group("replicate")

    @property
    def data_size(self) -> int:
        """Ranks that train on different samples: replicate x shard."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def data_index(self) -> int:
        """This rank's place among them."""
        return self.coordinate("replicate") * self.degrees.shard + self.coordinate("shard")

    @property
    def pp(self) -> Group:
        """The ranks of one pipeline."""
        return self.group("pp")

    def tie(self, unit: str) -> Group:
        """The ranks of this rank's pipeline that share the flat unit `unit`; of size 1 where this rank shares nothing."""
        ranks = self.ties.get(unit, ())
        if self.coordinate("pp") not in ranks:
            return Group(tie_name(ranks), (self.rank,), 0)
        return self.pp if len(ranks) == self.degrees.pipeline else self.groups[tie_name(ranks)]
