// CUDA kernels of prioritised sampling. A sample is one launch, a warp a draw. An update is three: entries settle which of those
// with the same row writes (each looks at all entries: no order of threads, no workspace), a CUDA block recomputes each touched block
// of leaves (the same work twice where two entries touch it), and one CUDA block adds up the ends. No float atomics: same bits always.
#include "common.cuh"
#include "philox.h"
#include "replay_tree.h"

namespace fastkd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kScan = 1024;
constexpr unsigned kAll = ~0u;

__device__ double infinity() { return __longlong_as_double(0x7ff0000000000000LL); }
__device__ double nan_() { return __longlong_as_double(0x7ff8000000000000LL); }
__device__ bool is_priority(double v) { return v >= 0 && v < infinity(); }

__device__ double warp_sum(double v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kAll, v, o);
  return v;
}
__device__ double warp_min(double v) {
  for (int o = 16; o; o >>= 1) v = fmin(v, __shfl_xor_sync(kAll, v, o));
  return v;
}

__global__ void uniform_kernel(const UniformParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.n) p.out[i] = philox_uniform(p.key[0], p.key[1], i);
}

// --- sums --------------------------------------------------------------------------------------------------------------------

// One CUDA block a block of leaves: every one of them, or that of an entry of `index`.
template <class T> __global__ void block_kernel(const TreeParams p, const int64_t* index) {
  const Levels l = levels(p.sums, p.n);
  const T* leaves = static_cast<const T*>(p.leaves);
  int64_t b = blockIdx.x;
  if (index) {
    const int64_t row = index[b];
    if (row < 0 || row >= p.n) return;
    b = row / kBlockLeaves;
  }
  const int lane = threadIdx.x % 32;
  __shared__ double sums[kPieces], lows[kPieces];
  for (int piece = threadIdx.x / 32; piece < kPieces; piece += kWarps) {
    double sum = 0, low = infinity();
    for (int half = 0; half < 2; ++half) {
      const int64_t at = b * kBlockLeaves + piece * kPieceLeaves + half * 32 + lane;
      const double q = at < p.n ? double(leaves[at]) : 0.0, v = is_priority(q) ? q : nan_();
      sum += v;
      if (v > 0) low = fmin(low, v);
    }
    sum = warp_sum(sum);
    low = warp_min(low);
    if (lane == 0) {
      l.piece[b * kPieces + piece] = sums[piece] = sum;
      l.piece_low[b * kPieces + piece] = lows[piece] = low;
    }
  }
  __syncthreads();
  if (threadIdx.x) return;
  double sum = 0, low = infinity();
  for (int piece = 0; piece < kPieces; ++piece) sum += sums[piece], low = fmin(low, lows[piece]);
  l.block[b] = sum;
  l.block_low[b] = low;
}

// One CUDA block: a thread adds up a run of blocks, the runs are added up in order, then each thread writes the ends of its run.
__global__ void ends_kernel(const Levels l) {
  const int64_t run = (l.blocks + kScan - 1) / kScan, from = min(l.blocks, int64_t(threadIdx.x) * run), to = min(l.blocks, from + run);
  double sum = 0, low = infinity();
  for (int64_t b = from; b < to; ++b) sum += l.block[b], low = fmin(low, l.block_low[b]);
  __shared__ double sums[kScan], lows[kScan];
  sums[threadIdx.x] = sum;
  lows[threadIdx.x] = low;
  for (int o = 1; o < kScan; o <<= 1) {
    __syncthreads();
    const bool has = int(threadIdx.x) >= o;
    const double s = has ? sums[threadIdx.x - o] : 0.0, v = has ? lows[threadIdx.x - o] : infinity();
    __syncthreads();
    sums[threadIdx.x] += s;
    lows[threadIdx.x] = fmin(lows[threadIdx.x], v);
  }
  __syncthreads();
  sum = threadIdx.x ? sums[threadIdx.x - 1] : 0.0;
  low = threadIdx.x ? lows[threadIdx.x - 1] : infinity();
  for (int64_t b = from; b < to; ++b) {
    l.end[b] = sum += l.block[b];
    l.end_low[b] = low = fmin(low, l.block_low[b]);
  }
}

// --- sample ------------------------------------------------------------------------------------------------------------------

// The first lane whose prefix sum (from `base` on) exceeds t among those with a positive part; where rounding leaves none, the last
// of these. `base` becomes the sum before it. All lanes of a warp get the same answer.
__device__ int down(double part, double t, double& base) {
  double sum = part;
  for (int o = 1; o < 32; o <<= 1) {
    const double v = __shfl_up_sync(kAll, sum, o);
    if (int(threadIdx.x % 32) >= o) sum += v;
  }
  const unsigned positive = __ballot_sync(kAll, part > 0), above = __ballot_sync(kAll, part > 0 && base + sum > t);
  const int lane = above ? __ffs(above) - 1 : positive ? 31 - __clz(positive) : 0;
  base += lane ? __shfl_sync(kAll, sum, lane - 1) : 0.0;
  return lane;
}

template <class T> __global__ void sample_kernel(const TreeSampleParams p) {
  const int64_t draw = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const Levels l = levels(p.t.sums, p.t.n);
  const T* leaves = static_cast<const T*>(p.t.leaves);
  if (draw == 0 && lane == 0) *static_cast<T*>(p.least) = T(l.end_low[l.blocks - 1]);
  if (draw >= p.draws) return;
  const double total = l.end[l.blocks - 1];
  const double t = __dmul_rn(p.u ? p.u[draw] : philox_uniform(p.key[0], p.key[1], draw), total);
  int64_t b = 0;  // the first block whose end exceeds t, or for t >= total the last that is not zero
  for (int64_t n = l.blocks; n > 0;) {
    const int64_t half = n / 2;
    const double end = l.end[b + half];
    const bool right = end <= t && end < total;
    b = right ? b + half + 1 : b;
    n = right ? n - half - 1 : half;
  }
  b = min(b, l.blocks - 1);
  double base = b ? l.end[b - 1] : 0.0;
  const int64_t piece = b * kPieces + down(lane < kPieces ? l.piece[b * kPieces + lane] : 0.0, t, base);
  const int64_t first = piece * kPieceLeaves + 2 * lane;
  const double even = first < p.t.n ? double(leaves[first]) : 0.0, odd = first + 1 < p.t.n ? double(leaves[first + 1]) : 0.0;
  const int pair = down(even + odd, t, base);
  if (lane != pair) return;
  const bool second = odd > 0 && (even <= 0 || base + even <= t);
  const int64_t row = min(first + second, p.t.n - 1);
  p.index[draw] = row;
  static_cast<T*>(p.probability)[draw] = T(double(leaves[row]) / total);
}

// --- update ------------------------------------------------------------------------------------------------------------------

template <class T> __global__ void settle_kernel(const TreeUpdateParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.entries) return;
  const T* value = static_cast<const T*>(p.value);
  const int64_t row = p.index[i];
  const bool inside = row >= 0 && row < p.t.n;
  if (!inside || !is_priority(double(value[i]))) atomicAdd(reinterpret_cast<unsigned long long*>(p.refused), 1ull);
  if (!inside) return;
  double taken = 0;
  int64_t count = 0;
  for (int64_t j = 0; j < p.entries; ++j) {
    if (p.index[j] != row) continue;
    const double v = double(value[j]);
    if (!is_priority(v)) continue;
    taken = p.duplicates == kLastWins ? v : p.duplicates == kMaxWins ? fmax(taken, v) : taken + v;
    ++count;
  }
  if (count) static_cast<T*>(p.t.leaves)[row] = T(p.duplicates == kMeanOfAll ? taken / double(count) : taken);
}

void add_up(const TreeParams& p, cudaStream_t s) {
  ends_kernel<<<1, kScan, 0, s>>>(levels(p.sums, p.n));
  check_launch("replay_ends", p.n, 1, 1);
}

template <class F> void with_leaf(int dtype, const F& f) {
  if (dtype == kFloat64) f(double{});
  else f(float{});
}

}  // namespace

void philox_uniform_cuda(const UniformParams& p, void* stream) {
  uniform_kernel<<<unsigned((p.n + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("philox_uniform", p.n, 1, 1);
}

void replay_sums_cuda(const TreeParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_leaf(p.dtype, [&](auto t) { block_kernel<decltype(t)><<<unsigned(levels(p.sums, p.n).blocks), kThreads, 0, s>>>(p, nullptr); });
  check_launch("replay_sums", p.n, 1, 1);
  add_up(p, s);
}

void replay_sample_cuda(const TreeSampleParams& p, void* stream) {
  const unsigned grid = unsigned((p.draws + kWarps - 1) / kWarps);
  with_leaf(p.t.dtype, [&](auto t) { sample_kernel<decltype(t)><<<grid ? grid : 1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p); });
  check_launch("replay_sample", p.t.n, p.draws, 1);
}

void replay_update_cuda(const TreeUpdateParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_leaf(p.t.dtype, [&](auto t) {
    using T = decltype(t);
    settle_kernel<T><<<unsigned((p.entries + kThreads - 1) / kThreads), kThreads, 0, s>>>(p);
    check_launch("replay_settle", p.t.n, p.entries, 1);
    block_kernel<T><<<unsigned(p.entries), kThreads, 0, s>>>(p.t, p.index);
    check_launch("replay_update", p.t.n, p.entries, 1);
  });
  add_up(p.t, s);
}

}  // namespace fastkd
