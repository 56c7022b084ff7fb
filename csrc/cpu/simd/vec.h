// One vector of the instruction set being compiled, and the few operations that the kernels are written in.
//
// Built on the compiler's vector extension: + - * / and comparisons are the language's own, so the width is written
// nowhere else and aarch64 gets NEON from the same source. Intrinsics stand only where the extension has no word for
// it. Everything lives in an unnamed namespace inside the instruction set's own: nothing compiled with AVX-512 may
// become the copy of a function that a lesser machine executes.
//
//   load<T>(p), load_n<T>(p, n)   T in memory (float, double, bf16, f16) to a vector of float (or double); the
//                                 first n lanes, the rest zero: a tail runs the same arithmetic as the body
//   store(p, v), store_n(p, v, n) the reverse, rounding to nearest even
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define FASTLM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTLM_VECTOR_BYTES 32
#else
#define FASTLM_VECTOR_BYTES 16
#endif

namespace fastlm::cpu::FASTLM_ISA {
namespace {

typedef float f32v __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef double f64v __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef int32_t i32v __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef uint16_t u16h __attribute__((vector_size(FASTLM_VECTOR_BYTES / 2)));  // as many 16-bit lanes as f32v has
typedef uint16_t u16v __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef uint8_t u8q __attribute__((vector_size(FASTLM_VECTOR_BYTES / 4)));    // and 8-bit lanes
typedef uint8_t u8v __attribute__((vector_size(FASTLM_VECTOR_BYTES)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// What a stored element is computed in.
template <class T> struct ComputeOf { using type = float; using vec = f32v; };
template <> struct ComputeOf<double> { using type = double; using vec = f64v; };
template <class T> using compute_t = typename ComputeOf<T>::type;
template <class T> using vec_t = typename ComputeOf<T>::vec;

template <class V> constexpr int lanes_of = FASTLM_VECTOR_BYTES / sizeof(V{}[0]);
constexpr int kLanes = lanes_of<f32v>;

// s - 0, which is s for every s: 0 + s would make +0 of -0, so the compiler could not drop the addition.
template <class V, class S> inline V splat(S s) {
  return static_cast<std::decay_t<decltype(V{}[0])>>(s) - V{};
}

// --- 16-bit formats ---------------------------------------------------------------------------------------------------
// By intrinsics where there are any: of the conversion as the extension has it, GCC 12 makes four to eight instructions.
inline u32v widen_bits(u16h h) {
#if defined(__AVX512F__)
  return (u32v)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (u32v)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, u32v);
#endif
}
inline u16h narrow_bits(u32v v) {  // below 2^16 each
#if defined(__AVX512F__)
  return (u16h)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  return (u16h)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, u16h);
#endif
}

inline f32v widen_bf16(u16h h) { return (f32v)(widen_bits(h) << 16); }

// vcvtneps2bf16 makes 0 of denormals, torch does not: where there is one, integers round.
inline u16h narrow_bf16(f32v v) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, kDenormal) == 0, 1)) return (u16h)_mm512_cvtneps_pbh((__m512)v);
#endif
  u32v u = (u32v)v;
  u32v rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  u32v quiet_nan = (u >> 16) | 0x40u;
  return narrow_bits((u32v)(v != v ? quiet_nan : rounded));
}

inline f32v widen_f16(u16h h) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (f32v)_mm256_cvtph_ps((__m128i)h);
#else
  u32v u = widen_bits(h), magnitude = (u & 0x7fffu) << 13;
  f32v scaled = (f32v)magnitude * 0x1p112f;  // rebiases the exponent, and makes normal numbers of denormals
  u32v special = magnitude | 0x7f800000u;    // inf and NaN
  return (f32v)(((u & 0x8000u) << 16) | (magnitude >= 0x0f800000u ? special : (u32v)scaled));
#endif
}

inline u16h narrow_f16(f32v v) {
#if defined(__AVX512F__)
  return (u16h)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (u16h)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  u32v u = (u32v)v, magnitude = u & 0x7fffffffu;
  u32v rebiased = magnitude - 0x38000000u;
  u32v normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  // Adding 0.5 lines the last bit of the float up with the last bit of a half denormal, and rounds.
  u32v denormal = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
  u32v infinite = magnitude > 0x7f800000u ? 0x7e00u + (u32v){} : 0x7c00u + (u32v){};
  u32v half = magnitude >= 0x47800000u ? infinite : (magnitude < 0x38800000u ? denormal : normal);
  return narrow_bits(half | ((u >> 16) & 0x8000u));
#endif
}

// --- load and store ---------------------------------------------------------------------------------------------------
template <class V, class T> inline V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> inline V load_raw_n(const T* p, int n) {
  V v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T> inline vec_t<T> load(const T* p);
template <> inline f32v load<float>(const float* p) { return load_raw<f32v>(p); }
template <> inline f64v load<double>(const double* p) { return load_raw<f64v>(p); }
template <> inline f32v load<bf16>(const bf16* p) { return widen_bf16(load_raw<u16h>(p)); }
template <> inline f32v load<f16>(const f16* p) { return widen_f16(load_raw<u16h>(p)); }

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

template <class T> inline vec_t<T> load_n(const T* p, int n);
template <> inline f32v load_n<float>(const float* p, int n) {
#if defined(__AVX512F__)
  return (f32v)_mm512_maskz_loadu_ps(first_lanes(n), p);
#elif defined(__AVX2__)
  return (f32v)_mm256_maskload_ps(p, first_lanes(n));
#else
  return load_raw_n<f32v>(p, n);
#endif
}
template <> inline f64v load_n<double>(const double* p, int n) { return load_raw_n<f64v>(p, n); }
inline u16h load_u16_n(const void* p, int n) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return (u16h)_mm256_maskz_loadu_epi16(first_lanes(n), p);
#else
  return load_raw_n<u16h>(static_cast<const uint16_t*>(p), n);
#endif
}
template <> inline f32v load_n<bf16>(const bf16* p, int n) { return widen_bf16(load_u16_n(p, n)); }
template <> inline f32v load_n<f16>(const f16* p, int n) { return widen_f16(load_u16_n(p, n)); }

inline void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, f64v v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, f32v v) {
  u16h h = narrow_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
inline void store(f16* p, f32v v) {
  u16h h = narrow_f16(v);
  std::memcpy(p, &h, sizeof h);
}

inline void store_n(float* p, f32v v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}
inline void store_n(double* p, f64v v, int n) { std::memcpy(p, &v, n * sizeof(double)); }
inline void store_u16_n(void* p, u16h h, int n) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)h);
#else
  std::memcpy(p, &h, n * sizeof(uint16_t));
#endif
}
inline void store_n(bf16* p, f32v v, int n) { store_u16_n(p, narrow_bf16(v), n); }
inline void store_n(f16* p, f32v v, int n) { store_u16_n(p, narrow_f16(v), n); }

// With kSigned, the highest bit of a byte fills the word above it.
template <bool kSigned> inline u32v load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (u32v)(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (u32v)(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  u32v words = __builtin_convertvector(load_raw<u8q>(p), u32v);
  return kSigned ? (u32v)((i32v)(words << 24) >> 24) : words;
#endif
}

// Two vectors of integers below 2^15 as one of 16 bits, and two of those as one of bytes, where more than 255 becomes 255.
// Each instruction packs within 16 bytes: only the bytes are in order again. And a difference that is not below 0.
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline u16v narrow_pair(u32v a, u32v b) { return (u16v)_mm512_packs_epi32((__m512i)a, (__m512i)b); }
inline u8v bytes_of(u16v a, u16v b) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (u8v)_mm512_permutexvar_epi32(order, _mm512_packus_epi16((__m512i)a, (__m512i)b));
}
inline u16v minus_saturated(u16v a, u16v b) { return (u16v)_mm512_subs_epu16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline u16v narrow_pair(u32v a, u32v b) { return (u16v)_mm256_packs_epi32((__m256i)a, (__m256i)b); }
inline u8v bytes_of(u16v a, u16v b) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return (u8v)_mm256_permutevar8x32_epi32(_mm256_packus_epi16((__m256i)a, (__m256i)b), order);
}
inline u16v minus_saturated(u16v a, u16v b) { return (u16v)_mm256_subs_epu16((__m256i)a, (__m256i)b); }
#else
inline u16v narrow_pair(u32v a, u32v b) {
  const u16h halves[2] = {narrow_bits(a), narrow_bits(b)};
  u16v pair;
  std::memcpy(&pair, halves, sizeof pair);
  return pair;
}
inline u8v bytes_of(u16v a, u16v b) {
  const u16v pairs[2] = {a, b};
  u8v bytes;
  for (size_t i = 0; i < sizeof bytes; ++i) {
    uint16_t x = pairs[i / (sizeof bytes / 2)][i % (sizeof bytes / 2)];
    bytes[i] = x < 255 ? x : 255;
  }
  return bytes;
}
inline u16v minus_saturated(u16v a, u16v b) { return (a > b ? a : b) - b; }
#endif

// --- arithmetic -------------------------------------------------------------------------------------------------------
// a * b + c in one instruction where the set has it. Spelt out: of a * b + c * d the compiler may fuse either product, and
// chooses differently in a loop's body and its tail, so that a result would depend on where a thread's share ends.
inline f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline f64v fma(f64v a, f64v b, f64v c) {
#if defined(__aarch64__)
  return (f64v)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;  // compiled for the baseline alone, which has no such instruction
#endif
}
// NaN in x stays NaN: the comparison is false for it.
template <class V> inline V relu(V x) { return x <= V{} ? V{} : x; }

inline f32v sqrt(f32v v) {
#if defined(__AVX512F__)
  return (f32v)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (f32v)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
inline f64v sqrt(f64v v) {
  for (int i = 0; i < lanes_of<f64v>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// The larger, the smaller; b where either is NaN.
template <class V> inline V max(V a, V b) { return a > b ? a : b; }
template <class V> inline V min(V a, V b) { return a < b ? a : b; }
// The same in one instruction, which GCC 12 does not find.
#if defined(__AVX512F__)
inline f32v max(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
inline f32v min(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline f32v max(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
inline f32v min(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
#endif
// NaN in either stays NaN.
template <class V> inline V maximum(V a, V b) { return ((a > b) | (a != a)) ? a : b; }
inline f32v abs(f32v x) { return (f32v)((i32v)x & 0x7fffffff); }

// 1 / x within an ulp, for x far from the ends of float's range.
inline f32v reciprocal(f32v x) {
#if defined(__AVX512F__)
  f32v r = (f32v)_mm512_rcp14_ps((__m512)x);
  return fma(r, fma(-x, r, splat<f32v>(1)), r);
#else
  return 1.0f / x;
#endif
}

template <class M> inline bool any(M mask) {
  for (int i = 0; i < static_cast<int>(sizeof(M) / sizeof(mask[0])); ++i) {
    if (mask[i]) return true;
  }
  return false;
}

// 2^x within 1.5 ulp; denormals, 0, inf and NaN where they belong. x = n + f with n = floor(x), and a polynomial for 2^f
// on [0, 1], fitted for the least relative error (2e-9) with the constant term fixed at 1.
inline f32v exp2_fraction(f32v f) {
  f32v p = fma(splat<f32v>(0x1.c5417ap-13f), f, splat<f32v>(0x1.46d64ap-10f));
  p = fma(p, f, splat<f32v>(0x1.3d0b92p-7f));
  p = fma(p, f, splat<f32v>(0x1.c68912p-5f));
  p = fma(p, f, splat<f32v>(0x1.ebfd58p-3f));
  p = fma(p, f, splat<f32v>(0x1.62e42cp-1f));
  return fma(p, f, splat<f32v>(1.0f));
}
// For |x| <= 160; `excess` is taken off x without being rounded into it.
inline f32v exp2_bounded(f32v x, f32v excess) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  f32v f = (f32v)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (f32v)_mm512_scalef_ps((__m512)exp2_fraction(f - excess), (__m512)x);  // scalef takes the floor of x itself
#else
  f32v shifted = (x - 0.5f) + 0x1.8p23f;  // the integer stands in the last bits
  i32v n = (i32v)shifted - 0x4b400000;
  f32v p = exp2_fraction(x - (shifted - 0x1.8p23f) - excess);
  i32v half = n >> 1;  // 2^n in two factors: one alone would leave the exponent's range
  return p * (f32v)((half + 127) << 23) * (f32v)((n - half + 127) << 23);
#endif
}
inline f32v exp2(f32v x) {
#if !(defined(__AVX512F__) && defined(__AVX512DQ__))  // its instructions take any x
  x = min(splat<f32v>(160), max(splat<f32v>(-160), x));  // NaN stays
#endif
  return exp2_bounded(x, f32v{});
}
inline f64v exp2(f64v x) {
  for (int i = 0; i < lanes_of<f64v>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// e^x within 2 ulp, for |x| <= 110. The rounding of x log2(e) would cost |x| / 2 ulp: it is found exactly and put back.
inline f32v exp_bounded(f32v x) {
  f32v scaled = x * 0x1.715476p+0f;
  f32v excess = fma(x, splat<f32v>(-0x1.715476p+0f), scaled);
  return exp2_bounded(scaled, fma(x, splat<f32v>(-0x1.4ae0c0p-26f), excess));
}
inline f32v exp(f32v x) {  // NaN stays; e^110 is inf, e^-110 is 0
  return exp_bounded(min(splat<f32v>(110), max(splat<f32v>(-110), x)));
}
inline f64v exp(f64v x) {
  for (int i = 0; i < lanes_of<f64v>; ++i) x[i] = std::exp(x[i]);
  return x;
}

inline f32v tanh(f32v x) {
  // Near 0 the difference below would cancel: x + x^3 P(x^2), fitted on [0, 0.55] for the least relative error (4e-8).
  f32v u = abs(x), z = x * x;
  f32v p = fma(splat<f32v>(-0x1.b137a4p-8f), z, splat<f32v>(0x1.5d226cp-6f));
  p = fma(p, z, splat<f32v>(-0x1.b9a04ep-5f));
  p = fma(p, z, splat<f32v>(0x1.110feap-3f));
  p = fma(p, z, splat<f32v>(-0x1.555554p-2f));
  f32v near = x * fma(p, z, splat<f32v>(1)), far = 1.0f - 2.0f / (1.0f + exp(u + u));
  return u < 0.55f ? near : (x < 0.0f ? -far : far);
}
inline f64v tanh(f64v x) {
  for (int i = 0; i < lanes_of<f64v>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <class V> inline V lane_numbers() {
  V v{};
  for (int i = 0; i < lanes_of<V>; ++i) v[i] = i;
  return v;
}

template <class V> inline V first_of(V v, int count, V rest = V{}) {  // the first lanes of v, the others of rest
  if (count == lanes_of<V>) return v;
  return lane_numbers<V>() < splat<V>(count) ? v : rest;
}

template <class V> inline auto reduce_add(V v) {
  auto sum = v[0];
  for (int i = 1; i < lanes_of<V>; ++i) sum += v[i];
  return sum;
}

// Swaps the upper half of each block of 2 kStep lanes in a with the lower half in b.
template <int kStep, class V> inline void exchange(V& a, V& b) {
  constexpr int kL = lanes_of<V>;
#if defined(__clang__)
  V x = a, y = b;
  for (int i = 0; i < kL; ++i) {
    a[i] = i & kStep ? y[i - kStep] : x[i];
    b[i] = i & kStep ? y[i] : x[i + kStep];
  }
#else
  decltype(V{} < V{}) first, second;
  for (int i = 0; i < kL; ++i) {
    first[i] = i & kStep ? kL + i - kStep : i;
    second[i] = i & kStep ? kL + i : i + kStep;
  }
  V x = a;
  a = __builtin_shuffle(x, b, first);
  b = __builtin_shuffle(x, b, second);
#endif
}
template <int kStep, class V> inline void transpose_from(V* rows) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes_of<V>; ++r) {
      if (!(r & kStep)) exchange<kStep>(rows[r], rows[r + kStep]);
    }
    transpose_from<kStep / 2>(rows);
  }
}

// Calls step(offset, count) over [0, n): full vectors first, then one partial one.
template <class V, class Step> inline void for_each_vector(int64_t n, const Step& step) {
  constexpr int kStep = lanes_of<V>;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) step(i, kStep);
  if (i < n) step(i, static_cast<int>(n - i));
}
// The load or store that fits: whole where count is a whole vector.
template <class T> inline vec_t<T> load_count(const T* p, int count) {
  return count == lanes_of<vec_t<T>> ? load(p) : load_n(p, count);
}
template <class T> inline void store_count(T* p, vec_t<T> v, int count) {
  count == lanes_of<vec_t<T>> ? store(p, v) : store_n(p, v, count);
}

template <bool kSigned> inline u32v load_bytes_count(const uint8_t* p, int count) {
  if (count == kLanes) return load_bytes<kSigned>(p);
  uint8_t bytes[kLanes] = {};
  std::memcpy(bytes, p, count);
  return load_bytes<kSigned>(bytes);
}

// --- past the caches --------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
inline void stream(float* p, f32v v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream_bits(void* p, u16h h) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)h); }
#elif defined(__AVX2__)
inline void stream(float* p, f32v v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream_bits(void* p, u16h h) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)h); }
#else
inline void stream(float* p, f32v v) { store(p, v); }
inline void stream_bits(void* p, u16h h) { std::memcpy(p, &h, sizeof h); }
#endif
inline void stream(double* p, f64v v) { store(p, v); }
inline void stream(bf16* p, f32v v) { stream_bits(p, narrow_bf16(v)); }
inline void stream(f16* p, f32v v) { stream_bits(p, narrow_f16(v)); }

// Stores of an array that the caches would not keep: where `past_caches`, a line is written without having been read. In
// scope until all are done, so that they are seen before what follows.
class Output {
 public:
  explicit Output(bool past_caches) : past_caches_(past_caches) {}
  ~Output() {
#if defined(__AVX2__)
    if (past_caches_) _mm_sfence();
#endif
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  template <class T> void store_count(T* p, vec_t<T> v, int count) const {
    constexpr int kL = lanes_of<vec_t<T>>;
    if (past_caches_ && count == kL && reinterpret_cast<uintptr_t>(p) % (kL * sizeof(T)) == 0) {
      stream(p, v);
    } else {
      FASTLM_ISA::store_count(p, v, count);
    }
  }

 private:
  const bool past_caches_;
};

// A row of a kernel table: one instance of the template `f` per DType. float64 is there to prove the formulas, on the
// baseline alone.
#if FASTLM_VECTOR_BYTES == 16
#define FASTLM_FOR_FLOATS(f) {f<float>, f<bf16>, f<f16>, f<double>}
#else
#define FASTLM_FOR_FLOATS(f) {f<float>, f<bf16>, f<f16>, {}}
#endif

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
