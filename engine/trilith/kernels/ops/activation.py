"""Activations of the MLP: GELU, alone or with the bias before it, and the gated units SwiGLU and GeGLU.

Natively only inputs are kept for backward. With `owns_gradient` backward may write over the gradient of the result: for
results that go into one op only, whose backward makes that gradient anew, such as a matrix product. The gated units
also take gate and up as the two halves of one product, and write their gradients as the two halves of one tensor:
nothing is copied then.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilith.errors import KernelError
from trilith.kernels import library, reference
from trilith.kernels.library import DTYPES, address
from trilith.kernels.ops.library_form import define, differentiate

_GELU_KINDS = ("gelu", "gelu_tanh")  # their places are codes of csrc/cpu/activation.cpp
_SILU = 2


def gelu(x: Tensor, kind: str, backend: str = "auto", *, owns_gradient: bool = False) -> Tensor:
    """x Phi(x), exact where `kind` is `gelu`, by the tanh formula where it is `gelu_tanh`; same shape and dtype.

    Raises KernelError for another kind.
    """
    code = _gelu_code(kind)
    if backend == "reference":
        return reference.gelu(x, kind)
    if library.takes("gelu", backend, x, None):
        return activation_op(x, None, code) if library.is_traced(x) else _Activation.apply(x, None, code, owns_gradient)
    return _torch_gelu(x, code)


def bias_gelu(x: Tensor, bias: Tensor, kind: str, backend: str = "auto", *, owns_gradient: bool = False) -> Tensor:
    """`gelu` of x + bias: x (..., F), bias (F,)."""
    code = _gelu_code(kind)
    if backend == "reference":
        return reference.bias_gelu(x, bias, kind)
    if library.takes("bias_gelu", backend, x, bias):
        if bias.shape != x.shape[-1:]:
            raise KernelError(f"bias_gelu: x {tuple(x.shape)} with bias {tuple(bias.shape)}: must be x's last dim")
        return activation_op(x, bias, code) if library.is_traced(x) else _Activation.apply(x, bias, code, owns_gradient)
    return _torch_gelu(x + bias, code)


def swiglu(gate: Tensor, up: Tensor, backend: str = "auto") -> Tensor:
    """gate sigmoid(gate) up; `gate` and `up` of one shape and dtype, which are the result's."""
    if backend == "reference":
        return reference.swiglu(gate, up)
    if library.takes("swiglu", backend, gate, up):
        return _gated(gate, up, _SILU)
    return functional.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, kind: str, backend: str = "auto") -> Tensor:
    """gelu(gate) up; `gate` and `up` of one shape and dtype, which are the result's."""
    code = _gelu_code(kind)
    if backend == "reference":
        return reference.geglu(gate, up, kind)
    if library.takes("geglu", backend, gate, up):
        return _gated(gate, up, code)
    return _torch_gelu(gate, code) * up


def swiglu_packed(gate_up: Tensor, backend: str = "auto") -> Tensor:
    """`swiglu` of the halves of gate_up (..., 2F), gate first: (..., F). Its gradient is one tensor, too."""
    _check_packed("swiglu_packed", gate_up)
    if library.takes("swiglu_packed", backend, gate_up, None):
        return _gated_packed(gate_up, _SILU)
    gate, up = gate_up.chunk(2, dim=-1)
    return swiglu(gate, up, backend)


def geglu_packed(gate_up: Tensor, kind: str, backend: str = "auto") -> Tensor:
    """`geglu` of the halves of gate_up (..., 2F), gate first: (..., F). Its gradient is one tensor, too."""
    _check_packed("geglu_packed", gate_up)
    code = _gelu_code(kind)
    if library.takes("geglu_packed", backend, gate_up, None):
        return _gated_packed(gate_up, code)
    gate, up = gate_up.chunk(2, dim=-1)
    return geglu(gate, up, kind, backend)


def _gelu_code(kind: str) -> int:
    if kind not in _GELU_KINDS:
        raise KernelError(f"gelu: kind = {kind!r}: must be 'gelu' or 'gelu_tanh'")
    return _GELU_KINDS.index(kind)


def _torch_gelu(x: Tensor, code: int) -> Tensor:
    return functional.gelu(x, approximate="tanh" if code else "none")


def _check_packed(op: str, gate_up: Tensor) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise KernelError(f"{op}: gate_up {tuple(gate_up.shape)}: its last dim must be even")


def _gated(gate: Tensor, up: Tensor, code: int) -> Tensor:
    if gate.shape != up.shape:
        raise KernelError(f"gated unit: gate {tuple(gate.shape)}, up {tuple(up.shape)}: must be equal")
    return glu_op(gate, up, code) if library.is_traced(gate) else _Gated.apply(gate, up, code)


def _gated_packed(gate_up: Tensor, code: int) -> Tensor:
    return glu_packed_op(gate_up, code) if library.is_traced(gate_up) else _GatedPacked.apply(gate_up, code)


# --- what runs ----------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, bias: Tensor | None, code: int) -> Tensor:
    x, width = x.contiguous(), x.shape[-1] if x.dim() else 1
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // width if width else 0
    library.run("activation_forward", x, DTYPES[x.dtype], code, x.data_ptr(), address(bias), y.data_ptr(), rows, width)
    return y


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, code: int, owns_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias (empty without one)."""
    dy, x, width = dy.contiguous(), x.contiguous(), x.shape[-1] if x.dim() else 1
    bias = None if bias is None else bias.contiguous()
    rows = x.numel() // width if width else 0
    dx = dy if owns_gradient else torch.empty_like(x)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    library.run(
        "activation_backward",
        x,
        DTYPES[x.dtype],
        code,
        dy.data_ptr(),
        x.data_ptr(),
        address(bias),
        dx.data_ptr(),
        dbias.data_ptr(),
        rows,
        width,
        scratch=(rows, width),
    )
    return dx, dbias


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x, or a contiguous copy, such that its rows are evenly spaced; and how far apart they are."""
    if x.is_contiguous():
        return x, x.shape[-1] if x.dim() else 1
    sizes, strides = x.shape, x.stride()
    if strides[-1] == 1 or sizes[-1] == 1:
        leading = [(size, stride) for size, stride in zip(sizes[:-1], strides[:-1], strict=True) if size != 1]
        if all(a[1] == b[0] * b[1] for a, b in pairwise(leading)):
            return x, leading[-1][1] if leading else sizes[-1]
    return x.contiguous(), sizes[-1]


def _gated_forward(gate: Tensor, up: Tensor, code: int) -> Tensor:
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _run_gated(gate.data_ptr(), up.data_ptr(), y, gate_stride, up_stride, code)
    return y


def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor, code: int) -> tuple[Tensor, Tensor]:
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    dgate, dup = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    addresses = (gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr())
    _run_gated_backward(dy, addresses, (gate_stride, up_stride, dy.shape[-1] if dy.dim() else 1), code)
    return dgate, dup


def _packed_forward(gate_up: Tensor, code: int) -> Tensor:
    gate_up, stride = _rows(gate_up)
    y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    first = gate_up.data_ptr()
    _run_gated(first, first + y.shape[-1] * y.element_size(), y, stride, stride, code)
    return y


def _packed_backward(dy: Tensor, gate_up: Tensor, code: int) -> Tensor:
    gate_up, stride = _rows(gate_up)
    gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    half = dy.shape[-1] * dy.element_size()
    first, result = gate_up.data_ptr(), gradient.data_ptr()
    addresses = (first, first + half, result, result + half)
    _run_gated_backward(dy, addresses, (stride, stride, gradient.shape[-1]), code)
    return gradient


def _run_gated(gate: int, up: int, y: Tensor, gate_stride: int, up_stride: int, code: int) -> None:
    width = y.shape[-1] if y.dim() else 1
    rows = y.numel() // width if width else 0
    library.run("glu_forward", y, DTYPES[y.dtype], code, gate, up, y.data_ptr(), rows, width, gate_stride, up_stride)


def _run_gated_backward(dy: Tensor, addresses: tuple[int, ...], strides: tuple[int, int, int], code: int) -> None:
    """`addresses` and `strides` of gate, up and their gradients, which have one stride."""
    dy, width = dy.contiguous(), dy.shape[-1] if dy.dim() else 1
    rows = dy.numel() // width if width else 0
    library.run("glu_backward", dy, DTYPES[dy.dtype], code, dy.data_ptr(), *addresses, rows, width, *strides)


class _Activation(torch.autograd.Function):
    """Keeps x and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, code: int, owns_gradient: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.code, ctx.owns_gradient = code, owns_gradient
        return _forward(x, bias, code)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = _backward(gradients[0], x, bias, ctx.code, ctx.owns_gradient)
        return dx, None if bias is None else dbias, None, None


class _Gated(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.code = code
        return _gated_forward(gate, up, code)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *_gated_backward(gradients[0], gate, up, ctx.code), None


class _GatedPacked(torch.autograd.Function):
    """Keeps the product of gate and up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.code = code
        return _packed_forward(gate_up, code)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        return _packed_backward(gradients[0], gate_up, ctx.code), None


# --- the library's form -------------------------------------------------------------------------------------------------


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_like(dy: Tensor, x: Tensor, bias: Tensor | None, code: int) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(0) if bias is None else _like(bias)


activation_op = define("activation(Tensor x, Tensor? bias, int kind) -> Tensor", _forward, _like)
activation_backward_op = define(
    "activation_backward(Tensor dy, Tensor x, Tensor? bias, int kind) -> (Tensor, Tensor)", _backward, _backward_like
)
glu_op = define("glu(Tensor gate, Tensor up, int kind) -> Tensor", _gated_forward, _like)
glu_backward_op = define(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)",
    _gated_backward,
    lambda dy, gate, up, kind: (_like(gate), _like(up)),
)
glu_packed_op = define(
    "glu_packed(Tensor gate_up, int kind) -> Tensor",
    _packed_forward,
    lambda gate_up, kind: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
glu_packed_backward_op = define(
    "glu_packed_backward(Tensor dy, Tensor gate_up, int kind) -> Tensor",
    _packed_backward,
    lambda dy, gate_up, kind: _like(gate_up),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.code = inputs
    ctx.save_for_backward(*tensors)


def _library_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = activation_backward_op(dy, x, bias, ctx.code)
    return dx, None if bias is None else dbias, None


differentiate("activation", _remember, _library_backward)
differentiate("glu", _remember, lambda ctx, dy: (*glu_backward_op(dy, *ctx.saved_tensors, ctx.code), None))
differentiate("glu_packed", _remember, lambda ctx, dy: (glu_packed_backward_op(dy, *ctx.saved_tensors, ctx.code), None))
