// AMX tiles of 16 rows of 64 bytes, eight per thread, and their products. If a test defines
// EMULATED_TILES, scalar loops replace the instructions.
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2.

#pragma once

#include <cmath>
#include <cstring>

#include "simd.h"

namespace {

#if defined(EMULATED_TILES) || \
    (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__))
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

// LDTILECFG's operand: how much of each tile is used.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

#ifdef EMULATED_TILES

thread_local TileShapes shapes;
thread_local struct {
  uint8_t rows[LANES][4 * LANES];
} tiles[8];

inline void load_shapes(const TileShapes &from) {
  shapes = from;
  std::memset(tiles, 0, sizeof tiles);
}

inline void release_shapes() { load_shapes({0, 0, {}, {}, {}}); }

template <int T>
inline void zero_tile() {
  std::memset(tiles + T, 0, sizeof tiles[T]);
}

template <int T>
inline void load_tile(const void *from, size_t stride) {
  zero_tile<T>();
  for (int r = 0; r < shapes.rows[T]; ++r)
    std::memcpy(tiles[T].rows[r], (const char *)from + r * stride, shapes.row_bytes[T]);
}

template <int T>
inline void store_tile(void *to, size_t stride) {
  for (int r = 0; r < shapes.rows[T]; ++r)
    std::memcpy((char *)to + r * stride, tiles[T].rows[r], shapes.row_bytes[T]);
}

inline float widened(const uint8_t *half) {
  const uint32_t bits = (uint32_t)half[0] << 16 | (uint32_t)half[1] << 24;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int C, int A, int B>
inline void multiply_bf16_tiles() {
  for (int r = 0; r < shapes.rows[C]; ++r)
    for (int c = 0; c < shapes.row_bytes[C]; c += 4) {
      float sums[2] = {}, total;
      for (int k = 0; k < shapes.row_bytes[A]; k += 4)
        for (int o = 0; o < 2; ++o)
          sums[o] = std::fma(widened(tiles[A].rows[r] + k + 2 * o),
                             widened(tiles[B].rows[k / 4] + c + 2 * o), sums[o]);
      std::memcpy(&total, tiles[C].rows[r] + c, sizeof total);
      total += sums[0] + sums[1];
      std::memcpy(tiles[C].rows[r] + c, &total, sizeof total);
    }
}

template <int C, int A, int B>
inline void multiply_int8_tiles() {
  for (int r = 0; r < shapes.rows[C]; ++r)
    for (int c = 0; c < shapes.row_bytes[C]; c += 4) {
      int32_t total;
      std::memcpy(&total, tiles[C].rows[r] + c, sizeof total);
      for (int k = 0; k < shapes.row_bytes[A]; ++k)
        total += (int8_t)tiles[A].rows[r][k] * tiles[B].rows[k / 4][c + k % 4];
      std::memcpy(tiles[C].rows[r] + c, &total, sizeof total);
    }
}

#else

// Not by intrinsics: GCC's need a literal tile number, not a template argument.

inline void load_shapes(const TileShapes &from) { asm volatile("ldtilecfg %0" ::"m"(from)); }

inline void release_shapes() { asm volatile("tilerelease"); }

template <int T>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Rows are `stride` bytes apart.
template <int T>
inline void load_tile(const void *from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void store_tile(void *to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// C += A B, A in rows of words, B in words of columns.
template <int C, int A, int B>
inline void multiply_bf16_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// A is signed, B is unsigned.
template <int C, int A, int B>
inline void multiply_int8_tiles() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// The number of rows for which this thread's tiles are shaped, see `shape_tiles`; 0: not shaped.
thread_local int shaped_rows = 0;

// Tiles for up to 32 rows by panels: sums in 0 to 3, rows in 4 and 5, words of columns in 6 and 7.
// Up to 16 rows use four sums side by side, and 5 for words of columns too; more use two by two.
inline void shape_tiles(int rows) {
  if (rows == shaped_rows) return;
  shaped_rows = rows;
  TileShapes shapes;
  const bool in_row = rows <= LANES;
  const int upper = in_row ? rows : LANES, lower = in_row ? rows : rows - LANES;
  const int heights[8] = {upper, upper, lower, lower, upper, in_row ? LANES : lower, LANES, LANES};
  for (int tile = 0; tile < 8; ++tile) {
    shapes.rows[tile] = heights[tile];
    shapes.row_bytes[tile] = 4 * LANES;
  }
  load_shapes(shapes);
}

// Lives while a thread multiplies tiles and then releases them: other libraries shape them too, and
// a sleeping thread with tiles in use keeps its core out of deep sleep.
struct TileUse {
  TileUse() {}  // avoids the warning about an unused variable
  ~TileUse() {
    if constexpr (HAS_TILES)
      if (shaped_rows) {
        release_shapes();
        shaped_rows = 0;
      }
  }
};

}  // namespace
