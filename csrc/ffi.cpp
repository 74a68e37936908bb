// The XLA custom call: checks its operands, prepares x, and shares the work over XLA's threads.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "kernel.h"
#include "parallel.h"

namespace qvla {
namespace {

struct Segment {
  int bits, multiplier, offset;
  int64_t tiles;
};

// Tiles of one segment times some rows.
struct Item {
  const Segment* segment;
  const uint8_t* words;
  int64_t tile;  // of all segments
  int tiles;
  int64_t row;
  int rows;
};

// Memory of the calling thread for prepared rows, kept from call to call.
struct Scratch {
  std::vector<uint8_t> floats, integers;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

// Bytes from row to row: whole cache lines, and not a power of two, because then all rows of a block
// would compete for one set of the first-level cache.
ptrdiff_t stride_of(size_t bytes) { return static_cast<ptrdiff_t>((bytes + 63) / 64 * 64 + 64); }

int64_t product(ffi::Span<const int64_t> dims, size_t count) {
  int64_t n = 1;
  for (size_t i = 0; i < count; ++i) n *= dims[i];
  return n;
}

ffi::Error invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("qvla_matmul: " + what);
}

// Whether a channel is named that is not there. Every call asks, so all at once, in vectors.
bool outside(const int32_t* index, int64_t count, int64_t channels) {
  int32_t least = 0, most = -1;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, index[i]);
    most = std::max(most, index[i]);
  }
  return least < -1 || most >= channels;
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> words,
                  ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> bias,
                  ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::S32> pruned,
                  ffi::Buffer<ffi::F32> pruned_bias, ffi::Result<ffi::AnyBuffer> y,
                  ffi::Span<const int64_t> segments, int64_t group, int64_t activation_bits,
                  int64_t max_threads) {
  const auto x_dims = x.dimensions(), y_dims = y->dimensions();
  if (x_dims.size() < 1 || y_dims.size() != x_dims.size()) return invalid("ranks differ");
  const int64_t k = x_dims.back(), channels = y_dims.back();
  const int64_t rows = product(x_dims, x_dims.size() - 1);
  if (rows != product(y_dims, y_dims.size() - 1)) return invalid("x and y have other rows");
  const bool x_half = x.element_type() == ffi::BF16, y_half = y->element_type() == ffi::BF16;
  if ((!x_half && x.element_type() != ffi::F32) || (!y_half && y->element_type() != ffi::F32))
    return invalid("x and y must be float32 or bfloat16");
  if (activation_bits != 16 && activation_bits != 8 && activation_bits != 4)
    return invalid("activation_bits");
  const int64_t padded = (k + kInputs - 1) / kInputs * kInputs;
  if (group < 0 || group % kInputs) return invalid("group");
  const int64_t groups = group ? (k + group - 1) / group : 1;

  std::vector<Segment> parts;
  int64_t tiles = 0, bytes = 0;
  bool exact = activation_bits == 16, integers = false;
  if (segments.size() % 4) return invalid("segments");
  for (size_t i = 0; i < segments.size(); i += 4) {
    const int64_t bits = segments[i];
    if ((bits != 2 && bits != 4 && bits != 8 && bits != 16 && bits != 32) || segments[i + 3] < 1)
      return invalid("segments");
    parts.push_back({static_cast<int>(bits), static_cast<int>(segments[i + 1]),
                     static_cast<int>(segments[i + 2]), segments[i + 3]});
    tiles += segments[i + 3];
    bytes += segments[i + 3] * tile_bytes(static_cast<int>(bits), static_cast<int>(padded));
    (bits >= 16 || activation_bits == 16 ? exact : integers) = true;
  }
  const auto count = [](const auto& buffer) { return static_cast<int64_t>(buffer.element_count()); };
  if (count(words) != bytes || count(scales) != tiles * groups * kLanes ||
      count(bias) != tiles * kLanes || count(index) != tiles * kLanes ||
      count(pruned) != count(pruned_bias))
    return invalid("the arrays do not fit the segments; batched weights are not supported");
  const int32_t* const indices = index.typed_data();
  if (outside(indices, count(index), channels) ||
      outside(pruned.typed_data(), count(pruned), channels))
    return invalid("the index names a channel that is not there");
  if (!rows) return ffi::Error::Success();

  const Kernel& kernel = chosen_kernel();
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (max_threads > 0) threads = std::min(threads, max_threads);

  thread_local Scratch memory;
  Scratch& scratch = memory;
  // Beside rounded inputs, rows of 16 bits meet x in bfloat16.
  const bool split = !x_half && activation_bits == 16;
  const ptrdiff_t float_stride = stride_of(kernel.float_bytes(padded, split));
  const ptrdiff_t integer_stride = stride_of(kernel.integer_bytes(padded));
  const auto reserve = [](auto& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  };
  if (exact) reserve(scratch.floats, (rows + kRowBlock) * float_stride);
  if (integers) {
    reserve(scratch.integers, (rows + kRowBlock) * integer_stride);
    reserve(scratch.scales, rows);
    reserve(scratch.sums, rows * groups);
  }
  const uint8_t* const given = static_cast<const uint8_t*>(x.untyped_data());
  const int qmax = activation_bits == 4 ? 7 : 127;
  // Few rows are prepared by one thread.
  const int64_t part_rows = rows >= 64 ? 16 : rows;
  const auto prepare = [&](int64_t i) {
    for (int64_t m = i * part_rows; m < std::min(rows, (i + 1) * part_rows); ++m) {
      const Row row = {given + m * k * (x_half ? 2 : 4), x_half, static_cast<int>(k),
                       static_cast<int>(padded), static_cast<int>(groups),
                       static_cast<int>(group ? group : padded)};
      if (exact) kernel.prepare_float(row, split, scratch.floats.data() + m * float_stride);
      if (integers)
        kernel.prepare_integer(row, qmax, scratch.integers.data() + m * integer_stride,
                               scratch.scales.data() + m, scratch.sums.data() + m * groups);
    }
  };

  // Decoding: long streams of tiles. Prefill: blocks of rows that stay in the second-level cache, and
  // in small layers as many blocks as threads.
  const bool many = rows >= kPanelRows;
  int64_t block = many ? (activation_bits == 16 ? 96 : 192) : rows;
  const auto blocks = [&] { return (rows + block - 1) / block; };
  if (many && blocks() < threads && blocks() * tiles < 32 * threads)
    block = (std::max<int64_t>(rows / threads, 1) + kPanelRows - 1) / kPanelRows * kPanelRows;
  int64_t many_tiles = 16;  // of an item of many rows
  while (many_tiles > 4 && blocks() * tiles < 2 * threads * many_tiles) many_tiles /= 2;
  std::vector<int64_t> starts = {0};
  while (rows - starts.back() - block >= kPanelRows)  // no thin rest
    starts.push_back(starts.back() + block);
  const auto end_of = [&](size_t i) { return i + 1 < starts.size() ? starts[i + 1] : rows; };
  std::vector<Item> items;
  // Items that follow one another have rows of their own: two threads would take turns in writing to the
  // cache lines of a row, where channels of several segments lie.
  for (size_t begin = 0; begin < starts.size(); begin += threads) {
    const size_t end = std::min(begin + static_cast<size_t>(threads), starts.size());
    const uint8_t* at = words.typed_data();
    int64_t first = 0;
    for (const Segment& part : parts) {
      const int64_t share = (part.tiles / (4 * threads) + 3) / 4 * 4;
      const int64_t run = many ? many_tiles : std::min<int64_t>(64, std::max<int64_t>(8, share));
      const ptrdiff_t size = tile_bytes(part.bits, static_cast<int>(padded));
      for (int64_t tile = 0; tile < part.tiles; tile += run)
        for (size_t i = begin; i < end; ++i)
          items.push_back({&part, at + tile * size, first + tile,
                           static_cast<int>(std::min(run, part.tiles - tile)), starts[i],
                           static_cast<int>(end_of(i) - starts[i])});
      at += part.tiles * size;
      first += part.tiles;
    }
  }
  uint8_t* const out = static_cast<uint8_t*>(y->untyped_data());
  const int64_t element = y_half ? 2 : 4;
  const auto multiply = [&](int64_t i) {
    const Item& item = items[i];
    const bool whole = activation_bits == 16 || item.segment->bits >= 16;
    Job job;
    job.words = item.words;
    job.bits = item.segment->bits;
    job.multiplier = item.segment->multiplier;
    job.offset = item.segment->offset;
    job.tiles = item.tiles;
    job.k = static_cast<int>(padded);
    job.groups = static_cast<int>(groups);
    job.group = static_cast<int>(group ? group : padded);
    job.scales = scales.typed_data() + item.tile * groups * kLanes;
    job.bias = bias.typed_data() + item.tile * kLanes;
    job.index = indices + item.tile * kLanes;
    job.rows = item.rows;
    job.stride = whole ? float_stride : integer_stride;
    job.x = (whole ? scratch.floats.data() : scratch.integers.data()) + item.row * job.stride;
    job.split = split;
    job.row_scale = whole ? nullptr : scratch.scales.data() + item.row;
    job.row_sums = whole ? nullptr : scratch.sums.data() + item.row * groups;
    job.y = out + item.row * channels * element;
    job.y_stride = channels;
    job.y_bfloat16 = y_half;
    whole ? kernel.multiply_float(job) : kernel.multiply_integer(job);
  };
  parallel(pool, threads, (rows + part_rows - 1) / part_rows, prepare,
           static_cast<int64_t>(items.size()), multiply);

  // Outputs of pruned channels are their biases.
  const int32_t* const gone = pruned.typed_data();
  for (int64_t i = 0; i < count(pruned); ++i) {
    const float value = pruned_bias.typed_data()[i];
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint16_t half = static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t at = m * channels + gone[i];
      if (y_half) reinterpret_cast<uint16_t*>(out)[at] = half;
      else reinterpret_cast<float*>(out)[at] = value;
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qvla

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(qvla_matmul, qvla::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("segments")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("activation_bits")
                                  .Attr<int64_t>("max_threads"));

extern "C" const char* qvla_kernel_name() { return qvla::chosen_kernel().name; }

#pragma GCC visibility pop
