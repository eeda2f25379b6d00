// CUDA kernel of the gather: a block walks over rows of output images, its threads over the row's elements in the order of memory,
// so stores are a straight stream and loads follow the crop. A row number outside the store is clamped: refusing it would need a sync.
#include "common.cuh"
#include "replay.h"

namespace fastkd {
namespace {

constexpr int kThreads = 256;

template <class In, class Out> struct Gather {
  using A = typename Acc<Out>::type;
  static constexpr bool kBytes = sizeof(In) == 1;

  __device__ static A value(const GatherParams& p, const In* row, int q, int c) {
    const In v = row && q >= 0 && q < p.width ? row[int64_t(q) * p.channels + c] : In(0.0f);
    if constexpr (kBytes) return static_cast<const A*>(p.lut)[v];
    else return A(load(v));
  }
};

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
        if constexpr (G::kBytes) out[t] = static_cast<const Out*>(p.lut)[c * 256 + v];
        else store(out[t], (A(load(v)) - static_cast<const A*>(p.mean)[c]) / static_cast<const A*>(p.std)[c]);
        continue;
      }
      const int next = min(x + 1, last), n = (flip ? last - next : next) + right;
      const A wy = static_cast<const A*>(p.wy)[i], wx = static_cast<const A*>(p.wx)[j];
      const A a = G::value(p, r0, q, c), d = G::value(p, r0, n, c);
      const A left = a + (G::value(p, r1, q, c) - a) * wy, far = d + (G::value(p, r1, n, c) - d) * wy;
      store(out[t], (left + (far - left) * wx - static_cast<const A*>(p.mean)[c]) / static_cast<const A*>(p.std)[c]);
    }
  }
}

template <class In> void launch(const GatherParams& p, cudaStream_t stream) {
  with_type(p.out_dtype, [&](auto o) {
    const int64_t lines = p.batch * p.out_height * (p.last ? 1 : p.channels);
    replay_gather_kernel<In, decltype(o)><<<blocks_for(lines, 1), kThreads, 0, stream>>>(p);
  });
  check_launch("replay_gather", p.batch, p.out_height, p.out_width);
}

}  // namespace

void replay_gather_cuda(const GatherParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.in_dtype == kUInt8) launch<uint8_t>(p, s);
  else if (p.in_dtype == kFloat32) launch<float>(p, s);
  else launch<__half>(p, s);
}

}  // namespace fastkd
