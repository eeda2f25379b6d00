// CUDA kernels of the BN-statistic ops. Activation, residual and gy are run-time branches, equal for all threads of a launch and taken
// once a vector.
#include "bn_cuda.cuh"
#include "bn_match.h"

namespace fastkd {
namespace {

// Vectors side by side of V channels (NHWC: step 1), or one channel for all of them (NCHW: step 0).
template <class A, int V> struct Frozen {
  A shift[V], scale[V], bias[V];

  template <class P> __device__ Frozen(const P& p, int64_t ch, int64_t step) {
    for (int q = 0; q < V; ++q) {
      shift[q] = p.shift[ch + q * step];
      scale[q] = p.scale ? p.scale[ch + q * step] : A(0);
      bias[q] = p.scale ? p.bias[ch + q * step] : A(0);
    }
  }
};

template <class T> struct Fwd {
  using A = typename Acc<T>::type;
  const T *x, *residual;
  const A *scale, *bias, *shift;
  T* y;
  double* partial;
  int64_t n, c, hw, per;
  int act;
  A slope;

  template <int V> using Constants = Frozen<A, V>;
  template <int V> struct In {
    Pack<T, V> x, residual;

    __device__ void from(const Fwd& p, int64_t at) {
      x = load_pack<V>(p.x + at);
      if (p.residual) residual = load_pack<V>(p.residual + at);
    }
  };

  template <int V> __device__ void apply(int64_t at, const In<V>& in, const Constants<V>& k, A (&s1)[V], A (&s2)[V]) const {
    A v[V];
    for (int q = 0; q < V; ++q) {
      v[q] = load(in.x.v[q]);
      const A d = v[q] - k.shift[q];
      s1[q] += d;
      s2[q] += d * d;
    }
    if (!y) return;
    for (int q = 0; q < V; ++q) v[q] = v[q] * k.scale[q] + k.bias[q];
    if (residual)
      for (int q = 0; q < V; ++q) v[q] += load(in.residual.v[q]);
    activate<V>(v, act, slope);
    store_pack<V>(y + at, v);
  }
};

template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  const T *gy, *x, *residual;
  const A *gsums, *scale, *bias, *shift;
  T *dx, *dresidual;
  int64_t n, c, hw, per;
  int act;
  A slope;

  template <int V> struct Constants : Frozen<A, V> {
    A g1[V], g2[V];

    __device__ Constants(const Bwd& p, int64_t ch, int64_t step) : Frozen<A, V>(p, ch, step) {
      for (int q = 0; q < V; ++q) {
        g1[q] = p.gsums ? p.gsums[ch + q * step] : A(0);
        g2[q] = p.gsums ? A(2) * p.gsums[p.c + ch + q * step] : A(0);
      }
    }
  };
  template <int V> struct In {
    Pack<T, V> x, gy, residual;

    __device__ void from(const Bwd& p, int64_t at) {
      x = load_pack<V>(p.x + at);
      if (p.gy) gy = load_pack<V>(p.gy + at);
      if (p.gy && p.residual) residual = load_pack<V>(p.residual + at);
    }
  };

  template <int V> __device__ void apply(int64_t at, const In<V>& in, const Constants<V>& k, A (&)[V], A (&)[V]) const {
    A d[V] = {};
    if (gsums)  // else 0 also where x is not finite
      for (int q = 0; q < V; ++q) d[q] = k.g1[q] + k.g2[q] * (A(load(in.x.v[q])) - k.shift[q]);
    if (gy) {
      A pre[V], g[V];
      for (int q = 0; q < V; ++q) {
        pre[q] = load(in.x.v[q]) * k.scale[q] + k.bias[q];
        g[q] = load(in.gy.v[q]);
      }
      if (residual)
        for (int q = 0; q < V; ++q) pre[q] += load(in.residual.v[q]);
      mask<V>(pre, g, act, slope);
      if (dresidual) store_pack<V>(dresidual + at, g);
      for (int q = 0; q < V; ++q) d[q] += g[q] * k.scale[q];
    }
    store_pack<V>(dx + at, d);
  }
};

}  // namespace

void bn_fwd_cuda(const BnParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Fwd<T> f{(const T*)p.x, (const T*)p.residual, (const A*)p.scale, (const A*)p.bias, (const A*)p.shift, (T*)p.y,
                   (double*)p.partial, z.n, z.c, z.hw, z.per, p.act, A(p.slope)};
    if (z.groups * z.c > 0) {
      with_vector<T>(z.layout == kNCHW ? z.hw : z.c, {p.x, p.residual, p.y}, [&](auto v) { bn_pieces<decltype(v)::value>(f, z, s); });
      check_launch("bn_fwd", z.n, z.c, z.hw);
    }
    bn_finish<A>((const double*)p.partial, nullptr, (A*)p.sums, z, s);
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
    with_vector<T, 4>(z.layout == kNCHW ? z.hw : z.c, {p.x, p.gy, p.residual, p.dx, p.dresidual},
                      [&](auto v) { bn_each<decltype(v)::value>(b, z, s); });
    check_launch("bn_bwd", z.n, z.c, z.hw);
  });
}

}  // namespace fastkd
