// CPU kernel of the gather: parallel over images, one pass over the output.
// A byte becomes a result by a table of 256 entries a channel, which Python fills by the reference's own arithmetic: the result has
// the reference's bits in every output type. Where multiply-adds give all entries of the table, they take its place, a vector of
// bytes at a time. Other stores are normalised with (x - mean) / std, and so are blended pixels.
#include "cpu_kernels.h"
#include "cpu_vec.h"

#include <type_traits>

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

#ifdef FASTKD_FMA
template <class Out> constexpr bool kFused = !std::is_same<Out, double>::value;
#else
template <class Out> constexpr bool kFused = false;
#endif

template <class Out, bool = kFused<Out>> struct Fused {
  Fused(const GatherParams&, bool) {}
};

#ifdef FASTKD_FMA
// The table as arithmetic: (byte / 255 - mean) / std with correctly rounded quotients, each a product and one correction by
// multiply-adds (Markstein, IBM J. Res. Dev. 34(1), 1990). `same` tells whether that gives every entry of the table.
template <class Out> struct Fused<Out, true> {
  const Out* lut;
  int64_t channels;
  bool same;
  Buffer<float> mean, std, rate;  // repeated, so that a vector can begin at any channel

  Fused(const GatherParams& p, bool wanted)
      : lut(static_cast<const Out*>(p.lut)), channels(wanted ? p.channels : 0), same(wanted), mean(channels + kLanes),
        std(channels + kLanes), rate(channels + kLanes) {
    for (int64_t i = 0; wanted && i < channels + kLanes; ++i) {
      mean.data[i] = static_cast<const float*>(p.mean)[i % channels], std.data[i] = static_cast<const float*>(p.std)[i % channels];
      rate.data[i] = 1.0f / std.data[i];
    }
    uint8_t bytes[256];
    Out out[256];
    for (int i = 0; i < 256; ++i) bytes[i] = uint8_t(i);
    for (int64_t c = 0; c < channels && same; ++c) {
      const V<float> m = V<float>::all(mean.data[c]), s = V<float>::all(std.data[c]), r = V<float>::all(rate.data[c]);
      for (int i = 0; i < 256; i += kLanes) vstore(out + i, value(vload(bytes + i), m, s, r));
      same = memcmp(out, lut + c * 256, sizeof out) == 0;
    }
  }

  static V<float> value(const V<float>& byte, const V<float>& mean, const V<float>& std, const V<float>& rate) {
    const V<float> all = V<float>::all(255.0f), part = V<float>::all(1.0f / 255.0f);
    V<float> v = byte * part;
    v = fma(fnma(v, all, byte), part, v);
    const V<float> t = v - mean;
    v = t * rate;
    return fma(fnma(v, std, t), rate, v);
  }

  // n bytes of channel c.
  void one(const uint8_t* from, int64_t n, int64_t c, Out* to) const {
    const V<float> m = V<float>::all(mean.data[c]), s = V<float>::all(std.data[c]), r = V<float>::all(rate.data[c]);
    cover(n, [&](int64_t k) { vstore(to + k, value(vload(from + k), m, s, r)); }, [&](int64_t k) { to[k] = lut[c * 256 + from[k]]; });
  }
  // n bytes, pixel after pixel; kC: channels if known, else 0.
  template <int kC> void all(const uint8_t* from, int64_t n, Out* to) const {
    const int64_t period = kC ? kC : channels;
    cover(n,
          [&](int64_t k) {
            const int64_t c = k % period;
            vstore(to + k, value(vload(from + k), vload(mean.data + c), vload(std.data + c), vload(rate.data + c)));
          },
          [&](int64_t k) { to[k] = lut[k % period * 256 + from[k]]; });
  }
};
#endif

#ifdef __AVX2__
// at[c][i]: which bytes of the i-th register of 16 pixels belong to channel c, and where; 0x80 makes zero.
struct Thirds {
  uint8_t at[3][3][16];
  constexpr Thirds() : at() {
    for (int c = 0; c < 3; ++c)
      for (int i = 0; i < 3; ++i)
        for (int k = 0; k < 16; ++k) {
          const int byte = 3 * k + c - 16 * i;
          at[c][i][k] = byte >= 0 && byte < 16 ? uint8_t(byte) : uint8_t(0x80);
        }
  }
};
constexpr Thirds kThirds;
#endif

// A row of pixels to one row a channel.
template <int kC> inline void split(const uint8_t* from, int64_t w, int64_t channels, uint8_t* to) {
  int64_t j = 0;
#ifdef __AVX2__
  if constexpr (kC == 3) {
    for (; j + 16 <= w; j += 16, from += 48) {
      __m128i in[3];
      for (int i = 0; i < 3; ++i) in[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
      for (int c = 0; c < 3; ++c) {
        __m128i out = _mm_setzero_si128();
        for (int i = 0; i < 3; ++i) {
          const __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kThirds.at[c][i]));
          out = _mm_or_si128(out, _mm_shuffle_epi8(in[i], places));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c * w + j), out);
      }
    }
  }
#endif
  for (; j < w; ++j, from += channels)
    for (int64_t c = 0; c < channels; ++c) to[c * w + j] = from[c];
}

// kC: channels if known, else 0; kLast: channels_last output.
template <class In, class Out, int kC, bool kLast> struct Gather {
  using A = typename Norm<Out>::type;
  static constexpr bool kBytes = sizeof(In) == 1;
  const GatherParams& p;
  const int64_t channels = kC ? kC : p.channels, plane = kLast ? 1 : p.out_height * p.out_width, step = kLast ? channels : 1;
  const A *mean = static_cast<const A*>(p.mean), *std = static_cast<const A*>(p.std);
  const Fused<Out>* fused = nullptr;

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

  // Rows of a cropped, mirrored image: where they lie in the store, or made in `space`. Output columns [from, to) read columns of the
  // image; the others are black, which they stay from row to row.
  struct Lines {
    const Gather& g;
    const Image& m;
    int64_t from, to;
    In *space, *black;  // [width * channels, and one element] each

    Lines(const Gather& g, const Image& m, In* space) : g(g), m(m), space(space), black(space + g.p.width * g.channels + 1) {
      const int64_t w = g.p.width, j0 = m.flip ? m.right : -m.right, j1 = j0 + w;
      from = least(w, j0 > 0 ? j0 : 0), to = j1 < w ? (j1 > from ? j1 : from) : w;
      memset(space, 0, size_t(2 * (w * g.channels + 1)) * sizeof(In));
    }
    const In* operator()(int64_t i) const {
      const In* src = g.row(m, i);
      if (!src || from == to) return black;
      if (!m.flip && !m.right) return src;
      if (m.flip) g.mirror(space + from * g.channels, g.at(m, src, from), to - from, to < g.p.width);
      else memcpy(space + from * g.channels, g.at(m, src, from), size_t((to - from) * g.channels) * sizeof(In));
      return space;
    }
  };

  // Pixels from right to left, black behind them if asked for. Three bytes are moved as four, the fourth is overwritten by the next
  // pixel; the first pixel is moved by itself, as it may be the last of the store.
  void mirror(In* to, const In* from, int64_t pixels, bool black) const {
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
    to += channels, from -= channels, --pixels;
    if constexpr (kBytes && kC == 3)
      for (; pixels > 0; --pixels, to += 3, from -= 3) memcpy(to, from, 4);
    else
      for (; pixels > 0; --pixels, to += channels, from -= channels)
        for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
    if (black) *to = In{};
  }

  void plain(const Image& m, Out* out, In* space) const {
    const int64_t w = p.width;
    const Lines lines(*this, m, space);
    for (int64_t i = 0; i < p.height; ++i, out += w * step) {
      const In* r = lines(i);
      if constexpr (kBytes && kFused<Out>) {
        if (fused->same) {
          if constexpr (kLast) fused->template all<kC>(r, w * channels, out);
          else {
            In* planes = space + 2 * (w * channels + 1);
            split<kC>(r, w, channels, planes);
            for (int64_t c = 0; c < channels; ++c) fused->one(planes + c * w, w, c, out + c * plane);
          }
          continue;
        }
      }
      for (int64_t j = 0; j < w; ++j) pixel(out + j * step, r + j * channels);
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

  void run(int threads) {
    const Fused<Out> table(p, kBytes && !p.y && p.mean);
    fused = &table;
    huge_pages(p.out, p.batch * p.out_height * p.out_width * channels * int64_t(sizeof(Out)));
    parallel(p.batch, threads, [&](int64_t b) {
      const Image m{static_cast<const In*>(p.images) + p.index[b] * p.stride, p.dy ? p.dy[b] - p.pad : 0, p.dx ? p.dx[b] - p.pad : 0,
                    p.flip && p.flip[b]};
      Out* out = static_cast<Out*>(p.out) + b * p.out_height * p.out_width * channels;
      if (p.y) return resized(m, out);
      Buffer<In> space(3 * (p.width * channels + 1));
      plain(m, out, space.data);
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
