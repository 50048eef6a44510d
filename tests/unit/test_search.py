"""The search for a schedule: constructed costs for which the right answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from trilith.errors import ConfigError
from trilith.models.activations import ActivationBytes
from trilith.models.base import Init, ParameterDecl, TensorDecl, UnitDecl
from trilith.pipeline.action import Schedule
from trilith.pipeline.memory import RankMemory
from trilith.pipeline.partition import Cuts
from trilith.pipeline.schedules import SCHEDULES
from trilith.pipeline.search import Measured, Question, Ranking, UnitCost, by_flops, candidates, search
from trilith.pipeline.simulate import peak_bytes

MIB = 2**20


def units(num_layers: int) -> tuple[UnitDecl, ...]:
    def unit(name: str, flops: float) -> UnitDecl:
        tensor = TensorDecl(f"{name}.weight", (10,), Init("zeros"))
        return UnitDecl(name, (ParameterDecl(f"{name}.weight", (tensor,), name),), flops, flops / 10)

    layers = [unit(f"layers.{index}", 10.0) for index in range(num_layers)]
    return (unit("embedding", 0.0), *layers, unit("head", 5.0))


def unit_cost(f: float, i: float, w: float, forward: int = MIB, queued: int = MIB) -> UnitCost:
    return UnitCost(f, i, w, ActivationBytes(forward, queued))


FREE = unit_cost(0.0, 0.0, 0.0, 0, 0)
LAYER = unit_cost(1.0, 1.0, 1.0)


def activations_alone(measured: Measured) -> Any:
    """A prediction of memory that counts a megabyte of state and the activations."""

    def memory(schedule: Schedule, cuts: Cuts) -> tuple[RankMemory, ...]:
        kept = measured.activations(cuts)
        peaks = peak_bytes(schedule, [a.after_forward for a in kept], [a.after_input_gradient for a in kept])
        return tuple(RankMemory(0, 1, MIB, 0, 0, 0, int(peak)) for peak in peaks)

    return memory


def ask(layers: Sequence[UnitCost], ranks: int, microbatches: int, transfer_s: float = 0.0, **changes: Any) -> Ranking:
    """The ranking for a model of these layers, with a free embedding and a free head."""
    measured = Measured((FREE, *layers, FREE), transfer_s)
    values: dict[str, Any] = {
        "units": units(len(layers)),
        "measured": measured,
        "schedules": candidates(ranks, microbatches, len(layers), None),
        "partitions": ("auto", "uniform"),
        "memory": activations_alone(measured),
    }
    return search(Question(**{**values, **changes}), is_measured=True)


def rows_by_name(ranking: Ranking) -> dict[str, Any]:
    return {row.schedule.name: row for row in reversed(ranking.rows)}


def test_candidates_are_synchronous_and_keep_their_rules() -> None:
    found = candidates(4, 8, 12, None)
    names = [schedule.name for schedule in found]
    assert not {"pipedream", "pipedream_2bw"} & set(names)
    expected = {name for name, recipe in SCHEDULES.items() if not recipe.asynchronous}
    assert set(names) == expected and names.count("interleaved_1f1b") == 2, "2 and 3 stages a rank"
    assert all(schedule.num_microbatches == 8 and schedule.num_ranks == 4 for schedule in found)
    assert "zb_h2" not in {schedule.name for schedule in candidates(4, 6, 12, None)}, "it needs 2p - 1 microbatches"
    assert {schedule.num_stages for schedule in candidates(4, 8, 12, 2)} == {8}
    assert all(schedule.num_stages <= 4 for schedule in candidates(4, 8, 5, None)), "every stage needs a layer"
    assert "interleaved_1f1b" not in {schedule.name for schedule in candidates(1, 8, 8, None)}


def test_with_room_and_equal_costs_nothing_beats_no_bubble() -> None:
    """F = B = W = 1 on 4 ranks: by span zb_h2 has no bubble, and 1f1b the 27.3 % of its formula."""
    rows = rows_by_name(ask([LAYER] * 8, 4, 8, overlaps_steps=True))
    assert rows["zb_h2"].bubble == pytest.approx(0.0, abs=1e-9)
    assert rows["1f1b"].bubble == pytest.approx(3 / 11) and rows["gpipe"].bubble == pytest.approx(3 / 11)
    assert rows["zb_h1"].bubble == pytest.approx(1 / 9)
    best = ask([LAYER] * 8, 4, 8, overlaps_steps=True).best
    assert best.bubble == pytest.approx(0.0, abs=1e-9) and best.schedule.splits_backward


def test_equal_times_are_decided_by_memory() -> None:
    """gpipe and 1f1b take the same time; gpipe holds all microbatches."""
    chosen = [schedule for schedule in candidates(2, 6, 4, None) if schedule.name in ("gpipe", "1f1b")]
    ranking = ask([LAYER] * 4, 2, 6, schedules=tuple(chosen))
    assert [row.schedule.name for row in ranking.rows] == ["1f1b", "gpipe"]
    assert ranking.rows[0].time_s == ranking.rows[1].time_s
    assert [row.memory_bytes for row in ranking.rows] == [MIB + 2 * 2 * MIB, MIB + 6 * 2 * MIB]
    assert len(ranking.rows) == 2, "equal layers: the uniform cut is the measured one"


def test_heavy_weight_gradients_favour_split_backwards() -> None:
    heavy = unit_cost(1.0, 1.0, 4.0)
    ranking = ask([heavy] * 8, 4, 8)
    assert ranking.best.schedule.splits_backward
    rows = rows_by_name(ranking)
    assert rows["zb_h1"].time_s < 0.9 * rows["1f1b"].time_s


def test_tight_memory_favours_schedules_that_hold_less() -> None:
    """The limit is what the leanest schedules need: 1f1b's first rank holds p microbatches."""
    free = ask([LAYER] * 8, 4, 8)
    needs = {name: row.memory_bytes for name, row in rows_by_name(free).items()}
    assert needs["v_min"] < needs["v_half"] < needs["1f1b"] == 9 * MIB
    tight = ask([LAYER] * 8, 4, 8, memory_limit_bytes=needs["v_half"])
    assert tight.best.schedule.name in ("v_half", "v_min")
    fitting = [row for row in tight.rows if row.fits]
    assert {row.schedule.name for row in fitting} == {"v_half", "v_min"}
    assert tight.rows[: len(fitting)] == tuple(fitting), "what does not fit comes last"
    assert not rows_by_name(tight)["1f1b"].fits
    tightest = ask([LAYER] * 8, 4, 8, memory_limit_bytes=needs["v_min"])
    assert tightest.best.schedule.name == "v_min"


def test_slow_transfers_favour_one_stage_a_rank() -> None:
    quick, slow = ask([LAYER] * 8, 4, 8), ask([LAYER] * 8, 4, 8, transfer_s=5.0)
    at = rows_by_name(quick)
    assert at["interleaved_1f1b"].time_s < at["1f1b"].time_s
    assert slow.best.virtual_stages == 1
    at = rows_by_name(slow)
    assert at["interleaved_1f1b"].time_s > at["1f1b"].time_s


def test_uneven_units_favour_the_measured_partition() -> None:
    """One layer as slow as three: it goes to a rank of its own."""
    layers = [unit_cost(3.0, 3.0, 3.0), LAYER, LAYER, LAYER]
    ranking = ask(layers, 2, 8)
    assert ranking.best.partition == "auto" and ranking.best.num_layers == (1, 3)
    by_partition = {row.partition: row for row in ranking.rows if row.schedule.name == "1f1b"}
    assert by_partition["auto"].time_s < 0.9 * by_partition["uniform"].time_s
    assert by_partition["uniform"].num_layers == (2, 2)


def test_the_embedding_and_the_head_cost_like_any_layer() -> None:
    measured = Measured((unit_cost(2.0, 2.0, 2.0), LAYER, LAYER, LAYER, LAYER, unit_cost(0.0, 0.0, 0.0)))
    ranking = ask([LAYER] * 4, 2, 8, measured=measured, partitions=("auto",))
    assert ranking.best.cuts[0] == (0, 2), "the embedding and one layer against three layers and the head"


def test_given_partitions_fix_the_number_of_stages() -> None:
    ranking = ask([LAYER] * 8, 2, 8, partitions=((2, 2, 2, 2),))
    assert all(row.num_layers == (2, 2, 2, 2) and row.virtual_stages == 2 for row in ranking.rows)


def test_nothing_fits() -> None:
    with pytest.raises(ConfigError) as caught:
        ask([LAYER] * 8, 4, 8, memory_limit_bytes=2 * MIB)
    smallest = min(row.memory_bytes for row in ask([LAYER] * 8, 4, 8).rows)
    text = str(caught.value)
    assert "pipeline.memory_limit_bytes = 2097152: no schedule fits" in text and f"{smallest} bytes" in text


@pytest.mark.parametrize("changes", [{"schedules": ()}, {"partitions": ((1, 1, 1),)}], ids=str)
def test_nothing_can_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.schedule = 'auto': none can be made"):
        ask([LAYER] * 4, 2, 4, **changes)


def test_flops_stand_in_for_times() -> None:
    """A layer's weight gradient is its product; its input gradient that, twice the attention, and what is recomputed."""
    kept = [ActivationBytes(1, 1)] * 4
    embedding, layer, _, head = by_flops(units(2), kept, "none").units
    assert (layer.forward_s, layer.backward_input_s, layer.backward_weight_s) == (10.5, 11.0, 10.0)
    assert embedding.total_s == 0.0 and head.forward_s == 5.25
    assert by_flops(units(2), kept, "full").units[1].backward_input_s == 21.5
    assert by_flops(units(2), kept, "selective").units[1].backward_input_s == 11.5
    assert by_flops(units(2), kept, "full").units[3] == head


def test_the_table_has_a_line_for_each_candidate() -> None:
    ranking = ask([LAYER] * 8, 2, 8, memory_limit_bytes=9 * MIB)
    lines = ranking.table().splitlines()
    assert "measured times" in lines[0] and "at most 9.0 MiB" in lines[0]
    assert len(lines) == 1 + len(ranking.rows)
    assert ranking.best.schedule.name in lines[1]
    assert any(line.endswith("auto [2x4]") for line in lines) and any(line.endswith("auto [4 4]") for line in lines)
    assert sum(line.endswith("does not fit") for line in lines) == sum(not row.fits for row in ranking.rows) > 0


def test_large_pipelines_are_ranked_at_once() -> None:
    ranking = ask([LAYER] * 32, 16, 64)
    assert len(ranking.rows) >= 5 and ranking.best.time_s < rows_by_name(ranking)["1f1b"].time_s
