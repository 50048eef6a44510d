"""The whole configuration: `Config`, a walk over its keys, and the JSON schema that editors read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args

from pydantic import BaseModel, PrivateAttr
from pydantic.fields import FieldInfo

from trilith.config.base import AUTO, Auto, Bool, ConfigModel, Count, Door, LocatedViolation, NotNegative, OrAbsent, key
from trilith.config.deepspeed import accepted_paths
from trilith.config.layout_keys import ActivationCheckpointingConfig, ParallelConfig, PipelineConfig
from trilith.config.model_keys import DataConfig, ModelConfig
from trilith.config.run_keys import (
    CheckpointConfig,
    CompileConfig,
    CsvMonitorConfig,
    KernelsConfig,
    RunConfig,
    TensorBoardConfig,
    TrainingConfig,
)
from trilith.config.sparse_keys import SparseAttentionConfig
from trilith.config.training_keys import (
    AdamWConfig,
    Bf16Config,
    DataTypesConfig,
    DtypeName,
    Fp16Config,
    OptimizerConfig,
    SchedulerConfig,
)
from trilith.config.zero_keys import AioConfig, ZeroConfig
from trilith.errors import Violation

NOTHING: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Provenance:
    """Where a Config's values came from; no part of what it says, so two configs that differ only here are equal.

    `origins`: dotted path -> "--set" or "file: mapped from ...", for what does not plainly stand in the file.
    `places`: dotted path -> "file:line". `notes`: what was mapped or ignored. `source`: the file's name.
    """

    origins: Mapping[str, str] = field(default_factory=lambda: NOTHING, compare=False)
    places: Mapping[str, str] = field(default_factory=lambda: NOTHING, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    source: str = field(default="", compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_provenance, (dict(self.origins), dict(self.places), self.notes, self.source))

    def place(self, path: str) -> str:
        """Where the key at `path`, or the nearest section above it, stands; "" if nowhere."""
        while path:
            if path in self.places:
                return self.places[path]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return ""

    def locate(self, violations: Iterable[Violation]) -> list[Violation]:
        """The violations, each once, with the line of its key, in the order of the file; those without a line last."""
        located: dict[tuple[str, str], tuple[tuple[bool, int, str], Violation]] = {}
        for violation in violations:
            place = violation.where if isinstance(violation, LocatedViolation) else ""
            place = place or self.place(violation.path)
            line = place.rpartition(":")[2]
            rank = (not line.isdigit(), int(line) if line.isdigit() else 0, violation.path)
            known = LocatedViolation(violation.path, violation.value, violation.rule, violation.fix, place)
            located.setdefault((violation.path, violation.rule), (rank, known))
        return [violation for _, violation in sorted(located.values(), key=lambda pair: pair[0])]


def _provenance(origins: dict[str, str], places: dict[str, str], notes: tuple[str, ...], source: str) -> Provenance:
    return Provenance(MappingProxyType(origins), MappingProxyType(places), notes, source)


def _default_optimizer() -> AdamWConfig:
    return AdamWConfig.model_validate({"type": "AdamW", "params": {"lr": "auto"}})


class Config(ConfigModel):
    """One run. After `resolve` nothing is "auto" but what preflight decides; `model` is None only with needs="engine"."""

    model: OrAbsent[ModelConfig] = key(None, "The transformer to train; a run needs it, trilith.initialize does not.")
    sparse_attention: SparseAttentionConfig | None = key(
        None, "Which blocks of attention's scores are computed, in all layers alike; null: all that causality allows."
    )
    data: DataConfig = key(DataConfig(), "Where samples come from.")
    training: TrainingConfig = key(TrainingConfig(), "Length and rhythm of the run.")
    parallel: ParallelConfig = key(ParallelConfig(), "Degrees of parallelism.")
    pipeline: PipelineConfig = key(PipelineConfig(), "Stages and their schedule.")
    train_batch_size: Auto[Count] = key(
        "auto",
        "Samples of one optimizer step over all ranks: train_micro_batch_size_per_gpu x gradient_accumulation_steps x "
        "parallel.data. auto: that product.",
        "samples",
    )
    train_micro_batch_size_per_gpu: Auto[Count] = key(
        "auto", "Samples of one microbatch on one data-parallel rank. auto: by the batch rule.", "samples"
    )
    gradient_accumulation_steps: Auto[Count] = key(
        "auto", "Microbatches of one optimizer step. auto: by the batch rule, 1 if that is open.", "microbatches"
    )
    gradient_clipping: Auto[NotNegative] = key(
        1.0, "Largest global L2 norm of the gradients; 0: no clipping. auto: 1.0."
    )
    optimizer: OptimizerConfig = key(_default_optimizer(), "The optimizer.")
    scheduler: SchedulerConfig | None = key(None, "Learning-rate schedule; null: constant.")
    fp16: Fp16Config = key(Fp16Config(), "Half precision with loss scaling.")
    bf16: Bf16Config = key(Bf16Config(), "bfloat16.")
    data_types: DataTypesConfig = key(DataTypesConfig(), "Number formats.")
    communication_data_type: Auto[DtypeName] = key(
        "auto", "Number format in which gradients are reduced. auto: data_types.grad_accum_dtype."
    )
    zero_optimization: ZeroConfig = key(ZeroConfig(), "What data-parallel ranks partition.")
    aio: AioConfig = key(AioConfig(), "How offloaded files are read and written.")
    activation_checkpointing: ActivationCheckpointingConfig = key(
        ActivationCheckpointingConfig(), "Recompute of activations."
    )
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "Saved state.")
    kernels: KernelsConfig = key(KernelsConfig(), "Which implementation of the ops runs.")
    compile: CompileConfig = key(CompileConfig(), "torch.compile of the model's blocks.")
    run: RunConfig = key(RunConfig(), "Where the run writes and what it runs on.")
    steps_per_print: Auto[Count] = key(
        "auto", "Progress line every so many steps. auto: training.log_interval, or 10.", "steps"
    )
    wall_clock_breakdown: Bool = key(False, "Add the times of the phases of a step to its record.")
    memory_breakdown: Bool = key(False, "Add memory by category to a step's record.")
    log_level: Auto[Literal["debug", "info", "warning", "error", "critical"]] = key(
        "info", "Least severe messages that are logged. auto: info."
    )
    tensorboard: TensorBoardConfig = key(TensorBoardConfig(), "TensorBoard events.")
    csv_monitor: CsvMonitorConfig = key(CsvMonitorConfig(), "Metrics as CSV files.")

    _provenance: Provenance = PrivateAttr(default_factory=Provenance)

    @property
    def provenance(self) -> Provenance:
        """Where the values came from."""
        return self._provenance


def with_provenance(config: Config, provenance: Provenance) -> Config:
    """`config`, just made and not yet handed out, with its provenance."""
    config._provenance = provenance
    return config


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation: `Section`, `Section | None`, a tagged union, a tuple of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from sections(part)


def walk(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key below `model` with its dotted path; where a section has several kinds, the keys of each."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, info
        for section in sections(info.annotation):
            yield from walk(section, f"{path}.")


@cache
def field_infos() -> Mapping[str, FieldInfo]:
    """Every key's field by dotted path."""
    return MappingProxyType(dict(walk()))


def takes_auto(path: str) -> bool:
    """Whether "auto" at `path` is replaced by `resolve`; for some keys, such as run.device, it is a choice like others."""
    info = field_infos().get(path)
    return info is not None and Door(AUTO) in info.metadata


@cache
def known_paths() -> tuple[str, ...]:
    """Every path that may stand in a file, DeepSpeed's mapped and ignored keys included, sorted."""
    return tuple(sorted(set(field_infos()) | set(accepted_paths())))


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the configuration; DeepSpeed keys that are mapped or ignored are marked deprecated."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Trilith run"
    schema["properties"]["$schema"] = {"type": "string", "description": "Where editors find this schema."}
    _tidy(schema)
    for path, description in accepted_paths().items():
        *parents, name = path.split(".")
        nodes = [schema]
        for parent in parents:
            nodes = [inner for node in nodes for inner in _descend(schema, node, parent)]
        for node in nodes:
            node["properties"].setdefault(name, {"description": description, "deprecated": True})
    return schema


def _descend(schema: dict[str, Any], node: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The object schemas of the section `name` of `node`: one, one for each kind, or a new one for DeepSpeed's own."""
    own = {"type": "object", "additionalProperties": False, "properties": {}, "deprecated": True}
    return list(_objects(schema, node["properties"].setdefault(name, own)))


def _objects(schema: dict[str, Any], node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in node:
        yield from _objects(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
    elif "properties" in node:
        yield node
    for choice in (*node.get("oneOf", ()), *node.get("anyOf", ())):
        yield from _objects(schema, choice)


def _tidy(node: Any) -> None:
    """Drops titles that only repeat a key's name, and defaults of sections, which their keys say."""
    if isinstance(node, list):
        for child in node:
            _tidy(child)
    elif isinstance(node, dict):
        for name, child in node.get("properties", {}).items():
            if child.get("title", "").replace(" ", "").lower() == name.replace("_", ""):
                del child["title"]
            if isinstance(child.get("default"), dict) or "$ref" in child:
                child.pop("default", None)
        for child in node.values():
            _tidy(child)
