// Every .cpp of an op is compiled once per instruction set: what it puts into namespace INSTRUCTION_SET exists once for
// each of them, and BEST_OF picks what the processor can run. What must exist only once stands under IS_BASELINE;
// outside it only C headers are included: of an inline function of the C++ library the linker keeps one copy, which
// could be the one for AVX-512.
#pragma once

#include <stdlib.h>
#include <string.h>

// FOR_EACH_INSTRUCTION_SET(void kernel(int argument);) declares the kernel of each of them.
#if defined(__x86_64__)
#define FOR_EACH_INSTRUCTION_SET(declaration) \
  namespace baseline {                        \
  declaration                                 \
  }                                           \
  namespace avx2 {                            \
  declaration                                 \
  }                                           \
  namespace avx512 {                          \
  declaration                                 \
  }
#define BEST_OF(kernel) \
  (tensorar::may_use("avx512") ? avx512::kernel : tensorar::may_use("avx2") ? avx2::kernel : baseline::kernel)

namespace tensorar {

// Whether the processor has all that training/build_ops.py lets the compiler use for a set. TENSORAR_INSTRUCTION_SET
// names the only one to use besides the baseline, so that one machine can test them all.
static inline bool may_use(const char* name) {
  const char* only = getenv("TENSORAR_INSTRUCTION_SET");
  if (only != nullptr && strcmp(only, name) != 0) return false;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (strcmp(name, "avx2") == 0) return has_avx2;
  return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace tensorar
#else
#define FOR_EACH_INSTRUCTION_SET(declaration) \
  namespace baseline {                        \
  declaration                                 \
  }
#define BEST_OF(kernel) baseline::kernel
#endif
