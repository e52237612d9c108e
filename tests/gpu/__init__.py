# SPDX-License-Identifier: Apache-2.0
"""For a machine with a GPU: the tests of the losses on it, and `make gpu-check`."""
