"""A user's layers: declaration, ties, cutting, what crosses between them, and linears whose weight gradient waits."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilith.errors import TrilithError
from trilith.kernels.weight_queue import WeightQueue
from trilith.layers.deferred_linear import DeferredLinear, defer_linears
from trilith.models.layer_stage import LayerBatch, build_layer_stages, holders_of
from trilith.models.pipeline_model import DeclaredLayer, LayerSpec, ParameterOfLayer, PipelineModel, TiedLayerSpec
from trilith.models.structure import (
    map_tensors,
    put_together,
    scalars_from_tensor,
    scalars_to_tensor,
    take_apart,
)
from trilith.pipeline_engine.layout import cut_layers

CPU = torch.device("cpu")


def mean(output: Tensor, labels: Tensor) -> Tensor:
    return (output - labels).square().mean()


# ---- declaration ------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Remembers on which device it was built."""

    devices: tuple[str, ...] = ()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.inner.bias.requires_grad_(False)
        nn.init.orthogonal_(self.inner.weight)
        self.register_parameter("number", nn.Parameter(torch.zeros((), dtype=torch.int64), requires_grad=False))
        Counted.devices += (str(self.inner.weight.device),)


def test_layers_are_declared_without_storage_or_random_numbers() -> None:
    Counted.devices = ()
    before = torch.get_rng_state()
    model = PipelineModel([LayerSpec(Counted, 4), torch.relu, LayerSpec(nn.LayerNorm, 4)], mean)
    assert [layer.kind for layer in model.declared] == ["Counted", "builtin_function_or_method", "LayerNorm"]
    first, second, third = model.declared
    assert first.parameters == (
        ParameterOfLayer("0.inner.weight", "0.inner.weight", (4, 4), True),
        ParameterOfLayer("0.inner.bias", "0.inner.bias", (4,), False),
    )
    assert second.parameters == () and [p.name for p in third.parameters] == ["2.weight", "2.bias"]
    assert Counted.devices == ("meta",) and torch.equal(torch.get_rng_state(), before)


class NoMeta(nn.Module):
    """Cannot be built on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(torch.rand(2).sum() > -1)))


def test_a_class_that_needs_values_is_built_for_real() -> None:
    before = torch.get_rng_state()
    assert PipelineModel([LayerSpec(NoMeta)], mean).declared[0].parameters[0].shape == (2,)
    assert torch.equal(torch.get_rng_state(), before)


def canonical(model: PipelineModel) -> dict[str, str]:
    return {p.name: p.canonical for layer in model.declared for p in layer.parameters if p.canonical != p.name}


def test_ties_by_name_by_key_and_by_identity_join() -> None:
    shared = nn.Linear(4, 4)
    model = PipelineModel(
        [
            LayerSpec(nn.Linear, 4, 4),
            shared,
            TiedLayerSpec("k", nn.Linear, 4, 4),
            shared,
            TiedLayerSpec("k", nn.Linear, 4, 4, tied_weight_attr=("weight", "bias")),
        ],
        mean,
        ties=[("3.weight", "4.weight")],
    )
    assert canonical(model) == {
        "2.weight": "1.weight",
        "3.weight": "1.weight",
        "4.weight": "1.weight",
        "3.bias": "1.bias",
    }
    assert holders_of(model.declared, [(0, 2), (2, 5)]) == {"1.weight": (0, 1), "1.bias": (0, 1)}
    assert holders_of(model.declared, [(0, 5)]) == {"1.weight": (0,), "1.bias": (0,)}
    pair = PipelineModel(
        model.layers[:1] * 4, mean, ties=[("0.bias", "2.bias"), ("1.bias", "3.bias"), ("3.bias", "2.bias")]
    )
    assert canonical(pair) == {"1.bias": "0.bias", "2.bias": "0.bias", "3.bias": "0.bias"}


@pytest.mark.parametrize(
    ("layers", "ties", "words"),
    [
        ([nn.Linear(2, 2)], [("0.weight", "1.weight")], "no parameter '1.weight'"),
        (
            [nn.Linear(2, 2), nn.Linear(2, 3)],
            [("0.weight", "1.weight")],
            r"1.weight .* shape is \(3, 2\) and not \(2, 2\)",
        ),
        ([nn.Linear(2, 2), nn.Linear(2, 2).double()], [("0.bias", "1.bias")], "dtype is torch.float64"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)], [("0.bias", "1.bias")], "requires_grad is False"),
    ],
)
def test_wrong_ties_are_named(layers: list[Any], ties: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(TrilithError, match=words):
        _ = PipelineModel(layers, mean, ties=ties).declared


def test_what_is_no_layer_and_what_is_no_loss_is_refused() -> None:
    with pytest.raises(TrilithError, match="layer 1 is a int"):
        PipelineModel([torch.relu, 3], mean)  # type: ignore[list-item]
    with pytest.raises(TrilithError, match="loss_fn Bilinear has parameters"):
        PipelineModel([torch.relu], nn.Bilinear(1, 1, 1))


# ---- cutting ----------------------------------------------------------------------------------------------------------


def declared(*layers: tuple[str, int]) -> tuple[DeclaredLayer, ...]:
    return tuple(
        DeclaredLayer(i, kind, (ParameterOfLayer(f"{i}.w", f"{i}.w", (numel,), True),))
        for i, (kind, numel) in enumerate(layers)
    )


def test_layers_are_cut_as_deepspeed_does() -> None:
    found = declared(("Embedding", 90), ("Block", 10), ("Tanh", 0), ("Block", 10), ("MyBlock", 10), ("Linear", 30))
    assert cut_layers(found, 2, "uniform") == ((0, 3), (3, 6))
    assert cut_layers(found, 4, "uniform") == ((0, 2), (2, 4), (4, 5), (5, 6))
    assert cut_layers(found, 2, "parameters") == cut_layers(found, 2, "cost") == ((0, 1), (1, 6))
    assert cut_layers(found, 3, "type:block") == ((0, 2), (2, 4), (4, 6))
    assert cut_layers(found, 2, "type:^(embedding|linear)$") == ((0, 1), (1, 6))
    assert cut_layers(found, 3, [3, 1, 2]) == ((0, 3), (3, 4), (4, 6))


@pytest.mark.parametrize(
    ("stages", "mode", "words"),
    [
        (3, "uniform", "2 layers for 3 stages"),
        (2, [1, 2], r"\[1, 2\]: must be 2 numbers of at least 1, which add up to 2"),
        (2, [2], "must be 2 numbers"),
        (2, [0, 2], "at least 1"),
        (2, "type:conv", "matches no layer. Their classes are A, B"),
        (2, "type:(", "is no regular expression"),
        (2, "flops", "'type:<regex>'"),
    ],
)
def test_wrong_partitions_are_named(stages: int, mode: Any, words: str) -> None:
    with pytest.raises(TrilithError, match=words):
        cut_layers(declared(("A", 1), ("B", 1)), stages, mode)


# ---- what crosses -----------------------------------------------------------------------------------------------------


def test_values_are_taken_apart_and_put_together() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    value = (a, [b, 3, {"x": None, 4: (a, "word", True)}], 0.1, -(2**63), float("nan"))
    tensors, scalars, form = take_apart(value, "it")
    assert [id(t) for t in tensors] == [id(a), id(b), id(a)] and scalars[:4] == [3, True, 0.1, -(2**63)]
    assert json.loads(json.dumps(form)) == form
    words = scalars_to_tensor(scalars, CPU)
    assert words.dtype == torch.int64
    again = put_together(form, tensors, scalars_from_tensor(words, form))
    assert again[0] is a and again[1][2][4][0] is a and again[1][2][4][1:] == ("word", True)
    assert again[1][2][4][2] is True and again[1][1] == 3 and type(again[1][1]) is int
    assert again[2] == 0.1 and again[3] == -(2**63) and again[4] != again[4]
    assert list(again[1][2]) == ["x", 4] and type(again) is tuple and type(again[1]) is list
    doubled = map_tensors(lambda t: t + 1, value)
    assert torch.equal(doubled[1][2][4][0], torch.ones(2)) and doubled[1][1] == 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (OrderedDict(x=torch.zeros(1)), "collections.OrderedDict"),
        ((torch.zeros(1), {1, 2}), "builtins.set"),
        ({(1, 2): torch.zeros(1)}, "builtins.dict"),
        (2**63, "does not fit into 64 bits"),
    ],
)
def test_what_cannot_cross_is_named(value: Any, words: str) -> None:
    with pytest.raises(TrilithError, match=f"layer 3: .*{words}"):
        take_apart(value, "layer 3")


# ---- stages -----------------------------------------------------------------------------------------------------------


def test_two_stages_run_as_one_and_copies_have_storage_of_their_own() -> None:
    shared = nn.Linear(3, 3)
    model = PipelineModel([shared, LayerSpec(nn.Linear, 3, 3), torch.tanh, shared], mean)
    cuts = [(0, 2), (2, 4)]
    holders = holders_of(model.declared, cuts)
    stages = build_layer_stages(model, cuts, [0, 1], holders, seed=7)
    assert stages[0].get_submodule("0") is shared and stages[1].get_submodule("3") is not shared
    specs = {p.name: (p.specs[0].name, p.flat_unit, p.specs[0].pieces[0].replica) for p in stages[1].local_parameters}
    assert specs == {"3.weight": ("0.weight", "0.weight", 1), "3.bias": ("0.bias", "0.bias", 1)}
    inputs, labels = torch.randn(2, 3), torch.randn(2, 3)
    batch = LayerBatch(inputs, labels, ["tensor"], 0.25)
    got = stages[1](stages[0]({}, batch), batch)["loss"]
    hidden = stages[0].get_submodule("1")(shared(inputs))
    assert torch.equal(got, mean(shared(torch.tanh(hidden)), labels) * 0.25)
    again = build_layer_stages(model, cuts, [0], holders, seed=7)[0]
    assert torch.equal(again.get_submodule("1").weight, stages[0].get_submodule("1").weight)  # type: ignore[arg-type]


def test_ties_inside_a_stage_are_one_parameter() -> None:
    model = PipelineModel([nn.Linear(3, 3), nn.Linear(3, 3)], mean, ties=[("0.weight", "1.weight")])
    stage = build_layer_stages(model, [(0, 2)], [0], holders_of(model.declared, [(0, 2)]), seed=0)[0]
    assert stage.get_submodule("0").weight is stage.get_submodule("1").weight
    assert [p.name for p in stage.local_parameters] == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize("loss", [3.0, torch.zeros(2), torch.zeros((), dtype=torch.int64)], ids=str)
def test_a_loss_that_is_no_scalar_is_named(loss: Any) -> None:
    model = PipelineModel([torch.tanh], lambda output, labels: loss)
    stage = build_layer_stages(model, [(0, 1)], [0], {}, seed=0)[0]
    with pytest.raises(TrilithError, match=r"loss_fn returned .*must return a scalar"):
        stage({}, LayerBatch(torch.zeros(1), None, [], 1.0))


def test_a_form_that_changes_is_named() -> None:
    model = PipelineModel([lambda x: (x, 1) if x.sum() > 0 else x, torch.tanh], mean)
    stage = build_layer_stages(model, [(0, 1), (1, 2)], [0], {}, seed=0)[0]
    with pytest.raises(TrilithError, match=r"layer 0 \(<lambda>\): returned tensor"):
        stage({}, LayerBatch(torch.zeros(1), None, [["tuple", ["tensor", "int"]]], 1.0))


def test_a_spec_that_builds_something_else_is_named() -> None:
    widths = iter((3, 4))
    model = PipelineModel([LayerSpec(lambda: nn.Linear(2, next(widths)))], mean)
    with pytest.raises(TrilithError, match=r"parameter 0.bias: has shape \(4,\), in the declaration \(3,\)"):
        build_layer_stages(model, [(0, 1)], [0], holders_of(model.declared, [(0, 1)]), seed=0)


class Noisy(nn.Module):
    """Dropout between two linears, a tuple in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, value: tuple[Tensor, int]) -> tuple[Tensor, int]:
        return nn.functional.dropout(self.b(torch.tanh(self.a(value[0]))), 0.5), value[1] + 1


def test_recomputed_layers_draw_the_same_random_numbers() -> None:
    model = PipelineModel([LayerSpec(Noisy), LayerSpec(Noisy), lambda value: value[0] * value[1]], mean)
    stage = build_layer_stages(model, [(0, 3)], [0], {}, seed=0)[0]
    found = []
    for recompute in (False, True):
        stage.recompute = recompute
        torch.manual_seed(3)
        x = torch.ones(2, 4, requires_grad=True)
        stage({}, LayerBatch((x, 1), torch.zeros(2, 4), [], 1.0))["loss"].backward()
        assert x.grad is not None and x.grad.count_nonzero() > 0
        found.append([x.grad, *(p.grad for p in stage.parameters() if p.grad is not None), torch.rand(1)])
        stage.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert len(found[0]) == 10


# ---- linears ----------------------------------------------------------------------------------------------------------


class Reads(nn.Linear):
    """A subclass: stays what it is."""


def test_every_plain_linear_is_deferred_wherever_it_stands() -> None:
    shared = nn.Linear(3, 3)
    nested = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    model = nn.ModuleDict(
        {
            "alone": nn.Linear(3, 3),
            "nested": nested,
            "subclass": Reads(3, 3),
            "computed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    parameters = dict(model.named_parameters())
    queue = WeightQueue()
    made = defer_linears(model, queue)
    assert len(made) == 1 and dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert isinstance(model["alone"], DeferredLinear) and type(model["subclass"]) is Reads
    assert nested[0] is nested.get_submodule("2.0") is shared  # its weight has two names: see defer_linears
    assert type(model["computed"]).__name__ == "ParametrizedLinear"


def test_a_deferred_linear_computes_what_a_linear_does() -> None:
    plain = nn.Linear(3, 5)
    calls: list[int] = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(plain)
    queue = WeightQueue()
    (deferred,) = defer_linears(model, queue)
    x, seed = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    model(x).backward(seed)
    assert calls == [1] and plain.weight.grad is None
    (item,) = queue.take()
    assert item.weight is plain.weight
    expected = torch.autograd.grad(nn.functional.linear(x, plain.weight, plain.bias), list(plain.parameters()), seed)
    assert torch.equal(item.gradient(), expected[0]) and torch.equal(plain.bias.grad, expected[1])  # type: ignore[arg-type]
    deferred.queue = None
    model(x).backward(seed)
    assert torch.equal(plain.weight.grad, expected[0]) and queue.take() == []  # type: ignore[arg-type]
