#include "limits.h"

#include <atomic>

#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kGrain = 1 << 16;
std::atomic<float> sink;  // results go here, so that the work has one

}  // namespace

int64_t run_products(DType dtype, int64_t rounds, int threads) {
  const LimitsKernels& limits = kernels().limits;
  auto run = dtype == DType::kBF16 ? limits.dot_bf16 : limits.fma;
  if (run == nullptr) return 0;
  parallel_for(threads, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sink.store(run(rounds), std::memory_order_relaxed);
  });
  return threads * rounds * (dtype == DType::kBF16 ? limits.dot_bf16_flops : limits.fma_flops);
}

int64_t run_read(const float* a, int64_t n, int threads) {
  auto read = kernels().limits.read;
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    sink.store(read(a + begin, end - begin), std::memory_order_relaxed);
  });
  return n * int64_t{sizeof(float)};
}

int64_t run_update(float* a, const float* b, int64_t n, int threads) {
  auto update = kernels().limits.update;
  parallel_for(threads, n, kGrain, [&](int64_t begin, int64_t end) {
    update(a + begin, b + begin, end - begin);
  });
  return 3 * n * int64_t{sizeof(float)};
}

}  // namespace fastlm::cpu
