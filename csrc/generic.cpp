// The kernel in vectors of 16 for any target.
#include "float32.h"

namespace qvla {
namespace {

// Rows that share an unpacked block: their accumulators must fit the registers.
constexpr int kRows = 4;

// A tile in two halves of 8 channels. Wider vectors than the target's would go through memory.
constexpr int kHalf = 8;
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));

inline Words8 load_block(const uint8_t* at) {
  Words8 block;
  std::memcpy(&block, at, sizeof block);
  return block;
}

inline Floats8 lanes(const float* from) {
  Floats8 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Writes results [height][8] of half a tile to the rows from `row` on that there are. A function of its
// own: inlined, one store for every row was most of the code and of the time that compilers took.
[[gnu::noinline]] void store_rows(const Job& job, int row, int height, int first,
                                  const Floats8* results) {
  for (int m = 0; m < height && row + m < job.rows; ++m)
    store_lanes<kHalf>(job, row + m, first, results[m]);
}

// ---- activations in float32, natural order ----

template <int BITS, int M>
void tile_float(const Job& job, int tile, int row) {
  constexpr int kPlanes = BITS >= 16 ? 1 : 8 / BITS;
  const float* x[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) x[m] = reinterpret_cast<const float*>(job.x + (row + m) * job.stride);
  // Code u stands for multiplier (u + shift); the multiplier goes with the scale.
  const float multiplier = static_cast<float>(job.multiplier);
  const float shift = static_cast<float>(job.offset) / multiplier;
  for (int half = 0; half < kLanes; half += kHalf) {
    const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k) + 4 * half;
    Floats8 total[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] = lanes(job.bias + tile * kLanes + half);
    for (int g = 0, k = 0; g < job.groups; ++g) {
      Floats8 sum[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m] = Floats8{};
      for (const int end = group_end(job, g); k < end; words += kBlock) {
        const Words8 block = load_block(words);
        if constexpr (BITS == 32) {
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) sum[m] += (Floats8)block * x[m][k];
          ++k;
        } else if constexpr (BITS == 16) {
          // Blocks alternate between the inputs (0, 2) and (1, 3) of a quad.
          const int at = (k & ~3) + ((k & 2) >> 1);
          const Floats8 low = (Floats8)(block << 16), high = (Floats8)(block & 0xffff0000u);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) sum[m] += low * x[m][at] + high * x[m][at + 2];
          k += 2;
        } else {
#pragma GCC unroll 4
          for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const Words8 code = (block >> (8 * j + BITS * p)) & ((1u << BITS) - 1);
              // Signed conversion is the one that every target has.
              const Floats8 w = __builtin_convertvector((Ints8)code, Floats8) + shift;
#pragma GCC unroll 4
              for (int m = 0; m < M; ++m) sum[m] += w * x[m][k + 4 * p + j];
            }
          }
          k += 4 * kPlanes;
        }
      }
      const Floats8 scale =
          lanes(job.scales + (static_cast<ptrdiff_t>(tile) * job.groups + g) * kLanes + half) *
          multiplier;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m] += sum[m] * scale;
    }
    store_rows(job, row, M, tile * kLanes + half, total);
  }
}

template <int BITS>
void all_float(const Job& job) {
  for (int tile = 0; tile < job.tiles; ++tile) {
    if (job.rows == 1) tile_float<BITS, 1>(job, tile, 0);
    else for (int row = 0; row < job.rows; row += kRows) tile_float<BITS, kRows>(job, tile, row);
  }
}

void multiply_float(const Job& job) {
  switch (job.bits) {
    case 16: return all_float<16>(job);
    case 32: return all_float<32>(job);
    default: return with_code_bits(job.bits, [&](auto bits) { all_float<bits>(job); });
  }
}

// ---- activations in integers: 16-bit pairs (0, 2), (1, 3) of every quad ----

size_t integer_bytes(int padded) { return sizeof(int16_t) * padded; }

void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums) {
  constexpr int kOrder[4] = {0, 2, 1, 3};
  int16_t* pairs = reinterpret_cast<int16_t*>(out);
  quantize_row(row, qmax, scale, sums, [&](int i, const Ints* codes) {
    for (int j = 0; j < kLanes; ++j)
      pairs[i + (j & ~3) + kOrder[j & 3]] = static_cast<int16_t>(codes[j / kVector][j % kVector]);
  });
}

// sum += low(w) low(x) + high(w) high(x) of 16-bit halves; x is one pair for all lanes.
inline Ints8 add_pairs(Ints8 sum, Words8 w, int32_t x) {
#if defined(__SSE2__)
  __m128i part[2];
  std::memcpy(part, &w, sizeof w);
  const __m128i pair = _mm_set1_epi32(x);
  for (__m128i& p : part) p = _mm_madd_epi16(p, pair);
  Ints8 product;
  std::memcpy(&product, part, sizeof product);
  return sum + product;
#else
  const int32_t low = static_cast<int16_t>(x & 0xffff), high = x >> 16;
  return sum + (Ints8)(w & 0xffffu) * low + (Ints8)(w >> 16) * high;
#endif
}

template <int BITS, int M>
void tile_integer(const Job& job, int tile, int row) {
  constexpr int kPlanes = 8 / BITS;
  constexpr uint32_t kMask = ((1u << BITS) - 1) * 0x00010001u;
  const int32_t* x[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
    x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
  for (int half = 0; half < kLanes; half += kHalf) {
    const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k) + 4 * half;
    Floats8 total[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] = Floats8{};
    for (int g = 0, k = 0; g < job.groups; ++g) {
      Ints8 sum[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m] = Ints8{};
      for (const int end = group_end(job, g); k < end; k += 4 * kPlanes, words += kBlock) {
        const Words8 block = load_block(words);
#pragma GCC unroll 4
        for (int p = 0; p < kPlanes; ++p) {
          const Words8 even = (block >> (BITS * p)) & kMask;
          const Words8 odd = (block >> (BITS * p + 8)) & kMask;
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            sum[m] = add_pairs(sum[m], even, x[m][k / 2 + 2 * p]);
            sum[m] = add_pairs(sum[m], odd, x[m][k / 2 + 2 * p + 1]);
          }
        }
      }
      const Floats8 scale =
          lanes(job.scales + (static_cast<ptrdiff_t>(tile) * job.groups + g) * kLanes + half);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        if (row + m >= job.rows) continue;
        const int32_t shift =
            job.offset * job.row_sums[static_cast<ptrdiff_t>(row + m) * job.groups + g];
        total[m] += __builtin_convertvector(sum[m] * job.multiplier + shift, Floats8) * scale;
      }
    }
    const Floats8 bias = lanes(job.bias + tile * kLanes + half);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
      if (row + m < job.rows) total[m] = total[m] * job.row_scale[row + m] + bias;
    store_rows(job, row, M, tile * kLanes + half, total);
  }
}

template <int BITS>
void all_integer(const Job& job) {
  for (int tile = 0; tile < job.tiles; ++tile) {
    if (job.rows == 1) tile_integer<BITS, 1>(job, tile, 0);
    else for (int row = 0; row < job.rows; row += kRows) tile_integer<BITS, kRows>(job, tile, row);
  }
}

void multiply_integer(const Job& job) {
  with_code_bits(job.bits, [&](auto bits) { all_integer<bits>(job); });
}

}  // namespace

const Kernel kPortable = {
    "portable",      float_bytes,    integer_bytes,    prepare_float,
    prepare_integer, multiply_float, multiply_integer, basic::attend,
};

}  // namespace qvla
