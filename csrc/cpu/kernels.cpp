#include "kernels.h"

#include "isa.h"

namespace fp4::cpu {

const Kernels& kernels() {
#ifdef FP4_X86
  if (isa() == Isa::avx512) return kAvx512Kernels;
  if (isa() == Isa::avx2) return kAvx2Kernels;
#endif
  return kScalarKernels;
}

}  // namespace fp4::cpu
