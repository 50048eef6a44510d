// What the memory allows an optimizer and a norm: their loads and stores with next to no arithmetic. Compiled by
// benchmarks/kernels/optimizer.py for the processor it runs on.
#include <cstdint>

// Reads 4 arrays and writes 3, as AdamW does.
extern "C" void adam_shape(float* weight, const float* gradient, float* first, float* second, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const float g = gradient[i];
        weight[i] += g;
        first[i] += g;
        second[i] += g;
    }
}

// Reads one array.
extern "C" float read(const float* x, int64_t n, int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += x[i];
    return total;
}
