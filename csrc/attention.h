// softmax(q k^T / sqrt(d)) v without the logits of all queries: what every instruction set provides.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qvla {

// Keys and values of one head at some positions. Strides are in elements.
struct Positions {
  const void *k, *v;
  bool k_bfloat16, v_bfloat16;  // otherwise float32
  int count;
  ptrdiff_t k_position, k_number;  // from position to position, and from number to number of a key
  ptrdiff_t v_position;            // the numbers of a value are consecutive
  const uint8_t* mask;             // [queries][count], 0 where a query does not attend; null: ones
  ptrdiff_t mask_query;            // 0: the same for all queries
};

// One key-value head of one observation, and some rows of its queries: row g `queries` + i is query i of
// the g-th head of those that share the keys.
struct Attention {
  const Positions* parts;  // a query attends to the positions of all of them
  int num_parts;
  int head_dim;
  const void* q;
  void* y;
  bool bfloat16;                // q and y; otherwise float32
  ptrdiff_t q_query, q_head;    // elements from query to query, and from head to head
  ptrdiff_t y_query, y_head;
  int queries;
  int begin, end;               // rows
};

// Rows of which a call takes a multiple, so that no instruction set computes more than it has to.
constexpr int kQueryRows = 24;

// The same code compiled for each (attention.cpp).
#if defined(__x86_64__)
namespace avx512 { void attend(const Attention&); }
namespace avx2 { void attend(const Attention&); }
#endif
namespace basic { void attend(const Attention&); }  // what every processor of the target has

}  // namespace qvla
