"""Where the ranks of one machine find each other's memory: once, when the groups of a run have been made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from os import close, getpid
from typing import Any

from trilith.comm.memory import PAGE_BYTES, Process, SharedFile, is_possible, new_file
from trilith.comm.objects import gather_objects
from trilith.comm.ring import CAPACITY_BYTES, Machine, Ring, Side, area_bytes
from trilith.topology import Group

# The control group carries small values only.
_CONTROL_BYTES = 1 << 20


def share_memory(groups: Mapping[str, Group], timeout_s: float) -> dict[str, Group]:
    """The same groups, each with a transport where all its ranks share memory; all ranks of `control` must call.

    `groups` are all gloo groups of this rank, `control` among them; those with one handle share one transport. Whether
    ranks share memory is tried, not guessed: every rank opens the file of every other rank of its groups. A group in
    which one rank could not stays with gloo, on all its ranks.
    """
    control = groups["control"]
    first: dict[Any, str] = {}
    for name, group in groups.items():
        first.setdefault(group.handle, name)
    names = [name for name, group in groups.items() if first[group.handle] == name and group.size > 1]
    areas, size = _lay_out(names)
    fd, memory = -1, None
    if is_possible():
        with suppress(OSError, ValueError):
            fd, memory = new_file(size)
    try:
        offer = None if memory is None else {"pid": getpid(), "fd": fd, "token": memory.token.hex(), "areas": areas}
        offers = gather_objects(offer, control)
        processes = {} if memory is None else _open(offers, control, (groups[name] for name in names))
        able = [name for name in names if memory and all(r in processes for r in _others(groups[name]))]
        everyones = gather_objects(able, control)  # by now every rank has opened what it needs
    finally:
        if fd >= 0:
            close(fd)
    if memory is None:
        return dict(groups)
    machine = Machine(memory, control.ranks[control.index], len(processes) + 1)
    rings = {
        name: _ring(machine, groups[name], timeout_s, memory, processes, offers)
        for name in names
        if all(name in everyones[rank] for rank in groups[name].ranks)
    }
    return {
        name: replace(group, transport=rings.get(first[group.handle]), meanwhile=machine.progress if rings else None)
        for name, group in groups.items()
    }


def _lay_out(names: Iterable[str]) -> tuple[dict[str, list[int]], int]:
    """Where each group's ring begins in this rank's file and how much it holds; the size of the file."""
    areas, size = {}, PAGE_BYTES
    for name in names:
        capacity = _CONTROL_BYTES if name == "control" else CAPACITY_BYTES
        areas[name] = [size, capacity]
        size += area_bytes(capacity)
    return areas, size


def _others(group: Group) -> list[int]:
    return [rank for place, rank in enumerate(group.ranks) if place != group.index]


def _open(offers: list[Any], control: Group, groups: Iterable[Group]) -> dict[int, Process]:
    """The processes of the ranks in this rank's groups, by rank: those that could be opened."""
    found: dict[int, Process] = {}
    for rank in sorted({rank for group in groups for rank in _others(group)}):
        offer = offers[rank]
        if offer is not None:
            with suppress(OSError):
                found[rank] = Process(rank, offer["pid"], offer["fd"], bytes.fromhex(offer["token"]))
    return found


def _ring(
    machine: Machine,
    group: Group,
    timeout_s: float,
    memory: SharedFile,
    processes: Mapping[int, Process],
    offers: list[Any],
) -> Ring:
    sides = []
    for rank in group.ranks:
        process = processes.get(rank)
        start, capacity = offers[rank]["areas"][group.name]
        sides.append(Side(process.file if process else memory, start, capacity, process))
    return Ring(machine, group.name, group.index, sides, timeout_s)
