// Small pieces of the CUDA kernels: element types, launch check.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common.h"

namespace fastkd {
namespace {

template <class T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };

__device__ inline float load(float v) { return v; }
__device__ inline double load(double v) { return v; }
__device__ inline float load(__half v) { return __half2float(v); }
__device__ inline float load(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void store(float& o, float v) { o = v; }
__device__ inline void store(double& o, double v) { o = v; }
__device__ inline void store(__half& o, float v) { o = __float2half_rn(v); }
__device__ inline void store(__nv_bfloat16& o, float v) { o = __float2bfloat16_rn(v); }

template <class F> void with_type(int dtype, const F& f) {
  if (dtype == kFloat32) f(float{});
  else if (dtype == kFloat64) f(double{});
  else if (dtype == kBFloat16) f(__nv_bfloat16{});
  else f(__half{});
}

// Turns a failed launch into an exception that names the kernel and its sizes.
inline void check_launch(const char* kernel, int64_t a, int64_t b, int64_t c) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + " (sizes " + std::to_string(a) + ", " + std::to_string(b) + ", " +
                             std::to_string(c) + "): " + cudaGetErrorString(error));
}

inline unsigned blocks_for(int64_t work, int64_t per_block) {  // for grid-stride loops: enough to fill any device, never too many
  const int64_t wanted = (work + per_block - 1) / per_block;
  return unsigned(wanted < 1 ? 1 : wanted > (1 << 20) ? (1 << 20) : wanted);
}

}  // namespace
}  // namespace fastkd
