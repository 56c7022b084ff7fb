#include "activation.h"

#include "isa.h"
#include "rows.h"

namespace fastlm::cpu {
namespace {

const ActivationKernels::OfDType& kernel_of(Act act, DType dtype) {
  return kernels_for(dtype).activation.of[static_cast<int>(act)][static_cast<int>(dtype)];
}

}  // namespace

void act_forward(Act act, DType dtype, const void* x, void* y, int64_t n, int threads) {
  auto kernel = kernel_of(act, dtype).forward;
  const bool past = x != y && past_caches(y, n, dtype);
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(x, begin, dtype), at(y, begin, dtype), end - begin, past);
  });
}

void act_backward(Act act, DType dtype, const void* dy, const void* saved, void* dx, int64_t n, int threads) {
  auto kernel = kernel_of(act, dtype).backward;
  const bool past = past_caches(dx, n, dtype);
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(dy, begin, dtype), at(saved, begin, dtype), at(dx, begin, dtype), end - begin, past);
  });
}

void bias_act_forward(Act act, DType dtype, const void* x, const void* bias, void* y, int64_t rows, int64_t cols,
                      const Dropout& dropout, int threads) {
  auto kernel = kernel_of(act, dtype).bias_forward;
  auto drop = kernels_for(dtype).dropout.forward[static_cast<int>(dtype)];
  const bool dropping = dropout.keep_scale != 1, past = !dropping && past_caches(y, rows * cols, dtype);
  // What is dropped is written twice, the second time in the first cache.
  constexpr int64_t kInCache = 4096;
  const int64_t step = dropping ? std::max<int64_t>(1, kInCache / std::max<int64_t>(1, cols)) : rows;
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += step) {
      const int64_t count = std::min(step, end - row);
      void* to = at(y, row * cols, dtype);
      kernel(at(x, row * cols, dtype), bias, to, count, cols, past);
      if (dropping) drop(to, to, row * cols, count * cols, dropout.seed, dropout.drop_below, dropout.keep_scale);
    }
  });
}

void bias_act_backward(Act act, DType dtype, const void* dy, const void* saved, const void* bias, void* dx, void* dbias,
                       int64_t rows, int64_t cols, int threads) {
  auto kernel = kernel_of(act, dtype).bias_backward;
  const bool past = past_caches(dx, rows * cols, dtype);
  sum_by_chunks(dtype, rows, cols, {dbias, nullptr}, threads, [&](int64_t row, int64_t count, auto* sums) {
    int64_t offset = row * cols;
    kernel(at(dy, offset, dtype), at(saved, offset, dtype), bias, at(dx, offset, dtype), sums, count, cols, past);
  });
}

void glu_forward(Act act, DType dtype, const void* gate, const void* up, void* y, int64_t rows, int64_t cols,
                 int64_t gate_row, int64_t up_row, int threads) {
  auto kernel = kernel_of(act, dtype).glu_forward;
  const bool past = past_caches(y, rows * cols, dtype);
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    kernel(at(gate, begin * gate_row, dtype), at(up, begin * up_row, dtype), at(y, begin * cols, dtype), end - begin, cols,
           gate_row, up_row, past);
  });
}

void glu_backward(Act act, DType dtype, const void* dy, const void* gate, const void* up, void* dgate, void* dup,
                  int64_t rows, int64_t cols, int64_t gate_row, int64_t up_row, int threads) {
  auto kernel = kernel_of(act, dtype).glu_backward;
  const bool past = past_caches(dgate, rows * cols, dtype);
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    kernel(at(dy, begin * cols, dtype), at(gate, begin * gate_row, dtype), at(up, begin * up_row, dtype),
           at(dgate, begin * cols, dtype), at(dup, begin * cols, dtype), end - begin, cols, gate_row, up_row, past);
  });
}

}  // namespace fastlm::cpu
