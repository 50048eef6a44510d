"""Schedules survive a file, broken files are refused by file, line and action, and no random edit slips through."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.written_schedules import play, texts
from trilith.errors import ScheduleError
from trilith.pipeline.action import Schedule
from trilith.pipeline.check import check
from trilith.pipeline.delayed import pipedream
from trilith.pipeline.passes import complete, freeze
from trilith.pipeline.schedule_file import read_schedule, write_schedule
from trilith.pipeline.schedules import SCHEDULES, make_schedule
from trilith.pipeline.simulate import Costs, simulate

BROKEN = sorted((Path(__file__).parent.parent / "broken_schedules").glob("*.txt"))
ACTION = re.compile(r"\b(?:F|B|I|W|SF|SB|RF|RB|RD|TR|U|V)\d+(?:\.\d+)?(?:[<>]\d+)?\b|action '\S+'")


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_file_is_refused_by_its_first_wrong_action(path: Path) -> None:
    """The first line of each file says how."""
    expected = path.read_text().splitlines()[0].removeprefix("# refused: ")
    with pytest.raises(ScheduleError) as caught:
        check(complete(read_schedule(path)))
    assert expected in str(caught.value)
    assert path.stem in str(caught.value)


def test_most_broken_files_name_an_action() -> None:
    naming = [path for path in BROKEN if ACTION.search(path.read_text().splitlines()[0])]
    assert len(naming) >= 40, "the others break a header, so there is no action to name"


@pytest.mark.parametrize("name", [name for name, recipe in SCHEDULES.items() if not recipe.asynchronous])
def test_schedules_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    recipe = SCHEDULES[name]
    for p in (1, 3, 4):
        made = make_schedule(name, p, recipe.stages_per_rank or 2, recipe.min_microbatches(p) + 2)
        for schedule in (made, complete(made)):
            write_schedule(schedule, tmp_path / "schedule.txt")
            assert max(len(line) for line in (tmp_path / "schedule.txt").read_text().splitlines()) <= 120
            assert read_schedule(tmp_path / "schedule.txt") == schedule
        check(complete(read_schedule(tmp_path / "schedule.txt"), validate=True))


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    """Comments, blank lines, a rank on two lines in turn with another, a name from the file; completed like any."""
    path = tmp_path / "mine.txt"
    path.write_text(
        "# mine\n\nmicrobatches: 2   # of them\nplacement:  0 1\n\nrank 0: F0.0\nrank 1: F1.0 B1.0\n"
        "rank  0:  F0.1 I0.0 W0.0 I0.1 W0.1 # the rest\nrank 1: F1.1 B1.1"
    )
    schedule = read_schedule(path)
    assert schedule.name == "mine"
    assert texts(schedule) == ["F0.0 F0.1 I0.0 W0.0 I0.1 W0.1", "F1.0 B1.0 F1.1 B1.1"]
    check(complete(schedule))
    check(complete(replace(schedule, ties=((0, 1),))))
    check(complete(freeze(schedule, (0,))))


def test_communication_in_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    made = complete(make_schedule("1f1b", 2, 1, 3))
    write_schedule(made, tmp_path / "made.txt")
    early = (tmp_path / "made.txt").read_text().replace("F0.2 RB0.1<1 SF0.2>1", "F0.2 SF0.2>1 RB0.1<1")
    (tmp_path / "made.txt").write_text(early)
    schedule = read_schedule(tmp_path / "made.txt")
    assert complete(schedule) == schedule != made
    with pytest.raises(ScheduleError, match="deadlocks with blocking sends"):
        check(schedule)


def test_what_a_file_cannot_say_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="schedule pipedream is asynchronous"):
        write_schedule(pipedream(2, 2), tmp_path / "no.txt")
    with pytest.raises(ScheduleError, match=r"validate of stage 0 \(V0\) has no place in a file"):
        write_schedule(complete(make_schedule("1f1b", 2, 1, 2), validate=True), tmp_path / "no.txt")
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"absent\.txt: cannot be read"):
        read_schedule(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match=r"binary\.txt: cannot be read"):
        read_schedule(tmp_path / "binary.txt")
    (tmp_path / "huge.txt").write_text(f"microbatches: {'9' * 5000}\n")
    with pytest.raises(ScheduleError, match="must be whole numbers"):
        read_schedule(tmp_path / "huge.txt")


# ------------------------------------------------------------------------------------------------------- random edits

Rows = list[list[str]]


def drop(draw: random.Random, rows: Rows) -> None:
    row = draw.choice(rows)
    row.pop(draw.randrange(len(row)))


def duplicate(draw: random.Random, rows: Rows) -> None:
    row = draw.choice(rows)
    row.insert(draw.randrange(len(row) + 1), draw.choice(row))


def swap(draw: random.Random, rows: Rows) -> None:
    """Mostly neighbours, which often may change places."""
    row = draw.choice(rows)
    one = draw.randrange(len(row) - 1)
    other = one + 1 if draw.random() < 0.7 else draw.randrange(len(row))
    row[one], row[other] = row[other], row[one]


def move(draw: random.Random, rows: Rows) -> None:
    """Within its rank or to another."""
    row = draw.choice(rows)
    word = row.pop(draw.randrange(len(row)))
    other = row if draw.random() < 0.8 else draw.choice(rows)
    other.insert(draw.randrange(len(other) + 1), word)


EDITS: tuple[Callable[[random.Random, Rows], None], ...] = (drop, duplicate, swap, move)
BASES = (("1f1b", 3, 1, 4), ("interleaved_1f1b", 2, 2, 4), ("zb_h1", 3, 1, 4), ("dualpipe_v", 2, 2, 4))


@pytest.mark.parametrize("whole", [False, True], ids=["computations", "completed"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base[0])
def test_a_random_edit_is_refused_or_harmless(base: tuple[str, int, int, int], whole: bool, tmp_path: Path) -> None:
    """One or two edits. What passes the check computes every gradient once and runs to its end, says the player."""
    draw = random.Random(f"{base} {whole}")
    good = make_schedule(*base)
    good = complete(good) if whole else good
    path = tmp_path / "edited.txt"
    head = f"microbatches: {good.num_microbatches}\nplacement: {' '.join(map(str, good.placement))}\n"
    refused = passed = 0
    for _ in range(250):
        rows = [text.split() for text in texts(good)]
        for _ in range(draw.choice((1, 1, 2))):
            draw.choice(EDITS)(draw, rows)
        path.write_text(head + "".join(f"rank {rank}: {' '.join(row)}\n" for rank, row in enumerate(rows)))
        try:
            schedule = complete(read_schedule(path))
            check(schedule)
        except ScheduleError as error:
            assert ACTION.search(str(error)), error
            refused += 1
            continue
        harmless(schedule)
        passed += 1
    assert refused > 100 and passed > 5, (refused, passed)


def harmless(schedule: Schedule) -> None:
    """The edited schedule is a schedule still."""
    simulate(schedule, Costs.uniform(schedule.num_stages))
    play(schedule)
