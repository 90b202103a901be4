#include "check.h"
#include "int4_decode.h"

TEST(a_row_becomes_int8_by_groups) {
  for (const int size : {1, 16, 31, 32, 70}) {
    const std::vector<float> row = randoms(size, size);
    std::vector<RowGroup> groups(group_count(size));
    to_groups(row.data(), size, groups.data());
    for (size_t g = 0; g < groups.size(); ++g) {
      const int8_t *numbers = (const int8_t *)groups[g].words;
      float most = 0;
      int sum = 0;
      for (int i = 0; i < GROUP; ++i) {
        const int at = g * GROUP + i;
        const float exact = at < size ? row[at] : 0;
        most = std::max(most, std::fabs(exact)), sum += numbers[i];
        CHECK_CLOSE(numbers[i] * groups[g].scale, exact, 0.501 * groups[g].scale);
      }
      CHECK_CLOSE(groups[g].scale, most / 127, 1e-6);
      CHECK(groups[g].offset == -8 * sum);
    }
  }
}

TEST(a_group_of_zeros_has_no_sum) {
  const std::vector<float> row(GROUP, 0);
  RowGroup group;
  to_groups(row.data(), GROUP, &group);
  for (const int32_t word : group.words) CHECK(word == 0);
  CHECK(group.offset == 0 && group.scale > 0);
}

TEST(a_grouped_tile_is_a_loop_over_groups) {
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
    std::vector<RowGroup> groups(rows * count);
    for (int r = 0; r < rows; ++r)
      to_groups(&x[r * count * GROUP], count * GROUP, &groups[r * count]);
    Floats totals[INT4_TILE][BLOCKS];
    grouped_product(rows, groups.data(), panel.data(), count, totals);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < PANEL; ++c) {
        float total = 0;
        for (int g = 0; g < count; ++g) {
          const RowGroup &group = groups[r * count + g];
          int sum = 0;
          for (int i = 0; i < GROUP; ++i) {
            const int word = i / 4, half = word / (GROUP_WORDS / 2);
            const int at = c % LANES * 4 + i % 4;
            const uint8_t both = panel[g].values[word % (GROUP_WORDS / 2)][c / LANES][at];
            sum += ((both >> 4 * half & 15) - 8) * ((const int8_t *)group.words)[i];
          }
          const float both = from_fp16(panel[g].scales[c]) * group.scale;
          total = std::fma((float)sum, both, total);
        }
        CHECK(((const float *)totals[r])[c] == total);
      }
  }
}
