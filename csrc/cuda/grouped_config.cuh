// One grouped block-scaled GEMM configuration: a matmul for each expert in one launch, whose shapes, pointers and
// layouts are all worked out on the device, since the host does not know how many rows an expert got.
#pragma once

#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "gemm_config.cuh"
#include "swizzle.h"

namespace fp4::cuda {

template <class ArchTag, class Element, class OutputType, class TileShape, class MainloopSchedule,
          class EpilogueSchedule>
struct GroupedConfig {
  using Operator = cutlass::arch::OpClassBlockScaledTensorOp;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using ClusterShape = cute::Shape<cute::_1, cute::_1, cute::_1>;
  static constexpr int kAlignCodes = 32;
  static constexpr int kAlignOutput = 128 / cutlass::sizeof_bits<OutputType>::value;
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      ArchTag, Operator, TileShape, ClusterShape, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      RowMajor*, kAlignOutput, OutputType, RowMajor*, kAlignOutput, EpilogueSchedule,
      ScaleAndBias<TileShape, OutputType>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      ArchTag, Operator, Element, RowMajor*, kAlignCodes, Element, ColumnMajor*, kAlignCodes, float, TileShape,
      ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= kSharedMemory<ArchTag>, "the tile needs more shared memory than a CTA has");

  using Codes = typename Device::ElementA;
  using Scale = typename Mainloop::ElementSF;
  using Layouts = typename Mainloop::Sm1xxBlkScaledConfig;
  using Shape = typename ProblemShape::UnderlyingProblemShape;

  // Arrays over the experts: the kernel reads one element of each for the matmul of an expert.
  struct Arrays {
    Shape* shapes;
    const Codes** a;
    const Codes** b;
    const Scale** scale_a;
    const Scale** scale_b;
    OutputType** d;
    typename Kernel::InternalStrideA* stride_a;
    typename Kernel::InternalStrideB* stride_b;
    typename Kernel::InternalStrideD* stride_d;
    typename Mainloop::InternalLayoutSFA* layout_a;
    typename Mainloop::InternalLayoutSFB* layout_b;
  };

  static constexpr size_t align(size_t bytes) { return (bytes + 127) / 128 * 128; }

  template <class T>
  static void take(T*& array, char*& at, int experts) {
    array = reinterpret_cast<T*>(at);
    at += align(sizeof(T) * experts);
  }

  // Divides the beginning of the workspace into the arrays; returns where they end.
  static char* divide(char* at, int experts, Arrays& arrays) {
    take(arrays.shapes, at, experts);
    take(arrays.a, at, experts);
    take(arrays.b, at, experts);
    take(arrays.scale_a, at, experts);
    take(arrays.scale_b, at, experts);
    take(arrays.d, at, experts);
    take(arrays.stride_a, at, experts);
    take(arrays.stride_b, at, experts);
    take(arrays.stride_d, at, experts);
    take(arrays.layout_a, at, experts);
    take(arrays.layout_b, at, experts);
    return at;
  }

  static __device__ void fill(const GroupedProblem& p, const Arrays& arrays, int expert) {
    constexpr int kBlock = Layouts::SFVecSize;
    const int64_t first = p.offsets[expert];
    const int m = p.offsets[expert + 1] - p.offsets[expert];
    const int64_t columns = p.k / kBlock;
    arrays.shapes[expert] = cute::make_shape(m, p.n, p.k);
    // Codes are counted in bytes, two to each.
    const auto* a = static_cast<const uint8_t*>(p.a) + first * (p.k / 2);
    const auto* b = static_cast<const uint8_t*>(p.b) + static_cast<int64_t>(expert) * p.n * (p.k / 2);
    arrays.a[expert] = reinterpret_cast<const Codes*>(a);
    arrays.b[expert] = reinterpret_cast<const Codes*>(b);
    const int64_t scale_row = expert_scale_row(expert, first);
    arrays.scale_a[expert] = static_cast<const Scale*>(p.scale_a) + scale_row * padded_columns(columns);
    arrays.scale_b[expert] = static_cast<const Scale*>(p.scale_b) + expert * swizzled_bytes(p.n, columns);
    arrays.d[expert] = static_cast<OutputType*>(p.d) + first * p.n;
    arrays.stride_a[expert] = cutlass::make_cute_packed_stride(typename Kernel::InternalStrideA{}, {m, p.k, 1});
    arrays.stride_b[expert] = cutlass::make_cute_packed_stride(typename Kernel::InternalStrideB{}, {p.n, p.k, 1});
    arrays.stride_d[expert] = cutlass::make_cute_packed_stride(typename Kernel::InternalStrideD{}, {m, p.n, 1});
    arrays.layout_a[expert] = Layouts::tile_atom_to_shape_SFA(cute::make_shape(m, p.n, p.k, 1));
    arrays.layout_b[expert] = Layouts::tile_atom_to_shape_SFB(cute::make_shape(m, p.n, p.k, 1));
  }

  static typename Device::Arguments arguments(const GroupedProblem& p, const Arrays& arrays) {
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = 0;
    hardware.sm_count = p.multiprocessors;
    hardware.max_active_clusters = p.multiprocessors;
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGrouped,
        {p.experts, arrays.shapes, nullptr},
        {arrays.a, arrays.stride_a, arrays.b, arrays.stride_b, arrays.scale_a, arrays.layout_a, arrays.scale_b,
         arrays.layout_b},
        {{{{1.0f}, {p.alpha}, {{cute::_0{}, cute::_0{}, 1}}},
          {},
          {p.bias, 0.0f, {cute::_0{}, cute::_1{}, static_cast<int64_t>(p.n)}},
          {}},
         nullptr,
         nullptr,
         arrays.d,
         arrays.stride_d},
        hardware};
    return arguments;
  }

  static bool can_implement(const GroupedProblem& p) {
    // CUTLASS cannot look at the shapes, which are on the device; this is its check of the alignment of each.
    return p.k % kAlignCodes == 0 && p.n % kAlignOutput == 0 &&
           Device::can_implement(arguments(p, {})) == cutlass::Status::kSuccess;
  }

  static size_t workspace_bytes(const GroupedProblem& p) {
    Arrays arrays{};
    const char* end = divide(nullptr, p.experts, arrays);
    return reinterpret_cast<size_t>(end) + Device::get_workspace_size(arguments(p, arrays));
  }

  static const char* run(const GroupedProblem& p, void* workspace, cudaStream_t stream);

  static constexpr GroupedGemm kernel() {
    GroupedGemm gemm{};
    gemm.can_implement = can_implement;
    gemm.workspace_bytes = workspace_bytes;
    gemm.run = run;
    return gemm;
  }
};

template <class Config>
__global__ void fill_arrays(GroupedProblem p, typename Config::Arrays arrays) {
  const int expert = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (expert < p.experts) Config::fill(p, arrays, expert);
}

template <class ArchTag, class Element, class OutputType, class TileShape, class MainloopSchedule,
          class EpilogueSchedule>
const char* GroupedConfig<ArchTag, Element, OutputType, TileShape, MainloopSchedule, EpilogueSchedule>::run(
    const GroupedProblem& p, void* workspace, cudaStream_t stream) {
  Arrays arrays{};
  char* rest = divide(static_cast<char*>(workspace), p.experts, arrays);
  fill_arrays<GroupedConfig><<<(p.experts + 127) / 128, 128, 0, stream>>>(p, arrays);
  Device device;
  cutlass::Status status = device.initialize(arguments(p, arrays), rest, stream);
  if (status == cutlass::Status::kSuccess) status = device.run(stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace fp4::cuda
