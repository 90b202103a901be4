// Draws a row's next token from its top-k ones, as gptray/generation/sampling.py does.
//
// In fp64 and in the candidates' order, so that PyTorch gives the same bits. PyTorch computes the
// exponentials between the two functions, because no two libraries agree on their last bit.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Draw {  // a row's settings; top_p 1 and min_p 0 are off
  double temperature, top_p, min_p;
  int64_t seed, row, position;  // the counter of its random number
  int64_t top_k;
};

// A number in [0, 1) from a counter by Philox4x32-10, as in gptray/generation/philox.py.
inline double uniform(uint64_t seed, uint64_t row, uint64_t position) {
  constexpr uint64_t LOW = 0xFFFFFFFF;
  uint64_t counter[4] = {position & LOW, position >> 32, row & LOW, row >> 32};
  uint64_t key[2] = {seed & LOW, seed >> 32};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = counter[0] * 0xD2511F53, second = counter[2] * 0xCD9E8D57;
    counter[0] = (second >> 32) ^ counter[1] ^ key[0], counter[1] = second & LOW;
    counter[2] = (first >> 32) ^ counter[3] ^ key[1], counter[3] = first & LOW;
    key[0] = (key[0] + 0x9E3779B9) & LOW, key[1] = (key[1] + 0xBB67AE85) & LOW;
  }
  return ((counter[0] << 32 | counter[1]) >> 11) * 0x1p-53;
}

// The logarithms of k candidates' weights; the first is the likeliest. A row that is no
// distribution gets weights of 1, and its draw is not used.
inline void log_weights(const float *values, int k, double temperature, double *to) {
  const double best = values[0];
  for (int i = 0; i < k; ++i)
    to[i] = std::isfinite(values[0]) ? (values[i] - best) / temperature : 0.0;
}

// The index of the candidate that a row draws. top_k is at most k, unless k is the whole
// vocabulary.
inline int draw_candidate(const double *weights, int k, const Draw &draw) {
  k = std::min<int64_t>(k, draw.top_k);
  std::vector<double> sums(k);
  double mass = 0;
  for (int i = 0; i < k; ++i) sums[i] = mass += weights[i];
  int count = 0;
  for (int i = 0; i < k; ++i) {
    // A candidate stays if those before it do not yet add up to top_p of the mass.
    const bool is_needed = !i || sums[i] - weights[i] < draw.top_p * mass;
    count += is_needed && weights[i] >= draw.min_p && weights[i] > 0;
  }
  const double target = uniform(draw.seed, draw.row, draw.position) * sums[count - 1];
  int place = 0;
  while (place < count - 1 && !(sums[place] > target)) ++place;
  return place;
}

}  // namespace
