#include "activation_decode.h"
#include "check.h"

template <typename Function>
static float of(const Function &function, float x) {
  return first_of(function(splat(x)));
}

TEST(the_exact_gelu_is_as_exact_as_fp32) {
  for (float x = -12; x <= 12; x += 0.0037f) {
    const double exact = 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    CHECK_CLOSE(of([](Floats v) { return activate(GELU, v); }, x), exact, 1e-6 * std::fabs(x));
  }
}

TEST(silu_is_as_exact_as_fp32) {
  for (float x = -200; x <= 200; x += 0.0137f) {
    const double exact = x / (1 + std::exp(-(double)x));
    CHECK_CLOSE(of(silu, x), exact, 5e-7 * std::fabs(x));
  }
  CHECK(of(silu, -1e30f) == 0);
}

TEST(gelu_by_tanh_and_none_are_told_apart) {
  for (const float x : {-3.f, 0.f, 0.7f}) {
    CHECK_CLOSE(of([](Floats v) { return activate(GELU_TANH, v); }, x), scalar_gelu(x), 1e-6);
    CHECK(of([](Floats v) { return activate(NONE, v); }, x) == x);
  }
}
