// CPU kernels of the BN-statistic ops. One read of x gives y and both sums; backward recomputes the activation's mask from x.
//
// NCHW:  a unit is 16 channels of `per` images; each channel keeps 16 lanes across its images, so that 4x4 maps need no
//        horizontal sum per row.
// NHWC:  a unit is up to 256 channels of `per` rows of the [n*hw, c] matrix. Narrow rows (16 to 128 channels) are read as they lie
//        in memory, sums and constants in registers; of wider ones eight at a time pass through accumulators in L1.
// Lanes are added in order, in double; so are the partial sums of the units. Bytes: see the Python docstrings.
#include "cpu_kernels.h"
#include "cpu_vec.h"

namespace fastkd {
namespace {

constexpr int64_t kPlanes = 16;   // channels of an NCHW unit
constexpr int64_t kWidth = 256;   // channels of an NHWC unit
constexpr int64_t kChain = 256;   // rows that are added in fp32 before they go into a double
constexpr int64_t kPiece = 16384; // elements of a unit of the backward pass

template <class T> struct Fwd {
  using A = typename Acc<T>::type;
  const T *x, *residual;
  const A *scale, *bias, *shift;
  T* y;
  double* partial;
  A* sums;
  A slope;
  int64_t n, c, hw, groups, per;

  explicit Fwd(const BnParams& p)
      : x((const T*)p.x), residual((const T*)p.residual), scale((const A*)p.scale), bias((const A*)p.bias),
        shift((const A*)p.shift), y((T*)p.y), partial((double*)p.partial), sums((A*)p.sums), slope(A(p.slope)),
        n(p.s.n), c(p.s.c), hw(p.s.hw), groups(p.s.groups), per(p.s.per) {}

  // One value (scalar or 16 lanes): its share of the sums, and y where it is wanted.
  template <int kAct, bool kY, bool kRes, class X>
  static void one(X v, X r, X k, X sc, X bi, A slope, X& s1, X& s2, X& out) {
    const X d = v - k;
    s1 += d;
    s2 += d * d;
    if constexpr (kY) {
      X pre = v * sc + bi;
      if constexpr (kRes) pre += r;
      out = act<kAct>(pre, slope);
    }
  }

  template <int kAct, bool kY, bool kRes> void nchw(int threads) const {
    const int64_t blocks = (c + kPlanes - 1) / kPlanes;
    parallel(groups * blocks, threads, [&](int64_t u) {
      const int64_t g = u / blocks, c0 = u % blocks * kPlanes, c1 = least(c, c0 + kPlanes);
      alignas(64) A s1[kPlanes][kLanes] = {}, s2[kPlanes][kLanes] = {};
      for (int64_t i = g * per; i < least(n, (g + 1) * per); ++i)
        for (int64_t ch = c0; ch < c1; ++ch) {
          const int64_t base = (i * c + ch) * hw;
          const A k = shift[ch], sc = kY ? scale[ch] : A(0), bi = kY ? bias[ch] : A(0);
          const V<A> vk = V<A>::all(k), vsc = V<A>::all(sc), vbi = V<A>::all(bi);
          int64_t j = 0;
          while (j + kLanes <= hw) {  // sums of 64 and then of those: a long fp32 chain would lose digits
            const int64_t stop = least(hw - kLanes, j + 63 * kLanes);
            V<A> v1 = V<A>::all(A(0)), v2 = v1, r{}, out{};
            for (; j <= stop; j += kLanes) {
              if constexpr (kRes) r = vload(residual + base + j);
              one<kAct, kY, kRes, V<A>>(vload(x + base + j), r, vk, vsc, vbi, slope, v1, v2, out);
              if constexpr (kY) vstore(y + base + j, out);
            }
            vstore(s1[ch - c0], vload(s1[ch - c0]) + v1);
            vstore(s2[ch - c0], vload(s2[ch - c0]) + v2);
          }
          for (int l = 0; j < hw; ++j, ++l) {
            A rest{}, o{};
            if constexpr (kRes) rest = load(residual[base + j]);
            one<kAct, kY, kRes, A>(load(x[base + j]), rest, k, sc, bi, slope, s1[ch - c0][l], s2[ch - c0][l], o);
            if constexpr (kY) store(y[base + j], o);
          }
        }
      for (int64_t ch = c0; ch < c1; ++ch) {
        double t1 = 0, t2 = 0;
        for (int l = 0; l < kLanes; ++l) t1 += s1[ch - c0][l], t2 += s2[ch - c0][l];
        partial[2 * g * c + ch] = t1;
        partial[(2 * g + 1) * c + ch] = t2;
      }
    });
  }

  template <int kAct, bool kY, bool kRes, int kRows>
  void rows(int64_t row, int64_t c0, int64_t c1, A* s1, A* s2) const {
    int64_t ch = c0;
    for (; ch + kLanes <= c1; ch += kLanes) {
      V<A> v1 = vload(s1 + ch - c0), v2 = vload(s2 + ch - c0), sc{}, bi{}, r{}, out{};
      const V<A> k = vload(shift + ch);
      if constexpr (kY) sc = vload(scale + ch), bi = vload(bias + ch);
      for (int q = 0; q < kRows; ++q) {
        const int64_t at = (row + q) * c + ch;
        if constexpr (kRes) r = vload(residual + at);
        one<kAct, kY, kRes, V<A>>(vload(x + at), r, k, sc, bi, slope, v1, v2, out);
        if constexpr (kY) vstore(y + at, out);
      }
      vstore(s1 + ch - c0, v1);
      vstore(s2 + ch - c0, v2);
    }
    for (; ch < c1; ++ch)
      for (int q = 0; q < kRows; ++q) {
        const int64_t at = (row + q) * c + ch;
        A r{}, o{};
        if constexpr (kRes) r = load(residual[at]);
        one<kAct, kY, kRes, A>(load(x[at]), r, shift[ch], kY ? scale[ch] : A(0), kY ? bias[ch] : A(0), slope, s1[ch - c0],
                               s2[ch - c0], o);
        if constexpr (kY) store(y[at], o);
      }
  }

  // As many rows of 16 kBlocks channels as go into one chain: read as they lie in memory, sums and constants in registers.
  template <int kAct, bool kY, bool kRes, int kBlocks> void chain(int64_t row, int64_t stop, A* s1, A* s2) const {
    V<A> v1[kBlocks], v2[kBlocks], k[kBlocks], sc[kBlocks], bi[kBlocks], r{}, out{};
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      v1[b] = v2[b] = V<A>::all(A(0));
      k[b] = vload(shift + b * kLanes);
      if constexpr (kY) sc[b] = vload(scale + b * kLanes), bi[b] = vload(bias + b * kLanes);
    }
    for (; row < stop; ++row)
  #pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
        const int64_t at = (row * kBlocks + b) * kLanes;
        if constexpr (kRes) r = vload(residual + at);
        one<kAct, kY, kRes, V<A>>(vload(x + at), r, k[b], sc[b], bi[b], slope, v1[b], v2[b], out);
        if constexpr (kY) vstore(y + at, out);
      }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) vstore(s1 + b * kLanes, v1[b]), vstore(s2 + b * kLanes, v2[b]);
  }

  template <int kAct, bool kY, bool kRes> void nhwc(int threads) const {
    const int64_t m = n * hw, blocks = (c + kWidth - 1) / kWidth;
    parallel(groups * blocks, threads, [&](int64_t u) {
      const int64_t g = u / blocks, c0 = u % blocks * kWidth, c1 = least(c, c0 + kWidth);
      double t1[kWidth] = {}, t2[kWidth] = {};
      const int64_t end = least(m, (g + 1) * per);
      for (int64_t row = g * per; row < end;) {
        alignas(64) A s1[kWidth] = {}, s2[kWidth] = {};
        const int64_t stop = least(end, row + kChain);
        if (c == kLanes || c == 2 * kLanes || c == 4 * kLanes || c == 8 * kLanes) {
          if (c == 8 * kLanes) chain<kAct, kY, kRes, 8>(row, stop, s1, s2);
          else if (c == kLanes) chain<kAct, kY, kRes, 1>(row, stop, s1, s2);
          else if (c == 2 * kLanes) chain<kAct, kY, kRes, 2>(row, stop, s1, s2);
          else chain<kAct, kY, kRes, 4>(row, stop, s1, s2);
          row = stop;
        }
        for (; row + 8 <= stop; row += 8) rows<kAct, kY, kRes, 8>(row, c0, c1, s1, s2);
        for (; row < stop; ++row) rows<kAct, kY, kRes, 1>(row, c0, c1, s1, s2);
        for (int64_t ch = 0; ch < c1 - c0; ++ch) t1[ch] += s1[ch], t2[ch] += s2[ch];
      }
      for (int64_t ch = c0; ch < c1; ++ch) {
        partial[2 * g * c + ch] = t1[ch - c0];
        partial[(2 * g + 1) * c + ch] = t2[ch - c0];
      }
    });
  }

  template <int kAct, bool kY, bool kRes> void run(int layout, int threads) const {
    if (layout == kNCHW) nchw<kAct, kY, kRes>(threads);
    else nhwc<kAct, kY, kRes>(threads);
    const int helpers = 2 * c * groups < 16384 ? 1 : threads;  // a second round of threads costs more than so few sums
    parallel((2 * c + 127) / 128, helpers, [&](int64_t u) {
      for (int64_t i = u * 128; i < least(2 * c, (u + 1) * 128); ++i) {
        double t = 0;
        for (int64_t g = 0; g < groups; ++g) t += partial[2 * g * c + i];
        sums[i] = A(t);
      }
    });
  }
};

template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  const T *gy, *x, *residual;
  const A *gsums, *scale, *bias, *shift;
  T *dx, *dresidual;
  A slope;
  int64_t n, c, hw;

  explicit Bwd(const BnGradParams& p)
      : gy((const T*)p.gy), x((const T*)p.x), residual((const T*)p.residual), gsums((const A*)p.gsums),
        scale((const A*)p.scale), bias((const A*)p.bias), shift((const A*)p.shift), dx((T*)p.dx), dresidual((T*)p.dresidual),
        slope(A(p.slope)), n(p.s.n), c(p.s.c), hw(p.s.hw) {}

  // dx of one value (scalar or 16 lanes); g leaves as the gradient of the preactivation.
  template <int kAct, bool kG, bool kRes, class X>
  static X one(X v, X r, X& g, X k, X sc, X bi, X g1, X g2, bool sums, A slope) {
    X d{};
    if (sums) d = g1 + (g2 + g2) * (v - k);  // else 0 also where x is not finite
    if constexpr (!kG) return d;
    X pre = v * sc + bi;
    if constexpr (kRes) pre += r;
    g = act_grad<kAct>(pre, g, slope);
    return g * sc + d;
  }

  template <int kAct, bool kG, bool kRes> void nchw(int threads) const {
    const int64_t planes = n * c, step = hw < kPiece ? kPiece / hw : 1;
    parallel((planes + step - 1) / step, threads, [&](int64_t u) {
      for (int64_t plane = u * step; plane < least(planes, (u + 1) * step); ++plane) {
        const int64_t ch = plane % c, base = plane * hw;
        const A k = shift[ch], sc = kG ? scale[ch] : A(0), bi = kG ? bias[ch] : A(0);
        const A g1 = gsums ? gsums[ch] : A(0), g2 = gsums ? gsums[c + ch] : A(0);
        const V<A> vk = V<A>::all(k), vg1 = V<A>::all(g1), vg2 = V<A>::all(g2), vsc = V<A>::all(sc), vbi = V<A>::all(bi);
        V<A> r{}, g{};
        int64_t j = 0;
        for (; j + kLanes <= hw; j += kLanes) {
          if constexpr (kRes) r = vload(residual + base + j);
          if constexpr (kG) g = vload(gy + base + j);
          vstore(dx + base + j, one<kAct, kG, kRes, V<A>>(vload(x + base + j), r, g, vk, vsc, vbi, vg1, vg2, gsums, slope));
          if constexpr (kG && kRes) if (dresidual) vstore(dresidual + base + j, g);
        }
        for (; j < hw; ++j) {
          A rest{}, gs{};
          if constexpr (kRes) rest = load(residual[base + j]);
          if constexpr (kG) gs = load(gy[base + j]);
          store(dx[base + j], one<kAct, kG, kRes, A>(load(x[base + j]), rest, gs, k, sc, bi, g1, g2, gsums, slope));
          if constexpr (kG && kRes) if (dresidual) store(dresidual[base + j], gs);
        }
      }
    });
  }

  // Rows of 16 kBlocks channels, constants in registers.
  template <int kAct, bool kG, bool kRes, int kBlocks> void narrow(int64_t row, int64_t stop) const {
    V<A> k[kBlocks], sc[kBlocks], bi[kBlocks], g1[kBlocks], g2[kBlocks], r{}, g{};
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      k[b] = vload(shift + b * kLanes);
      if constexpr (kG) sc[b] = vload(scale + b * kLanes), bi[b] = vload(bias + b * kLanes);
      if (gsums) g1[b] = vload(gsums + b * kLanes), g2[b] = vload(gsums + c + b * kLanes);
    }
    for (; row < stop; ++row)
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        const int64_t at = (row * kBlocks + b) * kLanes;
        if constexpr (kRes) r = vload(residual + at);
        if constexpr (kG) g = vload(gy + at);
        vstore(dx + at, one<kAct, kG, kRes, V<A>>(vload(x + at), r, g, k[b], sc[b], bi[b], g1[b], g2[b], gsums, slope));
        if constexpr (kG && kRes) if (dresidual) vstore(dresidual + at, g);
      }
  }

  // A row of any number of channels. (Several at a time would load constants once, but rows read side by side are slower.)
  template <int kAct, bool kG, bool kRes> void wide(int64_t row) const {
    V<A> r{}, g{}, sc{}, bi{}, g1{}, g2{};
    int64_t ch = 0;
    for (; ch + kLanes <= c; ch += kLanes) {
      const V<A> k = vload(shift + ch);
      if constexpr (kG) sc = vload(scale + ch), bi = vload(bias + ch);
      if (gsums) g1 = vload(gsums + ch), g2 = vload(gsums + c + ch);
      const int64_t at = row * c + ch;
      if constexpr (kRes) r = vload(residual + at);
      if constexpr (kG) g = vload(gy + at);
      vstore(dx + at, one<kAct, kG, kRes, V<A>>(vload(x + at), r, g, k, sc, bi, g1, g2, gsums, slope));
      if constexpr (kG && kRes) if (dresidual) vstore(dresidual + at, g);
    }
    for (; ch < c; ++ch) {
      const int64_t at = row * c + ch;
      A rest{}, gs{};
      if constexpr (kRes) rest = load(residual[at]);
      if constexpr (kG) gs = load(gy[at]);
      store(dx[at], one<kAct, kG, kRes, A>(load(x[at]), rest, gs, shift[ch], kG ? scale[ch] : A(0), kG ? bias[ch] : A(0),
                                           gsums ? gsums[ch] : A(0), gsums ? gsums[c + ch] : A(0), gsums, slope));
      if constexpr (kG && kRes) if (dresidual) store(dresidual[at], gs);
    }
  }

  template <int kAct, bool kG, bool kRes> void nhwc(int threads) const {
    const int64_t m = n * hw, step = c < kPiece ? kPiece / c : 1;
    parallel((m + step - 1) / step, threads, [&](int64_t u) {
      const int64_t stop = least(m, (u + 1) * step);
      if (c == kLanes) return narrow<kAct, kG, kRes, 1>(u * step, stop);
      if (c == 2 * kLanes) return narrow<kAct, kG, kRes, 2>(u * step, stop);
      if (c == 4 * kLanes) return narrow<kAct, kG, kRes, 4>(u * step, stop);
      if (c == 8 * kLanes) return narrow<kAct, kG, kRes, 8>(u * step, stop);
      for (int64_t row = u * step; row < stop; ++row) wide<kAct, kG, kRes>(row);
    });
  }

  template <int kAct, bool kG, bool kRes> void run(int layout, int threads) const {
    if (n * c * hw == 0) return;
    if (layout == kNCHW) nchw<kAct, kG, kRes>(threads);
    else nhwc<kAct, kG, kRes>(threads);
  }
};

}  // namespace

void FASTKD_CPU(bn_fwd)(const BnParams& p, int threads) {
  with_type(p.s.dtype, [&](auto t) {
    const Fwd<decltype(t)> f(p);
    if (!p.y) return f.template run<kNone, false, false>(p.s.layout, threads);
    with_act(p.act, [&](auto a) {
      constexpr int kAct = decltype(a)::value;
      if (p.residual) f.template run<kAct, true, true>(p.s.layout, threads);
      else f.template run<kAct, true, false>(p.s.layout, threads);
    });
  });
}

void FASTKD_CPU(bn_bwd)(const BnGradParams& p, int threads) {
  with_type(p.s.dtype, [&](auto t) {
    const Bwd<decltype(t)> b(p);
    if (!p.gy) return b.template run<kNone, false, false>(p.s.layout, threads);
    with_act(p.act, [&](auto a) {
      constexpr int kAct = decltype(a)::value;
      if (p.residual) b.template run<kAct, true, true>(p.s.layout, threads);
      else b.template run<kAct, true, false>(p.s.layout, threads);
    });
  });
}

}  // namespace fastkd
