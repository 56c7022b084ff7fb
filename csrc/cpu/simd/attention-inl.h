// Attention over tiles: o = softmax(scale q k^T) v row by row with a running maximum and sum (Milakov and Gimelshein,
// arXiv:1805.02867; Dao et al., arXiv:2205.14135), and its gradient from the saved lse. Nothing of size Tq x Tk exists.
//
// Forward: a block of queries against tiles of keys. Scores are computed transposed, (keys, queries), so that lanes run
// along queries: the softmax then needs no sum across lanes, and the probabilities lie as the second product reads them.
// Backward: a tile of keys against tiles of queries, scores as (queries, keys). dk and dv of the tile stay in the cache;
// dq is summed in memory, tile after tile, in the same order whatever the number of threads.
//
// Exponentials are to base 2: scores come out of the product times scale * log2(e).
//
// Positions that a query does not see contribute nothing, be they NaN or inf: their scores are replaced, not multiplied,
// and where a tile is partly hidden and holds something that is not finite, the product is taken pair by pair
// (product_of_some).
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "gemm-inl.h"
#include "philox-inl.h"
#include "vec.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kQueryTile = 64;  // queries in the cache at a time, in the backward
constexpr int64_t kFewQueries = 4;  // that are taken one by one, in the forward
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Cuts memory into arrays on cache lines; starting from null it measures.
struct Arena {
  char* next;
  template <class X> X* take(int64_t count) {
    X* array = reinterpret_cast<X*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
    return array;
  }
};

// --- what a query sees ------------------------------------------------------------------------------------------------
// Of rows x cols queries and keys, the first at (i, j): which pairs are seen, by position alone.
struct Band {
  int64_t lower, upper;  // row r sees column c iff r + lower <= c <= r + upper
  bool operator()(int64_t r, int64_t c) const { return r + lower <= c && c <= r + upper; }
  bool whole(int64_t rows, int64_t cols) const { return rows - 1 + lower <= 0 && cols - 1 <= upper; }
};
inline Band band_at(const AttentionShape& s, int64_t i, int64_t j) { return {i + s.lower - j, i + s.diagonal - j}; }

// The same with the mask, for the few tiles that are taken pair by pair.
struct Seen {
  Band band;
  const uint8_t* mask;  // at the tile, or null
  int64_t row, col;
  bool operator()(int64_t r, int64_t c) const { return band(r, c) && (mask == nullptr || mask[r * row + c * col] != 0); }
};
inline Seen seen_at(const AttentionShape& s, const AttentionScores& h, int64_t i, int64_t j) {
  const uint8_t* mask = h.mask == nullptr ? nullptr : h.mask + i * s.mask_row + j * s.mask_col;
  return {band_at(s, i, j), mask, s.mask_row, s.mask_col};
}

enum class Tile { kEmpty, kMixed, kFull };
// What the mask lets through of a tile.
inline Tile masked_tile(const Seen& seen, int64_t rows, int64_t cols) {
  if (seen.mask == nullptr) return Tile::kFull;
  bool some = false, all = true;
  for (int64_t r = 0; r < (seen.row == 0 ? 1 : rows); ++r) {
    const uint8_t* row = seen.mask + r * seen.row;
    uint8_t any = 0, every = 1;
    if (seen.col == 1) {
      for (int64_t c = 0; c < cols; ++c) any |= row[c], every &= row[c];
    } else {
      for (int64_t c = 0; c < (seen.col == 0 ? 1 : cols); ++c) any |= row[c * seen.col], every &= row[c * seen.col];
    }
    some = some || any;
    all = all && every;
    if (some && !all) return Tile::kMixed;
  }
  return all ? Tile::kFull : Tile::kEmpty;
}

// The mask's tile as numbers, 0 where it hides.
template <class S> inline void mask_to_numbers(const Seen& seen, int64_t rows, int64_t cols, S* dst, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = seen.mask + r * seen.row;
    if (seen.col == 1) {
      for (int64_t c = 0; c < cols; ++c) dst[r * ld + c] = row[c];
    } else {
      for (int64_t c = 0; c < cols; ++c) dst[r * ld + c] = row[c * seen.col];
    }
  }
}

// Of the keys [j, end): how many lie one behind the other, at most a tile; and where the first one's row is.
inline int64_t keys_at(const AttentionShape& s, int64_t j, int64_t end) {
  const int64_t keys = smaller(kKeyTile, end - j);
  return s.page_size == 0 ? keys : smaller(keys, s.page_size - j % s.page_size);
}
template <class T>
inline const T* row_at(const AttentionShape& s, const AttentionScores& h, const T* first, int64_t j, int64_t row, int64_t page) {
  return s.page_size == 0 ? first + j * row : first + h.pages[j / s.page_size] * page + j % s.page_size * row;
}

// --- scores to words --------------------------------------------------------------------------------------------------
// A vector from each of `terms` consecutive rows, to one vector of words that span the rows.
template <class W> inline word_vec<W> span_rows(const sum_vec<W> (&rows)[1]) { return rows[0]; }
// `terms` consecutive vectors of a row, to one vector of words that span columns.
template <class W> inline word_vec<W> span_cols(const sum_vec<W> (&vectors)[1]) { return vectors[0]; }
#if defined(__AVX512BF16__)
template <class W> inline u32v span_cols(const f32v (&vectors)[2]) {
  return (u32v)_mm512_cvtne2ps_pbh((__m512)vectors[1], (__m512)vectors[0]);
}
template <class W> inline u32v span_rows(const f32v (&rows)[2]) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (u32v)_mm512_permutexvar_epi16(interleave, (__m512i)span_cols<W>(rows));
}
#endif
template <class W> inline void store_words(W* p, word_vec<W> v) { std::memcpy(p, &v, sizeof v); }

// --- what changes a score -----------------------------------------------------------------------------------------------
// Of a tile whose first query is i and whose first key is j: softcap and ALiBi, on scores to base 2.
template <class V> struct ScoreChange {
  bool capped, sloped;
  V cap, inverse_cap, slope;
  int64_t shift;

  ScoreChange(const AttentionShape& s, const AttentionScores& h, int64_t i, int64_t j)
      : capped(s.softcap > 0), sloped(h.slope != 0 || h.dslope != nullptr), cap(splat<V>(s.softcap * kLog2E)),
        inverse_cap(splat<V>(capped ? 1 / (s.softcap * kLog2E) : 0)), slope(splat<V>(h.slope * kLog2E)),
        shift(i + s.k_len - s.q_len - j) {}
  bool any() const { return capped || sloped; }

  // The changed score, the derivative of the cap, and what the slope is multiplied by, the last two where there are any.
  struct Changed {
    V score, passed, distance;
  };
  // For a query and a key of the tile, of which one is a vector.
  Changed operator()(V score, V query, V key) const {
    Changed to{score, V{}, V{}};
    if (capped) {
      const V u = tanh(score * inverse_cap);  // tanh(s / c)
      to.score = cap * u;
      to.passed = splat<V>(1) - u * u;
    }
    if (sloped) {
      const V d = query + splat<V>(shift) - key;
      to.distance = max(d, -d);
      to.score -= slope * to.distance;
    }
    return to;
  }
};

// --- forward ----------------------------------------------------------------------------------------------------------
template <class T> struct ForwardTiles {
  using W = word_t<T>;
  using S = sum_t<W>;
  static constexpr int kL = word_lanes<W>, kTerms = terms_of<W>;
  static constexpr int64_t kPanel = kBlockVectors * kL;  // queries whose scores are worked on at a time
  static constexpr int64_t kPanels = (kQueryBlock + kPanel - 1) / kPanel;
  static constexpr int64_t kStep = larger(kL, kBlockRows<W>);  // lanes of a panel whose keys end together

  int64_t q_words, k_ld, v_ld;
  W *q, *k, *v, *p;    // (panels, words of D, panel), (keys, words of D), (words of keys, Dv), (words of keys, panel)
  S *scores;           // (keys, panel)
  S *over, *numbers;   // bias, mask or dropout as it lies over the scores, (keys, panel); the latter before, (panel, keys)
  S *o, *top, *total;  // (queries, Dv); largest score and sum of 2^(score - top) so far, (queries)
  S *shrink;           // what the panel's earlier sums are multiplied by, (panel)
  size_t bytes;

  ForwardTiles(const AttentionShape& s, char* work) {
    q_words = (s.dim + kTerms - 1) / kTerms;
    k_ld = round_up(q_words, kL);
    v_ld = round_up(s.v_dim, kL);
    Arena arena{work};
    q = arena.take<W>(kPanels * q_words * kPanel);
    k = arena.take<W>(kKeyTile * k_ld);
    v = arena.take<W>(kKeyTile / kTerms * v_ld);
    scores = arena.take<S>(kKeyTile * kPanel);
    if constexpr (kTerms == 1) {
      p = scores;
    } else {
      p = arena.take<W>(kKeyTile / kTerms * kPanel);
    }
    over = arena.take<S>(round_up(kKeyTile, kL) * kPanel);
    numbers = arena.take<S>(kPanel * kKeyTile);
    o = arena.take<S>(kPanels * kPanel * v_ld);
    top = arena.take<S>(kPanels * kPanel);
    total = arena.take<S>(kPanels * kPanel);
    shrink = arena.take<S>(kPanel);
    bytes = arena.next - work;
  }
};

// Scores (keys, panel) to probabilities relative to the running maximum, which moves; returns whether any moved. Of them
// lane n has the first keys_of(n). Those where `kept`, which may be null, is 0 count in the sum alone; dropout's scale is
// left to the end.
template <class W, class KeysOf>
inline bool softmax_step(const KeysOf& keys_of, int64_t lanes, int64_t ld, const sum_t<W>* scores, const sum_t<W>* kept,
                         W* p, sum_t<W>* top, sum_t<W>* total, sum_t<W>* shrink) {
  using V = sum_vec<W>;
  constexpr int kTerms = terms_of<W>;
  constexpr int kChains = 4;  // maxima taken side by side, to hide the latency of one
  const V none = splat<V>(-INFINITY);
  bool moved = false;
  for (int64_t n = 0; n < lanes; n += word_lanes<W>) {
    const int64_t keys = keys_of(n);
    const V before = load(top + n);
    V chain[kChains] = {before, before, before, before};
    int64_t j = 0;
    for (; j + kChains <= keys; j += kChains) {
      for (int c = 0; c < kChains; ++c) chain[c] = max(load(scores + (j + c) * ld + n), chain[c]);
    }
    for (; j < keys; ++j) chain[0] = max(load(scores + j * ld + n), chain[0]);
    const V now = max(max(chain[0], chain[1]), max(chain[2], chain[3]));
    // Where nothing is visible yet, -inf - 0 makes every exponential 0; -inf - -inf would make it NaN.
    const V base = now == none ? V{} : now;
    const V factor = exp2(before - base);
    V sum{};
    for (j = 0; j < keys; j += kTerms) {
      V rows[kTerms];
      for (int t = 0; t < kTerms; ++t) {
        rows[t] = j + t < keys ? exp2(load(scores + (j + t) * ld + n) - base) : V{};
        sum += rows[t];
        if (kept != nullptr && j + t < keys) rows[t] = load(kept + (j + t) * ld + n) != V{} ? rows[t] : V{};
      }
      store_words(p + j / kTerms * ld + n, span_rows<W>(rows));
    }
    store(top + n, now);
    store(total + n, load(total + n) * factor + sum);
    store(shrink + n, factor);
    moved = moved || any(factor != splat<V>(1));
  }
  return moved;
}

// Panels of queries, the first at i, against one packed tile of keys, the first at j.
template <class T>
inline void forward_panel(const AttentionShape& s, const AttentionScores& h, const ForwardTiles<T>& t, int64_t panel,
                          int64_t rows, int64_t i, int64_t j, int64_t tile_keys, bool v_finite) {
  using W = word_t<T>;
  using V = sum_vec<W>;
  using Tiles = ForwardTiles<T>;
  constexpr int kL = Tiles::kL;
  constexpr int64_t kPanel = Tiles::kPanel;
  const Band band = band_at(s, i, j);
  const int64_t shift = band.upper, keys = smaller(tile_keys, rows + shift), lanes = round_up(rows, kL);
  if (keys <= 0 || keys - 1 < band.lower) return;
  const Seen seen = seen_at(s, h, i, j);
  const Tile masked = masked_tile(seen, rows, keys);
  if (masked == Tile::kEmpty) return;
  // Beyond these the triangle of scores is not computed, and what lies there does not count.
  auto keys_of = [&](int64_t n) { return smaller(keys, n / Tiles::kStep * Tiles::kStep + Tiles::kStep + shift); };
  for (int64_t n = 0, key = 0; n < lanes; n += Tiles::kStep) {
    const int64_t end = larger(key, round_up(keys_of(n), kBlockRows<W>));
    product<W, Left::kByRows, Into::kStore>(
        end - key, lanes - n, t.k + key * t.k_ld, t.k_ld, t.q + panel * t.q_words * kPanel + n, kPanel,
        t.scores + key * kPanel + n, kPanel, static_cast<sum_t<W>>(s.scale * kLog2E),
        [&](int64_t, int64_t, int64_t, int64_t) { return Depth{0, s.dim}; });
    key = end;
  }
  if (const ScoreChange<V> change(s, h, i, j); change.any()) {
    for (int64_t key = 0; key < keys; ++key) {
      for (int64_t n = 0; n < lanes; n += kL) {
        sum_t<W>* at = t.scores + key * kPanel + n;
        store(at, change(load(at), lane_numbers<V>() + splat<V>(n), splat<V>(key)).score);
      }
    }
  }
  if (h.bias != nullptr) {
    const sum_t<W>* bias = static_cast<const sum_t<W>*>(h.bias) + i * s.bias_row + j;
    pack_transposed(bias, s.bias_row, rows, keys, t.over, kPanel, kPanel);
    for (int64_t n = 0; n < keys * kPanel; n += kL) {
      store(t.scores + n, fma(load(t.over + n), splat<V>(kLog2E), load(t.scores + n)));
    }
  }
  const bool partial = !band.whole(rows, keys) || masked == Tile::kMixed;
  if (partial) {
    for (int64_t key = 0; key < keys; ++key) {
      if (key <= shift && key >= rows - 1 + band.lower) continue;  // every row sees it
      for (int64_t n = 0; n < lanes; n += kL) {
        sum_t<W>* at = t.scores + key * kPanel + n;
        auto row = lane_numbers<V>();
        auto visible = (row >= splat<V>(key - shift - n)) & (row <= splat<V>(key - band.lower - n));
        store(at, visible ? load(at) : splat<V>(-INFINITY));
      }
    }
  }
  if (masked == Tile::kMixed) {
    mask_to_numbers(seen, rows, keys, t.numbers, kKeyTile);
    pack_transposed(t.numbers, kKeyTile, rows, keys, t.over, kPanel, kPanel);
    for (int64_t n = 0; n < keys * kPanel; n += kL) {
      store(t.scores + n, load(t.over + n) != V{} ? load(t.scores + n) : splat<V>(-INFINITY));
    }
  }
  const sum_t<W>* kept = nullptr;
  if (s.drop_below != 0) {
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t keep[kKeyTile];
      keep_of(h.first_element + (i + r) * s.element_row + j, keys, s.seed, s.drop_below, keep);
      for (int64_t c = 0; c < keys; ++c) t.numbers[r * kKeyTile + c] = keep[c];
    }
    pack_transposed(t.numbers, kKeyTile, rows, keys, t.over, kPanel, kPanel);
    kept = t.over;
  }
  sum_t<W>* o = t.o + panel * kPanel * t.v_ld;
  if (softmax_step<W>(keys_of, lanes, kPanel, t.scores, kept, t.p, t.top + panel * kPanel, t.total + panel * kPanel, t.shrink)) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < t.v_ld; d += kL) {
        store(o + i * t.v_ld + d, load(o + i * t.v_ld + d) * splat<V>(t.shrink[i]));
      }
    }
  }
  if (partial && !v_finite) {
    product_of_some<W, Left::kByDepth>(rows, t.v_ld, keys, t.p, kPanel, t.v, t.v_ld, o, t.v_ld, seen);
  } else {
    product<W, Left::kByDepth, Into::kAdd>(
        round_up(rows, kBlockRows<W>), t.v_ld, t.p, kPanel, t.v, t.v_ld, o, t.v_ld, 1,
        [&](int64_t row, int64_t count, int64_t, int64_t) { return Depth{0, smaller(keys, row + count + shift)}; });
  }
}

// A row's largest score and sum before its first key.
template <class S> inline S first_top(const AttentionScores& h) { return static_cast<S>(h.sink * kLog2E); }
template <class S> inline S first_total(const AttentionScores& h) { return h.sink == -INFINITY ? S(0) : S(1); }

// A row of o and its lse from the sums; one that sees nothing, nor a sink, has o = 0 and lse = -inf.
template <class T>
inline void finish_row(const AttentionShape& s, const compute_t<T>* sums, compute_t<T> top, compute_t<T> total, T* o,
                       compute_t<T>* lse) {
  using V = vec_t<T>;
  const V inverse = splat<V>(total == 0 ? 0 : static_cast<compute_t<T>>(s.keep_scale) / total);
  for_each_vector<V>(s.v_dim, [&](int64_t d, int count) { store_count(o + d, load(sums + d) * inverse, count); });
  *lse = total == 0 ? -INFINITY
                    : static_cast<compute_t<T>>((static_cast<double>(top) + std::log2(static_cast<double>(total))) * kLn2);
}

// sums = factor sums + p v over the keys that count: what others hold may not be finite. kVectors of v, the last of `count`.
template <int kVectors, class T, class Counts>
inline void add_values(const T* v, int64_t row, int64_t keys, int64_t count, const compute_t<T>* p, vec_t<T> factor,
                       compute_t<T>* sums, const Counts& counts) {
  using V = vec_t<T>;
  constexpr int kL = lanes_of<V>;
  V even[kVectors], odd[kVectors] = {};
  for (int n = 0; n < kVectors; ++n) even[n] = load(sums + n * kL) * factor;
  auto add = [&](int64_t key, V(&into)[kVectors]) {
    if (!counts(key)) return;
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      into[n] = fma(splat<V>(p[key]), load_count(v + key * row + n * kL, kVectors > 1 ? kL : static_cast<int>(count)), into[n]);
    }
  };
  int64_t key = 0;
  for (; key + 2 <= keys; key += 2) add(key, even), add(key + 1, odd);
  if (key < keys) add(key, even);
  for (int n = 0; n < kVectors; ++n) store(sums + n * kL, even[n] + odd[n]);
}

// One query, the i-th, against all keys, read where they lie: where there are few queries, packing keys for whole blocks
// of them costs a multiple of reading them. No dropout.
template <class T>
void attend_row(const AttentionShape& s, const AttentionScores& h, const T* q, const T* k, const T* v, T* o,
                compute_t<T>* lse, int64_t i) {
  using S = compute_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kL = lanes_of<V>, kMostDim = 256;
  S query[kMostDim] = {}, sums[kMostDim] = {}, scores[kKeyTile];
  const V scale = splat<V>(s.scale * kLog2E);
  for_each_vector<V>(s.dim, [&](int64_t d, int count) { store(query + d, load_count(q + d, count) * scale); });
  const Seen seen = seen_at(s, h, i, 0);
  S top = first_top<S>(h), total = first_total<S>(h);
  const ScoreChange<V> change(s, h, i, 0);
  const int64_t end = smaller(s.k_len, i + s.diagonal + 1);
  for (int64_t j = larger(0, i + s.lower), keys = 0; j < end; j += keys) {
    keys = keys_at(s, j, end);
    const T* k_tile = row_at(s, h, k, j, s.k_row, s.k_page);
    const T* v_tile = row_at(s, h, v, j, s.v_row, s.v_page);
    V tops = splat<V>(-INFINITY);
    for (int64_t n = 0; n < keys; n += kL) {
      const int lanes = static_cast<int>(smaller(kL, keys - n));
      V products[kL] = {};
      for (int key = 0; key < lanes; ++key) {
        const T* row = k_tile + (n + key) * s.k_row;
        for_each_vector<V>(s.dim, [&](int64_t d, int count) {
          products[key] = fma(load_count(row + d, count), load(query + d), products[key]);
        });
      }
      transpose_from<kL / 2>(products);
      V score{};
      for (int64_t d = 0; d < kL; ++d) score += products[d];
      if (change.any()) score = change(score, V{}, lane_numbers<V>() + splat<V>(j + n)).score;
      if (h.bias != nullptr) {
        const S* bias = static_cast<const S*>(h.bias) + i * s.bias_row + j + n;
        score = fma(load_count(bias, lanes), splat<V>(kLog2E), score);
      }
      score = first_of(score, lanes, splat<V>(-INFINITY));
      if (seen.mask != nullptr) {
        for (int key = 0; key < lanes; ++key) score[key] = seen(0, j + n + key) ? score[key] : -INFINITY;
      }
      store(scores + n, score);
      tops = max(score, tops);
    }
    S before = top;
    for (int lane = 0; lane < kL; ++lane) top = tops[lane] > top ? tops[lane] : top;
    // As in softmax_step: where nothing is visible yet, -inf - 0 makes every exponential 0, and NaN stays NaN.
    const V base = splat<V>(top == -INFINITY ? 0 : top), factor = exp2(splat<V>(before) - base);
    V added{};
    for (int64_t n = 0; n < keys; n += kL) {
      V p = exp2(load(scores + n) - base);
      store(scores + n, p);
      added += p;
    }
    total = total * factor[0] + reduce_add(added);
    const auto counts = [&](int64_t key) { return seen.mask == nullptr || seen(0, j + key); };
    int64_t d = 0;
    for (; d + 4 * kL <= s.v_dim; d += 4 * kL) add_values<4>(v_tile + d, s.v_row, keys, kL, scores, factor, sums + d, counts);
    for (; d < s.v_dim; d += kL) {
      add_values<1>(v_tile + d, s.v_row, keys, smaller(kL, s.v_dim - d), scores, factor, sums + d, counts);
    }
  }
  finish_row<T>(s, sums, top, total, o, lse);
}

template <class T>
void attention_forward_of(const AttentionShape& s, const AttentionScores& h, const T* q, const T* k, const T* v, T* o, compute_t<T>* lse,
                          int64_t begin, int64_t end, char* work) {
  using W = word_t<T>;
  using Tiles = ForwardTiles<T>;
  constexpr int kTerms = Tiles::kTerms;
  constexpr int64_t kPanel = Tiles::kPanel;
  if (h.sink == INFINITY) {  // it has all of the weight; inf - inf would say nothing
    for (int64_t i = begin; i < end; ++i) {
      for_each_vector<vec_t<T>>(s.v_dim, [&](int64_t d, int count) { store_count(o + i * s.o_row + d, vec_t<T>{}, count); });
      lse[i] = INFINITY;
    }
    return;
  }
  if (s.q_len <= kFewQueries && s.drop_below == 0) {
    for (int64_t i = begin; i < end; ++i) attend_row(s, h, q + i * s.q_row, k, v, o + i * s.o_row, lse + i, i);
    return;
  }
  const Tiles t(s, work);
  [[maybe_unused]] const ProductScope<W> scope;
  const int64_t panels = (end - begin + kPanel - 1) / kPanel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    int64_t i = begin + panel * kPanel;
    pack_transposed(q + i * s.q_row, s.q_row, smaller(kPanel, end - i), s.dim, t.q + panel * t.q_words * kPanel, kPanel,
                    kPanel);
  }
  for (int64_t i = 0; i < panels * kPanel; ++i) {
    t.top[i] = first_top<compute_t<T>>(h);
    t.total[i] = first_total<compute_t<T>>(h);
  }
  std::memset(t.o, 0, panels * kPanel * t.v_ld * sizeof(*t.o));

  const int64_t visible = smaller(s.k_len, end + s.diagonal);  // keys that the last query sees
  // The tile of the first query's first, counted from its page, so that tiles do not depend on where a block begins.
  int64_t first = larger(0, begin + s.lower);
  const int64_t page = s.page_size == 0 ? 0 : first / s.page_size * s.page_size;
  first = page + (first - page) / kKeyTile * kKeyTile;
  for (int64_t j = first, keys = 0; j < visible; j += keys) {
    keys = keys_at(s, j, visible);
    pack_rows(row_at(s, h, k, j, s.k_row, s.k_page), s.k_row, keys, s.dim, t.k, t.k_ld, round_up(keys, kBlockRows<W>));
    bool v_finite = pack_depth(row_at(s, h, v, j, s.v_row, s.v_page), s.v_row, keys, s.v_dim, t.v, t.v_ld, round_up(keys, kTerms));
    for (int64_t panel = 0; panel < panels; ++panel) {
      int64_t i = begin + panel * kPanel;
      forward_panel<T>(s, h, t, panel, smaller(kPanel, end - i), i, j, keys, v_finite);
    }
  }

  for (int64_t i = 0; i < end - begin; ++i) {
    finish_row<T>(s, t.o + i * t.v_ld, t.top[i], t.total[i], o + (begin + i) * s.o_row, lse + begin + i);
  }
}

// --- backward ---------------------------------------------------------------------------------------------------------
template <class T> struct BackwardTiles {
  using W = word_t<T>;
  using S = sum_t<W>;
  static constexpr int kL = word_lanes<W>, kTerms = terms_of<W>;

  int64_t rows_padded;             // of the arrays over queries
  int64_t d_words, v_words;        // row lengths of what lies by rows: words of D and of Dv
  int64_t d_ld, v_ld;              // row lengths of what lies by depth
  S *lse, *delta;                  // (heads, queries): lse / ln 2; sum of do * o over Dv, less dlse
  W *k_turned, *v_turned, *k;      // (words of D, keys), (words of Dv, keys), (words of keys, D)
  W *q, *dout;                     // (queries, words of D), (queries, words of Dv)
  W *q_deep, *dout_deep;           // (words of queries, D), (words of queries, Dv): the same where a word is one term
  S *scores, *ds;                  // (queries, keys)
  W *p_deep, *ds_deep, *ds_words;  // (words of queries, keys) twice, (queries, words of keys): likewise
  S *dk, *dv;                      // (keys, D), (keys, Dv)
  S *seen, *kept;                  // (queries, keys): 0 where the mask hides a key; 0 or 1 / (1 - p), by dropout
  size_t bytes;

  BackwardTiles(const AttentionShape& s, int64_t heads, char* work) {
    rows_padded = round_up(s.q_len, kQueryTile) + kQueryTile;
    d_words = round_up((s.dim + kTerms - 1) / kTerms, kL);
    v_words = round_up((s.v_dim + kTerms - 1) / kTerms, kL);
    d_ld = round_up(s.dim, kL);
    v_ld = round_up(s.v_dim, kL);
    Arena arena{work};
    lse = arena.take<S>(heads * rows_padded);
    delta = arena.take<S>(heads * rows_padded);
    k_turned = arena.take<W>(d_words * kKeyTile);
    v_turned = arena.take<W>(v_words * kKeyTile);
    k = arena.take<W>(kKeyTile / kTerms * d_ld);
    q = arena.take<W>(kQueryTile * d_words);
    dout = arena.take<W>(kQueryTile * v_words);
    scores = arena.take<S>(kQueryTile * kKeyTile);
    ds = arena.take<S>(kQueryTile * kKeyTile);
    if constexpr (kTerms == 1) {
      q_deep = q, dout_deep = dout, p_deep = scores, ds_deep = ds_words = ds;
    } else {
      q_deep = arena.take<W>(kQueryTile / kTerms * d_ld);
      dout_deep = arena.take<W>(kQueryTile / kTerms * v_ld);
      p_deep = arena.take<W>(kQueryTile / kTerms * kKeyTile);
      ds_deep = arena.take<W>(kQueryTile / kTerms * kKeyTile);
      ds_words = arena.take<W>(kQueryTile * kKeyTile / kTerms);
    }
    dk = arena.take<S>(kKeyTile * d_ld);
    dv = arena.take<S>(kKeyTile * v_ld);
    seen = arena.take<S>(kQueryTile * kKeyTile);
    kept = arena.take<S>(kQueryTile * kKeyTile);
    bytes = arena.next - work;
  }
};

// p = 2^(scores - lse) and ds = p (dp - delta), from scores and dp (in `ds`), to words; 0 where query i does not see
// key j, or is padding: outside the band, hidden by the mask (in `seen`), j >= keys or i >= rows. The tile's first query
// is i0, its first key j0.
template <class T>
inline void score_gradients(const AttentionShape& s, const AttentionScores& h, const BackwardTiles<T>& t, int64_t i0,
                            int64_t j0, int64_t rows, int64_t padded, int64_t lanes, const compute_t<T>* lse,
                            const compute_t<T>* delta, bool partial, const Band& band, bool masked, int64_t keys) {
  using W = word_t<T>;
  using V = sum_vec<W>;
  constexpr int kTerms = terms_of<W>, kL = word_lanes<W>;
  const auto* bias = static_cast<const sum_t<W>*>(h.bias);
  auto* dbias = static_cast<sum_t<W>*>(h.dbias);
  if (bias != nullptr) bias += i0 * s.bias_row + j0;
  if (dbias != nullptr) dbias += i0 * s.dbias_row + j0;
  const ScoreChange<V> change(s, h, i0, j0);
  double dslope = 0;
  for (int64_t i = 0; i < padded; i += kTerms) {
    V row_dslope[kTerms] = {};
    for (int64_t n = 0; n < lanes; n += kL * kTerms) {
      V p_of[kTerms][kTerms], ds_of[kTerms][kTerms];  // by column, then row
      V ds_row[kTerms][kTerms];                       // by row, then column
      for (int r = 0; r < kTerms; ++r) {
        const V row_lse = splat<V>(lse[i + r]), row_delta = splat<V>(delta[i + r]);
        for (int c = 0; c < kTerms; ++c) {
          const int64_t j = n + c * kL, at = (i + r) * kKeyTile + j;
          const int count = static_cast<int>(i + r < rows ? larger(0, smaller(kL, keys - j)) : 0);
          const auto changed = change(load(t.scores + at), splat<V>(i + r), lane_numbers<V>() + splat<V>(j));
          V score = changed.score, dp = load(t.ds + at);
          if (bias != nullptr && count > 0) {
            score = fma(load_count(bias + (i + r) * s.bias_row + j, count), splat<V>(kLog2E), score);
          }
          V p = exp2(score - row_lse), dropped = p;
          if (s.drop_below != 0) {
            V kept = load(t.kept + at);
            dropped = kept == V{} ? V{} : p * kept;
            dp = kept == V{} ? V{} : dp * kept;
          }
          V ds = p * (dp - row_delta), raw = change.capped ? ds * changed.passed : ds;
          if (partial) {
            int64_t first = larger(i + r + band.lower, 0) - j, last = smaller(i + r + band.upper, j + count - 1) - j;
            auto visible = (lane_numbers<V>() >= splat<V>(first)) & (lane_numbers<V>() <= splat<V>(last));
            if (masked) visible = visible & (load(t.seen + at) != V{});
            dropped = visible ? dropped : V{};
            ds = visible ? ds : V{};
            raw = visible ? raw : V{};
          }
          p = dropped;
          if (dbias != nullptr && count > 0) {
            auto* at = dbias + (i + r) * s.dbias_row + j;
            store_count(at, h.add_dbias ? load_count(at, count) + ds : ds, count);
          }
          if (h.dslope != nullptr && count > 0) row_dslope[r] -= ds * changed.distance;
          p_of[c][r] = p;
          ds_of[c][r] = ds_row[r][c] = raw;
        }
      }
      for (int c = 0; c < kTerms; ++c) {
        int64_t at = i / kTerms * kKeyTile + n + c * kL;
        store_words(t.p_deep + at, span_rows<W>(p_of[c]));
        store_words(t.ds_deep + at, span_rows<W>(ds_of[c]));
      }
      if constexpr (kTerms > 1) {
        for (int r = 0; r < kTerms; ++r) {
          store_words(t.ds_words + (i + r) * (kKeyTile / kTerms) + n / kTerms, span_cols<W>(ds_row[r]));
        }
      }
    }
    if (h.dslope != nullptr) {
      for (const V& sum : row_dslope) dslope += reduce_add(sum);
    }
  }
  if (h.dslope != nullptr) *h.dslope += dslope;
}

// One tile of queries, the first at i, against the packed tile of `keys` keys, the first at j.
template <class T>
inline void backward_tile(const AttentionShape& s, const AttentionScores& h, const BackwardTiles<T>& t, const T* q,
                          const T* dout, int64_t rows, int64_t i, int64_t j, int64_t keys, bool k_finite,
                          const compute_t<T>* lse, const compute_t<T>* delta, compute_t<T>* dq) {
  using W = word_t<T>;
  constexpr int kTerms = terms_of<W>, kL = word_lanes<W>;
  const int64_t padded = round_up(rows, kBlockRows<W>), lanes = round_up(keys, kL * kTerms);
  const int64_t key_rows = round_up(keys, kBlockRows<W>);
  const Band band = band_at(s, i, j);
  const int64_t shift = band.upper;
  const Seen seen = seen_at(s, h, i, j);
  const Tile masked = masked_tile(seen, rows, keys);
  if (masked == Tile::kEmpty) return;
  // A padded query in a word with a real one counts: 0 times what its p became of a key that is not finite.
  const bool partial = keys < lanes || !band.whole(rows, keys) || rows % kTerms != 0 || masked == Tile::kMixed;
  if (masked == Tile::kMixed) mask_to_numbers(seen, rows, keys, t.seen, kKeyTile);
  if (s.drop_below != 0) {
    uint8_t keep[kKeyTile];
    const auto keep_scale = static_cast<sum_t<W>>(s.keep_scale);
    for (int64_t r = 0; r < rows; ++r) {
      keep_of(h.first_element + (i + r) * s.element_row + j, keys, s.seed, s.drop_below, keep);
      for (int64_t c = 0; c < keys; ++c) t.kept[r * kKeyTile + c] = static_cast<sum_t<W>>(keep[c]) * keep_scale;
    }
  }

  bool q_finite = pack_rows(q, s.q_row, rows, s.dim, t.q, t.d_words, padded);
  bool do_finite = pack_rows(dout, s.do_row, rows, s.v_dim, t.dout, t.v_words, padded);
  if constexpr (kTerms > 1) {
    pack_depth(q, s.q_row, rows, s.dim, t.q_deep, t.d_ld, padded);
    pack_depth(dout, s.do_row, rows, s.v_dim, t.dout_deep, t.v_ld, padded);
  }

  // (queries, keys): a block whose last query does not see its first key is not needed
  auto if_seen = [&](int64_t dim) {
    return [=](int64_t row, int64_t count, int64_t key, int64_t) {
      return Depth{0, key <= row + count - 1 + shift ? dim : 0};
    };
  };
  product<W, Left::kByRows, Into::kStore>(padded, lanes, t.q, t.d_words, t.k_turned, kKeyTile, t.scores, kKeyTile,
                                          static_cast<sum_t<W>>(s.scale * kLog2E), if_seen(s.dim));
  product<W, Left::kByRows, Into::kStore>(padded, lanes, t.dout, t.v_words, t.v_turned, kKeyTile, t.ds, kKeyTile, 1,
                                          if_seen(s.v_dim));
  score_gradients(s, h, t, i, j, rows, padded, lanes, lse, delta, partial, band, masked == Tile::kMixed, keys);

  // (keys, D) and (keys, Dv), sums over the queries that see the key
  auto by_key = [&](const W* left, const W* right, int64_t ld, sum_t<W>* into, bool finite) {
    if (partial && !finite) {
      product_of_some<W, Left::kByDepth>(keys, ld, rows, left, kKeyTile, right, ld, into, ld,
                                         [&](int64_t key, int64_t row) { return seen(row, key); });
    } else {
      product<W, Left::kByDepth, Into::kAdd>(
          key_rows, ld, left, kKeyTile, right, ld, into, ld, 1,
          [&](int64_t key, int64_t, int64_t, int64_t) { return Depth{larger(0, key - shift), rows}; });
    }
  };
  by_key(t.p_deep, t.dout_deep, t.v_ld, t.dv, do_finite);
  by_key(t.ds_deep, t.q_deep, t.d_ld, t.dk, q_finite);

  // (queries, D), sums over the keys that the query sees
  if (partial && !k_finite) {
    product_of_some<W, Left::kByRows>(rows, t.d_ld, keys, t.ds_words, kKeyTile / kTerms, t.k, t.d_ld, dq, t.d_ld, seen);
  } else {
    product<W, Left::kByRows, Into::kAdd>(
        padded, t.d_ld, t.ds_words, kKeyTile / kTerms, t.k, t.d_ld, dq, t.d_ld, 1,
        [&](int64_t row, int64_t count, int64_t, int64_t) { return Depth{0, smaller(keys, row + count + shift)}; });
  }
}

// lse in base 2 and delta, for the queries of one head; what pads them makes p = 0.
template <class T>
inline void prepare_rows(const AttentionShape& s, const T* o, const T* dout, const compute_t<T>* lse,
                         const compute_t<T>* dlse, int64_t padded, compute_t<T>* lse2, compute_t<T>* delta) {
  for (int64_t i = 0; i < padded; ++i) {
    // A query that sees nothing: 2^(score - inf) = 0.
    bool empty = i >= s.q_len || lse[i] == -INFINITY;
    lse2[i] = empty ? INFINITY : static_cast<compute_t<T>>(lse[i] * kLog2E);
    delta[i] = 0;
    if (i >= s.q_len) continue;
    vec_t<T> sum{};
    for_each_vector<vec_t<T>>(s.v_dim, [&](int64_t d, int count) {
      sum = fma(load_count(dout + i * s.do_row + d, count), load_count(o + i * s.o_row + d, count), sum);
    });
    delta[i] = reduce_add(sum) - (dlse != nullptr ? dlse[i] : 0);
  }
}

template <class T, class V>
inline void store_scaled(const compute_t<T>* src, int64_t ld, int64_t rows, int64_t cols, T* dst, int64_t stride,
                         V scale) {
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector<V>(cols, [&](int64_t c, int n) { store_count(dst + r * stride + c, load(src + r * ld + c) * scale, n); });
  }
}

template <class T>
void attention_backward_of(const AttentionShape& s, const AttentionGroup& g, int64_t begin, int64_t end,
                           compute_t<T>* dq_sums, char* work) {
  using W = word_t<T>;
  using V = sum_vec<W>;
  const BackwardTiles<T> t(s, g.heads, work);
  [[maybe_unused]] const ProductScope<W> scope;
  auto of_head = [](const auto* first, int64_t head, int64_t distance) { return first + head * distance; };
  const T *q = static_cast<const T*>(g.q), *dout = static_cast<const T*>(g.dout), *o = static_cast<const T*>(g.o);
  const T *k = static_cast<const T*>(g.k), *v = static_cast<const T*>(g.v);
  const auto *lse = static_cast<const compute_t<T>*>(g.lse), *dlse = static_cast<const compute_t<T>*>(g.dlse);
  for (int64_t h = 0; h < g.heads; ++h) {
    prepare_rows<T>(s, of_head(o, h, g.o_head), of_head(dout, h, g.do_head), of_head(lse, h, g.lse_head),
                    dlse != nullptr ? of_head(dlse, h, g.lse_head) : nullptr, t.rows_padded, t.lse + h * t.rows_padded,
                    t.delta + h * t.rows_padded);
  }
  std::memset(dq_sums, 0, g.heads * t.rows_padded * t.d_ld * sizeof(*dq_sums));

  for (int64_t j = begin; j < end; j += kKeyTile) {
    const int64_t keys = smaller(kKeyTile, end - j);
    pack_transposed(k + j * s.k_row, s.k_row, keys, s.dim, t.k_turned, kKeyTile, kKeyTile);
    pack_transposed(v + j * s.v_row, s.v_row, keys, s.v_dim, t.v_turned, kKeyTile, kKeyTile);
    const bool k_finite = pack_depth(k + j * s.k_row, s.k_row, keys, s.dim, t.k, t.d_ld, kKeyTile);
    std::memset(t.dk, 0, kKeyTile * t.d_ld * sizeof(*t.dk));
    std::memset(t.dv, 0, kKeyTile * t.v_ld * sizeof(*t.dv));
    for (int64_t h = 0; h < g.heads; ++h) {
      AttentionScores scores = g.scores;
      if (scores.mask != nullptr) scores.mask += h * g.mask_head;
      if (scores.bias != nullptr) scores.bias = static_cast<const compute_t<T>*>(scores.bias) + h * g.bias_head;
      if (scores.dbias != nullptr) scores.dbias = static_cast<compute_t<T>*>(scores.dbias) + h * g.dbias_head;
      if (g.slopes != nullptr) scores.slope = g.slopes[h];
      if (g.dslopes != nullptr) scores.dslope = g.dslopes + h * g.dslope_head;
      scores.first_element += h * g.element_head;
      const int64_t last = smaller(s.q_len, j + keys - s.lower);  // after the last query that sees a key
      for (int64_t i = larger(0, j - s.diagonal); i < last; i += kQueryTile) {
        const int64_t row = h * t.rows_padded + i;
        backward_tile<T>(s, scores, t, of_head(q, h, g.q_head) + i * s.q_row, of_head(dout, h, g.do_head) + i * s.do_row,
                         smaller(kQueryTile, s.q_len - i), i, j, keys, k_finite, t.lse + row, t.delta + row,
                         dq_sums + row * t.d_ld);
      }
    }
    if (g.dk_sums != nullptr) {
      using S = compute_t<T>;
      std::memcpy(static_cast<S*>(g.dk_sums) + j * t.d_ld, t.dk, keys * t.d_ld * sizeof(S));
      std::memcpy(static_cast<S*>(g.dv_sums) + j * t.v_ld, t.dv, keys * t.v_ld * sizeof(S));
      continue;
    }
    store_scaled(t.dk, t.d_ld, keys, s.dim, static_cast<T*>(g.dk) + j * s.dk_row, s.dk_row,
                 splat<V>(s.scale));
    store_scaled(t.dv, t.v_ld, keys, s.v_dim, static_cast<T*>(g.dv) + j * s.dv_row, s.dv_row, splat<V>(1));
  }
}

// Rows of the sum over `parts` arrays, `part` apart, in order, scaled.
template <class T>
inline void store_sum_of_parts(const compute_t<T>* sums, int64_t ld, int64_t rows, int64_t cols, int64_t part,
                               int64_t parts, T* dst, int64_t stride, vec_t<T> scale) {
  for (int64_t i = 0; i < rows; ++i, sums += ld, dst += stride) {
    for_each_vector<vec_t<T>>(cols, [&](int64_t d, int n) {
      vec_t<T> sum = load(sums + d);
      for (int64_t p = 1; p < parts; ++p) sum += load(sums + p * part + d);
      store_count(dst + d, sum * scale, n);
    });
  }
}

template <class T>
void finish_dq_of(const AttentionShape& s, const AttentionGroup& g, const compute_t<T>* sums, int64_t parts) {
  const BackwardTiles<T> t(s, g.heads, nullptr);
  const int64_t head = t.rows_padded * t.d_ld;
  for (int64_t h = 0; h < g.heads; ++h) {
    store_sum_of_parts(sums + h * head, t.d_ld, s.q_len, s.dim, g.heads * head, parts,
                       static_cast<T*>(g.dq) + h * g.dq_head, s.dq_row, splat<vec_t<T>>(s.scale));
  }
}

// --- table ------------------------------------------------------------------------------------------------------------
template <class T>
void attention_forward(const AttentionShape& s, const AttentionScores& scores, const void* q, const void* k,
                       const void* v, void* o, void* lse, int64_t begin, int64_t end, void* work) {
  attention_forward_of<T>(s, scores, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                          static_cast<T*>(o), static_cast<compute_t<T>*>(lse), begin, end, static_cast<char*>(work));
}
template <class T> size_t attention_forward_bytes(const AttentionShape& s) { return ForwardTiles<T>(s, nullptr).bytes; }

template <class T>
void attention_backward(const AttentionShape& s, const AttentionGroup& group, int64_t begin, int64_t end, void* dq_sums,
                        void* work) {
  attention_backward_of<T>(s, group, begin, end, static_cast<compute_t<T>*>(dq_sums), static_cast<char*>(work));
}
template <class T> size_t attention_backward_bytes(const AttentionShape& s, int64_t heads) {
  return BackwardTiles<T>(s, heads, nullptr).bytes;
}
template <class T> int64_t attention_dq_sums_count(const AttentionShape& s, int64_t heads) {
  const BackwardTiles<T> t(s, heads, nullptr);
  return heads * t.rows_padded * t.d_ld;
}
template <class T> int64_t attention_dk_sums_count(const AttentionShape& s) {
  return s.k_len * BackwardTiles<T>(s, 1, nullptr).d_ld;
}
template <class T> int64_t attention_dv_sums_count(const AttentionShape& s) {
  return s.k_len * BackwardTiles<T>(s, 1, nullptr).v_ld;
}
template <class T>
void attention_finish_dk(const AttentionShape& s, const AttentionGroup& g, const void* dk, const void* dv, int64_t parts) {
  using S = compute_t<T>;
  const BackwardTiles<T> t(s, 1, nullptr);
  store_sum_of_parts(static_cast<const S*>(dk), t.d_ld, s.k_len, s.dim, s.k_len * t.d_ld, parts, static_cast<T*>(g.dk), s.dk_row,
                     splat<vec_t<T>>(s.scale));
  store_sum_of_parts(static_cast<const S*>(dv), t.v_ld, s.k_len, s.v_dim, s.k_len * t.v_ld, parts, static_cast<T*>(g.dv), s.dv_row,
                     splat<vec_t<T>>(1));
}
template <class T>
void attention_finish_dq(const AttentionShape& s, const AttentionGroup& group, const void* dq_sums, int64_t parts) {
  finish_dq_of<T>(s, group, static_cast<const compute_t<T>*>(dq_sums), parts);
}

constexpr AttentionKernels kAttentionKernels = {
    FASTLM_FOR_FLOATS(attention_forward),       FASTLM_FOR_FLOATS(attention_forward_bytes),
    FASTLM_FOR_FLOATS(attention_backward),      FASTLM_FOR_FLOATS(attention_backward_bytes),
    FASTLM_FOR_FLOATS(attention_dq_sums_count), FASTLM_FOR_FLOATS(attention_dk_sums_count),
    FASTLM_FOR_FLOATS(attention_dv_sums_count), FASTLM_FOR_FLOATS(attention_finish_dk),
    FASTLM_FOR_FLOATS(attention_finish_dq),
};

}  // namespace
}  // namespace fastlm::cpu::FASTLM_ISA
