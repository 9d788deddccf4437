#pragma once
#include <cstring>

#include "cuda_runtime.h"

// Copies arrive when they are waited for, not before.
namespace emulator {
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
inline thread_local std::vector<std::vector<Copy>> copies;  // of each fiber
}  // namespace emulator

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fprintf(stderr, "emulator: a copy of %zu bytes is not aligned\n", bytes);
    ++emulator::faults;
  }
  auto& copies = emulator::copies;
  if (copies.size() < emulator::current->fibers.size()) copies.resize(emulator::current->fibers.size());
  copies[emulator::current->running].push_back({to, from, bytes});
}

inline void __pipeline_commit() {}

inline void __pipeline_wait_prior(size_t) {
  emulator::give_way();
  if (emulator::copies.size() <= size_t(emulator::current->running)) return;
  auto& mine = emulator::copies[emulator::current->running];
  for (const auto& copy : mine) memcpy(copy.to, copy.from, copy.bytes);
  mine.clear();
}
