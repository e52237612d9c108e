# SPDX-License-Identifier: Apache-2.0
"""Data of a distillation run: `tasks` reads labelled tables, `augment` makes unlabelled transfer texts."""
