#pragma once

#include <cstddef>
#include <cstdint>

#include "../../dtype.h"

namespace fastlm::cpu {

// One query head and the key head that it reads. Rows are positions; elements of a row stand next to each other.
struct AttentionShape {
  int64_t q_len, k_len;    // Tq, Tk
  int64_t dim, v_dim;      // D, Dv
  int64_t lower, diagonal;  // query i sees key j iff i + lower <= j <= i + diagonal; -q_len and k_len: every key
  double scale;
  double softcap;  // c > 0: the scaled score s becomes c tanh(s / c)
  int64_t q_row, k_row, v_row, o_row;      // distance between rows, in elements
  int64_t page_size, k_page, v_page;       // keys of a page, 0: not in pages; distance between pages
  int64_t do_row, dq_row, dk_row, dv_row;  // of the gradients
  int64_t mask_row, mask_col, bias_row;    // of one that is the same for all rows, or columns, 0
  int64_t dbias_row, element_row;          // element_row: between the numbers of elements, for dropout
  uint32_t drop_below;  // an element is dropped where its random word is less; 0: none is
  double keep_scale;    // 1 / (1 - dropout_p)
  uint64_t seed;
};

// What one query head's scores are changed by. Null where nothing.
struct AttentionScores {
  const uint8_t* mask;     // 0: query i does not see key j, which is true of hidden keys anyway
  const void *bias;        // (Tq, Tk), of the type of sums, added to the scaled scores
  void* dbias;             // (Tq, Tk), its gradient
  bool add_dbias;          // to what stands there
  double slope;            // ALiBi: slope |i + k_len - q_len - j| is subtracted from the scores
  double* dslope;          // where not null, its gradient is added there
  double sink;             // a logit that takes part in the softmax and carries no value; -inf: none
  uint64_t first_element;  // number of element (0, 0), for dropout
  const int64_t* pages;    // where keys lie in pages: in the forward, page j / page_size holds key j
};

// The query heads that read one key head: pointers to the first, and the distance between heads.
struct AttentionGroup {
  int64_t heads;
  const void *q, *k, *v, *o, *dout;
  const void *lse, *dlse;  // (heads, q_len), `lse_head` apart; dlse may be null
  void *dq, *dk, *dv;
  void *dk_sums, *dv_sums;  // where not null, dk and dv go there instead, as finish_dk takes them
  int64_t q_head, o_head, do_head, dq_head, lse_head;
  AttentionScores scores;  // of the first head; slope, dslope and sink stand below
  const double* slopes;    // one for each head, or null
  double* dslopes;
  int64_t mask_head, bias_head, dbias_head, dslope_head, element_head;
};

// Queries of a forward call: enough that packing a tile of keys costs little beside the products with it.
constexpr int64_t kQueryBlock = 256;
// Keys in the cache at a time.
constexpr int64_t kKeyTile = 128;

// Sums, lse and statistics are float, or double for float64. Indexed by DType; `work` is uninitialised memory of the
// stated size, aligned to 64 bytes.
struct AttentionKernels {
  // o and lse of queries [begin, end), at most kQueryBlock of them, of one head
  void (*forward[kNumFloatDTypes])(const AttentionShape& shape, const AttentionScores& scores, const void* q,
                                   const void* k, const void* v, void* o, void* lse, int64_t begin, int64_t end,
                                   void* work);
  size_t (*forward_bytes[kNumFloatDTypes])(const AttentionShape& shape);

  // dk and dv of keys [begin, end) of one group, and what these keys add to its dq: into dq_sums, written by this call,
  // still without the scale, of dq_sums_count() elements
  void (*backward[kNumFloatDTypes])(const AttentionShape& shape, const AttentionGroup& group, int64_t begin, int64_t end,
                                    void* dq_sums, void* work);
  size_t (*backward_bytes[kNumFloatDTypes])(const AttentionShape& shape, int64_t heads);
  int64_t (*dq_sums_count[kNumFloatDTypes])(const AttentionShape& shape, int64_t heads);

  // Elements of dk_sums, and of dv_sums
  int64_t (*dk_sums_count[kNumFloatDTypes])(const AttentionShape& shape);
  int64_t (*dv_sums_count[kNumFloatDTypes])(const AttentionShape& shape);
  // dk = scale * the sum over `parts` arrays of dk_sums, one behind the other, in order; dv likewise, without the scale
  void (*finish_dk[kNumFloatDTypes])(const AttentionShape& shape, const AttentionGroup& group, const void* dk_sums,
                                     const void* dv_sums, int64_t parts);

  // dq = scale * the sum over `parts` arrays of dq_sums, in order
  void (*finish_dq[kNumFloatDTypes])(const AttentionShape& shape, const AttentionGroup& group, const void* dq_sums,
                                     int64_t parts);
};

}  // namespace fastlm::cpu
