// For AVX-512 with VNNI: products of four 8-bit integers, and how both of its kernels store outputs.
#include <algorithm>

#include "avx512.h"

namespace qvla {
namespace {

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

// Nearest bfloat16 numbers.
inline __m256i narrowed(__m512 value) {
  Floats wide;
  std::memcpy(&wide, &value, sizeof wide);
  const Words word = rounded(wide);
  __m512i bits;
  std::memcpy(&bits, &word, sizeof bits);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

// Where the lanes of a tile go.
class Channels {
 public:
  // For `many` rows also in windows: 16 channels, of which `mask` says which are lanes of the tile, and
  // `order` which lanes. A tile of sorted channels has few, and a window takes the time of a few lanes.
  Channels(const int32_t* index, bool many) : index_(index) {
    const __m512i run =
        _mm512_add_epi32(_mm512_set1_epi32(index[0]),
                         _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i all = _mm512_loadu_si512(index);
    all_ = _mm512_movepi32_mask(all) == 0;
    contiguous_ = all_ && _mm512_cmpeq_epi32_mask(all, run) == 0xffff;
    if (many && !contiguous_ && !find_windows()) count_ = 0;
  }

  void store(__m512 wide, float* y) const {
    if (contiguous_) return _mm512_storeu_ps(y + index_[0], wide);
    for (int w = 0; w < count_; ++w)
      _mm512_mask_storeu_ps(y + windows_[w].first, windows_[w].mask, moved(wide, w));
    if (count_) return;
    alignas(64) float lanes[kLanes];
    _mm512_store_ps(lanes, wide);
    distribute(lanes, index_, all_, y);
  }

  void store(__m512 wide, uint16_t* y) const {
    if (contiguous_)
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + index_[0]), narrowed(wide));
    for (int w = 0; w < count_; ++w)
      _mm256_mask_storeu_epi16(y + windows_[w].first, windows_[w].mask, narrowed(moved(wide, w)));
    if (count_) return;
    alignas(32) uint16_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), narrowed(wide));
    distribute(lanes, index_, all_, y);
  }

 private:
  struct Window {
    alignas(64) int32_t order[kLanes];
    int32_t first;
    __mmask16 mask;
  };
  static constexpr int kMost = 8;  // more take longer than lane after lane

  __m512 moved(__m512 wide, int w) const {
    return _mm512_permutexvar_ps(_mm512_load_si512(windows_[w].order), wide);
  }

  bool find_windows() {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t channel = index_[lane];
      if (channel < 0) continue;
      int w = 0;
      while (w < count_ && (channel < windows_[w].first || channel >= windows_[w].first + kLanes)) ++w;
      if (w == kMost) return false;
      if (w == count_) windows_[count_++] = {{}, channel, 0};
      const int place = channel - windows_[w].first;
      windows_[w].order[place] = lane;
      windows_[w].mask = static_cast<__mmask16>(windows_[w].mask | 1u << place);
    }
    return true;
  }

  const int32_t* index_;
  bool all_, contiguous_;
  int count_ = 0;
  Window windows_[kMost];
};

inline Channels channels_of(const Job& job, int tile, bool many) {
  return Channels(job.index + tile * kLanes, many);
}

// value(row) of a tile for the rows [row, end).
template <class Value>
inline void store_tile(const Job& job, int row, int end, const Channels& channels,
                       const Value& value) {
  for (; row < end; ++row) {
    const ptrdiff_t at = row * job.y_stride;
    if (job.y_bfloat16) channels.store(value(row), static_cast<uint16_t*>(job.y) + at);
    else channels.store(value(row), static_cast<float*>(job.y) + at);
  }
}

// Rows of a block: with 12 as for floats the compiler runs out of registers and takes twice as long.
constexpr int kIntegerRows = 8;

template <int BITS>
inline __m512i plane(__m512i block, int p) {
  if (BITS == 8) return block;
  const __m512i mask = _mm512_set1_epi8((1 << (BITS & 7)) - 1);
  return _mm512_and_si512(p ? _mm512_srli_epi16(block, p * BITS) : block, mask);
}

// GCC would copy the sums in every step of the loop before, were they not read here in one place.
inline __m512i settled(__m512i sum) {
  __asm__("" : "+v"(sum));
  return sum;
}

// Adds a group's sums of codes times their scales: multiplier (codes x) + offset sum(x), as floats.
template <int MR, int NT>
inline void add_group(const Job& job, int row, int first, int step, int g,
                      const __m512i (&sum)[MR][NT], __m512 (&total)[MR][NT]) {
  const __m512i multiplier = _mm512_set1_epi32(job.multiplier);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    // Of rows behind the last one, which have no sums and are not stored, anything will do.
    const ptrdiff_t at = std::min(row + m, job.rows - 1);
    const __m512i shift = _mm512_set1_epi32(job.offset * job.row_sums[at * job.groups + g]);
#pragma GCC unroll 2
    for (int n = 0; n < NT; ++n) {
      const __m512i product = _mm512_mullo_epi32(settled(sum[m][n]), multiplier);
      total[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(product, shift)),
                                    scale_of(job, first + n * step, g), total[m][n]);
    }
  }
}

// Totals [height][2][16] of one tile times the scales of their rows, and the biases, to its channels.
[[gnu::noinline]] void finish_rows(const Job& job, int row, int height, int tile,
                                   const Channels& channels, const float* totals) {
  const __m512 bias = bias_of(job, tile);
  store_tile(job, row, std::min(row + height, job.rows), channels, [&](int m) {
    const __m512 total = _mm512_load_ps(totals + 2 * (m - row) * kLanes);
    return _mm512_fmadd_ps(total, _mm512_set1_ps(job.row_scale[m]), bias);
  });
}

template <int BITS, int MR, int NT>
[[gnu::noinline]] void direct_integer(const Job& job, int row, int first, int step) {
  constexpr int kPlanes = 8 / BITS;
  const uint8_t* words[NT];
#pragma GCC unroll 2
  for (int n = 0; n < NT; ++n) {
    words[n] = job.words + (first + n * step) * tile_bytes(BITS, job.k);
    prefetch_lanes(job, first + n * step);
  }
  const int32_t* x[MR];
  __m512 total[MR][NT];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
#pragma GCC unroll 2
    for (int n = 0; n < NT; ++n) total[m][n] = _mm512_setzero_ps();
  }
  ptrdiff_t quad = 0;
  for (int g = 0; g < job.groups; ++g) {
    __m512i sum[MR][NT];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < NT; ++n) sum[m][n] = _mm512_setzero_si512();
    for (const ptrdiff_t end = group_end(job, g) / 4; quad < end; quad += kPlanes) {
      __m512i block[NT];
#pragma GCC unroll 2
      for (int n = 0; n < NT; ++n) {
        block[n] = _mm512_loadu_si512(words[n]);
        prefetch<MR>(words[n]);
        words[n] += kBlock;
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p) {
        __m512i w[NT];
#pragma GCC unroll 2
        for (int n = 0; n < NT; ++n) w[n] = plane<BITS>(block[n], p);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const __m512i a = _mm512_set1_epi32(x[m][quad + p]);
#pragma GCC unroll 2
          for (int n = 0; n < NT; ++n) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], w[n], a);
        }
      }
    }
    add_group(job, row, first, step, g, sum, total);
  }
  alignas(64) float totals[MR][2][kLanes];
  spill(total, totals);
  for (int n = 0; n < NT; ++n) {
    const int tile = first + n * step;
    finish_rows(job, row, MR, tile, channels_of(job, tile, false), totals[0][n]);
  }
}

template <int BITS, int NT>
void few_rows_integer(const Job& job, int first, int step) {
  for (int row = 0; row < job.rows; row += kIntegerRows) {
    const int rows = job.rows - row;
    if (rows == 1) direct_integer<BITS, 1, NT>(job, row, first, step);
    else if (rows == 2) direct_integer<BITS, 2, NT>(job, row, first, step);
    else if (rows <= 4) direct_integer<BITS, 4, NT>(job, row, first, step);
    else direct_integer<BITS, kIntegerRows, NT>(job, row, first, step);
  }
}

[[gnu::noinline]] void panel_rows_integer(const Job& job, int tile, const uint8_t* panel) {
  constexpr int MR = kIntegerRows;
  const Channels channels[2] = {channels_of(job, tile, true), channels_of(job, tile + 1, true)};
  for (int row = 0; row < job.rows; row += MR) {
    const int32_t* x[MR];
    __m512 total[MR][2];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
      total[m][0] = total[m][1] = _mm512_setzero_ps();
    }
    const uint8_t* at = panel;
    ptrdiff_t quad = 0;
    for (int g = 0; g < job.groups; ++g) {
      __m512i sum[MR][2];
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_si512();
      for (const ptrdiff_t end = group_end(job, g) / 4; quad < end; ++quad, at += 2 * kBlock) {
        const __m512i w0 = _mm512_load_si512(at), w1 = _mm512_load_si512(at + kBlock);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const __m512i a = _mm512_set1_epi32(x[m][quad]);
          sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, a);
          sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, a);
        }
      }
      add_group(job, row, tile, 1, g, sum, total);
    }
    alignas(64) float totals[MR][2][kLanes];
    spill(total, totals);
    for (int n = 0; n < 2; ++n)
      finish_rows(job, row, MR, tile + n, channels[n], totals[0][n]);
  }
}

template <int BITS>
void panel_integer(const Job& job, int tile) {
  constexpr int kPlanes = 8 / BITS;
  uint8_t* panel = scratch(0, static_cast<size_t>(job.k) * 2 * kLanes);
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n) {
    const uint8_t* words = job.words + (tile + n) * tile_bytes(BITS, job.k);
    uint8_t* out = panel + n * kBlock;
    for (int quad = 0; quad < job.k / 4; quad += kPlanes, words += kBlock) {
      prefetch<kPanelRows>(words);
      const __m512i block = _mm512_loadu_si512(words);
      for (int p = 0; p < kPlanes; ++p)
        _mm512_store_si512(out + (quad + p) * 2 * kBlock, plane<BITS>(block, p));
    }
  }
  panel_rows_integer(job, tile, panel);
}

template <int BITS>
void all_integer(const Job& job) {
  int done = 0;
  if (job.rows >= kPanelRows) {
    for (; done + 2 <= job.tiles; done += 2) panel_integer<BITS>(job, done);
  } else {
    const int step = job.tiles / 2;
    for (; done < step; ++done) few_rows_integer<BITS, 2>(job, done, step);
    done = 2 * step;
  }
  for (; done < job.tiles; ++done) few_rows_integer<BITS, 1>(job, done, 1);
}

}  // namespace

namespace avx512 {

void store_rows(const Job& job, int row, int height, int first, int tiles, int step,
                const float* results) {
  for (int n = 0; n < tiles; ++n)
    store_tile(job, row, std::min(row + height, job.rows),
               channels_of(job, first + n * step, false), [&](int m) {
                 return _mm512_load_ps(results + (2 * (m - row) + n) * kLanes);
               });
}

void add_bias_and_store_rows(const Job& job, int row, int height, int first, int tiles, int step,
                             const float* sums) {
  for (int n = 0; n < tiles; ++n) {
    const int tile = first + n * step;
    const __m512 bias = bias_of(job, tile);
    store_tile(job, row, std::min(row + height, job.rows), channels_of(job, tile, true), [&](int m) {
      return _mm512_add_ps(bias, _mm512_load_ps(sums + (2 * (m - row) + n) * kLanes));
    });
  }
}

size_t integer_bytes(int padded) { return padded; }

void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums) {
  quantize_row(row, qmax, scale, sums, [&](int i, const Ints* codes) {
    __m512i wide;
    std::memcpy(&wide, codes, sizeof wide);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtsepi32_epi8(wide));
  });
}

void multiply_integer(const Job& job) {
  with_code_bits(job.bits, [&](auto bits) { all_integer<bits>(job); });
}

}  // namespace avx512
}  // namespace qvla
