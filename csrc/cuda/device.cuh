// What the kernels ask of the machine: the few things that are not plain C++. Everything that is written in PTX stands
// here, so that a test can supply the same names in C++ and run the kernels and their launchers on the CPU.
#pragma once

#ifdef FASTLM_DEVICE_EMULATION
#include FASTLM_DEVICE_EMULATION
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "target.h"

namespace fastlm::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

// --- launching --------------------------------------------------------------------------------------------------------
inline void check(cudaError_t status, const char* what, const Target& target) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would report it again
  throw std::runtime_error("fastlm: " + std::string(what) + " failed on cuda:" + std::to_string(target.device) + ": " +
                           cudaGetErrorString(status));
}

// Makes a device current for its lifetime. One that is current already is left alone: setting it would make a context.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Target& target) : device_(target.device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", target);
    if (device_ != previous_) check(cudaSetDevice(device_), "cudaSetDevice", target);
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

// Queues kernel<<<grid, threads, shared_bytes>>>(args...); an empty grid is nothing to do.
template <class... Params, class... Args>
void launch(const Target& target, const char* name, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  DeviceGuard guard(target);
  if (shared_bytes > 48 * 1024) {  // more than every block gets by default
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name, target);
  }
  kernel<<<grid, threads, shared_bytes, reinterpret_cast<cudaStream_t>(target.stream)>>>(args...);
  check(cudaGetLastError(), name, target);
}

// 10 * major + minor of the architecture that the code which a kernel runs here was written for: 80 for an A100. An older
// one than the device's where the driver translated PTX.
template <class... Params>
int compiled_capability(const Target& target, void (*kernel)(Params...)) {
  DeviceGuard guard(target);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "reading a kernel's attributes", target);
  return std::min(attributes.ptxVersion, attributes.binaryVersion);
}

// How many multiprocessors a device has.
inline int processors(const Target& target) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, target.device), "reading a device's attributes", target);
  return count;
}

// --- number formats ---------------------------------------------------------------------------------------------------
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(f16 x) { return __half2float(x); }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ T narrow(float x);  // rounds to nearest even
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline double narrow<double>(float x) { return x; }
template <> __device__ inline f16 narrow<f16>(float x) { return __float2half_rn(x); }
template <> __device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <class T> __device__ inline T narrow(double x) { return static_cast<T>(x); }

__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Two neighbours in one register, the first in the low half.
template <class T> __device__ uint32_t pack(float low, float high);
template <> __device__ inline uint32_t pack<f16>(float low, float high) {
  __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}
template <> __device__ inline uint32_t pack<bf16>(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

__device__ inline float exp2_approx(float x) {  // 2 ulp; exp2(-inf) = 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal(float x) {  // 1 ulp; 0 where that would be subnormal
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double reciprocal(double x) { return 1 / x; }

// Reads 16 bytes in one access.
template <class V> __device__ inline V load16(const void* from) { return *static_cast<const V*>(from); }
// Writes 16 bytes in one access. In PTX, since the compiler takes a vector apart where another branch stores its elements.
__device__ inline void store16(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// --- a warp and its memory --------------------------------------------------------------------------------------------
template <class T> __device__ inline T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
template <class T> __device__ inline T shuffle(T x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

__device__ inline void sync_warp() { __syncwarp(); }

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts copying kBytes (4, 8 or 16, all aligned) to shared memory; zeros where `valid` is false, reading nothing.
template <int kBytes> __device__ inline void copy_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the L1: a tile is read from shared memory from now on
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes),
                 "r"(bytes));
  }
#endif
}
__device__ inline void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most kPending of the committed groups are under way.
template <int kPending> __device__ inline void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// c (16x8, fp32) += a (16x16) b (16x8) on the tensor cores; attention_index.h says which lane holds what.
template <class T> __device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
template <>
__device__ inline void multiply_add<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace fastlm::cuda

#endif
