// Attention in the widest vectors of the target; compiled for several (QVLA_PATH names the namespace).
//
// Keys and values of a head are copied once into panels: columns of two vectors (the last may have one),
// row after row, as `product` reads them. Then blocks of queries follow one another: their logits, all of
// them, stay in the caches, so the softmax is the plain one. All is computed in float32.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"

namespace qvla {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 12;  // numbers of a vector; queries whose sums fit the registers
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 6;
#elif defined(__aarch64__)
constexpr int kWidth = 4, kRows = 12;
#else
constexpr int kWidth = 4, kRows = 6;
#endif
static_assert(kQueryRows % kRows == 0, "blocks of queries");
constexpr float kMasked = -1e30f;  // as models/attention.py has it: a row of these alone gives numbers

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(Vector value, float* to) { std::memcpy(to, &value, sizeof value); }

inline int rounded_up(int n) { return (n + kWidth - 1) / kWidth * kWidth; }

// 2^x of x <= 0, 0 where it would be subnormal; NaN stays NaN.
inline Vector exp2(Vector x) {
  const Vector bounded = x < -126.0f ? Vector{} - 126.0f : x;
  const Vector shifted = bounded + 0x1.8p23f;  // the nearest integer, in the low bits
  const Vector rest = bounded - (shifted - 0x1.8p23f);
  // Interpolated from -1/2 to 1/2, within 2e-8.
  Vector sum = Vector{} + 0x1.446c7ep-13f;
  sum = sum * rest + 0x1.5f48c8p-10f;
  sum = sum * rest + 0x1.3b29d8p-7f;
  sum = sum * rest + 0x1.c6aeccp-5f;
  sum = sum * rest + 0x1.ebfbe0p-3f;
  sum = sum * rest + 0x1.62e430p-1f;
  sum = sum * rest + 1.0f;
  const Integers power = ((Integers)shifted << 23) + (127 << 23);
  return x < -126.0f ? Vector{} : sum * (Vector)power;
}

// A row of N vectors out of every `count` of the panel times kRows rows of x: out[m] = sum x[m][i] w[i].
template <int N>
[[gnu::noinline]] void product(const float* x, ptrdiff_t x_stride, const float* w, int count,
                               float* out, ptrdiff_t out_stride) {
  const float* row[kRows];
  Vector sum[kRows][N];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    row[m] = x + m * x_stride;
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = Vector{};
  }
  for (int i = 0; i < count; ++i, w += N * kWidth) {
    Vector column[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) column[n] = load(w + n * kWidth);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += column[n] * row[m][i];
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(sum[m][n], out + m * out_stride + n * kWidth);
}

// kRows rows of x [count] times a panel [count][width].
void products(const float* x, ptrdiff_t x_stride, const float* panel, int count, int width,
              float* out, ptrdiff_t out_stride) {
  int at = 0;
  for (; at + 2 * kWidth <= width; at += 2 * kWidth)
    product<2>(x, x_stride, panel + static_cast<ptrdiff_t>(at) * count, count, out + at, out_stride);
  if (at < width)
    product<1>(x, x_stride, panel + static_cast<ptrdiff_t>(at) * count, count, out + at, out_stride);
}

// Where a panel [count][width] has number `column` of row 0; row after row follows in steps of `step`.
struct Column {
  float* at;
  ptrdiff_t step;

  Column(float* panel, int count, int width, int column) {
    const int begin = column / (2 * kWidth) * 2 * kWidth;
    step = begin + 2 * kWidth <= width ? 2 * kWidth : kWidth;
    at = panel + static_cast<ptrdiff_t>(begin) * count + (column - begin);
  }
};

inline float number(const float* x, ptrdiff_t i) { return x[i]; }
inline float number(const uint16_t* x, ptrdiff_t i) { return to_float(x[i]); }

template <class T>
void pack_keys(const Positions& part, int head_dim, int first, int width, float* panel) {
  const T* const k = static_cast<const T*>(part.k);
  for (int p = 0; p < rounded_up(part.count); ++p) {
    const Column to(panel, head_dim, width, first + p);
    const T* const from = k + p * part.k_position;
    if (p < part.count)
      for (int i = 0; i < head_dim; ++i) to.at[i * to.step] = number(from, i * part.k_number);
    else
      for (int i = 0; i < head_dim; ++i) to.at[i * to.step] = 0;
  }
}

template <class T>
void pack_values(const Positions& part, int head_dim, int first, int count, float* panel) {
  const T* const v = static_cast<const T*>(part.v);
  const int width = rounded_up(head_dim);
  for (int begin = 0; begin < width; begin += kWidth) {
    const Column to(panel, count, width, begin);
    const int filled = std::min(kWidth, head_dim - begin);
    for (int p = 0; p < rounded_up(part.count); ++p) {
      float* const out = to.at + (first + p) * to.step;
      Vector lanes = {};
      if (p < part.count) {
        const T* const from = v + p * part.v_position + begin;
        if (filled == kWidth)
          for (int j = 0; j < kWidth; ++j) lanes[j] = number(from, j);
        else
          for (int j = 0; j < filled; ++j) lanes[j] = number(from, j);
      }
      store(lanes, out);
    }
  }
}

// Logits of query i, in units of log 2 -> weights; the inverse of their sum.
float soften(const Attention& job, int query, int positions, float* logits) {
  float* at = logits;
  for (int p = 0; p < job.num_parts; ++p) {
    const Positions& part = job.parts[p];
    if (part.mask) {
      const uint8_t* const mask = part.mask + query * part.mask_query;
      for (int i = 0; i < part.count; ++i) at[i] = mask[i] ? at[i] : kMasked;
    }
    const int end = rounded_up(part.count);
    for (int i = part.count; i < end; ++i) at[i] = -std::numeric_limits<float>::infinity();
    at += end;
  }
  Vector most = load(logits);
  for (int i = kWidth; i < positions; i += kWidth) {
    const Vector x = load(logits + i);
    most = x > most ? x : most;
  }
  float largest = most[0];
  for (int j = 1; j < kWidth; ++j) largest = std::max(largest, most[j]);
  Vector sum = {};
  for (int i = 0; i < positions; i += kWidth) {
    const Vector weight = exp2(load(logits + i) - largest);
    sum += weight;
    store(weight, logits + i);
  }
  float total = 0;
  for (int j = 0; j < kWidth; ++j) total += sum[j];
  return 1 / total;
}

template <class T>
void read_queries(const Attention& job, int row, int count, float scale, float* out) {
  for (int m = 0; m < kRows; ++m, out += job.head_dim) {
    const int r = row + m;
    const T* const q = static_cast<const T*>(job.q) + r / job.queries * job.q_head +
                       r % job.queries * job.q_query;
    for (int i = 0; i < job.head_dim; ++i) out[i] = m < count ? number(q, i) * scale : 0;
  }
}

void write_row(const Attention& job, int row, const float* sums, float factor) {
  const ptrdiff_t at = row / job.queries * job.y_head + row % job.queries * job.y_query;
  if (job.bfloat16) {
    uint16_t* const y = static_cast<uint16_t*>(job.y) + at;
    for (int i = 0; i < job.head_dim; ++i) y[i] = to_bfloat16(sums[i] * factor);
  } else {
    float* const y = static_cast<float*>(job.y) + at;
    for (int i = 0; i < job.head_dim; ++i) y[i] = sums[i] * factor;
  }
}

}  // namespace

namespace QVLA_PATH {

void attend(const Attention& job) {
  const int d = job.head_dim, width = rounded_up(d);
  int positions = 0;
  for (int p = 0; p < job.num_parts; ++p) positions += rounded_up(job.parts[p].count);
  const auto memory = [](int use, size_t numbers) {
    return reinterpret_cast<float*>(scratch(use, numbers * sizeof(float)));
  };
  float* const keys = memory(0, static_cast<size_t>(positions) * d);
  float* const values = memory(1, static_cast<size_t>(positions) * width);
  for (int p = 0, first = 0; p < job.num_parts; ++p) {
    const Positions& part = job.parts[p];
    part.k_bfloat16 ? pack_keys<uint16_t>(part, d, first, positions, keys)
                    : pack_keys<float>(part, d, first, positions, keys);
    part.v_bfloat16 ? pack_values<uint16_t>(part, d, first, positions, values)
                    : pack_values<float>(part, d, first, positions, values);
    first += rounded_up(part.count);
  }
  // A cache line more, so that rows do not compete for one set of the first-level cache.
  const ptrdiff_t stride = positions + kLanes;
  float* const logits = memory(2, kRows * (stride + d + width));
  float* const queries = logits + kRows * stride;
  float* const sums = queries + kRows * d;
  const float scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(d)));
  for (int row = job.begin; row < job.end; row += kRows) {
    const int count = std::min(kRows, job.end - row);
    job.bfloat16 ? read_queries<uint16_t>(job, row, count, scale, queries)
                 : read_queries<float>(job, row, count, scale, queries);
    products(queries, d, keys, d, positions, logits, stride);
    float factors[kRows];
    for (int m = 0; m < count; ++m)
      factors[m] = soften(job, (row + m) % job.queries, positions, logits + m * stride);
    products(logits, stride, values, positions, width, sums, width);
    for (int m = 0; m < count; ++m) write_row(job, row + m, sums + m * width, factors[m]);
  }
}

}  // namespace QVLA_PATH
}  // namespace qvla
