"""Which implementation is taken: the fastest one that works, found once, whatever becomes of the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trilith.errors import KernelError
from trilith.kernels.contest import Contest, user_cache


class Field:
    """Candidates with given times, and how often they ran."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.runs = seconds, dict.fromkeys(seconds, 0)

    def candidates(self) -> dict[str, Callable[[], object]]:
        def run(name: str) -> None:
            self.runs[name] += 1
            if self.seconds[name] < 0:
                raise RuntimeError("out of memory")

        return {name: lambda name=name: run(name) for name in self.seconds}  # type: ignore[misc]

    def clock(self, run: Callable[[], object]) -> float:
        before = dict(self.runs)
        run()
        (name,) = (name for name in before if self.runs[name] != before[name])
        return self.seconds[name]

    def winner(self, contest: Contest, shape_class: str = "a") -> str:
        return contest.winner(shape_class, self.candidates(), self.clock)


def test_the_fastest_wins_and_is_remembered(tmp_path: Path) -> None:
    path, field = tmp_path / "new" / "attention.json", Field(fused=2.0, torch=1.0)
    assert field.winner(Contest(path)) == "torch" and all(field.runs.values())
    other = Field(fused=1.0, torch=2.0)
    assert other.winner(Contest(path)) == "torch" and not any(other.runs.values()), "another process asks the file"
    assert other.winner(Contest(path), "b") == "fused"
    assert {name: row["winner"] for name, row in Contest(path).table().items()} == {"a": "torch", "b": "fused"}
    assert sorted(file.name for file in path.parent.iterdir()) == ["attention.json", "attention.json.lock"]


def test_processes_do_not_take_each_others_finds_away(tmp_path: Path) -> None:
    one, two, field = Contest(tmp_path / "c"), Contest(tmp_path / "c"), Field(x=1.0, y=2.0)
    field.winner(one, "a")
    field.winner(two, "b")
    assert set(Contest(tmp_path / "c").table()) == {"a", "b"}


def test_another_field_is_another_contest(tmp_path: Path) -> None:
    assert Field(fused=1.0, torch=2.0).winner(Contest(tmp_path / "c")) == "fused"
    assert Field(fused=3.0, torch=2.0, triton=2.5).winner(Contest(tmp_path / "c")) == "torch"


def test_what_fails_is_out(tmp_path: Path) -> None:
    assert Field(fused=-1.0, torch=5.0).winner(Contest(tmp_path / "c")) == "torch"
    with pytest.raises(KernelError, match="every implementation failed; the last: out of memory"):
        Field(fused=-1.0, torch=-1.0).winner(Contest(tmp_path / "c"), "b")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 0, "winners": {}}', '{"version": 1, "winners": {"a": 3}}', "\0\xff"]
)
def test_a_file_of_no_use_is_written_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text(content)
    assert Field(fused=1.0, torch=2.0).winner(Contest(path)) == "fused"
    assert json.loads(path.read_text())["winners"]["a"]["winner"] == "fused"


@pytest.fixture
def blocked(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "file").write_text("")
    yield tmp_path / "file" / "attention.json"  # below a file nothing can be made, for the superuser neither


def test_without_a_place_for_the_file_it_is_remembered_in_memory(blocked: Path) -> None:
    contest, field = Contest(blocked), Field(fused=1.0, torch=2.0)
    assert field.winner(contest) == "fused"
    runs = dict(field.runs)
    assert field.winner(contest) == "fused" and field.runs == runs


def test_where_caches_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/trilith")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache() == Path(os.path.expanduser("~")) / ".cache" / "trilith"
