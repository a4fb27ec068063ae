// Few rows: narrow tiles and K in several parts, so that all multiprocessors read weights.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

extern const Gemms kSm100Small =
    gemms<cutlass::arch::Sm100, Shape<_128, _64, _256>, Shape<_1, _1, _1>, cutlass::gemm::StreamKScheduler>();

}  // namespace fp4::cuda
