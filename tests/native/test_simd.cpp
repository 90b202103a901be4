#include "check.h"
#include "simd.h"

TEST(a_mask_has_as_many_lanes_as_are_left) {
  for (int count = -3; count < 40; ++count)
    CHECK(__builtin_popcount(lanes(count)) == std::max(0, std::min(count, 16)));
  CHECK(lanes(3) == 7);
}

TEST(numbers_pass_through_bf16_as_they_are_rounded_by_hand) {
  const std::vector<float> values = randoms(16, 1);
  for (int count = 0; count <= 16; ++count) {
    std::vector<uint16_t> halves(16, 7);
    store(halves.data(), load(values.data(), lanes(count)), lanes(count));
    float back[16];
    store(back, load(halves.data(), lanes(count)));
    for (int i = 0; i < 16; ++i) {
      CHECK(halves[i] == (i < count ? bf16(values[i]) : 7));
      CHECK(back[i] == (i < count ? from_bf16(halves[i]) : 0));
    }
  }
}

TEST(numbers_between_two_of_bf16_become_the_even_one_and_nan_stays) {
  std::vector<float> values = {1 + 0x1p-8f, 1 + 3 * 0x1p-8f, -1 - 0x1p-8f, 1 + 0x1.01p-8f};
  values.insert(values.end(), {0.f, -0.f, INFINITY, -INFINITY, 3e38f});
  values.resize(16, NAN);
  uint16_t halves[16];
  store(halves, load(values.data()));
  for (int i = 0; i < 16; ++i)
    CHECK(std::isnan(values[i]) ? std::isnan(from_bf16(halves[i])) : halves[i] == bf16(values[i]));
}

TEST(a_store_past_the_caches_writes_what_a_store_writes) {
  const std::vector<float> values = randoms(16, 2);
  alignas(64) uint16_t near[48] = {}, far[48] = {};
  for (const int at : {0, 1, 16})
    for (const int count : {5, 16}) {
      store(near + at, load(values.data()), lanes(count));
      store_stream(far + at, load(values.data()), lanes(count));
      end_streams();
      CHECK(!std::memcmp(near, far, sizeof near));
    }
}

TEST(a_pair_holds_the_even_number_in_its_lower_half) {
  const std::vector<float> even = randoms(16, 3), odd = randoms(16, 4);
  int32_t words[16];
  store(words, pair(load(even.data()), load(odd.data())));
  for (int i = 0; i < 16; ++i)
    CHECK(words[i] == (int32_t)(bf16(even[i]) | (uint32_t)bf16(odd[i]) << 16));
}

TEST(memory_may_be_fetched_to_its_end) {
  const std::vector<float> values(37);
  prefetch(values.data(), 37);
}
