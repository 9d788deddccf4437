// kernels/cuda/mean_field.cu for the CPU, with entry points for ctypes.
#include "cuda/mean_field.cu"

namespace fastcolor::cuda {
namespace {
thread_local uint4 memory[(emulator::kSharedMemory + emulator::kGuard) / sizeof(uint4)];
}
}  // namespace fastcolor::cuda

cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Device& d = emulator::device;
  *value = attribute == cudaDevAttrMultiProcessorCount                ? d.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? d.shared
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? d.shared_of_block
                                                                      : d.reserved;
  return cudaSuccess;
}

using namespace fastcolor;
using namespace fastcolor::cuda;

extern "C" {

void set_device(int multiprocessors, int shared, unsigned seed) {
  emulator::device = {multiprocessors, shared, std::min(shared - 1024, int(emulator::kSharedMemory)), 1024, seed};
  emulator::faults = 0;
  emulator::shared_of = [] { return reinterpret_cast<char*>(fastcolor::cuda::memory); };
}

int64_t scratch(const MeanFieldProblem* p, int states, int is_backward) {
  return is_backward ? mean_field_backward_scratch(*p) : mean_field_scratch(*p, states);
}

int64_t resident_pixels(int storage, int64_t labels, int64_t rank) {
  int64_t pixels = 0;
  return mean_field_resident_pixels(Storage(storage), labels, rank, false, &pixels) == cudaSuccess ? pixels : -1;
}

// How the work is divided: threads, blocks, groups, pixels of a block, and at a time.
int division(const MeanFieldProblem* p, int is_backward, int64_t* out) {
  Plan plan;
  Job job{};
  const cudaError_t error = make_job(*p, is_backward, p->logits, plan, job);
  const int64_t values[] = {plan.threads, plan.blocks, plan.groups, plan.pixels, plan.tile, job.vectors};
  std::copy(std::begin(values), std::end(values), out);
  return error;
}

int forward_pass(const MeanFieldProblem* p, void* marginals, const float* colors, float temperature, float* ab,
                 float* states, float* scratch) {
  return mean_field(*p, marginals, colors, temperature, ab, states, scratch, nullptr);
}

int backward_pass(const MeanFieldProblem* p, const void* grad, const float* states, const MeanFieldGradients* to,
                  float* scratch) {
  return mean_field_backward(*p, grad, states, *to, scratch, nullptr);
}

}  // extern "C"
