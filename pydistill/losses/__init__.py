# SPDX-License-Identifier: Apache-2.0
"""One module per loss: contract, reference, public function, registration and objective term."""
