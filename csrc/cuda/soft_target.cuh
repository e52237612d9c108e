// SPDX-License-Identifier: Apache-2.0
// Soft-target loss on the GPU: value and gradient in one kernel, one team of threads per row.
//
// With p = softmax(t / T), q = softmax(s / T) and unnormalised exponentials e^t, e^s relative to the row's maxima m,
// the forward KL (Hinton et al. 2015, arXiv 1503.02531) of a row is
//   KL(p||q) = A / (T Zt) - log Zt + log Zs,   A = sum e^t ((t - mt) - (s - ms)),   dKL/ds = (q - p) / T,
// the reverse KL the same with the sides swapped, and its gradient q (log(q / p) - KL) / T. The generalised
// Jensen-Shannon divergence (arXiv 2306.13649) has the gradient (1 - b) q (log(q / m) - KL(q||m)) / T.
//
// The first walk over a row reads it from memory and gives maxima and sums: every thread keeps its own running maxima
// and moves its sums along when they rise. A second walk computes the gradient from the final ones. For it the row
// waits in shared memory, where both sides fit, and is read again from global memory where not. The Jensen-Shannon
// divergence needs normalised probabilities for its value, and so a walk of its own in between.
//
// Sums of a row are in fp32: thousands of terms spread over many threads, added pairwise. Sums over rows are in fp64,
// whose cost at one addition per row is nothing.
#pragma once

#include "../soft_target.h"
#include "team.cuh"

namespace pyd {

constexpr int most_threads = 1024;
constexpr float log2e = 1.44269504f;

// What the denominator decides, computed on the device: the host never waits for a count.
struct SoftTargetScales {
  double denominator;
  float soft_grad, hard_grad;
};

// The problem as the kernel over rows reads it.
struct SoftTargetRows {
  int64_t rows;
  int classes;
  int team;  // threads per row
  Rows student, teacher;
  void* grad;
  const int64_t* labels;
  const bool* mask;
  int64_t ignore_index;
  float inverse_temperature, jsd_beta;
  float soft_value, hard_value;
  bool hard;
  const SoftTargetScales* scales;
  float* row_values;  // [rows]
};

// Shared memory of a team: slots for its reductions (within a warp there are none), and one side of its row.
__host__ __device__ constexpr int soft_target_slots_bytes(int team) {
  return team > warp_size ? reduction_bytes<float, 2 + 5 + 2> : 0;
}
__host__ __device__ constexpr int64_t soft_target_kept_bytes(int64_t classes, int64_t element) {
  return (classes * element + 2 * vector_bytes - 1) / vector_bytes * vector_bytes;
}

__device__ __forceinline__ bool valid_row(const bool* mask, const int64_t* labels, int64_t ignore_index, int64_t r) {
  return (mask == nullptr || mask[r]) && (labels == nullptr || labels[r] != ignore_index);
}

template <class S>
__device__ __forceinline__ const S* row_of(const Rows& rows, int64_t r) {
  const int64_t outer = r < rows.inner ? 0 : r / rows.inner;
  return reinterpret_cast<const S*>(static_cast<const char*>(rows.data) + outer * rows.outer_stride +
                                    (r - outer * rows.inner) * rows.inner_stride);
}

// One block. Counts the valid rows where the mean needs it, and writes what follows from the denominator.
__global__ void __launch_bounds__(most_threads)
    soft_target_scales(const bool* mask, const int64_t* labels, int64_t ignore_index, int64_t rows, bool mean,
                       const double* num_items, bool half_precision, double soft_value, double hard_value,
                       SoftTargetScales* scales, float* gradient_scale) {
  PYD_DYNAMIC_SHARED(shared);
  double count[1] = {0};
  if (mean && num_items == nullptr) {
    for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) count[0] += valid_row(mask, labels, ignore_index, r);
    reduce<Sum>(team_of(blockDim.x), count, reinterpret_cast<double*>(shared));
  }
  if (threadIdx.x != 0) return;
  const double denominator = !mean ? 1 : num_items != nullptr ? *num_items : fmax(count[0], 1.0);
  const double later = left_to_backward(denominator, half_precision);
  *scales = {denominator, static_cast<float>(soft_value / (denominator * later)),
             static_cast<float>(hard_value / (denominator * later))};
  *gradient_scale = static_cast<float>(later);
}

// One block: the rows' values added up in a fixed order, and divided.
__global__ void __launch_bounds__(most_threads)
    soft_target_total(const float* row_values, int64_t rows, const SoftTargetScales* scales, float* loss) {
  PYD_DYNAMIC_SHARED(shared);
  double total[1] = {0};
  for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) total[0] += row_values[r];
  reduce<Sum>(team_of(blockDim.x), total, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) *loss = static_cast<float>(total[0] / scales->denominator);
}

// What differences are taken to: the maximum, unless there is nothing above -inf.
__device__ __forceinline__ float reference_of(float top) { return top == -INFINITY ? 0.0f : top; }

// x where it is multiplied by something positive, 0 where by 0: a class of probability 0 contributes nothing.
__device__ __forceinline__ float unless_zero(float factor, float x) { return factor > 0 ? x : 0.0f; }

// NaN stays NaN.
__device__ __forceinline__ float at_least_zero(float x) { return x < 0 ? 0.0f : x; }

// Maxima of the classes seen so far, and sums relative to them.
template <Divergence D>
struct SoftTargetSums {
  float top_teacher = -INFINITY, top_student = -INFINITY;
  float teacher = 0, student = 0;  // sums of exponentials
  float product = 0;               // A above; for mse the squared distance
  float hard = 0;                  // sum of the student's exponentials at T = 1

  // Moves the sums to higher maxima.
  __device__ __forceinline__ void raise(float new_teacher, float new_student, float exponent) {
    const float to_teacher = reference_of(new_teacher), to_student = reference_of(new_student);
    const float by_teacher = reference_of(top_teacher) - to_teacher,
                by_student = reference_of(top_student) - to_student;
    // From -inf the factor is 0, like the sum that it multiplies.
    const float factor_teacher = exp2f((top_teacher - to_teacher) * exponent);
    const float factor_student = exp2f((top_student - to_student) * exponent);
    // What has become negligible is dropped, even if it was infinite.
    if constexpr (D == Divergence::forward_kl)
      product = unless_zero(factor_teacher, factor_teacher * (product + teacher * (by_teacher - by_student)));
    if constexpr (D == Divergence::cross_entropy)
      product = unless_zero(factor_teacher, factor_teacher * (product + teacher * by_student));
    if constexpr (D == Divergence::reverse_kl)
      product = unless_zero(factor_student, factor_student * (product + student * (by_student - by_teacher)));
    teacher *= factor_teacher;
    student *= factor_student;
    hard *= exp2f((top_student - to_student) * log2e);
    top_teacher = new_teacher;
    top_student = new_student;
  }
};

// One team per row. `cached`: both sides of the row wait in shared memory for the walks after the first.
template <class S, Divergence D, bool cached>
__global__ void __launch_bounds__(most_threads) soft_target_rows(const SoftTargetRows a) {
  constexpr bool soft = D != Divergence::mse;  // mse is a distance of logits, without exponentials
  PYD_DYNAMIC_SHARED(shared);
  const Team team = team_of(a.team);
  const int in_block = threadIdx.x / team.size;
  const int64_t r = int64_t{blockIdx.x} * (blockDim.x / team.size) + in_block;
  if (r >= a.rows) return;
  const S *student = row_of<S>(a.student, r), *teacher = row_of<S>(a.teacher, r);
  S* const grad = a.grad == nullptr ? nullptr : static_cast<S*>(a.grad) + r * a.classes;

  if (!valid_row(a.mask, a.labels, a.ignore_index, r)) {
    if (grad != nullptr)
      walk<S>(team, pieces_of(a.classes, grad), [&](auto width, int i) {
        constexpr int n = decltype(width)::value;
        const float zeros[n] = {};
        Vector<S, n> out;
        narrow(zeros, out);
        store(out, grad + i);
      });
    if (team.rank == 0) a.row_values[r] = 0;
    return;
  }

  float* const slots = reinterpret_cast<float*>(shared);
  [[maybe_unused]] S *kept_student = nullptr, *kept_teacher = nullptr;
  if constexpr (cached) {
    // At the same distance from a 16-byte boundary as the row itself.
    const int side = static_cast<int>(soft_target_kept_bytes(a.classes, sizeof(S)));
    unsigned char* const kept = shared + soft_target_slots_bytes(team.size) + 2 * in_block * side;
    kept_student = reinterpret_cast<S*>(kept + phase_of(student));
    kept_teacher = reinterpret_cast<S*>(kept + side + phase_of(teacher));
  }

  const float inverse_T = a.inverse_temperature, exponent = log2e * inverse_T;
  const bool shared_exponentials = soft && inverse_T == 1;  // of the soft and the hard part
  const int64_t given = a.hard ? a.labels[r] : 0;
  const int label = a.hard && given >= 0 && given < a.classes ? static_cast<int>(given) : -1;
  // A kernel cannot raise: a label that is no class makes its row NaN.
  float label_logit = a.hard && label < 0 ? NAN : 0.0f;

  const bool aligned_student = phase_of(student) == 0, aligned_teacher = phase_of(teacher) == 0;
  SoftTargetSums<D> sums;
  walk<S>(team, pieces_of<S>(a.classes), [&](auto width, int i) {
    constexpr int n = decltype(width)::value;
    const auto raw_student = load<n>(student + i, aligned_student);
    const auto raw_teacher = load<n>(teacher + i, aligned_teacher);
    if constexpr (cached) {
      store(raw_student, kept_student + i, aligned_student);
      store(raw_teacher, kept_teacher + i, aligned_teacher);
    }
    float s[n], t[n];
    widen(raw_student, s);
    widen(raw_teacher, t);
    float top_student = sums.top_student, top_teacher = sums.top_teacher;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      top_student = fmaxf(top_student, s[k]);
      if (soft) top_teacher = fmaxf(top_teacher, t[k]);
    }
    sums.raise(top_teacher, top_student, exponent);
    const float ref_student = reference_of(top_student), ref_teacher = reference_of(top_teacher);
    [[maybe_unused]] float es[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float ds = s[k] - ref_student;
      if constexpr (!soft) {
        const float d = s[k] == t[k] ? 0.0f : s[k] - t[k];  // two infinities of one sign agree
        sums.product = fmaf(d, d, sums.product);
      } else {
        const float dt = t[k] - ref_teacher, et = exp2f(dt * exponent);
        es[k] = exp2f(ds * exponent);
        sums.student += es[k];
        sums.teacher += et;
        if (D == Divergence::forward_kl) sums.product = fmaf(et, unless_zero(et, dt - ds), sums.product);
        if (D == Divergence::cross_entropy) sums.product = fmaf(et, unless_zero(et, ds), sums.product);
        if (D == Divergence::reverse_kl) sums.product = fmaf(es[k], unless_zero(es[k], ds - dt), sums.product);
      }
    }
    if (a.hard) {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        sums.hard += shared_exponentials ? es[k] : exp2f((s[k] - ref_student) * log2e);
        if (i + k == label) label_logit = s[k];
      }
    }
  });

  // The team's maxima, then its sums relative to them.
  float tops[2] = {sums.top_teacher, sums.top_student};
  reduce<Maximum>(team, tops, slots);
  sums.raise(tops[0], tops[1], exponent);
  float totals[5] = {sums.teacher, sums.student, sums.product, sums.hard, label_logit};
  reduce<Sum>(team, totals, slots + 2 * warp_size);
  const float z_teacher = totals[0], z_student = totals[1], product = totals[2], z_hard = totals[3];
  const float ref_teacher = reference_of(tops[0]), ref_student = reference_of(tops[1]);
  const S *student_again = cached ? kept_student : student, *teacher_again = cached ? kept_teacher : teacher;

  const float log_ratio = soft ? logf(z_student / z_teacher) : 0.0f;
  float divergence = product, kl_student = 0;
  if (D == Divergence::forward_kl) divergence = at_least_zero(product * inverse_T / z_teacher + log_ratio);
  if (D == Divergence::cross_entropy) divergence = logf(z_student) - product * inverse_T / z_teacher;
  if (D == Divergence::reverse_kl) divergence = at_least_zero(product * inverse_T / z_student - log_ratio);
  const float inverse_teacher = 1 / z_teacher, inverse_student = 1 / z_student;
  // Of one class: p and q, and log(p / m) and log(q / m), for the Jensen-Shannon divergence.
  const auto against_mixture = [&](float s, float t, float& p, float& q, float& log_p, float& log_q) {
    constexpr float tiny = 1e-37f;
    p = exp2f((t - ref_teacher) * exponent) * inverse_teacher;
    q = exp2f((s - ref_student) * exponent) * inverse_student;
    const float m = fmaxf(fmaf(a.jsd_beta, p - q, q), tiny);  // so written, m is q exactly where p is q
    log_p = logf(fmaxf(p / m, tiny));
    log_q = logf(fmaxf(q / m, tiny));
  };
  if constexpr (D == Divergence::jsd) {
    float kl[2] = {0, 0};  // KL(p||m), KL(q||m)
    walk<S>(team, pieces_of<S>(a.classes), [&](auto width, int i) {
      constexpr int n = decltype(width)::value;
      float s[n], t[n];
      widen(load<n>(student_again + i, aligned_student), s);
      widen(load<n>(teacher_again + i, aligned_teacher), t);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        float p, q, log_p, log_q;
        against_mixture(s[k], t[k], p, q, log_p, log_q);
        kl[0] = fmaf(p, log_p, kl[0]);
        kl[1] = fmaf(q, log_q, kl[1]);
      }
    });
    reduce<Sum>(team, kl, slots + 7 * warp_size);
    kl_student = kl[1];
    divergence = at_least_zero(fmaf(a.jsd_beta, kl[0] - kl[1], kl[1]));
  }
  float mean = 0, rest = 0;  // of T log(q / p) under q, less what the sums contribute
  if constexpr (D == Divergence::reverse_kl) {
    if (grad != nullptr) {
      // Its gradient is a difference from this mean, which may be large: what the first walk's rounding left is added.
      mean = product / z_student;
      float left[1] = {0};
      walk<S>(team, pieces_of<S>(a.classes), [&](auto width, int i) {
        constexpr int n = decltype(width)::value;
        float s[n], t[n];
        widen(load<n>(student_again + i, aligned_student), s);
        widen(load<n>(teacher_again + i, aligned_teacher), t);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const float ds = s[k] - ref_student, dt = t[k] - ref_teacher, es = exp2f(ds * exponent);
          left[0] = fmaf(es, unless_zero(es, ds - dt) - mean, left[0]);
        }
      });
      reduce<Sum>(team, left, slots + 7 * warp_size);
      rest = left[0] / z_student;
    }
  }
  if (team.rank == 0) {
    float value = a.soft_value * divergence;
    if (a.hard) value = fmaf(a.hard_value, logf(z_hard) - (totals[4] - ref_student), value);
    a.row_values[r] = value;
  }
  if (grad == nullptr) return;

  const float soft_grad = a.scales->soft_grad * inverse_T;
  const float hard_grad = label < 0 ? NAN : a.scales->hard_grad;
  const float of_student = soft_grad * inverse_student, of_teacher = soft_grad * inverse_teacher;
  const float of_hard = hard_grad / z_hard;
  // Element by element: how the row is cut does not matter, and 16-byte stores do.
  const bool with_student = phase_of(student) == phase_of(grad), with_teacher = phase_of(teacher) == phase_of(grad);
  walk<S>(team, pieces_of(a.classes, grad), [&](auto width, int i) {
    constexpr int n = decltype(width)::value;
    float s[n], t[n], g[n];
    widen(load<n>(student_again + i, with_student), s);
    widen(load<n>(teacher_again + i, with_teacher), t);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      [[maybe_unused]] const float ds = s[k] - ref_student, dt = t[k] - ref_teacher;
      if constexpr (D == Divergence::mse) {
        g[k] = s[k] == t[k] ? 0.0f : 2 * soft_grad * (s[k] - t[k]);
      } else if constexpr (D == Divergence::jsd) {
        float p, q, log_p, log_q;
        against_mixture(s[k], t[k], p, q, log_p, log_q);
        g[k] = (1 - a.jsd_beta) * soft_grad * q * (log_q - kl_student);
      } else {
        const float es = exp2f(ds * exponent);
        if (D == Divergence::reverse_kl)
          g[k] = of_student * es * (inverse_T * (unless_zero(es, ds - dt) - mean - rest));
        else
          g[k] = fmaf(of_student, es, -of_teacher * exp2f(dt * exponent));
      }
    }
    if (a.hard) {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        g[k] = fmaf(of_hard, exp2f((s[k] - ref_student) * log2e), g[k]);
        if (i + k == label) g[k] -= hard_grad;
      }
    }
    Vector<S, n> out;
    narrow(g, out);
    store(out, grad + i);
  });
}

}  // namespace pyd
