// fastlm._cpu: argument checks and bindings, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "arguments.h"
#include "cpu/activation.h"
#include "cpu/optimizer.h"
#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/embedding.h"
#include "cpu/isa.h"
#include "cpu/limits.h"
#include "cpu/matmul.h"
#include "cpu/mse_loss.h"
#include "cpu/norm.h"
#include "cpu/rope.h"
#include "cpu/parallel.h"

namespace fastlm {
namespace {

constexpr Border border{/*on_gpu=*/false};

// Longer kernels let other Python threads run meanwhile; below this, giving the GIL away costs more than it brings.
constexpr int64_t kReleaseGil = 1 << 15;

template <class Run>
void run_kernel(int64_t work, const Run& run) {
  if (work < kReleaseGil) return run();
  py::gil_scoped_release release;
  run();
}

void act_forward(const TensorView& x, const TensorView& y, int act, int threads) {
  border.check_same_dense("act_forward", x, {&y});
  int64_t n = x.numel();
  Act a = act_of("act_forward", act);
  run_kernel(n, [&] { cpu::act_forward(a, x.dtype, x.data, y.data, n, threads); });
}

void act_backward(const TensorView& dy, const TensorView& saved, const TensorView& dx, int act, int threads) {
  border.check_same_dense("act_backward", dy, {&saved, &dx});
  int64_t n = dy.numel();
  Act a = act_of("act_backward", act);
  run_kernel(n, [&] { cpu::act_backward(a, dy.dtype, dy.data, saved.data, dx.data, n, threads); });
}

// A share of [0, 1) as the kernels take it.
cpu::Dropout check_dropout(const char* op, double p, uint64_t seed) {
  FASTLM_CHECK(p >= 0 && p < 1, op, ": dropout_p must be in [0, 1), got ", p);
  return cpu::dropout_of(p, seed);
}

void dropout(const TensorView& x, const TensorView& y, double p, uint64_t seed, int threads) {
  border.check_same_dense("dropout", x, {&y});
  FASTLM_CHECK(x.contiguous(), "dropout: x must be contiguous, got ", x.describe());
  cpu::Dropout d = check_dropout("dropout", p, seed);
  run_kernel(x.numel(), [&] { cpu::dropout(x.dtype, d, x.data, y.data, x.numel(), threads); });
}

void bias_act_forward(const TensorView& x, const TensorView& bias, const TensorView& y, int act, double dropout_p,
                      uint64_t seed, int threads) {
  border.check_same_dense("bias_act", x, {&y});
  auto [rows, cols] = border.check_rows("bias_act", x, bias);
  Act a = act_of("bias_act", act);
  cpu::Dropout d = check_dropout("bias_act", dropout_p, seed);
  run_kernel(rows * cols, [&, rows = rows, cols = cols] {
    cpu::bias_act_forward(a, x.dtype, x.data, bias.data, y.data, rows, cols, d, threads);
  });
}

void bias_act_backward(const TensorView& dy, const TensorView& saved, const OptionalTensor& bias, const TensorView& dx,
                       const OptionalTensor& dbias, int act, int threads) {
  border.check_same_dense("bias_act_backward", dy, {&saved, &dx});
  auto [rows, cols] = border.check_rows("bias_act_backward", dy);
  if (bias) border.check_rows("bias_act_backward", dy, *bias);
  if (dbias) border.check_sums("bias_act_backward", "dbias", dy, *dbias, cols);
  Act a = act_of("bias_act_backward", act);
  run_kernel(rows * cols, [&, rows = rows, cols = cols] {
    cpu::bias_act_backward(a, dy.dtype, dy.data, saved.data, data_of(bias), dx.data, data_of(dbias), rows,
                           cols, threads);
  });
}

void glu_forward(const TensorView& gate, const TensorView& up, const TensorView& y, int act, int threads) {
  border.check_same_dense("glu", y, {});
  border.check_matrix("glu", "y", y, y, true);
  border.check_matrix("glu", "gate", y, gate, false);
  border.check_matrix("glu", "up", y, up, false);
  Act a = act_of("glu", act);
  run_kernel(y.numel(), [&] {
    cpu::glu_forward(a, y.dtype, gate.data, up.data, y.data, y.shape[0], y.shape[1], gate.strides[0], up.strides[0],
                     threads);
  });
}

void glu_backward(const TensorView& dy, const TensorView& gate, const TensorView& up, const TensorView& dgate,
                  const TensorView& dup, int act, int threads) {
  border.check_same_dense("glu_backward", dy, {&dgate, &dup});
  border.check_matrix("glu_backward", "dy", dy, dy, true);
  border.check_matrix("glu_backward", "gate", dy, gate, false);
  border.check_matrix("glu_backward", "up", dy, up, false);
  Act a = act_of("glu_backward", act);
  run_kernel(dy.numel(), [&] {
    cpu::glu_backward(a, dy.dtype, dy.data, gate.data, up.data, dgate.data, dup.data, dy.shape[0], dy.shape[1],
                      gate.strides[0], up.strides[0], threads);
  });
}

void norm_forward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& weight,
                  const OptionalTensor& bias, const TensorView& y, const OptionalTensor& sum, double eps, bool centred,
                  int threads) {
  auto [rows, cols] = border.check_norm("norm", x, residual, weight, bias, y, sum);
  run_kernel(rows * cols, [&, rows = rows, cols = cols] {
    cpu::norm_forward(x.dtype, x.data, data_of(residual), data_of(weight), data_of(bias), y.data, data_of(sum), rows,
                      cols, eps, centred, threads);
  });
}

void norm_backward(const TensorView& dy, const OptionalTensor& dsum, const TensorView& s, const OptionalTensor& weight,
                   const TensorView& dx, const OptionalTensor& dweight, const OptionalTensor& dbias, double eps,
                   bool centred, int threads) {
  auto [rows, cols] = border.check_norm_backward("norm_backward", dy, dsum, s, weight, dx, dweight, dbias);
  run_kernel(rows * cols, [&, rows = rows, cols = cols] {
    cpu::norm_backward(dy.dtype, dy.data, data_of(dsum), s.data, data_of(weight), dx.data, data_of(dweight),
                       data_of(dbias), rows, cols, eps, centred, threads);
  });
}

void rope(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& y, int64_t heads,
          int threads) {
  border.check_rope("rope", x, cos, sin, y, heads);
  const cpu::RopeShape shape{heads, x.shape[1], cos.shape[1], cos.shape[0]};
  run_kernel(x.numel(), [&] { cpu::rope(x.dtype, shape, x.data, cos.data, sin.data, y.data, x.shape[0] / heads, threads); });
}

void embedding_backward(const TensorView& dy, const TensorView& index, const TensorView& dweight, int64_t padding,
                        int threads) {
  const char* op = "embedding_backward";
  border.check_same_dense(op, dy, {});
  border.check_matrix(op, "dy", dy, dy, true);
  border.check_device(op, dy, dweight);
  border.check_device(op, dy, index);
  FASTLM_CHECK(index.dtype == DType::kI64 && index.contiguous() && index.numel() == dy.shape[0], op,
               ": index must be contiguous int64 (", dy.shape[0], ",), got ", index.describe());
  FASTLM_CHECK(dweight.ndim == 2 && dweight.dtype == dy.dtype && dweight.shape[1] == dy.shape[1] && dweight.contiguous(), op,
               ": dweight must be a ", dtype_name(dy.dtype), " matrix of ", dy.shape[1], " columns with contiguous memory, got ",
               dweight.describe());
  run_kernel(dy.numel() + dweight.numel(), [&] {
    cpu::embedding_backward(dy.dtype, dy.data, static_cast<const int64_t*>(index.data), index.numel(), dweight.data,
                            dweight.shape[0], dweight.shape[1], padding, threads);
  });
}

double mse_loss_forward(const TensorView& x, const TensorView& target, int threads) {
  border.check_same_dense("mse_loss", x, {&target});
  double sum = 0;
  run_kernel(x.numel(), [&] { sum = cpu::mse_loss_forward(x.dtype, x.data, target.data, x.numel(), threads); });
  return sum;
}

void mse_loss_backward(const TensorView& x, const TensorView& target, double scale, const TensorView& dx, int threads) {
  border.check_same_dense("mse_loss_backward", x, {&target, &dx});
  run_kernel(x.numel(), [&] {
    cpu::mse_loss_backward(x.dtype, x.data, target.data, scale, dx.data, x.numel(), threads);
  });
}

void optimizer_step(const std::vector<StepItem>& items, const StepOptions& options, const TensorList& steps, int threads) {
  int64_t work = 0;
  for (const StepItem& item : items) work += item.n;
  run_kernel(work, [&] { cpu::optimizer_step(items, options, threads); });
  store_steps(items, steps);
}

void adam_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
               const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, const TensorList& steps, double lr,
               double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad, bool maximize,
               double scale, bool stochastic, bool stochastic_params, uint32_t seed, double l1, const TensorList& masters,
               const TensorList& emas, double ema_decay, const TensorList& exp_avg_scales,
               const TensorList& exp_avg_sq_scales, int threads) {
  check_adam_lists(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad);
  std::vector<StepItem> items =
      border.check_step("adam_", {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters, emas,
                                  exp_avg_scales, exp_avg_sq_scales}, kAdamNames);
  optimizer_step(items, adam_options(lr, beta1, beta2, eps, weight_decay, decoupled, maximize, scale, stochastic,
                                     stochastic_params, seed, l1, ema_decay), steps, threads);
}

void sgd_step(const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers,
              const TensorList& steps, double lr, double momentum, double dampening, double weight_decay, double l1,
              bool nesterov, bool maximize, double scale, const TensorList& masters, const TensorList& emas,
              double ema_decay, bool stochastic_params, uint32_t seed, int threads) {
  check_sgd_lists(params, momentum_buffers, steps, momentum, stochastic_params);
  std::vector<StepItem> items =
      border.check_step("sgd_", {params, grads, momentum_buffers, {}, {}, steps, masters, emas, {}, {}}, kSgdNames);
  optimizer_step(items, sgd_options(lr, momentum, dampening, weight_decay, l1, nesterov, maximize, scale, ema_decay,
                                    stochastic_params, seed), steps, threads);
}

double sum_of_squares(const TensorList& tensors, int threads) {
  std::vector<cpu::DenseArray> arrays;
  int64_t work = 0;
  for (const TensorView& t : tensors) {
    border.check_same_dense("sum_of_squares", t, {});
    arrays.push_back({t.data, t.dtype, t.numel()});
    work += t.numel();
  }
  double sum = 0;
  run_kernel(work, [&] { sum = cpu::sum_of_squares(arrays, threads); });
  return sum;
}

// For dropout: the number of the first element of the scores, and what batch, head and row add to it.
using Elements = std::array<int64_t, 4>;

// What a query sees, and what changes its scores. Mask and bias are (B, Hq, Tq, Tk), expanded where they are the same;
// slopes and sinks (B, Hq) of double.
struct AttentionOptions {
  OptionalTensor mask, bias, slopes, sinks;
  int64_t lower, diagonal;  // query i sees key j iff i + lower <= j <= i + diagonal
  double scale, softcap, dropout_p;
  uint64_t seed;
  Elements elements;
};

// One number for each head of each batch.
double* check_per_head(const char* op, const char* name, const TensorView& q, const OptionalTensor& t) {
  if (!t) return nullptr;
  border.check_device(op, q, *t);
  FASTLM_CHECK(t->dtype == DType::kF64 && t->ndim == 2 && t->shape[0] == q.shape[0] && t->shape[1] == q.shape[1] &&
                   t->contiguous(),
               op, ": ", name, " must be contiguous float64 (", q.shape[0], ", ", q.shape[1], "), got ", t->describe());
  return static_cast<double*>(t->data);
}

// lse or its gradient: one number for each query, those of a head next to each other.
cpu::AttentionBatch::Distance check_lse(const char* op, const char* name, const TensorView& q, const TensorView& t) {
  border.check_device(op, q, t);
  FASTLM_CHECK(t.dtype == sum_dtype(q.dtype) && t.ndim == 3 && t.shape[0] == q.shape[0] && t.shape[1] == q.shape[1] &&
                   t.shape[2] == q.shape[2] && (t.strides[2] == 1 || t.shape[2] <= 1),
               op, ": ", name, " must be ", dtype_name(sum_dtype(q.dtype)), " (", q.shape[0], ", ", q.shape[1], ", ",
               q.shape[2], ") with a contiguous last dimension, got ", t.describe());
  return {t.strides[0], t.strides[1]};
}

void check_scores(const char* op, const char* name, const cpu::AttentionBatch& b, const TensorView& q, const TensorView& t,
                  DType dtype, bool any_columns) {
  border.check_device(op, q, t);
  const cpu::AttentionShape& s = b.shape;
  FASTLM_CHECK(t.dtype == dtype && t.ndim == 4 && t.shape[0] == b.batch && t.shape[1] == b.q_heads &&
                   t.shape[2] == s.q_len && t.shape[3] == s.k_len && (any_columns || t.strides[3] == 1 || s.k_len <= 1),
               op, ": ", name, " must be ", dtype_name(dtype), " (", b.batch, ", ", b.q_heads, ", ", s.q_len, ", ", s.k_len,
               ")", any_columns ? "" : " with a contiguous last dimension", ", got ", t.describe());
}

// The sizes and strides of a call, after checking its tensors.
cpu::AttentionBatch check_attention(const char* op, const Border::AttentionSizes& sizes, const TensorView& q,
                                    const TensorView& k, const TensorView& v, const TensorView& o, const TensorView& lse,
                                    const AttentionOptions& options) {
  border.check_operand(op, "o", q, o, sizes.o);
  cpu::AttentionBatch b{};
  b.lse = check_lse(op, "lse", q, lse);
  b.batch = sizes.q.batch, b.q_heads = sizes.q.heads, b.k_heads = sizes.k.heads;
  b.shape.q_len = sizes.q.length, b.shape.k_len = sizes.k.length;
  b.shape.dim = sizes.q.width, b.shape.v_dim = sizes.v.width;
  b.shape.lower = options.lower, b.shape.diagonal = options.diagonal, b.shape.scale = options.scale;
  const cpu::Dropout dropout = check_dropout(op, options.dropout_p, options.seed);
  b.shape.drop_below = dropout.drop_below, b.shape.keep_scale = dropout.keep_scale, b.shape.seed = dropout.seed;
  b.shape.softcap = options.softcap;
  b.slopes = check_per_head(op, "slopes", q, options.slopes), b.sinks = check_per_head(op, "sinks", q, options.sinks);
  b.scores.first_element = options.elements[0], b.element = {options.elements[1], options.elements[2]};
  b.shape.element_row = options.elements[3];
  if (const OptionalTensor& mask = options.mask) {
    check_scores(op, "mask", b, q, *mask, DType::kBool, true);
    b.scores.mask = static_cast<const uint8_t*>(mask->data), b.mask = {mask->strides[0], mask->strides[1]};
    b.shape.mask_row = mask->strides[2], b.shape.mask_col = mask->strides[3];
  }
  if (const OptionalTensor& bias = options.bias) {
    check_scores(op, "bias", b, q, *bias, sum_dtype(q.dtype), false);
    b.scores.bias = bias->data, b.bias = {bias->strides[0], bias->strides[1]}, b.shape.bias_row = bias->strides[2];
  }
  b.q = {q.strides[0], q.strides[1]}, b.shape.q_row = q.strides[2];
  b.k = {k.strides[0], k.strides[1]}, b.shape.k_row = k.strides[2];
  b.v = {v.strides[0], v.strides[1]}, b.shape.v_row = v.strides[2];
  b.o = {o.strides[0], o.strides[1]}, b.shape.o_row = o.strides[2];
  return b;
}

int64_t work_of(const cpu::AttentionBatch& b) {
  return b.batch * b.q_heads * b.shape.q_len * b.shape.k_len * b.shape.dim;
}

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                       const TensorView& lse, const OptionalTensor& mask, const OptionalTensor& bias,
                       const OptionalTensor& slopes, const OptionalTensor& sinks, int64_t lower, int64_t diagonal,
                       double scale, double softcap, double dropout_p, uint64_t seed, const Elements& elements,
                       int threads) {
  const char* op = "attention";
  cpu::AttentionBatch b =
      check_attention(op, border.check_attention(op, q, k, v), q, k, v, o, lse,
                      {mask, bias, slopes, sinks, lower, diagonal, scale, softcap, dropout_p, seed, elements});
  run_kernel(work_of(b), [&] {
    cpu::attention_forward(q.dtype, b, q.data, k.data, v.data, o.data, lse.data, threads);
  });
}

void attention_backward(const TensorView& dout, const OptionalTensor& dlse, const TensorView& q, const TensorView& k,
                        const TensorView& v, const TensorView& o, const TensorView& lse, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv, const OptionalTensor& dbias,
                        const OptionalTensor& dslopes, const OptionalTensor& mask, const OptionalTensor& bias,
                        const OptionalTensor& slopes, const OptionalTensor& sinks, int64_t lower, int64_t diagonal,
                        double scale, double softcap, double dropout_p, uint64_t seed, const Elements& elements,
                        int threads) {
  const char* op = "attention_backward";
  Border::AttentionSizes sizes = border.check_attention(op, q, k, v);
  cpu::AttentionBatch b =
      check_attention(op, sizes, q, k, v, o, lse,
                      {mask, bias, slopes, sinks, lower, diagonal, scale, softcap, dropout_p, seed, elements});
  b.dslopes = check_per_head(op, "dslopes", q, dslopes);
  if (dbias) {
    cpu::AttentionBatch shape = b;
    b.dbias_of_all = b.batch != 1 && dbias->ndim == 4 && dbias->shape[0] == 1;
    if (b.dbias_of_all) shape.batch = 1;
    check_scores(op, "dbias", shape, q, *dbias, sum_dtype(q.dtype), false);
    b.scores.dbias = dbias->data, b.dbias = {dbias->strides[0], dbias->strides[1]}, b.shape.dbias_row = dbias->strides[2];
  }
  border.check_operand(op, "do", q, dout, sizes.o);
  border.check_operand(op, "dq", q, dq, sizes.q);
  border.check_operand(op, "dk", q, dk, sizes.k);
  border.check_operand(op, "dv", q, dv, sizes.v);
  if (dlse) {
    auto [batch, head] = check_lse(op, "dlse", q, *dlse);
    FASTLM_CHECK(batch == b.lse.batch && head == b.lse.head, op, ": dlse must have the strides of lse, ", lse.describe(),
                 ", got ", dlse->describe());
  }
  b.dout = {dout.strides[0], dout.strides[1]}, b.shape.do_row = dout.strides[2];
  b.dq = {dq.strides[0], dq.strides[1]}, b.shape.dq_row = dq.strides[2];
  b.dk = {dk.strides[0], dk.strides[1]}, b.shape.dk_row = dk.strides[2];
  b.dv = {dv.strides[0], dv.strides[1]}, b.shape.dv_row = dv.strides[2];
  run_kernel(work_of(b), [&] {
    cpu::attention_backward(q.dtype, b, dout.data, data_of(dlse), q.data, k.data, v.data, o.data, lse.data,
                            dq.data, dk.data, dv.data, threads);
  });
}

// Against the first k_lens[n] keys of row n, which lie in (B, Hk, capacity, D), or, where there are pages (B, count), in
// (pages, Hk, page size, D). lower and diagonal are those of a row that is full.
void attention_decode(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                      const TensorView& lse, const TensorView& k_lens, const OptionalTensor& pages,
                      const OptionalTensor& slopes, const OptionalTensor& sinks, int64_t lower, int64_t diagonal,
                      double scale, double softcap, int threads) {
  const char* op = "attention_decode";
  auto check_indices = [&](const char* name, const TensorView& t, int ndim) {
    border.check_device(op, q, t);
    FASTLM_CHECK(t.dtype == DType::kI64 && t.ndim == ndim && t.contiguous() && t.shape[0] == q.shape[0], op, ": ", name,
                 " must be contiguous int64 of ", ndim, " dimensions, the first of ", q.shape[0], ", got ", t.describe());
    return static_cast<const int64_t*>(t.data);
  };
  FASTLM_CHECK(q.ndim == 4 && k.ndim == 4 && v.ndim == 4, op, ": q, k and v must have 4 dimensions");
  // As if all of a row's pages lay one behind the other.
  TensorView k_rows = k, v_rows = v;
  const int64_t page_size = pages ? k.shape[2] : 0;
  const int64_t* page = nullptr;
  if (pages) {
    page = check_indices("pages", *pages, 2);
    k_rows.shape[0] = v_rows.shape[0] = q.shape[0];
    k_rows.shape[2] = v_rows.shape[2] = pages->shape[1] * page_size;
    FASTLM_CHECK(v.shape[0] == k.shape[0] && v.shape[2] == page_size, op, ": v must have the pages of k");
  }
  cpu::AttentionBatch b =
      check_attention(op, border.check_attention(op, q, k_rows, v_rows), q, k_rows, v_rows, o, lse,
                      {{}, {}, slopes, sinks, lower, diagonal, scale, softcap, 0, 0, {}});
  b.k_lens = check_indices("k_lens", k_lens, 1);
  for (int64_t n = 0; n < b.batch; ++n) {
    const int64_t len = b.k_lens[n];
    FASTLM_CHECK(len >= 0 && len <= b.shape.k_len, op, ": k_lens[", n, "] must be from 0 to ", b.shape.k_len, ", got ", len);
    for (int64_t i = 0; page != nullptr && i * page_size < len; ++i) {
      const int64_t at = page[n * pages->shape[1] + i];
      FASTLM_CHECK(at >= 0 && at < k.shape[0], op, ": pages[", n, ", ", i, "] must be from 0 to ", k.shape[0] - 1, ", got ", at);
    }
  }
  if (pages) {
    b.pages = page, b.pages_row = pages->shape[1];
    b.shape.page_size = page_size, b.shape.k_page = k.strides[0], b.shape.v_page = v.strides[0];
    b.k.batch = b.v.batch = 0;
  }
  run_kernel(work_of(b), [&] {
    cpu::attention_forward(q.dtype, b, q.data, k.data, v.data, o.data, lse.data, threads);
  });
}

// The rows and classes of a call, after checking its tensors.
void cross_entropy_forward(const TensorView& x, const TensorView& target, const TensorView& loss, const TensorView& lse,
                           int64_t ignored, double smoothing, double softcap, int threads) {
  int64_t rows = border.check_cross_entropy("cross_entropy", x, target, loss, lse);
  run_kernel(x.numel(), [&] {
    cpu::cross_entropy_forward(x.dtype, x.data, static_cast<const int64_t*>(target.data), loss.data, lse.data, rows,
                               {x.shape[1], ignored, smoothing, softcap}, threads);
  });
}

void cross_entropy_backward(const TensorView& g, const OptionalTensor& dlse, const TensorView& x, const TensorView& target,
                            const TensorView& lse, const TensorView& dx, int64_t ignored, double smoothing, double softcap,
                            int threads) {
  int64_t rows = border.check_cross_entropy("cross_entropy_backward", x, target, g, lse);
  border.check_same_dense("cross_entropy_backward", x, {&dx});
  if (dlse) border.check_sums("cross_entropy_backward", "dlse", x, *dlse, rows);
  run_kernel(x.numel(), [&] {
    cpu::cross_entropy_backward(x.dtype, g.data, data_of(dlse), x.data, static_cast<const int64_t*>(target.data), lse.data,
                                dx.data, rows, {x.shape[1], ignored, smoothing, softcap}, threads);
  });
}

// Which way round the elements of a matrix lie: along its rows, or turned, along its columns. Sets the other stride.
bool check_factor(const TensorView& like, const char* name, const TensorView& t, int64_t rows, int64_t cols,
                  int64_t* stride) {
  border.check_device("matmul", like, t);
  FASTLM_CHECK(t.dtype == like.dtype && t.ndim == 2 && t.shape[0] == rows && t.shape[1] == cols, "matmul: ", name,
               " must be ", dtype_name(like.dtype), " (", rows, ", ", cols, "), got ", t.describe());
  bool by_rows = t.strides[1] == 1 || cols <= 1, by_cols = t.strides[0] == 1 || rows <= 1;
  FASTLM_CHECK(by_rows || by_cols || t.numel() == 0, "matmul: ", name, " must be contiguous along one dimension, got ",
               t.describe());
  *stride = t.strides[by_rows ? 0 : 1];
  return !by_rows;
}

void matmul(const TensorView& a, const TensorView& b, const TensorView& c, bool add, int threads) {
  border.check_float("matmul", "a", a);
  FASTLM_CHECK(a.dtype != DType::kF64 && a.ndim == 2 && b.ndim == 2, "matmul: takes matrices of up to 32 bits, got ",
               a.describe(), " and ", b.describe());
  border.check_device("matmul", a, c);
  FASTLM_CHECK(c.dtype == DType::kF32 && c.ndim == 2 && c.shape[0] == a.shape[0] && c.shape[1] == b.shape[1] &&
                   c.contiguous(),
               "matmul: c must be contiguous float32 (", a.shape[0], ", ", b.shape[1], "), got ", c.describe());
  cpu::Matmul m{c.shape[0], c.shape[1], a.shape[1], a.data, b.data, static_cast<float*>(c.data), 0, 0, c.shape[1],
                false, false, add};
  m.a_turned = check_factor(a, "a", a, m.rows, m.depth, &m.a_stride);
  m.b_turned = check_factor(a, "b", b, m.depth, m.cols, &m.b_stride);
  run_kernel(m.rows * m.cols * m.depth, [&] { cpu::matmul(a.dtype, m, threads); });
}

int64_t run_products(const std::string& dtype, int64_t rounds, int threads) {
  FASTLM_CHECK(dtype == "float32" || dtype == "bfloat16", "run_products: dtype must be float32 or bfloat16, got ", dtype);
  py::gil_scoped_release release;
  return cpu::run_products(dtype == "float32" ? DType::kF32 : DType::kBF16, rounds, threads);
}

float* dense_floats(const char* op, const TensorView& t) {
  FASTLM_CHECK(t.dtype == DType::kF32 && !t.cuda && t.contiguous(), op,
               ": tensors must be contiguous float32 on cpu, got ", t.describe());
  return static_cast<float*>(t.data);
}

int64_t run_read(const TensorView& a, int threads) {
  const float* data = dense_floats("run_read", a);
  py::gil_scoped_release release;
  return cpu::run_read(data, a.numel(), threads);
}

int64_t run_update(const TensorView& a, const TensorView& b, int threads) {
  float* data = dense_floats("run_update", a);
  const float* added = dense_floats("run_update", b);
  FASTLM_CHECK(same_layout(a, b), "run_update: b must be like a, ", a.describe(), ", got ", b.describe());
  py::gil_scoped_release release;
  return cpu::run_update(data, added, a.numel(), threads);
}

}  // namespace
}  // namespace fastlm

PYBIND11_MODULE(_cpu, m) {
  namespace cpu = fastlm::cpu;
  namespace py = pybind11;
  fastlm::TensorReader::instance();  // here, and not in some thread's first call: it imports torch
  m.doc() = "fastlm's CPU kernels. Outputs are allocated by the caller; see fastlm/kernels/native.";
  m.def("compiled_isas", &cpu::compiled_isas, "Instruction sets in this binary, best first.");
  m.def("usable_isas", &cpu::usable_isas, "Those that this machine can run, best first.");
  m.def("active_isa", [] { return cpu::kernels().isa; }, "The one in use.");
  m.def("select_isa", [](const std::string& name) { cpu::select_isa(name.c_str()); }, "Force one of the usable sets.");
  m.attr("threaded") = cpu::kThreaded;
  m.def("threads_usable", &cpu::threads_usable, "False in a forked child, where kernels run on one thread.");
  m.def("use_exchange", [](bool on) { return fastlm::TensorReader::instance().use_exchange(on); },
        "Read tensors through torch's DLPack exchange capsule (the default where there is one); returns whether it is in use.");

  m.attr("acts") = py::cast(std::vector<std::string>(fastlm::kActNames, fastlm::kActNames + fastlm::kNumActs));
  m.def("act_forward", &fastlm::act_forward);
  m.def("act_backward", &fastlm::act_backward);
  m.def("adam_step", &fastlm::adam_step);
  m.def("sgd_step", &fastlm::sgd_step);
  m.def("bias_act_forward", &fastlm::bias_act_forward);
  m.def("bias_act_backward", &fastlm::bias_act_backward);
  m.def("cross_entropy_forward", &fastlm::cross_entropy_forward);
  m.def("cross_entropy_backward", &fastlm::cross_entropy_backward);
  m.def("glu_forward", &fastlm::glu_forward);
  m.def("glu_backward", &fastlm::glu_backward);
  m.def("matmul", &fastlm::matmul, "c = a b, or c += a b: a (M, K) and b (K, N) of one dtype, c (M, N) float32.");
  m.def("norm_forward", &fastlm::norm_forward);
  m.def("norm_backward", &fastlm::norm_backward);
  m.def("sum_of_squares", &fastlm::sum_of_squares, "Over all elements of dense tensors.");

  // lower, diagonal: query i sees key j iff i + lower <= j <= i + diagonal. dbias is written where a query sees a key.
  m.def("dropout", &fastlm::dropout);
  m.def("mse_loss_forward", &fastlm::mse_loss_forward);
  m.def("mse_loss_backward", &fastlm::mse_loss_backward);
  m.def("embedding_backward", &fastlm::embedding_backward, "dweight (V, N) from dy (M, N) and int64 index (M,).");
  m.def("rope", &fastlm::rope);
  m.def("attention_forward", &fastlm::attention_forward);
  m.def("attention_backward", &fastlm::attention_backward);
  m.def("attention_decode", &fastlm::attention_decode);

  // For fastlm/benchmarks/limits.py: each returns the FLOPs or bytes that it did.
  m.def("run_products", &fastlm::run_products);
  m.def("run_read", &fastlm::run_read);
  m.def("run_update", &fastlm::run_update);
}
