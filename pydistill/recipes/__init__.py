# SPDX-License-Identifier: Apache-2.0
"""The built-in recipes: one module and one or more yaml files each, beside this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydistill.config import RECIPES_FOLDER, BaseRun, ConfigError, find_recipe, load_config, read_yaml
from pydistill.report import Page, ReportError, write_report

# recipe key of a yaml file -> module with run(plan) -> results
MODULES = {
    "bilstm": "pydistill.recipes.bilstm",
    "minilm": "pydistill.recipes.minilm",
    "mtdnn": "pydistill.recipes.mtdnn",
    "shared-projections": "pydistill.recipes.shared_projections",
}
# and where plan(config, resume=, overwrite=, dry_run=) is
PLANNERS = {
    "bilstm": "pydistill.plan:plan_bilstm",
    "minilm": "pydistill.recipes.minilm:plan_minilm",
    "mtdnn": "pydistill.recipes.mtdnn:plan_mtdnn",
    "shared-projections": "pydistill.recipes.shared_projections:plan_shared_projections",
}
# and where page(folder, results) is: what the report shows
PAGES = {
    "bilstm": "pydistill.recipes.bilstm_report:page",
    "minilm": "pydistill.recipes.minilm_report:page",
    "mtdnn": "pydistill.recipes.mtdnn_report:page",
    "shared-projections": "pydistill.recipes.shared_projections_report:page",
}


def available() -> dict[str, str]:
    """Return the name and the description of every built-in recipe."""
    paths = sorted(RECIPES_FOLDER.glob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: read_yaml(path).get("description", "") for path in paths}


def planner(config: BaseRun) -> Callable[..., Any]:
    """Return the function that plans a run of ``config.recipe``.

    Raises:
        ConfigError: there is no such recipe.
    """
    if config.recipe not in PLANNERS:
        raise ConfigError(f"recipe: must be one of {', '.join(PLANNERS)}, got {config.recipe!r}")
    return _imported(PLANNERS[config.recipe])


def page_of(folder: Path, results: dict[str, Any]) -> Page:
    """Return what the report of the run in ``folder`` shows, of any recipe.

    Raises:
        ReportError: it is a run of none of the recipes.
    """
    if results["recipe"] not in PAGES:
        raise ReportError(
            f"{folder}: is a run of {results['recipe']!r}, and only those of {', '.join(PAGES)} have a report"
        )
    return _imported(PAGES[results["recipe"]])(folder, results)


def report(folder: Path) -> tuple[Path, Page]:
    """Draw the report of a finished run; return where it is and what it shows.

    Raises:
        ReportError: the folder is not that of a finished run of one of the recipes.
    """
    return write_report(folder, page_of)


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def run(
    source: BaseRun | str | Path,
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
    from pydistill.recipes.stages import say

    config = source if isinstance(source, BaseRun) else load_config(find_recipe(source), overrides)
    planned = plan(config, resume=resume, overwrite=overwrite)
    say(str(planned))
    return import_module(MODULES[config.recipe]).run(planned)
