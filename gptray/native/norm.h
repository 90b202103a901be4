// Layer norm and RMSNorm of rows of C numbers, fp32 or bf16, and their gradients. RMSNorm is layer
// norm of rows whose mean is taken for 0, without a bias: nullptr asks for it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "simd.h"

namespace {

struct Moments {
  Floats mean, inverse;  // of the deviation
};

template <typename T>
inline Moments moments(const T *x, float eps, int C, bool is_rms) {
  Floats sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
  if (!is_rms)
    for (int i = 0; i < C; i += LANES) sum = _mm512_add_ps(sum, load(x + i, lanes(C - i)));
  const Floats mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / C);
  for (int i = 0; i < C; i += LANES) {
    const Floats d = _mm512_maskz_sub_ps(lanes(C - i), load(x + i, lanes(C - i)), mean);
    square = _mm512_fmadd_ps(d, d, square);
  }
  const float variance = _mm512_reduce_add_ps(square) / C;
  return {mean, _mm512_set1_ps(1.f / std::sqrt(variance + eps))};
}

template <typename T>
inline void normalise(const T *x, const float *weight, const float *bias, T *y, float eps, int C) {
  const Moments of_row = moments(x, eps, C, !bias);
  for (int i = 0; i < C; i += LANES) {
    const __mmask16 mask = lanes(C - i);
    const Floats d = _mm512_sub_ps(load(x + i, mask), of_row.mean);
    const Floats normed = _mm512_mul_ps(d, of_row.inverse);
    const Floats shift = bias ? load(bias + i, mask) : _mm512_setzero_ps();
    store(y + i, _mm512_fmadd_ps(normed, load(weight + i, mask), shift), mask);
  }
}

// With n the normed row and g = dy weight: dx = (g - mean(g) - n mean(g n)) / deviation, mean(g)
// being 0 for RMSNorm. Adds dy n to weight_sum and dy to bias_sum.
inline void norm_gradient(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                          float *weight_sum, float *bias_sum, float eps, int C) {
  const Moments of_row = moments(x, eps, C, !bias_sum);
  Floats sum = _mm512_setzero_ps(), product = _mm512_setzero_ps();
  for (int i = 0; i < C; i += LANES) {
    const __mmask16 mask = lanes(C - i);
    const Floats d = load(dy + i, mask);
    const Floats n = _mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), of_row.mean), of_row.inverse);
    const Floats g = _mm512_mul_ps(d, load(weight + i, mask));
    product = _mm512_fmadd_ps(g, n, product);
    store(weight_sum + i, _mm512_fmadd_ps(d, n, load(weight_sum + i, mask)), mask);
    if (!bias_sum) continue;
    sum = _mm512_add_ps(sum, g);
    store(bias_sum + i, _mm512_add_ps(d, load(bias_sum + i, mask)), mask);
  }
  const Floats mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / C);
  const Floats along = _mm512_set1_ps(_mm512_reduce_add_ps(product) / C);
  for (int i = 0; i < C; i += LANES) {
    const __mmask16 mask = lanes(C - i);
    const Floats n = _mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), of_row.mean), of_row.inverse);
    const Floats g = _mm512_mul_ps(load(dy + i, mask), load(weight + i, mask));
    const Floats rest = _mm512_fnmadd_ps(n, along, _mm512_sub_ps(g, mean));
    store(dx + i, _mm512_mul_ps(rest, of_row.inverse), mask);
  }
}

}  // namespace
