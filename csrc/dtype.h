// Element types that tensors arrive in. Plain C++: seen by the bindings, the CPU kernels and the CUDA launchers.
#pragma once

#include <cstdint>

namespace fastlm {

enum class DType : int { kF32, kBF16, kF16, kF64, kBool, kU8, kI32, kI64 };
constexpr int kNumDTypes = 8;
constexpr int kNumFloatDTypes = 4;  // the first four

inline int64_t size_of(DType t) {  // bytes of an element
  constexpr int64_t sizes[kNumDTypes] = {4, 2, 2, 8, 1, 1, 4, 8};
  return sizes[static_cast<int>(t)];
}

inline DType sum_dtype(DType t) { return t == DType::kF64 ? DType::kF64 : DType::kF32; }  // that kernels sum up in

inline const char* dtype_name(DType t) {  // torch's names
  constexpr const char* names[kNumDTypes] = {"float32", "bfloat16", "float16", "float64", "bool", "uint8", "int32", "int64"};
  return names[static_cast<int>(t)];
}

}  // namespace fastlm
