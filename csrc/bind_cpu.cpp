// fastcolor._cpu: one line for each function. Tensors come as addresses, so that no torch is needed to build.
#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/cross_entropy.h"
#include "cpu/lab.h"
#include "cpu/labels.h"
#include "cpu/mean_field.h"
#include "cpu/multiversion.h"
#include "cpu/render.h"

namespace py = pybind11;
namespace cpu = fastcolor::cpu;

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

using Free = py::call_guard<py::gil_scoped_release>;
}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "C++ kernels of fastcolor. Arguments are addresses and sizes: see kernels/cpu/*.h.";
  m.def("simd_level", &cpu::simd_level);
  m.def("use_simd", &cpu::use_simd);
  m.def("rgb_to_lab", [](Planes rgb, Planes lab, int64_t images, int64_t pixels, int threads) { cpu::rgb_to_lab(channels(rgb), channels(lab), images, pixels, threads); }, Free());
  m.def("rgb_to_lab_backward", [](Planes grad_lab, Planes rgb, Planes grad_rgb, int64_t images, int64_t pixels, int threads) { cpu::rgb_to_lab_backward(channels(grad_lab), channels(rgb), channels(grad_rgb), images, pixels, threads); }, Free());
  m.def("lab_to_rgb", [](Planes lab, Planes rgb, bool preserve_lightness, int64_t images, int64_t pixels, int threads) { cpu::lab_to_rgb(channels(lab), channels(rgb), preserve_lightness, images, pixels, threads); }, Free());
  m.def("lab_to_rgb_backward", [](Planes grad_rgb, Planes lab, Planes grad_lab, bool preserve_lightness, int64_t images, int64_t pixels, int threads) { cpu::lab_to_rgb_backward(channels(grad_rgb), channels(lab), channels(grad_lab), preserve_lightness, images, pixels, threads); }, Free());
  m.def("inverse_cbrt", [](Address x, Address out, int64_t n) { cpu::inverse_cbrt(at<float>(x), at<float>(out), n); }, Free());
  m.def("power", [](Address x, float p, Address out, int64_t n) { cpu::power(at<float>(x), p, at<float>(out), n); }, Free());
  m.def("gamut_scales", [](Address lab, Address t, int64_t n) { cpu::gamut_scales(at<float>(lab), at<float>(t), n); }, Free());

  using Field = cpu::MeanFieldProblem;
  py::class_<Field>(m, "MeanFieldProblem").def(py::init([](Address logits, int storage, bool labels_last, int64_t batch, int64_t labels, int64_t height, int64_t width, int64_t axes, Address counts, int64_t rank, Address a, Address b, Address guide, int64_t offsets, Address dy, Address dx, Address space, float sharpness, Address prior, int64_t sweeps, bool checkerboard, float damping, bool uniform, int threads) { return Field{at<void>(logits), fastcolor::Storage(storage), labels_last, batch, labels, height, width, axes, at<int64_t>(counts), rank, at<float>(a), at<float>(b), at<float>(guide), offsets, at<int64_t>(dy), at<int64_t>(dx), at<float>(space), sharpness, at<float>(prior), sweeps, checkerboard, damping, uniform, threads}; }));
  m.def("mean_field", [](const Field& problem, Address marginals, Address colors, float temperature, Address ab, Address states) { cpu::mean_field(problem, at<void>(marginals), at<float>(colors), temperature, at<float>(ab), at<float>(states)); }, Free());
  m.def("mean_field_backward", [](const Field& problem, Address grad, Address states, Address grad_logits, Address grad_a, Address grad_b, Address grad_guide, Address grad_space, Address grad_sharpness, Address grad_prior) { cpu::mean_field_backward(problem, at<void>(grad), at<float>(states), {at<float>(grad_logits), at<float>(grad_a), at<float>(grad_b), at<float>(grad_guide), at<float>(grad_space), at<float>(grad_sharpness), at<float>(grad_prior)}); }, Free());
  m.def("mean_field_state_size", &cpu::mean_field_state_size);

  using Tables = cpu::LabelTables;
  py::class_<Tables>(m, "LabelTables").def(py::init([](int64_t axes, int64_t count, Address centers, int64_t side, int64_t width, float first, float size, Address cells, Address cell_labels) { return Tables{axes, count, at<float>(centers), side, width, first, size, at<float>(cells), at<int32_t>(cell_labels)}; }));
  m.def("nearest_labels", [](const Tables& tables, Address ab, bool interleaved, int64_t images, int64_t pixels, int64_t k, Address index, Address squared, int threads) { cpu::nearest_labels(tables, at<float>(ab), interleaved, images, pixels, k, at<int64_t>(index), at<float>(squared), threads); }, Free());
  m.def("label_histogram", [](const Tables& tables, Address ab, bool interleaved, int64_t images, int64_t pixels, Address counts, int threads) { cpu::label_histogram(tables, at<float>(ab), interleaved, images, pixels, at<int64_t>(counts), threads); }, Free());
  m.def("cross_entropy", [](Address logits, int storage, bool labels_last, int64_t images, int64_t pixels, const Tables& tables, Address ab, Address weights, Address ignore, Address upstream, int64_t neighbors, float sharpness, bool mean, int threads, Address loss, Address losses, Address grad) { cpu::cross_entropy({at<void>(logits), fastcolor::Storage(storage), labels_last, images, pixels, tables, at<float>(ab), at<float>(weights), at<uint8_t>(ignore), at<float>(upstream), neighbors, sharpness, mean, threads}, at<float>(loss), at<float>(losses), at<void>(grad)); }, Free());
  m.def("exp2_of", [](Address x, Address out, int64_t n) { cpu::exp2_of(at<float>(x), at<float>(out), n); }, Free());

  using Scene = cpu::RenderProblem;
  py::class_<Scene>(m, "RenderProblem").def(py::init([](Address ab, Address guide, int64_t batch, int64_t low_height, int64_t low_width, int64_t height, int64_t width, Address rows_at, Address rows_beyond, Address columns_at, Address columns_beyond, float sharpness, float floor, int threads) { return Scene{at<float>(ab), at<float>(guide), batch, low_height, low_width, height, width, {at<int32_t>(rows_at), at<float>(rows_beyond)}, {at<int32_t>(columns_at), at<float>(columns_beyond)}, sharpness, floor, threads}; }));
  m.def("render", [](const Scene& scene, Address L, int light, Planes rgb, bool preserve_lightness) { cpu::render(scene, at<void>(L), fastcolor::Sample(light), channels(rgb), preserve_lightness); }, Free());
  m.def("render_uv", [](const Scene& scene, int64_t down, int64_t across, bool cosited_down, bool cosited_across, int bits, float black, float luma_span, float chroma_span, float red, float blue, Address xyz_to_rgb, Address luma, int64_t luma_height, int64_t luma_width, int64_t row, int64_t image, Address u, Address v) { cpu::render_uv(scene, {down, across, cosited_down, cosited_across, bits, black, luma_span, chroma_span, red, blue, at<float>(xyz_to_rgb)}, at<void>(luma), luma_height, luma_width, row, image, at<void>(u), at<void>(v)); }, Free());
  m.def("look_up", [](Address samples, bool wide, Address table, Address out, int64_t n, int threads) { cpu::look_up(at<void>(samples), wide, at<float>(table), at<float>(out), n, threads); }, Free());
  m.def("render_exp2", [](Address x, Address out, int64_t n) { cpu::render_exp2(at<float>(x), at<float>(out), n); }, Free());
}
