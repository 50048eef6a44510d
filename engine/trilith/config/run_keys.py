"""Keys of the sections `training`, `checkpoint`, `run`, `tensorboard` and `csv_monitor`."""

from __future__ import annotations

from typing import Literal

from trilith.config.base import Auto, Bool, ConfigModel, Count, CountOrZero, NotNegative, Positive, Str, Text, key


class TrainingConfig(ConfigModel):
    """Length and rhythm of the run."""

    steps: CountOrZero = key(0, "Optimizer steps; a run needs at least 1.", "steps")
    seed: CountOrZero = key(1234, "Seed of initial weights, dropout and, by default, sample order.")
    z_loss: NotNegative = key(
        0.0,
        "So many times ln(sum of exp(logits))^2 is added to each token's loss in training, also in the loss that is shown; "
        "1e-4 keeps logits from drifting (PaLM).",
    )
    eval_interval: CountOrZero = key(0, "Evaluate every so many steps; 0: never.", "steps")
    eval_batches: Count = key(8, "Evaluation batches averaged in one evaluation.", "batches")
    eval_batch_size: Auto[Count] = key(
        "auto", "Samples of one evaluation batch over all ranks. auto: train_batch_size.", "samples"
    )
    generate_tokens: CountOrZero = key(0, "Length of the sample generated at the end of the run; 0: none.", "tokens")
    generate_prompt: Str = key("def ", "Text that the generated sample continues.")
    log_interval: Auto[Count] = key("auto", "Progress line every so many steps. auto: steps_per_print.", "steps")


class CheckpointConfig(ConfigModel):
    """When state is saved, where, and whether a run continues from it."""

    save_interval: CountOrZero | None = key(
        0, "Save every so many steps, and at the end; 0: only at the end; null: never.", "steps"
    )
    directory: Auto[Text] = key("auto", "Where checkpoints lie. auto: run.directory/checkpoints.")
    resume: Literal["never", "auto", "must"] = key(
        "never", "Continue from the newest checkpoint: never, if there is one (auto), or fail without one (must)."
    )
    keep_last: Count = key(2, "Newest checkpoints that are kept.", "checkpoints")


class RunConfig(ConfigModel):
    """Where the run writes and what it runs on."""

    directory: Text = key("runs/default", "Directory of everything that the run writes.")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "Device of every rank; auto: cuda where there is one.")
    threads: Auto[Count] = key(
        "auto", "Threads of one rank. auto: cores of the machine / ranks on it, at least 1.", "threads"
    )
    shared_memory: Bool = key(
        True,
        "Ranks of one machine exchange CPU tensors through shared memory where the system lets them; false: by gloo.",
    )
    nvtx: Bool = key(False, "Mark every action of the schedule as an NVTX range, for Nsight Systems; needs CUDA.")
    peak_flops: Positive | None = key(
        None, "Peak of one rank, from which MFU is computed; null: MFU is not shown.", "FLOP/s"
    )


KernelName = Literal["auto", "fused", "torch", "reference"]


class KernelsConfig(ConfigModel):
    """Which implementation of the ops runs. All give the same results to rounding."""

    backend: KernelName = key(
        "auto",
        "All ops without a key of their own. auto: the native kernel where it was built and takes the tensors, else "
        "torch's op; fused: the native kernel or an error; torch: torch's op; reference: plain torch, as ops are defined.",
    )
    norm: KernelName | None = key(None, "LayerNorm and RMSNorm, with the residual's sum. null: kernels.backend.")
    activation: KernelName | None = key(None, "GELU and SwiGLU. null: kernels.backend.")
    rotary: KernelName | None = key(None, "Rotary positions. null: kernels.backend.")
    attention: KernelName | Literal["sdpa"] | None = key(
        None,
        "Attention; sdpa is torch's scaled_dot_product_attention, as torch. On a GPU auto times the native kernel and sdpa "
        "once for a class of shapes, and remembers which is faster. null: kernels.backend.",
    )
    dropout: KernelName | None = key(None, "Dropout of the residual stream. null: kernels.backend.")
    cross_entropy: KernelName | None = key(None, "The loss. null: kernels.backend.")
    optimizer: KernelName | None = key(None, "The optimizer's update and the gradient norm. null: kernels.backend.")
    fused_loss: Bool = key(
        False,
        "The last product and the loss as one op, in chunks of tokens: logits never exist whole, and the gradients are "
        "made in forward. Not where the weight's gradient is put off (schedules that split the backward).",
    )


class CompileConfig(ConfigModel):
    """torch.compile of the blocks of a built-in model."""

    enabled: Bool = key(
        False,
        "Compile every block's forward and backward as one graph. Not with tensor ranks, selective recompute, or schedules "
        "that split the backward.",
    )
    backend: Str = key("inductor", "Backend of torch.compile.")
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = key(
        "default", "Mode of torch.compile."
    )


class TensorBoardConfig(ConfigModel):
    """TensorBoard events."""

    enabled: Bool = key(False, "Write TensorBoard events.")
    output_path: Auto[Str] = key(
        "auto", 'Directory of the events. auto (or "", DeepSpeed\'s default): run.directory/tensorboard.'
    )
    job_name: Auto[Str] = key("auto", "Sub-directory of the events. auto: the last part of run.directory.")


class CsvMonitorConfig(ConfigModel):
    """Metrics as a CSV file, one row a step."""

    enabled: Bool = key(False, "Write CSV files.")
    output_path: Auto[Str] = key(
        "auto", 'Directory of the files. auto (or "", DeepSpeed\'s default): run.directory/csv.'
    )
    job_name: Auto[Str] = key("auto", "Sub-directory of the files. auto: the last part of run.directory.")
