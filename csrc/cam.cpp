// CPU kernels of the class activation map: parallel over images.
// NCHW: h*w accumulators, four channels a pass; NHWC: one dot product of 16 lanes a position.
#include "cpu_kernels.h"
#include "cpu_vec.h"

namespace fastkd {
namespace {

template <class T> struct Cam {
  using A = typename Acc<T>::type;
  const CamParams& p;
  const A* weight(int64_t b) const { return (const A*)p.weight + p.labels[b] * p.channels; }
  T* features(int64_t b) const { return (T*)p.features + b * p.channels * p.hw; }
  A* map(int64_t b) const { return (A*)p.map + b * p.hw; }

  void forward_nchw(int64_t b) const {
    const A* w = weight(b);
    const T* f = features(b);
    A* m = map(b);
    const int64_t hw = p.hw;
    for (int64_t j = 0; j < hw; ++j) m[j] = A(0);
    int64_t k = 0;
    for (; k + 4 <= p.channels; k += 4) {
      const T *f0 = f + k * hw, *f1 = f0 + hw, *f2 = f1 + hw, *f3 = f2 + hw;
      const A w0 = w[k], w1 = w[k + 1], w2 = w[k + 2], w3 = w[k + 3];
      int64_t j = 0;
      for (; j + kLanes <= hw; j += kLanes)
        vstore(m + j, vload(m + j) + ((vload(f0 + j) * w0 + vload(f1 + j) * w1) + (vload(f2 + j) * w2 + vload(f3 + j) * w3)));
      for (; j < hw; ++j) m[j] += (load(f0[j]) * w0 + load(f1[j]) * w1) + (load(f2[j]) * w2 + load(f3[j]) * w3);
    }
    for (; k < p.channels; ++k)
      for (int64_t j = 0; j < hw; ++j) m[j] += load(f[k * hw + j]) * w[k];
  }

  void forward_nhwc(int64_t b) const {
    const A* w = weight(b);
    const T* f = features(b);
    A* m = map(b);
    for (int64_t j = 0; j < p.hw; ++j) {
      const T* row = f + j * p.channels;
      V<A> v{};
      int64_t k = 0;
      for (; k + kLanes <= p.channels; k += kLanes) v += vload(row + k) * vload(w + k);
      A t = A(0);
      for (int l = 0; l < kLanes; ++l) t += v[l];
      for (; k < p.channels; ++k) t += load(row[k]) * w[k];
      m[j] = t;
    }
  }

  // d features = weight of the label (x) d map
  void adjoint(int64_t b) const {
    const A* w = weight(b);
    const A* m = map(b);
    T* f = features(b);
    const bool nchw = p.layout == kNCHW;
    const A *outer = nchw ? w : m, *inner = nchw ? m : w;
    const int64_t rows = nchw ? p.channels : p.hw, width = nchw ? p.hw : p.channels;
    for (int64_t i = 0; i < rows; ++i, f += width) {
      int64_t j = 0;
      for (; j + kLanes <= width; j += kLanes) vstore(f + j, vload(inner + j) * outer[i]);
      for (; j < width; ++j) store(f[j], inner[j] * outer[i]);
    }
  }
};

// One image of the finishing pass. NaN travels: a comparison with it is false, and it is never taken for a constant map.
template <class A> struct Finish {
  const CamFinishParams& p;

  static A scaled(A v, A low, A range, bool flat) { return flat ? A(0) : (v - low) / range; }

  void image(int64_t which) const {
    const A* raw = (const A*)p.map + which * p.h * p.w;
    A* rows = (A*)p.rows + which * p.h * p.width;
    const auto value = [&](int64_t i) { return p.relu && raw[i] <= A(0) ? A(0) : raw[i]; };
    const int64_t n = p.h * p.w;
    A low = value(0), high = low;
    for (int64_t i = 1; i < n && p.norm != kNoNorm; ++i) {  // amin and amax: NaN wins
      const A v = value(i);
      if (v < low || v != v) low = v;
      if (v > high || v != v) high = v;
      if (v != v) break;
    }
    if (p.norm == kMax) low = A(0);
    if (p.norm == kNoNorm) low = A(0), high = A(1);
    const bool flat = p.norm == kMinMax ? high == low : p.norm == kMax && high <= A(0);
    const A range = p.norm == kNoNorm ? A(1) : high - low + A(1e-8);
    if (!p.out) {
      for (int64_t i = 0; i < n; ++i) rows[i] = scaled(value(i), low, range, flat);
      return;
    }
    // Along the width once per source row; then each output row is a blend of two of them.
    const A step = A(p.w) / A(p.width), fall = A(p.h) / A(p.height);
    for (int64_t q = 0; q < p.width; ++q) {
      A at = step * (A(q) + A(0.5)) - A(0.5);
      at = at < A(0) ? A(0) : at;
      const int64_t left = least(int64_t(at), p.w - 1), right = least(left + 1, p.w - 1);
      const A t = at - A(left);
      for (int64_t i = 0; i < p.h; ++i) {
        const A a = scaled(value(i * p.w + left), low, range, flat), b = scaled(value(i * p.w + right), low, range, flat);
        rows[i * p.width + q] = (A(1) - t) * a + t * b;
      }
    }
    A* out = (A*)p.out + which * p.height * p.width;
    for (int64_t q = 0; q < p.height; ++q, out += p.width) {
      A at = fall * (A(q) + A(0.5)) - A(0.5);
      at = at < A(0) ? A(0) : at;
      const int64_t top = least(int64_t(at), p.h - 1), bottom = least(top + 1, p.h - 1);
      const A t = at - A(top), *r0 = rows + top * p.width, *r1 = rows + bottom * p.width;
      int64_t j = 0;
      for (; j + kLanes <= p.width; j += kLanes) vstore(out + j, vload(r0 + j) * (A(1) - t) + vload(r1 + j) * t);
      for (; j < p.width; ++j) out[j] = r0[j] * (A(1) - t) + r1[j] * t;
    }
  }
};

}  // namespace

void FASTKD_CPU(cam_finish)(const CamFinishParams& p, int threads) {
  if (p.dtype == kFloat64) parallel(p.batch, threads, [&](int64_t b) { Finish<double>{p}.image(b); });
  else parallel(p.batch, threads, [&](int64_t b) { Finish<float>{p}.image(b); });
}

void FASTKD_CPU(cam_fwd)(const CamParams& p, int threads) {
  with_type(p.dtype, [&](auto t) {
    const Cam<decltype(t)> cam{p};
    parallel(p.batch, threads, [&](int64_t b) { p.layout == kNCHW ? cam.forward_nchw(b) : cam.forward_nhwc(b); });
  });
}

void FASTKD_CPU(cam_bwd)(const CamParams& p, int threads) {
  with_type(p.dtype, [&](auto t) {
    const Cam<decltype(t)> cam{p};
    parallel(p.batch, threads, [&](int64_t b) { cam.adjoint(b); });
  });
}

}  // namespace fastkd
