// Memory of the threads; compiled for every processor, unlike the kernels that use it.
#include <vector>

#include "kernel.h"

namespace qvla {

uint8_t* scratch(int use, size_t bytes) {
  thread_local std::vector<uint8_t> memories[3];
  std::vector<uint8_t>& memory = memories[use];
  if (memory.size() < bytes + kBlock) memory.resize(bytes + kBlock);
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<uint8_t*>((at + kBlock - 1) / kBlock * kBlock);
}

}  // namespace qvla
