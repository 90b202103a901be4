// The activation of an MLP; gptray/native/abi.py mirrors it.

#pragma once

#include <cstdint>

enum Activation : int32_t { NONE, GELU_TANH, GELU, RELU, SWIGLU, GEGLU };

inline bool is_gated(int activation) { return activation == SWIGLU || activation == GEGLU; }
