// CUDA kernel of the gather: a block walks over rows of output images, its threads over the row's W*C elements, so stores are a
// straight stream and loads follow the crop. A row number outside the store is clamped: refusing it would need a host sync.
#include "common.cuh"
#include "replay.h"

namespace fastkd {
namespace {

constexpr int kThreads = 256;

template <class In, class Out> __global__ void replay_gather_kernel(const GatherParams p) {
  using A = typename Acc<Out>::type;
  const int w = int(p.width), channels = int(p.channels), row = w * channels;
  const int64_t h = p.height, lines = p.batch * h;
  for (int64_t line = blockIdx.x; line < lines; line += gridDim.x) {
    const int64_t b = line / h, i = line % h;
    const int64_t from = min(max(p.index[b], int64_t(0)), p.stored - 1);
    const int64_t r = i + (p.dy ? p.dy[b] - p.pad : 0);
    const int right = int(p.dx ? p.dx[b] - p.pad : 0);
    const bool flip = p.flip && p.flip[b], inside = r >= 0 && r < h;
    const In* src = static_cast<const In*>(p.images) + (from * h + (inside ? r : 0)) * row;
    Out* out = static_cast<Out*>(p.out) + line * row;
    for (int t = threadIdx.x; t < row; t += kThreads) {
      const int j = t / channels, c = t % channels, q = (flip ? w - 1 - j : j) + right;
      const In v = inside && q >= 0 && q < w ? src[q * channels + c] : In(0.0f);
      if constexpr (sizeof(In) == 1) out[t] = static_cast<const Out*>(p.lut)[c * 256 + v];
      else store(out[t], (A(load(v)) - static_cast<const A*>(p.mean)[c]) / static_cast<const A*>(p.std)[c]);
    }
  }
}

template <class In> void launch(const GatherParams& p, cudaStream_t stream) {
  with_type(p.out_dtype, [&](auto o) {
    replay_gather_kernel<In, decltype(o)><<<blocks_for(p.batch * p.height, 1), kThreads, 0, stream>>>(p);
  });
  check_launch("replay_gather", p.batch, p.height, p.width);
}

}  // namespace

void replay_gather_cuda(const GatherParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.in_dtype == kUInt8) launch<uint8_t>(p, s);
  else if (p.in_dtype == kFloat32) launch<float>(p, s);
  else launch<__half>(p, s);
}

}  // namespace fastkd
