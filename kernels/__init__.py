# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one module per loss. Imported as `pydistill.kernels`."""
