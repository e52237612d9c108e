// SPDX-License-Identifier: Apache-2.0
// Launches of soft_target: which kernel, how many threads per row, how much shared memory.
#include "soft_target.h"

#include <algorithm>

#include "launch.cuh"
#include "soft_target.cuh"

namespace pyd {
namespace {

static_assert(sizeof(SoftTargetScales) <= soft_target_scales_bytes);

constexpr int narrow_block = 128;  // threads of a block in which several teams work

// Up to 32 classes have a thread each; of wider rows each thread gets four 16-byte vectors, as far as a block goes.
int team_size(int64_t classes, int64_t element) {
  const int64_t wanted = classes <= warp_size ? classes : std::max<int64_t>(warp_size, classes * element / 64);
  int64_t size = 1;
  while (size < wanted && size < most_threads) size *= 2;
  return static_cast<int>(size);
}

template <class S, Divergence D>
cudaError_t launch_rows(const SoftTargetProblem& p, const SoftTargetRows& a, cudaStream_t stream) {
  int most_shared = 0;
  if (const auto error = find_most_shared(most_shared)) return error;
  const int block = a.team > warp_size ? a.team : narrow_block;
  const int64_t teams = block / a.team, blocks = blocks_of(a.rows, teams);
  int64_t shared = soft_target_slots_bytes(a.team);
  const int64_t with_rows = shared + teams * 2 * soft_target_kept_bytes(p.classes, sizeof(S));
  // A walk after the first is what rows are kept for.
  const bool cached = (p.grad != nullptr || D == Divergence::jsd) && with_rows <= most_shared;
  if (cached) shared = with_rows;
  const auto kernel = cached ? soft_target_rows<S, D, true> : soft_target_rows<S, D, false>;
  // More blocks than a grid holds would be rows of more bytes than any device has.
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), block, shared, stream, a);
}

template <class S>
cudaError_t launch_divergence(const SoftTargetProblem& p, const SoftTargetRows& a, cudaStream_t stream) {
  switch (p.divergence) {
    case Divergence::forward_kl:
      return launch_rows<S, Divergence::forward_kl>(p, a, stream);
    case Divergence::reverse_kl:
      return launch_rows<S, Divergence::reverse_kl>(p, a, stream);
    case Divergence::jsd:
      return launch_rows<S, Divergence::jsd>(p, a, stream);
    case Divergence::mse:
      return launch_rows<S, Divergence::mse>(p, a, stream);
    case Divergence::cross_entropy:
      return launch_rows<S, Divergence::cross_entropy>(p, a, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_dtype(const SoftTargetProblem& p, const SoftTargetRows& a, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::f32:
      return launch_divergence<float>(p, a, stream);
    case Dtype::bf16:
      return launch_divergence<__nv_bfloat16>(p, a, stream);
    case Dtype::f16:
      return launch_divergence<__half>(p, a, stream);
    case Dtype::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

// Threads of the kernels that are one block: a row each, up to a full block.
int single_block(int64_t rows) {
  return static_cast<int>(std::clamp<int64_t>((rows + warp_size - 1) / warp_size * warp_size, warp_size, most_threads));
}

int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace

int launch_soft_target(const SoftTargetProblem& p, const SoftTargetCuda& c, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  auto* const scales = static_cast<SoftTargetScales*>(c.scales);
  PYD_LAUNCH(soft_target_scales, 1, single_block(p.rows), (reduction_bytes<double, 1>), stream, p.mask, p.labels,
             p.ignore_index, p.rows, c.mean, c.num_items, p.dtype == Dtype::f16, p.soft_value, p.hard_value, scales,
             c.gradient_scale);
  if (const auto error = cudaGetLastError()) return error;
  if (p.rows > 0) {
    const SoftTargetRows a{.rows = p.rows,
                           .classes = static_cast<int>(p.classes),
                           .team = team_size(p.classes, element_size(p.dtype)),
                           .student = p.student,
                           .teacher = p.teacher,
                           .grad = p.grad,
                           .labels = p.labels,
                           .mask = p.mask,
                           .ignore_index = p.ignore_index,
                           .inverse_temperature = static_cast<float>(1 / p.temperature),
                           .jsd_beta = static_cast<float>(p.jsd_beta),
                           .soft_value = static_cast<float>(p.soft_value),
                           .hard_value = static_cast<float>(p.hard_value),
                           .hard = p.hard_value != 0,
                           .scales = scales,
                           .row_values = c.row_values};
    if (const auto error = launch_dtype(p, a, stream)) return error;
  }
  if (c.loss == nullptr) return cudaSuccess;
  PYD_LAUNCH(soft_target_total, 1, single_block(p.rows), (reduction_bytes<double, 1>), stream,
             static_cast<const float*>(c.row_values), p.rows, static_cast<const SoftTargetScales*>(scales), c.loss);
  return cudaGetLastError();
}

}  // namespace pyd
