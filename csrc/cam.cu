// CUDA kernels of the class activation map: one block an image, from the features to the finished map in one launch. Weights pass
// through shared memory in pieces, sums stay in registers, and a map of up to kCells cells stays in shared memory; a larger one
// waits in the memory of the slope. Sums have a fixed order: the same bits every time. A label out of range is clamped.
#include "cam.h"
#include "common.cuh"

namespace fastkd {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kWeights = 2048, kCells = 1024;
constexpr int64_t kPiece = 1 << 14;  // elements of d features that a block writes where images are cut

template <class T> struct Fwd {
  using A = typename Acc<T>::type;
  CamSizes s;
  const T* features;
  const void* weight;
  const int64_t* labels;
  A *out, *slope;
  bool relu, resize, renorm;
  int norm;
};
template <class T> struct Bwd {
  using A = typename Acc<T>::type;
  CamSizes s;
  const A* grad;
  const void* weight;
  const int64_t* labels;
  const A* slope;
  T* dfeatures;
  A* draw;
  bool resize;
  int64_t pieces;
};

// Element `at` of the head's weights, whatever their type is: a branch that is equal for all threads.
template <class A> __device__ A weight_at(const void* weight, int dtype, int64_t at) {
  if (dtype == kFloat32) return A(static_cast<const float*>(weight)[at]);
  if (dtype == kFloat64) return A(static_cast<const double*>(weight)[at]);
  if (dtype == kBFloat16) return A(load(static_cast<const __nv_bfloat16*>(weight)[at]));
  return A(load(static_cast<const __half*>(weight)[at]));
}

__device__ int64_t row_of(const CamSizes& s, const int64_t* labels, int64_t b) {
  return min(max(labels[b], int64_t(0)), s.classes - 1) * s.channels;
}

// NaN wins, as in amin and amax.
template <class A> __device__ A lesser(A a, A b) { return b < a || b != b ? b : a; }
template <class A> __device__ A greater(A a, A b) { return b > a || b != b ? b : a; }
template <class A> struct Extent { A low, high; };

template <class A> __device__ A warp_sum(A v) {
  for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
  return v;
}

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
  int64_t from, to;
  A ratio;
  struct Tap {
    int64_t left, right;
    A t;
    __device__ A share(int64_t i) const { return (i == left ? A(1) - t : A(0)) + (i == right ? t : A(0)); }
  };
  __device__ Axis(int64_t from, int64_t to) : from(from), to(to), ratio(A(from) / A(to)) {}
  __device__ Tap operator()(int64_t q) const {
    const A at = max(ratio * (A(q) + A(0.5)) - A(0.5), A(0));
    const int64_t left = min(int64_t(at), from - 1);
    return {left, min(left + 1, from - 1), at - A(left)};
  }
  // The values that may touch source i: a little more than those that do.
  __device__ int64_t first(int64_t i) const { return max(int64_t((A(i) - A(0.5)) / ratio - A(0.5)) - 1, int64_t(0)); }
  __device__ int64_t last(int64_t i) const { return min(int64_t((A(i) + A(1.5)) / ratio - A(0.5)) + 2, to); }
};

// Weighted sum over channels: m[j] of all cells of one image.
template <class T, class A> __device__ void weighted_sum(const Fwd<T>& p, int64_t b, A* m) {
  __shared__ A weight[kWeights], part[kThreads];
  const CamSizes& s = p.s;
  const int64_t hw = s.h * s.w, row = row_of(s, p.labels, b);
  const T* f = p.features + b * s.channels * hw;
  const int tid = threadIdx.x, lane = tid % 32;
  const auto fetch = [&](int64_t first) {
    const int n = int(min(int64_t(kWeights), s.channels - first));
    __syncthreads();
    for (int k = tid; k < n; k += kThreads) weight[k] = weight_at<A>(p.weight, s.weight_dtype, row + first + k);
    __syncthreads();
    return n;
  };
  if (s.layout == kNHWC) {  // a warp takes a cell, its lanes the channels
    for (int64_t first = 0; first < s.channels; first += kWeights) {
      const int n = fetch(first);
      for (int64_t j = tid / 32; j < hw; j += kWarps) {
        const T* cell = f + j * s.channels + first;
        A sum = 0;
#pragma unroll 4
        for (int k = lane; k < n; k += 32) sum += A(load(cell[k])) * weight[k];
        sum = warp_sum(sum);
        if (lane == 0) m[j] = first ? m[j] + sum : sum;
      }
    }
    if (s.channels == 0)
      for (int64_t j = tid; j < hw; j += kThreads) m[j] = 0;
    __syncthreads();
    return;
  }
  for (int64_t j0 = 0; j0 < hw; j0 += kThreads) {  // groups of threads take every groups-th channel: neighbours read neighbours
    const int wide = int(min(int64_t(kThreads), hw - j0)), groups = kThreads / wide, g = tid / wide, j = tid % wide;
    A sum = 0;
    for (int64_t first = 0; first < s.channels; first += kWeights) {
      const int n = fetch(first);
      if (g < groups) {
        const T* cell = f + first * hw + j0 + j;
#pragma unroll 4
        for (int k = g; k < n; k += groups) sum += A(load(cell[k * hw])) * weight[k];
      }
    }
    __syncthreads();
    part[tid] = sum;
    __syncthreads();
    if (tid < wide) {
      for (int i = 1; i < groups; ++i) sum += part[i * wide + tid];
      m[j0 + tid] = sum;
    }
  }
  __syncthreads();
}

template <class T> __global__ void __launch_bounds__(kThreads) cam_fwd_kernel(const Fwd<T> p) {
  using A = typename Acc<T>::type;
  __shared__ A cells[kCells];
  const CamSizes& s = p.s;
  const int64_t b = blockIdx.x, hw = s.h * s.w;
  A *slope = p.slope + b * hw, *out = p.out + b * s.height * s.width, *m = hw <= kCells ? cells : slope;
  weighted_sum(p, b, m);

  const auto value = [&](int64_t j) { return p.relu && m[j] <= A(0) ? A(0) : m[j]; };
  const A endless = A(INFINITY);
  Extent<A> e{endless, -endless};
  for (int64_t j = threadIdx.x; j < hw; j += kThreads) e = {lesser(e.low, value(j)), greater(e.high, value(j))};
  const Scale<A> first(p.norm, block_extent(e));
  A rate = first.slope();
  if (p.resize) {  // a warp takes a row
    const Axis<A> down(s.h, s.height), across(s.w, s.width);
    const auto each = [&](const auto& visit) {
      for (int64_t q = threadIdx.x / 32; q < s.height; q += kWarps) {
        const auto v = down(q);
        for (int64_t j = threadIdx.x % 32; j < s.width; j += 32) {
          const auto u = across(j);
          const auto blend = [&](int64_t row) {
            return (A(1) - u.t) * first(value(row * s.w + u.left)) + u.t * first(value(row * s.w + u.right));
          };
          visit(q * s.width + j, (A(1) - v.t) * blend(v.left) + v.t * blend(v.right));
        }
      }
    };
    Scale<A> second;
    if (p.renorm && p.norm != kNoNorm) {
      e = {endless, -endless};
      each([&](int64_t, A x) { e = {lesser(e.low, x), greater(e.high, x)}; });
      second = Scale<A>(p.norm, block_extent(e));
      rate *= second.slope();
    }
    each([&](int64_t at, A x) { out[at] = second(x); });
  } else {
    for (int64_t j = threadIdx.x; j < hw; j += kThreads) out[j] = first(value(j));
  }
  __syncthreads();  // the map may lie where the slope goes
  for (int64_t j = threadIdx.x; j < hw; j += kThreads) slope[j] = p.relu && m[j] <= A(0) ? A(0) : rate;
}

// A block: the gradient of one small map, then its part of d features = weight of the label (x) d map.
template <class T> __global__ void __launch_bounds__(kThreads) cam_bwd_kernel(const Bwd<T> p) {
  using A = typename Acc<T>::type;
  const CamSizes& s = p.s;
  const int64_t b = blockIdx.x / p.pieces, piece = blockIdx.x % p.pieces, hw = s.h * s.w;
  const A *grad = p.grad + b * s.height * s.width, *slope = p.slope + b * hw;
  A* draw = p.draw + b * hw;
  const auto scaled = [&](int64_t j, A g) { return slope[j] == A(0) ? A(0) : slope[j] * g; };
  if (p.resize) {  // a warp takes a cell and gathers from the pixels that it was spread over
    const Axis<A> down(s.h, s.height), across(s.w, s.width);
    for (int64_t j = threadIdx.x / 32; j < hw; j += kWarps) {
      const int64_t row = j / s.w, column = j % s.w, end = across.last(column);
      A sum = 0;
      for (int64_t q = down.first(row); q < down.last(row); ++q) {
        const A share = down(q).share(row);
        for (int64_t r = across.first(column) + threadIdx.x % 32; r < end; r += 32) {
          const A part = share * across(r).share(column);
          if (part != A(0)) sum += part * grad[q * s.width + r];
        }
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) draw[j] = scaled(j, sum);
    }
  } else if (piece == 0) {
    for (int64_t j = threadIdx.x; j < hw; j += kThreads) draw[j] = scaled(j, grad[j]);
  }
  if (!p.dfeatures) return;
  __syncthreads();

  const int64_t row = row_of(s, p.labels, b), n = s.channels * hw, per = (n + p.pieces - 1) / p.pieces, last = min(n, (piece + 1) * per);
  const int64_t inner = s.layout == kNHWC ? s.channels : hw, di = kThreads / inner, dj = kThreads % inner;
  T* f = p.dfeatures + b * n;
  int64_t e = piece * per + threadIdx.x, i = e / inner, j = e % inner;
  for (; e < last; e += kThreads) {
    const int64_t k = s.layout == kNHWC ? j : i, cell = s.layout == kNHWC ? i : j;
    const A g = p.resize ? draw[cell] : scaled(cell, grad[cell]);
    store(f[e], weight_at<A>(p.weight, s.weight_dtype, row + k) * g);
    i += di;
    j += dj;
    if (j >= inner) j -= inner, ++i;
  }
}

}  // namespace

void cam_fwd_cuda(const CamParams& p, void* stream) {
  with_type(p.s.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Fwd<T> f{p.s, (const T*)p.features, p.weight, p.labels, (A*)p.out, (A*)p.slope, p.relu, p.resize, p.renorm, p.norm};
    cam_fwd_kernel<T><<<unsigned(p.s.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(f);
  });
  check_launch("cam_fwd", p.s.batch, p.s.channels, p.s.h * p.s.w);
}

void cam_bwd_cuda(const CamGradParams& p, void* stream) {
  // A resize is undone once an image; without one, an image may be cut so that a small batch fills the device too.
  const int64_t n = p.s.channels * p.s.h * p.s.w, pieces = p.resize || !p.dfeatures || n <= kPiece ? 1 : (n + kPiece - 1) / kPiece;
  with_type(p.s.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Acc<T>::type;
    const Bwd<T> g{p.s, (const A*)p.grad, p.weight, p.labels, (const A*)p.slope, (T*)p.dfeatures, (A*)p.draw, p.resize, pieces};
    cam_bwd_kernel<T><<<unsigned(p.s.batch * pieces), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(g);
  });
  check_launch("cam_bwd", p.s.batch, p.s.channels, p.s.h * p.s.w);
}

}  // namespace fastkd
