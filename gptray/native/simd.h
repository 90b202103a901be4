// Vectors of 16 fp32 numbers, in which the kernels are written: avx512.h implements them for x86,
// neon.h for ARM, under the same names.
//
// A word is the 4 bytes that a lane multiplies and adds at once: 1 fp32, 2 bf16 or 4 int8 numbers.
// bf16 and fp16 numbers are passed as uint16_t. A mask has one bit per lane; the masks of loads and
// stores come from `lanes`.

#pragma once

#include <cstdint>

namespace {

constexpr int LANES = 16;

using Mask = uint16_t;
constexpr Mask ALL = 0xFFFF;

// A mask of the first `count` lanes.
inline Mask lanes(int count) { return count >= LANES ? ALL : count <= 0 ? 0 : (1u << count) - 1; }

// Make a0 b0 a1 b1 ... of two vectors, the first half of it in a. Only there if panels have words
// in pairs.
template <typename Vectors>
void zip(Vectors &a, Vectors &b);

}  // namespace

#ifdef __aarch64__
#include "neon.h"
#else
#include "avx512.h"
#endif

namespace {

// Prefetch memory that will be read soon.
template <typename T>
inline void prefetch(const T *from, int count) {
  for (int byte = 0; byte < count * (int)sizeof(T); byte += 64)
    __builtin_prefetch((const char *)from + byte);
}

// Prefetch memory that will be read a little later, into L2.
template <typename T>
inline void prefetch_l2(const T *from, int count) {
  for (int byte = 0; byte < count * (int)sizeof(T); byte += 64)
    __builtin_prefetch((const char *)from + byte, 0, 2);
}

}  // namespace
