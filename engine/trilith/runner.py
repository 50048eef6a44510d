"""The main job: what `trilith train` runs on every rank. Progress, evaluation, checkpoints, a sample, and the report."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Protocol

import filelock
import torch

from trilith import checkpoint, comm, measure, preflight
from trilith.data.batch import open_tokenizer, prepare_data
from trilith.errors import CheckpointError, TrilithError
from trilith.failpoints import Failpoints
from trilith.models.base import num_parameters
from trilith.monitor import report
from trilith.monitor.activations import ActivationMeter
from trilith.monitor.metrics import EvalRecord, StepRecord
from trilith.monitor.progress import Progress, human_bytes, human_count, human_time
from trilith.monitor.sinks import CsvFile, JsonLines, Sinks, TensorBoard
from trilith.pipeline import timeline
from trilith.pipeline.action import Kind
from trilith.pipeline.timeline import Record
from trilith.pipeline.trace_file import Trace
from trilith.preflight import Plan
from trilith.process_groups import join_world, leave_world
from trilith.trainer import Place, Trainer
from trilith_launcher import JoinedRank, run_joined

TEMPERATURE = 0.8
# A step's record may come two steps after its actions ran: so many of the last ones are watched for their activations.
WATCHED_STEPS = 3


class Context(Protocol):
    """How a rank tells its launcher where it is."""

    def position(self, step: int | None = None, stage: int | None = None, phase: str | None = None) -> None:
        """Note step, stage and phase."""

    def wait(self, text: str) -> None:
        """Note in which action this rank begins to wait for another one, and for what."""


def run_rank(
    *,
    rank: int,
    world_size: int,
    store_path: str | None,
    context: Context,
    resolved: dict[str, Any],
) -> None:
    """One rank of `trilith train`: plan, data, world, trainer, run. `resolved` is what `Resolved.to_json` gives."""
    plan = preflight.plan(resolved["config"], world_size=world_size)
    torch.set_num_threads(plan.config.run.threads)
    logging.basicConfig(
        level=plan.config.log_level.upper(), format=f"[rank {rank}] %(levelname)s %(name)s: %(message)s"
    )
    context.position(phase="data")
    prepare_data(plan.config.data)  # before groups exist: building may take longer than a collective may wait
    context.position(phase="start")
    device = plan.config.run.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    here = join_world(rank, world_size, store_path, plan.config.parallel.timeout_s, device)
    place = Place(rank, world_size, here)
    context.position(phase="measure")
    plan = measure.decide(plan, place, partial(print, flush=True))
    trainer = Trainer(plan, place, Failpoints.from_environment(rank))
    context.position(stage=trainer.topology.coordinate("pp"))
    trainer.on_wait = context.wait
    Run(trainer, context, _with_choice(resolved, plan)).run()
    trainer.close()
    leave_world()
    # A gloo group that is still referenced when Python shuts down aborts the process: let go of them here.
    del trainer
    gc.collect()


def _with_choice(resolved: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The resolved config with what the run chose itself in the place of "auto"."""
    decided = plan.resolved.to_json()
    before, after = resolved["config"]["pipeline"], decided["config"]["pipeline"]
    chosen = [f"pipeline.{key}" for key, value in after.items() if value != before[key]]
    origins = {**resolved["origins"], **{path: decided["origins"][path] for path in chosen}}
    return {**resolved, "config": decided["config"], "origins": origins, "notes": decided["notes"]}


class Run:
    """One rank's main loop. Rank 0 prints, logs and writes; all ranks step together."""

    def __init__(self, trainer: Trainer, context: Context, resolved: Mapping[str, Any]) -> None:
        self.trainer, self.context, self.config = trainer, context, trainer.config
        self.resolved = resolved
        self.control = trainer.topology.control
        self.directory = Path(self.config.run.directory)
        self.checkpoints = Path(self.config.checkpoint.directory)
        self.is_writer = trainer.topology.rank == 0
        self.last_evaluation: EvalRecord | None = None
        self.last_step: StepRecord | None = None
        self.trace: Trace | None = None
        self.activation_bytes = 0

    def run(self) -> None:
        """Train to the end and write everything that `run.directory` holds afterwards."""
        self.together(self._claim_directory)
        self._resume()
        steps, first = self.config.training.steps, self.trainer.state.step
        self.progress = Progress(steps, first, self.config.training.log_interval) if self.is_writer else None
        self.sinks = self._open_sinks(first)
        self.say(f"{num_parameters(self.trainer.plan.units):,} parameters on {self.control.size} ranks")
        for note in self.resolved["notes"]:
            self.say(f"note: {note}")
        try:
            while self.trainer.state.step < steps:
                self._span(self._next_stop())
            interval = self.config.training.eval_interval
            if self.last_step is not None and interval and steps % interval:
                self._evaluate()
            self._sample()
        finally:
            self.sinks.close()
            if self.progress is not None:
                self.progress.close()
        self._report()

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.progress is not None:
            self.progress.say(text)

    def together(self, action: Any) -> None:
        """Run `action` on rank 0; if it fails there, every rank fails with it."""
        failure = None
        if self.is_writer:
            try:
                action()
            except (TrilithError, OSError) as error:
                failure = f"{error}"
        failure = comm.broadcast_object(failure, 0, self.control)
        if failure:
            raise TrilithError(failure)

    # ---- before the first step ------------------------------------------------------------------------------------

    def _claim_directory(self) -> None:
        """Take the run directory for this process; an earlier run's is moved aside unless this one continues it."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.directory.parent / f".{self.directory.name}.lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise TrilithError(
                f"run.directory = {str(self.directory)!r}: another run is writing there. "
                "Wait for it, or choose another run.directory"
            ) from None
        if self.config.checkpoint.resume == "never" and (self.directory / "metrics.jsonl").exists():
            number = 1
            while (aside := self.directory.with_name(f"{self.directory.name}.{number}")).exists():
                number += 1
            self.directory.rename(aside)
            print(f"{self.directory} held an earlier run: moved to {aside}", flush=True)
        saves = self.config.checkpoint.save_interval is not None
        if saves and self.config.checkpoint.resume == "never" and checkpoint.newest(self.checkpoints) is not None:
            raise TrilithError(
                f"checkpoint.directory = {str(self.checkpoints)!r}: holds the checkpoints of an earlier run. "
                "Set checkpoint.resume to 'auto' to continue it, or choose another directory"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.resolved.json").write_text(json.dumps(self.resolved, indent=1) + "\n")

    def _resume(self) -> None:
        """Continue from the newest checkpoint that every rank can read; a damaged one is passed over, by name."""
        mode = self.config.checkpoint.resume
        if mode == "never":
            return
        found = checkpoint.candidates(self.checkpoints, print) if self.is_writer else []
        refused = ""
        for path in comm.broadcast_object([str(path) for path in found], 0, self.control):
            failure = ""
            try:
                self.trainer.resume(Path(path))
            except CheckpointError as error:
                failure = str(error)
            failure = next(filter(None, comm.gather_objects(failure, self.control)), "")
            if not failure:
                self.announce(f"resuming from {path}")
                return
            self.announce(f"checkpoint passed over: {failure}")
            refused = refused or failure
        if refused:
            raise CheckpointError(refused)
        if mode == "must":
            raise CheckpointError(f"checkpoint.resume = 'must': no valid checkpoint under {self.checkpoints}")
        self.announce(f"no valid checkpoint under {self.checkpoints}: starting fresh")

    def announce(self, text: str) -> None:
        """Print a line on rank 0, before there is a progress display."""
        if self.is_writer:
            print(text, flush=True)

    def _open_sinks(self, resume_step: int) -> Sinks:
        if not self.is_writer:
            return Sinks([])
        makers: list[Any] = [("metrics.jsonl", partial(JsonLines, self.directory / "metrics.jsonl", resume_step))]
        board, table = self.config.tensorboard, self.config.csv_monitor
        if board.enabled:
            makers.append(("TensorBoard", partial(TensorBoard, Path(board.output_path) / board.job_name)))
        if table.enabled:
            makers.append(
                ("CSV", partial(CsvFile, Path(table.output_path) / table.job_name / "metrics.csv", resume_step))
            )
        return Sinks(makers)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def _next_stop(self) -> int:
        """The next step after which the pipeline must be empty: an evaluation, a save, or the end."""
        step, steps = self.trainer.state.step, self.config.training.steps
        intervals = filter(None, (self.config.training.eval_interval, self.config.checkpoint.save_interval))
        return min([steps, *(step - step % interval + interval for interval in intervals)])

    def _span(self, stop: int) -> None:
        """Train up to step `stop`, then evaluate and save where it is due."""
        first, steps = self.trainer.state.step, self.config.training.steps
        records = self.trainer.train(stop - first)
        for step in range(first, stop):
            self.context.position(step=step, phase="train")
            if step >= steps - WATCHED_STEPS:
                with self._watched_activations():
                    for record in records:
                        self._note(record)
                break
            self._note(next(records))
        if stop == steps:
            self._gather_timeline()
        interval, save = self.config.training.eval_interval, self.config.checkpoint.save_interval
        if interval and stop % interval == 0:
            self._evaluate()
        if save is not None and (stop == steps or (save and stop % save == 0)):
            self._save()

    def _note(self, record: StepRecord) -> None:
        """Log and show a finished step."""
        self.context.position(step=record.step, phase="train")
        self.last_step = record
        self.sinks.write(record)
        if self.progress is not None:
            self.progress.step(record)

    @contextmanager
    def _watched_activations(self) -> Iterator[None]:
        """Within it, what autograd and the queues of weight gradients keep is counted."""
        queues = [stage.queue for stage in self.trainer.pipeline.values() if stage.queue is not None]
        with ActivationMeter(self.trainer.model.weight_buffers()) as meter:
            for queue in queues:
                queue.tracker = meter.track
            try:
                yield
            finally:
                for queue in queues:
                    queue.tracker = None
        self.activation_bytes = max(self.activation_bytes, meter.peak_bytes)

    def _gather_timeline(self) -> None:
        """The newest step's actions of one rank a pipeline rank, on rank 0's clock."""
        topology, plan = self.trainer.topology, self.trainer.plan
        shown = topology.data_index == 0 and topology.tp.index == 0
        offset_s = comm.clock_offset_s(self.control)
        mine = [
            [r.kind.value, r.stage, r.microbatch, r.start_s + offset_s, r.end_s + offset_s]
            for r in (self.trainer.records if shown else [])
        ]
        rows = {
            topology.degrees.dense.coordinate(rank, "pp"): [Record(Kind(kind), *rest) for kind, *rest in row]
            for rank, row in enumerate(comm.gather_objects(mine, self.control))
            if row
        }
        predicted = plan.simulation
        trace = Trace(self.trainer.state.step, plan.schedule, rows, predicted.bubble, predicted.bubble_makespan)
        self.trace = trace if rows else None

    def _evaluate(self) -> None:
        self.context.position(phase="evaluate")
        self.last_evaluation = self.trainer.evaluate()
        self.sinks.write(self.last_evaluation)
        if self.progress is not None:
            self.progress.evaluation(self.last_evaluation)

    def _save(self) -> None:
        self.context.position(phase="checkpoint")
        try:
            path = self.trainer.save(self.checkpoints)
        except CheckpointError as error:
            self.say(f"warning: {error}")  # a full disk must not end a run; the earlier checkpoints are untouched
        else:
            self.say(f"checkpoint {path}")

    # ---- after the last step --------------------------------------------------------------------------------------

    def _sample(self) -> None:
        """Print a short continuation of `training.generate_prompt`."""
        count = self.config.training.generate_tokens
        tokenizer = open_tokenizer(self.config.data) if count else None
        if tokenizer is None:
            return
        self.context.position(phase="generate")
        prompt = self.config.training.generate_prompt
        tokens = generate(self.trainer, tokenizer.encode(prompt) or [tokenizer.eod], count)
        text = tokenizer.decode(tokens)
        self.say(f"sample after {self.trainer.state.step} steps:\n{text}")
        if self.is_writer:
            (self.directory / "sample.txt").write_text(text + "\n", encoding="utf-8")

    def _report(self) -> None:
        """Gather memory by category from every rank; rank 0 writes timeline.json, report.html and report.png."""
        mine = {**self.trainer.model.memory_bytes(), "activations": self.activation_bytes}
        everyone = comm.gather_objects(mine, self.control)
        if not self.is_writer or self.trace is None:
            return
        self.trace.write(self.directory)
        # Ranks whose units lie elsewhere have other categories.
        names = dict.fromkeys(name for rank in everyone for name in rank)
        categories = {name: [rank.get(name, 0) for rank in everyone] for name in names}
        try:
            steps, evaluations = report.read_metrics(self.directory / "metrics.jsonl")
        except (OSError, ValueError) as error:
            print(f"warning: no report: metrics.jsonl cannot be read: {error}", file=sys.stderr)
            return
        panels = [report.loss_panel(steps, evaluations), *_timeline_panels(self.trace), report.memory_panel(categories)]
        tables = {
            **_timeline_tables(self.trace),
            "Memory per rank by category": report.memory_rows(categories),
            "Memory per rank beside the plan's prediction (without padding)": self._memory_beside_plan(categories),
        }
        report.write(self.directory, report.Report(str(self.directory), self._figures(steps), panels, tables))
        print(f"report {self.directory / 'report.html'}", flush=True)

    def _memory_beside_plan(self, measured: Mapping[str, list[int]]) -> list[list[str]]:
        """By rank, what the report's tables call the categories of the plan; of what is elsewhere, all together."""
        ranks = range(self.control.size)
        tiers = {
            tier: [
                sum(
                    counts[rank]
                    for name, counts in measured.items()
                    if name.startswith(f"{tier}_") and name != "host_swap"
                )
                for rank in ranks
            ]
            for tier in ("host", "disk")
        }
        plan, topology = self.trainer.plan, self.trainer.topology
        rows = [plan.memory[topology.degrees.dense.coordinate(rank, "pp")] for rank in ranks]
        predicted = {
            "parameters": [row.parameter_bytes for row in rows],
            "gradients": [row.gradient_bytes for row in rows],
            "optimizer": [row.optimizer_bytes for row in rows],
            "rollback": [row.rollback_bytes for row in rows],
            "gather_window": [row.window_bytes for row in rows],
            "activations": [row.activation_bytes for row in rows],
            "host": [row.host_bytes for row in rows],
            "disk": [row.disk_bytes for row in rows],
        }
        return report.compared_rows({**measured, **tiers}, predicted)

    def _figures(self, steps: Sequence[dict[str, Any]]) -> dict[str, str]:
        """The headline figures of the report."""
        assert self.last_step is not None
        figures = {
            "parameters": human_count(num_parameters(self.trainer.plan.units)),
            "steps": str(self.last_step.step),
            "first loss": f"{steps[0]['loss'] or nan:.3f}",
            "last loss": f"{self.last_step.loss:.3f}",
        }
        if self.last_evaluation is not None:
            figures["eval_loss"] = f"{self.last_evaluation.eval_loss:.3f}"
        rates = sorted(record["tokens_per_s"] for record in steps)
        figures["tokens/s (median)"] = human_count(rates[len(rates) // 2])
        figures["training time"] = human_time(sum(record["step_time_s"] for record in steps))
        figures["peak memory of a rank"] = human_bytes(self.last_step.memory_peak_bytes)
        return figures


def _timeline_panels(trace: Trace) -> list[report.Panel]:
    """One step's pipeline, measured and simulated, on one time axis."""
    height = 0.6 + 0.45 * trace.schedule.num_ranks
    titles = ("Pipeline of the last step, measured (s)", "the same, simulated from the measured action times (s)")
    end_s = max(bar.end_s for bar in (*trace.bars, *trace.simulation.bars))
    return [
        report.Panel(title, partial(timeline.draw, bars=bars, title=title, end_s=end_s), height)
        for title, bars in zip(titles, (trace.bars, trace.simulation.bars), strict=True)
    ]


def _timeline_tables(trace: Trace) -> dict[str, list[list[str]]]:
    """Its bubbles, measured beside predicted, and what the difference is made of."""
    tables = {"Pipeline of the last step": trace.rows()}
    if trace.delays:
        beyond_s = trace.measured.makespan_s - trace.simulation.makespan_s
        tables[f"Measured - simulated makespan {beyond_s * 1e6:+,.0f} µs, of which"] = trace.delay_rows()
    return tables


def generate(trainer: Trainer, prompt: Sequence[int], count: int) -> list[int]:
    """`prompt` continued by `count` tokens drawn at temperature 0.8, the same on every rank. All ranks call it.

    Every token is a forward over the whole window of S tokens (the newest ones), on the training stages.
    """
    topology, length = trainer.topology, trainer.config.model.sequence_length
    dense = topology.degrees.dense
    last = trainer.plan.schedule.placement[-1]  # the pipeline rank of the last stage
    source = dense.rank_of((last, *(0,) * (len(dense.axes) - 1)))
    draw = torch.Generator().manual_seed(trainer.config.training.seed)
    tokens = list(prompt)
    for _ in range(count):
        window = tokens[-length:]
        padded = torch.tensor([window + [0] * (length - len(window))], device=topology.device)
        logits = trainer.logits(padded, len(window) - 1)
        chosen = None
        if topology.rank == source:
            assert logits is not None
            odds = torch.softmax(logits.double().cpu() / TEMPERATURE, 0)
            chosen = int(torch.multinomial(odds, 1, generator=draw))
        tokens.append(comm.broadcast_object(chosen, source, topology.control))
    return tokens


def run_under_torchrun(joined: JoinedRank, plan: Plan) -> int:
    """This process's part of a run that torchrun started; returns its exit code."""
    return run_joined(joined, "trilith.runner:run_rank", {"resolved": plan.resolved.to_json()})
