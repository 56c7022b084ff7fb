// Checks of arguments that the bindings of both modules share.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "act.h"
#include "optimizer_item.h"
#include "tensor_view.h"

namespace fastlm {

using OptionalTensor = std::optional<TensorView>;
using TensorList = std::vector<TensorView>;

inline void* data_of(const OptionalTensor& t) { return t ? t->data : nullptr; }

// The activation of an index into a module's `acts`.
inline Act act_of(const char* op, int act) {
  FASTLM_CHECK(act >= 0 && act < kNumActs, op, ": act must be an index into acts, got ", act);
  return static_cast<Act>(act);
}

// Where a module's tensors have to be: on the CPU, or on one GPU, which the first tensor of a call decides.
struct Border {
  bool on_gpu;
  static_assert(StepItem::kMaxDims == TensorView::kMaxDims);

  void check_device(const char* op, const TensorView& first, const TensorView& t) const {
    FASTLM_CHECK(t.cuda == on_gpu && t.device == first.device, op, ": tensors must be on ",
                 on_gpu ? "one CUDA device" : "cpu", ", got ", t.cuda ? "cuda:" : "cpu:", t.device);
  }

  void check_float(const char* op, const char* name, const TensorView& t) const {
    if (int(t.dtype) >= kNumFloatDTypes) fail_type(op, ": ", name, " must be floating point, got ", t.describe());
  }

  // All of one dtype, dense, with the same sizes and strides, so that one flat loop pairs their elements.
  void check_same_dense(const char* op, const TensorView& first, std::initializer_list<const TensorView*> others) const {
    check_float(op, "x", first);
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
  Rows check_rows(const char* op, const TensorView& x) const {
    FASTLM_CHECK(x.contiguous() && x.ndim >= 1, op, ": x must be contiguous with at least one dimension, got ",
                 x.describe());
    int64_t cols = x.shape[x.ndim - 1];
    return {cols > 0 ? x.numel() / cols : 0, cols};
  }
  Rows check_rows(const char* op, const TensorView& x, const TensorView& bias) const {
    auto [rows, cols] = check_rows(op, x);
    check_device(op, x, bias);
    FASTLM_CHECK(bias.ndim == 1 && bias.shape[0] == cols && bias.contiguous() && bias.dtype == x.dtype, op,
                 ": bias must be contiguous (", cols, ") of dtype ", dtype_name(x.dtype), ", got ", bias.describe());
    return {rows, cols};
  }

  // (rows, cols) as `like`, with whole rows; contiguous where that is asked for.
  void check_matrix(const char* op, const char* name, const TensorView& like, const TensorView& t, bool contiguous) const {
    check_device(op, like, t);
    FASTLM_CHECK(t.ndim == 2 && t.dtype == like.dtype && t.shape[0] == like.shape[0] && t.shape[1] == like.shape[1] &&
                     (contiguous ? t.contiguous() : t.strides[1] == 1 || t.shape[1] <= 1),
                 op, ": ", name, " must be a ", dtype_name(like.dtype), " matrix of the size of the others with ",
                 contiguous ? "contiguous memory" : "contiguous rows", ", got ", t.describe());
  }

  // A buffer of sums: contiguous, double for double, else float.
  void check_sums(const char* op, const char* name, const TensorView& first, const TensorView& t, int64_t numel) const {
    DType sum = sum_dtype(first.dtype);
    check_device(op, first, t);
    FASTLM_CHECK(t.dtype == sum && t.contiguous() && t.numel() == numel, op, ": ", name, " must be ", numel,
                 " contiguous elements of dtype ", dtype_name(sum), ", got ", t.describe());
  }

  // Of norms: sums, weights and biases are of sum_dtype.
  Rows check_norm(const char* op, const TensorView& x, const OptionalTensor& residual, const OptionalTensor& weight,
                  const OptionalTensor& bias, const TensorView& y, const OptionalTensor& sum) const {
    check_same_dense(op, x, {&y});
    Rows of = check_rows(op, x);
    FASTLM_CHECK(residual.has_value() == sum.has_value(), op, ": residual and sum go together");
    if (sum) check_same_dense(op, x, {&*residual, &*sum});
    if (weight) check_sums(op, "weight", x, *weight, of.cols);
    if (bias) check_sums(op, "bias", x, *bias, of.cols);
    return of;
  }
  Rows check_norm_backward(const char* op, const TensorView& dy, const OptionalTensor& dsum, const TensorView& s,
                           const OptionalTensor& weight, const TensorView& dx, const OptionalTensor& dweight,
                           const OptionalTensor& dbias) const {
    check_same_dense(op, dy, {&s, &dx});
    if (dsum) check_same_dense(op, dy, {&*dsum});
    Rows of = check_rows(op, dy);
    if (weight) check_sums(op, "weight", dy, *weight, of.cols);
    if (dweight) check_sums(op, "dweight", dy, *dweight, of.cols);
    if (dbias) check_sums(op, "dbias", dy, *dbias, of.cols);
    return of;
  }

  // Rows of logits, and of what is kept for each. Returns how many there are.
  int64_t check_cross_entropy(const char* op, const TensorView& x, const TensorView& target, const TensorView& loss,
                              const TensorView& lse) const {
    check_same_dense(op, x, {});
    check_matrix(op, "x", x, x, true);
    check_device(op, x, target);
    FASTLM_CHECK(target.dtype == DType::kI64 && target.ndim == 1 && target.contiguous() && target.shape[0] == x.shape[0], op,
                 ": target must be contiguous int64 (", x.shape[0], "), got ", target.describe());
    check_sums(op, "loss", x, loss, x.shape[0]);
    check_sums(op, "lse", x, lse, x.shape[0]);
    return x.shape[0];
  }

  // x of rows of `heads` heads for each position; tables (positions, R/2).
  void check_rope(const char* op, const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& y,
                  int64_t heads) const {
    check_same_dense(op, x, {&y});
    check_matrix(op, "x", x, x, true);
    FASTLM_CHECK(cos.ndim == 2 && cos.shape[0] > 0, op, ": cos must be (positions, R/2), got ", cos.describe());
    check_sums(op, "cos", x, cos, cos.shape[0] * cos.shape[1]);
    check_sums(op, "sin", x, sin, cos.shape[0] * cos.shape[1]);
    FASTLM_CHECK(heads > 0 && x.shape[0] % heads == 0 && 2 * cos.shape[1] <= x.shape[1], op, ": x must be rows of ", heads,
                 " heads with at least ", 2 * cos.shape[1], " elements, got ", x.describe());
  }

  // Of attention: (B, H, T, D) with whole rows.
  struct Sizes {
    int64_t batch, heads, length, width;
  };
  void check_operand(const char* op, const char* name, const TensorView& q, const TensorView& t, const Sizes& want) const {
    check_device(op, q, t);
    FASTLM_CHECK(t.dtype == q.dtype && t.ndim == 4 && t.shape[0] == want.batch && t.shape[1] == want.heads &&
                     t.shape[2] == want.length && t.shape[3] == want.width && (t.strides[3] == 1 || want.width <= 1 || t.numel() == 0),
                 op, ": ", name, " must be ", dtype_name(q.dtype), " (", want.batch, ", ", want.heads, ", ", want.length,
                 ", ", want.width, ") with a contiguous last dimension, got ", t.describe());
  }

  // One number for each query of q: float, double for double.
  void check_per_query(const char* op, const char* name, const TensorView& q, const TensorView& t) const {
    DType expected = sum_dtype(q.dtype);
    check_device(op, q, t);
    FASTLM_CHECK(t.ndim == 3 && t.shape[0] == q.shape[0] && t.shape[1] == q.shape[1] && t.shape[2] == q.shape[2] &&
                     t.dtype == expected && t.contiguous(),
                 op, ": ", name, " must be contiguous ", dtype_name(expected), " (", q.shape[0], ", ", q.shape[1], ", ",
                 q.shape[2], "), got ", t.describe());
  }

  // Sizes of q and o, of k, and of v, after checking that they fit.
  struct AttentionSizes {
    Sizes q, k, v, o;
  };
  AttentionSizes check_attention(const char* op, const TensorView& q, const TensorView& k, const TensorView& v) const {
    for (const TensorView* t : {&q, &k, &v}) {
      FASTLM_CHECK(t->ndim == 4, op, ": q, k and v must have 4 dimensions (B, H, T, D), got ", t->describe());
    }
    check_float(op, "q", q);
    FASTLM_CHECK(k.shape[1] > 0 ? q.shape[1] % k.shape[1] == 0 : q.shape[1] == 0, op,
                 ": the heads of q must be a multiple of those of k, got ", q.shape[1], " and ", k.shape[1]);
    AttentionSizes sizes{{q.shape[0], q.shape[1], q.shape[2], q.shape[3]},
                         {q.shape[0], k.shape[1], k.shape[2], q.shape[3]},
                         {q.shape[0], k.shape[1], k.shape[2], v.shape[3]},
                         {q.shape[0], q.shape[1], q.shape[2], v.shape[3]}};
    check_operand(op, "q", q, q, sizes.q);
    check_operand(op, "k", q, k, sizes.k);
    check_operand(op, "v", q, v, sizes.v);
    return sizes;
  }

  // What a step works on. Nothing is written; `steps` lie on the CPU, or with steps_on_gpu where the others are.
  struct StepLists {
    const TensorList &params, &grads, &first, &second, &top;  // empty where the step has none
    const TensorList &steps, &masters, &emas, &first_scales, &second_scales;
  };
  std::vector<StepItem> check_step(const char* op, const StepLists& given, const char* const (&names)[kStepTensors],
                                   bool steps_on_gpu = false) const {
    const TensorList* lists[kStepTensors] = {&given.params, &given.grads, &given.first, &given.second,
                                             &given.top, &given.masters, &given.emas};
    const TensorList& params = given.params;
    auto check_count = [&](const char* name, const TensorList& list) {
      FASTLM_CHECK(list.empty() || list.size() == params.size(), op, ": ", name, " must hold ", params.size(),
                   " tensors, got ", list.size());
    };
    for (int t = 0; t < kStepTensors; ++t) check_count(names[t], *lists[t]);
    check_count("steps", given.steps);
    FASTLM_CHECK(given.grads.size() == params.size(), op, ": grads must hold ", params.size(), " tensors, got 0");

    std::vector<StepItem> items(params.size());
    std::vector<void*> written;
    written.reserve(params.size() * (kStepTensors + 1));
    auto check_written = [&](const char* name, size_t i, const TensorView& tensor) {
      FASTLM_CHECK(!tensor.overlaps_itself(), op, ": ", name, "[", i,
                   "] is written, so no two of its elements may share memory, got ", tensor.describe());
      if (tensor.numel() > 0) written.push_back(tensor.data);
    };
    for (size_t i = 0; i < params.size(); ++i) {
      const TensorView& param = params[i];
      check_float(op, "params", param);
      StepItem& item = items[i];
      item.dtype = item.state_dtype = param.dtype;
      if (!given.first.empty() && given.first[i].dtype != param.dtype) {
        item.state_dtype = given.first[i].dtype;
        bool fits = item.state_dtype == DType::kF32 || item.state_dtype == DType::kU8 ||
                    (item.state_dtype == DType::kBF16 && param.dtype == DType::kF32);
        FASTLM_CHECK(fits && param.dtype != DType::kF64, op, ": ", names[kFirst], "[", i,
                     "] must be of the dtype of params[", i, "], ", param.describe(),
                     ", or float32, bfloat16 or uint8 where that is float32 or less, got ", given.first[i].describe());
      }
      item.n = param.numel();
      item.ndim = param.ndim;
      std::copy_n(param.shape, param.ndim, item.shape);
      item.flat = param.dense();
      for (int t = 0; t < kStepTensors; ++t) {
        if (lists[t]->empty()) continue;
        const TensorView& tensor = (*lists[t])[i];
        check_device(op, params[0], tensor);
        FASTLM_CHECK(tensor.dtype == item.dtype_of(t) && tensor.ndim == param.ndim &&
                         std::equal(param.shape, param.shape + param.ndim, tensor.shape),
                     op, ": ", names[t], "[", i, "] must have dtype ", dtype_name(item.dtype_of(t)), " and the sizes of params[",
                     i, "], ", param.describe(), ", got ", tensor.describe());
        if (t != kGrad) check_written(names[t], i, tensor);
        item.data[t] = tensor.data;
        std::copy_n(tensor.strides, param.ndim, item.strides[t]);
        item.flat = item.flat && same_layout(tensor, param);
      }
      FASTLM_CHECK(given.masters.empty() || size_of(param.dtype) == 2, op,
                   ": masters are for 16-bit parameters, got params[", i, "] ", param.describe());
      FASTLM_CHECK(item.state_dtype == DType::kU8 || (given.first_scales.empty() && given.second_scales.empty()), op,
                   ": scales are for states of 8 bits, got params[", i, "] ", param.describe(), " without");
      if (item.state_dtype == DType::kU8) check_scales(op, given, names, i, item);
      if (given.steps.empty()) {
        item.step = 0;
        continue;
      }
      const TensorView& step = given.steps[i];
      FASTLM_CHECK((steps_on_gpu || !step.cuda) && is_scalar(step), op, ": steps[", i,
                   "] must be one float32 or float64 on ", steps_on_gpu ? "the device of params" : "cpu", ", got ",
                   step.describe());
      check_written("steps", i, step);
      if (steps_on_gpu) {
        check_device(op, params[0], step);
        continue;
      }
      item.step = (step.dtype == DType::kF64 ? *static_cast<double*>(step.data) : *static_cast<float*>(step.data)) + 1;
    }
    std::sort(written.begin(), written.end());
    auto twice = std::adjacent_find(written.begin(), written.end());
    if (twice != written.end()) fail_shared(op, given, lists, names, *twice);
    return items;
  }
  [[noreturn]] static void fail_shared(const char* op, const StepLists& given, const TensorList* const (&lists)[kStepTensors],
                                       const char* const (&names)[kStepTensors], void* data) {
    int seen = 0;
    auto look = [&](const char* name, const TensorList& list) {
      for (size_t i = 0; i < list.size(); ++i) {
        FASTLM_CHECK(list[i].data != data || list[i].numel() == 0 || ++seen < 2, op, ": ", name, "[", i,
                     "] shares its memory with another tensor that this call writes");
      }
    };
    for (int t = 0; t < kStepTensors; ++t) {
      if (t != kGrad) look(names[t], *lists[t]);
    }
    look("steps", given.steps);
    fail(op, ": two tensors that are written share their memory");
  }
  // Where a gradient is laid out unlike its parameter, memory order does not pair them: it would have to be copied first.
  void check_scales(const char* op, const StepLists& given, const char* const (&names)[kStepTensors], size_t i,
                    StepItem& item) const {
    FASTLM_CHECK(given.top.empty() && item.flat, op, ": states of 8 bits go with tensors of one dense layout and without ",
                 names[kTop], ", got params[", i, "] ", given.params[i].describe());
    const TensorList* scales[2] = {&given.first_scales, &given.second_scales};
    for (int s = 0; s < 2; ++s) {
      const char* name = names[kFirst + s];
      FASTLM_CHECK(scales[s]->size() == given.params.size(), op, ": scales of ", name, " must hold ", given.params.size(),
                   " tensors, got ", scales[s]->size());
      const TensorView& t = (*scales[s])[i];
      check_device(op, given.params[0], t);
      FASTLM_CHECK(t.dtype == DType::kF32 && t.contiguous() && t.numel() == (item.n + kStateBlock - 1) / kStateBlock, op,
                   ": scales of ", name, "[", i, "] must be contiguous float32, one for each ", kStateBlock,
                   " elements, got ", t.describe());
      item.scales[s] = static_cast<float*>(t.data);
    }
  }

  static bool is_scalar(const TensorView& t) {
    return t.numel() == 1 && (t.dtype == DType::kF32 || t.dtype == DType::kF64);
  }
  void check_scalar(const char* op, const char* name, const TensorView& first, const OptionalTensor& t) const {
    if (!t) return;
    check_device(op, first, *t);
    FASTLM_CHECK(is_scalar(*t), op, ": ", name, " must be one float32 or float64, got ", t->describe());
  }
};

constexpr const char* kAdamNames[kStepTensors] = {"params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "emas"};
constexpr const char* kSgdNames[kStepTensors] = {"params", "grads", "momentum_buffers", "", "", "masters", "emas"};

// What every step of Adam has, and what some steps of SGD must have.
inline void check_adam_lists(const TensorList& params, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                             const TensorList& max_exp_avg_sqs, const TensorList& steps, bool amsgrad) {
  size_t n = params.size();
  for (const auto& [name, list, want] : {std::tuple{"exp_avgs", &exp_avgs, n}, {"exp_avg_sqs", &exp_avg_sqs, n},
                                         {"max_exp_avg_sqs", &max_exp_avg_sqs, amsgrad ? n : 0}, {"steps", &steps, n}}) {
    FASTLM_CHECK(list->size() == want, "adam_: ", name, " must hold ", want, " tensors, got ", list->size());
  }
}
inline void check_sgd_lists(const TensorList& params, const TensorList& momentum_buffers, const TensorList& steps,
                            double momentum, bool stochastic_params) {
  size_t n = params.size(), buffers = momentum != 0 ? n : 0;
  FASTLM_CHECK(momentum_buffers.size() == buffers, "sgd_: momentum_buffers must hold ", buffers, " tensors, got ",
               momentum_buffers.size());
  FASTLM_CHECK(steps.size() == n || (steps.empty() && buffers == 0 && !stochastic_params), "sgd_: steps must hold ", n,
               " tensors, got ", steps.size());
}

inline StepOptions adam_options(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                                bool maximize, double scale, bool stochastic, bool stochastic_params, uint32_t seed,
                                double l1, double ema_decay) {
  return {StepRule::kAdam, lr, beta1, beta2, eps, 0, 0, weight_decay, l1, ema_decay, decoupled, false, maximize, scale,
          stochastic, stochastic_params, seed};
}
inline StepOptions sgd_options(double lr, double momentum, double dampening, double weight_decay, double l1, bool nesterov,
                               bool maximize, double scale, double ema_decay, bool stochastic_params, uint32_t seed) {
  return {StepRule::kSgd, lr, 0, 0, 0, momentum, dampening, weight_decay, l1, ema_decay, false, nesterov, maximize, scale,
          false, stochastic_params, seed};
}

// After the step: `steps` as `items` have them.
inline void store_steps(const std::vector<StepItem>& items, const TensorList& steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].dtype == DType::kF64) {
      *static_cast<double*>(steps[i].data) = items[i].step;
    } else {
      *static_cast<float*>(steps[i].data) = static_cast<float>(items[i].step);
    }
  }
}

}  // namespace fastlm
