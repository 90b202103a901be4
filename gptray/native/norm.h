// Layer norm and RMSNorm of rows of C numbers, fp32 or bf16, and their gradients. RMSNorm is layer
// norm with a mean of 0 and no bias; a bias of nullptr asks for it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "simd.h"

namespace {

struct Moments {
  Floats mean, inverse;  // inverse: 1 / standard deviation
};

template <typename T>
inline Moments moments(const T *x, float eps, int C, bool is_rms) {
  Floats sum = {}, square = {};
  if (!is_rms)
    for (int i = 0; i < C; i += LANES) sum = sum + load(x + i, lanes(C - i));
  const Floats mean = splat(reduce_add(sum) / C);
  for (int i = 0; i < C; i += LANES) {
    const Floats d = where(lanes(C - i), load(x + i, lanes(C - i)) - mean, Floats{});
    square = fmadd(d, d, square);
  }
  const float variance = reduce_add(square) / C;
  return {mean, splat(1.f / std::sqrt(variance + eps))};
}

template <typename T>
inline void normalise(const T *x, const float *weight, const float *bias, T *y, float eps, int C) {
  const Moments of_row = moments(x, eps, C, !bias);
  for (int i = 0; i < C; i += LANES) {
    const Mask mask = lanes(C - i);
    const Floats d = load(x + i, mask) - of_row.mean;
    const Floats normed = d * of_row.inverse;
    const Floats shift = bias ? load(bias + i, mask) : Floats{};
    store(y + i, fmadd(normed, load(weight + i, mask), shift), mask);
  }
}

// With n the normed row and g = dy weight: dx = (g - mean(g) - n mean(g n)) / deviation, mean(g)
// being 0 for RMSNorm. Adds dy n to weight_sum and dy to bias_sum.
inline void norm_gradient(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                          float *weight_sum, float *bias_sum, float eps, int C) {
  const Moments of_row = moments(x, eps, C, !bias_sum);
  Floats sum = {}, product = {};
  for (int i = 0; i < C; i += LANES) {
    const Mask mask = lanes(C - i);
    const Floats d = load(dy + i, mask);
    const Floats n = (load(x + i, mask) - of_row.mean) * of_row.inverse;
    const Floats g = d * load(weight + i, mask);
    product = fmadd(g, n, product);
    store(weight_sum + i, fmadd(d, n, load(weight_sum + i, mask)), mask);
    if (!bias_sum) continue;
    sum = sum + g;
    store(bias_sum + i, d + load(bias_sum + i, mask), mask);
  }
  const Floats mean = splat(reduce_add(sum) / C);
  const Floats along = splat(reduce_add(product) / C);
  for (int i = 0; i < C; i += LANES) {
    const Mask mask = lanes(C - i);
    const Floats n = (load(x + i, mask) - of_row.mean) * of_row.inverse;
    const Floats g = load(dy + i, mask) * load(weight + i, mask);
    const Floats rest = fnmadd(n, along, g - mean);
    store(dx + i, rest * of_row.inverse, mask);
  }
}

}  // namespace
