// fastcolor._cuda: one line for each function. Tensors come as addresses, so that no torch is needed to build.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda/lab.h"

namespace py = pybind11;
namespace cuda = fastcolor::cuda;

namespace {
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_at(Address address) { return reinterpret_cast<cudaStream_t>(address); }

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of fastcolor. Arguments are addresses, sizes and a stream: see kernels/cuda/*.h.";
  m.def("rgb_to_lab", [](Address rgb, int sample, bool rgb_interleaved, Address lab, bool lab_interleaved, int64_t images, int64_t pixels, Address stream) { check(cuda::rgb_to_lab(at<void>(rgb), cuda::Sample(sample), rgb_interleaved, at<float>(lab), lab_interleaved, images, pixels, stream_at(stream))); });
  m.def("rgb_to_lab_backward", [](Address grad_lab, bool grad_lab_interleaved, Address rgb, bool rgb_interleaved, Address grad_rgb, bool grad_rgb_interleaved, int64_t images, int64_t pixels, Address stream) { check(cuda::rgb_to_lab_backward(at<float>(grad_lab), grad_lab_interleaved, at<float>(rgb), rgb_interleaved, at<float>(grad_rgb), grad_rgb_interleaved, images, pixels, stream_at(stream))); });
  m.def("lab_to_rgb", [](Address lab, bool lab_interleaved, Address rgb, int sample, bool rgb_interleaved, bool preserve_lightness, int64_t images, int64_t pixels, Address stream) { check(cuda::lab_to_rgb(at<float>(lab), lab_interleaved, at<void>(rgb), cuda::Sample(sample), rgb_interleaved, preserve_lightness, images, pixels, stream_at(stream))); });
  m.def("lab_to_rgb_backward", [](Address grad_rgb, bool grad_rgb_interleaved, Address lab, bool lab_interleaved, Address grad_lab, bool grad_lab_interleaved, bool preserve_lightness, int64_t images, int64_t pixels, Address stream) { check(cuda::lab_to_rgb_backward(at<float>(grad_rgb), grad_rgb_interleaved, at<float>(lab), lab_interleaved, at<float>(grad_lab), grad_lab_interleaved, preserve_lightness, images, pixels, stream_at(stream))); });
}
