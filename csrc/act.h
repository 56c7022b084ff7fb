// The activations, by the numbers that Python calls them by. Plain C++: seen by the bindings and the kernels of both modules.
#pragma once

namespace fastlm {

enum class Act : int { kNone, kRelu, kReluSquared, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh };
constexpr int kNumActs = 8;
constexpr const char* kActNames[kNumActs] = {"none", "relu", "relu_squared", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"};

}  // namespace fastlm
