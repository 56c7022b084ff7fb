// Between the files of attention: arguments, and which of them does what.
//   attention.cu      which of the others a call takes, the statistics that backward starts from
//   attention_mma.cu  fp16 and bf16 on tensor cores, from sm_80 on
//   attention_f32.cu  fp32 arithmetic without tensor cores: float32 anywhere, every dtype on older devices
#pragma once

#include "attention.h"
#include "common.cuh"

namespace fastlm::cuda::attention {

struct ForwardArgs {
  Problem problem;
  Operand q, k, v, o;
  float* lse;
  bool aligned;  // every row of every operand starts at a multiple of 16 bytes and is whole 16-byte vectors
};

struct BackwardArgs {
  Problem problem;
  Operand q, k, v, d_o, dq, dk, dv;
  const float2* stats;  // per query: {lse * log2(e), sum(d_o * o) - dlse}; lse -inf stands as +inf, which makes P zero
  bool aligned;
};

// Whether this device runs the tensor-core kernels: whether they were compiled for sm_80 or later.
bool mma_runs(const Target& target);
void forward_mma(const Target& target, const ForwardArgs& args);
void forward_f32(const Target& target, const ForwardArgs& args);
void backward_mma(const Target& target, const BackwardArgs& args);
void backward_f32(const Target& target, const BackwardArgs& args);

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The kernel of the smallest padded head dim that holds the operands; run(std::integral_constant<int, 64, 128 or 256>).
template <class Run> void dispatch_width(const Problem& problem, const Run& run) {
  int width = problem.width > problem.width_v ? problem.width : problem.width_v;
  if (width <= 64) return run(std::integral_constant<int, 64>{});
  if (width <= 128) return run(std::integral_constant<int, 128>{});
  run(std::integral_constant<int, 256>{});
}

// --- softmax ----------------------------------------------------------------------------------------------------------
// exp2(s - max) without inf - inf where nothing was visible so far.
__device__ inline float finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ inline float final_lse(float max, float sum) {
  return sum == 0.0f ? -INFINITY : (finite_max(max) + log2f(sum)) * kLn2;
}
__device__ inline float final_factor(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

}  // namespace fastlm::cuda::attention
