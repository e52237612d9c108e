# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs on a GPU, decided without one: what was compiled, and what the device is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pydistill import _dispatch
from pydistill._dispatch import Backend, resolve

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("architectures", "covered", "not_covered"),
    [
        (["8.0", "9.0"], [(8, 0), (8, 6), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        (["8.6"], [(8, 6), (8, 9)], [(8, 0)]),
        (["8.0+PTX"], [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        (["8.0", "9.0", "10.0+PTX"], [(8, 0), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 0)]),
        (["9.0a"], [(9, 0)], [(10, 0), (9, 1)]),
        ([], [], [(8, 0), (9, 0)]),
    ],
)
def test_machine_code_runs_on_its_generation_and_ptx_on_all_later_ones(architectures, covered, not_covered):
    assert all(_dispatch._covers(architectures, capability) for capability in covered)
    assert not any(_dispatch._covers(architectures, capability) for capability in not_covered)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device of capability 9.0, kernels for 8.0 and 9.0, and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_dispatch, "native", SimpleNamespace(cuda_architectures=lambda: ["8.0", "9.0"]))
    backends = {"cuda": Backend(True, "compiled for 8.0, 9.0"), "triton": Backend(True, "triton")}
    monkeypatch.setitem(_dispatch.BACKENDS, "soft_target", {**_dispatch.BACKENDS["soft_target"], **backends})
    return monkeypatch


def test_compiled_kernels_come_first(a_gpu):
    assert resolve("soft_target", CUDA) == "cuda"
    assert resolve("soft_target", CUDA, "triton") == "triton"


def test_fp64_is_left_to_triton(a_gpu):
    assert resolve("soft_target", CUDA, dtype=torch.float32) == "cuda"
    assert resolve("soft_target", CUDA, dtype=torch.float64) == "triton"
    with pytest.raises(RuntimeError, match="CUDA kernels take fp32, bf16 and fp16, got fp64"):
        resolve("soft_target", CUDA, "cuda", torch.float64)


def test_a_device_without_code_is_left_to_triton(a_gpu):
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert resolve("soft_target", CUDA) == "triton"
    with pytest.raises(RuntimeError, match=r"compiled for 8.0, 9.0, not for this device's 12.0; TORCH_CUDA_ARCH_LIST"):
        resolve("soft_target", CUDA, "cuda")


def test_rocm_is_left_to_triton(a_gpu):
    a_gpu.setattr(torch.version, "hip", "6.4")
    assert resolve("soft_target", CUDA) == "triton"
    with pytest.raises(RuntimeError, match="CUDA kernels do not run on ROCm devices"):
        resolve("soft_target", CUDA, "cuda")


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(_dispatch, "native", SimpleNamespace(cuda_architectures=lambda: []))
    found = _dispatch._cuda("soft_target")
    assert not found.available
    assert found.reason.startswith("this installation was built without CUDA: nvcc was not found")
    monkeypatch.setattr(_dispatch, "native", SimpleNamespace(cuda_architectures=lambda: ["8.0", "10.0+PTX"]))
    assert _dispatch._cuda("soft_target") == Backend(True, "compiled for 8.0, 10.0+PTX")
    monkeypatch.setattr(_dispatch, "native", None)
    assert _dispatch._cuda("soft_target") == Backend(False, _dispatch.native_reason)


def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match="impl='cuda' does not run on device 'cpu'"):
        resolve("soft_target", torch.device("cpu"), "cuda")
