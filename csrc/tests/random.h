// What the checks of the kernels share: random numbers, bfloat16, and buffers that end with their memory.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "../kernel.h"

namespace qvla {

using Random = std::mt19937_64;

inline int uniform(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

inline int one_of(Random& random, std::initializer_list<int> options) {
  return options.begin()[uniform(random, 0, static_cast<int>(options.size()) - 1)];
}

inline float widened(uint16_t half) {
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// The upper half: a bfloat16 number, though not always the nearest.
inline uint16_t narrowed(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return static_cast<uint16_t>(word >> 16);
}

// An array that starts `skew` bytes behind an aligned address and ends where its memory ends.
template <class T>
class Buffer {
 public:
  Buffer(size_t size, size_t skew) : memory_(size * sizeof(T) + skew), skew_(skew) {
    memory_.shrink_to_fit();
  }
  T* data() { return reinterpret_cast<T*>(memory_.data() + skew_); }
  T& operator[](size_t i) { return data()[i]; }

 private:
  std::vector<uint8_t> memory_;
  size_t skew_;
};

// check_attention.cpp: attention of a random shape against plain loops in double precision.
bool attention_agrees(const Kernel& kernel, Random& random);

}  // namespace qvla
