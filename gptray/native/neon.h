// simd.h's vectors for ARM processors, four NEON registers each: with dot products of bf16 and
// int8, and matrix instructions, if the compiler may use them, else by conversion.
//
// avx512.h documents the functions. Arm Architecture Reference Manual, chapter C7.

#pragma once

#include <arm_neon.h>

#include <cmath>

namespace {

// Without a bf16 dot product, each word of weights takes two registers.
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
constexpr int SUMS = 6, IN_REGISTERS = 6;
#else
constexpr int SUMS = 4, IN_REGISTERS = 4;
#endif

#ifdef __ARM_FEATURE_MATMUL_INT8  // asked for with bf16 only, see processor.py
constexpr bool IN_PAIRS = true;
#else
constexpr bool IN_PAIRS = false;
#endif

// Not arrays: GCC keeps arrays of registers in memory.
struct __attribute__((may_alias)) Floats {
  float32x4_t a, b, c, d;
};
struct __attribute__((may_alias)) Words {
  int32x4_t a, b, c, d;
};

// Wraps an intrinsic, which has no address.
#define OF(intrinsic) [](auto... x) { return intrinsic(x...); }

// Apply a function to each register of the vectors.
template <typename Result, typename Make, typename... Vectors>
inline Result each(const Make &make, Vectors... x) {
  return {make(x.a...), make(x.b...), make(x.c...), make(x.d...)};
}

// As `each`, with the mask expanded to all or no bits of each lane.
template <typename Make>
inline Floats each_masked(const Make &make, Mask mask, Floats x, Floats y) {
  const uint32x4_t bits = {1, 2, 4, 8};
  const auto of = [&](int first) { return vtstq_u32(vdupq_n_u32(mask >> first), bits); };
  return {make(of(0), x.a, y.a), make(of(4), x.b, y.b), make(of(8), x.c, y.c),
          make(of(12), x.d, y.d)};
}

inline Floats operator+(Floats x, Floats y) { return each<Floats>(OF(vaddq_f32), x, y); }
inline Floats operator-(Floats x, Floats y) { return each<Floats>(OF(vsubq_f32), x, y); }
inline Floats operator*(Floats x, Floats y) { return each<Floats>(OF(vmulq_f32), x, y); }
inline Floats operator/(Floats x, Floats y) { return each<Floats>(OF(vdivq_f32), x, y); }

inline Floats splat(float value) {
  const float32x4_t x = vdupq_n_f32(value);
  return {x, x, x, x};
}

inline Words splat(int32_t word) {
  const int32x4_t x = vdupq_n_s32(word);
  return {x, x, x, x};
}

inline Floats as_floats(Words words) { return each<Floats>(OF(vreinterpretq_f32_s32), words); }

inline Words as_words(uint16x8_t a, uint16x8_t b, uint16x8_t c, uint16x8_t d) {
  return {vreinterpretq_s32_u16(a), vreinterpretq_s32_u16(b), vreinterpretq_s32_u16(c),
          vreinterpretq_s32_u16(d)};
}

// The first numbers, as many as the mask has lanes, then zeros.
template <typename T>
struct Some {
  T numbers[LANES] = {};

  Some(const T *from, Mask mask) {
    for (int i = 0; mask >> i & 1; ++i) numbers[i] = from[i];
  }
};

// Write the first of 16 numbers, as many as the mask has lanes.
template <typename T>
inline void store_some(T *to, const T *numbers, Mask mask) {
  for (int i = 0; mask >> i & 1; ++i) to[i] = numbers[i];
}

inline Floats load(const float *from, Mask mask = ALL) {
  if (mask != ALL) return load(Some<float>(from, mask).numbers);
  return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
}

inline Words load(const int32_t *from, Mask mask = ALL) {
  if (mask != ALL) return load(Some<int32_t>(from, mask).numbers);
  return {vld1q_s32(from), vld1q_s32(from + 4), vld1q_s32(from + 8), vld1q_s32(from + 12)};
}

inline Words load_halves(const uint16_t *from, Mask mask) {
  if (mask != ALL) return load_halves(Some<uint16_t>(from, mask).numbers, ALL);
  const uint16x8_t low = vld1q_u16(from), high = vld1q_u16(from + 8), zero = vdupq_n_u16(0);
  return as_words(vzip1q_u16(low, zero), vzip2q_u16(low, zero), vzip1q_u16(high, zero),
                  vzip2q_u16(high, zero));
}

inline Floats load(const uint16_t *from, Mask mask = ALL) {
  if (mask != ALL) return load(Some<uint16_t>(from, mask).numbers);
  const uint16x8_t low = vld1q_u16(from), high = vld1q_u16(from + 8), zero = vdupq_n_u16(0);
  return as_floats(as_words(vzip1q_u16(zero, low), vzip2q_u16(zero, low), vzip1q_u16(zero, high),
                            vzip2q_u16(zero, high)));
}

inline Floats load_fp16(const uint16_t *from) {
  const auto of = [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))); };
  return {of(0), of(4), of(8), of(12)};
}

// 8 numbers in bf16, rounded to nearest, ties to even.
inline uint16x8_t to_bf16(float32x4_t low, float32x4_t high) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
#else
  const auto rounded = [](float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t is_odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t number = vaddq_u32(bits, vaddq_u32(is_odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(x, x), number, nan));
  };
  return vuzp2q_u16(rounded(low), rounded(high));
#endif
}

inline void store(float *to, Floats value, Mask mask = ALL) {
  float all[LANES], *whole = mask == ALL ? to : all;
  vst1q_f32(whole, value.a), vst1q_f32(whole + 4, value.b);
  vst1q_f32(whole + 8, value.c), vst1q_f32(whole + 12, value.d);
  if (mask != ALL) store_some(to, all, mask);
}

inline void store(int32_t *to, Words words) {
  vst1q_s32(to, words.a), vst1q_s32(to + 4, words.b);
  vst1q_s32(to + 8, words.c), vst1q_s32(to + 12, words.d);
}

inline void store(uint16_t *to, Floats value, Mask mask = ALL) {
  uint16_t all[LANES], *whole = mask == ALL ? to : all;
  vst1q_u16(whole, to_bf16(value.a, value.b)), vst1q_u16(whole + 8, to_bf16(value.c, value.d));
  if (mask != ALL) store_some(to, all, mask);
}

inline void store_stream(uint16_t *to, Floats value, Mask mask) { store(to, value, mask); }

inline void end_streams() {}

inline void store_bytes(void *to, Words words) {
  const int16x8_t low = vcombine_s16(vmovn_s32(words.a), vmovn_s32(words.b));
  const int16x8_t high = vcombine_s16(vmovn_s32(words.c), vmovn_s32(words.d));
  vst1q_s8((int8_t *)to, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

inline Floats fmadd(Floats x, Floats y, Floats z) { return each<Floats>(OF(vfmaq_f32), z, x, y); }
inline Floats fnmadd(Floats x, Floats y, Floats z) { return each<Floats>(OF(vfmsq_f32), z, x, y); }
inline Floats fmsub(Floats x, Floats y, Floats z) {
  return fmadd(x, y, each<Floats>(OF(vnegq_f32), z));
}

inline Floats abs(Floats x) { return each<Floats>(OF(vabsq_f32), x); }

// The maximum of NaN and a number is the number.
inline Floats max(Floats x, Floats y) { return each<Floats>(OF(vmaxnmq_f32), x, y); }

inline Floats round(Floats x) { return each<Floats>(OF(vrndnq_f32), x); }
inline Words to_int(Floats x) { return each<Words>(OF(vcvtnq_s32_f32), x); }

inline Floats to_float(Words x) { return each<Floats>(OF(vcvtq_f32_s32), x); }

// For n >= -252: multiplies by two powers of 2, so that results can be subnormal or overflow.
inline Floats ldexp(Floats x, Floats n) {
  const auto power = [](int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  };
  const auto of = [&](float32x4_t x, float32x4_t n) {
    const int32x4_t whole = vminq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(254));
    const int32x4_t half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(x, power(half)), power(vsubq_s32(whole, half)));
  };
  return each<Floats>(of, x, n);
}

// An 8-bit estimate and two Newton steps.
inline Floats reciprocal(Floats x) {
  const auto of = [](float32x4_t x) {
    float32x4_t estimate = vrecpeq_f32(x);
    estimate = vmulq_f32(estimate, vrecpsq_f32(x, estimate));
    return vmulq_f32(estimate, vrecpsq_f32(x, estimate));
  };
  return each<Floats>(of, x);
}

inline float first_of(Floats x) { return vgetq_lane_f32(x.a, 0); }
inline float reduce_add(Floats x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d)));
}
inline float reduce_max(Floats x) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.a, x.b), vmaxnmq_f32(x.c, x.d)));
}
inline int32_t reduce_add(Words x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d)));
}

// The mask of the lanes whose bits are all set.
inline Mask to_mask(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
  const auto bits = [](uint32x4_t lanes, uint32_t first) {
    const uint32x4_t each = {first, first << 1, first << 2, first << 3};
    return vandq_u32(lanes, each);
  };
  const uint32x4_t low = vorrq_u32(bits(a, 1), bits(b, 1 << 4));
  return vaddvq_u32(vorrq_u32(low, vorrq_u32(bits(c, 1 << 8), bits(d, 1 << 12))));
}

inline Floats where(Mask mask, Floats x, Floats y) {
  return mask == ALL ? x : each_masked(OF(vbslq_f32), mask, x, y);
}

inline Floats where_positive(Floats number, Floats x, Floats y) {
  const auto of = [](float32x4_t number, float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcgezq_f32(number), x, y);
  };
  return each<Floats>(of, number, x, y);
}

inline Mask not_less(Mask mask, Floats x, Floats y) {
  return mask & ~to_mask(vcltq_f32(x.a, y.a), vcltq_f32(x.b, y.b), vcltq_f32(x.c, y.c),
                         vcltq_f32(x.d, y.d));
}
inline Mask not_equal(Mask mask, Floats x, Floats y) {
  return mask & ~to_mask(vceqq_f32(x.a, y.a), vceqq_f32(x.b, y.b), vceqq_f32(x.c, y.c),
                         vceqq_f32(x.d, y.d));
}

}  // namespace

#include "neon_words.h"
#ifdef __ARM_FEATURE_MATMUL_INT8
#include "neon_pairs.h"
#endif

#undef OF
