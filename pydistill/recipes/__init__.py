# SPDX-License-Identifier: Apache-2.0
"""The built-in recipes: one module and one or more yaml files each, beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydistill.config import RECIPES_FOLDER, ConfigError, RunConfig, find_recipe, load_config, read_yaml

# recipe key of a yaml file -> module with run(plan) -> results
MODULES = {"bilstm": "pydistill.recipes.bilstm"}


def available() -> dict[str, str]:
    """Return the name and the description of every built-in recipe."""
    paths = sorted(RECIPES_FOLDER.glob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: read_yaml(path).get("description", "") for path in paths}


def run(
    source: RunConfig | str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Plan a run, carry it out and return its results: the content of its ``metrics.json``.

    Args:
        source: a configuration, the name of a built-in recipe, or a yaml file.
        overrides: dotted keys and values laid over a name or file.
        resume: continue the run in the output folder; finished stages are kept.
        overwrite: replace the run in the output folder.

    Raises:
        ConfigError: a wrong key, type or value.
        PlanError: the run cannot work as configured; see :func:`pydistill.plan.plan`.
    """
    from pydistill.plan import plan

    config = source if isinstance(source, RunConfig) else load_config(find_recipe(source), overrides)
    if config.recipe not in MODULES:
        raise ConfigError(f"recipe: must be one of {', '.join(MODULES)}, got {config.recipe!r}")
    planned = plan(config, resume=resume, overwrite=overwrite)
    print(planned, flush=True)
    return import_module(MODULES[config.recipe]).run(planned)
