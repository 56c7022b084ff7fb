#include "relu.h"

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

int index_of(DType dtype) { return static_cast<int>(dtype); }

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
void bias_backward_of(DType dtype, const void* dy, const void* saved, const void* bias, void* dx, Sum* dbias,
                      int64_t rows, int64_t cols, bool squared, int threads) {
  auto kernel = kernels_for(dtype).relu.bias_backward[index_of(dtype)];
  int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  std::vector<Sum> partial(chunks * cols);
  parallel_for(rows * cols < kGrain ? 1 : threads, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t row = chunk * kRowChunk, count = std::min(kRowChunk, rows - row), offset = row * cols;
      kernel(at(dy, offset, dtype), at(saved, offset, dtype), bias, at(dx, offset, dtype), &partial[chunk * cols], count,
             cols, squared);
    }
  });
  if (dbias != nullptr) add_chunks(partial.data(), chunks, cols, dbias);
}

}  // namespace

void relu_forward(DType dtype, const void* x, void* y, int64_t n, bool squared, int threads) {
  auto kernel = kernels_for(dtype).relu.forward[index_of(dtype)];
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(x, begin, dtype), at(y, begin, dtype), end - begin, squared);
  });
}

void relu_backward(DType dtype, const void* dy, const void* saved, void* dx, int64_t n, bool squared, int threads) {
  auto kernel = kernels_for(dtype).relu.backward[index_of(dtype)];
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(dy, begin, dtype), at(saved, begin, dtype), at(dx, begin, dtype), end - begin, squared);
  });
}

void bias_act_forward(DType dtype, const void* x, const void* bias, void* y, int64_t rows, int64_t cols, bool squared,
                      int threads) {
  auto kernel = kernels_for(dtype).relu.bias_forward[index_of(dtype)];
  parallel_for(threads, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    kernel(at(x, begin * cols, dtype), bias, at(y, begin * cols, dtype), end - begin, cols, squared);
  });
}

void bias_act_backward(DType dtype, const void* dy, const void* saved, const void* bias, void* dx, void* dbias,
                       int64_t rows, int64_t cols, bool squared, int threads) {
  if (dtype == DType::kF64) {
    bias_backward_of(dtype, dy, saved, bias, dx, static_cast<double*>(dbias), rows, cols, squared, threads);
  } else {
    bias_backward_of(dtype, dy, saved, bias, dx, static_cast<float*>(dbias), rows, cols, squared, threads);
  }
}

}  // namespace fastlm::cpu
