// The XLA custom call of attention: checks its operands, and shares heads and queries over XLA's threads.
#include <algorithm>
#include <string>
#include <vector>

#include "kernel.h"
#include "parallel.h"

namespace qvla {
namespace {

ffi::Error refused(const std::string& what) {
  return ffi::Error::InvalidArgument("qvla_attention: " + what);
}

bool is_float(ffi::DataType type) { return type == ffi::F32 || type == ffi::BF16; }

const uint8_t* at(const ffi::AnyBuffer& x, ptrdiff_t element) {
  return static_cast<const uint8_t*>(x.untyped_data()) +
         element * (x.element_type() == ffi::F32 ? 4 : 2);
}

// q [b, t, n, d], then for each part k [b, s, m, d], v [b, s, m, d] and, where `masked` says so, a mask
// [b or 1, 1, t or 1, s] -> y as q.
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::RemainingArgs rest,
                     ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int64_t> masked,
                     int64_t max_threads) {
  const auto shape = q.dimensions();
  if (shape.size() != 4 || !is_float(q.element_type()) || y->element_type() != q.element_type() ||
      y->element_count() != q.element_count())
    return refused("q");
  const int64_t b = shape[0], t = shape[1], n = shape[2], d = shape[3];
  struct Part {
    ffi::AnyBuffer k, v;
    const uint8_t* mask;
    int64_t count, mask_batch, mask_query;  // strides, 0 for an axis of one
  };
  std::vector<Part> parts;
  int64_t m = 0, positions = 0;
  size_t next = 0;
  for (const int64_t has_mask : masked) {
    const auto k = rest.get<ffi::AnyBuffer>(next), v = rest.get<ffi::AnyBuffer>(next + 1);
    next += 2;
    if (!k.has_value() || !v.has_value()) return refused("operands are missing");
    const auto dims = k->dimensions(), others = v->dimensions();
    if (dims.size() != 4 || !std::equal(dims.begin(), dims.end(), others.begin(), others.end()) ||
        dims[0] != b || dims[3] != d ||
        !is_float(k->element_type()) || !is_float(v->element_type()) || (m && dims[2] != m))
      return refused("k and v");
    m = dims[2];
    Part part = {*k, *v, nullptr, dims[1], 0, 0};
    if (has_mask) {
      const auto mask = rest.get<ffi::AnyBuffer>(next++);
      if (!mask.has_value() || mask->element_type() != ffi::PRED) return refused("mask");
      const auto size = mask->dimensions();
      if (size.size() != 4 || (size[0] != b && size[0] != 1) || size[1] != 1 ||
          (size[2] != t && size[2] != 1) || size[3] != part.count)
        return refused("mask");
      part.mask = static_cast<const uint8_t*>(mask->untyped_data());
      part.mask_query = size[2] == 1 ? 0 : part.count;
      part.mask_batch = size[0] == 1 ? 0 : size[2] * part.count;
    }
    positions += part.count;
    parts.push_back(part);
  }
  if (!m || n % m || !positions) return refused("heads and positions");
  if (!q.element_count()) return ffi::Error::Success();

  const Kernel& kernel = chosen_kernel();
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (max_threads > 0) threads = std::min(threads, max_threads);
  // Each item copies keys and values of its head for itself, so queries of a head are shared only where
  // heads are too few.
  const int64_t group = n / m, rows = group * t, heads = b * m;
  const int64_t blocks = (rows + kQueryRows - 1) / kQueryRows;
  const int64_t shares = std::min(blocks, (2 * threads + heads - 1) / heads);
  const int64_t share = (blocks + shares - 1) / shares * kQueryRows;
  const int64_t items_of_head = (rows + share - 1) / share;
  parallel(
      pool, threads, 0, [](int64_t) {}, heads * items_of_head, [&](int64_t i) {
        const int64_t head = i / items_of_head % m, batch = i / items_of_head / m;
        std::vector<Positions> given;
        for (const Part& part : parts) {
          const int64_t first = (batch * part.count * m + head) * d;
          given.push_back({at(part.k, first), at(part.v, first),
                           part.k.element_type() == ffi::BF16, part.v.element_type() == ffi::BF16,
                           static_cast<int>(part.count), m * d, 1, m * d,
                           part.mask ? part.mask + batch * part.mask_batch : nullptr,
                           part.mask_query});
        }
        const int64_t first = (batch * t * n + head * group) * d;
        const int64_t begin = i % items_of_head * share;
        const ffi::AnyBuffer out = *y;
        kernel.attend({given.data(), static_cast<int>(given.size()), static_cast<int>(d),
                       at(q, first), const_cast<uint8_t*>(at(out, first)),
                       q.element_type() == ffi::BF16, n * d, d, n * d, d, static_cast<int>(t),
                       static_cast<int>(begin), static_cast<int>(std::min(rows, begin + share))});
      });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qvla

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(qvla_attention, qvla::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("masked")
                                  .Attr<int64_t>("max_threads"));

#pragma GCC visibility pop
