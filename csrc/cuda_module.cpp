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
  border.check_same_dense(squared ? "relu_squared" : "relu", x, {&y});
  cuda::relu_forward({x.device, stream}, x.dtype, x.data, y.data, x.numel(), squared);
}

void relu_backward(const TensorView& dy, const TensorView& saved, const TensorView& dx, bool squared, uintptr_t stream) {
  border.check_same_dense(squared ? "relu_squared_backward" : "relu_backward", dy, {&saved, &dx});
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
cuda::attention::Operand operand(const TensorView& t) { return {t.data, t.strides[0], t.strides[1], t.strides[2]}; }

cuda::attention::Problem problem_of(const char* op, const Border::AttentionSizes& sizes, DType dtype, int64_t lower,
                                    int64_t upper, double scale) {
  FASTLM_CHECK(dtype != DType::kF64, op, ": q must be float32, float16 or bfloat16, got float64");
  for (const Border::Sizes* s : {&sizes.q, &sizes.k}) {
    FASTLM_CHECK(std::max({s->batch, s->heads, s->length}) < 1 << 30, op, ": no dimension may reach 2^30, got (", s->batch,
                 ", ", s->heads, ", ", s->length, ", ", s->width, ")");
  }
  FASTLM_CHECK(std::max(sizes.q.width, sizes.v.width) <= cuda::attention::kMaxWidth, op, ": head dims may be at most ",
               cuda::attention::kMaxWidth, ", got ", sizes.q.width, " and ", sizes.v.width);
  // Diagonals farther out than the corners mean the same as the corners.
  int queries = int(sizes.q.length), keys = int(sizes.k.length);
  cuda::attention::Mask mask{queries, keys, int(std::clamp<int64_t>(lower, -queries, keys)),
                             int(std::clamp<int64_t>(upper, -queries, keys))};
  return {dtype,
          int(sizes.q.batch),
          int(sizes.q.heads),
          int(sizes.k.heads),
          int(sizes.q.width),
          int(sizes.v.width),
          mask,
          float(scale)};
}

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                       const TensorView& lse, int64_t lower, int64_t upper, double scale, uintptr_t stream) {
  const char* op = "attention";
  border.check_device(op, q, q);
  Border::AttentionSizes sizes = border.check_attention(op, q, k, v);
  cuda::attention::Problem problem = problem_of(op, sizes, q.dtype, lower, upper, scale);
  border.check_operand(op, "o", q, o, sizes.o);
  border.check_per_query(op, "lse", q, lse);
  cuda::attention::forward({q.device, stream}, problem, operand(q), operand(k), operand(v), operand(o),
                           static_cast<float*>(lse.data));
}

void attention_backward(const TensorView& d_o, const OptionalTensor& dlse, const TensorView& q, const TensorView& k,
                        const TensorView& v, const TensorView& o, const TensorView& lse, const OptionalTensor& dq,
                        const OptionalTensor& dk, const OptionalTensor& dv, const TensorView& stats, int64_t lower,
                        int64_t upper, double scale, uintptr_t stream) {
  const char* op = "attention_backward";
  Border::AttentionSizes sizes = border.check_attention(op, q, k, v);
  cuda::attention::Problem problem = problem_of(op, sizes, q.dtype, lower, upper, scale);
  FASTLM_CHECK(dk.has_value() == dv.has_value(), op, ": dk and dv are computed together, got only one of them");
  border.check_operand(op, "do", q, d_o, sizes.o);
  border.check_operand(op, "o", q, o, sizes.o);
  border.check_per_query(op, "lse", q, lse);
  if (dlse) border.check_per_query(op, "dlse", q, *dlse);
  if (dq) border.check_operand(op, "dq", q, *dq, sizes.q);
  if (dk) border.check_operand(op, "dk", q, *dk, sizes.k);
  if (dv) border.check_operand(op, "dv", q, *dv, sizes.v);
  border.check_sums(op, "stats", q, stats, 2 * lse.numel());
  auto optional = [](const OptionalTensor& t) { return t ? operand(*t) : cuda::attention::Operand{}; };
  cuda::attention::backward({q.device, stream}, problem, operand(d_o),
                            dlse ? static_cast<const float*>(dlse->data) : nullptr, operand(q), operand(k), operand(v),
                            operand(o), static_cast<const float*>(lse.data), optional(dq), optional(dk), optional(dv),
                            stats.data);
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
  store_steps(items, steps);
}

}  // namespace
}  // namespace fastlm

PYBIND11_MODULE(FASTLM_MODULE, m) {
  namespace py = pybind11;
  namespace cuda = fastlm::cuda;
  fastlm::TensorReader::instance();  // here, and not in some thread's first call: it imports torch
  m.doc() =
      "fastlm's CUDA kernels. Outputs are allocated by the caller; every call names the stream it runs on, as the "
      "integer that torch gives. See fastlm/kernels/native.";
  m.def("runtime_version", &cuda::runtime_version, "The CUDA runtime compiled in: 13000 for 13.0.");
  m.def("driver_version", &cuda::driver_version, "The newest CUDA that the driver supports; 0 without a driver.");
  m.def("driver_problem", &cuda::driver_problem, "Why this module cannot run on this machine, or None.");
  m.def("use_exchange", [](bool on) { return fastlm::TensorReader::instance().use_exchange(on); },
        "Read tensors through torch's DLPack exchange capsule (the default where there is one); returns whether it is in use.");

  // Without the GIL: a launch may wait for room in the GPU's queue, or for the module's code to load.
  auto kernel = [&](const char* name, auto function, const char* doc = "") {
    m.def(name, function, doc, py::call_guard<py::gil_scoped_release>());
  };
  kernel("relu_forward", &fastlm::relu_forward);
  kernel("relu_backward", &fastlm::relu_backward);
  kernel("bias_act_forward", &fastlm::bias_act_forward);
  kernel("bias_act_backward", &fastlm::bias_act_backward);
  m.def("bias_act_chunks", &cuda::bias_act_chunks, "Rows of `partial` that bias_act_backward works in.");
  kernel("adam_step", &fastlm::adam_step, "steps stay on the CPU; everything else is on one device.");
  kernel("attention_forward", &fastlm::attention_forward, "Query i sees key j where i + lower <= j <= i + upper.");
  kernel("attention_backward", &fastlm::attention_backward);
}
