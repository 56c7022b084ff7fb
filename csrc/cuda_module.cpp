// fastlm._cuda: argument checks and bindings, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cuda/relu.h"
#include "cuda/runtime.h"
#include "cuda/target.h"
#include "tensor_view.h"

namespace fastlm {
namespace {

using OptionalTensor = std::optional<TensorView>;
using cuda::Target;

#ifdef FASTLM_DEVICE_EMULATION
constexpr bool kOnGpu = false;
#else
constexpr bool kOnGpu = true;
#endif

// `first` decides the device; `stream` is one of that device's.
void check_device(const char* op, const TensorView& first, const TensorView& t) {
  FASTLM_CHECK(t.cuda == kOnGpu && t.device == first.device, op, ": tensors must be on one CUDA device, got ",
               t.cuda ? "cuda:" : "cpu ", t.device);
}

void check_float(const char* op, const char* name, const TensorView& t) {
  FASTLM_CHECK(int(t.dtype) < kNumFloatDTypes, op, ": ", name, " must be a floating-point tensor, got ", t.describe());
}

// All of one dtype, dense, with the same sizes and strides, so that one flat loop pairs their elements.
void check_same_dense(const char* op, const TensorView& first, std::initializer_list<const TensorView*> others) {
  check_float(op, "the first tensor", first);
  check_device(op, first, first);
  FASTLM_CHECK(first.dense(), op, ": tensors must be dense, got ", first.describe());
  for (const TensorView* other : others) {
    check_device(op, first, *other);
    FASTLM_CHECK(other->dtype == first.dtype && same_layout(*other, first), op,
                 ": tensors must share dtype, sizes and strides; got ", first.describe(), " and ", other->describe());
  }
}

struct Rows {
  int64_t rows, cols;
};
Rows check_rows(const char* op, const TensorView& x, const TensorView& bias) {
  FASTLM_CHECK(x.contiguous() && x.ndim >= 1, op, ": x must be contiguous with at least one dimension, got ",
               x.describe());
  int64_t cols = x.shape[x.ndim - 1];
  check_device(op, x, bias);
  FASTLM_CHECK(bias.ndim == 1 && bias.shape[0] == cols && bias.contiguous() && bias.dtype == x.dtype, op,
               ": bias must be contiguous (", cols, ") of dtype ", dtype_name(x.dtype), ", got ", bias.describe());
  return {cols > 0 ? x.numel() / cols : 0, cols};
}

void relu_forward(const TensorView& x, const TensorView& y, bool squared, uintptr_t stream) {
  check_same_dense("relu", x, {&y});
  cuda::relu_forward({x.device, stream}, x.dtype, x.data, y.data, x.numel(), squared);
}

void relu_backward(const TensorView& dy, const TensorView& saved, const TensorView& dx, bool squared, uintptr_t stream) {
  check_same_dense("relu_backward", dy, {&saved, &dx});
  cuda::relu_backward({dy.device, stream}, dy.dtype, dy.data, saved.data, dx.data, dy.numel(), squared);
}

void bias_act_forward(const TensorView& x, const TensorView& bias, const TensorView& y, bool squared, uintptr_t stream) {
  check_same_dense("bias_act", x, {&y});
  auto [rows, cols] = check_rows("bias_act", x, bias);
  cuda::bias_act_forward({x.device, stream}, x.dtype, x.data, bias.data, y.data, rows, cols, squared);
}

void bias_act_backward(const TensorView& dy, const TensorView& saved, const TensorView& bias, const TensorView& dx,
                       const TensorView& dbias, const TensorView& partial, bool squared, uintptr_t stream) {
  check_same_dense("bias_act_backward", dy, {&saved, &dx});
  auto [rows, cols] = check_rows("bias_act_backward", dy, bias);
  DType sum = dy.dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  for (auto [t, name, numel] : {std::tuple{&dbias, "dbias", cols},
                                std::tuple{&partial, "partial", cuda::bias_act_chunks(rows) * cols}}) {
    check_device("bias_act_backward", dy, *t);
    FASTLM_CHECK(t->dtype == sum && t->contiguous() && t->numel() == numel, "bias_act_backward: ", name, " must be ",
                 numel, " contiguous elements of dtype ", dtype_name(sum), ", got ", t->describe());
  }
  cuda::bias_act_backward({dy.device, stream}, dy.dtype, dy.data, saved.data, bias.data, dx.data, dbias.data,
                          partial.data, rows, cols, squared);
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
}
