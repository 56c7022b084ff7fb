#include "activation.h"

#include <vector>

#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu {
namespace {

// Below this many elements a thread costs more to wake than it saves; measured with bench_relu.
constexpr int64_t kGrain = 1 << 15;
// Column sums run in float within a chunk of rows and in double across chunks. The chunk does not depend on the number
// of threads, so neither does the result.
constexpr int64_t kRowChunk = 512;

const ActivationKernels::OfDType& kernel_of(Act act, DType dtype) {
  return kernels_for(dtype).activation.of[static_cast<int>(act)][static_cast<int>(dtype)];
}

const char* at(const void* base, int64_t offset, DType dtype) {
  return static_cast<const char*>(base) + offset * size_of(dtype);
}
char* at(void* base, int64_t offset, DType dtype) { return static_cast<char*>(base) + offset * size_of(dtype); }

int64_t row_grain(int64_t cols) { return cols > 0 ? (kGrain + cols - 1) / cols : 1; }

template <class Sum> void add_chunks(const Sum* partial, int64_t chunks, int64_t cols, Sum* out) {
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; ++i) sum += partial[i * cols + c];
    out[c] = static_cast<Sum>(sum);
  }
}

template <class Sum>
void bias_backward_of(Act act, DType dtype, const void* dy, const void* saved, const void* bias, void* dx, Sum* dbias,
                      int64_t rows, int64_t cols, int threads) {
  auto kernel = kernel_of(act, dtype).bias_backward;
  int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  std::vector<Sum> partial(chunks * cols);
  parallel_for(rows * cols < kGrain ? 1 : threads, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t row = chunk * kRowChunk, count = std::min(kRowChunk, rows - row), offset = row * cols;
      kernel(at(dy, offset, dtype), at(saved, offset, dtype), bias, at(dx, offset, dtype), &partial[chunk * cols], count,
             cols);
    }
  });
  if (dbias != nullptr) add_chunks(partial.data(), chunks, cols, dbias);
}

}  // namespace

void act_forward(Act act, DType dtype, const void* x, void* y, int64_t n, int threads) {
  auto kernel = kernel_of(act, dtype).forward;
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(x, begin, dtype), at(y, begin, dtype), end - begin);
  });
}

void act_backward(Act act, DType dtype, const void* dy, const void* saved, void* dx, int64_t n, int threads) {
  auto kernel = kernel_of(act, dtype).backward;
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(dy, begin, dtype), at(saved, begin, dtype), at(dx, begin, dtype), end - begin);
  });
}

void bias_act_forward(Act act, DType dtype, const void* x, const void* bias, void* y, int64_t rows, int64_t cols,
                      int threads) {
  auto kernel = kernel_of(act, dtype).bias_forward;
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    kernel(at(x, begin * cols, dtype), bias, at(y, begin * cols, dtype), end - begin, cols);
  });
}

void bias_act_backward(Act act, DType dtype, const void* dy, const void* saved, const void* bias, void* dx, void* dbias,
                       int64_t rows, int64_t cols, int threads) {
  if (dtype == DType::kF64) {
    bias_backward_of(act, dtype, dy, saved, bias, dx, static_cast<double*>(dbias), rows, cols, threads);
  } else {
    bias_backward_of(act, dtype, dy, saved, bias, dx, static_cast<float*>(dbias), rows, cols, threads);
  }
}

void glu_forward(Act act, DType dtype, const void* gate, const void* up, void* y, int64_t rows, int64_t cols,
                 int64_t gate_row, int64_t up_row, int threads) {
  auto kernel = kernel_of(act, dtype).glu_forward;
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    kernel(at(gate, begin * gate_row, dtype), at(up, begin * up_row, dtype), at(y, begin * cols, dtype), end - begin, cols,
           gate_row, up_row);
  });
}

void glu_backward(Act act, DType dtype, const void* dy, const void* gate, const void* up, void* dgate, void* dup,
                  int64_t rows, int64_t cols, int64_t gate_row, int64_t up_row, int threads) {
  auto kernel = kernel_of(act, dtype).glu_backward;
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    kernel(at(dy, begin * cols, dtype), at(gate, begin * gate_row, dtype), at(up, begin * up_row, dtype),
           at(dgate, begin * cols, dtype), at(dup, begin * cols, dtype), end - begin, cols, gate_row, up_row);
  });
}

}  // namespace fastlm::cpu
