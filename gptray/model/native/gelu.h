// GPT-2's GELU and its slope.

#pragma once

#include "words.h"

namespace {

// GPT-2's, 0.5 z (1 + tanh u) with u = sqrt(2 / pi) (z + 0.044715 z^3), is z / (1 + e^(-2 u)).
constexpr float GELU_1 = 0.7978845608f, GELU_3 = 0.0356774081f;

// 1 / (1 + e^(-2 u))
inline Floats gate(Floats z, Floats square) {
  const Floats one = _mm512_set1_ps(1.f);
  const Floats slope = _mm512_fmadd_ps(_mm512_set1_ps(GELU_3), square, _mm512_set1_ps(GELU_1));
  const Floats e = exp(_mm512_mul_ps(_mm512_mul_ps(z, slope), _mm512_set1_ps(-2.f)));
  return _mm512_rcp14_ps(_mm512_add_ps(one, e));  // off by 6e-5 of the value
}

inline Floats gelu(Floats z) { return _mm512_mul_ps(z, gate(z, _mm512_mul_ps(z, z))); }

// d gelu / dz = g + 2 z g (1 - g) du/dz, g the gate
inline Floats gelu_slope(Floats z) {
  const Floats square = _mm512_mul_ps(z, z), g = gate(z, square);
  const Floats du = _mm512_fmadd_ps(_mm512_set1_ps(3 * GELU_3), square, _mm512_set1_ps(GELU_1));
  const Floats rest = _mm512_fnmadd_ps(g, g, g);  // g (1 - g)
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_add_ps(z, z), du), rest, g);
}

}  // namespace
