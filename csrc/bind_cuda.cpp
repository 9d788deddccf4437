// fastcolor._cuda: one line for each function. Tensors come as addresses, so that no torch is needed to build.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>

#include "cuda/lab.h"
#include "cuda/mean_field.h"
#include "cuda/render.h"

namespace py = pybind11;
namespace cuda = fastcolor::cuda;

namespace {
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Three channels: address, Sample, whether interleaved.
using Planes = std::tuple<Address, int, bool>;

fastcolor::Channels channels(const Planes& planes) {
  const auto [address, sample, interleaved] = planes;
  return {at<void>(address), fastcolor::Sample(sample), interleaved};
}

cudaStream_t stream_at(Address address) { return reinterpret_cast<cudaStream_t>(address); }

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of fastcolor. Arguments are addresses, sizes and a stream: see kernels/cuda/*.h.";
  m.def("rgb_to_lab", [](Planes rgb, Planes lab, int64_t images, int64_t pixels, Address stream) { check(cuda::rgb_to_lab(channels(rgb), channels(lab), images, pixels, stream_at(stream))); });
  m.def("rgb_to_lab_backward", [](Planes grad_lab, Planes rgb, Planes grad_rgb, int64_t images, int64_t pixels, Address stream) { check(cuda::rgb_to_lab_backward(channels(grad_lab), channels(rgb), channels(grad_rgb), images, pixels, stream_at(stream))); });
  m.def("lab_to_rgb", [](Planes lab, Planes rgb, bool preserve_lightness, int64_t images, int64_t pixels, Address stream) { check(cuda::lab_to_rgb(channels(lab), channels(rgb), preserve_lightness, images, pixels, stream_at(stream))); });
  m.def("lab_to_rgb_backward", [](Planes grad_rgb, Planes lab, Planes grad_lab, bool preserve_lightness, int64_t images, int64_t pixels, Address stream) { check(cuda::lab_to_rgb_backward(channels(grad_rgb), channels(lab), channels(grad_lab), preserve_lightness, images, pixels, stream_at(stream))); });

  using Field = cuda::MeanFieldProblem;
  py::class_<Field>(m, "MeanFieldProblem").def(py::init([](Address logits, int storage, bool labels_last, int64_t batch, int64_t labels, int64_t height, int64_t width, int64_t axes, int64_t rank, int64_t offsets, int64_t reach_y, int64_t reach_x, Address whole, Address a, Address b, Address guide, Address space, Address sharpness, Address prior, int64_t sweeps, bool checkerboard, float damping, bool uniform) { return Field{at<void>(logits), fastcolor::Storage(storage), labels_last, batch, labels, height, width, axes, rank, offsets, reach_y, reach_x, at<int>(whole), at<float>(a), at<float>(b), at<float>(guide), at<float>(space), at<float>(sharpness), at<float>(prior), sweeps, checkerboard, damping, uniform}; }));
  m.def("mean_field_scratch", &cuda::mean_field_scratch);
  m.def("mean_field_backward_scratch", &cuda::mean_field_backward_scratch);
  m.def("mean_field_resident_pixels", [](int storage, int64_t labels, int64_t rank, bool backward) { int64_t pixels = 0; check(cuda::mean_field_resident_pixels(fastcolor::Storage(storage), labels, rank, backward, &pixels)); return pixels; });
  m.def("mean_field", [](const Field& problem, Address marginals, Address colors, float temperature, Address ab, Address states, Address scratch, Address stream) { check(cuda::mean_field(problem, at<void>(marginals), at<float>(colors), temperature, at<float>(ab), at<float>(states), at<float>(scratch), stream_at(stream))); });
  m.def("mean_field_backward", [](const Field& problem, Address grad, Address states, Address grad_logits, Address grad_a, Address grad_b, Address grad_guide, Address grad_space, Address grad_sharpness, Address grad_prior, Address scratch, Address stream) { check(cuda::mean_field_backward(problem, at<void>(grad), at<float>(states), {at<float>(grad_logits), at<float>(grad_a), at<float>(grad_b), at<float>(grad_guide), at<float>(grad_space), at<float>(grad_sharpness), at<float>(grad_prior)}, at<float>(scratch), stream_at(stream))); });

  using Scene = cuda::RenderProblem;
  py::class_<Scene>(m, "RenderProblem").def(py::init([](Address ab, Address guide, int storage, int64_t batch, int64_t low_height, int64_t low_width, int64_t height, int64_t width, Address rows_at, Address rows_beyond, Address columns_at, Address columns_beyond, float sharpness, float floor) { return Scene{at<void>(ab), at<void>(guide), fastcolor::Storage(storage), batch, low_height, low_width, height, width, {at<int32_t>(rows_at), at<float>(rows_beyond)}, {at<int32_t>(columns_at), at<float>(columns_beyond)}, sharpness, floor}; }));
  m.def("render", [](const Scene& scene, Address L, int light, Planes rgb, bool preserve_lightness, Address stream) { check(cuda::render(scene, at<void>(L), fastcolor::Sample(light), channels(rgb), preserve_lightness, stream_at(stream))); });
  m.def("render_uv", [](const Scene& scene, int64_t down, int64_t across, bool cosited_down, bool cosited_across, int bits, float black, float luma_span, float chroma_span, float red, float blue, Address xyz_to_rgb, Address luma, int64_t luma_height, int64_t luma_width, int64_t row, int64_t image, Address u, Address v, Address stream) { check(cuda::render_uv(scene, {down, across, cosited_down, cosited_across, bits, black, luma_span, chroma_span, red, blue, at<float>(xyz_to_rgb)}, at<void>(luma), luma_height, luma_width, row, image, at<void>(u), at<void>(v), stream_at(stream))); });
  m.def("look_up", [](Address samples, bool wide, Address table, Address out, int64_t n, Address stream) { check(cuda::look_up(at<void>(samples), wide, at<float>(table), at<float>(out), n, stream_at(stream))); });
}
