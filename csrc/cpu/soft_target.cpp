// SPDX-License-Identifier: Apache-2.0
// Soft-target loss on the CPU: value and gradient in one sweep. Compiled once per instruction set.
//
// With p = softmax(t / T), q = softmax(s / T) and unnormalised exponentials e^t, e^s relative to a reference r near the
// row's maximum, the forward KL (Hinton et al. 2015, arXiv 1503.02531) of a row is
//   KL(p||q) = A / (T Zt) - log Zt + log Zs,   A = sum e^t ((t - rt) - (s - rs)),   dKL/ds = (q - p) / T,
// the reverse KL the same with the sides swapped, and its gradient q (log(q / p) - KL) / T. The generalised
// Jensen-Shannon divergence (arXiv 2306.13649) has the gradient (1 - b) q (log(q / m) - KL(q||m)) / T.
//
// A row is walked in chunks that fit the first-level cache. The reference is the maximum of the first few classes; it
// is kept until a later value exceeds it by so much that a sum leaves the safe range, which saves a pass over memory
// for the maximum. The teacher's exponentials wait in a per-thread buffer in the second-level cache, the student's
// where the gradient will be, and a second walk writes it. So memory sees two reads and one write per element.
//
// A chunk that outgrows its reference, or holds inf or NaN (classes ruled out have logits of -inf), is done once more
// with the chunk's own maximum and without terms for classes of probability 0.

#include "soft_target.h"

#include "simd.h"
#include "transpose.h"

namespace pyd::PYD_ISA {
namespace {

constexpr int64_t chunk = 1024;
constexpr int64_t reference_head = 256;  // classes whose maximum is a row's first reference
constexpr int64_t narrow_classes = 16;   // up to here, one row per vector lane
constexpr double log2e = 1.4426950408889634;
// A chunk's sum of exponentials above this moves the reference. 2^24 leaves room for the fourth power (T = 4), which
// stays below the second limit; at other temperatures the exponentials at T = 1 may be the ones that grow.
constexpr double safe_sum = 16777216.0, most_hard = 1e30;

// How the hard-label term gets its exponentials e^(s - r) at T = 1 from those at the loss's temperature.
enum class Hard { none, power1, power2, power4, own };

template <class X>
PYD_INLINE bool finite(X x) {
  return x - x == 0;
}

template <class S>
PYD_INLINE const S* row_of(const Rows& rows, int64_t r) {
  const int64_t outer = r < rows.inner ? 0 : r / rows.inner;  // a division costs more than a narrow row
  return reinterpret_cast<const S*>(static_cast<const char*>(rows.data) + outer * rows.outer_stride +
                                    (r - outer * rows.inner) * rows.inner_stride);
}

PYD_INLINE bool valid(const SoftTargetArgs& a, int64_t r) {
  return (a.mask == nullptr || a.mask[r]) && (a.labels == nullptr || a.labels[r] != a.ignore_index);
}

// The first n lanes of x, zero in the others.
template <class V>
PYD_INLINE V keep_first(V x, int64_t n) {
  typename V::scalar lanes[V::width];
  for (int i = 0; i < V::width; ++i) lanes[i] = i < n ? 1 : 0;
  return where_positive(V::load(lanes), x, V::all(0));
}

template <class V>
PYD_INLINE V power(V x, Hard hard) {
  if (hard == Hard::power2) return x * x;
  if (hard == Hard::power4) return (x * x) * (x * x);
  return x;
}

template <class V, class S>
typename V::scalar max_of(const S* x, int64_t n) {
  using F = typename V::scalar;
  const F lowest = -__builtin_inf();
  V m = V::all(lowest);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) m = max(V::load(x + i), m);
  if (i < n) m = max(V::load_part(x + i, n - i, lowest), m);
  return largest(m);
}

// Full-precision storage of a gradient can hold the student's exponentials until the gradient takes their place.
template <class S, class F>
constexpr bool may_overwrite = sizeof(S) == sizeof(F);

struct Sums {
  double teacher = 0, student = 0;  // sums of exponentials
  double product = 0;               // A above; for mse the squared distance
  double hard = 0;                  // sum of the student's exponentials at T = 1
};

// What a row leaves behind for its second walk, in the thread's scratch memory.
template <class F>
struct Buffers {
  F *teacher, *student, *hard;               // [classes + padding] each
  F* saved;                                  // [chunk]: the student's logits, which their exponentials may overwrite
  F *teacher_reference, *student_reference;  // [chunks] each; -inf for a chunk with nothing but -inf up to its end

  static size_t row_elements(int64_t classes) { return (classes + 63) / 64 * 64 + 64; }
  static size_t chunks(int64_t classes) { return (classes + chunk - 1) / chunk; }
  static size_t bytes(int64_t classes) { return (3 * row_elements(classes) + chunk + 2 * chunks(classes)) * sizeof(F); }
  Buffers(void* scratch, int64_t classes) {
    // Staggered by a cache line, so that the three streams do not fall into the same sets.
    teacher = static_cast<F*>(scratch);
    student = teacher + row_elements(classes) + 16;
    hard = student + row_elements(classes) + 16;
    saved = teacher + 3 * row_elements(classes);
    teacher_reference = saved + chunk;
    student_reference = teacher_reference + chunks(classes);
  }
};

// First walk over one chunk of n classes: exponentials out, their sums returned. `careful` leaves classes of
// probability 0 out of products that would be 0 * inf. `out_student` may be where `student` is.
template <class V, class S, Divergence D, Hard H, bool careful>
__attribute__((noinline)) Sums first_walk(const S* teacher, const S* student, int64_t n,
                                          typename V::scalar teacher_reference, typename V::scalar student_reference,
                                          double temperature, typename V::scalar* out_teacher,
                                          typename V::scalar* out_student, typename V::scalar* out_hard,
                                          typename V::scalar* saved) {
  using F = typename V::scalar;
  constexpr int width = V::width;
  const V zero = V::all(0), scale = V::all(static_cast<F>(log2e / temperature)), unit = V::all(static_cast<F>(log2e));
  const V ref_t = V::all(teacher_reference), ref_s = V::all(student_reference);
  V sum_t = zero, sum_s = zero, sum_a = zero, sum_h = zero;

  const auto step = [&](int64_t i, V t, V s, int64_t lanes) PYD_INLINE_LAMBDA {
    if constexpr (may_overwrite<S, F>) s.store(saved + i);
    if constexpr (D == Divergence::mse) {
      V d = careful ? where_equal(s, t, zero, s - t) : s - t;
      if (lanes < width) d = keep_first(d, lanes);
      sum_a = fma(d, d, sum_a);
      d.store(out_teacher + i);
    }
    if constexpr (D != Divergence::mse || H != Hard::none) {
      const V ds = s - ref_s;
      V es = exp2(ds * scale);
      if (lanes < width) es = keep_first(es, lanes);
      sum_s = sum_s + es;
      if (lanes < width)
        es.store_part(out_student + i, lanes);
      else
        es.store(out_student + i);
      if constexpr (H == Hard::power2 || H == Hard::power4) sum_h = sum_h + power(es, H);
      if constexpr (H == Hard::own) {
        V eh = exp2(ds * unit);
        if (lanes < width) eh = keep_first(eh, lanes);
        sum_h = sum_h + eh;
        eh.store(out_hard + i);
      }
      if constexpr (D != Divergence::mse) {
        const V dt = t - ref_t;
        V et = exp2(dt * scale);
        if (lanes < width) et = keep_first(et, lanes);
        sum_t = sum_t + et;
        if constexpr (D == Divergence::forward_kl || D == Divergence::cross_entropy) {
          V d = D == Divergence::forward_kl ? dt - ds : ds;
          if (careful) d = where_positive(et, d, zero);
          sum_a = fma(et, d, sum_a);
        }
        if constexpr (D == Divergence::reverse_kl) {
          V d = ds - dt;
          if (careful) d = where_positive(es, d, zero);
          sum_a = fma(es, d, sum_a);
          d.store(out_teacher + i);  // the gradient needs the log ratio, not the teacher's exponential
        } else {
          et.store(out_teacher + i);
        }
      }
    }
  };

  constexpr int64_t ahead = 16384 / sizeof(S);  // far enough for memory to answer, into the second-level cache
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    __builtin_prefetch(teacher + i + ahead, 0, 2);
    __builtin_prefetch(student + i + ahead, 0, 2);
    step(i, V::load(teacher + i), V::load(student + i), width);
  }
  // Lanes past the end hold the references: differences 0, exponentials dropped by keep_first.
  if (i < n)
    step(i, V::load_part(teacher + i, n - i, teacher_reference), V::load_part(student + i, n - i, student_reference),
         n - i);
  return {sum(sum_t), sum(sum_s), sum(sum_a), sum(sum_h)};
}

// One side's reference, moved up to `top`: returns by how much (0 where there was none to move).
template <class F>
PYD_INLINE double move_reference(F& reference, F top) {
  const F old = reference;
  if (!(top > reference)) return 0;
  reference = top;
  return old == -static_cast<F>(__builtin_inf()) ? 0 : double(old) - top;
}

// All of a row's first walk: exponentials in the buffers and in `exp_student`, sums in `total`.
template <class V, class S, Divergence D, Hard H>
void exponentials(const S* teacher, const S* student, int64_t classes, double temperature,
                  const Buffers<typename V::scalar>& b, typename V::scalar* exp_student, Sums& total,
                  typename V::scalar& ref_t, typename V::scalar& ref_s) {
  using F = typename V::scalar;
  const F unset = -__builtin_inf();
  const int64_t head = classes < reference_head ? classes : reference_head;
  ref_t = D == Divergence::mse ? F(0) : max_of<V>(teacher, head);
  ref_s = D == Divergence::mse && H == Hard::none ? F(0) : max_of<V>(student, head);
  total = Sums{};
  for (int64_t k = 0, low = 0; low < classes; ++k, low += chunk) {
    const int64_t n = classes - low < chunk ? classes - low : chunk;
    Sums part = first_walk<V, S, D, H, false>(teacher + low, student + low, n, ref_t, ref_s, temperature,
                                              b.teacher + low, exp_student + low, b.hard + low, b.saved);
    // Not so where a later maximum outgrew its reference, and where there is inf or NaN.
    if (!(part.teacher <= safe_sum && part.student <= safe_sum && part.hard <= most_hard && finite(part.product))) {
      const double shift_t = D == Divergence::mse ? 0 : move_reference(ref_t, max_of<V>(teacher + low, n));
      const S* logits = student + low;
      S again[chunk];
      if constexpr (may_overwrite<S, F>) {  // by the walk just done
        __builtin_memcpy(again, b.saved, n * sizeof(S));
        logits = again;
      }
      const double shift_s = D == Divergence::mse && H == Hard::none ? 0 : move_reference(ref_s, max_of<V>(logits, n));
      const double factor_t = __builtin_exp2(shift_t * log2e / temperature);
      const double factor_s = __builtin_exp2(shift_s * log2e / temperature);
      if (D == Divergence::forward_kl) total.product = factor_t * (total.product + total.teacher * (shift_t - shift_s));
      if (D == Divergence::cross_entropy) total.product = factor_t * (total.product + total.teacher * shift_s);
      if (D == Divergence::reverse_kl) total.product = factor_s * (total.product + total.student * (shift_s - shift_t));
      total.teacher *= factor_t;
      total.student *= factor_s;
      total.hard *= __builtin_exp2(shift_s * log2e);
      part = first_walk<V, S, D, H, true>(teacher + low, logits, n, ref_t == unset ? F(0) : ref_t,
                                          ref_s == unset ? F(0) : ref_s, temperature, b.teacher + low,
                                          exp_student + low, b.hard + low, b.saved);
    }
    b.teacher_reference[k] = ref_t;
    b.student_reference[k] = ref_s;
    total.teacher += part.teacher;
    total.student += part.student;
    total.product += part.product;
    total.hard += part.hard;
  }
  if (H == Hard::power1) total.hard = total.student;
}

// JSD's middle walk: log(q / m) over the teacher's buffer, KL(p||m) and KL(q||m) added up.
template <class V>
void jsd_walk(int64_t n, typename V::scalar factor_t, typename V::scalar factor_s, double beta,
              typename V::scalar* e_teacher, const typename V::scalar* e_student, double& kl_p, double& kl_q) {
  using F = typename V::scalar;
  const V v_beta = V::all(static_cast<F>(beta)), tiny = V::all(static_cast<F>(1e-37));
  const V vt = V::all(factor_t), vs = V::all(factor_s);
  V sum_p = V::all(0), sum_q = V::all(0);
  const auto step = [&](int64_t i, V es) PYD_INLINE_LAMBDA {
    const V p = vt * V::load(e_teacher + i), q = vs * es;
    const V m = max(fma(v_beta, p - q, q), tiny);  // so written, m is q exactly where p is q
    const V log_p = log(max(p / m, tiny)), log_q = log(max(q / m, tiny));
    sum_p = fma(p, log_p, sum_p);
    sum_q = fma(q, log_q, sum_q);
    log_q.store(e_teacher + i);
  };
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) step(i, V::load(e_student + i));
  if (i < n) step(i, V::load_part(e_student + i, n - i, 0));
  kl_p += sum(sum_p);
  kl_q += sum(sum_q);
}

PYD_INLINE double at_least_zero(double x) { return x < 0 ? 0 : x; }

// One valid row: writes its gradient (unless grad is null) and returns its value.
template <class V, class S, Divergence D, Hard H>
double row(const SoftTargetArgs& a, const S* teacher, const S* student, S* grad, int64_t label,
           const Buffers<typename V::scalar>& b) {
  using F = typename V::scalar;
  const int64_t classes = a.classes;
  const double T = a.temperature;
  const double label_logit = H == Hard::none ? 0 : widen(student[label]);
  // The student's exponentials wait where the gradient will be: those lines have to be brought into the cache anyway,
  // and one stream less passes through it.
  F* exp_student = b.student;
  if constexpr (may_overwrite<S, F>)
    if (grad != nullptr) exp_student = grad;
  Sums z;
  F ref_t, ref_s;
  exponentials<V, S, D, H>(teacher, student, classes, T, b, exp_student, z, ref_t, ref_s);

  const auto chunk_scale = [&](F reference, F final_reference) {
    return reference == -static_cast<F>(__builtin_inf())
               ? 0
               : __builtin_exp2((double(reference) - final_reference) * log2e / T);
  };
  double divergence = 0, kl_q = 0;
  if constexpr (D == Divergence::forward_kl)
    divergence = at_least_zero(z.product / (T * z.teacher) - __builtin_log(z.teacher) + __builtin_log(z.student));
  if constexpr (D == Divergence::cross_entropy) divergence = __builtin_log(z.student) - z.product / (T * z.teacher);
  if constexpr (D == Divergence::reverse_kl)
    divergence = at_least_zero(z.product / (T * z.student) - __builtin_log(z.student) + __builtin_log(z.teacher));
  if constexpr (D == Divergence::mse) divergence = z.product;
  if constexpr (D == Divergence::jsd) {
    double kl_p = 0;
    for (int64_t k = 0, low = 0; low < classes; ++k, low += chunk) {
      const int64_t n = classes - low < chunk ? classes - low : chunk;
      jsd_walk<V>(n, static_cast<F>(chunk_scale(b.teacher_reference[k], ref_t) / z.teacher),
                  static_cast<F>(chunk_scale(b.student_reference[k], ref_s) / z.student), a.jsd_beta, b.teacher + low,
                  exp_student + low, kl_p, kl_q);
    }
    divergence = at_least_zero(a.jsd_beta * kl_p + (1 - a.jsd_beta) * kl_q);
  }
  double value = a.soft_value * divergence;
  if constexpr (H != Hard::none) value += a.hard_value * (__builtin_log(z.hard) - (label_logit - ref_s));
  if (grad == nullptr) return value;

  for (int64_t k = 0, low = 0; low < classes; ++k, low += chunk) {
    const int64_t n = classes - low < chunk ? classes - low : chunk;
    const F *e_t = b.teacher + low, *e_s = exp_student + low, *e_h = b.hard + low;
    const F chunk_t = b.teacher_reference[k], chunk_s = b.student_reference[k];
    const double factor_s = chunk_scale(chunk_s, ref_s);
    // Factor of the first buffer, of the second, and an offset, as each divergence uses them.
    F first = 0, second = 0, offset = 0;
    if constexpr (D == Divergence::forward_kl || D == Divergence::cross_entropy) {
      first = static_cast<F>(a.soft_grad / T / z.teacher * chunk_scale(chunk_t, ref_t));
      second = static_cast<F>(a.soft_grad / T / z.student * factor_s);
    }
    if constexpr (D == Divergence::reverse_kl) {
      first = static_cast<F>(1 / T);
      second = static_cast<F>(a.soft_grad / T / z.student * factor_s);
      const double moved = (double(chunk_s) - ref_s) - (double(chunk_t) - ref_t);
      offset = static_cast<F>((finite(moved) ? moved : 0) / T - __builtin_log(z.student) + __builtin_log(z.teacher) -
                              divergence);
    }
    if constexpr (D == Divergence::jsd) {
      second = static_cast<F>(a.soft_grad * (1 - a.jsd_beta) / T / z.student * factor_s);
      offset = static_cast<F>(-kl_q);
    }
    if constexpr (D == Divergence::mse) first = static_cast<F>(2 * a.soft_grad);
    F hard = 0;
    if constexpr (H != Hard::none)
      hard = static_cast<F>(a.hard_grad / z.hard *
                            (factor_s == 0 ? 0 : __builtin_exp2((double(chunk_s) - ref_s) * log2e)));
    const V v_first = V::all(first), v_second = V::all(second), v_offset = V::all(offset), v_hard = V::all(hard);

    const auto gradient = [&](int64_t i, V es) PYD_INLINE_LAMBDA -> V {
      const V x = V::load(e_t + i);
      V g;
      if constexpr (D == Divergence::forward_kl || D == Divergence::cross_entropy) g = fnma(v_first, x, v_second * es);
      if constexpr (D == Divergence::reverse_kl) g = v_second * es * fma(v_first, x, v_offset);
      if constexpr (D == Divergence::jsd) g = v_second * es * (x + v_offset);
      if constexpr (D == Divergence::mse) g = v_first * x;
      if constexpr (H == Hard::own) g = fma(v_hard, V::load(e_h + i), g);
      if constexpr (H == Hard::power1 || H == Hard::power2 || H == Hard::power4) g = fma(v_hard, power(es, H), g);
      return g;
    };
    // The label's own element is taken before its rounding to the storage type, which happens once.
    const int64_t at = label - low;
    F at_label = 0;
    if constexpr (H != Hard::none) {
      if (at >= 0 && at < n) {
        F lanes[V::width];
        const int64_t base = at / V::width * V::width, rest = n - base;
        gradient(base, rest < V::width ? V::load_part(e_s + base, rest, 0) : V::load(e_s + base)).store(lanes);
        at_label = static_cast<F>(lanes[at - base] - a.hard_grad);
      }
    }
    S* out = grad + low;
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) gradient(i, V::load(e_s + i)).store(out + i);
    if (i < n) gradient(i, V::load_part(e_s + i, n - i, 0)).store_part(out + i, n - i);
    if constexpr (H != Hard::none)
      if (at >= 0 && at < n) narrow(at_label, out[at]);
  }
  return value;
}

template <class S>
PYD_INLINE void write_row_loss(const SoftTargetArgs& a, int64_t r, double value) {
  if (a.row_loss == nullptr) return;
  if (sizeof(S) == sizeof(double))
    static_cast<double*>(a.row_loss)[r] = value;
  else
    static_cast<float*>(a.row_loss)[r] = static_cast<float>(value);
}

template <class V, class S, Divergence D, Hard H>
double wide_rows(const SoftTargetArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Buffers<typename V::scalar> buffers(scratch, a.classes);
  double total = 0;
  for (int64_t r = begin; r < end; ++r) {
    S* grad = a.grad == nullptr ? nullptr : static_cast<S*>(a.grad) + r * a.classes;
    double value = 0;
    if (valid(a, r))
      value = row<V, S, D, H>(a, row_of<S>(a.teacher, r), row_of<S>(a.student, r), grad,
                              H == Hard::none ? 0 : a.labels[r], buffers);
    else if (grad != nullptr)
      __builtin_memset(grad, 0, a.classes * sizeof(S));
    total += value;
    write_row_loss<S>(a, r, value);
  }
  return total;
}

// `n` rows of a tensor from row r0 on, one per lane; lanes that are not valid hold zeros.
template <class S>
PYD_INLINE void load_lanes(const Rows& rows, int64_t r0, int64_t n, const Transpose& transpose,
                           const Floats& valid_lanes, float* lanes) {
  constexpr int width = Floats::width;
  const int64_t classes = transpose.columns, row_bytes = classes * static_cast<int64_t>(sizeof(S));
  alignas(64) float flat[width * narrow_classes];
  const S* first = row_of<S>(rows, r0);
  // Contiguous where the last row lies where it would if all were.
  if (n == width && row_of<S>(rows, r0 + n - 1) == first + (n - 1) * classes && rows.inner_stride == row_bytes) {
    for (int64_t c = 0; c < classes; ++c) Floats::load(first + c * width).store(flat + c * width);
  } else {
    for (int64_t i = 0; i < width * classes; ++i) flat[i] = 0;
    for (int64_t l = 0; l < n; ++l)
      for (int64_t c = 0; c < classes; ++c) flat[l * classes + c] = widen(row_of<S>(rows, r0 + l)[c]);
  }
  transpose.load(flat, lanes);
  for (int64_t c = 0; c < classes; ++c) {
    float* p = lanes + c * width;
    where_positive(valid_lanes, Floats::load(p), Floats::all(0)).store(p);
  }
}

// Few classes: one row per lane, so that no lane idles and a logarithm is computed for a whole vector of rows. Where C
// is not 0 it is the number of classes, and the loops over them dissolve.
template <class S, Divergence D, int C>
double narrow_rows(const SoftTargetArgs& a, int64_t begin, int64_t end, void*) {
  using V = Floats;
  constexpr int width = V::width;
  const int64_t classes = C != 0 ? C : a.classes;
  const bool hard = a.hard_value != 0 || a.hard_grad != 0;
  const bool selective = a.mask != nullptr || a.labels != nullptr;
  const double T = a.temperature;
  const V zero = V::all(0), scale = V::all(static_cast<float>(log2e / T)), unit = V::all(static_cast<float>(log2e));
  const V inv_T = V::all(static_cast<float>(1 / T)), beta = V::all(static_cast<float>(a.jsd_beta)),
          tiny = V::all(1e-37f);
  const V soft_value = V::all(static_cast<float>(a.soft_value)), hard_value = V::all(static_cast<float>(a.hard_value));
  const V hard_grad = V::all(static_cast<float>(a.hard_grad));
  const V soft_grad = V::all(static_cast<float>(D == Divergence::mse   ? 2 * a.soft_grad
                                                : D == Divergence::jsd ? a.soft_grad * (1 - a.jsd_beta) / T
                                                                       : a.soft_grad / T));
  const Transpose transpose(classes);
  alignas(64) float teacher[width * narrow_classes], student[width * narrow_classes], own[width * narrow_classes] = {};
  alignas(64) float flat[width * narrow_classes];
  double total[width] = {};

  for (int64_t r0 = begin; r0 < end; r0 += width) {
    const int64_t n = end - r0 < width ? end - r0 : width;
    alignas(64) float weights[width], labels[width], values[width];
    V weight = V::all(1), label = V::all(-1);
    if (selective || n < width) {
      for (int64_t l = 0; l < width; ++l) {
        const bool ok = l < n && valid(a, r0 + l);
        weights[l] = ok ? 1 : 0;
        labels[l] = ok && hard ? static_cast<float>(a.labels[r0 + l]) : -1;
      }
      weight = V::load(weights);
      label = V::load(labels);
    }
    load_lanes<S>(a.teacher, r0, n, transpose, weight, teacher);
    load_lanes<S>(a.student, r0, n, transpose, weight, student);

    V top_t = V::load(teacher), top_s = V::load(student);
    for (int64_t c = 1; c < classes; ++c) {
      top_t = max(V::load(teacher + c * width), top_t);
      top_s = max(V::load(student + c * width), top_s);
    }
    V sum_t = zero, sum_s = zero, sum_a = zero, sum_h = zero, at_label = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const V t = V::load(teacher + c * width), s = V::load(student + c * width), dt = t - top_t, ds = s - top_s;
      const V et = exp2(dt * scale), es = exp2(ds * scale);
      V kept = et;  // what the gradient needs of the teacher
      if constexpr (D == Divergence::forward_kl) sum_a = fma(et, where_positive(et, dt - ds, zero), sum_a);
      if constexpr (D == Divergence::cross_entropy) sum_a = fma(et, where_positive(et, ds, zero), sum_a);
      if constexpr (D == Divergence::reverse_kl) {
        kept = where_positive(es, ds - dt, zero);
        sum_a = fma(es, kept, sum_a);
      }
      if constexpr (D == Divergence::mse) {
        kept = where_equal(s, t, zero, s - t);
        sum_a = fma(kept, kept, sum_a);
      }
      sum_t = sum_t + et;
      sum_s = sum_s + es;
      kept.store(teacher + c * width);
      es.store(student + c * width);
      if (hard) {
        const V eh = exp2(ds * unit);
        sum_h = sum_h + eh;
        eh.store(own + c * width);
        at_label = where_equal(label, V::all(static_cast<float>(c)), ds, at_label);
      }
    }

    const V inv_t = V::all(1) / sum_t, inv_s = V::all(1) / sum_s;
    V divergence = sum_a, kl_q = zero;
    if constexpr (D == Divergence::forward_kl) divergence = max(zero, fma(sum_a * inv_T, inv_t, log(sum_s / sum_t)));
    if constexpr (D == Divergence::cross_entropy) divergence = fnma(sum_a * inv_T, inv_t, log(sum_s));
    if constexpr (D == Divergence::reverse_kl) divergence = max(zero, fma(sum_a * inv_T, inv_s, log(sum_t / sum_s)));
    if constexpr (D == Divergence::jsd) {
      V kl_p = zero;
      for (int64_t c = 0; c < classes; ++c) {
        const V p = V::load(teacher + c * width) * inv_t, q = V::load(student + c * width) * inv_s;
        const V m = max(fma(beta, p - q, q), tiny);
        const V log_p = log(max(p / m, tiny)), log_q = log(max(q / m, tiny));
        kl_p = fma(p, log_p, kl_p);
        kl_q = fma(q, log_q, kl_q);
        log_q.store(teacher + c * width);
      }
      divergence = max(zero, fma(beta, kl_p - kl_q, kl_q));
    }
    V value = soft_value * divergence;
    if (hard) value = fma(hard_value, log(sum_h) - at_label, value);
    where_positive(weight, value, zero).store(values);
    for (int l = 0; l < width; ++l) total[l] += values[l];
    if (a.row_loss != nullptr)
      for (int64_t l = 0; l < n; ++l) write_row_loss<S>(a, r0 + l, values[l]);
    if (a.grad == nullptr) continue;

    const V inv_h = hard ? hard_grad / sum_h : zero;
    const V ratio_offset = D == Divergence::reverse_kl ? log(sum_t / sum_s) - divergence : zero - kl_q;
    for (int64_t c = 0; c < classes; ++c) {
      const V x = V::load(teacher + c * width), q = V::load(student + c * width) * inv_s;
      V g = zero;
      if constexpr (D == Divergence::forward_kl || D == Divergence::cross_entropy) g = soft_grad * fnma(x, inv_t, q);
      if constexpr (D == Divergence::reverse_kl) g = soft_grad * q * fma(x, inv_T, ratio_offset);
      if constexpr (D == Divergence::jsd) g = soft_grad * q * (x + ratio_offset);
      if constexpr (D == Divergence::mse) g = soft_grad * x;
      if (hard) {
        g = fma(inv_h, V::load(own + c * width), g);
        g = where_equal(label, V::all(static_cast<float>(c)), g - hard_grad, g);
      }
      where_positive(weight, g, zero).store(teacher + c * width);
    }
    transpose.store(teacher, flat);
    S* out = static_cast<S*>(a.grad) + r0 * classes;
    int64_t i = 0;
    for (; i + width <= n * classes; i += width) V::load(flat + i).store(out + i);
    if (i < n * classes) V::load(flat + i).store_part(out + i, n * classes - i);
  }
  double all = 0;
  for (int l = 0; l < width; ++l) all += total[l];
  return all;
}

using RowsFunction = double (*)(const SoftTargetArgs&, int64_t, int64_t, void*);

template <class V, class S, Divergence D>
RowsFunction choose_hard(const SoftTargetArgs& a) {
  if (a.hard_value == 0 && a.hard_grad == 0) return wide_rows<V, S, D, Hard::none>;
  if (a.temperature == 1) return wide_rows<V, S, D, Hard::power1>;
  if constexpr (D == Divergence::forward_kl || D == Divergence::cross_entropy) {
    if (a.temperature == 2) return wide_rows<V, S, D, Hard::power2>;
    if (a.temperature == 4) return wide_rows<V, S, D, Hard::power4>;
  }
  if constexpr (D != Divergence::mse) return wide_rows<V, S, D, Hard::own>;
  return nullptr;  // mse is defined at temperature 1 only
}

template <class V, class S, Divergence D>
RowsFunction choose_width(const SoftTargetArgs& a) {
  if constexpr (V::width > 1) {
    if (a.classes == 2) return narrow_rows<S, D, 2>;
    if (a.classes == 3) return narrow_rows<S, D, 3>;
    if (a.classes <= narrow_classes) return narrow_rows<S, D, 0>;
  }
  return choose_hard<V, S, D>(a);
}

template <class V, class S>
RowsFunction choose(const SoftTargetArgs& a) {
  switch (a.divergence) {
    case Divergence::forward_kl:
      return choose_width<V, S, Divergence::forward_kl>(a);
    case Divergence::reverse_kl:
      return choose_width<V, S, Divergence::reverse_kl>(a);
    case Divergence::jsd:
      return choose_width<V, S, Divergence::jsd>(a);
    case Divergence::mse:
      return choose_width<V, S, Divergence::mse>(a);
    case Divergence::cross_entropy:
      return choose_width<V, S, Divergence::cross_entropy>(a);
  }
  return nullptr;
}

double soft_target_rows(const SoftTargetArgs& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::f32:
      return choose<Floats, float>(a)(a, begin, end, scratch);
    case Dtype::bf16:
      return choose<Floats, bf16>(a)(a, begin, end, scratch);
    case Dtype::f16:
      return choose<Floats, f16>(a)(a, begin, end, scratch);
    case Dtype::f64:
      return choose<Doubles, double>(a)(a, begin, end, scratch);
  }
  return 0;
}

size_t scratch_bytes(const SoftTargetArgs& a) {
  return a.dtype == Dtype::f64 ? Buffers<double>::bytes(a.classes) : Buffers<float>::bytes(a.classes);
}

}  // namespace

extern const SoftTargetKernel soft_target = {scratch_bytes, soft_target_rows};

}  // namespace pyd::PYD_ISA
