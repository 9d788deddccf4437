// fastcolor._cpu: one line for each function. Tensors come as addresses, so that no torch is needed to build.
#include <pybind11/pybind11.h>

#include "cpu/lab.h"
#include "cpu/multiversion.h"

namespace py = pybind11;
namespace cpu = fastcolor::cpu;

namespace {
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Free = py::call_guard<py::gil_scoped_release>;
}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "C++ kernels of fastcolor. Arguments are addresses and sizes: see kernels/cpu/*.h.";
  m.def("simd_level", &cpu::simd_level);
  m.def("rgb_to_lab", [](Address rgb, int sample, bool rgb_interleaved, Address lab, bool lab_interleaved, int64_t images, int64_t pixels, int threads) { cpu::rgb_to_lab(at<void>(rgb), cpu::Sample(sample), rgb_interleaved, at<float>(lab), lab_interleaved, images, pixels, threads); }, Free());
  m.def("rgb_to_lab_backward", [](Address grad_lab, bool grad_lab_interleaved, Address rgb, bool rgb_interleaved, Address grad_rgb, bool grad_rgb_interleaved, int64_t images, int64_t pixels, int threads) { cpu::rgb_to_lab_backward(at<float>(grad_lab), grad_lab_interleaved, at<float>(rgb), rgb_interleaved, at<float>(grad_rgb), grad_rgb_interleaved, images, pixels, threads); }, Free());
  m.def("lab_to_rgb", [](Address lab, bool lab_interleaved, Address rgb, int sample, bool rgb_interleaved, bool preserve_lightness, int64_t images, int64_t pixels, int threads) { cpu::lab_to_rgb(at<float>(lab), lab_interleaved, at<void>(rgb), cpu::Sample(sample), rgb_interleaved, preserve_lightness, images, pixels, threads); }, Free());
  m.def("lab_to_rgb_backward", [](Address grad_rgb, bool grad_rgb_interleaved, Address lab, bool lab_interleaved, Address grad_lab, bool grad_lab_interleaved, bool preserve_lightness, int64_t images, int64_t pixels, int threads) { cpu::lab_to_rgb_backward(at<float>(grad_rgb), grad_rgb_interleaved, at<float>(lab), lab_interleaved, at<float>(grad_lab), grad_lab_interleaved, preserve_lightness, images, pixels, threads); }, Free());
  m.def("inverse_cbrt", [](Address x, Address out, int64_t n) { cpu::inverse_cbrt(at<float>(x), at<float>(out), n); }, Free());
  m.def("power", [](Address x, float p, Address out, int64_t n) { cpu::power(at<float>(x), p, at<float>(out), n); }, Free());
}
