"""The kernels of fastcolor: SIMD C++, CUDA C++ and Triton. Nothing here knows a model, a file or a command."""
