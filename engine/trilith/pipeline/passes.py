"""Passes over schedules: insert communication and reductions, and prove a schedule before it runs. No torch.

`check` proves three things of a completed schedule, for any speed of any rank:

- every action is there exactly once and in an order that its dependencies allow, weight gradients in microbatch order;
- messages match in order: a channel is a directed pair of pipeline ranks with a communicator of its own, and its n-th
  send is its n-th receive (activations and gradients may share a channel);
- no deadlock, neither where sends are buffered (eager) nor where a send and its receive hold both ranks until they have
  met, one operation at a time (blocking).

The executor sits between the last two: it posts receives ahead and keeps a bounded number of sends in flight. Every
bound is a relaxation of blocking, and more room never makes a deadlock, so what passes here cannot hang there.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace
from types import MappingProxyType
from typing import NoReturn

from trilith.errors import ScheduleError
from trilith.pipeline.action import (
    COMPUTE,
    NO_MICROBATCH,
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
    needs,
)
from trilith.pipeline.simulate import Costs, Stuck, action_times, stuck_error

Message = tuple[Kind, int, int]  # (FORWARD | BACKWARD, stage that made it, microbatch)
_OTHER_END = MappingProxyType(
    {
        Kind.SEND_FORWARD: Kind.RECEIVE_FORWARD,
        Kind.RECEIVE_FORWARD: Kind.SEND_FORWARD,
        Kind.SEND_BACKWARD: Kind.RECEIVE_BACKWARD,
        Kind.RECEIVE_BACKWARD: Kind.SEND_BACKWARD,
    }
)


# ------------------------------------------------------------------------------------------------------------ inserting


def _transfer(schedule: Schedule, rank: int, token: Token) -> tuple[Action, int, Action] | None:
    """(send on `rank`, receiving rank, receive) of a token, or None where its reader is on the same rank or absent."""
    kind, stage, microbatch = token
    reader = consumer(token, schedule.num_stages)
    if reader is None or schedule.placement[reader] == rank:
        return None
    peer = schedule.placement[reader]
    if kind is Kind.FORWARD:
        kinds = (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)
    else:
        kinds = (Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD)
    return Action(kinds[0], stage, microbatch, peer), peer, Action(kinds[1], reader, microbatch, rank)


def insert_communication(schedule: Schedule) -> Schedule:
    """Add a send and a receive for every tensor that changes rank; neighbouring stages on one rank need none.

    All computations are laid out on one time axis (by simulation with equal stages). A message takes the moment at
    which it is made, on both sides: the send follows its computation, the receive goes before the first computation of
    its rank that starts at or after that moment. So all actions have one global order that every rank keeps to, which
    is why the result cannot deadlock even with blocking sends, and why messages of a channel match in order.

    Raises ScheduleError where the computations cannot run to their end in the given order.
    """
    events: list[list[tuple[tuple[float, int, str, int, int], Action]]] = [[] for _ in schedule.actions]
    for rank, row in enumerate(action_times(schedule, Costs.uniform(schedule.num_stages))):
        for action, start, end in row:
            events[rank].append(((start, 1, action.kind, action.stage, action.microbatch), action))
            for token in gives(action):
                transfer = _transfer(schedule, rank, token)
                if transfer is not None:
                    send, peer, receive = transfer
                    moment = (end, 0, *token)
                    events[rank].append((moment, send))
                    events[peer].append((moment, receive))
    for row_of_events in events:
        row_of_events.sort(key=lambda event: event[0])
    return replace(schedule, actions=tuple(tuple(action for _, action in row) for row in events))


def insert_reduce(schedule: Schedule, ties: bool = False) -> Schedule:
    """Add the reduction of each stage's gradients after its last backward, and with `ties` the sum of tied weights.

    A reduction goes after the sends that follow the last backward, so that it does not hold up the rank before. Tied
    weights (the embedding on the first stage, the output layer on the last) are summed at the end, where the two stages
    lie on different ranks. A forward-only schedule has nothing to reduce.
    """
    if schedule.is_forward_only:
        return schedule
    rows = [list(actions) for actions in schedule.actions]
    for row in rows:
        last: dict[int, int] = {}
        for index, action in enumerate(row):
            for part in action.parts():
                if part.kind in WEIGHT_GRADIENT:
                    last[part.stage] = index
        for stage, index in sorted(last.items(), key=lambda item: item[1], reverse=True):
            while index + 1 < len(row) and row[index + 1].kind in SENDS:
                index += 1
            row.insert(index + 1, Action(Kind.REDUCE, stage))
    ends = _tied_stages(schedule)
    if ties and ends:
        for stage in ends:
            rows[schedule.placement[stage]].append(Action(Kind.TIE_REDUCE, stage))
    return replace(schedule, actions=tuple(tuple(row) for row in rows))


def _tied_stages(schedule: Schedule) -> tuple[int, ...]:
    """The first and last stage where they lie on different ranks, else nothing."""
    crosses = schedule.placement[0] != schedule.placement[-1]
    return (0, schedule.num_stages - 1) if crosses else ()


def complete(schedule: Schedule, *, ties: bool = False) -> Schedule:
    """The schedule as the executor runs it: with communication, reductions and, for `ties`, the sum of tied weights."""
    return insert_reduce(insert_communication(schedule), ties)


# ------------------------------------------------------------------------------------------------------------- checking


def check(schedule: Schedule) -> None:
    """Prove that a completed schedule computes every gradient once and can always run to its end (see the module).

    Raises ScheduleError naming the first action that is wrong or cannot run, and what it waits for.
    """
    _check_placement(schedule)
    _check_inventory(schedule)
    _check_order(schedule)
    _check_channels(schedule)
    _play(schedule, blocking=False)
    _play(schedule, blocking=True)


def _refuse(schedule: Schedule, text: str) -> NoReturn:
    raise ScheduleError(f"schedule {schedule.name}: {text}")


def _check_placement(schedule: Schedule) -> None:
    """Shapes fit, and every action stands on the rank of its stage."""
    if len(schedule.placement) != schedule.num_stages or len(schedule.actions) != schedule.num_ranks:
        _refuse(
            schedule,
            f"{len(schedule.placement)} placed stages and {len(schedule.actions)} lists of actions do not fit "
            f"{schedule.num_stages} stages on {schedule.num_ranks} ranks",
        )
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < schedule.num_ranks:
            _refuse(schedule, f"stage {stage} is placed on rank {rank}, ranks are 0..{schedule.num_ranks - 1}")
    for rank, action in schedule.parts():
        if not 0 <= action.stage < schedule.num_stages:
            _refuse(schedule, f"rank {rank}: {action.describe()}: stages are 0..{schedule.num_stages - 1}")
        if action.kind not in STAGE_WIDE and not 0 <= action.microbatch < schedule.num_microbatches:
            last = schedule.num_microbatches - 1
            _refuse(schedule, f"rank {rank}: {action.describe()}: microbatches are 0..{last}")
        owner = schedule.placement[action.stage]
        if owner != rank:
            _refuse(schedule, f"rank {rank}: {action.describe()}: stage {action.stage} lies on rank {owner}")


def _expected(schedule: Schedule, present: set[Action]) -> set[Action]:
    """Every action that must be there, but gathers, releases and the sum of tied weights, which are a choice."""
    expected: set[Action] = set()
    backward = not schedule.is_forward_only
    for stage, rank in enumerate(schedule.placement):
        if backward:
            expected.add(Action(Kind.REDUCE, stage))
        for m in range(schedule.num_microbatches):
            tokens = [(Kind.FORWARD, stage, m)]
            expected.add(Action(Kind.FORWARD, stage, m))
            if backward:
                tokens.append((Kind.BACKWARD, stage, m))
                split = Action(Kind.BACKWARD_INPUT, stage, m), Action(Kind.BACKWARD_WEIGHT, stage, m)
                if present.isdisjoint(split):
                    expected.add(Action(Kind.BACKWARD, stage, m))
                else:
                    expected.update(split)
            for token in tokens:
                transfer = _transfer(schedule, rank, token)
                if transfer is not None:
                    expected.update((transfer[0], transfer[2]))
    return expected


def _check_inventory(schedule: Schedule) -> None:
    """Every action exactly once, and none that nothing asks for."""
    seen: set[Action] = set()
    for rank, action in schedule.parts():
        if action.kind in (Kind.GATHER, Kind.RELEASE):
            continue
        if action in seen:
            _refuse(schedule, f"rank {rank}: {action.describe()} is there twice")
        seen.add(action)
    ties = {action for action in seen if action.kind is Kind.TIE_REDUCE}
    if ties and ties != {Action(Kind.TIE_REDUCE, stage) for stage in _tied_stages(schedule)}:
        first = min(ties, key=lambda action: action.stage)
        _refuse(
            schedule,
            f"{first.describe()}: tied weights are summed by the ranks of the first and the last stage together, and "
            "only where these are two ranks",
        )
    expected = _expected(schedule, seen)
    by_place = {action: (schedule.placement[action.stage], str(action)) for action in seen | expected}
    for missing in sorted(expected - seen, key=by_place.__getitem__)[:1]:
        _refuse(schedule, f"rank {by_place[missing][0]}: {missing.describe()} is missing")
    for extra in sorted(seen - ties - expected, key=by_place.__getitem__)[:1]:
        _refuse(schedule, f"rank {by_place[extra][0]}: {extra.describe()} is not asked for by any stage")


def _check_order(schedule: Schedule) -> None:
    """Weight gradients of a stage in microbatch order, its reduction after the last, tied weights after that."""
    for rank, actions in enumerate(schedule.actions):
        done: dict[int, int] = defaultdict(int)
        reduced: set[int] = set()
        for action in actions:
            for part in action.parts():
                if part.kind in WEIGHT_GRADIENT:
                    if part.microbatch != done[part.stage]:
                        _refuse(
                            schedule,
                            f"rank {rank}: {part.describe()} comes before microbatch {done[part.stage]}: weight "
                            "gradients of a stage run in microbatch order",
                        )
                    done[part.stage] += 1
                elif part.kind is Kind.REDUCE:
                    if done[part.stage] != schedule.num_microbatches:
                        _refuse(schedule, f"rank {rank}: {part.describe()} comes before the stage's last backward")
                    reduced.add(part.stage)
                elif part.kind is Kind.TIE_REDUCE and part.stage not in reduced:
                    _refuse(schedule, f"rank {rank}: {part.describe()} comes before the stage's reduce")


def _message(action: Action) -> Message:
    """Which message a send or receive carries, named by the stage that made it."""
    if action.kind is Kind.SEND_FORWARD:
        return (Kind.FORWARD, action.stage, action.microbatch)
    if action.kind is Kind.RECEIVE_FORWARD:
        return (Kind.FORWARD, action.stage - 1, action.microbatch)
    if action.kind is Kind.SEND_BACKWARD:
        return (Kind.BACKWARD, action.stage, action.microbatch)
    return (Kind.BACKWARD, action.stage + 1, action.microbatch)


def _check_channels(schedule: Schedule) -> None:
    """The n-th send of a channel is its n-th receive."""
    sends: dict[tuple[int, int], list[Action]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.peer is not None:
                if action.kind in SENDS:
                    sends[rank, action.peer].append(action)
                else:
                    receives[action.peer, rank].append(action)
    for (source, target), sent in sends.items():
        for send, receive in zip(sent, receives[source, target], strict=True):
            if _message(send) != _message(receive):
                _refuse(
                    schedule,
                    f"channel {source} to {target}: rank {target} cannot run {receive.describe()}: the next message of "
                    f"the channel is {send.describe()}",
                )


class _Board:
    """The state of a schedule being played: where each rank stands and what it holds."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.position = [0] * schedule.num_ranks
        self.held: list[set[Token]] = [set() for _ in range(schedule.num_ranks)]
        self.in_flight: dict[tuple[int, int], deque[Message]] = defaultdict(deque)

    def next(self, rank: int) -> Action | None:
        """The action that a rank stands before; None at its end."""
        actions = self.schedule.actions[rank]
        return actions[self.position[rank]] if self.position[rank] < len(actions) else None

    def lacks(self, rank: int, action: Action) -> Token | None:
        """The first thing that a computation or a send needs and its rank does not hold."""
        if action.kind in COMPUTE:
            wanted = needs(action, self.schedule.num_stages)
        elif action.kind in SENDS:
            wanted = (_message(action),)
        else:
            return None
        held = self.held[rank]
        return next((token for token in wanted if token not in held), None)

    def run(self, rank: int, action: Action) -> None:
        """Do it: the rank now holds what the action gives, and stands before its next action."""
        if action.kind in COMPUTE:
            self.held[rank].update(gives(action))
        elif action.kind in RECEIVES:
            self.held[rank].add(_message(action))
        self.position[rank] += 1


def _play(schedule: Schedule, blocking: bool) -> None:
    """Run the schedule on paper until all is done or nothing moves; the order of ranks does not change the outcome."""
    board = _Board(schedule)
    woken = deque(range(schedule.num_ranks))
    while woken:
        rank = woken.popleft()
        while (action := board.next(rank)) is not None:
            step = _step_blocking if blocking else _step_eager
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
        board.in_flight[rank, action.peer].append(_message(action))
        woken.append(action.peer)
    elif action.kind in RECEIVES:
        assert action.peer is not None
        queue = board.in_flight[action.peer, rank]
        if not queue:
            return False
        message = queue.popleft()
        assert message == _message(action), "_check_channels ran before"
    board.run(rank, action)
    return True


def _step_blocking(board: _Board, rank: int, action: Action, woken: deque[int]) -> bool:
    """One action where a send, a receive and a sum of tied weights wait for the other rank to stand at its side."""
    if board.lacks(rank, action) is not None:
        return False
    other = _partner(board.schedule, rank, action)
    if other is not None:
        peer, wanted = other
        facing = board.next(peer)
        if facing is None or facing.kind is not wanted or not _faces(facing, action, rank):
            return False
        if board.lacks(peer, facing) is not None:
            return False
        board.run(peer, facing)
        woken.append(peer)
    board.run(rank, action)
    return True


def _partner(schedule: Schedule, rank: int, action: Action) -> tuple[int, Kind] | None:
    """The rank that takes part in a communication action, and what it does there; None for all other actions."""
    if action.kind is Kind.TIE_REDUCE:
        return next(
            (schedule.placement[s], action.kind) for s in _tied_stages(schedule) if schedule.placement[s] != rank
        )
    if action.peer is None:
        return None
    return action.peer, _OTHER_END[action.kind]


def _faces(facing: Action, action: Action, rank: int) -> bool:
    """True where two ranks stand at the two ends of one message (or at the same sum of tied weights)."""
    return facing.microbatch == NO_MICROBATCH or (facing.peer == rank and _message(facing) == _message(action))


def _bringer(schedule: Schedule, rank: int, token: Token) -> Action:
    """The action that brings a token to a rank: its computation, or its receive where that is on another rank."""
    owner = schedule.placement[token[1]]
    transfer = _transfer(schedule, owner, token) if owner != rank else None
    return Action(*token) if transfer is None else transfer[2]


def _why(board: _Board, rank: int, action: Action) -> Stuck:
    """What a rank that does not move waits for."""
    token = board.lacks(rank, action)
    if token is not None:
        return Stuck(action, f"{_bringer(board.schedule, rank, token).describe()}, which comes after it", None)
    partner = _partner(board.schedule, rank, action)
    assert partner is not None
    peer, wanted = partner
    stands = board.next(peer)
    where = f"stands at {stands.describe()}" if stands is not None else "is at its end"
    return Stuck(action, f"the matching {wanted.value.replace('_', ' ')} on rank {peer}, which {where}", peer)
