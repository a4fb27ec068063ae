// Many rows: the largest tile of the tensor cores, shared by two multiprocessors.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

extern const Gemms kSm100Large =
    gemms<cutlass::arch::Sm100, Shape<_256, _256, _256>, Shape<_2, _1, _1>, void>();

}  // namespace fp4::cuda
