// Which instruction set the CPU kernels run with, decided once per process.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FP4_X86 1
#define FP4_TARGET_AVX2 __attribute__((target("avx2,f16c")))
#define FP4_TARGET_AVX2_FMA __attribute__((target("avx2,fma,f16c")))
#define FP4_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#endif

namespace fp4::cpu {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

// The widest set that this CPU has, or the narrower one that FP4_CPU_ISA names (scalar, avx2, avx512).
inline Isa isa() {
  static const Isa chosen = [] {
    Isa widest = Isa::scalar;
#ifdef FP4_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      widest = Isa::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vnni")) {
        widest = Isa::avx512;
      }
    }
#endif
    const char* wanted = std::getenv("FP4_CPU_ISA");
    if (wanted == nullptr) return widest;
    Isa limit = widest;
    if (std::strcmp(wanted, "scalar") == 0) limit = Isa::scalar;
    if (std::strcmp(wanted, "avx2") == 0) limit = Isa::avx2;
    return limit < widest ? limit : widest;
  }();
  return chosen;
}

}  // namespace fp4::cpu
