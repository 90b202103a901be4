#include "check.h"
#include "draw.h"

static const int64_t ONES = -1;

// A row without limits.
static Draw plain() { return {1, 1, 0, 7, 0, 0, 1 << 30}; }

TEST(random_numbers_are_philox) {
  // The published test vector of Philox4x32-10 for counter and key all ones, first two words.
  const uint64_t words = (uint64_t)0x408F276D << 32 | 0x41C83B0E;
  CHECK(uniform(ONES, ONES, ONES) == (words >> 11) * std::ldexp(1., -53));
}

TEST(weights_are_relative_to_the_likeliest) {
  const float values[] = {3, 1, -INFINITY};
  double logs[3];
  log_weights(values, 3, 0.5, logs);
  CHECK(logs[0] == 0 && logs[1] == -4 && logs[2] == -INFINITY);
}

TEST(a_row_that_is_no_distribution_has_equal_weights) {
  for (const float best : {NAN, INFINITY, -INFINITY}) {
    const float values[] = {best, 1};
    double logs[2];
    log_weights(values, 2, 1, logs);
    CHECK(logs[0] == 0 && logs[1] == 0);
  }
}

// How often each of some candidates is drawn at so many positions.
static std::vector<int> counts(const std::vector<double> &weights, Draw draw, int draws) {
  std::vector<int> found(weights.size());
  for (draw.position = 0; draw.position < draws; ++draw.position)
    ++found[draw_candidate(weights.data(), weights.size(), draw)];
  return found;
}

TEST(candidates_are_drawn_by_their_weights) {
  const std::vector<int> found = counts({1, 0.5, 0.25, 0.25}, plain(), 4000);
  CHECK(std::abs(found[0] - 2000) < 150 && std::abs(found[1] - 1000) < 150);
  CHECK(std::abs(found[2] - 500) < 100 && found[3] == 4000 - found[0] - found[1] - found[2]);
}

TEST(limits_leave_the_first) {
  const std::vector<double> weights = {1, 0.5, 0.25, 0.25, 0};
  const auto most = [&](Draw draw) {  // the last that is ever drawn
    const std::vector<int> found = counts(weights, draw, 300);
    int last = 0;
    for (int i = 0; i < 5; ++i) last = found[i] ? i : last;
    return last;
  };
  Draw draw = plain();
  CHECK(most(draw) == 3);
  draw.top_k = 2;
  CHECK(most(draw) == 1);
  draw = plain(), draw.min_p = 0.5;
  CHECK(most(draw) == 1);
  draw = plain(), draw.top_p = 0.5;  // the first makes up half
  CHECK(most(draw) == 0);
  draw.top_p = 0.51;
  CHECK(most(draw) == 1);
}
