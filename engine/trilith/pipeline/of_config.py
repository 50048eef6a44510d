"""The schedule that a config asks for, by name or by file, for described and for users' models. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from trilith.config import Config
from trilith.config.base import AUTO
from trilith.config.layout_keys import FROM_FILE
from trilith.errors import ConfigError, ScheduleError, Violation
from trilith.pipeline.action import Schedule
from trilith.pipeline.check import check
from trilith.pipeline.passes import complete
from trilith.pipeline.schedule_file import read_schedule
from trilith.pipeline.schedules import make_schedule, schedule_problems
from trilith.topology import Ties

FILE_KEY = "pipeline.schedule_file"
FIX_FILE = "Mend the file, or name a schedule."


def asked_problems(config: Config) -> tuple[list[Violation], int | None]:
    """Every rule that the schedule which the config names breaks, and its number of stages where that is known.

    `pipeline.schedule` is not "auto". That "file" needs `schedule_file` is a rule of the config's own.
    """
    pipeline = config.pipeline
    if pipeline.schedule == FROM_FILE:
        return _file_problems(config)
    ranks, microbatches = config.parallel.pipeline, config.gradient_accumulation_steps
    problems = schedule_problems(pipeline.schedule, ranks, pipeline.virtual_stages, microbatches)
    return problems, ranks * pipeline.virtual_stages


def asked_schedule(config: Config) -> Schedule:
    """The computations of the schedule that the config names, where `asked_problems` found none."""
    pipeline = config.pipeline
    if pipeline.schedule == FROM_FILE:
        assert pipeline.schedule_file is not None, "a rule of the config"
        return read_schedule(pipeline.schedule_file)
    microbatches = config.gradient_accumulation_steps
    return make_schedule(pipeline.schedule, config.parallel.pipeline, pipeline.virtual_stages, microbatches)


def _file_problems(config: Config) -> tuple[list[Violation], int | None]:
    """What is wrong with a schedule's file, and where it does not fit the rest of the config."""
    path = config.pipeline.schedule_file
    if path is None:
        return [], None
    try:
        schedule = read_schedule(path)
    except ScheduleError as error:
        return [Violation(FILE_KEY, path, str(error), FIX_FILE)], None
    found = []
    per_rank = schedule.num_stages / schedule.num_ranks
    for key, value, in_file, what in (
        ("parallel.pipeline", config.parallel.pipeline, schedule.num_ranks, "pipeline ranks"),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps, schedule.num_microbatches, "microbatches"),
        ("pipeline.virtual_stages", config.pipeline.virtual_stages, per_rank, "stages per rank"),
    ):
        if value not in (in_file, AUTO):
            rule = f"must be as in {FILE_KEY} {path}, which has {in_file:g} {what}"
            found.append(Violation(key, value, rule, "Change one of the two."))
    return found, schedule.num_stages


def completed(schedule: Schedule, config: Config) -> Schedule:
    """The schedule with its communication, reductions and validations, proven.

    Raises ConfigError where a file's cannot run: those that we make can.
    """
    try:
        schedule = complete(schedule, validate=config.pipeline.optimizer_sync == "postvalidate")
        check(schedule)
    except ScheduleError as error:
        if config.pipeline.schedule != FROM_FILE:
            raise
        raise ConfigError([Violation(FILE_KEY, config.pipeline.schedule_file, str(error), FIX_FILE)]) from None
    return schedule


def tied_ranks(stages_of: Mapping[str, Sequence[int]], schedule: Schedule) -> Ties:
    """Flat unit -> the pipeline ranks that hold a copy of it, for those that several do, from the stages that do."""
    ranks = {name: {schedule.placement[stage] for stage in stages} for name, stages in stages_of.items()}
    return MappingProxyType({name: tuple(sorted(held)) for name, held in ranks.items() if len(held) > 1})
