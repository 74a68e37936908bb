// softmax(q k^T / sqrt(d)) v, of which no more logits are held than those of a few queries.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qvla {

// Some queries of the heads that share one key-value head, in one observation. Row g `queries` + i is
// query i of head g. Numbers of a row are consecutive; strides are in elements.
struct Attention {
  int head_dim;
  const void *q, *k, *v;
  bool q_bfloat16, k_bfloat16, v_bfloat16;  // otherwise float32
  void* y;                                  // as q, and laid out as q
  int queries, positions;
  ptrdiff_t query_stride, head_stride;      // from query to query, and from head to head
  ptrdiff_t position_stride;                // from key to key, and from value to value
  const uint8_t* mask;                      // [queries][positions], 0: does not attend; null: all attend
  ptrdiff_t mask_stride;                    // from query to query; 0: all have the same
  int begin, end;                           // rows
};

// Callers share rows out in multiples of this, which are whole blocks of every instruction set.
constexpr int kQueryRows = 24;

// attention.cpp, compiled for each of these.
#if defined(__x86_64__)
namespace avx512 { void attend(const Attention&); }
namespace avx2 { void attend(const Attention&); }
#endif
namespace basic { void attend(const Attention&); }  // what every processor of the target has

}  // namespace qvla
