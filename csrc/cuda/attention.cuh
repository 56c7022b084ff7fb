// Between the files of attention: arguments, and which of them does what.
//   attention.cu               which of the others a call takes, the statistics that backward starts from
//   attention_mma_forward.cu,
//   attention_mma_backward.cu  fp16 and bf16 on tensor cores, from sm_80 on
//   attention_sm90_forward.cu,
//   attention_sm90_backward.cu with Hopper's own instructions
//   attention_decode.cu        few queries against a cache, in both kinds of arithmetic
//   attention_f32.cu           fp32 arithmetic without tensor cores: float32 anywhere, every dtype on older devices
//
// Each kernel comes twice: for scores that are the scaled products alone, and with all of ScoreTerms, which are then
// looked for at run time.
#pragma once

#include "attention.h"
#include "common.cuh"
#include "philox.h"

namespace fastlm::cuda::attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

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
  float *dbias, *dslopes;
  float* dq_sums;  // (B, Hq, Tq, D), zero before, to add up dq in any order; null: in one order
  bool aligned;
};

// Whether this device runs the tensor-core kernels: whether they were compiled for sm_80 or later.
bool mma_runs(const Target& target);
bool on_tensor_cores(const Target& target, DType dtype);
// Whether every row of a tensor starts at a multiple of 16 bytes and is whole 16-byte vectors.
bool aligned(const Operand& x, int width, DType dtype);
// Whether the kernels for Hopper are asked for and can run: not chosen by themselves before they have run on a GPU.
bool sm90_chosen(const Target& target);
// With them, where they take the call: false else.
bool forward_sm90(const Target& target, const ForwardArgs& args);
void forward_mma(const Target& target, const ForwardArgs& args);
void forward_f32(const Target& target, const ForwardArgs& args);
bool backward_sm90_takes(const Target& target, const BackwardArgs& args);
bool backward_sm90(const Target& target, const BackwardArgs& args);
void backward_mma(const Target& target, const BackwardArgs& args);
void backward_f32(const Target& target, const BackwardArgs& args);

// --- blocks -----------------------------------------------------------------------------------------------------------
// What one block works on: some rows of one head of one sequence. `mask` counts rows from the sequence's first.
struct Block {
  Mask mask;
  int64_t batch, head, head_k;
  int query0, key0;  // where the sequence begins
  int first;         // row of the tile; past the end for a block without one

  // An operand's rows of this sequence.
  __device__ int64_t at_query(const Operand& x, int64_t of_head) const {
    return batch * x.batch + of_head * x.head + query0 * x.row;
  }
  __device__ int64_t at_key(const Operand& x, int64_t of_head) const {
    return batch * x.batch + of_head * x.head + key0 * x.row;
  }
  // A row's place among what is kept for each query.
  __device__ int64_t query_number(const Problem& problem, int64_t of_head, int row) const {
    return (batch * problem.heads_q + of_head) * problem.queries + query0 + row;
  }
};

inline int64_t blocks_of(const Problem& problem, bool of_keys, int tile_rows) {
  int rows = of_keys ? problem.keys : problem.queries;
  int64_t tiles = problem.packed.queries == nullptr ? ceil_div(rows, tile_rows)
                                                    : tile_numbers(rows, problem.packed.sequences, tile_rows);
  return int64_t(problem.batch) * (of_keys ? problem.heads_k : problem.heads_q) * tiles;
}

// The block of number `index`. Under a causal mask the last queries and the first keys have most to do: they go first, so that no long block starts
// late.
__device__ inline Block block_of(const Problem& problem, int64_t index, bool of_keys, int tile_rows) {
  const Packed& packed = problem.packed;
  int total = of_keys ? problem.keys : problem.queries;
  int64_t tiles = packed.queries == nullptr ? (total + tile_rows - 1) / tile_rows
                                            : tile_numbers(total, packed.sequences, tile_rows);
  int64_t tile = index % tiles;
  int heads = of_keys ? problem.heads_k : problem.heads_q, group = problem.heads_q / problem.heads_k;
  int64_t head = index / tiles % heads;
  Block block{{}, index / tiles / heads, head, of_keys ? head : head / group, 0, 0, 0};
  Rows queries{0, problem.queries}, keys{0, problem.keys};
  if (packed.queries != nullptr) {
    const int64_t* ends = of_keys ? packed.keys : packed.queries;
    int sequence = sequence_of(ends, packed.sequences, tile, tile_rows);
    tile -= first_tile(ends[sequence], sequence, tile_rows);
    queries = rows_of(packed.queries, sequence, problem.queries);
    keys = rows_of(packed.keys, sequence, problem.keys);
  }
  block.mask = problem.band.mask(queries.count, keys.count);
  block.query0 = queries.begin, block.key0 = keys.begin;
  int rows = of_keys ? keys.count : queries.count, own = (rows + tile_rows - 1) / tile_rows;
  block.first = tile < 0 || tile >= own ? rows : int(of_keys ? tile : own - 1 - tile) * tile_rows;
  return block;
}

// --- elements of any dtype in fp32 ---------------------------------------------------------------------------------------
// Four elements from `offset` on, widened; zeros from `count` on.
__device__ inline float4 load_four(const Operand& x, DType dtype, int64_t offset, int count, bool aligned) {
  if (dtype == DType::kF32) {
    const float* p = static_cast<const float*>(x.data) + offset;
    if (aligned && count >= 4) return *reinterpret_cast<const float4*>(p);
    return make_float4(count > 0 ? p[0] : 0, count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, count > 3 ? p[3] : 0);
  }
  auto at = [&](int i) {
    if (i >= count) return 0.0f;
    if (dtype == DType::kF16) return widen(static_cast<const f16*>(x.data)[offset + i]);
    return widen(static_cast<const bf16*>(x.data)[offset + i]);
  };
  return make_float4(at(0), at(1), at(2), at(3));
}

// --- scores -----------------------------------------------------------------------------------------------------------
// Positions count from the sequence's first row, as in Mask. Scores are in units of log 2.
template <bool kTerms> class Scores;

template <> class Scores<false> {
 public:
  __device__ Scores(const Problem& problem, const Block& block, int64_t) : mask_(block.mask), scale_(problem.scale * kLog2e) {}
  __device__ bool whole(int q0, int rows, int k0, int cols) const { return mask_.whole(q0, rows, k0, cols); }
  __device__ bool visible(int i, int j) const { return mask_.visible(i, j); }
  __device__ float score(float product, int, int) const { return product * scale_; }
  __device__ float keep_scale() const { return 1.0f; }

 private:
  Mask mask_;
  float scale_;
};

template <> class Scores<true> {
 public:
  // Of one query head.
  __device__ Scores(const Problem& problem, const Block& block, int64_t head)
      : terms_(problem.terms), mask_(block.mask), scale_(problem.scale), last_(block.mask.keys - block.mask.queries) {
    auto at = [&](const ScoresOperand& x) {
      return block.batch * x.batch + head * x.head + block.query0 * x.row + block.key0 * x.col;
    };
    hidden_ = terms_.mask.data == nullptr ? nullptr : static_cast<const uint8_t*>(terms_.mask.data) + at(terms_.mask);
    bias_ = terms_.bias.data == nullptr ? nullptr : static_cast<const float*>(terms_.bias.data) + at(terms_.bias);
    int64_t row = block.batch * problem.heads_q + head;
    slope_ = terms_.slopes == nullptr ? 0.0f : terms_.slopes[row];
    row_stride_ = problem.keys;
    element0_ = (row * problem.queries + block.query0) * row_stride_ + block.key0;
    seed_ = terms_.drop_below == 0 ? 0 : static_cast<uint64_t>(*terms_.seed);
  }
  __device__ bool whole(int q0, int rows, int k0, int cols) const {
    return hidden_ == nullptr && mask_.whole(q0, rows, k0, cols);
  }
  __device__ bool visible(int i, int j) const {
    return mask_.visible(i, j) &&
           (hidden_ == nullptr || (i < mask_.queries && hidden_[i * terms_.mask.row + j * terms_.mask.col] != 0));
  }
  // Of a pair that is visible, so that nothing is read past the ends.
  __device__ float score(float product, int i, int j) const {
    float s = product * scale_;
    if (terms_.softcap > 0) s = terms_.softcap * tanhf(s / terms_.softcap);
    if (bias_ != nullptr && i < mask_.queries) s += bias_[i * terms_.bias.row + j * terms_.bias.col];
    if (terms_.slopes != nullptr) s -= slope_ * distance(i, j);
    return s * kLog2e;
  }
  // By which softcap multiplies the gradient of a score.
  __device__ float slope_of_cap(float product) const {
    if (terms_.softcap == 0) return 1.0f;
    float t = tanhf(product * scale_ / terms_.softcap);
    return 1.0f - t * t;
  }
  __device__ float distance(int i, int j) const { return fabsf(float(j - i - last_)); }
  __device__ int64_t element(int i, int j) const { return element0_ + i * row_stride_ + j; }

  // By which dropout multiplies what it keeps. Weights take it with the sums that they go into: in fp16 it may be more than
  // a weight can hold.
  __device__ float keep_scale() const { return terms_.drop_below == 0 ? 1.0f : terms_.keep_scale; }
  // The same of one weight: 0 where it is dropped.
  __device__ float keep(int i, int j) const {
    if (terms_.drop_below == 0) return 1.0f;
    return kept(static_cast<uint64_t>(element(i, j)), seed_, terms_.drop_below) ? terms_.keep_scale : 0.0f;
  }
  // Whether those of keys j and j + 1 are kept.
  __device__ KeptPair keeps_pair(int i, int j) const {
    if (terms_.drop_below == 0) return {true, true};
    return kept_pair(static_cast<uint64_t>(element(i, j)), seed_, terms_.drop_below);
  }

 private:
  const ScoreTerms& terms_;
  Mask mask_;
  float scale_, slope_;
  int last_;
  const uint8_t* hidden_;
  const float* bias_;
  int64_t row_stride_, element0_;
  uint64_t seed_;
};

// run(std::integral_constant<int, n>) with the smallest n of those given that holds `width`.
template <int kD, int... kMore, class Run> void dispatch_padded(int width, const Run& run) {
  if constexpr (sizeof...(kMore) > 0) {
    if (width > kD) return dispatch_padded<kMore...>(width, run);
  }
  run(std::integral_constant<int, kD>{});
}

// The same for the kernels that come twice: run(the padded head dim, whether there are terms), both as types.
template <int... kWidths, class Run> void dispatch_kernel(const Problem& problem, const Run& run) {
  dispatch_padded<kWidths...>(problem.width > problem.width_v ? problem.width : problem.width_v, [&](auto width) {
    problem.terms.any() ? run(width, std::true_type{}) : run(width, std::false_type{});
  });
}

// Chosen, not multiplied: what is dropped may be NaN.
__device__ inline float kept(float x, float keep) { return keep == 0.0f ? 0.0f : x * keep; }

// --- softmax ----------------------------------------------------------------------------------------------------------
// exp2(s - max) without inf - inf where nothing was visible so far.
__device__ inline float finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ inline float final_lse(float max, float sum) {
  return sum == 0.0f ? -INFINITY : (finite_max(max) + log2f(sum)) * kLn2;
}
__device__ inline float final_factor(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// A sink joins the keys of a row as one more, which has no value: the row's weights become smaller by the returned factor.
__device__ inline float add_sink(const Problem& problem, const Block& block, float& max, float& sum) {
  if (problem.terms.sinks == nullptr) return 1.0f;
  float sink = problem.terms.sinks[block.batch * problem.heads_q + block.head] * kLog2e;
  if (sink == INFINITY) {  // it takes all of the weight
    max = INFINITY, sum = 1.0f;
    return 0.0f;
  }
  float new_max = fmaxf(max, sink), rescale = exp2_approx(max - finite_max(new_max));
  sum = sum * rescale + exp2_approx(sink - finite_max(new_max));
  max = new_max;
  return rescale;
}

}  // namespace fastlm::cuda::attention
