"""The main job from end to end, on synthetic data: what a run directory holds, and what happens on the second run."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest

from tests.harness import run_ranks
from trilith import preflight, runner
from trilith.checkpoint import newest
from trilith.checkpoint.manifest import published_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
NEEDED = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s", "memory_peak_bytes"}
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "consumed_samples", "eval_loss", "eval_tokens")


def content(directory: Path, **changes: Any) -> dict[str, Any]:
    """A run of six steps that evaluates every third and saves every second."""
    made: dict[str, Any] = {
        "model": {
            "family": "gpt2",
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "sequence_length": 8,
            "vocab_size": 31,
            "dropout": 0.1,
        },
        "data": {"corpus": "synthetic"},
        "parallel": {"data": 1},
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_type": "linear"}},
        "training": {"steps": STEPS, "eval_interval": 3, "eval_batches": 2, "log_interval": 2},
        "checkpoint": {"save_interval": 2, "keep_last": 2},
        "run": {"directory": str(directory), "threads": 1, "device": "cpu"},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            made.setdefault(section, {})[key] = value
        else:
            made[section] = value
    return made


class Nowhere:
    """A launcher that does not listen."""

    def position(self, step: int | None = None, stage: int | None = None, phase: str | None = None) -> None:
        pass

    def wait(self, text: str) -> None:
        pass


def job(rank: int, world_size: int, configs: list[dict[str, Any]]) -> None:
    """One rank of `trilith train`, without its launcher, for one config after the other."""
    for config in configs:
        resolved = preflight.plan(config).resolved.to_json()
        runner.run_rank(rank=rank, world_size=world_size, store_path=None, context=Nowhere(), resolved=resolved)


def run(*configs: dict[str, Any]) -> list[str]:
    """The runs, one after the other in one process of one rank; the lines they print."""
    said = io.StringIO()
    with redirect_stdout(said):
        run_ranks(1, job, list(configs))
    return said.getvalue().splitlines()


def fails(config: dict[str, Any]) -> str:
    with pytest.raises(AssertionError) as caught:
        run_ranks(1, job, [config])
    return str(caught.value)


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def what_repeats(directory: Path) -> list[dict[str, Any]]:
    """Records without times and memory: what must be the same bit for bit."""
    return [{key: row[key] for key in SAME if key in row} for row in metrics(directory)]


@dataclass(frozen=True)
class Straight:
    """A run that nothing disturbed: its directory, and what it printed. Not to be changed."""

    directory: Path
    said: list[str]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The run, with every sink."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    return Straight(directory, run(content(directory, tensorboard__enabled=True, csv_monitor__enabled=True)))


# ---- one run ------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(straight: Straight) -> None:
    here, said = straight.directory, straight.said
    rows = metrics(here)
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert all(set(r) >= NEEDED for r in steps)
    assert [r["tokens"] for r in steps] == [4 * 8] * STEPS
    assert [r["consumed_tokens"] for r in steps] == [4 * 8 * n for n in range(1, STEPS + 1)]
    assert [r["step"] for r in evaluations] == [3, 6] and all(r["eval_tokens"] == 2 * 4 * 8 for r in evaluations)
    assert published_steps(here / "checkpoints") == [4, 6]
    resolved = json.loads((here / "config.resolved.json").read_text())
    assert resolved["config"]["gradient_accumulation_steps"] == 1 and "auto" not in json.dumps(
        resolved["config"]["model"]
    )
    assert resolved["origins"]["gradient_accumulation_steps"].startswith("derived") and resolved["world_size"] == 1
    assert json.loads((here / "timeline.json").read_text())["step"] == STEPS
    assert (here / "report.png").stat().st_size > 5000 and "eval_loss" in (here / "report.html").read_text()
    with next((here / "csv").rglob("*.csv")).open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(n) for n in range(1, STEPS + 1)]
    assert list((here / "tensorboard").rglob("events.*"))
    assert [line[:8] for line in said if line.startswith("step ")] == ["step 1/6", "step 2/6", "step 4/6", "step 6/6"]
    assert any(line.startswith("eval at step 3: ") for line in said)
    assert (
        f"checkpoint {here / 'checkpoints' / 'step-00000006'}" in said and said[-1] == f"report {here / 'report.html'}"
    )


def test_a_second_run_moves_the_first_aside(tmp_path: Path) -> None:
    here = tmp_path / "mine"
    short = content(here, training__steps=1, checkpoint__save_interval=None)
    said = run(short, short, short)
    assert sorted(path.name for path in tmp_path.glob("mine*")) == ["mine", "mine.1", "mine.2"]
    assert all(len(what_repeats(path)) == 2 for path in tmp_path.glob("mine*"))
    assert [line for line in said if "moved" in line] == [
        f"{here} held an earlier run: moved to {here}.{number}" for number in (1, 2)
    ]
    assert not (here / "checkpoints").exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / ".mine.lock"):
        assert f"run.directory = '{tmp_path / 'mine'}': another run is writing there" in fails(
            content(tmp_path / "mine")
        )
    assert not (tmp_path / "mine").exists()


def test_a_save_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    """As on a full disk: a warning each time, the run goes on to its end."""
    (tmp_path / "file").write_text("")
    said = run(content(tmp_path / "mine", checkpoint__directory=str(tmp_path / "file" / "checkpoints")))
    warnings = [line for line in said if line.startswith("warning: ")]
    assert len(warnings) == 3 and all("could not be written; earlier ones are untouched" in line for line in warnings)
    assert len([row for row in metrics(tmp_path / "mine") if "loss" in row]) == STEPS


# ---- resuming -----------------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_as_if_it_had_not_been(
    straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 6, resumed from step 4 by itself: the same records as a run that was never killed, once each."""
    here = tmp_path / "killed"
    monkeypatch.setenv("TRILITH_FAILPOINT", "optimizer_step:0:6:exit")
    assert "exit code 1" in fails(content(here))
    monkeypatch.delenv("TRILITH_FAILPOINT")
    assert [row["step"] for row in metrics(here)] == [1, 2, 3, 3, 4, 5]
    said = run(content(here, checkpoint__resume="auto"))
    assert f"resuming from {here / 'checkpoints' / 'step-00000004'}" in said
    assert what_repeats(here) == what_repeats(straight.directory)
    assert published_steps(here / "checkpoints") == [4, 6]


def test_resume_falls_back_from_a_damaged_checkpoint(straight: Straight, tmp_path: Path) -> None:
    """The newest is cut short: it is named, the one before it is taken, and in the end replaced by a good one."""
    here = tmp_path / "mine"
    shutil.copytree(straight.directory, here)
    damaged = here / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    said = run(content(here, checkpoint__resume="must", csv_monitor__enabled=True))
    passed_over = [line for line in said if line.startswith("checkpoint passed over: ")]
    assert len(passed_over) == 1 and f"{damaged}: 100 bytes" in passed_over[0]
    assert f"resuming from {here / 'checkpoints' / 'step-00000004'}" in said
    assert what_repeats(here) == what_repeats(straight.directory)
    assert newest(here / "checkpoints") == here / "checkpoints" / "step-00000006"


def test_resume_modes_without_a_checkpoint(tmp_path: Path) -> None:
    missing = tmp_path / "mine" / "checkpoints"
    short = {"training__steps": 1, "checkpoint__save_interval": None}
    must, auto = (content(tmp_path / "mine", checkpoint__resume=mode, **short) for mode in ("must", "auto"))
    assert f"checkpoint.resume = 'must': no valid checkpoint under {missing}" in fails(must)
    assert run(auto)[0] == f"no valid checkpoint under {missing}: starting fresh"


def test_a_new_run_does_not_mix_with_another_s_checkpoints(straight: Straight, tmp_path: Path) -> None:
    """A checkpoint.directory that an earlier run filled: refused before the first step, and nothing is lost."""
    shared = straight.directory / "checkpoints"
    text = fails(content(tmp_path / "two", checkpoint__directory=str(shared), training__seed=2))
    assert f"checkpoint.directory = {str(shared)!r}: holds the checkpoints of an earlier run" in text
    assert published_steps(shared) == [4, 6] and not (tmp_path / "two").exists()


# ---- through the command ------------------------------------------------------------------------------------------


def test_train_on_two_ranks(tmp_path: Path) -> None:
    """`trilith train` with its launcher: the ranks meet, train, write; one process gives the same losses."""
    two, one = tmp_path / "two", tmp_path / "one"
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content(two, data_types__param_dtype="fp64")))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trilith",
            "train",
            str(path),
            "--set",
            "parallel.tensor=2",
            "--set",
            "training.steps=3",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "engine"), str(ROOT / "launcher")))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 ranks" in done.stdout and "step 3/3" in done.stdout
    origins = json.loads((two / "config.resolved.json").read_text())["origins"]
    assert (origins["parallel.tensor"], origins["model.num_layers"]) == ("--set", "file")
    run(content(one, data_types__param_dtype="fp64", training__steps=3))
    losses = [[row.get("loss", row.get("eval_loss")) for row in metrics(directory)] for directory in (two, one)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-10)
