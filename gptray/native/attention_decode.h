// Attention of a decoding step over the KV cache, fp32 or bf16.
//
// All threads of a parallel region call `attention` and share its loops.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "decode.h"
#include "exp.h"
#include "gemm.h"
#include "norm.h"
#include "team.h"

namespace {

// Queries that share one read of a key.
constexpr int QUERIES = 4;

// Prefetch keys or values: a processor with tiles can have more reads in flight to L2 than to L1.
template <typename T>
inline void prefetch_cached(const T *from, int count) {
  HAS_TILES ? prefetch_l2(from, count) : prefetch(from, count);
}

// Scores (count, with space for LANES more) -> e^(score - max); returns 1 / their sum.
inline Floats exponentials(float *w, int count) {
  for (int t = count; t < count + LANES; ++t) w[t] = -INFINITY;
  Floats most = splat(-INFINITY), total = {};
  for (int t = 0; t < count; t += LANES) most = max(most, load(w + t));
  most = splat(reduce_max(most));
  for (int t = 0; t < count; t += LANES) {
    const Floats e = exp(load(w + t) - most);
    total = where(lanes(count - t), total + e, total);
    store(w + t, e);
  }
  return splat(1.f / reduce_add(total));
}

// Up to B blocks of columns of values (count, E), summed with the weights of each of G heads.
template <int G, int B, typename T>
inline void weigh(const float *w, size_t stride, const Floats *inverse, const T *values,
                  const T *next_keys, int count, int E, int columns, float *out) {
  Mask masks[B];
  for (int b = 0; b < B; ++b) masks[b] = lanes(columns - b * LANES);
  Floats sums[G][B] = {};
  for (int t = 0; t < count; ++t) {
    if (next_keys) prefetch_cached(next_keys + (size_t)t * E, E);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const Floats value = load(values + (size_t)t * E + b * LANES, masks[b]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[g][b] = fmadd(splat(w[g * stride + t]), value, sums[g][b]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store(out + g * E + b * LANES, sums[g][b] * inverse[g], masks[b]);
}

// G heads of one row, q (G, E), over the same `count` keys and values (count, E) -> out (G, E).
template <int G, typename T>
void attend(const float *q, const T *keys, const T *values, const T *next_keys, int count, int E,
            float *out) {
  thread_local std::vector<float> weights;
  const size_t stride = count + LANES;
  weights.resize(G * stride);
  float *const w = weights.data();
  for (int t = 0; t < count; ++t) {
    prefetch_cached(values + (size_t)t * E, E);
    Floats sums[G] = {};
    for (int e = 0; e < E; e += LANES) {
      const Mask mask = lanes(E - e);
      const Floats key = load(keys + (size_t)t * E + e, mask);
      for (int g = 0; g < G; ++g) sums[g] = fmadd(load(q + g * E + e, mask), key, sums[g]);
    }
    for (int g = 0; g < G; ++g) w[g * stride + t] = reduce_add(sums[g]);
  }
  Floats inverse[G];
  for (int g = 0; g < G; ++g) inverse[g] = exponentials(w + g * stride, count);
  constexpr int most = std::min(BLOCKS, SUMS / G);  // blocks whose sums stay in registers
  for (int e = 0; e < E; e += most * LANES) {
    const int columns = E - e;
    const auto run = columns > 3 * LANES   ? weigh<G, most, T>
                     : columns > 2 * LANES ? weigh<G, std::min(most, 3), T>
                     : columns > LANES     ? weigh<G, std::min(most, 2), T>
                                           : weigh<G, 1, T>;
    run(w, stride, inverse, values + e, e ? nullptr : next_keys, count, E, columns, out + e);
  }
}

// As `attend`, for any number of heads.
template <typename T>
void attend_group(int heads, const float *q, const T *keys, const T *values, const T *next_keys,
                  int count, int E, float *out) {
  for (int g = 0; g < heads; g += QUERIES, q += QUERIES * E, out += QUERIES * E) {
    const auto run = heads - g == 1   ? attend<1, T>
                     : heads - g == 2 ? attend<2, T>
                     : heads - g == 3 ? attend<3, T>
                                      : attend<QUERIES, T>;
    run(q, keys, values, g + QUERIES < heads ? nullptr : next_keys, count, E, out);
  }
}

// Prepare a head (E) of q or k: normalise it, then rotate it by its position. The two numbers of a
// pair are R / 2 apart (Su et al. 2021, RoFormer).
inline void prepare(float *head, const Norm &norm, const Model &model, const Block &block,
                    int position) {
  if (norm.weight && !model.wide_qk_norm)
    normalise(head, norm.weight, norm.bias, head, norm.eps, model.head_width);
  const int half = block.rotary / 2;
  for (int i = 0; i < half; i += LANES) {
    const Mask mask = lanes(half - i);
    const Floats cos = load(block.cos + (size_t)position * half + i, mask);
    const Floats sin = load(block.sin + (size_t)position * half + i, mask);
    const Floats first = load(head + i, mask), second = load(head + half + i, mask);
    store(head + i, fmsub(first, cos, second * sin), mask);
    store(head + half + i, fmadd(second, cos, first * sin), mask);
  }
}

// One layer's attention; a group of query heads shares a head of keys and values.
template <typename T>
struct Layer {
  const Model &model;
  const Block &block;
  const Step &step;
  T *keys, *values;
  size_t head;  // capacity of a slot for one head, in numbers
  int K = model.kv_heads, G = model.n_head / K, E = model.head_width;

  // A group's queries (G, E) in a row.
  float *queries(int row, int group) const {
    return step.wide + ((size_t)row * (G + 2) * K + G * group) * E;
  }

  // The offset of a group's keys, and of its values, in the cache of a row's slot.
  size_t cache_offset(int row, int group) const {
    return ((size_t)step.slots[row] * K + group) * head;
  }

  // Prepare a group's queries; write its key and value to the cache.
  void write_cache(int row, int group) const {
    const int position = step.positions[row];
    float *q = queries(row, group);
    float *k = queries(row, K) + group * E;  // behind all queries
    const float *v = k + K * E;
    for (int g = 0; g < G; ++g) prepare(q + g * E, block.q_norm, model, block, position);
    prepare(k, block.k_norm, model, block, position);
    const size_t to = cache_offset(row, group) + (size_t)position * E;
    for (int e = 0; e < E; e += LANES) {
      const Mask mask = lanes(E - e);
      store(keys + to + e, load(k + e, mask), mask);
      store(values + to + e, load(v + e, mask), mask);
    }
  }

  // A row attends up to and including its own position.
  void attend(int row, int group) const {
    const int stop = step.positions[row] + 1, start = std::max(0, stop - block.window);
    const size_t from = cache_offset(row, group) + (size_t)start * E;
    const T *next = group + 1 < K ? keys + from + head : nullptr;
    float *out = step.attended + ((size_t)row * K + group) * G * E;
    attend_group(G, queries(row, group), keys + from, values + from, next, stop - start, E, out);
  }
};

// step.wide (N, (H + 2 K) E) -> step.attended (N, H E).
template <typename T>
void attention(Team &team, const Model &model, const Step &step, const Cache &cache, int number) {
  const Layer<T> layer = {model,
                          model.blocks[number],
                          step,
                          (T *)cache.keys[number],
                          (T *)cache.values[number],
                          (size_t)cache.length * model.head_width};
  if (model.wide_qk_norm) {
    const int queries = model.n_head * layer.E, keys = layer.K * layer.E;
#pragma omp for schedule(static)
    for (int row = 0; row < step.rows; ++row) {
      float *q = layer.queries(row, 0), *k = q + queries;
      const Norm &q_norm = layer.block.q_norm, &k_norm = layer.block.k_norm;
      normalise(q, q_norm.weight, nullptr, q, q_norm.eps, queries);
      normalise(k, k_norm.weight, nullptr, k, k_norm.eps, keys);
    }
  }
  // A row may read keys that other rows of its slot write.
  if (!step.apart) {
#pragma omp for collapse(2) schedule(static)
    for (int row = 0; row < step.rows; ++row)
      for (int group = 0; group < layer.K; ++group) layer.write_cache(row, group);
  }
  team.share(1, step.rows * layer.K, [&](int, int part) {
    const int row = part / layer.K, group = part % layer.K;
    if (step.apart) layer.write_cache(row, group);
    layer.attend(row, group);
  });
}

}  // namespace
