#include "candidates.h"
#include "check.h"

static void check_top(const std::vector<float> &logits, int k) {
  std::vector<int64_t> order(logits.size()), ids(k);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t one, int64_t other) { return logits[one] > logits[other]; });
  std::vector<float> values(k);
  top_of_row(logits.data(), logits.size(), k, values.data(), ids.data());
  for (int i = 0; i < k; ++i) CHECK(ids[i] == order[i] && values[i] == logits[order[i]]);
}

TEST(the_largest_come_first_and_of_equals_the_lower_id) {
  for (const int width : {1, 17, 64, 1000}) {
    std::vector<float> logits = randoms(width, width);
    for (float &logit : logits) logit = std::round(4 * logit) / 4;
    for (const int k : {1, 7, 100})
      if (k <= width) check_top(logits, k);
  }
}

TEST(zeros_are_equal_whatever_their_sign) { check_top({-0.f, 0.f, -1.f, 0.f, -0.f}, 4); }

TEST(a_row_of_minus_infinity_is_filled_by_the_lowest_ids) {
  std::vector<float> logits(200, -INFINITY);
  logits[150] = 1, logits[3] = -2;
  check_top(logits, 6);
}

TEST(what_is_not_a_number_is_found) {
  std::vector<float> logits = randoms(300, 1);
  logits[123] = NAN;
  float value[1];
  int64_t id[1];
  top_of_row(logits.data(), 300, 1, value, id);
  CHECK(id[0] == 123);
}
