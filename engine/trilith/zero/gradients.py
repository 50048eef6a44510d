"""The one path that gradients take: from autograd into flat buffers, over tensor ranks, over data ranks, over ties.

Gradients accumulate in place over the microbatches of a step. In the last backward a unit whose gradients are complete is
reduced while the rest of backward runs. Units are launched in one fixed order, that of backward, a unit only after all
before it: every rank issues the same collectives in the same order, whatever its autograd did first or not at all. What
is launched together (a bucket) is a matter of time only; each unit has its collectives for itself, so that the result
does not depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trilith import comm
from trilith.errors import TrilithError
from trilith.precision import PrecisionPolicy
from trilith.topology import Topology
from trilith.zero.flat import FlatUnit

# Above so many elements a collective costs its bytes, not its latency: waiting for more to launch gains nothing.
_LATENCY_BOUND = 1 << 20

Bucket = tuple["_Flight", ...]


@dataclass
class _Flight:
    """One unit on its way through a step. `missing`: parameters that have not arrived in the last backward."""

    unit: FlatUnit
    missing: int = 0
    launched: bool = False
    exchange: Tensor | None = None
    payload: Tensor | None = None
    handle: comm.Handle | None = None


@dataclass
class _StageGradients:
    """The units of one stage; `counting`: its last backward is running; `buckets` in the order of launching."""

    flights: tuple[_Flight, ...]
    buckets: tuple[Bucket, ...]
    counting: bool = False
    queued: bool = False


@dataclass
class _Tie:
    """The copies of one unit on this rank, by stage; `handle`: of the sum over the ranks that hold others."""

    unit: str
    copies: Mapping[int, _Flight]
    handle: comm.Handle | None = None


class GradientReducer:
    """Reduces the gradients of this rank's stages. Every rank of the data and tensor groups makes the same calls."""

    def __init__(
        self,
        units: Mapping[int, Sequence[FlatUnit]],
        topology: Topology,
        policy: PrecisionPolicy,
        *,
        tied_units: frozenset[str] = frozenset(),
        overlap: bool = True,
        bucket_numel: int = _LATENCY_BOUND,
    ) -> None:
        self.topology = topology
        self._policy = policy
        bucket_numel = min(bucket_numel, _LATENCY_BOUND)
        self._stages = {stage: _stage_gradients(members, bucket_numel) for stage, members in units.items()}
        self._ties = _ties_of(self._stages, tied_units)
        shared = [tie for tie in self._ties if topology.tie(tie.unit).size > 1]
        self._awaited = frozenset(stage for tie in shared for stage in tie.copies)
        self._summed: set[int] = set()
        self._queue: deque[Bucket] = deque()
        self._exchanging: deque[_Flight] = deque()
        self._converts = policy.param_dtype != policy.grad_accum_dtype
        # Asked of the exchange areas, which are the same on all tensor ranks: all must launch at the same moments.
        exchanges = any(unit.layout.exchange_numel for members in units.values() for unit in members)
        self._overlaps = overlap and (topology.dp.size > 1 or (topology.tp.size > 1 and exchanges))
        self._hooks: list[RemovableHandle] = []
        self._views: dict[Tensor, tuple[_StageGradients, _Flight, Tensor]] = {}
        for gradients in self._stages.values():
            for flight in gradients.flights:
                for parameter, view in zip(flight.unit.parameters, flight.unit.gradient_views, strict=True):
                    self._views[parameter] = (gradients, flight, view)
                if not self._converts:
                    flight.unit.attach_gradients()
                if self._converts or self._overlaps:
                    self._register(gradients, flight)

    # ---- called while a step runs -------------------------------------------------------------------------------

    def begin_backward(self, stage: int, final: bool) -> None:
        """A backward of `stage` begins; `final`: the last of the step, after which its gradients are complete."""
        if final and self._overlaps:
            self._enqueue(self._stages[stage])
            self._stages[stage].counting = True

    def begin_weight_gradients(self, stage: int, weights: Sequence[Tensor], final: bool) -> None:
        """The second half of a backward begins: `accumulate` will be called for each of `weights`, in order.

        `final`: the last of the step. What does not go through `accumulate` is complete then.
        """
        if not (final and self._overlaps):
            return
        gradients = self._stages[stage]
        self._enqueue(gradients)
        for flight in gradients.flights:
            flight.missing = 0
        for weight in weights:
            self._views[weight][1].missing += 1
        gradients.counting = True
        self._advance()

    def accumulate(self, weight: Tensor, gradient: Tensor) -> None:
        """Add a weight's gradient that autograd did not bring."""
        gradients, flight, view = self._views[weight]
        view.add_(gradient)
        if gradients.counting:
            self._count(flight)

    def reduce(self, stage: int) -> None:
        """Launch what is not launched yet of a stage whose gradients are complete; parameters may lack a gradient."""
        gradients = self._stages[stage]
        self._enqueue(gradients)
        gradients.counting = False
        for flight in gradients.flights:
            flight.missing = 0
        self._advance()

    def tie_reduce(self, stage: int) -> None:
        """Launch the sums of tied units over their ranks, after `reduce`, when all stages here that hold one called it.

        All are launched at once, in the order of names: ranks that share several must begin them in one order.
        """
        self._settle_exchanges()
        self._summed.add(stage)
        if not self._awaited <= self._summed:
            return
        for tie in self._ties:
            group = self.topology.tie(tie.unit)
            if group.size > 1:
                assert tie.handle is None
                tie.handle = comm.all_reduce(self._local_sum(tie), group, async_op=True)

    def finish(self) -> None:
        """Wait until every gradient of the step is reduced, and be ready for the next step."""
        for stage in self._stages:
            self.reduce(stage)  # nothing is left of a stage that was reduced already
        self._settle_exchanges()
        for gradients in self._stages.values():
            for flight in gradients.flights:
                self._settle(flight)
        for tie in self._ties:
            self._finish_tie(tie)
        self._summed.clear()
        for gradients in self._stages.values():
            gradients.queued = gradients.counting = False
            for flight in gradients.flights:
                flight.launched = False

    def close(self) -> None:
        """Remove all hooks and let go of the gradients."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        for gradients in self._stages.values():
            for flight in gradients.flights:
                for parameter in flight.unit.parameters:
                    parameter.grad = None

    # ---- arrival ------------------------------------------------------------------------------------------------

    def _register(self, gradients: _StageGradients, flight: _Flight) -> None:
        for parameter, view in zip(flight.unit.parameters, flight.unit.gradient_views, strict=True):
            hook = self._hook(gradients, flight, view)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def _hook(self, gradients: _StageGradients, flight: _Flight, view: Tensor) -> Callable[[Tensor], None]:
        converts = self._converts

        def arrived(parameter: Tensor) -> None:
            if converts:
                assert parameter.grad is not None
                view.add_(parameter.grad)
                parameter.grad = None
            if gradients.counting:
                self._count(flight)

        return arrived

    def _count(self, flight: _Flight) -> None:
        if flight.launched:
            raise TrilithError(
                f"unit {flight.unit.layout.name}: a gradient arrived twice in one backward, after the unit was reduced "
                "(a parameter used in several reentrant checkpoints?): each must be complete when it arrives. "
                "Use checkpoint(..., use_reentrant=False), or set zero_optimization.overlap_comm to false"
            )
        flight.missing -= 1
        if flight.missing == 0:
            self._advance()

    # ---- launching ----------------------------------------------------------------------------------------------

    def _enqueue(self, gradients: _StageGradients) -> None:
        if not gradients.queued:
            gradients.queued = True
            self._queue.extend(gradients.buckets)
            for flight in gradients.flights:
                flight.missing = len(flight.unit.parameters)

    def _advance(self) -> None:
        """Launch the buckets at the head of the queue that are complete."""
        while self._queue and all(flight.missing <= 0 for flight in self._queue[0]):
            bucket = self._queue.popleft()
            before = list(self._exchanging)
            self._exchanging.clear()
            for flight in bucket:
                flight.launched = True
                if not self._converts:
                    flight.unit.collect_gradients()
                self._start_exchange(flight)
            # The bucket before is handed on only now: its exchange had the time of a bucket to finish.
            for flight in before:
                self._start_reduction(flight)
            for flight in bucket:
                if flight.exchange is None:
                    self._start_reduction(flight)
                else:
                    self._exchanging.append(flight)

    def _start_exchange(self, flight: _Flight) -> None:
        """Begin the sum over tensor ranks of the pieces that several of them hold; the others contribute zeros."""
        layout, gradient, group = flight.unit.layout, flight.unit.gradient, self.topology.tp
        if group.size == 1 or not layout.exchange_numel:
            return
        if layout.sums_in_place:
            start = layout.summed[0].offset
            flight.exchange = gradient[start : start + layout.exchange_numel]
        else:
            flight.exchange = gradient.new_zeros(layout.exchange_numel)
            for area, own in _summed_views(flight.exchange, flight.unit):
                area.copy_(own)
        flight.handle = comm.all_reduce(flight.exchange, group, async_op=True)

    def _start_reduction(self, flight: _Flight) -> None:
        """Take in the sum over tensor ranks, and begin the sum over data ranks."""
        unit, group = flight.unit, self.topology.dp
        if flight.exchange is not None:
            assert flight.handle is not None
            flight.handle.wait()
            if not unit.layout.sums_in_place:
                for area, own in _summed_views(flight.exchange, unit):
                    own.copy_(area)
            flight.exchange = flight.handle = None
        if group.size == 1:
            return
        payload = unit.gradient.to(self._policy.reduce_dtype)
        flight.payload = payload
        if unit.layout.degree == 1:
            flight.handle = comm.all_reduce(payload, group, async_op=True)
        else:
            flight.handle = comm.reduce_scatter(payload[unit.start : unit.stop], payload, group, async_op=True)

    def _settle_exchanges(self) -> None:
        while self._exchanging:
            self._start_reduction(self._exchanging.popleft())

    def _settle(self, flight: _Flight) -> None:
        """Wait for a unit's reduction; its own partition of the gradient is final then."""
        if flight.handle is None:
            return
        flight.handle.wait()
        assert flight.payload is not None
        if flight.payload is not flight.unit.gradient:
            flight.unit.own_gradient.copy_(flight.payload[flight.unit.start : flight.unit.stop])
        flight.handle = flight.payload = None

    # ---- ties ---------------------------------------------------------------------------------------------------

    def _local_sum(self, tie: _Tie) -> Tensor:
        """The sum of this rank's copies of a tied unit's gradient, in the order of stages, in the first one."""
        first, *others = tie.copies.values()
        for flight in tie.copies.values():
            assert flight.launched, f"{tie.unit} is summed with its copies before it is reduced"
            self._settle(flight)
        for other in others:
            first.unit.own_gradient.add_(other.unit.own_gradient)
        return first.unit.own_gradient

    def _finish_tie(self, tie: _Tie) -> None:
        """Wait for the sum of a tied unit, or make it where all its copies lie here; every copy gets it."""
        first, *others = tie.copies.values()
        if self.topology.tie(tie.unit).size == 1:
            self._local_sum(tie)
        else:
            assert tie.handle is not None, f"{tie.unit} was not summed with its copies"
            tie.handle.wait()
            tie.handle = None
        for other in others:
            other.unit.own_gradient.copy_(first.unit.own_gradient)


def _ties_of(stages: Mapping[int, _StageGradients], tied_units: frozenset[str]) -> tuple[_Tie, ...]:
    """The tied units of this rank's stages, in the order of names."""
    copies: dict[str, dict[int, _Flight]] = {}
    for stage in sorted(stages):
        for flight in stages[stage].flights:
            if flight.unit.layout.name in tied_units:
                copies.setdefault(flight.unit.layout.name, {})[stage] = flight
    return tuple(_Tie(name, copies[name]) for name in sorted(copies))


def _stage_gradients(units: Sequence[FlatUnit], bucket_numel: int) -> _StageGradients:
    """The units of a stage, and its buckets from the last unit to the first, as backward completes them."""
    flights = tuple(_Flight(unit) for unit in units)
    buckets: list[Bucket] = []
    size = 0
    for flight in reversed(flights):
        if buckets and size + flight.unit.layout.numel <= bucket_numel:
            buckets[-1] = (*buckets[-1], flight)
            size += flight.unit.layout.numel
        else:
            buckets.append((flight,))
            size = flight.unit.layout.numel
    return _StageGradients(flights, tuple(buckets))


def _summed_views(exchange: Tensor, unit: FlatUnit) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of the exchange area, part of the gradient) of each run that is summed over tensor ranks."""
    for p in unit.layout.summed:
        yield exchange[p.exchange_offset : p.exchange_offset + p.numel], unit.gradient[p.offset : p.offset + p.numel]
