// Few rows: K in several parts, so that all multiprocessors read weights.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

template <class Element, class Output>
using Config = GemmConfig<cutlass::arch::Sm120, Element, Output, Shape<_128, _128, _128>, Shape<_1, _1, _1>,
                          cutlass::gemm::StreamKScheduler>;

extern const Gemms kSm120Small = kernel_table<Gemm, Config>();

}  // namespace fp4::cuda
