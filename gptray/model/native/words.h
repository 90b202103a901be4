// Products of bf16 numbers with fp32 sums, for x86 processors with AVX-512 and its dot product.
//
// A word is two bf16 numbers that one lane multiplies and adds at once. One side of a product gives
// a word to all lanes, for up to TILE rows; the other side is packed into panels: [panel of 64
// columns][word][64 columns]. Each sum runs in one fixed order.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {

constexpr int LANES = 16, BLOCKS = 4, PANEL = LANES * BLOCKS;
constexpr int TILE = 6;  // rows at once: 24 sums, 4 weights and a word in 32 registers

using Floats = __m512;
using Words = __m512i;

inline __mmask16 lanes(int count) {
  return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1;
}

inline Floats load(const float *from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

inline Words halves(const uint16_t *from, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

inline Floats load(const uint16_t *from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(halves(from, mask), 16));
}

inline __m256i to_bf16(Floats value) { return (__m256i)_mm512_cvtneps_pbh(value); }

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

inline void store(float *to, Floats value, __mmask16 mask) {
  _mm512_mask_storeu_ps(to, mask, value);
}

inline Words pair(Words even, Words odd) {
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

inline Words pair(Floats even, Floats odd) {
  return pair(_mm512_cvtepu16_epi32(to_bf16(even)), _mm512_cvtepu16_epi32(to_bf16(odd)));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x as 2^n 2^r with |r| <= 1 / 2; off by 4e-5 of the value, bf16 by up to 4e-3.
inline Floats exp2(Floats x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-150.f));
  const Floats n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
  Floats p = _mm512_set1_ps(0.00961812911f);  // ln(2)^4 / 4! and so on
  for (const float c : {0.0555041087f, 0.240226507f, 0.693147181f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// --- products

// Words of one side of a product: of row r at place k.
struct Rows {
  const int32_t *words;
  size_t row, place;  // steps
};

// ROWS rows by a panel of `count` words; begin(r, b) gives each sum, end(r, b, sum) takes it.
template <int ROWS, typename Begin, typename End>
inline void tile(Rows x, const Words *panel, int count, const Begin &begin, const End &end) {
  Floats sums[ROWS][BLOCKS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) sums[r][b] = begin(r, b);
  const int32_t *words = x.words;
  for (int k = 0; k < count; ++k, panel += BLOCKS, words += x.place) {
    // By name: of an array GCC 12 keeps a copy in memory.
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + 1);
    const __m512bh w2 = (__m512bh)_mm512_loadu_si512(panel + 2);
    const __m512bh w3 = (__m512bh)_mm512_loadu_si512(panel + 3);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh word = (__m512bh)_mm512_set1_epi32(words[r * x.row]);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], word, w0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], word, w1);
      sums[r][2] = _mm512_dpbf16_ps(sums[r][2], word, w2);
      sums[r][3] = _mm512_dpbf16_ps(sums[r][3], word, w3);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) end(r, b, sums[r][b]);
}

template <typename Begin, typename End>
inline void product(int rows, Rows x, const Words *panel, int count, const Begin &begin,
                    const End &end) {
  switch (rows) {
    case 1: return tile<1>(x, panel, count, begin, end);
    case 2: return tile<2>(x, panel, count, begin, end);
    case 3: return tile<3>(x, panel, count, begin, end);
    case 4: return tile<4>(x, panel, count, begin, end);
    case 5: return tile<5>(x, panel, count, begin, end);
    default: return tile<TILE>(x, panel, count, begin, end);
  }
}

inline Floats zero(int, int) { return _mm512_setzero_ps(); }

// Call run(row, rows) for tiles of about the same height that make up rows first .. stop - 1.
template <typename Run>
inline void in_tiles(int first, int stop, const Run &run) {
  for (int row = first, rows; row < stop; row += rows) {
    const int left = (stop - row + TILE - 1) / TILE;
    rows = (stop - row + left - 1) / left;
    run(row, rows);
  }
}

inline int panel_count(int columns) { return (columns + PANEL - 1) / PANEL; }

// --- panels

// Room for a `Words`.
struct alignas(64) Line {
  int32_t words[LANES];
};

// A thread's memory for `size` of them; what was in it may be lost.
template <typename T>
T *room(std::vector<T> &vector, size_t size) {
  if (vector.size() < size) vector.resize(size);
  return vector.data();
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

// Rows of `count` words -> block `block` of their panels; words(r, k) gives 16 words of the
// block's row r from word k on.
template <typename Get>
inline void pack_block(const Get &words, Words *panels, int block, int count) {
  Words *to = panels + (size_t)(block / BLOCKS) * count * BLOCKS + block % BLOCKS;
  for (int k = 0; k < count; k += LANES) {
    Words square[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) square[r] = words(r, k);
    transpose(square);
    for (int i = 0; i < std::min(LANES, count - k); ++i) to[(size_t)(k + i) * BLOCKS] = square[i];
  }
}

// W (N, K) fp32 -> panels of 64 rows, words along K.
void pack_rows(const float *w, Words *panels, int N, int K) {
#pragma omp for schedule(static)
  for (int block = 0; block < panel_count(N) * BLOCKS; ++block)
    pack_block(
        [&](int r, int k) {
          const int row = block * LANES + r, left = row < N ? K - 2 * k : 0;
          const float *from = w + (size_t)row * K + 2 * k;
          const Floats low = load(from, lanes(left)), high = load(from + LANES, lanes(left - LANES));
          return (Words)_mm512_cvtne2ps_pbh(high, low);
        },
        panels, block, K / 2);
}

// W (N, K) fp32 -> panels of 64 columns, words along N.
void pack_columns(const float *w, Words *panels, int N, int K) {
  const int count = N / 2;
#pragma omp for collapse(2) schedule(static)
  for (int panel = 0; panel < panel_count(K); ++panel)
    for (int n = 0; n < count; ++n)
      for (int b = 0; b < BLOCKS; ++b) {
        const int column = panel * PANEL + b * LANES;
        const __mmask16 mask = lanes(K - column);
        const float *from = w + (size_t)2 * n * K + column;
        const Words words = pair(load(from, mask), load(from + K, mask));
        _mm512_store_si512(panels + ((size_t)panel * count + n) * BLOCKS + b, words);
      }
}

// `columns` <= 64 columns of rows (M, stride) bf16 -> a panel of them, words along M.
void pack_panel(const uint16_t *x, size_t stride, Words *panel, int M, int columns) {
  for (int m = 0; m < M; m += 2, x += 2 * stride)
    for (int b = 0; b < BLOCKS; ++b) {
      const __mmask16 mask = lanes(columns - b * LANES), odd = m + 1 < M ? mask : 0;
      const uint16_t *from = x + b * LANES;
      _mm512_store_si512(panel++, pair(halves(from, mask), halves(from + stride, odd)));
    }
}

// Rows (M, K) bf16 -> panels of 64 columns, words along M.
void pack_panels(const uint16_t *x, Words *panels, int M, int K) {
  const size_t size = (size_t)(M + 1) / 2 * BLOCKS;
#pragma omp for schedule(static)
  for (int panel = 0; panel < panel_count(K); ++panel)
    pack_panel(x + panel * PANEL, K, panels + panel * size, M, K - panel * PANEL);
}

}  // namespace
