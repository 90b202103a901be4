// Vectors of 16 fp32 numbers, for x86 processors with AVX-512 and its bf16 and int8 dot products.
//
// A word is the 4 bytes that a lane multiplies and adds at once: 1 fp32, 2 bf16 or 4 int8 numbers.
// bf16 numbers are passed as uint16_t.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int LANES = 16;

using Floats = __m512;
using Words = __m512i;

// A mask of the first `count` lanes.
inline __mmask16 lanes(int count) {
  return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1;
}

inline Floats load(const float *from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

// bf16 numbers as words with 0 in the upper half.
inline Words halves(const uint16_t *from, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

inline Floats load(const uint16_t *from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(halves(from, mask), 16));
}

inline __m256i to_bf16(Floats value) { return (__m256i)_mm512_cvtneps_pbh(value); }

inline void store(float *to, Floats value, __mmask16 mask) {
  _mm512_mask_storeu_ps(to, mask, value);
}

inline void store(uint16_t *to, Floats value, __mmask16 mask) {
  if (mask == 0xFFFF)
    _mm256_storeu_si256((__m256i *)to, to_bf16(value));
  else
    _mm256_mask_storeu_epi16(to, mask, to_bf16(value));
}

// Past the caches where it can be: for what is read much later.
inline void store_far(uint16_t *to, Floats value, __mmask16 mask) {
  if (mask == 0xFFFF && (uintptr_t)to % 32 == 0)
    _mm256_stream_si256((__m256i *)to, to_bf16(value));
  else
    store(to, value, mask);
}

// Ask for memory that is read soon.
template <typename T>
inline void fetch(const T *from, int count) {
  for (int byte = 0; byte < count * (int)sizeof(T); byte += 64)
    _mm_prefetch((const char *)from + byte, _MM_HINT_T0);
}

// Words of two bf16 numbers; those of `even` stand in the lower halves.
inline Words pair(Words even, Words odd) {
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

inline Words pair(Floats even, Floats odd) {
  return pair(_mm512_cvtepu16_epi32(to_bf16(even)), _mm512_cvtepu16_epi32(to_bf16(odd)));
}

// 16 rows of 16 words <-> 16 columns of them.
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
