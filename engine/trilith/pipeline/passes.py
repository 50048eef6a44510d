"""Passes over schedules: freeze stages, insert communication, reductions and validation. No torch.

A generator, or a file, gives computations; `complete` makes of them what the executor runs, and `check.check` proves it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from trilith.errors import ScheduleError
from trilith.pipeline.action import (
    COMPUTE,
    INPUT_GRADIENT,
    MESSAGES,
    PER_UPDATE,
    RECEIVES,
    SENDS,
    WEIGHT_GRADIENT,
    Action,
    Kind,
    Schedule,
    gives,
    overlapped,
)
from trilith.pipeline.check import check_placement, transfer
from trilith.pipeline.simulate import Costs, action_times

Row = Sequence[Action]


def complete(schedule: Schedule, *, validate: bool = False) -> Schedule:
    """The schedule as the executor runs it: with communication, reductions and, for `validate`, a VALIDATE per rank.

    What a schedule already has is taken as it is: only where it has no messages at all are they inserted, and so for
    reductions and VALIDATE; completing twice changes nothing. Ties and updates are the schedule's own, and so are frozen
    stages: where it still has what they do not need, `freeze` takes it out.

    Raises ScheduleError where the computations cannot run to their end, nothing trains, or there is nothing to validate.
    """
    check_placement(schedule)
    if schedule.frozen:
        schedule = freeze(schedule, ())
    elif not _has(schedule, MESSAGES):
        schedule = insert_communication(schedule)
    if not _has(schedule, PER_UPDATE):
        schedule = insert_reductions(schedule)
    if validate and not _has(schedule, frozenset((Kind.VALIDATE,))):
        schedule = insert_validation(schedule)
    return schedule


def _has(schedule: Schedule, kinds: frozenset[Kind]) -> bool:
    return any(action.kind in kinds for actions in schedule.actions for action in actions)


def freeze(schedule: Schedule, frozen: Iterable[int]) -> Schedule:
    """The schedule for stages of which some (`frozen`) have no trainable parameters, with its communication.

    These have no weight gradients, reductions or updates, and only the input-gradient half of their backwards; none at
    all where nothing before them trains. A stage that trains, with none before it that does, keeps both halves of its
    backward but sends no gradients. What is left keeps the order that it had: messages are inserted before anything is
    taken out, so a rank that lost its backwards is not asked for its forwards earlier than its neighbours use them.

    Raises ScheduleError where the schedule trains and no stage has anything to train.
    """
    schedule = replace(schedule, frozen=schedule.frozen.union(frozen))
    check_placement(schedule)
    if not schedule.frozen:
        return schedule
    if schedule.first_trained == schedule.num_stages and not schedule.is_forward_only:
        raise ScheduleError(
            f"schedule {schedule.name}: nothing trains: none of its {schedule.num_stages} stages has trainable "
            "parameters. Unfreeze some, or evaluate instead"
        )
    if not _has(schedule, MESSAGES):
        schedule = replace(insert_communication(replace(schedule, frozen=frozenset())), frozen=schedule.frozen)
    shared = frozenset().union(*schedule.shared_ties)
    rows = []
    for actions in schedule.actions:
        kept = (_frozen(schedule, shared, action) for action in actions)
        rows.append(tuple(action for action in kept if action is not None))
    return replace(schedule, actions=tuple(rows))


def _frozen(schedule: Schedule, shared: frozenset[int], action: Action) -> Action | None:
    """What is left of an action among frozen stages; `shared` are the stages that still sum tied weights over ranks."""
    kind, stage, first = action.kind, action.stage, schedule.first_trained
    if action.pair is not None:
        forward, backward = action.pair[0], _frozen(schedule, shared, action.pair[1])
        return forward if backward is None else overlapped(forward, backward)
    if kind in INPUT_GRADIENT:
        if stage < first:
            return None
        return replace(action, kind=Kind.BACKWARD_INPUT) if stage in schedule.frozen else action
    needless = (
        (kind is Kind.SEND_BACKWARD and stage <= first)
        or (kind is Kind.RECEIVE_BACKWARD and stage < first)
        or (kind in (Kind.BACKWARD_WEIGHT, Kind.REDUCE, Kind.UPDATE) and stage in schedule.frozen)
        or (kind is Kind.TIE_REDUCE and stage not in shared)
    )
    return None if needless else action


def insert_communication(schedule: Schedule) -> Schedule:
    """Add a send and a receive for every tensor that changes rank; neighbouring stages on one rank need none.

    All computations are laid out on one time axis (by simulation with equal stages). A message takes the moment at
    which it is made, on both sides: the send follows its computation, the receive goes before the first computation of
    its rank that starts at or after that moment. So all actions have one global order that every rank keeps to, which
    is why the result cannot deadlock even with blocking sends, and why messages of a channel match in order. Other
    actions stay behind the computation that they follow, and its sends.

    Raises ScheduleError where the computations cannot run to their end in the given order.
    """
    # At one moment: messages, the same way on both sides, then what follows a computation, then the next computation.
    events: list[list[tuple[tuple, Action]]] = [[] for _ in schedule.actions]
    times = action_times(schedule, Costs.uniform(schedule.num_stages))
    for rank, actions in enumerate(schedule.actions):
        row, now = iter(times[rank]), 0.0
        for action in actions:
            if action.kind not in COMPUTE:
                events[rank].append(((now, 1), action))
                continue
            _, start, now = next(row)
            events[rank].append(((start, 2), action))
            for token in gives(action):
                message = transfer(schedule, token)
                if message is not None:
                    send, receive = message
                    assert send.peer is not None
                    events[rank].append(((now, 0, *token), send))
                    events[send.peer].append(((now, 0, *token), receive))
    for row_of_events in events:
        row_of_events.sort(key=lambda event: event[0])
    return replace(schedule, actions=tuple(tuple(action for _, action in row) for row in events))


def insert_reductions(schedule: Schedule) -> Schedule:
    """Add, for every update, the reduction of each stage's gradients and the sums of weights tied over ranks.

    A reduction goes after the last weight gradient of its update and the sends that follow, so that it does not hold up
    the rank before; an UPDATE in the schedule comes after it. Tied weights are summed once all stages of the rank are
    reduced. Nothing is inserted for frozen stages, and nothing into a forward-only schedule.
    """
    shared = set().union(*schedule.shared_ties)
    rows = []
    for rank, actions in enumerate(schedule.actions):
        after = _reductions(schedule, actions, sorted(shared.intersection(schedule.stages_of(rank))))
        row: list[Action] = []
        for index, action in enumerate(actions):
            row += (action, *after.get(index, ()))
        rows.append(tuple(row))
    return replace(schedule, actions=tuple(rows))


def _reductions(schedule: Schedule, actions: Row, shared: Sequence[int]) -> dict[int, list[Action]]:
    """Index in a rank's actions -> the reductions that go behind it."""
    last: dict[tuple[int, int], int] = {}  # (update, stage) -> where its last weight gradient is
    for index, action in enumerate(actions):
        for part in action.parts():
            if part.kind in WEIGHT_GRADIENT:
                last[schedule.update_of(part.microbatch), part.stage] = index
    after: dict[int, list[Action]] = defaultdict(list)
    all_reduced: dict[int, int] = {}  # update -> where the last stage of the rank is reduced
    for (update, stage), index in sorted(last.items(), key=lambda item: item[1]):
        index = _last_send_after(actions, index)
        after[index].append(Action(Kind.REDUCE, stage, update))
        all_reduced[update] = index
    for update, index in all_reduced.items():
        after[index] += [Action(Kind.TIE_REDUCE, stage, update) for stage in shared]
    return after


def _last_send_after(actions: Row, index: int) -> int:
    """Where the last send stands that follows a computation before the next one; the computation, if there is none."""
    last = index
    for at in range(index + 1, len(actions)):
        if actions[at].kind in SENDS:
            last = at
        elif actions[at].kind not in RECEIVES:
            break
    return last


def insert_gathers(schedule: Schedule, marks: Sequence[Mapping[int, tuple[bool, bool]]]) -> Schedule:
    """Add GATHER and RELEASE: `marks[rank][index]` tells of a computation whether it begins with weights to be fetched, and
    whether it lets some go.

    A GATHER goes before what is received for the computation: weights are on their way while the rank waits. A RELEASE
    goes behind the computation's sends.
    """
    rows = []
    for actions, marked in zip(schedule.actions, marks, strict=True):
        before: dict[int, Action] = {}
        after: dict[int, Action] = {}
        for index, (gathers, releases) in marked.items():
            stage, first = actions[index].stage, index
            while first > 0 and actions[first - 1].kind in RECEIVES:
                first -= 1
            if gathers:
                before[first] = Action(Kind.GATHER, stage)
            if releases:
                after[_last_send_after(actions, index)] = Action(Kind.RELEASE, stage)
        row: list[Action] = []
        for index, action in enumerate(actions):
            row += [a for a in (before.get(index), action, after.get(index)) if a is not None]
        rows.append(tuple(row))
    return replace(schedule, actions=tuple(rows))


def insert_validation(schedule: Schedule) -> Schedule:
    """Add a VALIDATE to each rank: as late as can be, before any gradient, where the step can still be thrown away.

    Before it lies what follows from no backward, neither on the rank nor through a message: a rank that has taken such
    a message would have seen part of a step that its sender does not throw away. A rank without backward validates as
    soon as those that have one have from it what they take before they do: so little is under way to throw away.

    Takes a schedule with communication. Raises ScheduleError where it has no backward, or updates of its own.
    """
    if schedule.is_forward_only or schedule.update_every:
        what = "computes no gradient" if schedule.is_forward_only else "is asynchronous"
        raise ScheduleError(f"schedule {schedule.name} {what}: there is no step before it to validate")
    first = [_first_backward(actions) for actions in schedule.actions]
    cuts = [len(actions) if at is None else at for at, actions in zip(first, schedule.actions, strict=True)]
    messages = _messages(schedule)
    _move_cuts(messages, cuts, back=True)
    if None in first:
        cuts = [0 if at is None else cut for at, cut in zip(first, cuts, strict=True)]
        _move_cuts(messages, cuts, back=False)
    rows = []
    for rank, (actions, cut) in enumerate(zip(schedule.actions, cuts, strict=True)):
        rows.append((*actions[:cut], Action(Kind.VALIDATE, min(schedule.stages_of(rank))), *actions[cut:]))
    return replace(schedule, actions=tuple(rows))


def _first_backward(actions: Row) -> int | None:
    """The index of a rank's first backward of any kind."""
    backward = INPUT_GRADIENT | WEIGHT_GRADIENT
    return next((i for i, action in enumerate(actions) if any(p.kind in backward for p in action.parts())), None)


def _messages(schedule: Schedule) -> list[tuple[int, int, int, int]]:
    """(sender, index of the send, receiver, index of the receive) of every message: a channel's n-th are its n-th."""
    sends: dict[tuple[int, int], list[int]] = defaultdict(list)
    receives: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for index, action in enumerate(actions):
            if action.kind in SENDS and action.peer is not None:
                sends[rank, action.peer].append(index)
            elif action.kind in RECEIVES and action.peer is not None:
                receives[action.peer, rank].append(index)
    return [
        (source, sent, target, received)
        for (source, target), indices in sends.items()
        for sent, received in zip(indices, receives[source, target], strict=False)
    ]


def _move_cuts(messages: list[tuple[int, int, int, int]], cuts: list[int], back: bool) -> None:
    """Move one cut per rank until no message is received before the receiver's and sent after the sender's.

    `back`: the receiver's moves back to before it takes the message; else the sender's moves on past the send.
    """
    moved = True
    while moved:
        moved = False
        for source, sent, target, received in messages:
            if received < cuts[target] and sent >= cuts[source]:
                if back:
                    cuts[target] = received
                else:
                    cuts[source] = sent + 1
                moved = True
