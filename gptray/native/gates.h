// A function of a gate times an input (Shazeer 2020): SwiGLU's is silu(z) = z / (1 + e^-z), GEGLU's
// GPT-2's GELU.

#pragma once

#include "gelu.h"

namespace {

// The value, and its slopes by gate and by input.
struct Gated {
  Floats value, by_gate, by_input;
};

// For training: more precise than bf16. d silu / dz = s + silu (1 - s) with s = 1 / (1 + e^-z).
inline Gated swiglu(Floats gate, Floats input) {
  const Floats one = splat(1.f);
  const Floats e = exp2(gate * splat(-LOG2_E));
  const Floats s = reciprocal(one + e);  // relative error 6e-5
  const Floats silu = gate * s;
  const Floats slope = fmadd(silu, one - s, s);
  return {silu * input, slope * input, silu};
}

inline Gated geglu(Floats gate, Floats input) {
  const ValueAndSlope gelu = gelu_and_slope(gate);
  return {gelu.value * input, gelu.slope * input, gelu.value};
}

}  // namespace
