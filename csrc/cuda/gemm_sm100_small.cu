// Few rows: narrow tiles and K in several parts, so that all multiprocessors read weights.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

template <class Element, class Output>
using Config = GemmConfig<cutlass::arch::Sm100, Element, Output, Shape<_128, _64, _256>, Shape<_1, _1, _1>,
                          cutlass::gemm::StreamKScheduler>;

extern const Gemms kSm100Small = kernel_table<Gemm, Config>();

}  // namespace fp4::cuda
