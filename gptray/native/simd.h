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

}  // namespace
