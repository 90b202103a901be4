// Products of panels in pairs of words (gemm.h has their layout), by matrix instructions: a
// register of a panel holds two words of two columns, one of x two words of two rows, and one of
// sums two rows of two columns.
//
// Arm Architecture Reference Manual, chapter C7: BFMMLA adds as two BFDOT one after the other do,
// and USMMLA is exact, so sums have the same bits as by dot products.

#pragma once

#include <algorithm>

namespace {

template <typename Vectors, typename Low, typename High>
inline void zip(const Low &low, const High &high, Vectors &a, Vectors &b) {
  const Vectors x = a, y = b;
  a = {low(x.a, y.a), high(x.a, y.a), low(x.b, y.b), high(x.b, y.b)};
  b = {low(x.c, y.c), high(x.c, y.c), low(x.d, y.d), high(x.d, y.d)};
}

// Undo `zip`.
template <typename Vectors, typename Even, typename Odd>
inline void unzip(const Even &even, const Odd &odd, Vectors &a, Vectors &b) {
  const Vectors x = a, y = b;
  a = {even(x.a, x.b), even(x.c, x.d), even(y.a, y.b), even(y.c, y.d)};
  b = {odd(x.a, x.b), odd(x.c, x.d), odd(y.a, y.b), odd(y.c, y.d)};
}

inline void zip(Floats &a, Floats &b) { zip(OF(vzip1q_f32), OF(vzip2q_f32), a, b); }
inline void zip(Words &a, Words &b) { zip(OF(vzip1q_s32), OF(vzip2q_s32), a, b); }
inline void unzip(Floats &a, Floats &b) { unzip(OF(vuzp1q_f32), OF(vuzp2q_f32), a, b); }
inline void unzip(Words &a, Words &b) { unzip(OF(vuzp1q_s32), OF(vuzp2q_s32), a, b); }

// sums + the products of two words of 8 columns by those of two rows.
inline Floats multiply_pairs(Floats sums, Words w, int32x4_t x) {
  const auto of = [&](float32x4_t sums, int32x4_t w) {
    return vbfmmlaq_f32(sums, vreinterpretq_bf16_s32(w), vreinterpretq_bf16_s32(x));
  };
  return {of(sums.a, w.a), of(sums.b, w.b), of(sums.c, w.c), of(sums.d, w.d)};
}
inline Words multiply_pairs(Words sums, Words w, int32x4_t x) {
  const auto of = [&](int32x4_t sums, int32x4_t w) {
    return vusmmlaq_s32(sums, vreinterpretq_u8_s32(w), vreinterpretq_s8_s32(x));
  };
  return {of(sums.a, w.a), of(sums.b, w.b), of(sums.c, w.c), of(sums.d, w.d)};
}

// Add to the sums of ROWS rows, or one less, by 16 columns the products of `count` pairs of words:
// x points to the first row's, with strides from row to row and from pair to pair; weights(k, half)
// gives those of 8 columns. Of an odd number of rows, the last one is multiplied twice.
template <int ROWS, typename Sum, typename Weights>
__attribute__((always_inline)) inline void add_pairs(Sum (&sums)[ROWS][1], int rows, int count,
                                                     const int32_t *x, size_t row, size_t pair,
                                                     const Weights &weights) {
  constexpr int PAIRS = (ROWS + 1) / 2;
  const size_t to_last = rows % 2 ? 0 : row;
  Sum left[PAIRS], right[PAIRS];
#pragma GCC unroll 3
  for (int i = 0; i < PAIRS; ++i) {
    left[i] = sums[2 * i][0], right[i] = sums[std::min(2 * i + 1, ROWS - 1)][0];
    zip(left[i], right[i]);
  }
  for (int k = 0; k < count; ++k, x += pair) {
    int32x4_t words[PAIRS];
#pragma GCC unroll 3
    for (int i = 0; i < PAIRS; ++i) {
      const int32_t *first = x + 2 * i * row;
      const int32_t *second = first + (i + 1 < PAIRS ? row : to_last);
      words[i] = vcombine_s32(vld1_s32(first), vld1_s32(second));
    }
    const Words w_left = weights(k, 0);
#pragma GCC unroll 3
    for (int i = 0; i < PAIRS; ++i) left[i] = multiply_pairs(left[i], w_left, words[i]);
    // Only now: GCC would load all weights first, and keep sums in memory for lack of registers.
    if (PAIRS > 2) asm volatile("" ::: "memory");
    const Words w_right = weights(k, 1);
#pragma GCC unroll 3
    for (int i = 0; i < PAIRS; ++i) right[i] = multiply_pairs(right[i], w_right, words[i]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < PAIRS; ++i) {
    unzip(left[i], right[i]);
    sums[2 * i][0] = left[i];
    if (2 * i + 1 < ROWS) sums[2 * i + 1][0] = right[i];
  }
}

}  // namespace
