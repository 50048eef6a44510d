"""The engine's table of contents: how a plan becomes ranks, stages, partitions, and then training steps.

Read `Trainer.__init__` for how a run is put together; what a step does stands in `stepping/`. Nothing here prints: the
main job with progress, sinks and report is `runner.py`; tests, benchmarks and the parity tool drive this class directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilith import build, checkpoint, comm
from trilith.errors import CheckpointError, TrilithError
from trilith.failpoints import Failpoints
from trilith.feed import TokenFeed
from trilith.host_memory import HostMemory
from trilith.models.base import train_flops_per_token
from trilith.models.batch import Microbatch
from trilith.monitor.metrics import EvalRecord, StepRecord
from trilith.optim.lr import make_lr
from trilith.pipeline.action import Schedule
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import forward_only
from trilith.pipeline.stage import PipelineStage
from trilith.pipeline.timeline import Record
from trilith.pipeline.transport import GroupChannels
from trilith.precision import PrecisionPolicy
from trilith.preflight import Plan
from trilith.process_groups import build_topology
from trilith.stepping.base import Finished, LossReport, Parts, Stepper
from trilith.stepping.make import make_stepper
from trilith.stepping.synchronous import Accumulated, SynchronousSteps
from trilith.zero.delayed import make_model
from trilith.zero.sharded import sharding_of

CPU = torch.device("cpu")


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint keeps besides tensors."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Place:
    """Which process this is. The default process group must exist where `world_size` > 1."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU


class Trainer:
    """One rank's part of a run. Every rank of the world makes one from the same plan and calls the same methods."""

    def __init__(self, plan: Plan, place: Place, failpoints: Failpoints | None = None) -> None:
        """Build groups, stages, partitions and the executor, and give the weights their initial values.

        All ranks must call it together: process groups are made here.
        """
        self.plan, self.config = plan, plan.config
        self.failpoints = failpoints or Failpoints()
        if self.config.run.nvtx and place.device.type != "cuda":
            raise TrilithError(f"run.nvtx = true on {place.device}: NVTX ranges need CUDA. Leave it out")
        self.failpoints.hit("build")
        timeout_s, channels = self.config.parallel.timeout_s, plan.schedule.channels()
        shared_memory = self.config.run.shared_memory
        self.topology = build_topology(plan.degrees, place.device, timeout_s, plan.ties, channels, shared_memory)
        self.policy = PrecisionPolicy.from_config(self.config)
        self.stages = build.build_stages(self.config, plan.stages, plan.schedule, self.topology, self.policy)
        sharding = replace(sharding_of(self.config, self.topology.tp), whole_gradients=plan.whole_gradients)
        self.model = make_model(
            plan.schedule, self.stages, self.topology, self.policy, self.config, sharding, self.failpoints
        )
        build.initialise(self.model, self.stages, self.policy, self.config.training.seed)
        self.pipeline = {
            index: PipelineStage(
                index,
                stage,
                self.model.stage(index),
                is_first=index == 0,
                is_last=index == len(plan.stages) - 1,
                queue=stage.queue,
                queue_is_direct=True,
            )
            for index, stage in self.stages.items()
        }
        self.channels = GroupChannels(self.topology)
        self.on_wait: Callable[[str], None] | None = None
        self.feed = TokenFeed(plan, self.topology, self.stages, self.failpoints)
        self.lr = make_lr(self.config.scheduler, self.config.optimizer.params.lr)
        self.steps = self._make_stepper()
        self._forward_executors: dict[int, Executor] = {}
        self.state = TrainState()
        self.records: list[Record] = []
        self.host_memory = HostMemory()
        self.flops_per_token = {causal: train_flops_per_token(plan.units, causal) for causal in (True, False)}

    def _make_stepper(self) -> Stepper:
        parts = Parts(
            self.model,
            self.plan.schedule,
            self.make_executor,
            self.feed,
            self.lr,
            self.topology,
            self.failpoints,
        )
        return make_stepper(parts, self.config.pipeline.optimizer_sync)

    def make_executor(self, schedule: Schedule) -> Executor:
        """An executor of `schedule` (complete) on this rank's stages."""
        executor = Executor(schedule, self.pipeline, self.channels)
        executor.on_wait = self._wait
        if self.config.run.nvtx:
            executor.around = torch.cuda.nvtx.range
        return executor

    def _wait(self, position: str) -> None:
        if self.on_wait is not None:
            self.on_wait(position)

    # ---- training -----------------------------------------------------------------------------------------------

    def train(self, num_steps: int) -> Iterator[StepRecord]:
        """Train `num_steps` steps and yield the record of each when it is over. Every rank must call it.

        With `pipeline.optimizer_sync` = postvalidate and with asynchronous schedules a record comes later than the next
        step began; evaluation and checkpoints must wait until the iterator is exhausted.
        """
        self._train_mode(True)
        before_s: float | None = None
        for finished in self.steps.train(self.state.step, num_steps):
            yield self._record(finished, before_s)
            before_s = finished.marks_s[-1]

    def train_step(self) -> StepRecord:
        """One step by itself: forward and backward of every microbatch, reduction, clipping, optimizer."""
        (record,) = self.train(1)
        return record

    def accumulate(self) -> Accumulated:
        """The first half of a synchronous step: forward and backward of every microbatch. `update` must follow.

        Between the two, a tool may call `model.finish()` and look at the step's gradients.
        """
        self._train_mode(True)
        return self._synchronous().accumulate(self.state.step)

    def update(self, accumulated: Accumulated) -> StepRecord:
        """The second half of a step that `accumulate` began."""
        return self._record(self._synchronous().update(accumulated))

    def _synchronous(self) -> SynchronousSteps:
        if not isinstance(self.steps, SynchronousSteps):
            raise TrilithError(
                f"pipeline.schedule = {self.config.pipeline.schedule!r} with pipeline.optimizer_sync = "
                f"{self.config.pipeline.optimizer_sync!r}: a step cannot be taken apart. Use a synchronous schedule with "
                "optimizer_sync 'step'"
            )
        return self.steps

    def _record(self, finished: Finished, before_s: float | None = None) -> StepRecord:
        """Count a step, and make its record. `before_s` is when the step before was over, if it belonged to the same span.

        A step's time runs from there, as the beginning of one may overlap the end of another.
        """
        outcome, loss = finished.outcome, finished.loss
        norm = outcome.grad_norm
        if not outcome.skipped and not isfinite(loss if norm is None else norm):
            raise TrilithError(
                f"step {finished.index + 1}: the global gradient norm is {norm} and the loss {loss}: the run has "
                "diverged. Resume from the last checkpoint with a lower learning rate"
            )
        self.state.step += 1
        assert self.state.step == finished.index + 1, (self.state.step, finished.index)
        self.state.consumed_samples += self.config.train_batch_size
        self.state.tokens += finished.tokens
        self.records = finished.records
        self.host_memory.settle()
        elapsed = finished.marks_s[-1] - (finished.marks_s[0] if before_s is None else before_s)
        positions = self.config.train_batch_size * self.config.model.sequence_length
        flops = {causal: per_token * positions / elapsed for causal, per_token in self.flops_per_token.items()}
        peak = self.config.run.peak_flops
        world_peak = peak * self.topology.world_size if peak else None
        return StepRecord(
            step=self.state.step,
            loss=loss,
            lr=finished.lr,
            grad_norm=norm,
            tokens=finished.tokens,
            consumed_tokens=self.state.tokens,
            tokens_per_s=finished.tokens / elapsed,
            step_time_s=elapsed,
            memory_peak_bytes=finished.memory_peak_bytes,
            consumed_samples=self.state.consumed_samples,
            model_flops_per_s_causal=flops[True],
            model_flops_per_s_noncausal=flops[False],
            mfu_causal=flops[True] / world_peak if world_peak else None,
            mfu_noncausal=flops[False] / world_peak if world_peak else None,
            loss_scale=outcome.loss_scale if self.policy.scales_loss else None,
            skipped=outcome.skipped,
            breakdown=self._breakdown(finished.marks_s),
        )

    # ---- evaluation and generation ------------------------------------------------------------------------------

    def evaluate(self) -> EvalRecord:
        """Mean loss over `training.eval_batches` batches of the held-out split, always the same samples."""
        start, total, tokens = time.perf_counter(), 0.0, 0
        self._train_mode(False)
        executor = self.forward_executor(self.plan.eval_microbatches)
        for index in range(self.config.training.eval_batches):
            self.failpoints.hit("evaluate")
            batch = self.feed.evaluation(index)
            result = executor.run(batch.microbatches, batch.boundary)
            losses = [output["loss"] for output in result.outputs]
            total += LossReport(losses, self.topology).result()[0] * batch.tokens
            tokens += batch.tokens
        return EvalRecord(self.state.step, total / max(tokens, 1), tokens, time.perf_counter() - start)

    def forward_executor(self, num_microbatches: int) -> Executor:
        """An executor of the forward-only schedule on the same stages, made once per number of microbatches."""
        if num_microbatches not in self._forward_executors:
            schedule = complete(forward_only(self.plan.schedule.placement, num_microbatches))
            self._forward_executors[num_microbatches] = self.make_executor(schedule)
        return self._forward_executors[num_microbatches]

    def logits(self, tokens: Tensor, position: int) -> Tensor | None:
        """Whole-vocabulary logits (V,) at `position` for `tokens` (1, S); None on ranks without the last stage."""
        self._train_mode(False)
        sample_ids = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        batch = Microbatch(tokens, None, None, positions, sample_ids, 1.0)
        outputs = self.forward_executor(1).run([batch], self.feed.boundary(batch)).outputs
        if not outputs:
            return None
        local = outputs[0]["logits"][0, position].contiguous()
        whole = local.new_empty(self.topology.tp.size * local.numel())
        comm.all_gather(whole, local, self.topology.tp).wait()
        return whole[: self.config.model.vocab_size]

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def save(self, root: Path) -> Path:
        """Publish a checkpoint of this step under `root`; every rank must call it."""
        entries = [checkpoint.Entry(spec.with_role(role), tensor) for role, spec, tensor in self.model.owned_entries()]
        state = {
            "train": vars(self.state),
            "model": self.model.state_dict(),
            "config": self.plan.resolved.to_json()["config"],
            "data": self.feed.train_data.fingerprint,
        }
        keep = self.config.checkpoint.keep_last
        return checkpoint.save(
            root, self.state.step, entries, state, self.topology.control, keep_last=keep, failpoints=self.failpoints
        )

    def resume(self, directory: Path) -> None:
        """Continue from the checkpoint in `directory`: weights, optimizer states, scaler, step and data position.

        Any layout, schedule and ZeRO stage may have written it.
        Raises CheckpointError if it belongs to another model, data set or batch size.
        """
        self.failpoints.hit("checkpoint_load")
        manifest = checkpoint.read_manifest(directory)
        self._require_same_model(directory, manifest.state["config"])
        if manifest.state["data"] != self.feed.train_data.fingerprint:
            raise CheckpointError(
                f"{directory}: was trained on other data ({manifest.state['data']}) than this config names "
                f"({self.feed.train_data.fingerprint})"
            )
        train: Mapping[str, Any] = manifest.state["train"]
        if train["consumed_samples"] != train["step"] * self.config.train_batch_size:
            raise CheckpointError(
                f"{directory}: {train['consumed_samples']} samples in {train['step']} steps: "
                f"train_batch_size = {self.config.train_batch_size} differs from the run that saved it"
            )
        entries = [checkpoint.Entry(spec.with_role(role), tensor) for role, spec, tensor in self.model.state_entries()]
        checkpoint.load(directory, entries)
        self.state = TrainState(**train)
        self.model.load_state_dict(manifest.state["model"])
        self.model.after_load()

    def _require_same_model(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose config differs in what shapes the parameters or their use."""
        mine = _what_makes_the_model(self.plan.resolved.to_json()["config"])
        other = _what_makes_the_model(saved)
        for name in sorted(mine):
            if other.get(name) != mine[name]:
                raise CheckpointError(
                    f"{directory}: {name} = {other.get(name)!r} in the checkpoint, {mine[name]!r} in this config"
                )

    def close(self) -> None:
        """Remove hooks; the process groups stay."""
        self.model.close()

    # ---- parts --------------------------------------------------------------------------------------------------

    def _train_mode(self, training: bool) -> None:
        for stage in self.stages.values():
            if stage.training != training:  # setting it walks over all modules
                stage.train(training)

    def _breakdown(self, marks_s: tuple[float, ...]) -> dict[str, float]:
        """What `wall_clock_breakdown` and `memory_breakdown` add to a record; times are the host's."""
        found: dict[str, float] = {}
        if self.config.wall_clock_breakdown:
            names = ("time_data_s", "time_forward_backward_s", "time_optimizer_s")
            found |= {name: b - a for name, a, b in zip(names, marks_s, marks_s[1:], strict=False)}
        if self.config.memory_breakdown:
            found |= {f"memory_{name}_bytes": count for name, count in self.model.memory_bytes().items()}
        return found


def _what_makes_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved config, as JSON, says which function of its parameters a model is; by dotted key."""
    regularisers = ("dropout", "attention_dropout", "init_std")
    found = {f"model.{name}": value for name, value in config["model"].items() if name not in regularisers}
    sparse = config.get("sparse_attention")
    if sparse is not None and sparse.get("num_random_blocks"):
        found["training.seed"] = config["training"]["seed"]  # which draws the random blocks
    return found | {"sparse_attention": sparse}
