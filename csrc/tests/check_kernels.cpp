// Every kernel that this processor runs against plain loops in double precision, over random shapes.
//
//    check_kernels [CASES [SEED [NAME]]]
//
// It needs neither XLA nor Python, so that it runs where they do not: cross-compiled, in an emulator.
// Tiles are filled as kernel.h describes them, in buffers of just the size that the product may touch,
// which begin off the alignment of vectors. CASES are tried for each kernel, NAME alone if it is given; a
// quarter of them are of attention.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "random.h"

namespace qvla {
namespace {

// Nearest bfloat16 number, ties to even, by the distance to both neighbours.
float nearest_half(float value) {
  const uint16_t low = narrowed(value);
  if (!std::isfinite(value)) return value;
  const double below = std::fabs(static_cast<double>(value) - widened(low));
  const double above = std::fabs(static_cast<double>(widened(low + 1)) - value);
  return widened(below < above || (below == above && low % 2 == 0) ? low : low + 1);
}

struct Case {
  int bits, multiplier, offset;
  int tiles, rows, k, group, activation_bits;  // group 0: none
  bool x_bfloat16, y_bfloat16;
  int kind;  // of inputs: 0 normal, 1 half integers, 2 one is not finite, 3 a row of zeros

  int padded() const { return (k + kInputs - 1) / kInputs * kInputs; }
  int groups() const { return group ? (k + group - 1) / group : 1; }
  int step() const { return group ? group : padded(); }
  bool whole() const { return activation_bits == 16 || bits >= 16; }

  std::string name() const {
    char text[256];
    std::snprintf(text, sizeof text,
                  "%d bits (%d u + %d), %d tiles, %d rows, k %d, group %d, activations of %d bits "
                  "from %s, y in %s, inputs of kind %d",
                  bits, multiplier, offset, tiles, rows, k, group, activation_bits,
                  x_bfloat16 ? "bfloat16" : "float32", y_bfloat16 ? "bfloat16" : "float32", kind);
    return text;
  }
};

Case draw(Random& random) {
  Case c;
  c.bits = one_of(random, {2, 4, 8, 16, 32});
  const bool odd = c.bits == 2 && uniform(random, 0, 1);
  c.multiplier = odd ? 2 : 1;
  c.offset = odd ? -3 : c.bits >= 16 ? 0 : -(1 << (c.bits - 1));
  c.tiles = one_of(random, {0, 1, 1, 2, 3, 4, 5, 7, 9});
  c.rows = uniform(random, 0, 2) ? uniform(random, 0, 14) : one_of(random, {23, 24, 25, 40, 61, 97});
  c.k = uniform(random, 0, 1) ? uniform(random, 0, 40)
                              : one_of(random, {63, 64, 65, 127, 128, 129, 200, 300});
  c.group = one_of(random, {0, 0, 16, 32, 48, 128});
  c.activation_bits = one_of(random, {16, 8, 4});
  c.x_bfloat16 = uniform(random, 0, 1);
  c.y_bfloat16 = uniform(random, 0, 1);
  c.kind = one_of(random, {0, 0, 0, 0, 1, 2, 3});
  return c;
}

// Where a tile has the code of a lane's input: byte and bit within the tile, as kernel.h says.
void place(int bits, int lane, int i, ptrdiff_t* byte, int* bit) {
  *bit = 0;
  if (bits == 32) {
    *byte = static_cast<ptrdiff_t>(i) * kBlock + 4 * lane;
    return;
  }
  if (bits == 16) {
    const int quad = i / 4, j = i % 4;
    *byte = static_cast<ptrdiff_t>(2 * quad + (j & 1)) * kBlock + 4 * lane + (j & 2);
    return;
  }
  const int inputs = 32 / bits, within = i % inputs;
  *byte = static_cast<ptrdiff_t>(i / inputs) * kBlock + 4 * lane + within % 4;
  *bit = within / 4 * bits;
}

bool run(const Kernel& kernel, const Case& c, Random& random) {
  std::normal_distribution<float> normal;
  const int lanes = c.tiles * kLanes, k = c.k, padded = c.padded(), groups = c.groups();
  const auto fail = [&](const std::string& what) {
    std::printf("%s: %s: %s\n", kernel.name, c.name().c_str(), what.c_str());
    return false;
  };

  // Weights, and what they stand for. Codes behind k meet zeros, so anything may stand there.
  const ptrdiff_t size = tile_bytes(c.bits, padded);
  Buffer<uint8_t> words(c.tiles * size, 1);
  std::fill(words.data(), words.data() + c.tiles * size, 0);
  std::vector<double> meaning(static_cast<size_t>(lanes) * k);
  for (int lane = 0; lane < lanes; ++lane) {
    for (int i = 0; i < padded; ++i) {
      ptrdiff_t byte;
      int bit;
      place(c.bits, lane % kLanes, i, &byte, &bit);
      byte += lane / kLanes * size;
      double value;
      if (c.bits == 32) {
        const float number = normal(random);
        std::memcpy(words.data() + byte, &number, 4);
        value = number;
      } else if (c.bits == 16) {
        const uint16_t half = narrowed(normal(random));
        std::memcpy(words.data() + byte, &half, 2);
        value = widened(half);
      } else {
        const int code = uniform(random, 0, (1 << c.bits) - 1);
        words[byte] |= code << bit;
        value = c.multiplier * code + c.offset;
      }
      if (i < k) meaning[static_cast<size_t>(lane) * k + i] = value;
    }
  }
  Buffer<float> scales(static_cast<size_t>(lanes) * groups, 4), bias(lanes, 4);
  for (int i = 0; i < lanes * groups; ++i)
    scales[i] = c.bits >= 16 ? 1.0f : 0.01f + std::fabs(normal(random));
  for (int i = 0; i < lanes; ++i) bias[i] = normal(random);

  // Lanes in some order of channels, in runs now and then; some lanes have none, and channels lack.
  const int channels = lanes + uniform(random, 0, 5);
  std::vector<int32_t> order(channels);
  for (int i = 0; i < channels; ++i) order[i] = i;
  if (uniform(random, 0, 2)) std::shuffle(order.begin(), order.end(), random);
  Buffer<int32_t> index(lanes, 4);
  for (int i = 0; i < lanes; ++i) index[i] = uniform(random, 0, 15) ? order[i] : -1;

  // Inputs as they are given, and as double.
  Buffer<float> wide(static_cast<size_t>(c.rows) * k, 4);
  Buffer<uint16_t> half(static_cast<size_t>(c.rows) * k, 2);
  const float largest = c.activation_bits == 4 ? 7.0f : 127.0f;
  for (int m = 0; m < c.rows; ++m) {
    for (int i = 0; i < k; ++i) {
      const size_t at = static_cast<size_t>(m) * k + i;
      float value = normal(random);
      // With the largest number first the scale is 1, and every half is a tie.
      if (c.kind == 1) value = i ? 0.5f * uniform(random, -14, 14) : largest;
      if (c.kind == 3 && m == 0) value = 0;
      if (c.kind == 2 && m == 0 && i == k / 2)
        value = uniform(random, 0, 1) ? std::nanf("") : HUGE_VALF;
      half[at] = narrowed(value);
      wide[at] = c.x_bfloat16 ? widened(half[at]) : value;
    }
  }

  // Preparation: codes, scales and sums are exact.
  const bool split = !c.x_bfloat16 && c.activation_bits == 16;
  const size_t bytes = c.whole() ? kernel.float_bytes(padded, split) : kernel.integer_bytes(padded);
  const ptrdiff_t stride = static_cast<ptrdiff_t>((bytes + 63) / 64 * 64 + 64);
  Buffer<uint8_t> prepared((c.rows + kRowBlock) * stride, 4);
  Buffer<float> row_scale(c.rows, 4);
  Buffer<int32_t> row_sums(static_cast<size_t>(c.rows) * groups, 4);
  std::vector<double> x(static_cast<size_t>(c.rows) * k);
  for (int m = 0; m < c.rows; ++m) {
    const float* const given = wide.data() + static_cast<size_t>(m) * k;
    const void* const source = c.x_bfloat16
                                   ? static_cast<const void*>(half.data() + static_cast<size_t>(m) * k)
                                   : given;
    const Row row = {source, c.x_bfloat16, k, padded, groups, c.step()};
    if (c.whole()) {
      kernel.prepare_float(row, split, prepared.data() + m * stride);
      for (int i = 0; i < k; ++i)
        x[static_cast<size_t>(m) * k + i] = split ? given[i] : nearest_half(given[i]);
      continue;
    }
    kernel.prepare_integer(row, static_cast<int>(largest), prepared.data() + m * stride,
                           row_scale.data() + m, row_sums.data() + static_cast<size_t>(m) * groups);
    float most = 0;
    bool finite = true;
    for (int i = 0; i < k; ++i) {
      most = std::max(most, std::fabs(given[i]));
      finite = finite && std::isfinite(given[i]);
    }
    if (!finite) {
      if (!std::isnan(row_scale[m])) return fail("a row that is not finite has a scale");
      for (int i = 0; i < k; ++i) x[static_cast<size_t>(m) * k + i] = std::nan("");
      continue;
    }
    const float inverse = most == 0 ? 0.0f : largest / most;
    if (row_scale[m] != (most == 0 ? 0.0f : most / largest)) return fail("the scale of a row");
    for (int g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int i = g * c.step(); i < std::min(k, (g + 1) * c.step()); ++i) {
        const float code = std::nearbyint(given[i] * inverse);
        sum += static_cast<int32_t>(code);
        x[static_cast<size_t>(m) * k + i] = static_cast<double>(code) * row_scale[m];
      }
      if (row_sums[static_cast<size_t>(m) * groups + g] != sum) return fail("the sum of a row's codes");
    }
  }

  constexpr uint16_t kUntouched = 0x4171;  // 15.0625 in bfloat16
  const size_t outputs = static_cast<size_t>(c.rows) * channels;
  Buffer<float> y_wide(c.y_bfloat16 ? 0 : outputs, 4);
  Buffer<uint16_t> y_half(c.y_bfloat16 ? outputs : 0, 2);
  for (size_t i = 0; i < outputs; ++i)
    if (c.y_bfloat16) y_half[i] = kUntouched;
    else y_wide[i] = widened(kUntouched);
  const Job job = {words.data(), c.bits,  c.multiplier, c.offset,     c.tiles,
                   padded,       groups,  c.step(),     scales.data(), bias.data(),
                   index.data(), c.rows,  prepared.data(), stride,    split,
                   c.whole() ? nullptr : row_scale.data(),
                   c.whole() ? nullptr : row_sums.data(),
                   c.y_bfloat16 ? static_cast<void*>(y_half.data()) : y_wide.data(),
                   channels,     c.y_bfloat16};
  c.whole() ? kernel.multiply_float(job) : kernel.multiply_integer(job);

  std::vector<bool> written(outputs);
  for (int lane = 0; lane < lanes; ++lane) {
    if (index[lane] < 0) continue;
    for (int m = 0; m < c.rows; ++m) {
      double sum = bias[lane], x_length = 0, w_length = 0;
      for (int i = 0; i < k; ++i) {
        const double a = x[static_cast<size_t>(m) * k + i];
        const double w = meaning[static_cast<size_t>(lane) * k + i] *
                         scales[(lane / kLanes * groups + i / std::max(c.step(), 1)) * kLanes + lane % kLanes];
        sum += a * w;
        x_length += a * a;
        w_length += w * w;
      }
      const size_t at = static_cast<size_t>(m) * channels + index[lane];
      written[at] = true;
      const float found = c.y_bfloat16 ? widened(y_half[at]) : y_wide[at];
      if (c.kind == 2 && m == 0 && k > 0) {
        if (std::isfinite(found)) return fail("an input that is not finite does not show");
        continue;
      }
      // Errors of single roundings walk at random.
      const double allowed = 2e-5 * std::sqrt(x_length * w_length) + 1e-6 * (1 + std::fabs(bias[lane])) +
                             (c.y_bfloat16 ? std::ldexp(std::fabs(sum), -8) : 0);
      if (!(std::fabs(found - sum) <= allowed)) {
        char text[128];
        std::snprintf(text, sizeof text, "row %d, lane %d: %.9g, not %.9g within %.2g", m, lane, found,
                      sum, allowed);
        return fail(text);
      }
    }
  }
  for (size_t i = 0; i < outputs; ++i)
    if (!written[i] && (c.y_bfloat16 ? y_half[i] : narrowed(y_wide[i])) != kUntouched)
      return fail("an output that no lane has was written");
  return true;
}

}  // namespace
}  // namespace qvla

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 500;
  const unsigned seed = argc > 2 ? std::atoi(argv[2]) : 0;
  int passed = 0, failed = 0;
  for (const qvla::Kernel* kernel : qvla::runnable_kernels()) {
    if (argc > 3 && std::strcmp(argv[3], kernel->name)) continue;
    qvla::Random random(seed);
    int bad = 0;
    for (int i = 0; i < cases; ++i)
      bad += i % 4 == 3 ? !qvla::attention_agrees(*kernel, random)
                        : !qvla::run(*kernel, qvla::draw(random), random);
    std::printf("%-9s %d of %d cases agree\n", kernel->name, cases - bad, cases);
    failed += bad;
    passed += cases - bad;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}
