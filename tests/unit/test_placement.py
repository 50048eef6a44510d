"""Where units are placed, and tensors that come from disk and go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trilith.config.zero_keys import ZeroConfig
from trilith.errors import OffloadError
from trilith.failpoints import VARIABLE, Failpoints
from trilith.zero.disk import DiskStore
from trilith.zero.placement import ON_DEVICE, Placement, Sized, Tier, UnitBytes, place_units, settle
from trilith.zero.swap import State, Swapped

DEVICES = ("none", "cpu", "nvme", "auto")
UNITS = st.lists(st.builds(Sized, st.integers(0, 1000), st.booleans(), st.booleans()), max_size=8)
SIZES = st.lists(st.builds(UnitBytes, *[st.integers(0, 100)] * 3), min_size=1, max_size=8)


def zero(optimizer: str = "none", param: str = "none", ratio: float = 1.0, max_in_cpu: int = 0) -> Any:
    return ZeroConfig.model_validate(
        {
            "offload_optimizer": {"device": optimizer, "ratio": ratio},
            "offload_param": {"device": param, "max_in_cpu": max_in_cpu},
        }
    )


@given(
    units=UNITS,
    optimizer=st.sampled_from(DEVICES),
    param=st.sampled_from(DEVICES),
    ratio=st.floats(0, 1),
    max_in_cpu=st.integers(0, 3000),
)
def test_units_are_placed_as_asked(
    units: list[Sized], optimizer: str, param: str, ratio: float, max_in_cpu: int
) -> None:
    found = place_units(units, zero(optimizer, param, ratio, max_in_cpu))
    assert len(found) == len(units)
    wanted = {"auto": Tier.HOST}.get(optimizer) or Tier(optimizer)
    trained = [unit for unit in units if not unit.is_frozen]
    away = [unit for unit, place in zip(units, found, strict=True) if place.states is not Tier.DEVICE]
    assert all(place.states in (wanted, Tier.DEVICE) for place in found)
    assert not any(unit.is_frozen for unit in away)
    if wanted is not Tier.DEVICE:
        if ratio == 1:
            assert len(away) == len(trained)
        difference = abs(sum(unit.numel for unit in away) - ratio * sum(unit.numel for unit in trained))
        assert difference <= max((unit.numel for unit in trained), default=0) / 2 + 1e-6, "to half of a unit"
    in_host = 0
    for unit, place in zip(units, found, strict=True):
        if not unit.is_sharded or param == "none":
            assert place.weights is Tier.DEVICE
        elif param == "nvme":
            fits = in_host + unit.numel <= max_in_cpu
            assert place.weights is (Tier.HOST if fits else Tier.DISK)
            in_host += unit.numel if fits else 0
        else:
            assert place.weights is Tier.HOST


def test_the_last_units_are_offloaded_and_the_first_stay_in_host_memory() -> None:
    units = [Sized(10, True), Sized(10, True), Sized(10, True), Sized(10, True)]
    found = place_units(units, zero("nvme", "nvme", 0.5, 20))
    assert [place.states for place in found] == [Tier.DEVICE, Tier.DEVICE, Tier.DISK, Tier.DISK]
    assert [place.weights for place in found] == [Tier.HOST, Tier.HOST, Tier.DISK, Tier.DISK]


def needed(size: UnitBytes, before: Placement, after: Placement) -> int:
    """Bytes that the device gains."""
    count = 0
    if before.weights is not after.weights:
        count += size.weights
    if before.states is not after.states:
        count += size.states + (size.masters if after.weights is not Tier.DEVICE else 0)
    return count


@given(
    sizes=SIZES,
    optimizer=st.sampled_from(DEVICES),
    param=st.sampled_from(DEVICES),
    room=st.integers(0, 1500),
    sharded=st.booleans(),
)
def test_auto_brings_up_what_fits(sizes: list[UnitBytes], optimizer: str, param: str, room: int, sharded: bool) -> None:
    config = zero(optimizer, param)
    before = place_units([Sized(1, sharded) for _ in sizes], config)
    after = settle(before, sizes, room, config)
    assert sum(needed(*each) for each in zip(sizes, before, after, strict=True)) <= room
    for old, new in zip(before, after, strict=True):
        assert new.states in (old.states, Tier.DEVICE) and new.weights in (old.weights, Tier.DEVICE)
        assert optimizer == "auto" or new.states is old.states
        assert param == "auto" or new.weights is old.weights
    if room >= sum(size.weights + size.states + size.masters for size in sizes) and optimizer == param == "auto":
        assert all(place == ON_DEVICE for place in after)
    left = room - sum(needed(*each) for each in zip(sizes, before, after, strict=True))
    for size, new in zip(sizes, after, strict=True):
        if optimizer == "auto" and new.states is Tier.HOST:
            assert size.states + (size.masters if new.weights is not Tier.DEVICE else 0) > left, (
                "nothing that fits stays"
            )


# ---- tensors that come and go -----------------------------------------------------------------------------------------


def swapped(directory: Path, failpoint: str = "", numel: int = 5000) -> tuple[DiskStore, Swapped, dict[str, Tensor]]:
    """A set of two tensors with other numbers each."""
    points = Failpoints.from_environment(3, {VARIABLE: failpoint})
    settings: dict[str, Any] = {"threads": 1, "block_bytes": 4096, "queue_depth": 2, "checksum": True}
    store = DiskStore(directory, 3, failpoints=points, **settings)
    tensors = {"master": torch.arange(numel, dtype=torch.float32), "exp_avg": torch.ones(numel)}
    swap = Swapped(store, "unit/states")
    for role, tensor in tensors.items():
        swap.add(role, tensor)
    return store, swap, tensors


def test_tensors_come_and_go(tmp_path: Path) -> None:
    store, swap, tensors = swapped(tmp_path)
    view = tensors["master"][10:20]
    assert swap.num_bytes == swap.host_bytes == 2 * 4 * 5000
    swap.put()
    assert swap.state is State.WRITING and swap.host_bytes == swap.num_bytes
    swap.settle()
    swap.settle()
    assert swap.state is State.ABSENT and swap.host_bytes == 0
    assert tensors["master"].untyped_storage().nbytes() == 0 and tensors["master"].numel() == 5000
    swap.fetch()
    swap.fetch()
    assert swap.state is State.READING
    swap.wait()
    swap.wait()
    assert swap.state is State.PRESENT and torch.equal(view, torch.arange(10.0, 20.0)), "views come back, too"
    tensors["master"] += 1
    swap.put()
    swap.fetch()  # while it is written: it is not read
    assert swap.state is State.PRESENT and view[0] == 11 and store.bytes_read == swap.num_bytes
    swap.drop()  # as it was when it was written
    swap.wait()
    assert view[0] == 11 and tensors["exp_avg"][0] == 1
    store.close()


def test_what_was_never_put_is_zero(tmp_path: Path) -> None:
    store, swap, tensors = swapped(tmp_path)
    swap.drop()
    swap.open_blank()
    assert swap.state is State.PRESENT
    swap.drop()
    swap.wait()
    assert not any(tensor.any() for tensor in tensors.values()) and store.bytes_read == 0
    swap.put()
    swap.settle()
    swap.open_blank()
    for tensor in tensors.values():
        tensor.fill_(7)
    swap.put()
    swap.settle()
    swap.fetch()
    swap.open_blank()  # reads to the end what has begun
    assert all(bool((tensor == 7).all()) for tensor in tensors.values())
    store.close()


@pytest.mark.parametrize(
    ("failpoint", "verb"), [("offload_write:3:3:full", "write"), ("offload_read:3:4:full", "read")]
)
def test_errors_come_where_one_waits(failpoint: str, verb: str, tmp_path: Path) -> None:
    store, swap, _ = swapped(tmp_path, failpoint)
    swap.put()
    with pytest.raises(OffloadError, match=rf"rank 3.*cannot {verb} 'unit/states/master'.*ENOSPC") as caught:
        swap.settle()
        swap.wait()
    assert str(tmp_path) in str(caught.value)
    store.close()
