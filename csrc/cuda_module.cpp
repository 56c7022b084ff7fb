// fastlm._cuda: argument checks and bindings, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <variant>

#include "arguments.h"
#include "cuda/activation.h"
#include "cuda/optimizer.h"
#include "cuda/attention.h"
#include "cuda/cross_entropy.h"
#include "cuda/dropout.h"
#include "cuda/embedding.h"
#include "cuda/mse_loss.h"
#include "cuda/norm.h"
#include "cuda/rope.h"
#include "cuda/runtime.h"
#include "cuda/target.h"

namespace fastlm {
namespace {

#ifdef FASTLM_DEVICE_EMULATION
constexpr Border border{/*on_gpu=*/false};
#else
constexpr Border border{/*on_gpu=*/true};  // `stream` is one of the first tensor's device
#endif

const int64_t* check_integers(const char* op, const char* name, const TensorView& q, const TensorView& t, int64_t numel) {
  border.check_device(op, q, t);
  FASTLM_CHECK(t.dtype == DType::kI64 && t.contiguous() && t.numel() == numel, op, ": ", name, " must be ", numel,
               " contiguous int64, got ", t.describe());
  return static_cast<const int64_t*>(t.data);
}

// --- activations ------------------------------------------------------------------------------------------------------
void act_forward(const TensorView& x, const TensorView& y, int act, uintptr_t stream) {
  border.check_same_dense("act_forward", x, {&y});
  cuda::act_forward({x.device, stream}, act_of("act_forward", act), x.dtype, x.data, y.data, x.numel());
}

void act_backward(const TensorView& dy, const TensorView& saved, const TensorView& dx, int act, uintptr_t stream) {
  border.check_same_dense("act_backward", dy, {&saved, &dx});
  cuda::act_backward({dy.device, stream}, act_of("act_backward", act), dy.dtype, dy.data, saved.data, dx.data, dy.numel());
}

void bias_act_forward(const TensorView& x, const TensorView& bias, const TensorView& y, int act, uintptr_t stream) {
  border.check_same_dense("bias_act", x, {&y});
  auto [rows, cols] = border.check_rows("bias_act", x, bias);
  cuda::bias_act_forward({x.device, stream}, act_of("bias_act", act), x.dtype, x.data, bias.data, y.data, rows, cols);
}

void bias_act_backward(const TensorView& dy, const TensorView& saved, const OptionalTensor& bias, const TensorView& dx,
                       const TensorView& dbias, const TensorView& partial, int act, uintptr_t stream) {
  const char* op = "bias_act_backward";
  border.check_same_dense(op, dy, {&saved, &dx});
  auto [rows, cols] = border.check_rows(op, dy);
  if (bias) border.check_rows(op, dy, *bias);
  border.check_sums(op, "dbias", dy, dbias, cols);
  border.check_sums(op, "partial", dy, partial, cuda::bias_act_chunks(rows) * cols);
  cuda::bias_act_backward({dy.device, stream}, act_of(op, act), dy.dtype, dy.data, saved.data, data_of(bias), dx.data,
                          dbias.data, partial.data, rows, cols);
}

void glu_forward(const TensorView& gate, const TensorView& up, const TensorView& y, int act, uintptr_t stream) {
  border.check_same_dense("glu", y, {});
  border.check_matrix("glu", "y", y, y, true);
  border.check_matrix("glu", "gate", y, gate, false);
  border.check_matrix("glu", "up", y, up, false);
  cuda::glu_forward({y.device, stream}, act_of("glu", act), y.dtype, gate.data, up.data, y.data, y.shape[0], y.shape[1],
                    gate.strides[0], up.strides[0]);
}

void glu_backward(const TensorView& dy, const TensorView& gate, const TensorView& up, const TensorView& dgate,
                  const TensorView& dup, int act, uintptr_t stream) {
  const char* op = "glu_backward";
  border.check_same_dense(op, dy, {&dgate, &dup});
  border.check_matrix(op, "dy", dy, dy, true);
  border.check_matrix(op, "gate", dy, gate, false);
  border.check_matrix(op, "up", dy, up, false);
  cuda::glu_backward({dy.device, stream}, act_of(op, act), dy.dtype, dy.data, gate.data, up.data, dgate.data, dup.data,
                     dy.shape[0], dy.shape[1], gate.strides[0], up.strides[0]);
}

void dropout(const TensorView& x, const TensorView& y, double p, const TensorView& seed, uintptr_t stream) {
  const char* op = "dropout";
  border.check_same_dense(op, x, {&y});
  FASTLM_CHECK(x.contiguous(), op, ": x must be contiguous, got ", x.describe());
  FASTLM_CHECK(p >= 0 && p < 1, op, ": p must be in [0, 1), got ", p);
  cuda::dropout({x.device, stream}, x.dtype, x.data, y.data, x.numel(), p, check_integers(op, "seed", x, seed, 1));
}

void mse_loss_forward(const TensorView& x, const TensorView& target, const TensorView& sum, const TensorView& partial,
                      uintptr_t stream) {
  const char* op = "mse_loss";
  border.check_same_dense(op, x, {&target});
  border.check_sums(op, "sum", x, sum, 1);
  border.check_sums(op, "partial", x, partial, cuda::mse_loss_chunks(x.numel()));
  cuda::mse_loss_forward({x.device, stream}, x.dtype, x.data, target.data, sum.data, partial.data, x.numel());
}

void mse_loss_backward(const TensorView& g, const TensorView& x, const TensorView& target, const TensorView& dx,
                       uintptr_t stream) {
  const char* op = "mse_loss_backward";
  border.check_same_dense(op, x, {&target, &dx});
  border.check_sums(op, "g", x, g, 1);
  cuda::mse_loss_backward({x.device, stream}, x.dtype, g.data, x.data, target.data, dx.data, x.numel());
}

// --- norms ------------------------------------------------------------------------------------------------------------
void norm_forward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                  const TensorView& y, const OptionalTensor& sum, double eps, bool centred, uintptr_t stream) {
  auto [rows, cols] = border.check_norm("norm", x, residual, weight, bias, y, sum);
  cuda::norm_forward({x.device, stream}, x.dtype, x.data, data_of(residual), data_of(weight), data_of(bias), y.data, data_of(sum),
                     rows, cols, eps, centred);
}

void norm_backward(const TensorView& dy, const OptionalTensor& dsum, const TensorView& s, const OptionalTensor& weight,
                   const TensorView& dx, const OptionalTensor& dweight, const OptionalTensor& dbias, const TensorView& partial,
                   double eps, bool centred, uintptr_t stream) {
  auto [rows, cols] = border.check_norm_backward("norm_backward", dy, dsum, s, weight, dx, dweight, dbias);
  int64_t sums = int64_t(dweight.has_value()) + int64_t(dbias.has_value());
  border.check_sums("norm_backward", "partial", dy, partial, sums * cuda::norm_slices(dy.dtype, rows, cols) * cols);
  cuda::norm_backward({dy.device, stream}, dy.dtype, dy.data, data_of(dsum), s.data, data_of(weight), dx.data, data_of(dweight),
                      data_of(dbias), partial.data, rows, cols, eps, centred);
}

// --- rope and the loss ------------------------------------------------------------------------------------------------
void rope(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& y, int64_t heads, uintptr_t stream) {
  border.check_rope("rope", x, cos, sin, y, heads);
  cuda::rope({x.device, stream}, x.dtype, {heads, x.shape[1], cos.shape[1], cos.shape[0]}, x.data, cos.data, sin.data, y.data,
             x.shape[0] / heads);
}

void cross_entropy_forward(const TensorView& x, const TensorView& target, const TensorView& loss, const TensorView& lse,
                           int64_t ignored, double smoothing, double softcap, uintptr_t stream) {
  int64_t rows = border.check_cross_entropy("cross_entropy", x, target, loss, lse);
  cuda::cross_entropy_forward({x.device, stream}, x.dtype, x.data, static_cast<const int64_t*>(target.data), loss.data, lse.data,
                              rows, {x.shape[1], ignored, smoothing, softcap});
}

void cross_entropy_backward(const TensorView& g, const OptionalTensor& dlse, const TensorView& x, const TensorView& target,
                            const TensorView& lse, const TensorView& dx, int64_t ignored, double smoothing, double softcap,
                            uintptr_t stream) {
  int64_t rows = border.check_cross_entropy("cross_entropy_backward", x, target, g, lse);
  border.check_same_dense("cross_entropy_backward", x, {&dx});
  if (dlse) border.check_sums("cross_entropy_backward", "dlse", x, *dlse, rows);
  cuda::cross_entropy_backward({x.device, stream}, x.dtype, g.data, data_of(dlse), x.data, static_cast<const int64_t*>(target.data),
                               lse.data, dx.data, rows, {x.shape[1], ignored, smoothing, softcap});
}

// --- the embedding ----------------------------------------------------------------------------------------------------
void embedding_forward(const TensorView& weight, const TensorView& index, const TensorView& y, uintptr_t stream) {
  const char* op = "embedding";
  border.check_same_dense(op, weight, {});
  border.check_matrix(op, "weight", weight, weight, true);
  border.check_same_dense(op, y, {});
  FASTLM_CHECK(y.ndim == 2 && y.contiguous() && y.dtype == weight.dtype && y.shape[1] == weight.shape[1], op, ": y must be ",
               dtype_name(weight.dtype), " (n, ", weight.shape[1], "), got ", y.describe());
  border.check_device(op, weight, y);
  cuda::embedding_forward({weight.device, stream}, weight.dtype, weight.data, check_integers(op, "index", weight, index, y.shape[0]),
                          y.data, y.shape[0], weight.shape[0], weight.shape[1]);
}

void embedding_backward(const TensorView& dy, const TensorView& index, const TensorView& order, const TensorView& dweight,
                        const TensorView& partial, int64_t padding, uintptr_t stream) {
  const char* op = "embedding_backward";
  border.check_same_dense(op, dy, {});
  border.check_matrix(op, "dy", dy, dy, true);
  border.check_same_dense(op, dweight, {});
  int64_t count = dy.shape[0], cols = dy.shape[1];
  FASTLM_CHECK(dweight.ndim == 2 && dweight.contiguous() && dweight.dtype == dy.dtype && dweight.shape[1] == cols, op,
               ": dweight must be ", dtype_name(dy.dtype), " (V, ", cols, "), got ", dweight.describe());
  border.check_device(op, dy, dweight);
  border.check_sums(op, "partial", dy, partial, cuda::embedding_partial_rows(count) * cols);
  cuda::embedding_backward({dy.device, stream}, dy.dtype, dy.data, check_integers(op, "index", dy, index, count),
                           check_integers(op, "order", dy, order, count), dweight.data, partial.data, count, dweight.shape[0], cols,
                           padding);
}

// --- attention --------------------------------------------------------------------------------------------------------
cuda::attention::Operand operand(const TensorView& t) { return {t.data, t.strides[0], t.strides[1], t.strides[2]}; }

// Lower and upper from the last key for the last query, and upper from the first key for the first query, as in
// attention_index.h; from kFar on: none.
using Diagonals = std::array<int64_t, 3>;

// What the bindings take besides the tensors of every call.
struct AttentionOptions {
  const OptionalTensor &mask, &bias, &slopes, &sinks, &seed, &ends_q, &ends_k;
  const Diagonals& diagonals;
  double scale, softcap, dropout_p;
};

// (B, Hq, Tq, Tk) with strides of any kind.
cuda::attention::ScoresOperand check_scores(const char* op, const char* name, const TensorView& q, int64_t keys, DType dtype,
                                            const OptionalTensor& t) {
  if (!t) return {};
  border.check_device(op, q, *t);
  FASTLM_CHECK(t->dtype == dtype && t->ndim == 4 && t->shape[0] == q.shape[0] && t->shape[1] == q.shape[1] &&
                   t->shape[2] == q.shape[2] && t->shape[3] == keys,
               op, ": ", name, " must be ", dtype_name(dtype), " (", q.shape[0], ", ", q.shape[1], ", ", q.shape[2], ", ", keys,
               "), got ", t->describe());
  return {t->data, t->strides[0], t->strides[1], t->strides[2], t->strides[3]};
}

// A number for each query head, (B, Hq).
const float* check_per_head(const char* op, const char* name, const TensorView& q, const OptionalTensor& t) {
  if (!t) return nullptr;
  border.check_sums(op, name, q, *t, q.shape[0] * q.shape[1]);
  return static_cast<const float*>(t->data);
}

cuda::attention::Problem problem_of(const char* op, const Border::AttentionSizes& sizes, const TensorView& q,
                                    const AttentionOptions& options) {
  using cuda::attention::kFar;
  FASTLM_CHECK(q.dtype != DType::kF64, op, ": q must be float32, float16 or bfloat16, got float64");
  for (const Border::Sizes* s : {&sizes.q, &sizes.k}) {
    FASTLM_CHECK(std::max({s->batch, s->heads, s->length}) < kFar, op, ": no dimension may reach 2^30, got (", s->batch,
                 ", ", s->heads, ", ", s->length, ", ", s->width, ")");
  }
  FASTLM_CHECK(std::max(sizes.q.width, sizes.v.width) <= cuda::attention::kMaxWidth, op, ": head dims may be at most ",
               cuda::attention::kMaxWidth, ", got ", sizes.q.width, " and ", sizes.v.width);
  FASTLM_CHECK(options.dropout_p >= 0 && options.dropout_p < 1, op, ": dropout_p must be in [0, 1), got ", options.dropout_p);
  auto near = [](int64_t x) { return int(std::clamp<int64_t>(x, -kFar, kFar)); };
  cuda::attention::Problem problem{};
  problem.dtype = q.dtype;
  problem.batch = int(sizes.q.batch), problem.heads_q = int(sizes.q.heads), problem.heads_k = int(sizes.k.heads);
  problem.queries = int(sizes.q.length), problem.keys = int(sizes.k.length);
  problem.width = int(sizes.q.width), problem.width_v = int(sizes.v.width);
  problem.band = {near(options.diagonals[0]), near(options.diagonals[1]), near(options.diagonals[2])};
  problem.scale = float(options.scale);
  FASTLM_CHECK(options.ends_q.has_value() == options.ends_k.has_value(), op, ": the ends of packed queries and keys go together");
  if (options.ends_q) {
    int64_t ends = options.ends_q->numel();
    FASTLM_CHECK(ends >= 2 && ends < kFar && sizes.q.batch == 1, op, ": packed sequences have two ends or more and a batch of 1");
    problem.packed = {check_integers(op, "ends of queries", q, *options.ends_q, ends),
                      check_integers(op, "ends of keys", q, *options.ends_k, ends), int(ends - 1)};
  }
  cuda::attention::ScoreTerms& terms = problem.terms;
  terms.mask = check_scores(op, "mask", q, sizes.k.length, DType::kBool, options.mask);
  terms.bias = check_scores(op, "bias", q, sizes.k.length, DType::kF32, options.bias);
  terms.slopes = check_per_head(op, "slopes", q, options.slopes);
  terms.sinks = check_per_head(op, "sinks", q, options.sinks);
  terms.softcap = float(options.softcap);
  FASTLM_CHECK(terms.softcap > 0 || options.softcap == 0, op, ": softcap must be 0 or a positive float32, got ", options.softcap);
  if (options.dropout_p > 0) {
    FASTLM_CHECK(options.seed.has_value(), op, ": dropout needs a seed");
    terms.drop_below = static_cast<uint32_t>(options.dropout_p * 4294967296.0);
    terms.keep_scale = float(1 / (1 - options.dropout_p));
    terms.seed = check_integers(op, "seed", q, *options.seed, 1);
  }
  return problem;
}

const char* attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                       const TensorView& lse, const OptionalTensor& mask, const OptionalTensor& bias,
                       const OptionalTensor& slopes, const OptionalTensor& sinks, const OptionalTensor& seed,
                       const OptionalTensor& ends_q, const OptionalTensor& ends_k, const Diagonals& diagonals,
                       double scale, double softcap, double dropout_p, uintptr_t stream) {
  const char* op = "attention";
  border.check_device(op, q, q);
  Border::AttentionSizes sizes = border.check_attention(op, q, k, v);
  cuda::attention::Problem problem = problem_of(op, sizes, q,
                                                {mask, bias, slopes, sinks, seed, ends_q, ends_k, diagonals, scale,
                                                 softcap, dropout_p});
  border.check_operand(op, "o", q, o, sizes.o);
  border.check_per_query(op, "lse", q, lse);
  return cuda::attention::forward({q.device, stream}, problem, operand(q), operand(k), operand(v), operand(o),
                                  static_cast<float*>(lse.data));
}

// With `stats` the family of kernels that it took; without, does nothing and says how many floats dq_sums may have.
std::variant<const char*, int64_t> attention_backward(
                        const TensorView& d_o, const OptionalTensor& dlse, const TensorView& q, const TensorView& k,
                        const TensorView& v, const TensorView& o, const TensorView& lse, const OptionalTensor& dq,
                        const OptionalTensor& dk, const OptionalTensor& dv, const OptionalTensor& dbias,
                        const OptionalTensor& dslopes, const OptionalTensor& dq_sums, const OptionalTensor& stats,
                        const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& slopes,
                        const OptionalTensor& sinks, const OptionalTensor& seed, const OptionalTensor& ends_q,
                        const OptionalTensor& ends_k, const Diagonals& diagonals, double scale, double softcap,
                        double dropout_p, uintptr_t stream) {
  const char* op = "attention_backward";
  Border::AttentionSizes sizes = border.check_attention(op, q, k, v);
  cuda::attention::Problem problem = problem_of(op, sizes, q,
                                                {mask, bias, slopes, sinks, seed, ends_q, ends_k, diagonals, scale,
                                                 softcap, dropout_p});
  FASTLM_CHECK(dk.has_value() == dv.has_value(), op, ": dk and dv are computed together, got only one of them");
  FASTLM_CHECK(dq || (!dbias && !dslopes), op, ": dbias and dslopes are computed together with dq");
  border.check_operand(op, "do", q, d_o, sizes.o);
  border.check_operand(op, "o", q, o, sizes.o);
  border.check_per_query(op, "lse", q, lse);
  if (dlse) border.check_per_query(op, "dlse", q, *dlse);
  if (dq) border.check_operand(op, "dq", q, *dq, sizes.q);
  if (dk) border.check_operand(op, "dk", q, *dk, sizes.k);
  if (dv) border.check_operand(op, "dv", q, *dv, sizes.v);
  if (dbias) border.check_sums(op, "dbias", q, *dbias, lse.numel() * sizes.k.length);
  if (dslopes) border.check_per_query(op, "dslopes", q, *dslopes);
  if (dq_sums) {
    FASTLM_CHECK(dq && dk, op, ": dq_sums is for all of dq, dk and dv");
    border.check_sums(op, "dq_sums", q, *dq_sums, lse.numel() * sizes.q.width);
  }
  cuda::Target target{q.device, stream};
  auto optional = [](const OptionalTensor& t) { return t ? operand(*t) : cuda::attention::Operand{}; };
  auto floats = [](const OptionalTensor& t) { return t ? static_cast<float*>(t->data) : nullptr; };
  if (!stats) {
    bool adds = dq && dk && cuda::attention::adds_in_any_order(target, problem, operand(d_o), operand(q), operand(k), operand(v),
                                                               operand(*dq), operand(*dk), operand(*dv));
    return adds ? lse.numel() * sizes.q.width : int64_t(0);
  }
  border.check_sums(op, "stats", q, *stats, 2 * lse.numel());
  return cuda::attention::backward(target, problem, operand(d_o), floats(dlse), operand(q), operand(k), operand(v), operand(o),
                                   static_cast<const float*>(lse.data), optional(dq), optional(dk), optional(dv),
                                   floats(dbias), floats(dslopes), floats(dq_sums), stats->data);
}

// Attention of few queries to a cache, and the room that it works in: called twice, first for how many floats that is.
int64_t attention_decode(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                         const TensorView& lse, const OptionalTensor& partial, const TensorView& lens,
                         const OptionalTensor& pages, const OptionalTensor& slopes, const OptionalTensor& sinks,
                         const Diagonals& diagonals, double scale, double softcap, uintptr_t stream) {
  const char* op = "attention_decode";
  border.check_device(op, q, q);
  FASTLM_CHECK(q.ndim == 4 && k.ndim == 4 && v.ndim == 4, op, ": q, k and v must have 4 dimensions");
  cuda::attention::Cache cache{operand(k), operand(v), check_integers(op, "lens", q, lens, q.shape[0]), nullptr, 0, 0, 0};
  // As if all pages of a sequence lay one behind the other.
  TensorView k_rows = k, v_rows = v;
  if (pages) {
    FASTLM_CHECK(pages->ndim == 2 && pages->shape[0] == q.shape[0], op, ": pages must be (B, n) with B = ", q.shape[0], ", got ",
                 pages->describe());
    FASTLM_CHECK(v.shape[0] == k.shape[0] && v.shape[2] == k.shape[2], op, ": v must have the pages of k");
    FASTLM_CHECK(k.shape[0] > 0 || pages->numel() == 0, op, ": there must be pages");
    cache.pages = check_integers(op, "pages", q, *pages, pages->numel());
    cache.pages_row = pages->shape[1], cache.page_count = k.shape[0], cache.page_size = int(k.shape[2]);
    k_rows.shape[0] = v_rows.shape[0] = q.shape[0];
    k_rows.shape[2] = v_rows.shape[2] = pages->shape[1] * k.shape[2];
  }
  static const OptionalTensor none;
  Border::AttentionSizes sizes = border.check_attention(op, q, k_rows, v_rows);
  cuda::attention::Problem problem = problem_of(
      op, sizes, q, {none, none, slopes, sinks, none, none, none, diagonals, scale, softcap, 0.0});
  border.check_operand(op, "o", q, o, sizes.o);
  border.check_per_query(op, "lse", q, lse);
  cuda::Target target{q.device, stream};
  int splits = cuda::attention::decode_splits(target, problem);
  int64_t numel = splits * lse.numel() * (sizes.v.width + 2);
  if (!partial) return numel;
  border.check_sums(op, "partial", q, *partial, numel);
  cuda::attention::decode(target, problem, operand(q), cache, operand(o), static_cast<float*>(lse.data),
                          static_cast<float*>(partial->data), splits);
  return numel;
}

// --- optimizers -------------------------------------------------------------------------------------------------------
struct StepNumbers {
  const OptionalTensor &scale, &lr, &found_inf;
};

void optimizer_step(const char* op, std::vector<StepItem> items, const TensorList& params, const TensorList& steps,
                    const StepOptions& options, const StepNumbers& numbers, const OptionalTensor& workspace, uintptr_t stream) {
  if (items.empty()) return;
  cuda::StepOnDevice on_device;
  for (const auto& [name, given, to] : {std::tuple{"scale", &numbers.scale, &on_device.scale}, {"lr", &numbers.lr, &on_device.lr},
                                        {"found_inf", &numbers.found_inf, &on_device.found_inf}}) {
    border.check_scalar(op, name, params[0], *given);
    if (*given) *to = {(*given)->data, (*given)->dtype == DType::kF64};
  }
  FASTLM_CHECK(workspace || steps.empty() || (!numbers.lr && !numbers.found_inf), op,
               ": lr and found_inf can be on the device only where the steps are");
  if (workspace) {
    border.check_device(op, params[0], *workspace);
    FASTLM_CHECK(workspace->dtype == DType::kF64 && workspace->contiguous() && !steps.empty() &&
                     workspace->numel() == cuda::kStepWorkspace * static_cast<int64_t>(steps.size()),
                 op, ": workspace must be ", cuda::kStepWorkspace, " float64 per parameter that counts its steps, got ",
                 workspace->describe());
    on_device.workspace = workspace->data;
    for (const TensorView& step : steps) on_device.steps.push_back({step.data, step.dtype == DType::kF64});
  }
  cuda::optimizer_step({params[0].device, stream}, items, options, on_device);
  if (!workspace) store_steps(items, steps);
}

void adam_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
               const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, const TensorList& steps, double lr,
               double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad, bool maximize,
               const OptionalTensor& scale, bool stochastic, const OptionalTensor& device_lr, bool stochastic_params,
               uint32_t seed, double l1, const OptionalTensor& found_inf, const TensorList& masters, const TensorList& emas,
               double ema_decay, const TensorList& exp_avg_scales, const TensorList& exp_avg_sq_scales,
               const OptionalTensor& workspace, uintptr_t stream) {
  check_adam_lists(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad);
  std::vector<StepItem> items =
      border.check_step("adam_", {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters, emas,
                                  exp_avg_scales, exp_avg_sq_scales}, kAdamNames, workspace.has_value());
  optimizer_step("adam_", items, params, steps,
                 adam_options(lr, beta1, beta2, eps, weight_decay, decoupled, maximize, 1, stochastic, stochastic_params,
                              seed, l1, ema_decay), {scale, device_lr, found_inf}, workspace, stream);
}

void sgd_step(const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers, const TensorList& steps,
              double lr, double momentum, double dampening, double weight_decay, double l1, bool nesterov, bool maximize,
              const OptionalTensor& scale, const OptionalTensor& device_lr, const OptionalTensor& found_inf,
              const TensorList& masters, const TensorList& emas, double ema_decay, bool stochastic_params, uint32_t seed,
              const OptionalTensor& workspace, uintptr_t stream) {
  check_sgd_lists(params, momentum_buffers, steps, momentum, stochastic_params);
  std::vector<StepItem> items = border.check_step(
      "sgd_", {params, grads, momentum_buffers, {}, {}, steps, masters, emas, {}, {}}, kSgdNames, workspace.has_value());
  optimizer_step("sgd_", items, params, steps,
                 sgd_options(lr, momentum, dampening, weight_decay, l1, nesterov, maximize, 1, ema_decay, stochastic_params, seed),
                 {scale, device_lr, found_inf}, workspace, stream);
}

std::vector<cuda::NormArray> norm_arrays(const TensorList& tensors) {
  std::vector<cuda::NormArray> arrays;
  for (const TensorView& t : tensors) {
    border.check_float("grad_norm", "grads", t);
    border.check_device("grad_norm", tensors[0], t);
    FASTLM_CHECK(t.dense(), "grad_norm: grads must be dense, got ", t.describe());
    arrays.push_back({t.data, t.dtype, t.numel()});
  }
  return arrays;
}

void grad_norm(const TensorList& tensors, const TensorView& norm, const TensorView& partial, uintptr_t stream) {
  std::vector<cuda::NormArray> arrays = norm_arrays(tensors);
  if (arrays.empty()) throw std::invalid_argument("grad_norm: grads must hold at least one tensor");
  border.check_scalar("grad_norm", "norm", tensors[0], norm);
  border.check_device("grad_norm", tensors[0], partial);
  FASTLM_CHECK(partial.dtype == DType::kF64 && partial.contiguous() && partial.numel() == cuda::norm_chunks(arrays),
               "grad_norm: partial must be ", cuda::norm_chunks(arrays), " contiguous float64, got ", partial.describe());
  cuda::norm_of({norm.device, stream}, arrays, {norm.data, norm.dtype == DType::kF64}, static_cast<double*>(partial.data));
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
  m.attr("acts") = py::cast(std::vector<std::string>(fastlm::kActNames, fastlm::kActNames + fastlm::kNumActs));
  kernel("act_forward", &fastlm::act_forward, "y = act(x), act an index into `acts`.");
  kernel("act_backward", &fastlm::act_backward, "saved: the output of none, relu, sigmoid and tanh, the input of the others.");
  kernel("bias_act_forward", &fastlm::bias_act_forward);
  kernel("bias_act_backward", &fastlm::bias_act_backward);
  m.def("bias_act_chunks", &cuda::bias_act_chunks, "Rows of `partial` that bias_act_backward works in.");
  kernel("rope", &fastlm::rope);
  kernel("cross_entropy_forward", &fastlm::cross_entropy_forward, "A target that is no class makes its row's results NaN.");
  kernel("cross_entropy_backward", &fastlm::cross_entropy_backward, "dx may be x.");
  kernel("embedding_forward", &fastlm::embedding_forward, "An index that is no row makes a row of NaN.");
  kernel("embedding_backward", &fastlm::embedding_backward,
         "index is sorted, order says where each of it came from; dweight is zero, `partial` has embedding_partial_rows(n) rows.");
  m.def("embedding_partial_rows", &cuda::embedding_partial_rows);
  kernel("norm_forward", &fastlm::norm_forward);
  kernel("norm_backward", &fastlm::norm_backward, "`partial` has norm_slices(dy) rows for each of dweight and dbias.");
  m.def("norm_slices", [](const fastlm::TensorView& dy) {
    auto [rows, cols] = fastlm::border.check_rows("norm_slices", dy);
    return cuda::norm_slices(dy.dtype, rows, cols);
  });
  kernel("glu_forward", &fastlm::glu_forward, "y = act(gate) * up, matrices with contiguous rows.");
  kernel("glu_backward", &fastlm::glu_backward);
  kernel("dropout", &fastlm::dropout, "seed, one int64, stays on the device.");
  kernel("mse_loss_forward", &fastlm::mse_loss_forward, "sum = the sum of (x - target)^2.");
  kernel("mse_loss_backward", &fastlm::mse_loss_backward);
  m.def("mse_loss_chunks", &cuda::mse_loss_chunks, "Elements of `partial` that mse_loss_forward works in.");
  kernel("adam_step", &fastlm::adam_step,
         "All on one device but the steps, which are on the CPU without a workspace of step_workspace float64 a parameter.");
  kernel("sgd_step", &fastlm::sgd_step, "Likewise; there may be no steps.");
  m.attr("step_workspace") = cuda::kStepWorkspace;
  kernel("grad_norm", &fastlm::grad_norm, "norm = the 2-norm of all elements of dense tensors.");
  m.def("grad_norm_chunks", [](const fastlm::TensorList& grads) { return cuda::norm_chunks(fastlm::norm_arrays(grads)); },
        "Elements of `partial` that grad_norm works in.");
  kernel("attention_forward", &fastlm::attention_forward, 
         "Diagonals (lower, upper, upper from the start) as in attention_index.h. Returns the family of kernels that it took.");
  kernel("attention_backward", &fastlm::attention_backward,
         "Returns the family that it took. Without `stats` does nothing, and returns how many elements dq_sums, float32 and zero, "
         "must have for dq to be added up in any order, in fewer products; 0 where no kernel does so.");
  kernel("attention_decode", &fastlm::attention_decode,
         "Returns the elements that `partial`, float32, must have; without it, does nothing else.");
}
