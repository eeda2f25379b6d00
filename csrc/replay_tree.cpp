// CPU kernels of prioritised sampling. A draw costs three cache misses (end of a block, its pieces, 64 leaves), so all draws of a
// chunk go down together, level by level, and each level prefetches what the next one reads. An update recomputes the pieces and
// blocks that it touched from the leaves, then the ends behind the first of them. Sums are scalar fp64 in one fixed order.
#include <limits>

#include "cpu_kernels.h"
#include "cpu_vec.h"
#include "philox.h"

namespace fastkd {
namespace {

constexpr int64_t kChunk = 64;
constexpr double kNone = std::numeric_limits<double>::infinity();

// How many of `n` rising values are at most t and below `total`.
inline int64_t passed(const double* v, int64_t n, double t, double total) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    const bool right = v[low + half] <= t && v[low + half] < total;
    low = right ? low + half + 1 : low;
    n = right ? n - half - 1 : half;
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

  // A leaf that is no priority makes its sums NaN.
  static double checked(T q) { return q >= T(0) && q < std::numeric_limits<T>::infinity() ? double(q) : std::numeric_limits<double>::quiet_NaN(); }

  void piece(int64_t at) const {
    const T* q = leaves + at * kPieceLeaves;
    const int64_t count = at * kPieceLeaves < p.n ? least(kPieceLeaves, p.n - at * kPieceLeaves) : 0;
    constexpr int kStrands = 8;  // independent additions
    double sum[kStrands] = {}, low[kStrands];
    for (double& v : low) v = kNone;
    int64_t j = 0;
    for (; j + kStrands <= count; j += kStrands)
      for (int s = 0; s < kStrands; ++s) {
        const double v = checked(q[j + s]);
        sum[s] += v;
        low[s] = v > 0 && v < low[s] ? v : low[s];
      }
    for (int s = 0; j < count; ++j, ++s) {
      const double v = checked(q[j]);
      sum[s] += v;
      low[s] = v > 0 && v < low[s] ? v : low[s];
    }
    for (int s = 1; s < kStrands; ++s) {
      sum[0] += sum[s];
      low[0] = low[s] < low[0] ? low[s] : low[0];
    }
    l.piece[at] = sum[0];
    l.piece_low[at] = low[0];
  }

  void block(int64_t b) const {
    double sum = 0, low = kNone;
    for (int64_t i = b * kPieces; i < (b + 1) * kPieces; ++i) {
      sum += l.piece[i];
      low = l.piece_low[i] < low ? l.piece_low[i] : low;
    }
    l.block[b] = sum;
    l.block_low[b] = low;
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
    for (int64_t i = 0; i < count; ++i) {
      at[i] = at[i] * kPieces + down(l.piece + at[i] * kPieces, kPieces, t[i], base[i]);
      prefetch(leaves + at[i] * kPieceLeaves, kPieceLeaves * sizeof(T));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = at[i] * kPieceLeaves, row = first + down(leaves + first, least(kPieceLeaves, p.n - first), t[i], base[i]);
      s.index[from + i] = row;
      static_cast<T*>(s.probability)[from + i] = T(double(leaves[row]) / total);
    }
  }

  void sample(const TreeSampleParams& s, int threads) const {
    *static_cast<T*>(s.least) = T(l.end_low[l.blocks - 1]);
    parallel((s.draws + kChunk - 1) / kChunk, threads, [&](int64_t c) { draw(s, c * kChunk, least(s.draws, (c + 1) * kChunk)); });
  }

  void update(const TreeUpdateParams& s) const {
    T* q = static_cast<T*>(p.leaves);
    const T* value = static_cast<const T*>(s.value);
    if (s.entries == 0) return;
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
