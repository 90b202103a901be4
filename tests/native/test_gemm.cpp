#include "check.h"
#include "gemm.h"

// A panel of `words` words times up to TILE rows of them, each sum from `start` on.
template <typename Kind>
static void multiply(const std::vector<int32_t> &x, const std::vector<int32_t> &panel, int rows,
                     int words, const Floats &start, float *out) {
  const auto begin = [&](int, int) {
    typename Kind::Sum sum;
    std::memcpy(&sum, &start, sizeof sum);
    return sum;
  };
  const auto end = [&](int r, int b, typename Kind::Sum sum) {
    std::memcpy(out + r * PANEL + b * LANES, &sum, sizeof sum);
  };
  std::vector<int32_t> own = panel;
  if (Kind::PAIRED) pair_words(own.data(), words);
  product<Kind>(rows, {x.data(), (size_t)words, 1}, (const Words *)own.data(), words, begin, end);
}

static std::vector<int32_t> random_words(size_t count, unsigned seed) {
  const auto halves = bf16(randoms(2 * count, seed));
  std::vector<int32_t> words(count);
  std::memcpy(words.data(), halves.data(), count * sizeof(int32_t));
  return words;
}

TEST(a_tile_of_fp32_is_a_loop_over_its_words) {
  const int words = 37;
  for (int rows = 1; rows <= TILE; ++rows) {
    const std::vector<float> x = randoms(rows * words, rows), w = randoms(words * PANEL, 9);
    std::vector<int32_t> x_words(x.size()), panel(w.size());
    std::memcpy(x_words.data(), x.data(), x.size() * 4);
    std::memcpy(panel.data(), w.data(), w.size() * 4);
    float out[TILE * PANEL];
    multiply<Fp32>(x_words, panel, rows, words, splat(0.5f), out);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < PANEL; ++c) {
        float sum = 0.5f;
        for (int k = 0; k < words; ++k) sum = std::fma(x[r * words + k], w[k * PANEL + c], sum);
        CHECK(out[r * PANEL + c] == sum);
      }
  }
}

TEST(a_tile_of_bf16_is_a_loop_over_pairs) {
  const int words = 37;
  for (int rows = 1; rows <= TILE; ++rows) {
    const auto x = random_words(rows * words, rows), panel = random_words(words * PANEL, 9);
    float out[TILE * PANEL];
    multiply<Bf16>(x, panel, rows, words, Floats{}, out);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < PANEL; ++c) {
        double sum = 0;
        for (int k = 0; k < words; ++k)
          for (const int shift : {0, 16})
            sum += (double)from_bf16((uint32_t)x[r * words + k] >> shift) *
                   from_bf16((uint32_t)panel[k * PANEL + c] >> shift);
        CHECK_CLOSE(out[r * PANEL + c], sum, 1e-4);
      }
  }
}

TEST(a_tile_of_int8_is_a_loop_over_fours) {
  const int words = 37;
  std::mt19937 generator(5);
  for (int rows = 1; rows <= TILE; ++rows) {
    std::vector<int32_t> x(rows * words), panel(words * PANEL), out(TILE * PANEL);
    for (auto *numbers : {&x, &panel})
      for (int32_t &word : *numbers) word = (int32_t)generator();
    multiply<Int8>(x, panel, rows, words, Floats{}, (float *)out.data());
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < PANEL; ++c) {
        int32_t sum = 0;
        for (int k = 0; k < words; ++k)
          for (int o = 0; o < 4; ++o)
            sum += ((const int8_t *)&x[r * words + k])[o] *
                   (((const uint8_t *)&panel[k * PANEL + c])[o] - 128 + BYTE_BIAS);
        CHECK(out[r * PANEL + c] == sum);
      }
  }
}

TEST(a_sum_of_bf16_has_the_bits_of_dot_products_of_one_word_after_another) {
  if (HAS_TILES) return;
  const int words = 37;
  for (int rows = 1; rows <= TILE; ++rows) {
    const auto x = random_words(rows * words, rows), panel = random_words(words * PANEL, 9);
    float out[TILE * PANEL];
    multiply<Bf16>(x, panel, rows, words, splat(0.5f), out);
    for (int r = 0; r < rows; ++r)
      for (int b = 0; b < BLOCKS; ++b) {
        Floats sum = splat(0.5f);
        for (int k = 0; k < words; ++k)
          sum = dot_bf16(sum, splat(x[r * words + k]), load(&panel[k * PANEL + b * LANES]));
        CHECK(!std::memcmp(&sum, &out[r * PANEL + b * LANES], sizeof sum));
      }
  }
}

template <typename Kind>
static int words_called_for(int rows, int words) {
  const std::vector<int32_t> x(rows * words), panel(words * PANEL);
  int called = 0;
  product<Kind>(
      rows, {x.data(), (size_t)words, 1}, (const Words *)panel.data(), words, FromZero<Kind>{},
      [](int, int, typename Kind::Sum) {}, [&](int count) { called += count; });
  return called;
}

TEST(a_product_calls_for_each_word_as_often_as_it_goes_through_a_panel) {
  const int words = 2 * LANES;
  for (int rows = 2; rows <= TILE; ++rows) {
    CHECK(words_called_for<Fp32>(rows, words) == passes<Fp32>(rows) * words);
    CHECK(words_called_for<Bf16>(rows, words) == passes<Bf16>(rows) * words);
    CHECK(words_called_for<Int8>(rows, words) == passes<Int8>(rows) * words);
  }
}

TEST(tiles_cover_all_rows_once_and_differ_by_no_more_than_even_heights_need) {
  for (int stop = 0; stop < 50; ++stop) {
    int next = 3, least = TILE, most = 0;
    in_tiles(3, 3 + stop, [&](int row, int rows) {
      CHECK(row == next);
      next += rows, least = std::min(least, rows), most = std::max(most, rows);
    });
    CHECK(next == 3 + stop && most <= TILE && (!stop || most - least < 2 * ABREAST));
  }
}

TEST(the_last_panel_holds_what_is_left_of_the_columns) {
  CHECK(panel_count(1) == 1 && panel_count(64) == 1 && panel_count(65) == 2);
}
