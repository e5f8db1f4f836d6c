"""The architecture, read from the syntax trees: who may import whom, who owns which library, how long things get."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.load_stages import load_any
from orchestrator.spec_stages import StagedSpec

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("orchestrator", "jobs") for path in (ROOT / folder).rglob("*.py"))
KINDS = ("pretrain", "finetune", "tune", "evaluate", "stages")
SPECS = sorted(path for kind in KINDS for path in (ROOT / "configs" / kind).glob("*.yaml"))

LAYERS = (
    {"credentials"},
    {"errors"},
    {"method_names", "fsspec_store"},
    {"object_store"},
    {"atomic_file"},
    {"local_copy"},
    {"quantities", "locations", "yaml_file", "page", "charts", "intervals", "provenance"},
    {"architectures", "spec_numbers", "ratio_estimates", "progress_line"},
    {"tasks"},
    {"ranking"},
    {"spec_survival"},
    {"spec_data", "spec_deepspeed", "spec_search", "spec_methods"},
    {"spec_retain"},
    {"spec", "console", "command_group"},
    {"methods", "spec_stages", "spec_evaluation"},
    {"load_spec"},
    {"search_space", "load_stages"},
    {"planning"},
    {"data"},
    {"samples"},
    {"facts"},
    {"policy"},
    {"tracking"},
    {"runs"},
    {"checkpoints"},
    {"worker"},
    {"doctor", "cluster_files"},
    {"scheduling"},
    {"submission"},
    {"commands"},
    {"cli_cluster"},
    {"cli", "jobs"},
    {"__main__"},
)
"""From the bottom up: a unit imports itself and units of lower layers, never a neighbour."""
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

INNER_LAYERS: dict[str, tuple[set[str], ...]] = {
    "data": ({"sources", "split_names"}, {"formats"}, {"..."}),
    "policy": ({"laws"}, {"..."}, {"views"}),
    "samples": ({"..."}, {"forms"}, {"open_split", "prepare"}, {"data_look", "stand_in"}),
    "scheduling": ({"decisions"}, {"..."}, {"search"}, {"launch"}, {"run_stages"}),
    "cluster_files": ({"..."}, {"check", "render"}),
}
"""Likewise inside a room that has rooms of its own; `...` stands for all its modules that are not named."""

OWNERS = {
    "ray": {"scheduling", "submission", "cluster_files"},
    "botocore": {"cluster_files"},
    "mlflow": {"tracking"},
    "torch": {"checkpoints", "worker", "facts", "methods", "tasks"},
    "deepspeed": {"worker"},
    "transformers": {"samples", "worker", "facts", "methods"},
    "datasets": {"data"},
    "peft": {"methods"},
    "bitsandbytes": {"methods"},
    "sklearn": {"tasks"},
}
"""The only units that may import a library."""
LIGHT = {unit for unit, rank in RANK.items() if rank < RANK["tracking"]} | {"runs"}
"""Units of which no module loads a heavy library when it is imported; some do later, inside of functions."""

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_JOB_LINES = 40


def unit_of(dotted: str) -> str:
    """`orchestrator.planning.plan` -> `planning`; `jobs.pretrain` -> `jobs`; the package itself -> ``."""
    first, _, rest = dotted.partition(".")
    return rest.partition(".")[0] if first == "orchestrator" else first


def dotted_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import out from the top"
            # `from orchestrator import spec` names a module, `from orchestrator.spec import RunSpec` does not.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (
                (node.lineno, name) for name in (names if node.module == "orchestrator" else [node.module or ""])
            )


def test_every_module_has_a_layer() -> None:
    units = {unit_of(dotted_name(path)) for path in MODULES} - {""}
    assert units <= RANK.keys(), f"give {units - RANK.keys()} a place in LAYERS"


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in MODULES
        if (importer := unit_of(dotted_name(path)))
        for line, name in imports(path)
        if name.partition(".")[0] in ("orchestrator", "jobs")
        and (imported := unit_of(name)) in RANK
        and imported != importer
        and RANK[imported] >= RANK[importer]
    ]
    assert not wrong, "\n".join(wrong)


def inner_rank(dotted: str) -> tuple[str, int]:
    """(room, rank inside of it) of a module; -1 where the room has no inner layers."""
    room, _, rest = dotted.removeprefix("orchestrator.").partition(".")
    layers = INNER_LAYERS.get(room)
    if layers is None or not rest:
        return room, -1
    unit = rest.partition(".")[0]
    return room, next(rank for wanted in (unit, "...") for rank, units in enumerate(layers) if wanted in units)


def test_imports_point_down_inside_rooms_too() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in MODULES
        for room, rank in [inner_rank(dotted_name(path))]
        for line, name in imports(path)
        if name.startswith("orchestrator.")
        for other, below in [inner_rank(name)]
        if room == other and -1 not in (rank, below) and below > rank
    ]
    assert not wrong, "\n".join(wrong)


def modules_imported(path: Path) -> set[str]:
    """Our modules that a file imports, wherever the import stands; of `from package import name` the name, if it is
    a module."""
    there = {dotted_name(module) for module in MODULES}
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & there or {node.module}
    return found & there


def test_no_modules_import_each_other_in_a_circle() -> None:
    below = {dotted_name(path): modules_imported(path) - {dotted_name(path)} for path in MODULES}
    while leaves := {name for name, names in below.items() if not names}:
        below = {name: names - leaves for name, names in below.items() if name not in leaves}
    assert not below, "\n".join(f"{name} -> {', '.join(sorted(names))}" for name, names in sorted(below.items()))


def test_each_outside_library_has_its_owners() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}, which only {', '.join(sorted(owners))} may"
        for path in MODULES
        for line, name in imports(path)
        if (owners := OWNERS.get(name.partition(".")[0])) and unit_of(dotted_name(path)) not in owners
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_stay_short() -> None:
    limits = {path: MAX_JOB_LINES if path.parent.name == "jobs" else MAX_MODULE_LINES for path in MODULES}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    wrong = [f"{path.relative_to(ROOT)}: {lengths[path]} lines" for path in MODULES if lengths[path] > limits[path]]
    assert not wrong, "\n".join(wrong)


def test_functions_stay_short() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


def unpickled(source: str) -> list[str]:
    """Calls that would run what a file holds: any of pickle's readers, torch's without `weights_only`, numpy's with
    objects."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "cloudpickle", "joblib", "dill"):
            found += [
                f"{node.module}.{name.name}" for name in node.names if name.name in ("load", "loads", "Unpickler")
            ]
        if not isinstance(node, ast.Call | ast.Attribute):
            continue
        called = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        if isinstance(node, ast.Attribute):
            if re.fullmatch(r"(pickle|cloudpickle|joblib|dill)\.(load|loads|Unpickler)", called):
                found.append(called)
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append(called)
        if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            found.append(called)
    return found


def test_no_file_is_unpickled() -> None:
    wrong = [f"{path.relative_to(ROOT)}: {call}" for path in MODULES for call in unpickled(path.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(file)", ["torch.load"]),
        ("torch.load(file, weights_only=False)", ["torch.load"]),
        ("torch.load(file, mmap=True, weights_only=True)", []),
        ("pickle.loads(text)", ["pickle.loads"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("class Own(pickle.Unpickler): ...", ["pickle.Unpickler"]),
        ("np.load(file)", []),
        ("np.load(file, allow_pickle=True)", ["np.load"]),
        ("json.load(file)", []),
    ],
)
def test_what_unpickles_is_found(source: str, found: list[str]) -> None:
    assert unpickled(source) == found


def test_rooms_below_tracking_and_the_protocol_of_runs_load_no_heavy_library() -> None:
    light = [dotted_name(path) for path in MODULES if unit_of(dotted_name(path)) in LIGHT]
    heavy = ("torch", "ray", "mlflow", "transformers", "deepspeed", "datasets", "matplotlib", "sklearn")
    code = f"import sys, {', '.join(light)}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_shipped_spec_loads() -> None:
    # One test over all files, so that an empty folder is no skipped test; each failure names its file.
    loaded = {path: load_any(path) for path in SPECS}
    assert {path.parent.name for path in SPECS} == set(KINDS)
    for path, one in loaded.items():
        kind = "stages" if isinstance(one, StagedSpec) else "tune" if one.search is not None else one.kind
        assert kind == path.parent.name, path


def test_every_shipped_spec_names_its_schema_for_editors() -> None:
    for path in SPECS:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        scheme, found, target = first.partition("$schema=")
        assert found, f"{path} has no schema line on top"
        assert scheme == "# yaml-language-server: ", path
        assert "://" in target or (path.parent / target.strip()).is_file(), f"{path}: no schema at {target}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from orchestrator import spec, errors", ["orchestrator.spec", "orchestrator.errors"]),
        ("from orchestrator.spec import RunSpec", ["orchestrator.spec"]),
        ("def f():\n    import ray.train", ["ray.train"]),
        ("import typing\nif typing.TYPE_CHECKING:\n    from mlflow import MlflowClient", ["typing", "mlflow"]),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path: Path, source: str, found: list[str]) -> None:
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    assert [name for _, name in imports(path)] == found


def test_no_two_files_of_tests_have_one_name() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []  # pytest imports a module under its name alone


def test_the_readme_names_every_module_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("## The tree") : text.index("## Non-goals")]
    named = set(re.findall(r"^\s+(\w+\.py)\s", tree, re.MULTILINE))
    there = {path.name for path in (ROOT / "orchestrator").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == there
