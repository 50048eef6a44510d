"""The CUDA kernels: on the processor, whose emulator draws the order of threads anew each time, and on a GPU, if any.

Every width class of every kernel; error at most twice that of plain torch in the same dtype (gradients three times); the
same bits twice; random decisions and optimizers bit-equal to the processor's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.emulated import DTYPES_ON_CUDA, Device
from trilith.kernels import library, ops, reference
from trilith.kernels.ops import optimizer
from trilith.kernels.stream import dropout_keep, threshold

pytestmark = pytest.mark.skipif(library.CPU is None, reason=library.MISSING)
LOW = pytest.mark.parametrize("dtype", DTYPES_ON_CUDA, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


Run = Callable[..., Tensor | tuple[Tensor, ...]]


def results(run: Run, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of `run` on leaves, then their gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(outs, leaves, [u.to(o) for u, o in zip(upstream, outs, strict=True)])
    return [*(o.detach() for o in outs), *gradients]


def check(device: Device, native: Run, plain: Run, inputs: Sequence[Tensor], num_outputs: int = 1) -> None:
    """`native` on the device beside `plain` torch on the processor, both against `plain` in fp64; and the same twice."""
    shapes = plain(*inputs)
    outs = shapes if isinstance(shapes, tuple) else (shapes,)
    upstream = [random(*o.shape, dtype=inputs[0].dtype, seed=7 + i) for i, o in enumerate(outs)]
    here = [device.put(x) for x in inputs], [device.put(u) for u in upstream]
    found, again = results(native, *here), results(native, *here)
    for one, two in zip(found, again, strict=True):
        assert torch.equal(one, two), "other bits the second time: a race"
    theirs = results(plain, inputs, upstream)
    truths = results(plain, [x.double() for x in inputs], [u.double() for u in upstream])
    for index, (mine, their, truth) in enumerate(zip(found, theirs, truths, strict=True)):
        assert mine.shape == truth.shape and mine.dtype == their.dtype
        most = truth.abs().max().item() if truth.numel() else 0.0
        unit = torch.finfo(mine.dtype).eps
        error, beside = ((x.cpu().double() - truth).abs().max().item() if x.numel() else 0.0 for x in (mine, their))
        assert error <= (2 if index < num_outputs else 3) * beside + unit * max(most, 1.0), (index, error, beside, most)


# --- norms ----------------------------------------------------------------------------------------------------------------

# A width of every plan of csrc/cuda/plan.h in each dtype, of rows that are looped over, and between.
WIDTHS = (1, 7, 8, 64, 72, 130, 256, 512, 1000, 1024, 2048, 4096, 8192, 8200)


@LOW
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms", "add layer", "add rms"])
def test_norms(kind: str, width: int, dtype: torch.dtype, device: Device) -> None:
    rows = 41 if width <= 256 else 7 if width <= 2048 else 2
    if kind != "add layer" and width not in (7, 64, 512, *((8192,) if kind == "rms" else ())):
        pytest.skip("every width in one kind, some in all: the emulator takes long")
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    weight, bias = random(width, dtype=dtype, seed=2), random(width, dtype=dtype, seed=3)
    backend, eps = device.backend, 1e-5
    cases: dict[str, tuple[Run, Run, list[Tensor]]] = {
        "layer": (
            lambda x, w, b: ops.layer_norm(x, w, b, eps, backend),
            lambda x, w, b: functional.layer_norm(x, w.shape, w, b, eps),
            [x, weight, bias],
        ),
        "layer without bias": (
            lambda x, w: ops.layer_norm(x, w, None, eps, backend),
            lambda x, w: functional.layer_norm(x, w.shape, w, None, eps),
            [x, weight],
        ),
        "rms": (
            lambda x, w: ops.rms_norm(x, w, eps, backend),
            lambda x, w: functional.rms_norm(x, w.shape, w, eps),
            [x, weight],
        ),
        "add layer": (
            lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, eps, backend),
            lambda x, r, w, b: (x + r, functional.layer_norm(x + r, w.shape, w, b, eps)),
            [x, residual, weight, bias],
        ),
        "add rms": (
            lambda x, r, w: ops.add_rms_norm(x, r, w, eps, backend),
            lambda x, r, w: (x + r, functional.rms_norm(x + r, w.shape, w, eps)),
            [x, residual, weight],
        ),
    }
    native, plain, inputs = cases[kind]
    check(device, native, plain, inputs, 2 if kind.startswith("add") else 1)


def test_norms_of_nothing_and_of_rows_that_begin_anywhere(device: Device) -> None:
    weight, bias = device.put(random(64)), device.put(random(64, seed=1))
    empty = device.put(torch.empty(0, 64)).requires_grad_()
    y = ops.layer_norm(empty, weight.requires_grad_(), bias, 1e-5, device.backend)
    y.sum().backward()
    assert y.shape == (0, 64) and weight.grad is not None and not weight.grad.any()
    shifted = device.put(random(1 + 5 * 64))[1:].view(5, 64)
    expected = functional.layer_norm(shifted, (64,), weight, bias)
    torch.testing.assert_close(ops.layer_norm(shifted, weight, bias, 1e-5, device.backend), expected)


# --- activations ----------------------------------------------------------------------------------------------------------


@LOW
@pytest.mark.parametrize("shape", [(5, 1), (3, 7), (33, 40), (70, 264)])
def test_activations(shape: tuple[int, int], dtype: torch.dtype, device: Device) -> None:
    backend = device.backend
    x, bias = random(*shape, dtype=dtype) * 3, random(shape[1], dtype=dtype, seed=1)
    gate_up = random(shape[0], 2 * shape[1], dtype=dtype, seed=2)
    x.view(-1)[:3] = torch.tensor([100.0, -100.0, 0.0])
    for kind in ("gelu", "gelu_tanh"):
        how = "tanh" if kind == "gelu_tanh" else "none"
        check(
            device,
            lambda x, kind=kind: ops.gelu(x, kind, backend),
            lambda x, how=how: functional.gelu(x, approximate=how),
            [x],
        )
        check(
            device,
            lambda x, b, kind=kind: ops.bias_gelu(x, b, kind, backend),
            lambda x, b, how=how: functional.gelu(x + b, approximate=how),
            [x, bias],
        )
        check(
            device,
            lambda g, kind=kind: ops.geglu_packed(g, kind, backend),
            lambda g, how=how: functional.gelu(g.chunk(2, -1)[0], approximate=how) * g.chunk(2, -1)[1],
            [gate_up],
        )
    check(
        device,
        lambda g: ops.swiglu_packed(g, backend),
        lambda g: functional.silu(g.chunk(2, -1)[0]) * g.chunk(2, -1)[1],
        [gate_up],
    )
    check(device, lambda g, u: ops.swiglu(g, u, backend), lambda g, u: functional.silu(g) * u, [x, x.flip(0)])


def test_a_gradient_that_is_owned_is_written_over(device: Device) -> None:
    x, bias = device.put(random(9, 24)).requires_grad_(), device.put(random(24, seed=1)).requires_grad_()
    plain = torch.autograd.grad(
        ops.bias_gelu(x, bias, "gelu", device.backend), (x, bias), device.put(random(9, 24, seed=2))
    )
    given = device.put(random(9, 24, seed=2))
    y = ops.bias_gelu(x, bias, "gelu", device.backend, owns_gradient=True)
    dx, dbias = torch.autograd.grad(y, (x, bias), given)
    assert torch.equal(dx, plain[0]) and torch.equal(dbias, plain[1]) and torch.equal(given, dx)


# --- dropout --------------------------------------------------------------------------------------------------------------


@LOW
@pytest.mark.parametrize(("width", "first"), [(40, 0), (40, 8), (64, 3), (7, 0), (36, 4)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_dropout(width: int, first: int, is_packed: bool, dtype: torch.dtype, device: Device) -> None:
    """Bit-equal to the definition, at positions of each sample's own, too."""
    key, p, batch, length = (123, 456), 0.3, 3, 5
    samples = torch.tensor([7, 1 << 33, 12])
    positions = torch.arange(length) if not is_packed else torch.arange(batch * length).view(batch, length).flip(1)
    x, residual = (random(batch, length, width, dtype=dtype, seed=i) for i in (0, 1))
    keep = dropout_keep(key, samples, positions, (first, first + width), p, "reference")
    factor = 65536 / (65536 - threshold(p))
    where = (device.put(samples), device.put(positions), (first, first + width))
    here, other = device.put(x).requires_grad_(), device.put(residual)
    y = ops.dropout(here, p, key, *where, backend=device.backend)
    expected = (x.float() * keep * torch.tensor(factor, dtype=torch.float32)).to(dtype)
    assert torch.equal(y.detach().cpu(), expected)
    (gradient,) = torch.autograd.grad(y, here, other)
    assert torch.equal(gradient.cpu(), (residual.float() * keep * torch.tensor(factor, dtype=torch.float32)).to(dtype))
    added = ops.dropout_add(here.detach(), other, p, key, *where, backend=device.backend)
    sum_ = (x.float() * keep * torch.tensor(factor, dtype=torch.float32) + residual.float()).to(dtype)
    assert torch.equal(added.cpu(), sum_)
    native = dropout_keep(key, device.put(samples), device.put(positions), (first, first + width), p, device.backend)
    assert torch.equal(native.cpu(), keep)


def test_dropout_with_a_bias(device: Device) -> None:
    key, p, samples, positions = (1, 2), 0.25, torch.arange(2), torch.arange(40)
    keep = dropout_keep(key, samples, positions, (0, 48), p, "reference")
    factor = 65536 / (65536 - threshold(p))

    def native(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        where = (device.put(samples), device.put(positions), (0, 48))
        return ops.dropout_add(x, residual, p, key, *where, bias=bias, backend=device.backend)

    def plain(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + (x + bias) * keep * factor

    check(device, native, plain, [random(2, 40, 48), random(48, seed=1), random(2, 40, 48, seed=2)])


# --- rotary ---------------------------------------------------------------------------------------------------------------


@LOW
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 16), (2, 6), (5, 64)])
def test_rotary(heads: int, head_dim: int, dtype: torch.dtype, device: Device) -> None:
    x = random(2, 9, heads * head_dim, dtype=dtype)
    angles = random(9, head_dim // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()

    def native(x: Tensor) -> Tensor:
        # The packed form changes its input in place: a copy of it.
        tables = device.put(cos), device.put(sin)
        return ops.rotary_packed(x.clone(), heads - 1, head_dim, *tables, backend=device.backend)

    def plain(x: Tensor) -> Tensor:
        split = x.unflatten(-1, (heads, head_dim))
        turned = reference.rotary(split[:, :, :-1], cos.to(split.dtype), sin.to(split.dtype))
        return torch.cat((turned, split[:, :, -1:]), 2).flatten(2)

    check(device, native, plain, [x])


# --- the loss -------------------------------------------------------------------------------------------------------------


@LOW
@pytest.mark.parametrize("vocab", [1, 3, 64, 1003, 9000])
def test_cross_entropy(vocab: int, dtype: torch.dtype, device: Device) -> None:
    tokens = 9 if vocab < 2000 else 3
    logits, labels = random(tokens, vocab, dtype=dtype) * 4, torch.arange(tokens) * 7 % vocab
    if vocab > 10:
        logits[0, 5:9], logits[1, 2] = -torch.inf, 60.0
    scale = torch.linspace(0.0, 1.0, tokens)
    truth = logits.double().requires_grad_()
    losses = functional.cross_entropy(truth, labels, reduction="none")
    losses.backward(scale.double())
    here = device.put(logits), device.put(labels)
    found, kept = ops.token_losses(*here, device.backend)
    torch.testing.assert_close(found.cpu().double(), losses.detach(), rtol=3e-6, atol=3e-6)
    gradient = ops.token_loss_gradient(*here, device.put(scale), kept, backend=device.backend)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(gradient.cpu().double(), truth.grad, rtol=tolerance, atol=tolerance)
    # In the logits' place, and the parts of a vocabulary that is split, with padding behind each.
    place = here[0].clone()
    ops.token_loss_gradient(place, here[1], device.put(scale), kept, out=place, backend=device.backend)
    assert torch.equal(place, gradient)
    cut = vocab // 2
    parts = [functional.pad(part, (0, 3)) for part in (logits[:, :cut], logits[:, cut:])]
    firsts, sizes = (0, cut), (cut, vocab - cut)
    moved = [device.put(part) for part in parts]
    largest = [ops.local_logit_max(part, size, device.backend) for part, size in zip(moved, sizes, strict=True)]
    most = torch.maximum(*largest)
    assert torch.equal(most.cpu(), logits.float().amax(1))
    split = list(zip(moved, firsts, sizes, strict=True))
    terms = [ops.cross_entropy_terms(part, here[1], most, first, size, device.backend) for part, first, size in split]
    total, target = (torch.stack(both).sum(0) for both in zip(*terms, strict=True))
    torch.testing.assert_close((total.log() - target).cpu().double(), losses.detach(), rtol=3e-6, atol=3e-6)
    shared = (here[1], most, total, device.put(scale))
    gradients = [ops.cross_entropy_gradient(p, *shared, first, n, backend=device.backend) for p, first, n in split]
    assert not any(gradient[:, size:].any() for gradient, size in zip(gradients, sizes, strict=True))
    whole = torch.cat([gradient[:, :size] for gradient, size in zip(gradients, sizes, strict=True)], 1)
    torch.testing.assert_close(whole.cpu().double(), truth.grad, rtol=tolerance, atol=tolerance)


def test_z_loss(device: Device) -> None:
    """In the gradient as a scale of the softmax, in the fused kernel as a number."""
    z_loss, labels = 0.3, torch.arange(6)
    logits = random(6, 90) * 3
    leaf = logits.double().requires_grad_()
    normalisers = leaf.logsumexp(-1)
    truth = functional.cross_entropy(leaf, labels, reduction="none") + z_loss * normalisers.square()
    truth.sum().backward()
    here, moved, scale = device.put(logits), device.put(labels), device.put(torch.ones(6))
    losses, kept = ops.token_losses(here, moved, device.backend)
    more, of_softmax = ops.with_z_loss(z_loss, lambda: ops.log_normalisers(here, kept), scale)
    torch.testing.assert_close((losses + more).cpu().double(), truth.detach(), rtol=2e-6, atol=0.0)
    gradient = ops.token_loss_gradient(here, moved, scale, kept, softmax_scale=of_softmax, backend=device.backend)
    torch.testing.assert_close(gradient.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-6)
    x, weight = random(6, 5), random(90, 5, seed=1)
    found = [device.put(t).requires_grad_() for t in (x, weight)]
    total, _ = ops.linear_cross_entropy(*found, moved, z_loss=z_loss, backend=device.backend)
    plain = [t.double().requires_grad_() for t in (x, weight)]
    expected, _ = ops.linear_cross_entropy(*plain, labels, z_loss=z_loss, backend="reference")
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-5, atol=0.0)
    for one, two in zip(torch.autograd.grad(total, found), torch.autograd.grad(expected, plain), strict=True):
        torch.testing.assert_close(one.cpu().double(), two, rtol=1e-4, atol=1e-4)


def test_cross_entropy_lets_nan_through(device: Device) -> None:
    logits = device.put(random(3, 300))
    logits[1, 17] = torch.nan
    losses, _ = ops.token_losses(logits, device.put(torch.zeros(3, dtype=torch.int64)), device.backend)
    assert losses.isnan().tolist() == [False, True, False]


@LOW
def test_linear_cross_entropy(dtype: torch.dtype, device: Device) -> None:
    """The loss and the gradient of a chunk in one kernel, in the place of its logits."""
    x, weight = random(20, 16, dtype=dtype), random(50, 16, dtype=dtype, seed=1)
    labels, mask = torch.arange(20) * 3 % 50, torch.arange(20) % 5 != 0

    def run(x: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
        leaves = x.requires_grad_(), weight.requires_grad_()
        others = (device.put(labels), device.put(mask)) if backend == "fused" else (labels, mask)
        total, losses = ops.linear_cross_entropy(*leaves, *others, backend=backend)
        return [losses.cpu(), *(g.cpu() for g in torch.autograd.grad(total, leaves))]

    found = run(device.put(x), device.put(weight), "fused")
    for mine, truth in zip(found, run(x.double(), weight.double(), "reference"), strict=True):
        error = (mine.double() - truth).abs().max() / truth.abs().max()
        assert error < {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


# --- softmax --------------------------------------------------------------------------------------------------------------


@LOW
@pytest.mark.parametrize("keys", [1, 5, 16, 40, 300, 1030, 4100])
@pytest.mark.parametrize("how", ["plain", "causal", "mask", "both"])
def test_masked_softmax(how: str, keys: int, dtype: torch.dtype, device: Device) -> None:
    queries = min(keys, 6) if keys < 1000 else 2
    x = random(2, 2, queries, keys, dtype=dtype) * 3
    causal, mask = how in ("causal", "both"), None
    if how in ("mask", "both"):
        mask = random(2, 1, queries, keys, seed=3) > 0
        mask[0, 0, 0] = False  # nothing is seen

    def native(x: Tensor) -> Tensor:
        moved = None if mask is None else device.put(mask)
        return ops.masked_softmax(x, 0.5, causal=causal, mask=moved, backend=device.backend)

    check(device, native, lambda x: reference.masked_softmax(x, 0.5, causal, mask), [x])


# --- optimizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", DTYPES_ON_CUDA)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adam", "adamw", "lion", "sgd", "nesterov", "plain sgd"])
def test_optimizers_have_the_bits_of_the_processor(
    kind: str, state: torch.dtype, gradient: torch.dtype, device: Device
) -> None:
    """Slices of every alignment, in all buffers alike or not, larger than a chunk, with a copy of the weights or not."""
    if kind == "plain sgd" and state == torch.bfloat16:
        pytest.skip("no state")
    # offset of each slice in its buffers, elements, and whether the states begin elsewhere
    slices = ((0, 1000, 0), (1003, 37, 0), (1041, 0, 0), (1045, 17001, 0), (18050, 250, 1))
    num_states = {"adam": 2, "adamw": 2, "plain sgd": 0}.get(kind, 1)
    flat = {
        "parameters": random(20000),
        "gradients": random(20000, dtype=gradient, seed=1),
        **{f"state{i}": random(20000, seed=2 + i).abs().to(state) for i in range(num_states)},
        "weights": torch.full((20000,), torch.nan, dtype=torch.bfloat16),
    }
    multipliers = torch.tensor([[1.0, 1.0], [0.5, 0.0], [1.0, 1.0], [2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    step = optimizer.step_values(0.01, grad_scale=8.0, step=3, betas=(0.9, 0.95))
    step[1] = 0.5

    def update(place: Callable[[Tensor], Tensor], has_weights: bool) -> dict[str, Tensor]:
        made = {name: place(tensor.clone()) for name, tensor in flat.items()}
        lists = []
        for name, tensor in made.items():
            shifts = [shift if name.startswith("state") else 0 for _, _, shift in slices]
            parts = [
                tensor[start + shift : start + shift + n] for (start, n, _), shift in zip(slices, shifts, strict=True)
            ]
            lists.append(parts if name != "weights" or has_weights else [])
        p, g, *states, weights = lists
        given = optimizer.Slices(p, g, states, weights, multipliers)
        if kind in ("adam", "adamw"):
            optimizer.adam(given, step, 0.9, 0.95, 1e-8, 0.1, kind == "adamw", has_weights)
        elif kind == "lion":
            optimizer.lion(given, step, 0.9, 0.95, 0.1, has_weights)
        else:
            momentum = 0.0 if kind == "plain sgd" else 0.9
            optimizer.sgd(given, step, momentum, 0.1, 0.1, kind == "nesterov", has_weights)
        return {name: tensor.cpu() for name, tensor in made.items()}

    for has_weights in (False, True):
        found = update(device.put, has_weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "CPU", getattr(library.LIBRARY, library.LIBRARY.instruction_sets[0]))  # type: ignore[union-attr]
            expected = update(lambda x: x, has_weights)
        for name, tensor in expected.items():
            same = torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
            assert same, (name, (found[name].double() - tensor.double()).abs().max())


@LOW
def test_sum_of_squares_and_the_clip_factor(dtype: torch.dtype, device: Device) -> None:
    tensors = [random(n + 5, dtype=dtype, seed=n)[5 if n % 2 else 0 :][:n] for n in (0, 1, 31, 20000, 40001)]
    truth = sum((x.double() ** 2).sum() for x in tensors)
    total = optimizer.sum_of_squares([device.put(x) for x in tensors])
    torch.testing.assert_close(total.cpu(), truth, rtol=1e-12, atol=0.0)
    assert torch.equal(total, optimizer.sum_of_squares([device.put(x) for x in tensors]))
    tensors[3][7] = torch.inf
    assert not optimizer.sum_of_squares([device.put(x) for x in tensors]).isfinite()
