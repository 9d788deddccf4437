// kernels/cuda/lab.cu for the CPU, with entry points for ctypes.
#include "cuda/lab.cu"

using namespace fastcolor;
using namespace fastcolor::cuda;

extern "C" {

void set_seed(unsigned seed) {
  emulator::device.seed = seed;
  emulator::faults = 0;
}

int run_rgb_to_lab(const Channels* rgb, const Channels* lab, int64_t images, int64_t pixels) {
  return rgb_to_lab(*rgb, *lab, images, pixels, nullptr);
}

int run_rgb_to_lab_backward(const Channels* grad, const Channels* rgb, const Channels* out, int64_t images,
                            int64_t pixels) {
  return rgb_to_lab_backward(*grad, *rgb, *out, images, pixels, nullptr);
}

int run_lab_to_rgb(const Channels* lab, const Channels* rgb, bool preserve_lightness, int64_t images, int64_t pixels) {
  return lab_to_rgb(*lab, *rgb, preserve_lightness, images, pixels, nullptr);
}

int run_lab_to_rgb_backward(const Channels* grad, const Channels* lab, const Channels* out, bool preserve_lightness,
                            int64_t images, int64_t pixels) {
  return lab_to_rgb_backward(*grad, *lab, *out, preserve_lightness, images, pixels, nullptr);
}

}  // extern "C"
