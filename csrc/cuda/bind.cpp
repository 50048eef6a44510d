// trilith._kernels_cuda: the CUDA kernels for Python. Pointers and streams are integers; the GIL is released in every call.
#include <pybind11/pybind11.h>

#include "cuda/ops.h"

PYBIND11_MODULE(_kernels_cuda, module) {
    module.doc() = "Kernels of csrc/cuda. Call them through trilith.kernels.ops, which checks what they do not.";
    using namespace trilith::cuda;
    const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
#define TRILITH_BIND(op) module.def(#op, op, release);
    TRILITH_BIND(why_not)
    TRILITH_BIND(norm_forward)
    TRILITH_BIND(norm_backward_workspace)
    TRILITH_BIND(norm_backward)
    TRILITH_BIND(activation_forward)
    TRILITH_BIND(activation_backward_workspace)
    TRILITH_BIND(activation_backward)
    TRILITH_BIND(glu_forward)
    TRILITH_BIND(glu_backward)
    TRILITH_BIND(dropout_forward)
    TRILITH_BIND(dropout_bias_backward_workspace)
    TRILITH_BIND(dropout_bias_backward)
    TRILITH_BIND(dropout_keep)
    TRILITH_BIND(attention_forward)
    TRILITH_BIND(attention_backward_workspace)
    TRILITH_BIND(attention_backward)
    TRILITH_BIND(rotary)
    TRILITH_BIND(logit_max)
    TRILITH_BIND(cross_entropy_terms)
    TRILITH_BIND(cross_entropy_gradient)
    TRILITH_BIND(cross_entropy_fused)
    TRILITH_BIND(softmax_forward)
    TRILITH_BIND(softmax_backward)
    TRILITH_BIND(adam)
    TRILITH_BIND(lion)
    TRILITH_BIND(sgd)
    TRILITH_BIND(sum_of_squares_workspace)
    TRILITH_BIND(sum_of_squares)
    TRILITH_BIND(clip_step)
#undef TRILITH_BIND
}
