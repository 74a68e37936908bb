// The kernels for AVX2 and FMA, compiled twice (QVLA_KERNEL names it): 8-bit activations in products of bytes
// or, where it is compiled with AVX-VNNI, of four bytes at once.
//
// Without VNNI products of unsigned and signed bytes are added in pairs to 16 bits. Codes of 2 and 4 bits leave
// room there for many pairs: at most 2 * 3 * 127 and 2 * 15 * 127 in size each. Of 8 bits a pair
// fits just so, if the code is taken as a signed number and its sign given to the activation:
// 2 * 128 * 127 < 2^15.
#include <algorithm>

#include "avx2.h"

namespace qvla {
namespace {

constexpr int kFewRows = 4;  // up to here integers are multiplied straight from the blocks
#if defined(__AVXVNNI__)
constexpr bool kVnni = true;

// Adds products of four unsigned and four signed bytes.
inline __m256i dot(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
constexpr bool kVnni = false;

[[maybe_unused]] inline __m256i dot(__m256i sum, __m256i, __m256i) { return sum; }  // a name alone
#endif
constexpr int kIntegerRows = kVnni ? 6 : 4;  // rows that share what was loaded of a panel

template <int BITS>
constexpr int kQuads = kVnni ? 1 << 20 : BITS == 2 ? 32 : 8;  // whose pairs are added in 16 bits

size_t integer_bytes(int padded) { return padded; }

void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums) {
  quantize_row(row, qmax, scale, sums, [&](int i, const Ints* codes) {
    __m256i v[2];
    std::memcpy(v, codes, sizeof v);
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes);
  });
}

// Whether codes are taken as signed numbers.
template <int BITS>
constexpr bool kSigned = BITS == 8 && !kVnni;

// Codes of plane p.
template <int BITS>
inline __m256i plane(__m256i words, int p) {
  if (BITS == 8 && !kSigned<BITS>) return words;
  if (BITS == 8) return _mm256_xor_si256(words, _mm256_set1_epi8(-128));
  const __m256i mask = _mm256_set1_epi8((1 << (BITS & 7)) - 1);
  return _mm256_and_si256(p ? _mm256_srli_epi16(words, p * BITS) : words, mask);
}

// The compiler would gather the products of all rows before it adds them, and so run out of registers.
[[maybe_unused]] inline __m256i in_turn(__m256i sum) {
  __asm__ volatile("" : "+x"(sum));
  return sum;
}

[[maybe_unused]] inline __m256i widen_pairs(__m256i pairs) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Adds a group's sums of codes times their scales: multiplier (codes x) + offset sum(x), as floats.
template <int BITS, int M>
inline void add_group(const Job& job, int tile, int row, int g, const __m256i (&sum)[M][2],
                      __m256 (&total)[M][2]) {
  const int offset = job.offset + (kSigned<BITS> ? 128 * job.multiplier : 0);
  const __m256i multiplier = _mm256_set1_epi32(job.multiplier);
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    // Of rows behind the last one, which have no sums and are not stored, anything will do.
    const ptrdiff_t at = std::min(row + m, job.rows - 1);
    const __m256i shift = _mm256_set1_epi32(offset * job.row_sums[at * job.groups + g]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i product = _mm256_mullo_epi32(sum[m][half], multiplier);
      total[m][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(product, shift)),
                                       scale_of(job, tile, g, half), total[m][half]);
    }
  }
}

// Totals [height][2][8] times the scales of their rows, and the biases, to the rows from `row` on.
[[gnu::noinline]] void finish_rows(const Job& job, int tile, int row, int height,
                                   const float* totals) {
  const int end = std::min(row + height, job.rows);
  for (; row < end; ++row) {
    const __m256 scale = _mm256_set1_ps(job.row_scale[row]);
    for (int half = 0; half < 2; ++half, totals += kHalf) {
      alignas(32) float lanes[kHalf];
      _mm256_store_ps(lanes,
                      _mm256_fmadd_ps(_mm256_load_ps(totals), scale, bias_of(job, tile, half)));
      store_lanes<kHalf>(job, row, tile * kLanes + half * kHalf, lanes);
    }
  }
}

// M rows times the quads [quad, end) of the panel, or of the packed blocks.
template <int BITS, int M, bool PANEL>
inline void add_quads(__m256i (&sum)[M][2], const int32_t* const (&x)[M], const uint8_t*& at,
                      int quad, int end) {
  constexpr int kPlanes = PANEL ? 1 : 8 / BITS;
  while (quad < end) {
    __m256i pairs[M][2];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) pairs[m][0] = pairs[m][1] = _mm256_setzero_si256();
    for (const int stop = std::min(quad + kQuads<BITS>, end); quad < stop;
         quad += kPlanes, at += kBlock) {
      if (!PANEL) prefetch(at);
      const __m256i block[2] = {load_half(at, 0), load_half(at, 1)};
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p) {
        __m256i w[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) w[half] = PANEL ? block[half] : plane<BITS>(block[half], p);
        if constexpr (kVnni) {
#pragma GCC unroll 6
          for (int m = 0; m < M; ++m) {
            const __m256i a = _mm256_set1_epi32(x[m][quad + p]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) sum[m][half] = dot(sum[m][half], w[half], a);
          }
        } else if constexpr (BITS == 8) {
          const __m256i size[2] = {_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])};
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const __m256i a = _mm256_set1_epi32(x[m][quad + p]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
              sum[m][half] = in_turn(_mm256_add_epi32(
                  sum[m][half],
                  widen_pairs(_mm256_maddubs_epi16(size[half], _mm256_sign_epi8(a, w[half])))));
          }
        } else {
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const __m256i a = _mm256_set1_epi32(x[m][quad + p]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
              pairs[m][half] =
                  in_turn(_mm256_add_epi16(pairs[m][half], _mm256_maddubs_epi16(w[half], a)));
          }
        }
      }
    }
    if constexpr (BITS != 8 && !kVnni) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
          sum[m][half] = _mm256_add_epi32(sum[m][half], widen_pairs(pairs[m][half]));
    }
  }
}

template <int BITS, int M, bool PANEL>
[[gnu::noinline]] void rows_integer(const Job& job, int tile, int row, const uint8_t* at) {
  const int32_t* x[M];
  __m256 total[M][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
    total[m][0] = total[m][1] = _mm256_setzero_ps();
  }
  for (int g = 0, quad = 0; g < job.groups; ++g) {
    __m256i sum[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    const int end = group_end(job, g) / 4;
    add_quads<BITS, M, PANEL>(sum, x, at, quad, end);
    quad = end;
    add_group<BITS>(job, tile, row, g, sum, total);
  }
  alignas(32) float totals[M][2][kHalf];
  spill(total, totals);
  finish_rows(job, tile, row, M, totals[0][0]);
}

template <int BITS>
void panel_integer(const Job& job, int tile) {
  constexpr int kPlanes = 8 / BITS;
  const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
  uint8_t* const panel = scratch(0, static_cast<size_t>(job.k) * kLanes);
  for (int quad = 0; quad < job.k / 4; quad += kPlanes, words += kBlock) {
    for (int half = 0; half < 2; ++half) {
      const __m256i block = load_half(words, half);
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p)
        _mm256_store_si256(reinterpret_cast<__m256i*>(panel + (quad + p) * kBlock) + half,
                           plane<BITS>(block, p));
    }
  }
  for (int row = 0; row < job.rows; row += kIntegerRows)
    rows_integer<BITS, kIntegerRows, true>(job, tile, row, panel);
}

template <int BITS>
void all_integer(const Job& job) {
  for (int tile = 0; tile < job.tiles; ++tile) {
    const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
    if (job.rows > kFewRows) panel_integer<BITS>(job, tile);
    else if (job.rows > 2) rows_integer<BITS, kFewRows, false>(job, tile, 0, words);
    else if (job.rows == 2) rows_integer<BITS, 2, false>(job, tile, 0, words);
    else rows_integer<BITS, 1, false>(job, tile, 0, words);
  }
}

void multiply_integer(const Job& job) {
  if (!job.rows) return;
  with_code_bits(job.bits, [&](auto bits) { all_integer<bits>(job); });
}

}  // namespace

const Kernel QVLA_KERNEL = {
    QVLA_KERNEL_NAME, avx2::float_bytes, integer_bytes, avx2::prepare_float, prepare_integer,
    avx2::multiply_float, multiply_integer, avx2::attend,
};

}  // namespace qvla
