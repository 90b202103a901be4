// ReLU, max(z, 0), and GELU, z P(z): GPT-2's, where P(z) is the gate g = 1 / (1 + e^(-2 u)) with
// u = sqrt(2 / pi) (z + 0.044715 z^3), and the exact one, where P is the normal CDF.

#pragma once

#include "exp.h"

namespace {

// For decoding: to fp32 precision.
inline Floats gelu(Floats x) {
  const Floats square = x * x, one = splat(1.f);
  const Floats u = x * fmadd(splat(0.044715f), square, one);
  const Floats e = exp(u * splat(-1.5957691216f));
  return x / (one + e);
}

constexpr float GELU_1 = 0.7978845608f, GELU_3 = 0.0356774081f;

struct ValueAndSlope {
  Floats value, slope;
};

// For training: more precise than bf16. d gelu / dz = g + 2 z g (1 - g) du/dz
inline ValueAndSlope gelu_and_slope(Floats z) {
  const Floats square = z * z;
  const Floats power = fmadd(splat(-2 * LOG2_E * GELU_3), square, splat(-2 * LOG2_E * GELU_1));
  const Floats e = exp2(z * power);
  const Floats g = reciprocal(splat(1.f) + e);  // relative error 6e-5
  const Floats twice_du = fmadd(splat(6 * GELU_3), square, splat(2 * GELU_1));
  const Floats value = z * g, rest = fnmadd(g, g, g);  // g (1 - g)
  return {value, fmadd(z * twice_du, rest, g)};
}

// The exact GELU, for training: P(-a) = t (a1 + a2 t + ...) e^(-a^2 / 2) / 2 with
// t = 1 / (1 + p a / sqrt 2) (Abramowitz & Stegun 7.1.26). d gelu / dz = P + z p with p = dP / dz.
inline ValueAndSlope exact_gelu_and_slope(Floats z) {
  const Floats e = exp2(z * z * splat(-0.5f * LOG2_E));
  const Floats t = reciprocal(fmadd(abs(z), splat(0.23164189f), splat(1.f)));
  Floats tail = splat(0.530702715f);
  for (const float c : {-0.726576013f, 0.710706871f, -0.142248368f, 0.127414796f})
    tail = fmadd(tail, t, splat(c));
  tail = tail * t * e;
  const Floats p = where_positive(z, splat(1.f) - tail, tail);
  const Floats density = e * splat(0.39894228f);
  return {z * p, fmadd(z, density, p)};
}

// NaN remains; at 0 the slope is 0.
inline ValueAndSlope relu_and_slope(Floats z) {
  const Floats zero{}, negative = zero - z;
  return {where_positive(negative, zero, z), where_positive(negative, zero, splat(1.f))};
}

}  // namespace
