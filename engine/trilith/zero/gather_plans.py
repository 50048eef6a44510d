"""The gather plans of the schedules that a rank runs, and these schedules with GATHER and RELEASE where a plan says so."""

from __future__ import annotations

from collections.abc import Mapping

from trilith.pipeline.action import Schedule
from trilith.pipeline.passes import insert_gathers
from trilith.zero.gathers import Gatherer
from trilith.zero.residency import GatherPlan, StageUses, gather_marks, uses_of


class GatherPlans:
    """Plans by schedule, each made once. A schedule is known by its identity, and kept, so that no other can have it."""

    def __init__(self, gatherer: Gatherer, uses: Mapping[int, StageUses] | None, rank: int) -> None:
        """`uses`: by stage of this pipeline rank, None where the order is not known and nothing can be planned."""
        self._gatherer, self._uses, self._rank = gatherer, uses, rank
        self._plans: dict[int, tuple[Schedule, GatherPlan | None]] = {}

    def of(self, schedule: Schedule) -> GatherPlan | None:
        """The plan of this rank's actions; None where nothing can be planned.

        The schedule is kept then, too: what a run of it writes down is known by its identity (`Gatherer.begin_run`).
        """
        if id(schedule) not in self._plans:
            plan = None
            if self._uses is not None:
                plan = self._gatherer.plan(uses_of(schedule.actions[self._rank], self._uses)[0])
            self._plans[id(schedule)] = (schedule, plan)
        return self._plans[id(schedule)][1]

    def insert(self, schedule: Schedule) -> Schedule:
        """The schedule with the plan's gathers in this rank's row; other rows are left to their ranks."""
        if self._uses is None:
            return schedule
        uses, spans = uses_of(schedule.actions[self._rank], self._uses)
        plan = self._gatherer.plan(uses)
        marks: list[dict[int, tuple[bool, bool]]] = [{} for _ in schedule.actions]
        marks[self._rank] = gather_marks(plan, spans)
        made = insert_gathers(schedule, marks)
        self._plans[id(made)] = (made, plan)
        return made
