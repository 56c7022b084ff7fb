#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

namespace fastlm::cpu {

// Uninitialised memory on cache lines, `count` pieces of `bytes`.
class Workspace {
 public:
  Workspace(int64_t count, size_t bytes)
      : stride_((bytes + kLine - 1) / kLine * kLine),
        memory_(static_cast<char*>(::operator new(count * stride_, std::align_val_t{kLine}))) {}
  ~Workspace() { ::operator delete(memory_, std::align_val_t{kLine}); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* piece(int64_t i) const { return memory_ + i * stride_; }

 private:
  static constexpr size_t kLine = 64;
  size_t stride_;
  char* memory_;
};

// How many threads parallel_tasks can keep busy: as many pieces of workspace are needed.
inline int64_t min_threads(int threads, int64_t tasks) { return std::max<int64_t>(1, std::min<int64_t>(threads, tasks)); }

}  // namespace fastlm::cpu
