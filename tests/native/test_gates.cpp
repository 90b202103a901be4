#include "check.h"
#include "gates.h"

static Gated of(float gate, float input) { return swiglu(splat(gate), splat(input)); }

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

TEST(geglu_and_its_slopes_are_more_exact_than_bf16) {
  const double input = -1.5, step = 1e-5;
  for (float z = -30; z <= 30; z += 0.0037f) {
    const Gated ours = geglu(splat(z), splat((float)input));
    const double value = scalar_gelu(z);
    const double slope = (scalar_gelu(z + step) - scalar_gelu(z - step)) / (2 * step);
    CHECK_CLOSE(first_of(ours.by_input), value, 3e-4 * std::fabs(z) + 1e-6);
    CHECK_CLOSE(first_of(ours.by_gate) / input, slope, 2e-3);
    CHECK_CLOSE(first_of(ours.value), value * input, 3e-4 * std::fabs(z * input) + 1e-6);
  }
}
