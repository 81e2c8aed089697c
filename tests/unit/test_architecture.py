"""The import line, the light-module rule, the file limits and the cluster file of `docs/architecture.md`."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[2]
LINE = ("tokenization", "pipeline", "training", "jobs")
HEAVY = ("torch", "ray", "deepspeed")
LIGHT_MODULES = (
    "tokenization",
    "tokenization.config",
    "tokenization.fingerprint",
    "pipeline",
    "pipeline.config",
    "training",
    "training.config",
    "training.evaluation",
    "training.evaluation.config",
    "jobs",
    "jobs.cli",
    "jobs.spec",
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", LINE)
def test_a_package_imports_only_what_stands_to_its_left(package: str) -> None:
    to_the_right = set(LINE[LINE.index(package) + 1 :])
    wrong = {str(path.relative_to(ROOT)): imported_packages(path) & to_the_right for path in sources(package)}
    assert {path: names for path, names in wrong.items() if names} == {}


def named_in_the_table(package: str) -> list[Path]:
    """What the document's table of files names of a package; a name without a folder lies where the one before does."""
    rows = (line.split("|")[1:-1] for line in (ROOT / "docs" / "architecture.md").read_text().splitlines())
    paths: list[Path] = []
    of_package = ""
    for first, _, names, _ in (row for row in rows if len(row) == 4):
        of_package = first.strip().strip("`/") or of_package
        folder = ROOT / package
        for name in re.findall(r"`([^`]+)`", names) if of_package == package else ():
            if name.endswith("/"):
                paths.extend((ROOT / package / name).rglob("*.py"))
                continue
            paths.append(ROOT / package / name if "/" in name else folder / name)
            folder = paths[-1].parent
    return paths


@pytest.mark.parametrize("package", LINE)
def test_the_table_of_files_names_each_once_and_no_other(package: str) -> None:
    named = [path for path in named_in_the_table(package) if path.name != "__init__.py"]
    assert sorted(named) == [path for path in sources(package) if path.name != "__init__.py"]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", LINE)
def test_files_fit_on_two_screens_and_functions_on_one(package: str) -> None:
    long: list[str] = []
    for path in sources(package):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(f"{path.name}: file")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                if (node.end_lineno or 0) - first.lineno >= 60:
                    long.append(f"{path.name}: {node.name}")
    assert long == []


def test_cluster_file_follows_the_schema_that_ray_ships() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert {"cpu_worker", "gpu_worker"} <= set(cluster["available_node_types"])


def test_nodes_of_the_cluster_have_the_token_that_they_ask_for() -> None:
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
