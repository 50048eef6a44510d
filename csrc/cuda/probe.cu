// Whether the kernels can run here: the driver is young enough for the runtime that is linked in, and knows code for the device.
#include "cuda/device.h"
#include "cuda/ops.h"

namespace trilith::cuda {

namespace {

__global__ void nothing() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string why_not(int device) {
    int driver = 0, runtime = 0, before = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) return "the CUDA runtime does not answer";
    if (driver / 1000 < runtime / 1000)
        return "the driver is for CUDA " + version(driver) + ", the kernels were built with " + version(runtime) +
               ": update the driver, or build with an older nvcc";
    cudaFuncAttributes attributes;
    cudaError_t status = cudaGetDevice(&before);
    if (status == cudaSuccess) status = cudaSetDevice(device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, nothing);
    cudaSetDevice(before);
    cudaGetLastError();
    if (status == cudaErrorNoKernelImageForDevice) return "the kernels were not built for this device: set TRILITH_CUDA_ARCHS";
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace trilith::cuda
