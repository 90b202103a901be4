// simd.h's vectors for x86 processors with AVX-512 and its bf16 and int8 dot products.

#pragma once

#include <immintrin.h>

namespace {

// Vectors of sums that fit in registers beside the operands, and the rows of a register tile.
constexpr int SUMS = 24, IN_REGISTERS = 6;

using Floats = __m512;  // has + - * /
using Words = __m512i;

// Whether panels have their words in pairs (panel_layout.h), which x86 has no instructions for.
constexpr bool IN_PAIRS = false;

inline Floats splat(float value) { return _mm512_set1_ps(value); }

inline Words splat(int32_t word) { return _mm512_set1_epi32(word); }

// Reinterpret the bits.
inline Floats as_floats(Words words) { return _mm512_castsi512_ps(words); }

inline Floats load(const float *from, Mask mask = ALL) { return _mm512_maskz_loadu_ps(mask, from); }

inline Words load(const int32_t *from, Mask mask = ALL) {
  return _mm512_maskz_loadu_epi32(mask, from);
}

// bf16 numbers as words with zeros in the upper half.
inline Words load_halves(const uint16_t *from, Mask mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

inline Floats load(const uint16_t *from, Mask mask = ALL) {
  return as_floats(_mm512_slli_epi32(load_halves(from, mask), 16));
}

inline Floats load_fp16(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

inline __m256i to_bf16(Floats value) { return (__m256i)_mm512_cvtneps_pbh(value); }

inline void store(float *to, Floats value, Mask mask = ALL) {
  _mm512_mask_storeu_ps(to, mask, value);
}

inline void store(int32_t *to, Words words) { _mm512_storeu_si512(to, words); }

inline void store(uint16_t *to, Floats value, Mask mask = ALL) {
  if (mask == ALL)
    _mm256_storeu_si256((__m256i *)to, to_bf16(value));
  else
    _mm256_mask_storeu_epi16(to, mask, to_bf16(value));
}

// Bypasses the caches if it can, for data that is read much later; call `end_streams` afterwards.
inline void store_stream(uint16_t *to, Floats value, Mask mask) {
  if (mask == ALL && (uintptr_t)to % 32 == 0)
    _mm256_stream_si256((__m256i *)to, to_bf16(value));
  else
    store(to, value, mask);
}

inline void end_streams() { _mm_sfence(); }

// The lowest byte of each word.
inline void store_bytes(void *to, Words words) {
  _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(words));
}

inline Floats fmadd(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }    // xy + z
inline Floats fmsub(Floats x, Floats y, Floats z) { return _mm512_fmsub_ps(x, y, z); }    // xy - z
inline Floats fnmadd(Floats x, Floats y, Floats z) { return _mm512_fnmadd_ps(x, y, z); }  // z - xy

inline Floats abs(Floats x) { return _mm512_abs_ps(x); }

inline Floats max(Floats x, Floats y) { return _mm512_max_ps(x, y); }

// Round to the nearest integer, ties to even.
inline Floats round(Floats x) { return _mm512_roundscale_ps(x, 8); }
inline Words to_int(Floats x) { return _mm512_cvtps_epi32(x); }

inline Floats to_float(Words x) { return _mm512_cvtepi32_ps(x); }

// x 2^n, n an integer.
inline Floats ldexp(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

// 1 / x, relative error 6e-5.
inline Floats reciprocal(Floats x) { return _mm512_rcp14_ps(x); }

inline float first_of(Floats x) { return _mm512_cvtss_f32(x); }
inline float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }
inline int32_t reduce_add(Words x) { return _mm512_reduce_add_epi32(x); }

// x in the lanes of the mask, y in the others.
inline Floats where(Mask mask, Floats x, Floats y) { return _mm512_mask_mov_ps(y, mask, x); }

// x where number >= 0, else y.
inline Floats where_positive(Floats number, Floats x, Floats y) {
  return where(_mm512_cmp_ps_mask(number, Floats{}, _CMP_GE_OQ), x, y);
}

// True for NaN too.
inline Mask not_less(Mask mask, Floats x, Floats y) {
  return _mm512_mask_cmp_ps_mask(mask, x, y, _CMP_NLT_UQ);
}
inline Mask not_equal(Mask mask, Floats x, Floats y) {
  return _mm512_mask_cmp_ps_mask(mask, x, y, _CMP_NEQ_UQ);
}

// Words of two bf16 numbers, those of `even` in the lower halves.
inline Words pair(Words even, Words odd) {
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

inline Words pair(Floats even, Floats odd) {
  return pair(_mm512_cvtepu16_epi32(to_bf16(even)), _mm512_cvtepu16_epi32(to_bf16(odd)));
}

// The numbers in the lower and upper halves of words.
inline Floats even_of(Words w) { return as_floats(_mm512_slli_epi32(w, 16)); }
inline Floats odd_of(Words w) { return as_floats(_mm512_and_si512(w, splat((int32_t)0xFFFF0000))); }

// 32 consecutive numbers as 16 words of bf16.
inline Words to_words(Floats low, Floats high) { return (Words)_mm512_cvtne2ps_pbh(high, low); }

// sum + the dot product of each pair of words of bf16.
inline Floats dot_bf16(Floats sum, Words x, Words w) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
}

// Added to the bytes of weights before they are multiplied.
constexpr int BYTE_BIAS = 128;

// Weights with BYTE_BIAS added, from packed weights with 128 added.
inline Words biased(Words bytes) { return bytes; }

// sum + the dot product of each pair of words of bytes; x is signed, w has BYTE_BIAS added.
inline Words dot_bytes(Words sum, Words x, Words w) {
  // Not the intrinsic: around it GCC 12 spills every sum, at half the speed.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

inline Words add(Words x, Words y) { return _mm512_add_epi32(x, y); }

// The lower and upper four bits of bytes.
inline Words low_nibbles(Words w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Words high_nibbles(Words w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }

// A lookup table of 16 bytes, and its entries for codes in bytes.
using Table = Words;
inline Table table_of(const int8_t *bytes) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes));
}
inline Words look_up(Table table, Words codes) { return _mm512_shuffle_epi8(table, codes); }

// Keep words in registers: GCC 12 would load them again for each row.
inline void keep_in_registers(Words &a, Words &b) { asm("" : "+v"(a), "+v"(b)); }
inline void keep_in_registers(Words &a, Words &b, Words &c, Words &d) {
  asm("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d));
}

// Transpose 16 rows of 16 words.
inline void transpose(Words (&w)[LANES]) {
  Words t[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4)  // w[i + c]: columns c, c + 4, c + 8, c + 12 of 4 rows
#pragma GCC unroll 2
    for (int c = 0; c < 4; c += 2) {
      w[i + c] = _mm512_unpacklo_epi64(t[i + c / 2], t[i + 2 + c / 2]);
      w[i + c + 1] = _mm512_unpackhi_epi64(t[i + c / 2], t[i + 2 + c / 2]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Words even = _mm512_shuffle_i32x4(w[c], w[c + 4], 0x88);
    const Words even_2 = _mm512_shuffle_i32x4(w[c + 8], w[c + 12], 0x88);
    const Words odd = _mm512_shuffle_i32x4(w[c], w[c + 4], 0xDD);
    const Words odd_2 = _mm512_shuffle_i32x4(w[c + 8], w[c + 12], 0xDD);
    w[c] = _mm512_shuffle_i32x4(even, even_2, 0x88);
    w[c + 4] = _mm512_shuffle_i32x4(odd, odd_2, 0x88);
    w[c + 8] = _mm512_shuffle_i32x4(even, even_2, 0xDD);
    w[c + 12] = _mm512_shuffle_i32x4(odd, odd_2, 0xDD);
  }
}

}  // namespace
