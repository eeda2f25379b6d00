// Small pieces of the CUDA kernels: element types, vectors, sums over a block, launch check.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

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

// V elements in one load or store.
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T v[V]; };
// Through the read-only cache: inputs are never written by the same kernel, so that loads may pass earlier stores.
template <int V, class T> __device__ inline Pack<T, V> load_pack(const T* p) {
  Pack<T, V> out;
  if constexpr (sizeof out == 16) {
    const int4 raw = __ldg(reinterpret_cast<const int4*>(p));
    memcpy(&out, &raw, 16);
  } else if constexpr (sizeof out == 8) {
    const int2 raw = __ldg(reinterpret_cast<const int2*>(p));
    memcpy(&out, &raw, 8);
  } else {
    static_assert(V == 1, "vectors are 8 or 16 bytes");
    out.v[0] = *p;
  }
  return out;
}
// The elements in the accumulation type. Pairs of bfloat16 are cut out of 32 bits: a shift, a mask.
template <int V, class T, class A> __device__ inline void widen(const Pack<T, V>& from, A (&to)[V]) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value && V % 2 == 0) {
    for (int q = 0; q < V; q += 2) {
      uint32_t pair;
      memcpy(&pair, &from.v[q], 4);
      const uint32_t both[2] = {pair << 16, pair & 0xffff0000u};
      memcpy(&to[q], both, 8);
    }
  } else {
    for (int q = 0; q < V; ++q) to[q] = A(load(from.v[q]));
  }
}
template <int V, class T, class A> __device__ inline void store_pack(T* p, const A (&v)[V]) {
  Pack<T, V> out;
  for (int q = 0; q < V; ++q) store(out.v[q], v[q]);
  *reinterpret_cast<Pack<T, V>*>(p) = out;
}

template <int k> struct Int { static constexpr int value = k; };

// Calls f(Int<V>) with the widest vector (16 or 8 bytes and at most kMost elements, or one element) that fits rows of `length` elements
// at these addresses.
template <class T, int kMost = 8, class F> void with_vector(int64_t length, std::initializer_list<const void*> at, const F& f) {
  constexpr int kWide = 16 / int(sizeof(T)), kFull = kWide < kMost ? kWide : kMost, kHalf = kWide / 2;
  size_t bits = 0;
  for (const void* p : at) bits |= reinterpret_cast<size_t>(p);
  if (length % kFull == 0 && bits % (kFull * sizeof(T)) == 0) f(Int<kFull>{});
  else if (kHalf > 1 && kHalf < kFull && length % kHalf == 0 && bits % 8 == 0) f(Int<kHalf>{});
  else f(Int<1>{});
}

// out[0] and out[stride]: the sums of t1 and of t2 over a block of kThreads threads in a row, always in the same order.
template <int kThreads, class A> __device__ inline void store_block_sums(A t1, A t2, double* out, int64_t stride) {
  __shared__ A part[2][kThreads / 32];
  for (int o = 16; o; o >>= 1) t1 += __shfl_down_sync(~0u, t1, o), t2 += __shfl_down_sync(~0u, t2, o);
  if (threadIdx.x % 32 == 0) part[0][threadIdx.x / 32] = t1, part[1][threadIdx.x / 32] = t2;
  __syncthreads();
  if (threadIdx.x < 2) {
    double t = 0;
    for (int w = 0; w < kThreads / 32; ++w) t += part[threadIdx.x][w];
    out[threadIdx.x * stride] = t;
  }
}

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
