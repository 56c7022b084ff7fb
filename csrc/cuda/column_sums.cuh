// Sums over rows in two steps, in the same order every time: a kernel leaves one row of sums for each of its parts, these add
// them up.
#pragma once

#include "common.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kSumColumns = 32, kSumThreads = 256, kSumRows = kSumThreads / kSumColumns;

// out[c] = sum over parts of partial[part, c], in double
template <class C>
__global__ void __launch_bounds__(kSumThreads) column_sum_kernel(const C* partial, C* out, int64_t parts, int64_t cols) {
  __shared__ double sums[kSumRows][kSumColumns];
  int x = threadIdx.x % kSumColumns, y = threadIdx.x / kSumColumns;
  int64_t col = int64_t(blockIdx.x) * kSumColumns + x;
  double sum = 0;
  for (int64_t i = y; i < (col < cols ? parts : 0); i += kSumRows) sum += partial[i * cols + col];
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || col >= cols) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][x];
  out[col] = static_cast<C>(sum);
}

template <class C> void sum_columns(const Target& target, const char* name, const C* partial, C* out, int64_t parts, int64_t cols) {
  launch(target, name, column_sum_kernel<C>, grid_of(ceil_div(cols, kSumColumns)), kSumThreads, 0, partial, out, parts, cols);
}

}  // namespace
}  // namespace fastlm::cuda
