// Attention of sequences with grouped query heads, and optional norm and rotation of queries and
// keys.

#pragma once

#include "attention_train.h"
#include "norm.h"

namespace {

// B sequences of T tokens; a token's row in qkv has H query heads, K key heads and K value heads of
// D numbers each.
struct Heads {
  int T, H, K, D;

  int group() const { return H / K; }
  size_t stride() const { return (size_t)(H + 2 * K) * D; }
  template <typename T>
  Strided<T> head(T *qkv, int b, int head) const {
    return {qkv + b * this->T * stride() + head * D, stride()};
  }
  // A head of the output (B, T, H D).
  template <typename T>
  Strided<T> output(T *out, int b, int h) const {
    const size_t width = (size_t)H * D;
    return {out + b * this->T * width + h * D, width};
  }
};

// What queries or keys go through first: RMSNorm with a weight (D), or none if nullptr; then
// rotation of the pairs `half` apart by their token's angles, (T, half) each, or none if half is 0.
struct Preparation {
  const float *weight;
  float eps;
  const uint16_t *cosines, *sines;
  int half;

  bool is_identity() const { return !weight && !half; }
};

// Rotate pairs by a token's angles; back, if `is_back`.
inline void rotate(uint16_t *row, const Preparation &how, int t, bool is_back) {
  const uint16_t *cosines = how.cosines + (size_t)t * how.half, *sines = how.sines + t * how.half;
  for (int i = 0; i < how.half; i += LANES) {
    const Mask mask = lanes(how.half - i);
    const Floats cos = load(cosines + i, mask), forth = load(sines + i, mask);
    const Floats sin = is_back ? Floats{} - forth : forth;
    const Floats first = load(row + i, mask), second = load(row + how.half + i, mask);
    store(row + i, fmsub(first, cos, second * sin), mask);
    store(row + how.half + i, fmadd(second, cos, first * sin), mask);
  }
}

// A head's prepared rows, in `memory` (T, D) unless there is nothing to do.
From prepared(const Preparation &how, From x, Size size, std::vector<uint16_t> &memory) {
  if (how.is_identity()) return x;
  const int D = size.D;
  uint16_t *to = scratch(memory, (size_t)size.T * D);
  for (int t = 0; t < size.T; ++t, to += D) {
    if (how.weight)
      normalise(x.row(t), how.weight, nullptr, to, how.eps, D);
    else
      std::copy(x.row(t), x.row(t) + D, to);
    rotate(to, how, t, false);
  }
  return {memory.data(), (size_t)D};
}

// Write the gradient of a head's rows, from that of its prepared rows in `grad`; nothing to do if
// they are the same. Adds to the weight's gradient.
void write_prepared(const Preparation &how, To grad, From x, Size size, To dx, float *weight_sum) {
  if (how.is_identity()) return;
  for (int t = 0; t < size.T; ++t) {
    rotate(grad.row(t), how, t, true);
    if (how.weight)
      norm_gradient(grad.row(t), x.row(t), how.weight, dx.row(t), weight_sum, nullptr, how.eps,
                    size.D);
    else
      std::copy(grad.row(t), grad.row(t) + size.D, dx.row(t));
  }
}

// One query head of sequence b.
void attend_head(const Heads &heads, const Preparation &queries, const Preparation &keys,
                 const uint16_t *qkv, uint16_t *out, float *log_sums, int b, int h) {
  const TileUse tiles;
  thread_local std::vector<uint16_t> query_rows, key_rows;
  const Size size = {heads.T, heads.D};
  const int key = heads.H + h / heads.group();
  const From q = prepared(queries, heads.head(qkv, b, h), size, query_rows);
  const From k = prepared(keys, heads.head(qkv, b, key), size, key_rows);
  attend(q, k, heads.head(qkv, b, key + heads.K), size, heads.output(out, b, h),
         log_sums + ((size_t)b * heads.H + h) * heads.T);
}

// The arguments of the backward pass, see `attention_gradient`.
struct Pass {
  const uint16_t *grad, *qkv, *out;
  const float *log_sums;
  uint16_t *dqkv;
};

// The gradients of key head g of sequence b, its value head and all query heads that share them.
// Adds to the gradients of the norms' weights, weight_sums (2, D).
void group_gradient(const Heads &heads, const Preparation &queries, const Preparation &keys,
                    const Pass &pass, float *weight_sums, int b, int g) {
  const TileUse tiles;
  thread_local std::vector<uint16_t> query_rows, key_rows, rows;
  const Size size = {heads.T, heads.D};
  const int key = heads.H + g;
  const From raw_k = heads.head(pass.qkv, b, key);
  const BackwardWorkspace w(prepared(keys, raw_k, size, key_rows),
                            heads.head(pass.qkv, b, key + heads.K), size);
  // Gradients of prepared queries or keys, where preparing them changed them.
  const To apart = {scratch(rows, (size_t)size.T * size.D), (size_t)size.D};
  for (int h = g * heads.group(); h < (g + 1) * heads.group(); ++h) {
    const From raw_q = heads.head(pass.qkv, b, h);
    const To dq = heads.head(pass.dqkv, b, h);
    const Queries of = {prepared(queries, raw_q, size, query_rows), heads.output(pass.out, b, h),
                        heads.output(pass.grad, b, h),
                        pass.log_sums + ((size_t)b * heads.H + h) * heads.T};
    const To grad = queries.is_identity() ? dq : apart;
    attend_backward(w, of, grad);
    write_prepared(queries, grad, raw_q, size, dq, weight_sums);
  }
  const To dk = heads.head(pass.dqkv, b, key), grad = keys.is_identity() ? dk : apart;
  write_gradients(w, grad, heads.head(pass.dqkv, b, key + heads.K));
  write_prepared(keys, grad, raw_k, size, dk, weight_sums + heads.D);
}

}  // namespace
