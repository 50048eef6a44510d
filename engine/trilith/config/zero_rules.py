"""Rules of `zero_optimization`: what may be partitioned and offloaded under which schedule, and what has no effect.

Whether the layout holds it (memory, units, ranks) is preflight's to judge.
"""

from __future__ import annotations

from trilith.config.base import NotGiven
from trilith.config.layout_keys import ASYNCHRONOUS
from trilith.config.rule import Rule, one_of_its_divisors
from trilith.config.schema import Config
from trilith.config.zero_keys import OffloadOptimizerConfig, OffloadParamConfig, ZeroConfig
from trilith.errors import Violation

_ZERO = "zero_optimization"
_STAGE = f"{_ZERO}.stage"
_OPTIMIZER, _PARAM = f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"


def _offloads(config: Config) -> tuple[tuple[str, OffloadOptimizerConfig | OffloadParamConfig], ...]:
    """(path, section) of both kinds of offload."""
    zero = config.zero_optimization
    return (_OPTIMIZER, zero.offload_optimizer), (_PARAM, zero.offload_param)


def replicas_divide_data(config: Config) -> list[Violation]:
    """The data degree is so many copies of the ZeRO partition, each over equally many ranks."""
    data, replicate = config.parallel.data, config.parallel.replicate
    if data % replicate == 0:
        return []
    rule = f"must divide parallel.data {data}, which counts the copies' ranks, too"
    fix = f"{one_of_its_divisors(data)} Or a multiple of {replicate} as parallel.data."
    return [Violation("parallel.replicate", replicate, rule, fix)]


def offload_is_of_a_partition(config: Config) -> list[Violation]:
    """A rank offloads its own part: of states from stage 1, of weights at stage 3."""
    stage, found = config.zero_optimization.stage, []
    for (path, section), needed, what in zip(
        _offloads(config), ("1, 2 or 3", "3"), ("optimizer states", "weights"), strict=True
    ):
        if section.device != "none" and str(stage) not in needed:
            rule = f"moves a rank's own part of the {what}, but at {_STAGE} {stage} they are not partitioned"
            found.append(Violation(f"{path}.device", section.device, rule, f'Use stage {needed}, or device "none".'))
    return found


def disk_has_a_path(config: Config) -> list[Violation]:
    """Files are written where the configuration says, never at a place of our own choice."""
    return [
        Violation(
            f"{path}.nvme_path",
            NotGiven(),
            f"is needed while {path}.device is nvme",
            "Give a directory on a fast local disk.",
        )
        for path, section in _offloads(config)
        if section.device == "nvme" and section.nvme_path is None
    ]


def automatic_offload_has_a_limit(config: Config) -> list[Violation]:
    """`auto` offloads what does not fit, so it must know what fits."""
    if config.pipeline.memory_limit_bytes is not None:
        return []
    rule = "offloads what pipeline.memory_limit_bytes does not hold, and that is not given"
    fix = 'Give pipeline.memory_limit_bytes, or use device "cpu" or "none".'
    return [
        Violation(f"{path}.device", section.device, rule, fix)
        for path, section in _offloads(config)
        if section.device == "auto"
    ]


def versions_are_whole(config: Config) -> list[Violation]:
    """Asynchronous schedules keep several versions of a stage's weights, whole and on the device."""
    schedule, stage, found = config.pipeline.schedule, config.zero_optimization.stage, []
    if schedule not in ASYNCHRONOUS:
        return []
    why = f"pipeline.schedule {schedule} keeps several versions of whole weights on each rank and updates all of them"
    if stage >= 2:
        rule = f"{why}, so gradients and weights cannot be partitioned"
        found.append(Violation(_STAGE, stage, rule, f"Use stage 0 or 1 under {schedule}, or another schedule."))
    for path, section in _offloads(config):
        if section.device != "none":
            rule = f"{why}, so nothing can be offloaded"
            fix = f'Use device "none" under {schedule}, or another schedule.'
            found.append(Violation(f"{path}.device", section.device, rule, fix))
    return found


def taken_back_from_memory(config: Config) -> list[Violation]:
    """Postvalidation takes a step back from a copy, which lies in memory."""
    if config.pipeline.optimizer_sync == "step" or config.zero_optimization.offload_optimizer.device != "nvme":
        return []
    rule = f"takes a wrong step back from a copy in memory, but {_OPTIMIZER}.device nvme keeps the states on disk"
    fix = f'Use "step", or {_OPTIMIZER}.device "cpu".'
    return [Violation("pipeline.optimizer_sync", config.pipeline.optimizer_sync, rule, fix)]


_DEVICES = (f"{_OPTIMIZER}.device", f"{_PARAM}.device")
ZERO_RULES: tuple[Rule, ...] = (
    Rule(("parallel.data", "parallel.replicate"), replicas_divide_data),
    Rule((_STAGE, *_DEVICES), offload_is_of_a_partition),
    Rule((*_DEVICES, f"{_OPTIMIZER}.nvme_path", f"{_PARAM}.nvme_path"), disk_has_a_path),
    Rule((*_DEVICES, "pipeline.memory_limit_bytes"), automatic_offload_has_a_limit),
    Rule(("pipeline.schedule", _STAGE, *_DEVICES), versions_are_whole),
    Rule(("pipeline.optimizer_sync", f"{_OPTIMIZER}.device"), taken_back_from_memory),
)


def zero_notes(config: Config) -> list[str]:
    """What of `zero_optimization` is allowed but has no effect, or another one than in DeepSpeed."""
    zero, notes = config.zero_optimization, []
    unused = [
        name
        for name, info in ZeroConfig.model_fields.items()
        if name.startswith("stage3_") and getattr(zero, name) != info.default
    ]
    if zero.stage < 3:
        notes += [f"{_ZERO}.{name}: has no effect at stage {zero.stage}, only at 3" for name in unused]
    if zero.stage < 2 and zero.reduce_interval != "microbatch":
        notes.append(
            f"{_ZERO}.reduce_interval: has no effect at stage {zero.stage}: gradients are whole and reduced once a step"
        )
    if zero.stage == 0 and config.parallel.replicate > 1:
        notes.append("parallel.replicate: has no effect at zero_optimization.stage 0, where nothing is partitioned")
    elif zero.zero_hpz_partition_size > 1:
        notes.append(
            f"{_ZERO}.zero_hpz_partition_size: optimizer states and gradients, too, are partitioned among "
            f"{zero.zero_hpz_partition_size} ranks only (HSDP), not among all {config.parallel.data}"
        )
    if zero.offload_optimizer.device == "none" and zero.offload_optimizer.ratio != 1.0:
        notes.append(f"{_OPTIMIZER}.ratio: has no effect while device is none")
    notes += [
        f"{path}.nvme_path: has no effect while device is {section.device}"
        for path, section in _offloads(config)
        if section.nvme_path is not None and section.device != "nvme"
    ]
    return notes
