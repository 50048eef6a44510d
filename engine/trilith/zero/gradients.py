"""The one path that gradients take: from autograd into flat buffers, over tensor ranks, over data ranks, over ties.

A unit's gradient is whole on the rank until the last microbatch of a step (`Flight`), or goes to the ranks that own
its parts after every microbatch (`PassingFlight`, ZeRO-2 and 3). Either way a unit whose gradients are complete is
reduced while the rest of backward runs. Units are launched in one fixed order, that of backward, a unit only after
all before it: every rank issues the same collectives in the same order, whatever its autograd did first or not at
all. What is launched together (a bucket) is a matter of time only; each unit has its collectives for itself, so that
the result does not depend on it. Under hybrid sharding the sum over the replicas comes last, once a step, over
partitions only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trilith import comm
from trilith.errors import TrilithError
from trilith.kernels.weight_queue import Deferred
from trilith.pipeline.action import NO_MICROBATCH
from trilith.precision import PrecisionPolicy
from trilith.topology import Topology
from trilith.zero.flat import FlatUnit
from trilith.zero.flights import BucketPool, Flight, PassingFlight

# Above so many elements a collective costs its bytes, not its latency: waiting for more to launch gains nothing.
_LATENCY_BOUND = 1 << 20
# Units whose gradient is whole and on its way to its owners, besides the one that autograd fills.
_IN_FLIGHT = 2

Bucket = tuple[Flight, ...]


@dataclass
class _StageGradients:
    """The units of one stage; `buckets` in the order of launching; `counting`: arrivals are counted to launch at once.

    `halves`: the microbatch whose first half of a backward runs, None otherwise; `seconds`: the one whose second half
    runs, NO_MICROBATCH otherwise. `queued`: its last backward began, and `left` are the units it brings that are reduced
    after every microbatch.
    """

    flights: tuple[Flight, ...]
    buckets: tuple[Bucket, ...]
    counting: bool = False
    queued: bool = False
    halves: int | None = None
    seconds: int = NO_MICROBATCH
    left: tuple[Flight, ...] = ()

    @property
    def passing(self) -> tuple[Flight, ...]:
        """Units that are reduced after every microbatch, in the order of launching."""
        return tuple(flight for bucket in self.buckets for flight in bucket if flight.passes)


@dataclass
class _Tie:
    """The copies of one unit on this rank, by stage; `handle`: of the sum over the ranks that hold others."""

    unit: str
    copies: Mapping[int, Flight]
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
        self.pool = BucketPool(policy.grad_accum_dtype, topology.device)
        bucket_numel = min(bucket_numel, _LATENCY_BOUND)
        self._stages = {stage: _stage_gradients(members, bucket_numel, self.pool) for stage, members in units.items()}
        self._ties = _ties_of(self._stages, tied_units)
        shared = [tie for tie in self._ties if topology.tie(tie.unit).size > 1]
        self._awaited = frozenset(stage for tie in shared for stage in tie.copies)
        self._summed: set[int] = set()
        self._queue: deque[Bucket] = deque()
        self._exchanging: deque[Flight] = deque()
        self._on_the_way: deque[Flight] = deque()
        self._converts = policy.param_dtype != policy.grad_accum_dtype
        # Asked of the exchange areas, which are the same on all tensor ranks: all must launch at the same moments.
        exchanges = any(unit.layout.exchange_numel for members in units.values() for unit in members)
        passes = any(flight.passes for gradients in self._stages.values() for flight in gradients.flights)
        self._overlaps = overlap and (topology.dp.size > 1 or passes or (topology.tp.size > 1 and exchanges))
        self._hooks: list[RemovableHandle] = []
        self._places: dict[Tensor, tuple[_StageGradients, Flight, int]] = {}
        for gradients in self._stages.values():
            for flight in gradients.flights:
                for index, parameter in enumerate(flight.unit.parameters):
                    self._places[parameter] = (gradients, flight, index)
                if not (self._converts or flight.passes):
                    flight.unit.attach_gradients()
                if self._converts or self._overlaps or flight.passes:
                    self._register(gradients, flight)

    # ---- called while a step runs -------------------------------------------------------------------------------

    def begin_backward(self, stage: int, final: bool) -> None:
        """A whole backward of `stage` begins; `final`: the last of the step, after which its gradients are complete."""
        self._begin(self._stages[stage], self._stages[stage].passing, final)

    def end_backward(self, stage: int, final: bool) -> None:
        """It is done: what is reduced after every microbatch is launched. After the last, `reduce` launches all."""
        if not final:
            self._flush(self._stages[stage])

    def _begin(self, gradients: _StageGradients, passing: Sequence[Flight], final: bool) -> None:
        """Gradients begin to arrive that complete a microbatch of `passing` units, or, `final`, the step of all."""
        gradients.left = tuple(passing)
        gradients.counting = self._overlaps and (final or bool(passing))
        if gradients.counting and final:
            self._enqueue(gradients)
        elif gradients.counting:
            self._enqueue_passing(passing)

    def begin_input_gradients(self, stage: int, microbatch: int) -> None:
        """The first half of a backward begins. What it brings of units with deferred weights waits for the second."""
        self._stages[stage].halves = microbatch

    def end_input_gradients(self, stage: int, microbatch: int, weights: Collection[Tensor]) -> None:
        """It is done; the gradients of `weights` come in the second half."""
        gradients = self._stages[stage]
        gradients.halves = None
        left = {id(self._places[weight][1]) for weight in weights}
        gradients.left = tuple(flight for flight in gradients.passing if id(flight) not in left)
        for flight in gradients.left:
            flight.take_waiting(microbatch)
        self._flush(gradients)

    def begin_weight_gradients(self, stage: int, microbatch: int, weights: Sequence[Tensor], final: bool) -> None:
        """The second half of a backward begins: `accumulate` will be called for each of `weights`, in order.

        `final`: the last of the step. What does not go through `accumulate` is complete then.
        """
        gradients = self._stages[stage]
        counts = Counter(id(self._places[weight][1]) for weight in weights)
        gradients.seconds = microbatch
        expecting = [flight for flight in gradients.passing if id(flight) in counts]
        self._begin(gradients, expecting, final)
        if gradients.counting:
            for flight in gradients.flights:
                flight.missing = counts[id(flight)]
            self._advance()

    def accumulate(self, weight: Tensor, gradient: Tensor | Deferred) -> None:
        """Add a weight's gradient that autograd did not bring; before a unit's first in a second half, what waited for it.

        No sooner: whole gradients of all units of the stage would be there at once.
        """
        gradients, flight, index = self._places[weight]
        flight.take_waiting(gradients.seconds)
        flight.add(index, gradient)
        if gradients.counting:
            self._count(flight)

    def end_weight_gradients(self, stage: int, final: bool) -> None:
        """The second half of a backward is done."""
        self._stages[stage].seconds = NO_MICROBATCH
        if not final:
            self._flush(self._stages[stage])

    def reduce(self, stage: int) -> None:
        """Launch what is not launched yet of a stage whose gradients are complete; parameters may lack a gradient."""
        gradients = self._stages[stage]
        self._enqueue(gradients)
        gradients.counting, gradients.left = False, ()
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
        self._on_the_way.clear()
        flights = [flight for gradients in self._stages.values() for flight in gradients.flights]
        for flight in flights:
            flight.settle()
        for tie in self._ties:
            self._finish_tie(tie)
        self._sum_over_replicas(flights)
        self._summed.clear()
        for gradients in self._stages.values():
            gradients.queued = gradients.counting = False
        for flight in flights:
            assert not flight.has_waiting, f"{flight.unit.layout.name}: a first half of a backward has no second"
            flight.launched = False

    def close(self) -> None:
        """Remove all hooks and let go of the gradients."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        for parameter in self._places:
            parameter.grad = None

    # ---- arrival ------------------------------------------------------------------------------------------------

    def _register(self, gradients: _StageGradients, flight: Flight) -> None:
        for index, parameter in enumerate(flight.unit.parameters):
            hook = self._hook(gradients, flight, index)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def _hook(self, gradients: _StageGradients, flight: Flight, index: int) -> Callable[[Tensor], None]:
        takes = self._converts or flight.passes

        def arrived(parameter: Tensor) -> None:
            if takes:
                assert parameter.grad is not None
                if gradients.halves is not None and flight.passes:
                    flight.wait_with(gradients.halves, index, parameter.grad)
                else:
                    flight.add(index, parameter.grad)
                parameter.grad = None
            if gradients.counting:
                self._count(flight)

        return arrived

    def _count(self, flight: Flight) -> None:
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
        """Queue the units of a stage for the last time in a step."""
        if gradients.queued:
            return
        gradients.queued = True
        for bucket in gradients.buckets:
            if not bucket[0].passes or bucket[0] in gradients.left:
                self._queue.append(bucket)
                for flight in bucket:
                    flight.missing = len(flight.unit.parameters)

    def _enqueue_passing(self, flights: Iterable[Flight]) -> None:
        """Queue units for one microbatch, each alone: none stays whole for longer than it must."""
        for flight in flights:
            self._queue.append((flight,))
            flight.missing = len(flight.unit.parameters)

    def _flush(self, gradients: _StageGradients) -> None:
        """Launch what a microbatch brought of the units that are reduced after each, complete or not."""
        passing, counted = gradients.left, gradients.counting
        gradients.counting, gradients.left = False, ()
        if not passing:
            return
        if not counted:
            self._enqueue_passing(passing)
        for flight in passing:
            flight.missing = 0
        self._advance()
        self._settle_exchanges()
        for flight in passing:
            flight.launched = False

    def _advance(self) -> None:
        """Launch the buckets at the head of the queue that are complete."""
        while self._queue and all(flight.missing <= 0 for flight in self._queue[0]):
            bucket = self._queue.popleft()
            before = list(self._exchanging)
            self._exchanging.clear()
            for flight in bucket:
                flight.launched = True
                if not (self._converts or flight.passes):
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

    def _start_exchange(self, flight: Flight) -> None:
        """Begin the sum over tensor ranks of the pieces that several of them hold; the others contribute zeros."""
        if flight.passes:
            flight.settle()  # of the microbatch before
        group = self.topology.tp
        if group.size > 1 and flight.unit.layout.exchange_numel:
            flight.handle = comm.all_reduce(flight.begin_exchange(), group, async_op=True)

    def _start_reduction(self, flight: Flight) -> None:
        """Take in the sum over tensor ranks, and begin the sum over data ranks."""
        unit, group = flight.unit, self.topology.dp
        if flight.exchange is not None:
            assert flight.handle is not None
            flight.handle.wait()
            flight.end_exchange()
        if group.size == 1 and not flight.passes:
            return
        payload = flight.hand_over().to(self._policy.reduce_dtype)
        flight.payload = payload
        if unit.layout.degree < group.size:
            flight.handle = comm.all_reduce(payload, group, async_op=True)
        else:
            own, sizes = payload[unit.start : unit.stop], unit.layout.uneven_sizes
            flight.handle = comm.reduce_scatter(own, payload, group, sizes, async_op=True)
        if flight.passes:
            self._on_the_way.append(flight)
            while len(self._on_the_way) > _IN_FLIGHT:
                self._on_the_way.popleft().settle()

    def _settle_exchanges(self) -> None:
        while self._exchanging:
            self._start_reduction(self._exchanging.popleft())

    # ---- ties and replicas --------------------------------------------------------------------------------------

    def _local_sum(self, tie: _Tie) -> Tensor:
        """The sum of this rank's copies of a tied unit's gradient, in the order of stages, in the first one."""
        first, *others = tie.copies.values()
        for flight in tie.copies.values():
            assert flight.launched or flight.passes, f"{tie.unit} is summed with its copies before it is reduced"
            flight.settle()
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

    def _sum_over_replicas(self, flights: Iterable[Flight]) -> None:
        """The second tier of hybrid sharding: partitions are summed over the ranks that hold the same one."""
        group = self.topology.replicate
        if group.size == 1:
            return
        under_way = []
        for flight in flights:
            payload = flight.unit.own_gradient.to(self._policy.reduce_dtype)
            under_way.append((flight.unit.own_gradient, payload, comm.all_reduce(payload, group, async_op=True)))
        for gradient, payload, handle in under_way:
            handle.wait()
            if payload is not gradient:
                gradient.copy_(payload)


def _ties_of(stages: Mapping[int, _StageGradients], tied_units: frozenset[str]) -> tuple[_Tie, ...]:
    """The tied units of this rank's stages, in the order of names."""
    copies: dict[str, dict[int, Flight]] = {}
    for stage in sorted(stages):
        for flight in stages[stage].flights:
            if flight.unit.layout.name in tied_units:
                copies.setdefault(flight.unit.layout.name, {})[stage] = flight
    return tuple(_Tie(name, copies[name]) for name in sorted(copies))


def _stage_gradients(units: Sequence[FlatUnit], bucket_numel: int, pool: BucketPool) -> _StageGradients:
    """The units of a stage, and its buckets from the last unit to the first, as backward completes them."""
    flights = tuple(Flight(unit) if unit.has_whole_gradient else PassingFlight(unit, pool) for unit in units)
    buckets: list[Bucket] = []
    size = 0
    for flight in reversed(flights):
        if buckets and not flight.passes and size + flight.unit.layout.numel <= bucket_numel:
            buckets[-1] = (*buckets[-1], flight)
            size += flight.unit.layout.numel
        else:
            buckets.append((flight,))
            size = bucket_numel if flight.passes else flight.unit.layout.numel
    return _StageGradients(flights, tuple(buckets))
