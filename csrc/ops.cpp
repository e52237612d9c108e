// SPDX-License-Identifier: Apache-2.0
// START HERE (native): the schema of every op, and the Python module with build information and raw kernel entry
// points. The implementations register themselves in csrc/<loss>.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"

STABLE_TORCH_LIBRARY(pydistill, m) {
  // Loss, gradient of the student's logits (empty unless asked for), and the factor that is still to be applied to it.
  m.def(
      "soft_target(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor? num_items, str divergence, "
      "float temperature, float hard_weight, float jsd_beta, bool scale_by_temperature, int ignore_index, "
      "str reduction, bool with_gradient) -> (Tensor loss, Tensor gradient, Tensor gradient_scale)");
  // The same with the gradient written over the student's logits.
  m.def(
      "soft_target_(Tensor(a!) student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor? num_items, str "
      "divergence, "
      "float temperature, float hard_weight, float jsd_beta, bool scale_by_temperature, int ignore_index, "
      "str reduction) -> (Tensor loss, Tensor gradient_scale)");
  // Relations are pairs of slots (0 queries, 1 keys, 2 values), each slot in one relation at most. Weighted loss, the
  // value of each relation, gradients of the student's slots (empty where not asked for), and the factor that is still
  // to be applied to them. With row_weights ("none") the gradient is that of the values weighted by row.
  m.def(
      "attention_relation(Tensor? student_q, Tensor? student_k, Tensor? student_v, Tensor? teacher_q, Tensor? "
      "teacher_k, Tensor? teacher_v, int[] relations, float[] weights, Tensor? mask, Tensor? segment_ids, Tensor? "
      "num_items, Tensor? row_weights, bool causal, int? relation_heads, float? scale, str reduction, bool "
      "with_gradient) -> (Tensor loss, Tensor parts, Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor "
      "gradient_scale)");
  // With `up` the student's rows are projected, projection [ds, dt], otherwise the teacher's, [dt, ds]. Loss, gradients
  // (empty where not asked for; those of projection and bias in fp32, fp64 for fp64), and the factor that is still to
  // be applied to the student's. With row_weights ("none") the gradients are those of the values weighted by row.
  m.def(
      "projected_mse(Tensor student, Tensor teacher, Tensor projection, Tensor? bias, Tensor? mask, Tensor? num_items, "
      "Tensor? row_weights, bool up, bool normalize, str method, str reduction, bool with_student, bool "
      "with_projection, bool with_bias) -> (Tensor loss, Tensor grad_student, Tensor grad_projection, Tensor "
      "grad_bias, Tensor gradient_scale)");
  // rows *= scale, one factor for all or one per row; nothing is touched where the factor is 1.
  m.def("scale_rows_(Tensor(a!) rows, Tensor scale) -> ()");
}

namespace {

constexpr int64_t stream_block = 1 << 16;

void stream(uintptr_t a, uintptr_t b, uintptr_t out, int64_t n) {
  torch::stable::parallel_for(0, (n + stream_block - 1) / stream_block, 1, [&](int64_t begin, int64_t end) {
    const int64_t low = begin * stream_block, high = end * stream_block < n ? end * stream_block : n;
    pyd::kernels().limits.stream(reinterpret_cast<const float*>(a) + low, reinterpret_cast<const float*>(b) + low,
                                 reinterpret_cast<float*>(out) + low, high - low);
  });
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
  m.def("cuda_architectures", [] { return std::vector<std::string>{}; }, "CUDA architectures compiled in.");
  m.def("stream", &stream, pybind11::arg("a"), pybind11::arg("b"), pybind11::arg("out"), pybind11::arg("n"),
        "out = a + b over n floats at three addresses (out aligned to 64 bytes), on all threads, with non-temporal "
        "stores: "
        "the memory limit of a loss that reads two tensors and writes one.");
  m.def("multiply_add", &multiply_add, pybind11::arg("iterations"),
        "Fused multiply-adds on registers, on all threads; returns the number of floating-point operations done.");
  m.def("exponentials", &exponentials, pybind11::arg("iterations"),
        "Exponentials of numbers in registers, on all threads; returns the number of exponentials done.");
}
