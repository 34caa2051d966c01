"""Who may import whom, where files are opened and lines printed, and what the public names are.

Read from the source, imports inside functions included; those for type checkers only are left out, since nothing comes
of them at run time.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cmtool

ROOT = Path(cmtool.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
FLOW = {"errors", "flow"}

# What each part of the package may import of the others. A new module must find its place here.
MAY_IMPORT = {
    "cache": set(),
    "compat": set(),
    "editing": set(),
    "errors": set(),
    "compiled": {"cache"},
    "memory": {"compiled"},
    "networks": {"compiled"},
    "rng": {"compiled"},
    "precision": {"errors", "memory", "processes"},
    "processes": {"errors", "pulse"},
    "pulse": {"errors"},
    "spec": {"errors"},
    "flow": {"errors"},
    "solvers": FLOW,
    "times": FLOW,
    "sampler": FLOW | {"times"},
    "generate": FLOW | {"editing", "io", "networks", "rng", "sampler", "solvers", "times"},
    "starts": FLOW | {"generate", "sampler", "solvers", "times"},
    "evaluation": FLOW | {"compat", "generate", "io", "processes", "rng", "solvers", "times"},
    "training": FLOW | {"compat", "networks", "processes", "rng", "solvers", "times"},
    "io": FLOW | {"cache", "compat", "networks", "processes", "rng", "spec", "times"},
    "doctor": FLOW | {"cache", "compiled", "io", "memory", "networks", "precision", "rng", "training"},
    "benchmark": FLOW | {"compat", "generate", "io", "memory", "networks", "rng", "times", "training"},
    "reporting": set(),
    "studio": FLOW | {"generate", "io", "starts"},
    "cli": FLOW
    | {
        "reporting",
        "studio",
        "benchmark",
        "doctor",
        "editing",
        "evaluation",
        "generate",
        "io",
        "networks",
        "precision",
        "processes",
        "rng",
        "sampler",
        "spec",
        "starts",
        "times",
        "training",
    },
    "__main__": {"cli", "processes"},
    "__init__": set(),
}

# Packages that belong to one part.
OWNERS = {
    "typer": {"cli"},
    "rich": {"cli"},
    "PIL": {"io", "reporting"},
    "datasets": {"io"},
    "diffusers": {"benchmark"},
    "huggingface_hub": {"io"},
    "onnx": {"io"},
    "onnxruntime": {"io"},
    "pyarrow": {"io"},
    "safetensors": {"io"},
    "sklearn": {"io"},
    "tensorboard": {"io"},
    "wandb": {"io"},
    "lpips": {"training"},
    "torch_fidelity": {"evaluation"},
    "torchvision": {"io", "training"},
    "triton": {"networks"},
}
STDLIB_AND_CORE = {*sys.stdlib_module_names, "cmtool", "torch", "numpy"}
SLOW = {
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "safetensors",
    "lpips",
    "sklearn",
    "rich",
    "huggingface_hub",
    "onnx",
    "datasets",
    "pyarrow",
    "tensorboard",
    "wandb",
}

FILE_CALLS = {
    *(
        "open",
        "read_text",
        "read_bytes",
        "write_text",
        "write_bytes",
        "mkdir",
        "touch",
        "unlink",
        "rename",
        "replace_file",
    ),
    *("rmtree", "mkstemp", "NamedTemporaryFile", "TemporaryDirectory", "fdopen"),
}
# The null device in place of a closed pipe is no file of the user's, and neither is machine code in the cache folder.
FILE_CALLS_ALLOWED = {
    ("cli/app.py", "os.open"),
    ("compiled.py", "source.read_bytes"),
    ("studio/server.py", "files('cmtool.studio').joinpath('page.html').read_bytes"),
    ("compiled.py", "file.parent.mkdir"),
    ("compiled.py", "tempfile.TemporaryDirectory"),
    ("compiled.py", "Path('/proc/cpuinfo').read_text"),
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part(path: Path) -> str:
    """The part of the package a source file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    """The module's dotted name."""
    names = ("cmtool", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


def imports(node: ast.AST, *, functions: bool) -> Iterator[str]:
    """Dotted names of all imported modules, those inside functions too if asked for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import: {ast.unparse(child)}"
            assert child.module is not None
            yield child.module
            yield from (name for alias in child.names if (name := f"{child.module}.{alias.name}") in MODULES)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(child, functions=functions)


def calls(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(last name, whole name) of everything that is called."""
    for child in ast.walk(node):
        if isinstance(child, ast.Call) and isinstance(child.func, (ast.Name, ast.Attribute)):
            whole = ast.unparse(child.func)
            yield whole.rsplit(".", 1)[-1], whole


sources = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_checks_see_something():
    assert len(SOURCES) > 40
    found = set(imports(tree(ROOT / "training" / "distances.py"), functions=True))
    assert {"torch", "lpips", "cmtool.compat"} <= found
    assert "lpips" not in set(imports(tree(ROOT / "training" / "distances.py"), functions=False))
    assert "cmtool.io.checkpoint" in set(
        imports(tree(ROOT / "io" / "run.py"), functions=False)
    )  # from cmtool.io import ...
    assert ("open", "path.open") in set(calls(tree(ROOT / "io" / "checkpoint.py")))


def test_every_part_has_its_place_and_none_are_circular():
    assert {part(path) for path in SOURCES} == MAY_IMPORT.keys()
    list(TopologicalSorter(MAY_IMPORT).static_order())  # raises on a circle


@sources
def test_imports_go_one_way(path):
    allowed = MAY_IMPORT[part(path)] | {part(path)}
    for name in imports(tree(path), functions=True):
        if name.startswith("cmtool."):
            assert name.split(".")[1] in allowed, f"{part(path)} may not import {name}"


@sources
def test_packages_are_imported_by_their_owners_only(path):
    for name in imports(tree(path), functions=True):
        package = name.split(".")[0]
        if package in OWNERS:
            assert part(path) in OWNERS[package], f"{package} belongs to {', '.join(OWNERS[package])}"
        else:
            assert package in STDLIB_AND_CORE, f"{package} is no dependency"


def test_the_command_line_starts_without_anything_slow():
    """Help, completion and usage errors import the command modules and the names of the presets, and no more."""
    todo, seen = ["cmtool.cli.app", "cmtool.__main__", "cmtool.training.presets"], set()
    while todo:
        module = todo.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        todo.extend(module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1))  # its packages
        for name in imports(tree(MODULES[module]), functions=False):
            assert name.split(".")[0] not in SLOW, f"{module} imports {name} where it is read"
            todo.append(name)
    assert {"cmtool.cli.sample", "cmtool.errors", "cmtool.networks.configs"} <= seen


@sources
def test_only_io_touches_files(path):
    if part(path) == "io":
        return
    place = path.relative_to(ROOT).as_posix()
    for last, whole in calls(tree(path)):
        touches = last in FILE_CALLS or whole in {"torch.save", "torch.load", "np.save", "np.load"}
        assert not touches or (place, whole) in FILE_CALLS_ALLOWED, f"{place} calls {whole}"


@sources
def test_only_the_command_line_prints(path):
    if part(path) in ("cli", "__main__"):
        return
    for _, whole in calls(tree(path)):
        assert whole not in {"print", "exit", "quit", "sys.exit"}, "only cli/ prints and exits"
        assert not whole.startswith(("sys.stderr.", "warnings.warn", "logging.warn")), f"{whole}: raise, or return it"


@sources
def test_nothing_in_a_file_is_executed(path):
    for last, whole in calls(tree(path)):
        assert whole not in {"eval", "exec", "compile"}, whole
        assert not whole.startswith(("pickle.load", "marshal.", "joblib.")), whole
        assert last != "Unpickler", whole
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)


# Public names.


def test_public_names():
    assert cmtool.__all__ == ["__version__", *cmtool._PUBLIC]
    assert dir(cmtool) == sorted(cmtool.__all__)
    for name, module in cmtool._PUBLIC.items():
        found = getattr(cmtool, name)
        assert found is getattr(importlib.import_module(module), name)
        assert found.__module__ == module, f"{name} lives in {found.__module__}"
        assert (found.__doc__ or "").strip(), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        cmtool.smaple  # noqa: B018


def test_importing_the_package_imports_nothing_slow():
    code = (
        "import sys, cmtool; cmtool.__version__; dir(cmtool);"
        f"slow = sorted({SLOW!r} & sys.modules.keys()); assert not slow, slow;"
        "cmtool.sample; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["cmtool.flow", "cmtool.networks"])
def test_all_lists_what_there_is(package):
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), name


def test_kinds_are_unique_and_name_their_class():
    """One table for all components: a name used twice would hide a class."""
    from cmtool import networks, solvers, times
    from cmtool.flow import parameterization, path
    from cmtool.training import (
        augment,
        average,
        distances,
        objectives,
        recipe,
        tangents,
        targets,
        trajectory,
        weights,
    )

    tables = [
        *(
            path.PATHS,
            parameterization.PARAMETERIZATIONS,
            parameterization.TIME_INPUTS,
            solvers.SOLVERS,
            networks.CONFIGS,
        ),
        *(times.GRIDS, times.CURRICULA, times.INDEX_LAWS, times.TIME_SAMPLERS),
        *(average.AVERAGES, distances.DISTANCES, weights.WEIGHTS, targets.TARGETS, trajectory.TRAJECTORIES),
        *(objectives.OBJECTIVES, tangents.LIMITS, tangents.BALANCES),
        {"optimizer": recipe.Optimizer, "augment": augment.Augment},
    ]
    assert sum(len(table) for table in tables) == len(recipe.KINDS)
    for table in tables:
        for kind, cls in table.items():
            assert cls.kind == kind
            assert recipe.KINDS[kind] is cls


def test_every_component_has_its_table_and_its_short_name():
    """Every dataclass with a kind is known by it, and `parts` names all that a recipe is made of."""
    from cmtool import networks
    from cmtool.training import parts, recipe

    named = {getattr(parts, name) for name in parts.__all__} - {parts.Recipe, parts.Part}
    assert set(recipe.KINDS.values()) - set(networks.CONFIGS.values()) == named
    places = ("cmtool.training.", "cmtool.flow.", "cmtool.times")
    for module in (name for name in MODULES if name.startswith(places)):
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type) and is_dataclass(value) and isinstance(vars(value).get("kind"), str):
                assert recipe.KINDS.get(value.kind) is value, f"{module}.{value.__name__} is in no table"
