# SPDX-License-Identifier: Apache-2.0
"""GPU code proven without a GPU: the PTX that compilers emit is executed, measured, budgeted and mutated.

`interpreter` runs PTX on numpy; `triton_device` and `cuda_device` put it in the place of a GPU, so that a host
function's own launches arrive there with CPU tensors; `static` reads registers, occupancy and instructions out of
compiled code; `mutants` breaks it one instruction at a time."""
