// Enough of CUDA for g++ to build a .cu file as a library for the CPU, so that its kernels run where no GPU is.
//
// A thread of a kernel is a fiber, a block a thread of the host; cooperative launches run all blocks at once, others one
// after the other. Fibers give way where CUDA threads wait for each other, and the next one is drawn by lot: a missing
// barrier shows as a wrong result sooner or later. Shared memory starts as NaN in every byte (all bits set), and what lies
// behind it is watched. The device is small and its size is set by `emulator::device`, so that tests see many blocks.
//
// A source with dynamic shared memory needs `thread_local uint4 memory[emulator::kSharedMemory / 16]` in the namespace of
// its kernels: see mean_field.cpp.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include <sched.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };

using std::max;
using std::min;
inline int64_t min(int64_t a, int b) { return std::min<int64_t>(a, b); }
inline int64_t min(int a, int64_t b) { return std::min<int64_t>(a, b); }

inline thread_local uint3 blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kSharedMemory = 256 << 10, kStack = 256 << 10, kGuard = 4 << 10;

// What cudaDeviceGetAttribute says.
struct Device {
  int multiprocessors = 3, shared = 24 << 10, shared_of_block = 23 << 10, reserved = 1 << 10;
  unsigned seed = 0;  // of the order in which fibers run
};
inline Device device;
inline std::atomic<int> faults{0};

// To another stack. swapcontext asks the system for the mask of signals each time, which would take most of a test.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
struct Context {
  void* stack = nullptr;
};
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.weak emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void start(Context& context, char* stack, size_t bytes, void (*function)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 3;
  *--top = reinterpret_cast<void*>(function);  // aligned as after a call
  context.stack = top - 6;
}
inline void switch_to(Context& from, Context& to) { emulator_switch(&from.stack, to.stack); }
#else
using Context = ucontext_t;
inline void start(Context& context, char* stack, size_t bytes, void (*function)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
}
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake = nullptr;  // of the address sanitizer
  bool finished = false;
  ~Fiber() { if (stack) munmap(stack, kStack); }
};

// One block that runs on one thread of the host.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<int> ready;
  std::function<void()> kernel;
  Context scheduler;
  void* fake = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  int running = 0;
  std::mt19937 order;
  // of the whole block, and of each warp: how many have arrived, and what they brought
  struct Meeting {
    std::vector<int> arrived;
    int expected = 0;
    uint64_t slots[2][32] = {};
    unsigned turn = 0;
  };
  Meeting block;
  std::vector<Meeting> warps;
  std::vector<int> votes;
};
inline thread_local Block* current = nullptr;

inline Fiber& fiber() { return *current->fibers[current->running]; }

inline void to_scheduler(bool finished = false) {
  Block& block = *current;
  Fiber& self = fiber();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &self.fake, block.bottom, block.size);
#endif
  switch_to(self.context, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake, nullptr, nullptr);
#endif
  (void)finished;
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &current->bottom, &current->size);
#endif
  current->kernel();
  fiber().finished = true;
  to_scheduler(true);
}

// Gives way to the others without waiting for them in particular.
inline void give_way() {
  current->ready.push_back(current->running);
  to_scheduler();
}

// Until all of a meeting have come. The turn is counted by whoever comes last.
inline void meet(Block::Meeting& meeting) {
  meeting.arrived.push_back(current->running);
  if (int(meeting.arrived.size()) < meeting.expected) {
    to_scheduler();
    return;
  }
  ++meeting.turn;
  const int self = current->running;
  for (int i : meeting.arrived) if (i != self) current->ready.push_back(i);
  meeting.arrived.clear();
  give_way();  // the last to come is not the first to go on
}

template <typename T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 8);
  const int id = current->running, lane = id % 32;
  Block::Meeting& warp = current->warps[id / 32];
  auto& slots = warp.slots[warp.turn & 1];  // two that are used in turn: nobody is more than one ahead
  memcpy(&slots[lane], &value, sizeof value);
  meet(warp);
  T result;
  memcpy(&result, &slots[from], sizeof result);
  return result;
}

inline void run_block(char* shared, size_t bytes, unsigned seed) {
  Block& block = *current;
  memset(shared, 0xff, bytes);
  memset(shared + bytes, 0x5a, kGuard);
  block.order.seed(seed);
  block.ready.clear();
  const int threads = int(block.fibers.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& f = *block.fibers[i];
    f.finished = false;
    start(f.context, f.stack, kStack, fiber_main);
    block.ready.push_back(i);
  }
  int left = threads;
  while (left > 0) {
    if (block.ready.empty()) {
      fprintf(stderr, "emulator: threads wait for others that have ended or wait elsewhere\n");
      abort();
    }
    const size_t at = block.order() % block.ready.size();
    std::swap(block.ready[at], block.ready.back());
    block.running = block.ready.back();
    block.ready.pop_back();
    Fiber& f = fiber();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.fake, f.stack, kStack);
#endif
    switch_to(block.scheduler, f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.fake, nullptr, nullptr);
#endif
    left -= f.finished;
  }
  for (size_t i = 0; i < kGuard; ++i) {
    if (shared[bytes + i] != 0x5a) {
      fprintf(stderr, "emulator: a write behind the end of shared memory\n");
      ++faults;
      break;
    }
  }
}

inline void launch(const cudaLaunchConfig_t& config, char* (*shared)(), const std::function<void()>& kernel) {
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    cooperative |= config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative;
  }
  const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
  const auto work = [&](unsigned from, unsigned to) {
    Block block;
    current = &block;
    block.kernel = kernel;
    blockDim = {threads, 1, 1}, gridDim = {blocks, 1, 1};
    block.block.expected = int(threads);
    block.warps.resize(threads / 32);
    for (auto& warp : block.warps) warp.expected = 32;
    for (unsigned i = 0; i < threads; ++i) {
      block.fibers.push_back(std::make_unique<Fiber>());
      Fiber& f = *block.fibers.back();
      f.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
    for (unsigned b = from; b < to; ++b) {
      blockIdx = {b, 0, 0};
      run_block(shared(), config.dynamicSmemBytes, device.seed + b);
    }
    current = nullptr;
  };
  std::vector<std::thread> running;
  for (unsigned b = 0; b < (cooperative ? blocks : 1u); ++b) {
    running.emplace_back(work, b, cooperative ? b + 1 : blocks);
  }
  for (auto& thread : running) thread.join();
}

inline thread_local char none[kGuard];
inline char* (*shared_of)() = [] { return none; };  // where the dynamic shared memory of a block is

}  // namespace emulator

struct ThreadIndex {
  struct {
    operator unsigned() const { return unsigned(emulator::current->running); }
  } x;
};
inline ThreadIndex threadIdx;

// --- in kernels ------------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::meet(emulator::current->block); }

inline int __syncthreads_and(int value) {
  emulator::Block& block = *emulator::current;
  block.votes.resize(block.fibers.size());
  block.votes[block.running] = value != 0;
  emulator::meet(block.block);
  const int result = std::all_of(block.votes.begin(), block.votes.end(), [](int vote) { return vote; });
  emulator::meet(block.block);
  return result;
}

inline void __syncwarp(unsigned = 0xffffffffu) {
  emulator::meet(emulator::current->warps[emulator::current->running / 32]);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, (emulator::current->running % 32) ^ mask);
}

template <typename T>
T __shfl_sync(unsigned, T value, int from, int width) {
  return emulator::shuffle(value, emulator::current->running % 32 / width * width + from);
}

template <typename T>
T __ldg(const T* from) { return *from; }

template <typename T>
void __stcs(T* to, T value) { *to = value; }

inline float __fdividef(float a, float b) { return a / b; }

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline void __nanosleep(unsigned) {
  sched_yield();
  emulator::give_way();
}

inline int atomicExch(int* at, int value) { return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST); }

inline float atomicAdd(float* at, float value) {
  uint32_t* word = reinterpret_cast<uint32_t*>(at);
  uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED), next;
  float now;
  do {
    memcpy(&now, &old, sizeof now);
    const float sum = now + value;
    memcpy(&next, &sum, sizeof next);
  } while (!__atomic_compare_exchange_n(word, &old, next, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return now;
}

// --- on the host -----------------------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->blockDim.x % 32 != 0 || config->blockDim.x > 1024 || config->gridDim.x == 0) return cudaErrorInvalidValue;
  if (config->dynamicSmemBytes > size_t(emulator::device.shared_of_block)) return cudaErrorInvalidValue;
  emulator::launch(*config, emulator::shared_of, [&] { kernel(arguments...); });
  return emulator::faults ? cudaErrorUnknown : cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  return value <= emulator::device.shared_of_block ? cudaSuccess : cudaErrorInvalidValue;
}
