"""Every op against its reference in float64: at most twice plain torch's error in the same dtype, gradients three times.

`plain` is what a torch user would write. Where an op is torch's own function the two errors are equal; the bound is there
for the kernels that take its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trilith.errors import KernelError
from trilith.kernels import mask, ops, reference, stream
from trilith.kernels.ops import cross_entropy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY = (7, 2**31 + 9)


@dataclass(frozen=True)
class Op:
    """An op with its reference, plain torch's way, and the shapes of its inputs at odd sizes.

    `tables` inputs (fp32 at least, without gradient) come last.
    """

    name: str
    ours: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    tables: int = 0


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def ids(x: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=x.device) + 2**32 - 1


def places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def our_dropout(x: Tensor) -> Tensor:
    return ops.dropout(x, 0.3, KEY, ids(x, x.shape[0]), places(x), (3, 3 + x.shape[2]))


def true_dropout(x: Tensor) -> Tensor:
    return reference.dropout(x, 0.3, KEY, ids(x, x.shape[0]), places(x), (3, 3 + x.shape[2]))


def plain_dropout(x: Tensor) -> Tensor:
    keep = stream.dropout_keep(KEY, ids(x, x.shape[0]), places(x), (3, 3 + x.shape[2]), 0.3)
    return x * keep * stream.keep_scale(0.3)


def plain_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full_like(scores, float("-inf")).triu(1)
    return scores


def plain_attention(kv_index: tuple[int, ...], causal: bool, p: float) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :, list(kv_index)], v[:, :, list(kv_index)]
        weights = F.softmax(plain_scores(q, k, causal), dim=-1)
        if p > 0.0:
            heads = (5, 5 + q.shape[2])
            keep = stream.attention_keep(KEY, ids(q, q.shape[0]), heads, places(q), (0, k.shape[1]), p)
            weights = weights * keep * stream.keep_scale(p)
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    return run


def attention_op(name: str, kv_index: tuple[int, ...], causal: bool, p: float) -> Op:
    """Attention of len(kv_index) query heads, at sequence lengths 1, 7 and 33."""

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = (5, 5 + q.shape[2])
            return function(
                q,
                k,
                v,
                mask=mask.CAUSAL if causal else mask.FULL,
                kv_index=kv_index,
                dropout_p=p,
                key=KEY,
                sample_ids=ids(q, q.shape[0]),
                head_range=heads,
            )

        return run

    heads, kv_heads = len(kv_index), max(kv_index) + 1
    shapes = tuple(
        ((b, s, heads, d), (b, s, kv_heads, d), (b, s, kv_heads, d)) for b, s, d in ((1, 1, 4), (3, 7, 5), (2, 33, 16))
    )
    return Op(name, call(ops.attention), call(reference.attention), plain_attention(kv_index, causal, p), shapes)


def rows(*extra: Callable[[int], tuple[int, ...]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Shapes of x and of further inputs that depend on its last dim."""
    leading = ((1, 1, 1), (3, 5, 7), (2, 9, 130), (1, 3, 1031))
    return tuple((shape, *(make(shape[-1]) for make in extra)) for shape in leading)


OPS = (
    Op("linear", ops.linear, reference.linear, F.linear, rows(lambda h: (2 * h + 1, h), lambda h: (2 * h + 1,))),
    Op("linear_without_bias", ops.linear, reference.linear, F.linear, rows(lambda h: (3, h))),
    Op(
        "layer_norm",
        lambda x, w, b: ops.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: reference.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5),
        rows(lambda h: (h,), lambda h: (h,)),
    ),
    Op(
        "layer_norm_without_bias",
        lambda x, w: ops.layer_norm(x, w, None, 1e-5),
        lambda x, w: reference.layer_norm(x, w, None, 1e-5),
        lambda x, w: F.layer_norm(x, w.shape, w, None, 1e-5),
        rows(lambda h: (h,)),
    ),
    Op(
        "rms_norm",
        lambda x, w: ops.rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
        rows(lambda h: (h,)),
    ),
    Op("gelu", lambda x: ops.gelu(x, "gelu"), lambda x: reference.gelu(x, "gelu"), F.gelu, rows()),
    Op(
        "gelu_tanh",
        lambda x: ops.gelu(x, "gelu_tanh"),
        lambda x: reference.gelu(x, "gelu_tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        rows(),
    ),
    Op(
        "swiglu",
        ops.swiglu,
        reference.swiglu,
        lambda g, u: F.silu(g) * u,
        tuple((s[0], s[0]) for s in rows()),
    ),
    Op(
        "rotary",
        ops.rotary,
        reference.rotary,
        plain_rotary,
        tuple(((b, s, n, d), (s, d // 2), (s, d // 2)) for b, s, n, d in ((1, 1, 1, 2), (2, 7, 3, 6), (1, 5, 2, 64))),
        tables=2,
    ),
    Op("dropout", our_dropout, true_dropout, plain_dropout, rows()),
    attention_op("attention", (0, 1, 2), True, 0.0),
    attention_op("attention_full", (0, 1, 2), False, 0.0),
    attention_op("attention_grouped", (0, 0, 1, 1), True, 0.0),
    attention_op("attention_irregular", (0, 1, 1), True, 0.0),
    attention_op("attention_one_kv_head", (0, 0, 0), True, 0.0),
    attention_op("attention_dropout", (0, 1, 1), True, 0.2),
    attention_op("attention_full_dropout", (0, 0, 1, 1), False, 0.2),
)


def draw(op: Op, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs in `dtype`; the tables in fp32 at least."""
    generator = torch.Generator().manual_seed(sum(map(len, shapes)))
    table = torch.float64 if dtype == torch.float64 else torch.float32
    first_table = len(shapes) - op.tables
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, table if i >= first_table else dtype)
        for i, shape in enumerate(shapes)
    ]


def strided(x: Tensor) -> Tensor:
    """The same values, not contiguous: every second column of a wider tensor, batch and next dim swapped in memory."""
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide.transpose(0, -2).contiguous().transpose(0, -2)[..., 1::2] if x.dim() > 1 else wide[1::2]


def evaluate(run: Callable[..., Tensor], inputs: list[Tensor], tables: int) -> list[Tensor]:
    """The output and the gradients of all inputs but the tables, for a fixed output gradient."""
    leaves = [x.detach().requires_grad_(i < len(inputs) - tables) for i, x in enumerate(inputs)]
    output = run(*leaves)
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
    # Exact in each dtype, so that the truth has the same output gradient.
    gradients = torch.autograd.grad(
        output, [x for x in leaves if x.requires_grad], gradient.bfloat16().half().to(output.dtype)
    )
    return [output.detach(), *gradients]


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max()) if truth.numel() else 0.0


def check_accuracy(op: Op, inputs: list[Tensor]) -> None:
    dtype = inputs[0].dtype
    truths = evaluate(op.truth, [x.double() for x in inputs], op.tables)
    plains = evaluate(op.plain, inputs, op.tables)
    ours = evaluate(op.ours, inputs, op.tables)
    for i, (value, plain, truth) in enumerate(zip(ours, plains, truths, strict=True)):
        assert value.dtype == dtype and value.shape == truth.shape
        # Plain torch may hit the truth by luck: one unit in the last place is always allowed. In float64 the truth is
        # itself only as good as the order of its sums. Their terms are of order one also where little is left of them, or
        # nothing: the gradient of the only score of a softmax.
        roundings = 64.0 if dtype == torch.float64 else 1.0
        size = float(truth.abs().max())
        size = max(1.0, size) if dtype == torch.float64 or size == 0.0 else size
        floor = roundings * torch.finfo(dtype).eps * size
        # On a GPU the op is torch's own fused one, beside torch's chain of ops.
        limit = max((3 if i or value.is_cuda else 2) * error(plain, truth), floor)
        what = f"gradient {i - 1}" if i else "output"
        assert error(value, truth) <= limit, f"{op.name} {what}: {error(value, truth):.3g} > {limit:.3g}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_accuracy(op: Op, dtype: torch.dtype, device: str) -> None:
    for shapes in op.shapes:
        inputs = draw(op, shapes, dtype, device)
        check_accuracy(op, inputs)
        check_accuracy(op, [strided(x) for x in inputs])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_reference_is_plain_torch(op: Op, dtype: torch.dtype, device: str) -> None:
    """The truth itself, against what torch's users write."""
    inputs = draw(op, op.shapes[1], dtype, device)
    tolerance = 64 * torch.finfo(dtype).eps
    for ours, plain in zip(evaluate(op.truth, inputs, op.tables), evaluate(op.plain, inputs, op.tables), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_gradcheck(op: Op) -> None:
    """Autograd against finite differences, in float64; twice where our own Function differentiates itself."""
    inputs = draw(op, op.shapes[1], torch.float64, "cpu")
    leaves = [x.requires_grad_(i < len(inputs) - op.tables) for i, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(op.ours, leaves, fast_mode=True)
    if op.name in ("rotary", "dropout"):
        assert torch.autograd.gradgradcheck(op.ours, leaves, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-7, 3e4])
@pytest.mark.parametrize("op", [op for op in OPS if "linear" not in op.name], ids=lambda op: op.name)
def test_extremes(op: Op, size: float, dtype: torch.dtype, device: str) -> None:
    """All zero, tiny and near the end of fp16: finite wherever the truth is, and no worse than the truth allows."""
    inputs = [x.clamp(-2, 2) * (size if i == 0 else 1.0) for i, x in enumerate(draw(op, op.shapes[1], dtype, device))]
    truths = evaluate(op.truth, [x.double() for x in inputs], op.tables)
    ours = evaluate(op.ours, inputs, op.tables)
    for value, truth in zip(ours, truths, strict=True):
        representable = truth.abs() < torch.finfo(dtype).max
        assert value[representable].isfinite().all()
    bound = 0.02 * float(truths[0].abs().max()) + torch.finfo(dtype).tiny
    if torch.finfo(dtype).max > 2 * float(truths[0].abs().max()):
        assert error(ours[0], truths[0]) <= bound


def test_gelu_refuses_other_kinds() -> None:
    for gelu in (ops.gelu, reference.gelu):
        with pytest.raises(KernelError, match="'quick'"):
            gelu(torch.ones(2), "quick")


@pytest.mark.parametrize("device", DEVICES)
def test_rotary_turns_pairs_by_their_angle(device: str) -> None:
    """As complex numbers x_i + 1j x_(i + D/2) times exp(1j angle); the length stays, and a turn back gives x again."""
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, device=device)
    angles = torch.randn(5, 4, dtype=torch.float64, device=device)
    turned = ops.rotary(x, angles.cos(), angles.sin())
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))
    torch.testing.assert_close(ops.rotary(turned, angles.cos(), -angles.sin()), x)
    with pytest.raises(KernelError, match="head dim 6"):
        ops.rotary(x[..., :6], angles.cos(), angles.sin())


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_keeps_the_expectation(dtype: torch.dtype, device: str) -> None:
    x = torch.ones(16, 128, 256, dtype=dtype, device=device)
    samples, positions = torch.arange(16, device=device), torch.arange(128, device=device)
    for p in (0.1, 0.5):
        y = ops.dropout(x, p, KEY, samples, positions, (0, 256))
        scale = torch.tensor(stream.keep_scale(p), dtype=torch.float64).to(dtype)
        assert set(y.unique().tolist()) == {0.0, float(scale)}
        mean = float(y.double().mean()) / float(scale) * stream.keep_scale(p)
        assert abs(mean - 1.0) < 5 * (p / (1 - p) / x.numel()) ** 0.5


def test_dropout_off_is_the_identity() -> None:
    x, samples, positions = torch.randn(2, 3, 4), torch.arange(2), torch.arange(3)
    assert ops.dropout(x, 0.0, KEY, samples, positions, (0, 4)) is x
    assert ops.dropout(x, 0.5, KEY, samples, positions, (0, 4), training=False) is x
    with pytest.raises(KernelError, match="dropout probability"):
        ops.dropout(x, 1.0, KEY, samples, positions, (0, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_does_not_know_the_layout(device: str) -> None:
    """Batch, sequence, features and heads dealt to ranks: each part equals the part of the whole, bit for bit."""
    x = torch.randn(4, 6, 20, device=device)
    samples, positions = torch.arange(4, device=device) + 9, torch.arange(6, device=device)
    full = ops.dropout(x, 0.4, KEY, samples, positions, (0, 20))
    part = ops.dropout(x[1:3, 2:, 5:], 0.4, KEY, samples[1:3], positions[2:], (5, 20))
    assert torch.equal(part, full[1:3, 2:, 5:])
    q, k, v = (torch.randn(4, 6, heads, 8, dtype=torch.float64, device=device) for heads in (6, 2, 2))
    settings = {"dropout_p": 0.4, "key": KEY}
    everything = ops.attention(q, k, v, sample_ids=samples, **settings)
    some = ops.attention(
        q[1:3, :, 2:5], k[1:3], v[1:3], kv_index=(0, 1, 1), sample_ids=samples[1:3], head_range=(2, 5), **settings
    )
    torch.testing.assert_close(some, everything[1:3, :, 2:5], rtol=1e-13, atol=1e-14)


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_attention_layout_and_causality(device: str) -> None:
    """(B, S, N, D) comes out; a later key or value changes no earlier row."""
    q, k, v = (torch.randn(2, 9, heads, 4, dtype=torch.float64, device=device) for heads in (4, 2, 2))
    for p in (0.0, 0.3):
        settings = {"dropout_p": p, "key": KEY, "sample_ids": torch.arange(2, device=device)}
        before = ops.attention(q, k, v, **settings)
        assert before.shape == q.shape
        late_k, late_v = k.clone(), v.clone()
        late_k[:, 5:], late_v[:, 5:] = 100.0, -3.0
        after = ops.attention(q, late_k, late_v, **settings)
        assert torch.equal(after[:, :5], before[:, :5]) and not torch.equal(after[:, 5:], before[:, 5:])


def test_attention_over_other_keys() -> None:
    """Without a causal mask queries and keys may differ in number."""
    q, k = torch.randn(1, 3, 2, 4, dtype=torch.float64), torch.randn(1, 7, 2, 4, dtype=torch.float64)
    expected = reference.attention(q, k, k, kv_index=(0, 1), mask=mask.FULL)
    torch.testing.assert_close(ops.attention(q, k, k, mask=mask.FULL), expected)


def test_attention_refuses_what_does_not_fit() -> None:
    q, k = torch.randn(1, 3, 3, 4), torch.randn(1, 3, 2, 4)
    with pytest.raises(KernelError, match="need a kv_index"):
        ops.attention(q, k, k)
    with pytest.raises(KernelError, match="2 entries for 3"):
        ops.attention(q, k, k, kv_index=(0, 1))
    with pytest.raises(KernelError, match="2 queries and 3 keys"):
        ops.attention(q[:, :2], k, k, kv_index=(0, 1, 1))
    with pytest.raises(KernelError, match="sample ids"):
        ops.attention(q, k, k, kv_index=(0, 1, 1), dropout_p=0.1)


# --- cross-entropy over a split vocabulary ------------------------------------------------------------------------


def split_cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Losses and logit gradient as `degree` ranks make them, with sums in the place of collectives."""
    vocab = logits.shape[-1]
    rows = -(-vocab // degree)
    shards = [(r * rows, min(max(vocab - r * rows, 0), rows)) for r in range(degree)]
    padding = logits.new_full((*logits.shape[:-1], rows * degree - vocab), 77.0)
    parts = torch.cat((logits, padding), dim=-1).split(rows, dim=-1)
    pieces = [(part, *shard) for part, shard in zip(parts, shards, strict=True)]
    largest = torch.stack([ops.local_logit_max(part, valid) for part, _, valid in pieces]).amax(dim=0)
    terms = [ops.cross_entropy_terms(part, labels, largest, first, valid) for part, first, valid in pieces]
    total, target = (torch.stack(values).sum(dim=0) for values in zip(*terms, strict=True))
    gradients = []
    for part, first, valid in pieces:
        gradient = ops.cross_entropy_gradient(part, labels, largest, total, scale, first, valid)
        truth = reference.local_logit_gradient(part, labels, largest, total, scale, first, valid)
        torch.testing.assert_close(gradient, truth)
        assert not gradient[..., valid:].any()
        own = part.clone(memory_format=torch.contiguous_format)
        assert ops.cross_entropy_gradient(own, labels, largest, total, scale, first, valid, out=own) is own
        assert torch.equal(own, gradient)
        gradients.append(gradient)
    return total.log() - target, torch.cat(gradients, dim=-1)[..., :vocab]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_cross_entropy(
    size: float, degree: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with padding, with a rank that holds no label (vocabulary 6 on 5 ranks), and cut into small pieces.

    Degree 0 stands for the functions of a whole vocabulary.
    """
    generator = torch.Generator().manual_seed(degree)
    for vocab, piece in ((37, None), (6, None), (1031, None), (37, 50)):
        if piece is not None:
            monkeypatch.setattr(cross_entropy, "_CPU_PIECE", piece)
            monkeypatch.setattr(cross_entropy, "_GPU_PIECE", piece)
        logits = (torch.randn(3, 5, vocab, generator=generator, dtype=torch.float64) * size).to(device, dtype)
        labels = torch.randint(vocab, (3, 5), generator=generator).to(device)
        scale = torch.rand(3, 5, generator=generator, dtype=torch.float64).to(device)
        scale = scale.to(reference.accumulation_dtype(dtype))

        def plain(x: Tensor, labels: Tensor = labels, scale: Tensor = scale) -> tuple[Tensor, Tensor]:
            leaf = x.detach().requires_grad_()
            losses = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
            return losses.detach(), torch.autograd.grad(losses, leaf, scale.to(losses.dtype))[0]

        truths, plains = plain(logits.double()), plain(logits)
        if degree == 0:
            losses, kept = ops.token_losses(logits, labels)
            ours = losses, ops.token_loss_gradient(logits, labels, scale, kept)
        else:
            ours = split_cross_entropy(logits, labels, scale, degree)
        assert ours[0].dtype == scale.dtype and ours[1].dtype == dtype
        for value, other, truth, factor in zip(ours, plains, truths, (2, 3), strict=True):
            roundings = 64.0 if dtype == torch.float64 else 1.0
            floor = roundings * torch.finfo(dtype).eps * float(truth.abs().max())
            assert error(value, truth) <= max(factor * error(other, truth), floor)


def test_a_label_outside_of_a_whole_vocabulary_has_no_loss() -> None:
    logits, labels = torch.randn(3, 7, dtype=torch.float64), torch.tensor([7, -100, 2])
    losses, kept = ops.token_losses(logits, labels)
    assert losses[0] == losses[1] == 0.0 and losses[2] > 0.0
    gradient = ops.token_loss_gradient(logits, labels, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), kept)
    assert not gradient[:2].any() and gradient[2, 2] < 0.0


def test_cross_entropy_pieces_equal_the_reference() -> None:
    logits, labels = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 11, 15, 4])
    largest = reference.local_logit_max(logits, 7)
    total, target = ops.cross_entropy_terms(logits, labels, largest, 9, 7)
    torch.testing.assert_close(total, reference.local_sum_exp(logits, largest, 7))
    assert torch.equal(target, reference.local_target_logit(logits, labels, largest, 9, 7))
    assert target[1] == logits[1, 2] - largest[1] and target[0] == target[3] == 0.0
    assert torch.equal(reference.local_logit_max(logits, 0), torch.full((4,), float("-inf"), dtype=torch.float64))
