// y = x w_hat^T + bias from packed tiles: what every instruction set's kernel provides.
//
// A tile is 16 output channels. Its bytes are 64-byte blocks along k; in a block channel c owns the
// 32-bit word c, and a word holds 32 / bits inputs:
//
//    2, 4, 8 bits: byte j of the word holds the inputs 4 p + j in its bits [p b, (p + 1) b)
//   16 bits:       bfloat16 pairs; the inputs of a quad (0, 1, 2, 3) are the words (0, 2), (1, 3)
//   32 bits:       one float32 number
//
// so that byte planes meet four consecutive inputs (int8 products of 4), and 16-bit words the pairs
// (0, 2) and (1, 3) of a quad (bfloat16 products of 2). Codes are unsigned; code u stands for
// multiplier u + offset, times the scale.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace qvla {

constexpr int kLanes = 16;          // channels of a tile
constexpr int kBlock = 64;          // bytes of a block
constexpr int kInputs = 16;         // k is padded to a multiple: a block of 2 bits
constexpr int kRowBlock = 12;       // most rows that a micro-kernel holds in registers
constexpr int kPanelRows = 24;      // from here on tiles are unpacked once for all rows

struct Job {
  const uint8_t* words;       // first tile
  int bits, multiplier, offset;
  int tiles;
  int k;                      // padded
  int groups, group;          // scales of a row, inputs of one (the last may have fewer)
  const float* scales;        // [tiles][groups][16]
  const float* bias;          // [tiles][16]
  const int32_t* index;       // [tiles][16], output channel of a lane; -1: none
  int rows;
  const uint8_t* x;           // prepared rows; kRowBlock rows behind the last may be read
  ptrdiff_t stride;           // bytes from row to row
  bool split;                 // x has float32's precision: the sum of two numbers in bfloat16 kernels
  const float* row_scale;     // integer products: scale of each row ...
  const int32_t* row_sums;    // ... and the sums of its codes, [rows][groups]
  void* y;                    // first row
  ptrdiff_t y_stride;         // elements
  bool y_bfloat16;
};

// One row as it was given to the product.
struct Row {
  const void* x;
  bool bfloat16;
  int k, padded;
  int groups, group;
};

struct Kernel {
  const char* name;
  // Bytes of a prepared row.
  size_t (*float_bytes)(int padded, bool split);
  size_t (*integer_bytes)(int padded);
  // Rounds float32 inputs to bfloat16 where they are not split.
  void (*prepare_float)(const Row&, bool split, uint8_t* out);
  // Codes of the row, their scale and sums.
  void (*prepare_integer)(const Row&, int qmax, uint8_t* out, float* scale, int32_t* sums);
  void (*multiply_float)(const Job&);
  void (*multiply_integer)(const Job&);
  void (*attend)(const Attention&);
};

inline ptrdiff_t tile_bytes(int bits, int k) { return static_cast<ptrdiff_t>(k) * 2 * bits; }

extern const Kernel kPortable;
#if defined(__x86_64__)
extern const Kernel kAvx2;
extern const Kernel kAvx2Vnni;    // products of four 8-bit integers
extern const Kernel kAvx512;      // products of four 8-bit integers
extern const Kernel kAvx512Bf16;  // ... and of two bfloat16 numbers
#elif defined(__aarch64__)
extern const Kernel kNeon;
extern const Kernel kNeonDot;   // products of four 8-bit integers
extern const Kernel kNeonBf16;  // ... and of two bfloat16 numbers
#endif

// Memory of the calling thread that begins with a cache line, kept: a fresh one would be paged in by every
// call. `use`, 0 to 2, tells what is needed at the same time apart.
uint8_t* scratch(int use, size_t bytes);

// Kernels that this processor can run, best first; the last is kPortable.
std::vector<const Kernel*> runnable_kernels();

// The best of them, or the one that QVLA_CPU_KERNEL names.
const Kernel& chosen_kernel();

}  // namespace qvla
