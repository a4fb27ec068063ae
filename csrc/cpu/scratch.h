// Uninitialised memory of one call or of one thread's task, aligned for vector loads.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace fp4::cpu {

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

template <typename T>
std::unique_ptr<T[], AlignedDelete> scratch(size_t count) {
  return std::unique_ptr<T[], AlignedDelete>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
}

}  // namespace fp4::cpu
