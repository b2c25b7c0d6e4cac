"""The rules of the package's structure: levels, no cycles, Megatron behind its doors, short parameter lists."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_oprd"
NAME = PACKAGE.name
# One folder is one level; a module imports its own folder or folders before it. Commands (modules that end in
# `run_command(main)`) stand above all folders.
LEVELS = (
    "types",
    "model_spec",
    "config",
    "runtime",
    "losses",
    "data",
    "parallel",
    "hf",
    "models",
    "rollout",
    "training",
    "checkpoint",
    "evaluation",
    "report",
    "resilience",
    "bridge",
    "launch",
    "planning",
    "health",
    "bridge.fitting",
    "analysis",
    "testing",
    "commands",
)
COMMANDS = len(LEVELS)
MEGATRON_FOLDERS = {"runtime", "parallel", "hf", "models", "rollout", "training", "checkpoint", "planning", "testing"}
MOST_PARAMETERS = 6


def modules(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """Return the syntax tree of each module by its dotted name below the package."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.Module) -> set[str]:
    """Return every absolute name that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(trees: dict[str, ast.Module], module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in imports(trees[module]):
        parts = name.split(".")
        if parts[0] != NAME:
            continue
        candidates = (".".join(parts[1:end]) for end in range(len(parts), 0, -1))
        found.add(next(candidate for candidate in candidates if candidate in trees))
    return found - {""}


def is_command(tree: ast.Module) -> bool:
    """Return True if running the module runs a command."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == "run_command" for call in calls)


def level(trees: dict[str, ast.Module], module: str) -> int:
    """Return the level of a module. Raises ValueError for a module in no folder of LEVELS."""
    if is_command(trees[module]):
        return COMMANDS
    folder = module
    while folder not in LEVELS:
        folder, dot, _ = folder.rpartition(".")
        if not dot:
            raise ValueError(f"{module} lies in no folder of LEVELS")
    return LEVELS.index(folder)


def upward_imports(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module in trees
        if module
        for other in sorted(own_imports(trees, module))
        if level(trees, other) > level(trees, module)
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(graph[module]):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def long_signatures(trees: dict[str, ast.Module]) -> list[str]:
    """Return the public functions and methods with more than MOST_PARAMETERS parameters, `self` not counted."""
    found = []
    for module, tree in trees.items():
        holders = [
            ("", tree),
            *((node.name, node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"),
        ]
        for holder, node in holders:
            for function in node.body:
                if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                    continue
                every = function.args
                names = [one.arg for one in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > MOST_PARAMETERS:
                    found.append(".".join(filter(None, (module, holder, function.name))))
    return found


TREES = modules()


def test_imports_point_downward():
    assert upward_imports(TREES) == []


def test_the_package_root_holds_only_commands_and_the_lowest_levels():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", *LEVELS[:2]}
    assert [name for name in sorted(files) if not is_command(TREES[name])] == []


def test_no_import_cycle_between_files():
    assert cycle({module: own_imports(TREES, module) for module in TREES}) == []


def test_megatron_core_is_imported_only_where_models_are_built_and_run():
    wrong = []
    for module, tree in TREES.items():
        for name in sorted(imports(tree)):
            if name.startswith("megatron.core") and module.split(".")[0] not in MEGATRON_FOLDERS:
                wrong.append(f"{module} imports {name}")
            if name.startswith("megatron.training"):
                wrong.append(f"{module} imports {name}")
            if "parallel_state" in name.split(".") and module != "parallel.topology":
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_the_package_does_not_import_mock():
    assert [module for module, tree in TREES.items() if any("mock" in name for name in imports(tree))] == []


def test_public_functions_have_few_parameters():
    assert long_signatures(TREES) == []


@pytest.mark.parametrize("source", ["from megatron_oprd.models import build", "import megatron_oprd.models.build"])
def test_an_upward_import_is_found(source):
    trees = TREES | {"data.packing": ast.parse(f"def f():\n    {source}\n")}
    assert upward_imports(trees) == ["data.packing imports models.build"]


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_a_long_signature_is_found():
    tree = ast.parse("class A:\n def f(self, a, b, c, d, *, e, g, h): ...\n")
    assert long_signatures({"x": tree}) == ["x.A.f"]


def test_importing_the_package_loads_neither_torch_nor_megatron():
    code = "import sys, megatron_oprd; sys.exit(any(m in sys.modules for m in ('torch', 'megatron.core')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
