// The matmuls of the experts of a layer, in one launch.
#include "grouped_config.cuh"

namespace fp4::cuda {

using namespace cute;

template <class Element, class Output>
using Config = GroupedConfig<cutlass::arch::Sm100, Element, Output, Shape<_128, _128, _256>,
                             cute::conditional_t<cute::is_same_v<Element, Nvfp4>,
                                                 cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100,
                                                 cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmMxf4Sm100>,
                             cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm>;

extern const GroupedGemms kSm100Grouped = kernel_table<GroupedGemm, Config>();

}  // namespace fp4::cuda
