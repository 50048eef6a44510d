"""What a run writes about itself: records, sinks that never stop training, progress lines, saved bytes, the report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trilith.monitor import report
from trilith.monitor.activations import ActivationMeter
from trilith.monitor.metrics import EvalRecord, StepRecord, peak_memory_bytes
from trilith.monitor.progress import Progress, human_bytes, human_count, human_time
from trilith.monitor.sinks import CsvFile, JsonLines, Record, Sinks, TensorBoard

STEP = StepRecord(
    step=1,
    loss=1 / 3,
    lr=1e-3,
    grad_norm=0.1 + 0.2,
    tokens=4096,
    tokens_per_s=1234.5,
    step_time_s=0.25,
    memory_peak_bytes=3 << 30,
    consumed_samples=32,
    consumed_tokens=4096,
    model_flops_per_s_causal=2.5e9,
    model_flops_per_s_noncausal=3e9,
)
EVALUATION = EvalRecord(step=1, eval_loss=2 / 3, eval_tokens=512, eval_time_s=0.5)
NEEDED = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s", "memory_peak_bytes"}


def step(number: int, **changes: Any) -> StepRecord:
    return replace(STEP, step=number, consumed_samples=32 * number, **changes)


def lines(path: Path) -> list[Any]:
    """Every line of a file as strict JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---- records ------------------------------------------------------------------------------------------------------


def test_records_are_flat_and_unrounded() -> None:
    row = STEP.to_json()
    assert set(row) >= NEEDED
    assert row["loss"] == 1 / 3 and row["grad_norm"] == 0.1 + 0.2 and row["skipped"] is False
    assert not {"mfu_causal", "mfu_noncausal", "loss_scale", "breakdown"} & set(row), "what is not known is left out"
    known = step(2, mfu_causal=0.5, loss_scale=8.0, breakdown={"forward_time_s": 0.1}).to_json()
    assert (known["mfu_causal"], known["loss_scale"], known["forward_time_s"]) == (0.5, 8.0, 0.1)
    assert "breakdown" not in known
    assert EVALUATION.to_json() == {"step": 1, "eval_loss": 2 / 3, "eval_tokens": 512, "eval_time_s": 0.5}


def test_peak_memory_is_this_process_s() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert 10 << 20 < before < 1 << 40
    kept = torch.ones(1 << 25)
    assert peak_memory_bytes(torch.device("cpu")) >= before and kept.numel()


# ---- metrics.jsonl ------------------------------------------------------------------------------------------------


def write_all(path: Path, records: list[Record], resume_step: int = 0) -> None:
    sink = JsonLines(path, resume_step)
    for record in records:
        sink.write(record)
    sink.close()


def test_one_object_a_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write(STEP)
    assert lines(path) == [STEP.to_json()], "a line reaches the file at once"
    sink.write(EVALUATION)
    sink.close()
    assert lines(path) == [STEP.to_json(), EVALUATION.to_json()]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """A skipped fp16 step has an infinite norm; every line must stay JSON for any reader."""
    path = tmp_path / "metrics.jsonl"
    write_all(path, [step(1, grad_norm=math.inf, skipped=True), step(2, loss=math.nan)])
    first, second = lines(path)
    assert first["grad_norm"] is None and first["skipped"] is True and first["loss"] == 1 / 3
    assert second["loss"] is None
    steps, _ = report.read_metrics(path)
    assert len(steps) == 2


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, [step(1), step(2)])
    write_all(path, [step(1)])
    assert [row["step"] for row in lines(path)] == [1]


def test_resume_drops_later_lines(tmp_path: Path) -> None:
    """A run killed at step 5 that resumes at 3 writes 4 and 5 again; evaluations of step 3 stay."""
    path = tmp_path / "metrics.jsonl"
    evaluation = replace(EVALUATION, step=3)
    write_all(path, [step(1), step(2), step(3), evaluation, step(4), step(5)])
    kept = path.read_text().splitlines()[:4]
    write_all(path, [step(4), step(5)], resume_step=3)
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 3, 4, 5]
    assert path.read_text().splitlines()[:4] == kept


@pytest.mark.parametrize("cut", [1, 10, 60, 200])
def test_a_line_that_a_kill_cut_short_is_dropped(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, [step(1), step(2), step(3)])
    whole = path.read_bytes()
    last = len(whole) - len(json.dumps(step(3).to_json())) - 1
    path.write_bytes(whole[: last + cut])
    write_all(path, [step(3)], resume_step=9)
    assert [row["step"] for row in lines(path)] == [1, 2, 3]


@pytest.mark.parametrize("rubbish", [b"\0" * 40, b"\xff\xfe{", b"17\n", b"null\n", b'{"no": 1}\n', b"\n"])
def test_what_a_crash_left_at_the_end_is_dropped(rubbish: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, [step(1)])
    path.write_bytes(path.read_bytes() + rubbish)
    write_all(path, [step(2)], resume_step=1)
    assert [row["step"] for row in lines(path)] == [1, 2]


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    write_all(tmp_path / "metrics.jsonl", [step(8)], resume_step=7)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [8]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while resuming, here at the replacement, loses no line."""
    path = tmp_path / "metrics.jsonl"
    write_all(path, [step(1), step(2)])
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, 1)
    assert path.read_bytes() == before


# ---- CSV and TensorBoard ------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_rows_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "job" / "metrics.csv"
    sink = CsvFile(path)
    for record in (step(1), EVALUATION, step(2), step(12)):
        sink.write(record)
    sink.close()
    assert [(row["step"], float(row["loss"])) for row in rows(path)] == [("1", 1 / 3), ("2", 1 / 3), ("12", 1 / 3)]
    text = path.read_text()
    for later in (text, text[: text.index("12,")] + "1"):  # step 12 whole, or cut short to what looks like step 1
        path.write_text(later)
        sink = CsvFile(path, resume_step=5)
        sink.write(step(3, loss=0.5, loss_scale=8.0))
        sink.close()
        assert [row["step"] for row in rows(path)] == ["1", "2", "3"]
    assert rows(path)[-1]["loss"] == "0.5", "columns keep their meaning when a figure comes new"
    assert all(None not in row for row in rows(path))


def test_tensorboard_has_deepspeed_s_tags(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    sink.write(step(2, loss_scale=8.0))
    sink.write(replace(EVALUATION, step=2))
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = ("train_loss", "lr", "grad_norm", "tokens_per_s", "loss_scale")
    assert set(events.Tags()["scalars"]) == {f"Train/Samples/{n}" for n in names} | {"Eval/Samples/eval_loss"}
    (point,) = events.Scalars("Train/Samples/train_loss")
    assert (point.step, point.value) == (64, pytest.approx(1 / 3))
    assert events.Scalars("Eval/Samples/eval_loss")[0].step == 64


# ---- sinks that fail ----------------------------------------------------------------------------------------------


class Broken:
    """Works for `good` records, then raises."""

    def __init__(self, good: int, error: Exception) -> None:
        self.good, self.error, self.calls = good, error, 0

    def write(self, record: Record) -> None:
        self.calls += 1
        if self.calls > self.good:
            raise self.error

    def close(self) -> None:
        raise self.error


def failing_maker() -> Broken:
    raise PermissionError("not here")


def test_a_sink_that_fails_is_dropped_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Broken(2, OSError(28, "No space left on device"))
    makers: list[tuple[str, Callable[[], Any]]] = [
        ("never made", failing_maker),
        ("broken", lambda: broken),
        ("metrics.jsonl", lambda: JsonLines(tmp_path / "metrics.jsonl")),
    ]
    sinks = Sinks(makers)
    for number in range(1, 7):
        sinks.write(step(number))
    sinks.close()
    sinks.close()
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6], "the others go on"
    assert broken.calls == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("warning: ") for line in said)
    assert "never made" in said[0] and "not here" in said[0]
    assert "broken" in said[1] and "No space left" in said[1]


def test_a_sink_that_fails_to_close(capsys: pytest.CaptureFixture[str]) -> None:
    sinks = Sinks([("broken", lambda: Broken(9, ValueError("late")))])
    sinks.write(STEP)
    sinks.close()
    assert capsys.readouterr().err.count("warning: broken") == 1


def test_an_interrupt_is_no_failure_of_a_sink() -> None:
    class Interrupted(Broken):
        def write(self, record: Record) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([("sink", lambda: Interrupted(0, ValueError()))]).write(STEP)


# ---- progress -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12, "12"),
        (999.4, "999"),
        (999.7, "1k"),
        (1234567, "1.23M"),
        (999_999, "1M"),
        (2.5e9, "2.5G"),
        (4e12, "4T"),
    ],
)
def test_human_count(value: float, text: str) -> None:
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05"), (3599.9, "1:00:00")],
)
def test_human_time(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_plain_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Not a terminal: the first line of this run, every tenth, and the last; no control characters."""
    progress = Progress(total_steps=25, first_step=3, interval=10)
    for number in range(4, 26):
        progress.step(step(number))
    progress.evaluation(replace(EVALUATION, step=20))
    progress.say("checkpoint runs/step-00000020")
    progress.close()
    said = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in said[:4]] == ["step  4/25", "step 10/25", "step 20/25", "step 25/25"]
    assert said[4:] == ["eval at step 20: eval_loss 0.6667 over 512 tokens", "checkpoint runs/step-00000020"]
    parts = said[1].split("  ")
    assert parts[1:6] == [
        "loss 0.3333",
        "lr 1.00e-03",
        "grad_norm 0.300",
        "1.23k tokens/s",
        "2.5GFLOP/s causal (3G non-causal)",
    ]
    assert parts[6] == "mem 3.0 GiB" and parts[7].startswith("left ") and len(parts) == 8
    assert said[3].endswith("left 0:00")
    assert all(character.isprintable() for line in said for character in line)


def test_figures_that_only_some_runs_have(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total_steps=2)
    progress.step(step(1, mfu_causal=0.4123, mfu_noncausal=0.5, loss_scale=65536.0, skipped=True, grad_norm=math.inf))
    line = capsys.readouterr().out
    for text in ("MFU 41.2% causal (50.0% non-causal)", "loss_scale 65536", "SKIPPED (overflow)", "grad_norm inf"):
        assert text in line


# ---- saved activations --------------------------------------------------------------------------------------------


class Square(nn.Module):
    """y = relu(x W), loss = sum(y y): autograd keeps x, W and y, y in three places of one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x @ self.weight).relu()
        return (y * y.view(-1, 32)).sum()


def inputs() -> torch.Tensor:
    """With a gradient, so that autograd needs the weights."""
    return torch.ones(8, 16, requires_grad=True)


X_BYTES, Y_BYTES = 8 * 16 * 4, 8 * 32 * 4


def test_saved_bytes_by_hand() -> None:
    module = Square()
    with ActivationMeter(module.parameters()) as meter:
        loss = module(inputs())
        assert meter.peak_bytes == X_BYTES + Y_BYTES
        loss.backward()
    assert meter.peak_bytes == X_BYTES + Y_BYTES
    assert torch.equal(module.weight.grad, torch.full((16, 32), 2.0 * 16 * 8))
    with ActivationMeter() as meter:
        module(inputs())
    assert meter.peak_bytes == X_BYTES + Y_BYTES + 16 * 32 * 4, "weights count where they are not left out"


def test_saved_bytes_follow_the_microbatches_in_flight() -> None:
    """One after the other: one microbatch's bytes. Both forwards first: twice as many."""
    module = Square()
    with ActivationMeter(module.parameters()) as meter:
        for _ in range(3):
            module(inputs()).backward()
        assert meter.peak_bytes == X_BYTES + Y_BYTES
        first, second = module(inputs()), module(inputs())
        assert meter.peak_bytes == 2 * (X_BYTES + Y_BYTES)
        first.backward()
        second.backward()
        module(inputs()).backward()
    assert meter.peak_bytes == 2 * (X_BYTES + Y_BYTES)


def test_a_graph_that_is_dropped_is_released() -> None:
    """relu keeps its own output: the meter must not tie that into a cycle that nothing collects."""
    module = Square()
    with ActivationMeter(module.parameters()) as meter:
        for _ in range(3):
            module(inputs())
    assert meter.peak_bytes == X_BYTES + Y_BYTES


def test_views_of_a_flat_buffer_are_left_out_whole() -> None:
    """ZeRO's parameters are views of one buffer; what autograd keeps of them is no activation."""
    flat = torch.ones(16 * 32 + 100)
    module = Square()
    module.weight.data = flat[100:].view(16, 32)
    with ActivationMeter([module.weight]) as meter:
        module(inputs()).backward()
    assert meter.peak_bytes == X_BYTES + Y_BYTES


def test_what_is_held_outside_of_autograd_counts_while_it_lives() -> None:
    """A queue of weight gradients keeps x, which autograd keeps too (once), and a gradient of its own."""
    module, gradient = Square(), torch.ones(8, 32)
    with ActivationMeter(module.parameters()) as meter:
        x = inputs()
        loss = module(x)
        held = [meter.track(x), meter.track(gradient)]
        assert meter.live_bytes == meter.peak_bytes == X_BYTES + 2 * Y_BYTES
        loss.backward()
        assert meter.live_bytes == X_BYTES + Y_BYTES
        held.clear()
        assert meter.live_bytes == 0 and meter.peak_bytes == X_BYTES + 2 * Y_BYTES


# ---- the report ---------------------------------------------------------------------------------------------------


def test_report_makes_both_files(tmp_path: Path) -> None:
    write_all(tmp_path / "metrics.jsonl", [step(1), step(2, loss=math.nan), step(3), replace(EVALUATION, step=3)])
    steps, evaluations = report.read_metrics(tmp_path / "metrics.jsonl")
    assert ([r["step"] for r in steps], [r["step"] for r in evaluations]) == ([1, 2, 3], [3])
    memory = {"parameters": [1 << 20, 2 << 20], "gradients": [3 << 20, 4 << 20]}
    panels = [report.loss_panel(steps, evaluations), report.memory_panel(memory)]
    tables = {"Memory <per rank>": report.memory_rows(memory)}
    report.write(tmp_path, report.Report("runs/größe & <b>", {"last loss": "0.333 <nats>"}, panels, tables))
    picture = (tmp_path / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("runs/größe &amp; &lt;b&gt;", "0.333 &lt;nats&gt;", "Memory &lt;per rank&gt;", 'src="report.png"'):
        assert part in text
    assert "<td>1</td><td>2.0 MiB</td><td>4.0 MiB</td>" in text
    assert "<script" not in text and "http" not in text, "the report needs no network"


def test_memory_beside_the_prediction() -> None:
    """A category that a rank does not have is nothing; one that nobody has is left out."""
    measured = {"parameters": [1024, 3072], "host": [0, 2048], "rollback": [0, 0]}
    rows = report.compared_rows(
        measured, {"parameters": [1024, 2048], "host": [0, 2048], "rollback": [0, 0], "disk": [0, 0]}
    )
    assert rows[0] == ["rank", "parameters: measured / predicted", "host: measured / predicted"]
    assert rows[1] == ["0", f"{human_bytes(1024)} / {human_bytes(1024)} (1.00)", f"{human_bytes(0)} / {human_bytes(0)}"]
    assert rows[2][1].endswith("(1.50)") and rows[2][2].endswith("(1.00)")


def test_a_run_without_evaluations_has_a_report(tmp_path: Path) -> None:
    report.write(tmp_path, report.Report("run", {}, [report.loss_panel([STEP.to_json()], [])], {}))
    assert (tmp_path / "report.png").exists() and (tmp_path / "report.html").exists()
