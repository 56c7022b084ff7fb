// fastlm._cuda: argument checks and bindings, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "cuda/adam.h"
#include "cuda/attention.h"
#include "cuda/relu.h"
#include "cuda/runtime.h"
#include "cuda/target.h"

namespace fastlm {
namespace {

#ifdef FASTLM_DEVICE_EMULATION
constexpr Border border{/*on_gpu=*/false};
#else
constexpr Border border{/*on_gpu=*/true};  // `stream` is one of the first tensor's device
#endif

void relu_forward(const TensorView& x, const TensorView& y, bool squared, uintptr_t stream) {
  border.check_same_dense("relu", x, {&y});
  cuda::relu_forward({x.device, stream}, x.dtype, x.data, y.data, x.numel(), squared);
}

void relu_backward(const TensorView& dy, const TensorView& saved, const TensorView& dx, bool squared, uintptr_t stream) {
  border.check_same_dense("relu_backward", dy, {&saved, &dx});
  cuda::relu_backward({dy.device, stream}, dy.dtype, dy.data, saved.data, dx.data, dy.numel(), squared);
}

void bias_act_forward(const TensorView& x, const TensorView& bias, const TensorView& y, bool squared, uintptr_t stream) {
  border.check_same_dense("bias_act", x, {&y});
  auto [rows, cols] = border.check_rows("bias_act", x, bias);
  cuda::bias_act_forward({x.device, stream}, x.dtype, x.data, bias.data, y.data, rows, cols, squared);
}

void bias_act_backward(const TensorView& dy, const TensorView& saved, const TensorView& bias, const TensorView& dx,
                       const TensorView& dbias, const TensorView& partial, bool squared, uintptr_t stream) {
  border.check_same_dense("bias_act_backward", dy, {&saved, &dx});
  auto [rows, cols] = border.check_rows("bias_act_backward", dy, bias);
  border.check_sums("bias_act_backward", "dbias", dy, dbias, cols);
  border.check_sums("bias_act_backward", "partial", dy, partial, cuda::bias_act_chunks(rows) * cols);
  cuda::bias_act_backward({dy.device, stream}, dy.dtype, dy.data, saved.data, bias.data, dx.data, dbias.data,
                          partial.data, rows, cols, squared);
}

// --- attention --------------------------------------------------------------------------------------------------------
struct Sizes {
  int64_t batch, heads, length, width;
};

// A (B, H, T, D) tensor that the kernels can read: whole rows, of the dtype of `first`.
cuda::attention::Operand check_operand(const char* op, const char* name, const TensorView& first, const TensorView& t,
                                       const Sizes& want) {
  border.check_device(op, first, t);
  FASTLM_CHECK(t.dtype == first.dtype && t.ndim == 4 && t.shape[0] == want.batch && t.shape[1] == want.heads &&
                   t.shape[2] == want.length && t.shape[3] == want.width,
               op, ": ", name, " must be ", dtype_name(first.dtype), " (", want.batch, ", ", want.heads, ", ", want.length,
               ", ", want.width, "), got ", t.describe());
  FASTLM_CHECK(t.strides[3] == 1 || want.width == 1, op, ": ", name, " must be contiguous in its last dimension, got ",
               t.describe());
  return {t.data, t.strides[0], t.strides[1], t.strides[2]};
}

float* check_per_query(const char* op, const char* name, const TensorView& first, const TensorView& t, int64_t batch,
                       int64_t heads, int64_t queries) {
  border.check_device(op, first, t);
  FASTLM_CHECK(t.dtype == DType::kF32 && t.contiguous() && t.ndim == 3 && t.shape[0] == batch && t.shape[1] == heads &&
                   t.shape[2] == queries,
               op, ": ", name, " must be float32 contiguous (", batch, ", ", heads, ", ", queries, "), got ",
               t.describe());
  return static_cast<float*>(t.data);
}

cuda::attention::Problem check_problem(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                                       int64_t lower, int64_t upper, double scale) {
  FASTLM_CHECK(q.dtype == DType::kF32 || q.dtype == DType::kF16 || q.dtype == DType::kBF16, op,
               ": q must be float32, float16 or bfloat16, got ", q.describe());
  for (const TensorView* t : {&q, &k, &v}) {
    FASTLM_CHECK(t->ndim == 4, op, ": q, k and v must have four dimensions, got ", t->describe());
    for (int i = 0; i < 4; ++i) {
      FASTLM_CHECK(t->shape[i] < 1 << 30, op, ": no dimension may reach 2^30, got ", t->describe());
    }
  }
  FASTLM_CHECK(k.shape[1] > 0 && q.shape[1] % k.shape[1] == 0, op, ": the heads of q, ", q.shape[1],
               ", must be a multiple of those of k, ", k.shape[1]);
  FASTLM_CHECK(q.shape[3] <= cuda::attention::kMaxWidth && v.shape[3] <= cuda::attention::kMaxWidth, op,
               ": head dims may be at most ", cuda::attention::kMaxWidth, ", got ", q.shape[3], " and ", v.shape[3]);
  // Diagonals farther out than the corners mean the same as the corners.
  int queries = int(q.shape[2]), keys = int(k.shape[2]);
  cuda::attention::Mask mask{queries, keys, int(std::clamp<int64_t>(lower, -queries, keys)),
                             int(std::clamp<int64_t>(upper, -queries, keys))};
  return {q.dtype, int(q.shape[0]), int(q.shape[1]), int(k.shape[1]), int(q.shape[3]), int(v.shape[3]),
          mask, float(scale)};
}

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                       const TensorView& lse, int64_t lower, int64_t upper, double scale, uintptr_t stream) {
  const char* op = "attention";
  cuda::attention::Problem problem = check_problem(op, q, k, v, lower, upper, scale);
  Sizes sizes_q{q.shape[0], q.shape[1], q.shape[2], q.shape[3]}, sizes_o{q.shape[0], q.shape[1], q.shape[2], v.shape[3]};
  Sizes sizes_k{q.shape[0], k.shape[1], k.shape[2], q.shape[3]}, sizes_v{q.shape[0], k.shape[1], k.shape[2], v.shape[3]};
  cuda::attention::forward({q.device, stream}, problem, check_operand(op, "q", q, q, sizes_q),
                           check_operand(op, "k", q, k, sizes_k), check_operand(op, "v", q, v, sizes_v),
                           check_operand(op, "o", q, o, sizes_o),
                           check_per_query(op, "lse", q, lse, q.shape[0], q.shape[1], q.shape[2]));
}

void attention_backward(const TensorView& d_o, const OptionalTensor& dlse, const TensorView& q, const TensorView& k,
                        const TensorView& v, const TensorView& o, const TensorView& lse, const OptionalTensor& dq,
                        const OptionalTensor& dk, const OptionalTensor& dv, const TensorView& stats, int64_t lower,
                        int64_t upper, double scale, uintptr_t stream) {
  const char* op = "attention_backward";
  cuda::attention::Problem problem = check_problem(op, q, k, v, lower, upper, scale);
  int64_t batch = q.shape[0], heads = q.shape[1], queries = q.shape[2];
  Sizes sizes_q{batch, heads, queries, q.shape[3]}, sizes_o{batch, heads, queries, v.shape[3]};
  Sizes sizes_k{batch, k.shape[1], k.shape[2], q.shape[3]}, sizes_v{batch, k.shape[1], k.shape[2], v.shape[3]};
  FASTLM_CHECK(dk.has_value() == dv.has_value(), op, ": dk and dv are computed together, got only one of them");
  border.check_device(op, q, stats);
  FASTLM_CHECK(stats.dtype == DType::kF32 && stats.contiguous() && stats.numel() == 2 * batch * heads * queries, op,
               ": stats must be ", 2 * batch * heads * queries, " contiguous float32, got ", stats.describe());
  auto optional = [&](const char* name, const OptionalTensor& t, const Sizes& sizes) {
    return t ? check_operand(op, name, q, *t, sizes) : cuda::attention::Operand{};
  };
  cuda::attention::backward(
      {q.device, stream}, problem, check_operand(op, "do", q, d_o, sizes_o),
      dlse ? check_per_query(op, "dlse", q, *dlse, batch, heads, queries) : nullptr, check_operand(op, "q", q, q, sizes_q),
      check_operand(op, "k", q, k, sizes_k), check_operand(op, "v", q, v, sizes_v), check_operand(op, "o", q, o, sizes_o),
      check_per_query(op, "lse", q, lse, batch, heads, queries), optional("dq", dq, sizes_q), optional("dk", dk, sizes_k),
      optional("dv", dv, sizes_v), stats.data);
}

// --- Adam -------------------------------------------------------------------------------------------------------------
void adam_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
               const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, const TensorList& steps, double lr,
               double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad, bool maximize,
               uintptr_t stream) {
  std::vector<AdamItem> items =
      border.check_adam(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad);
  if (items.empty()) return;
  cuda::adam_step({params[0].device, stream}, items, {lr, beta1, beta2, eps, weight_decay, decoupled, maximize});
}

}  // namespace
}  // namespace fastlm

PYBIND11_MODULE(FASTLM_MODULE, m) {
  namespace cuda = fastlm::cuda;
  m.doc() =
      "fastlm's CUDA kernels. Outputs are allocated by the caller; every call names the stream it runs on, as the "
      "integer that torch gives. See fastlm/kernels/native.";
  m.def("runtime_version", &cuda::runtime_version, "The CUDA runtime compiled in: 13000 for 13.0.");
  m.def("driver_version", &cuda::driver_version, "The newest CUDA that the driver supports; 0 without a driver.");
  m.def("driver_problem", &cuda::driver_problem, "Why this module cannot run on this machine, or None.");
  m.def("use_exchange", [](bool on) { return fastlm::TensorReader::instance().use_exchange(on); },
        "Read tensors through torch's DLPack exchange capsule (the default where there is one); returns whether it is in use.");

  m.def("relu_forward", &fastlm::relu_forward);
  m.def("relu_backward", &fastlm::relu_backward);
  m.def("bias_act_forward", &fastlm::bias_act_forward);
  m.def("bias_act_backward", &fastlm::bias_act_backward);
  m.def("bias_act_chunks", &cuda::bias_act_chunks, "Rows of `partial` that bias_act_backward works in.");
  m.def("adam_step", &fastlm::adam_step, "steps stay on the CPU; everything else is on one device.");
  m.def("attention_forward", &fastlm::attention_forward, "Query i sees key j where i + lower <= j <= i + upper.");
  m.def("attention_backward", &fastlm::attention_backward);
}
