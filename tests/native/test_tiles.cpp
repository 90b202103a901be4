#include "check.h"
#include "gemm.h"
#include "tile_check.h"
#include "tiles.h"

// Sums of `rows` rows by a panel of `count` words, each from `start` on: (rows, 64).
template <typename Kind, typename Number>
static std::vector<Number> sums(int rows, Rows x, const std::vector<int32_t> &panel, int count,
                                Number start) {
  std::vector<Number> out(rows * PANEL);
  const TileUse tiles;
  tile_product<Kind>(
      rows, x, (const Words *)panel.data(), count,
      [&](int, int) {
        typename Kind::Sum sum;
        for (int i = 0; i < LANES; ++i) std::memcpy((Number *)&sum + i, &start, sizeof start);
        return sum;
      },
      [&](int r, int b, typename Kind::Sum sum) {
        std::memcpy(&out[r * PANEL + b * LANES], &sum, sizeof sum);
      });
  return out;
}

static std::vector<int32_t> random_words(size_t count, unsigned seed) {
  const auto halves = bf16(randoms(2 * count, seed));
  std::vector<int32_t> words(count);
  std::memcpy(words.data(), halves.data(), count * sizeof(int32_t));
  return words;
}

TEST(tiles_of_bf16_are_loops_over_pairs) {
  if (!HAS_TILES) return;
  for (const int rows : {1, 15, 16, 17, 25, 32})
    for (const int words : {1, 16, 37, 48}) {
      const auto x = random_words(rows * words, rows), panel = random_words(words * PANEL, 9);
      const auto out = sums<Bf16>(rows, {x.data(), (size_t)words, 1}, panel, words, 0.5f);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < PANEL; ++c) {
          double sum = 0.5;
          for (int k = 0; k < words; ++k)
            for (const int shift : {0, 16})
              sum += (double)from_bf16((uint32_t)x[r * words + k] >> shift) *
                     from_bf16((uint32_t)panel[k * PANEL + c] >> shift);
          CHECK_CLOSE(out[r * PANEL + c], sum, 1e-4);
        }
    }
}

TEST(tiles_of_int8_give_the_sums_of_registers) {
  if (!HAS_TILES) return;
  std::mt19937 generator(5);
  for (const int rows : {1, 7, 16, 17, 32})
    for (const int words : {3, 32, 41}) {
      std::vector<int32_t> x(rows * words), panel(words * PANEL);
      for (auto *numbers : {&x, &panel})
        for (int32_t &word : *numbers) word = (int32_t)generator();
      const auto out = sums<Int8>(rows, {x.data(), (size_t)words, 1}, panel, words, -7);
      for (int first = 0; first < rows; first += IN_REGISTERS)
        register_product<Int8>(
            std::min(IN_REGISTERS, rows - first), {&x[first * words], (size_t)words, 1},
            (const Words *)panel.data(), words, [](int, int) { return splat(-7); },
            [&](int r, int b, Words sum) {
              CHECK(!std::memcmp(&sum, &out[(first + r) * PANEL + b * LANES], sizeof sum));
            });
    }
}

TEST(a_row_has_the_same_bits_in_every_shape_of_tiles) {
  if (!HAS_TILES) return;
  const int words = 37;
  const auto x = random_words(TILE * words, 1), panel = random_words(words * PANEL, 2);
  const auto all = sums<Bf16>(TILE, {x.data(), (size_t)words, 1}, panel, words, 0.25f);
  for (const int rows : {1, 9, 16, 20})
    for (const int first : {0, 5, TILE - rows}) {
      const Rows from = {&x[first * words], (size_t)words, 1};
      const auto out = sums<Bf16>(rows, from, panel, words, 0.25f);
      CHECK(!std::memcmp(out.data(), &all[first * PANEL], out.size() * sizeof(float)));
    }
}

TEST(rows_that_stand_in_columns_are_turned) {
  if (!HAS_TILES) return;
  const int words = 37, width = 50;
  const auto columns = random_words(words * width, 1), panel = random_words(words * PANEL, 2);
  for (const int rows : {6, 16, 31}) {
    const int first = width - rows;
    std::vector<int32_t> x(rows * words);
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < words; ++k) x[r * words + k] = columns[k * width + first + r];
    const auto out = sums<Bf16>(rows, {&columns[first], 1, width}, panel, words, 0.f);
    CHECK(out == sums<Bf16>(rows, {x.data(), (size_t)words, 1}, panel, words, 0.f));
  }
}

TEST(the_trial_of_tiles_ends_well) {
  if (!HAS_TILES) return;
  CHECK(tiles_are_right());
}
