// The kernel for 64-bit ARM, compiled three times (QVLA_KERNEL names it): plain NEON, with the
// products of four 8-bit integers (SDOT), and with those of bfloat16 pairs (BFDOT), too.
//
// A block is four vectors of four channels, a quarter of a tile each, and a lane of a vector of x
// meets all of them: both products sum within 32-bit words, which is how tiles are laid out.
#include <arm_neon.h>

#include <utility>

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include "rows.h"
#else
#include "float32.h"
#endif

namespace qvla {
namespace {

constexpr int kQuarter = 4;  // channels of a vector

// Rows of a block. Those of eight meet half a tile at a time: their sums fill half the registers.
constexpr int kMostRows = 8;
template <int M>
constexpr int kQuarters = M == kMostRows ? 2 : 4;

#define INLINE __attribute__((always_inline))

// f(0) ... f(N - 1), whose argument is a constant: lanes and shifts must be.
template <class F, int... I>
INLINE inline void each_of(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
INLINE inline void each(const F& f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

inline float32x4_t scale_of(const Job& job, int tile, int g, int quarter) {
  return vld1q_f32(job.scales + (static_cast<ptrdiff_t>(tile) * job.groups + g) * kLanes +
                   quarter * kQuarter);
}

inline float32x4_t bias_of(const Job& job, int tile, int quarter) {
  return vld1q_f32(job.bias + tile * kLanes + quarter * kQuarter);
}

inline void store(const Job& job, int row, int tile, int quarter, float32x4_t value) {
  float lanes[kQuarter];
  vst1q_f32(lanes, value);
  store_lanes<kQuarter>(job, row, tile * kLanes + quarter * kQuarter, lanes);
}

// Every row of every tile, in the smallest blocks that take all rows.
template <class F>
inline void all_tiles(const Job& job, const F& block) {
  for (int tile = 0; tile < job.tiles; ++tile) {
    for (int row = 0; row < job.rows; row += kMostRows) {
      const int rows = job.rows - row;
      if (rows == 1) block(std::integral_constant<int, 1>{}, tile, row);
      else if (rows == 2) block(std::integral_constant<int, 2>{}, tile, row);
      else if (rows <= 4) block(std::integral_constant<int, 4>{}, tile, row);
      else block(std::integral_constant<int, kMostRows>{}, tile, row);
    }
  }
}

// ---- activations in bfloat16 or float32 ----

// A step of the loop over k: whole quads of inputs and whole blocks.
template <int BITS>
constexpr int kStepQuads = BITS < 8 ? 8 / BITS : 1;
template <int BITS>
constexpr int kStepBlocks = BITS > 8 ? BITS / 8 : 1;

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

// bfloat16, quads in the order (0, 2, 1, 3): the pairs that the words of a tile meet. float32 rows
// are the sum of two such rows, one behind the other.

size_t half_row(int padded) { return sizeof(uint16_t) * padded; }

size_t float_bytes(int padded, bool split) { return half_row(padded) * (split ? 2 : 1); }

void prepare_float(const Row& row, bool split, uint8_t* out) {
  constexpr int kOrder[4] = {0, 2, 1, 3};
  for (int i = 0; i < row.padded; i += kVector) {
    const Floats x = load(row, i);
    uint16_t high[kVector], low[kVector];
    for (int j = 0; j < kVector; ++j) {
      const float value = x[(j & ~3) + kOrder[j & 3]];
      high[j] = to_bfloat16(value);
      low[j] = to_bfloat16(value - to_float(high[j]));
    }
    std::memcpy(out + 2 * i, high, sizeof high);
    if (split) std::memcpy(out + half_row(row.padded) + 2 * i, low, sizeof low);
  }
}

// What codes stand for, in bytes: entries of bfloat16 numbers' low halves, and of their high ones.
struct Tables {
  uint8x16_t low, high;

  explicit Tables(const Job& job) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      const int code = job.bits < 8 ? i & ((1 << job.bits) - 1) : 0;
      const uint16_t value = to_bfloat16(static_cast<float>(job.multiplier * code + job.offset));
      bytes[0][i] = value & 0xff;
      bytes[1][i] = value >> 8;
    }
    low = vld1q_u8(bytes[0]);
    high = vld1q_u8(bytes[1]);
  }
};

struct Pairs {
  bfloat16x8_t even, odd;  // inputs (0, 2) and (1, 3) of a quad, four channels
};

// Quad P of a step as bfloat16 pairs.
template <int BITS, int P>
INLINE inline Pairs pairs_of(const uint8x16_t* block, const Tables& tables) {
  static_assert(BITS <= 16, "wider weights are not pairs");
  if constexpr (BITS == 16) {
    return {vreinterpretq_bf16_u8(block[0]), vreinterpretq_bf16_u8(block[1])};
  } else if constexpr (BITS == 8) {
    // Signed codes: bit 7 of the stored ones is flipped. Each goes to the top of its word.
    const uint32x4_t code = vreinterpretq_u32_u8(veorq_u8(block[0], vdupq_n_u8(128)));
    const uint32x4_t top = vdupq_n_u32(0xff000000u);
    const auto number = [](uint32x4_t word) INLINE {
      return vreinterpretq_u16_f32(vcvtq_n_f32_s32(vreinterpretq_s32_u32(word), 24));
    };
    const uint16x8_t a = number(vshlq_n_u32(code, 24));
    const uint16x8_t b = number(vandq_u32(vshlq_n_u32(code, 16), top));
    const uint16x8_t c = number(vandq_u32(vshlq_n_u32(code, 8), top));
    const uint16x8_t d = number(vandq_u32(code, top));
    // bfloat16 holds them exactly: the upper halves are all there is.
    return {vreinterpretq_bf16_u16(vtrn2q_u16(a, c)), vreinterpretq_bf16_u16(vtrn2q_u16(b, d))};
  } else {
    uint8x16_t code = block[0];
    if constexpr (P > 0) code = vshrq_n_u8(code, P * BITS);
    code = vandq_u8(code, vdupq_n_u8((1 << BITS) - 1));
    const uint8x16_t low = vqtbl1q_u8(tables.low, code), high = vqtbl1q_u8(tables.high, code);
    return {vreinterpretq_bf16_u8(vtrn1q_u8(low, high)),
            vreinterpretq_bf16_u8(vtrn2q_u8(low, high))};
  }
}

template <int BITS, int M, int Q>
struct FloatProduct {
  const float factor = 1;  // of all sums
  const Tables tables;
  const ptrdiff_t low;  // bytes from a row to its second summand; 0 without
  const uint8_t* x[M];

  FloatProduct(const Job& job, int row)
      : tables(job), low(job.split ? static_cast<ptrdiff_t>(half_row(job.k)) : 0) {
    for (int m = 0; m < M; ++m) x[m] = job.x + (row + m) * job.stride;
  }

  // sums += quads of x from input k on, times the blocks of a step.
  INLINE inline void step(float32x4_t (&sum)[M][Q], const uint8x16_t (&block)[Q][kStepBlocks<BITS>],
                          int k) const {
    if constexpr (BITS == 32) wide_step(sum, block, k);
    else each<kStepQuads<BITS>>([&](auto p) INLINE {
      Pairs w[Q];
      each<Q>([&](auto q) INLINE { w[q] = pairs_of<BITS, p>(block[q], tables); });
      const auto meet = [&](ptrdiff_t behind) INLINE {
        each<M>([&](auto m) INLINE {
          const bfloat16x4_t quad =
              vreinterpret_bf16_u8(vld1_u8(x[m] + behind + 2 * (k + 4 * p)));
          each<Q>([&](auto q) INLINE {
            sum[m][q] = vbfdotq_lane_f32(sum[m][q], w[q].even, quad, 0);
            sum[m][q] = vbfdotq_lane_f32(sum[m][q], w[q].odd, quad, 1);
          });
        });
      };
      meet(0);
      if (low) meet(low);
    });
  }

  // Weights in float32 meet the numbers whose halves x is, widened.
  INLINE inline void wide_step(float32x4_t (&sum)[M][Q],
                               const uint8x16_t (&block)[Q][kStepBlocks<BITS>], int k) const {
    each<M>([&](auto m) INLINE {
      const auto widened = [](const uint8_t* at) INLINE {
        return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(at)), 16));
      };
      float32x4_t quad = widened(x[m] + 2 * k);
      if (low) quad = vaddq_f32(quad, widened(x[m] + low + 2 * k));
      each<4>([&](auto j) INLINE {
        constexpr int kOrder[4] = {0, 2, 1, 3};
        each<Q>([&](auto q) INLINE {
          const float32x4_t w = vreinterpretq_f32_u8(block[q][j]);
          sum[m][q] = vfmaq_laneq_f32(sum[m][q], w, quad, kOrder[j]);
        });
      });
    });
  }
};

#else

// float32 in natural order.

// Input J of quad P of a step, four channels, without the multiplier.
template <int BITS, int P, int J>
INLINE inline float32x4_t weight_of(const uint8x16_t* block, float32x4_t shift) {
  if constexpr (BITS == 32) {
    return vreinterpretq_f32_u8(block[J]);
  } else if constexpr (BITS == 16) {
    // Words hold the inputs (0, 2) and (1, 3).
    const uint32x4_t word = vreinterpretq_u32_u8(block[J & 1]);
    return vreinterpretq_f32_u32(J < 2 ? vshlq_n_u32(word, 16)
                                       : vandq_u32(word, vdupq_n_u32(0xffff0000u)));
  } else {
    constexpr int kFirst = 8 * J + BITS * P;  // bit of the field
    const uint32x4_t word = vreinterpretq_u32_u8(block[0]);
    const uint32x4_t code = vandq_u32(word, vdupq_n_u32(((1u << BITS) - 1) << kFirst));
    float32x4_t value;
    if constexpr (kFirst == 0) value = vcvtq_f32_u32(code);
    else value = vcvtq_n_f32_u32(code, kFirst);  // divides by 2^kFirst, exactly
    return vaddq_f32(value, shift);
  }
}

template <int BITS, int M, int Q>
struct FloatProduct {
  const float factor;  // of all sums
  const float32x4_t shift;
  const float* x[M];

  // Code u stands for multiplier (u + shift); the multiplier goes with the scale.
  FloatProduct(const Job& job, int row)
      : factor(static_cast<float>(job.multiplier)),
        shift(vdupq_n_f32(static_cast<float>(job.offset) / factor)) {
    for (int m = 0; m < M; ++m)
      x[m] = reinterpret_cast<const float*>(job.x + (row + m) * job.stride);
  }

  // sums += quads of x from input k on, times the blocks of a step.
  INLINE inline void step(float32x4_t (&sum)[M][Q], const uint8x16_t (&block)[Q][kStepBlocks<BITS>],
                          int k) const {
    each<kStepQuads<BITS>>([&](auto p) INLINE {
      float32x4_t quad[M];
      each<M>([&](auto m) INLINE { quad[m] = vld1q_f32(x[m] + k + 4 * p); });
      each<4>([&](auto j) INLINE {
        each<Q>([&](auto q) INLINE {
          const float32x4_t w = weight_of<BITS, p, j>(block[q], shift);
          each<M>([&](auto m) INLINE { sum[m][q] = vfmaq_laneq_f32(sum[m][q], w, quad[m], j); });
        });
      });
    });
  }
};

#endif

template <int BITS, int M>
void tile_float(const Job& job, int tile, int row) {
  constexpr int Q = kQuarters<M>, kBlocks = kStepBlocks<BITS>;
  const FloatProduct<BITS, M, Q> product(job, row);
  const float32x4_t factor = vdupq_n_f32(product.factor);
  for (int first = 0; first < kLanes / kQuarter; first += Q) {
    const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k) + 16 * first;
    float32x4_t total[M][Q];
    each<M>([&](auto m) INLINE {
      each<Q>([&](auto q) INLINE { total[m][q] = bias_of(job, tile, first + q); });
    });
    for (int g = 0, k = 0; g < job.groups; ++g) {
      float32x4_t sum[M][Q];
      each<M>([&](auto m) INLINE {
        each<Q>([&](auto q) INLINE { sum[m][q] = vdupq_n_f32(0); });
      });
      for (const int end = group_end(job, g); k < end; k += 4 * kStepQuads<BITS>) {
        uint8x16_t block[Q][kBlocks];
        each<kBlocks>([&](auto b) INLINE {
          each<Q>([&](auto q) INLINE { block[q][b] = vld1q_u8(words + 16 * q); });
          words += kBlock;
        });
        product.step(sum, block, k);
      }
      each<Q>([&](auto q) INLINE {
        const float32x4_t scale = vmulq_f32(scale_of(job, tile, g, first + q), factor);
        each<M>([&](auto m) INLINE { total[m][q] = vfmaq_f32(total[m][q], sum[m][q], scale); });
      });
    }
    for (int m = 0; m < M && row + m < job.rows; ++m)
      for (int q = 0; q < Q; ++q) store(job, row + m, tile, first + q, total[m][q]);
  }
}

template <int BITS>
void all_float(const Job& job) {
  all_tiles(job, [&](auto m, int tile, int row) { tile_float<BITS, m>(job, tile, row); });
}

void multiply_float(const Job& job) {
  switch (job.bits) {
    case 16: return all_float<16>(job);
    case 32: return all_float<32>(job);
    default: return with_code_bits(job.bits, [&](auto bits) { all_float<bits>(job); });
  }
}

// ---- 8-bit activations ----

size_t integer_bytes(int padded) { return padded; }

void prepare_integer(const Row& row, int qmax, uint8_t* out, float* scale, int32_t* sums) {
  quantize_row(row, qmax, scale, sums, [&](int i, const Ints* codes) {
    int32_t wide[kLanes];
    std::memcpy(wide, codes, sizeof wide);
    int8_t bytes[kLanes];
    for (int j = 0; j < kLanes; ++j) bytes[j] = static_cast<int8_t>(wide[j]);
    std::memcpy(out + i, bytes, sizeof bytes);
  });
}

// sum += the products of four codes each with quad LANE of x.
template <int LANE>
INLINE inline int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_laneq_s32(sum, w, x, LANE);
#else
  const int8x16_t quad = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), LANE));
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(quad));
  const int16x8_t high = vmull_high_s8(w, quad);
  // Two products fit 16 bits, because codes of x are at least -127: 2 * 128 * 127 < 2^15.
  return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}

// Plane P of a block, signed: 8-bit codes less 128, the others as they are.
template <int BITS, int P>
INLINE inline int8x16_t plane(uint8x16_t block) {
  if constexpr (BITS == 8) return vreinterpretq_s8_u8(veorq_u8(block, vdupq_n_u8(128)));
  if constexpr (P > 0) block = vshrq_n_u8(block, P * (BITS & 7));
  return vreinterpretq_s8_u8(vandq_u8(block, vdupq_n_u8((1 << (BITS & 7)) - 1)));
}

template <int BITS, int M>
void tile_integer(const Job& job, int tile, int row) {
  // A step of 16 inputs, a vector of x.
  constexpr int Q = kQuarters<M>, kPlanes = 8 / BITS, kBlocks = 4 / kPlanes;
  const int offset = job.offset + (BITS == 8 ? 128 * job.multiplier : 0);
  const uint8_t* x[M];
  each<M>([&](auto m) INLINE { x[m] = job.x + (row + m) * job.stride; });
  for (int first = 0; first < kLanes / kQuarter; first += Q) {
    const uint8_t* words = job.words + tile * tile_bytes(BITS, job.k) + 16 * first;
    float32x4_t total[M][Q];
    each<M>([&](auto m) INLINE {
      each<Q>([&](auto q) INLINE { total[m][q] = vdupq_n_f32(0); });
    });
    for (int g = 0, k = 0; g < job.groups; ++g) {
      int32x4_t sum[M][Q];
      each<M>([&](auto m) INLINE {
        each<Q>([&](auto q) INLINE { sum[m][q] = vdupq_n_s32(0); });
      });
      for (const int end = group_end(job, g); k < end; k += kInputs) {
        int8x16_t codes[M];
        each<M>([&](auto m) INLINE { codes[m] = vreinterpretq_s8_u8(vld1q_u8(x[m] + k)); });
        each<kBlocks>([&](auto b) INLINE {
          uint8x16_t block[Q];
          each<Q>([&](auto q) INLINE { block[q] = vld1q_u8(words + 16 * q); });
          words += kBlock;
          each<kPlanes>([&](auto p) INLINE {
            each<Q>([&](auto q) INLINE {
              const int8x16_t w = plane<BITS, p>(block[q]);
              each<M>([&](auto m) INLINE {
                sum[m][q] = dot<b * kPlanes + p>(sum[m][q], w, codes[m]);
              });
            });
          });
        });
      }
      each<Q>([&](auto q) INLINE {
        const float32x4_t scale = scale_of(job, tile, g, first + q);
        for (int m = 0; m < M && row + m < job.rows; ++m) {
          const int32_t shift =
              offset * job.row_sums[static_cast<ptrdiff_t>(row + m) * job.groups + g];
          const int32x4_t value = vmlaq_n_s32(vdupq_n_s32(shift), sum[m][q], job.multiplier);
          total[m][q] = vfmaq_f32(total[m][q], vcvtq_f32_s32(value), scale);
        }
      });
    }
    for (int m = 0; m < M && row + m < job.rows; ++m)
      for (int q = 0; q < Q; ++q)
        store(job, row + m, tile, first + q,
              vfmaq_n_f32(bias_of(job, tile, first + q), total[m][q], job.row_scale[row + m]));
  }
}

template <int BITS>
void all_integer(const Job& job) {
  all_tiles(job, [&](auto m, int tile, int row) { tile_integer<BITS, m>(job, tile, row); });
}

void multiply_integer(const Job& job) {
  with_code_bits(job.bits, [&](auto bits) { all_integer<bits>(job); });
}

#undef INLINE

}  // namespace

const Kernel QVLA_KERNEL = {
    QVLA_KERNEL_NAME, float_bytes,    integer_bytes,    prepare_float,
    prepare_integer,  multiply_float, multiply_integer, basic::attend,
};

}  // namespace qvla
