// What an MLP does between its layers, as exact as fp32.

#pragma once

#include "decode.h"
#include "gelu.h"

namespace {

// x P(X < x) for a normal X: 0.5 x (1 + erf(x / sqrt(2))), erf to 1.5e-7 by Abramowitz & Stegun
// 1964, 7.1.26.
inline Floats gelu_exact(Floats x) {
  const auto all = [](float value) { return _mm512_set1_ps(value); };
  const Floats z = _mm512_mul_ps(_mm512_abs_ps(x), all(0.70710678f)), one = all(1.f);
  const Floats t = _mm512_div_ps(one, _mm512_fmadd_ps(z, all(0.3275911f), one));
  Floats p = all(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    p = _mm512_fmadd_ps(p, t, all(c));
  const Floats e = exp(_mm512_mul_ps(z, _mm512_sub_ps(_mm512_setzero_ps(), z)));
  const Floats tail =
      _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(e, all(0.5f)));  // beyond |x|
  const __mmask16 is_positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, is_positive, one, tail));
}

// x / (1 + e^-x)
inline Floats silu(Floats x) {
  const Floats e = exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// What stands in one block of outputs; of SWIGLU see linear_decode.h.
inline Floats activate(int activation, Floats x) {
  return activation == GELU_TANH ? gelu(x) : activation == GELU ? gelu_exact(x) : x;
}

}  // namespace
