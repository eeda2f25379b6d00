// CUDA kernels of the BN-statistic ops. Memory-bound: activation, residual and gy are run-time branches, equal for all threads.
// Forward: a block sums a fixed piece (`per` images of one channel in NCHW; `per` rows of 32 channels in NHWC) and writes its
// partial; a second kernel adds the partials in a fixed order. No atomics, no workspace state: the same bits every time.
#include "bn_match.h"
#include "common.cuh"

namespace fastkd {
namespace {

constexpr int kThreads = 256, kX = 32, kY = 8;

template <class T> struct Fwd {
  using A = typename Acc<T>::type;
  const T *x, *residual;
  const A *scale, *bias, *shift;
  T* y;
  double* partial;
  int64_t n, c, hw, groups, per;
  int act;
  A slope;
};

// NaN passes as in torch: every comparison is false for it.
template <class A> __device__ A activate(A v, int act, A slope) {
  if (act == kRelu) return v <= A(0) ? A(0) : v;
  if (act == kRelu6) return v <= A(0) ? A(0) : (v >= A(6) ? A(6) : v);
  if (act == kLeakyRelu) return v > A(0) ? v : v * slope;
  return v;
}
template <class A> __device__ A masked(A v, A g, int act, A slope) {
  if (act == kRelu) return v <= A(0) ? A(0) : g;
  if (act == kRelu6) return v <= A(0) || v >= A(6) ? A(0) : g;
  if (act == kLeakyRelu) return v > A(0) ? g : g * slope;
  return g;
}

template <class T, class A> __device__ void one(const Fwd<T>& p, int64_t at, int64_t ch, A k, A& s1, A& s2) {
  const A v = load(p.x[at]), d = v - k;
  s1 += d;
  s2 += d * d;
  if (p.y) {
    A pre = v * p.scale[ch] + p.bias[ch];
    if (p.residual) pre += load(p.residual[at]);
    store(p.y[at], activate(pre, p.act, p.slope));
  }
}

// One block: one channel of `per` images.
template <class T> __global__ void bn_fwd_nchw_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  const int64_t g = blockIdx.x / p.c, ch = blockIdx.x % p.c;
  const int64_t end = min(p.n, (g + 1) * p.per), di = kThreads / p.hw, dj = kThreads % p.hw;
  int64_t i = g * p.per + threadIdx.x / p.hw, j = threadIdx.x % p.hw;
  const A k = p.shift[ch];
  A s1 = 0, s2 = 0;
  while (i < end) {
    one(p, (i * p.c + ch) * p.hw + j, ch, k, s1, s2);
    i += di;
    j += dj;
    if (j >= p.hw) j -= p.hw, ++i;
  }
  __shared__ A part[2][kThreads / 32];
  for (int o = 16; o; o >>= 1) s1 += __shfl_down_sync(~0u, s1, o), s2 += __shfl_down_sync(~0u, s2, o);
  if (threadIdx.x % 32 == 0) part[0][threadIdx.x / 32] = s1, part[1][threadIdx.x / 32] = s2;
  __syncthreads();
  if (threadIdx.x < 2) {
    double t = 0;
    for (int w = 0; w < kThreads / 32; ++w) t += part[threadIdx.x][w];
    p.partial[(2 * g + threadIdx.x) * p.c + ch] = t;
  }
}

// One block: 32 channels of `per` rows; eight rows at a time.
template <class T> __global__ void bn_fwd_nhwc_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  const int64_t blocks = (p.c + kX - 1) / kX, g = blockIdx.x / blocks, ch = blockIdx.x % blocks * kX + threadIdx.x;
  const int64_t end = min(p.n * p.hw, (g + 1) * p.per);
  A s1 = 0, s2 = 0;
  if (ch < p.c) {
    const A k = p.shift[ch];
    for (int64_t row = g * p.per + threadIdx.y; row < end; row += kY) one(p, row * p.c + ch, ch, k, s1, s2);
  }
  __shared__ A part[2][kY][kX];
  part[0][threadIdx.y][threadIdx.x] = s1;
  part[1][threadIdx.y][threadIdx.x] = s2;
  __syncthreads();
  if (threadIdx.y < 2 && ch < p.c) {
    double t = 0;
    for (int r = 0; r < kY; ++r) t += part[threadIdx.y][r][threadIdx.x];
    p.partial[(2 * g + threadIdx.y) * p.c + ch] = t;
  }
}

// sums[i] = partial[0, i] + partial[1, i] + …: eight interleaved strands, then the strands in order.
template <class A> __global__ void bn_finish_kernel(const double* partial, A* sums, int64_t groups, int64_t columns) {
  const int64_t i = int64_t(blockIdx.x) * kX + threadIdx.x;
  double t = 0;
  if (i < columns)
    for (int64_t g = threadIdx.y; g < groups; g += kY) t += partial[g * columns + i];
  __shared__ double strand[kY][kX];
  strand[threadIdx.y][threadIdx.x] = t;
  __syncthreads();
  if (threadIdx.y == 0 && i < columns) {
    t = 0;
    for (int r = 0; r < kY; ++r) t += strand[r][threadIdx.x];
    sums[i] = A(t);
  }
}

template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  const T *gy, *x, *residual;
  const A *gsums, *scale, *bias, *shift;
  T *dx, *dresidual;
  int64_t c, hw, total;
  int act, layout;
  A slope;
};

// I: 32-bit indices where the tensor allows, because of the division per element.
template <class T, class I> __global__ void bn_bwd_kernel(const Bwd<T> p) {
  using A = typename Acc<T>::type;
  const I c = I(p.c), hw = I(p.hw);
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < p.total; e += int64_t(gridDim.x) * kThreads) {
    const I at = I(e), ch = p.layout == kNHWC ? at % c : at / hw % c;
    const A v = load(p.x[at]);
    A d = p.gsums ? p.gsums[ch] + A(2) * p.gsums[c + ch] * (v - p.shift[ch]) : A(0);
    if (p.gy) {
      A pre = v * p.scale[ch] + p.bias[ch];
      if (p.residual) pre += load(p.residual[at]);
      const A g = masked(pre, A(load(p.gy[at])), p.act, p.slope);
      d += g * p.scale[ch];
      if (p.dresidual) store(p.dresidual[at], g);
    }
    store(p.dx[at], d);
  }
}

}  // namespace

void bn_fwd_cuda(const BnParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Fwd<T> f{(const T*)p.x, (const T*)p.residual, (const A*)p.scale, (const A*)p.bias, (const A*)p.shift, (T*)p.y,
                   (double*)p.partial, z.n, z.c, z.hw, z.groups, z.per, p.act, A(p.slope)};
    if (z.groups * z.c > 0) {
      if (z.layout == kNCHW) bn_fwd_nchw_kernel<T><<<unsigned(z.groups * z.c), kThreads, 0, s>>>(f);
      else bn_fwd_nhwc_kernel<T><<<unsigned(z.groups * ((z.c + kX - 1) / kX)), dim3(kX, kY), 0, s>>>(f);
      check_launch("bn_fwd", z.n, z.c, z.hw);
    }
    if (z.c == 0) return;
    bn_finish_kernel<A><<<unsigned((2 * z.c + kX - 1) / kX), dim3(kX, kY), 0, s>>>((const double*)p.partial, (A*)p.sums, z.groups, 2 * z.c);
    check_launch("bn_finish", z.groups, 2, z.c);
  });
}

void bn_bwd_cuda(const BnGradParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  const int64_t total = z.n * z.c * z.hw;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Bwd<T> b{(const T*)p.gy, (const T*)p.x, (const T*)p.residual, (const A*)p.gsums, (const A*)p.scale, (const A*)p.bias,
                   (const A*)p.shift, (T*)p.dx, (T*)p.dresidual, z.c, z.hw, total, p.act, z.layout, A(p.slope)};
    const unsigned grid = blocks_for(total, kThreads);
    if (total < (int64_t(1) << 31)) bn_bwd_kernel<T, uint32_t><<<grid, kThreads, 0, s>>>(b);
    else bn_bwd_kernel<T, int64_t><<<grid, kThreads, 0, s>>>(b);
    check_launch("bn_bwd", z.n, z.c, z.hw);
  });
}

}  // namespace fastkd
