// SPDX-License-Identifier: Apache-2.0
// Vectors of float for the CPU kernels, torch-free: one interface, three instruction sets, and a scalar double that
// lets the same kernel source serve the fp64 used by gradient checks.
//
// This header is compiled once per instruction set, with PYD_ISA naming the namespace. Nothing in it may be an ordinary
// inline function or a template of std: the linker would keep one copy of those, perhaps the one with AVX-512 in it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PYD_INLINE inline __attribute__((always_inline))
#define PYD_INLINE_LAMBDA __attribute__((always_inline))

namespace pyd::PYD_ISA {

// Storage types. Arithmetic is always in float (or double).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

PYD_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
PYD_INLINE uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

PYD_INLINE float widen(float x) { return x; }
PYD_INLINE double widen(double x) { return x; }
PYD_INLINE float widen(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
PYD_INLINE float widen(f16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal on the way.
  return as_float(sign | as_bits(as_float(magnitude << 13) * as_float(0x77800000)));
#endif
}

PYD_INLINE void narrow(float x, float& out) { out = x; }
PYD_INLINE void narrow(double x, double& out) { out = x; }
PYD_INLINE void narrow(float x, bf16& out) {  // round to nearest even
  const uint32_t bits = as_bits(x);
  out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
PYD_INLINE void narrow(float x, f16& out) {  // round to nearest even
#if defined(__F16C__)
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal in half: let the FPU round at the position of the last bit
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// 2^x on [-1/2, 1/2] with value 1 at 0: relative error below 1e-7 (degree 5 minimax).
constexpr float exp2_c1 = 0.6931469776f, exp2_c2 = 0.2402224209f, exp2_c3 = 0.05550733743f, exp2_c4 = 0.00967151264f,
                exp2_c5 = 0.001326472722f;

// log(1 + x) = x - x^2/2 + x^3 Q(x) on [-1/3, 1/3]: relative error below 5e-9 (degree 7 minimax).
constexpr float log_c[8] = {0.3333321598f, -0.2499979767f, 0.2001040593f, -0.1668048735f,
                            0.1400586891f, -0.1218426085f, 0.1398443703f, -0.1289168625f};

#if defined(__AVX512F__)

struct Floats {
  using scalar = float;
  static constexpr int width = 16;
  __m512 v;

  static PYD_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static PYD_INLINE Floats all(float x) { return {_mm512_set1_ps(x)}; }
  static PYD_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static PYD_INLINE Floats load(const bf16* p) {
    return {from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static PYD_INLINE Floats load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // The first n elements, 0 <= n < width; the others are `rest`.
  static PYD_INLINE Floats load_part(const float* p, int64_t n, float rest) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(rest), first(n), p)};
  }
  static PYD_INLINE Floats load_part(const bf16* p, int64_t n, float rest) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(rest), first(n), from_bf16(_mm256_maskz_loadu_epi16(first(n), p)))};
  }
  static PYD_INLINE Floats load_part(const f16* p, int64_t n, float rest) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(rest), first(n), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)))};
  }
  PYD_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  PYD_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  PYD_INLINE void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  PYD_INLINE void store_part(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  PYD_INLINE void store_part(bf16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  PYD_INLINE void store_part(f16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), to_f16()); }

  static PYD_INLINE __m512 from_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  PYD_INLINE __m256i to_bf16() const { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
  PYD_INLINE __m256i to_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

PYD_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
PYD_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
PYD_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
PYD_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
PYD_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PYD_INLINE Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
PYD_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
// a where x > 0 (never where x is NaN), else b.
PYD_INLINE Floats where_positive(Floats x, Floats a, Floats b) {
  return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), a.v)};
}
PYD_INLINE Floats where_equal(Floats x, Floats y, Floats a, Floats b) {
  return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, y.v, _CMP_EQ_OQ), a.v)};
}
PYD_INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
PYD_INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }

// 2^x; 0 for -inf, inf from 128 on.
PYD_INLINE Floats exp2(Floats x) {
  const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x.v, n);  // NaN for -inf, which scalef turns into 0
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(exp2_c5), r, _mm512_set1_ps(exp2_c4));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp2_c3));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp2_c2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp2_c1));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return {_mm512_scalef_ps(p, n)};
}
// x = m 2^e with m in [2/3, 4/3); x positive and normal.
PYD_INLINE void split(Floats x, Floats& m, Floats& e) {
  const __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x3f2aaaab));
  const __m512i exponent = _mm512_srai_epi32(shifted, 23);
  e.v = _mm512_cvtepi32_ps(exponent);
  m.v = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(exponent, 23)));
}

#elif defined(__AVX2__)

struct Floats {
  using scalar = float;
  static constexpr int width = 8;
  __m256 v;

  static PYD_INLINE Floats all(float x) { return {_mm256_set1_ps(x)}; }
  static PYD_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static PYD_INLINE Floats load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static PYD_INLINE Floats load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  PYD_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  PYD_INLINE void store(bf16* p) const {  // round to nearest even; NaN keeps its high bits and becomes quiet
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high =
        _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
  PYD_INLINE void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class S>
  static PYD_INLINE Floats load_part(const S* p, int64_t n, float rest) {
    alignas(32) float part[width];
    for (int i = 0; i < width; ++i) part[i] = i < n ? widen(p[i]) : rest;
    return {_mm256_load_ps(part)};
  }
  template <class S>
  PYD_INLINE void store_part(S* p, int64_t n) const {
    alignas(32) float part[width];
    _mm256_store_ps(part, v);
    for (int i = 0; i < n; ++i) narrow(part[i], p[i]);
  }
};

PYD_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
PYD_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
PYD_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
PYD_INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
PYD_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PYD_INLINE Floats fnma(Floats a, Floats b, Floats c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
PYD_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
PYD_INLINE Floats where_positive(Floats x, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
}
PYD_INLINE Floats where_equal(Floats x, Floats y, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_EQ_OQ))};
}
PYD_INLINE float sum(Floats a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PYD_INLINE float largest(Floats a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// 2^x; below x = -126.5 it is 0, from 127.5 on inf.
PYD_INLINE Floats exp2(Floats x) {
  // The bounds stand first: max and min return their second operand when either is NaN, which keeps NaN a NaN.
  const __m256 y = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x.v));
  const __m256 n = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_sub_ps(y, n);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(exp2_c5), r, _mm256_set1_ps(exp2_c4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(exp2_c3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(exp2_c2));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(exp2_c1));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(p, _mm256_castsi256_ps(scale))};
}
PYD_INLINE void split(Floats x, Floats& m, Floats& e) {
  const __m256i shifted = _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x3f2aaaab));
  const __m256i exponent = _mm256_srai_epi32(shifted, 23);
  e.v = _mm256_cvtepi32_ps(exponent);
  m.v = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(exponent, 23)));
}

#else  // GCC and Clang vector extensions: SSE2 on x86-64, NEON on 64-bit Arm

struct Floats {
  using scalar = float;
  static constexpr int width = 4;
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  V v;

  static PYD_INLINE Floats all(float x) { return {V{x, x, x, x}}; }
  template <class S>
  static PYD_INLINE Floats load(const S* p) {
    return {V{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
  }
  template <class S>
  static PYD_INLINE Floats load_part(const S* p, int64_t n, float rest) {
    V v = {rest, rest, rest, rest};
    for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
    return {v};
  }
  template <class S>
  PYD_INLINE void store(S* p) const {
    for (int i = 0; i < width; ++i) narrow(v[i], p[i]);
  }
  template <class S>
  PYD_INLINE void store_part(S* p, int64_t n) const {
    for (int i = 0; i < n; ++i) narrow(v[i], p[i]);
  }
};

PYD_INLINE Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
PYD_INLINE Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
PYD_INLINE Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
PYD_INLINE Floats operator/(Floats a, Floats b) { return {a.v / b.v}; }
PYD_INLINE Floats fma(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }
PYD_INLINE Floats fnma(Floats a, Floats b, Floats c) { return {c.v - a.v * b.v}; }
PYD_INLINE Floats max(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }
PYD_INLINE Floats where_positive(Floats x, Floats a, Floats b) { return {x.v > 0.0f ? a.v : b.v}; }
PYD_INLINE Floats where_equal(Floats x, Floats y, Floats a, Floats b) { return {x.v == y.v ? a.v : b.v}; }
PYD_INLINE float sum(Floats a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
PYD_INLINE float largest(Floats a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

// 2^x; below x = -126.5 it is 0, from 127.5 on inf.
PYD_INLINE Floats exp2(Floats x) {
  const Floats low = Floats::all(-127.0f), high = Floats::all(128.0f), magic = Floats::all(12582912.0f);  // 1.5 * 2^23
  const Floats::V y = x.v < low.v ? low.v : (x.v > high.v ? high.v : x.v);  // NaN fails both comparisons and stays
  const Floats::V n = (y + magic.v) - magic.v;                              // rounds to the nearest integer
  const Floats::V r = y - n;
  Floats::V p = exp2_c5 * r + exp2_c4;
  p = p * r + exp2_c3;
  p = p * r + exp2_c2;
  p = p * r + exp2_c1;
  p = p * r + 1.0f;
  const Floats::I scale = (__builtin_convertvector(n, Floats::I) + 127) << 23;
  return {p * reinterpret_cast<Floats::V>(scale)};
}
PYD_INLINE void split(Floats x, Floats& m, Floats& e) {
  const Floats::I exponent = (reinterpret_cast<Floats::I>(x.v) - 0x3f2aaaab) >> 23;
  e.v = __builtin_convertvector(exponent, Floats::V);
  m.v = reinterpret_cast<Floats::V>(reinterpret_cast<Floats::I>(x.v) - (exponent << 23));
}

#endif

// Natural logarithm of positive normal numbers.
PYD_INLINE Floats log(Floats x) {
  Floats m, e;
  split(x, m, e);
  const Floats r = m - Floats::all(1.0f);
  Floats q = Floats::all(log_c[7]);
#pragma GCC unroll 7
  for (int i = 6; i >= 0; --i) q = fma(q, r, Floats::all(log_c[i]));
  const Floats r2 = r * r;
  const Floats low =
      fma(q * r, r2, fma(e, Floats::all(1.42860677e-06f), fnma(Floats::all(0.5f), r2, Floats::all(0.0f))));
  return fma(e, Floats::all(0.693145752f), r + low);  // ln 2 in two parts, the first with trailing zeros
}

// One double with the interface of a vector, for fp64.
struct Doubles {
  using scalar = double;
  static constexpr int width = 1;
  double v;

  static PYD_INLINE Doubles all(double x) { return {x}; }
  static PYD_INLINE Doubles load(const double* p) { return {*p}; }
  static PYD_INLINE Doubles load_part(const double*, int64_t, double rest) { return {rest}; }
  PYD_INLINE void store(double* p) const { *p = v; }
  PYD_INLINE void store_part(double*, int64_t) const {}
};

PYD_INLINE Doubles operator+(Doubles a, Doubles b) { return {a.v + b.v}; }
PYD_INLINE Doubles operator-(Doubles a, Doubles b) { return {a.v - b.v}; }
PYD_INLINE Doubles operator*(Doubles a, Doubles b) { return {a.v * b.v}; }
PYD_INLINE Doubles operator/(Doubles a, Doubles b) { return {a.v / b.v}; }
PYD_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return {a.v * b.v + c.v}; }
PYD_INLINE Doubles fnma(Doubles a, Doubles b, Doubles c) { return {c.v - a.v * b.v}; }
PYD_INLINE Doubles max(Doubles a, Doubles b) { return {a.v > b.v ? a.v : b.v}; }
PYD_INLINE Doubles where_positive(Doubles x, Doubles a, Doubles b) { return {x.v > 0 ? a.v : b.v}; }
PYD_INLINE Doubles where_equal(Doubles x, Doubles y, Doubles a, Doubles b) { return {x.v == y.v ? a.v : b.v}; }
PYD_INLINE double sum(Doubles a) { return a.v; }
PYD_INLINE double largest(Doubles a) { return a.v; }
PYD_INLINE Doubles exp2(Doubles x) { return {__builtin_exp2(x.v)}; }
PYD_INLINE Doubles log(Doubles x) { return {__builtin_log(x.v)}; }

}  // namespace pyd::PYD_ISA
