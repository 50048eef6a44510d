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
from dataclasses import dataclass, field

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
    tied: list[comm.Handle] = field(default_factory=list)


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
        self._tied_units = tied_units
        bucket_numel = min(bucket_numel, _LATENCY_BOUND)
        self._stages = {stage: _stage_gradients(members, bucket_numel) for stage, members in units.items()}
        self._queue: deque[Bucket] = deque()
        self._exchanging: deque[_Flight] = deque()
        self._converts = policy.param_dtype != policy.grad_accum_dtype
        # Asked of the exchange areas, which are the same on all tensor ranks: all must launch at the same moments.
        exchanges = any(unit.layout.exchange_numel for members in units.values() for unit in members)
        self._overlaps = overlap and (topology.dp.size > 1 or (topology.tp.size > 1 and exchanges))
        self._hooks: list[RemovableHandle] = []
        for gradients in self._stages.values():
            for flight in gradients.flights:
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

    def reduce(self, stage: int) -> None:
        """Launch what is not launched yet of a stage whose gradients are complete; parameters may lack a gradient."""
        gradients = self._stages[stage]
        self._enqueue(gradients)
        gradients.counting = False
        for flight in gradients.flights:
            flight.missing = 0
        self._advance()

    def tie_reduce(self, stage: int) -> None:
        """Launch the sum of a stage's tied units over the first and the last stage, after `reduce` of that stage."""
        gradients = self._stages[stage]
        self._settle_exchanges()
        for flight in gradients.flights:
            if flight.unit.layout.name in self._tied_units:
                assert flight.launched, f"{flight.unit.layout.name} is summed with its copy before it is reduced"
                self._settle(flight)
                gradients.tied.append(
                    comm.all_reduce(flight.unit.own_gradient, self.topology.embedding_tie, async_op=True)
                )

    def finish(self) -> None:
        """Wait until every gradient of the step is reduced, and be ready for the next step."""
        for stage in self._stages:
            self.reduce(stage)  # nothing is left of a stage that was reduced already
        self._settle_exchanges()
        across = self.topology.embedding_tie.size > 1
        for gradients in self._stages.values():
            for flight in gradients.flights:
                self._settle(flight)
                flight.launched = False
                if across and flight.unit.layout.name in self._tied_units:
                    assert gradients.tied, f"{flight.unit.layout.name} was not summed with its copy"
            for handle in gradients.tied:
                handle.wait()
            gradients.tied.clear()
            gradients.queued = gradients.counting = False
        if not across:
            self._sum_local_ties()

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

    def _sum_local_ties(self) -> None:
        """Sum tied units whose two stages both lie on this rank."""
        copies: dict[str, list[Tensor]] = {}
        for gradients in self._stages.values():
            for flight in gradients.flights:
                if flight.unit.layout.name in self._tied_units:
                    copies.setdefault(flight.unit.layout.name, []).append(flight.unit.own_gradient)
        for first, *others in copies.values():
            for other in others:
                first.add_(other)
            for other in others:
                other.copy_(first)


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
