"""Copies between a device and host memory that run beside the computation, one stream for each direction.

On a GPU, with page-locked host memory, both directions of the bus and the multiprocessors work at once: while one unit is
updated in host memory the gradient of the next comes down and the weights of the last go up (Ren et al. 2021,
ZeRO-Offload, section 4.2). Where there is no such device a copy is made at once, by the same calls.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Arrival:
    """A copy on its way into host memory."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        """Keep the host waiting until the copy is there."""
        if self._event is not None:
            self._event.synchronize()


class Copies:
    """The streams of one rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def down(self, target: Tensor, source: Tensor) -> Arrival:
        """Begin to copy `source` into host memory once all that was queued for it is done; keep both until it arrived."""
        if self._streams is None:
            target.copy_(source)
            return Arrival(None)
        stream = self._streams[0]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return Arrival(stream.record_event())

    def up(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy `source` from host memory once all that was queued for `target` is done.

        Neither may be used before `join`, the source by the host not before a later `Arrival`.
        """
        if self._streams is None:
            target.copy_(source)
            return
        stream = self._streams[1]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def join(self) -> None:
        """What the device computes from now on waits for all that went up; the host does not."""
        if self._streams is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._streams[1])
