// How CUDA kernels of BatchNorm walk over [n, c, hw], one channel's constants in registers, and how their sums are cut. An operation P
// is a struct of pointers and sizes (n, c, hw, per, partial) with
//   In<V>: what is read of a vector, Constants<V>: of its channels,
//   apply(at, in, constants, s1, s2): the work on a vector, which may add to two sums a channel.
// Memory-bound: a thread asks for kAhead vectors before it uses the first, and finds its channel without a division per element.
// Sums: a block sums a fixed piece and writes its partial; `bn_finish_kernel` adds the partials in a fixed order. No atomics, no
// workspace state: the same bits every time.
//   NCHW: a piece is one channel of `per` images.
//   NHWC: a piece is `per` rows of up to 64 channels; a thread keeps the channels of its vector and walks down the rows.
#pragma once
#include "common.cuh"

namespace fastkd {
namespace {

constexpr int kBnThreads = 256, kAhead = 4, kWide = 64;  // channels of NHWC side by side in a block
constexpr int kStrandX = 32, kStrandY = 32;

// NaN passes as in torch: every comparison is false for it.
template <int V, class A> __device__ void activate(A (&v)[V], int act, A slope) {
  if (act == kRelu) {
    for (int q = 0; q < V; ++q) v[q] = v[q] <= A(0) ? A(0) : v[q];
  } else if (act == kRelu6) {
    for (int q = 0; q < V; ++q) v[q] = v[q] <= A(0) ? A(0) : v[q] >= A(6) ? A(6) : v[q];
  } else if (act == kLeakyRelu) {
    for (int q = 0; q < V; ++q) v[q] = v[q] > A(0) ? v[q] : v[q] * slope;
  }
}
template <int V, class A> __device__ void mask(const A (&v)[V], A (&g)[V], int act, A slope) {
  if (act == kRelu) {
    for (int q = 0; q < V; ++q) g[q] = v[q] <= A(0) ? A(0) : g[q];
  } else if (act == kRelu6) {
    for (int q = 0; q < V; ++q) g[q] = v[q] <= A(0) || v[q] >= A(6) ? A(0) : g[q];
  } else if (act == kLeakyRelu) {
    for (int q = 0; q < V; ++q) g[q] = v[q] > A(0) ? g[q] : g[q] * slope;
  }
}

// Where the vectors of a thread lie in a piece of NCHW (channel `ch` of the images from `first`), kAhead at a time; -1: none is left.
// 32-bit division: one of 64 bits costs as much as the work on a vector.
template <int V, class F> __device__ void each_batch(int64_t first, int64_t end, int64_t c, int64_t ch, int64_t hw, const F& visit) {
  const unsigned width = unsigned(hw / V), down = kBnThreads / width, right = kBnThreads % width;
  int64_t i = first + threadIdx.x / width;
  unsigned j = threadIdx.x % width;
  while (i < end) {
    int64_t at[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      at[u] = i < end ? (i * c + ch) * hw + int64_t(j) * V : -1;
      i += down;
      j += right;
      if (j >= width) j -= width, ++i;
    }
    visit(at);
  }
}

template <class P, int V, class A>
__device__ void piece_nchw(const P& p, unsigned g, unsigned ch, A (&s1)[V], A (&s2)[V]) {
  const typename P::template Constants<V> k(p, ch, 0);
  each_batch<V>(g * p.per, min(p.n, (g + 1) * p.per), p.c, ch, p.hw, [&](const int64_t (&at)[kAhead]) {
    typename P::template In<V> in[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at[u] >= 0) in[u].from(p, at[u]);
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at[u] >= 0) p.apply(at[u], in[u], k, s1, s2);
  });
}

template <class P, int V> __global__ void __launch_bounds__(kBnThreads, 3) bn_each_nchw_kernel(const P p) {
  typename P::A s1[V] = {}, s2[V] = {};  // not used
  piece_nchw(p, blockIdx.x / unsigned(p.c), blockIdx.x % unsigned(p.c), s1, s2);
}

template <class P, int V> __global__ void __launch_bounds__(kBnThreads, 2) bn_sums_nchw_kernel(const P p) {
  using A = typename P::A;
  const unsigned g = blockIdx.x / unsigned(p.c), ch = blockIdx.x % unsigned(p.c);
  A s1[V] = {}, s2[V] = {}, t1 = 0, t2 = 0;
  piece_nchw(p, g, ch, s1, s2);
  for (int q = 0; q < V; ++q) t1 += s1[q], t2 += s2[q];
  store_block_sums<kBnThreads>(t1, t2, p.partial + 2 * g * p.c + ch, p.c);
}

// blockDim: x vectors of channels, y rows at a time; x * y = kBnThreads. kAhead rows from `row` on.
template <class P, int V, class A>
__device__ void rows_nhwc(const P& p, int64_t row, int64_t end, int64_t ch, const typename P::template Constants<V>& k, A (&s1)[V],
                          A (&s2)[V]) {
  typename P::template In<V> in[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u)
    if (row + u * blockDim.y < end) in[u].from(p, (row + u * blockDim.y) * p.c + ch);
#pragma unroll
  for (int u = 0; u < kAhead; ++u)
    if (row + u * blockDim.y < end) p.apply((row + u * blockDim.y) * p.c + ch, in[u], k, s1, s2);
}

template <class P, int V> __global__ void __launch_bounds__(kBnThreads, 2) bn_each_nhwc_kernel(const P p) {
  const unsigned wide = blockDim.x * V, blocks = unsigned((p.c + wide - 1) / wide);
  const int64_t ch = int64_t(blockIdx.x % blocks) * wide + threadIdx.x * V;
  if (ch >= p.c) return;
  typename P::A s1[V] = {}, s2[V] = {};  // not used
  const typename P::template Constants<V> k(p, ch, 1);
  rows_nhwc<P, V>(p, int64_t(blockIdx.x / blocks) * kAhead * blockDim.y + threadIdx.y, p.n * p.hw, ch, k, s1, s2);
}

template <class P, int V> __global__ void __launch_bounds__(kBnThreads, 2) bn_sums_nhwc_kernel(const P p) {
  using A = typename P::A;
  const unsigned wide = blockDim.x * V, blocks = unsigned((p.c + wide - 1) / wide);
  const int64_t g = blockIdx.x / blocks, c0 = int64_t(blockIdx.x % blocks) * wide;
  const int64_t ch = c0 + threadIdx.x * V, end = min(p.n * p.hw, (g + 1) * p.per);
  A s1[V] = {}, s2[V] = {};
  if (ch < p.c) {
    const typename P::template Constants<V> k(p, ch, 1);
    for (int64_t row = g * p.per + threadIdx.y; row < end; row += kAhead * blockDim.y) rows_nhwc<P, V>(p, row, end, ch, k, s1, s2);
  }
  __shared__ A part[2][kBnThreads * V];  // [rows, channels]
  for (int q = 0; q < V; ++q) {
    const int at = threadIdx.y * wide + threadIdx.x * V + q;
    part[0][at] = s1[q];
    part[1][at] = s2[q];
  }
  __syncthreads();
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < 2 * int(wide); i += kBnThreads) {
    const int which = i / int(wide), col = i % int(wide);
    if (c0 + col >= p.c) continue;
    double t = 0;
    for (int r = 0; r < int(blockDim.y); ++r) t += part[which][r * wide + col];
    p.partial[(2 * g + which) * p.c + c0 + col] = t;
  }
}

// sums[i] = partial[0, i] + partial[1, i] + …: interleaved strands, then the strands in order; the second half of the columns times
// `factor` of its channel, if there is one.
template <class A>
__global__ void __launch_bounds__(kStrandX* kStrandY)
    bn_finish_kernel(const double* partial, const A* factor, A* sums, int64_t groups, int64_t c) {
  const int64_t i = int64_t(blockIdx.x) * kStrandX + threadIdx.x, columns = 2 * c;
  double t = 0;
  if (i < columns) {
#pragma unroll 8
    for (int64_t g = threadIdx.y; g < groups; g += kStrandY) t += partial[g * columns + i];
  }
  __shared__ double strand[kStrandY][kStrandX];
  strand[threadIdx.y][threadIdx.x] = t;
  __syncthreads();
  if (threadIdx.y == 0 && i < columns) {
    t = 0;
    for (int r = 0; r < kStrandY; ++r) t += strand[r][threadIdx.x];
    sums[i] = A(factor && i >= c ? t * double(factor[i - c]) : t);
  }
}

// Vectors of channels side by side, and rows, in a block.
inline dim3 bn_block(int64_t vectors, int most) {
  int x = 1;
  while (x < vectors && x < most) x *= 2;
  return dim3(x, kBnThreads / x);
}

// The work on every element, in vectors of V.
template <int V, class P> void bn_each(const P& p, const Sizes& z, cudaStream_t s) {
  if (z.layout == kNCHW) {
    bn_each_nchw_kernel<P, V><<<unsigned(z.groups * z.c), kBnThreads, 0, s>>>(p);
  } else {
    const dim3 block = bn_block((z.c + V - 1) / V, kWide / V);
    const int64_t blocks = (z.c + block.x * V - 1) / (block.x * V), tall = kAhead * block.y;
    bn_each_nhwc_kernel<P, V><<<unsigned(blocks * ((z.n * z.hw + tall - 1) / tall)), block, 0, s>>>(p);
  }
}

// The same with the sums of each piece.
template <int V, class P> void bn_pieces(const P& p, const Sizes& z, cudaStream_t s) {
  if (z.layout == kNCHW) {
    bn_sums_nchw_kernel<P, V><<<unsigned(z.groups * z.c), kBnThreads, 0, s>>>(p);
  } else {
    const dim3 block = bn_block((z.c + V - 1) / V, kWide / V);
    const int64_t blocks = (z.c + block.x * V - 1) / (block.x * V);
    bn_sums_nhwc_kernel<P, V><<<unsigned(z.groups * blocks), block, 0, s>>>(p);
  }
}

template <class A> void bn_finish(const double* partial, const A* factor, A* sums, const Sizes& z, cudaStream_t s) {
  if (z.c == 0) return;
  const unsigned blocks = unsigned((2 * z.c + kStrandX - 1) / kStrandX);
  bn_finish_kernel<A><<<blocks, dim3(kStrandX, kStrandY), 0, s>>>(partial, factor, sums, z.groups, z.c);
  check_launch("bn_finish", z.groups, 2, z.c);
}

}  // namespace
}  // namespace fastkd
