// Attention: which kernels a call takes, and sum(d_o * o) per query, which backward starts from.
#include "attention.cuh"

namespace fastlm::cuda::attention {
namespace {

constexpr int kStatsThreads = 256;

template <class T>
__global__ void __launch_bounds__(kStatsThreads)
    stats_kernel(Problem problem, Operand d_o, Operand o, const float* lse, const float* dlse, float2* stats,
                 int64_t rows) {
  int64_t row = int64_t(blockIdx.x) * (kStatsThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;  // the whole warp
  int64_t i = row % problem.queries, head = row / problem.queries % problem.heads_q,
          batch = row / problem.queries / problem.heads_q;
  const T* a = static_cast<const T*>(d_o.data) + batch * d_o.batch + head * d_o.head + i * d_o.row;
  const T* b = static_cast<const T*>(o.data) + batch * o.batch + head * o.head + i * o.row;
  float sum = 0;
  for (int d = threadIdx.x % kWarp; d < problem.width_v; d += kWarp) sum += widen(a[d]) * widen(b[d]);
  sum = lanes_sum<kWarp>(sum);
  if (threadIdx.x % kWarp == 0) {
    float l = lse[row];
    stats[row] = make_float2(l == -INFINITY ? INFINITY : l * kLog2e, sum - (dlse != nullptr ? dlse[row] : 0.0f));
  }
}

}  // namespace

bool aligned(const Operand& x, int width, DType dtype) {
  int64_t size = size_of(dtype);
  return aligned16(x.data) && x.batch * size % 16 == 0 && x.head * size % 16 == 0 && x.row * size % 16 == 0 &&
         width * size % 16 == 0;
}

bool on_tensor_cores(const Target& target, DType dtype) { return dtype != DType::kF32 && mma_runs(target); }

const char* forward(const Target& target, const Problem& problem, const Operand& q, const Operand& k, const Operand& v,
             const Operand& o, float* lse) {
  ForwardArgs args{problem, q, k, v, o, lse, true};
  for (const Operand* x : {&q, &k}) args.aligned &= aligned(*x, problem.width, problem.dtype);
  for (const Operand* x : {&v, &o}) args.aligned &= aligned(*x, problem.width_v, problem.dtype);
  if (!on_tensor_cores(target, problem.dtype)) return forward_f32(target, args), "fp32";
  if (forward_sm90(target, args)) return "sm90";
  return forward_mma(target, args), "sm80";
}

static BackwardArgs backward_args(const Problem& problem, const Operand& d_o, const Operand& q, const Operand& k, const Operand& v,
                                  const Operand& dq, const Operand& dk, const Operand& dv) {
  BackwardArgs args{problem, q, k, v, d_o, dq, dk, dv, nullptr, nullptr, nullptr, nullptr, true};
  for (const Operand* x : {&q, &k, &dq, &dk}) {
    if (x->data != nullptr) args.aligned &= aligned(*x, problem.width, problem.dtype);
  }
  for (const Operand* x : {&v, &d_o, &dv}) {
    if (x->data != nullptr) args.aligned &= aligned(*x, problem.width_v, problem.dtype);
  }
  return args;
}

bool adds_in_any_order(const Target& target, const Problem& problem, const Operand& d_o, const Operand& q, const Operand& k,
                       const Operand& v, const Operand& dq, const Operand& dk, const Operand& dv) {
  return on_tensor_cores(target, problem.dtype) && backward_sm90_takes(target, backward_args(problem, d_o, q, k, v, dq, dk, dv));
}

const char* backward(const Target& target, const Problem& problem, const Operand& d_o, const float* dlse, const Operand& q,
              const Operand& k, const Operand& v, const Operand& o, const float* lse, const Operand& dq,
              const Operand& dk, const Operand& dv, float* dbias, float* dslopes, float* dq_sums, void* stats) {
  int64_t rows = int64_t(problem.batch) * problem.heads_q * problem.queries;
  dispatch_float(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      launch(target, "attention_backward", stats_kernel<T>, grid_of(ceil_div(rows, kStatsThreads / kWarp)), kStatsThreads,
             0, problem, d_o, o, lse, dlse, static_cast<float2*>(stats), rows);
    }
  });
  BackwardArgs args = backward_args(problem, d_o, q, k, v, dq, dk, dv);
  args.stats = static_cast<const float2*>(stats);
  args.dbias = dbias, args.dslopes = dslopes, args.dq_sums = dq_sums;
  if (!on_tensor_cores(target, problem.dtype)) return backward_f32(target, args), "fp32";
  if (backward_sm90(target, args)) return "sm90";
  return backward_mma(target, args), "sm80";
}

}  // namespace fastlm::cuda::attention
