// CUDA kernels of the BN-statistics loss: one launch each way. A teacher has at most some 30 000 channels, less than a launch costs.
// Forward: a block in which each warp takes every 32nd layer. Backward: a block a layer. Sums in a fixed order, no atomics.
#include "bn_loss.h"
#include "common.cuh"

namespace fastkd {
namespace {

constexpr int kWarp = 32, kForward = 1024, kBackward = 256;

template <class A> struct Loss {
  const A *stats, *target, *average, *grad;
  const int64_t *calls, *offsets;
  A* out;
  int64_t c, layers;
  int kind;
  double momentum, first;

  __device__ bool blended() const { return average && (!calls || *calls > 0); }
  __device__ double weight(int64_t layer) const { return layer ? 1.0 : first; }
  __device__ A batch(int64_t i, bool blend) const {
    return blend ? stats[i] * A(1 - momentum) + average[i] * A(momentum) : stats[i];
  }
  __device__ A variance(A v) const { return v < A(1e-8) ? A(1e-8) : v; }  // NaN stays

  // This thread's share of a layer: squares of mean and variance differences, or both halves of the divergence in `a`.
  __device__ void share(int64_t from, int64_t to, int thread, int threads, bool blend, A& a, A& b) const {
#pragma unroll 4
    for (int64_t i = from + thread; i < to; i += threads) {
      const A d = batch(i, blend) - target[i], var = batch(c + i, blend), run = target[c + i];
      if (kind == kL2) {
        a += d * d;
        b += (var - run) * (var - run);
      } else {
        const A v = variance(var), r = variance(run);
        a += (d * d + v) / (A(2) * r) - A(0.5) * log(v / r) - A(0.5);
      }
    }
  }
};

// The sum of the lanes' values, in lane 0.
__device__ double over_lanes(double v) {
  for (int o = kWarp / 2; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
  return v;
}

template <class A> __global__ void __launch_bounds__(kForward) bn_loss_fwd_kernel(const Loss<A> p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const bool blend = p.blended();
  __shared__ double total[kForward / kWarp];
  double t = 0;
  for (int64_t l = warp; l < p.layers; l += warps) {
    A a = 0, b = 0;
    p.share(p.offsets[l], p.offsets[l + 1], lane, kWarp, blend, a, b);
    const double first = over_lanes(a), second = over_lanes(b);
    t += p.weight(l) * (p.kind == kL2 ? sqrt(first) + sqrt(second) : first);
  }
  if (lane == 0) total[warp] = t;
  __syncthreads();
  if (threadIdx.x == 0) {
    t = 0;
    for (int w = 0; w < warps; ++w) t += total[w];
    *p.out = A(t);
  }
}

template <class A> __global__ void bn_loss_bwd_kernel(const Loss<A> p) {
  const int64_t l = blockIdx.x, from = p.offsets[l], to = p.offsets[l + 1];
  const bool blend = p.blended();
  const double by = double(*p.grad) * p.weight(l) * (blend ? double(A(1 - p.momentum)) : 1.0);
  A mean_by = A(by), var_by = A(by);
  if (p.kind == kL2) {  // d |v| = v / |v|; a zero norm has gradient zero
    __shared__ double part[2][kBackward / kWarp];
    A a = 0, b = 0;
    p.share(from, to, threadIdx.x, kBackward, blend, a, b);
    const double first = over_lanes(a), second = over_lanes(b);
    if (threadIdx.x % kWarp == 0) part[0][threadIdx.x / kWarp] = first, part[1][threadIdx.x / kWarp] = second;
    __syncthreads();
    double squares[2] = {0, 0};
    for (int w = 0; w < kBackward / kWarp; ++w) squares[0] += part[0][w], squares[1] += part[1][w];
    mean_by = squares[0] == 0 ? A(0) : A(by / sqrt(squares[0]));
    var_by = squares[1] == 0 ? A(0) : A(by / sqrt(squares[1]));
  }
  for (int64_t i = from + threadIdx.x; i < to; i += kBackward) {
    const A d = p.batch(i, blend) - p.target[i], var = p.batch(p.c + i, blend), run = p.target[p.c + i];
    if (p.kind == kL2) {
      p.out[i] = d * mean_by;
      p.out[p.c + i] = (var - run) * var_by;
    } else {
      const A r = p.variance(run);
      p.out[i] = mean_by * d / r;
      p.out[p.c + i] = var >= A(1e-8) ? var_by * A(0.5) * (A(1) / r - A(1) / var) : A(0);
    }
  }
}

template <class F> void with_width(const BnLossParams& p, const F& f) {
  const auto made = [&](auto zero) {
    using A = decltype(zero);
    f(Loss<A>{(const A*)p.stats, (const A*)p.target, (const A*)p.average, (const A*)p.grad, p.calls, p.offsets, (A*)p.out, p.c,
              p.layers, p.kind, p.momentum, p.first});
  };
  if (p.dtype == kFloat64) made(double{});
  else made(float{});
}

}  // namespace

void bn_loss_fwd_cuda(const BnLossParams& p, void* stream) {
  with_width(p, [&](const auto& loss) {
    bn_loss_fwd_kernel<<<1, kForward, 0, static_cast<cudaStream_t>(stream)>>>(loss);
    check_launch("bn_loss_fwd", p.layers, 2, p.c);
  });
}

void bn_loss_bwd_cuda(const BnLossParams& p, void* stream) {
  with_width(p, [&](const auto& loss) {
    bn_loss_bwd_kernel<<<unsigned(p.layers), kBackward, 0, static_cast<cudaStream_t>(stream)>>>(loss);
    check_launch("bn_loss_bwd", p.layers, 2, p.c);
  });
}

}  // namespace fastkd
