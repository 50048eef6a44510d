"""Keys of the sections that lay a run out: `parallel`, `pipeline`, `activation_checkpointing`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError

from trilith.config.base import AUTO, Auto, Bool, ConfigModel, Count, Positive, Text, key

Partition = Literal["cost", "uniform", "parameters", "auto"]
ScheduleName = Literal[
    "gpipe",
    "1f1b",
    "interleaved_1f1b",
    "zb_h1",
    "zb_h2",
    "zb_v",
    "v_half",
    "v_min",
    "dualpipe_v",
    "pipedream",
    "pipedream_2bw",
    "auto",
    "file",
]
FROM_FILE = "file"
V_SHAPED = frozenset(("zb_v", "v_half", "v_min", "dualpipe_v"))  # two stages a rank, down the ranks and up again
ASYNCHRONOUS = frozenset(("pipedream", "pipedream_2bw"))  # gradients of older weights: other mathematics
PREFLIGHT_DECIDES = frozenset((AUTO, FROM_FILE))  # how many stages a rank has, under these schedules


def _partition(value: Any) -> Any:
    """A method's name, or a list of whole numbers: one message for both, not one per alternative."""
    if value in ("cost", "uniform", "parameters", "auto"):
        return value
    if isinstance(value, (list, tuple)) and value:
        whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in value]
        if all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31 for v in whole):
            return tuple(whole)
    rule = 'must be "cost", "uniform", "parameters", "auto" or a list with the number of layers of each stage'
    raise PydanticCustomError("partition", rule)  # type: ignore[arg-type]


def _partition_schema() -> JsonSchemaValue:
    names: JsonSchemaValue = {"enum": ["cost", "uniform", "parameters", "auto"]}
    counts: JsonSchemaValue = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    return {"anyOf": [names, counts]}


class ParallelConfig(ConfigModel):
    """Degrees of parallelism; their product data x pipeline x context x tensor is the number of ranks."""

    data: Auto[Count] = key(
        "auto", "Data-parallel degree, copies included. auto: what the other degrees leave of the world size.", "ranks"
    )
    pipeline: Count = key(1, "Pipeline-parallel degree.", "ranks")
    tensor: Count = key(1, "Tensor-parallel degree.", "ranks")
    context: Count = key(1, "Context-parallel degree; only 1 for now.", "ranks")
    replicate: Count = key(
        1,
        "Copies of the ZeRO partition inside the data degree (HSDP): data / replicate ranks share a partition, and copies "
        "reduce gradients among themselves. zero_optimization.zero_hpz_partition_size sets it the other way round.",
        "copies",
    )
    sequence_parallel: Bool = key(
        False, "Megatron sequence parallelism: norms and dropout hold 1/tensor of the sequence."
    )
    timeout_s: Positive = key(120.0, "A collective that takes longer fails.", "seconds")


class PipelineConfig(ConfigModel):
    """How the model is cut into stages and in what order stages work."""

    schedule: ScheduleName = key(
        "1f1b",
        "Order of forwards and backwards: a schedule by name, file (that of schedule_file), or auto (the fastest that "
        "fits, by measured costs). pipedream and pipedream_2bw change the mathematics; under pipedream also the steps "
        "before which the pipeline is drained, to evaluate (training.eval_interval) and save "
        "(checkpoint.save_interval), change the result.",
    )
    schedule_file: Text | None = key(None, "Text file with the actions of each rank; only with schedule file.")
    virtual_stages: Auto[Count] = key(
        "auto",
        "Stages per pipeline rank. auto: 2 for V-shaped schedules, as many as schedule_file has, what schedule auto "
        "finds best, else 1.",
        "stages",
    )
    partition: Annotated[
        Partition | tuple[int, ...], BeforeValidator(_partition), WithJsonSchema(_partition_schema())
    ] = key(
        "cost",
        "How layers are dealt to stages: by their FLOPs (cost), uniformly, by parameters, by measured cost (auto; so, too, "
        "by default where schedule is auto), or a list with the layers of each stage in the order of the model.",
        "layers",
    )
    optimizer_sync: Literal["step", "postvalidate"] = key(
        "step",
        "When the optimizer steps: after the global norm is known (step), or before, rolled back where the norm proves "
        "it wrong (postvalidate); same results.",
    )
    memory_limit_bytes: Count | None = key(
        None, "Most that the predicted state and activations of a rank may take; null: no limit.", "bytes"
    )


class ActivationCheckpointingConfig(ConfigModel):
    """Recompute of activations in backward."""

    recompute: Literal["none", "selective", "full"] = key(
        "none", "What backward computes again: nothing, attention's core only (selective), or whole blocks (full)."
    )
