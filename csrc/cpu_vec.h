// Small pieces of the CPU kernels. Included by {bn_match,cam,replay}.cpp, which are compiled once per instruction set: all
// of it is in an unnamed namespace, so that no AVX-512 copy of an inline function can stand in for the portable one.
#pragma once
#include <cstring>

#include "common.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastkd {
namespace {

// Sums use this many lanes on every instruction set, and the compiler may not contract multiply-adds (-ffp-contract=off):
// all variants, and any number of threads, give the same bits.
constexpr int kLanes = 16;

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

template <class T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };

template <class To, class From> inline To bit_cast_(From f) {
  To t;
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  __builtin_memcpy(&t, &f, sizeof t);
  return t;
}

// fp16 to fp32 and back, in integers: U and F are a 32-bit scalar or a register of them. The same bits as the processor's own
// conversion: subnormals exact, to nearest even, a NaN becomes quiet and keeps its payload. No fp32 subnormal occurs on the way, so
// that flushing them changes nothing: 0.5f has a last place of 2^-24, that of an fp16 subnormal.
template <class F, class U> inline F half_to_float(U h) {
  const U sign = (h & 0x8000u) << 16, rest = h & 0x7fffu, scaled = rest << 13;
  const U tiny = bit_cast_<U>(bit_cast_<F>(rest + 0x3f000000u) - 0.5f), none = U{}, quiet = none + 0x400000u;
  const U special = (scaled + 0x70000000u) | (rest > 0x7c00u ? quiet : none);
  return bit_cast_<F>(sign | (rest < 0x400u ? tiny : rest < 0x7c00u ? scaled + 0x38000000u : special));
}
template <class U, class F> inline U float_to_half(F v) {
  const U u = bit_cast_<U>(v), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu, infinite = U{} + 0x7c00u;
  const U tiny = bit_cast_<U>(bit_cast_<F>(size) + 0.5f) - 0x3f000000u, nan = 0x7e00u | ((size >> 13) & 0x3ffu);
  const U normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  return sign | (size > 0x7f800000u ? nan : size >= 0x477ff000u ? infinite : size < 0x38800000u ? tiny : normal);
}

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(BFloat v) { return bit_cast_<float>(uint32_t(v.bits) << 16); }
inline float load(Half v) { return half_to_float<float>(uint32_t(v.bits)); }

inline void store(float& o, float v) { o = v; }
inline void store(double& o, double v) { o = v; }
inline void store(BFloat& o, float v) {  // to nearest even; NaN stays NaN
  const uint32_t u = bit_cast_<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  o.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}
inline void store(Half& o, float v) { o.bits = uint16_t(float_to_half<uint32_t>(v)); }

// Sixteen lanes as an array of registers, in the vector extension of GCC and Clang. (One vector of 64 bytes would be shorter to
// write, but GCC takes it apart lane by lane where registers are narrower.)
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
template <class A> struct Reg { typedef A type __attribute__((vector_size(kBytes))); };
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));

#define FASTKD_EACH _Pragma("GCC unroll 8") for (int i = 0; i < V::kParts; ++i)

template <class A> struct V {
  using R = typename Reg<A>::type;
  static constexpr int kWide = kBytes / int(sizeof(A)), kParts = kLanes / kWide;
  R r[kParts];

  static inline V all(A v) { V o; FASTKD_EACH o.r[i] = R{} + v; return o; }
  friend inline V operator+(const V& a, const V& b) { V o; FASTKD_EACH o.r[i] = a.r[i] + b.r[i]; return o; }
  friend inline V operator-(const V& a, const V& b) { V o; FASTKD_EACH o.r[i] = a.r[i] - b.r[i]; return o; }
  friend inline V operator*(const V& a, const V& b) { V o; FASTKD_EACH o.r[i] = a.r[i] * b.r[i]; return o; }
  friend inline V operator*(const V& a, A b) { V o; FASTKD_EACH o.r[i] = a.r[i] * b; return o; }
  inline V& operator+=(const V& b) { FASTKD_EACH r[i] += b.r[i]; return *this; }
  inline A operator[](int l) const { return r[l / kWide][l % kWide]; }
};

// Register by register: a copy of the whole array would go through memory.
template <class A> inline V<A> vload(const A* p) {
  using V = fastkd::V<A>;
  V v;
  FASTKD_EACH __builtin_memcpy(&v.r[i], p + i * V::kWide, sizeof v.r[i]);
  return v;
}
template <class A> inline void vstore(A* p, const V<A>& v) {
  using V = fastkd::V<A>;
  FASTKD_EACH __builtin_memcpy(p + i * V::kWide, &v.r[i], sizeof v.r[i]);
}
inline V<float> vload(const BFloat* p) {
  using V = fastkd::V<float>;
  V v;
  FASTKD_EACH {
    U16 u;
    __builtin_memcpy(&u, p + i * V::kWide, sizeof u);
    v.r[i] = (V::R)(__builtin_convertvector(u, U32) << 16);
  }
  return v;
}
inline void vstore(BFloat* p, const V<float>& v) {
  using V = fastkd::V<float>;
  FASTKD_EACH {
    const U32 u = (U32)v.r[i];
    const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, nan = (u >> 16) | 0x40u;
    const U16 out = __builtin_convertvector((v.r[i] == v.r[i]) ? rounded : nan, U16);
    __builtin_memcpy(p + i * V::kWide, &out, sizeof out);
  }
}
inline V<float> vload(const Half* p) {
  using V = fastkd::V<float>;
  V v;
  FASTKD_EACH {
#if defined(__AVX512F__)
    v.r[i] = (V::R)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i * V::kWide)));
#elif defined(__F16C__)
    v.r[i] = (V::R)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i * V::kWide)));
#else
    U16 u;
    __builtin_memcpy(&u, p + i * V::kWide, sizeof u);
    v.r[i] = half_to_float<V::R>(__builtin_convertvector(u, U32));
#endif
  }
  return v;
}
inline void vstore(Half* p, const V<float>& v) {
  using V = fastkd::V<float>;
  FASTKD_EACH {
#if defined(__AVX512F__)
    const auto out = _mm512_cvtps_ph((__m512)v.r[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    const auto out = _mm256_cvtps_ph((__m256)v.r[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const U16 out = __builtin_convertvector(float_to_half<U32>(v.r[i]), U16);
#endif
    __builtin_memcpy(p + i * V::kWide, &out, sizeof out);
  }
}

// Sixteen bytes as floats, and multiply-adds with one rounding: a * b + c, c - a * b. Where the processor has none, nobody asks.
#if defined(__AVX512F__) || defined(__FMA__)
#define FASTKD_FMA
inline V<float> vload(const uint8_t* p) {
  using V = fastkd::V<float>;
  V v;
#ifdef __AVX512F__
  v.r[0] = (V::R)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  FASTKD_EACH v.r[i] = (V::R)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + i * V::kWide))));
#endif
  return v;
}
inline V<float> fma(const V<float>& a, const V<float>& b, const V<float>& c) {
  using V = fastkd::V<float>;
  V o;
#ifdef __AVX512F__
  FASTKD_EACH o.r[i] = (V::R)_mm512_fmadd_ps((__m512)a.r[i], (__m512)b.r[i], (__m512)c.r[i]);
#else
  FASTKD_EACH o.r[i] = (V::R)_mm256_fmadd_ps((__m256)a.r[i], (__m256)b.r[i], (__m256)c.r[i]);
#endif
  return o;
}
inline V<float> fnma(const V<float>& a, const V<float>& b, const V<float>& c) {
  using V = fastkd::V<float>;
  V o;
#ifdef __AVX512F__
  FASTKD_EACH o.r[i] = (V::R)_mm512_fnmadd_ps((__m512)a.r[i], (__m512)b.r[i], (__m512)c.r[i]);
#else
  FASTKD_EACH o.r[i] = (V::R)_mm256_fnmadd_ps((__m256)a.r[i], (__m256)b.r[i], (__m256)c.r[i]);
#endif
  return o;
}
#endif

// X is a scalar or one register. NaN passes through forward and backward as in torch: every comparison is false for it.
template <int kAct, class A, class X> inline X act_one(X pre, A slope) {
  const X zero = X{} + A(0), six = X{} + A(6);
  if constexpr (kAct == kRelu) return pre <= zero ? zero : pre;
  else if constexpr (kAct == kRelu6) {
    const X low = pre <= zero ? zero : pre;
    return low >= six ? six : low;
  } else if constexpr (kAct == kLeakyRelu) return pre > zero ? pre : pre * slope;
  else return pre;
}
template <int kAct, class A, class X> inline X act_grad_one(X pre, X g, A slope) {
  const X zero = X{} + A(0), six = X{} + A(6);
  if constexpr (kAct == kRelu) return pre <= zero ? zero : g;
  else if constexpr (kAct == kRelu6) {
    const X low = pre <= zero ? zero : g;
    return pre >= six ? zero : low;
  } else if constexpr (kAct == kLeakyRelu) return pre > zero ? g : g * slope;
  else return g;
}
template <int kAct, class A> inline A act(A pre, A slope) { return act_one<kAct, A, A>(pre, slope); }
template <int kAct, class A> inline A act_grad(A pre, A g, A slope) { return act_grad_one<kAct, A, A>(pre, g, slope); }
template <int kAct, class A> inline V<A> act(const V<A>& pre, A slope) {
  using V = fastkd::V<A>;
  V o;
  FASTKD_EACH o.r[i] = act_one<kAct, A, typename V::R>(pre.r[i], slope);
  return o;
}
template <int kAct, class A> inline V<A> act_grad(const V<A>& pre, const V<A>& g, A slope) {
  using V = fastkd::V<A>;
  V o;
  FASTKD_EACH o.r[i] = act_grad_one<kAct, A, typename V::R>(pre.r[i], g.r[i], slope);
  return o;
}

// Memory of its own; not std::vector, whose functions are no unnamed namespace's (see above).
template <class X> struct Buffer {
  X* const data;
  explicit Buffer(int64_t n) : data(new X[n]) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { delete[] data; }
};

// 0..n-1 in whole vectors, the last one moved back over its neighbour; element by element where there is not one vector.
// For work that may be done twice.
template <class Block, class One> inline void cover(int64_t n, const Block& block, const One& one) {
  if (n < kLanes) {
    for (int64_t j = 0; j < n; ++j) one(j);
    return;
  }
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) block(j);
  if (j < n) block(n - kLanes);
}

// Independent units of work over `threads` threads; who runs a unit never changes its result.
template <class F> inline void parallel(int64_t units, int threads, const F& run) {
#ifdef _OPENMP
  const int64_t used = units < threads ? units : threads;
  if (used > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(used))
    for (int64_t u = 0; u < units; ++u) run(u);
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t u = 0; u < units; ++u) run(u);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls f(T{}) with the element type of `dtype` (Python lets only these through).
template <class F> inline void with_type(int dtype, const F& f) {
  if (dtype == kFloat32) f(float{});
  else if (dtype == kFloat64) f(double{});
  else if (dtype == kBFloat16) f(BFloat{});
  else f(Half{});
}

template <int k> struct Int { static constexpr int value = k; };
template <class F> inline void with_act(int act, const F& f) {
  if (act == kRelu) f(Int<kRelu>{});
  else if (act == kRelu6) f(Int<kRelu6>{});
  else if (act == kLeakyRelu) f(Int<kLeakyRelu>{});
  else f(Int<kNone>{});
}

}  // namespace
}  // namespace fastkd
