// SPDX-License-Identifier: Apache-2.0
// How a relation job is done, as its sizes decide: how many queries at a time, in one sweep or several, by symmetry or
// not.
#pragma once

#include "attention_relation.h"
#include "gemm.h"
#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

// What a thread keeps in its second-level cache, in bytes; the sum of it all stays below 2 MB.
constexpr int64_t tiles_limit = 1024 << 10;      // a block's two tiles in a one-sweep job
constexpr int64_t total_limit = 704 << 10;       // the gradient of its keys
constexpr int64_t keys_limit = 192 << 10;        // keys that are copied as a whole
constexpr int64_t key_block = 256;               // how many are copied at a time where there are more
constexpr int64_t symmetric_tiles = 1200 << 10;  // bytes of both tiles of a symmetric job
constexpr int64_t symmetric_keys = 256 << 10;    // bytes of its copied keys

// Vectors in a block of a one-sweep job: fewer where there are more keys, so that the tiles stay in the cache.
template <class V>
int block_vectors(const RelationJob& job) {
  int vectors = gemm_vectors;
  while (V::width > 1 && vectors > 1 &&
         job.sequence.count * vectors * V::width * 2 * int64_t(sizeof(typename V::scalar)) > tiles_limit)
    vectors /= 2;
  return vectors;
}

template <class V>
bool one_sweep_of(const RelationJob& job) {
  const int64_t n = job.sequence.count, size = sizeof(typename V::scalar);
  return n * V::width * 2 * size <= tiles_limit && n * round_up(job.student.size, V::width) * size <= total_limit;
}

// Vectors in a block of a symmetric job: small blocks waste less on the diagonal, large ones multiply faster.
template <class V>
constexpr int symmetric_vectors(int64_t n) {
  return V::width > 1 && gemm_vectors == 4 && n <= 192 ? 2 : gemm_vectors;
}

// Rows of the tiles of all blocks.
int64_t symmetric_rows(int64_t n, int64_t lanes) {
  const int64_t blocks = (n + lanes - 1) / lanes;
  return blocks * n - lanes * blocks * (blocks - 1) / 2;
}

template <class V>
bool symmetric_of(const RelationJob& job) {
  const int64_t n = job.sequence.count, size = sizeof(typename V::scalar), lanes = symmetric_vectors<V>(n) * V::width;
  return job.self && !job.causal && n >= 32 && one_sweep_of<V>(job) &&
         symmetric_rows(n, lanes) * lanes * 2 * size <= symmetric_tiles &&
         n * (job.student.size + job.teacher.size) * size <= symmetric_keys;
}

}  // namespace
}  // namespace pyd::PYD_ISA
