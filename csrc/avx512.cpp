// The kernels for AVX-512 with VNNI: products of four 8-bit integers, and of float32 numbers or, where it
// is compiled with BF16, of bfloat16 pairs.
//
// Few rows (decoding) multiply straight from the packed blocks, in several streams of tiles with
// prefetching, because memory is the limit. Many rows (prefill) unpack a pair of tiles once into a
// panel that stays in the caches.
#if defined(__AVX512BF16__)
#include "avx512_bfloat16.h"
#else
#include "avx512_float32.h"
#endif

namespace qvla {
namespace {

// ---- 8-bit activations ----

// Rows of a block: with 12 as above the compiler runs out of registers and takes twice as long.
constexpr int kIntegerRows = 8;

size_t integer_bytes(int padded) { return padded; }

void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums) {
  quantize_row(row, qmax, scale, sums, [&](int i, Ints code) {
    __m512i wide;
    std::memcpy(&wide, &code, sizeof wide);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtsepi32_epi8(wide));
  });
}

template <int BITS>
inline __m512i plane(__m512i block, int p) {
  if (BITS == 8) return block;
  const __m512i mask = _mm512_set1_epi8((1 << (BITS & 7)) - 1);
  return _mm512_and_si512(p ? _mm512_srli_epi16(block, p * BITS) : block, mask);
}

// sum = multiplier (codes x) + offset sum(x), as a float.
inline __m512 shifted(const Job& job, __m512i sum, int row, int g) {
  const int32_t shift = job.offset * job.row_sums[static_cast<ptrdiff_t>(row) * job.groups + g];
  const __m512i product = _mm512_mullo_epi32(sum, _mm512_set1_epi32(job.multiplier));
  return _mm512_cvtepi32_ps(_mm512_add_epi32(product, _mm512_set1_epi32(shift)));
}

inline void finish(const Job& job, int row, int tile, __m512 total) {
  const __m512 scale = _mm512_set1_ps(job.row_scale[row]);
  store(job, row, tile, _mm512_fmadd_ps(total, scale, bias_of(job, tile)));
}

template <int BITS, int MR, int NT>
void direct_integer(const Job& job, int row, int first, int step) {
  constexpr int kPlanes = 8 / BITS;
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
  __m512 total[MR][NT];
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) total[m][n] = _mm512_setzero_ps();
  ptrdiff_t quad = 0;
  for (int g = 0; g < job.groups; ++g) {
    __m512i sum[MR][NT];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) sum[m][n] = _mm512_setzero_si512();
    for (const ptrdiff_t end = group_end(job, g) / 4; quad < end; quad += kPlanes) {
      __m512i block[NT];
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        block[n] = _mm512_loadu_si512(words[n]);
        prefetch<MR>(words[n]);
        words[n] += kBlock;
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p) {
        __m512i w[NT];
#pragma GCC unroll 4
        for (int n = 0; n < NT; ++n) w[n] = plane<BITS>(block[n], p);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          const __m512i a = _mm512_set1_epi32(x[m][quad + p]);
#pragma GCC unroll 4
          for (int n = 0; n < NT; ++n) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], w[n], a);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      const __m512 scale = scale_of(job, first + n * step, g);
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m)
        if (row + m < job.rows)
          total[m][n] = _mm512_fmadd_ps(shifted(job, sum[m][n], row + m, g), scale, total[m][n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n)
      if (row + m < job.rows) finish(job, row + m, first + n * step, total[m][n]);
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

void panel_rows_integer(const Job& job, int tile, const uint8_t* panel) {
  constexpr int MR = kIntegerRows;
  for (int row = 0; row < job.rows; row += MR) {
    const int32_t* x[MR];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
      x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
    __m512 total[MR][2];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) total[m][0] = total[m][1] = _mm512_setzero_ps();
    const uint8_t* at = panel;
    ptrdiff_t quad = 0;
    for (int g = 0; g < job.groups; ++g) {
      __m512i sum[MR][2];
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_si512();
      for (const ptrdiff_t end = group_end(job, g) / 4; quad < end; ++quad, at += 2 * kBlock) {
        const __m512i w0 = _mm512_load_si512(at), w1 = _mm512_load_si512(at + kBlock);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          const __m512i a = _mm512_set1_epi32(x[m][quad]);
          sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, a);
          sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, a);
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < 2; ++n) {
        const __m512 scale = scale_of(job, tile + n, g);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m)
          if (row + m < job.rows)
            total[m][n] = _mm512_fmadd_ps(shifted(job, sum[m][n], row + m, g), scale, total[m][n]);
      }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < 2; ++n)
        if (row + m < job.rows) finish(job, row + m, tile + n, total[m][n]);
  }
}

template <int BITS>
void panel_integer(const Job& job, int tile) {
  constexpr int kPlanes = 8 / BITS;
  uint8_t* panel = scratch<0>(static_cast<size_t>(job.k) * 2 * kLanes);
#pragma GCC unroll 4
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

void multiply_integer(const Job& job) {
  with_code_bits(job.bits, [&](auto bits) { all_integer<bits>(job); });
}

}  // namespace

const Kernel QVLA_KERNEL = {
    QVLA_KERNEL_NAME, float_bytes, integer_bytes, prepare_float, prepare_integer, multiply_float,
    multiply_integer,
};

}  // namespace qvla
