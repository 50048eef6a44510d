"""Runs any checked schedule: one table from action kind to method, and the activations in flight.

Sends are asynchronous and receives are posted ahead (`transport`), so a rank waits only in front of a computation whose
inputs have not arrived. Neighbouring stages on one rank hand their tensors over without communication. A backward may
run in two halves: the first fills the stage's queue of weight gradients (`kernels/weight_queue.py`), the second computes
them. Between runs the executor is empty: no activation, gradient or message outlives a run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

# torch.autograd imports this, and sympy with it, at the first backward that is given gradients: half a second, which
# ranks forked from a process that has imported it do not spend.
import torch.fx.experimental.symbolic_shapes
from torch.autograd.graph import get_gradient_edge

from trilith.errors import ScheduleError
from trilith.kernels.weight_queue import Deferred
from trilith.pipeline.action import NO_MICROBATCH, Action, Kind, Schedule
from trilith.pipeline.check import check, validated_prefix
from trilith.pipeline.stage import PipelineStage
from trilith.pipeline.step import (
    Kept,
    LossSeed,
    Microbatches,
    Recorder,
    Request,
    StartAnew,
    Step,
    StepResult,
    Tensors,
)
from trilith.pipeline.timeline import Record
from trilith.pipeline.transport import Boundary, Channels, Inbox, Outbox, carried


class Executor:
    """Runs the actions of one pipeline rank, step after step.

    `schedule` must be complete (`passes.complete`); it is checked here once more. `stages` are all the stages of one
    pipeline rank, by index. `on_wait`, where it is set, is called with `position()` whenever the rank begins to wait for
    a message that has not arrived.

    Raises ScheduleError where the schedule does not pass `check`.
    """

    def __init__(self, schedule: Schedule, stages: Mapping[int, PipelineStage], channels: Channels) -> None:
        self._table: Mapping[Kind, Callable[[Action], None]] = MappingProxyType(
            {
                Kind.FORWARD: self._forward,
                Kind.BACKWARD: self._backward,
                Kind.BACKWARD_INPUT: self._backward_input,
                Kind.BACKWARD_WEIGHT: self._backward_weight,
                Kind.OVERLAPPED: self._overlapped,
                Kind.SEND_FORWARD: self._send,
                Kind.SEND_BACKWARD: self._send,
                Kind.RECEIVE_FORWARD: self._receive,
                Kind.RECEIVE_BACKWARD: self._receive,
                Kind.GATHER: self._ask_parameters,
                Kind.RELEASE: self._ask_parameters,
                Kind.REDUCE: self._ask_parameters,
                Kind.TIE_REDUCE: self._ask_parameters,
                Kind.UPDATE: self._ask_parameters,
                Kind.VALIDATE: self._validate,
            }
        )
        check(schedule)
        self._schedule = schedule
        self._stages = dict(stages)
        self._channels = channels
        self._rank = schedule.placement[min(self._stages)]
        self._actions = schedule.actions[self._rank]
        self._trains = not schedule.is_forward_only
        self._split = frozenset((a.stage, a.microbatch) for a in self._actions if a.kind is Kind.BACKWARD_WEIGHT)
        self._validates = any(action.kind is Kind.VALIDATE for action in self._actions)
        self._stale = {source: n for (source, to), n in validated_prefix(schedule).items() if to == self._rank}
        self._step: Step | None = None
        self._current: Action | None = None
        self._waits_for: Action | None = None
        self.on_wait: Callable[[str], None] | None = None
        self.around: Callable[[str], AbstractContextManager[Any]] | None = None  # of each action, by its description
        assert tuple(sorted(self._stages)) == schedule.stages_of(self._rank), sorted(self._stages)
        for index, stage in self._stages.items():
            ends = (index == 0, index == schedule.num_stages - 1)
            assert (stage.index, stage.is_first, stage.is_last) == (index, *ends), stage
        # Gradients end where nothing before trains: a stage's inputs need none there, or it has no backward at all.
        self._first_trained = schedule.first_trained if self._trains else schedule.num_stages

    def position(self) -> str:
        """What the rank is doing, in words, for error reports: the action, and the message it waits for.

        Another thread may call it (a watchdog).
        """
        action, waits_for = self._current, self._waits_for
        if action is None:
            return "between steps"
        text = self._numbered(action).describe()
        if waits_for is not None:
            text += f", waiting for {self._numbered(waits_for).describe()} from pipeline rank {waits_for.peer}"
        return text

    def _numbered(self, action: Action) -> Action:
        """An action with the true number of its microbatch."""
        offset = self._step.offset if self._step is not None else 0
        if not offset or action.microbatch == NO_MICROBATCH:
            return action
        pair = None if action.pair is None else (self._numbered(action.pair[0]), self._numbered(action.pair[1]))
        return replace(action, microbatch=action.microbatch + offset, pair=pair)

    # -------------------------------------------------------------------------------------------------------- a run

    def run(
        self,
        microbatches: Microbatches,
        boundary: Boundary | Sequence[Boundary],
        loss_seed: LossSeed = 1.0,
        *,
        validate: Callable[[], bool] | None = None,
        on_restart: Callable[[], None] | None = None,
        recorder: Recorder | None = None,
    ) -> StepResult:
        """Run all actions of this rank once; every rank of the pipeline must call it with the same counts and shapes.

        `microbatches[m]` is handed to every stage's module. `boundary` gives name, local shape and dtype of the tensors
        between stages; those of floating dtype get gradients. A sequence gives one for each stage but the last: what
        it hands to the next. `loss_seed` is the gradient of the loss (the loss scale), or a function of the microbatch
        that is asked for it when its backward begins. Gradients are left to the modules' parameters. A forward-only
        schedule runs without gradients. `recorder` collects a `Record` of every action but sends and receives, timed
        with a monotonic clock on the host: on a GPU these are the times of launching, not of running.

        `validate` is called at the schedule's VALIDATE; where it returns False, the weights of this step were wrong and
        have been corrected: what was computed is thrown away, `on_restart` is called, and the step begins anew. On all
        ranks or on none.

        An exception inside carries a note that names rank, action, stage and microbatch; `position` still tells it.
        """
        self.begin(microbatches, boundary, loss_seed, validate=validate, recorder=recorder)
        try:
            self.advance()
        except StartAnew:
            self._throw_away()
            if on_restart is not None:
                on_restart()
            self.begin(microbatches, boundary, loss_seed, recorder=recorder)
            self.advance()
        return self.end()

    def begin(
        self,
        microbatches: Microbatches,
        boundary: Boundary | Sequence[Boundary],
        loss_seed: LossSeed = 1.0,
        *,
        validate: Callable[[], bool] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Begin a run that `advance` carries on, in parts, and `end` ends; the arguments are those of `run`."""
        if self._step is not None:
            raise ScheduleError(
                f"the run before broke off in {self.position()}; its messages may still be under way. Start the ranks "
                "anew"
            )
        between = self._schedule.num_stages - 1
        boundaries = [boundary] * between if isinstance(boundary, Mapping) else list(boundary)
        assert len(boundaries) == between, (len(boundaries), between)
        assert validate is None or self._validates, "a schedule without VALIDATE cannot be thrown away"
        request = Request(microbatches, boundaries, loss_seed, validate, recorder)
        inbox = Inbox(self._channels, self._actions, boundaries, self._stale if validate is not None else None)
        self._step = Step(request, inbox, Outbox(self._channels))
        for stage in self._stages.values():
            stage.parameters.begin_run(self._schedule)

    def advance(self, stop: int | None = None) -> None:
        """Run the rank's actions from where it stands up to index `stop` (None: to the last)."""
        step = self._now
        stop = len(self._actions) if stop is None else stop
        try:
            with torch.set_grad_enabled(self._trains):
                while step.next_action < stop:
                    action = self._current = self._actions[step.next_action]
                    with nullcontext() if self.around is None else self.around(self._numbered(action).describe()):
                        self._table[action.kind](action)
                    step.next_action += 1
        except StartAnew:
            raise
        except Exception as error:
            error.add_note(f"on pipeline rank {self._rank}, in {self.position()}")
            raise

    def end(self) -> StepResult:
        """End a run whose actions are all done: wait for its sends, and give back losses and outputs."""
        step = self._now
        assert step.next_action == len(self._actions), self.position()
        step.outbox.drain()
        step.assert_empty()
        self._step = self._current = None
        return StepResult(
            losses=[step.losses[m] for m in sorted(step.losses)],
            outputs=[step.outputs[m] for m in sorted(step.outputs)],
        )

    def rewind(self, position: int, microbatches: int, done: int) -> None:
        """Go on as if the rank stood before action `position`, `microbatches` microbatches earlier.

        For schedules that repeat themselves: the actions from `position` to here must come again, `microbatches` later,
        from here on. So a short schedule runs without an end. Microbatches keep their true numbers for all others.
        `done`: how many of the schedule's microbatches are through; their losses are forgotten.
        """
        step = self._now
        step.inbox.rewind(self._actions, step.next_action, position, microbatches)
        step.rewind(position, microbatches, done)

    @property
    def losses(self) -> Mapping[int, torch.Tensor]:
        """The losses of the run under way, by microbatch, on the rank of the last stage."""
        return MappingProxyType(self._now.losses)

    def _throw_away(self) -> None:
        """Forget the run under way, up to VALIDATE: take in what was sent for it, drop everything."""
        step = self._now
        step.inbox.discard(self._stale)
        step.outbox.drain()
        if step.request.recorder is not None:
            step.request.recorder.clear()
        self._step = self._current = None

    # ------------------------------------------------------------------------------------------------- computations

    def _forward(self, action: Action) -> None:
        step, stage, at = self._now, self._stages[action.stage], (action.stage, action.microbatch)
        inputs = {} if stage.is_first else self._take(Kind.RECEIVE_FORWARD, action)
        start_s = time.perf_counter()
        backward, before = self._first_trained <= action.stage, self._first_trained < action.stage
        number = action.microbatch + step.offset
        stage.parameters.begin_forward(number)
        self._set_queue(action)
        if before:
            for tensor in inputs.values():
                tensor.requires_grad_(tensor.is_floating_point())
        with torch.set_grad_enabled(backward):
            outputs = stage.module(inputs, step.request.microbatches[number])
        self._record(action, start_s)
        if stage.is_last:
            loss = self._finish(action, outputs)
            if backward:
                step.kept[at] = Kept(inputs, {}, loss)
            return
        boundary = step.request.boundaries[action.stage]
        self._check_outputs(action, outputs, boundary)
        if backward:
            edges = {
                name: get_gradient_edge(tensor)
                for name, tensor in outputs.items()
                if tensor.requires_grad and name in carried(Kind.SEND_BACKWARD, boundary)
            }
            step.kept[at] = Kept(inputs, edges, None)
        self._pass_on(Kind.SEND_FORWARD, action, {name: outputs[name].detach() for name in boundary})

    def _finish(self, action: Action, outputs: Tensors) -> torch.Tensor | None:
        """Collect what the last stage returned; the loss, with its graph, where there is one."""
        step, loss = self._now, outputs.get("loss")
        if loss is not None:
            step.losses[action.microbatch + step.offset] = loss.detach().to(torch.float64)
        if not self._trains:
            step.outputs[action.microbatch] = outputs
        elif loss is None or loss.numel() != 1:
            raise ScheduleError(
                f"{action.describe()}: the last stage returned {_shapes(outputs)}; to train it must return the "
                "microbatch's loss, a scalar, as 'loss'"
            )
        return loss

    def _check_outputs(self, action: Action, outputs: Tensors, boundary: Boundary) -> None:
        """Shapes were agreed before the step: a stage that returns others would leave its neighbour waiting."""
        expected = {name: (tuple(shape), dtype) for name, (shape, dtype) in boundary.items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in outputs.items()}
        if found != expected:
            raise ScheduleError(
                f"{action.describe()}: the stage returned {_shapes(outputs)}; the boundary of the step is {expected}"
            )

    def _backward(self, action: Action) -> None:
        parameters, gradients = self._stages[action.stage].parameters, self._output_gradients(action)
        start_s = time.perf_counter()
        number, final = action.microbatch + self._now.offset, self._is_final(action)
        parameters.begin_backward(number, final)
        self._differentiate(action, gradients)
        parameters.end_backward(number, final)
        self._record(action, start_s)
        self._return_gradients(action)

    def _backward_input(self, action: Action) -> None:
        stage, gradients = self._stages[action.stage], self._output_gradients(action)
        start_s = time.perf_counter()
        number, trains = action.microbatch + self._now.offset, action.stage not in self._schedule.frozen
        stage.parameters.begin_input_gradients(number)
        self._differentiate(action, gradients)
        deferred = stage.queue.take() if stage.queue is not None and trains else []
        if trains:
            self._now.deferred[action.stage, action.microbatch] = deferred
        stage.parameters.end_input_gradients(number, {item.weight for item in deferred})
        self._record(action, start_s)
        self._return_gradients(action)

    def _backward_weight(self, action: Action) -> None:
        start_s = time.perf_counter()
        self._compute_weights(action, self._now.deferred.pop((action.stage, action.microbatch)))
        self._record(action, start_s)

    def _overlapped(self, action: Action) -> None:
        """A forward and a backward as one action: one after the other, their messages after both."""
        for part in action.parts():
            self._table[part.kind](part)

    def _output_gradients(self, action: Action) -> Tensors:
        """What the backward of a stage is given by the stage behind it; waits for it."""
        return {} if self._stages[action.stage].is_last else self._take(Kind.RECEIVE_BACKWARD, action)

    def _differentiate(self, action: Action, gradients: Tensors) -> None:
        """Autograd's part of a backward. The gradients of the inputs lie in their `.grad`."""
        kept = self._now.kept[action.stage, action.microbatch]
        self._set_queue(action)
        if kept.loss is not None:
            if kept.loss.requires_grad:
                seed = self._seed(kept.loss, action.microbatch + self._now.offset)
                torch.autograd.backward([kept.loss], [seed])
        elif kept.edges:
            torch.autograd.backward(list(kept.edges.values()), [gradients.pop(name) for name in kept.edges])

    def _set_queue(self, action: Action) -> None:
        """Let the stage's linears defer their weight gradients, hand them on at once, or leave them to autograd."""
        stage = self._stages[action.stage]
        if stage.queue is not None:
            stage.queue.defers = (action.stage, action.microbatch) in self._split
            stage.queue.receive = stage.parameters.accumulate if stage.queue_is_direct else None

    def _compute_weights(self, action: Action, deferred: list[Deferred]) -> None:
        """The second half of a backward, first in first out; each product's tensors are let go when it is done.

        The gradients of a weight that was used several times are summed before they are added, as autograd does.
        """
        parameters = self._stages[action.stage].parameters
        uses = Counter(item.weight for item in deferred)
        number, final = action.microbatch + self._now.offset, self._is_final(action)
        parameters.begin_weight_gradients(number, list(uses), final)
        sums: dict[torch.Tensor, torch.Tensor] = {}
        deferred.reverse()
        with torch.no_grad():
            while deferred:
                item = deferred.pop()
                before = sums.pop(item.weight, None)
                uses[item.weight] -= 1
                if uses[item.weight]:
                    sums[item.weight] = item.gradient() if before is None else before.add_(item.gradient())
                else:
                    parameters.accumulate(item.weight, item if before is None else before.add_(item.gradient()))
        parameters.end_weight_gradients(number, final)

    def _is_final(self, action: Action) -> bool:
        """Whether a microbatch is the last of its update."""
        of_update = self._schedule.update_every or self._schedule.num_microbatches
        return action.microbatch % of_update == of_update - 1

    def _return_gradients(self, action: Action) -> None:
        """Hand the gradients of a stage's inputs to the stage before, if something there trains."""
        kept = self._now.kept.pop((action.stage, action.microbatch))
        if self._first_trained < action.stage:
            names = carried(Kind.SEND_BACKWARD, self._now.request.boundaries[action.stage - 1])
            self._pass_on(Kind.SEND_BACKWARD, action, {name: _take_grad(kept.inputs[name]) for name in names})

    def _seed(self, loss: torch.Tensor, microbatch: int) -> torch.Tensor:
        """The gradient of the loss, in its shape, dtype and device."""
        seed = self._now.request.loss_seed
        if callable(seed):
            seed = seed(microbatch)
        if isinstance(seed, torch.Tensor):
            return seed.detach().to(loss).reshape(loss.shape)
        return torch.full_like(loss, seed, requires_grad=False)

    def _ask_parameters(self, action: Action) -> None:
        start_s, parameters = time.perf_counter(), self._stages[action.stage].parameters
        number = self._numbered(action).microbatch
        if action.kind is Kind.GATHER:
            parameters.gather()
        elif action.kind is Kind.RELEASE:
            parameters.release()
        elif action.kind is Kind.REDUCE:
            parameters.reduce(number)
        elif action.kind is Kind.TIE_REDUCE:
            parameters.tie_reduce(number)
        else:
            parameters.update(number)
        self._record(action, start_s)

    def _validate(self, action: Action) -> None:
        """Learn whether the weights of this step were right, before any gradient is added to those of the one before."""
        validate = self._now.request.validate
        if validate is None:
            return
        start_s = time.perf_counter()
        is_right = validate()
        self._record(action, start_s)
        if not is_right:
            raise StartAnew
        self._now.inbox.lift_limit()

    # ---------------------------------------------------------------------------------------------------- messages

    def _send(self, action: Action) -> None:
        assert action.peer is not None
        tensors = self._now.outgoing.pop((action.kind, action.stage, action.microbatch))
        self._now.outbox.send(tensors, action.peer)

    def _receive(self, action: Action) -> None:
        self._now.inbox.reach(action)

    def _pass_on(self, kind: Kind, action: Action, tensors: Tensors) -> None:
        """Give what a computation made to the neighbouring stage: here at once, elsewhere by the send that follows."""
        neighbour = action.stage + (1 if kind is Kind.SEND_FORWARD else -1)
        if neighbour in self._stages:
            self._now.handed[kind, neighbour, action.microbatch] = tensors
        else:
            self._now.outgoing[kind, action.stage, action.microbatch] = tensors

    def _take(self, kind: Kind, action: Action) -> Tensors:
        """What the neighbouring stage made for a computation; waits for its message."""
        forward = kind is Kind.RECEIVE_FORWARD
        neighbour = action.stage + (-1 if forward else 1)
        if neighbour in self._stages:
            made_by = Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD
            return self._now.handed.pop((made_by, action.stage, action.microbatch))
        receive = Action(kind, action.stage, action.microbatch, self._schedule.placement[neighbour])
        self._waits_for = receive
        if self.on_wait is not None and not self._now.inbox.has_arrived(receive):
            self.on_wait(self.position())
        tensors = self._now.inbox.take(receive)
        self._waits_for = None
        return tensors

    @property
    def _now(self) -> Step:
        assert self._step is not None
        return self._step

    def _record(self, action: Action, start_s: float) -> None:
        recorder = self._now.request.recorder
        if recorder is not None:
            number = self._numbered(action).microbatch
            recorder.append(Record(action.kind, action.stage, number, start_s, time.perf_counter()))


def _take_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient that a backward left on a stage input; zeros where the stage did not use it."""
    gradient = tensor.grad
    tensor.grad = None
    return torch.zeros_like(tensor, requires_grad=False) if gradient is None else gradient


def _shapes(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
