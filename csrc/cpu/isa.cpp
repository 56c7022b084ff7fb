#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastlm::cpu {

namespace amx { extern const Kernels kTable; }
namespace avx512bf16 { extern const Kernels kTable; }
namespace avx512 { extern const Kernels kTable; }
namespace avx2 { extern const Kernels kTable; }
namespace baseline { extern const Kernels kTable; }

namespace {

struct Isa {
  const Kernels* table;
  bool (*usable)();
};

#if FASTLM_EMULATE_AVX512
constexpr bool kEmulated = true;  // see tests/kernels/avx512
#else
constexpr bool kEmulated = false;
#endif

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
#if FASTLM_AVX512
bool has_avx512() {
  return kEmulated || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"));
}
#endif
#if FASTLM_AVX512BF16
bool has_avx512bf16() { return has_avx512() && (kEmulated || __builtin_cpu_supports("avx512bf16")); }
#endif
#if FASTLM_AMX
bool has_amx() {
#if FASTLM_EMULATE_AMX  // see tests/kernels/amx
  return has_avx512bf16();
#elif defined(__linux__)
  unsigned a, b, c, features;
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &features)) return false;
  if ((features & kTiles) == 0 || (features & kBf16) == 0) return false;
  // Linux gives a process the tiles' 8 KB of state when it asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

const Isa kIsas[] = {
// What this compiler knows; see CMakeLists.txt.
#if FASTLM_AMX
    {&amx::kTable, has_amx},
#endif
#if FASTLM_AVX512BF16
    {&avx512bf16::kTable, has_avx512bf16},
#endif
#if FASTLM_AVX512
    {&avx512::kTable, has_avx512},
#endif
#if FASTLM_AVX2
    // Every CPU with AVX2 has F16C; GCC before 11 cannot ask for it by name.
    {&avx2::kTable, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&baseline::kTable, [] { return true; }},
};

std::atomic<const Kernels*> active{nullptr};

}  // namespace

std::vector<const char*> compiled_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : kIsas) names.push_back(isa.table->isa);
  return names;
}

std::vector<const char*> usable_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : kIsas) {
    if (isa.usable()) names.push_back(isa.table->isa);
  }
  return names;
}

void select_isa(const char* name) {
  std::string known;
  for (const Isa& isa : kIsas) {
    known += std::string(known.empty() ? "" : ", ") + isa.table->isa;
    if (std::strcmp(isa.table->isa, name) != 0) continue;
    if (!isa.usable()) throw std::invalid_argument(std::string("fastlm: this CPU cannot run the instruction set ") + name);
    active.store(isa.table, std::memory_order_release);
    return;
  }
  throw std::invalid_argument(std::string("fastlm: FASTLM_CPU_ISA must be one of ") + known + ", got " + name);
}

const Kernels& kernels() {
  const Kernels* table = active.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* forced = std::getenv("FASTLM_CPU_ISA");
    select_isa(forced != nullptr && *forced ? forced : usable_isas().front());
    table = active.load(std::memory_order_acquire);
  }
  return *table;
}

const Kernels& kernels_for(DType dtype) { return dtype == DType::kF64 ? baseline::kTable : kernels(); }

}  // namespace fastlm::cpu
