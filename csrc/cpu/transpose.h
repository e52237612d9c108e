// SPDX-License-Identifier: Apache-2.0
// Between rows of a few floats in memory and one row per vector lane. Torch-free, compiled once per instruction set.
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

}  // namespace pyd::PYD_ISA
