// Many rows: weights are read once for 256 of them.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

template <class Element, class Output>
using Config = GemmConfig<cutlass::arch::Sm120, Element, Output, Shape<_256, _128, _128>, Shape<_1, _1, _1>,
                          void>;

extern const Gemms kSm120Large = kernel_table<Gemm, Config>();

}  // namespace fp4::cuda
