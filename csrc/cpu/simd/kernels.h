// The table of kernels that each instruction set fills in. Pointers and numbers only: nothing here knows of tensors.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "activation.h"
#include "optimizer.h"
#include "attention.h"
#include "cross_entropy.h"
#include "dropout.h"
#include "embedding.h"
#include "limits.h"
#include "matmul.h"
#include "mse_loss.h"
#include "norm.h"
#include "rope.h"

namespace fastlm::cpu {

struct Kernels {
  const char* isa;
  ActivationKernels activation;
  OptimizerKernels optimizer;
  AttentionKernels attention;
  CrossEntropyKernels cross_entropy;
  DropoutKernels dropout;
  EmbeddingKernels embedding;
  LimitsKernels limits;
  MatmulKernels matmul;
  MseLossKernels mse_loss;
  NormKernels norm;
  RopeKernels rope;
};

}  // namespace fastlm::cpu
