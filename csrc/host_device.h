// Plain C++ that kernels call and that a test can check by itself.
#pragma once

#ifdef __CUDACC__
#define FASTLM_HOST_DEVICE __host__ __device__
#else
#define FASTLM_HOST_DEVICE
#endif
