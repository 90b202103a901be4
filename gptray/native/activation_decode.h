// The activation of an MLP, to fp32 precision.

#pragma once

#include "decode.h"
#include "gelu.h"

namespace {

// x P(X < x) for a normal X: 0.5 x (1 + erf(x / sqrt(2))), erf to 1.5e-7 by Abramowitz & Stegun
// 1964, 7.1.26.
inline Floats gelu_exact(Floats x) {
  const Floats z = abs(x) * splat(0.70710678f), one = splat(1.f);
  const Floats t = one / fmadd(z, splat(0.3275911f), one);
  Floats p = splat(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    p = fmadd(p, t, splat(c));
  const Floats e = exp(z * (Floats{} - z));
  const Floats tail = p * t * (e * splat(0.5f));  // beyond |x|
  return x * where_positive(x, one - tail, tail);
}

// x / (1 + e^-x)
inline Floats silu(Floats x) {
  const Floats e = exp(Floats{} - x);
  return x / (splat(1.f) + e);
}

// For one block of outputs; linear_decode.h handles gates.
inline Floats activate(int activation, Floats x) {
  switch (activation) {
    case GELU_TANH: return gelu(x);
    case GELU: return gelu_exact(x);
    case RELU: return relu_and_slope(x).value;
    default: return x;
  }
}

}  // namespace
