#include "check.h"
#include "grouped_decode.h"

template <int INPUTS>
static std::vector<RowGroup<INPUTS>> grouped(const std::vector<float> &row, int added) {
  std::vector<RowGroup<INPUTS>> groups(group_count(row.size(), INPUTS));
  to_groups(row.data(), row.size(), added, groups.data());
  return groups;
}

template <int INPUTS>
static void check_groups(int added) {
  for (const int size : {1, 16, 31, 32, 70, 300}) {
    const std::vector<float> row = randoms(size, size);
    const auto groups = grouped<INPUTS>(row, added);
    for (size_t g = 0; g < groups.size(); ++g) {
      const int8_t *numbers = (const int8_t *)groups[g].words;
      float most = 0;
      int sum = 0;
      for (int i = 0; i < INPUTS; ++i) {
        const int at = g * INPUTS + i;
        const float exact = at < size ? row[at] : 0;
        most = std::max(most, std::fabs(exact)), sum += numbers[i];
        CHECK_CLOSE(numbers[i] * groups[g].scale, exact, 0.501 * groups[g].scale);
      }
      CHECK_CLOSE(groups[g].scale, most / 127, 1e-6);
      CHECK(groups[g].offset == -added * sum);
    }
  }
}

TEST(a_row_becomes_int8_by_groups) {
  check_groups<GROUP>(8);
  check_groups<INT8_GROUP>(128);
}

TEST(a_group_of_zeros_has_no_sum) {
  const auto groups = grouped<GROUP>(std::vector<float>(GROUP, 0), 8);
  for (const int32_t word : groups[0].words) CHECK(word == 0);
  CHECK(groups[0].offset == 0 && groups[0].scale > 0);
}

TEST(a_product_with_int8_is_a_loop_over_groups) {
  const int size = 300, words = size / 4, groups = group_count(size, INT8_GROUP);
  std::mt19937 generator(5);
  std::vector<int32_t> panel(words * PANEL);
  for (int32_t &word : panel) word = (int32_t)generator();
  std::vector<int32_t> packed = panel;
  if (IN_PAIRS) pair_words(packed.data(), words);
  for (int rows = 1; rows <= TILE; ++rows) {
    std::vector<RowGroup<INT8_GROUP>> x;
    for (int r = 0; r < rows; ++r)
      for (const auto &group : grouped<INT8_GROUP>(randoms(size, r), BYTE_BIAS)) x.push_back(group);
    Floats totals[TILE][BLOCKS];
    int8_product(rows, x.data(), (const Words *)packed.data(), words, totals);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < PANEL; ++c) {
        float total = 0;
        for (int g = 0; g < groups; ++g) {
          const RowGroup<INT8_GROUP> &group = x[r * groups + g];
          int sum = 0;
          for (int i = 0; i < std::min(INT8_GROUP, size - g * INT8_GROUP); ++i) {
            const int word = (g * INT8_GROUP + i) / 4;
            const uint8_t weight = ((const uint8_t *)&panel[word * PANEL + c])[i % 4];
            sum += (weight - 128) * ((const int8_t *)group.words)[i];
          }
          total = std::fma((float)sum, group.scale, total);
        }
        CHECK(((const float *)totals[r])[c] == total);
      }
  }
}

// value(code): of a weight.
template <typename Kind, typename Value>
static void check_codes(const Value &value) {
  const int count = 3;
  std::mt19937 generator(5);
  std::vector<PanelGroup> panel(count);
  for (PanelGroup &group : panel) {
    for (uint8_t *byte = &group.values[0][0][0]; byte < (uint8_t *)group.scales; ++byte)
      *byte = generator();
    for (uint16_t &scale : group.scales) scale = fp16((int)(generator() % 99) - 49);
  }
  for (int rows = 1; rows <= INT4_TILE; ++rows) {
    const std::vector<float> x = randoms(rows * count * GROUP, rows);
    std::vector<RowGroup<GROUP>> groups(rows * count);
    for (int r = 0; r < rows; ++r)
      to_groups(&x[r * count * GROUP], count * GROUP, Kind::added, &groups[r * count]);
    Floats totals[INT4_TILE][BLOCKS];
    grouped_product<Kind>(rows, groups.data(), panel.data(), count, totals);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < PANEL; ++c) {
        float total = 0;
        for (int g = 0; g < count; ++g) {
          const RowGroup<GROUP> &group = groups[r * count + g];
          int sum = 0;
          for (int i = 0; i < GROUP; ++i) {
            const int word = i / 4, half = word / (HALF_WORDS);
            const int at = c % LANES * 4 + i % 4;
            const uint8_t both = panel[g].values[word % (HALF_WORDS)][c / LANES][at];
            sum += value(both >> 4 * half & 15) * ((const int8_t *)group.words)[i];
          }
          const float both = from_fp16(panel[g].scales[c]) * group.scale;
          total = std::fma((float)sum, both, total);
        }
        CHECK(((const float *)totals[r])[c] == total);
      }
  }
}

TEST(a_product_with_int4_is_a_loop_over_groups) {
  check_codes<Int4>([](int code) { return code - 8; });
}

TEST(a_product_with_iq4_nl_is_a_loop_over_groups) {
  // Those of the format.
  constexpr int values[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                            1,    13,   25,  38,  53,  69,  89,  113};
  check_codes<Iq4>([&](int code) { return values[code]; });
}
