// The packed side of products: panels of 64 columns, [panel][word][64 columns].
//
// For ARM's matrix instructions, panels of bf16 and int8 have their words in pairs instead, those
// of a column side by side: [panel][pair of words][64 columns][2 words]. An odd last word stands
// alone, as without pairs.

#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "tiles.h"

namespace {

constexpr int BLOCKS = 4, PANEL = LANES * BLOCKS;
constexpr int AT_ONCE = SUMS / IN_REGISTERS;  // blocks of a register tile
constexpr int TILE = HAS_TILES ? 2 * LANES : IN_PAIRS ? 2 * IN_REGISTERS : IN_REGISTERS;
constexpr int ABREAST = IN_PAIRS ? 2 : 1;  // words of a column that stand side by side
constexpr int ROW_BLOCK = 96;              // most rows that use a panel while it is cached

// M rows in blocks of about the same height, so that threads share them evenly: the number of
// blocks, and the first row of each.
inline int row_blocks(int M) { return (M + ROW_BLOCK - 1) / ROW_BLOCK; }

inline int block_start(int block, int M) { return (int64_t)M * block / row_blocks(M); }

inline int panel_count(int columns) { return (columns + PANEL - 1) / PANEL; }

// Where word k of a column is in a panel of `count` words.
inline size_t place_in_panel(int k, int column, int count) {
  const int first = k / ABREAST * ABREAST, beside = std::min(ABREAST, count - first);
  return (size_t)first * PANEL + beside * column + (k - first);
}

// Put the words of a panel into pairs.
inline void pair_words(int32_t *panel, int count) {
  const std::vector<int32_t> words(panel, panel + (size_t)count * PANEL);
  for (int k = 0; k < count; ++k)
    for (int column = 0; column < PANEL; ++column)
      panel[place_in_panel(k, column, count)] = words[(size_t)k * PANEL + column];
}

}  // namespace
