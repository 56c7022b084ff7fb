// Splits work over OpenMP threads. The runtime is the one torch has loaded: nothing is linked here, because two runtimes
// in one process fight over the cores (8 ms instead of 10 us for alternating regions).
#pragma once

#include <algorithm>
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastlm::cpu {

#if defined(_OPENMP)
constexpr bool kThreaded = true;
#else
constexpr bool kThreaded = false;  // kernels run on the calling thread
#endif

// False in a child made by os.fork after a parallel region: libgomp would wait for ever for threads the child lacks.
bool threads_usable();

// body(begin, end) over [0, n) in one piece per thread, cut at multiples of `grain`.
template <class Body>
void parallel_for(int threads, int64_t n, int64_t grain, const Body& body) {
  int64_t blocks = (n + grain - 1) / grain;
  int pieces = static_cast<int>(std::min<int64_t>(threads, blocks));
  if (pieces <= 1 || !threads_usable()) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(pieces) schedule(static, 1)
#endif
  for (int i = 0; i < pieces; ++i) {
    int64_t begin = blocks * i / pieces * grain, end = std::min(n, blocks * (i + 1) / pieces * grain);
    if (begin < end) body(begin, end);
  }
}

// body(task, thread) for every task in [0, n), each taken by the next free thread; for tasks of unequal size. The
// thread's number, below `threads`, picks a workspace.
template <class Body>
void parallel_tasks(int threads, int64_t n, const Body& body) {
  [[maybe_unused]] int team = threads_usable() ? static_cast<int>(std::min<int64_t>(threads, n)) : 1;
#if defined(_OPENMP)
  if (team > 1) {
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) body(i, 0);
}

}  // namespace fastlm::cpu
