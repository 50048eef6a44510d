"""Schedules that fill the bubble with weight gradients: ZB-H1, ZB-H2 and DualPipeV, as pure generators.

A backward is split: the input gradient (I) is what the rank before waits for and runs at once, the weight gradient (W)
is put where the rank would be idle. In formulas F, I and W are the times of one stage, B = I + W, p is the number of
ranks and m of microbatches. A microbatch is live from the start of its F to the end of its W (or whole backward). Both
gradients of a stage are made in microbatch order. Compute actions only; `passes.complete` adds the others.
"""

from __future__ import annotations

from trilith.pipeline.action import Action, Kind, Schedule, overlapped


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1 (Qi et al. 2023, arXiv 2401.10241, section 3.1): the memory of 1F1B, a third of its bubble at F = I = W.

    Forwards and input gradients are 1F1B's. The weight gradient of a microbatch comes s input gradients later on rank
    s, so that every rank holds min(p, m) microbatches, and the ranks that finish first with the pipeline have the most
    weight gradients left for the end.

    With k = min(p, m) the longest span of a rank, rank 0's, is m (F + I + W) plus a bubble of
    (p-1) I + (p-k) F + (k-1) max(0, F - W). For m >= p and F >= W that is the paper's (p-1) (F + I - W); at F = I = W
    = 1 the bubble's share is (2p-1-k) / (3m + 2p-1-k). Where F <= W no order with p live microbatches has a smaller one:
    rank 0's first input gradient cannot start before p F + (p-1) I, and of its work only k forwards fit before that.
    """
    return _delayed_weights("zb_h1", num_ranks, num_microbatches, depth=1)


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H2 (Qi et al. 2023, arXiv 2401.10241, section 3.1): no bubble at F = I = W, for 2p-1 live microbatches.

    Twice the warm-up of ZB-H1 fills the wait for the first input gradient, twice its delay of weight gradients the end:
    each rank starts and ends one slot after the rank before it. The longest span of a rank has a bubble of
    (p-1) max(0, F + I - 2W, I - F). Every rank holds 2p-1 microbatches, and needs as many: m >= 2p-1.
    """
    assert num_microbatches >= 2 * num_ranks - 1, "make_schedule refuses fewer"
    return _delayed_weights("zb_h2", num_ranks, num_microbatches, depth=2)


def _delayed_weights(name: str, num_ranks: int, num_microbatches: int, depth: int) -> Schedule:
    """1F1B with `depth` forwards of warm-up for each rank after, and W `depth` input gradients late for each before."""

    def of_rank(rank: int) -> tuple[Action, ...]:
        warmup = min(depth * (num_ranks - 1 - rank), num_microbatches)
        delay = depth * rank
        order = [Action(Kind.FORWARD, rank, m) for m in range(warmup)]
        for m in range(num_microbatches + delay):
            if m + warmup < num_microbatches:
                order.append(Action(Kind.FORWARD, rank, m + warmup))
            if m < num_microbatches:
                order.append(Action(Kind.BACKWARD_INPUT, rank, m))
            if m >= delay:
                order.append(Action(Kind.BACKWARD_WEIGHT, rank, m - delay))
        return tuple(order)

    ranks = range(num_ranks)
    return Schedule(name, num_ranks, num_ranks, num_microbatches, tuple(ranks), tuple(map(of_rank, ranks)))


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV (DualPipe of DeepSeek-V3, arXiv 2412.19437, cut in half by the "V" of its README), for m >= 2p.

    Stages go down the ranks and back up: stage s lies on rank s for s < p, else on rank 2p-1-s. Most of the time a rank
    runs the forward of one of its two stages together with the whole backward of the other, as one overlapped action
    whose communication can hide behind the other half. With F&B = F + B the time of such a pair, and F = I >= W, the
    longest span of a rank is 2 m (F + B) plus a bubble of (p-1) (F&B + B - 3W). Every rank holds 2p+1 (stage,
    microbatch) pairs, half a microbatch more than p.
    """
    assert num_microbatches >= 2 * num_ranks, "make_schedule refuses fewer"
    placement = (*range(num_ranks), *reversed(range(num_ranks)))
    rows = tuple(_RankOrder(num_ranks, rank, num_microbatches).actions() for rank in range(num_ranks))
    return Schedule("dualpipe_v", num_ranks, 2 * num_ranks, num_microbatches, placement, rows)


class _RankOrder:
    """The order of one rank in DualPipeV. `down` is its stage on the way down, `up` the one on the way back."""

    def __init__(self, num_ranks: int, rank: int, num_microbatches: int) -> None:
        self.after = num_ranks - 1 - rank
        self.rank = rank
        self.num_microbatches = num_microbatches
        self.down, self.up = rank, 2 * num_ranks - 1 - rank
        self.forwards = {self.down: 0, self.up: 0}
        self.backwards = {self.down: 0, self.up: 0}
        self.owed: list[Action] = []  # weight gradients whose input gradients are done, oldest first
        self.order: list[Action] = []

    def actions(self) -> tuple[Action, ...]:
        """Fill the pipeline, run pairs, drain it."""
        self._fill()
        self._steady()
        self._drain()
        assert set(self.forwards.values()) == set(self.backwards.values()) == {self.num_microbatches} and not self.owed
        return tuple(self.order)

    def _fill(self) -> None:
        """Forwards until the first gradient is here, then those that still fit, each after a split backward."""
        for _ in range(2 * self.after):
            self._forward(self.down)
        for _ in range(self.rank + 1):
            self._forward(self.down)
            self._forward(self.up)
        for _ in range(self.after):
            self._input_gradient(self.up)
            self._weight_gradient()
            self._forward(self.up)

    def _steady(self) -> None:
        """Pairs, the two stages in turn. The last rank starts its first backward alone: nothing comes in with it."""
        for turn in range(self.num_microbatches - 2 * self.after - self.rank - 1):
            if turn == 0 and self.after == 0:
                self._forward(self.down)
                self._backward(self.up)
            else:
                self._pair(self.down, self.up)
            self._pair(self.up, self.down)

    def _drain(self) -> None:
        """The last forwards, then backwards of the two stages in turn, the later ones without W, which ends it."""
        for _ in range(self.after):
            self._backward(self.up)
            self._pair(self.up, self.down)
        for turn in range(2 * (self.rank + 1)):
            stage = self.down if turn % 2 else self.up
            if turn <= self.rank:
                self._backward(stage)
            else:
                self._input_gradient(stage)
        for _ in range(self.after):
            self._weight_gradient()
            self._input_gradient(self.down)
        while self.owed:
            self._weight_gradient()

    def _next_forward(self, stage: int) -> Action:
        self.forwards[stage] += 1
        return Action(Kind.FORWARD, stage, self.forwards[stage] - 1)

    def _next_backward(self, stage: int, kind: Kind) -> Action:
        self.backwards[stage] += 1
        return Action(kind, stage, self.backwards[stage] - 1)

    def _forward(self, stage: int) -> None:
        self.order.append(self._next_forward(stage))

    def _backward(self, stage: int) -> None:
        self.order.append(self._next_backward(stage, Kind.BACKWARD))

    def _input_gradient(self, stage: int) -> None:
        action = self._next_backward(stage, Kind.BACKWARD_INPUT)
        self.order.append(action)
        self.owed.append(Action(Kind.BACKWARD_WEIGHT, stage, action.microbatch))

    def _weight_gradient(self) -> None:
        self.order.append(self.owed.pop(0))

    def _pair(self, forward: int, backward: int) -> None:
        self.order.append(overlapped(self._next_forward(forward), self._next_backward(backward, Kind.BACKWARD)))
