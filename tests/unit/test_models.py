"""The families against formulas written here a second time, cuts into stages, recompute, dropout, number formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.harness import assert_close_named
from tests.model_cases import gradients, make_stage, microbatch, small, tensor_topology, whole_gradients
from trilith.config.model_keys import ModelConfig
from trilith.layers.attention import Attention
from trilith.layers.dropout import Dropout
from trilith.layers.position import rotary_tables
from trilith.models.batch import Microbatch
from trilith.models.families import declare
from trilith.models.stage import StageModel

Values = Mapping[str, Tensor]
CASES = {
    "gpt2": small("gpt2"),
    "gpt2-untied-grouped": small("gpt2", tie_embeddings=False, num_kv_heads=2, activation="gelu"),
    "llama": small("llama", num_kv_heads=2),
    "llama-tied-biased": small("llama", tie_embeddings=True, linear_bias=True, num_kv_heads=3),
}
each_case = pytest.mark.parametrize("model", CASES.values(), ids=CASES.keys())


def make(model: ModelConfig, **settings: object) -> StageModel:
    return make_stage(model, tensor_topology(), **settings)  # type: ignore[arg-type]


def linear(values: Values, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, values[f"{name}.weight"], values.get(f"{name}.bias"))


def norm(values: Values, name: str, x: Tensor, model: ModelConfig) -> Tensor:
    """LayerNorm or RMSNorm by their definitions."""
    if model.family == "gpt2":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + model.norm_eps) * values[f"{name}.weight"]
    return x + values.get(f"{name}.bias", 0.0)


def rotated(x: Tensor, model: ModelConfig) -> Tensor:
    """Rotary positions as a complex product, x (B, S, N, D)."""
    if model.family == "gpt2":
        return x
    half = x.shape[-1] // 2
    frequencies = model.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1]).double()[:, None] * frequencies)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def plain_attention(values: Values, name: str, x: Tensor, model: ModelConfig) -> Tensor:
    """One query head at a time."""
    q, k, v = (linear(values, f"{name}.{part}", x).unflatten(-1, (-1, 4)) for part in "qkv")
    q, k = rotated(q, model), rotated(k, model)
    heads = []
    for head in range(model.num_heads):
        source = head * model.num_kv_heads // model.num_heads
        scores = q[:, :, head] @ k[:, :, source].mT / 2.0
        future = torch.arange(x.shape[1])[:, None] < torch.arange(x.shape[1])
        heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, :, source])
    return linear(values, f"{name}.output", torch.cat(heads, dim=-1))


def plain_mlp(values: Values, name: str, x: Tensor, model: ModelConfig) -> Tensor:
    up = linear(values, f"{name}.up", x)
    if model.family == "llama":
        gate = linear(values, f"{name}.gate", x)
        return linear(values, f"{name}.down", gate * torch.sigmoid(gate) * up)
    approximate = "tanh" if model.activation == "gelu_tanh" else "none"
    return linear(values, f"{name}.down", functional.gelu(up, approximate=approximate))


def plain_loss(values: Values, model: ModelConfig, batch: Microbatch) -> Tensor:
    """Mean loss of the labels that count, without dropout; `values` are canonical tensors."""
    assert batch.tokens is not None and batch.labels is not None and batch.loss_mask is not None
    x = values["embedding.tokens.weight"][batch.tokens]
    if model.family == "gpt2":
        x = x + values["embedding.positions.weight"]
    for layer in range(model.num_layers):
        unit = f"layers.{layer}"
        x = x + plain_attention(values, f"{unit}.attention", norm(values, f"{unit}.attention_norm", x, model), model)
        x = x + plain_mlp(values, f"{unit}.mlp", norm(values, f"{unit}.mlp_norm", x, model), model)
    head = values.get("head.output.weight", values["embedding.tokens.weight"])
    logits = norm(values, "head.norm", x, model) @ head.mT
    return functional.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask])


def canonical_values(stage: StageModel) -> dict[str, Tensor]:
    """A stage's parameters as leaf canonical tensors."""
    found = dict(stage.named_parameters())
    local = {p.name: (p, found[p.name].detach()) for p in stage.local_parameters}
    return {name: value.requires_grad_() for name, value in whole_gradients([local]).items()}


@each_case
def test_equals_the_formulas(model: ModelConfig) -> None:
    model = model.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    stage, batch = make(model), microbatch(model)
    values = canonical_values(stage)
    expected = plain_loss(values, model, batch)
    expected.backward()
    loss = stage({}, batch)["loss"]
    loss.backward()
    actual = whole_gradients([gradients(stage)])
    assert actual.keys() == values.keys()
    pairs: dict[str, tuple[Tensor, Tensor]] = {"loss": (loss, expected)}
    for name, value in values.items():
        assert value.grad is not None
        pairs[name] = (actual[name], value.grad)
    assert_close_named(pairs, rtol=1e-9, atol=1e-12)


def run(stage: StageModel, batch: Microbatch) -> dict[str, Tensor]:
    """Loss and local gradients."""
    stage.zero_grad()
    loss = stage({}, batch)["loss"]
    loss.backward()
    return {"loss": loss.detach(), **{name: gradient for name, (_, gradient) in gradients(stage).items()}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["selective", "full"])
@each_case
def test_recompute_changes_no_bit(model: ModelConfig, recompute: str, dtype: torch.dtype) -> None:
    batch = microbatch(model)
    kept = run(make(model, dtype=dtype), batch)
    again = run(make(model, dtype=dtype, recompute=recompute), batch)
    assert kept.keys() == again.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


@pytest.mark.parametrize("recompute", ["none", "full"])
@each_case
def test_loss_without_logits_is_the_same(model: ModelConfig, recompute: str) -> None:
    """Product and loss as one op: equal loss and gradients, for a loss scale that was not expected, too."""
    batch = microbatch(model)
    plain, fused = (make(model, recompute=recompute) for _ in range(2))
    assert fused.head is not None and plain.head is not None and not plain.head.fuses
    fused.head.fused_loss = True
    expected, found = run(plain, batch), run(fused, batch)
    assert_close_named({name: (found[name], expected[name]) for name in expected}, rtol=1e-11, atol=1e-14)
    fused.zero_grad()
    (fused({}, batch)["loss"] * 1024.0).backward()
    scaled = {name: gradient for name, (_, gradient) in gradients(fused).items()}
    assert_close_named({name: (scaled[name], expected[name] * 1024.0) for name in scaled}, rtol=1e-11, atol=1e-11)
    seen = []
    fused.observer = lambda unit, output, _: seen.append((unit, output.shape))
    run(fused, batch)
    assert seen[-1] == ("head", (3, 12, 61)), "an observer still sees logits"
    assert "logits" in fused({}, replace(batch, labels=None))


def saved_numel(stage: StageModel, batch: Microbatch) -> int:
    """Elements that forward keeps for backward, parameters left out."""
    known = {parameter.data_ptr() for parameter in stage.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stage({}, batch)["loss"]
    assert loss.requires_grad
    return sum(size for size, _ in storages.values())


def test_recompute_keeps_less() -> None:
    model = small("llama")
    none, selective, full = (
        saved_numel(make(model, recompute=kind), microbatch(model)) for kind in ("none", "selective", "full")
    )
    assert full < selective < none


@pytest.mark.parametrize("recompute", ["none", "full"])
@each_case
def test_any_cut_into_stages_is_the_same_model(model: ModelConfig, recompute: str) -> None:
    """Activations forward, gradients back; a tied tensor's two gradients add up. A stage in between may be empty."""
    batch, units, topology = microbatch(model), declare(model), tensor_topology()
    whole = make(model)
    expected = run(whole, batch)
    truth = whole_gradients([gradients(whole)])
    for cuts in ((1, 2, 2), (3, 3), (2, 3), (2,)):
        bounds = (0, *cuts, len(units))
        stages = [make_stage(model, topology, units=units[lo:hi], recompute=recompute) for lo, hi in pairwise(bounds)]
        crossing: list[tuple[Tensor, Tensor]] = []
        inputs: dict[str, Tensor] = {}
        for stage in stages[:-1]:
            sent = stage(inputs, batch)["hidden"]
            assert (tuple(sent.shape), sent.dtype) == stage.boundary(3, model.sequence_length)["hidden"]
            received = sent.detach().requires_grad_()
            crossing.append((sent, received))
            inputs = {"hidden": received}
        loss = stages[-1](inputs, batch)["loss"]
        loss.backward()
        for sent, received in reversed(crossing):
            sent.backward(received.grad)
        actual: dict[str, Tensor] = {}
        for stage in stages:
            for local in stage.local_parameters:
                gradient = stage.get_parameter(local.name).grad
                assert gradient is not None, local.name
                for spec in local.specs:
                    for piece in spec.pieces:
                        part = gradient.flatten().as_strided(piece.box.shape, piece.strides, piece.offset)
                        actual[spec.name] = actual.get(spec.name, 0) + part
        assert torch.equal(loss.detach(), expected["loss"]), cuts
        assert_close_named({name: (actual[name], truth[name]) for name in truth}, rtol=1e-12, atol=1e-14)


@each_case
def test_dropout_belongs_to_the_sample(model: ModelConfig) -> None:
    """Three samples in one microbatch, or one in each: the same masks, so the same loss; off in evaluation."""
    stage, batch = make(model), microbatch(model)
    assert batch.tokens is not None and batch.labels is not None and batch.loss_mask is not None
    together = stage({}, batch)["loss"]
    parts = []
    for row in range(3):
        part = slice(row, row + 1)
        single = replace(
            batch,
            tokens=batch.tokens[part],
            labels=batch.labels[part],
            loss_mask=batch.loss_mask[part],
            sample_ids=batch.sample_ids[part],
        )
        parts.append(stage({}, single)["loss"])
    torch.testing.assert_close(sum(parts), together, rtol=1e-13, atol=0.0)
    other = stage({}, replace(batch, sample_ids=batch.sample_ids + 1))["loss"]
    assert abs(other - together) > 1e-6
    sure = make(model.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0}))
    assert torch.equal(stage.eval()({}, batch)["loss"], sure({}, batch)["loss"])


def dropout_keys(stage: StageModel) -> dict[str, tuple[int, int]]:
    """Stream key of each dropout site by module name."""
    keys = {name: module.key for name, module in stage.named_modules() if isinstance(module, Dropout)}
    return keys | {n: module.dropout.key for n, module in stage.named_modules() if isinstance(module, Attention)}


def test_each_site_has_its_own_stream() -> None:
    """Keys follow the global layer: a stage that holds some layers drops what the whole model would."""
    model = small("gpt2", num_layers=3)
    keys = dropout_keys(make(model))
    assert len(set(keys.values())) == len(keys) == 1 + 3 * 3
    part = dropout_keys(make(model, units=declare(model)[2:]))
    assert len(part) == 2 * 3 and all(keys[name] == key for name, key in part.items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
def test_number_formats(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """Activations and gradients in the parameters' format, the loss summed in float64, near the float64 model's."""
    model = small(family, dropout=0.0, attention_dropout=0.0)
    stage, batch = make(model, dtype=dtype), microbatch(model)
    exact = make(model)({}, batch)["loss"]
    loss = stage({}, batch)["loss"]
    loss.backward()
    assert loss.dtype == torch.float64
    assert abs(loss - exact) < tolerance * exact
    assert {parameter.grad.dtype for parameter in stage.parameters() if parameter.grad is not None} == {dtype}
    assert stage.boundary(2, 12) == {"hidden": ((2, 12, 24), dtype)}
    assert stage({}, replace(batch, labels=None))["logits"].dtype == dtype


@each_case
def test_observer_sees_every_unit_once(model: ModelConfig) -> None:
    stage, batch = make(model, recompute="full"), microbatch(model)
    seen: list[tuple[str, tuple[int, ...]]] = []
    stage.observer = lambda unit, output, of: seen.append((unit, tuple(output.shape)))
    stage({}, batch)["loss"].backward()
    hidden = (3, 12, 24)
    assert seen == [("embedding", hidden), ("layers.0", hidden), ("layers.1", hidden), ("head", (3, 12, 61))]


def test_a_shorter_sequence_is_the_beginning() -> None:
    """Generation may run fewer positions than `sequence_length`; causality makes their logits the same."""
    for model in CASES.values():
        stage, batch = make(model).eval(), replace(microbatch(model), labels=None)
        assert batch.tokens is not None
        short = replace(batch, tokens=batch.tokens[:, :5], positions=batch.positions[:5])
        whole, beginning = (stage({}, b)["logits"] for b in (batch, short))
        torch.testing.assert_close(beginning, whole[:, :5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make_positions", [torch.arange, lambda n: torch.arange(n) + 100_000])
def test_rotary_tables_are_exact_far_out(make_positions: Callable[[int], Tensor]) -> None:
    positions = make_positions(4)
    cos, sin = rotary_tables(positions, 8, 10000.0, torch.bfloat16)
    angles = positions.double()[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-7)
