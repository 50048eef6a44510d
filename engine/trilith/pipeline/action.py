"""The vocabulary of pipeline schedules: actions, their text form, what each needs and gives, and the schedule itself.

A schedule is a value: per pipeline rank a tuple of actions. Generators make it, passes complete and check it, the
executor runs it, the simulator and the timeline draw it; none of them knows the others. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from trilith.errors import ScheduleError

NO_MICROBATCH = -1  # the microbatch of an action that concerns a whole stage


class Kind(StrEnum):
    """What an action does. `SEND_FORWARD` carries activations to the next stage, `SEND_BACKWARD` gradients back.

    `BACKWARD` is whole; `BACKWARD_INPUT` and `BACKWARD_WEIGHT` are its halves. `UPDATE` is an optimizer step of one stage
    inside an asynchronous schedule. `VALIDATE` is where a rank that took its optimizer step before the global norm was
    known learns whether it was right: once a rank, before its first backward.
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"
    BACKWARD_WEIGHT = "backward_weight"
    OVERLAPPED = "overlapped"
    SEND_FORWARD = "send_forward"
    SEND_BACKWARD = "send_backward"
    RECEIVE_FORWARD = "receive_forward"
    RECEIVE_BACKWARD = "receive_backward"
    GATHER = "gather"
    RELEASE = "release"
    REDUCE = "reduce"
    TIE_REDUCE = "tie_reduce"
    UPDATE = "update"
    VALIDATE = "validate"

    __hash__ = str.__hash__  # what Enum has is written in Python, and kinds are keys in every loop over a schedule


COMPUTE = frozenset((Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.OVERLAPPED))
SENDS = frozenset((Kind.SEND_FORWARD, Kind.SEND_BACKWARD))
RECEIVES = frozenset((Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD))
MESSAGES = SENDS | RECEIVES
STAGE_WIDE = frozenset((Kind.GATHER, Kind.RELEASE, Kind.REDUCE, Kind.TIE_REDUCE, Kind.VALIDATE))  # of no microbatch
PER_UPDATE = frozenset(
    (Kind.REDUCE, Kind.TIE_REDUCE)
)  # name the last microbatch of their update where there are several
WEIGHT_GRADIENT = frozenset((Kind.BACKWARD, Kind.BACKWARD_WEIGHT))
INPUT_GRADIENT = frozenset((Kind.BACKWARD, Kind.BACKWARD_INPUT))

_CODES = MappingProxyType(
    {
        Kind.FORWARD: "F",
        Kind.BACKWARD: "B",
        Kind.BACKWARD_INPUT: "I",
        Kind.BACKWARD_WEIGHT: "W",
        Kind.SEND_FORWARD: "SF",
        Kind.SEND_BACKWARD: "SB",
        Kind.RECEIVE_FORWARD: "RF",
        Kind.RECEIVE_BACKWARD: "RB",
        Kind.GATHER: "AG",
        Kind.RELEASE: "FR",
        Kind.REDUCE: "RD",
        Kind.TIE_REDUCE: "TR",
        Kind.UPDATE: "U",
        Kind.VALIDATE: "V",
    }
)
_KINDS = MappingProxyType({code: kind for kind, code in _CODES.items()})
_PATTERN = re.compile(r"([A-Z]{1,2})([0-9]{1,9})(?:\.([0-9]{1,9}))?(?:([<>])([0-9]{1,9}))?")


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a pipeline rank does.

    `stage` is the global stage (a virtual stage is a stage). `peer` is the other pipeline rank of a send or receive.
    A receive names the stage that consumes the message, a send the stage that made it. `pair` holds the forward and the
    backward of an `OVERLAPPED` action, whose own stage and microbatch are the forward's.
    """

    kind: Kind
    stage: int
    microbatch: int = NO_MICROBATCH
    peer: int | None = None
    pair: tuple[Action, Action] | None = None

    def parts(self) -> tuple[Action, ...]:
        """The actions of an overlapped pair; of any other action, itself."""
        return self.pair if self.pair is not None else (self,)

    def __str__(self) -> str:
        """The text form: `F0.3`, `B1.2`, `SF0.3>1`, `RB0.3<1`, `RD2`, `F4.1&B3.0`; `parse` reads it back."""
        if self.pair is not None:
            return "&".join(str(part) for part in self.pair)
        text = f"{_CODES[self.kind]}{self.stage}"
        if self.microbatch != NO_MICROBATCH:
            text += f".{self.microbatch}"
        if self.peer is not None:
            text += f"{'>' if self.kind in SENDS else '<'}{self.peer}"
        return text

    def describe(self) -> str:
        """The action in words, for messages: `forward of stage 1, microbatch 3 (F1.3)`."""
        if self.pair is not None:
            return " overlapped with ".join(part.describe() for part in self.pair)
        words = f"{self.kind.value.replace('_', ' ')} of stage {self.stage}"
        if self.microbatch != NO_MICROBATCH:
            words += f", microbatch {self.microbatch}"
        return f"{words} ({self})"


def overlapped(forward: Action, backward: Action) -> Action:
    """A forward and a backward of two microbatches run as one action (DualPipe, arXiv 2412.19437)."""
    return Action(Kind.OVERLAPPED, forward.stage, forward.microbatch, pair=(forward, backward))


def parse(text: str) -> Action:
    """The action that `str(action)` printed.

    Raises ScheduleError where the text names no kind, or lacks or has too many of stage, microbatch and peer.
    """
    if "&" in text:
        members = [parse(part) for part in text.split("&")]
        if [m.kind for m in members] not in ([Kind.FORWARD, Kind.BACKWARD], [Kind.FORWARD, Kind.BACKWARD_INPUT]):
            raise ScheduleError(f"action {text!r}: a pair is one forward and one backward, as in F4.1&B3.0")
        return overlapped(*members)
    found = _PATTERN.fullmatch(text.strip())
    if found is None or found[1] not in _KINDS:
        raise ScheduleError(f"action {text!r}: not of the form F0.3, SF0.3>1 or RD2. Codes: {', '.join(_KINDS)}")
    kind = _KINDS[found[1]]
    if kind not in PER_UPDATE and (found[3] is None) != (kind in STAGE_WIDE):
        has = "has no" if kind in STAGE_WIDE else "needs a"
        raise ScheduleError(f"action {text!r}: {kind.value} {has} microbatch")
    arrow = ">" if kind in SENDS else "<" if kind in RECEIVES else None
    if found[4] != arrow:
        needs = f"needs {arrow!r} and a pipeline rank" if arrow else "has no peer"
        raise ScheduleError(f"action {text!r}: {kind.value} {needs}")
    microbatch = NO_MICROBATCH if found[3] is None else int(found[3])
    return Action(kind, int(found[2]), microbatch, None if found[5] is None else int(found[5]))


Token = tuple[Kind, int, int]  # (FORWARD | BACKWARD, stage, microbatch): its activations, or its input gradients, exist


def needs(action: Action, num_stages: int) -> tuple[Token, ...]:
    """What must exist before a compute action can run."""
    tokens: list[Token] = []
    for part in action.parts():
        stage, microbatch = part.stage, part.microbatch
        if part.kind is Kind.FORWARD:
            if stage > 0:
                tokens.append((Kind.FORWARD, stage - 1, microbatch))
        elif part.kind is Kind.BACKWARD_WEIGHT:
            tokens.append((Kind.BACKWARD, stage, microbatch))
        else:
            tokens.append((Kind.FORWARD, stage, microbatch))
            if stage < num_stages - 1:
                tokens.append((Kind.BACKWARD, stage + 1, microbatch))
    return tuple(tokens)


def gives(action: Action) -> tuple[Token, ...]:
    """What exists after a compute action has run."""
    tokens: list[Token] = []
    for part in action.parts():
        if part.kind is Kind.FORWARD:
            tokens.append((Kind.FORWARD, part.stage, part.microbatch))
        elif part.kind in INPUT_GRADIENT:
            tokens.append((Kind.BACKWARD, part.stage, part.microbatch))
    return tuple(tokens)


def message_of(action: Action) -> Token:
    """What a send or receive carries, named by the computation that made it."""
    if action.kind is Kind.SEND_FORWARD:
        return (Kind.FORWARD, action.stage, action.microbatch)
    if action.kind is Kind.RECEIVE_FORWARD:
        return (Kind.FORWARD, action.stage - 1, action.microbatch)
    if action.kind is Kind.SEND_BACKWARD:
        return (Kind.BACKWARD, action.stage, action.microbatch)
    assert action.kind is Kind.RECEIVE_BACKWARD, action
    return (Kind.BACKWARD, action.stage + 1, action.microbatch)


def consumer(token: Token, num_stages: int) -> int | None:
    """The other stage that reads a token's tensors, or None at the ends of the pipeline."""
    stage = token[1] + (1 if token[0] is Kind.FORWARD else -1)
    return stage if 0 <= stage < num_stages else None


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order, over one step.

    `placement[stage]` is the pipeline rank that holds the stage; `actions[rank]` what the rank does, in order. `ties` are
    the sets of stages that share a weight. `update_every` is 0 where the optimizer steps once, after the last
    microbatch, else the number of microbatches of each update (asynchronous schedules). `frozen` are the stages
    without trainable parameters: they have no weight gradients, and no backward at all where nothing before trains.
    """

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    ties: tuple[tuple[int, ...], ...] = ()
    update_every: int = 0
    frozen: frozenset[int] = frozenset()

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds, ascending."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def parts(self) -> Iterator[tuple[int, Action]]:
        """(rank, action) of every action, overlapped pairs taken apart."""
        for rank, actions in enumerate(self.actions):
            for action in actions:
                for part in action.parts():
                    yield rank, part

    @property
    def is_forward_only(self) -> bool:
        """True where no action computes a gradient (evaluation)."""
        return not any(part.kind in COMPUTE and part.kind is not Kind.FORWARD for _, part in self.parts())

    @property
    def splits_backward(self) -> bool:
        """True where some backward runs in two halves."""
        return any(part.kind is Kind.BACKWARD_WEIGHT for _, part in self.parts())

    @property
    def first_trained(self) -> int:
        """The lowest stage that has trainable parameters, the number of stages where none has.

        Gradients go no further back: the stages before it have no backward, and itself it sends none.
        """
        stage = 0
        while stage < self.num_stages and stage in self.frozen:
            stage += 1
        return stage

    @property
    def updates(self) -> tuple[int, ...]:
        """The names of the updates in REDUCE, TIE_REDUCE and UPDATE, in order: see `update_of`."""
        if not self.update_every:
            return (NO_MICROBATCH,)
        return tuple(range(self.update_every - 1, self.num_microbatches, self.update_every))

    def update_of(self, microbatch: int) -> int:
        """The update that a microbatch's gradients go into: its last microbatch, -1 where a step has but one update."""
        if not self.update_every:
            return NO_MICROBATCH
        return microbatch - microbatch % self.update_every + self.update_every - 1

    @property
    def shared_ties(self) -> tuple[tuple[int, ...], ...]:
        """The ties whose gradients are summed over ranks: stages of two ranks or more, with a weight that trains.

        A tie with a frozen stage has none: its weight is one of that stage's.
        """
        return tuple(
            tie
            for tie in self.ties
            if len({self.placement[stage] for stage in tie}) > 1 and self.frozen.isdisjoint(tie)
        )

    def channels(self) -> tuple[tuple[int, int], ...]:
        """The directed pairs (source, destination) of pipeline ranks that messages pass between, sorted."""
        pairs: set[tuple[int, int]] = set()
        for rank, action in self.parts():
            if action.peer is not None:
                pairs.add((rank, action.peer) if action.kind in SENDS else (action.peer, rank))
        return tuple(sorted(pairs))
