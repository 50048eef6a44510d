"""Optimizer steps taken before the global norm is known, and taken back where they were wrong.

A norm over all pipeline ranks makes the first rank to finish a step wait for the last, and costs a schedule without
bubbles everything it won. So a rank guesses from its own gradients that nothing will be clipped or skipped, keeps a copy
of what the optimizer changes, steps, and goes on; the norm travels meanwhile, and is looked at before the first backward
of the next step. Qi et al. 2024 (Zero Bubble Pipeline Parallelism, arXiv 2401.10241), section 4; there a step is undone
by arithmetic, here from the copy, so that every bit is as if the rank had waited.

The guess is a pure function of numbers that all pipeline ranks have in the end: each sees at validation what every other
one did, and all agree, without another message, on whether the step that is under way began with wrong weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, sqrt

import torch
from torch import Tensor

from trilith import comm
from trilith.errors import TrilithError
from trilith.optim.clip import clip_factor
from trilith.optim.foreign import ForeignOptimizer
from trilith.topology import Group
from trilith.zero.flat import add_bytes
from trilith.zero.placement import Tier
from trilith.zero.sharded import ShardedModel, StepOutcome


class Move(StrEnum):
    """What a rank does at the end of a step: step unclipped at once, skip at once, or wait for the norm before."""

    STEP = "step"
    SKIP = "skip"
    WAIT = "wait"


@dataclass(frozen=True)
class GuessRule:
    """When a rank may step before it knows the norm. `max_norm` (0 = none) clips, `checks_overflow` skips."""

    max_norm: float
    checks_overflow: bool

    @property
    def can_fail(self) -> bool:
        """Whether a guess can be wrong at all: where nothing is clipped or skipped, all steps are plain."""
        return self.max_norm > 0 or self.checks_overflow

    def is_plain(self, norm: float) -> bool:
        """Whether a step with this global norm is taken, and unclipped: what a rank that does not wait bets on."""
        if self.checks_overflow and not isfinite(norm):
            return False
        return clip_factor(norm, self.max_norm) == 1.0

    def move(self, own_norm: float, last_was_plain: bool) -> Move:
        """What a rank does whose gradients alone have the norm `own_norm`, where the last step was plain or not.

        Own gradients that are not finite decide for all; own gradients that must be clipped do, too, but by how much is
        not known. After a step that was clipped or skipped the next one likely is, so nobody bets against it.
        """
        if not self.can_fail:
            return Move.STEP
        if self.checks_overflow and not isfinite(own_norm):
            return Move.SKIP
        return Move.STEP if last_was_plain and self.is_plain(own_norm) else Move.WAIT


class SquaresGather:
    """The sums of squares of every pipeline rank on their way to all: a vector (units,) of float64 each."""

    def __init__(self, squares: Tensor, group: Group) -> None:
        """Launch the exchange; it is over at the first call of any method."""
        self._rows = squares.new_empty(group.size, squares.numel())
        self._handle = comm.all_gather(self._rows, squares, group, async_op=True)

    def norm(self) -> float:
        """The global norm, in the arithmetic of `ShardedModel.grad_norm`."""
        self._handle.wait()
        return float(self._rows.sum(0).sum().sqrt())

    def own_norms(self) -> list[float]:
        """By pipeline rank the norm of that rank's gradients alone, as it knew it itself."""
        self._handle.wait()
        return [norm_of(row) for row in self._rows.tolist()]


def norm_of(squares: Sequence[float]) -> float:
    """The norm of one pipeline rank's gradients; on the host, so that every rank that computes it gets the same bits."""
    return sqrt(sum(squares))


@dataclass(frozen=True)
class _Pending:
    """A step that was begun and not validated. `last_was_plain`: the step before it, on which all ranks' moves depend."""

    lr: float
    scale: float
    gather: SquaresGather
    last_was_plain: bool
    move: Move


class PostValidation:
    """Ends the steps of a `ShardedModel` in two parts: `begin_step`, and later `validate`. Every rank makes both calls.

    `outcome`: of the step that was validated last. `num_guesses`: steps that this rank took without waiting;
    `num_rollbacks`: those of them that were taken back.
    """

    def __init__(self, model: ShardedModel) -> None:
        """Allocate the copy of what an optimizer step changes on this rank, if a step may have to be taken back.

        Raises TrilithError for an optimizer whose state cannot be copied.
        """
        if isinstance(model.optimizer, ForeignOptimizer):
            raise TrilithError(
                "pipeline.optimizer_sync = 'postvalidate': a step of an optimizer that was handed in cannot be taken "
                "back. Use the config section `optimizer`, or optimizer_sync 'step'"
            )
        self._model = model
        self._rule = GuessRule(model.max_norm, model.policy.check_overflow)
        self._copies: list[Tensor] = []
        model.kept_bytes["rollback"] = 0
        for tier, tensor in self._changed():
            # They stay there when "auto" brings states to the device: its limit does not know them.
            self._copies.append(torch.empty_like(tensor))
            add_bytes(model.kept_bytes, tier, "rollback", self._copies[-1:])
        self._num_steps = 0
        self._pending: _Pending | None = None
        self._last_was_plain = False  # before the first step nothing speaks for it
        self.outcome: StepOutcome | None = None
        self.num_guesses = self.num_rollbacks = 0

    @property
    def is_pending(self) -> bool:
        """Whether a step was begun and not validated."""
        return self._pending is not None

    def begin_step(self, lr: float) -> None:
        """End a step whose gradients are complete, with learning rate `lr`, as far as this rank can alone.

        The gradients stay until the first backward of the next step, which must not begin before `validate`.
        """
        assert self._pending is None, "the step before was not validated"
        model = self._model
        model.finish()
        scale, squares = model.loss_scale, model.stage_squares()
        gather = SquaresGather(squares, model.topology.pp)
        move = self._rule.move(norm_of(squares.tolist()) / scale, self._last_was_plain)
        self._pending = _Pending(lr, scale, gather, self._last_was_plain, move)
        if move is Move.STEP:
            self.num_guesses += 1
            self._keep()
            model.update(lr, model.loss_scale)
        elif move is Move.WAIT:
            model.apply(lr, gather.norm() / scale)

    def validate(self) -> bool:
        """Learn the norm of the step begun last, and mend the step if this rank did the wrong thing.

        False where any pipeline rank did: then its forwards since were wrong, and the next step must begin anew. All
        ranks return the same. Raises TrilithError if the loss scale cannot fall further.
        """
        pending, rule = self._pending, self._rule
        assert pending is not None, "no step was begun"
        norm = pending.gather.norm() / pending.scale
        moves = [rule.move(own / pending.scale, pending.last_was_plain) for own in pending.gather.own_norms()]
        self._last_was_plain = rule.is_plain(norm)
        wrong = not self._last_was_plain and Move.STEP in moves
        if wrong and pending.move is Move.STEP:
            self.num_rollbacks += 1
            self._restore()
            self._model.apply(pending.lr, norm)
        self._pending = None
        self.outcome = self._model.close_step(norm)
        return not wrong

    def _changed(self) -> list[tuple[Tier, Tensor]]:
        """What an optimizer step changes on this rank, where it may have to be taken back: master weights and moments;
        gradients, too, where the optimizer divides them by the loss scale.

        That happens in place where they have the dtype of the masters, and they are needed again for a clipped step.
        """
        model, found = self._model, list[tuple[Tier, Tensor]]()
        for unit, state in zip(model.units, model.optimizer.state, strict=True) if self._rule.can_fail else ():
            states = unit.placement.states
            found += [(states, tensor) for tensor in (unit.master, *state.values())]
            if model.policy.scales_loss and self._rule.max_norm > 0 and unit.gradient.dtype == unit.master.dtype:
                found.append((Tier.DEVICE if unit.has_whole_gradient else states, unit.own_gradient))
        return found

    def _live(self) -> list[Tensor]:
        return [tensor for _, tensor in self._changed()]

    def _keep(self) -> None:
        """Copy what the optimizer is about to change."""
        self._num_steps = self._model.optimizer.num_steps
        if self._copies:
            torch._foreach_copy_(self._copies, self._live())

    def _restore(self) -> None:
        """Undo the optimizer's step, in the modules of all data ranks, too."""
        self._model.optimizer.num_steps = self._num_steps
        if self._copies:
            torch._foreach_copy_(self._live(), self._copies)
        self._model.after_load()
