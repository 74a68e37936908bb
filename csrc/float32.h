// Activations in float32, natural order, and which of them the words of a tile meet.
#pragma once
#include "rows.h"

namespace qvla {
namespace {

size_t float_bytes(int padded, bool) { return sizeof(float) * padded; }

// Rounded to bfloat16 where it is not to be split.
void prepare_float(const Row& row, bool split, uint8_t* out) {
  const bool exact = split || row.bfloat16;
  for (int i = 0; i < row.padded; i += kVector) {
    const Floats x = load(row, i);
    const Words half = rounded(x);
    if (exact) std::memcpy(out + sizeof(float) * i, &x, sizeof x);
    else std::memcpy(out + sizeof(float) * i, &half, sizeof half);
  }
}

inline const float* row_of(const Job& job, int row) {
  return reinterpret_cast<const float*>(job.x + row * job.stride);
}

// Inputs of a block, and which of them its field T of every word meets; fields follow one another
// from the low bits on.
template <int BITS>
constexpr int kFields = 32 / BITS;

template <int BITS>
constexpr int input_of(int t) {
  if constexpr (BITS >= 16) return 2 * t;
  else return t % (8 / BITS) * 4 + t * BITS / 8;
}

// Inputs that the block at k meets: 16-bit blocks alternate between (0, 2) and (1, 3).
template <int BITS>
inline int first_input(int k) {
  return BITS == 16 ? (k & ~3) + ((k & 2) >> 1) : k;
}

}  // namespace
}  // namespace qvla
