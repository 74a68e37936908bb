// Attention in the widest vectors of the target; compiled for several (QVLA_PATH names the namespace).
//
// Keys and values of a head are copied once into panels: columns of two vectors (the last may have one),
// row after row, as `product` reads them. Then come blocks of queries. All logits of a block stay in the
// caches, so the softmax is the plain one. Numbers are float32, whatever operands are.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"

namespace qvla {
namespace {

// Queries whose sums fit the registers, of which 64-bit ARM has as many as AVX-512.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
static_assert(kQueryRows % kRows == 0, "blocks of queries");
constexpr float kMasked = -1e30f;  // as models/attention.py has it: a row of these alone gives numbers

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(Floats value, float* to) { std::memcpy(to, &value, sizeof value); }

inline int rounded_up(int n) { return (n + kVector - 1) / kVector * kVector; }

// 2^x of x <= 0, 0 where it would be subnormal; NaN stays NaN.
inline Floats exp2(Floats x) {
  const Floats bounded = x < -126.0f ? Floats{} - 126.0f : x;
  const Floats shifted = bounded + 0x1.8p23f;  // the nearest integer, in the low bits
  const Floats rest = bounded - (shifted - 0x1.8p23f);
  // Interpolated from -1/2 to 1/2, within 2e-8.
  Floats sum = Floats{} + 0x1.446c7ep-13f;
  sum = sum * rest + 0x1.5f48c8p-10f;
  sum = sum * rest + 0x1.3b29d8p-7f;
  sum = sum * rest + 0x1.c6aeccp-5f;
  sum = sum * rest + 0x1.ebfbe0p-3f;
  sum = sum * rest + 0x1.62e430p-1f;
  sum = sum * rest + 1.0f;
  const Ints power = ((Ints)shifted << 23) + (127 << 23);
  return x < -126.0f ? Floats{} : sum * (Floats)power;
}

// kRows rows of x times a column of N vectors, [count][N]: out[m] = the sum of x[m][i] w[i].
template <int N>
[[gnu::noinline]] void product(const float* x, ptrdiff_t x_stride, const float* w, int count,
                               float* out, ptrdiff_t out_stride) {
  const float* row[kRows];
  Floats sum[kRows][N];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    row[m] = x + m * x_stride;
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = Floats{};
  }
  for (int i = 0; i < count; ++i, w += N * kVector) {
    Floats column[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) column[n] = load(w + n * kVector);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += column[n] * row[m][i];
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(sum[m][n], out + m * out_stride + n * kVector);
}

// kRows rows of x [count] times a panel [count][width].
void products(const float* x, ptrdiff_t x_stride, const float* panel, int count, int width,
              float* out, ptrdiff_t out_stride) {
  int at = 0;
  for (; at + 2 * kVector <= width; at += 2 * kVector)
    product<2>(x, x_stride, panel + static_cast<ptrdiff_t>(at) * count, count, out + at, out_stride);
  if (at < width)
    product<1>(x, x_stride, panel + static_cast<ptrdiff_t>(at) * count, count, out + at, out_stride);
}

// Where a panel [count][width] has number `column` of row 0; row after row follows in steps of `step`.
struct Column {
  float* at;
  ptrdiff_t step;

  Column(float* panel, int count, int width, int column) {
    const int begin = column / (2 * kVector) * 2 * kVector;
    step = begin + 2 * kVector <= width ? 2 * kVector : kVector;
    at = panel + static_cast<ptrdiff_t>(begin) * count + (column - begin);
  }
};

inline float number(const float* x, ptrdiff_t i) { return x[i]; }
inline float number(const uint16_t* x, ptrdiff_t i) { return to_float(x[i]); }

template <class T>
void pack_keys(const Attention& job, float* panel) {
  const T* k = static_cast<const T*>(job.k);
  const int d = job.head_dim, width = rounded_up(job.positions);
  for (int p = 0; p < width; ++p, k += job.position_stride) {
    const Column to(panel, d, width, p);
    for (int i = 0; i < d; ++i) to.at[i * to.step] = p < job.positions ? number(k, i) : 0;
  }
}

template <class T>
void pack_values(const Attention& job, float* panel) {
  const int d = job.head_dim, count = job.positions, width = rounded_up(d);
  for (int begin = 0; begin < width; begin += kVector) {
    const Column to(panel, count, width, begin);
    const T* v = static_cast<const T*>(job.v) + begin;
    for (int p = 0; p < count; ++p, v += job.position_stride) {
      Floats numbers = {};
      if (begin + kVector <= d)
        for (int j = 0; j < kVector; ++j) numbers[j] = number(v, j);
      else
        for (int j = 0; begin + j < d; ++j) numbers[j] = number(v, j);
      store(numbers, to.at + p * to.step);
    }
  }
}

// Logits of a query, in units of log 2 -> weights; the inverse of their sum.
float soften(const Attention& job, int query, float* logits) {
  const int width = rounded_up(job.positions);
  if (job.mask) {
    const uint8_t* const mask = job.mask + query * job.mask_stride;
    for (int i = 0; i < job.positions; ++i) logits[i] = mask[i] ? logits[i] : kMasked;
  }
  for (int i = job.positions; i < width; ++i) logits[i] = -std::numeric_limits<float>::infinity();
  Floats most = load(logits);
  for (int i = kVector; i < width; i += kVector) {
    const Floats x = load(logits + i);
    most = x > most ? x : most;
  }
  float largest = most[0];
  for (int j = 1; j < kVector; ++j) largest = std::max(largest, most[j]);
  Floats sum = {};
  for (int i = 0; i < width; i += kVector) {
    const Floats weight = exp2(load(logits + i) - largest);
    sum += weight;
    store(weight, logits + i);
  }
  float total = 0;
  for (int j = 0; j < kVector; ++j) total += sum[j];
  return 1 / total;
}

// Where a row of q or y begins.
inline ptrdiff_t place_of(const Attention& job, int row) {
  return row / job.queries * job.head_stride + row % job.queries * job.query_stride;
}

// kRows rows, the last ones zeros if there are only `count`.
template <class T>
void read_queries(const Attention& job, int row, int count, float* out) {
  const int d = job.head_dim;
  const float scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(d)));
  for (int m = 0; m < kRows; ++m, out += d) {
    const T* const q = static_cast<const T*>(job.q) + (m < count ? place_of(job, row + m) : 0);
    for (int i = 0; i < d; ++i) out[i] = m < count ? number(q, i) * scale : 0;
  }
}

void write_row(const Attention& job, int row, const float* sums, float factor) {
  const ptrdiff_t at = place_of(job, row);
  if (job.q_bfloat16) {
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
  const int d = job.head_dim, width = rounded_up(d), count = job.positions;
  const auto memory = [](int use, size_t numbers) {
    return reinterpret_cast<float*>(scratch(use, numbers * sizeof(float)));
  };
  float* const keys = memory(0, static_cast<size_t>(rounded_up(count)) * d);
  float* const values = memory(1, static_cast<size_t>(count) * width);
  job.k_bfloat16 ? pack_keys<uint16_t>(job, keys) : pack_keys<float>(job, keys);
  job.v_bfloat16 ? pack_values<uint16_t>(job, values) : pack_values<float>(job, values);
  // A cache line more, so that rows do not compete for one set of the first-level cache.
  const ptrdiff_t stride = rounded_up(count) + kLanes;
  float* const logits = memory(2, kRows * (stride + d + width));
  float* const queries = logits + kRows * stride;
  float* const sums = queries + kRows * d;
  for (int row = job.begin; row < job.end; row += kRows) {
    const int rows = std::min(kRows, job.end - row);
    job.q_bfloat16 ? read_queries<uint16_t>(job, row, rows, queries)
                   : read_queries<float>(job, row, rows, queries);
    products(queries, d, keys, d, rounded_up(count), logits, stride);
    float factors[kRows];
    for (int m = 0; m < rows; ++m)
      factors[m] = soften(job, (row + m) % job.queries, logits + m * stride);
    products(logits, stride, values, count, width, sums, width);
    for (int m = 0; m < rows; ++m) write_row(job, row + m, sums + m * width, factors[m]);
  }
}

}  // namespace QVLA_PATH
}  // namespace qvla
