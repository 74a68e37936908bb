// Weights and activations in float32, for processors without AVX-512 BF16 and for those that take
// longer over a product of bfloat16 pairs than over two of float32 numbers.
#include <algorithm>

#include "avx512.h"
#include "float32.h"

namespace qvla {
namespace {

constexpr int kPanelInputs = 256;  // inputs of a panel of two tiles: 32 KiB

// What a segment's codes of 2 or 4 bits stand for, for the low 4 bits of a word.
inline __m512 table_of(const Job& job) {
  alignas(64) float table[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int code = i & ((1 << (job.bits & 7)) - 1);
    table[i] = static_cast<float>(job.multiplier * code + job.offset);
  }
  return _mm512_load_ps(table);
}

// Field T of every word.
template <int BITS, int T>
inline __m512 value(__m512i block, __m512 table) {
  if constexpr (BITS == 32) return _mm512_castsi512_ps(block);
  if constexpr (BITS == 16)
    return _mm512_castsi512_ps(T ? _mm512_and_si512(block, _mm512_set1_epi32(0xffff0000))
                                 : _mm512_slli_epi32(block, 16));
  const __m512i low = T ? _mm512_srli_epi32(block, T * BITS & 31) : block;
  if constexpr (BITS == 8) {
    // Code u in the low bits of the number 2^23 is 2^23 + u, exactly.
    const __m512i number = _mm512_ternarylogic_epi32(low, _mm512_set1_epi32(255),
                                                     _mm512_set1_epi32(0x4b000000), 0xea);
    return _mm512_sub_ps(_mm512_castsi512_ps(number), _mm512_set1_ps(0x1p23f + 128));
  }
  return _mm512_permutexvar_ps(low, table);
}

// Sums of one row and tile: a product takes four cycles, and two begin in each.
template <int MR, int NT>
constexpr int kSums = MR * NT >= 8 ? 1 : MR * NT >= 4 ? 2 : 4;

template <int BITS, int T, int MR, int NT, int S>
inline void add_fields(__m512 (&sum)[MR][NT][S], const __m512i (&block)[NT], __m512 table,
                       const float* const (&x)[MR], int k) {
  if constexpr (T < kFields<BITS>) {
    __m512 w[NT];
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) w[n] = value<BITS, T>(block[n], table);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const __m512 a = _mm512_set1_ps(x[m][k + input_of<BITS>(T)]);
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        __m512& s = sum[m][n][T % S];
        s = _mm512_fmadd_ps(w[n], a, s);
      }
    }
    add_fields<BITS, T + 1>(sum, block, table, x, k);
  }
}

// MR rows from `row` on times the tiles first, first + step, ...: each is a stream of its own.
template <int BITS, int MR, int NT>
[[gnu::noinline]] void direct_float(const Job& job, __m512 table, int row, int first, int step) {
  constexpr int S = kSums<MR, NT>;
  const uint8_t* words[NT];
#pragma GCC unroll 4
  for (int n = 0; n < NT; ++n) {
    words[n] = job.words + (first + n * step) * tile_bytes(BITS, job.k);
    prefetch_lanes(job, first + n * step);
  }
  const float* x[MR];
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) x[m] = row_of(job, row + m);
  __m512 total[MR][NT];
#pragma GCC unroll 4
  for (int n = 0; n < NT; ++n)
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) total[m][n] = bias_of(job, first + n * step);
  for (int g = 0, k = 0; g < job.groups; ++g) {
    __m512 sum[MR][NT][S];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n)
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sum[m][n][s] = _mm512_setzero_ps();
    for (const int end = group_end(job, g); k < end; k += kFields<BITS>) {
      __m512i block[NT];
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        block[n] = _mm512_loadu_si512(words[n]);
        // One row waits for the core, too: GCC would read the block again for every field.
        if constexpr (MR == 1) __asm__("" : "+v"(block[n]));
        prefetch<MR>(words[n]);
        words[n] += kBlock;
      }
      add_fields<BITS, 0>(sum, block, table, x, first_input<BITS>(k));
    }
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      const __m512 scale = scale_of(job, first + n * step, g);
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        __m512 s = sum[m][n][0];
#pragma GCC unroll 4
        for (int i = 1; i < S; ++i) s = _mm512_add_ps(s, sum[m][n][i]);
        total[m][n] = _mm512_fmadd_ps(s, scale, total[m][n]);
      }
    }
  }
  store_block(job, row, first, step, total);
}

template <int BITS, int NT>
void few_rows_float(const Job& job, __m512 table, int first, int step) {
  by_row_blocks(job.rows, [&](auto height, int row) {
    direct_float<BITS, height, NT>(job, table, row, first, step);
  });
}

template <int BITS, int T>
inline void unpack_fields(__m512i block, __m512 table, __m512 scale, float* out) {
  if constexpr (T < kFields<BITS>) {
    _mm512_store_ps(out + input_of<BITS>(T) * 2 * kLanes,
                    _mm512_mul_ps(value<BITS, T>(block, table), scale));
    unpack_fields<BITS, T + 1>(block, table, scale, out);
  }
}

// The inputs from begin to end of a tile, times their scales, in every other vector of the panel.
template <int BITS>
[[gnu::noinline]] void unpack(const Job& job, __m512 table, int tile, int begin, int end, float* panel) {
  const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k) + begin * (2 * BITS);
  int g = std::min(begin / job.group, job.groups - 1);
  for (int k = begin; k < end; ++g) {
    const __m512 scale = scale_of(job, tile, g);
    for (const int stop = std::min(end, group_end(job, g)); k < stop;
         k += kFields<BITS>, words += kBlock) {
      prefetch<kPanelRows>(words);
      unpack_fields<BITS, 0>(_mm512_loadu_si512(words), table, scale,
                             panel + (first_input<BITS>(k) - begin) * 2 * kLanes);
    }
  }
}

// Adds what a panel gives to the sums of all rows, [rows][2][16].
template <int MR, int NT>
[[gnu::noinline]] void panel_rows_float(const Job& job, const float* panel, int begin, int end, float* sums) {
  for (int row = 0; row < job.rows; row += MR) {
    const float* x[MR];
    __m512 sum[MR][NT];
    float* const out = sums + static_cast<ptrdiff_t>(row) * 2 * kLanes;
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      x[m] = row_of(job, row + m);
#pragma GCC unroll 2
      for (int n = 0; n < NT; ++n) sum[m][n] = _mm512_load_ps(out + (2 * m + n) * kLanes);
    }
    const float* at = panel;
    for (int k = begin; k < end; ++k, at += 2 * kLanes) {
      __m512 w[NT];
#pragma GCC unroll 2
      for (int n = 0; n < NT; ++n) w[n] = _mm512_load_ps(at + n * kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        const __m512 a = _mm512_set1_ps(x[m][k]);
#pragma GCC unroll 2
        for (int n = 0; n < NT; ++n) sum[m][n] = _mm512_fmadd_ps(w[n], a, sum[m][n]);
      }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < NT; ++n) _mm512_store_ps(out + (2 * m + n) * kLanes, sum[m][n]);
  }
}

template <int NT>
void add_panel(const Job& job, const float* panel, int begin, int end, float* sums) {
  low_blocks(job.rows) ? panel_rows_float<8, NT>(job, panel, begin, end, sums)
                       : panel_rows_float<kRowBlock, NT>(job, panel, begin, end, sums);
}

// All tiles at some inputs, then at the next: these inputs of all rows stay in the second-level cache.
template <int BITS>
void panels_float(const Job& job, __m512 table) {
  float* const panel = reinterpret_cast<float*>(scratch(1, kPanelInputs * 2 * kBlock));
  const ptrdiff_t pair = static_cast<ptrdiff_t>(job.rows + kRowBlock) * 2 * kLanes;
  const int pairs = (job.tiles + 1) / 2;
  float* const sums = reinterpret_cast<float*>(scratch(2, pairs * pair * sizeof(float)));
  std::fill(sums, sums + pairs * pair, 0.0f);
  for (int begin = 0; begin < job.k; begin += kPanelInputs) {
    const int end = std::min(begin + kPanelInputs, job.k);
    for (int p = 0; p < pairs; ++p) {
      const int count = std::min(2, job.tiles - 2 * p);
      for (int n = 0; n < count; ++n)
        unpack<BITS>(job, table, 2 * p + n, begin, end, panel + n * kLanes);
      count == 2 ? add_panel<2>(job, panel, begin, end, sums + p * pair)
                 : add_panel<1>(job, panel, begin, end, sums + p * pair);
    }
  }
  for (int p = 0; p < pairs; ++p)
    avx512::add_bias_and_store_rows(job, 0, job.rows, 2 * p, std::min(2, job.tiles - 2 * p), 1,
                                    sums + p * pair);
}

template <int BITS>
void all_float(const Job& job) {
  const __m512 table = table_of(job);
  if (job.rows >= kPanelRows) return panels_float<BITS>(job, table);
  const int step = job.tiles / 2;
  for (int tile = 0; tile < step; ++tile) few_rows_float<BITS, 2>(job, table, tile, step);
  if (job.tiles % 2) few_rows_float<BITS, 1>(job, table, job.tiles - 1, 1);
}

void multiply_float(const Job& job) {
  switch (job.bits) {
    case 16: return all_float<16>(job);
    case 32: return all_float<32>(job);
    default: return with_code_bits(job.bits, [&](auto bits) { all_float<bits>(job); });
  }
}

}  // namespace

const Kernel kAvx512 = {
    "avx512",       float_bytes,    avx512::integer_bytes, prepare_float, avx512::prepare_integer,
    multiply_float, avx512::multiply_integer, avx512::attend,
};

}  // namespace qvla
