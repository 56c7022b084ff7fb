// What kernels for sm_90a ask of the machine beyond device.cuh: copies of whole tiles by the copy engine (TMA), barriers in
// shared memory that count their bytes, products of a warpgroup (wgmma). As there, all that is PTX stands here, and a test
// supplies the same names in C++.
#pragma once

#include "common.cuh"

#ifdef FASTLM_DEVICE_EMULATION
#include FASTLM_HOPPER_EMULATION
#else

#include <cuda.h>

namespace fastlm::cuda {

// Whether this is being compiled for sm_90a, whose instructions no other architecture has.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTLM_SM90A 1
#endif

// --- tensor maps ------------------------------------------------------------------------------------------------------
using TensorMap = CUtensorMap;

// A (B, H, T, D) tensor of 16-bit elements, cut into boxes of 64 columns (128 bytes) by `rows`; swizzled in shared memory
// by 128 bytes, zeros past the edges. False where the copy engine cannot read it.
inline bool make_tensor_map(TensorMap* map, const void* data, bool is_f16, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                            int rows) {
  static auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (encode == nullptr) return false;
  // Innermost first; strides in bytes, of all but the innermost.
  cuuint64_t dims[4] = {cuuint64_t(sizes[3]), cuuint64_t(sizes[2]), cuuint64_t(sizes[1]), cuuint64_t(sizes[0])};
  cuuint64_t steps[3] = {cuuint64_t(2 * strides[2]), cuuint64_t(2 * strides[1]), cuuint64_t(2 * strides[0])};
  cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1}, ones[4] = {1, 1, 1, 1};
  return encode(map, is_f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), dims,
                steps, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// --- shared memory ----------------------------------------------------------------------------------------------------
// Where tiles begin: at a multiple of 1024 bytes, as the swizzle wants it. An address that is known when compiling, and so
// costs no registers.
__device__ inline char* tile_memory() {
  extern __shared__ __align__(1024) char tiles[];
  return tiles;
}

// --- barriers in shared memory ----------------------------------------------------------------------------------------
struct alignas(8) TileBarrier {
  uint64_t word;
};

// Completes a phase when `count` threads have arrived and all announced bytes have come.
__device__ inline void barrier_init(TileBarrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
// Makes initialised barriers visible to the copy engine; a barrier of the block must follow.
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(TileBarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ inline void barrier_arrive_expect(TileBarrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Until the phase of this parity is complete: of a new barrier, parity 0 is its first phase, and 1 counts as done.
__device__ inline void barrier_wait(TileBarrier* b, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}"
      ::"r"(shared_address(b)), "r"(parity) : "memory");
}

// --- the copy engine --------------------------------------------------------------------------------------------------
// Starts copying the box at (column, row, head, batch); its bytes count for the barrier. One thread says it for all.
__device__ inline void load_box(void* shared, const TensorMap* map, TileBarrier* b, int column, int row, int head, int batch) {
#ifdef FASTLM_SM90A
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(b))
      : "memory");
#endif
}
// Between this thread's ordinary accesses to shared memory and the copy engine's or the tensor cores'.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- groups of threads ------------------------------------------------------------------------------------------------
constexpr int kWarpgroup = 128;

template <int kRegisters> __device__ inline void give_registers() {
#ifdef FASTLM_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters> __device__ inline void take_registers() {
#ifdef FASTLM_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Barriers by number, 1 to 15, of so many threads: those that wait, and those that go on.
__device__ inline void group_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void group_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Adds to two neighbours in device memory at a multiple of 8 bytes, in whatever order they come.
__device__ inline void add_two(float* to, float first, float second) {
#if CUDART_VERSION >= 12010
#ifdef FASTLM_SM90A
  atomicAdd(reinterpret_cast<float2*>(to), make_float2(first, second));
#endif
#else
  atomicAdd(to, first);
  atomicAdd(to + 1, second);
#endif
}

// --- products of a warpgroup ------------------------------------------------------------------------------------------
// A tile in shared memory as the tensor cores read it: its address and two distances, for the swizzle of 128 bytes.
struct TileDescriptor {
  uint32_t low, high;
  __device__ uint64_t word() const { return uint64_t(high) << 32 | low; }
  // The same of what lies so many bytes farther on, a multiple of 16.
  __device__ TileDescriptor after(int bytes) const { return {low + uint32_t(bytes >> 4), high}; }
};
__device__ inline TileDescriptor tile_descriptor(const void* at, int leading_bytes, int stride_bytes) {
  uint32_t low = (shared_address(at) >> 4 & 0x3fff) | uint32_t(leading_bytes >> 4 & 0x3fff) << 16;
  asm volatile("" : "+r"(low));  // else those of all steps of a product would be kept in registers from turn to turn
  return {low, uint32_t(stride_bytes >> 4 & 0x3fff) | 1u << 30};
}

__device__ inline void wgmma_fence() {
#ifdef FASTLM_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#ifdef FASTLM_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most kPending of the committed groups are under way.
template <int kPending> __device__ inline void wgmma_wait() {
#ifdef FASTLM_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// The compiler may move neither reads nor writes of the accumulators past this.
template <int kSize> __device__ inline void pin(float (&acc)[kSize][4]) {
#pragma unroll
  for (int n = 0; n < kSize; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(acc[n][e])::"memory");
  }
}

// The compiler may move no load past this.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

#define FASTLM_ACC1(how, n) how(c[n][0]), how(c[n][1]), how(c[n][2]), how(c[n][3])
#define FASTLM_ACC4(how, n) FASTLM_ACC1(how, n), FASTLM_ACC1(how, n + 1), FASTLM_ACC1(how, n + 2), FASTLM_ACC1(how, n + 3)
#define FASTLM_ACC8(how) FASTLM_ACC4(how, 0), FASTLM_ACC4(how, 4)
#define FASTLM_ACC16(how) FASTLM_ACC8(how), FASTLM_ACC4(how, 8), FASTLM_ACC4(how, 12)
#define FASTLM_REGS32                                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define FASTLM_REGS64                                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "     \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
  "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

// c (64 x 8 kSize, as multiply_add's accumulators side by side, 16 rows a warp) = a b, or c + a b where kAdd: two kinds of
// instruction, so that the registers of c are free until the first. a: 16 columns of a tile, row after row (K-major). b: 16
// columns of its rows, row after row.
template <class T, int kSize, bool kAdd>
__device__ void wgmma_shared(float (&c)[kSize][4], TileDescriptor a, TileDescriptor b);
// The same for 64 columns, with a and b: 16 rows of tiles, a transposed.
template <class T, bool kAdd> __device__ void wgmma_rows(float (&c)[8][4], TileDescriptor a, TileDescriptor b);
// c + a b with a: 16 columns in registers, as multiply_add's; b: 16 rows of a tile.
template <class T, int kSize>
__device__ void wgmma_registers(float (&c)[kSize][4], const uint32_t (&a)[4], TileDescriptor b);

#ifdef FASTLM_SM90A
// N0 ... N4: the operands after the accumulators. Whether to add is a predicate, which is constant here. ROWS: whether
// operands are read by rows, "1, 1", or by columns.
#define FASTLM_WGMMA_SHARED(DECLARATION, SIZE, PTX, COLS, REGS, ACCS, N0, N1, ADD, ROWS)                      \
  template <> __device__ inline void DECLARATION(float(&c)[SIZE][4], TileDescriptor a, TileDescriptor b) {   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                           \
                 "wgmma.mma_async.sync.aligned.m64n" COLS "k16.f32." PTX "." PTX " " REGS N0 ", " N1         \
                 ", p, 1, 1, " ROWS ";\n}"                                                                   \
                 : ACCS                                                                                      \
                 : "l"(a.word()), "l"(b.word()));                                                            \
  }
#define FASTLM_WGMMA(TYPE, PTX, SIZE, COLS, REGS, N0, N1, N2, N3, N4)                                                    \
  FASTLM_WGMMA_SHARED((wgmma_shared<TYPE, SIZE, false>), SIZE, PTX, COLS, REGS, FASTLM_ACC##SIZE("=f"), N0, N1, "0", "0, 0") \
  FASTLM_WGMMA_SHARED((wgmma_shared<TYPE, SIZE, true>), SIZE, PTX, COLS, REGS, FASTLM_ACC##SIZE("+f"), N0, N1, "1", "0, 0")  \
  template <>                                                                                                            \
  __device__ inline void wgmma_registers<TYPE, SIZE>(float(&c)[SIZE][4], const uint32_t(&a)[4], TileDescriptor b) {      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" COLS "k16.f32." PTX "." PTX " " REGS "{" N0 ", " N1 ", " N2 ", " N3  \
                 "}, " N4 ", p, 1, 1, 1;\n}"                                                                             \
                 : FASTLM_ACC##SIZE("+f")                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.word()));                                             \
  }
#define FASTLM_WGMMA_ROWS(TYPE, PTX)                                                                              \
  FASTLM_WGMMA_SHARED((wgmma_rows<TYPE, false>), 8, PTX, "64", FASTLM_REGS32, FASTLM_ACC8("=f"), "%32", "%33", "0", "1, 1") \
  FASTLM_WGMMA_SHARED((wgmma_rows<TYPE, true>), 8, PTX, "64", FASTLM_REGS32, FASTLM_ACC8("+f"), "%32", "%33", "1", "1, 1")
FASTLM_WGMMA_ROWS(f16, "f16")
FASTLM_WGMMA_ROWS(bf16, "bf16")
FASTLM_WGMMA(f16, "f16", 8, "64", FASTLM_REGS32, "%32", "%33", "%34", "%35", "%36")
FASTLM_WGMMA(f16, "f16", 16, "128", FASTLM_REGS64, "%64", "%65", "%66", "%67", "%68")
FASTLM_WGMMA(bf16, "bf16", 8, "64", FASTLM_REGS32, "%32", "%33", "%34", "%35", "%36")
FASTLM_WGMMA(bf16, "bf16", 16, "128", FASTLM_REGS64, "%64", "%65", "%66", "%67", "%68")
#else
template <class T, int kSize, bool kAdd> __device__ void wgmma_shared(float (&)[kSize][4], TileDescriptor, TileDescriptor) {}
template <class T, bool kAdd> __device__ void wgmma_rows(float (&)[8][4], TileDescriptor, TileDescriptor) {}
template <class T, int kSize> __device__ void wgmma_registers(float (&)[kSize][4], const uint32_t (&)[4], TileDescriptor) {}
#endif

}  // namespace fastlm::cuda

#endif
