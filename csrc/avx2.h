// What the kernels for AVX2 and FMA share: halves of tiles, outputs, and the product of floats.
//
// A tile is two halves of 8 channels, which take every input together. One row (decoding) multiplies
// straight from the packed blocks; from a few rows on tiles are unpacked into a panel that stays in the
// caches.
#pragma once
#include <immintrin.h>

#include "rows.h"

namespace qvla {

// avx2_float32.cpp, compiled once for both kernels.
namespace avx2 {

size_t float_bytes(int padded, bool split);
void prepare_float(const Row& row, bool split, uint8_t* out);
void multiply_float(const Job& job);

}  // namespace avx2

namespace {

constexpr int kAhead = 2048;  // bytes that are prefetched ahead
constexpr int kHalf = 8;      // channels of a vector

inline void prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
}

inline __m256i load_half(const uint8_t* block, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block) + half);
}

inline __m256 scale_of(const Job& job, int tile, int g, int half) {
  const ptrdiff_t at = (static_cast<ptrdiff_t>(tile) * job.groups + g) * kLanes;
  return _mm256_loadu_ps(job.scales + at + half * kHalf);
}

inline __m256 bias_of(const Job& job, int tile, int half) {
  return _mm256_loadu_ps(job.bias + tile * kLanes + half * kHalf);
}

template <int M, int H>
inline void spill(const __m256 (&total)[M][H], float (&out)[M][H][kHalf]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < H; ++half) _mm256_store_ps(out[m][half], total[m][half]);
}

}  // namespace
}  // namespace qvla
