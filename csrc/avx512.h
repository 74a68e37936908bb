// What the kernels for AVX-512 share: streams of tiles, what stands beside their words, outputs, and the
// product of integers.
//
// Few rows (decoding) multiply straight from the packed blocks, in several streams of tiles with
// prefetching, because memory is the limit. Many rows (prefill) unpack a pair of tiles once into a
// panel that stays in the caches.
#pragma once
#include <immintrin.h>

#include "rows.h"

namespace qvla {

// avx512_integer.cpp, compiled once for both kernels. Outputs are stored by a function of their own: inlined,
// one store for every row and tile was most of the code and of the time that compilers took.
namespace avx512 {

size_t integer_bytes(int padded);
void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums);
void multiply_integer(const Job& job);

// Writes results [height][2][16] of `tiles` (1 or 2) tiles, first and first + step, to the rows from `row`
// on; those behind the last row are left out.
void store_rows(const Job& job, int row, int height, int first, int tiles, int step,
                const float* results);

// The same for results that lack their biases.
void add_bias_and_store_rows(const Job& job, int row, int height, int first, int tiles, int step,
                             const float* sums);

}  // namespace avx512

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

inline __m512 scale_of(const Job& job, int tile, int g) {
  return _mm512_loadu_ps(job.scales + (static_cast<ptrdiff_t>(tile) * job.groups + g) * kLanes);
}

inline __m512 bias_of(const Job& job, int tile) {
  return _mm512_loadu_ps(job.bias + tile * kLanes);
}

template <int MR, int NT>
inline void spill(const __m512 (&total)[MR][NT], float (&out)[MR][2][kLanes]) {
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < NT; ++n) _mm512_store_ps(out[m][n], total[m][n]);
}

template <int MR, int NT>
inline void store_block(const Job& job, int row, int first, int step,
                        const __m512 (&total)[MR][NT]) {
  alignas(64) float results[MR][2][kLanes];
  spill(total, results);
  avx512::store_rows(job, row, MR, first, NT, step, results[0][0]);
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
