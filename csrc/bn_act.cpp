// CPU kernels of BatchNorm with batch statistics and activation. Two reads for the sums of backward, two reads and a write for its
// result; the activation's mask is recomputed from x by the expression that gave y, so that both always agree.
//
// NCHW:  a unit of the sums is 16 channels of `per` images, with 16 lanes a channel; elsewhere it is some planes.
// NHWC:  a unit of the sums is up to 256 channels of `per` rows of the [n*hw, c] matrix; elsewhere it is some rows. One row after
//        the other, so that memory is read straight on: constants and sums in registers up to 128 channels, from L1 beyond.
// Lanes are added in order, in double; so are the partial sums of the units.
#include <cmath>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_vec.h"

namespace fastkd {
namespace {

constexpr int64_t kPlanes = 16;   // channels of an NCHW unit of the sums
constexpr int64_t kWidth = 256;   // channels of an NHWC unit of the sums
constexpr int64_t kChain = 256;   // rows that are added in fp32 before they go into a double
constexpr int64_t kPiece = 16384; // elements of any other unit

// The constants of one channel (X = A) or of 16 (X = V<A>): y = act(scale d + bias), dx = scale g - b - c d, with d = x - mean.
template <class X> struct Channel {
  X mean, scale, bias, b, c;
};

template <class A> struct Table {
  int64_t channels;
  std::vector<A> rows;

  Table(const A* stats, const A* bias, const A* gsums, int64_t c, double count) : channels(c), rows(size_t(5 * c)) {
    for (int64_t ch = 0; ch < c; ++ch) {
      const A scale = stats[kScale * c + ch];
      rows[ch] = stats[kMean * c + ch];
      rows[c + ch] = scale;
      rows[2 * c + ch] = bias ? bias[ch] : A(0);
      if (!gsums) continue;
      rows[3 * c + ch] = A(double(scale) * double(gsums[ch]) / count);
      rows[4 * c + ch] = A(double(scale) * double(stats[kRstd * c + ch]) * double(gsums[c + ch]) / count);
    }
  }
  template <class X, class Get> Channel<X> read(int64_t ch, const Get& get) const {
    const A* p = rows.data() + ch;
    return {get(p), get(p + channels), get(p + 2 * channels), get(p + 3 * channels), get(p + 4 * channels)};
  }
  Channel<A> one(int64_t ch) const {
    return read<A>(ch, [](const A* p) { return *p; });
  }
  Channel<V<A>> all(int64_t ch) const {  // one channel in 16 lanes
    return read<V<A>>(ch, [](const A* p) { return V<A>::all(*p); });
  }
  Channel<V<A>> each(int64_t ch) const {  // 16 channels
    return read<V<A>>(ch, [](const A* p) { return vload(p); });
  }
};

// The channels c0 … c1 - 1 of a row: f16 gets the offset of 16 neighbours and the first of their channels, f1 one element.
template <class A, class F16, class F1>
inline void pass(const Table<A>& table, int64_t row, int64_t c0, int64_t c1, const F16& f16, const F1& f1) {
  int64_t ch = c0, at = row * table.channels + c0;
  for (; ch + kLanes <= c1; ch += kLanes, at += kLanes) f16(at, ch, table.each(ch));
  for (; ch < c1; ++ch, ++at) f1(at, ch, table.one(ch));
}

// Rows row … stop - 1 of 16 kBlocks channels as they lie in memory, constants in registers.
template <int kBlocks, class A, class F16> inline void narrow(const Table<A>& table, int64_t row, int64_t stop, const F16& f16) {
  Channel<V<A>> k[kBlocks];
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) k[b] = table.each(b * kLanes);
  for (; row < stop; ++row)
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) f16((row * kBlocks + b) * kLanes, b * kLanes, k[b]);
}

// Every element once.
template <class A, class F16, class F1> void walk(const Sizes& s, const Table<A>& table, int threads, const F16& f16, const F1& f1) {
  if (s.layout == kNCHW) {
    const int64_t planes = s.n * s.c, step = s.hw < kPiece ? kPiece / s.hw : 1;
    parallel((planes + step - 1) / step, threads, [&](int64_t u) {
      for (int64_t plane = u * step; plane < least(planes, (u + 1) * step); ++plane) {
        const int64_t ch = plane % s.c, end = (plane + 1) * s.hw;
        const Channel<V<A>> all = table.all(ch);
        const Channel<A> one = table.one(ch);
        int64_t at = plane * s.hw;
        for (; at + kLanes <= end; at += kLanes) f16(at, ch, all);
        for (; at < end; ++at) f1(at, ch, one);
      }
    });
    return;
  }
  const int64_t rows = s.n * s.hw, step = s.c < kPiece ? kPiece / s.c : 1;
  parallel((rows + step - 1) / step, threads, [&](int64_t u) {
    const int64_t begin = u * step, stop = least(rows, begin + step);
    if (s.c == 2 * kLanes) return narrow<2>(table, begin, stop, f16);
    if (s.c == 4 * kLanes) return narrow<4>(table, begin, stop, f16);
    if (s.c == 8 * kLanes) return narrow<8>(table, begin, stop, f16);
    for (int64_t row = begin; row < stop; ++row) pass(table, row, 0, s.c, f16, f1);
  });
}

template <class T> struct Fwd {
  using A = typename Acc<T>::type;

  static void stats(const BnActParams& p) {
    const auto *sums = (const A*)p.sums, *shift = (const A*)p.shift, *weight = (const A*)p.weight;
    A* out = (A*)p.stats;
    const int64_t c = p.s.c;
    const double n = double(p.count);
    for (int64_t i = 0; i < c; ++i) {
      const double d = double(sums[i]) / n, raw = double(sums[c + i]) / n - d * d;
      const double var = raw < 0 ? 0 : raw;  // below 0 is rounding; NaN stays
      const double rstd = 1 / std::sqrt(var + p.eps);
      out[kMean * c + i] = A(double(shift[i]) + d);
      out[kUnbiased * c + i] = A(var * (n / (n - 1)));
      out[kRstd * c + i] = A(rstd);
      out[kScale * c + i] = A(weight ? rstd * double(weight[i]) : rstd);
    }
  }

  template <int kAct> static void run(const BnActParams& p, int threads) {
    const T* x = (const T*)p.x;
    T* y = (T*)p.y;
    const A slope = A(p.slope);
    const Table<A> table((const A*)p.stats, (const A*)p.bias, nullptr, p.s.c, 1);
    walk(
        p.s, table, threads,
        [=](int64_t at, int64_t, const Channel<V<A>>& k) {
          vstore(y + at, act<kAct>((vload(x + at) - k.mean) * k.scale + k.bias, slope));
        },
        [=](int64_t at, int64_t, const Channel<A>& k) { store(y[at], act<kAct>((load(x[at]) - k.mean) * k.scale + k.bias, slope)); });
  }
};

template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  const T *gy, *x;
  T* dx;
  const A* stats;
  double* partial;
  A *gsums, slope;
  Sizes s;
  Table<A> table;

  explicit Bwd(const BnActGradParams& p)
      : gy((const T*)p.gy), x((const T*)p.x), dx((T*)p.dx), stats((const A*)p.stats), partial((double*)p.partial),
        gsums((A*)p.gsums), slope(A(p.slope)), s(p.s),
        table(stats, (const A*)p.bias, p.dx ? (const A*)p.gsums : nullptr, p.s.c, double(p.count)) {}

  template <int kAct, class X> void add(X v, X g, const Channel<X>& k, X& t1, X& t2) const {
    const X d = v - k.mean, m = act_grad<kAct>(d * k.scale + k.bias, g, slope);
    t1 += m;
    t2 += m * d;
  }

  void put(int64_t g, int64_t ch, double t1, double t2) const {
    partial[2 * g * s.c + ch] = t1;
    partial[(2 * g + 1) * s.c + ch] = t2;
  }

  template <int kAct> void sums_nchw(int threads) const {
    const int64_t blocks = (s.c + kPlanes - 1) / kPlanes;
    parallel(s.groups * blocks, threads, [&](int64_t u) {
      const int64_t g = u / blocks, c0 = u % blocks * kPlanes, c1 = least(s.c, c0 + kPlanes);
      alignas(64) A t1[kPlanes][kLanes] = {}, t2[kPlanes][kLanes] = {};
      for (int64_t i = g * s.per; i < least(s.n, (g + 1) * s.per); ++i)
        for (int64_t ch = c0; ch < c1; ++ch) {
          const Channel<V<A>> all = table.all(ch);
          const Channel<A> one = table.one(ch);
          const T *xs = x + (i * s.c + ch) * s.hw, *gs = gy + (i * s.c + ch) * s.hw;
          int64_t j = 0;
          while (j + kLanes <= s.hw) {  // sums of 64 and then of those: a long fp32 chain would lose digits
            const int64_t stop = least(s.hw - kLanes, j + 63 * kLanes);
            V<A> v1 = V<A>::all(A(0)), v2 = v1;
            for (; j <= stop; j += kLanes) add<kAct, V<A>>(vload(xs + j), vload(gs + j), all, v1, v2);
            vstore(t1[ch - c0], vload(t1[ch - c0]) + v1);
            vstore(t2[ch - c0], vload(t2[ch - c0]) + v2);
          }
          for (int l = 0; j < s.hw; ++j, ++l) add<kAct, A>(load(xs[j]), load(gs[j]), one, t1[ch - c0][l], t2[ch - c0][l]);
        }
      for (int64_t ch = c0; ch < c1; ++ch) {
        double s1 = 0, s2 = 0;
        for (int l = 0; l < kLanes; ++l) s1 += t1[ch - c0][l], s2 += t2[ch - c0][l];
        put(g, ch, s1, s2);
      }
    });
  }

  // Sums of the rows of a chain, of channels c0 … c1 - 1.
  template <int kAct> void rows(int64_t row, int64_t stop, int64_t c0, int64_t c1, A* t1, A* t2) const {
    const auto f16 = [&](int64_t at, int64_t ch, const Channel<V<A>>& k) {
      V<A> v1 = vload(t1 + ch - c0), v2 = vload(t2 + ch - c0);
      add<kAct, V<A>>(vload(x + at), vload(gy + at), k, v1, v2);
      vstore(t1 + ch - c0, v1);
      vstore(t2 + ch - c0, v2);
    };
    const auto f1 = [&](int64_t at, int64_t ch, const Channel<A>& k) {
      add<kAct, A>(load(x[at]), load(gy[at]), k, t1[ch - c0], t2[ch - c0]);
    };
    for (; row < stop; ++row) pass(table, row, c0, c1, f16, f1);
  }

  // The same of rows of 16 kBlocks channels, sums in registers.
  template <int kAct, int kBlocks> void chain(int64_t row, int64_t stop, A* t1, A* t2) const {
    V<A> v1[kBlocks], v2[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) v1[b] = v2[b] = V<A>::all(A(0));
    narrow<kBlocks>(table, row, stop, [&](int64_t at, int64_t ch, const Channel<V<A>>& k) __attribute__((always_inline)) {
      add<kAct, V<A>>(vload(x + at), vload(gy + at), k, v1[ch / kLanes], v2[ch / kLanes]);
    });
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) vstore(t1 + b * kLanes, v1[b]), vstore(t2 + b * kLanes, v2[b]);
  }

  template <int kAct> void sums_nhwc(int threads) const {
    const int64_t m = s.n * s.hw, blocks = (s.c + kWidth - 1) / kWidth;
    parallel(s.groups * blocks, threads, [&](int64_t u) {
      const int64_t g = u / blocks, c0 = u % blocks * kWidth, c1 = least(s.c, c0 + kWidth);
      double s1[kWidth] = {}, s2[kWidth] = {};
      const int64_t end = least(m, (g + 1) * s.per);
      for (int64_t row = g * s.per; row < end;) {
        alignas(64) A t1[kWidth] = {}, t2[kWidth] = {};
        const int64_t stop = least(end, row + kChain);
        if (s.c == 2 * kLanes) chain<kAct, 2>(row, stop, t1, t2);
        else if (s.c == 4 * kLanes) chain<kAct, 4>(row, stop, t1, t2);
        else if (s.c == 8 * kLanes) chain<kAct, 8>(row, stop, t1, t2);
        else rows<kAct>(row, stop, c0, c1, t1, t2);
        for (int64_t ch = 0; ch < c1 - c0; ++ch) s1[ch] += t1[ch], s2[ch] += t2[ch];
        row = stop;
      }
      for (int64_t ch = c0; ch < c1; ++ch) put(g, ch, s1[ch - c0], s2[ch - c0]);
    });
  }

  template <int kAct> void sums(int threads) const {
    if (s.layout == kNCHW) sums_nchw<kAct>(threads);
    else sums_nhwc<kAct>(threads);
    const int helpers = 2 * s.c * s.groups < 16384 ? 1 : threads;  // a second round of threads costs more than so few sums
    parallel((s.c + 63) / 64, helpers, [&](int64_t u) {
      for (int64_t ch = u * 64; ch < least(s.c, (u + 1) * 64); ++ch) {
        double t1 = 0, t2 = 0;
        for (int64_t g = 0; g < s.groups; ++g) t1 += partial[2 * g * s.c + ch], t2 += partial[(2 * g + 1) * s.c + ch];
        gsums[ch] = A(t1);
        gsums[s.c + ch] = A(t2 * double(stats[kRstd * s.c + ch]));
      }
    });
  }

  template <int kAct, class X> X grad(X v, X g, const Channel<X>& k) const {
    const X d = v - k.mean;
    return act_grad<kAct>(d * k.scale + k.bias, g, slope) * k.scale - (k.b + k.c * d);
  }

  template <int kAct> void run(int threads) const {
    walk(
        s, table, threads,
        [&](int64_t at, int64_t, const Channel<V<A>>& k) { vstore(dx + at, grad<kAct, V<A>>(vload(x + at), vload(gy + at), k)); },
        [&](int64_t at, int64_t, const Channel<A>& k) { store(dx[at], grad<kAct, A>(load(x[at]), load(gy[at]), k)); });
  }
};

}  // namespace

void FASTKD_CPU(bn_act_fwd)(const BnActParams& p, int threads) {
  with_type(p.s.dtype, [&](auto t) {
    using F = Fwd<decltype(t)>;
    F::stats(p);
    with_act(p.act, [&](auto a) { F::template run<decltype(a)::value>(p, threads); });
  });
}

void FASTKD_CPU(bn_act_bwd_sums)(const BnActGradParams& p, int threads) {
  with_type(p.s.dtype, [&](auto t) {
    const Bwd<decltype(t)> b(p);
    with_act(p.act, [&](auto a) { b.template sums<decltype(a)::value>(threads); });
  });
}

void FASTKD_CPU(bn_act_bwd)(const BnActGradParams& p, int threads) {
  with_type(p.s.dtype, [&](auto t) {
    const Bwd<decltype(t)> b(p);
    with_act(p.act, [&](auto a) { b.template run<decltype(a)::value>(threads); });
  });
}

}  // namespace fastkd
