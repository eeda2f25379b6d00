// CUDA kernels of the BN-statistic ops. Memory-bound: a thread moves 16 bytes at a time where the rows allow it (8, or one element,
// elsewhere). Activation, residual and gy are run-time branches, equal for all threads of a launch and taken once a vector. Their launches
// cost the host less than Triton's, their twins in Triton take less time on the device: in graphs those are preferred (`Op.captured`).
// Forward: sums as bn_cuda.cuh cuts them. Backward: a matrix of planes by positions (NCHW) or of positions by channels (NHWC), row by row.
// Written with the generic kernels of bn_cuda.cuh both were slower in half precision (0.35 ms for 0.24 ms, 64 x 64 x 112 x 112 on an H100).
#include "bn_cuda.cuh"
#include "bn_match.h"

namespace fastkd {
namespace {

constexpr int kThreads = kBnThreads;

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

// The constants of the channels of a vector: V of them side by side (NHWC), or one for all (NCHW).
template <class A, int V> struct Channels {
  A shift[V], scale[V], bias[V];

  __device__ Channels(const A* k, const A* sc, const A* bi, int64_t ch, int64_t step) {
    for (int q = 0; q < V; ++q) {
      shift[q] = k[ch + q * step];
      scale[q] = sc ? sc[ch + q * step] : A(0);
      bias[q] = sc ? bi[ch + q * step] : A(0);
    }
  }
};

template <class T, int V, class A>
__device__ void one(const Fwd<T>& p, int64_t at, const Pack<T, V>& x, const Channels<A, V>& k, A (&s1)[V], A (&s2)[V]) {
  A v[V];
  for (int q = 0; q < V; ++q) {
    v[q] = load(x.v[q]);
    const A d = v[q] - k.shift[q];
    s1[q] += d;
    s2[q] += d * d;
  }
  if (!p.y) return;
  for (int q = 0; q < V; ++q) v[q] = v[q] * k.scale[q] + k.bias[q];
  if (p.residual) {
    const Pack<T, V> r = load_pack<V>(p.residual + at);
    for (int q = 0; q < V; ++q) v[q] += load(r.v[q]);
  }
  activate<V>(v, p.act, p.slope);
  store_pack<V>(p.y + at, v);
}

template <class T, int V> __global__ void __launch_bounds__(kThreads) bn_fwd_nchw_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  const int64_t g = blockIdx.x / p.c, ch = blockIdx.x % p.c, width = p.hw / V;
  const int64_t end = min(p.n, (g + 1) * p.per), down = kThreads / width, right = kThreads % width;
  int64_t i = g * p.per + threadIdx.x / width, j = threadIdx.x % width;
  const Channels<A, V> k(p.shift, p.scale, p.bias, ch, 0);
  A s1[V] = {}, s2[V] = {};
  while (i < end) {
    Pack<T, V> x[kAhead];
    int64_t at[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      at[u] = i < end ? (i * p.c + ch) * p.hw + j * V : -1;
      if (at[u] >= 0) x[u] = load_pack<V>(p.x + at[u]);
      i += down;
      j += right;
      if (j >= width) j -= width, ++i;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at[u] >= 0) one<T, V>(p, at[u], x[u], k, s1, s2);
  }
  A t1 = 0, t2 = 0;
  for (int q = 0; q < V; ++q) t1 += s1[q], t2 += s2[q];
  store_block_sums<kThreads>(t1, t2, p.partial + 2 * g * p.c + ch, p.c);
}

// blockDim: x vectors of channels, y rows at a time; x * y = kThreads.
template <class T, int V> __global__ void __launch_bounds__(kThreads) bn_fwd_nhwc_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  const int wide = blockDim.x * V;
  const int64_t blocks = (p.c + wide - 1) / wide, g = blockIdx.x / blocks, c0 = blockIdx.x % blocks * wide;
  const int64_t ch = c0 + threadIdx.x * V, end = min(p.n * p.hw, (g + 1) * p.per);
  A s1[V] = {}, s2[V] = {};
  if (ch < p.c) {
    const Channels<A, V> k(p.shift, p.scale, p.bias, ch, 1);
    for (int64_t row = g * p.per + threadIdx.y; row < end; row += kAhead * blockDim.y) {
      Pack<T, V> x[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (row + u * blockDim.y < end) x[u] = load_pack<V>(p.x + (row + u * blockDim.y) * p.c + ch);
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (row + u * blockDim.y < end) one<T, V>(p, (row + u * blockDim.y) * p.c + ch, x[u], k, s1, s2);
    }
  }
  __shared__ A part[2][kThreads * V];  // [rows, channels]
  for (int q = 0; q < V; ++q) {
    const int at = threadIdx.y * wide + threadIdx.x * V + q;
    part[0][at] = s1[q];
    part[1][at] = s2[q];
  }
  __syncthreads();
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < 2 * wide; i += kThreads) {
    const int which = i / wide, col = i % wide;
    if (c0 + col >= p.c) continue;
    double t = 0;
    for (int r = 0; r < int(blockDim.y); ++r) t += part[which][r * wide + col];
    p.partial[(2 * g + which) * p.c + c0 + col] = t;
  }
}

template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  const T *gy, *x, *residual;
  const A *gsums, *scale, *bias, *shift;
  T *dx, *dresidual;
  int64_t c, rows, cols;
  int act;
  A slope;
};

// What backward knows of a channel beside its constants.
template <class A, int V> struct Slopes : Channels<A, V> {
  A g1[V], g2[V];

  template <class T>
  __device__ Slopes(const Bwd<T>& p, int64_t ch, int64_t step) : Channels<A, V>(p.shift, p.scale, p.bias, ch, step) {
    for (int q = 0; q < V; ++q) {
      g1[q] = p.gsums ? p.gsums[ch + q * step] : A(0);
      g2[q] = p.gsums ? A(2) * p.gsums[p.c + ch + q * step] : A(0);
    }
  }
};

template <class T, int V, class A> __device__ void one(const Bwd<T>& p, int64_t at, const Slopes<A, V>& k) {
  const Pack<T, V> x = load_pack<V>(p.x + at);
  A d[V] = {};
  if (p.gsums)  // else 0 also where x is not finite
    for (int q = 0; q < V; ++q) d[q] = k.g1[q] + k.g2[q] * (A(load(x.v[q])) - k.shift[q]);
  if (p.gy) {
    const Pack<T, V> gy = load_pack<V>(p.gy + at);
    A pre[V], g[V];
    for (int q = 0; q < V; ++q) {
      pre[q] = load(x.v[q]) * k.scale[q] + k.bias[q];
      g[q] = load(gy.v[q]);
    }
    if (p.residual) {
      const Pack<T, V> r = load_pack<V>(p.residual + at);
      for (int q = 0; q < V; ++q) pre[q] += load(r.v[q]);
    }
    mask<V>(pre, g, p.act, p.slope);
    if (p.dresidual) store_pack<V>(p.dresidual + at, g);
    for (int q = 0; q < V; ++q) d[q] += g[q] * k.scale[q];
  }
  store_pack<V>(p.dx + at, d);
}

// blockDim: x vectors of a row, y rows at a time. Rows are planes, channel = row % c.
template <class T, int V> __global__ void __launch_bounds__(kThreads) bn_bwd_nchw_kernel(const Bwd<T> p) {
  using A = typename Acc<T>::type;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows; row += int64_t(gridDim.x) * blockDim.y) {
    const Slopes<A, V> k(p, row % p.c, 0);
#pragma unroll 2
    for (int64_t col = threadIdx.x * V; col < p.cols; col += blockDim.x * V) one<T, V>(p, row * p.cols + col, k);
  }
}

// The same with channels in a row: a thread keeps its channels.
template <class T, int V> __global__ void __launch_bounds__(kThreads) bn_bwd_nhwc_kernel(const Bwd<T> p) {
  using A = typename Acc<T>::type;
  const int wide = blockDim.x * V;
  const int64_t blocks = (p.cols + wide - 1) / wide, ch = blockIdx.x % blocks * wide + threadIdx.x * V;
  if (ch >= p.cols) return;
  const Slopes<A, V> k(p, ch, 1);
  const int64_t step = gridDim.x / blocks * blockDim.y;
#pragma unroll 2
  for (int64_t row = blockIdx.x / blocks * blockDim.y + threadIdx.y; row < p.rows; row += step) one<T, V>(p, row * p.cols + ch, k);
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
      with_vector<T>(z.layout == kNCHW ? z.hw : z.c, {p.x, p.residual, p.y}, [&](auto v) {
        constexpr int V = decltype(v)::value;
        if (z.layout == kNCHW) {
          bn_fwd_nchw_kernel<T, V><<<unsigned(z.groups * z.c), kThreads, 0, s>>>(f);
        } else {
          const dim3 block = bn_block((z.c + V - 1) / V, kWide / V);
          const int64_t blocks = (z.c + block.x * V - 1) / (block.x * V);
          bn_fwd_nhwc_kernel<T, V><<<unsigned(z.groups * blocks), block, 0, s>>>(f);
        }
      });
      check_launch("bn_fwd", z.n, z.c, z.hw);
    }
    bn_finish<A>((const double*)p.partial, nullptr, (A*)p.sums, z, s);
  });
}

void bn_bwd_cuda(const BnGradParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  const bool last = z.layout == kNHWC;
  const int64_t rows = last ? z.n * z.hw : z.n * z.c, cols = last ? z.c : z.hw;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Bwd<T> b{(const T*)p.gy, (const T*)p.x, (const T*)p.residual, (const A*)p.gsums, (const A*)p.scale, (const A*)p.bias,
                   (const A*)p.shift, (T*)p.dx, (T*)p.dresidual, z.c, rows, cols, p.act, A(p.slope)};
    with_vector<T>(cols, {p.x, p.gy, p.residual, p.dx, p.dresidual}, [&](auto v) {
      constexpr int V = decltype(v)::value;
      const dim3 block = bn_block((cols + V - 1) / V, last ? kWide / V : kThreads);
      if (last) {
        const int64_t blocks = (cols + block.x * V - 1) / (block.x * V);
        const int64_t groups = blocks_for(rows, kAhead * block.y), most = (4096 + blocks - 1) / blocks;
        bn_bwd_nhwc_kernel<T, V><<<unsigned(blocks * (groups < most ? groups : most)), block, 0, s>>>(b);
      } else {
        bn_bwd_nchw_kernel<T, V><<<blocks_for(rows, block.y), block, 0, s>>>(b);
      }
    });
    check_launch("bn_bwd", z.n, z.c, z.hw);
  });
}

}  // namespace fastkd
