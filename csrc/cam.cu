// CUDA kernels of the class activation map: one block an image, from the features to the finished map in one launch, and from its
// gradient to that of the features in another. Memory-bound: features move in vectors of 16 bytes where rows and addresses allow it
// (one element elsewhere), several on their way at once; weights pass through shared memory in pieces. The resize is separable:
// forward stretches the small map along the width in shared memory and blends two of its rows a pixel; backward adds up pixels along
// the height first. A map of up to kCells cells stays in shared memory; a larger one waits in the memory of the slope, or of the
// gradient of the raw map. Sums have a fixed order: the same bits every time. A label out of range is clamped.
#include "cam.h"
#include "common.cuh"

namespace fastkd {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kBlocks = 2, kCells = 1024;
constexpr int kAhead = 4;             // vectors that a thread asks for before it uses the first
constexpr int64_t kPiece = 1 << 14;   // elements of d features that a block writes where images are cut
constexpr int64_t kFewImages = 128;   // so few leave most of a device idle
template <class A> constexpr int kWeights = (8 << 10) / int(sizeof(A));  // in shared memory at once
template <class A> constexpr int kSpace = (24 << 10) / int(sizeof(A));   // for stretched rows, and for sums
template <class A> constexpr int kPixels = 16 / int(sizeof(A));

template <class T> struct Fwd {
  using A = typename Acc<T>::type;
  CamSizes s;
  const T* features;
  const void* weight;
  const int64_t* labels;
  A *out, *slope;
  bool relu, resize, renorm, wide;  // wide: rows of the map take vectors
  int norm;
};
template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  CamSizes s;
  const A* grad;
  const void* weight;
  const int64_t* labels;
  const A* slope;  // null: grad is that of the raw map
  T* dfeatures;
  A* draw;  // null: known already
  bool resize, wide;
  int64_t pieces;
};

// Calls f with the address of element `at` of the head's weights, whatever their type is: a branch that is equal for all threads.
template <class F> __device__ void with_weight(const void* weight, int dtype, int64_t at, const F& f) {
  if (dtype == kFloat32) f(static_cast<const float*>(weight) + at);
  else if (dtype == kFloat64) f(static_cast<const double*>(weight) + at);
  else if (dtype == kBFloat16) f(static_cast<const __nv_bfloat16*>(weight) + at);
  else f(static_cast<const __half*>(weight) + at);
}

__device__ int64_t row_of(const CamSizes& s, const int64_t* labels, int64_t b) {
  return min(max(labels[b], int64_t(0)), s.classes - 1) * s.channels;
}

// Weights of n channels, from element `at` on, into shared memory.
template <class A> __device__ void stage(const void* weight, const CamSizes& s, int64_t at, int n, A* to) {
  with_weight(weight, s.weight_dtype, at, [&](const auto* from) {
#pragma unroll 4
    for (int k = threadIdx.x; k < n; k += kThreads) to[k] = A(load(from[k]));
  });
}

// V neighbours in shared memory, at a multiple of V.
template <int V, class A> __device__ void read(const A* from, A (&to)[V]) {
  constexpr int P = V < kPixels<A> ? V : kPixels<A>;
#pragma unroll
  for (int i = 0; i < V; i += P) {
    const Pack<A, P> part = *reinterpret_cast<const Pack<A, P>*>(from + i);
    for (int q = 0; q < P; ++q) to[i + q] = part.v[q];
  }
}

// V neighbours in global memory as one store, which is not read again here: the compiler may cut a plain one into words.
template <int V, class T, class A> __device__ void write(T* to, const A (&v)[V]) {
  if constexpr (V == 1) {
    store(*to, v[0]);
  } else {
    Pack<T, V> out;
    int4 raw;
    static_assert(sizeof out == sizeof raw, "vectors are 16 bytes");
    for (int q = 0; q < V; ++q) store(out.v[q], v[q]);
    memcpy(&raw, &out, sizeof raw);
    __stcs(reinterpret_cast<int4*>(to), raw);
  }
}

// NaN wins, as in amin and amax.
template <class A> __device__ A lesser(A a, A b) { return b < a || b != b ? b : a; }
template <class A> __device__ A greater(A a, A b) { return b > a || b != b ? b : a; }
template <class A> struct Extent { A low, high; };

// Over the first `lanes` of a warp, or of each such part of it; a part's first lane gets the sum.
template <class A> __device__ A lane_sum(A v, int lanes = 32) {
  for (int o = lanes / 2; o; o /= 2) v += __shfl_down_sync(~0u, v, o);
  return v;
}

// Threads side by side that walk a row of `length` together: a power of two up to a warp.
struct Team {
  int lanes = 1, lane, team, teams;
  __device__ explicit Team(int64_t length) {
    while (lanes < 32 && lanes < length) lanes *= 2;
    lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = kThreads / lanes;
  }
};

// Over all threads of the block; every thread gets the result.
template <class A> __device__ Extent<A> block_extent(Extent<A> e) {
  __shared__ A low[kWarps], high[kWarps];
  for (int o = 16; o; o >>= 1) {
    e.low = lesser(e.low, __shfl_down_sync(~0u, e.low, o));
    e.high = greater(e.high, __shfl_down_sync(~0u, e.high, o));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) low[threadIdx.x / 32] = e.low, high[threadIdx.x / 32] = e.high;
  __syncthreads();
  e = {low[0], high[0]};
  for (int w = 1; w < kWarps; ++w) e = {lesser(e.low, low[w]), greater(e.high, high[w])};
  return e;
}

// (v - low) * rate, or 0 for a map with nothing to show.
template <class A> struct Scale {
  A low, rate;
  bool flat;
  __device__ Scale() : low(0), rate(1), flat(false) {}
  __device__ Scale(int norm, const Extent<A>& e) : Scale() {
    if (norm == kNoNorm) return;
    low = norm == kMax ? A(0) : e.low;
    flat = norm == kMax ? e.high <= A(0) : e.high == e.low;
    rate = A(1) / (e.high - low + A(kCamEps));
  }
  __device__ A operator()(A v) const { return flat ? A(0) : (v - low) * rate; }
  __device__ A slope() const { return flat ? A(0) : rate; }
};

// One axis of a bilinear resize, align_corners=False: value q of `to` is (1 - t) of source `left` and t of source `right`.
template <class A> struct Axis {
  int from, to;
  A ratio;
  struct Tap {
    int left, right;
    A t;
    __device__ A share(int i) const { return (i == left ? A(1) - t : A(0)) + (i == right ? t : A(0)); }
  };
  __device__ Axis(int64_t from, int64_t to) : from(int(from)), to(int(to)), ratio(A(from) / A(to)) {}
  __device__ A at(int q) const { return max(ratio * (A(q) + A(0.5)) - A(0.5), A(0)); }
  __device__ int left(int q) const { return min(int(at(q)), from - 1); }
  __device__ Tap operator()(int q) const {
    const int i = left(q);
    return {i, min(i + 1, from - 1), at(q) - A(i)};
  }
  // The first value whose left source is i or a later one.
  __device__ int begin(int i) const {
    if (i <= 0 || i >= from) return i <= 0 ? 0 : to;
    int q = min(max(int((A(i) + A(0.5)) / ratio - A(0.5)), 0), to);
    while (q > 0 && left(q - 1) >= i) --q;
    while (q < to && left(q) < i) ++q;
    return q;
  }
};

// A run of [channels, cells] in vectors of V, taken by so many threads that each meets the same cells in all its vectors and passes
// equally many channels from one to the next.
template <int V> struct Flat {
  int threads, channels, channel[V];  // 0 threads: no number does; channel: of the elements of this thread's first vector
  __device__ explicit Flat(int64_t hw) : threads(0), channels(0) {
    int common = 1;  // of hw and V
    while (common < V && hw % (2 * common) == 0) common *= 2;
    if (hw / common > kThreads) return;
    const int cells = int(hw), period = cells / common;
    threads = kThreads / period * period;
    channels = threads * V / cells;
#pragma unroll
    for (int q = 0; q < V; ++q) channel[q] = (int(threadIdx.x) * V + q) / cells;
  }
  __device__ bool takes_part() const { return int(threadIdx.x) < threads; }
};

// NHWC, n channels of all cells: a team takes kAhead cells at once. `more`: adds to what m holds.
template <int V, class T, class A>
__device__ void sum_nhwc(const T* f, const A* weight, int n, int64_t channels, int64_t hw, bool more, A* m) {
  const Team t(n / V);
  for (int64_t j0 = t.team; j0 - t.team < hw; j0 += kAhead * t.teams) {
    A sum[kAhead] = {};
    for (int k = t.lane * V; k < n; k += t.lanes * V) {
      Pack<T, V> x[kAhead];
      A w[V];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (j0 + u * t.teams < hw) x[u] = load_pack<V>(f + (j0 + u * t.teams) * channels + k);
      read<V>(weight + k, w);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (j0 + u * t.teams >= hw) continue;
        A v[V];
        widen(x[u], v);
        for (int q = 0; q < V; ++q) sum[u] += v[q] * w[q];
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t j = j0 + u * t.teams;
      const A whole = lane_sum(sum[u], t.lanes);
      if (t.lane == 0 && j < hw) m[j] = more ? m[j] + whole : whole;
    }
  }
}

// NCHW, n channels as one flat run: a thread's sums of its V cells.
template <int V, class T, class A> __device__ void sum_flat(const T* f, const A* weight, int n, int hw, const Flat<V>& flat, A (&sum)[V]) {
  const int step = flat.threads * V, end = n * hw;
  const A* w = weight;
  for (int e = threadIdx.x * V; e < end; e += kAhead * step) {
    Pack<T, V> x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (e + u * step < end) x[u] = load_pack<V>(f + e + u * step);
#pragma unroll
    for (int u = 0; u < kAhead; ++u, w += flat.channels) {
      if (e + u * step >= end) continue;
      A v[V];
      widen(x[u], v);
      for (int q = 0; q < V; ++q) sum[q] += v[q] * w[flat.channel[q]];
    }
  }
}

// m = the sums of all threads: element i of the run of sums belongs to cell i % hw. `space` holds kThreads * V elements.
template <int V, class A> __device__ void add_flat(const Flat<V>& flat, const A (&sum)[V], int hw, A* space, A* m) {
  const int tid = threadIdx.x, all = flat.threads * V, some = hw < kThreads ? kThreads / hw * hw : hw;
  if (flat.takes_part())
    for (int q = 0; q < V; ++q) space[tid * V + q] = sum[q];
  __syncthreads();
  for (int j = tid; j < some; j += kThreads) {  // elements j, j + some, …: no other thread reads these
    A part = space[j];
#pragma unroll 4
    for (int i = j + some; i < all; i += some) part += space[i];
    space[j] = part;
  }
  __syncthreads();
  for (int j = tid; j < hw; j += kThreads) {
    A whole = space[j];
#pragma unroll 4
    for (int i = j + hw; i < some; i += hw) whole += space[i];
    m[j] = whole;
  }
}

// Weighted sum over channels: m[j] of all cells of one image.
template <int V, bool kLast, class T, class A> __device__ void weighted_sum(const Fwd<T>& p, int64_t b, A* space, A* m) {
  alignas(16) __shared__ A weight[kWeights<A>];
  const CamSizes& s = p.s;
  const int64_t hw = s.h * s.w, row = row_of(s, p.labels, b);
  const Flat<V> flat(hw);
  A sum[V] = {};
  int64_t first = 0;
  do {  // once also without a channel
    const int n = int(min(int64_t(kWeights<A>), s.channels - first));
    if (first) __syncthreads();
    stage(p.weight, s, row + first, n, weight);
    __syncthreads();
    const T* f = p.features + b * s.channels * hw + first * (kLast ? 1 : hw);
    if constexpr (kLast) {
      sum_nhwc<V>(f, weight, n, s.channels, hw, first > 0, m);
    } else if (flat.threads) {
      if (flat.takes_part()) sum_flat<V>(f, weight, n, int(hw), flat, sum);
    } else {  // more cells than threads
      for (int64_t j = threadIdx.x; j < hw; j += kThreads) {
        A cell = first ? m[j] : A(0);
#pragma unroll 8
        for (int k = 0; k < n; ++k) cell += A(load(f[k * hw + j])) * weight[k];
        m[j] = cell;
      }
    }
    first += kWeights<A>;
  } while (first < s.channels);
  if (!kLast && flat.threads) add_flat<V>(flat, sum, int(hw), space, m);
  __syncthreads();
}

// Blends rows of the small map, stretched along the width, into P pixels at a time: row(i, x, to) gets those of source i. A team takes
// a row of pixels; visit(at, pixels).
template <int P, class A, class Row, class Visit> __device__ void each_pixel(const CamSizes& s, const Row& row, const Visit& visit) {
  const Axis<A> down(s.h, s.height);
  const Team t(s.width / P);
  for (int q = t.team; q < down.to; q += t.teams) {
    const auto v = down(q);
    for (int x = t.lane * P; x < int(s.width); x += t.lanes * P) {
      A a[P], b[P];
      row(v.left, x, a);
      row(v.right, x, b);
#pragma unroll
      for (int i = 0; i < P; ++i) a[i] = (A(1) - v.t) * a[i] + v.t * b[i];
      visit(q * s.width + x, a);
    }
  }
}

template <class T, int V, bool kLast> __global__ void __launch_bounds__(kThreads, kBlocks) cam_fwd_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  alignas(16) __shared__ A space[kSpace<A>];
  __shared__ A cells[kCells];
  static_assert(kThreads * V <= kSpace<A>, "the sums of a flat run have room");
  const CamSizes& s = p.s;
  const int64_t b = blockIdx.x, hw = s.h * s.w;
  A *slope = p.slope + b * hw, *out = p.out + b * s.height * s.width, *m = hw <= kCells ? cells : slope;
  weighted_sum<V, kLast>(p, b, space, m);

  const auto value = [&](int64_t j) { return p.relu && m[j] <= A(0) ? A(0) : m[j]; };
  const A endless = A(INFINITY);
  Extent<A> e{endless, -endless};
  for (int64_t j = threadIdx.x; j < hw; j += kThreads) e = {lesser(e.low, value(j)), greater(e.high, value(j))};
  const Scale<A> first(p.norm, block_extent(e));
  A rate = first.slope();
  if (p.resize) {
    const Axis<A> across(s.w, s.width);
    const auto stretched = [&](int i, int x) {
      const auto u = across(x);
      return (A(1) - u.t) * first(value(i * s.w + u.left)) + u.t * first(value(i * s.w + u.right));
    };
    const bool staged = s.h * s.width <= kSpace<A>;
    const int width = staged ? int(s.width) : 0;
    if (staged) {
      for (int i = threadIdx.x; i < int(s.h) * width; i += kThreads) space[i] = stretched(i / width, i % width);
      __syncthreads();
    }
    const auto each = [&](const auto& visit) {
      if (staged && p.wide) {
        constexpr int P = kPixels<A>;
        each_pixel<P, A>(s, [&](int i, int x, A(&to)[P]) { read<P>(space + i * width + x, to); }, visit);
      } else {
        const auto row = [&](int i, int x, A(&to)[1]) { to[0] = staged ? space[i * width + x] : stretched(i, x); };
        each_pixel<1, A>(s, row, visit);
      }
    };
    const bool again = p.renorm && p.norm != kNoNorm;
    Scale<A> second;
    if (again) {
      e = {endless, -endless};
      each([&](int64_t, const auto& pixels) {
        for (const A v : pixels) e = {lesser(e.low, v), greater(e.high, v)};
      });
      second = Scale<A>(p.norm, block_extent(e));
      rate *= second.slope();
    }
    each([&](int64_t at, auto& pixels) {
      if (again)
        for (A& v : pixels) v = second(v);
      write(out + at, pixels);
    });
  } else {
    for (int64_t j = threadIdx.x; j < hw; j += kThreads) out[j] = first(value(j));
  }
  __syncthreads();  // the map may lie where the slope goes
  for (int64_t j = threadIdx.x; j < hw; j += kThreads) slope[j] = p.relu && m[j] <= A(0) ? A(0) : rate;
}

// Sums along the height. Pixels of a row q with left source i add (1 - t) to that source, which goes to sums[2 slot], and t to the next
// one, to sums[2 slot + 1]; slot 0 stands for source `from`, which may be -1 and has no rows then. Each pixel is read once, P at a time.
template <int P, class A>
__device__ void sum_rows(const Axis<A>& down, const A* grad, int from, int slots, int width, A* sums) {
  const int vectors = width / P;
  for (int e = threadIdx.x; e < slots * vectors; e += kThreads) {
    const int slot = e / vectors, x = e % vectors * P;
    const int source = from + slot, end = down.begin(source + 1);
    int q = down.begin(source);
    const A* row = grad + int64_t(q) * width + x;
    const A left = A(source);
    A near[P] = {}, far[P] = {};
    for (; q < end; q += kAhead, row += kAhead * width) {
      Pack<A, P> g[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (q + u < end) g[u] = load_pack<P>(row + u * width);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (q + u >= end) continue;
        const A t = down.at(q + u) - left;
        for (int i = 0; i < P; ++i) near[i] += (A(1) - t) * g[u].v[i], far[i] += t * g[u].v[i];
      }
    }
    store_pack(sums + 2 * slot * width + x, near);
    store_pack(sums + (2 * slot + 1) * width + x, far);
  }
}

// Adjoint of the resize: done(cell, gradient of the small map), once a cell, from some thread.
template <class T, class A, class Done> __device__ void undo_resize(const Bwd<T>& p, const A* grad, A* space, const Done& done) {
  const CamSizes& s = p.s;
  const Axis<A> down(s.h, s.height), across(s.w, s.width);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = across.to;
  const int rows = min(down.from, kSpace<A> / 2 / width - 1);  // of the small map, whose sums fit at once
  if (rows < 1) {  // a warp takes a cell and gathers from the pixels that it was spread over
    for (int64_t j = warp; j < s.h * s.w; j += kWarps) {
      const int row = int(j / s.w), column = int(j % s.w), bottom = down.begin(row + 1), end = across.begin(column + 1);
      A sum = 0;
      for (int q = down.begin(row - 1); q < bottom; ++q) {
        const A share = down(q).share(row);
        for (int x = across.begin(column - 1) + lane; x < end; x += 32) sum += share * across(x).share(column) * grad[q * s.width + x];
      }
      sum = lane_sum(sum);
      if (lane == 0) done(j, sum);
    }
    return;
  }
  for (int top = 0; top < down.from; top += rows) {
    const int here = min(rows, down.from - top);
    if (top) __syncthreads();
    if (p.wide) sum_rows<kPixels<A>>(down, grad, top - 1, here + 1, width, space);
    else sum_rows<1>(down, grad, top - 1, here + 1, width, space);
    __syncthreads();
    for (int64_t j = warp; j < here * s.w; j += kWarps) {  // a warp takes a cell
      const int row = int(j / s.w), column = int(j % s.w), end = across.begin(column + 1);
      const A *far = space + (2 * row + 1) * width, *near = far + width, *rest = near + width;
      const bool last = top + row == down.from - 1;  // is its own next one
      A sum = 0;
      for (int x = across.begin(column - 1) + lane; x < end; x += 32)
        sum += across(x).share(column) * (far[x] + near[x] + (last ? rest[x] : A(0)));
      sum = lane_sum(sum);
      if (lane == 0) done(top * s.w + j, sum);
    }
  }
}

// A block: the gradient of one small map, then its part of d features = weight of the label (x) d map.
template <class T, int V, bool kLast> __global__ void __launch_bounds__(kThreads, kBlocks) cam_bwd_kernel(const Bwd<T> p) {
  using A = typename Acc<T>::type;
  alignas(16) __shared__ A space[kSpace<A>];
  __shared__ A weight[kWeights<A>], cells[kCells];
  const CamSizes& s = p.s;
  const int tid = threadIdx.x;
  const int64_t b = blockIdx.x / p.pieces, piece = blockIdx.x % p.pieces, hw = s.h * s.w, row = row_of(s, p.labels, b);
  const A *grad = p.grad + b * s.height * s.width, *slope = p.slope ? p.slope + b * hw : nullptr;
  A* draw = p.draw && piece == 0 ? p.draw + b * hw : nullptr;
  const bool kept = hw <= kCells, writes = p.dfeatures && s.channels > 0;
  const auto done = [&](int64_t j, A g) {
    if (slope) g = slope[j] == A(0) ? A(0) : slope[j] * g;
    if (kept) cells[j] = g;
    if (draw) draw[j] = g;
  };

  // A thread keeps its channels (NHWC, pieces are cells) or its cells (NCHW, pieces are channels). The first weights are on their way
  // while the map is worked on.
  const int64_t vectors = s.channels / V, whole = kLast ? hw : s.channels, unit = kLast ? 1 : V;
  const int64_t per = ((whole + p.pieces - 1) / p.pieces + unit - 1) / unit * unit;
  const int64_t begin = min(whole, piece * per), end = min(whole, begin + per);
  const int columns = int(max(min(vectors, int64_t(kThreads)), int64_t(1)));
  int64_t k = tid < kThreads / columns * columns ? tid % columns : vectors;
  A w[V];
  const auto fetch = [&] {
    if (k < vectors)
      with_weight(p.weight, s.weight_dtype, row + k * V, [&](const auto* from) {
        for (int q = 0; q < V; ++q) w[q] = A(load(from[q]));
      });
  };
  const auto room = [&](int64_t first) { return int(min(int64_t(kWeights<A>), end - first)); };
  if (writes && kLast) fetch();
  if (writes && !kLast) stage(p.weight, s, row + begin, room(begin), weight);

  if (p.resize) undo_resize(p, grad, space, done);
  else
    for (int64_t j = tid; j < hw; j += kThreads) done(j, grad[j]);
  if (!writes) return;
  __syncthreads();
  const A* g = kept ? cells : slope ? draw : grad;  // of the raw map
  T* f = p.dfeatures + b * s.channels * hw;
  if constexpr (kLast) {
    for (; k < vectors; k += columns, fetch()) {
#pragma unroll 4
      for (int64_t j = begin + tid / columns; j < end; j += kThreads / columns) {
        const A one = g[j];
        A v[V];
        for (int q = 0; q < V; ++q) v[q] = w[q] * one;
        write(f + j * s.channels + k * V, v);
      }
    }
    return;
  }
  const Flat<V> flat(hw);
  if (flat.takes_part())
    for (int q = 0; q < V; ++q) w[q] = g[(tid * V + q) % int(hw)];
  for (int64_t first = begin; first < end; first += kWeights<A>) {
    const int n = room(first);
    if (first > begin) {
      __syncthreads();
      stage(p.weight, s, row + first, n, weight);
      __syncthreads();
    }
    T* run = f + first * hw;
    if (flat.takes_part()) {
      const A* channel = weight;
#pragma unroll 2
      for (int e = tid * V; e < n * int(hw); e += flat.threads * V, channel += flat.channels) {
        A v[V];
        for (int q = 0; q < V; ++q) v[q] = channel[flat.channel[q]] * w[q];
        write(run + e, v);
      }
    } else if (!flat.threads) {  // more cells than threads
      for (int i = 0; i < n; ++i)
        for (int64_t j = tid; j < hw; j += kThreads) store(run[i * hw + j], weight[i] * g[j]);
    }
  }
}

// Positions along an axis are 32-bit in a resize; indices of elements are not.
void check_axes(const CamSizes& s) {
  for (const int64_t n : {s.h, s.w, s.height, s.width})
    if (n > INT32_MAX) throw std::runtime_error("cam: a resize takes axes of up to 2147483647 values, found " + std::to_string(n));
}

// Calls f(Int<V>, Int<layout is NHWC>) with vectors of 16 bytes or of one element: they lie along the channels (NHWC), or along a whole
// image.
template <class T, class F> void with_run(const CamSizes& s, const void* features, const F& f) {
  const bool last = s.layout == kNHWC;
  with_vector<T>(last ? s.channels : s.channels * s.h * s.w, {features}, [&](auto v) {
    constexpr int V = decltype(v)::value, kVector = V * sizeof(T) == 16 ? V : 1;
    if (last) f(Int<kVector>{}, Int<1>{});
    else f(Int<kVector>{}, Int<0>{});
  });
}

// Whether rows of the finished map, or of its gradient, are made of vectors of 16 bytes.
template <class A> bool rows_of_vectors(const CamSizes& s, const void* map) {
  return s.width % kPixels<A> == 0 && reinterpret_cast<size_t>(map) % 16 == 0;
}

}  // namespace

void cam_fwd_cuda(const CamParams& p, void* stream) {
  if (p.resize) check_axes(p.s);
  with_type(p.s.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Fwd<T> f{p.s, (const T*)p.features, p.weight, p.labels, (A*)p.out, (A*)p.slope, p.relu, p.resize, p.renorm,
                   rows_of_vectors<A>(p.s, p.out), p.norm};
    with_run<T>(p.s, p.features, [&](auto v, auto last) {
      constexpr int V = decltype(v)::value, kLast = decltype(last)::value;
      cam_fwd_kernel<T, V, kLast><<<unsigned(p.s.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(f);
    });
  });
  check_launch("cam_fwd", p.s.batch, p.s.channels, p.s.h * p.s.w);
}

void cam_bwd_cuda(const CamGradParams& p, void* stream) {
  if (p.resize) check_axes(p.s);
  // A small batch fills the device too where images are cut. A resize is undone once an image: in a launch of its own then. So is a
  // map that shared memory does not hold.
  const int64_t n = p.s.channels * p.s.h * p.s.w, cut = !p.dfeatures || n <= kPiece ? 1 : (n + kPiece - 1) / kPiece;
  const bool apart = cut > 1 && (p.s.h * p.s.w > kCells || (p.resize && p.s.batch < kFewImages));
  with_type(p.s.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    Bwd<T> g{p.s, (const A*)p.grad, p.weight, p.labels, (const A*)p.slope, (T*)p.dfeatures, (A*)p.draw,
             p.resize, rows_of_vectors<A>(p.s, p.grad), apart || p.resize ? 1 : cut};
    with_run<T>(p.s, p.dfeatures, [&](auto v, auto last) {
      constexpr int V = decltype(v)::value, kLast = decltype(last)::value;
      const auto launch = [&] {
        cam_bwd_kernel<T, V, kLast><<<unsigned(p.s.batch * g.pieces), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(g);
        check_launch("cam_bwd", p.s.batch, p.s.channels, p.s.h * p.s.w);
      };
      if (apart) {
        g.dfeatures = nullptr;
        launch();
        g.s.height = p.s.h, g.s.width = p.s.w;
        g.grad = g.draw, g.slope = nullptr, g.draw = nullptr, g.dfeatures = (T*)p.dfeatures;
        g.resize = false, g.pieces = cut;
      }
      launch();
    });
  });
}

}  // namespace fastkd
