// Weights in bfloat16, two inputs at once (AVX-512 BF16): for bfloat16 activations, and for float32
// ones as the sum of two.
#include "avx512.h"

namespace qvla {
namespace {

// What a segment's codes of 2 or 4 bits stand for, as bfloat16, for the low 5 bits of a word.
inline __m512i table_of(const Job& job) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {
    const int code = i & ((1 << (job.bits & 7)) - 1);
    table[i] = to_bfloat16(static_cast<float>(job.multiplier * code + job.offset));
  }
  return _mm512_load_si512(table);
}

inline __m512 dot(__m512 sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}

size_t half_row(int padded) { return sizeof(uint16_t) * padded; }

size_t float_bytes(int padded, bool split) { return half_row(padded) * (split ? 2 : 1); }

// Quads in the order (0, 2, 1, 3): the pairs that the words of a tile meet.
void prepare_float(const Row& row, bool split, uint8_t* out) {
  for (int i = 0; i < row.padded; i += kLanes) {
    const Floats natural = load(row, i);
    __m512 x;
    std::memcpy(&x, &natural, sizeof x);
    x = _mm512_permute_ps(x, _MM_SHUFFLE(3, 1, 2, 0));
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i), high);
    if (split) {
      const __m512 kept = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x, kept));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half_row(row.padded) + 2 * i), low);
    }
  }
}

// Field T of every 16-bit word, as bfloat16.
template <int BITS, int T>
inline __m512i field(__m512i block, __m512i table) {
  if constexpr (BITS == 16) return block;
  if constexpr (BITS == 8) {
    // Code u in the low bits of the number 2^23 is 2^23 + u, exactly.
    const __m512i byte = _mm512_set1_epi32(255), large = _mm512_set1_epi32(0x4b000000);
    const __m512 zero = _mm512_set1_ps(0x1p23f + 128);
    const auto value = [&](int shift) {
      const __m512i number =
          _mm512_ternarylogic_epi32(_mm512_srli_epi32(block, shift), byte, large, 0xea);
      return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(number), zero));
    };
    const __m512i a = value(8 * T), b = value(16 + 8 * T);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
  }
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(block, T * BITS), table);
}

// Pair of the block's activations that field T meets.
template <int BITS>
constexpr int pair_of(int t) {
  if (BITS == 4) return (t & 1) * 2 + (t >> 1);
  if (BITS == 2) return t < 4 ? 2 * t : 2 * (t - 4) + 1;
  return t;
}

template <int BITS>
constexpr int kFields = BITS == 16 ? 1 : 16 / BITS;  // pairs of a block, too

// Sums of one row and tile: a single one would wait for each product before the next.
template <int MR>
constexpr int kSums = MR == 1 ? 2 : 1;

template <int BITS, int T, int MR, int NT, bool SPLIT>
inline void add_fields(__m512 (&sum)[MR][NT][kSums<MR>], const __m512i (&block)[NT], __m512i table,
                       const int32_t* const (&x)[MR], ptrdiff_t pair, ptrdiff_t low) {
  if constexpr (T < kFields<BITS>) {
    __m512i w[NT];
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) w[n] = field<BITS, T>(block[n], table);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const __m512i a = _mm512_set1_epi32(x[m][pair + pair_of<BITS>(T)]);
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        __m512& s = sum[m][n][T % kSums<MR>];
        s = dot(s, w[n], a);
      }
      if constexpr (SPLIT) {
        const __m512i b = _mm512_set1_epi32(x[m][low + pair + pair_of<BITS>(T)]);
#pragma GCC unroll 4
        for (int n = 0; n < NT; ++n) {
          __m512& s = sum[m][n][(T + 1) % kSums<MR>];
          s = dot(s, w[n], b);
        }
      }
    }
    add_fields<BITS, T + 1, MR, NT, SPLIT>(sum, block, table, x, pair, low);
  }
}

// MR rows from `row` on times the tiles first, first + step, ...: each is a stream of its own.
template <int BITS, int MR, int NT, bool SPLIT>
[[gnu::noinline]] void direct_float(const Job& job, __m512i table, int row, int first, int step) {
  const uint8_t* words[NT];
#pragma GCC unroll 4
  for (int n = 0; n < NT; ++n) {
    words[n] = job.words + (first + n * step) * tile_bytes(BITS, job.k);
    prefetch_lanes(job, first + n * step);
  }
  const int32_t* x[MR];
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
    x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
  const ptrdiff_t low = job.k / 2;  // in pairs
  __m512 total[MR][NT];
#pragma GCC unroll 4
  for (int n = 0; n < NT; ++n)
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) total[m][n] = bias_of(job, first + n * step);
  ptrdiff_t pair = 0;
  for (int g = 0; g < job.groups; ++g) {
    __m512 sum[MR][NT][kSums<MR>];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n)
#pragma GCC unroll 2
        for (int s = 0; s < kSums<MR>; ++s) sum[m][n][s] = _mm512_setzero_ps();
    for (const ptrdiff_t end = group_end(job, g) / 2; pair < end; pair += kFields<BITS>) {
      __m512i block[NT];
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        block[n] = _mm512_loadu_si512(words[n]);
        prefetch<MR>(words[n]);
        words[n] += kBlock;
      }
      add_fields<BITS, 0, MR, NT, SPLIT>(sum, block, table, x, pair, low);
    }
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      const __m512 scale = scale_of(job, first + n * step, g);
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        __m512 s = sum[m][n][0];
        if constexpr (kSums<MR> == 2) s = _mm512_add_ps(s, sum[m][n][1]);
        total[m][n] = _mm512_fmadd_ps(s, scale, total[m][n]);
      }
    }
  }
  store_block(job, row, first, step, total);
}

template <int BITS, int NT, bool SPLIT>
void few_rows_float(const Job& job, __m512i table, int first, int step) {
  by_row_blocks(job.rows, [&](auto height, int row) {
    direct_float<BITS, height, NT, SPLIT>(job, table, row, first, step);
  });
}

template <int BITS, int T>
inline void unpack_fields(__m512i block, __m512i table, uint8_t* out) {
  if constexpr (T < kFields<BITS>) {
    _mm512_store_si512(out + pair_of<BITS>(T) * 2 * kBlock, field<BITS, T>(block, table));
    unpack_fields<BITS, T + 1>(block, table, out);
  }
}

template <int MR, bool SPLIT>
[[gnu::noinline]] void panel_rows_float(const Job& job, int tile, const uint8_t* panel) {
  const ptrdiff_t low = job.k / 2;
  for (int row = 0; row < job.rows; row += MR) {
    const int32_t* x[MR];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
      x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
    __m512 total[MR][2];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < 2; ++n) total[m][n] = bias_of(job, tile + n);
    const uint8_t* at = panel;
    ptrdiff_t pair = 0;
    for (int g = 0; g < job.groups; ++g) {
      __m512 sum[MR][2];
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
      for (const ptrdiff_t end = group_end(job, g) / 2; pair < end; ++pair, at += 2 * kBlock) {
        const __m512i w0 = _mm512_load_si512(at), w1 = _mm512_load_si512(at + kBlock);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          const __m512i a = _mm512_set1_epi32(x[m][pair]);
          sum[m][0] = dot(sum[m][0], w0, a);
          sum[m][1] = dot(sum[m][1], w1, a);
          if constexpr (SPLIT) {
            const __m512i b = _mm512_set1_epi32(x[m][low + pair]);
            sum[m][0] = dot(sum[m][0], w0, b);
            sum[m][1] = dot(sum[m][1], w1, b);
          }
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < 2; ++n) {
        const __m512 scale = scale_of(job, tile + n, g);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) total[m][n] = _mm512_fmadd_ps(sum[m][n], scale, total[m][n]);
      }
    }
    store_block(job, row, tile, 1, total);
  }
}

template <int BITS>
void panel_float(const Job& job, __m512i table, int tile) {
  uint8_t* panel = scratch(0, static_cast<size_t>(job.k) * kBlock);
#pragma GCC unroll 4
  for (int n = 0; n < 2; ++n) {
    const uint8_t* words = job.words + (tile + n) * tile_bytes(BITS, job.k);
    uint8_t* out = panel + n * kBlock;
    for (int pair = 0; pair < job.k / 2; pair += kFields<BITS>, words += kBlock) {
      prefetch<kPanelRows>(words);
      unpack_fields<BITS, 0>(_mm512_loadu_si512(words), table, out + pair * 2 * kBlock);
    }
  }
  const bool low = low_blocks(job.rows);
  if (job.split) low ? panel_rows_float<8, true>(job, tile, panel)
                     : panel_rows_float<kRowBlock, true>(job, tile, panel);
  else low ? panel_rows_float<8, false>(job, tile, panel)
           : panel_rows_float<kRowBlock, false>(job, tile, panel);
}

// Weights in float32 meet the numbers whose halves x is, widened.
template <int MR, bool SPLIT>
[[gnu::noinline]] void wide_rows(const Job& job, int tile, int row) {
  constexpr int kOrder[4] = {0, 2, 1, 3};  // of the inputs of a quad in x
  const auto widened = [](const uint8_t* at) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  const uint8_t* words = job.words + tile * tile_bytes(32, job.k);
  __m512 total[MR][1];
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) total[m][0] = bias_of(job, tile);
  for (int g = 0, k = 0; g < job.groups; ++g) {
    __m512 sum[MR];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) sum[m] = _mm512_setzero_ps();
    for (const int end = group_end(job, g); k < end; k += kLanes) {
      alignas(64) float x[MR][kLanes];
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        const uint8_t* const at = job.x + (row + m) * job.stride + 2 * k;
        __m512 value = widened(at);
        if constexpr (SPLIT) value = _mm512_add_ps(value, widened(at + half_row(job.k)));
        _mm512_store_ps(x[m], value);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i, words += kBlock) {
        const __m512 w = _mm512_loadu_ps(words);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m)
          sum[m] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[m][(i & ~3) + kOrder[i & 3]]), sum[m]);
      }
    }
    const __m512 scale = scale_of(job, tile, g);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) total[m][0] = _mm512_fmadd_ps(sum[m], scale, total[m][0]);
  }
  store_block(job, row, tile, 1, total);
}

void all_wide(const Job& job) {
  for (int tile = 0; tile < job.tiles; ++tile) {
    if (job.rows == 1) job.split ? wide_rows<1, true>(job, tile, 0) : wide_rows<1, false>(job, tile, 0);
    else for (int row = 0; row < job.rows; row += 8)
      job.split ? wide_rows<8, true>(job, tile, row) : wide_rows<8, false>(job, tile, row);
  }
}

template <int BITS>
void all_float(const Job& job) {
  const __m512i table = table_of(job);
  int done = 0;
  if (job.rows >= kPanelRows) {
    for (; done + 2 <= job.tiles; done += 2) panel_float<BITS>(job, table, done);
  } else {
    const int step = job.tiles / 2;
    for (; done < step; ++done)
      job.split ? few_rows_float<BITS, 2, true>(job, table, done, step)
                : few_rows_float<BITS, 2, false>(job, table, done, step);
    done = 2 * step;
  }
  for (; done < job.tiles; ++done)
    job.split ? few_rows_float<BITS, 1, true>(job, table, done, 1)
              : few_rows_float<BITS, 1, false>(job, table, done, 1);
}

void multiply_float(const Job& job) {
  switch (job.bits) {
    case 16: return all_float<16>(job);
    case 32: return all_wide(job);
    default: return with_code_bits(job.bits, [&](auto bits) { all_float<bits>(job); });
  }
}

}  // namespace

const Kernel kAvx512Bf16 = {
    "avx512_bf16",  float_bytes,    avx512::integer_bytes, prepare_float, avx512::prepare_integer,
    multiply_float, avx512::multiply_integer, avx512::attend,
};

}  // namespace qvla
