// Layer norm or RMSNorm of all rows, and its gradients; see norm.h. All threads of a parallel
// region call these functions.

#pragma once

#include "norm.h"

namespace {

// Partial sums over the rows, as many at any number of threads.
constexpr int NORM_PARTS = 32;

void normalise_rows(const uint16_t *x, const float *weight, const float *bias, uint16_t *y,
                    float eps, int M, int C) {
#pragma omp for schedule(static)
  for (int row = 0; row < M; ++row)
    normalise(x + (size_t)row * C, weight, bias, y + (size_t)row * C, eps, C);
}

// sums (NORM_PARTS, 2, C); RMSNorm (no dbias) uses half of it.
void norm_gradients(const uint16_t *dy, const uint16_t *x, const float *weight, uint16_t *dx,
                    float *dweight, float *dbias, float *sums, float eps, int M, int C) {
  const int count = dbias ? 2 * C : C;
#pragma omp for schedule(static)
  for (int part = 0; part < NORM_PARTS; ++part) {
    float *own = sums + (size_t)part * count;
    std::fill(own, own + count, 0.f);
    const size_t first = (size_t)M * part / NORM_PARTS, stop = (size_t)M * (part + 1) / NORM_PARTS;
    for (size_t at = first * C; at < stop * C; at += C)
      norm_gradient(dy + at, x + at, weight, dx + at, own, dbias ? own + C : nullptr, eps, C);
  }
#pragma omp for schedule(static)
  for (int i = 0; i < count; ++i) {
    float sum = 0.f;
    for (int part = 0; part < NORM_PARTS; ++part) sum += sums[(size_t)part * count + i];
    *(i < C ? dweight + i : dbias + (i - C)) = sum;
  }
}

}  // namespace
