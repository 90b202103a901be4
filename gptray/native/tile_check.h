// Checks that tiles multiply as registers do on this machine, before anything relies on them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "gemm.h"

namespace {

// Compare both ways to multiply `rows` rows by a panel of `count` words.
template <typename Kind, typename Number>
bool tiles_agree(int rows, int count, const int32_t *x, const Words *panel, Number tolerance) {
  const TileUse tiles;
  Number sums[TILE][PANEL];
  const auto begin = [](int, int) { return typename Kind::Sum{}; };
  tile_product<Kind>(rows, {x, (size_t)count, 1}, panel, count, begin,
                     [&](int r, int b, typename Kind::Sum sum) {
                       std::memcpy(sums[r] + b * LANES, &sum, sizeof sum);
                     });
  bool agree = true;
  in_tiles(
      0, rows,
      [&](int first, int height) {
        register_product<Kind>(height, {x + (size_t)first * count, (size_t)count, 1}, panel, count,
                               begin, [&](int r, int b, typename Kind::Sum sum) {
                                 Number right[LANES];
                                 std::memcpy(right, &sum, sizeof sum);
                                 for (int i = 0; i < LANES; ++i)
                                   agree &= std::abs(sums[first + r][b * LANES + i] - right[i]) <=
                                            tolerance;
                               });
      },
      IN_REGISTERS);
  return agree;
}

// Checks each shape of tiles, with words left over.
bool tiles_are_right() {
  constexpr int COUNT = 37;
  alignas(64) static int32_t x[TILE * COUNT], panel[COUNT * PANEL];
  uint32_t state = 1;
  // Masked so that both halves of a word are small numbers in bf16.
  const auto fill = [&](int32_t *to, size_t size) {
    for (size_t i = 0; i < size; ++i) to[i] = (state = state * 1664525 + 1013904223) & 0xBF3FBF3F;
  };
  fill(x, std::size(x)), fill(panel, std::size(panel));
  for (const int rows : {LANES - 1, TILE - 1}) {
    if (!tiles_agree<Bf16>(rows, COUNT, x, (const Words *)panel, 1e-3f)) return false;
    if (!tiles_agree<Int8>(rows, COUNT, x, (const Words *)panel, 0)) return false;
  }
  return true;
}

}  // namespace
