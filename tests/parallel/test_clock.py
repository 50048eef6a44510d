"""Clocks of ranks on one axis: nothing to do on one machine, an exchange of messages between machines."""

from __future__ import annotations

import time
from functools import partial

import torch

from tests.harness import run_ranks
from trilith import comm
from trilith.process_groups import build_topology
from trilith.topology import Degrees

AHEAD_S = (0.0, 1000.0, -0.25)
BOUND_S = 0.05  # half a round trip between processes of a busy machine, with a wide margin


def shifted(rank: int) -> float:
    return time.perf_counter() + AHEAD_S[rank]


def offsets(rank: int, world_size: int, hosts: list[str] | None) -> float:
    topology = build_topology(Degrees(pipeline=world_size), torch.device("cpu"), 60)
    host = None if hosts is None else hosts[rank]
    return comm.clock_offset_s(topology.control, partial(shifted, rank), host)


def test_ranks_of_other_machines_are_aligned() -> None:
    found = run_ranks(3, offsets, ["a", "b", "c"])
    assert found[0] == 0.0
    assert all(abs(offset + ahead) < BOUND_S for offset, ahead in zip(found, AHEAD_S, strict=True)), found


def test_ranks_of_the_first_rank_s_machine_share_its_clock() -> None:
    found = run_ranks(3, offsets, ["a", "a", "c"])
    assert found[:2] == [0.0, 0.0] and abs(found[2] + AHEAD_S[2]) < BOUND_S
    assert run_ranks(3, offsets, None) == [0.0, 0.0, 0.0], "by default the machine is told by its boot"
