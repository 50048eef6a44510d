// What the native tests are made of: checks that count their failures, and memory of exactly the size that an op may touch,
// so that AddressSanitizer sees one element too many.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/types.h"
#include "cpu/kernels.h"

namespace trilith::tests {

using Numbers = std::vector<double>;

void fail(const std::string& what);
int num_failures();
int num_checks();
void check(bool holds, const std::string& what);

// Contiguous elements of a dtype; new ones are NaN, so that what an op leaves out is seen.
class Buffer {
  public:
    Buffer(DType dtype, int64_t count);
    Buffer(DType dtype, const Numbers& values);

    DType dtype() const { return dtype_; }
    int64_t size() const { return count_; }
    Address address() const { return reinterpret_cast<Address>(bytes_.get()); }
    double at(int64_t i) const;
    void set(int64_t i, double value);
    Numbers values() const;
    bool same_bits(const Buffer& other) const;

  private:
    DType dtype_;
    int64_t count_, num_bytes_;
    std::shared_ptr<unsigned char[]> bytes_;  // copies share it
};

// The dtype that an op on `dtype` computes in.
DType wide(DType dtype);
// What one rounding to the dtype may cost, and some more for the op: relative to the largest of 1, the number and `scale`.
double tolerance(DType dtype);

// `count` numbers in about [-2, 2], the same for the same seed.
Numbers random_numbers(int64_t count, uint64_t seed);
Buffer random_buffer(DType dtype, int64_t count, uint64_t seed);

void check_close(const std::string& what, const Buffer& found, const Numbers& expected, double scale = 1);

constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
const char* name_of(DType dtype);

// `run(threads)` gives what an op made; 1 and 2 threads must make the same bits. Returns it.
std::vector<Buffer> run_both(const std::string& what, const std::function<std::vector<Buffer>(int)>& run);

// --- the tests: those of ops for each instruction set and dtype ---
void test_norm(const CpuKernels& kernels, DType dtype);
void test_attention(const CpuKernels& kernels, DType dtype);
void test_activation(const CpuKernels& kernels, DType dtype);
void test_rotary(const CpuKernels& kernels, DType dtype);
void test_dropout(const CpuKernels& kernels, DType dtype);
void test_random(const CpuKernels& kernels, DType dtype);
void test_cross_entropy(const CpuKernels& kernels, DType dtype);
void test_optimizer(const CpuKernels& kernels, DType dtype);
void test_io();
void test_data();
void test_plans();

}  // namespace trilith::tests
