"""Offload changes no bit: states and weights in host memory or on disk against everything on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cells import Cell
from tests.harness import run_ranks
from tests.offload_cases import (
    OPTIMIZERS,
    assert_same_bits,
    clipped_late,
    compared_on_the_way,
    content,
    left_in,
    offloaded,
)
from trilith.zero.placement import Tier

TIERS = ("none", "cpu", "nvme", "auto")


def cell(data: int = 2, zero: int = 3, **more: Any) -> Cell:
    return Cell(data=data, microbatches=2, zero=zero, **more)


@pytest.mark.parametrize(
    ("zero", "data"),
    [(1, 1), (2, 2), (3, 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, 2), (2, 1), (3, 1)))],
)
def test_every_pair_of_tiers(zero: int, data: int, tmp_path: Path) -> None:
    plain = content(cell(data, zero))
    others = {
        f"{optimizer} {param}": offloaded(plain, optimizer, param, str(tmp_path))
        for optimizer in TIERS
        for param in (TIERS if zero == 3 else TIERS[:1])
        if (optimizer, param) != ("none", "none")
    }
    for result in assert_same_bits(plain, others):
        for name, one in result.items():
            states, weights = ({getattr(place, what) for place in one.placements[0]} for what in ("states", "weights"))
            wanted = name.split() if name != "plain" else ["none", "none"]
            for tier, places in zip(wanted, (states, weights), strict=True):
                assert places == {Tier.HOST if tier == "auto" else Tier(tier)}, name
        assert any(step[1] > 0.3 for step in result["plain"].steps), "some steps are clipped"
    assert not left_in(tmp_path)


DETAILS: dict[str, dict[str, Any]] = {
    "half": {"ratio": 0.5},
    "one buffer": {"buffer_count": 1, "param_buffer_count": 1},
    "two buffers": {"buffer_count": 2},
    "no reading ahead": {"pipeline_read": False},
    "no writing behind": {"pipeline_write": False},
    "neither": {"pipeline_read": False, "pipeline_write": False},
    "some in host memory": {"param_max_in_cpu": 3000},
    "checksums": {"checks": True},
}


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_details(zero: int, tmp_path: Path) -> None:
    plain = content(cell(zero=zero), "bf16")
    param = "nvme" if zero == 3 else "none"
    others = {name: offloaded(plain, "nvme", param, str(tmp_path), **keys) for name, keys in DETAILS.items()}
    others["half in host memory"] = offloaded(plain, "cpu", param, str(tmp_path), ratio=0.5)
    for result in assert_same_bits(plain, others):
        for name in ("half", "half in host memory"):
            assert len({place.states for place in result[name].placements[0]}) == 2
        if zero == 3:
            assert {place.weights for place in result["some in host memory"].placements[0]} == {Tier.HOST, Tier.DISK}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", pytest.param("fp64", marks=pytest.mark.slow)])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    for zero, kinds in ((1, ("cpu none", "nvme none", "auto none")), (3, ("cpu cpu", "nvme nvme", "auto auto"))):
        plain = content(cell(zero=zero), dtype)
        others = {kind: offloaded(plain, *kind.split(), str(tmp_path)) for kind in kinds}
        for result in assert_same_bits(plain, others):
            skips = [skipped for _, _, skipped, _, _ in result["plain"].steps]
            assert any(skips) == (dtype == "fp16") and not all(skips)
            if dtype == "fp16":
                assert any(skips[skips.index(False) :]), "a step in the middle overflows, too"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_rounded_on_their_way_up(dtype: str) -> None:
    for zero, optimizer in ((1, "AdamW"), (3, "LAMB")):
        plain = content(cell(zero=zero), dtype, optimizer, steps=6)
        source = offloaded(plain, "cpu", "none", "")
        assert not any(run_ranks(2, compared_on_the_way, plain, source))


def test_clipped_by_a_norm_that_nobody_waited_for() -> None:
    assert not any(run_ranks(2, clipped_late, content(cell(zero=1), "fp64", steps=6)))


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "AdamW"])
def test_optimizers(optimizer: str, tmp_path: Path) -> None:
    plain = content(cell(zero=3), "bf16", optimizer)
    others = {kind: offloaded(plain, *kind.split(), str(tmp_path)) for kind in ("cpu nvme", "auto auto")}
    others["half"] = offloaded(plain, "nvme", "none", str(tmp_path), ratio=0.5, buffer_count=2)
    assert_same_bits(plain, others)


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "zb_v"])
def test_pipelines(schedule: str, tmp_path: Path) -> None:
    virtual = 2 if schedule == "zb_v" else 1
    for zero, kinds in ((2, ("cpu none", "nvme none")), (3, ("cpu nvme", "nvme cpu", "auto auto"))):
        plain = content(cell(zero=zero, pipeline=2, schedule=schedule, virtual_stages=virtual, tied=True), "bf16")
        assert_same_bits(plain, {kind: offloaded(plain, *kind.split(), str(tmp_path)) for kind in kinds})


def test_tensor_ranks_with_parts_of_unequal_size(tmp_path: Path) -> None:
    """LAMB sums norms over them in the middle of a step: they must step the same units together."""
    plain = content(Cell(data=1, tensor=2, microbatches=2, zero=1, odd=True), "bf16", "LAMB")
    others = {f"{ratio}": offloaded(plain, "nvme", "none", str(tmp_path), ratio=ratio) for ratio in (0.3, 0.5, 0.7, 1)}
    assert_same_bits(plain, others)


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_postvalidation(dtype: str, tmp_path: Path) -> None:
    """Steps that are taken back lie in host memory, also after "auto" brought some of them up."""
    plain = content(cell(zero=3, pipeline=2), dtype)
    waiting, plain["pipeline"]["optimizer_sync"] = content(cell(zero=3, pipeline=2), dtype), "postvalidate"
    others = {kind: offloaded(plain, *kind.split(), str(tmp_path)) for kind in ("cpu none", "cpu cpu", "cpu nvme")}
    others["auto"] = offloaded(plain, "auto", "auto", str(tmp_path), room=0.7)
    others["plain, too"] = plain
    for result in assert_same_bits(waiting, others):
        assert result["cpu none"].memory["host_rollback"] > 0 and result["cpu none"].memory["rollback"] == 0
