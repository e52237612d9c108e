// SPDX-License-Identifier: Apache-2.0
// START HERE (native): the Python module with build information and raw loops. The schemas of the ops are in
// pydistill/_schemas.py; their implementations register themselves in csrc/<loss>.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

constexpr int64_t stream_block = 1 << 16;

void stream(uintptr_t a, uintptr_t b, uintptr_t out, int64_t n) {
  torch::stable::parallel_for(0, (n + stream_block - 1) / stream_block, 1, [&](int64_t begin, int64_t end) {
    const int64_t low = begin * stream_block, high = end * stream_block < n ? end * stream_block : n;
    pyd::kernels().limits.stream(reinterpret_cast<const float*>(a) + low, reinterpret_cast<const float*>(b) + low,
                                 reinterpret_cast<float*>(out) + low, high - low);
  });
}

// PYDISTILL_CUDA_ARCHITECTURES is "8.0 9.0 10.0+PTX", or empty where CUDA was left out.
std::vector<std::string> cuda_architectures() {
  std::istringstream list(PYDISTILL_CUDA_ARCHITECTURES);
  return {std::istream_iterator<std::string>(list), {}};
}

// The same loop on every thread; returns what all of them did.
double on_all_threads(double (*loop)(int64_t), int64_t iterations) {
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loop(iterations);
  });
  return loop(1) * static_cast<double>(iterations * threads);
}

double multiply_add(int64_t iterations) { return on_all_threads(pyd::kernels().limits.multiply_add, iterations); }

double exponentials(int64_t iterations) { return on_all_threads(pyd::kernels().limits.exponentials, iterations); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and raw loops of pydistill's compiled extension.";
  m.attr("version") = PYDISTILL_VERSION;
  m.def("isas_compiled", &pyd::isas_compiled, "Instruction sets with kernels in this build, best first.");
  m.def("isa", [] { return std::string(pyd::kernels().isa); }, "The instruction set whose kernels run.");
  m.def("cuda_architectures", &cuda_architectures,
        "CUDA architectures compiled in, as in '9.0', and '10.0+PTX' for those that newer devices can use as well.");
  m.def("stream", &stream, pybind11::arg("a"), pybind11::arg("b"), pybind11::arg("out"), pybind11::arg("n"),
        "out = a + b over n floats at three addresses (out aligned to 64 bytes), on all threads, with non-temporal "
        "stores: "
        "the memory limit of a loss that reads two tensors and writes one.");
  m.def("multiply_add", &multiply_add, pybind11::arg("iterations"),
        "Fused multiply-adds on registers, on all threads; returns the number of floating-point operations done.");
  m.def("exponentials", &exponentials, pybind11::arg("iterations"),
        "Exponentials of numbers in registers, on all threads; returns the number of exponentials done.");
}
