// Activations by their codes.
#pragma once

#include <type_traits>

namespace trilith {

enum Kind { kGelu = 0, kGeluTanh = 1, kSilu = 2 };

// Calls f with the kind as a constant.
template <class F>
void with_kind(int kind, F&& f) {
    switch (kind) {
        case kGelu: f(std::integral_constant<int, kGelu>()); break;
        case kGeluTanh: f(std::integral_constant<int, kGeluTanh>()); break;
        default: f(std::integral_constant<int, kSilu>()); break;
    }
}

}  // namespace trilith
