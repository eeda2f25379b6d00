// CPU kernels of the class activation map: an image at a time, from the features to the finished map, parallel over images.
// What stands between them (the small map, its rows stretched along the width) is a few kilobytes that stay in the cache.
#include <limits>
#include <type_traits>

#include "cpu_kernels.h"
#include "cpu_vec.h"

namespace fastkd {
namespace {

constexpr int kBlock = 4 * kLanes;  // cells whose sums fit in registers

// Sum of the lanes, as a tree: halves added to halves.
template <class A> inline A total(const V<A>& v) {
  typedef A Eight __attribute__((vector_size(8 * sizeof(A))));
  typedef A Four __attribute__((vector_size(4 * sizeof(A))));
  A part[kLanes];
  Eight a, b;
  vstore(part, v);
  __builtin_memcpy(&a, part, sizeof a);
  __builtin_memcpy(&b, part + 8, sizeof b);
  a += b;
  Four c, d;
  __builtin_memcpy(&c, &a, sizeof c);
  __builtin_memcpy(&d, (const char*)&a + sizeof c, sizeof d);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

// X is a scalar or one register. NaN wins, as in amin and amax.
template <class X> inline X lesser(X a, X b) { return b < a ? b : b != b ? b : a; }
template <class X> inline X greater(X a, X b) { return b > a ? b : b != b ? b : a; }

// Smallest and largest value of those taken.
template <class A> struct Extent {
  static constexpr A kEndless = std::numeric_limits<A>::infinity();
  A low = kEndless, high = -kEndless;
  V<A> lows = V<A>::all(kEndless), highs = V<A>::all(-kEndless);
  inline void take(A v) { low = lesser(low, v), high = greater(high, v); }
  inline void take(const V<A>& v) {
    using V = fastkd::V<A>;
    FASTKD_EACH lows.r[i] = lesser(lows.r[i], v.r[i]), highs.r[i] = greater(highs.r[i], v.r[i]);
  }
  inline void close() {
    A l[kLanes], h[kLanes];
    vstore(l, lows);
    vstore(h, highs);
    for (int half = kLanes / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) l[i] = lesser(l[i], l[i + half]), h[i] = greater(h[i], h[i + half]);
    low = lesser(low, l[0]), high = greater(high, h[0]);
  }
};

// (v - low) * rate, or 0 for a map with nothing to show.
template <class A> struct Scale {
  A low = A(0), rate = A(1);
  bool flat = false;
  Scale() = default;
  Scale(int norm, const Extent<A>& e) {
    if (norm == kNoNorm) return;
    low = norm == kMax ? A(0) : e.low;
    flat = norm == kMax ? e.high <= A(0) : e.high == e.low;
    rate = A(1) / (e.high - low + A(kCamEps));
  }
  inline A operator()(A v) const { return flat ? A(0) : (v - low) * rate; }
  inline V<A> operator()(const V<A>& v) const { return flat ? V<A>{} : (v - V<A>::all(low)) * rate; }
  inline A slope() const { return flat ? A(0) : rate; }
};

// One axis of a bilinear resize, align_corners=False: value q of `to` is (1 - t) of source `left` and t of the next one.
template <class A> struct Axis {
  int64_t from, to;
  A ratio;
  Axis(int64_t from, int64_t to) : from(from), to(to), ratio(A(from) / A(to)) {}
  struct Tap { int64_t left, right; A t; };
  inline Tap operator()(int64_t q) const {
    A at = ratio * (A(q) + A(0.5)) - A(0.5);
    at = at < A(0) ? A(0) : at;
    const int64_t left = least(int64_t(at), from - 1);
    return {left, least(left + 1, from - 1), at - A(left)};
  }
};

// The same along the width, made once a call: the values between two sources are neighbours, and a vector of them needs no gather.
template <class A> struct Across {
  Buffer<int64_t> first;  // [w + 1]: the values of source j are first[j] … first[j + 1] - 1
  Buffer<A> t;            // [width], and a vector that is read past the end
  Across(int64_t w, int64_t width) : first(w + 1), t(width + kLanes) {
    const Axis<A> axis(w, width);
    for (int64_t j = 0; j <= w; ++j) first.data[j] = width;
    for (int64_t q = width; q < width + kLanes; ++q) t.data[q] = A(0);
    for (int64_t q = width; q-- > 0;) {
      const auto tap = axis(q);
      t.data[q] = tap.t;
      first.data[tap.left] = q;
    }
    for (int64_t j = w; j-- > 0;) first.data[j] = least(first.data[j], first.data[j + 1]);
  }
};

// The head's row of a label in the accumulation type; converted into `space` where it is not in it.
template <class A> inline const A* row_of(const CamSizes& s, const void* weight, int64_t label, A* space) {
  const int64_t first = label * s.channels;
  const A* row = nullptr;
  with_type(s.weight_dtype, [&](auto t) {
    using W = decltype(t);
    const W* from = (const W*)weight + first;
    if constexpr (std::is_same<W, A>::value) {
      row = from;
    } else {
      for (int64_t k = 0; k < s.channels; ++k) space[k] = A(load(from[k]));
      row = space;
    }
  });
  return row;
}

// Weighted sum over channels -----------------------------------------------------------------------------------------------

// NCHW, N vectors of cells at `at`: their sums stay in registers while the channels pass.
template <int N, class T, class A> inline void sum_block(const T* f, const A* w, int64_t channels, int64_t hw, const int64_t* at, A* m) {
  V<A> sum[N] = {};
  int64_t k = 0;
  for (; k + 4 <= channels; k += 4, f += 4 * hw, w += 4) {
    _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) {
      const T* p = f + at[i];
      sum[i] += (vload(p) * w[0] + vload(p + hw) * w[1]) + (vload(p + 2 * hw) * w[2] + vload(p + 3 * hw) * w[3]);
    }
  }
  for (; k < channels; ++k, f += hw, ++w) {
    _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) sum[i] += vload(f + at[i]) * w[0];
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) vstore(m + at[i], sum[i]);
}

// NCHW, any size: the map is the accumulator, four channels a pass.
template <class T, class A> inline void sum_rows(const T* f, const A* w, int64_t channels, int64_t hw, A* m) {
  for (int64_t j = 0; j < hw; ++j) m[j] = A(0);
  int64_t k = 0;
  for (; k + 4 <= channels; k += 4, f += 4 * hw, w += 4) {
    const T *f0 = f, *f1 = f0 + hw, *f2 = f1 + hw, *f3 = f2 + hw;
    const A w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    int64_t j = 0;
    for (; j + kLanes <= hw; j += kLanes)
      vstore(m + j, vload(m + j) + ((vload(f0 + j) * w0 + vload(f1 + j) * w1) + (vload(f2 + j) * w2 + vload(f3 + j) * w3)));
    for (; j < hw; ++j) m[j] += (load(f0[j]) * w0 + load(f1[j]) * w1) + (load(f2[j]) * w2 + load(f3[j]) * w3);
  }
  for (; k < channels; ++k, f += hw, ++w)
    for (int64_t j = 0; j < hw; ++j) m[j] += load(f[j]) * w[0];
}

template <class T, class A> inline void sum_nchw(const T* f, const A* w, int64_t channels, int64_t hw, A* m) {
  if (hw < kLanes || hw > kBlock) return sum_rows(f, w, channels, hw, m);
  int64_t at[4];
  for (int i = 0; i < 4; ++i) at[i] = least(i * kLanes, hw - kLanes);
  if (hw <= kLanes) sum_block<1>(f, w, channels, hw, at, m);
  else if (hw <= 2 * kLanes) sum_block<2>(f, w, channels, hw, at, m);
  else if (hw <= 3 * kLanes) sum_block<3>(f, w, channels, hw, at, m);
  else sum_block<4>(f, w, channels, hw, at, m);
}

// NHWC, N cells at once: one dot product a cell, the weights are loaded once for all of them.
template <int N, class T, class A> inline void dot_cells(const T* f, const A* w, int64_t channels, A* m) {
  V<A> sum[N] = {};
  int64_t k = 0;
  for (; k + kLanes <= channels; k += kLanes) {
    const V<A> v = vload(w + k);
    _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) sum[i] += vload(f + i * channels + k) * v;
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) m[i] = total(sum[i]);
  for (; k < channels; ++k)
    for (int i = 0; i < N; ++i) m[i] += load(f[i * channels + k]) * w[k];
}

template <class T, class A> inline void sum_nhwc(const T* f, const A* w, int64_t channels, int64_t hw, A* m) {
  int64_t j = 0;
  for (; j + 4 <= hw; j += 4) dot_cells<4>(f + j * channels, w, channels, m + j);
  for (; j < hw; ++j) dot_cells<1>(f + j * channels, w, channels, m + j);
}

// Forward ------------------------------------------------------------------------------------------------------------------

// Rows of the small map, stretched along the width: [h, width], and a vector that is written past the end.
template <class A> inline void stretch(const CamSizes& s, const Across<A>& across, const A* m, A* rows) {
  for (int64_t i = 0; i < s.h; ++i, m += s.w, rows += s.width)
    for (int64_t j = 0; j < s.w; ++j) {
      const A a = m[j], b = m[least(j + 1, s.w - 1)];
      for (int64_t q = across.first.data[j]; q < across.first.data[j + 1]; q += kLanes) {  // the next source, or row, overwrites the rest
        const V<A> t = vload(across.t.data + q);
        vstore(rows + q, (V<A>::all(A(1)) - t) * a + t * b);
      }
    }
}

// Each output row is a blend of two stretched ones; `block` and `one` get (index in the image, value).
template <class A, class Block, class One> inline void each_row(const CamSizes& s, const A* rows, const Block& block, const One& one) {
  const Axis<A> down(s.h, s.height);
  const int64_t width = s.width;
  for (int64_t q = 0; q < s.height; ++q) {
    const auto tap = down(q);
    const A *r0 = rows + tap.left * width, *r1 = rows + tap.right * width, a = A(1) - tap.t, b = tap.t;
    const int64_t at = q * width;
    cover(width, [&](int64_t j) { block(at + j, vload(r0 + j) * a + vload(r1 + j) * b); },
          [&](int64_t j) { one(at + j, r0[j] * a + r1[j] * b); });
  }
}

template <class T> struct Forward {
  using A = typename Acc<T>::type;
  const CamParams& p;
  const Across<A> across;

  explicit Forward(const CamParams& p) : p(p), across(p.s.w, p.resize ? p.s.width : 0) {}
  int64_t space() const { return p.s.channels + 2 * p.s.h * p.s.w + (p.resize ? p.s.h * p.s.width + kLanes : 0); }

  void operator()(int64_t b, A* space) const {
    const CamSizes& s = p.s;
    const int64_t hw = s.h * s.w;
    A *raw = space + s.channels, *scaled = raw + hw, *rows = scaled + hw;
    const A* w = row_of<A>(s, p.weight, p.labels[b], space);
    const T* f = (const T*)p.features + b * s.channels * hw;
    if (s.layout == kNCHW) sum_nchw(f, w, s.channels, hw, raw);
    else sum_nhwc(f, w, s.channels, hw, raw);
    p.relu ? finish<kRelu>(b, raw, scaled, rows) : finish<kNone>(b, raw, scaled, rows);
  }

  template <int kAct> void finish(int64_t b, const A* raw, A* scaled, A* rows) const {
    const CamSizes& s = p.s;
    const int64_t hw = s.h * s.w;
    A *slope = (A*)p.slope + b * hw, *out = (A*)p.out + b * s.height * s.width;
    const A none = A(0);
    Extent<A> e;
    cover(hw, [&](int64_t j) { e.take(act<kAct>(vload(raw + j), none)); }, [&](int64_t j) { e.take(act<kAct>(raw[j], none)); });
    e.close();
    const Scale<A> first(p.norm, e);
    A rate = first.slope(), *small = p.resize ? scaled : out;
    cover(hw, [&](int64_t j) { vstore(small + j, first(act<kAct>(vload(raw + j), none))); },
          [&](int64_t j) { small[j] = first(act<kAct>(raw[j], none)); });
    if (p.resize) rate *= resize(scaled, rows, out);
    const V<A> rates = V<A>::all(rate);
    cover(hw, [&](int64_t j) { vstore(slope + j, act_grad<kAct>(vload(raw + j), rates, none)); },
          [&](int64_t j) { slope[j] = act_grad<kAct>(raw[j], rate, none); });
  }

  // Returns what the second scaling multiplies with.
  A resize(const A* scaled, A* rows, A* out) const {
    stretch(p.s, across, scaled, rows);
    if (!p.renorm) {
      each_row(p.s, rows, [&](int64_t at, const V<A>& v) { vstore(out + at, v); }, [&](int64_t at, A v) { out[at] = v; });
      return A(1);
    }
    Extent<A> e;
    each_row(p.s, rows, [&](int64_t, const V<A>& v) { e.take(v); }, [&](int64_t, A v) { e.take(v); });
    e.close();
    const Scale<A> second(p.norm, e);
    const V<A> low = V<A>::all(second.low);
    const A rate = second.rate;
    if (second.flat) {
      for (int64_t j = 0; j < p.s.height * p.s.width; ++j) out[j] = A(0);
      return A(0);
    }
    each_row(p.s, rows, [&](int64_t at, const V<A>& v) { vstore(out + at, (v - low) * rate); },
             [&](int64_t at, A v) { out[at] = (v - second.low) * rate; });
    return rate;
  }
};

// Backward -----------------------------------------------------------------------------------------------------------------

template <class T> struct Backward {
  using A = typename Acc<T>::type;
  const CamGradParams& p;
  const Axis<A> down, across;
  const Buffer<A> weights;  // [width, kLanes]: what a value of a row adds to each cell of it; for narrow maps

  explicit Backward(const CamGradParams& p)
      : p(p), down(p.s.h, p.s.height), across(p.s.w, p.s.width), weights(p.resize && p.s.w <= kLanes ? p.s.width * kLanes : 0) {
    if (!p.resize || p.s.w > kLanes) return;
    for (int64_t j = 0; j < p.s.width * kLanes; ++j) weights.data[j] = A(0);
    for (int64_t q = 0; q < p.s.width; ++q) {
      const auto tap = across(q);
      weights.data[q * kLanes + tap.left] += A(1) - tap.t;
      weights.data[q * kLanes + tap.right] += tap.t;
    }
  }
  int64_t space() const { return p.s.channels + (p.resize ? p.s.h * p.s.width : 0); }

  void operator()(int64_t b, A* space) const {
    const CamSizes& s = p.s;
    const int64_t hw = s.h * s.w;
    const A *g = (const A*)p.grad + b * s.height * s.width, *slope = (const A*)p.slope + b * hw;
    A* m = (A*)p.draw + b * hw;
    if (p.resize) {
      shrink(g, space + s.channels, m);
      g = m;
    }
    for (int64_t j = 0; j < hw; ++j) m[j] = slope[j] == A(0) ? A(0) : slope[j] * g[j];
    if (!p.dfeatures) return;

    // d features = weight of the label (x) d map
    const A* w = row_of<A>(s, p.weight, p.labels[b], space);
    T* f = (T*)p.dfeatures + b * s.channels * hw;
    const bool nchw = s.layout == kNCHW;
    const A *outer = nchw ? w : m, *inner = nchw ? m : w;
    const int64_t rows = nchw ? s.channels : hw, width = nchw ? hw : s.channels;
    for (int64_t i = 0; i < rows; ++i, f += width)
      cover(width, [&](int64_t j) { vstore(f + j, vload(inner + j) * outer[i]); }, [&](int64_t j) { store(f[j], inner[j] * outer[i]); });
  }

  // Adjoint of the resize: g [height, width] to m [h, w], by way of rows [h, width].
  void shrink(const A* g, A* rows, A* m) const {
    const CamSizes& s = p.s;
    for (int64_t j = 0; j < s.h * s.width; ++j) rows[j] = A(0);
    for (int64_t q = 0; q < s.height; ++q, g += s.width) {
      const auto tap = down(q);
      A *r0 = rows + tap.left * s.width, *r1 = rows + tap.right * s.width;  // one and the same at the edges
      const A a = A(1) - tap.t, b = tap.t;
      int64_t j = 0;
      for (; j + kLanes <= s.width; j += kLanes) {
        const V<A> v = vload(g + j);
        vstore(r0 + j, vload(r0 + j) + v * a);
        vstore(r1 + j, vload(r1 + j) + v * b);
      }
      for (; j < s.width; ++j) {
        r0[j] += g[j] * a;
        r1[j] += g[j] * b;
      }
    }
    if (s.w <= kLanes) return narrow(rows, m);
    for (int64_t j = 0; j < s.h * s.w; ++j) m[j] = A(0);
    for (int64_t q = 0; q < s.width; ++q) {
      const auto tap = across(q);
      for (int64_t i = 0; i < s.h; ++i) {
        m[i * s.w + tap.left] += rows[i * s.width + q] * (A(1) - tap.t);
        m[i * s.w + tap.right] += rows[i * s.width + q] * tap.t;
      }
    }
  }

  // Rows of a map that fit into a vector: value q of a row adds to all cells at once, most of them with weight 0.
  void narrow(const A* rows, A* m) const {
    constexpr int kRows = 4;
    for (int64_t i = 0; i < p.s.h; i += kRows) {
      V<A> sum[kRows] = {};
      const A* row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = rows + least(i + r, p.s.h - 1) * p.s.width;
      for (int64_t q = 0; q < p.s.width; ++q) {
        const V<A> v = vload(weights.data + q * kLanes);
        _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r) sum[r] += v * row[r][q];
      }
      for (int r = 0; r < kRows && i + r < p.s.h; ++r) {
        A lanes[kLanes];
        vstore(lanes, sum[r]);
        for (int64_t j = 0; j < p.s.w; ++j) m[(i + r) * p.s.w + j] = lanes[j];
      }
    }
  }
};

// Images in pieces, a few for each thread: one buffer a piece. Images do not know of each other, so the cut changes no result.
template <class Work> inline void each_image(int64_t batch, int threads, const Work& work) {
  const int64_t per = least(batch, (batch - 1) / (4 * threads) + 1), pieces = (batch - 1) / per + 1;
  parallel(pieces, threads, [&](int64_t i) {
    const Buffer<typename Work::A> space(work.space());
    for (int64_t b = i * per; b < least(batch, (i + 1) * per); ++b) work(b, space.data);
  });
}

}  // namespace

void FASTKD_CPU(cam_fwd)(const CamParams& p, int threads) {
  with_type(p.s.dtype, [&](auto t) { each_image(p.s.batch, threads, Forward<decltype(t)>(p)); });
}

void FASTKD_CPU(cam_bwd)(const CamGradParams& p, int threads) {
  with_type(p.s.dtype, [&](auto t) { each_image(p.s.batch, threads, Backward<decltype(t)>(p)); });
}

}  // namespace fastkd
