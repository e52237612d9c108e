// SPDX-License-Identifier: Apache-2.0
// The attention_relation op: checks, sequences from masks, allocation, and the distribution of heads over threads.
// Kernels are in csrc/cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_relation_problem.h"
#include "checks.h"
#include "cpu/isa.h"
#include "tensors.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Which tokens see each other.
struct Sequences {
  std::vector<std::vector<int32_t>> tokens;   // of each sequence, ascending
  std::vector<int64_t> batch;                 // row of each sequence
  std::vector<std::vector<int32_t>> padding;  // of each batch row
  int64_t valid = 0;
};

Sequences sequences_of(const RelationProblem& p) {
  const int64_t batches = p.batches, positions = p.positions;
  const bool* valid = p.mask ? static_cast<const bool*>(p.mask->const_data_ptr()) : nullptr;
  const int64_t* segment = p.segment_ids ? static_cast<const int64_t*>(p.segment_ids->const_data_ptr()) : nullptr;
  Sequences found;
  found.padding.resize(batches);
  for (int64_t b = 0; b < batches; ++b) {
    std::map<int64_t, std::vector<int32_t>> rows;
    for (int64_t i = 0; i < positions; ++i) {
      if ((valid == nullptr || valid[b * positions + i]) && (segment == nullptr || segment[b * positions + i] >= 0))
        rows[segment == nullptr ? 0 : segment[b * positions + i]].push_back(static_cast<int32_t>(i));
      else
        found.padding[b].push_back(static_cast<int32_t>(i));
    }
    for (auto& [id, tokens] : rows) {
      found.valid += static_cast<int64_t>(tokens.size());
      found.tokens.push_back(std::move(tokens));
      found.batch.push_back(b);
    }
  }
  return found;
}

Heads heads_of(const Tensor& t) { return {t.const_data_ptr(), t.size(3), t.stride(0), t.stride(1), t.stride(2)}; }

// Padding receives a gradient of zero.
void clear(const Tensor& gradient, const std::vector<std::vector<int32_t>>& padding) {
  const int64_t size = static_cast<int64_t>(gradient.element_size());
  torch::stable::parallel_for(0, gradient.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (const int32_t i : padding[b])
        for (int64_t h = 0; h < gradient.size(1); ++h)
          std::memset(static_cast<char*>(gradient.mutable_data_ptr()) +
                          (b * gradient.stride(0) + h * gradient.stride(1) + i * gradient.stride(2)) * size,
                      0, gradient.size(3) * size);
  });
}

// Runs f(worker) once on every thread, or as often as there are workers.
template <class Function>
void on_threads(int64_t workers, Function f) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) f(worker);
  });
}

// Values of all jobs, in order.
std::vector<double> run(const std::vector<RelationJob>& jobs) {
  const AttentionRelationKernel& kernel = kernels().attention_relation;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<double> values(jobs.size(), 0);

  // Whole jobs side by side, the longest first; where the parts of one job would keep more threads busy than there are
  // jobs, the jobs one after the other.
  std::vector<size_t> whole, split;
  for (size_t i = 0; i < jobs.size(); ++i) (kernel.one_sweep(jobs[i]) ? whole : split).push_back(i);
  int64_t parts = 0;
  for (const size_t i : whole) parts = std::max(parts, kernel.parts(jobs[i]));
  if (static_cast<int64_t>(whole.size()) < std::min(threads, parts)) {
    const auto rest =
        std::stable_partition(whole.begin(), whole.end(), [&](size_t i) { return kernel.symmetric(jobs[i]); });
    split.insert(split.end(), rest, whole.end());
    whole.erase(rest, whole.end());
  }
  std::stable_sort(whole.begin(), whole.end(),
                   [&](size_t a, size_t b) { return jobs[a].sequence.count > jobs[b].sequence.count; });

  std::atomic<size_t> next{0};
  if (!whole.empty())
    on_threads(threads, [&](int64_t) {
      size_t scratch_size = 0, total_size = 0;
      Buffer scratch, total;
      for (size_t i = next++, after; i < whole.size(); i = after) {
        const RelationJob& job = jobs[whole[i]];
        after = next++;
        if (kernel.scratch_bytes(job) > scratch_size) scratch = Buffer(scratch_size = kernel.scratch_bytes(job));
        if (kernel.partial_bytes(job) > total_size) total = Buffer(total_size = kernel.partial_bytes(job));
        values[whole[i]] =
            kernel.whole(job, after < whole.size() ? &jobs[whole[after]] : nullptr, total.data, scratch.data);
      }
    });

  for (const size_t i : split) {
    const RelationJob& job = jobs[i];
    const size_t scratch_size = kernel.scratch_bytes(job);
    if (kernel.one_sweep(job)) {
      const int64_t parts = kernel.parts(job), workers = std::min(threads, parts);
      std::vector<Buffer> partial(workers), scratch(workers);
      std::vector<double> value(parts);
      Buffer total(kernel.partial_bytes(job));
      for (int64_t w = 0; w < workers; ++w) {
        partial[w] = Buffer(kernel.partial_bytes(job));
        scratch[w] = Buffer(scratch_size);
      }
      for (int64_t wave = 0; wave < parts; wave += workers) {
        const int64_t count = std::min(workers, parts - wave);
        on_threads(count, [&](int64_t w) {
          value[wave + w] = kernel.part(job, wave + w, total.data, partial[w].data, scratch[w].data);
        });
        if (job.grad_b.data != nullptr)
          for (int64_t w = wave == 0 ? 1 : 0; w < count; ++w) kernel.add(job, wave + w, total.data, partial[w].data);
      }
      if (job.grad_b.data != nullptr) kernel.write_keys(job, total.data);
      for (const double x : value) values[i] += x;
      continue;
    }
    const int64_t blocks = kernel.blocks(job);
    Buffer statistics(kernel.statistics_bytes(job));
    std::vector<double> part(blocks);
    const auto sweep = [&](auto f) {
      std::atomic<int64_t> block{0};
      on_threads(std::min(threads, blocks), [&](int64_t) {
        const Buffer scratch(scratch_size);
        for (int64_t k; (k = block++) < blocks;) f(k, scratch.data);
      });
    };
    sweep([&](int64_t k, void* scratch) { part[k] = kernel.block_statistics(job, k, statistics.data, scratch); });
    if (job.grad_b.data != nullptr)
      sweep([&](int64_t k, void* scratch) { kernel.block_gradient(job, k, statistics.data, scratch); });
    for (const double x : part) values[i] += x;
  }
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_relation(
    std::optional<Tensor> student_q, std::optional<Tensor> student_k, std::optional<Tensor> student_v,
    std::optional<Tensor> teacher_q, std::optional<Tensor> teacher_k, std::optional<Tensor> teacher_v,
    std::vector<int64_t> relations, std::vector<double> weights, std::optional<Tensor> mask,
    std::optional<Tensor> segment_ids, std::optional<Tensor> num_items, std::optional<Tensor> row_weights, bool causal,
    std::optional<int64_t> relation_heads, std::optional<double> scale, std::string reduction, bool with_gradient) {
  const RelationProblem p = relation_problem(
      {student_q, student_k, student_v}, {teacher_q, teacher_k, teacher_v},
      {relations, weights, mask, segment_ids, num_items, row_weights, causal, relation_heads, scale, reduction});
  const Tensor& first = p.first();
  const Dtype dtype = p.dtype;
  const int64_t count = static_cast<int64_t>(p.pairs.size()), batches = p.batches, positions = p.positions;
  const Sequences sequences = sequences_of(p);
  const int64_t sequence_count = static_cast<int64_t>(sequences.tokens.size());

  double denominator = 1;
  if (reduction == "sequence_mean") denominator = static_cast<double>(std::max<int64_t>(sequence_count, 1));
  if (reduction == "token_mean") denominator = static_cast<double>(std::max<int64_t>(sequences.valid, 1));
  if (num_items) denominator = scalar_of(*num_items);
  // fp16 has no room below for a gradient divided by many rows: that factor is left to backward (see soft_target), at
  // its size for a head of middling length.
  double rows = denominator;
  if (reduction == "sequence_mean" || reduction == "token_mean") rows *= static_cast<double>(p.pairs[0].heads);
  if (reduction == "sequence_mean")
    rows *= static_cast<double>(std::max<int64_t>(sequences.valid, 1)) /
            static_cast<double>(std::max<int64_t>(sequence_count, 1));
  const double later = dtype == Dtype::f16 ? std::exp2(-std::floor(std::log2(rows))) : 1;

  std::array<Tensor, relation_slots> gradients;
  for (int slot = 0; slot < relation_slots; ++slot) {
    if (!with_gradient || !p.students[slot]) {
      gradients[slot] = torch::stable::new_empty(first, {0});
      continue;
    }
    gradients[slot] = torch::stable::empty_like(*p.students[slot]);
    ask_for_large_pages(gradients[slot]);
    clear(gradients[slot], sequences.padding);
  }

  const bool rows_wanted = reduction == "none";
  const auto loss_dtype = std::optional<ScalarType>(dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor row_loss = torch::stable::new_empty(first, {0}, loss_dtype);
  const int64_t value_size = static_cast<int64_t>(row_loss.element_size());
  std::vector<RelationJob> jobs;
  std::vector<double> factors;  // of each job in its relation's value
  std::vector<int64_t> relation_of;
  for (int64_t r = 0; r < count; ++r) {
    const RelationPair& pair = p.pairs[r];
    const int64_t heads = pair.heads;
    RelationJob job{};
    job.dtype = dtype;
    job.causal = causal;
    job.self = pair.a == pair.b;
    job.student = {heads_of(*p.students[pair.a]), heads_of(*p.students[pair.b]), pair.student_size, pair.student_scale};
    job.teacher = {heads_of(*p.teachers[pair.a]), heads_of(*p.teachers[pair.b]), pair.teacher_size, pair.teacher_scale};
    if (with_gradient) {
      job.grad_a = heads_of(gradients[pair.a]);
      job.grad_b = heads_of(gradients[pair.b]);
    }
    if (rows_wanted) row_loss = torch::stable::new_zeros(first, {batches, heads, positions}, loss_dtype);
    for (int64_t s = 0; s < sequence_count; ++s) {
      const int64_t length = static_cast<int64_t>(sequences.tokens[s].size());
      double factor = 1 / denominator;
      if (reduction == "sequence_mean") factor /= static_cast<double>(length * heads);
      if (reduction == "token_mean") factor /= static_cast<double>(heads);
      job.sequence = {sequences.batch[s], sequences.tokens[s].data(), length, pair.weight * factor / later};
      for (int64_t h = 0; h < heads; ++h) {
        job.relation_head = h;
        const int64_t at = (sequences.batch[s] * heads + h) * positions;
        if (rows_wanted) job.row_loss = static_cast<char*>(row_loss.mutable_data_ptr()) + at * value_size;
        if (p.row_weights)
          job.row_weights = static_cast<const char*>(p.row_weights->const_data_ptr()) + at * value_size;
        jobs.push_back(job);
        factors.push_back(factor);
        relation_of.push_back(r);
      }
    }
  }
  const std::vector<double> values = run(jobs);
  std::vector<double> parts(count, 0);
  for (size_t i = 0; i < jobs.size(); ++i) parts[relation_of[i]] += values[i] * factors[i];

  const auto write = [&](const Tensor& t, int64_t i, double x) {
    if (dtype == Dtype::f64)
      static_cast<double*>(t.mutable_data_ptr())[i] = x;
    else
      static_cast<float*>(t.mutable_data_ptr())[i] = static_cast<float>(x);
  };
  Tensor part_values = torch::stable::new_empty(first, {count}, loss_dtype);
  Tensor loss = rows_wanted ? row_loss : torch::stable::new_empty(first, {}, loss_dtype);
  Tensor gradient_scale = torch::stable::new_empty(first, {}, loss_dtype);
  double total = 0;
  for (int64_t r = 0; r < count; ++r) {
    write(part_values, r, parts[r]);
    total += p.pairs[r].weight * parts[r];
  }
  if (!rows_wanted) write(loss, 0, total);
  write(gradient_scale, 0, later);
  return {loss, part_values, gradients[0], gradients[1], gradients[2], gradient_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("attention_relation", TORCH_BOX(&attention_relation)); }

}  // namespace pyd
