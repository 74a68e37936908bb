// Attention against plain loops in double precision.
#include <cmath>
#include <cstdio>

#include "random.h"

namespace qvla {
namespace {

// Numbers in float32 or bfloat16, and what they are in float32.
struct Operand {
  Operand(Random& random, size_t size, float spread)
      : bfloat16(uniform(random, 0, 1)), values(size), wide(bfloat16 ? 0 : size, 4),
        half(bfloat16 ? size : 0, 2) {
    std::normal_distribution<float> normal(0, spread);
    for (size_t i = 0; i < size; ++i) {
      const float value = normal(random);
      values[i] = bfloat16 ? widened(narrowed(value)) : value;
      if (bfloat16) half[i] = narrowed(value);
      else wide[i] = value;
    }
  }
  void* data() { return bfloat16 ? static_cast<void*>(half.data()) : wide.data(); }
  float now(size_t i) { return bfloat16 ? widened(half[i]) : wide[i]; }

  bool bfloat16;
  std::vector<float> values;
  Buffer<float> wide;
  Buffer<uint16_t> half;
};

}  // namespace

bool attention_agrees(const Kernel& kernel, Random& random) {
  const int d = uniform(random, 0, 1) ? uniform(random, 1, 40) : one_of(random, {64, 72, 128});
  const int t = uniform(random, 1, 60), s = uniform(random, 0, 1) ? uniform(random, 1, 40)
                                                                  : uniform(random, 60, 140);
  const int group = uniform(random, 1, 3), heads = group + uniform(random, 0, 2);
  const float spread = one_of(random, {1, 1, 5});
  Operand q(random, static_cast<size_t>(t) * heads * d, spread);
  Operand k(random, static_cast<size_t>(s) * heads * d, spread), v(random, k.values.size(), 1);
  Operand y(random, q.values.size(), 1);
  y.bfloat16 = q.bfloat16;
  y.wide = Buffer<float>(y.bfloat16 ? 0 : q.values.size(), 4);
  y.half = Buffer<uint16_t>(y.bfloat16 ? q.values.size() : 0, 2);
  const int masks = one_of(random, {0, 1, t});  // rows of the mask
  Buffer<uint8_t> mask(static_cast<size_t>(masks) * s, 1);
  const int most = one_of(random, {0, 1, 3});  // now and then no position is left
  for (int i = 0; i < masks * s; ++i) mask[i] = uniform(random, 0, most) > 0;
  const int rows = group * t;
  const int begin = uniform(random, 0, rows / kQueryRows) * kQueryRows;
  const int end = uniform(random, std::min(begin, rows), rows);
  kernel.attend({d, q.data(), k.data(), v.data(), q.bfloat16, k.bfloat16, v.bfloat16, y.data(), t, s,
                 heads * d, d, heads * d, masks ? mask.data() : nullptr, masks == 1 ? 0 : s, begin,
                 end});

  for (int row = begin; row < end; ++row) {
    const size_t at = static_cast<size_t>(row % t * heads + row / t) * d;
    std::vector<double> logits(s);
    double largest = -HUGE_VAL, total = 0;
    for (int p = 0; p < s; ++p) {
      for (int i = 0; i < d; ++i)
        logits[p] += static_cast<double>(q.values[at + i]) * k.values[static_cast<size_t>(p) * heads * d + i];
      logits[p] /= std::sqrt(static_cast<double>(d));
      if (masks && !mask[(masks == 1 ? 0 : row % t) * s + p]) logits[p] = -1e30;
      largest = std::max(largest, logits[p]);
    }
    for (double& x : logits) total += x = std::exp(x - largest);
    for (int i = 0; i < d; ++i) {
      double sum = 0;
      for (int p = 0; p < s; ++p) sum += logits[p] / total * v.values[static_cast<size_t>(p) * heads * d + i];
      const double allowed = 1e-5 * spread * spread + (y.bfloat16 ? std::ldexp(std::fabs(sum), -8) : 0);
      if (std::fabs(y.now(at + i) - sum) <= allowed) continue;
      std::printf("%s: attention of %d queries, %d positions, %d of %d heads, d %d, mask of %d rows: row %d, "
                  "number %d: %.9g, not %.9g within %.2g\n", kernel.name, t, s, group, heads, d, masks,
                  row, i, y.now(at + i), sum, allowed);
      return false;
    }
  }
  return true;
}

}  // namespace qvla
