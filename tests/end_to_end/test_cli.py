"""The `trilith` command as a user meets it: exit codes, messages, what is printed, and how fast."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.broken_configs import BROKEN_CONFIGS, BrokenConfig, edited, valid_config
from trilith import cli

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.json"
QUIET_LOAD = 1.5


def trilith(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m trilith ARGUMENTS` in a process of its own."""
    search = os.pathsep.join((str(ROOT / "engine"), str(ROOT / "launcher")))
    return subprocess.run(
        [sys.executable, "-m", "trilith", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """The command in this process: (exit code, stdout, stderr)."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def write(directory: Path, content: dict[str, Any]) -> Path:
    path = directory / "run.json"
    path.write_text(json.dumps(content))
    return path


# ---- broken configs -----------------------------------------------------------------------------------------------


def is_clear(case: BrokenConfig, path: Path, code: int, out: str, err: str) -> None:
    """Exit code 2; a message on stderr that names the file, speaks of the key only, gives the hint; no traceback."""
    assert code == 2, err
    assert "Traceback" not in err + out and out == ""
    key = str(path) if case.key == "CONFIG" else case.key
    head, *problems = err.splitlines()
    assert head.startswith(f"{path.name}: {len(problems)} problem") and case.hint in err, err
    assert problems and all(key in problem for problem in problems), err


@pytest.mark.parametrize("case", BROKEN_CONFIGS, ids=lambda case: case.name)
def test_broken_configs_are_refused(case: BrokenConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = case.write(tmp_path)
    is_clear(case, path, *call(capsys, "check", path))


@pytest.mark.parametrize("case", BROKEN_CONFIGS, ids=lambda case: case.name)
def test_nothing_is_started(
    case: BrokenConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`trilith train` refuses the same before any process, file or directory exists."""

    def started(*arguments: object, **options: object) -> int:
        raise AssertionError("something was started")

    for name in ("trilith_launcher.launch", "trilith.data.batch.prepare_data", "subprocess.Popen", "os.fork"):
        monkeypatch.setattr(name, started)
    monkeypatch.chdir(tmp_path)
    path = case.write(tmp_path)
    before = sorted(tmp_path.iterdir())
    is_clear(case, path, *call(capsys, "train", path))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["typo_in_section", "trailing_comma", "heads_over_tensor"])
def test_broken_configs_in_a_process(name: str, tmp_path: Path) -> None:
    """The same through the real command: one of structure, one of JSON, one of layout."""
    (case,) = (case for case in BROKEN_CONFIGS if case.name == name)
    path = case.write(tmp_path)
    done = trilith("train", path)
    is_clear(case, path, done.returncode, done.stdout, done.stderr)


def test_several_mistakes_are_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, edited({"parallel.tensr": 2, "training.steps": "20", "model.dropout": 2}))
    code, _, err = call(capsys, "check", path, "--set", "optimizer.params.lr=-1")
    assert code == 2 and err.startswith("run.json: 4 problems")
    for key in ("parallel.tensr", "training.steps", "model.dropout", "optimizer.params.lr"):
        assert sum(key in line.split(" = ")[0] for line in err.splitlines()) == 1, (key, err)


# ---- check --------------------------------------------------------------------------------------------------------


def test_check_prints_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, valid_config())
    code, out, err = call(capsys, "check", path)
    assert (code, err) == (0, "") and "8 ranks = data 2 x pipeline 2 x tensor 2" in out
    code, out, _ = call(capsys, "check", path, "--json", "--set", "parallel.data=auto", "--world-size", "16")
    content = json.loads(out)
    assert code == 0 and content["world_size"] == 16 and content["config"]["parallel"]["data"] == 4
    code, _, err = call(capsys, "check", path, "--world-size", "6")
    assert code == 2 and "6" in err and "Traceback" not in err
    code, _, err = call(capsys, "check", path, "--world-size", "0")
    assert code == 2 and "Traceback" not in err


@pytest.mark.parametrize("name", sorted({path.name for path in (ROOT / "configs").glob("*.json")} - {"schema.json"}))
def test_shipped_configs_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "check", ROOT / "configs" / name)[0] == 0


# ---- schedule -----------------------------------------------------------------------------------------------------

SCHEDULE = ("schedule", "--name", "1f1b", "--stages", "4", "--microbatches", "8")


def test_schedule_prints_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """1F1B with p = 4, m = 8: idle 3 of 11 slots of the span, (p - 1)/(m + p - 1); at most p - rank in flight."""
    code, out, _ = call(capsys, *SCHEDULE, "--json")
    content = json.loads(out)
    assert code == 0
    assert content["bubble"] == pytest.approx(3 / 11, abs=1e-12) == pytest.approx(0.2727, abs=5e-5)
    assert content["bubble_makespan"] == pytest.approx(3 / 11, abs=1e-12)
    assert content["peak_microbatches"] == [4, 3, 2, 1]
    code, out, _ = call(capsys, *SCHEDULE)
    assert code == 0 and "bubble 27.3%" in out and "4, 3, 2, 1" in out
    assert len(re.findall(r"^\d \|", out, re.MULTILINE)) == 4, "a row a rank"


def test_interleaving_shrinks_the_bubble(capsys: pytest.CaptureFixture[str]) -> None:
    """v = 2 halves the idle slots: (p - 1)/(v m + p - 1)."""
    arguments = ("--name", "interleaved_1f1b", "--stages", "4", "--microbatches", "8", "--virtual", "2", "--json")
    _, out, _ = call(capsys, "schedule", *arguments)
    assert json.loads(out)["bubble"] == pytest.approx(3 / 19, abs=1e-12)


def test_schedule_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.png"
    code, out, _ = call(capsys, *SCHEDULE, "--png", path, "--json")
    assert code == 0 and json.loads(out)["num_stages"] == 4
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "zigzag", "--stages", "4", "--microbatches", "8"), "zigzag"),
        (("--name", "1f1b", "--stages", "0", "--microbatches", "8"), "at least 1"),
        (("--name", "1f1b", "--stages", "4", "--microbatches", "8", "--virtual", "2"), "one stage per rank"),
        (("--name", "1f1b", "--stages", "4"), "--microbatches"),
        (("--name", "1f1b", "--stages", "four", "--microbatches", "8"), "four"),
    ],
)
def test_schedules_that_cannot_be(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "schedule", *arguments)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere" / "out.png"
    code, _, err = call(capsys, *SCHEDULE, "--png", path)
    assert code == 2 and err == f"{path}: No such file or directory\n"


# ---- doctor and the rest ------------------------------------------------------------------------------------------


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    for part in ("trilith ", "Python 3.", "torch", "cores", "CUDA", "backends", "gloo", "g++"):
        assert part in out, part
    code, out, _ = call(capsys, "doctor", "--json")
    content = json.loads(out)
    assert content["packages"]["torch"] and content["cores"] >= 1 and "gloo" in content["backends"]
    assert content["memory_bytes"] > 1 << 28 and set(content["compilers"]) == {"g++", "nvcc"}


def test_doctor_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and "not found (not needed to train)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "COMMAND"), (("trane", "x.json"), "trane"), (("check",), "CONFIG.json"), (("data", "build"), "--output")],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 2 and message in err


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "data", "build", tmp_path / "none.txt", "--output", tmp_path / "set")
    assert code == 2 and "none.txt" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("variables", "message"), [({"RANK": "0"}, "WORLD_SIZE"), ({"RANK": "x", "WORLD_SIZE": "2"}, "'x'")]
)
def test_half_of_torchrun_s_environment(
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(capsys, "train", write(tmp_path, valid_config()))
    assert code == 2 and message in err and "Traceback" not in err


def test_a_reader_that_goes_away() -> None:
    """`trilith check ... | head -1` ends without a word."""
    command = f"{sys.executable} -m trilith check {QUICKSTART} --json | head -c 1"
    search = os.pathsep.join((str(ROOT / "engine"), str(ROOT / "launcher")))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env={**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "{" and done.stderr == ""


# ---- speed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "limit_s"),
    [(("--help",), 0.5), (("check", str(QUICKSTART)), 2.0), (("check", str(QUICKSTART), "--json"), 2.0)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_commands_answer_at_once(arguments: tuple[str, ...], limit_s: float) -> None:
    """torch is not imported; the best of three runs keeps the limit where the machine has nothing else to do."""
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = trilith(*arguments)
        times.append(time.monotonic() - start)
        assert done.returncode == 0, done.stderr
    seen = trilith(*arguments, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.split("|")[-1].strip() for line in seen.stderr.splitlines() if line.startswith("import time:")}
    assert "trilith.cli" in imported and "torch" not in imported
    assert arguments == ("--help",) or "trilith.preflight" in imported
    assert arguments != ("--help",) or not {"pydantic", "numpy"} & imported
    load = os.getloadavg()[0]
    print(f"trilith {' '.join(arguments)}: best of three {min(times):.2f} s, load average {load:.1f}")
    if load < QUIET_LOAD:
        assert min(times) < limit_s
