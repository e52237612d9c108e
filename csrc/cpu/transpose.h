// SPDX-License-Identifier: Apache-2.0
// Transposition: between rows of a few floats in memory and one row per vector lane, and of whole matrices. Torch-free,
// compiled once per instruction set.
#pragma once

#include "simd.h"

namespace pyd::PYD_ISA {

// For `width` rows of `columns` floats lying one after the other: load gives columns vectors with one row per lane,
// stored at lanes[column * width]; store is the way back. Both sides hold width * columns floats.
struct Transpose {
  static constexpr int width = Floats::width;
  static constexpr int most_columns = 16;
  int64_t columns;

#if defined(__AVX512F__)
  // Lane l of column c is element l * columns + c: register (that / 16), position (that % 16). And back, element e of
  // register r is lane (16 r + e) / columns of column (16 r + e) % columns.
  __m512i load_position[most_columns], store_lane[most_columns];
  __mmask16 load_mask[most_columns][most_columns], store_mask[most_columns][most_columns];

  explicit Transpose(int64_t columns_) : columns(columns_) {
    alignas(64) int32_t position[width], lane[width];
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t other = 0; other < columns; ++other) load_mask[c][other] = store_mask[c][other] = 0;
      for (int64_t l = 0; l < width; ++l) {
        const int64_t from = l * columns + c, to = c * width + l;
        position[l] = static_cast<int32_t>(from % width);
        load_mask[c][from / width] |= static_cast<__mmask16>(1u << l);
        lane[l] = static_cast<int32_t>(to / columns);
        store_mask[c][to % columns] |= static_cast<__mmask16>(1u << l);
      }
      load_position[c] = _mm512_load_si512(position);
      store_lane[c] = _mm512_load_si512(lane);
    }
  }
  PYD_INLINE void load(const float* rows, float* lanes) const {
    for (int64_t c = 0; c < columns; ++c) {
      __m512 v = _mm512_permutexvar_ps(load_position[c], _mm512_loadu_ps(rows));
      for (int64_t r = 1; r < columns; ++r)
        v = _mm512_mask_permutexvar_ps(v, load_mask[c][r], load_position[c], _mm512_loadu_ps(rows + r * width));
      _mm512_storeu_ps(lanes + c * width, v);
    }
  }
  PYD_INLINE void store(const float* lanes, float* rows) const {
    for (int64_t r = 0; r < columns; ++r) {
      __m512 v = _mm512_permutexvar_ps(store_lane[r], _mm512_loadu_ps(lanes));
      for (int64_t c = 1; c < columns; ++c)
        v = _mm512_mask_permutexvar_ps(v, store_mask[r][c], store_lane[r], _mm512_loadu_ps(lanes + c * width));
      _mm512_storeu_ps(rows + r * width, v);
    }
  }
#else
  explicit Transpose(int64_t columns_) : columns(columns_) {}
  PYD_INLINE void load(const float* rows, float* lanes) const {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t l = 0; l < width; ++l) lanes[c * width + l] = rows[l * columns + c];
  }
  PYD_INLINE void store(const float* lanes, float* rows) const {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t l = 0; l < width; ++l) rows[l * columns + c] = lanes[c * width + l];
  }
#endif
};

#if defined(__AVX512F__)
// 16 x 16 words; of `in` the first `rows` and `columns` are read, the others are zero. Rows of `out` past `columns`,
// and its words past `lanes`, are left alone.
template <bool whole>
PYD_INLINE void transpose_block(const void* in, int64_t in_row, int64_t rows, int64_t columns, void* out,
                                int64_t out_row, int64_t lanes) {
  const auto* from = static_cast<const float*>(in);
  auto* to = static_cast<float*>(out);
  const __mmask16 read = static_cast<__mmask16>((1u << columns) - 1), kept = static_cast<__mmask16>((1u << lanes) - 1);
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if constexpr (whole)
      a[i] = _mm512_loadu_ps(from + i * in_row);
    else
      a[i] = i < rows ? _mm512_maskz_loadu_ps(read, from + i * in_row) : _mm512_setzero_ps();
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
  // a[4 q + k]: its four groups of lanes hold columns k, 4 + k, 8 + k, 12 + k of rows 4 q .. 4 q + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512 even = _mm512_shuffle_f32x4(a[k], a[4 + k], 0x88), odd = _mm512_shuffle_f32x4(a[k], a[4 + k], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0xdd);
    b[k] = _mm512_shuffle_f32x4(even, even2, 0x88);
    b[8 + k] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    b[4 + k] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    b[12 + k] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if constexpr (whole)
      _mm512_storeu_ps(to + i * out_row, b[i]);
    else if (i < columns)
      _mm512_mask_storeu_ps(to + i * out_row, kept, b[i]);
  }
}
#endif

// out[c * out_row + r] = in[r * in_row + c] for r < rows and c < columns; zero for rows <= r < out_rows.
template <class Word>
void transpose(const Word* in, int64_t in_row, int64_t rows, int64_t columns, Word* out, int64_t out_row,
               int64_t out_rows) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Word) == 4) {
    for (int64_t r = 0; r < out_rows; r += 16)
      for (int64_t c = 0; c < columns; c += 16) {
        const Word* from = in + r * in_row + c;
        Word* to = out + c * out_row + r;
        const int64_t n = columns - c < 16 ? columns - c : 16, lanes = out_rows - r < 16 ? out_rows - r : 16;
        if (r + 16 <= rows && n == 16)
          transpose_block<true>(from, in_row, 16, 16, to, out_row, 16);
        else
          transpose_block<false>(from, in_row, rows - r, n, to, out_row, lanes);
      }
    return;
  }
#endif
  for (int64_t r = 0; r < out_rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_row + r] = r < rows ? in[r * in_row + c] : Word{};
}

}  // namespace pyd::PYD_ISA
