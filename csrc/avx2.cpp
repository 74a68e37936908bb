// The kernels for AVX2 and FMA: bfloat16 and float32 activations meet the weights in float32, 8-bit ones
// in products of bytes or, where it is compiled with AVX-VNNI, of four bytes at once.
//
// A tile is two halves of 8 channels, which take every input together. One row (decoding) multiplies
// straight from the packed blocks; from a few rows on tiles are unpacked into a panel that stays in the
// caches.
#include <immintrin.h>

#include <algorithm>

#include "float32.h"

namespace qvla {
namespace {

constexpr int kAhead = 2048;     // bytes that are prefetched ahead
constexpr int kHalf = 8;         // channels of a vector
constexpr int kFewRows = 4;      // up to here integers are multiplied straight from the blocks
constexpr int kPanelInputs = 256;  // inputs of a panel of floats: 16 KiB
constexpr int kPanelHeight = 6;    // rows that share what was loaded of it
#if defined(__AVXVNNI__)
constexpr bool kVnni = true;

// Adds products of four unsigned and four signed bytes.
inline __m256i dot(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
constexpr bool kVnni = false;

inline __m256i dot(__m256i sum, __m256i, __m256i) { return sum; }  // only so that its name is known
#endif
constexpr int kIntegerRows = kVnni ? 6 : 4;  // rows that share what was loaded of a panel of integers

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

inline void store(const Job& job, int row, int tile, int half, __m256 value) {
  alignas(32) float lanes[kHalf];
  _mm256_store_ps(lanes, value);
  store_lanes<kHalf>(job, row, tile * kLanes + half * kHalf, lanes);
}

// ---- activations in float32, natural order ----

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
void direct_float(const Job& job, int tile, int first) {
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
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < H; ++half)
      if (m < job.rows) store(job, m, tile, first + half, total[m][half]);
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
void one_row(const Job& job, int tile) {
  constexpr int kSums = 16 / BITS, kHalves = BITS == 4 ? 2 : 1;  // so that all sums are in registers
  const float* const x = row_of(job, 0);
  for (int first = 0; first < 2; first += kHalves) {
    const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
    __m256 total[kHalves];
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) total[half] = bias_of(job, tile, first + half);
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
        total[half] = _mm256_fmadd_ps(all, scale, total[half]);
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) store(job, 0, tile, first + half, total[half]);
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
  float* const panel = reinterpret_cast<float*>(scratch<0>(kPanelInputs * kBlock));
  float* const totals =
      reinterpret_cast<float*>(scratch<1>(static_cast<size_t>(job.rows + kRowBlock) * kBlock));
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
  for (int row = 0; row < job.rows; ++row)
    for (int half = 0; half < 2; ++half)
      store(job, row, tile, half, _mm256_load_ps(totals + row * kLanes + half * kHalf));
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

void multiply_float(const Job& job) {
  if (!job.rows) return;
  switch (job.bits) {
    case 16: return all_float<16>(job);
    case 32: return all_float<32>(job);
    default: return with_code_bits(job.bits, [&](auto bits) { all_float<bits>(job); });
  }
}

// ---- 8-bit activations, natural order ----
//
// Without VNNI products of unsigned and signed bytes are added in pairs to 16 bits. Codes of 2 and 4 bits leave
// room there for many pairs: at most 2 * 3 * 127 and 2 * 15 * 127 in size each. Of 8 bits a pair
// fits just so, if the code is taken as a signed number and its sign given to the activation:
// 2 * 128 * 127 < 2^15.

template <int BITS>
constexpr int kQuads = kVnni ? 1 << 20 : BITS == 2 ? 32 : 8;  // whose pairs are added in 16 bits

size_t integer_bytes(int padded) { return padded; }

void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums) {
  quantize_row(row, qmax, scale, sums, [&](int i, Ints code) {
    __m256i v[2];
    std::memcpy(v, &code, sizeof v);
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
inline __m256i in_turn(__m256i sum) {
  __asm__ volatile("" : "+x"(sum));
  return sum;
}

inline __m256i widen_pairs(__m256i pairs) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// multiplier (codes x) + offset sum(x), as a float.
template <int BITS>
inline __m256 shifted(const Job& job, __m256i sum, int row, int g) {
  const int offset = job.offset + (kSigned<BITS> ? 128 * job.multiplier : 0);
  const int32_t shift = offset * job.row_sums[static_cast<ptrdiff_t>(row) * job.groups + g];
  const __m256i product = _mm256_mullo_epi32(sum, _mm256_set1_epi32(job.multiplier));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(product, _mm256_set1_epi32(shift)));
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
void rows_integer(const Job& job, int tile, int row, const uint8_t* at) {
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
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = scale_of(job, tile, g, half);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m)
        if (row + m < job.rows)
          total[m][half] =
              _mm256_fmadd_ps(shifted<BITS>(job, sum[m][half], row + m, g), scale, total[m][half]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
    for (int half = 0; half < 2; ++half)
      if (row + m < job.rows)
        store(job, row + m, tile, half,
              _mm256_fmadd_ps(total[m][half], _mm256_set1_ps(job.row_scale[row + m]),
                              bias_of(job, tile, half)));
}

template <int BITS>
void panel_integer(const Job& job, int tile) {
  constexpr int kPlanes = 8 / BITS;
  const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
  uint8_t* const panel = scratch<0>(static_cast<size_t>(job.k) * kLanes);
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
    QVLA_KERNEL_NAME, float_bytes,    integer_bytes,    prepare_float,
    prepare_integer,  multiply_float, multiply_integer,
};

}  // namespace qvla
