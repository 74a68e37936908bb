// Which kernel runs: what the processor says it can do, and what the environment asks for.
#include <cstdlib>
#include <cstring>

#include "kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qvla {
namespace {

bool supported(const Kernel& kernel) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&kernel == &kAvx512) return vnni;
  if (&kernel == &kAvx512Bf16) return vnni && __builtin_cpu_supports("avx512bf16");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&kernel == &kAvx2) return avx2;
  if (&kernel == &kAvx2Vnni) {
    // Leaf 7.1, bit 4 of EAX: older compilers do not know the name "avxvnni".
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }
#elif defined(__aarch64__)
  bool dot = false, bfloat16 = false;
#if defined(__linux__)
  // HWCAP_ASIMDDP and HWCAP2_BF16 of the kernel's interface, which older headers do not name.
  dot = getauxval(AT_HWCAP) >> 20 & 1;
  bfloat16 = getauxval(AT_HWCAP2) >> 14 & 1;
#endif
  if (&kernel == &kNeonDot) return dot;
  if (&kernel == &kNeonBf16) return dot && bfloat16;
#endif
  (void)kernel;
  return true;
}

}  // namespace

std::vector<const Kernel*> runnable_kernels() {
  std::vector<const Kernel*> found;
#if defined(__x86_64__)
  // Intel's processors begin four float32 products of 16 in the time of one bfloat16 product of 32.
  __builtin_cpu_init();
  const bool intel = __builtin_cpu_is("intel");
  const Kernel& first = intel ? kAvx512 : kAvx512Bf16;
  const Kernel& second = intel ? kAvx512Bf16 : kAvx512;
#endif
  for (const Kernel* kernel : {
#if defined(__x86_64__)
           &first, &second, &kAvx2Vnni, &kAvx2,
#elif defined(__aarch64__)
           &kNeonBf16, &kNeonDot, &kNeon,
#endif
           &kPortable})
    if (supported(*kernel)) found.push_back(kernel);
  return found;
}

const Kernel& chosen_kernel() {
  static const Kernel* const chosen = [] {
    const char* const wanted = std::getenv("QVLA_CPU_KERNEL");
    const std::vector<const Kernel*> all = runnable_kernels();
    for (const Kernel* kernel : all)
      if (!wanted || !*wanted || !std::strcmp(wanted, kernel->name)) return kernel;
    return all.back();
  }();
  return *chosen;
}

}  // namespace qvla
