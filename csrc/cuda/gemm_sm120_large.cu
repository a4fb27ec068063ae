// Many rows: weights are read once for 256 of them.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

extern const Gemms kSm120Large =
    gemms<cutlass::arch::Sm120, Shape<_256, _128, _128>, Shape<_1, _1, _1>, void>();

}  // namespace fp4::cuda
