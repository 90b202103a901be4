// Exponentials, as exact as their users need: decoding computes in fp32, training in bf16.

#pragma once

#include <initializer_list>

#include "simd.h"

namespace {

constexpr float LOG2_E = 1.44269504f;

// e^x for x <= 88 as 2^n e^r with |r| <= ln 2 / 2; off by 1e-7 of the value.
inline Floats exp(Floats x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.f));
  const Floats n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)), 8);
  Floats r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  Floats p = _mm512_set1_ps(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// 2^x as 2^n 2^r with |r| <= 1 / 2; off by 6e-5 of the value, bf16 by up to 4e-3.
inline Floats exp2(Floats x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-150.f));
  const Floats n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
  Floats p = _mm512_set1_ps(0.00961812911f);  // ln(2)^4 / 4! and so on
  for (const float c : {0.0555041087f, 0.240226507f, 0.693147181f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

}  // namespace
