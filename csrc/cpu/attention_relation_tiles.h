// SPDX-License-Identifier: Apache-2.0
// What is done down the columns of score tiles: maxima, exponentials with their sums, the gradient of the scores.
#pragma once

#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

// So many exponentials are summed before the sum joins the others: long sums would lose digits.
constexpr int64_t sum_length = 128;

// Down the columns of a tile [end - begin, lanes]. Key j is `begin` + row; where `masked`, lane l counts it only if
// j <= query + l.
template <class V, int vectors, bool masked>
__attribute__((noinline)) void maxima(const typename V::scalar* tile, int64_t begin, int64_t end, int64_t query,
                                      typename V::scalar* top_of_lane) {
  using F = typename V::scalar;
  constexpr int lanes = vectors * V::width;
  F rows[lanes];
  for (int l = 0; l < lanes; ++l) rows[l] = static_cast<F>(query + l) + F(0.5);
  V top[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) top[v] = V::load(top_of_lane + v * V::width);
  for (int64_t j = begin; j < end; ++j, tile += lanes)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V x = V::load(tile + v * V::width);
      if constexpr (masked) x = where_positive(V::load(rows + v * V::width) - V::all(static_cast<F>(j)), x, top[v]);
      top[v] = max(x, top[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) top[v].store(top_of_lane + v * V::width);
}

// Exponentials over the scores, relative to `top`, their largest; `sums` [3, lanes] is given Zt, Zs and A (in units of
// log 2).
template <class V, int vectors, bool masked, bool scaled>
__attribute__((noinline)) void exponentials(typename V::scalar* teacher, typename V::scalar* student, int64_t begin,
                                            int64_t end, int64_t query, typename V::scalar factor_t,
                                            typename V::scalar factor_s, const typename V::scalar* top_t,
                                            const typename V::scalar* top_s, typename V::scalar* sums, Ahead& ahead) {
  using F = typename V::scalar;
  constexpr int lanes = vectors * V::width;
  const V scale_t = V::all(factor_t), scale_s = V::all(factor_s), zero = V::all(0);
  F rows[lanes];
  for (int l = 0; l < lanes; ++l) rows[l] = static_cast<F>(query + l) + F(0.5);
  V zt[vectors], zs[vectors], a[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) zt[v] = zs[v] = a[v] = zero;
  for (int64_t j = begin; j < end; ++j, teacher += lanes, student += lanes) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      // The largest is exactly 0, which a scale before the difference would spoil.
      V t = V::load(teacher + v * V::width) - V::load(top_t + v * V::width);
      V s = V::load(student + v * V::width) - V::load(top_s + v * V::width);
      if constexpr (scaled) {
        t = t * scale_t;
        s = s * scale_s;
      }
      V et = exp2(t), es = exp2(s), difference = t - s;
      if constexpr (masked) {
        const V seen = V::load(rows + v * V::width) - V::all(static_cast<F>(j));
        et = where_positive(seen, et, zero);
        es = where_positive(seen, es, zero);
        difference = where_positive(seen, difference, zero);
      }
      zt[v] = zt[v] + et;
      zs[v] = zs[v] + es;
      a[v] = fma(et, difference, a[v]);
      et.store(teacher + v * V::width);
      es.store(student + v * V::width);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    (V::load(sums + v * V::width) + zt[v]).store(sums + v * V::width);
    (V::load(sums + lanes + v * V::width) + zs[v]).store(sums + lanes + v * V::width);
    (V::load(sums + 2 * lanes + v * V::width) + a[v]).store(sums + 2 * lanes + v * V::width);
  }
}

// G over the student's exponentials.
template <class V, int vectors>
__attribute__((noinline)) void differences(const typename V::scalar* teacher, typename V::scalar* student, int64_t keys,
                                           const typename V::scalar* factor_t, const typename V::scalar* factor_s) {
  constexpr int lanes = vectors * V::width;
  V ct[vectors], cs[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    ct[v] = V::load(factor_t + v * V::width);
    cs[v] = V::load(factor_s + v * V::width);
  }
  for (int64_t j = 0; j < keys; ++j, teacher += lanes, student += lanes)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      fnma(ct[v], V::load(teacher + v * V::width), cs[v] * V::load(student + v * V::width))
          .store(student + v * V::width);
}

PYD_INLINE Doubles log_of_ratio(Doubles over, Doubles under) { return log(over / under); }
// The quotient's own rounding is put back, for a KL near 0 is the small difference of two logarithms.
PYD_INLINE Floats log_of_ratio(Floats over, Floats under) {
  const Floats ratio = over / under;
  return log(ratio) + fnma(ratio, under, over) / over;
}

}  // namespace
}  // namespace pyd::PYD_ISA
