// CPU kernels of the BN-statistics loss: parallel over layers; squares in 16 lanes, lanes and layers added in order, in double.
#include "bn_loss.h"

#include <cmath>

#include "cpu_kernels.h"
#include "cpu_vec.h"

namespace fastkd {
namespace {

template <class X, class A> X get(const A* p) {  // one value or 16
  if constexpr (sizeof(X) == sizeof(A)) return *p;
  else return vload(p);
}

template <class A> struct Loss {
  const BnLossParams& p;
  const A *stats, *target, *average;
  bool blended;
  A keep, mix;  // shares of the batch and of the average

  explicit Loss(const BnLossParams& q)
      : p(q), stats((const A*)q.stats), target((const A*)q.target), average((const A*)q.average),
        blended(average && (!q.calls || *q.calls > 0)), keep(blended ? A(1 - q.momentum) : A(1)), mix(A(q.momentum)) {}

  double weight(int64_t layer) const { return layer ? 1.0 : p.first; }

  template <class X> X batch(int64_t i) const {
    const X s = get<X>(stats + i);
    return blended ? s * keep + get<X>(average + i) * mix : s;
  }
  template <class X> X difference(int64_t i) const { return batch<X>(i) - get<X>(target + i); }

  double norm(int64_t from, int64_t to) const {
    V<A> squares{};
    int64_t i = from;
    for (; i + kLanes <= to; i += kLanes) {
      const V<A> d = difference<V<A>>(i);
      squares += d * d;
    }
    double t = 0;
    for (int l = 0; l < kLanes; ++l) t += squares[l];
    for (; i < to; ++i) {
      const double d = difference<A>(i);
      t += d * d;
    }
    return std::sqrt(t);
  }

  struct Channel { double d, var, run; bool moves; };  // variances at least 1e-8; below, the batch's moves nothing
  Channel channel(int64_t i) const {
    const A var = batch<A>(p.c + i), run = target[p.c + i];
    return {difference<A>(i), var < A(1e-8) ? 1e-8 : double(var), run < A(1e-8) ? 1e-8 : double(run), var >= A(1e-8)};
  }

  double term(int64_t from, int64_t to) const {
    if (p.kind == kL2) return norm(from, to) + norm(p.c + from, p.c + to);
    double t = 0;
    for (int64_t i = from; i < to; ++i) {
      const Channel k = channel(i);
      t += (k.d * k.d + k.var) / (2 * k.run) - 0.5 * std::log(k.var / k.run) - 0.5;
    }
    return t;
  }

  void forward(int threads) const {
    parallel(p.layers, threads, [&](int64_t l) { p.terms[l] = weight(l) * term(p.offsets[l], p.offsets[l + 1]); });
    double t = 0;
    for (int64_t l = 0; l < p.layers; ++l) t += p.terms[l];
    *(A*)p.out = A(t);
  }

  void scaled(int64_t from, int64_t to, double by) const {  // d |v| = v / |v|; a zero norm has gradient zero
    const double size = norm(from, to);
    const A factor = size == 0 ? A(0) : A(by / size);
    A* out = (A*)p.out;
    int64_t i = from;
    for (; i + kLanes <= to; i += kLanes) vstore(out + i, difference<V<A>>(i) * factor);
    for (; i < to; ++i) out[i] = difference<A>(i) * factor;
  }

  void backward(int threads) const {
    A* out = (A*)p.out;
    parallel(p.layers, threads, [&](int64_t l) {
      const int64_t from = p.offsets[l], to = p.offsets[l + 1];
      const double by = double(*(const A*)p.grad) * weight(l) * keep;
      if (p.kind == kL2) {
        scaled(from, to, by);
        scaled(p.c + from, p.c + to, by);
        return;
      }
      for (int64_t i = from; i < to; ++i) {
        const Channel k = channel(i);
        out[i] = A(by * k.d / k.run);
        out[p.c + i] = k.moves ? A(by * 0.5 * (1 / k.run - 1 / k.var)) : A(0);
      }
    });
  }
};

}  // namespace

void FASTKD_CPU(bn_loss_fwd)(const BnLossParams& p, int threads) {
  if (p.dtype == kFloat64) Loss<double>(p).forward(threads);
  else Loss<float>(p).forward(threads);
}

void FASTKD_CPU(bn_loss_bwd)(const BnLossParams& p, int threads) {
  if (p.dtype == kFloat64) Loss<double>(p).backward(threads);
  else Loss<float>(p).backward(threads);
}

}  // namespace fastkd
