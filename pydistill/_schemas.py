# SPDX-License-Identifier: Apache-2.0
"""START HERE (ops): the schema of every op, for each namespace of operators: compiled code has one, Triton another.

Kernels implement them in csrc/<loss>.cpp and kernels/<loss>.py; fake kernels and autograd are in losses/<loss>.py.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    # Loss, gradient of the student's logits (empty unless asked for), and the factor that is still to be applied to it.
    "soft_target(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor? num_items, str divergence, "
    "float temperature, float hard_weight, float jsd_beta, bool scale_by_temperature, int ignore_index, str reduction, "
    "bool with_gradient) -> (Tensor loss, Tensor gradient, Tensor gradient_scale)",
    # The same with the gradient written over the student's logits.
    "soft_target_(Tensor(a!) student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor? num_items, str divergence, "
    "float temperature, float hard_weight, float jsd_beta, bool scale_by_temperature, int ignore_index, "
    "str reduction) -> (Tensor loss, Tensor gradient_scale)",
    # Relations are pairs of slots (0 queries, 1 keys, 2 values), each slot in one relation at most. Weighted loss, the
    # value of each relation, gradients of the student's slots (empty where not asked for), and the factor that is still
    # to be applied to them. With row_weights ("none") the gradient is that of the values weighted by row.
    "attention_relation(Tensor? student_q, Tensor? student_k, Tensor? student_v, Tensor? teacher_q, Tensor? teacher_k, "
    "Tensor? teacher_v, int[] relations, float[] weights, Tensor? mask, Tensor? segment_ids, Tensor? num_items, "
    "Tensor? row_weights, bool causal, int? relation_heads, float? scale, str reduction, bool with_gradient) -> "
    "(Tensor loss, Tensor parts, Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor gradient_scale)",
    # With `up` the student's rows are projected, projection [ds, dt], else the teacher's, [dt, ds]. Loss, gradients
    # (empty where not asked for; those of projection and bias in fp32, fp64 for fp64), and the factor that is still to
    # be applied to the student's. With row_weights ("none") the gradients are those of the values weighted by row.
    "projected_mse(Tensor student, Tensor teacher, Tensor projection, Tensor? bias, Tensor? mask, Tensor? num_items, "
    "Tensor? row_weights, bool up, bool normalize, str method, str reduction, bool with_student, bool with_projection, "
    "bool with_bias) -> (Tensor loss, Tensor grad_student, Tensor grad_projection, Tensor grad_bias, "
    "Tensor gradient_scale)",
    # rows *= scale, one factor for all or one per row; nothing is touched where the factor is 1.
    "scale_rows_(Tensor(a!) rows, Tensor scale) -> ()",
)


def define(namespace: str) -> torch.library.Library:
    """All ops, still without kernels, as ``torch.ops.<namespace>``; they last as long as what is returned."""
    library = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library
