// The kernel in vectors of 16 for any target; compiled again for AVX2 (QVLA_KERNEL names it).
#include "rows.h"

namespace qvla {
namespace {

// Rows that share an unpacked block: their accumulators must fit the registers.
constexpr int kRows = 4;

inline Words load_block(const uint8_t* at) {
  Words block;
  std::memcpy(&block, at, sizeof block);
  return block;
}

inline void store(const Job& job, int row, int tile, Floats value) {
  const int32_t* index = job.index + tile * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (index[lane] < 0) continue;
    const ptrdiff_t at = row * job.y_stride + index[lane];
    if (job.y_bfloat16) static_cast<uint16_t*>(job.y)[at] = to_bfloat16(value[lane]);
    else static_cast<float*>(job.y)[at] = value[lane];
  }
}

inline Floats lanes(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline int group_end(const Job& job, int g) {
  return g + 1 == job.groups ? job.k : (g + 1) * job.group;
}

// ---- activations in float32, natural order ----

size_t float_bytes(int padded, bool) { return sizeof(float) * padded; }

void prepare_float(const Row& row, bool, uint8_t* out) {
  for (int i = 0; i < row.padded; i += kLanes) {
    const Floats x = load(row, i);
    std::memcpy(out + sizeof(float) * i, &x, sizeof x);
  }
}

template <int M>
inline void add(Floats (&sum)[M], Floats w, const float* const (&x)[M], int k) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) sum[m] += w * x[m][k];
}

template <int BITS, int M>
void tile_float(const Job& job, int tile, int row) {
  constexpr int kPlanes = BITS == 16 ? 1 : 8 / BITS;
  const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = reinterpret_cast<const float*>(job.x + (row + m) * job.stride);
  // Code u stands for multiplier (u + shift); the multiplier goes with the scale.
  const float multiplier = static_cast<float>(job.multiplier);
  const float shift = static_cast<float>(job.offset) / multiplier;
  Floats total[M];
  for (int m = 0; m < M; ++m) total[m] = lanes(job.bias + tile * kLanes);
  for (int g = 0, k = 0; g < job.groups; ++g) {
    Floats sum[M] = {};
    for (const int end = group_end(job, g); k < end;) {
      const Words block = load_block(words);
      words += kBlock;
      if constexpr (BITS == 16) {
        // Blocks alternate between the inputs (0, 2) and (1, 3) of a quad.
        const int at = (k & ~3) + ((k & 2) >> 1);
        const Words low = block << 16, high = block & 0xffff0000u;
        Floats w;
        std::memcpy(&w, &low, sizeof w);
        add<M>(sum, w, x, at);
        std::memcpy(&w, &high, sizeof w);
        add<M>(sum, w, x, at + 2);
        k += 2;
      } else {
#pragma GCC unroll 4
        for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const Words code = (block >> (8 * j + BITS * p)) & ((1u << BITS) - 1);
            // Signed conversion is the one that every target has.
            const Floats w = __builtin_convertvector((Ints)code, Floats) + shift;
            add<M>(sum, w, x, k + 4 * p + j);
          }
        }
        k += 4 * kPlanes;
      }
    }
    const Floats scale = lanes(job.scales + (tile * job.groups + g) * kLanes) * multiplier;
    for (int m = 0; m < M; ++m) total[m] += sum[m] * scale;
  }
  for (int m = 0; m < M && row + m < job.rows; ++m) store(job, row + m, tile, total[m]);
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
    case 2: return all_float<2>(job);
    case 4: return all_float<4>(job);
    case 8: return all_float<8>(job);
    case 16: return all_float<16>(job);
  }
}

// ---- activations in integers: 16-bit pairs (0, 2), (1, 3) of every quad ----

size_t integer_bytes(int padded) { return sizeof(int16_t) * padded; }

void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums) {
  constexpr int kOrder[4] = {0, 2, 1, 3};
  int16_t* pairs = reinterpret_cast<int16_t*>(out);
  quantize_row(row, qmax, scale, sums, [&](int i, Ints code) {
    for (int j = 0; j < kLanes; ++j)
      pairs[i + (j & ~3) + kOrder[j & 3]] = static_cast<int16_t>(code[j]);
  });
}

// sum += low(w) low(x) + high(w) high(x) of 16-bit halves; x is one pair for all lanes.
inline Ints add_pairs(Ints sum, Words w, int32_t x) {
#if defined(__AVX2__)
  __m256i part[2];
  std::memcpy(part, &w, sizeof w);
  const __m256i pair = _mm256_set1_epi32(x);
  for (__m256i& p : part) p = _mm256_madd_epi16(p, pair);
  Ints product;
  std::memcpy(&product, part, sizeof product);
  return sum + product;
#elif defined(__SSE2__)
  __m128i part[4];
  std::memcpy(part, &w, sizeof w);
  const __m128i pair = _mm_set1_epi32(x);
  for (__m128i& p : part) p = _mm_madd_epi16(p, pair);
  Ints product;
  std::memcpy(&product, part, sizeof product);
  return sum + product;
#else
  const int32_t low = static_cast<int16_t>(x & 0xffff), high = x >> 16;
  return sum + (Ints)(w & 0xffffu) * low + (Ints)(w >> 16) * high;
#endif
}

template <int BITS, int M>
void tile_integer(const Job& job, int tile, int row) {
  constexpr int kPlanes = 8 / BITS;
  constexpr uint32_t kMask = ((1u << BITS) - 1) * 0x00010001u;
  const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k);
  const int32_t* x[M];
  for (int m = 0; m < M; ++m)
    x[m] = reinterpret_cast<const int32_t*>(job.x + (row + m) * job.stride);
  Floats total[M];
  for (int m = 0; m < M; ++m) total[m] = Floats{};
  for (int g = 0, k = 0; g < job.groups; ++g) {
    Ints sum[M] = {};
    for (const int end = group_end(job, g); k < end; k += 4 * kPlanes, words += kBlock) {
      const Words block = load_block(words);
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p) {
        const Words even = (block >> (BITS * p)) & kMask, odd = (block >> (BITS * p + 8)) & kMask;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          sum[m] = add_pairs(sum[m], even, x[m][k / 2 + 2 * p]);
          sum[m] = add_pairs(sum[m], odd, x[m][k / 2 + 2 * p + 1]);
        }
      }
    }
    const Floats scale = lanes(job.scales + (tile * job.groups + g) * kLanes);
    for (int m = 0; m < M && row + m < job.rows; ++m) {
      const int32_t shift = job.offset * job.row_sums[(row + m) * job.groups + g];
      total[m] += __builtin_convertvector(sum[m] * job.multiplier + shift, Floats) * scale;
    }
  }
  for (int m = 0; m < M && row + m < job.rows; ++m)
    store(job, row + m, tile, total[m] * job.row_scale[row + m] + lanes(job.bias + tile * kLanes));
}

template <int BITS>
void all_integer(const Job& job) {
  for (int tile = 0; tile < job.tiles; ++tile) {
    if (job.rows == 1) tile_integer<BITS, 1>(job, tile, 0);
    else for (int row = 0; row < job.rows; row += kRows) tile_integer<BITS, kRows>(job, tile, row);
  }
}

void multiply_integer(const Job& job) {
  switch (job.bits) {
    case 2: return all_integer<2>(job);
    case 4: return all_integer<4>(job);
    case 8: return all_integer<8>(job);
  }
}

}  // namespace

const Kernel QVLA_KERNEL = {
    QVLA_KERNEL_NAME, float_bytes,    integer_bytes,    prepare_float,
    prepare_integer,  multiply_float, multiply_integer,
};

}  // namespace qvla
