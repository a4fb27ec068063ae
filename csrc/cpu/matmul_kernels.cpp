#include "matmul_kernels.h"

namespace fp4::cpu {

const MatmulKernels& matmul_kernels() {
#ifdef FP4_X86
  if (isa() == Isa::avx512) return kAvx512Matmul;
  if (isa() == Isa::avx2) return kAvx2Matmul;
#endif
  return kScalarMatmul;
}

}  // namespace fp4::cpu
