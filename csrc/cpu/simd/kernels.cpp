// Compiled once per instruction set, with FASTLM_ISA naming it. To add an op, include its -inl.h and name its table.
#include "kernels.h"

#include "activation-inl.h"
#include "optimizer-inl.h"
#include "attention-inl.h"
#include "cross_entropy-inl.h"
#include "dropout-inl.h"
#include "embedding-inl.h"
#include "limits-inl.h"
#include "matmul-inl.h"
#include "mse_loss-inl.h"
#include "norm-inl.h"
#include "rope-inl.h"

#define FASTLM_STRING_(x) #x
#define FASTLM_STRING(x) FASTLM_STRING_(x)

namespace fastlm::cpu::FASTLM_ISA {

extern const Kernels kTable;
const Kernels kTable = {FASTLM_STRING(FASTLM_ISA), kActivationKernels, kOptimizerKernels,   kAttentionKernels,
                        kCrossEntropyKernels,      kDropoutKernels,    kEmbeddingKernels, kLimitsKernels,
                        kMatmulKernels,            kMseLossKernels,    kNormKernels,   kRopeKernels};

}  // namespace fastlm::cpu::FASTLM_ISA
