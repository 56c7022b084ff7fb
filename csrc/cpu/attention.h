#pragma once

#include <cstdint>

#include "../dtype.h"
#include "simd/attention.h"

namespace fastlm::cpu {

// Batches and heads around the shape of one head. Distances in elements; q_heads is a multiple of k_heads, and query
// head h reads key head h / (q_heads / k_heads). lse and dlse have one layout, their queries next to each other.
struct AttentionBatch {
  int64_t batch, q_heads, k_heads;
  AttentionShape shape;
  struct Distance {
    int64_t batch, head;
  };
  Distance q, k, v, o, lse, dout, dq, dk, dv, mask, bias, dbias, element;
  AttentionScores scores;  // of the first head of the first batch
  bool dbias_of_all;       // dbias is (1, q_heads, Tq, Tk), a sum over the batch, else (B, q_heads, Tq, Tk)
  const double *slopes, *sinks;  // (B, q_heads), of ALiBi and of the softmax; or null
  double* dslopes;               // (B, q_heads), or null
  const int64_t* k_lens;         // (B,): each row's k_len, to which lower and diagonal follow; or null
  const int64_t* pages;          // (B, pages of a row), or null
  int64_t pages_row;
};

void attention_forward(DType dtype, const AttentionBatch& batch, const void* q, const void* k, const void* v, void* o,
                       void* lse, int threads);
// dlse may be null: zero.
void attention_backward(DType dtype, const AttentionBatch& batch, const void* dout, const void* dlse, const void* q,
                        const void* k, const void* v, const void* o, const void* lse, void* dq, void* dk, void* dv,
                        int threads);

}  // namespace fastlm::cpu
