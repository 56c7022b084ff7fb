#pragma once

#include <cstdint>

#include "../dtype.h"
#include "attention_index.h"
#include "target.h"

namespace fastlm::cuda::attention {

// A (B, H, T, D) tensor whose last dimension is contiguous; strides in elements.
struct Operand {
  const void* data;
  int64_t batch, head, row;
};

// Ends of packed sequences, {0, ..., total} on the device, for queries and keys; null: none are packed. Then batch is 1.
struct Packed {
  const int64_t *queries, *keys;
  int sequences;
};

// A (B, Hq, Tq, Tk) tensor, any of whose strides may be 0.
struct ScoresOperand {
  const void* data;
  int64_t batch, head, row, col;
};

// What makes a score more than scale q k, and what befalls its weight; null and 0: nothing. On the device, tensors of a
// number for each head are (B, Hq), contiguous.
struct ScoreTerms {
  ScoresOperand mask, bias;      // uint8_t: 0 is hidden; float
  const float *slopes, *sinks;   // ALiBi: score - slope |j - i|, ends aligned; the weight of a key that has no value
  float softcap;
  uint32_t drop_below;           // a weight is dropped where its random word is smaller
  float keep_scale;              // of those that are not
  const int64_t* seed;

  bool any() const { return mask.data || bias.data || slopes || sinks || softcap > 0 || drop_below > 0; }
};

struct Problem {
  DType dtype;
  int batch, heads_q, heads_k;  // query head h reads key head h / (heads_q / heads_k)
  int queries, keys;            // in all, where sequences are packed
  int width, width_v;           // head dims of q and k, of v and o
  Band band;
  Packed packed;
  ScoreTerms terms;
  float scale;
};

constexpr int kMaxWidth = 256;

// o = softmax(scale q k^T, masked) v; lse (B, Hq, Tq), contiguous: its natural log-sum-exp, -inf where a query sees
// nothing (o is 0 there). Returns the family of kernels that does it: fp32, sm80 or sm90.
const char* forward(const Target& target, const Problem& problem, const Operand& q, const Operand& k, const Operand& v,
             const Operand& o, float* lse);

// Gradients from d_o and dlse (contiguous, or null). dq, or both dk and dv, may be null: not wanted. `stats` is 8 bytes
// per query, to work in. With dq also, if not null, dbias (B, Hq, Tq, Tk), zero before, and of the slopes what each
// query adds, dslopes (B, Hq, Tq); both contiguous. With dq_sums, (B, Hq, Tq, D), zero before, and all of dq, dk and dv, the
// last bits of dq may differ from call to call, where adds_in_any_order(). Returns the family.
const char* backward(const Target& target, const Problem& problem, const Operand& d_o, const float* dlse, const Operand& q,
              const Operand& k, const Operand& v, const Operand& o, const float* lse, const Operand& dq,
              const Operand& dk, const Operand& dv, float* dbias, float* dslopes, float* dq_sums, void* stats);

// Whether backward computes two products less of the same call with dq_sums.
bool adds_in_any_order(const Target& target, const Problem& problem, const Operand& d_o, const Operand& q, const Operand& k,
                       const Operand& v, const Operand& dq, const Operand& dk, const Operand& dv);

// Keys and values of sequences, (B, Hk, capacity, D), or in pages: then a page is where a sequence is in k and v, and
// `pages` (B, pages_row) lists those of each sequence. All of it on the device.
struct Cache {
  Operand k, v;
  const int64_t* lens;   // (B,) filled keys of each sequence
  const int64_t* pages;  // null: none
  int64_t pages_row, page_count;
  int page_size;
};

// Attention of `queries` queries of each sequence, the last of them at its last key, in problem.band; of problem.terms
// softcap, slopes and sinks. problem.keys is the capacity. `partial` has room for decode_splits() * B * Hq * Tq * (Dv + 2)
// floats.
int decode_splits(const Target& target, const Problem& problem);
void decode(const Target& target, const Problem& problem, const Operand& q, const Cache& cache, const Operand& o, float* lse,
            float* partial, int splits);

}  // namespace fastlm::cuda::attention
