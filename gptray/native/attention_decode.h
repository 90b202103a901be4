// Attention of a decoding step over the kept keys and values, fp32 or bf16.
//
// All threads of a parallel region call `attention` and share its loops.

#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "decode.h"
#include "exp.h"
#include "gemm.h"

namespace {

// One head of one row, q (E), over `count` keys and values (count, E) -> out (E).
template <typename T>
void attend(const float *q, const T *keys, const T *values, const T *next_keys, int count, int E,
            float *out) {
  thread_local std::vector<float> weights;
  weights.resize(count + LANES);
  float *const w = weights.data();
  for (int t = 0; t < count; ++t) {
    fetch(values + (size_t)t * E, E);
    Floats sum = _mm512_setzero_ps();
    for (int e = 0; e < E; e += LANES) {
      const __mmask16 mask = lanes(E - e);
      sum = _mm512_fmadd_ps(load(q + e, mask), load(keys + (size_t)t * E + e, mask), sum);
    }
    w[t] = _mm512_reduce_add_ps(sum);
  }
  for (int t = count; t < count + LANES; ++t) w[t] = -INFINITY;
  Floats most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int t = 0; t < count; t += LANES) most = _mm512_max_ps(most, load(w + t, 0xFFFF));
  most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int t = 0; t < count; t += LANES) {
    const Floats e = exp(_mm512_sub_ps(load(w + t, 0xFFFF), most));
    total = _mm512_mask_add_ps(total, lanes(count - t), total, e);
    store(w + t, e, 0xFFFF);
  }
  const Floats inverse = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(total));
  for (int e = 0; e < E; e += PANEL) {
    Floats sums[BLOCKS] = {};
    for (int t = 0; t < count; ++t) {
      if (next_keys && e == 0) fetch(next_keys + (size_t)t * E, E);
      const Floats weight = _mm512_set1_ps(w[t]);
      for (int b = 0; b < BLOCKS; ++b) {
        const int at = e + b * LANES;
        if (at >= E) continue;
        const Floats value = load(values + (size_t)t * E + at, lanes(E - at));
        sums[b] = _mm512_fmadd_ps(weight, value, sums[b]);
      }
    }
    for (int b = 0; b < BLOCKS && e + b * LANES < E; ++b) {
      const int at = e + b * LANES;
      store(out + at, _mm512_mul_ps(sums[b], inverse), lanes(E - at));
    }
  }
}

// Store the keys and values of step.wide (N, 3 C); every row attends up to its own position.
template <typename T>
void attention(const Model &model, const Step &step, const Cache &cache, int layer) {
  const int C = model.n_embd, H = model.n_head, E = C / H;
  const size_t head = (size_t)cache.length * E;
  T *keys = (T *)cache.keys[layer], *values = (T *)cache.values[layer];
#pragma omp for schedule(static)
  for (int row = 0; row < step.rows; ++row)
    for (int h = 0; h < H; ++h) {
      const float *k = step.wide + (size_t)row * 3 * C + C + h * E, *v = k + C;
      const size_t to = ((size_t)step.slots[row] * H + h) * head + (size_t)step.positions[row] * E;
      for (int e = 0; e < E; e += LANES) {
        store(keys + to + e, load(k + e, lanes(E - e)), lanes(E - e));
        store(values + to + e, load(v + e, lanes(E - e)), lanes(E - e));
      }
    }
#pragma omp for collapse(2) schedule(dynamic, 4)
  for (int row = 0; row < step.rows; ++row)
    for (int h = 0; h < H; ++h) {
      const float *q = step.wide + (size_t)row * 3 * C + h * E;
      const T *k = keys + ((size_t)step.slots[row] * H + h) * head;
      const T *v = values + (k - keys), *next = h + 1 < H ? k + head : nullptr;
      attend(q, k, v, next, step.positions[row] + 1, E, step.attended + (size_t)row * C + h * E);
    }
}

}  // namespace
