"""`trilith trace`: what a run of two pipeline ranks writes about its last step, in words, as a picture, for Perfetto."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_run import content
from tests.harness import run_ranks
from trilith import cli, preflight, runner
from trilith.pipeline.action import COMPUTE, Kind
from trilith.pipeline.trace_file import Trace, read_trace
from trilith.trainer import Place, Trainer

STEPS = 4


class Listener:
    """A launcher that keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []
        self.waits: list[str] = []

    def position(self, step: int | None = None, stage: int | None = None, phase: str | None = None) -> None:
        if phase == "train":
            self.steps.append(step)

    def wait(self, text: str) -> None:
        self.waits.append(text)


def job(rank: int, world_size: int, config: dict[str, Any]) -> tuple[list[int | None], list[str]]:
    """One rank of `trilith train` in a world that exists; what it told its launcher."""
    listener, plan = Listener(), preflight.plan(config)
    trainer = Trainer(plan, Place(rank, world_size))
    trainer.on_wait = listener.wait
    runner.Run(trainer, listener, plan.resolved.to_json()).run()
    assert all(stage.queue is None or stage.queue.tracker is None for stage in trainer.pipeline.values())
    trainer.close()
    return listener.steps, listener.waits


def train(directory: Path, schedule: str, **changes: Any) -> list[tuple[list[int | None], list[str]]]:
    """Four steps of a model of four layers on two pipeline ranks, evaluated after the third."""
    virtual = 2 if schedule == "dualpipe_v" else 1
    config = content(
        directory, model__num_layers=4, parallel__pipeline=2, pipeline__schedule=schedule, training__steps=STEPS,
        pipeline__virtual_stages=virtual, checkpoint__save_interval=None, **changes,
    )  # fmt: skip
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    return run_ranks(2, job, config)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "traced"
    for steps, waits in train(directory, "zb_h1"):
        assert steps == sorted(steps, key=lambda step: step or 0) and {0, 1, 2, 3} <= set(steps)
        assert all(re.search(r"waiting for receive .* from pipeline rank [01]", wait) for wait in waits)
    return directory


def expected(trace: Trace) -> list[list[tuple[Kind, int, int]]]:
    """The computations of each rank, in order, pairs taken apart."""
    return [
        [(part.kind, part.stage, part.microbatch) for action in row for part in action.parts() if part.kind in COMPUTE]
        for row in trace.schedule.actions
    ]


def test_every_action_of_the_last_step_is_recorded(traced: Path) -> None:
    trace = read_trace(traced)
    assert trace.step == STEPS and trace.schedule.name == "zb_h1"
    rows = [[(r.kind, r.stage, r.microbatch) for r in trace.records[rank] if r.kind in COMPUTE] for rank in (0, 1)]
    assert rows == expected(trace)
    assert {r.kind for row in trace.records.values() for r in row} >= {
        Kind.BACKWARD_WEIGHT,
        Kind.REDUCE,
        Kind.TIE_REDUCE,
    }
    for row in trace.records.values():
        assert all(a.end_s <= b.start_s for a, b in pairwise(row)), "one thing at a time, in order"
    made = {(r.kind, r.stage, r.microbatch): r for row in trace.records.values() for r in row}
    for m in range(4):
        assert made[Kind.FORWARD, 0, m].end_s < made[Kind.FORWARD, 1, m].start_s, "ranks are on one clock"
        assert made[Kind.BACKWARD_INPUT, 1, m].end_s < made[Kind.BACKWARD_INPUT, 0, m].start_s
    assert trace.measured.makespan_s > 0 and 0 < trace.measured.bubble < 1
    beyond_s = trace.measured.makespan_s - trace.simulation.makespan_s
    assert sum(delay.seconds for delay in trace.delays) == pytest.approx(beyond_s, abs=1e-9)


def test_the_report_shows_measured_beside_predicted(traced: Path) -> None:
    html = (traced / "report.html").read_text(encoding="utf-8")
    trace = read_trace(traced)
    for name, bubble in (("measured", trace.measured.bubble), ("predicted", trace.predicted_bubble)):
        assert re.search(rf"<td>{name}</td><td>[^<]*</td><td>{bubble:.1%}</td>", html)
    assert "Measured - simulated makespan" in html and "µs: rank" in html
    assert "parameters: measured / predicted" in html and "activations: measured / predicted" in html


def test_the_command(traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, chrome = tmp_path / "trace.png", tmp_path / "trace.json"
    assert cli.main(["trace", str(traced), "--png", str(png), "--chrome", str(chrome)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 4, zb_h1: 2 ranks, 2 stages, 4 microbatches\nmeasured\n0 |")
    assert "µs: rank" in out and png.read_bytes().startswith(b"\x89PNG")
    events = json.loads(chrome.read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"F0.0", "I1.3", "W0.3", "RD1"}


def test_runs_that_left_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert f"{tmp_path / 'timeline.json'}: there is no such file" in capsys.readouterr().err
    (tmp_path / "timeline.json").write_text("{}")
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "is no timeline of this version" in capsys.readouterr().err


def test_pairs_are_recorded_as_their_parts(tmp_path: Path) -> None:
    train(tmp_path / "run", "dualpipe_v")
    trace = read_trace(tmp_path / "run")
    rows = [[(r.kind, r.stage, r.microbatch) for r in trace.records[rank] if r.kind in COMPUTE] for rank in (0, 1)]
    assert rows == expected(trace)
    assert Kind.OVERLAPPED in {bar.kind for bar in trace.bars}


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        ("1f1b", {"pipeline__optimizer_sync": "postvalidate"}),
        ("pipedream", {"gradient_clipping": 0.0, "model__tie_embeddings": False}),
        ("pipedream_2bw", {}),
    ],
)
def test_steps_that_run_into_each_other(
    schedule: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A span ends where an evaluation needs final weights; every step is logged once, in order, and the last is traced."""
    train(tmp_path / "run", schedule, **changes)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "eval_loss" in row) for row in rows] == [
        (1, False), (2, False), (3, False), (3, True), (4, False), (4, True),
    ]  # fmt: skip
    trace = read_trace(tmp_path / "run")
    computed = [r for row in trace.records.values() for r in row if r.kind in COMPUTE]
    assert trace.step == 4 and len(computed) == 2 * 2 * 4, "forward and backward of four microbatches on two ranks"
    assert bool(trace.delays) == (schedule == "1f1b")
    assert ("note: pipeline.schedule:" in capsys.readouterr().out) == (schedule != "1f1b"), "it changes the mathematics"


def test_kept_activations_are_counted(traced: Path) -> None:
    """Rank 0 keeps two microbatches of half the model, rank 1 one and its weight gradients' inputs: none is nothing."""
    html = (traced / "report.html").read_text(encoding="utf-8")
    table = html[html.index("Memory per rank by category") :].partition("</table>")[0]
    head = re.findall(r"<th>([^<]*)</th>", table)
    cells = [re.findall(r"<td>([^<]*)</td>", row) for row in table.split("<tr>")[2:]]
    assert head[0] == "rank" and [row[0] for row in cells] == ["0", "1"]
    assert all(row[head.index("activations")].endswith("KiB") for row in cells), cells
