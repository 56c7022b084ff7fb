// AVX-512 in software: what csrc/cpu/simd uses of it, written after Intel's description of each instruction, so that the
// kernels for it run on machines without. Chosen by FASTLM_EMULATE_AVX512=ON; no AVX-512 header is included with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef float __m256 __attribute__((vector_size(32)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_TO_NEG_INF 1
#define _MM_FROUND_NO_EXC 8
#define FASTLM_EMULATED static inline __attribute__((always_inline, unused))

namespace {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint16_t Words16 __attribute__((vector_size(32)));
typedef uint16_t Words32 __attribute__((vector_size(64)));
typedef uint32_t Lanes __attribute__((vector_size(64)));

FASTLM_EMULATED float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FASTLM_EMULATED uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
FASTLM_EMULATED float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
FASTLM_EMULATED float bf16_of(uint16_t word) { return flushed(float_of(uint32_t(word) << 16)); }

// --- memory: the lanes of the mask alone are touched ------------------------------------------------------------------
template <class V, class Mask> FASTLM_EMULATED V masked_load(Mask mask, const void* p, int size) {
  V v{};
  for (int i = 0; i < int(sizeof(V)) / size; ++i) {
    if (mask >> i & 1) std::memcpy(reinterpret_cast<char*>(&v) + i * size, static_cast<const char*>(p) + i * size, size);
  }
  return v;
}
template <class V, class Mask> FASTLM_EMULATED void masked_store(void* p, Mask mask, const V& v, int size) {
  for (int i = 0; i < int(sizeof(V)) / size; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(p) + i * size, reinterpret_cast<const char*>(&v) + i * size, size);
  }
}
FASTLM_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) { return masked_load<__m512>(m, p, 4); }
FASTLM_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) { return masked_load<__m256i>(m, p, 2); }
FASTLM_EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void* p) { return masked_load<__m512i>(m, p, 2); }
FASTLM_EMULATED __m128i _mm_loadu_si128(const __m128i* p) { return masked_load<__m128i>(0xffffu, p, 1); }
FASTLM_EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 v) { masked_store(p, m, v, 4); }
FASTLM_EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i v) { masked_store(p, m, v, 2); }

FASTLM_EMULATED void _mm512_stream_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
FASTLM_EMULATED void _mm256_stream_si256(__m256i* p, __m256i v) { std::memcpy(p, &v, sizeof v); }
FASTLM_EMULATED void _mm_sfence() {}

// --- conversions ------------------------------------------------------------------------------------------------------
FASTLM_EMULATED __m512 _mm512_cvtph_ps(__m256i h) {
  _Float16 half[16];
  std::memcpy(half, &h, sizeof half);
  __m512 v;
  for (int i = 0; i < 16; ++i) v[i] = half[i];
  return v;
}
FASTLM_EMULATED __m256i _mm512_cvtps_ph(__m512 v, int) {
  _Float16 half[16];
  for (int i = 0; i < 16; ++i) half[i] = static_cast<_Float16>(v[i]);
  __m256i h;
  std::memcpy(&h, half, sizeof h);
  return h;
}
FASTLM_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i v) { return (__m512i)__builtin_convertvector((Words16)v, Lanes); }
FASTLM_EMULATED __m256i _mm512_cvtepi32_epi16(__m512i v) { return (__m256i)__builtin_convertvector((Lanes)v, Words16); }
FASTLM_EMULATED __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l,
                                          int m, int n, int o, int p) {
  typedef int Signed __attribute__((vector_size(64)));
  return (__m512i)Signed{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
}
FASTLM_EMULATED __m512i _mm512_permutexvar_epi32(__m512i index, __m512i v) {
  Lanes out{};
  for (int i = 0; i < 16; ++i) out[i] = ((Lanes)v)[((Lanes)index)[i] & 15];
  return (__m512i)out;
}
// Narrowed with saturation: within each 16 bytes first those of a, then those of b.
template <class To, class From> FASTLM_EMULATED __m512i packed(__m512i a, __m512i b, int least, int most) {
  constexpr int kFrom = 16 / sizeof(From);
  From in[2][64 / sizeof(From)];
  To out[64 / sizeof(To)];
  std::memcpy(in[0], &a, 64);
  std::memcpy(in[1], &b, 64);
  for (int i = 0; i < int(64 / sizeof(To)); ++i) {
    int block = i / (2 * kFrom), at = i % (2 * kFrom);
    int x = in[at / kFrom][block * kFrom + at % kFrom];
    out[i] = To(x < least ? least : x > most ? most : x);
  }
  __m512i result;
  std::memcpy(&result, out, 64);
  return result;
}
FASTLM_EMULATED __m512i _mm512_packs_epi32(__m512i a, __m512i b) { return packed<int16_t, int32_t>(a, b, -32768, 32767); }
FASTLM_EMULATED __m512i _mm512_packus_epi16(__m512i a, __m512i b) { return packed<uint8_t, int16_t>(a, b, 0, 255); }
FASTLM_EMULATED __m512i _mm512_subs_epu16(__m512i a, __m512i b) {
  uint16_t x[32], y[32];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (int i = 0; i < 32; ++i) x[i] = x[i] > y[i] ? x[i] - y[i] : 0;
  std::memcpy(&a, x, 64);
  return a;
}
FASTLM_EMULATED __m512i _mm512_cvtepu8_epi32(__m128i v) { return (__m512i)__builtin_convertvector((Bytes16)v, Lanes); }
FASTLM_EMULATED __m512i _mm512_cvtepi8_epi32(__m128i v) {
  int8_t bytes[16];
  std::memcpy(bytes, &v, 16);
  int32_t words[16];
  for (int i = 0; i < 16; ++i) words[i] = bytes[i];
  __m512i result;
  std::memcpy(&result, words, 64);
  return result;
}

// To bf16: denormals become 0, the nearest else, and the second operand goes to the lower half.
FASTLM_EMULATED uint16_t bf16_bits(float f) {
  uint32_t bits = bits_of(flushed(f));
  return f != f ? (bits >> 16) | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
FASTLM_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  Words32 words;
  for (int i = 0; i < 16; ++i) words[i] = bf16_bits(low[i]), words[i + 16] = bf16_bits(high[i]);
  return (__m512bh)words;
}

FASTLM_EMULATED Words16 _mm512_cvtneps_pbh(__m512 v) {
  Words16 words;
  for (int i = 0; i < 16; ++i) words[i] = bf16_bits(v[i]);
  return words;
}
// The lanes of the classes asked for, which are denormals here.
FASTLM_EMULATED __mmask16 _mm512_fpclass_ps_mask(__m512 v, int) {
  __mmask16 found = 0;
  for (int i = 0; i < 16; ++i) found |= __mmask16((std::fpclassify(v[i]) == FP_SUBNORMAL) << i);
  return found;
}

// --- arithmetic -------------------------------------------------------------------------------------------------------
FASTLM_EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
FASTLM_EMULATED __m512 _mm512_set1_ps(float x) { return x - __m512{}; }
FASTLM_EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
FASTLM_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
FASTLM_EMULATED __m512 _mm512_sqrt_ps(__m512 a) {
  for (int i = 0; i < 16; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
// x less its floor, the rounding that is asked for; of an infinity 0.
FASTLM_EMULATED __m512 _mm512_reduce_ps(__m512 a, int) {
  for (int i = 0; i < 16; ++i) a[i] = std::isinf(a[i]) ? 0.0f : a[i] - std::floor(a[i]);
  return a;
}
// b where either is NaN.
FASTLM_EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
FASTLM_EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = a[i] < b[i] ? a[i] : b[i];
  return a;
}
// Of the 14 bits that are promised, and no more.
FASTLM_EMULATED __m512 _mm512_rcp14_ps(__m512 a) {
  for (int i = 0; i < 16; ++i) {
    float r = 1.0f / a[i];
    uint32_t bits;
    std::memcpy(&bits, &r, 4);
    bits = (bits + (1u << 8)) & ~((1u << 9) - 1);
    std::memcpy(&a[i], &bits, 4);
  }
  return a;
}
// a 2^floor(b)
FASTLM_EMULATED float scaled(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return NAN;
  if (!std::isinf(b)) return std::ldexp(a, static_cast<int>(std::fmin(std::fmax(std::floor(b), -4000.0f), 4000.0f)));
  if (b > 0) return a == 0 ? NAN : std::copysign(INFINITY, a);
  return std::isinf(a) ? NAN : std::copysign(0.0f, a);
}
FASTLM_EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = scaled(a[i], b[i]);
  return a;
}
// The products of the lower words of each 64 bits.
FASTLM_EMULATED __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  for (int i = 0; i < 8; ++i) a[i] = (long long)((uint64_t)(uint32_t)a[i] * (uint32_t)b[i]);
  return a;
}
// c + the products of each pair, the odd one first; denormals count as 0 and become 0.
FASTLM_EMULATED __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  Words32 x = (Words32)a, y = (Words32)b;
  for (int i = 0; i < 16; ++i) {
    float odd = flushed(__builtin_fmaf(bf16_of(x[2 * i + 1]), bf16_of(y[2 * i + 1]), flushed(c[i])));
    c[i] = flushed(__builtin_fmaf(bf16_of(x[2 * i]), bf16_of(y[2 * i]), odd));
  }
  return c;
}

// --- 16-bit words -----------------------------------------------------------------------------------------------------
FASTLM_EMULATED __m512i _mm512_set1_epi16(short x) {
  Words32 words;
  for (int i = 0; i < 32; ++i) words[i] = x;
  return (__m512i)words;
}
template <class... Shorts> FASTLM_EMULATED __m512i _mm512_set_epi16(Shorts... highest_first) {
  short given[] = {static_cast<short>(highest_first)...};
  Words32 words;
  for (int i = 0; i < 32; ++i) words[i] = given[31 - i];
  return (__m512i)words;
}
FASTLM_EMULATED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  Words32 words, from = (Words32)a, at = (Words32)index;
  for (int i = 0; i < 32; ++i) words[i] = from[at[i] & 31];
  return (__m512i)words;
}

}  // namespace
