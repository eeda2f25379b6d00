// CPU kernels of the doubling of an activated image. A unit is some rows of the small image: each is computed in L1, then doubled
// on the way out. NCHW: a row is w values of one channel; NHWC: w pixels of c channels, whose constants are laid out for a row once.
#include <cmath>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_vec.h"

namespace fastkd {
namespace {

constexpr int64_t kPiece = 16384;  // elements of a unit of work

typedef int32_t I32 __attribute__((vector_size(kBytes)));
using F32 = Reg<float>::type;

// exp(x) = 2^k (1 + p) for |x| < 88. Returns p, so that nothing cancels near 0; `power` is 2^k. A NaN stays one.
inline F32 exp_parts(F32 x, F32& power) {
  const F32 magic = F32{} + 12582912.0f;  // adding it rounds to an integer, half to even
  const F32 k = (x * 1.44269504f + magic) - magic;
  const F32 r = (x - k * 0.693359375f) - k * -2.12194440e-4f;  // k times the head of ln 2 is exact
  power = (F32)((U32)(__builtin_convertvector(k, I32) + 127) << 23);
  F32 p = F32{} + 1.0f / 5040;  // Taylor: the next term is below 2e-8 of the sum where |r| < ln(2) / 2
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return r + r * (r * p);
}

inline F32 between(F32 x, float low, float high) {
  const F32 l = F32{} + low, h = F32{} + high;
  const F32 v = x < l ? l : x;
  return v > h ? h : v;
}

template <int kAct> inline F32 squash_one(F32 x) {
  F32 power;
  if constexpr (kAct == kTanh) {
    const F32 p = exp_parts(between(x + x, -30, 30), power), t = power * p + (power - 1.0f);  // e^2x - 1
    return t / (t + 2.0f);
  }
  const F32 zero{}, p = exp_parts(between(zero - x, -87, 87), power), s = 1.0f / (1.0f + (power + power * p));
  return x < zero - 87.0f ? zero : s;
}

// The activation of `count` values, in place; room for whole vectors is there.
template <int kAct> void squash(float* v, int64_t count) {
  using V = fastkd::V<float>;
  for (int64_t j = 0; j < count; j += kLanes) {
    V o = vload(v + j);
    FASTKD_EACH o.r[i] = squash_one<kAct>(o.r[i]);
    vstore(v + j, o);
  }
}
template <int kAct> void squash(double* v, int64_t count) {
  for (int64_t j = 0; j < count; ++j) v[j] = kAct == kTanh ? std::tanh(v[j]) : 1 / (1 + std::exp(-v[j]));
}

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Rows of `width` values whose constants are one number (NCHW) or stand side by side (NHWC).
template <class T> struct Rows {
  using A = typename Acc<T>::type;
  int64_t rows, width, group, per_plane, channels, pixels;  // group: values that are doubled together
  bool last;

  template <class P> explicit Rows(const P& p) {
    last = p.layout == kNHWC;
    rows = last ? p.n * p.h : p.n * p.c * p.h;
    group = last ? p.c : 1;
    width = p.w * group;
    per_plane = p.h, channels = p.c, pixels = p.w;
  }

  // A constant for each value of a row (NHWC), or for each channel (NCHW).
  std::vector<A> constants(const void* given, A otherwise) const {
    std::vector<A> v(size_t(last ? padded(width) : channels), otherwise);
    if (given)
      for (int64_t j = 0; j < (last ? width : channels); ++j) v[j] = ((const A*)given)[j % channels];
    return v;
  }
  int64_t channel(int64_t row) const { return row / per_plane % channels; }

  template <class F> void each(int threads, const F& run) const {
    const int64_t step = width < kPiece ? kPiece / width : 1;
    parallel((rows + step - 1) / step, threads, [&](int64_t u) {
      std::vector<A> buffer(size_t(padded(2 * width)));
      for (int64_t row = u * step; row < least(rows, (u + 1) * step); ++row) run(row, buffer.data());
    });
  }
};

template <int64_t kGroup, class T, class A> void spread(T* out, const A* v, int64_t pixels, int64_t group) {
  const int64_t g = kGroup ? kGroup : group;
  for (int64_t j = 0; j < pixels; ++j, v += g, out += 2 * g)
    for (int64_t k = 0; k < g; ++k) {
      store(out[k], v[k]);
      out[g + k] = out[k];
    }
}

template <int kAct, class T> void upsample_fwd(const UpsampleActParams& p, int threads) {
  using A = typename Acc<T>::type;
  const Rows<T> r(p);
  const std::vector<A> scale = r.constants(p.scale, A(1)), bias = r.constants(p.bias, A(0));
  const int64_t w = r.width;
  r.each(threads, [&](int64_t row, A* v) {
    const T* x = (const T*)p.x + row * w;
    T* y = (T*)p.y + row * 4 * w;
    const int64_t ch = r.last ? 0 : r.channel(row);
    const V<A> s0 = V<A>::all(scale[ch]), b0 = V<A>::all(bias[ch]);
    int64_t j = 0;
    for (; j + kLanes <= w; j += kLanes)
      vstore(v + j, vload(x + j) * (r.last ? vload(&scale[j]) : s0) + (r.last ? vload(&bias[j]) : b0));
    for (; j < w; ++j) v[j] = load(x[j]) * scale[r.last ? j : ch] + bias[r.last ? j : ch];
    squash<kAct>(v, w);
    if (r.group == 1) spread<1>(y, v, r.pixels, 1);
    else if (r.group == 3) spread<3>(y, v, r.pixels, 3);
    else spread<0>(y, v, r.pixels, r.group);
    std::memcpy(y + 2 * w, y, size_t(2 * w) * sizeof(T));
  });
}

template <int64_t kGroup, int kAct, class T, class A>
void gather(T* dx, const A* sum, const T* y, const A* scale, bool last, int64_t pixels, int64_t group) {
  const int64_t g = kGroup ? kGroup : group;
  for (int64_t j = 0; j < pixels; ++j, sum += 2 * g, y += 2 * g, dx += g)
    for (int64_t k = 0; k < g; ++k) {
      const A v = load(y[k]), slope = kAct == kTanh ? A(1) - v * v : v * (A(1) - v);
      store(dx[k], scale[last ? k : 0] * (slope * (sum[k] + sum[g + k])));
    }
}

template <int kAct, class T> void upsample_bwd(const UpsampleActGradParams& p, int threads) {
  using A = typename Acc<T>::type;
  const Rows<T> r(p);
  const std::vector<A> scale = r.constants(p.scale, A(1));
  const int64_t w = r.width;
  r.each(threads, [&](int64_t row, A* sum) {
    const T *top = (const T*)p.gy + row * 4 * w, *bottom = top + 2 * w, *y = (const T*)p.y + row * 4 * w;
    T* dx = (T*)p.dx + row * w;
    int64_t j = 0;
    for (; j + kLanes <= 2 * w; j += kLanes) vstore(sum + j, vload(top + j) + vload(bottom + j));
    for (; j < 2 * w; ++j) sum[j] = load(top[j]) + load(bottom[j]);
    const A* own = r.last ? scale.data() : scale.data() + r.channel(row);
    if (r.group == 1) gather<1, kAct>(dx, sum, y, own, false, r.pixels, 1);
    else if (r.group == 3) gather<3, kAct>(dx, sum, y, own, true, r.pixels, 3);
    else gather<0, kAct>(dx, sum, y, own, true, r.pixels, r.group);
  });
}

}  // namespace

void FASTKD_CPU(upsample_act_fwd)(const UpsampleActParams& p, int threads) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.act == kTanh ? upsample_fwd<kTanh, T>(p, threads) : upsample_fwd<kSigmoid, T>(p, threads);
  });
}

void FASTKD_CPU(upsample_act_bwd)(const UpsampleActGradParams& p, int threads) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.act == kTanh ? upsample_bwd<kTanh, T>(p, threads) : upsample_bwd<kSigmoid, T>(p, threads);
  });
}

}  // namespace fastkd
