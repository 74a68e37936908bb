// Preparing rows of x, in the widest vectors that the target has: the compiler takes wider ones apart, for
// some operations number by number.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernel.h"

namespace qvla {
namespace {  // compiled once for every instruction set

#if defined(__AVX512F__)
constexpr int kVector = 16;  // numbers of a vector
#elif defined(__AVX2__)
constexpr int kVector = 8;
#else
constexpr int kVector = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kVector)));
typedef int32_t Ints __attribute__((vector_size(4 * kVector)));
typedef uint32_t Words __attribute__((vector_size(4 * kVector)));
typedef uint16_t Halves __attribute__((vector_size(2 * kVector)));

inline float to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// Nearest bfloat16, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((word >> 16) | 0x40);
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
}

// Inputs from i on, zeros behind the row's end.
inline Floats load(const Row& row, int i) {
  Floats out = {};
  if (i + kVector <= row.k) {
    if (row.bfloat16) {
      Halves half;
      std::memcpy(&half, static_cast<const uint16_t*>(row.x) + i, sizeof half);
      const Words word = __builtin_convertvector(half, Words) << 16;
      std::memcpy(&out, &word, sizeof out);
    } else {
      std::memcpy(&out, static_cast<const float*>(row.x) + i, sizeof out);
    }
    return out;
  }
  for (int j = 0; i + j < row.k; ++j)
    out[j] = row.bfloat16 ? to_float(static_cast<const uint16_t*>(row.x)[i + j])
                          : static_cast<const float*>(row.x)[i + j];
  return out;
}

// Nearest bfloat16 numbers, as `to_bfloat16` has them, in the upper halves of the words.
inline Words rounded(Floats value) {
  Words word;
  std::memcpy(&word, &value, sizeof word);
  const Words near = (word + 0x7fffu + ((word >> 16) & 1)) & 0xffff0000u;
  return value != value ? (word & 0xffff0000u) | 0x400000u : near;
}

// Nearest integers, ties to even. Not by adding a large number: the compiler may fuse that addition
// with the product before it, and a product that was not rounded breaks ties in another way.
inline Ints nearest(Floats value) {
  Ints out;
#if defined(__AVX512F__)
  __m512 v;
  std::memcpy(&v, &value, sizeof v);
  const __m512i codes = _mm512_cvtps_epi32(v);
  std::memcpy(&out, &codes, sizeof out);
#elif defined(__AVX2__)
  __m256 v;
  std::memcpy(&v, &value, sizeof v);
  const __m256i codes = _mm256_cvtps_epi32(v);
  std::memcpy(&out, &codes, sizeof out);
#elif defined(__SSE2__)
  __m128 v;
  std::memcpy(&v, &value, sizeof v);
  const __m128i codes = _mm_cvtps_epi32(v);
  std::memcpy(&out, &codes, sizeof out);
#else
  for (int i = 0; i < kVector; ++i) out[i] = static_cast<int32_t>(std::nearbyint(value[i]));
#endif
  return out;
}

// Behind the last input of group g.
inline int group_end(const Job& job, int g) {
  return g + 1 == job.groups ? job.k : (g + 1) * job.group;
}

// Writes N results, those of the lanes from `first` on, to their output channels.
template <int N, class Values>
inline void store_lanes(const Job& job, int row, int first, const Values& values) {
  for (int i = 0; i < N; ++i) {
    const int32_t channel = job.index[first + i];
    if (channel < 0) continue;
    const ptrdiff_t at = row * job.y_stride + channel;
    if (job.y_bfloat16) static_cast<uint16_t*>(job.y)[at] = to_bfloat16(values[i]);
    else static_cast<float*>(job.y)[at] = values[i];
  }
}

// Calls `product` with the bits of the codes, 2, 4 or 8, as a constant.
template <class Product>
inline void with_code_bits(int bits, const Product& product) {
  switch (bits) {
    case 2: return product(std::integral_constant<int, 2>{});
    case 4: return product(std::integral_constant<int, 4>{});
    case 8: return product(std::integral_constant<int, 8>{});
  }
}

// The activation quantizer of kernels/activations.py: 16 codes at a time go to `put`, in vectors.
template <class Put>
inline void quantize_row(const Row& row, int qmax, float* scale, int32_t* sums, const Put& put) {
  Floats most = {}, check = {};
  for (int i = 0; i < row.padded; i += kVector) {
    const Floats x = load(row, i);
    const Floats size = x < 0 ? -x : x;
    most = size > most ? size : most;
    check += x * 0.0f;  // NaN as soon as one input is not finite
  }
  float largest = 0, finite = 0;
  for (int j = 0; j < kVector; ++j) {
    largest = largest < most[j] ? most[j] : largest;
    finite += check[j];  // and so NaN, which differs from 0
  }
  const bool zero = largest < 0x1p-100f;
  const float top = static_cast<float>(qmax), inverse = zero ? 0.0f : top / largest;
  *scale = finite != 0 ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : largest / top;
  for (int g = 0; g < row.groups; ++g) {
    const int begin = g * row.group;
    const int end = g + 1 == row.groups ? row.padded : begin + row.group;
    Ints sum = {};
    for (int i = begin; i < end; i += kLanes) {
      Ints codes[kLanes / kVector];
#pragma GCC unroll 4
      for (int part = 0; part < kLanes / kVector; ++part) {
        Floats q = load(row, i + part * kVector) * inverse;
        // So that NaN gets a code in range, too: its row has the scale NaN.
        q = q < top ? q : Floats{} + top;
        q = q > -top ? q : Floats{} - top;
        codes[part] = nearest(q);
        sum += codes[part];
      }
      put(i, codes);
    }
    int32_t total = 0;
    for (int j = 0; j < kVector; ++j) total += sum[j];
    sums[g] = total;
  }
}

}  // namespace
}  // namespace qvla
