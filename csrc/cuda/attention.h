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

struct Problem {
  DType dtype;
  int batch, heads_q, heads_k;  // query head h reads key head h / (heads_q / heads_k)
  int width, width_v;           // head dims of q and k, of v and o
  Mask mask;
  float scale;
};

constexpr int kMaxWidth = 256;

// o = softmax(scale q k^T, masked) v; lse (B, Hq, Tq), contiguous: its natural log-sum-exp, -inf where a query sees
// nothing (o is 0 there).
void forward(const Target& target, const Problem& problem, const Operand& q, const Operand& k, const Operand& v,
             const Operand& o, float* lse);

// Gradients from d_o and dlse (contiguous, or null). dq, or both dk and dv, may be null: not wanted. `stats` is 8 bytes
// per query, to work in.
void backward(const Target& target, const Problem& problem, const Operand& d_o, const float* dlse, const Operand& q,
              const Operand& k, const Operand& v, const Operand& o, const float* lse, const Operand& dq,
              const Operand& dk, const Operand& dv, void* stats);

}  // namespace fastlm::cuda::attention
