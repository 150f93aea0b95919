"""The package as users get it: sdist, wheel, imports, version; and the commands of the Makefile."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DATA_SUFFIXES = {".json", ".safetensors"}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def source_version() -> str:
    tree = ast.parse((ROOT / "resnet_triton" / "_version.py").read_text(encoding="utf-8"))
    (value,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return value


def run_python(code: str, cwd: Path = ROOT) -> str:
    """Runs `code` in a fresh process, with `cwd` first on its path; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_make(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    # The make that runs these tests hands its own variables down in MAKEFLAGS.
    dropped = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH", "TRITON_HOME", "XDG_CACHE_HOME"}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=cwd,
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# --- sdist and wheel


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of a copy of the sources, and the wheel that is built from that sdist."""
    tmp = tmp_path_factory.mktemp("packaging")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    for name in ("resnet_triton", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    def build(what: str, cwd: Path) -> Path:
        code = f"from setuptools import build_meta as b; print('BUILT', b.build_{what}({str(tmp)!r}))"
        result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("BUILT ")]
        return tmp / line.removeprefix("BUILT ")

    sdist = build("sdist", source)
    with tarfile.open(sdist) as tar:
        if sys.version_info >= (3, 12):
            tar.extractall(tmp / "unpacked", filter="data")
        else:
            tar.extractall(tmp / "unpacked")
    (unpacked,) = (tmp / "unpacked").iterdir()
    return sdist, build("wheel", unpacked)


def package_files() -> set[str]:
    """Names in the archives of all sources and data files, the kernels under their public name."""
    found = set()
    for folder, name in (
        (ROOT / "resnet_triton", "resnet_triton"),
        (ROOT / "kernels", "resnet_triton/kernels"),
    ):
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            if relative.parts[0] == "kernels" or "__pycache__" in relative.parts or not path.is_file():
                continue
            if path.suffix in {".py", *DATA_SUFFIXES} or path.name == "py.typed":
                found.add(f"{name}/{relative.as_posix()}")
    return found


def test_the_wheel_holds_every_source_and_data_file(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        assert package_files() - names == set()
        assert {
            "resnet_triton/py.typed",
            "resnet_triton/_version.py",
            "resnet_triton/kernels/__init__.py",
        } <= names
        symlinks = [i.filename for i in wheel.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]
        assert symlinks == []
        kernel_source = wheel.read("resnet_triton/kernels/geometry.py")
    assert kernel_source == (ROOT / "kernels" / "geometry.py").read_bytes()


def test_the_wheel_installs_one_top_level_package(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        top = {name.split("/")[0] for name in wheel.namelist()}
    version = source_version()
    assert top == {"resnet_triton", f"resnet_triton-{version}.dist-info"}


def test_the_sdist_holds_real_files(archives):
    with tarfile.open(archives[0]) as tar:
        members = {"/".join(m.name.split("/")[1:]): m for m in tar.getmembers()}
    assert package_files() - set(members) == set()
    assert [name for name, m in members.items() if not (m.isfile() or m.isdir())] == []
    assert {"LICENSE", "README.md", "pyproject.toml"} <= set(members)


def test_the_wheel_has_the_console_script(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        entry_points = wheel.read(f"resnet_triton-{source_version()}.dist-info/entry_points.txt").decode()
    assert "resnet-triton = resnet_triton.cli:main" in entry_points


def test_kernels_is_a_symlink_in_the_repository():
    link = ROOT / "resnet_triton" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


# --- version


def test_the_version_is_written_once():
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "resnet_triton._version.__version__"


def test_the_installed_metadata_has_the_same_version():
    try:
        installed = importlib.metadata.version("resnet-triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("resnet-triton is not installed in this environment")
    assert installed == source_version()


# --- imports


def test_importing_the_wheel_does_not_import_triton(archives, tmp_path):
    with zipfile.ZipFile(archives[1]) as wheel:
        wheel.extractall(tmp_path)
    out = run_python(
        """
        import sys, torch
        before = "triton" in sys.modules
        import resnet_triton
        print(before, "triton" in sys.modules, resnet_triton.__version__)
        print(resnet_triton.__file__)
        """,
        cwd=tmp_path,
    )
    facts, file = out.splitlines()
    assert facts.split() == ["False", "False", source_version()]
    assert Path(file).is_relative_to(tmp_path)


def test_the_package_works_without_triton():
    out = run_python(
        """
        import importlib.abc, sys

        class NoTriton(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoTriton())
        import torch
        import resnet_triton

        for name in resnet_triton.__all__:
            getattr(resnet_triton, name)
        model = resnet_triton.resnet18(num_classes=3).eval()
        with torch.inference_mode():
            print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))
        """
    )
    assert out.strip() == "(1, 3)"


def imported_modules(path: Path) -> set[str]:
    """Absolute module names that a file imports; relative imports are left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def test_kernels_import_only_torch_and_triton():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        foreign = {name for name in imported_modules(path) if name.partition(".")[0] not in allowed}
        assert foreign == set(), f"{path.name} imports {foreign}"


def test_ruff_bans_the_top_level_name_kernels():
    lint = PYPROJECT["tool"]["ruff"]["lint"]
    assert "TID251" in lint["select"]
    assert "resnet_triton.kernels" in lint["flake8-tidy-imports"]["banned-api"]["kernels"]["msg"]


# --- dependencies


def requirement_names(requirements: list[str]) -> set[str]:
    from packaging.requirements import Requirement

    return {Requirement(r).name for r in requirements}


def test_constraints_name_only_what_is_required():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    required = requirement_names([*project["dependencies"], *itertools.chain.from_iterable(extras)])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constrained = requirement_names([line for line in lines if line and not line.startswith("#")])
    assert constrained <= required


def test_triton_is_required_only_where_it_exists():
    from packaging.requirements import Requirement

    (triton,) = [r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "triton"]
    assert triton.marker is not None
    here = {"sys_platform": "linux", "platform_machine": "x86_64"}
    assert triton.marker.evaluate(here)
    assert triton.marker.evaluate(here | {"platform_machine": "aarch64"})
    assert not triton.marker.evaluate(here | {"sys_platform": "darwin", "platform_machine": "arm64"})
    assert not triton.marker.evaluate(here | {"sys_platform": "win32", "platform_machine": "AMD64"})


# --- the Makefile


@needs_make
def test_make_help_lists_the_targets():
    out = run_make("help").stdout
    for target in ("test", "bench", "check", "codegen", "clean", "help"):
        assert f"\n  {target} " in out


@needs_make
@pytest.mark.parametrize("version", ["2.7", "3.6", "3.9"])
def test_an_old_python_is_refused_in_one_line(tmp_path, version):
    old = script(tmp_path / "python", f"echo {version}")
    result = run_make("check-python", f"PYTHON={old}")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert f"is Python {version}, but Python >= 3.10 is needed" in line
    assert "PYTHON=python3.11" in line


@needs_make
def test_a_missing_python_is_named():
    result = run_make("check-python", "PYTHON=/does/not/exist/python3")
    assert result.returncode != 0
    assert "/does/not/exist/python3 was not found" in result.stderr


@needs_make
def test_a_missing_venv_module_is_named(tmp_path):
    body = f'case "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"'
    result = run_make("check-python", f"PYTHON={script(tmp_path / 'python', body)}")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert "has no venv module" in line
    assert "apt install python3" in line


@needs_make
def test_this_python_is_accepted():
    result = run_make("check-python", f"PYTHON={sys.executable}", PYTHONHOME="/nowhere", PYTHONPATH="/nowhere")
    assert result.returncode == 0, result.stderr


@needs_make
def test_settings_of_the_caller_do_not_reach_the_recipes(tmp_path):
    leaks = dict.fromkeys(
        (
            "PYTHONPATH",
            "PYTHONHOME",
            "PIP_TARGET",
            "PIP_PREFIX",
            "CONDA_PREFIX",
            "VIRTUAL_ENV",
            "TRITON_INTERPRET",
        ),
        "leaked",
    )
    lines = run_make("print-env", PIP_USER="1", **leaks).stdout.splitlines()
    assert [line for line in lines if "leaked" in line] == []
    assert "PIP_USER=0" in lines


@needs_make
def test_caches_go_into_the_checkout_without_a_writable_home(tmp_path):
    lines = run_make("print-env", HOME=str(tmp_path / "missing")).stdout.splitlines()
    assert f"TRITON_HOME={ROOT}/.cache" in lines
    assert f"XDG_CACHE_HOME={ROOT}/.cache" in lines


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the commands only, in a folder with a space, and a PYTHON that installs nothing."""
    root = tmp_path / "a checkout"
    root.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, root)
    shutil.copytree(ROOT / "tools", root / "tools")
    (root / "resnet_triton").mkdir()
    shutil.copy2(ROOT / "resnet_triton" / "_version.py", root / "resnet_triton")
    # `-m venv DIR` makes a python in it that does the same as this one and logs what pip was asked for.
    fake = """\
case "$*" in
    *version_info*) echo 3.11 ;;
    *"-m venv "*) for dir; do :; done; mkdir -p "$dir/bin"; cp "$0" "$dir/bin/python" ;;
    *"-m pip install"*) echo "$*" >>pip.log; exit "${FAKE_PIP_STATUS:-0}" ;;
esac
"""
    script(root / "python", fake)
    return root


@needs_make
class TestEnvironment:
    def make(self, checkout: Path, *arguments: str, good: bool = True, **env: str) -> list[str]:
        """`make env`; returns the pip command lines so far."""
        result = run_make("env", "PYTHON=./python", *arguments, cwd=checkout, **env)
        assert (result.returncode == 0) == good, result.stderr
        log = checkout / "pip.log"
        return log.read_text().splitlines() if log.exists() else []

    def test_it_is_made_once(self, checkout):
        (command,) = self.make(checkout)
        assert "-c constraints.txt" in command
        assert command.endswith("-e .[test,bench,dev]")
        assert len(self.make(checkout)) == 1

    def test_new_requirements_update_it_in_place(self, checkout):
        self.make(checkout)
        (checkout / ".venv" / "kept").touch()
        os.utime(checkout / "constraints.txt", (2e9, 2e9))
        assert len(self.make(checkout)) == 2
        assert (checkout / ".venv" / "kept").exists()

    def test_an_interrupted_installation_starts_again(self, checkout):
        assert len(self.make(checkout, good=False, FAKE_PIP_STATUS="137")) == 1
        (checkout / ".venv" / "half-made").touch()
        assert len(self.make(checkout)) == 2
        assert not (checkout / ".venv" / "half-made").exists()

    def test_a_failed_installation_is_completed(self, checkout):
        assert len(self.make(checkout, good=False, FAKE_PIP_STATUS="1")) == 1
        (checkout / ".venv" / "kept").touch()
        assert len(self.make(checkout)) == 2
        assert (checkout / ".venv" / "kept").exists()

    def test_an_environment_made_by_the_user_is_not_cleared(self, checkout):
        (checkout / ".venv" / "bin").mkdir(parents=True)
        shutil.copy2(checkout / "python", checkout / ".venv" / "bin" / "python")
        (checkout / ".venv" / "kept").touch()
        assert len(self.make(checkout)) == 1
        assert (checkout / ".venv" / "kept").exists()

    def test_a_moved_checkout_installs_again(self, checkout):
        self.make(checkout)
        moved = checkout.rename(checkout.with_name("elsewhere"))
        assert len(self.make(moved)) == 2

    def test_another_python_makes_it_anew(self, checkout):
        self.make(checkout)
        (checkout / ".venv" / "old").touch()
        body = (checkout / "python").read_text().replace("echo 3.11", "echo 3.12")
        script(checkout / "python3.12", body)
        assert len(self.make(checkout, "PYTHON=./python3.12")) == 2
        assert not (checkout / ".venv" / "old").exists()

    def test_a_folder_that_is_no_environment_is_left_alone(self, checkout):
        (checkout / "photos").mkdir()
        assert self.make(checkout, "VENV=photos", good=False) == []
        assert (checkout / "photos").exists()

    def test_the_newest_releases_get_their_own_environment(self, checkout):
        (command,) = self.make(checkout, "TORCH=latest")
        assert "constraints.txt" not in command
        assert "--upgrade" in command
        assert (checkout / ".venv-latest").is_dir()
        assert not (checkout / ".venv").exists()


class TestRunTests:
    """tools/run_tests.py on a project with one tiny test per group."""

    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        for folder, want in (("", ""), ("interpreter", "1"), ("codegen", "")):
            path = tmp_path / "tests" / folder / f"test_{folder or 'compiled'}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(
                f"import os\n\ndef test_mode():\n    assert os.environ.get('TRITON_INTERPRET', '') == {want!r}\n"
            )
        return tmp_path

    def run(self, project: Path, *arguments: str) -> tuple[int, list[str]]:
        result = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "run_tests.py"), "--jobs", "1", *arguments],
            cwd=project,
            env=os.environ | {"TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return result.returncode, result.stdout.splitlines()

    def test_all_groups_run_in_their_mode(self, project):
        code, lines = self.run(project)
        assert code == 0
        assert lines[-1] == "tests: 3 passed, 0 failed, 0 skipped"

    def test_a_failure_stops_nothing_and_is_not_lost(self, project):
        (project / "tests" / "test_compiled.py").write_text("def test_mode():\n    assert False\n")
        (project / "tests" / "interpreter" / "test_interpreter.py").write_text("")
        code, lines = self.run(project)
        assert code != 0
        assert lines[-1] == "tests: 1 passed, 1 failed, 0 skipped"
        assert any("interpreter" in line and "FAILED (pytest exit code 5)" in line for line in lines)
