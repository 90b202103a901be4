// Layer norm of rows of C numbers, and its gradients. All threads of a parallel region call these.

#pragma once

#include <algorithm>

#include "words.h"

namespace {

// Parts that the rows are summed in, as many at any number of threads.
constexpr int NORM_PARTS = 32;

struct Moments {
  Floats mean, inverse;  // of the deviation
};

inline Moments moments(const uint16_t *x, float eps, int C) {
  Floats sum = zero(0, 0), square = zero(0, 0);
  for (int i = 0; i < C; i += LANES) sum = _mm512_add_ps(sum, load(x + i, lanes(C - i)));
  const Floats mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / C);
  for (int i = 0; i < C; i += LANES) {
    const Floats d = _mm512_maskz_sub_ps(lanes(C - i), load(x + i, lanes(C - i)), mean);
    square = _mm512_fmadd_ps(d, d, square);
  }
  const float variance = _mm512_reduce_add_ps(square) / C;
  return {mean, _mm512_set1_ps(1.f / std::sqrt(variance + eps))};
}

void normalise(const uint16_t *x, const float *weight, const float *bias, uint16_t *y, float eps,
               int M, int C) {
#pragma omp for schedule(static)
  for (int row = 0; row < M; ++row) {
    const uint16_t *from = x + (size_t)row * C;
    const Moments of_row = moments(from, eps, C);
    for (int i = 0; i < C; i += LANES) {
      const __mmask16 mask = lanes(C - i);
      const Floats d = _mm512_sub_ps(load(from + i, mask), of_row.mean);
      const Floats normed = _mm512_mul_ps(d, of_row.inverse);
      const Floats out = _mm512_fmadd_ps(normed, load(weight + i, mask), load(bias + i, mask));
      store(y + (size_t)row * C + i, out, mask);
    }
  }
}

// With n the normed row and g = dy weight: dx = (g - mean(g) - n mean(g n)) / deviation. Adds
// dy n to weight_sum and dy to bias_sum.
void norm_gradient(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                   float *weight_sum, float *bias_sum, float eps, int C) {
  const Moments of_row = moments(x, eps, C);
  Floats sum = zero(0, 0), product = zero(0, 0);
  for (int i = 0; i < C; i += LANES) {
    const __mmask16 mask = lanes(C - i);
    const Floats d = load(dy + i, mask);
    const Floats n = _mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), of_row.mean), of_row.inverse);
    const Floats g = _mm512_mul_ps(d, load(weight + i, mask));
    sum = _mm512_add_ps(sum, g);
    product = _mm512_fmadd_ps(g, n, product);
    store(weight_sum + i, _mm512_fmadd_ps(d, n, load(weight_sum + i, mask)), mask);
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

// sums (NORM_PARTS, 2, C)
void norm_gradients(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                    float *dweight, float *dbias, float *sums, float eps, int M, int C) {
#pragma omp for schedule(static)
  for (int part = 0; part < NORM_PARTS; ++part) {
    float *own = sums + (size_t)part * 2 * C;
    std::fill(own, own + 2 * C, 0.f);
    const size_t first = (size_t)M * part / NORM_PARTS, stop = (size_t)M * (part + 1) / NORM_PARTS;
    for (size_t at = first * C; at < stop * C; at += C)
      norm_gradient(dy + at, x + at, weight, dx + at, own, own + C, eps, C);
  }
#pragma omp for schedule(static)
  for (int i = 0; i < 2 * C; ++i) {
    float sum = 0.f;
    for (int part = 0; part < NORM_PARTS; ++part) sum += sums[(size_t)part * 2 * C + i];
    (i < C ? dweight : dbias)[i % C] = sum;
  }
}

}  // namespace
