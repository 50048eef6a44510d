"""V-shaped schedules with split backwards: ZB-V, V-Half and V-Min, as pure generators.

Two stages a rank, in the shape of a V: stage s lies on rank s for s < p (the way down), else on rank 2p-1-s (the way
up), so that the last stage is on the first rank and every rank holds one stage whose microbatches stay long and one
whose stay is short. F, I and W are forward, input gradient and weight gradient of one stage, p is the number of ranks,
m of microbatches, a slot is the time of one action at F = I = W. A (stage, microbatch) pair is live from the start of
its F to the end of its W; two pairs are a microbatch of the rank. Both gradients of a stage are made in microbatch
order. Every m >= 1 is admitted. Compute actions only; `passes.complete` adds the others.

The three differ in how much they hold, and pay for holding less with idle slots (of the rank that has most, within its
own span, at F = I = W and m >= 2p) and with a longer time between two microbatches where F, I and W differ:

    schedule  live microbatches  idle slots                  time per microbatch, from p = 4 on
    1f1b      p                  6p - 6                      2 (F + I + W)
    zb_v      p                  0                           2 (F + I + W)
    v_half    (p+2) // 2         3p - 3, odd p: 3p - 4       max(2 (F + I + W), 4F + 2W, 4I + W)
    v_min     (p+4) // 3         4p - 5                      max(2 (F + I + W), 6F, 6I)

So the bubble at F = I = W is idle / (6m + idle), and v_half has none that grows with m where F <= I <= F + W/2, v_min
only where neither F nor I is above the mean of the three. A schedule whose limit is that of one further up is that one:
v_half at p <= 2 is zb_v, v_min at p = 1, 2, 3 and 5 is v_half.

V-Half and V-Min are made as their paper makes them, from a building block: the slots in which one microbatch has its
two forwards and two input gradients on each rank. A microbatch starts every 6 slots, as many as a rank has work for, so
no two of the four may be in one slot, modulo 6, on any rank; the weight gradients go where slots are free. How far apart
neighbouring ranks do the same thing sets how long a microbatch stays, hence how many are live. Repeated, the block has
no bubble in the middle but a long start and end. `_Squeeze` takes these out: every rank runs as soon as it can what the
block would have it do later. ZB-V, whose start and end leave no slot idle, is written out (`_filled`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trilith.pipeline.action import Action, Kind, Schedule

_SLOTS = 6  # of a rank for one microbatch: F, I and W of two stages
_NEVER = 1 << 60  # later than any slot


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V (Qi et al. 2023, arXiv 2401.10241, section 6): no bubble at F = I = W, with the memory of 1F1B, p.

    Needs 2p-1 microbatches for that; with fewer, but more than p, the idle time is 2 (2p-1-m) slots, with p or fewer it
    is max(2p-1-m, 4 (p-m) - 1) slots (0 for p = 1).
    """
    if num_microbatches <= num_ranks:  # the limit does not bind: run each action as early as it can be
        return _squeezed("zb_v", num_microbatches, _block(num_ranks, down=4, up=2, turns=(1, 2, 3)), 2 * num_ranks)
    rows = tuple(_filled(num_ranks, rank, num_microbatches) for rank in range(num_ranks))
    return _v_shaped("zb_v", num_ranks, num_microbatches, rows)


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """V-Half (Qi et al. 2024, arXiv 2405.15362): half the memory of 1F1B, (p+2)//2, and half its bubble.

    With m >= 2p and F = I = W a rank is idle for 3p-3 slots where p is even, 3p-4 where it is odd; in 1F1B for 6p-6.
    """
    limit = (num_ranks + 2) // 2
    if limit >= num_ranks:
        return replace(zb_v(num_ranks, num_microbatches), name="v_half")
    # either way the last rank sends a microbatch up in the slot after it came down
    turns = (1, 2, 4) if num_ranks % 2 else (4, 2, 1)
    return _squeezed("v_half", num_microbatches, _block(num_ranks, down=2, up=1, turns=turns), 2 * limit)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """V-Min (Qi et al. 2024, arXiv 2405.15362): a third of the memory of 1F1B, (p+4)//3, and two thirds of its bubble.

    With m >= 2p and F = I = W a rank is idle for 4p-5 slots, in 1F1B for 6p-6. Where F, I and W differ, this is the
    schedule that suffers most, and with many microbatches 1F1B has the smaller bubble (see the module). In part that is
    the price of the limit: on the two stages of a rank together a microbatch is live for at least (2p+1) (F + I) + 2W,
    and there is room for 2L pairs, L = (p+4)//3, so in no order is the time per microbatch less than that over 2L.
    """
    limit = (num_ranks + 4) // 3
    if limit == (num_ranks + 2) // 2:
        return replace(v_half(num_ranks, num_microbatches), name="v_min")
    return _squeezed("v_min", num_microbatches, _block(num_ranks, down=1, up=1, turns=(1, 2, 3)), 2 * limit)


def _v_shaped(name: str, num_ranks: int, num_microbatches: int, rows: tuple[tuple[Action, ...], ...]) -> Schedule:
    """A schedule whose stages go down the ranks and back up."""
    placement = (*range(num_ranks), *reversed(range(num_ranks)))
    return Schedule(name, num_ranks, 2 * num_ranks, num_microbatches, placement, rows)


# -------------------------------------------------------------------------------------------------------- written out


def _filled(num_ranks: int, rank: int, num_microbatches: int) -> tuple[Action, ...]:
    """ZB-V's order of one rank: capitals for the stage on the way down, small letters for the one on the way up.

    Forwards until p microbatches' worth is live; forwards of the way up, each with its backward, until the first
    gradient comes down; a microbatch in and a microbatch out; the last gradients, and the weight gradients that were
    left for this. Made for 2p-1 microbatches at least; those that are not there are left out.
    """
    after = num_ranks - 1 - rank
    count = max(num_microbatches, 2 * num_ranks - 1)
    letters = "F" * (2 * after + 1) + "fF" * rank
    letters += "fiw" * (after + 1)
    letters += "FIWfiw" * (count - 2 * num_ranks + 1 + rank) + "IWfiw" * after
    letters += "Ii" * rank + "IW" * (after + 1) + "w" * rank + "W" * rank
    kinds = {"F": Kind.FORWARD, "I": Kind.BACKWARD_INPUT, "W": Kind.BACKWARD_WEIGHT}
    order = []
    following = dict.fromkeys("FIWfiw", 0)
    for letter in letters:
        microbatch = following[letter]
        following[letter] += 1
        if microbatch < num_microbatches:
            stage = rank if letter.isupper() else 2 * num_ranks - 1 - rank
            order.append(Action(kinds[letter.upper()], stage, microbatch))
    return tuple(order)


# -------------------------------------------------------------------------------------------------- block, then squeezed


@dataclass(frozen=True)
class _RankSlots:
    """Slots of microbatch 0 on one rank in a building block: forward and input gradient, on the way down and up."""

    forward_down: int
    forward_up: int
    input_up: int
    input_down: int


def _block(num_ranks: int, down: int, up: int, turns: tuple[int, int, int]) -> tuple[_RankSlots, ...]:
    """The building block whose neighbouring ranks are `down` and `up` slots apart on the way down and up.

    On rank 0 the forward of the way up and the two input gradients are in slots that leave `turns` when divided by 6
    (the forward of the way down is in slot 0), each as early as that allows. With these no two are in one slot, modulo
    6, on any rank.
    """
    last = num_ranks - 1
    back = up * last  # slots from rank 0 to the last on a way up, `down * last` on a way down
    forward_up = _first(down * last + 1, turns[0] - back)
    input_up = _first(forward_up + back + 1, turns[1])
    input_down = _first(input_up + down * last + 1, turns[2] - back)
    return tuple(
        _RankSlots(
            down * rank, forward_up + up * (last - rank), input_up + down * rank, input_down + up * (last - rank)
        )
        for rank in range(num_ranks)
    )


def _first(slot: int, turn: int) -> int:
    """The first slot from `slot` on that leaves `turn` when divided by 6."""
    return slot + (turn - slot) % _SLOTS


def _squeezed(name: str, num_microbatches: int, block: tuple[_RankSlots, ...], limit: int) -> Schedule:
    """The block for all microbatches, squeezed; `limit` (stage, microbatch) pairs live at most on a rank."""
    rows = _Squeeze(block, num_microbatches, limit).run()
    return _v_shaped(name, len(block), num_microbatches, rows)


class _Squeeze:
    """Runs a repeated building block slot by slot, everything as early as inputs and the limit of live pairs allow.

    Each rank keeps to the block's order of its forwards, and to that of its input gradients. In a slot it runs, of the
    next forward and the next input gradient, the one that can run, the one of the earlier slot in the block where both
    can, and the oldest weight gradient owed where neither can.

    This always ends. Of all that is left, look at what has the earliest slot in the block (weight gradients as soon as
    their rank is free): what it needs has run, and so has every weight gradient that the block has before it, while no
    forward after it on its rank has; so no more is live than in the block, which keeps to the limit, and it can run.
    """

    def __init__(self, block: tuple[_RankSlots, ...], num_microbatches: int, limit: int) -> None:
        self.num_ranks = len(block)
        self.limit = limit
        self.actions = 2 * 3 * num_microbatches
        top = 2 * self.num_ranks - 1
        # (slot in the block, stage, microbatch) per rank, in the order of slots
        self.forwards = [
            _repeated(((slots.forward_down, rank), (slots.forward_up, top - rank)), num_microbatches)
            for rank, slots in enumerate(block)
        ]
        self.inputs = [
            _repeated(((slots.input_down, rank), (slots.input_up, top - rank)), num_microbatches)
            for rank, slots in enumerate(block)
        ]
        # how many of each a rank has run
        self.forwards_run = [0] * self.num_ranks
        self.inputs_run = [0] * self.num_ranks
        self.weights_run = [0] * self.num_ranks
        # the slot from which the outcome is there, by stage and microbatch; stage -1 feeds the first, 2p the last
        self.forward_ready = {(-1, m): 0 for m in range(num_microbatches)}
        self.input_ready = {(top + 1, m): 0 for m in range(num_microbatches)}

    def run(self) -> tuple[tuple[Action, ...], ...]:
        """The actions of every rank."""
        rows: list[list[Action]] = [[] for _ in range(self.num_ranks)]
        slot = 0
        while any(len(row) < self.actions for row in rows):
            for rank, row in enumerate(rows):
                action = self._action(rank, slot)
                if action is not None:
                    row.append(action)
            slot += 1
            assert slot <= self.num_ranks * self.actions, "the block does not keep to its limit"
        return tuple(map(tuple, rows))

    def _action(self, rank: int, slot: int) -> Action | None:
        """What a rank runs in a slot; None where it has to wait."""
        forward_planned, forward = self._next_forward(rank, slot)
        input_planned, gradient = self._next_input(rank, slot)
        if forward is not None and forward_planned < input_planned:
            self.forwards_run[rank] += 1
            self.forward_ready[forward.stage, forward.microbatch] = slot + 1
            return forward
        if gradient is not None:
            self.inputs_run[rank] += 1
            self.input_ready[gradient.stage, gradient.microbatch] = slot + 1
            return gradient
        if self.weights_run[rank] < self.inputs_run[rank]:
            _, stage, microbatch = self.inputs[rank][self.weights_run[rank]]
            self.weights_run[rank] += 1
            return Action(Kind.BACKWARD_WEIGHT, stage, microbatch)
        return None

    def _next_forward(self, rank: int, slot: int) -> tuple[int, Action | None]:
        """(slot in the block, the rank's next forward) where it can run now, (never, None) where it cannot."""
        run = self.forwards_run[rank]
        if run < len(self.forwards[rank]) and run - self.weights_run[rank] < self.limit:
            planned, stage, microbatch = self.forwards[rank][run]
            if self.forward_ready.get((stage - 1, microbatch), _NEVER) <= slot:
                return planned, Action(Kind.FORWARD, stage, microbatch)
        return _NEVER, None

    def _next_input(self, rank: int, slot: int) -> tuple[int, Action | None]:
        """The same of the rank's next input gradient."""
        run = self.inputs_run[rank]
        if run < len(self.inputs[rank]):
            planned, stage, microbatch = self.inputs[rank][run]
            forward = self.forward_ready.get((stage, microbatch), _NEVER)
            gradient = self.input_ready.get((stage + 1, microbatch), _NEVER)
            if max(forward, gradient) <= slot:
                return planned, Action(Kind.BACKWARD_INPUT, stage, microbatch)
        return _NEVER, None


def _repeated(slots: tuple[tuple[int, int], ...], num_microbatches: int) -> list[tuple[int, int, int]]:
    """(slot, stage, microbatch) of every microbatch, in order, from (slot, stage) of microbatch 0."""
    return sorted((slot + _SLOTS * m, stage, m) for slot, stage in slots for m in range(num_microbatches))
