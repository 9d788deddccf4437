// kernels/cuda/render.cu for the CPU, with entry points for ctypes.
#include "cuda/render.cu"

using namespace fastcolor;
using namespace fastcolor::cuda;

extern "C" {

void set_seed(unsigned seed) {
  emulator::device.seed = seed;
  emulator::faults = 0;
}

int run_render(const RenderProblem* p, const void* L, int light, const Channels* rgb, bool preserve_lightness) {
  return render(*p, L, Sample(light), *rgb, preserve_lightness, nullptr);
}

int run_render_uv(const RenderProblem* p, const YuvLayout* yuv, const void* luma, int64_t height, int64_t width,
                  int64_t row, int64_t image, void* u, void* v) {
  return render_uv(*p, *yuv, luma, height, width, row, image, u, v, nullptr);
}

int run_look_up(const void* samples, bool wide, const float* table, float* out, int64_t n) {
  return look_up(samples, wide, table, out, n, nullptr);
}

}  // extern "C"
