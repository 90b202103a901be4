// The rest of neon.h: words, their products and their layout.

#pragma once

namespace {

inline Words pair(Words even, Words odd) {
  const auto of = [](int32x4_t even, int32x4_t odd) { return vsliq_n_s32(even, odd, 16); };
  return each<Words>(of, even, odd);
}

inline Words pair(Floats even, Floats odd) {
  const uint16x8_t e = to_bf16(even.a, even.b), e_2 = to_bf16(even.c, even.d);
  const uint16x8_t o = to_bf16(odd.a, odd.b), o_2 = to_bf16(odd.c, odd.d);
  return as_words(vzip1q_u16(e, o), vzip2q_u16(e, o), vzip1q_u16(e_2, o_2), vzip2q_u16(e_2, o_2));
}

inline float32x4_t even_of(int32x4_t w) { return vreinterpretq_f32_s32(vshlq_n_s32(w, 16)); }
inline float32x4_t odd_of(int32x4_t w) {
  return vreinterpretq_f32_s32(vandq_s32(w, vdupq_n_s32((int32_t)0xFFFF0000)));
}
inline Floats even_of(Words w) { return {even_of(w.a), even_of(w.b), even_of(w.c), even_of(w.d)}; }
inline Floats odd_of(Words w) { return {odd_of(w.a), odd_of(w.b), odd_of(w.c), odd_of(w.d)}; }

inline Words to_words(Floats low, Floats high) {
  return as_words(to_bf16(low.a, low.b), to_bf16(low.c, low.d), to_bf16(high.a, high.b),
                  to_bf16(high.c, high.d));
}

inline Floats dot_bf16(Floats sum, Words x, Words w) {
  const auto of = [](float32x4_t sum, int32x4_t x, int32x4_t w) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    return vbfdotq_f32(sum, vreinterpretq_bf16_s32(x), vreinterpretq_bf16_s32(w));
#else
    return vfmaq_f32(vfmaq_f32(sum, even_of(x), even_of(w)), odd_of(x), odd_of(w));
#endif
  };
  return each<Floats>(of, sum, x, w);
}

#ifdef __ARM_FEATURE_MATMUL_INT8  // products of unsigned by signed bytes
constexpr int BYTE_BIAS = 128;
#else
constexpr int BYTE_BIAS = 0;
#endif

inline Words biased(Words bytes) {
  if (BYTE_BIAS) return bytes;
  const auto of = [](int32x4_t x) { return veorq_s32(x, vdupq_n_s32((int32_t)0x80808080)); };
  return each<Words>(of, bytes);
}

inline Words dot_bytes(Words sum, Words x, Words w) {
  const auto of = [](int32x4_t sum, int32x4_t words, int32x4_t weights) {
    const int8x16_t x = vreinterpretq_s8_s32(words), w = vreinterpretq_s8_s32(weights);
#ifdef __ARM_FEATURE_MATMUL_INT8
    return vusdotq_s32(sum, vreinterpretq_u8_s8(w), x);
#elif defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, x, w);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(w)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(x, w));
    return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
  };
  return each<Words>(of, sum, x, w);
}

inline Words add(Words x, Words y) { return each<Words>(OF(vaddq_s32), x, y); }

inline Words low_nibbles(Words w) {
  const auto of = [](int32x4_t x) { return vandq_s32(x, vdupq_n_s32(0x0F0F0F0F)); };
  return each<Words>(of, w);
}
inline Words high_nibbles(Words w) {
  const auto of = [](int32x4_t x) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4));
  };
  return each<Words>(of, w);
}

using Table = int8x16_t;
inline Table table_of(const int8_t *bytes) { return vld1q_s8(bytes); }
inline Words look_up(Table table, Words codes) {
  const auto of = [&](int32x4_t x) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(table, vreinterpretq_u8_s32(x)));
  };
  return each<Words>(of, codes);
}

inline void keep_in_registers(Words &, Words &) {}
inline void keep_in_registers(Words &, Words &, Words &, Words &) {}

// Transpose 4 rows of 4 words.
inline void transpose(int32x4_t (&w)[4]) {
  const auto wide = OF(vreinterpretq_s64_s32);
  const int64x2_t even = wide(vtrn1q_s32(w[0], w[1])), even_2 = wide(vtrn1q_s32(w[2], w[3]));
  const int64x2_t odd = wide(vtrn2q_s32(w[0], w[1])), odd_2 = wide(vtrn2q_s32(w[2], w[3]));
  w[0] = vreinterpretq_s32_s64(vtrn1q_s64(even, even_2));
  w[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd, odd_2));
  w[2] = vreinterpretq_s32_s64(vtrn2q_s64(even, even_2));
  w[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd, odd_2));
}

inline void transpose(Words (&w)[LANES]) {
  int32_t *const words = (int32_t *)w;
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j <= i; j += 4) {  // swap the squares at (i, j) and (j, i)
      int32_t *const lower = words + i * LANES + j, *const upper = words + j * LANES + i;
      int32x4_t square[4], other[4];
      for (int r = 0; r < 4; ++r) square[r] = vld1q_s32(lower + r * LANES);
      for (int r = 0; r < 4; ++r) other[r] = vld1q_s32(upper + r * LANES);
      transpose(square), transpose(other);
      for (int r = 0; r < 4; ++r) vst1q_s32(lower + r * LANES, other[r]);
      for (int r = 0; r < 4; ++r) vst1q_s32(upper + r * LANES, square[r]);
    }
}

}  // namespace
