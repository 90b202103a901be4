// GELU, z P(z): of GPT-2, where P(z) is the gate g = 1 / (1 + e^(-2 u)) with
// u = sqrt(2 / pi) (z + 0.044715 z^3), and exact, where P is the normal distribution's.

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

// The exact one, more exact than bf16: P(-a) = t (a1 + a2 t + ...) e^(-a^2 / 2) / 2 with
// t = 1 / (1 + p a / sqrt 2) (Abramowitz & Stegun 7.1.26). d gelu / dz = P + z p with p = dP / dz.
inline GeluAndSlope exact_gelu_and_slope(Floats z) {
  const auto all = [](float value) { return _mm512_set1_ps(value); };
  const Floats e = exp2(_mm512_mul_ps(_mm512_mul_ps(z, z), all(-0.5f * LOG2_E)));
  const Floats t = _mm512_rcp14_ps(_mm512_fmadd_ps(_mm512_abs_ps(z), all(0.23164189f), all(1.f)));
  Floats tail = all(0.530702715f);
  for (const float c : {-0.726576013f, 0.710706871f, -0.142248368f, 0.127414796f})
    tail = _mm512_fmadd_ps(tail, t, all(c));
  tail = _mm512_mul_ps(_mm512_mul_ps(tail, t), e);
  const __mmask16 is_positive = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GE_OQ);
  const Floats p = _mm512_mask_sub_ps(tail, is_positive, all(1.f), tail);
  const Floats density = _mm512_mul_ps(e, all(0.39894228f));
  return {_mm512_mul_ps(z, p), _mm512_fmadd_ps(z, density, p)};
}

}  // namespace
