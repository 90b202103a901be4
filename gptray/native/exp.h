// Exponentials, as precise as their callers need: decoding computes in fp32, training in bf16.

#pragma once

#include <initializer_list>

#include "simd.h"

namespace {

constexpr float LOG2_E = 1.44269504f;

// e^x for x <= 88 as 2^n e^r with |r| <= ln 2 / 2; relative error 1e-7.
inline Floats exp(Floats x) {
  x = max(x, splat(-104.f));
  const Floats n = round(x * splat(LOG2_E));
  Floats r = fnmadd(n, splat(0.693359375f), x);
  r = fnmadd(n, splat(-2.12194440e-4f), r);
  Floats p = splat(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    p = fmadd(p, r, splat(c));
  return ldexp(p, n);
}

// 2^x as 2^n 2^r with |r| <= 1 / 2; relative error 6e-5, where bf16's is up to 4e-3.
inline Floats exp2(Floats x) {
  x = max(x, splat(-150.f));
  const Floats n = round(x), r = x - n;
  Floats p = splat(0.00961812911f);  // ln(2)^4 / 4! and so on
  for (const float c : {0.0555041087f, 0.240226507f, 0.693147181f, 1.f}) p = fmadd(p, r, splat(c));
  return ldexp(p, n);
}

}  // namespace
