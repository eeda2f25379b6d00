// CUDA kernels of the gather. A row number outside the store is clamped: refusing it would need a sync.
// Bytes of one or three channels that are not blended, the usual store, are bound by memory: up to 16 bytes a store, the loads of a
// thread together and without branches, no division in the loop. Everything else: an element at a time.
#include "common.cuh"
#include "replay.h"

namespace fastkd {
namespace {

constexpr int kThreads = 256, kPerSM = 5;  // up to 48 registers
constexpr int kBlocks = 132 * kPerSM;      // fill an H100 at once: each loads the table once and makes an equal share of the rows

// What the threads of a row need to know, worked out by one of them.
struct alignas(16) Line {
  const uint8_t* row;  // of the store
  int64_t out;         // where the row of the result begins, in vectors
  int step, origin;    // pixel x of the cropped image begins step * x + origin bytes after `row`
  unsigned seen;       // if that is less than this; else it is black
};

template <int kC, bool kLast, int V> __device__ Line line_of(const GatherParams& p, int64_t line) {
  const int64_t h = p.out_height, w = p.out_width, b = line / h, i = line % h;
  const int64_t from = min(max(p.index[b], int64_t(0)), p.stored - 1), r = (p.y ? p.y[i] : i) + (p.dy ? p.dy[b] - p.pad : 0);
  const int right = int(p.dx ? min(max(p.dx[b] - p.pad, -p.width), p.width) : 0);
  const bool flip = p.flip && p.flip[b], inside = r >= 0 && r < p.height;
  Line made;
  made.row = static_cast<const uint8_t*>(p.images) + from * p.stride + (inside ? r : 0) * p.width * kC;
  made.out = (kLast ? line * kC : b * kC * h + i) * w / V;
  made.step = flip ? -kC : kC;
  made.origin = (flip ? int(p.width) - 1 + right : right) * kC;
  made.seen = inside ? unsigned(p.width) * kC : 0;
  return made;
}

// A byte over 255 as torch divides by a number on this device: on a GPU it multiplies by the reciprocal.
template <class A> __device__ A scaled(int byte) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(A) == 8) return __dmul_rn(double(byte), 1.0 / 255);
  else return __fmul_rn(float(byte), 1.0f / 255);
#else
  return A(byte) / A(255);
#endif
}

// (v - mean) / std, each step rounded, as the definition does it; v itself where both are null.
template <class A> __device__ A normalised(const GatherParams& p, A v, int c) {
  if (p.mean) v = v - static_cast<const A*>(p.mean)[c];
  return p.std ? v / static_cast<const A*>(p.std)[c] : v;
}

// Lanes that look bytes up meet in the banks of shared memory: for results of two bytes that takes about as long as device memory does.
// An arithmetic without division mostly gives all entries of the table, and then takes its place.
template <class Out> __device__ Out shade(int byte, float mean, float rate) {
  Out made;
  store(made, __fmul_rn(__fadd_rn(__fmul_rn(float(byte), 1.0f / 255), -mean), rate));
  return made;
}
template <class Out> __device__ bool same_bits(Out a, Out b) {
  uint16_t x, y;
  memcpy(&x, &a, 2), memcpy(&y, &b, 2);
  return x == y;
}

// kLast: [batch, out_height, out_width, kC], else [batch, kC, …]. A thread makes a vector of V elements in a row, else one in the row of
// each channel. Blocks are `across` threads wide and kThreads / across rows high, and make `share` rows.
template <class Out, int kC, bool kLast, int V>
__global__ void __launch_bounds__(kThreads, kPerSM) replay_bytes_kernel(const GatherParams p, int across, int64_t share) {
  __shared__ Out lut[kC * 256];
  __shared__ Line lines[kThreads];
  __shared__ float mean[kC], rate[kC];
  __shared__ bool looked_up;
  static_assert(kThreads == 256, "a thread is a byte");
  const int own = threadIdx.x;
  constexpr bool kShort = sizeof(Out) == 2;
  const auto byte = scaled<typename Acc<Out>::type>(own);
  for (int c = 0; c < kC; ++c) store(lut[c * 256 + own], normalised(p, byte, c));
  if (own < kC) {
    mean[own] = kShort && p.mean ? static_cast<const float*>(p.mean)[own] : 0;
    rate[own] = kShort && p.std ? 1 / static_cast<const float*>(p.std)[own] : 1;
    looked_up = !kShort;
  }
  __syncthreads();
  if constexpr (sizeof(Out) == 2) {
    bool same = true;
    for (int c = 0; c < kC; ++c) same &= same_bits(shade<Out>(own, mean[c], rate[c]), lut[c * 256 + own]);
    if (!same) looked_up = true;
  }
  const int rows = kThreads / across, x = int(threadIdx.x) % across, y = int(threadIdx.x) / across;
  const int vectors = int(p.out_width) * (kLast ? kC : 1) / V, high = kThreads / rows * rows;
  const int64_t plane = p.out_height * p.out_width / V, end = min(p.batch * p.out_height, (blockIdx.x + 1) * share);
  for (int64_t at = blockIdx.x * share; at < end; at += high) {
    const int here = int(min(end - at, int64_t(high)));
    __syncthreads();
    if (int(threadIdx.x) < here) lines[threadIdx.x] = line_of<kC, kLast, V>(p, at + threadIdx.x);
    __syncthreads();
    for (int u = y < rows ? x : vectors; u < vectors; u += across) {
      const int t = u * V, first = kLast ? t % kC : 0;  // channel
      int pixel[V], channel[kC];
      const Out* table[kC];
      float m[kC], r[kC];
      for (int e = 0; e < V; ++e) pixel[e] = kLast ? t / kC + e / kC + (first + e % kC >= kC) : t + e;
      if (p.x)
        for (int e = 0; e < V; ++e) pixel[e] = int(p.x[pixel[e]]);
      for (int k = 0; k < kC; ++k) {
        const int c = (first + k) % kC;
        channel[k] = c, table[k] = lut + c * 256, m[k] = mean[c], r[k] = rate[c];
      }
      const auto make = [&](auto looked) {
        for (int i = y; i < here; i += rows) {
          const Line line = lines[i];
          for (int pass = 0; pass < (kLast ? 1 : kC); ++pass) {
            const auto of = [&](int e) { return kLast ? e % kC : pass; };  // which of these
            int v[V];
            for (int e = 0; e < V; ++e) {  // where it is black, the row's first bytes are read: loads behind a branch would wait
              const unsigned q = line.step * pixel[e] + line.origin + channel[of(e)];
              const int byte = __ldg(line.row + (q < line.seen ? q : 0));
              v[e] = q < line.seen ? byte : 0;
            }
            Pack<Out, V> made;
            for (int e = 0; e < V; ++e) {
              if constexpr (decltype(looked)::value) made.v[e] = table[of(e)][v[e]];
              else made.v[e] = shade<Out>(v[e], m[of(e)], r[of(e)]);
            }
            static_cast<Pack<Out, V>*>(p.out)[line.out + pass * plane + u] = made;
          }
        }
      };
      if constexpr (sizeof(Out) == 2) {
        if (looked_up) make(Int<1>{});
        else make(Int<0>{});
      } else make(Int<1>{});
    }
  }
}

template <class In, class Out> struct Gather {
  using A = typename Acc<Out>::type;
  static constexpr bool kBytes = sizeof(In) == 1;

  __device__ static A value(const GatherParams& p, const In* row, int q, int c) {
    const In v = row && q >= 0 && q < p.width ? row[int64_t(q) * p.channels + c] : In(0.0f);
    if constexpr (kBytes) return scaled<A>(v);
    else return A(load(v));
  }
};

// Threads go over the row's elements in the order of memory, so stores are a straight stream and loads follow the crop.
template <class In, class Out> __global__ void replay_gather_kernel(const GatherParams p) {
  using G = Gather<In, Out>;
  using A = typename G::A;
  const int w = int(p.out_width), channels = int(p.channels), row = w * (p.last ? channels : 1), last = int(p.width) - 1;
  const int64_t h = p.out_height, lines = p.batch * h * (p.last ? 1 : channels);  // NCHW: a line is a row of one channel
  for (int64_t line = blockIdx.x; line < lines; line += gridDim.x) {
    const int64_t i = line % h, b = p.last ? line / h : line / h / channels;
    const int channel = p.last ? 0 : int(line / h % channels);
    const int64_t from = min(max(p.index[b], int64_t(0)), p.stored - 1), down = p.dy ? p.dy[b] - p.pad : 0;
    const int right = int(p.dx ? p.dx[b] - p.pad : 0);
    const bool flip = p.flip && p.flip[b];
    const In* image = static_cast<const In*>(p.images) + from * p.stride;
    const auto source = [&](int64_t r) { return r + down >= 0 && r + down < p.height ? image + (r + down) * p.width * channels : nullptr; };
    const int64_t y = p.y ? p.y[i] : i;
    const In *r0 = source(y), *r1 = p.blended ? source(min(y + 1, p.height - 1)) : nullptr;
    Out* out = static_cast<Out*>(p.out) + line * row;
    for (int t = threadIdx.x; t < row; t += kThreads) {
      const int j = p.last ? t / channels : t, c = p.last ? t % channels : channel, x = p.x ? int(p.x[j]) : j;
      const int q = (flip ? last - x : x) + right;
      if (!p.blended) {
        const In v = r0 && q >= 0 && q <= last ? r0[int64_t(q) * channels + c] : In(0.0f);
        if constexpr (G::kBytes) store(out[t], normalised(p, scaled<A>(v), c));
        else store(out[t], normalised(p, A(load(v)), c));
        continue;
      }
      const int next = min(x + 1, last), n = (flip ? last - next : next) + right;
      const A wy = static_cast<const A*>(p.wy)[i], wx = static_cast<const A*>(p.wx)[j];
      const A a = G::value(p, r0, q, c), d = G::value(p, r0, n, c);
      const A left = a + (G::value(p, r1, q, c) - a) * wy, far = d + (G::value(p, r1, n, c) - d) * wy;
      store(out[t], normalised(p, left + (far - left) * wx, c));
    }
  }
}

template <int kC, bool kLast> void launch_bytes(const GatherParams& p, cudaStream_t stream) {
  with_type(p.out_dtype, [&](auto o) {
    using Out = decltype(o);
    const int64_t length = p.out_width * (kLast ? kC : 1);
    with_vector<Out>(length, {p.out}, [&](auto v) {
      constexpr int V = decltype(v)::value;
      const int across = int(length / V < kThreads ? length / V : kThreads), rows = kThreads / across;
      const int64_t lines = p.batch * p.out_height, times = (lines + rows - 1) / rows, share = (times + kBlocks - 1) / kBlocks * rows;
      replay_bytes_kernel<Out, kC, kLast, V><<<blocks_for(lines, share), kThreads, 0, stream>>>(p, across, share);
    });
  });
}

template <class In> void launch(const GatherParams& p, cudaStream_t stream) {
  with_type(p.out_dtype, [&](auto o) {
    const int64_t lines = p.batch * p.out_height * (p.last ? 1 : p.channels);
    replay_gather_kernel<In, decltype(o)><<<blocks_for(lines, 1), kThreads, 0, stream>>>(p);
  });
}

}  // namespace

void replay_gather_cuda(const GatherParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool small = (p.width > p.out_width ? p.width : p.out_width) * p.channels < 1 << 29;  // a row's bytes are counted in 32 bits
  const bool table = p.in_dtype == kUInt8 && !p.blended && small;
  if (table && p.channels == 1) launch_bytes<1, true>(p, s);  // layouts are one
  else if (table && p.channels == 3) p.last ? launch_bytes<3, true>(p, s) : launch_bytes<3, false>(p, s);
  else if (p.in_dtype == kUInt8) launch<uint8_t>(p, s);
  else if (p.in_dtype == kFloat32) launch<float>(p, s);
  else launch<__half>(p, s);
  check_launch("replay_gather", p.batch, p.out_height, p.out_width);
}

}  // namespace fastkd
