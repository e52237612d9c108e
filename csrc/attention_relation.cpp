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

#include "checks.h"
#include "cpu/isa.h"
#include "tensors.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int slots = 3;  // queries, keys, values

// Which tokens see each other.
struct Sequences {
  std::vector<std::vector<int32_t>> tokens;   // of each sequence, ascending
  std::vector<int64_t> batch;                 // row of each sequence
  std::vector<std::vector<int32_t>> padding;  // of each batch row
  int64_t valid = 0;
};

Sequences sequences_of(int64_t batches, int64_t positions, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& segment_ids) {
  STD_TORCH_CHECK(positions < (int64_t{1} << 31), "attention_relation: N must be below 2^31, got ", positions);
  const auto check = [&](const Tensor& t, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == batches && t.size(1) == positions,
                    "attention_relation: ", name, " must have shape [", batches, ", ", positions,
                    "] and its proper dtype, got ", shape(t));
    return torch::stable::contiguous(t);
  };
  Tensor masks, segments;
  const bool* valid = nullptr;
  const int64_t* segment = nullptr;
  if (mask) {
    masks = check(*mask, ScalarType::Bool, "mask");
    valid = static_cast<const bool*>(masks.const_data_ptr());
  }
  if (segment_ids) {
    segments = check(*segment_ids, ScalarType::Long, "segment_ids");
    segment = static_cast<const int64_t*>(segments.const_data_ptr());
  }
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

using Slots = std::array<std::optional<Tensor>, slots>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_relation(
    std::optional<Tensor> student_q, std::optional<Tensor> student_k, std::optional<Tensor> student_v,
    std::optional<Tensor> teacher_q, std::optional<Tensor> teacher_k, std::optional<Tensor> teacher_v,
    std::vector<int64_t> relations, std::vector<double> weights, std::optional<Tensor> mask,
    std::optional<Tensor> segment_ids, std::optional<Tensor> num_items, std::optional<Tensor> row_weights, bool causal,
    std::optional<int64_t> relation_heads, std::optional<double> scale, std::string reduction, bool with_gradient) {
  const Slots given_students{student_q, student_k, student_v}, given_teachers{teacher_q, teacher_k, teacher_v};
  const int64_t count = static_cast<int64_t>(relations.size()) / 2;
  STD_TORCH_CHECK(count >= 1 && relations.size() == 2 * weights.size(),
                  "attention_relation: relations must hold two slots per weight");
  STD_TORCH_CHECK(
      reduction == "sequence_mean" || reduction == "token_mean" || reduction == "sum" || reduction == "none",
      "attention_relation: unknown reduction '", reduction, "'");
  STD_TORCH_CHECK(reduction != "none" || count == 1, "attention_relation: reduction 'none' takes one relation");
  Slots students, teachers;
  std::array<int, slots> uses{};
  const Tensor* first = nullptr;
  for (int64_t r = 0; r < count; ++r)
    for (int side = 0; side < 2; ++side) {
      const int64_t slot = relations[2 * r + side];
      STD_TORCH_CHECK(slot >= 0 && slot < slots && given_students[slot] && given_teachers[slot],
                      "attention_relation: relation ", r, " needs the tensors of slot ", slot);
      if (side == 1 && slot == relations[2 * r]) continue;
      STD_TORCH_CHECK(++uses[slot] == 1, "attention_relation: slot ", slot, " stands in two relations");
      const auto usable = [&](const Tensor& t) {
        STD_TORCH_CHECK(t.dim() == 4, "attention_relation: tensors must be [B, H, N, d], got ", shape(t));
        return t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
      };
      students[slot] = usable(*given_students[slot]);
      teachers[slot] = usable(*given_teachers[slot]);
      if (first == nullptr) first = &*students[slot];
      for (const Tensor* t : {&*students[slot], &*teachers[slot]})
        STD_TORCH_CHECK(
            t->scalar_type() == first->scalar_type() && t->size(0) == first->size(0) && t->size(2) == first->size(2),
            "attention_relation: all tensors must have one dtype, B and N, got ", shape(*t), " vs ", shape(*first));
    }
  STD_TORCH_CHECK(!scale || *scale > 0, "attention_relation: scale must be above 0");
  const Dtype dtype = dtype_of("attention_relation", *first);
  const int64_t batches = first->size(0), positions = first->size(2);
  const Sequences sequences = sequences_of(batches, positions, mask, segment_ids);
  const int64_t sequence_count = static_cast<int64_t>(sequences.tokens.size());

  double denominator = 1;
  if (reduction == "sequence_mean") denominator = static_cast<double>(std::max<int64_t>(sequence_count, 1));
  if (reduction == "token_mean") denominator = static_cast<double>(std::max<int64_t>(sequences.valid, 1));
  if (num_items) denominator = scalar_of(*num_items);
  // fp16 has no room below for a gradient divided by many rows: that factor is left to backward (see soft_target), at
  // its size for a head of middling length.
  double rows = denominator;
  if (reduction == "sequence_mean" || reduction == "token_mean")
    rows *= static_cast<double>(relation_heads ? *relation_heads : first->size(1));
  if (reduction == "sequence_mean")
    rows *= static_cast<double>(std::max<int64_t>(sequences.valid, 1)) /
            static_cast<double>(std::max<int64_t>(sequence_count, 1));
  const double later = dtype == Dtype::f16 ? std::exp2(-std::floor(std::log2(rows))) : 1;

  std::array<Tensor, slots> gradients;
  for (int slot = 0; slot < slots; ++slot) {
    if (!with_gradient || !students[slot]) {
      gradients[slot] = torch::stable::new_empty(*first, {0});
      continue;
    }
    gradients[slot] = torch::stable::empty_like(*students[slot]);
    ask_for_large_pages(gradients[slot]);
    clear(gradients[slot], sequences.padding);
  }

  const bool rows_wanted = reduction == "none";
  const auto loss_dtype = std::optional<ScalarType>(dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor row_loss = torch::stable::new_empty(*first, {0}, loss_dtype);
  const int64_t value_size = static_cast<int64_t>(row_loss.element_size());
  std::vector<RelationJob> jobs;
  std::vector<double> factors;  // of each job in its relation's value
  std::vector<int64_t> relation_of;
  Tensor incoming;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t a = relations[2 * r], b = relations[2 * r + 1];
    const Tensor &student_a = *students[a], &student_b = *students[b], &teacher_a = *teachers[a],
                 &teacher_b = *teachers[b];
    const int64_t heads = relation_heads ? *relation_heads : student_a.size(1);
    const auto width = [](const Tensor& t) { return t.size(1) * t.size(3); };
    STD_TORCH_CHECK(same_shape(student_a, student_b) && same_shape(teacher_a, teacher_b),
                    "attention_relation: both tensors of a relation must have one shape, got ", shape(student_a),
                    " and ", shape(student_b), ", ", shape(teacher_a), " and ", shape(teacher_b));
    STD_TORCH_CHECK(heads >= 1 && width(student_a) % heads == 0 && width(teacher_a) % heads == 0 &&
                        (relation_heads || student_a.size(1) == teacher_a.size(1)),
                    "attention_relation: ", heads, " relation heads do not divide ", shape(student_a), " and ",
                    shape(teacher_a));
    RelationJob job{};
    job.dtype = dtype;
    job.causal = causal;
    job.self = a == b;
    const auto side = [&](const Tensor& x, const Tensor& y) {
      const int64_t size = width(x) / heads;
      return RelationSide{heads_of(x), heads_of(y), size, scale ? *scale : 1 / std::sqrt(static_cast<double>(size))};
    };
    job.student = side(student_a, student_b);
    job.teacher = side(teacher_a, teacher_b);
    if (with_gradient) {
      job.grad_a = heads_of(gradients[a]);
      job.grad_b = heads_of(gradients[b]);
    }
    if (rows_wanted) {
      row_loss = torch::stable::new_zeros(*first, {batches, heads, positions}, loss_dtype);
      if (row_weights) {
        STD_TORCH_CHECK(
            row_weights->numel() == batches * heads * positions && row_weights->scalar_type() == *loss_dtype,
            "attention_relation: row_weights must be [B, heads, N] in the dtype of the loss, got ",
            shape(*row_weights));
        incoming = torch::stable::contiguous(*row_weights);
      }
    }
    for (int64_t s = 0; s < sequence_count; ++s) {
      const int64_t length = static_cast<int64_t>(sequences.tokens[s].size());
      double factor = 1 / denominator;
      if (reduction == "sequence_mean") factor /= static_cast<double>(length * heads);
      if (reduction == "token_mean") factor /= static_cast<double>(heads);
      job.sequence = {sequences.batch[s], sequences.tokens[s].data(), length, weights[r] * factor / later};
      for (int64_t h = 0; h < heads; ++h) {
        job.relation_head = h;
        const int64_t at = (sequences.batch[s] * heads + h) * positions;
        if (rows_wanted) job.row_loss = static_cast<char*>(row_loss.mutable_data_ptr()) + at * value_size;
        if (rows_wanted && row_weights)
          job.row_weights = static_cast<const char*>(incoming.const_data_ptr()) + at * value_size;
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
  Tensor part_values = torch::stable::new_empty(*first, {count}, loss_dtype);
  Tensor loss = rows_wanted ? row_loss : torch::stable::new_empty(*first, {}, loss_dtype);
  Tensor gradient_scale = torch::stable::new_empty(*first, {}, loss_dtype);
  double total = 0;
  for (int64_t r = 0; r < count; ++r) {
    write(part_values, r, parts[r]);
    total += weights[r] * parts[r];
  }
  if (!rows_wanted) write(loss, 0, total);
  write(gradient_scale, 0, later);
  return {loss, part_values, gradients[0], gradients[1], gradients[2], gradient_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("attention_relation", TORCH_BOX(&attention_relation)); }

}  // namespace pyd
