"""Which stepper a schedule asks for."""

from __future__ import annotations

from trilith.stepping.base import Parts, Stepper
from trilith.stepping.delayed import DelayedSteps
from trilith.stepping.postvalidated import PostvalidatedSteps
from trilith.stepping.synchronous import SynchronousSteps


def make_stepper(parts: Parts, optimizer_sync: str) -> Stepper:
    """The stepper of `parts.schedule`; `optimizer_sync` is `pipeline.optimizer_sync` of the config."""
    if parts.schedule.update_every:
        return DelayedSteps(parts)
    if optimizer_sync == "postvalidate":
        return PostvalidatedSteps(parts)
    return SynchronousSteps(parts)
