"""ZeRO-3 at work: brings whole weights before they are used and lets them go after, as the gather plan says.

Hooks on the modules that units belong to (`homes`) tell when a unit is used. Forward: before and after the module's call.
Backward: the first gradient of an output begins it; autograd runs the nodes that were made last first, so the
backward of a call is over when that of one begins whose forward had returned before it, or the whole backward ends. The
call of a module around others thus lasts in backward, too. A backward inside of a backward (a reentrant checkpoint) is
over when anything happens in the outer one. A step that leaves the plan, or has none yet, gathers on demand and lets go
at once, and its uses are written down: the next step has them as its plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trilith import comm
from trilith.models.structure import tensors_in
from trilith.topology import Group
from trilith.zero.flat import FlatUnit
from trilith.zero.placement import Tier
from trilith.zero.residency import GatherLimits, GatherPlan, Use, plan_gathers


@dataclass
class _Call:
    """One forward call of a home; `began` and `ended` count both events of all calls."""

    units: tuple[int, ...]
    began: int
    ended: int
    reads_in_backward: bool


@dataclass
class _Backward:
    """The backward of a call, under way. `use`: its place in the plan; `task`: autograd's number of the backward."""

    call: _Call
    use: int | None
    task: int


@dataclass
class _Pass:
    """Where a step stands. `plan`: None where uses are only written down (`seen`)."""

    plan: GatherPlan | None = None
    cursor: int = 0
    launched: int = 0  # gathers of uses before this one are launched
    seen: list[Use] = field(default_factory=list)


class Gatherer:
    """Makes units whole and lets them go. Every rank of the group makes the same calls in the same order.

    `gathered_numel`, `num_gathers`: since the beginning. `live_bytes`, `peak_bytes`: of whole weights of sharded units.
    """

    def __init__(self, units: Sequence[FlatUnit], group: Group, limits: GatherLimits) -> None:
        self._units, self._group, self._limits = tuple(units), group, limits
        self._number = {id(unit): i for i, unit in enumerate(self._units)}
        self._on_disk = any(unit.shard_swap is not None for unit in self._units)
        self._handles: dict[int, comm.Handle] = {}  # of units on their way
        self._whole: set[int] = set()  # units that are there, or on their way
        self._pins = [0] * len(self._units)
        self._due: set[int] = set()  # to be let go when nothing uses them
        self._plans: dict[Hashable, GatherPlan] = {}
        self._pass = _Pass()
        self._key: Hashable = None
        self._calls: list[tuple[int, int | None, tuple[int, ...]]] = []  # forwards under way: (began, use, pinned)
        self._backwards: dict[int, _Backward] = {}  # by the beginning of the call
        self._clock = 0
        self._num_whole = 0  # contexts that keep everything whole
        self._hooks: list[RemovableHandle] = []
        self.gathered_numel = self.num_gathers = self.live_bytes = self.peak_bytes = 0

    # ---- hooks --------------------------------------------------------------------------------------------------

    def attach(self, home: nn.Module, units: Sequence[FlatUnit], reads_in_backward: bool) -> tuple[int, ...]:
        """Gather `units` whenever `home` is called, and in its backward if that reads weights; returns their numbers."""
        numbers = tuple(sorted(self._number[id(unit)] for unit in units))

        def before(module: nn.Module, args: object) -> None:
            self._begin_forward(numbers)

        def after(module: nn.Module, args: object, output: object) -> None:
            self._end_forward(numbers, output, reads_in_backward)

        self._hooks.append(home.register_forward_pre_hook(before, prepend=True))
        self._hooks.append(home.register_forward_hook(after, always_call=True))
        return numbers

    def close(self) -> None:
        """Remove the hooks and leave all weights whole."""
        self.detach()
        for number in range(len(self._units)):
            self._launch(number)
        for number in range(len(self._units)):
            self._wait(number)

    def leave(self, group: Group) -> None:
        """Remove the hooks and forget the group; `group` is of this rank alone."""
        self.detach()
        self._group = group

    def detach(self) -> None:
        """Remove the hooks, for good."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def plan(self, uses: Sequence[Use]) -> GatherPlan:
        """The plan of a run whose uses are known."""
        return plan_gathers(uses, [unit.layout.numel for unit in self._units], self._limits)

    # ---- a run --------------------------------------------------------------------------------------------------

    def begin_run(self, key: Hashable = None, plan: GatherPlan | None = None) -> None:
        """A sequence of uses begins: those that the last run under `key` wrote down, or `plan`."""
        self._remember()
        self._calls.clear()
        self._end_backwards()
        self._key = key
        self._pass = _Pass(self._plans.get(key) or plan)
        if self._pass.plan is not None:
            self._drop(unit for unit in list(self._whole) if not self._pins[unit])

    def _remember(self) -> None:
        if self._pass.seen and self._pass.plan is None and self._key is not None:
            self._plans[self._key] = self.plan(self._pass.seen)

    def invalidate(self) -> None:
        """The shards have changed: nothing that is whole may be used again."""
        assert not any(self._pins), "weights changed while they were in use"
        self._drop(list(self._whole))

    def ahead(self) -> None:
        """Launch what the next use needs (GATHER): it may take a while until that begins."""
        if self._pass.plan is not None and self._pass.cursor < len(self._pass.plan.uses):
            self._launch_before(self._pass.plan, self._pass.cursor)

    def end_backward(self) -> None:
        """The whole backward is over."""
        self._end_backwards()

    def release(self) -> None:
        """Let go of what the plan does not keep (RELEASE); most of it is gone since the end of its use."""
        self._drop(unit for unit in list(self._due) if not self._pins[unit])

    def all_whole(self) -> AbstractContextManager[None]:
        """Within it every unit is whole; all ranks of the group must enter and leave together.

        What is computed inside is no use of a plan, and need not be the same on all ranks.
        """
        return self.whole(self._units)

    @contextmanager
    def whole(self, units: Iterable[FlatUnit]) -> Iterator[None]:
        """As `all_whole` for some units; others of `units` are whole anyway. Computing is for a context with all."""
        numbers = [self._number[id(unit)] for unit in units if id(unit) in self._number]
        missing = [number for number in numbers if number not in self._whole]
        for number in missing:
            self._launch(number)
        for number in numbers:
            self._wait(number)
            self._pins[number] += 1
        self._num_whole += 1
        try:
            yield
        finally:
            self._num_whole -= 1
            for number in numbers:
                self._pins[number] -= 1
            self._drop(missing)

    # ---- uses ---------------------------------------------------------------------------------------------------

    def _begin_forward(self, units: tuple[int, ...]) -> None:
        self._clock += 1
        task = torch._C._current_graph_task_id()
        self._end_backwards(task=task)
        # Computed again in backward, with the weights that are there for it.
        is_again = bool(self._backwards) and all(self._pins[unit] and unit not in self._handles for unit in units)
        if self._num_whole or is_again:
            self._calls.append((self._clock, None, ()))
        else:
            self._calls.append((self._clock, self._begin_use(units, backward=False), units))

    def _end_forward(self, units: tuple[int, ...], output: object, reads_in_backward: bool) -> None:
        if not self._calls:  # the run ended while the call was broken off
            return
        began, use, pinned = self._calls.pop()
        self._end_use(use, pinned)
        if not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        if tensors:
            self._clock += 1
            call = _Call(units, began, self._clock, reads_in_backward)

            def begin(gradient: Tensor) -> None:
                self._begin_backward(call)

            for tensor in tensors:
                tensor.register_hook(begin)

    def _begin_backward(self, call: _Call) -> None:
        task = torch._C._current_graph_task_id()
        self._end_backwards(call.ended, task)
        if call.reads_in_backward and call.began not in self._backwards and not self._num_whole:
            self._backwards[call.began] = _Backward(call, self._begin_use(call.units, backward=True), task)

    def _end_backwards(self, ended: float = inf, task: int = -1) -> None:
        """End the backwards of calls that began when one had `ended`, and those inside the backward `task`; last first.

        With neither, all.
        """
        over = [began for began, backward in self._backwards.items() if began > ended or backward.task > task]
        for began in sorted(over, reverse=True):
            backward = self._backwards.pop(began)
            self._end_use(backward.use, backward.call.units)

    def _begin_use(self, units: tuple[int, ...], backward: bool) -> int | None:
        """Bring the weights of `units`; returns the place in the plan, None where the step does not follow one."""
        around = (unit for unit, pins in enumerate(self._pins) if pins)
        use = Use(tuple(sorted({*units, *around})), backward)
        state, place = self._pass, None
        state.seen.append(use)
        if state.plan is not None:
            if not self._is_next(state.plan, use):
                self._leave_plan(use)
            if state.plan is not None:
                place = state.cursor
                state.cursor += 1
                self._launch_before(state.plan, place)
        for unit in units:
            self._launch(unit)
        for unit in units:
            self._pins[unit] += 1
            self._due.discard(unit)
            self._wait(unit)
        return place

    def _is_next(self, plan: GatherPlan, use: Use) -> bool:
        return self._pass.cursor < len(plan.uses) and plan.uses[self._pass.cursor] == use

    def _leave_plan(self, use: Use) -> None:
        """The step is not as the one before: let go of what only the plan wanted, and write the step down anew.

        A forward that nothing followed, such as an evaluation's, may have come between: then the plan begins again.
        """
        state = self._pass
        self._drop(unit for unit in list(self._whole) if not self._pins[unit] and unit not in use.units)
        if state.plan is not None and state.plan.uses[0] == use:
            state.cursor = state.launched = 0
            state.seen = [use]
        else:
            state.plan = None

    def _end_use(self, place: int | None, units: tuple[int, ...]) -> None:
        """`place`: what `_begin_use` returned."""
        for unit in units:
            self._pins[unit] -= 1
        plan = self._pass.plan
        if plan is None or place is None:
            self._due.update(units)
        else:
            self._due.update(plan.releases[place])
        self._drop(unit for unit in list(self._due) if not self._pins[unit])
        if plan is not None and place is not None:
            for unit in plan.after[place]:
                self._launch(unit)

    def _launch_before(self, plan: GatherPlan, place: int) -> None:
        if self._pass.launched <= place:
            self._pass.launched = place + 1
            for unit in plan.before[place]:
                self._launch(unit)
            self._read_ahead(plan, place + 1)

    def _read_ahead(self, plan: GatherPlan, place: int) -> None:
        """Begin to read what the next gathers need from disk."""
        room = self._limits.reads if self._on_disk else 0
        while room and place < len(plan.uses):
            for number in (*plan.before[place], *plan.after[place]):
                swap = self._units[number].shard_swap
                if swap is not None and room:
                    swap.fetch()
                    room -= 1
            place += 1

    # ---- weights ------------------------------------------------------------------------------------------------

    def _launch(self, number: int) -> None:
        """Begin to gather a unit that is neither there nor on its way."""
        if number in self._whole:
            return
        unit = self._units[number]
        assert unit.shard is not None
        self._whole.add(number)
        whole, shard = unit.unshard(), unit.shard
        if unit.placement.weights is not Tier.DEVICE:
            shard = whole[unit.start : unit.stop]
            unit.read_shard(shard)
        self._handles[number] = comm.all_gather(whole, shard, self._group, unit.layout.uneven_sizes, async_op=True)
        self.num_gathers += 1
        self.gathered_numel += unit.layout.numel
        self.live_bytes += unit.whole_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _wait(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:
            handle.wait()
            self._units[number].show()

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._due.discard(number)
            if number in self._whole:
                self._wait(number)
                self._whole.discard(number)
                self._units[number].reshard()
                self.live_bytes -= self._units[number].whole_bytes
