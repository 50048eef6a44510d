"""Hybrid sharding: `data / replicate` ranks share a partition, the others hold copies; equal to one process, in two tiers.

Zhao et al. 2023 (PyTorch FSDP), section 3.2.2.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests import zero_cases
from tests.cells import Cell, config, reference_config
from tests.end_to_end.test_resume import Order, canonical, cell, content_of
from tests.end_to_end.test_resume import run as run_order
from tests.harness import assert_close_named, run_ranks
from tests.runs import reference, run, worst_relative
from tests.zero_cases import Way
from trilith import comm
from trilith.process_groups import build_topology
from trilith.topology import Degrees

RTOL = 1e-10
STAGES = (0, 1, 2, 3)


# ---- the toy --------------------------------------------------------------------------------------------------------


def toy_on_ranks(rank: int, world_size: int, replicate: int, ways: list[Way]) -> list[dict[str, Any]]:
    """Norms, whole weights, and the sums over groups of each way; every rank of one group makes the same."""
    degrees = Degrees(replicate=replicate, shard=world_size // replicate)
    topology = build_topology(degrees, torch.device("cpu"), timeout_s=20)
    found = []
    for way in ways:
        toy, model = zero_cases.make(way, topology)
        calls: list[tuple[str, str, int]] = []

        def noted(kind: str, payload: int, function: Any, calls: list[Any] = calls) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                group = next(arg for arg in args if hasattr(arg, "ranks"))
                if group.name in ("dp", "replicate"):
                    calls.append((kind, group.name, args[payload].numel()))
                return function(*args, **options)

            return call

        with (
            patch.object(comm, "all_reduce", noted("sum", 0, comm.all_reduce)),
            patch.object(comm, "reduce_scatter", noted("scatter", 1, comm.reduce_scatter)),
        ):
            norms = zero_cases.train(model, toy, way, range(1))
        norms += zero_cases.train(model, toy, way, range(1, zero_cases.STEPS))
        with model.gathered():
            weights = {name: p.detach().clone() for name, p in toy.named_parameters()}
        units = [(unit.layout.numel, unit.stop - unit.start) for unit in model.units]
        memory = model.memory_bytes()
        model.close()
        found.append({"norms": norms, "weights": weights, "calls": calls, "units": units, "memory": memory})
    return found


@pytest.mark.parametrize("replicate", [2, 4])
@pytest.mark.parametrize("model", [{}, {"tied": True}, {"frozen": True}], ids=str)
def test_the_toy_equals_one_process(model: dict[str, Any], replicate: int) -> None:
    ways = [Way(stage, microbatches=m, max_live=0, **model) for stage in STAGES for m in (1, 3)]
    weights, norms = zero_cases.reference(ways[0])
    results = run_ranks(4, toy_on_ranks, replicate, ways)
    for number, way in enumerate(ways):
        for result in results:
            assert result[number]["norms"] == pytest.approx(norms, rel=RTOL), way
            assert result[number]["norms"] == results[0][number]["norms"], way
            found = result[number]["weights"]
            assert_close_named({f"{way} {n}": (found[n], w) for n, w in weights.items()}, rtol=RTOL, atol=1e-12)
            assert all(torch.equal(found[n], w) for n, w in results[0][number]["weights"].items()), "ranks differ"


def test_gradients_are_summed_in_two_tiers() -> None:
    """Whole units over the ranks of a partition, after every microbatch at stage 2; partitions over the copies, once."""
    ways = [Way(stage, microbatches=3) for stage in STAGES]
    for results in run_ranks(4, toy_on_ranks, 2, ways):
        for way, found in zip(ways, results, strict=True):
            whole, parts = sorted(n for n, _ in found["units"]), sorted(p for _, p in found["units"])
            times = 3 if way.stage >= 2 else 1
            kind = "scatter" if way.stage else "sum"
            inner = sorted(numel for made, group, numel in found["calls"] if (made, group) == (kind, "dp"))
            outer = sorted(numel for made, group, numel in found["calls"] if group == "replicate")
            assert inner == sorted(whole * times) and outer == parts, way
            assert {made for made, group, _ in found["calls"] if group == "replicate"} == {"sum"}


@pytest.mark.parametrize("replicate", [1, 2, 4])
def test_a_rank_stores_its_part_of_a_partition(replicate: int) -> None:
    ways = [Way(stage, hidden=64, dtype="fp32") for stage in STAGES]
    shards = 4 // replicate
    for results in run_ranks(4, toy_on_ranks, replicate, ways):
        for way, found in zip(ways, results, strict=True):
            numel, memory = sum(n for n, _ in found["units"]), found["memory"]
            assert memory["parameters"] == 4 * numel // (shards if way.stage == 3 else 1)
            assert memory["gradients"] == 4 * numel // (shards if way.stage >= 2 else 1)
            assert memory["optimizer"] == 8 * numel // (shards if way.stage >= 1 else 1)


def test_communication_in_bf16_rounds_in_both_tiers_and_nothing_else() -> None:
    ways = [Way(stage, microbatches=3, dtype="fp32", clipping=0.0) for stage in (1, 2, 3)]
    results = run_ranks(4, toy_on_ranks, 2, ways + [replace(way, communication="bf16") for way in ways])
    for result in results:
        for exact, rounded in zip(result[:3], result[3:], strict=True):
            pairs = list(zip(exact["norms"], rounded["norms"], strict=True))
            assert all(a != b and a == pytest.approx(b, rel=2e-2) for a, b in pairs)
            same = [torch.equal(w, results[0][3]["weights"][n]) for n, w in result[3]["weights"].items()]
            assert all(same), "the copies of a partition differ"


# ---- whole runs -----------------------------------------------------------------------------------------------------

CELLS = (
    (Cell(4, 1, 1, microbatches=3, zero=1, tied=True, dropout=0.1), 2),
    (Cell(4, 1, 1, microbatches=2, zero=3, family="llama", recompute="full"), 2),
    (Cell(4, 1, 1, microbatches=2, zero=2), 4),
    (Cell(2, 1, 2, microbatches=2, zero=3, sequence_parallel=True, tied=True), 2),
    (Cell(4, 2, 1, "1f1b", 1, 4, 2, tied=True, dropout=0.1), 2),
    (Cell(4, 2, 1, "zb_v", 2, 3, 3, tied=True), 2),
    (Cell(4, 2, 1, "interleaved_1f1b", 2, 4, 1, odd=True), 4),
    (Cell(4, 2, 1, "pipedream_2bw", 1, 4, 1), 2),
)


@pytest.mark.parametrize(("cell", "replicate"), CELLS[:-1], ids=str)
def test_a_run_equals_one_process(cell: Cell, replicate: int) -> None:
    """fp64, clipping on."""
    content = config(cell, parallel__replicate=replicate, training__steps=4)
    plain = reference_config(cell)
    plain["training"]["steps"] = 4
    assert worst_relative(run(content), reference(plain)) <= RTOL


def test_an_asynchronous_run_is_the_same_with_copies() -> None:
    cell, replicate = CELLS[-1]
    plain = run(config(cell, training__steps=4))
    assert worst_relative(run(config(cell, parallel__replicate=replicate, training__steps=4)), plain) <= RTOL


def test_a_guessed_step_is_the_same_with_copies() -> None:
    """`postvalidate` at stages 2 and 3 over copies of a partition."""
    for stage in (2, 3):
        curves = []
        for optimizer_sync in ("step", "postvalidate"):
            cell = Cell(4, 2, 1, "1f1b", 1, 3, stage, tied=True)
            content = config(cell, parallel__replicate=2, pipeline__optimizer_sync=optimizer_sync)
            curves.append(run(content))
        assert curves[0] == curves[1]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def with_copies(chosen: Cell, replicate: int) -> dict[str, Any]:
    content = content_of(chosen)
    content["parallel"]["replicate"] = replicate
    return content


PAIRS = (
    ((cell(4, 1, 1, zero=2), 2), (cell(2, 1, 1, zero=1), 1)),
    ((cell(2, 2, 1, zero=3), 1), (cell(4, 1, 1, zero=3), 2)),
    ((cell(4, 1, 1, zero=3), 4), (cell(1, 1, 1, zero=0), 1)),
    ((cell(1, 1, 2, zero=0), 1), (cell(4, 1, 2, zero=1), 2)),
)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_checkpoints_do_not_know_of_copies(source: tuple[Cell, int], target: tuple[Cell, int], tmp_path: Path) -> None:
    """Saved with copies and loaded without, and the other way round: each element once, and every bit back."""
    saved = run_order(with_copies(*source), Order(2, save=str(tmp_path), more=2))
    found = run_order(with_copies(*target), Order(0, resume=saved[0].saved, more=2))
    states, loaded = canonical(saved), canonical(found)
    pairs: dict[str, tuple[Tensor, Tensor]] = {name: (loaded[name], value) for name, value in states.items()}
    assert set(loaded) == set(states)
    assert_close_named(pairs, rtol=0, atol=0)
    assert worst_relative(found[0].curve, saved[0].curve[2:]) <= RTOL


def test_a_run_with_copies_resumes_bit_for_bit(tmp_path: Path) -> None:
    content = with_copies(cell(4, 1, 1, zero=3, tied=True), 2)
    straight = run_order(content, Order(4))
    first = run_order(content, Order(2, save=str(tmp_path)))
    second = run_order(content, Order(2, resume=first[0].saved))
    assert first[0].figures + second[0].figures == straight[0].figures
