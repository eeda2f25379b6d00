// CPU kernels of prioritised sampling. A draw costs three cache misses (end of a block, its pieces, 64 leaves), so all draws of a
// chunk go down together, level by level, and each level prefetches what the next one reads. An update recomputes the pieces and
// blocks that it touched from the leaves, then the ends behind the first of them. Sums are scalar fp64 in one fixed order.
#include <limits>

#include "cpu_kernels.h"
#include "cpu_vec.h"
#include "philox.h"

namespace fastkd {
namespace {

constexpr int64_t kChunk = 64, kAbreast = 4;
constexpr double kNone = std::numeric_limits<double>::infinity();

// How many of `n` rising values are at most t and below `total`. Without a branch on the values, which nobody could predict.
inline int64_t passed(const double* v, int64_t n, double t, double total) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = (n + 1) / 2;
    const double at = v[low + half - 1];
    low += ((at <= t) & (at < total)) ? half : 0;
    n -= half;
  }
  return low;
}

inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
}

template <class T> struct Tree {
  const TreeParams& p;
  const Levels l = levels(p.sums, p.n);
  const T* leaves = static_cast<const T*>(p.leaves);

  // Eight strands of a sum and of a minimum, in as many registers as the processor needs: the same bits on all of them.
  using D = typename Reg<double>::type;
  static constexpr int kStrands = 8, kWide = kBytes / int(sizeof(double)), kRegs = kStrands / kWide;
  struct Strands {
    D sum[kRegs], low[kRegs];
    Strands() {
      for (int i = 0; i < kRegs; ++i) sum[i] = D{}, low[i] = D{} + kNone;
    }
    inline void take(int i, D v, D least) { sum[i] += v, low[i] = least < low[i] ? least : low[i]; }
    inline void close(double& total, double& smallest) const {
      double s[kStrands], m[kStrands];
      __builtin_memcpy(s, sum, sizeof s);
      __builtin_memcpy(m, low, sizeof m);
      for (int half = kStrands / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) s[i] += s[i + half], m[i] = m[i + half] < m[i] ? m[i + half] : m[i];
      total = s[0], smallest = m[0];
    }
  };

  static inline D wide(const double* q) {
    D v;
    __builtin_memcpy(&v, q, sizeof v);
    return v;
  }
  static inline D wide(const float* q) {
    typedef float Narrow __attribute__((vector_size(kBytes / 2)));
    Narrow v;
    __builtin_memcpy(&v, q, sizeof v);
    return __builtin_convertvector(v, D);
  }

  // A leaf that is no priority makes its sums NaN.
  void piece(int64_t at) const {
    const T* q = leaves + at * kPieceLeaves;
    const int64_t count = at * kPieceLeaves < p.n ? least(kPieceLeaves, p.n - at * kPieceLeaves) : 0;
    T padded[kPieceLeaves];
    if (count < kPieceLeaves) {
      for (int64_t j = 0; j < kPieceLeaves; ++j) padded[j] = j < count ? q[j] : T(0);
      q = padded;
    }
    const D none = D{} + kNone, zero = D{}, nan = D{} + std::numeric_limits<double>::quiet_NaN();
    Strands s;
    for (int64_t j = 0; j < kPieceLeaves; j += kStrands)
      _Pragma("GCC unroll 4") for (int i = 0; i < kRegs; ++i) {
        const D raw = wide(q + j + i * kWide), upper = raw < none ? raw : nan, v = raw >= zero ? upper : nan;
        s.take(i, v, v > zero ? v : none);
      }
    s.close(l.piece[at], l.piece_low[at]);
  }

  void block(int64_t b) const {
    Strands s;
    for (int64_t j = b * kPieces; j < (b + 1) * kPieces; j += kStrands)
      _Pragma("GCC unroll 4") for (int i = 0; i < kRegs; ++i) s.take(i, wide(l.piece + j + i * kWide), wide(l.piece_low + j + i * kWide));
    s.close(l.block[b], l.block_low[b]);
  }

  void ends(int64_t from) const {
    double sum = from ? l.end[from - 1] : 0, low = from ? l.end_low[from - 1] : kNone;
    for (int64_t b = from; b < l.blocks; ++b) {
      l.end[b] = sum += l.block[b];
      l.end_low[b] = low = l.block_low[b] < low ? l.block_low[b] : low;
    }
  }

  void build(int threads) const {
    parallel(l.blocks, threads, [&](int64_t b) {
      for (int64_t i = b * kPieces; i < (b + 1) * kPieces; ++i) piece(i);
      block(b);
    });
    ends(0);
  }

  // The first of `count` parts whose prefix sum, begun at `base`, exceeds t; `base` becomes the sum before it. Where rounding
  // leaves none, the last part that is not zero.
  template <class Part> static int64_t down(const Part* part, int64_t count, double t, double& base) {
    double before = base, sum = base;
    int64_t last = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double next = sum + double(part[j]);
      if (next > t) {
        base = sum;
        return j;
      }
      if (part[j] > Part(0)) last = j, before = sum;
      sum = next;
    }
    base = before;
    return last;
  }

  // `down` of kAbreast draws at once, in step: their additions do not wait for one another, and nothing branches on a value.
  // part[d] has kCount parts; at[d] becomes the part.
  template <int64_t kCount, class Part>
  static void abreast(const Part* const* part, const double* t, double* base, int64_t* at) {
    double sum[kAbreast], before[kAbreast];
    int64_t count[kAbreast] = {};
    _Pragma("GCC unroll 8") for (int64_t d = 0; d < kAbreast; ++d) sum[d] = before[d] = base[d];
    for (int64_t j = 0; j < kCount; ++j)
      _Pragma("GCC unroll 8") for (int64_t d = 0; d < kAbreast; ++d) {
        sum[d] += double(part[d][j]);
        const bool low = sum[d] <= t[d];
        before[d] = low ? sum[d] : before[d];
        count[d] += low;
      }
    _Pragma("GCC unroll 8") for (int64_t d = 0; d < kAbreast; ++d) {
      if (count[d] == kCount) count[d] = down(part[d], kCount, t[d], base[d]);
      else base[d] = before[d];
      at[d] = count[d];
    }
  }

  // One level down for all draws of a chunk: at[i] becomes the part of the kCount below it; the last of `n` parts may have fewer.
  template <int64_t kCount, class Part>
  static void level(const Part* parts, int64_t n, const double* t, double* base, int64_t* at, int64_t count) {
    int64_t i = 0;
    for (; i + kAbreast <= count; i += kAbreast) {
      const Part* part[kAbreast];
      int64_t found[kAbreast];
      bool whole = true;
      for (int64_t d = 0; d < kAbreast; ++d) part[d] = parts + at[i + d] * kCount, whole &= (at[i + d] + 1) * kCount <= n;
      if (!whole) break;
      abreast<kCount>(part, t + i, base + i, found);
      for (int64_t d = 0; d < kAbreast; ++d) at[i + d] = at[i + d] * kCount + found[d];
    }
    for (; i < count; ++i) {
      const int64_t first = at[i] * kCount;
      at[i] = first + down(parts + first, least(kCount, n - first), t[i], base[i]);
    }
  }

  void draw(const TreeSampleParams& s, int64_t from, int64_t to) const {
    double t[kChunk], base[kChunk];
    int64_t at[kChunk];
    const double total = l.end[l.blocks - 1];
    const int64_t count = to - from;
    for (int64_t i = 0; i < count; ++i) {
      t[i] = (s.u ? s.u[from + i] : philox_uniform(s.key[0], s.key[1], from + i)) * total;
      at[i] = passed(l.end, l.blocks - 1, t[i], total);
      base[i] = at[i] ? l.end[at[i] - 1] : 0;
      prefetch(l.piece + at[i] * kPieces, kPieces * sizeof(double));
    }
    level<kPieces>(l.piece, l.blocks * kPieces, t, base, at, count);
    for (int64_t i = 0; i < count; ++i) prefetch(leaves + at[i] * kPieceLeaves, kPieceLeaves * sizeof(T));
    level<kPieceLeaves>(leaves, p.n, t, base, at, count);
    for (int64_t i = 0; i < count; ++i) {
      s.index[from + i] = at[i];
      static_cast<T*>(s.probability)[from + i] = T(double(leaves[at[i]]) / total);
    }
  }

  void sample(const TreeSampleParams& s, int threads) const {
    // Infinite: nothing can be drawn, and Python says so.
    *static_cast<T*>(s.least) = l.end[l.blocks - 1] > 0 ? T(l.end_low[l.blocks - 1]) : std::numeric_limits<T>::infinity();
    parallel((s.draws + kChunk - 1) / kChunk, threads, [&](int64_t c) { draw(s, c * kChunk, least(s.draws, (c + 1) * kChunk)); });
  }

  void update(const TreeUpdateParams& s) const {
    T* q = static_cast<T*>(p.leaves);
    const T* value = static_cast<const T*>(s.value);
    if ((*s.refused = refused(s, value))) return;
    if (s.duplicates == kLastWins)
      for (int64_t i = 0; i < s.entries; ++i) q[s.index[i]] = value[i];
    else settle(s, q, value);
    constexpr int64_t kAhead = 8;
    for (int64_t i = 0; i < s.entries; ++i) {
      if (i + kAhead < s.entries) prefetch(leaves + s.index[i + kAhead] / kPieceLeaves * kPieceLeaves, kPieceLeaves * sizeof(T));
      piece(s.index[i] / kPieceLeaves);
    }
    int64_t first = l.blocks;
    for (int64_t i = 0; i < s.entries; ++i) {
      const int64_t b = s.index[i] / kBlockLeaves;
      block(b);
      first = least(first, b);
    }
    ends(first);
  }

  int64_t refused(const TreeUpdateParams& s, const T* value) const {
    int64_t count = 0;
    for (int64_t i = 0; i < s.entries; ++i) {
      const bool inside = (s.index[i] >= 0) & (s.index[i] < p.n);
      const bool priority = (value[i] >= T(0)) & (value[i] < std::numeric_limits<T>::infinity());
      count += !(inside & priority);
    }
    return count;
  }

  static void settle(const TreeUpdateParams& s, T* q, const T* value) {
    for (int64_t i = 0, j; i < s.entries; i = j) {
      const int64_t row = s.index[s.order[i]];
      double sum = 0;
      T most = T(0);
      for (j = i; j < s.entries && s.index[s.order[j]] == row; ++j) {
        const T v = value[s.order[j]];
        sum += double(v);
        most = v > most ? v : most;
      }
      q[row] = s.duplicates == kMaxWins ? most : T(sum / double(j - i));
    }
  }
};

template <class F> void with_leaf(int dtype, const F& f) {
  if (dtype == kFloat64) f(double{});
  else f(float{});
}

}  // namespace

void FASTKD_CPU(philox_uniform)(const UniformParams& p, int threads) {
  constexpr int64_t kPart = 4096;
  parallel((p.n + kPart - 1) / kPart, threads, [&](int64_t c) {
    for (int64_t i = c * kPart; i < least(p.n, (c + 1) * kPart); ++i) p.out[i] = philox_uniform(p.key[0], p.key[1], i);
  });
}

void FASTKD_CPU(replay_sums)(const TreeParams& p, int threads) {
  with_leaf(p.dtype, [&](auto t) { Tree<decltype(t)>{p}.build(threads); });
}

void FASTKD_CPU(replay_sample)(const TreeSampleParams& p, int threads) {
  with_leaf(p.t.dtype, [&](auto t) { Tree<decltype(t)>{p.t}.sample(p, threads); });
}

void FASTKD_CPU(replay_update)(const TreeUpdateParams& p, int) {
  with_leaf(p.t.dtype, [&](auto t) { Tree<decltype(t)>{p.t}.update(p); });
}

}  // namespace fastkd
