// GPT-2's GELU, 0.5 z (1 + tanh u) with u = sqrt(2 / pi) (z + 0.044715 z^3): z g with the gate
// g = 1 / (1 + e^(-2 u)).

#pragma once

#include "exp.h"

namespace {

// As exact as fp32: for decoding.
inline Floats gelu(Floats x) {
  const Floats square = _mm512_mul_ps(x, x), one = _mm512_set1_ps(1.f);
  const Floats u = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), square, one));
  const Floats e = exp(_mm512_mul_ps(u, _mm512_set1_ps(-1.5957691216f)));
  return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

constexpr float GELU_1 = 0.7978845608f, GELU_3 = 0.0356774081f;

struct GeluAndSlope {
  Floats value, slope;
};

// More exact than bf16: for training. d gelu / dz = g + 2 z g (1 - g) du/dz
inline GeluAndSlope gelu_and_slope(Floats z) {
  const auto all = [](float value) { return _mm512_set1_ps(value); };
  const Floats square = _mm512_mul_ps(z, z);
  const Floats power =
      _mm512_fmadd_ps(all(-2 * LOG2_E * GELU_3), square, all(-2 * LOG2_E * GELU_1));
  const Floats e = exp2(_mm512_mul_ps(z, power));
  const Floats g = _mm512_rcp14_ps(_mm512_add_ps(all(1.f), e));  // off by 6e-5 of the value
  const Floats twice_du = _mm512_fmadd_ps(all(6 * GELU_3), square, all(2 * GELU_1));
  const Floats value = _mm512_mul_ps(z, g), rest = _mm512_fnmadd_ps(g, g, g);  // g (1 - g)
  return {value, _mm512_fmadd_ps(_mm512_mul_ps(z, twice_du), rest, g)};
}

}  // namespace
