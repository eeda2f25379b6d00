// CUDA kernels of BatchNorm with batch statistics and activation. Memory-bound: activation and bias are run-time branches, equal for
// all threads. The sums of backward are cut as those of bn_match.cu are; a second kernel adds the partials in a fixed order, without
// atomics. The passes move 16 bytes a thread where the rows allow it.
#include "bn_act.h"
#include "common.cuh"

namespace fastkd {
namespace {

constexpr int kThreads = 256, kX = 32, kY = 8;

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

// One thread a channel.
template <class A> __global__ void bn_stats_kernel(const A* sums, const A* shift, const A* weight, A* stats, int64_t c, double n, double eps) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= c) return;
  const double d = double(sums[i]) / n, raw = double(sums[c + i]) / n - d * d;
  const double var = raw < 0 ? 0 : raw, rstd = 1 / sqrt(var + eps);  // below 0 is rounding; NaN stays
  stats[kMean * c + i] = A(double(shift[i]) + d);
  stats[kUnbiased * c + i] = A(var * (n / (n - 1)));
  stats[kRstd * c + i] = A(rstd);
  stats[kScale * c + i] = A(weight ? rstd * double(weight[i]) : rstd);
}

template <class T> struct Pass {
  using A = typename Acc<T>::type;
  const T *gy, *x;
  T* out;
  const A *stats, *bias, *gsums;
  double* partial;
  int64_t n, c, hw, groups, per, total;
  int act, layout;
  A slope, inverse;  // inverse: 1 / count

  __device__ A pre(A d, int64_t ch) const { return d * stats[kScale * c + ch] + (bias ? bias[ch] : A(0)); }
  __device__ A forward(A v, int64_t ch) const { return activate(pre(v - stats[kMean * c + ch], ch), act, slope); }
  __device__ A backward(A v, A grad, int64_t ch) const {
    const A d = v - stats[kMean * c + ch], g = masked(pre(d, ch), grad, act, slope);
    return stats[kScale * c + ch] * (g - (gsums[ch] + stats[kRstd * c + ch] * d * gsums[c + ch]) * inverse);
  }
};

// kVec neighbours a thread: of one channel (NCHW, hw a multiple of kVec) or of as many channels (NHWC, c a multiple). I: 32-bit
// indices where the tensor allows, because of the divisions.
template <class T, class I, int kVec> __global__ void bn_act_kernel(const Pass<T> p) {
  using P = Pack<T, kVec>;
  const I c = I(p.c), hw = I(p.hw);
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < p.total / kVec; e += int64_t(gridDim.x) * kThreads) {
    const I at = I(e * kVec), ch = p.layout == kNHWC ? at % c : at / hw % c;
    const P x = reinterpret_cast<const P*>(p.x)[e];
    P out;
    if (p.gy) out = reinterpret_cast<const P*>(p.gy)[e];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const I own = p.layout == kNHWC ? ch + i : ch;
      store(out.v[i], p.gy ? p.backward(load(x.v[i]), load(out.v[i]), own) : p.forward(load(x.v[i]), own));
    }
    reinterpret_cast<P*>(p.out)[e] = out;
  }
}

template <class T, class A> __device__ void add(const Pass<T>& p, int64_t at, int64_t ch, A& t1, A& t2) {
  const A d = A(load(p.x[at])) - p.stats[kMean * p.c + ch];
  const A g = masked(p.pre(d, ch), A(load(p.gy[at])), p.act, p.slope);
  t1 += g;
  t2 += g * d;
}

// One block: one channel of `per` images.
template <class T> __global__ void bn_act_sums_nchw_kernel(const Pass<T> p) {
  using A = typename Acc<T>::type;
  const int64_t g = blockIdx.x / p.c, ch = blockIdx.x % p.c;
  const int64_t end = min(p.n, (g + 1) * p.per), di = kThreads / p.hw, dj = kThreads % p.hw;
  int64_t i = g * p.per + threadIdx.x / p.hw, j = threadIdx.x % p.hw;
  A t1 = 0, t2 = 0;
  while (i < end) {
    add(p, (i * p.c + ch) * p.hw + j, ch, t1, t2);
    i += di;
    j += dj;
    if (j >= p.hw) j -= p.hw, ++i;
  }
  store_block_sums<kThreads>(t1, t2, p.partial + 2 * g * p.c + ch, p.c);
}

// One block: 32 channels of `per` rows; eight rows at a time.
template <class T> __global__ void bn_act_sums_nhwc_kernel(const Pass<T> p) {
  using A = typename Acc<T>::type;
  const int64_t blocks = (p.c + kX - 1) / kX, g = blockIdx.x / blocks, ch = blockIdx.x % blocks * kX + threadIdx.x;
  const int64_t end = min(p.n * p.hw, (g + 1) * p.per);
  A t1 = 0, t2 = 0;
  if (ch < p.c)
    for (int64_t row = g * p.per + threadIdx.y; row < end; row += kY) add(p, row * p.c + ch, ch, t1, t2);
  __shared__ A part[2][kY][kX];
  part[0][threadIdx.y][threadIdx.x] = t1;
  part[1][threadIdx.y][threadIdx.x] = t2;
  __syncthreads();
  if (threadIdx.y < 2 && ch < p.c) {
    double t = 0;
    for (int r = 0; r < kY; ++r) t += part[threadIdx.y][r][threadIdx.x];
    p.partial[(2 * g + threadIdx.y) * p.c + ch] = t;
  }
}

// gsums[i] = partial[0, i] + partial[1, i] + …, the second row times r: eight interleaved strands, then the strands in order.
template <class A> __global__ void bn_act_finish_kernel(const double* partial, const A* stats, A* gsums, int64_t groups, int64_t c) {
  const int64_t i = int64_t(blockIdx.x) * kX + threadIdx.x;
  double t = 0;
  if (i < 2 * c)
    for (int64_t g = threadIdx.y; g < groups; g += kY) t += partial[g * 2 * c + i];
  __shared__ double strand[kY][kX];
  strand[threadIdx.y][threadIdx.x] = t;
  __syncthreads();
  if (threadIdx.y == 0 && i < 2 * c) {
    t = 0;
    for (int r = 0; r < kY; ++r) t += strand[r][threadIdx.x];
    gsums[i] = A(i < c ? t : t * double(stats[kRstd * c + i - c]));
  }
}

template <class T, class I> void launch(const Pass<T>& p, cudaStream_t s) {
  constexpr int kVec = 16 / sizeof(T);
  const auto aligned = [](const void* a) { return reinterpret_cast<uintptr_t>(a) % 16 == 0; };
  const bool wide = (p.layout == kNHWC ? p.c : p.hw) % kVec == 0 && aligned(p.x) && aligned(p.gy) && aligned(p.out);
  if (wide) bn_act_kernel<T, I, kVec><<<blocks_for(p.total / kVec, kThreads), kThreads, 0, s>>>(p);
  else bn_act_kernel<T, I, 1><<<blocks_for(p.total, kThreads), kThreads, 0, s>>>(p);
}

template <class T> void launch(const Pass<T>& p, cudaStream_t s, const char* name) {
  if (p.total < (int64_t(1) << 31)) launch<T, uint32_t>(p, s);
  else launch<T, int64_t>(p, s);
  check_launch(name, p.n, p.c, p.hw);
}

template <class T> Pass<T> pass_of(const BnActGradParams& p) {
  using A = typename Acc<T>::type;
  const Sizes& z = p.s;
  return {(const T*)p.gy, (const T*)p.x, (T*)p.dx, (const A*)p.stats, (const A*)p.bias, (const A*)p.gsums, (double*)p.partial, z.n, z.c,
          z.hw, z.groups, z.per, z.n * z.c * z.hw, p.act, z.layout, A(p.slope), A(1.0 / double(p.count))};
}

}  // namespace

void bn_act_fwd_cuda(const BnActParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    bn_stats_kernel<A><<<unsigned((z.c + kThreads - 1) / kThreads), kThreads, 0, s>>>(
        (const A*)p.sums, (const A*)p.shift, (const A*)p.weight, (A*)p.stats, z.c, double(p.count), p.eps);
    check_launch("bn_stats", 1, z.c, 1);
    const Pass<T> pass{nullptr, (const T*)p.x, (T*)p.y, (const A*)p.stats, (const A*)p.bias, nullptr, nullptr, z.n, z.c, z.hw, z.groups,
                       z.per, z.n * z.c * z.hw, p.act, z.layout, A(p.slope), A(0)};
    launch(pass, s, "bn_act_fwd");
  });
}

void bn_act_bwd_sums_cuda(const BnActGradParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Pass<T> pass = pass_of<T>(p);
    if (z.layout == kNCHW) bn_act_sums_nchw_kernel<T><<<unsigned(z.groups * z.c), kThreads, 0, s>>>(pass);
    else bn_act_sums_nhwc_kernel<T><<<unsigned(z.groups * ((z.c + kX - 1) / kX)), dim3(kX, kY), 0, s>>>(pass);
    check_launch("bn_act_bwd_sums", z.n, z.c, z.hw);
    bn_act_finish_kernel<A><<<unsigned((2 * z.c + kX - 1) / kX), dim3(kX, kY), 0, s>>>((const double*)p.partial, (const A*)p.stats,
                                                                                      (A*)p.gsums, z.groups, z.c);
    check_launch("bn_act_finish", z.groups, 2, z.c);
  });
}

void bn_act_bwd_cuda(const BnActGradParams& p, void* stream) {
  with_type(p.s.dtype, [&](auto t) { launch(pass_of<decltype(t)>(p), static_cast<cudaStream_t>(stream), "bn_act_bwd"); });
}

}  // namespace fastkd
