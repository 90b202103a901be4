#include "check.h"
#include "gelu.h"

// What a function makes of 16 equal numbers.
template <typename Function>
static float of(const Function &function, float x) {
  float results[16];
  store(results, function(splat(x)));
  for (const float result : results) CHECK(!std::memcmp(&result, results, sizeof result));
  return results[0];
}

TEST(exp_is_as_exact_as_fp32) {
  for (float x = -87; x <= 80; x += 0.0137f) {
    const double exact = std::exp((double)x);
    CHECK_CLOSE(of([](Floats v) { return exp(v); }, x), exact, 2.5e-7 * exact);
  }
  CHECK(of([](Floats v) { return exp(v); }, -INFINITY) < 1e-37);
}

TEST(exp2_is_more_exact_than_bf16) {
  for (float x = -120; x <= 100; x += 0.0137f) {
    const double exact = std::exp2((double)x);
    CHECK_CLOSE(of([](Floats v) { return exp2(v); }, x), exact, 6e-5 * exact);
  }
  CHECK(of([](Floats v) { return exp2(v); }, -INFINITY) == 0);
}

TEST(gelu_is_as_exact_as_fp32) {
  for (float x = -12; x <= 12; x += 0.0037f) {
    const double exact = scalar_gelu(x);
    CHECK_CLOSE(of([](Floats v) { return gelu(v); }, x), exact, 1e-6 * std::fabs(x));
  }
}

TEST(gelu_and_its_slope_are_more_exact_than_bf16) {
  for (float x = -12; x <= 12; x += 0.0037f) {
    const double slope = (scalar_gelu(x + 1e-5) - scalar_gelu(x - 1e-5)) / 2e-5;
    CHECK_CLOSE(of([](Floats v) { return gelu_and_slope(v).value; }, x), scalar_gelu(x), 3e-4);
    CHECK_CLOSE(of([](Floats v) { return gelu_and_slope(v).slope; }, x), slope, 1.1e-3);
  }
}

TEST(the_exact_gelu_and_its_slope_are_more_exact_than_bf16) {
  const auto gelu = [](double z) { return 0.5 * z * (1 + std::erf(z / std::sqrt(2.))); };
  for (float x = -12; x <= 12; x += 0.0037f) {
    const double slope = (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5;
    CHECK_CLOSE(of([](Floats v) { return exact_gelu_and_slope(v).value; }, x), gelu(x), 3e-4);
    CHECK_CLOSE(of([](Floats v) { return exact_gelu_and_slope(v).slope; }, x), slope, 3e-4);
  }
  CHECK(of([](Floats v) { return exact_gelu_and_slope(v).value; }, -1e4f) == 0);
}

TEST(relu_has_no_slope_at_0_and_keeps_nan) {
  for (const float x : {-2.f, -1e-30f, -0.f, 0.f, 1e-30f, 3.f}) {
    CHECK(of([](Floats v) { return relu_and_slope(v).value; }, x) == (x > 0 ? x : 0.f));
    CHECK(of([](Floats v) { return relu_and_slope(v).slope; }, x) == (x > 0 ? 1.f : 0.f));
  }
  CHECK(std::isnan(of([](Floats v) { return relu_and_slope(v).value; }, NAN)));
}
