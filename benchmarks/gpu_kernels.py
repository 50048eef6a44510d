"""The CUDA kernels beside a copy of as many bytes on the same device, and beside torch's own ops.

`python -m benchmarks.gpu_kernels [--json FILE]`, on a machine with a CUDA device. Every case moves at least 256 MiB. A
"copy" moves what the op must: each input read once, each result written once. Results are compared with torch's first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Benchmark, arguments
from trilith.kernels import library, ops
from trilith.kernels.ops import optimizer

FUSED = "fused"
DTYPE = torch.bfloat16
BETAS, EPS, DECAY, LR = (0.9, 0.95), 1e-8, 0.1, 1e-3


def device_timed(action: Callable[[], Any]) -> float:
    """Seconds between two events around several calls, so that launches are under way before the first has ended."""
    calls = 5
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        action()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def copy_of(num_bytes: int) -> Callable[[], Tensor]:
    """A copy that reads and writes half of the bytes each."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Cases:
    """Adds rows to a benchmark."""

    def __init__(self, benchmark: Benchmark, rounds: int) -> None:
        self._benchmark, self._rounds = benchmark, rounds

    def beside_copy(self, case: str, ours: Callable[[], Any], num_bytes: int, share: float) -> None:
        """`share` of a copy's rate is wanted."""
        assert num_bytes >= 1 << 28, (case, num_bytes)
        peer = f"copy of {num_bytes >> 20} MiB"
        self.beside(case, ours, copy_of(num_bytes), peer, 1.0 / share)

    def beside(
        self, case: str, ours: Callable[[], Any], peer: Callable[[], Any], name: str, goal: float | None
    ) -> None:
        """Add a comparison."""
        about: dict[str, Any] = {"peer_name": name, "goal": goal, "rounds": self._rounds, "timed": device_timed}
        self._benchmark.compare(case, ours, peer, **about)


def same(ours: Tensor, theirs: Tensor, tolerance: float = 2e-2) -> None:
    """Both, to rounding in bf16."""
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-12)
    assert float(error) < tolerance, f"results differ: {float(error)}"


def gradients_of(y: Tensor, leaves: list[Tensor], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A backward that may run again and again."""
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def norms(cases: Cases) -> None:
    """Forward and backward alone: gradients are asked for by the native op's own function."""
    for rows, width in ((16384, 4096), (8192, 8192), (32768, 1024)):
        x, dy = (torch.randn(rows, width, device="cuda", dtype=DTYPE) for _ in range(2))
        weight, bias = (torch.randn(width, device="cuda", dtype=DTYPE) for _ in range(2))
        size = x.numel() * x.element_size()
        natives: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
            "layer_norm": (
                lambda x, w, b: ops.layer_norm(x, w, b, 1e-5, FUSED),
                lambda x, w, b: functional.layer_norm(x, w.shape, w, b),
                [x, weight, bias],
            ),
            "rms_norm": (
                lambda x, w: ops.rms_norm(x, w, 1e-5, FUSED),
                lambda x, w: functional.rms_norm(x, w.shape, w, 1e-5),
                [x, weight],
            ),
        }
        for name, (native, plain, inputs) in natives.items():
            runs = []
            for run in (native, plain):
                leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                y = run(*leaves)
                runs.append((y, gradients_of(y, leaves, dy)))
            same(runs[0][0], runs[1][0])
            for one, two in zip(runs[0][1](), runs[1][1](), strict=True):
                same(one, two)
            shape = f"{rows} x {width}"
            with torch.no_grad():
                cases.beside_copy(f"{name} forward {shape}", lambda n=native, i=inputs: n(*i), 2 * size, 0.95)
                cases.beside(
                    f"{name} forward {shape}",
                    lambda n=native, i=inputs: n(*i),
                    lambda p=plain, i=inputs: p(*i),
                    "torch",
                    None,
                )
            cases.beside_copy(f"{name} backward {shape}", runs[0][1], 3 * size, 0.92)
            cases.beside(f"{name} backward {shape}", runs[0][1], runs[1][1], "torch", 1 / 2.1)


def losses(cases: Cases) -> None:
    """Loss and gradient in one pass; fused with the last product."""
    tokens, vocab = 8192, 131072
    logits = torch.randn(tokens, vocab, device="cuda", dtype=DTYPE)
    labels = torch.randint(vocab, (tokens,), device="cuda")
    scale = torch.full((tokens,), 1.0 / tokens, device="cuda")
    losses = torch.empty(tokens, device="cuda")

    def fused(table: Tensor) -> None:
        where = (table.data_ptr(), vocab, labels.data_ptr(), 0, vocab, vocab, len(table), 0.0)
        library.run("cross_entropy_fused", table, library.DTYPES[DTYPE], *where, scale.data_ptr(), losses.data_ptr())

    few = logits[:256].clone()
    fused(few)
    leaf = logits[:256].float().requires_grad_()
    functional.cross_entropy(leaf, labels[:256], reduction="sum").backward()
    assert leaf.grad is not None
    same(few, leaf.grad / tokens)
    # From the second call on gradients lie where logits were: the time is the same.
    name, num_bytes = f"cross-entropy, loss and gradient {tokens} x {vocab}", 2 * logits.numel() * 2
    cases.beside_copy(name, partial(fused, logits), num_bytes, 1 / 1.4)
    logits = logits[:1]
    hidden = 4096
    x = torch.randn(tokens, hidden, device="cuda", dtype=DTYPE, requires_grad=True)
    weight = torch.randn(vocab, hidden, device="cuda", dtype=DTYPE).mul_(hidden**-0.5).requires_grad_()
    held = torch.empty(tokens, vocab, device="cuda", dtype=DTYPE)

    def ours() -> None:
        total, _ = ops.linear_cross_entropy(x, weight, labels, backend=FUSED)
        torch.autograd.grad(total, (x, weight))

    def products() -> None:
        with torch.no_grad():
            torch.mm(x, weight.t(), out=held)
            torch.mm(held, weight)
            torch.mm(held.t(), x)

    cases.beside(
        f"linear + cross-entropy, hidden {hidden}, vocabulary {vocab}", ours, products, "its three products", 1.1
    )


def pointwise(cases: Cases) -> None:
    """Activations, gated units and rotary embedding."""
    rows, width = 16384, 8192
    x, dy = (torch.randn(rows, width, device="cuda", dtype=DTYPE) for _ in range(2))
    gate_up = torch.randn(rows, 2 * width, device="cuda", dtype=DTYPE)
    size = x.numel() * x.element_size()
    bias = torch.randn(width, device="cuda", dtype=DTYPE)
    same(ops.gelu(x, "gelu_tanh", FUSED), functional.gelu(x, approximate="tanh"))
    gate, up = gate_up.chunk(2, -1)
    same(ops.swiglu_packed(gate_up, FUSED), functional.silu(gate) * up)
    with torch.no_grad():
        for kind in ("gelu_tanh", "gelu"):
            cases.beside_copy(f"bias + {kind} forward", lambda k=kind: ops.bias_gelu(x, bias, k, FUSED), 2 * size, 0.9)
        cases.beside_copy("swiglu forward, packed", lambda: ops.swiglu_packed(gate_up, FUSED), 3 * size, 0.9)
    for name, run, inputs, passes in (
        ("bias + gelu_tanh", lambda x, b: ops.bias_gelu(x, b, "gelu_tanh", FUSED), [x, bias], 3),
        ("swiglu", lambda g: ops.swiglu_packed(g, FUSED), [gate_up], 5),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = run(*leaves)
        cases.beside_copy(
            f"{name} backward",
            gradients_of(y, leaves, dy),
            passes * size,
            0.9,
        )
    batch, length, heads, head_dim = 4, 8192, 48, 128
    qkv = torch.randn(batch, length, heads * head_dim, device="cuda", dtype=DTYPE)
    angles = torch.randn(length, head_dim // 2, device="cuda")
    turned = 2 * heads // 3
    with torch.no_grad():
        cases.beside_copy(
            "rotary in place, packed",
            lambda: ops.rotary_packed(qkv, turned, head_dim, angles.cos(), angles.sin(), backend=FUSED),
            2 * batch * length * turned * head_dim * 2,
            0.9,
        )


def updates(cases: Cases) -> None:
    """Norm, clip and AdamW with a bf16 copy of the weights."""
    numel = 1 << 28
    parameter, gradient = (torch.randn(numel, device="cuda") for _ in range(2))
    first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
    weight = torch.empty(numel, device="cuda", dtype=DTYPE)
    multipliers = torch.ones(1, 2, dtype=torch.float64)
    slices = optimizer.Slices([parameter], [gradient], ([first], [second]), [weight], multipliers)
    theirs = nn.Parameter(parameter.clone())
    theirs.grad = gradient
    plain = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    steps = 0

    def ours() -> None:
        nonlocal steps
        steps += 1
        clipping = optimizer.Clipping(optimizer.sum_of_squares([gradient]), loss_scale=1.0, max_norm=1.0)
        step = optimizer.step_values(LR, grad_scale=clipping, step=steps, betas=BETAS)
        optimizer.adam(slices, step, *BETAS, EPS, DECAY)

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        plain.step()
        with torch.no_grad():
            weight.copy_(theirs)

    ours()
    kept = gradient.clone()
    torchs()
    gradient.copy_(kept)
    same(parameter, theirs.detach(), 1e-5)
    cases.beside_copy(f"clip + AdamW + bf16 copy, {numel >> 20} M", ours, 34 * numel, 0.9)
    cases.beside(f"clip + AdamW + bf16 copy, {numel >> 20} M", ours, torchs, "torch", 1 / 1.35)


def main() -> int:
    """Measure everything on the current device."""
    options = arguments(__doc__ or "")
    if not torch.cuda.is_available() or library.cuda_refusal(0):
        print(f"nothing measured: {library.cuda_refusal(0) if torch.cuda.is_available() else 'no CUDA device'}")
        return 0
    benchmark = Benchmark("gpu_kernels")
    cases = Cases(benchmark, options.rounds)
    for family in (norms, pointwise, updates, losses):
        family(cases)
        torch.cuda.empty_cache()
    benchmark.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
