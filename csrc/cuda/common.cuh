// Shared by all CUDA kernels: 16-byte accesses, reductions, the step from a dtype to a type.
#pragma once

#include <cstring>

#include "../dtype.h"
#include "device.cuh"

namespace fastlm::cuda {

constexpr int kWarp = 32;

// --- types ------------------------------------------------------------------------------------------------------------
// What a stored element is computed in.
template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using compute_t = typename ComputeOf<T>::type;

template <class T> struct TypeTag { using type = T; };

// Calls run(TypeTag<T>) for the element type.
template <class Run> void dispatch_float(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kF32: return run(TypeTag<float>{});
    case DType::kBF16: return run(TypeTag<bf16>{});
    case DType::kF16: return run(TypeTag<f16>{});
    case DType::kF64: return run(TypeTag<double>{});
    default: throw std::invalid_argument(std::string("fastlm: no CUDA kernel for ") + dtype_name(dtype));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A one-dimensional grid, refused where the device could not count its blocks.
inline dim3 grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument("fastlm: tensor too large: it would take " + std::to_string(blocks) + " CUDA blocks");
  }
  return dim3(static_cast<unsigned>(blocks));
}

// --- 16-byte accesses -------------------------------------------------------------------------------------------------
template <class T> constexpr int kVector = 16 / sizeof(T);

template <class T> struct alignas(16) Vector {
  T at[kVector<T>];
};

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The first `count` elements at p, the rest zero: one access where the vector is whole and p aligned, else one each, so
// that tails and misaligned tensors run the arithmetic of the body.
template <class T> __device__ Vector<T> load_count(const T* p, int64_t count, bool aligned) {
  if (aligned && count >= kVector<T>) return load16<Vector<T>>(p);
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) v.at[i] = i < count ? p[i] : narrow<T>(0.0f);
  return v;
}

template <class T> __device__ void store_count(T* p, const Vector<T>& v, int64_t count, bool aligned) {
  if (aligned && count >= kVector<T>) {
    uint32_t words[4];
    memcpy(words, &v, 16);
    return store16(p, words);
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (i < count) p[i] = v.at[i];
  }
}

// The elements of compute_t that go with a vector of T: `count` at most, zeros past them.
template <class T> __device__ void load_wide(compute_t<T> (&out)[kVector<T>], const compute_t<T>* from, int64_t count, bool aligned) {
  using C = compute_t<T>;
#pragma unroll
  for (int part = 0; part < kVector<T> / kVector<C>; ++part) {
    Vector<C> v = load_count(from + part * kVector<C>, count - part * kVector<C>, aligned);
#pragma unroll
    for (int e = 0; e < kVector<C>; ++e) out[part * kVector<C> + e] = v.at[e];
  }
}

// --- reductions -------------------------------------------------------------------------------------------------------
// Over the kLanes lanes that share lane / kLanes; every one of them gets the result.
template <int kLanes, class T> __device__ T lanes_sum(T x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int kLanes> __device__ float lanes_max(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
// Over a block of kThreads, once in a kernel; thread 0 gets the result.
template <int kThreads> __device__ double block_sum(double x) {
  __shared__ double sums[kThreads / kWarp];
  x = lanes_sum<kWarp>(x);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int i = 1; i < kThreads / kWarp; ++i) x += sums[i];
  return x;
}

}  // namespace fastlm::cuda
