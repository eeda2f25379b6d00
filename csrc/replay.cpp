// CPU kernel of the gather: parallel over images, one pass over the output.
// A uint8 pixel becomes a float by a table of 256 entries a channel, which Python fills by the reference's own arithmetic: the
// result has the reference's bits in every output type. Other stores are normalised with (x - mean) / std.
#include "cpu_kernels.h"
#include "cpu_vec.h"

namespace fastkd {
namespace {

template <class O> struct Norm { using type = float; };
template <> struct Norm<double> { using type = double; };

template <class In, class Out, bool kLut> struct Gather {
  using A = typename Norm<Out>::type;
  const GatherParams& p;

  template <int kC> void pixel(Out* o, const In* s) const {
    const int64_t channels = kC ? kC : p.channels;
    for (int64_t c = 0; c < channels; ++c) {
      if constexpr (kLut) o[c] = ((const Out*)p.lut)[c * 256 + s[c]];
      else store(o[c], (A(load(s[c])) - ((const A*)p.mean)[c]) / ((const A*)p.std)[c]);
    }
  }

  template <int kC> void image(int64_t b, const In* black) const {
    const int64_t h = p.height, w = p.width, channels = kC ? kC : p.channels, row = w * channels;
    const In* img = (const In*)p.images + p.index[b] * h * row;
    Out* out = (Out*)p.out + b * h * row;
    const int64_t down = p.dy ? p.dy[b] - p.pad : 0, right = p.dx ? p.dx[b] - p.pad : 0;
    const bool flip = p.flip && p.flip[b];
    // Output columns [j0, j1) read columns of the image; the others are black.
    const int64_t j0 = flip ? right : -right, j1 = j0 + w, from = least(w, j0 > 0 ? j0 : 0), to = j1 < w ? (j1 > from ? j1 : from) : w;
    for (int64_t i = 0; i < h; ++i, out += row) {
      const int64_t r = i + down;
      const bool inside = r >= 0 && r < h;
      const int64_t a = inside ? from : w, z = inside ? to : w;
      for (int64_t j = 0; j < a; ++j) pixel<kC>(out + j * channels, black);
      const In* src = img + r * row;
      if (!flip)
        for (int64_t j = a; j < z; ++j) pixel<kC>(out + j * channels, src + (j + right) * channels);
      else
        for (int64_t j = a; j < z; ++j) pixel<kC>(out + j * channels, src + (w - 1 - j + right) * channels);
      for (int64_t j = z; j < w; ++j) pixel<kC>(out + j * channels, black);
    }
  }

  void run(int threads, const In* black) const {
    parallel(p.batch, threads, [&](int64_t b) {
      if (p.channels == 3) image<3>(b, black);
      else if (p.channels == 1) image<1>(b, black);
      else image<0>(b, black);
    });
  }
};

template <class In, bool kLut> void with_out(const GatherParams& p, int threads) {
  // One black pixel; more channels than this are refused by Python.
  static const In black[4096] = {};
  if (p.out_dtype == kFloat32) Gather<In, float, kLut>{p}.run(threads, black);
  else if (p.out_dtype == kFloat64) Gather<In, double, kLut>{p}.run(threads, black);
  else if (p.out_dtype == kBFloat16) Gather<In, BFloat, kLut>{p}.run(threads, black);
  else Gather<In, Half, kLut>{p}.run(threads, black);
}

}  // namespace

void FASTKD_CPU(replay_gather)(const GatherParams& p, int threads) {
  if (p.in_dtype == kUInt8) with_out<uint8_t, true>(p, threads);
  else if (p.in_dtype == kFloat32) with_out<float, false>(p, threads);
  else with_out<Half, false>(p, threads);
}

}  // namespace fastkd
