"""Schedules as text for tests, and a slow, plain player of them that shares no code with `pipeline.check`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from trilith.pipeline.action import Action, Kind, Schedule, parse

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
ARROWS = {Kind.SEND_FORWARD: 1, Kind.SEND_BACKWARD: -1, Kind.RECEIVE_FORWARD: -1, Kind.RECEIVE_BACKWARD: 1}


def written(name: str, placement: tuple[int, ...], num_microbatches: int, *ranks: str) -> Schedule:
    """A schedule from the text form of its actions."""
    actions = tuple(tuple(parse(word) for word in row.split()) for row in ranks)
    return Schedule(name, len(ranks), len(placement), num_microbatches, placement, actions)


def texts(schedule: Schedule) -> list[str]:
    """The actions of each rank as text."""
    return [" ".join(str(action) for action in actions) for actions in schedule.actions]


class Play:
    """Runs a completed schedule step by step: who holds which tensor, what is on the wire, where each rank stands."""

    def __init__(self, schedule: Schedule, *, buffered: bool) -> None:
        self.schedule, self.buffered = schedule, buffered
        self.at = [0] * schedule.num_ranks
        self.held: list[set[tuple[str, int, int]]] = [set() for _ in schedule.actions]
        self.wires: dict[tuple[int, int], list[tuple[str, int, int]]] = defaultdict(list)
        self.ran: list[Action] = []

    def to(self, stops: Sequence[int]) -> None:
        """Go on until every rank stands at its stop, as one does before a barrier; asserts that it gets there."""
        moved = True
        while moved:
            moved = sum(self._one(rank, stops) for rank in range(self.schedule.num_ranks)) > 0
        assert self.at == list(stops), f"stuck before {[self._next(r) for r in range(len(stops))]}"

    def to_the_end(self) -> None:
        """All actions; afterwards every gradient was computed once and no message is left."""
        self.to([len(actions) for actions in self.schedule.actions])
        assert not any(self.wires.values())
        assert len(self.ran) == len(set(self.ran))
        for stage in range(self.schedule.num_stages):
            for m in range(self.schedule.num_microbatches):
                ran = {kind for kind in (F, B, I, W) if Action(kind, stage, m) in self.ran}
                assert ran in ({F, B}, {F, I, W}), (stage, m, ran)

    def _next(self, rank: int) -> Action | None:
        actions = self.schedule.actions[rank]
        return actions[self.at[rank]] if self.at[rank] < len(actions) else None

    def _one(self, rank: int, stops: Sequence[int]) -> bool:
        """One action of a rank, and at a meeting that of the other; False where it cannot run now."""
        if self.at[rank] >= stops[rank]:
            return False
        action = self.schedule.actions[rank][self.at[rank]]
        if action.kind in ARROWS:
            return self._message(rank, action, stops)
        if action.kind in (F, B, I, W, Kind.OVERLAPPED):
            if not all(self.held[rank].issuperset(self._inputs(part)) for part in action.parts()):
                return False
            for part in action.parts():
                self.held[rank].add(("activation" if part.kind is F else "gradient", part.stage, part.microbatch))
                self.ran.append(part)
        self.at[rank] += 1
        return True

    def _inputs(self, part: Action) -> set[tuple[str, int, int]]:
        stage, m = part.stage, part.microbatch
        if part.kind is W:
            return {("gradient", stage, m)}
        if part.kind is F:
            return {("activation", stage - 1, m)} if stage else set()
        after = {("gradient", stage + 1, m)} if stage + 1 < self.schedule.num_stages else set()
        return {("activation", stage, m)} | after

    def _message(self, rank: int, action: Action, stops: Sequence[int]) -> bool:
        other, m = action.peer, action.microbatch
        what = "activation" if action.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD) else "gradient"
        if action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            tensor = (what, action.stage, m)
            if tensor not in self.held[rank]:
                return False
            if not self.buffered:
                facing = self._next(other) if self.at[other] < stops[other] else None
                reader = action.stage + ARROWS[action.kind]
                kind = Kind.RECEIVE_FORWARD if what == "activation" else Kind.RECEIVE_BACKWARD
                if facing != Action(kind, reader, m, rank):
                    return False
                self.held[other].add(tensor)
                self.at[other] += 1
            else:
                self.wires[rank, other].append(tensor)
        else:
            wire = self.wires[other, rank]
            if not wire:
                return False  # a receive without buffers runs together with its send
            tensor = wire.pop(0)
            assert tensor == (what, action.stage + ARROWS[action.kind], m), (action, tensor)
            self.held[rank].add(tensor)
        self.at[rank] += 1
        return True


def play(schedule: Schedule) -> None:
    """Both ways to the end."""
    for buffered in (True, False):
        Play(schedule, buffered=buffered).to_the_end()
