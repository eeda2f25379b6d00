// CPU kernel of the gather: parallel over images, one pass over the output.
// A byte becomes a result by a table of 256 entries a channel, which Python fills by the reference's own arithmetic: the result has
// the reference's bits in every output type. Other stores are normalised with (x - mean) / std, and so are blended pixels.
#include "cpu_kernels.h"
#include "cpu_vec.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastkd {
namespace {

// A result of more than 32 MB comes fresh from the system each time, and its page faults cost several times what the gather does.
// Huge pages make them five hundred times fewer; where the system has none, nothing changes.
void huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t from = (uintptr_t(p) + kHuge - 1) / kHuge * kHuge, to = (uintptr_t(p) + uintptr_t(bytes)) / kHuge * kHuge;
  if (bytes > (int64_t(32) << 20)) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

template <class O> struct Norm { using type = float; };
template <> struct Norm<double> { using type = double; };

// kC: channels if known, else 0; kLast: channels_last output.
template <class In, class Out, int kC, bool kLast> struct Gather {
  using A = typename Norm<Out>::type;
  static constexpr bool kBytes = sizeof(In) == 1;
  const GatherParams& p;
  const int64_t channels = kC ? kC : p.channels, plane = kLast ? 1 : p.out_height * p.out_width, step = kLast ? channels : 1;
  const A *mean = static_cast<const A*>(p.mean), *std = static_cast<const A*>(p.std);

  void put(Out* o, In v, int64_t c) const {
    if constexpr (kBytes) o[c * plane] = static_cast<const Out*>(p.lut)[c * 256 + v];
    else store(o[c * plane], (A(load(v)) - mean[c]) / std[c]);
  }
  void pixel(Out* o, const In* s) const {
    for (int64_t c = 0; c < channels; ++c) put(o, s[c], c);
  }
  void black(Out* o) const {
    for (int64_t c = 0; c < channels; ++c) put(o, In{}, c);
  }

  A value(const In* s, int64_t c) const {
    if constexpr (kBytes) return static_cast<const A*>(p.lut)[s ? s[c] : 0];
    else return s ? A(load(s[c])) : A(0);
  }

  // Four pixels of two rows, rows first.
  void blend(Out* o, const In* s00, const In* s10, const In* s01, const In* s11, A wy, A wx) const {
    for (int64_t c = 0; c < channels; ++c) {
      const A a = value(s00, c), b = value(s01, c), left = a + (value(s10, c) - a) * wy, right = b + (value(s11, c) - b) * wy;
      store(o[c * plane], ((left + (right - left) * wx) - mean[c]) / std[c]);
    }
  }

  struct Image {
    const In* pixels;
    int64_t down, right;
    bool flip;
  };

  // A row of the cropped image: null where it is black.
  const In* row(const Image& m, int64_t i) const {
    const int64_t r = i + m.down;
    return r >= 0 && r < p.height ? m.pixels + r * p.width * channels : nullptr;
  }
  const In* at(const Image& m, const In* row, int64_t j) const {
    const int64_t q = (m.flip ? p.width - 1 - j : j) + m.right;
    return row && q >= 0 && q < p.width ? row + q * channels : nullptr;
  }

  void plain(const Image& m, Out* out) const {
    const int64_t w = p.width;
    // Output columns [from, to) read columns of the image; the others are black.
    const int64_t j0 = m.flip ? m.right : -m.right, j1 = j0 + w, from = least(w, j0 > 0 ? j0 : 0), to = j1 < w ? (j1 > from ? j1 : from) : w;
    for (int64_t i = 0; i < p.height; ++i, out += w * step) {
      const In* src = row(m, i);
      const int64_t a = src ? from : w, z = src ? to : w;
      for (int64_t j = 0; j < a; ++j) black(out + j * step);
      if (a < z) {
        const In* s = at(m, src, a);
        if (!m.flip)
          for (int64_t j = a; j < z; ++j, s += channels) pixel(out + j * step, s);
        else
          for (int64_t j = a; j < z; ++j, s -= channels) pixel(out + j * step, s);
      }
      for (int64_t j = z; j < w; ++j) black(out + j * step);
    }
  }

  void resized(const Image& m, Out* out) const {
    const A *wy = static_cast<const A*>(p.wy), *wx = static_cast<const A*>(p.wx);
    for (int64_t i = 0; i < p.out_height; ++i) {
      const In *r0 = row(m, p.y[i]), *r1 = row(m, least(p.y[i] + 1, p.height - 1));
      for (int64_t j = 0; j < p.out_width; ++j, out += step) {
        const int64_t x0 = p.x[j], x1 = least(x0 + 1, p.width - 1);
        const In* s = at(m, r0, x0);
        if (!p.blended) s ? pixel(out, s) : black(out);
        else blend(out, s, at(m, r1, x0), at(m, r0, x1), at(m, r1, x1), wy[i], wx[j]);
      }
    }
  }

  void run(int threads) const {
    huge_pages(p.out, p.batch * p.out_height * p.out_width * channels * int64_t(sizeof(Out)));
    parallel(p.batch, threads, [&](int64_t b) {
      const Image m{static_cast<const In*>(p.images) + p.index[b] * p.stride, p.dy ? p.dy[b] - p.pad : 0, p.dx ? p.dx[b] - p.pad : 0,
                    p.flip && p.flip[b]};
      Out* out = static_cast<Out*>(p.out) + b * p.out_height * p.out_width * channels;
      if (p.y) resized(m, out);
      else plain(m, out);
    });
  }
};

template <class In, class Out, int kC> void with_layout(const GatherParams& p, int threads) {
  if (p.last) Gather<In, Out, kC, true>{p}.run(threads);
  else Gather<In, Out, kC, false>{p}.run(threads);
}

template <class In> void with_out(const GatherParams& p, int threads) {
  const auto with_channels = [&](auto out) {
    using Out = decltype(out);
    if (p.channels == 3) with_layout<In, Out, 3>(p, threads);
    else if (p.channels == 1) with_layout<In, Out, 1>(p, threads);
    else with_layout<In, Out, 0>(p, threads);
  };
  if (p.out_dtype == kFloat32) with_channels(float{});
  else if (p.out_dtype == kFloat64) with_channels(double{});
  else if (p.out_dtype == kBFloat16) with_channels(BFloat{});
  else with_channels(Half{});
}

}  // namespace

void FASTKD_CPU(replay_gather)(const GatherParams& p, int threads) {
  if (p.in_dtype == kUInt8) with_out<uint8_t>(p, threads);
  else if (p.in_dtype == kFloat32) with_out<float>(p, threads);
  else with_out<Half>(p, threads);
}

}  // namespace fastkd
