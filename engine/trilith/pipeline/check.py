"""Proves a schedule before it runs. No torch.

`check` proves of a completed schedule (`passes.complete`), for any speed of any rank:

- every action is there exactly once, on its rank, and in an order that its dependencies allow; input gradients and
  weight gradients of a stage run in microbatch order, both parts of an overlapped pair could start when it starts;
- every update's gradients are reduced after the last of them and before the first of the next update;
- messages match in order: a channel is a directed pair of pipeline ranks with a communicator of its own, and its n-th
  send is its n-th receive (activations and gradients may share a channel);
- no deadlock, neither where sends are buffered (eager) nor where a send and its receive hold both ranks until they have
  met, one operation at a time (blocking);
- where ranks validate the step before, all do, before any gradient, and the step can be thrown away there: no rank has
  taken a message that its sender sends after its own VALIDATE.

The executor sits between eager and blocking: it posts receives ahead and keeps a bounded number of sends in flight.
Every bound is a relaxation of blocking, and more room never makes a deadlock, so what passes here cannot hang there.
Sums of tied weights are launched without waiting: they hold nobody.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from trilith.errors import ScheduleError
from trilith.pipeline.action import (
    COMPUTE,
    INPUT_GRADIENT,
    NO_MICROBATCH,
    PER_UPDATE,
    RECEIVES,
    SENDS,
    STAGE_WIDE,
    WEIGHT_GRADIENT,
    Action,
    Kind,
    Schedule,
    Token,
    consumer,
    gives,
    message_of,
    needs,
)
from trilith.pipeline.simulate import Stuck, stuck_error

Channel = tuple[int, int]  # (rank that sends, rank that receives)
_OTHER_END = MappingProxyType(
    {
        Kind.SEND_FORWARD: Kind.RECEIVE_FORWARD,
        Kind.RECEIVE_FORWARD: Kind.SEND_FORWARD,
        Kind.SEND_BACKWARD: Kind.RECEIVE_BACKWARD,
        Kind.RECEIVE_BACKWARD: Kind.SEND_BACKWARD,
    }
)


def check(schedule: Schedule) -> None:
    """Prove that a completed schedule computes every gradient once and can always run to its end (see the module).

    Raises ScheduleError naming the first action that is wrong or cannot run, and what it waits for.
    """
    check_placement(schedule)
    _check_inventory(schedule)
    _check_order(schedule)
    _check_channels(schedule)
    _check_validation(schedule)
    _play(schedule, blocking=False)
    _play(schedule, blocking=True)


def transfer(schedule: Schedule, token: Token) -> tuple[Action, Action] | None:
    """(send, receive) that bring a token to the rank that reads it; None where nobody does, or the rank that made it.

    Gradients for a stage before the first that trains are read by nobody.
    """
    kind, stage, microbatch = token
    reader = consumer(token, schedule.num_stages)
    if reader is None or schedule.placement[reader] == schedule.placement[stage]:
        return None
    if kind is Kind.FORWARD:
        kinds = (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)
    elif reader < schedule.first_trained:
        return None
    else:
        kinds = (Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD)
    send = Action(kinds[0], stage, microbatch, schedule.placement[reader])
    return send, Action(kinds[1], reader, microbatch, schedule.placement[stage])


def validated_prefix(schedule: Schedule) -> Mapping[Channel, int]:
    """Per channel, how many messages its source sends before its VALIDATE; empty where no rank validates.

    These, and no others, are under way when a step is thrown away at VALIDATE: the receiving rank has to take them in.
    """
    counts = dict.fromkeys(schedule.channels(), 0)
    for rank, actions in enumerate(schedule.actions):
        validates = _validates_at(actions)
        if validates is None:
            return MappingProxyType({})
        for action in actions[:validates]:
            if action.kind in SENDS:
                assert action.peer is not None
                counts[rank, action.peer] += 1
    return MappingProxyType(counts)


def _validates_at(actions: tuple[Action, ...]) -> int | None:
    """The index of a rank's VALIDATE."""
    return next((index for index, action in enumerate(actions) if action.kind is Kind.VALIDATE), None)


def _refuse(schedule: Schedule, text: str) -> NoReturn:
    raise ScheduleError(f"schedule {schedule.name}: {text}")


# ------------------------------------------------------------------------------------------------------- what is there


def check_placement(schedule: Schedule) -> None:
    """Shapes fit, every rank has a stage, and every action stands on the rank of its stage; raises ScheduleError."""
    stages, ranks, microbatches = schedule.num_stages, schedule.num_ranks, schedule.num_microbatches
    if len(schedule.placement) != stages or len(schedule.actions) != ranks:
        _refuse(
            schedule,
            f"{len(schedule.placement)} placed stages and {len(schedule.actions)} lists of actions do not fit "
            f"{stages} stages on {ranks} ranks",
        )
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < ranks:
            _refuse(schedule, f"stage {stage} is placed on rank {rank}, ranks are 0..{ranks - 1}")
    for rank in sorted(set(range(ranks)).difference(schedule.placement))[:1]:
        _refuse(schedule, f"rank {rank} holds no stage")
    if schedule.update_every and microbatches % schedule.update_every:
        _refuse(schedule, f"{microbatches} microbatches do not divide into updates of {schedule.update_every}")
    for stage in sorted(schedule.frozen.union(*schedule.ties).difference(range(stages)))[:1]:
        _refuse(schedule, f"stage {stage} is frozen or tied: stages are 0..{stages - 1}")
    for rank, action in schedule.parts():
        if not 0 <= action.stage < stages:
            _refuse(schedule, f"rank {rank}: {action.describe()}: stages are 0..{stages - 1}")
        of_stage = action.kind in STAGE_WIDE and action.microbatch == NO_MICROBATCH
        if not of_stage and not 0 <= action.microbatch < microbatches:
            _refuse(schedule, f"rank {rank}: {action.describe()}: microbatches are 0..{microbatches - 1}")
        owner = schedule.placement[action.stage]
        if owner != rank:
            _refuse(schedule, f"rank {rank}: {action.describe()}: stage {action.stage} lies on rank {owner}")


def _expected(schedule: Schedule, present: set[Action]) -> set[Action]:
    """Every action that must be there, but gathers and releases, which are a choice."""
    expected: set[Action] = set()
    backward_from = schedule.num_stages if schedule.is_forward_only else schedule.first_trained
    for stage in range(schedule.num_stages):
        for m in range(schedule.num_microbatches):
            tokens = [(Kind.FORWARD, stage, m)]
            expected.add(Action(Kind.FORWARD, stage, m))
            if stage >= backward_from:
                tokens.append((Kind.BACKWARD, stage, m))
                expected.update(_expected_backward(schedule, present, stage, m))
            for token in tokens:
                expected.update(transfer(schedule, token) or ())
    if backward_from < schedule.num_stages:
        expected |= _expected_of_updates(schedule, present)
    return expected


def _expected_backward(schedule: Schedule, present: set[Action], stage: int, m: int) -> tuple[Action, ...]:
    """In one or in two; of a frozen stage only the gradient of its input."""
    inputs, weights = Action(Kind.BACKWARD_INPUT, stage, m), Action(Kind.BACKWARD_WEIGHT, stage, m)
    if stage in schedule.frozen:
        return (inputs,)
    return (Action(Kind.BACKWARD, stage, m),) if present.isdisjoint((inputs, weights)) else (inputs, weights)


def _expected_of_updates(schedule: Schedule, present: set[Action]) -> set[Action]:
    """Per update the reductions, and the UPDATE of every stage if one has any; per rank a VALIDATE if one has any."""
    expected: set[Action] = set()
    kinds = {action.kind for action in present}
    shared = set().union(*schedule.shared_ties)
    updates = Kind.UPDATE in kinds and schedule.update_every > 0
    if updates and shared:
        tie = ", ".join(str(stage) for stage in sorted(shared))
        _refuse(schedule, f"it updates stage by stage, but stages {tie} share weights across ranks")
    for stage in sorted(set(range(schedule.num_stages)) - schedule.frozen):
        for update in schedule.updates:
            expected.add(Action(Kind.REDUCE, stage, update))
            if stage in shared:
                expected.add(Action(Kind.TIE_REDUCE, stage, update))
            if updates:
                expected.add(Action(Kind.UPDATE, stage, update))
    if Kind.VALIDATE in kinds and not schedule.update_every:
        expected.update(Action(Kind.VALIDATE, min(schedule.stages_of(r))) for r in range(schedule.num_ranks))
    return expected


def _check_inventory(schedule: Schedule) -> None:
    """Every action exactly once, and none that nothing asks for."""
    seen: dict[Action, int] = {}
    for rank, action in schedule.parts():
        if action.kind in (Kind.GATHER, Kind.RELEASE):
            continue
        if action in seen:
            _refuse(schedule, f"rank {rank}: {action.describe()} is there twice")
        seen[action] = rank
    expected = _expected(schedule, set(seen))
    missing = expected.difference(seen)
    if missing:
        order = {kind: index for index, kind in enumerate(Kind)}
        first = min(missing, key=lambda a: (schedule.placement[a.stage], order[a.kind], a.stage, a.microbatch))
        _refuse(schedule, f"rank {schedule.placement[first.stage]}: {first.describe()} is missing")
    for action, rank in seen.items():
        if action not in expected:
            _refuse(schedule, f"rank {rank}: {action.describe()} is not asked for by any stage")


# ------------------------------------------------------------------------------------------------- in which order


@dataclass
class _Row:
    """What the stages of one rank have done, while the rank's actions are gone through in order."""

    schedule: Schedule
    rank: int
    inputs: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # stage -> its input gradients
    weights: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # stage -> its weight gradients
    reduced: dict[int, int] = field(default_factory=dict)  # stage -> the update it reduced last

    def take(self, action: Action) -> None:
        """Go past an action, or refuse it."""
        if action.kind in INPUT_GRADIENT:
            self._in_turn(action, self.inputs, "input gradients")
        if action.kind in WEIGHT_GRADIENT:
            self._in_turn(action, self.weights, "weight gradients")
        if action.kind in PER_UPDATE or action.kind is Kind.UPDATE:
            self._of_update(action)
        elif action.kind is Kind.VALIDATE and self.inputs:
            self._refuse(action, "comes after the rank's first backward")

    def _in_turn(self, action: Action, done: dict[int, int], what: str) -> None:
        if action.microbatch != done[action.stage]:
            rule = f"comes before microbatch {done[action.stage]}: {what} of a stage run in microbatch order"
            self._refuse(action, rule)
        done[action.stage] += 1

    def _of_update(self, action: Action) -> None:
        """Between the update's last gradient and the next one's first; first reduced, then summed over ties."""
        update, stage = action.microbatch, action.stage
        last = self.schedule.num_microbatches - 1 if update == NO_MICROBATCH else update
        if self.weights[stage] <= last:
            self._refuse(action, f"comes before the stage's last backward of that update, microbatch {last}")
        if self.weights[stage] > last + 1:
            self._refuse(action, f"comes after the stage's backward of the next update, microbatch {last + 1}")
        if action.kind is Kind.REDUCE:
            self.reduced[stage] = update
            return
        waits_for = {stage}
        if action.kind is Kind.TIE_REDUCE:
            waits_for.update(*(tie for tie in self.schedule.shared_ties if stage in tie))
        for other in sorted(waits_for.intersection(self.schedule.stages_of(self.rank))):
            if self.reduced.get(other) != update:
                self._refuse(action, f"comes before {Action(Kind.REDUCE, other, update).describe()}")

    def _refuse(self, action: Action, text: str) -> NoReturn:
        _refuse(self.schedule, f"rank {self.rank}: {action.describe()} {text}")


def _check_order(schedule: Schedule) -> None:
    """Gradients of a stage in microbatch order, reductions after the last, VALIDATE before the first; pairs are pairs."""
    for rank, actions in enumerate(schedule.actions):
        row = _Row(schedule, rank)
        for action in actions:
            if action.pair is not None:
                _check_pair(schedule, rank, action.pair)
            for part in action.parts():
                row.take(part)


def _check_pair(schedule: Schedule, rank: int, pair: tuple[Action, Action]) -> None:
    forward, backward = pair
    if forward.kind is not Kind.FORWARD or backward.kind not in INPUT_GRADIENT:
        _refuse(
            schedule, f"rank {rank}: {forward.describe()} with {backward.describe()}: a pair is F and B, or F and I"
        )
    if forward.microbatch == backward.microbatch:
        rule = "a pair has two microbatches, as its backward cannot start before its forward is done"
        _refuse(schedule, f"rank {rank}: {forward.describe()} with {backward.describe()}: {rule}")


# --------------------------------------------------------------------------------------------------------- messages


def _check_channels(schedule: Schedule) -> None:
    """The n-th send of a channel is its n-th receive."""
    sends: dict[Channel, list[Action]] = defaultdict(list)
    receives: dict[Channel, list[Action]] = defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.peer is not None:
                if action.kind in SENDS:
                    sends[rank, action.peer].append(action)
                else:
                    receives[action.peer, rank].append(action)
    for (source, target), sent in sends.items():
        for send, receive in zip(sent, receives[source, target], strict=True):
            if message_of(send) != message_of(receive):
                _refuse(
                    schedule,
                    f"channel {source} to {target}: rank {target} cannot run {receive.describe()}: the next message of "
                    f"the channel is {send.describe()}",
                )


def _check_validation(schedule: Schedule) -> None:
    """No rank takes a message before its VALIDATE that its sender sends after its own."""
    sent = validated_prefix(schedule)
    if not sent:
        return
    for rank, actions in enumerate(schedule.actions):
        taken: dict[int, int] = defaultdict(int)
        for action in actions[: _validates_at(actions)]:
            if action.kind in RECEIVES:
                assert action.peer is not None
                taken[action.peer] += 1
                if taken[action.peer] > sent[action.peer, rank]:
                    _refuse(
                        schedule,
                        f"rank {rank}: {action.describe()} comes before the rank's validate, but rank {action.peer} "
                        "sends that message after its own: the step could not be thrown away there",
                    )


# ------------------------------------------------------------------------------------------------------------ playing


class _Board:
    """The state of a schedule being played: where each rank stands and what it holds."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.position = [0] * schedule.num_ranks
        self.held: list[set[Token]] = [set() for _ in range(schedule.num_ranks)]
        self.in_flight: dict[Channel, deque[Token]] = defaultdict(deque)

    def next(self, rank: int) -> Action | None:
        """The action that a rank stands before; None at its end."""
        actions = self.schedule.actions[rank]
        return actions[self.position[rank]] if self.position[rank] < len(actions) else None

    def lacks(self, rank: int, action: Action) -> Token | None:
        """The first thing that a computation or a send needs and its rank does not hold."""
        if action.kind in COMPUTE:
            wanted = needs(action, self.schedule.num_stages)
        elif action.kind in SENDS:
            wanted = (message_of(action),)
        else:
            return None
        held = self.held[rank]
        return next((token for token in wanted if token not in held), None)

    def run(self, rank: int, action: Action) -> None:
        """Do it: the rank now holds what the action gives, and stands before its next action."""
        if action.kind in COMPUTE:
            self.held[rank].update(gives(action))
        elif action.kind in RECEIVES:
            self.held[rank].add(message_of(action))
        self.position[rank] += 1


def _play(schedule: Schedule, blocking: bool) -> None:
    """Run the schedule on paper until all is done or nothing moves; the order of ranks does not change the outcome."""
    board = _Board(schedule)
    woken = deque(range(schedule.num_ranks))
    step = _step_blocking if blocking else _step_eager
    while woken:
        rank = woken.popleft()
        while (action := board.next(rank)) is not None:
            if not step(board, rank, action, woken):
                break
    stuck = {}
    for rank in range(schedule.num_ranks):
        action = board.next(rank)
        if action is not None:
            stuck[rank] = _why(board, rank, action)
    if stuck:
        raise stuck_error(schedule, stuck, "deadlocks with blocking sends" if blocking else "cannot run to its end")


def _step_eager(board: _Board, rank: int, action: Action, woken: deque[int]) -> bool:
    """One action with buffered sends; False where it cannot run yet. A send wakes its receiver."""
    if board.lacks(rank, action) is not None:
        return False
    if action.kind in SENDS:
        assert action.peer is not None
        board.in_flight[rank, action.peer].append(message_of(action))
        woken.append(action.peer)
    elif action.kind in RECEIVES:
        assert action.peer is not None
        queue = board.in_flight[action.peer, rank]
        if not queue:
            return False
        message = queue.popleft()
        assert message == message_of(action), "_check_channels ran before"
    board.run(rank, action)
    return True


def _step_blocking(board: _Board, rank: int, action: Action, woken: deque[int]) -> bool:
    """One action where a send and a receive wait for the other rank to stand at the other end."""
    if board.lacks(rank, action) is not None:
        return False
    if action.peer is not None:
        facing = board.next(action.peer)
        if facing is None or facing.peer != rank or facing.kind is not _OTHER_END[action.kind]:
            return False
        if message_of(facing) != message_of(action) or board.lacks(action.peer, facing) is not None:
            return False
        board.run(action.peer, facing)
        woken.append(action.peer)
    board.run(rank, action)
    return True


def _bringer(schedule: Schedule, rank: int, token: Token) -> Action:
    """The action that brings a token to a rank: its computation, or its receive where that is on another rank."""
    elsewhere = schedule.placement[token[1]] != rank
    brought = transfer(schedule, token) if elsewhere else None
    return Action(*token) if brought is None else brought[1]


def _why(board: _Board, rank: int, action: Action) -> Stuck:
    """What a rank that does not move waits for."""
    token = board.lacks(rank, action)
    if token is not None:
        return Stuck(action, f"{_bringer(board.schedule, rank, token).describe()}, which comes after it", None)
    assert action.peer is not None
    wanted = _OTHER_END[action.kind]
    stands = board.next(action.peer)
    where = f"stands at {stands.describe()}" if stands is not None else "is at its end"
    text = f"the matching {wanted.value.replace('_', ' ')} on rank {action.peer}, which {where}"
    return Stuck(action, text, action.peer)
