// What fastlm._cuda needs of a CUDA toolkit, apart from a compiler that can build a program: its headers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

__global__ void probe(__half* x, __nv_bfloat16* y) {
  x[0] = __float2half_rn(1.0f);
  y[0] = __float2bfloat16_rn(1.0f);
}

int main() {}
