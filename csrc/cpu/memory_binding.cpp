// fp4::cpu_prefer_large_pages, for the memory of packed weights. Every token reads all weights once, in order, and with
// pages of 4 KB the processor spends a tenth of that time on finding the next page. Linux gives pages of 2 MB to a
// process that asks before it first writes to the memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fp4::cpu {

namespace {

using torch::stable::Tensor;

// Asks for large pages where whole ones fit into the memory of `x`, which must not have been written to yet. Linux may
// refuse, which changes nothing but speed, so the result of the call is ignored.
void prefer_large_pages(Tensor x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLargePage = 1 << 21;
  const auto start = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (start + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t last = (start + static_cast<uintptr_t>(x.numel() * x.element_size())) & ~(kLargePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

}  // namespace

// fp4/ops/ lists operators on values; this one is about memory, so its schema is here.
STABLE_TORCH_LIBRARY_FRAGMENT(fp4, m) { m.def("cpu_prefer_large_pages(Tensor(a!) x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fp4, CPU, m) { m.impl("cpu_prefer_large_pages", TORCH_BOX(&prefer_large_pages)); }

}  // namespace fp4::cpu
