#include "check.h"
#include "swiglu.h"

static Gated of(float gate, float input) { return gated(splat(gate), splat(input)); }

TEST(swiglu_and_its_slopes_are_more_exact_than_bf16) {
  const double input = -1.5;
  for (float z = -30; z <= 30; z += 0.0037f) {
    const Gated ours = of(z, input);
    const double s = 1 / (1 + std::exp((double)-z)), slope = s + z * s * (1 - s);
    CHECK_CLOSE(first_of(ours.by_input), z * s, 3e-4 * std::fabs(z * s) + 1e-6);
    CHECK_CLOSE(first_of(ours.by_gate) / input, slope, 1.1e-3);
    CHECK_CLOSE(first_of(ours.value), z * s * input, 3e-4 * std::fabs(z * s * input) + 1e-6);
  }
  for (const float z : {-1e4f, 1e4f})
    CHECK(std::isfinite(first_of(of(z, 1).value)) && std::isfinite(first_of(of(z, 1).by_gate)));
}
