"""The engine's table of contents: how a plan becomes ranks, stages, partitions, and then training steps.

Read `Trainer.__init__` for how a run is put together and `train_step` for what a step does. Nothing here prints: the main
job with progress, sinks and report is `runner.py`; tests, benchmarks and the parity tool drive this class directly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilith import build, checkpoint, comm
from trilith.data.batch import Batches, open_batches
from trilith.data.sampler import microbatch_ids
from trilith.errors import CheckpointError, TrilithError
from trilith.failpoints import Failpoints
from trilith.host_memory import HostMemory
from trilith.models.base import train_flops_per_token
from trilith.models.batch import Microbatch
from trilith.monitor.metrics import EvalRecord, StepRecord, peak_memory_bytes
from trilith.optim.lr import make_lr
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import make_schedule
from trilith.pipeline.stage import PipelineStage
from trilith.pipeline.timeline import Record
from trilith.pipeline.transport import GroupChannels
from trilith.precision import PrecisionPolicy
from trilith.preflight import Plan
from trilith.process_groups import build_topology
from trilith.zero.stage12 import ShardedModel

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


@dataclass(frozen=True)
class Accumulated:
    """A step between its backward and its update: when its phases began, its global target tokens, this rank's losses."""

    marks_s: tuple[float, ...]
    tokens: int
    losses: Sequence[Tensor]


class Trainer:
    """One rank's part of a run. Every rank of the world makes one from the same plan and calls the same methods."""

    def __init__(self, plan: Plan, place: Place, failpoints: Failpoints | None = None) -> None:
        """Build groups, stages, partitions and the executor, and give the weights their initial values.

        All ranks must call it together: process groups are made here.
        """
        self.plan, self.config = plan, plan.config
        self.failpoints = failpoints or Failpoints()
        self.failpoints.hit("build")
        timeout_s, channels = self.config.parallel.timeout_s, plan.schedule.channels()
        self.topology = build_topology(plan.degrees, place.device, timeout_s, ties=plan.ties, channels=channels)
        self.policy = PrecisionPolicy.from_config(self.config)
        self.stages = build.build_stages(self.config, plan.stages, self.topology, self.policy)
        self.model = ShardedModel(self.stages, self.topology, self.policy, self.config)
        build.initialise(self.model, self.stages, self.policy, self.config.training.seed)
        self.pipeline = {
            index: PipelineStage(
                index, stage, self.model.stage(index), is_first=index == 0, is_last=index == len(plan.stages) - 1
            )
            for index, stage in self.stages.items()
        }
        self.channels = GroupChannels(self.topology)
        self.executor = Executor(plan.schedule, self.pipeline, self.channels)
        self._forward_executors: dict[int, Executor] = {}
        self.lr = make_lr(self.config.scheduler, self.config.optimizer.params.lr)
        self.train_data = self._open("train")
        self.state = TrainState()
        self.host_memory = HostMemory()
        self.flops_per_token = {causal: train_flops_per_token(plan.units, causal) for causal in (True, False)}

    # ---- one training step --------------------------------------------------------------------------------------

    def train_step(self, recorder: list[Record] | None = None) -> StepRecord:
        """Forward and backward of every microbatch, reduction, clipping, optimizer. Every rank must call it.

        `recorder`, where given, collects this rank's actions with their times.
        """
        return self.update(self.accumulate(recorder))

    def accumulate(self, recorder: list[Record] | None = None) -> Accumulated:
        """The first half of `train_step`: forward and backward of every microbatch. `update` must follow.

        Between the two, a tool may call `model.finish()` and look at the step's gradients.
        """
        start_s, step = time.perf_counter(), self.state.step
        batch_size = self.config.train_batch_size
        ids = self._microbatch_ids(step * batch_size, self.config.gradient_accumulation_steps)
        microbatches, tokens = self._microbatches(self.train_data, ids)
        has_data_s = time.perf_counter()
        self._train_mode(True)
        self.model.zero_grad()
        self.failpoints.hit("forward")
        boundary = self._boundary(microbatches[0])
        executor = self.executor
        if recorder is not None:
            executor = Executor(self.plan.schedule, self.pipeline, self.channels, recorder)
        result = executor.run(microbatches, boundary, loss_seed=self.model.loss_scale)
        return Accumulated((start_s, has_data_s, time.perf_counter()), tokens, result.losses)

    def update(self, accumulated: Accumulated) -> StepRecord:
        """The second half of `train_step`: reduction, clipping, optimizer, and the step's record."""
        self.failpoints.hit("optimizer_step")
        lr, tokens = self.lr(self.model.optimizer_steps), accumulated.tokens
        outcome = self.model.step(lr)
        marks_s = (*accumulated.marks_s, time.perf_counter())
        loss, memory = self._gather_loss(accumulated.losses)
        if not outcome.skipped and not isfinite(outcome.grad_norm):
            raise TrilithError(
                f"step {self.state.step + 1}: the global gradient norm is {outcome.grad_norm} and the loss {loss}: the run "
                "has diverged. Resume from the last checkpoint with a lower learning rate"
            )
        self.state.step += 1
        self.state.consumed_samples += self.config.train_batch_size
        self.state.tokens += tokens
        self.host_memory.settle()
        elapsed = time.perf_counter() - marks_s[0]
        positions = self.config.train_batch_size * self.config.model.sequence_length
        flops = {causal: per_token * positions / elapsed for causal, per_token in self.flops_per_token.items()}
        peak = self.config.run.peak_flops
        world_peak = peak * self.topology.world_size if peak else None
        return StepRecord(
            step=self.state.step,
            loss=loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            tokens=tokens,
            consumed_tokens=self.state.tokens,
            tokens_per_s=tokens / elapsed,
            step_time_s=elapsed,
            memory_peak_bytes=memory,
            consumed_samples=self.state.consumed_samples,
            model_flops_per_s_causal=flops[True],
            model_flops_per_s_noncausal=flops[False],
            mfu_causal=flops[True] / world_peak if world_peak else None,
            mfu_noncausal=flops[False] / world_peak if world_peak else None,
            loss_scale=outcome.loss_scale if self.policy.scales_loss else None,
            skipped=outcome.skipped,
            breakdown=self._breakdown(marks_s),
        )

    # ---- evaluation and generation ------------------------------------------------------------------------------

    def evaluate(self) -> EvalRecord:
        """Mean loss over `training.eval_batches` batches of the held-out split, always the same samples."""
        start, total, tokens = time.perf_counter(), 0.0, 0
        self._train_mode(False)
        batch_size, count = self.config.training.eval_batch_size, self.plan.eval_microbatches
        executor = self.forward_executor(count)
        for index in range(self.config.training.eval_batches):
            self.failpoints.hit("evaluate")
            ids = self._microbatch_ids(index * batch_size, count)
            microbatches, found = self._microbatches(self.eval_data, ids)
            result = executor.run(microbatches, self._boundary(microbatches[0]))
            losses = [output["loss"] for output in result.outputs]
            total += self._gather_loss(losses)[0] * found
            tokens += found
        return EvalRecord(self.state.step, total / max(tokens, 1), tokens, time.perf_counter() - start)

    def forward_executor(self, num_microbatches: int) -> Executor:
        """An executor of the forward-only schedule on the same stages, made once per number of microbatches."""
        if num_microbatches not in self._forward_executors:
            virtual_stages = self.config.pipeline.virtual_stages
            schedule = make_schedule("forward_only", self.config.parallel.pipeline, virtual_stages, num_microbatches)
            self._forward_executors[num_microbatches] = Executor(complete(schedule), self.pipeline, self.channels)
        return self._forward_executors[num_microbatches]

    def logits(self, tokens: Tensor, position: int) -> Tensor | None:
        """Whole-vocabulary logits (V,) at `position` for `tokens` (1, S); None on ranks without the last stage."""
        self._train_mode(False)
        sample_ids = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        batch = Microbatch(tokens, None, None, positions, sample_ids, 1.0)
        outputs = self.forward_executor(1).run([batch], self._boundary(batch)).outputs
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
            "data": self.train_data.fingerprint,
        }
        keep = self.config.checkpoint.keep_last
        return checkpoint.save(
            root, self.state.step, entries, state, self.topology.control, keep_last=keep, failpoints=self.failpoints
        )

    def resume(self, directory: Path) -> None:
        """Continue from the checkpoint in `directory`: weights, optimizer states, scaler, step and data position.

        Raises CheckpointError if it belongs to another model, data set or batch size.
        """
        self.failpoints.hit("checkpoint_load")
        manifest = checkpoint.read_manifest(directory)
        self._require_same_model(directory, manifest.state["config"]["model"])
        if manifest.state["data"] != self.train_data.fingerprint:
            raise CheckpointError(
                f"{directory}: was trained on other data ({manifest.state['data']}) than this config names "
                f"({self.train_data.fingerprint})"
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

    @cached_property
    def eval_data(self) -> Batches:
        """The held-out split, opened by the first evaluation."""
        return self._open("valid")

    def _require_same_model(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose model section differs in what shapes the parameters or their use."""
        mine = self.plan.resolved.to_json()["config"]["model"]
        for name in sorted(mine.keys() - {"dropout", "attention_dropout", "init_std"}):
            if saved.get(name) != mine[name]:
                raise CheckpointError(
                    f"{directory}: model.{name} = {saved.get(name)!r} in the checkpoint, {mine[name]!r} in this config"
                )

    def close(self) -> None:
        """Remove hooks; the process groups stay."""
        self.model.close()

    # ---- parts --------------------------------------------------------------------------------------------------

    def _open(self, split: str) -> Batches:
        model = self.config.model
        return open_batches(self.config.data, model.sequence_length, model.vocab_size, split)

    def _train_mode(self, training: bool) -> None:
        for stage in self.stages.values():
            stage.train(training)

    def _microbatch_ids(self, first: int, count: int) -> list[Tensor]:
        """Global sample indices (B,) of this data rank's microbatches: the same global batch in every layout."""
        size, dp = self.config.train_micro_batch_size_per_gpu, self.topology.dp
        return [torch.from_numpy(microbatch_ids(first, index, size, dp.index, dp.size)) for index in range(count)]

    def _microbatches(self, data: Batches, ids: Sequence[Tensor]) -> tuple[list[Microbatch], int]:
        """This rank's microbatches, and the step's global number of target tokens, known before the first backward."""
        self.failpoints.hit("data_read")
        device = self.topology.device
        first, last = 0 in self.stages, len(self.plan.stages) - 1 in self.stages
        positions = torch.arange(self.config.model.sequence_length, device=device)
        samples = [data.samples(i.numpy()) for i in ids] if first or last else []
        tokens = sum(data.count_targets(i.numpy()) for i in ids)
        masked = self.config.data.loss_mask != "none"
        tokens = self._sum_over_data(tokens) if masked else tokens * self.topology.dp.size

        def place(array: Any) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)

        batches = []
        for index, sample_ids in enumerate(ids):
            sample = samples[index] if samples else None
            batches.append(
                Microbatch(
                    tokens=place(sample.tokens) if sample is not None and first else None,
                    labels=place(sample.labels) if sample is not None and last else None,
                    loss_mask=place(sample.loss_mask) if sample is not None and last else None,
                    positions=positions,
                    sample_ids=sample_ids.to(device),
                    loss_weight=1.0 / max(tokens, 1),  # no label counts: the loss is 0
                )
            )
        return batches, tokens

    def _breakdown(self, marks_s: Sequence[float]) -> dict[str, float]:
        """What `wall_clock_breakdown` and `memory_breakdown` add to a record; times are the host's."""
        found: dict[str, float] = {}
        if self.config.wall_clock_breakdown:
            names = ("time_data_s", "time_forward_backward_s", "time_optimizer_s")
            found |= {name: b - a for name, a, b in zip(names, marks_s, marks_s[1:], strict=False)}
        if self.config.memory_breakdown:
            found |= {f"memory_{name}_bytes": count for name, count in self.model.memory_bytes().items()}
        return found

    def _sum_over_data(self, count: int) -> int:
        total = torch.tensor([count], dtype=torch.float64, device=self.topology.device)
        comm.all_reduce(total, self.topology.dp).wait()
        return int(total.item())

    def _boundary(self, batch: Microbatch) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stage = next(iter(self.stages.values()))
        return stage.boundary(batch.sample_ids.numel(), batch.positions.numel())

    def _gather_loss(self, losses: Sequence[Tensor]) -> tuple[float, int]:
        """(the step's global loss, the largest memory peak in bytes), the same on every rank; summed in rank order."""
        counted = bool(losses) and self.topology.tp.index == 0
        local = sum(
            (loss.double() for loss in losses), torch.zeros((), dtype=torch.float64, device=self.topology.device)
        )
        peak = peak_memory_bytes(self.topology.device)
        mine = torch.tensor([float(local) if counted else 0.0, float(peak)], dtype=torch.float64)
        everyone = torch.empty(2 * self.topology.world_size, dtype=torch.float64)
        comm.all_gather(everyone, mine, self.topology.control).wait()
        return sum(everyone[::2].tolist()), int(everyone[1::2].max())
