// The top-k tokens of a row of logits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "gemm.h"

namespace {

// A sort key: larger for likelier tokens, and among equals for the lower id, as choosing.py orders
// them. NaN of either sign is the largest.
inline int64_t rank_key(float logit, int id) {
  int32_t bits;
  logit += 0.f;  // -0 is 0
  std::memcpy(&bits, &logit, sizeof bits);
  const int32_t order = std::isnan(logit) ? 0x7FFFFFFF : bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return (int64_t)((uint64_t)order << 32) | (0x7FFFFFFF - id);
}

// The top k of a row of `width` logits, none of which is below the k-th largest panel maximum.
void top_of_row(const float *logits, int width, int k, float *values, int64_t *ids) {
  std::vector<float> maxima;
  for (int i = 0; i < width; i += PANEL) {
    Floats most = splat(-INFINITY);
    for (int j = i; j < std::min(i + PANEL, width); j += LANES) {
      const Mask mask = lanes(width - j);
      most = where(mask, max(load(logits + j, mask), most), most);
    }
    maxima.push_back(reduce_max(most));
  }
  float least = -INFINITY;
  if ((int)maxima.size() >= k) {
    std::nth_element(maxima.begin(), maxima.begin() + k - 1, maxima.end(), std::greater<float>());
    least = maxima[k - 1];
  }
  std::vector<int64_t> keys;
  const Floats lowest = splat(-INFINITY);
  for (int i = 0; i < width; i += LANES) {
    const Mask mask = lanes(width - i);
    const Floats row = load(logits + i, mask);
    // "Not less" includes NaN, which the sampler must see. -inf, which fills masked rows, comes
    // later.
    int found = not_less(mask, row, splat(least));
    found &= not_equal(mask, row, lowest);
    for (; found; found &= found - 1) {
      const int id = i + __builtin_ctz(found);
      keys.push_back(rank_key(logits[id], id));
    }
  }
  for (int id = 0; (int)keys.size() < k; ++id)
    if (logits[id] == -INFINITY) keys.push_back(rank_key(logits[id], id));
  std::partial_sort(keys.begin(), keys.begin() + k, keys.end(), std::greater<int64_t>());
  for (int i = 0; i < k; ++i) {
    ids[i] = 0x7FFFFFFF - (keys[i] & 0xFFFFFFFF);
    values[i] = logits[ids[i]];
  }
}

}  // namespace
