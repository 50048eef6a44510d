#include "tests/check.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace trilith::tests {

namespace {

struct Count {
    int checks = 0, failures = 0;
};
Count& count() {
    static Count found;
    return found;
}

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace

int num_checks() { return count().checks; }
int num_failures() { return count().failures; }
void fail(const std::string& what) {
    constexpr int shown = 40;
    if (++count().failures <= shown) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}
void check(bool holds, const std::string& what) {
    ++count().checks;
    if (!holds) fail(what);
}

Buffer::Buffer(DType dtype, int64_t count)
    : dtype_(dtype),
      count_(count),
      num_bytes_(count * bytes_of(dtype)),
      bytes_(new unsigned char[static_cast<size_t>(num_bytes_)]) {
    for (int64_t i = 0; i < count_; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
}
Buffer::Buffer(DType dtype, const Numbers& values) : Buffer(dtype, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < count_; ++i) set(i, values[static_cast<size_t>(i)]);
}

double Buffer::at(int64_t i) const {
    const unsigned char* at = bytes_.get() + i * bytes_of(dtype_);
    if (dtype_ == DType::f64) {
        double value;
        std::memcpy(&value, at, sizeof value);
        return value;
    }
    if (dtype_ == DType::f16) {
        _Float16 value;
        std::memcpy(&value, at, sizeof value);
        return static_cast<double>(value);
    }
    uint32_t bits = 0;
    std::memcpy(dtype_ == DType::f32 ? reinterpret_cast<unsigned char*>(&bits) : reinterpret_cast<unsigned char*>(&bits) + 2, at,
                static_cast<size_t>(bytes_of(dtype_)));
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<double>(value);
}

void Buffer::set(int64_t i, double value) {
    unsigned char* at = bytes_.get() + i * bytes_of(dtype_);
    if (dtype_ == DType::f64) {
        std::memcpy(at, &value, sizeof value);
    } else if (dtype_ == DType::f16) {
        const _Float16 narrow = static_cast<_Float16>(value);
        std::memcpy(at, &narrow, sizeof narrow);
    } else {
        const float single = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &single, sizeof bits);
        if (dtype_ == DType::bf16) {
            if (value == value) bits += 0x7FFF + ((bits >> 16) & 1);
            const uint16_t half = static_cast<uint16_t>(bits >> 16);
            std::memcpy(at, &half, sizeof half);
        } else {
            std::memcpy(at, &bits, sizeof bits);
        }
    }
}

Numbers Buffer::values() const {
    Numbers found(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; ++i) found[static_cast<size_t>(i)] = at(i);
    return found;
}

bool Buffer::same_bits(const Buffer& other) const {
    return num_bytes_ == other.num_bytes_ && std::memcmp(bytes_.get(), other.bytes_.get(), static_cast<size_t>(num_bytes_)) == 0;
}

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

double tolerance(DType dtype) {
    switch (dtype) {
        case DType::f64: return 1e-12;
        case DType::f32: return 3e-6;
        case DType::bf16: return 1.0 / 128;
        default: return 1.0 / 1024;
    }
}

Numbers random_numbers(int64_t count, uint64_t seed) {
    Numbers found(static_cast<size_t>(count));
    uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
    for (double& value : found) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint64_t mixed = (state ^ (state >> 29)) * 0xBF58476D1CE4E5B9u;
        value = static_cast<double>(mixed >> 11) * 0x1p-53 * 4 - 2;
    }
    return found;
}
Buffer random_buffer(DType dtype, int64_t count, uint64_t seed) { return Buffer(dtype, random_numbers(count, seed)); }

void check_close(const std::string& what, const Buffer& found, const Numbers& expected, double scale) {
    check(found.size() == static_cast<int64_t>(expected.size()), what + ": size");
    const double allowed = tolerance(found.dtype());
    for (int64_t i = 0; i < found.size(); ++i) {
        const double value = found.at(i), truth = expected[static_cast<size_t>(i)];
        // What is not a number here fails, too.
        if (!(std::abs(value - truth) <= allowed * std::max({1.0, std::abs(truth), scale})) && value != truth) {
            check(false, what + " [" + std::to_string(i) + "] = " + std::to_string(value) + ", not " + std::to_string(truth));
            return;
        }
    }
    check(true, what);
}

const char* name_of(DType dtype) {
    constexpr const char* names[] = {"f32", "f64", "bf16", "f16"};
    return names[static_cast<int>(dtype)];
}

std::vector<Buffer> run_both(const std::string& what, const std::function<std::vector<Buffer>(int)>& run) {
    std::vector<Buffer> one = run(1);
    const std::vector<Buffer> two = run(2);
    for (size_t i = 0; i < one.size(); ++i)
        check(one[i].same_bits(two[i]), what + ": 1 and 2 threads differ in result " + std::to_string(i));
    return one;
}

}  // namespace trilith::tests
