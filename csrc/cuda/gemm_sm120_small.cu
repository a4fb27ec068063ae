// Few rows: K in several parts, so that all multiprocessors read weights.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

extern const Gemms kSm120Small =
    gemms<cutlass::arch::Sm120, Shape<_128, _128, _128>, Shape<_1, _1, _1>, cutlass::gemm::StreamKScheduler>();

}  // namespace fp4::cuda
