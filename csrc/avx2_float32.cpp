// For AVX2 and FMA: bfloat16 and float32 activations meet the weights in float32.
#include <algorithm>

#include "avx2.h"
#include "float32.h"

namespace qvla {
namespace {

constexpr int kPanelInputs = 256;  // inputs of a panel: 16 KiB
constexpr int kPanelHeight = 6;    // rows that share what was loaded of it

// Writes results [rows][halves][8], of the halves of the tile from `first` on. A function of its own:
// inlined, one store for every row was most of the code and of the time that compilers took.
[[gnu::noinline]] void store_rows(const Job& job, int rows, int tile, int first, int halves,
                                  const float* results) {
  for (int m = 0; m < rows; ++m)
    for (int half = 0; half < halves; ++half, results += kHalf)
      store_lanes<kHalf>(job, m, tile * kLanes + (first + half) * kHalf, results);
}

// What code 0 stands for, in units of the multiplier, which goes with the scale.
inline float shift_of(const Job& job) {
  return static_cast<float>(job.offset) / static_cast<float>(job.multiplier);
}

inline __m256 times(__m256 scale, int multiplier) {
  return _mm256_mul_ps(scale, _mm256_set1_ps(static_cast<float>(multiplier)));
}

// Field T of every word in float32: u + shift, and numbers as they are.
template <int BITS, int T>
inline __m256 value(__m256i words, __m256 shift) {
  if constexpr (BITS == 32) return _mm256_castsi256_ps(words);
  if constexpr (BITS == 16)
    return _mm256_castsi256_ps(T ? _mm256_and_si256(words, _mm256_set1_epi32(0xffff0000))
                                 : _mm256_slli_epi32(words, 16));
  const __m256i mask = _mm256_set1_epi32((1ll << BITS) - 1);
  return _mm256_add_ps(
      _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, T * BITS), mask)), shift);
}

template <int BITS, int M, int H, int T>
inline void add_fields(__m256 (&sum)[M][H], const __m256i (&words)[H], __m256 shift,
                       const float* const (&x)[M], int k) {
  if constexpr (T < kFields<BITS>) {
    __m256 w[H];
#pragma GCC unroll 2
    for (int half = 0; half < H; ++half) w[half] = value<BITS, T>(words[half], shift);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256 a = _mm256_broadcast_ss(x[m] + k + input_of<BITS>(T));
#pragma GCC unroll 2
      for (int half = 0; half < H; ++half) sum[m][half] = _mm256_fmadd_ps(w[half], a, sum[m][half]);
    }
    add_fields<BITS, M, H, T + 1>(sum, words, shift, x, k);
  }
}

// M rows straight from the blocks, H halves of the tile from `first` on: M H sums are in registers.
template <int BITS, int M, int H>
[[gnu::noinline]] void direct_float(const Job& job, int tile, int first) {
  const float* x[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) x[m] = row_of(job, m);
  const __m256 shift = _mm256_set1_ps(shift_of(job));
  const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
  __m256 total[M][H];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < H; ++half) total[m][half] = bias_of(job, tile, first + half);
  for (int g = 0, k = 0; g < job.groups; ++g) {
    __m256 sum[M][H];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int half = 0; half < H; ++half) sum[m][half] = _mm256_setzero_ps();
    for (const int end = group_end(job, g); k < end; k += kFields<BITS>, words += kBlock) {
      prefetch(words);
      __m256i block[H];
#pragma GCC unroll 2
      for (int half = 0; half < H; ++half) block[half] = load_half(words, first + half);
      add_fields<BITS, M, H, 0>(sum, block, shift, x, first_input<BITS>(k));
    }
#pragma GCC unroll 2
    for (int half = 0; half < H; ++half) {
      const __m256 scale = times(scale_of(job, tile, g, first + half), job.multiplier);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        total[m][half] = _mm256_fmadd_ps(sum[m][half], scale, total[m][half]);
    }
  }
  alignas(32) float results[M][H][kHalf];
  spill(total, results);
  store_rows(job, std::min(M, job.rows), tile, first, H, results[0][0]);
}

// Fields of 16-bit halves of the words are multiplied where they stand, as 2^position u: each position
// has a sum of its own, which is brought to scale at the end. That saves a shift and an addition for
// every 8 weights; what the offset adds is one sum over the inputs.
template <int BITS, int T>
inline void add_in_place(__m256 (&sum)[16 / BITS], __m256i words, __m256i upper, const float* x) {
  if constexpr (T < kFields<BITS>) {
    constexpr int kPosition = T * BITS % 16;
    const __m256i mask = _mm256_set1_epi32(((1 << BITS) - 1) << kPosition);
    const __m256i field = _mm256_and_si256(T * BITS < 16 ? words : upper, mask);
    sum[kPosition / BITS] = _mm256_fmadd_ps(
        _mm256_cvtepi32_ps(field), _mm256_broadcast_ss(x + input_of<BITS>(T)), sum[kPosition / BITS]);
    add_in_place<BITS, T + 1>(sum, words, upper, x);
  }
}

// One row of codes of 2 or 4 bits.
template <int BITS>
[[gnu::noinline]] void one_row(const Job& job, int tile) {
  constexpr int kSums = 16 / BITS, kHalves = BITS == 4 ? 2 : 1;  // so that all sums are in registers
  const float* const x = row_of(job, 0);
  for (int first = 0; first < 2; first += kHalves) {
    const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
    __m256 total[1][kHalves];
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) total[0][half] = bias_of(job, tile, first + half);
    for (int g = 0, k = 0; g < job.groups; ++g) {
      const int end = group_end(job, g);
      __m256 inputs = _mm256_setzero_ps();
      for (int i = k; i < end; i += kHalf) inputs = _mm256_add_ps(inputs, _mm256_loadu_ps(x + i));
      alignas(32) float lanes[kHalf];
      _mm256_store_ps(lanes, inputs);
      float shift = 0;
      for (int i = 0; i < kHalf; ++i) shift += lanes[i];
      shift *= shift_of(job);
      __m256 sum[kHalves][kSums];
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half)
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s) sum[half][s] = _mm256_setzero_ps();
      for (; k < end; k += kFields<BITS>, words += kBlock) {
        prefetch(words);
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
          const __m256i block = load_half(words, first + half);
          add_in_place<BITS, 0>(sum[half], block, _mm256_srli_epi32(block, 16), x + k);
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half) {
        __m256 all = _mm256_set1_ps(shift);
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s)
          all = _mm256_fmadd_ps(sum[half][s], _mm256_set1_ps(1.0f / (1 << (s * BITS))), all);
        const __m256 scale = times(scale_of(job, tile, g, first + half), job.multiplier);
        total[0][half] = _mm256_fmadd_ps(all, scale, total[0][half]);
      }
    }
    alignas(32) float results[1][kHalves][kHalf];
    spill(total, results);
    store_rows(job, 1, tile, first, kHalves, results[0][0]);
  }
}

template <int BITS, int T>
inline void unpack_fields(const __m256i (&words)[2], __m256 shift, const __m256 (&scale)[2],
                          float* out) {
  if constexpr (T < kFields<BITS>) {
    float* const at = out + input_of<BITS>(T) * kLanes;
    _mm256_store_ps(at, _mm256_mul_ps(value<BITS, T>(words[0], shift), scale[0]));
    _mm256_store_ps(at + kHalf, _mm256_mul_ps(value<BITS, T>(words[1], shift), scale[1]));
    unpack_fields<BITS, T + 1>(words, shift, scale, out);
  }
}

// Adds a panel's part to the totals of a few rows.
void panel_rows_float(const Job& job, int row, const float* panel, int begin, int end, float* totals) {
  constexpr int M = kPanelHeight;
  const float* x[M];
  __m256 sum[M][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    x[m] = row_of(job, row + m);
    sum[m][0] = sum[m][1] = _mm256_setzero_ps();
  }
  for (int k = begin; k < end; ++k, panel += kLanes) {
    const __m256 low = _mm256_load_ps(panel), high = _mm256_load_ps(panel + kHalf);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m256 a = _mm256_broadcast_ss(x[m] + k);
      sum[m][0] = _mm256_fmadd_ps(low, a, sum[m][0]);
      sum[m][1] = _mm256_fmadd_ps(high, a, sum[m][1]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    float* const at = totals + (row + m) * kLanes;
    _mm256_store_ps(at, _mm256_add_ps(_mm256_load_ps(at), sum[m][0]));
    _mm256_store_ps(at + kHalf, _mm256_add_ps(_mm256_load_ps(at + kHalf), sum[m][1]));
  }
}

template <int BITS>
void panel_float(const Job& job, int tile) {
  float* const panel = reinterpret_cast<float*>(scratch(0, kPanelInputs * kBlock));
  float* const totals =
      reinterpret_cast<float*>(scratch(1, static_cast<size_t>(job.rows + kRowBlock) * kBlock));
  for (int row = 0; row < job.rows; ++row)
    for (int half = 0; half < 2; ++half)
      _mm256_store_ps(totals + row * kLanes + half * kHalf, bias_of(job, tile, half));
  const __m256 shift = _mm256_set1_ps(shift_of(job));
  const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
  for (int begin = 0, g = 0, k = 0; begin < job.k; begin = k) {
    const int end = std::min(begin + kPanelInputs, job.k);
    while (k < end) {
      const __m256 scale[2] = {times(scale_of(job, tile, g, 0), job.multiplier),
                               times(scale_of(job, tile, g, 1), job.multiplier)};
      for (const int stop = std::min(end, group_end(job, g)); k < stop;
           k += kFields<BITS>, words += kBlock) {
        const __m256i block[2] = {load_half(words, 0), load_half(words, 1)};
        unpack_fields<BITS, 0>(block, shift, scale, panel + (first_input<BITS>(k) - begin) * kLanes);
      }
      if (k == group_end(job, g)) ++g;
    }
    for (int row = 0; row < job.rows; row += kPanelHeight)
      panel_rows_float(job, row, panel, begin, end, totals);
  }
  store_rows(job, job.rows, tile, 0, 2, totals);
}

template <int BITS>
void all_float(const Job& job) {
  for (int tile = 0; tile < job.tiles; ++tile) {
    if (job.rows > 8) {
      panel_float<BITS>(job, tile);
    } else if (job.rows > 4) {
      for (int half = 0; half < 2; ++half) direct_float<BITS, 8, 1>(job, tile, half);
    } else if (job.rows > 2) {
      direct_float<BITS, 4, 2>(job, tile, 0);
    } else if (job.rows == 2) {
      direct_float<BITS, 2, 2>(job, tile, 0);
    } else if constexpr (BITS <= 4) {
      one_row<BITS>(job, tile);
    } else {
      direct_float<BITS, 1, 2>(job, tile, 0);
    }
  }
}

}  // namespace

namespace avx2 {

size_t float_bytes(int padded, bool split) { return qvla::float_bytes(padded, split); }

void prepare_float(const Row& row, bool split, uint8_t* out) {
  qvla::prepare_float(row, split, out);
}

void multiply_float(const Job& job) {
  if (!job.rows) return;
  switch (job.bits) {
    case 16: return all_float<16>(job);
    case 32: return all_float<32>(job);
    default: return with_code_bits(job.bits, [&](auto bits) { all_float<bits>(job); });
  }
}

}  // namespace avx2
}  // namespace qvla
