// What the kernels for AVX-512 share: streams of tiles, what stands beside their words, and outputs.
#pragma once
#include <immintrin.h>


#include "rows.h"

namespace qvla {
namespace {

// What a stream will come to. Where memory is the limit it goes to the second-level cache, because
// streams whole pages apart push one another out of the first; where products are, to the first.
template <int MR>
inline void prefetch(const uint8_t* at) {
  const char* const next = reinterpret_cast<const char*>(at);
  if constexpr (MR <= 2) _mm_prefetch(next + 1024, _MM_HINT_T1);
  else _mm_prefetch(next + 2048, _MM_HINT_T0);
}

// What the next tile of each stream has beside its words.
inline void prefetch_lanes(const Job& job, int tile) {
  const ptrdiff_t next = (tile + 1) * kLanes;
  _mm_prefetch(reinterpret_cast<const char*>(job.scales + next * job.groups), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(job.bias + next), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(job.index + next), _MM_HINT_T0);
}

// Nearest bfloat16 numbers.
inline __m256i narrowed(__m512 value) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  Floats wide;
  std::memcpy(&wide, &value, sizeof wide);
  const Words word = rounded(wide);
  __m512i bits;
  std::memcpy(&bits, &word, sizeof bits);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#endif
}

// Lanes to channels in any order: plain stores are faster than a scatter instruction.
template <class T>
inline void distribute(const T* lanes, const int32_t* index, bool all, T* y) {
  if (all) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) y[index[lane]] = lanes[lane];
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      if (index[lane] >= 0) y[index[lane]] = lanes[lane];
  }
}

inline void store(const Job& job, int row, int tile, __m512 value) {
  const int32_t* const channels = job.index + tile * kLanes;
  const __m512i index = _mm512_loadu_si512(channels);
  const __m512i run =
      _mm512_add_epi32(_mm512_set1_epi32(channels[0]),
                       _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  const bool all = _mm512_movepi32_mask(index) == 0;
  const bool contiguous = all && _mm512_cmpeq_epi32_mask(index, run) == 0xffff;
  if (job.y_bfloat16) {
    uint16_t* const y = static_cast<uint16_t*>(job.y) + row * job.y_stride;
    const __m256i half = narrowed(value);
    if (contiguous) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + channels[0]), half);
      return;
    }
    alignas(32) uint16_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), half);
    distribute(lanes, channels, all, y);
    return;
  }
  float* const y = static_cast<float*>(job.y) + row * job.y_stride;
  if (contiguous) {
    _mm512_storeu_ps(y + channels[0], value);
    return;
  }
  alignas(64) float lanes[kLanes];
  _mm512_store_ps(lanes, value);
  distribute(lanes, channels, all, y);
}

inline __m512 scale_of(const Job& job, int tile, int g) {
  return _mm512_loadu_ps(job.scales + (static_cast<ptrdiff_t>(tile) * job.groups + g) * kLanes);
}

inline __m512 bias_of(const Job& job, int tile) {
  return _mm512_loadu_ps(job.bias + tile * kLanes);
}

// Calls `product(height, row)` for blocks of rows, each of the smallest of a few heights that takes what
// is left, so that few kernels are compiled.
template <class Product>
inline void by_row_blocks(int rows, const Product& product) {
  for (int row = 0; row < rows; row += kRowBlock) {
    const int left = rows - row;
    if (left == 1) product(std::integral_constant<int, 1>{}, row);
    else if (left == 2) product(std::integral_constant<int, 2>{}, row);
    else if (left <= 4) product(std::integral_constant<int, 4>{}, row);
    else if (left <= 8) product(std::integral_constant<int, 8>{}, row);
    else product(std::integral_constant<int, kRowBlock>{}, row);
  }
}

// Whether blocks of 8 rows waste fewer than blocks of 12.
inline bool low_blocks(int rows) { return (rows + 7) / 8 * 8 < (rows + 11) / 12 * 12; }

}  // namespace
}  // namespace qvla
