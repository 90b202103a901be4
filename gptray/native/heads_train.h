// Attention of sequences whose heads of queries share heads of keys and values, and whose queries
// and keys may be normalised and rotated first.

#pragma once

#include "attention_train.h"
#include "norm.h"

namespace {

// B sequences of T tokens; a token's row in qkv has H heads of queries, K of keys and K of values,
// D numbers each.
struct Heads {
  int T, H, K, D;

  int group() const { return H / K; }
  size_t stride() const { return (size_t)(H + 2 * K) * D; }
  template <typename T>
  Strided<T> head(T *qkv, int b, int head) const {
    return {qkv + b * this->T * stride() + head * D, stride()};
  }
  // Of what attention gives, (B, T, H D).
  template <typename T>
  Strided<T> output(T *out, int b, int h) const {
    const size_t width = (size_t)H * D;
    return {out + b * this->T * width + h * D, width};
  }
};

// What is done to rows of queries or keys: RMSNorm with a weight (D) or nullptr; then the pairs of
// numbers that lie `half` apart are rotated by their token's angles, (T, half) each.
struct Preparation {
  const float *weight;
  float eps;
  const uint16_t *cosines, *sines;
  int half;

  bool is_nothing() const { return !weight && !half; }
};

// Rotate pairs by a token's angles, or back.
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

// A head's rows as they meet, in `room` (T, D) unless nothing is done to them.
From prepared(const Preparation &how, From x, Size size, std::vector<uint16_t> &memory) {
  if (how.is_nothing()) return x;
  const int D = size.D;
  uint16_t *to = room(memory, (size_t)size.T * D);
  for (int t = 0; t < size.T; ++t, to += D) {
    if (how.weight)
      normalise(x.row(t), how.weight, nullptr, to, how.eps, D);
    else
      std::copy(x.row(t), x.row(t) + D, to);
    rotate(to, how, t, false);
  }
  return {memory.data(), (size_t)D};
}

// The gradient of a head's rows, which lies in `grad` until now if anything is done to them. Adds
// to that of the weight.
void write_prepared(const Preparation &how, To grad, From x, Size size, To dx, float *weight_sum) {
  if (how.is_nothing()) return;
  for (int t = 0; t < size.T; ++t) {
    rotate(grad.row(t), how, t, true);
    if (how.weight)
      norm_gradient(grad.row(t), x.row(t), how.weight, dx.row(t), weight_sum, nullptr, how.eps,
                    size.D);
    else
      std::copy(grad.row(t), grad.row(t) + size.D, dx.row(t));
  }
}

// One head of queries of sequence b.
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

// What a step's backward pass takes, see `attention_gradient`.
struct Pass {
  const uint16_t *grad, *qkv, *out;
  const float *log_sums;
  uint16_t *dqkv;
};

// The gradients of sequence b's head g of keys, of its values and of all queries that share them.
// Adds to those of the norms' weights, weight_sums (2, D).
void group_gradient(const Heads &heads, const Preparation &queries, const Preparation &keys,
                    const Pass &pass, float *weight_sums, int b, int g) {
  const TileUse tiles;
  thread_local std::vector<uint16_t> query_rows, key_rows, rows;
  const Size size = {heads.T, heads.D};
  const int key = heads.H + g;
  const From raw_k = heads.head(pass.qkv, b, key);
  const Backward w(prepared(keys, raw_k, size, key_rows), heads.head(pass.qkv, b, key + heads.K),
                   size);
  const To before = {room(rows, (size_t)size.T * size.D), (size_t)size.D};
  for (int h = g * heads.group(); h < (g + 1) * heads.group(); ++h) {
    const From raw_q = heads.head(pass.qkv, b, h);
    const To dq = heads.head(pass.dqkv, b, h);
    const Queries of = {prepared(queries, raw_q, size, query_rows), heads.output(pass.out, b, h),
                        heads.output(pass.grad, b, h),
                        pass.log_sums + ((size_t)b * heads.H + h) * heads.T};
    const To made = queries.is_nothing() ? dq : before;
    attend_backward(w, of, made);
    write_prepared(queries, made, raw_q, size, dq, weight_sums);
  }
  const To dk = heads.head(pass.dqkv, b, key), made = keys.is_nothing() ? dk : before;
  write_gradients(w, made, heads.head(pass.dqkv, b, key + heads.K));
  write_prepared(keys, made, raw_k, size, dk, weight_sums + heads.D);
}

}  // namespace
