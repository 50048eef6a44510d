"""Whatever ways of ZeRO are drawn: fp64 results stay, and what only moves data or memory changes not one bit.

Two things besides the order of microbatches and ranks in a sum are in the bits: a norm is summed over each rank's part
of a unit first, and units are cut otherwise at stage 0, and where small parameters stay whole. They reach the weights
through the clipping factor alone. Many draws run one after the other on the same ranks, so that they take seconds.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import zero_cases
from tests.cells import Cell, config, reference_config
from tests.harness import assert_close_named, run_ranks
from tests.runs import reference, worst_relative
from tests.zero_cases import NO_LIMIT, Way
from trilith import preflight
from trilith.process_groups import build_topology
from trilith.topology import Degrees
from trilith.trainer import Place, Trainer

RTOL = 1e-10


def drawn(draw: random.Random, microbatches: tuple[int, ...], **fixed: Any) -> Way:
    """A way with every axis drawn, sizes in the order of the toy's units."""
    sizes = (0, 40, 80, 200, NO_LIMIT)
    values = {
        "stage": draw.choice((0, 1, 2, 2, 3, 3, 3, 3)),
        "microbatches": draw.choice(microbatches),
        "interval": draw.choice(("microbatch", "step")),
        "overlap": draw.random() < 0.7,
        "bucket": draw.choice((0, 60, NO_LIMIT)),
        "prefetch": draw.choice(sizes),
        "backward_prefetch": draw.choice(("pre", "post")),
        "max_live": draw.choice(sizes),
        "max_reuse": draw.choice(sizes),
        "persistence": draw.choice((0, 0, 6, 30, NO_LIMIT)),
        "model_persistence": draw.choice((NO_LIMIT, NO_LIMIT, 20, 0)),
        "known": draw.random() < 0.7,
        "clipping": draw.choice((0.0, 0.7)),
    }
    return Way(**{**values, **fixed})


def order_of_sums(way: Way) -> tuple[Any, ...]:
    """Ways with one of these have the same bits in all weights."""
    cut = (way.stage > 0, (way.persistence, way.model_persistence) if way.stage == 3 else ())
    return way.microbatches, way.reduces_each_microbatch, way.clipping, cut if way.clipping else ()


# ---- the toy --------------------------------------------------------------------------------------------------------


def toy_on_ranks(rank: int, world_size: int, ways: list[Way]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """(norms, whole weights) of each way."""
    topology = build_topology(Degrees(shard=world_size), torch.device("cpu"), timeout_s=20)
    found = []
    for way in ways:
        toy, model = zero_cases.make(way, topology)
        norms = zero_cases.train(model, toy, way)
        with model.gathered():
            weights = {name: p.detach().clone() for name, p in toy.named_parameters()}
        model.close()
        found.append((norms, weights))
    return found


MODELS = ({}, {"tied": True}, {"frozen": True})


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize(("world_size", "microbatches"), [(2, (1, 2, 3)), (3, (1, 2, 4))])
def test_no_way_to_train_the_toy_changes_it(world_size: int, microbatches: tuple[int, ...], model: Any) -> None:
    """All ways equal one process; those that sum microbatches and ranks in one order are equal bit for bit."""
    draw = random.Random(world_size)
    ways = [drawn(draw, microbatches, **model) for _ in range(24)]
    expected_of = {clipping: zero_cases.reference(Way(clipping=clipping, **model)) for clipping in (0.0, 0.7)}
    results = run_ranks(world_size, toy_on_ranks, ways)
    first: dict[Any, tuple[Way, Any]] = {}
    for number, way in enumerate(ways):
        found, (weights, norms) = results[0][number], expected_of[way.clipping]
        assert found[0] == pytest.approx(norms, rel=RTOL), way
        pairs = {f"{way} {name}": (found[1][name], weights[name]) for name in weights}
        assert_close_named(pairs, rtol=RTOL, atol=1e-12)
        like, expected = first.setdefault(order_of_sums(way), (way, found))
        for result in results:
            differing = [name for name in weights if bits(result[number][1][name]) != bits(expected[1][name])]
            assert not differing, f"{way}: {differing} differ from {like}"
            assert result[number][0] == found[0], f"{way}: ranks differ"
            assert not way.clipping or found[0] == expected[0], f"{way}: norms differ from {like}"


def bits(tensor: Tensor) -> bytes:
    return tensor.clone().numpy().tobytes()  # the storage of what numpy has seen can no longer be let go


# ---- two pipeline stages --------------------------------------------------------------------------------------------

SAMPLES = 8
SCHEDULES = (("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("interleaved_1f1b", 2), ("zb_v", 2))


def pipelined(draw: random.Random, way: Way) -> dict[str, Any]:
    """The config of data 2 x pipeline 2; one model and batch, the schedule drawn."""
    schedule, stages = draw.choice(SCHEDULES)
    recompute = draw.choice(("none", "full"))
    cell = Cell(2, 2, 1, schedule, stages, way.microbatches, way.stage, tied=way.tied, recompute=recompute, dropout=0.1)
    content = config(cell, model__num_layers=4, training__steps=3)
    content["zero_optimization"] = way.zero_section()
    content["gradient_clipping"] = way.clipping
    content["train_micro_batch_size_per_gpu"] = SAMPLES // (2 * way.microbatches)
    return content


def pipeline_on_ranks(rank: int, world_size: int, contents: list[Any]) -> list[tuple[list[Any], dict[str, bytes]]]:
    """(losses and norms, bytes of the whole weights by name) of each config."""
    found = []
    for content in contents:
        trainer = Trainer(preflight.plan(content), Place(rank, world_size))
        records = [trainer.train_step() for _ in range(content["training"]["steps"])]
        with trainer.model.gathered():
            weights = {
                f"{name} in stage {index}" if "output" in name else name: bits(p.detach())
                for index, stage in trainer.stages.items()
                for name, p in stage.named_parameters()
            }
        trainer.close()
        found.append(([(r.loss, r.grad_norm) for r in records], weights))
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_no_way_to_train_a_pipeline_changes_it(tied: bool) -> None:
    draw = random.Random(tied)
    ways = [drawn(draw, (1, 2, 4), tied=tied, known=True) for _ in range(16)]
    ways = [replace(way, max_live=way.max_live * 20, prefetch=way.prefetch * 20) for way in ways]
    contents = [pipelined(draw, way) for way in ways]
    expected = {clipping: reference(reference_of(contents[0], tied, clipping)) for clipping in (0.0, 0.7)}
    results = run_ranks(4, pipeline_on_ranks, contents, timeout_s=120)
    first: dict[Any, tuple[Way, Any]] = {}
    for number, way in enumerate(ways):
        here = (way, contents[number]["pipeline"])
        curve = results[0][number][0]
        assert worst_relative(curve, expected[way.clipping]) <= RTOL, here
        assert all(result[number][0] == curve for result in results)
        weights: dict[str, set[bytes]] = defaultdict(set)
        for result in results:
            for name, value in result[number][1].items():
                weights[name.split(" in ")[0]].add(value)
        assert all(len(values) == 1 for values in weights.values()), f"{here}: ranks differ"
        like, found = first.setdefault(order_of_sums(way), (here, (curve, weights)))
        assert [loss for loss, _ in curve] == [loss for loss, _ in found[0]], f"{here}: losses differ from {like}"
        assert not way.clipping or curve == found[0], f"{here}: norms differ from {like}"
        assert [name for name in weights if weights[name] != found[1][name]] == [], f"{here} differs from {like}"


def reference_of(content: dict[str, Any], tied: bool, clipping: float) -> dict[str, Any]:
    """The one-process config of the same model and batch."""
    plain = reference_config(Cell(2, 2, 1, microbatches=SAMPLES // 2, tied=tied, dropout=0.1))
    return {**plain, "model": content["model"], "training": content["training"], "gradient_clipping": clipping}
