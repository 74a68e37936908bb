// The XLA custom call of attention: checks its operands, and shares heads and queries over XLA's threads.
#include <algorithm>
#include <string>

#include "kernel.h"
#include "parallel.h"

namespace qvla {
namespace {

ffi::Error refused(const std::string& what) {
  return ffi::Error::InvalidArgument("qvla_attention: " + what);
}

bool is_float(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::F32 || x.element_type() == ffi::BF16;
}

uint8_t* at(ffi::AnyBuffer x, ptrdiff_t element) {
  return static_cast<uint8_t*>(x.untyped_data()) + element * (x.element_type() == ffi::F32 ? 4 : 2);
}

// q [b, t, n, d], k and v [b, s, m, d] and perhaps a mask [1 or b, 1, 1 or t, s] -> y as q.
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::RemainingArgs masks, ffi::Result<ffi::AnyBuffer> y,
                     int64_t max_threads) {
  const auto shape = q.dimensions(), keys = k.dimensions(), values = v.dimensions();
  if (!is_float(q) || !is_float(k) || !is_float(v) || y->element_type() != q.element_type())
    return refused("q, k and v must be float32 or bfloat16, and y as q");
  if (shape.size() != 4 || keys.size() != 4 || y->element_count() != q.element_count() ||
      !std::equal(keys.begin(), keys.end(), values.begin(), values.end()))
    return refused("shapes");
  const int64_t b = shape[0], t = shape[1], n = shape[2], d = shape[3], s = keys[1], m = keys[2];
  if (keys[0] != b || keys[3] != d || !m || n % m || !s) return refused("shapes");
  const uint8_t* mask = nullptr;
  int64_t mask_batch = 0, mask_query = 0;
  if (masks.size()) {
    const auto given = masks.get<ffi::Buffer<ffi::PRED>>(0);
    if (!given.has_value() || masks.size() > 1) return refused("mask");
    const auto size = given->dimensions();
    if (size.size() != 4 || (size[0] != b && size[0] != 1) || size[1] != 1 ||
        (size[2] != t && size[2] != 1) || size[3] != s)
      return refused("the mask's shape");
    mask = static_cast<const uint8_t*>(given->untyped_data());
    mask_query = size[2] == 1 ? 0 : s;
    mask_batch = size[0] == 1 ? 0 : size[2] * s;
  }
  if (!q.element_count()) return ffi::Error::Success();

  const Kernel& kernel = chosen_kernel();
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (max_threads > 0) threads = std::min(threads, max_threads);
  // Each item copies the keys and values of its head for itself, so queries of a head are shared out only
  // if heads are few.
  const int64_t group = n / m, rows = group * t, heads = b * m;
  const int64_t blocks = (rows + kQueryRows - 1) / kQueryRows;
  const int64_t wanted = std::min(blocks, (2 * threads + heads - 1) / heads);
  const int64_t share = (blocks + wanted - 1) / wanted * kQueryRows;
  const int64_t shares = (rows + share - 1) / share;
  const auto attend = [&](int64_t i) {
    const int64_t batch = i / shares / m, head = i / shares % m, begin = i % shares * share;
    const int64_t query = (batch * t * n + head * group) * d, key = (batch * s * m + head) * d;
    Attention job;
    job.head_dim = static_cast<int>(d);
    job.q = at(q, query);
    job.k = at(k, key);
    job.v = at(v, key);
    job.q_bfloat16 = q.element_type() == ffi::BF16;
    job.k_bfloat16 = k.element_type() == ffi::BF16;
    job.v_bfloat16 = v.element_type() == ffi::BF16;
    job.y = at(*y, query);
    job.queries = static_cast<int>(t);
    job.positions = static_cast<int>(s);
    job.query_stride = n * d;
    job.head_stride = d;
    job.position_stride = m * d;
    job.mask = mask ? mask + batch * mask_batch : nullptr;
    job.mask_stride = mask_query;
    job.begin = static_cast<int>(begin);
    job.end = static_cast<int>(std::min(rows, begin + share));
    kernel.attend(job);
  };
  parallel(pool, threads, 0, [](int64_t) {}, heads * shares, attend);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qvla

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(qvla_attention, qvla::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("max_threads"));

#pragma GCC visibility pop
