"""How named tensors travel between pipeline ranks: receives posted ahead, sends in flight with their buffers, in order.

A channel is a directed pair of pipeline ranks; what is sent on it arrives in order. Both bounds here (receives posted
ahead, sends in flight) are relaxations of blocking sends, so a schedule that passed `check.check` cannot hang in them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from trilith import comm
from trilith.pipeline.action import RECEIVES, Action, Kind
from trilith.topology import Topology

Boundary = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype), the same on every rank

RECEIVES_AHEAD = 2  # receives posted beyond the one that a rank's schedule has reached, per channel
SENDS_IN_FLIGHT = 4  # messages whose buffers are kept before a rank waits for the oldest, per channel


class Handle(Protocol):
    """An operation under way."""

    @property
    def done(self) -> bool:
        """True where it is known to be over, without waiting."""

    def wait(self) -> None:
        """Return when the tensor may be used again (on a GPU: make the current stream wait)."""


class Channels(Protocol):
    """What the executor needs of the machine: asynchronous, ordered messages to and from other pipeline ranks."""

    @property
    def device(self) -> torch.device:
        """Where received tensors are to lie."""

    def send(self, tensor: torch.Tensor, peer: int) -> Handle:
        """Start sending a contiguous tensor to pipeline rank `peer`; the caller keeps it until the handle is done."""

    def receive(self, tensor: torch.Tensor, peer: int) -> Handle:
        """Start receiving into a contiguous tensor from pipeline rank `peer`."""


class GroupChannels:
    """`Channels` over the topology's two-rank groups, one communicator per directed pair of pipeline ranks."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._rank = topology.coordinate("pp")

    @property
    def device(self) -> torch.device:
        """The rank's device."""
        return self._topology.device

    def send(self, tensor: torch.Tensor, peer: int) -> Handle:
        """See `Channels`."""
        return comm.send(tensor, self._topology.channels[self._rank, peer])

    def receive(self, tensor: torch.Tensor, peer: int) -> Handle:
        """See `Channels`."""
        return comm.receive(tensor, self._topology.channels[peer, self._rank])


def carried(kind: Kind, boundary: Boundary) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of a message: all of the boundary forward; backward the gradients of those that can have one."""
    is_forward = kind in (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)
    return {name: spec for name, spec in boundary.items() if is_forward or spec[1].is_floating_point}


class Inbox:
    """The receives of one run, posted in the channel's order, `RECEIVES_AHEAD` further than the schedule has come.

    `boundaries[s]` is what stage s hands to the next. `limit`, where given, is the number of messages from each rank
    that may be posted before `lift_limit`: those that are sure to be sent even if the run is thrown away.
    """

    def __init__(
        self,
        channels: Channels,
        actions: Sequence[Action],
        boundaries: Sequence[Boundary],
        limit: Mapping[int, int] | None = None,
    ) -> None:
        self._channels = channels
        self._boundaries = boundaries
        self._limit = limit
        self._unposted: dict[int, deque[Action]] = defaultdict(deque)
        self._posted: dict[Action, list[tuple[str, torch.Tensor, Handle]]] = {}
        self._num_posted: dict[int, int] = defaultdict(int)
        self._allowed: dict[int, int] = defaultdict(lambda: RECEIVES_AHEAD)
        for action in actions:
            if action.kind in RECEIVES:
                assert action.peer is not None
                self._unposted[action.peer].append(action)
        for peer in self._unposted:
            self._post_allowed(peer)

    @property
    def is_empty(self) -> bool:
        """True when every receive was posted and taken."""
        return not self._posted and not any(self._unposted.values())

    def _post_allowed(self, peer: int) -> None:
        """Post as many receives from `peer` as the schedule's place and the limit allow."""
        queue, allowed = self._unposted[peer], self._allowed[peer]
        if self._limit is not None:
            allowed = min(allowed, self._limit.get(peer, 0))
        while queue and self._num_posted[peer] < allowed:
            self._post(queue.popleft())

    def _post(self, action: Action) -> None:
        assert action.peer is not None
        self._num_posted[action.peer] += 1
        between = action.stage - 1 if action.kind is Kind.RECEIVE_FORWARD else action.stage
        arriving = []
        for name, (shape, dtype) in carried(action.kind, self._boundaries[between]).items():
            tensor = torch.empty(shape, dtype=dtype, device=self._channels.device)
            arriving.append((name, tensor, self._channels.receive(tensor, action.peer)))
        self._posted[action] = arriving

    def reach(self, action: Action) -> None:
        """The schedule has come to a receive: let one more of its channel be posted."""
        assert action.peer is not None
        self._allowed[action.peer] += 1
        self._post_allowed(action.peer)

    def lift_limit(self) -> None:
        """The run will not be thrown away: post what waited for that."""
        self._limit = None
        for peer in self._unposted:
            self._post_allowed(peer)

    def rewind(self, actions: Sequence[Action], here: int, position: int, microbatches: int) -> None:
        """Go on as if the rank stood before `actions[position]`, not `actions[here]`; see `Executor.rewind`."""
        self._posted = {
            replace(action, microbatch=action.microbatch - microbatches): arriving
            for action, arriving in self._posted.items()
        }
        for peer, queue in self._unposted.items():
            receives = [i for i, a in enumerate(actions) if a.kind in RECEIVES and a.peer == peer]
            before_here, before = bisect_left(receives, here), bisect_left(receives, position)
            self._num_posted[peer] += before - before_here
            self._allowed[peer] += before - before_here
            queue.clear()
            queue.extend(actions[i] for i in receives[self._num_posted[peer] :])

    def has_arrived(self, action: Action) -> bool:
        """Whether a posted receive is known to be complete, without waiting."""
        return all(handle.done for _, _, handle in self._posted[action])

    def take(self, action: Action) -> dict[str, torch.Tensor]:
        """Wait for a receive that was reached, and hand over its tensors."""
        tensors = {}
        for name, tensor, handle in self._posted[action]:
            handle.wait()
            tensors[name] = tensor
        del self._posted[action]
        return tensors

    def discard(self, sent: Mapping[int, int]) -> None:
        """Take in the messages that each rank sent before the run was given up, and drop them."""
        for peer, count in sent.items():
            while self._num_posted[peer] < count:
                self._post(self._unposted[peer].popleft())
        for arriving in self._posted.values():
            for _, _, handle in arriving:
                handle.wait()
        self._posted.clear()


class Outbox:
    """The sends of one run, with their buffers kept until each is done."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._flying: dict[int, deque[list[tuple[torch.Tensor, Handle]]]] = defaultdict(deque)

    @property
    def is_empty(self) -> bool:
        """True when no send is under way."""
        return not any(self._flying.values())

    def send(self, tensors: Mapping[str, torch.Tensor], peer: int) -> None:
        """Start sending a message; where too many are in flight on the channel, wait for the oldest first."""
        flying = self._flying[peer]
        while flying and all(handle.done for _, handle in flying[0]):
            flying.popleft()
        while len(flying) >= SENDS_IN_FLIGHT:
            _wait(flying.popleft())
        contiguous = [tensor.contiguous() for tensor in tensors.values()]
        flying.append([(tensor, self._channels.send(tensor, peer)) for tensor in contiguous])

    def drain(self) -> None:
        """Wait until everything is sent."""
        for flying in self._flying.values():
            while flying:
                _wait(flying.popleft())


def _wait(message: Sequence[tuple[torch.Tensor, Handle]]) -> None:
    for _, handle in message:
        handle.wait()
