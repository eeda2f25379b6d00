// CUDA kernels of the BN-statistic ops. Memory-bound: a thread moves 16 bytes at a time where the rows allow it (8, or one element,
// elsewhere) and finds its channel without a division per element. Activation, residual and gy are run-time branches, equal for all
// threads of a launch and taken once a vector.
// Forward: a block sums a fixed piece and writes its partial; a second kernel adds the partials in a fixed order. No atomics, no
// workspace state: the same bits every time.
//   NCHW: a piece is one channel of `per` images.
//   NHWC: a piece is `per` rows of up to 64 channels; a thread keeps the channels of its vector and walks down the rows.
// Backward: a block takes such a piece of NCHW, and of NHWC a few rows.
#include "bn_match.h"
#include "common.cuh"

namespace fastkd {
namespace {

constexpr int kThreads = 256, kAhead = 4;  // vectors that a thread asks for before it uses the first
constexpr int kStrandX = 32, kStrandY = 32;

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

// Where the vectors of a thread lie in a piece of NCHW (channel `ch` of `per` images from `first`), kAhead at a time; -1: none is left.
// 32-bit division: one of 64 bits costs as much as the work on a vector.
template <int V, class F> __device__ void each_batch(int64_t first, int64_t end, int64_t c, int64_t ch, int64_t hw, const F& visit) {
  const unsigned width = unsigned(hw / V), down = kThreads / width, right = kThreads % width;
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

template <class T, int V> __global__ void __launch_bounds__(kThreads) bn_fwd_nchw_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  const unsigned g = blockIdx.x / unsigned(p.c), ch = blockIdx.x % unsigned(p.c);
  const Channels<A, V> k(p.shift, p.scale, p.bias, ch, 0);
  A s1[V] = {}, s2[V] = {};
  each_batch<V>(g * p.per, min(p.n, (g + 1) * p.per), p.c, ch, p.hw, [&](const int64_t (&at)[kAhead]) {
    Pack<T, V> x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at[u] >= 0) x[u] = load_pack<V>(p.x + at[u]);
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at[u] >= 0) one<T, V>(p, at[u], x[u], k, s1, s2);
  });
  A t1 = 0, t2 = 0;
  for (int q = 0; q < V; ++q) t1 += s1[q], t2 += s2[q];
  store_block_sums<kThreads>(t1, t2, p.partial + 2 * g * p.c + ch, p.c);
}

// blockDim: x vectors of channels, y rows at a time; x * y = kThreads.
template <class T, int V> __global__ void __launch_bounds__(kThreads) bn_fwd_nhwc_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  const int wide = blockDim.x * V;
  const unsigned blocks = unsigned((p.c + wide - 1) / wide);
  const int64_t g = blockIdx.x / blocks, c0 = int64_t(blockIdx.x % blocks) * wide;
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

// sums[i] = partial[0, i] + partial[1, i] + …: interleaved strands, then the strands in order.
template <class A>
__global__ void __launch_bounds__(kStrandX* kStrandY) bn_finish_kernel(const double* partial, A* sums, int64_t groups, int64_t columns) {
  const int64_t i = int64_t(blockIdx.x) * kStrandX + threadIdx.x;
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
    sums[i] = A(t);
  }
}

template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  const T *gy, *x, *residual;
  const A *gsums, *scale, *bias, *shift;
  T *dx, *dresidual;
  int64_t n, c, hw, per;
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

// What backward reads of a vector. All of a thread's are asked for before the first is used.
template <class T, int V> struct Read {
  Pack<T, V> x, gy, residual;

  __device__ void from(const Bwd<T>& p, int64_t at) {
    x = load_pack<V>(p.x + at);
    if (p.gy) gy = load_pack<V>(p.gy + at);
    if (p.gy && p.residual) residual = load_pack<V>(p.residual + at);
  }
};

template <class T, int V, class A> __device__ void one(const Bwd<T>& p, int64_t at, const Read<T, V>& in, const Slopes<A, V>& k) {
  A d[V] = {};
  if (p.gsums)  // else 0 also where x is not finite
    for (int q = 0; q < V; ++q) d[q] = k.g1[q] + k.g2[q] * (A(load(in.x.v[q])) - k.shift[q]);
  if (p.gy) {
    A pre[V], g[V];
    for (int q = 0; q < V; ++q) {
      pre[q] = load(in.x.v[q]) * k.scale[q] + k.bias[q];
      g[q] = load(in.gy.v[q]);
    }
    if (p.residual)
      for (int q = 0; q < V; ++q) pre[q] += load(in.residual.v[q]);
    mask<V>(pre, g, p.act, p.slope);
    if (p.dresidual) store_pack<V>(p.dresidual + at, g);
    for (int q = 0; q < V; ++q) d[q] += g[q] * k.scale[q];
  }
  store_pack<V>(p.dx + at, d);
}

// A block takes one channel of `per` images, as forward does.
template <class T, int V> __global__ void __launch_bounds__(kThreads, 3) bn_bwd_nchw_kernel(const Bwd<T> p) {
  using A = typename Acc<T>::type;
  const unsigned g = blockIdx.x / unsigned(p.c), ch = blockIdx.x % unsigned(p.c);
  const Slopes<A, V> k(p, ch, 0);
  each_batch<V>(g * p.per, min(p.n, (g + 1) * p.per), p.c, ch, p.hw, [&](const int64_t (&at)[kAhead]) {
    Read<T, V> in[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at[u] >= 0) in[u].from(p, at[u]);
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at[u] >= 0) one<T, V>(p, at[u], in[u], k);
  });
}

// blockDim: x vectors of channels, y rows at a time; a thread takes kAhead rows of its channels.
template <class T, int V> __global__ void __launch_bounds__(kThreads, 3) bn_bwd_nhwc_kernel(const Bwd<T> p) {
  using A = typename Acc<T>::type;
  const int wide = blockDim.x * V;
  const unsigned blocks = unsigned((p.c + wide - 1) / wide);
  const int64_t ch = int64_t(blockIdx.x % blocks) * wide + threadIdx.x * V, rows = p.n * p.hw;
  if (ch >= p.c) return;
  const int64_t row = int64_t(blockIdx.x / blocks) * kAhead * blockDim.y + threadIdx.y;
  Read<T, V> in[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u)
    if (row + u * blockDim.y < rows) in[u].from(p, (row + u * blockDim.y) * p.c + ch);
  const Slopes<A, V> k(p, ch, 1);
#pragma unroll
  for (int u = 0; u < kAhead; ++u)
    if (row + u * blockDim.y < rows) one<T, V>(p, (row + u * blockDim.y) * p.c + ch, in[u], k);
}

// Vectors of a row side by side, and rows, in a block: as many vectors as the row has, up to `most`.
dim3 shape(int64_t vectors, int most) {
  int x = 1;
  while (x < vectors && x < most) x *= 2;
  return dim3(x, kThreads / x);
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
          const dim3 block = shape((z.c + V - 1) / V, 64 / V);
          const int64_t blocks = (z.c + block.x * V - 1) / (block.x * V);
          bn_fwd_nhwc_kernel<T, V><<<unsigned(z.groups * blocks), block, 0, s>>>(f);
        }
      });
      check_launch("bn_fwd", z.n, z.c, z.hw);
    }
    if (z.c == 0) return;
    bn_finish_kernel<A><<<unsigned((2 * z.c + kStrandX - 1) / kStrandX), dim3(kStrandX, kStrandY), 0, s>>>(
        (const double*)p.partial, (A*)p.sums, z.groups, 2 * z.c);
    check_launch("bn_finish", z.groups, 2, z.c);
  });
}

void bn_bwd_cuda(const BnGradParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Bwd<T> b{(const T*)p.gy, (const T*)p.x, (const T*)p.residual, (const A*)p.gsums, (const A*)p.scale, (const A*)p.bias,
                   (const A*)p.shift, (T*)p.dx, (T*)p.dresidual, z.n, z.c, z.hw, z.per, p.act, A(p.slope)};
    // Wider vectors take so many registers that a processor holds one block, and nothing is under way while it computes.
    with_vector<T, 4>(z.layout == kNCHW ? z.hw : z.c, {p.x, p.gy, p.residual, p.dx, p.dresidual}, [&](auto v) {
      constexpr int V = decltype(v)::value;
      if (z.layout == kNCHW) {
        bn_bwd_nchw_kernel<T, V><<<unsigned(z.groups * z.c), kThreads, 0, s>>>(b);
      } else {
        const dim3 block = shape((z.c + V - 1) / V, 64 / V);
        const int64_t blocks = (z.c + block.x * V - 1) / (block.x * V), tall = kAhead * block.y;
        bn_bwd_nhwc_kernel<T, V><<<unsigned(blocks * ((z.n * z.hw + tall - 1) / tall)), block, 0, s>>>(b);
      }
    });
    check_launch("bn_bwd", z.n, z.c, z.hw);
  });
}

}  // namespace fastkd
