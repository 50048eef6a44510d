// Runs every native test. Built with the sanitizers by `make test-native`.
#include <cstdio>
#include <string>

#include "cpu/tables.h"
#include "tests/check.h"

using namespace trilith;
using namespace trilith::tests;

int main() {
    using Test = void (*)(const CpuKernels&, DType);
    const std::pair<const char*, Test> of_ops[] = {
        {"norm", test_norm},       {"attention", test_attention}, {"activation", test_activation},
        {"rotary", test_rotary},   {"dropout", test_dropout},     {"random", test_random},
        {"cross-entropy", test_cross_entropy}, {"optimizer", test_optimizer},
    };
    auto report = [](const std::string& name, int failures_before) {
        std::printf("%-28s %s\n", name.c_str(), num_failures() == failures_before ? "ok" : "FAILED");
        std::fflush(stdout);
    };
    for (const CpuKernels* kernels : usable_cpu_kernels())
        for (const auto& [name, test] : of_ops) {
            const int before = num_failures();
            for (DType dtype : kDTypes) test(*kernels, dtype);
            report(std::string(name) + " " + kernels->name, before);
        }
    const std::pair<const char*, void (*)()> others[] = {{"io", test_io}, {"data", test_data}, {"plans", test_plans}};
    for (const auto& [name, test] : others) {
        const int before = num_failures();
        test();
        report(name, before);
    }
    std::printf("%d checks, %d failed\n", num_checks(), num_failures());
    return num_failures() ? 1 : 0;
}
