#include "mse_loss.h"

#include "isa.h"
#include "rows.h"

namespace fastlm::cpu {

double mse_loss_forward(DType dtype, const void* x, const void* target, int64_t n, int threads) {
  constexpr int64_t kPiece = 1 << 16;  // the unit that is shared out, whatever the number of threads
  auto kernel = kernels_for(dtype).mse_loss.forward[static_cast<int>(dtype)];
  std::vector<double> sums((n + kPiece - 1) / kPiece);
  parallel_for(threads, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      sums[k] = kernel(at(x, k * kPiece, dtype), at(target, k * kPiece, dtype), std::min(kPiece, n - k * kPiece));
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void mse_loss_backward(DType dtype, const void* x, const void* target, double scale, void* dx, int64_t n, int threads) {
  auto kernel = kernels_for(dtype).mse_loss.backward[static_cast<int>(dtype)];
  const bool past = past_caches(dx, n, dtype);
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    kernel(at(x, begin, dtype), at(target, begin, dtype), scale, at(dx, begin, dtype), end - begin, past);
  });
}

}  // namespace fastlm::cpu
