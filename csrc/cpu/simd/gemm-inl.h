// Matrix products on tiles that fit the caches, and the packing of rows into such tiles.
//
// Tiles hold words. A word is what one lane multiplies in one step: a float, a double, or two neighbours in the summed
// direction as bf16, where the instruction set multiplies those in pairs (vdpbf16ps). A product C = A B has its left
// factor read one word at a time, broadcast to all lanes, and its right factor a vector at a time, so the lanes run
// along the columns of C.
//
//   A by rows   word (m, k) at a[m * lda + k]          packed by pack_rows
//   A by depth  word (m, k) at a[k * lda + m]          packed by pack_depth
//   B           word (k, n) at b[k * ldb + n]          packed by pack_depth, or by pack_transposed
//
// Tiles are zero up to whole words, vectors and blocks of kBlockRows<W> rows, so that no kernel has a tail.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__AMX_BF16__)
#include "amx-inl.h"
#endif
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

struct bf16x2 { uint32_t bits; };  // the even element in the low half

template <class W> struct WordOf;
template <> struct WordOf<float> {
  using vec = f32v;
  using sum = float;
  using sum_vec = f32v;
  static constexpr int terms = 1;
  static vec broadcast(const float* p) { return splat<f32v>(*p); }
  static sum_vec dot(vec a, vec b, sum_vec c) { return fma(a, b, c); }
};
template <> struct WordOf<double> {
  using vec = f64v;
  using sum = double;
  using sum_vec = f64v;
  static constexpr int terms = 1;
  static vec broadcast(const double* p) { return splat<f64v>(*p); }
  static sum_vec dot(vec a, vec b, sum_vec c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
template <> struct WordOf<bf16x2> {
  using vec = u32v;
  using sum = float;
  using sum_vec = f32v;
  static constexpr int terms = 2;
  static vec broadcast(const bf16x2* p) { return splat<u32v>(p->bits); }
  static sum_vec dot(vec a, vec b, sum_vec c) {
    return (f32v)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// The word in which elements of T are multiplied.
template <class T> struct WordFor { using type = compute_t<T>; };
#if defined(__AVX512BF16__)
template <> struct WordFor<bf16> { using type = bf16x2; };
#endif
template <class T> using word_t = typename WordFor<T>::type;
template <class W> using word_vec = typename WordOf<W>::vec;
template <class W> using sum_t = typename WordOf<W>::sum;
template <class W> using sum_vec = typename WordOf<W>::sum_vec;
template <class W> constexpr int terms_of = WordOf<W>::terms;
template <class W> constexpr int word_lanes = lanes_of<sum_vec<W>>;

// Accumulators of a block: 8 x 2 vectors of 32 registers, 4 x 3 or 4 x 2 of 16. Eight or more are in flight, which
// covers the latency of two multipliers, and a broadcast serves two or three multiplications.
#if defined(__AVX512F__)
template <class W> constexpr int kBlockRows = 8;
constexpr int kBlockVectors = 2;
#elif defined(__AVX2__)
template <class W> constexpr int kBlockRows = 4;
constexpr int kBlockVectors = 3;
#else
template <class W> constexpr int kBlockRows = 4;
constexpr int kBlockVectors = 2;
#endif
template <class W> constexpr int64_t kDepthStep = 1;
#if defined(__AMX_BF16__)
template <> constexpr int kBlockRows<bf16x2> = kTileRows;
template <> constexpr int64_t kDepthStep<bf16x2> = 16;
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// --- products ---------------------------------------------------------------------------------------------------------
enum class Left { kByRows, kByDepth };
enum class Into { kStore, kAdd };  // C = scale A B, or C += A B

// What a kernel holds while it takes products of words W: nothing, but for the tiles of amx-inl.h.
template <class W> struct ProductScope {
  ProductScope() {}
};
#if defined(__AMX_BF16__)
template <> struct ProductScope<bf16x2> : TileScope {};
#endif

template <class W, Left kLeft, Into kInto, int kVectors>
inline void product_block(int64_t depth, const W* a, int64_t lda, const W* b, int64_t ldb, sum_t<W>* c, int64_t ldc,
                          sum_t<W> scale) {
  constexpr int kL = word_lanes<W>, kRows = kBlockRows<W>;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<W, bf16x2>) {
    tile_block<kLeft == Left::kByDepth, kInto == Into::kAdd, kVectors>(depth, &a->bits, lda, &b->bits, ldb, c, ldc, scale);
    return;
  }
#endif
  sum_vec<W> sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    word_vec<W> right[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) right[n] = load_raw<word_vec<W>>(b + k * ldb + n * kL);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      word_vec<W> left = WordOf<W>::broadcast(kLeft == Left::kByRows ? a + m * lda + k : a + k * lda + m);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[m][n] = WordOf<W>::dot(left, right[n], sums[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      sum_t<W>* at = c + m * ldc + n * kL;
      store(at, kInto == Into::kAdd ? load(at) + sums[m][n] : sums[m][n] * splat<sum_vec<W>>(scale));
    }
  }
}

struct Depth { int64_t begin, end; };  // in elements

// C (rows x cols) = scale A B or += A B. depth_of(row, rows, col, cols) names the part of the sum that a block of C
// needs; a block that needs none is left as it is. rows is a multiple of kBlockRows<W>, cols of the lanes.
template <class W, Left kLeft, Into kInto, class DepthOf>
inline void product(int64_t rows, int64_t cols, const W* a, int64_t lda, const W* b, int64_t ldb, sum_t<W>* c,
                    int64_t ldc, sum_t<W> scale, const DepthOf& depth_of) {
  constexpr int kL = word_lanes<W>, kTerms = terms_of<W>;
  for (int64_t n = 0; n < cols;) {
    int64_t vectors = smaller(kBlockVectors, (cols - n) / kL);
    for (int64_t m = 0; m < rows; m += kBlockRows<W>) {
      Depth d = depth_of(m, kBlockRows<W>, n, vectors * kL);
      if (d.begin >= d.end) continue;
      // On tiles, which sum 16 words apart, at a whole one: so no sum depends on what of it is left out.
      int64_t k = d.begin / kTerms / kDepthStep<W> * kDepthStep<W>, depth = (d.end + kTerms - 1) / kTerms - k;
      const W* left = kLeft == Left::kByRows ? a + m * lda + k : a + k * lda + m;
      auto run = vectors == 1   ? product_block<W, kLeft, kInto, 1>
                 : vectors == 2 ? product_block<W, kLeft, kInto, 2>
                                : product_block<W, kLeft, kInto, kBlockVectors>;
      run(depth, left, lda, b + k * ldb + n, ldb, c + m * ldc + n, ldc, scale);
    }
    n += vectors * kL;
  }
}

// Word k of a factor with the terms that do not count set to zero.
template <class W, class Word, class Counts> inline Word counted_terms(Word word, int64_t k, const Counts& counts) {
  if constexpr (terms_of<W> == 1) {
    return counts(k) ? word : Word{};
  } else {
    return word & ((counts(2 * k) ? 0xffffu : 0) | (counts(2 * k + 1) ? 0xffff0000u : 0));
  }
}

// C += A B over the pairs (m, k) that counts(m, k) names, and no other: 0 * NaN in a product would be NaN. Slow, and
// meant for the tile that has both NaN or inf in B and pairs that must not see it. Gives the bits that product gives
// where A is zero in the other pairs and B is finite.
template <class W, Left kLeft, class Counts>
__attribute__((noinline)) void product_of_some(int64_t rows, int64_t cols, int64_t depth, const W* a, int64_t lda,
                                               const W* b, int64_t ldb, sum_t<W>* c, int64_t ldc, const Counts& counts) {
  const int64_t words = (depth + terms_of<W> - 1) / terms_of<W>;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < cols; n += word_lanes<W>) {
      auto row_counts = [&](int64_t element) { return element < depth && counts(m, element); };
      auto left_at = [&](int64_t k) {
        const W* at = kLeft == Left::kByRows ? a + m * lda + k : a + k * lda + m;
        return counted_terms<W>(WordOf<W>::broadcast(at), k, row_counts);
      };
      auto right_at = [&](int64_t k) { return counted_terms<W>(load_raw<word_vec<W>>(b + k * ldb + n), k, row_counts); };
#if defined(__AMX_BF16__)
      if constexpr (std::is_same_v<W, bf16x2>) {
        add_row_by_tiles(words, left_at, right_at, c + m * ldc + n);
        continue;
      }
#endif
      sum_vec<W> sum{};
      for (int64_t k = 0; k < words; ++k) sum = WordOf<W>::dot(left_at(k), right_at(k), sum);
      store(c + m * ldc + n, load(c + m * ldc + n) + sum);
    }
  }
}

// --- packing ----------------------------------------------------------------------------------------------------------
// Up to one vector of words from `count` consecutive elements, zero beyond.
template <class W> struct Words {
  template <class T> static word_vec<W> load_from(const T* p, int64_t count) {
    return count >= word_lanes<W> ? load(p) : load_n(p, static_cast<int>(count));
  }
  static sum_vec<W> times_zero(word_vec<W> v) { return v * word_vec<W>{}; }
};
#if defined(__AVX512BF16__)
template <> struct Words<bf16x2> {
  static u32v load_from(const bf16* p, int64_t count) {
    if (count >= 2 * kLanes) return load_raw<u32v>(p);
    return (u32v)_mm512_maskz_loadu_epi16((1u << count) - 1u, p);
  }
  static f32v times_zero(u32v v) { return (f32v)(v << 16) * f32v{} + (f32v)(v & 0xffff0000u) * f32v{}; }
};
#endif

// Whether every element of the packed words was finite: then the sum of 0 * element is 0, else NaN.
template <class V> inline bool all_zero(V v) {
  for (int i = 0; i < lanes_of<V>; ++i) {
    if (!(v[i] == 0)) return false;
  }
  return true;
}

// Rows of elements, `stride` apart, to rows of words, `ld` apart; zero up to ld and to padded_rows.
template <class W, class T>
inline bool pack_rows(const T* src, int64_t stride, int64_t rows, int64_t cols, W* dst, int64_t ld,
                      int64_t padded_rows) {
  constexpr int kL = word_lanes<W>, kTerms = terms_of<W>;
  sum_vec<W> check{};
  for (int64_t r = 0; r < rows; ++r, src += stride, dst += ld) {
    for (int64_t w = 0; w < ld; w += kL) {
      int64_t left = cols - w * kTerms;
      word_vec<W> v{};
      if (left > 0) v = Words<W>::load_from(src + w * kTerms, left);
      check += Words<W>::times_zero(v);
      std::memcpy(dst + w, &v, sizeof v);
    }
  }
  if (padded_rows > rows) std::memset(dst, 0, (padded_rows - rows) * ld * sizeof(W));
  return all_zero(check);
}

// Rows of elements to words that span `terms` rows: word (r / terms, col). For words of one term the same as pack_rows.
template <class W, class T>
inline bool pack_depth(const T* src, int64_t stride, int64_t rows, int64_t cols, W* dst, int64_t ld,
                       int64_t padded_rows) {
  if constexpr (terms_of<W> == 1) {
    return pack_rows(src, stride, rows, cols, dst, ld, padded_rows);
  } else {
    constexpr int kL = word_lanes<W>;
    f32v check{};
    for (int64_t r = 0; r < padded_rows; r += 2, src += 2 * stride, dst += ld) {
      for (int64_t w = 0; w < ld; w += kL) {
        int n = static_cast<int>(larger(0, smaller(kL, cols - w)));
        u32v low{}, high{};
        if (n > 0 && r < rows) low = widen_bits(load_u16_n(src + w, n));
        if (n > 0 && r + 1 < rows) high = widen_bits(load_u16_n(src + stride + w, n));
        u32v v = low | (high << 16);
        check += Words<W>::times_zero(v);
        std::memcpy(dst + w, &v, sizeof v);
      }
    }
    return all_zero(check);
  }
}

// Rows of elements to the transposed tile: word (col, row) at dst[col / terms * ld + row]; zero up to padded_rows, the
// number of lanes, a multiple of the vector.
template <class W, class T>
inline void pack_transposed(const T* src, int64_t stride, int64_t rows, int64_t cols, W* dst, int64_t ld,
                            int64_t padded_rows) {
  constexpr int kL = word_lanes<W>, kTerms = terms_of<W>;
  int64_t words = (cols + kTerms - 1) / kTerms;
  for (int64_t r = 0; r < padded_rows; r += kL) {
    for (int64_t w = 0; w < words; w += kL) {
      word_vec<W> square[kL];
      for (int i = 0; i < kL; ++i) {
        square[i] = word_vec<W>{};
        if (r + i < rows) square[i] = Words<W>::load_from(src + (r + i) * stride + w * kTerms, cols - w * kTerms);
      }
      transpose_from<kL / 2>(square);
      for (int i = 0; i < kL && w + i < words; ++i) std::memcpy(dst + (w + i) * ld + r, &square[i], sizeof square[i]);
    }
  }
}

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
