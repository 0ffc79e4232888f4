"""The repository itself: its metadata, pins, Makefile, file sizes, and what `import lightning_accel` loads."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_accel
from tests.conftest import REPO
from tests.test_layers import FILES

tomllib = pytest.importorskip("tomllib", reason="the repository is built with Python >= 3.11")

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
TRACKED = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.splitlines()
MAX_LINES = 400


def pins(name: str) -> dict[str, str]:
    lines = (REPO / "requirements" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {key.lower().replace("_", "-"): version for key, version in pairs}


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    texts = list(itertools.chain(project["dependencies"], *project["optional-dependencies"].values()))
    return [requirement for text in texts if (requirement := Requirement(text)).name != project["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_pins_are_within_the_bounds_of_the_metadata(requirement: Requirement) -> None:
    version = pins("pins.txt").get(requirement.name.lower().replace("_", "-"))
    tested = {"peft", "optuna", "ray", "onnx", "onnxruntime", "pre-commit"}
    assert (version is None) == (requirement.name in tested), "pinned, or known not to be tested with"
    assert version is None or requirement.specifier.contains(version)


def test_the_pins_are_exact_and_sorted() -> None:
    lines = [line for line in (REPO / "requirements/pins.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines), "no local versions, no ranges"
    assert [line.lower() for line in lines] == sorted(line.lower() for line in lines)


@pytest.mark.parametrize("name", ["lightning", "jsonargparse"])
def test_compat_has_the_oldest_version_that_the_metadata_allows(name: str) -> None:
    bound = next(requirement for requirement in requirements() if requirement.name == name)
    (specifier,) = bound.specifier
    assert specifier.operator == ">="
    oldest = Version(f"{specifier.version}.0").release[:3]
    assert Version(pins("compat.txt")[name]).release[:3] == oldest


def test_every_make_target_can_be_made() -> None:
    makefile = (REPO / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (\S+)", makefile, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
    assert phony == targets >= {"demo", "test", "quick", "lint", "type", "docs", "bench", "compat", "clean", "help"}
    for target in sorted(targets):
        subprocess.run(["make", "-n", target], cwd=REPO, check=True, capture_output=True)


def test_ci_runs_lint_types_docs_and_every_test() -> None:
    script = REPO / ".ci/run"
    assert script.stat().st_mode & 0o100
    assert re.findall(r"^make (\w+)$", script.read_text(), re.MULTILINE) == ["lint", "type", "docs", "test"]
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("module", FILES)
def test_files_are_short_and_say_what_is_public(module: str) -> None:
    source = FILES[module].read_text()
    assert len(source.splitlines()) <= MAX_LINES
    tree = ast.parse(source)
    if not tree.body or module.endswith("__main__"):
        return
    assert ast.get_docstring(tree), "a module docstring"
    assigned = {ast.unparse(target) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert "__all__" in assigned


def test_nothing_large_or_generated_is_tracked() -> None:
    if not TRACKED:
        pytest.skip("not a git checkout")
    large = [path for path in TRACKED if (REPO / path).is_file() and (REPO / path).stat().st_size > 200_000]
    generated = [path for path in TRACKED if re.search(r"lightning_logs|\.ckpt$|\.pyc$|^site/|^receipts/", path)]
    assert large == generated == []


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Reads ``!!python/name:`` tags as text."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    nav = str(yaml.load((REPO / "mkdocs.yml").read_text(), Loader)["nav"])
    pages = [path.relative_to(REPO / "docs").as_posix() for path in (REPO / "docs").rglob("*.md")]
    assert [page for page in pages if f"'{page}'" not in nav] == []
    assert [page for page in re.findall(r"'([\w/]+\.md)'", nav) if page not in pages] == []


@pytest.mark.parametrize("link, status", [("index.md", 0), ("nowhere.md", 1)])
def test_make_docs_stops_at_a_broken_link(link: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n[link]({link})\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ntheme: {name: material, font: false}\n")
    build = re.search(r"\$\(BIN\)/mkdocs (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert build
    done = subprocess.run([sys.executable, "-m", "mkdocs", *build[1].split()], cwd=tmp_path, capture_output=True)
    assert done.returncode == status


def test_the_changelog_knows_this_version_or_unreleased_changes() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert len(headings) == 1 or headings[1] == lightning_accel.__version__


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_recipes(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"lightning_accel-{lightning_accel.__version__}-py3")
    names = zipfile.ZipFile(wheel).namelist()
    source = [path for path in (REPO / "lightning_accel").rglob("*") if path.suffix in {".py", ".c", ".yaml", ".typed"}]
    assert {path.relative_to(REPO).as_posix() for path in source} <= set(names)
    assert not [name for name in names if name.split("/")[0] in {"tests", "docs", "examples", "benchmarks"}]
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.skipif("not (REPO / '.venv').exists()", reason="make would build an environment")
def test_make_installs_again_only_when_the_pins_change(tmp_path: Path) -> None:
    """`make -n` of a copy whose environment carries the right stamps has nothing to install; with other pins it has."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((REPO / name).read_text())
    (tmp_path / "requirements").mkdir()
    for name in ("pins.txt", "compat.txt"):
        (tmp_path / "requirements" / name).write_text((REPO / "requirements" / name).read_text())

    def plan() -> str:
        return subprocess.run(["make", "-n", "lint"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / ".venv").mkdir()
    for stamp in re.findall(r"^touch (\S+)$", plan(), re.MULTILINE):
        (tmp_path / stamp).touch()
    assert "pip install" not in plan()
    with (tmp_path / "requirements/pins.txt").open("a") as file:
        file.write("zzz==1.0\n")
    assert "pip install" in plan()
