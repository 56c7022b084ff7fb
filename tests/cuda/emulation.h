// csrc/cuda/device.cuh in plain C++: runs the CUDA kernels and their launchers, unchanged, on the CPU.
//
// Every CUDA thread is a fiber. One warp runs as far as it can without the others, then another, in random order, so that
// a missing barrier shows as a wrong result. Asynchronous copies arrive either at once or as late as allowed, decided
// by launch: the first finds a tile that is overwritten while still read, the second one that is read before it came. Shared memory starts as NaN. What the
// instructions do is written from NVIDIA's PTX ISA manual (sections "ldmatrix" and "Matrix fragments for
// mma.m16n8k16"), not from the kernels.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <ucontext.h>

#include "cuda/target.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace fastlm::cuda {

// --- fibers -----------------------------------------------------------------------------------------------------------
namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u,%u,%u thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x);
  std::abort();
}

struct Barrier {
  int arrived = 0;
  int generation = 0;
  bool any = false, result = false;  // of the predicates of __syncthreads_or
};

struct Copy {
  void* to;
  unsigned char bytes[16];
  int count;
};

constexpr int kLanes = 32;
// What a lane shows the others in a warp-wide instruction. Two of them, used in turn: nobody can be two instructions
// ahead of a lane that has not read yet.
struct Slot {
  uint32_t words[6];
  const void* address;
};
struct Warp {
  Barrier barrier;
  Slot slots[2][kLanes];
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  int collectives = 0;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

constexpr size_t kStack = 256 * 1024;
constexpr size_t kSharedLimit = 99 * 1024, kHopperSharedLimit = 227 * 1024;

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block;
  std::function<void()> body;
  jmp_buf scheduler;
  int current = 0;
  bool progress = false;
  bool late_copies = false;
  unsigned launches = 0;
  int shared_bytes = 0;       // that the block has
  int64_t bank_conflicts = 0;  // extra passes that ldmatrix would take
  std::function<void()> begin_block;  // what else starts anew
  alignas(1024) char shared[kHopperSharedLimit];
};
inline Machine machine;

inline Fiber& self() { return machine.fibers[machine.current]; }
inline Warp& warp() { return machine.warps[machine.current / kLanes]; }
inline int lane() { return machine.current % kLanes; }

inline void yield() {
  if (_setjmp(self().resume) == 0) _longjmp(machine.scheduler, 1);
}

inline bool wait(Barrier& barrier, int expected, bool predicate = false) {
  int generation = barrier.generation;
  barrier.any |= predicate;
  machine.progress = true;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    barrier.result = barrier.any;
    barrier.any = false;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
  return barrier.result;
}

// Shows `mine` to the warp and returns what all lanes showed.
inline const Slot* exchange(const Slot& mine) {
  Warp& w = warp();
  Slot* slots = w.slots[self().collectives++ % 2];
  slots[lane()] = mine;
  wait(w.barrier, kLanes);
  return slots;
}

inline void enter() {
  machine.body();
  Fiber& fiber = self();
  if (!fiber.groups.empty() || !fiber.open.empty()) {
    for (auto& group : fiber.groups) if (!group.empty()) fail("thread ended with copies under way");
  }
  fiber.done = true;
  machine.progress = true;
  _longjmp(machine.scheduler, 1);
}

// Runs a thread up to its next wait; whether that was its end.
inline bool resume(int i) {
  Machine& m = machine;
  Fiber& f = m.fibers[i];
  if (f.done) return false;
  m.current = i;
  threadIdx = dim3(i, 0, 0);
  if (_setjmp(m.scheduler) == 0) {
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
    setcontext(&f.start);
  }
  return machine.fibers[i].done;
}

// `order`: the threads, warp by warp.
inline void run_block(const std::vector<int>& order) {
  Machine& m = machine;
  std::memset(m.shared, 0xff, sizeof m.shared);
  m.block = {};
  if (m.begin_block) m.begin_block();
  for (Warp& w : m.warps) w.barrier = {};
  for (Fiber& f : m.fibers) {
    f.started = f.done = false;
    f.collectives = 0;
    f.groups.clear();
    f.open.clear();
  }
  // One warp runs until nothing but the rest of the block can let it go on, then the next: as far apart as barriers allow.
  for (size_t left = m.fibers.size(); left > 0;) {
    bool any_progress = false;
    for (size_t begin = 0; begin < order.size(); begin += kLanes) {
      do {
        m.progress = false;
        for (size_t at = begin; at < begin + kLanes; ++at) left -= resume(order[at]);
        any_progress |= m.progress;
      } while (m.progress);
    }
    if (!any_progress && left > 0) fail("deadlock: threads wait at different barriers");
  }
}

}  // namespace emulation

template <class Kernel> int compiled_capability(const Target&, Kernel*) {
  const char* forced = std::getenv("EMULATED_COMPUTE_CAPABILITY");
  return forced != nullptr ? std::atoi(forced) : 80;
}

template <class... Params, class... Args>
void launch(const Target&, const char*, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            const Args&... args) {
  using namespace emulation;
  const bool hopper = compiled_capability(Target{}, kernel) == 90;
  if (shared_bytes > int(hopper ? kHopperSharedLimit : kSharedLimit)) throw std::runtime_error("more shared memory than a block has");
  if (threads % kLanes != 0) throw std::runtime_error("a block must be whole warps");
  Machine& m = machine;
  m.shared_bytes = shared_bytes;
  m.fibers.resize(threads);
  for (Fiber& f : m.fibers) {
    if (!f.stack) f.stack.reset(new char[kStack]);
  }
  m.warps.resize(threads / kLanes);
  m.body = [&] { kernel(args...); };
  gridDim = grid;
  blockDim = dim3(threads);
  std::mt19937 random(++m.launches);
  m.late_copies = random() % 2 == 0;
  std::vector<int> warps(threads / kLanes), order(threads);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = int(i);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        for (size_t i = warps.size() - 1; i > 0; --i) std::swap(warps[i], warps[random() % (i + 1)]);
        for (int i = 0; i < threads; ++i) order[i] = warps[i / kLanes] * kLanes + i % kLanes;
        blockIdx = dim3(x, y, z);
        run_block(order);
      }
    }
  }
}


inline int processors(const Target&) { return 3; }

// In CUDA of floats as well as of doubles.
using std::exp, std::fma, std::log, std::sqrt, std::tanh;

// --- number formats ---------------------------------------------------------------------------------------------------
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
  int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                    : std::ldexp(float(mantissa | 1024), exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

template <class T> T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline double narrow<double>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {
  uint32_t u = bits_of(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> inline f16 narrow<f16>(float x) {
  uint16_t sign = bits_of(x) >> 16 & 0x8000;
  if (std::isnan(x)) return {0x7fff};
  float a = std::fabs(x);
  if (a >= 65520) return {uint16_t(sign | 0x7c00)};
  if (a < 6.103515625e-05f) return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(a, 24))))};
  int exponent;
  std::frexp(a, &exponent);  // a in [2^(e-1), 2^e)
  int mantissa = int(std::nearbyint(std::ldexp(a, 11 - exponent)));  // 1024..2048; 2048 carries into the exponent
  return {uint16_t(sign | uint16_t(((exponent + 13) << 10) + mantissa))};
}
template <class T> T narrow(double x) { return static_cast<T>(x); }

template <class T> uint32_t pack(float low, float high) {
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal(float x) {
  float y = 1 / x;
  return std::fpclassify(y) == FP_SUBNORMAL ? std::copysign(0.0f, y) : y;
}
inline double reciprocal(double x) { return 1 / x; }

template <class V> V load16(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulation::fail("16-byte load from a misaligned address");
  return *static_cast<const V*>(from);
}
inline void store16(void* to, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::fail("16-byte store to a misaligned address");
  std::memcpy(to, words, 16);
}

// --- a warp and its memory --------------------------------------------------------------------------------------------
inline void __syncthreads() { emulation::wait(emulation::machine.block, blockDim.x); }
inline int __syncthreads_or(int predicate) { return emulation::wait(emulation::machine.block, blockDim.x, predicate != 0); }

template <class T> T shuffle(T x, int source) {
  static_assert(sizeof(T) <= 8);
  emulation::Slot slot{};
  std::memcpy(slot.words, &x, sizeof x);
  const emulation::Slot* all = emulation::exchange(slot);
  std::memcpy(&x, all[source & 31].words, sizeof x);
  return x;
}
template <class T> T shuffle_xor(T x, int mask) { return shuffle(x, emulation::lane() ^ mask); }

inline void sync_warp() { emulation::exchange({}); }

inline char* dynamic_shared() { return emulation::machine.shared; }
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - emulation::machine.shared);
}

template <int kBytes> void copy_async(void* shared, const void* global, bool valid) {
  using namespace emulation;
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0) fail("copy_async to a misaligned address");
  if (valid && reinterpret_cast<uintptr_t>(global) % kBytes != 0) fail("copy_async from a misaligned address");
  if (shared < machine.shared || static_cast<char*>(shared) + kBytes > machine.shared + machine.shared_bytes) {
    fail("copy_async outside shared memory");
  }
  Copy copy{shared, {}, kBytes};
  if (valid) std::memcpy(copy.bytes, global, kBytes);
  if (machine.late_copies) {
    std::memset(shared, 0xff, kBytes);  // on its way: what was there is lost
    self().open.push_back(copy);
  } else {
    std::memcpy(shared, copy.bytes, kBytes);
    Copy empty{shared, {}, 0};
    self().open.push_back(empty);
  }
}
inline void copy_commit() {
  emulation::self().groups.push_back(std::move(emulation::self().open));
  emulation::self().open.clear();
}
template <int kPending> void copy_wait() {
  auto& groups = emulation::self().groups;
  while (int(groups.size()) > kPending) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, copy.count);
    groups.erase(groups.begin());
  }
}

namespace emulation {
inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix from a misaligned address");
  const Slot* all = exchange({{}, row});
  for (int m = 0; m < 4; ++m) {
    auto element = [&](int r, int c) { return static_cast<const uint16_t*>(all[8 * m + r].address)[c]; };
    int r = lane() / 4, c = 2 * (lane() % 4);
    out[m] = transposed ? uint32_t(element(c, r)) | uint32_t(element(c + 1, r)) << 16
                        : uint32_t(element(r, c)) | uint32_t(element(r, c + 1)) << 16;
  }
  if (lane() == 0) {  // each matrix is one pass if its eight rows lie in different groups of four banks
    for (int m = 0; m < 4; ++m) {
      int used[8] = {}, passes = 1;
      for (int r = 0; r < 8; ++r) {
        int& count = used[reinterpret_cast<uintptr_t>(all[8 * m + r].address) / 16 % 8];
        passes = std::max(passes, ++count);
      }
      machine.bank_conflicts += passes - 1;
    }
  }
}
}  // namespace emulation
inline void load_matrices(uint32_t (&out)[4], const void* row) { emulation::load_matrices(out, row, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) { emulation::load_matrices(out, row, true); }

template <class T> void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  const Slot* all = exchange({{a[0], a[1], a[2], a[3], b0, b1}, nullptr});
  auto half = [](uint32_t word, int i) { return widen(T{uint16_t(word >> 16 * i)}); };
  // Element (row, k) of A and (k, col) of B, by the manual's tables.
  auto element_a = [&](int row, int k) { return half(all[row % 8 * 4 + k % 8 / 2].words[k / 8 * 2 + row / 8], k % 2); };
  auto element_b = [&](int k, int col) { return half(all[col * 4 + k % 8 / 2].words[4 + k / 8], k % 2); };
  for (int i = 0; i < 4; ++i) {
    int row = lane() / 4 + i / 2 * 8, col = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += element_a(row, k) * element_b(k, col);
  }
}

}  // namespace fastlm::cuda
