// CUDA kernels of BatchNorm with batch statistics and activation. Activation and bias are run-time branches, equal for all threads of a
// launch and taken once a vector.
#include "bn_act.h"
#include "bn_cuda.cuh"

namespace fastkd {
namespace {

constexpr int kThreads = 256;

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

// Vectors side by side of V channels (NHWC: step 1), or one channel for all of them (NCHW: step 0).
template <class A, int V> struct Norm {
  A mean[V], scale[V], bias[V];

  template <class P> __device__ Norm(const P& p, int64_t ch, int64_t step) {
    for (int q = 0; q < V; ++q) {
      mean[q] = p.stats[kMean * p.c + ch + q * step];
      scale[q] = p.stats[kScale * p.c + ch + q * step];
      bias[q] = p.bias ? p.bias[ch + q * step] : A(0);
    }
  }
};

template <class T> struct Fwd {
  using A = typename Acc<T>::type;
  const T* x;
  T* y;
  const A *stats, *bias;
  int64_t n, c, hw, per;
  int act;
  A slope;

  template <int V> using Constants = Norm<A, V>;
  template <int V> struct In {
    Pack<T, V> x;
    __device__ void from(const Fwd& p, int64_t at) { x = load_pack<V>(p.x + at); }
  };

  template <int V> __device__ void apply(int64_t at, const In<V>& in, const Constants<V>& k, A (&)[V], A (&)[V]) const {
    A v[V];
    for (int q = 0; q < V; ++q) v[q] = (A(load(in.x.v[q])) - k.mean[q]) * k.scale[q] + k.bias[q];
    activate<V>(v, act, slope);
    store_pack<V>(y + at, v);
  }
};

// What both passes of backward read, and the gradient behind the activation.
template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  const T *gy, *x;
  T* dx;
  const A *stats, *bias, *gsums;
  double* partial;
  int64_t n, c, hw, per;
  int act;
  A slope, inverse;  // 1 / count

  template <int V> struct In {
    Pack<T, V> x, gy;
    __device__ void from(const Bwd& p, int64_t at) {
      x = load_pack<V>(p.x + at);
      gy = load_pack<V>(p.gy + at);
    }
  };

  // d = x - mean, g = gradient of the normalised value before bias.
  template <int V> __device__ void masked(const In<V>& in, const Norm<A, V>& k, A (&d)[V], A (&g)[V]) const {
    A pre[V];
    for (int q = 0; q < V; ++q) {
      d[q] = A(load(in.x.v[q])) - k.mean[q];
      pre[q] = d[q] * k.scale[q] + k.bias[q];
      g[q] = load(in.gy.v[q]);
    }
    mask<V>(pre, g, act, slope);
  }
};

template <class T> struct Sums : Bwd<T> {
  using A = typename Bwd<T>::A;
  template <int V> using In = typename Bwd<T>::template In<V>;
  template <int V> using Constants = Norm<A, V>;

  template <int V> __device__ void apply(int64_t, const In<V>& in, const Constants<V>& k, A (&s1)[V], A (&s2)[V]) const {
    A d[V], g[V];
    this->template masked<V>(in, k, d, g);
    for (int q = 0; q < V; ++q) s1[q] += g[q], s2[q] += g[q] * d[q];
  }
};

template <class T> struct Grad : Bwd<T> {
  using A = typename Bwd<T>::A;
  template <int V> using In = typename Bwd<T>::template In<V>;
  template <int V> struct Constants : Norm<A, V> {
    A g1[V], g2[V];

    __device__ Constants(const Grad& p, int64_t ch, int64_t step) : Norm<A, V>(p, ch, step) {
      for (int q = 0; q < V; ++q) {
        g1[q] = p.gsums[ch + q * step] * p.inverse;
        g2[q] = p.stats[kRstd * p.c + ch + q * step] * p.gsums[p.c + ch + q * step] * p.inverse;
      }
    }
  };

  template <int V> __device__ void apply(int64_t at, const In<V>& in, const Constants<V>& k, A (&)[V], A (&)[V]) const {
    A d[V], g[V];
    this->template masked<V>(in, k, d, g);
    for (int q = 0; q < V; ++q) g[q] = k.scale[q] * (g[q] - (k.g1[q] + k.g2[q] * d[q]));
    store_pack<V>(this->dx + at, g);
  }
};

template <class T> Bwd<T> bwd_of(const BnActGradParams& p) {
  using A = typename Acc<T>::type;
  const Sizes& z = p.s;
  return {(const T*)p.gy, (const T*)p.x, (T*)p.dx, (const A*)p.stats, (const A*)p.bias, (const A*)p.gsums, (double*)p.partial, z.n, z.c,
          z.hw, z.per, p.act, A(p.slope), A(1.0 / double(p.count))};
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
    const Fwd<T> f{(const T*)p.x, (T*)p.y, (const A*)p.stats, (const A*)p.bias, z.n, z.c, z.hw, z.per, p.act, A(p.slope)};
    with_vector<T>(z.layout == kNCHW ? z.hw : z.c, {p.x, p.y}, [&](auto v) { bn_each<decltype(v)::value>(f, z, s); });
    check_launch("bn_act_fwd", z.n, z.c, z.hw);
  });
}

void bn_act_bwd_sums_cuda(const BnActGradParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Sizes& z = p.s;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Sums<T> f{bwd_of<T>(p)};
    with_vector<T, 4>(z.layout == kNCHW ? z.hw : z.c, {p.x, p.gy}, [&](auto v) { bn_pieces<decltype(v)::value>(f, z, s); });
    check_launch("bn_act_bwd_sums", z.n, z.c, z.hw);
    bn_finish<A>((const double*)p.partial, (const A*)p.stats + kRstd * z.c, (A*)p.gsums, z, s);
  });
}

void bn_act_bwd_cuda(const BnActGradParams& p, void* stream) {
  const Sizes& z = p.s;
  with_type(z.dtype, [&](auto t) {
    using T = decltype(t);
    const Grad<T> f{bwd_of<T>(p)};
    with_vector<T, 4>(z.layout == kNCHW ? z.hw : z.c, {p.x, p.gy, p.dx},
                      [&](auto v) { bn_each<decltype(v)::value>(f, z, static_cast<cudaStream_t>(stream)); });
    check_launch("bn_act_bwd", z.n, z.c, z.hw);
  });
}

}  // namespace fastkd
