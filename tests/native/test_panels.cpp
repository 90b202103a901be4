#include "check.h"
#include "panels.h"

// The number of a panel's column at place `k`, two of which make a word.
static float at(const std::vector<Line> &panels, int column, int k, int words) {
  const uint32_t *panel =
      (const uint32_t *)panels.data() + (size_t)(column / PANEL) * words * PANEL;
  const uint32_t both = panel[place_in_panel(k / 2, column % PANEL, words)];
  return from_bf16(k % 2 ? both >> 16 : both & 0xFFFF);
}

TEST(rows_and_columns_of_weights_are_packed_as_they_stand) {
  for (const int N : {2, 29, 64, 66, 130})
    for (const int K : {2, 34, 64, 98}) {
      const int words = (N + 1) / 2;
      const std::vector<float> w = randoms((size_t)N * K, N + K);
      std::vector<Line> rows((size_t)panel_count(N) * BLOCKS * K / 2);
      std::vector<Line> columns((size_t)panel_count(K) * BLOCKS * words);
      pack_rows(w.data(), (Words *)rows.data(), N, K);
      pack_columns(w.data(), (Words *)columns.data(), N, K);
      for (int n = 0; n < panel_count(N) * PANEL; ++n)
        for (int k = 0; k < K; ++k)
          CHECK(at(rows, n, k, K / 2) == (n < N ? from_bf16(bf16(w[n * K + k])) : 0));
      for (int k = 0; k < panel_count(K) * PANEL; ++k)
        for (int n = 0; n < 2 * words; ++n)
          CHECK(at(columns, k, n, words) == (k < K && n < N ? from_bf16(bf16(w[n * K + k])) : 0));
    }
}

TEST(rows_of_bf16_are_packed_with_a_zero_beside_the_last_odd_one) {
  for (const int M : {1, 2, 7})
    for (const int K : {2, 64, 70}) {
      const auto x = bf16(randoms((size_t)M * K, M + K));
      const int words = column_words(M);
      std::vector<Line> panels((size_t)panel_count(K) * words * BLOCKS);
      pack_panels(x.data(), (Words *)panels.data(), M, K);
      for (int k = 0; k < panel_count(K) * PANEL; ++k)
        for (int m = 0; m < 2 * words; ++m)
          CHECK(at(panels, k, m, words) == (k < K && m < M ? from_bf16(x[m * K + k]) : 0));
    }
}

TEST(a_square_is_turned_over) {
  Words square[LANES];
  int32_t numbers[LANES][LANES];
  for (int r = 0; r < LANES; ++r)
    for (int c = 0; c < LANES; ++c) numbers[r][c] = 100 * r + c;
  for (int r = 0; r < LANES; ++r) square[r] = load(numbers[r]);
  transpose(square);
  for (int r = 0; r < LANES; ++r) store(numbers[r], square[r]);
  for (int r = 0; r < LANES; ++r)
    for (int c = 0; c < LANES; ++c) CHECK(numbers[r][c] == 100 * c + r);
}

TEST(a_left_panel_has_words_of_a_column_side_by_side) {
  const int words = 48;
  std::vector<Line> panel(words * BLOCKS);
  int32_t *numbers = (int32_t *)panel.data();
  for (int k = 0; k < words; ++k)
    for (int c = 0; c < PANEL; ++c) numbers[k * PANEL + c] = 100 * k + c;
  if (IN_PAIRS) pair_words(numbers, words);
  transpose_left((Words *)panel.data(), words);
  const Rows left = {numbers, LEFT_STEP, PANEL};
  for (int k = 0; k < words; ++k)
    for (int c = 0; c < PANEL; ++c) {
      const int group = k / LEFT_STEP * LEFT_STEP;
      CHECK(left.words[group * left.place + c * left.row + (k - group)] == 100 * k + c);
    }
}
