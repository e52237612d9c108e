# SPDX-License-Identifier: Apache-2.0
"""Liger-Kernel's Triton kernels as a provider on a GPU, where `liger-kernel` is installed.

Forward KL at a temperature, batch mean, times T^2, which Liger leaves to the caller. It has no counterpart to the other
losses.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor


def available(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("liger_kernel") is not None


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Its KL divergence, which takes logarithms of probabilities; those are PyTorch's."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    inputs = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return LigerKLDIVLoss(reduction="batchmean")(*inputs) * temperature**2


def linear_soft_target_loss(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    """Its fused output layer, where beta 0 is the forward KL."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature)
    return loss(student, weight, teacher, teacher_weight, None) * temperature**2
