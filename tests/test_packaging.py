# SPDX-License-Identifier: Apache-2.0
"""What a stranger gets: source distribution, the wheel built from it, and clear words where something is missing."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pydistill._version import __version__

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree around the tests")


class Built(NamedTuple):
    tree: Path  # what was built
    sdist: Path
    wheel: Path
    unpacked: Path  # the wheel's files, as an installation would lay them out


def run(
    command: Sequence[str | Path], cwd: Path, env: dict[str, str | None] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """A process with its output; a None in `env` removes that variable."""
    environment = {**os.environ, "PYTHONPATH": "", **(env or {})}
    kept = {key: value for key, value in environment.items() if value is not None}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=kept, capture_output=True, text=True, timeout=timeout)


# An editable installation in this environment would offer its own modules for those that a wheel does not have.
HIDE_EDITABLE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
"""


def python(
    code: str, cwd: Path, path: Path, env: dict[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """`code` in a new interpreter that finds the packages in `path` first."""
    return run([sys.executable, "-c", HIDE_EDITABLE + code], cwd, {"PYTHONPATH": str(path), **(env or {})})


def copy_of_tree(target: Path) -> Path:
    """The tree without what builds and tools left in it, so that a build here neither reads nor disturbs them."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Source distribution, the wheel built from that, and the wheel's files. The one build of the suite."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = copy_of_tree(folder / "tree")
    # Without optimisation, and for one GPU at most: the same files and symbols in a third of the time.
    done = run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree],
        cwd=folder,
        env={"CMAKE_BUILD_TYPE": "Debug", "TORCH_CUDA_ARCH_LIST": "9.0"},
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return Built(tree, sdist, wheel, unpacked)


def package_files(tree: Path) -> set[str]:
    """What has to be in every wheel of the tree, by path inside it."""
    files = [path.relative_to(tree) for path in (tree / "pydistill").rglob("*.py")]
    files += [path.relative_to(tree) for path in (tree / "pydistill" / "recipes").glob("*.yaml")]
    kernels = [Path("pydistill") / path.relative_to(tree) for path in (tree / "kernels").rglob("*.py")]
    return {path.as_posix() for path in [*files, *kernels]} | {"pydistill/py.typed", "pydistill/_C.pyi"}


def metadata_of(unpacked: Path) -> Message:
    (file,) = unpacked.glob("*.dist-info/METADATA")
    return message_from_string(file.read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    files = {path.relative_to(built.unpacked).as_posix() for path in built.unpacked.rglob("*") if path.is_file()}
    assert package_files(built.tree) <= files
    ours = {file for file in files if ".dist-info/" not in file}
    (native,) = ours - package_files(built.tree)
    assert re.fullmatch(r"pydistill/_C\.[\w.-]+\.(so|pyd)", native)
    # Above all no top-level `kernels`, which would collide with other people's.
    assert {file.split("/")[0] for file in ours} == {"pydistill"}
    assert any(file.endswith("licenses/LICENSE") for file in files)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_source_distribution_builds_on_its_own(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    native = {path.relative_to(built.tree).as_posix() for path in (built.tree / "csrc").rglob("*") if path.is_file()}
    assert native <= files
    assert {
        "CMakeLists.txt",
        "cmake/cuda.cmake",
        "setup.py",
        "pyproject.toml",
        "kernels/__init__.py",
        "constraints.txt",
        "LICENSE",
    } <= files
    assert not [file for file in files if file.endswith((".so", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_metadata(built: Built) -> None:
    headers = metadata_of(built.unpacked)
    assert headers["Version"] == __version__
    assert headers["Requires-Python"] == ">=3.10"
    assert headers["License-Expression"] == "Apache-2.0"
    assert "torch>=2.10" in headers.get_all("Requires-Dist", [])
    # A plain install must not bring GPU compilers along, only the extra may.
    assert not [
        line for line in headers.get_all("Requires-Dist", []) if line.startswith("triton") and "extra" not in line
    ]
    (entry_points,) = built.unpacked.glob("*.dist-info/entry_points.txt")
    assert "pydistill = pydistill.cli:main" in entry_points.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_native_module_uses_nothing_but_the_stable_abi(built: Built) -> None:
    """No C++ symbol of torch: those change from release to release, and one wheel has to load into all of them."""
    (module,) = (built.unpacked / "pydistill").glob("_C.*.so")
    symbols = run(["nm", "-D", "-C", "--undefined-only", module], built.unpacked).stdout
    assert re.search(r" (aoti_torch|torch)_\w+$", symbols, flags=re.MULTILINE)
    assert re.findall(r".*\b(?:at|c10|torch)::.*", symbols) == []
    needed = run(["readelf", "-d", module], built.unpacked).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", needed)
    assert [name for name in libraries if "torch" in name or "c10" in name or "cuda" in name] == ["libtorch_cpu.so"]
    assert "$ORIGIN/../torch/lib" in needed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_installed_wheel_computes_without_compiler_triton_or_transformers(built: Built, tmp_path: Path) -> None:
    code = """
import sys
for name in ("triton", "transformers", "datasets", "pybind11"):
    sys.modules[name] = None  # importing it now fails
import torch, pydistill, pydistill.kernels
from pydistill import _C, _dispatch
from pydistill.losses.soft_target import soft_target_reference
from importlib.util import find_spec
student, teacher = torch.linspace(-3, 3, 21).reshape(3, 7).requires_grad_(), torch.zeros(3, 7)
assert _dispatch.resolve("soft_target", torch.device("cpu")) == "cpp"
loss = pydistill.soft_target_loss(student, teacher, temperature=2.0)
loss.backward()
torch.testing.assert_close(loss, soft_target_reference(student, teacher, temperature=2.0))
assert find_spec("kernels") is None
print(pydistill.__file__, pydistill.kernels.__file__, _C.version, pydistill.__version__, sep="\\n")
"""
    done = python(code, tmp_path, built.unpacked, {"PATH": None, "PYDISTILL_NATIVE": None})
    assert done.returncode == 0, done.stderr
    package, kernels, native_version, version = done.stdout.split("\n")[:4]
    assert Path(package) == built.unpacked / "pydistill" / "__init__.py"
    assert Path(kernels) == built.unpacked / "pydistill" / "kernels" / "__init__.py"
    assert native_version == version == __version__


@pytest.mark.slow
def test_wheel_without_native_code_runs_the_reference(tmp_path: Path) -> None:
    tree = copy_of_tree(tmp_path / "tree")
    done = run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, tree],
        cwd=tmp_path,
        env={"PYDISTILL_NATIVE": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = tmp_path / f"pydistill-{__version__}-py3-none-any.whl"
    # A zip file on the path is an installation without any file that could be loaded as native code.
    code = """
import torch, pydistill
from pydistill import _dispatch
assert _dispatch.native is None, _dispatch.native
assert pydistill.soft_target_loss(torch.ones(2, 3), torch.ones(2, 3)).item() == 0
try:
    pydistill.soft_target_loss(torch.ones(2, 3), torch.ones(2, 3), impl="cpp")
except RuntimeError as error:
    print(error)
"""
    done = python(code, tmp_path, wheel)
    assert done.returncode == 0, done.stderr
    assert "PYDISTILL_NATIVE" in done.stdout


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_import_without_torch_says_what_to_install(tmp_path: Path) -> None:
    done = python("import sys; sys.modules['torch'] = None; import pydistill", tmp_path, ROOT)
    assert done.returncode == 1
    assert re.fullmatch(r"ImportError: .*PyTorch.*pip install 'torch>=2\.10'", last_line(done.stderr))


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
def test_import_with_an_old_torch_says_what_to_install(tmp_path: Path, version: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    done = run([sys.executable, "-c", "import pydistill"], tmp_path, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 1
    line = last_line(done.stderr)
    assert line.startswith("ImportError: ") and version in line
    assert re.search(r"torch >= 2\.10.*pip install --upgrade 'torch>=2\.10'", line)


def setup_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """What `setup.py build_ext` stops with."""
    monkeypatch.setattr(
        sys,
        "argv",
        ["setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
    )
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    return str(stopped.value)


def test_build_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert re.search(
        r"needs torch in this environment: pip install 'torch>=2\.10'", setup_message(monkeypatch, tmp_path)
    )


def test_build_with_an_old_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.1")
    assert re.search(r"torch >= 2\.10, got 2\.9\.1: pip install", setup_message(monkeypatch, tmp_path))


def test_build_switch_takes_0_or_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYDISTILL_NATIVE", "off")
    assert setup_message(monkeypatch, tmp_path) == "pydistill: PYDISTILL_NATIVE must be 0 or 1, got 'off'"


def test_cuda_switch_takes_0_1_or_auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYDISTILL_CUDA", "on")
    assert setup_message(monkeypatch, tmp_path) == "pydistill: PYDISTILL_CUDA must be 0, 1 or auto, got 'on'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDACXX": "/nowhere/nvcc"}, r"PYDISTILL_CUDA=1, but nvcc was not found: set CUDACXX or CUDA_HOME"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, r"TORCH_CUDA_ARCH_LIST must look like '8\.0;9\.0\+PTX', got 'Hopper'"),
    ],
)
def test_cuda_that_was_demanded_and_cannot_be_built(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    if "CUDACXX" not in variables and shutil.which("nvcc") is None:
        pytest.skip("no nvcc found")
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, "-DPYDISTILL_VERSION=test", "-DPYDISTILL_CUDA=1"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run([*command, f"-DPython_EXECUTABLE={sys.executable}"], tmp_path, {**variables, "PATH": path})
    assert done.returncode != 0
    assert re.search(message, re.sub(r"\s+", " ", done.stderr)), done.stderr


def test_version_is_written_once() -> None:
    pattern = re.compile(rf"""["'=\s]{re.escape(__version__)}["'\s]""")
    files = [
        "pyproject.toml",
        "setup.py",
        "CMakeLists.txt",
        "Makefile",
        "csrc/ops.cpp",
        "pydistill/__init__.py",
    ]
    assert not [file for file in files if f'version = "{__version__}"' in (ROOT / file).read_text()]
    assert pattern.search((ROOT / "pydistill" / "_version.py").read_text())


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks as they stand, with the names that the text says the reader has."""
    from tiny_models import tiny_bert, tiny_rows, tiny_tokenizer
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    names: dict[str, Any] = {
        "student": tiny_bert(0),
        "teacher": tiny_bert(1).eval(),
        "args": arguments,
        "train_dataset": tiny_rows(8),
        "tokenizer": tiny_tokenizer(),
    }
    loss_example, relation_example, training_example = readme_blocks()
    exec(loss_example, names)
    assert names["student_logits"].grad.abs().sum() > 0
    exec(relation_example, names)
    assert names["student_q"].grad.abs().sum() > 0
    exec(training_example, names)
    assert names["trainer"].state.global_step == 1


def test_documents_name_what_exists() -> None:
    """Links between the pages, and the files and make targets that CONTRIBUTING and README tell people to use."""
    makefile = (ROOT / "Makefile").read_text()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        for link in re.findall(r"\]\((?!\w+:)([^)#]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        for target in re.findall(r"`make ([\w-]+)", text) + re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name} names make {target}"
        for file in re.findall(r"`((?:pydistill|csrc|tests|docs)/[\w./-]+\.\w+)`", text):
            assert (ROOT / file).exists(), f"{page.name} names {file}"
