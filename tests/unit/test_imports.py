"""Imports point downward, Megatron stays behind its doors, and `import megatron_oprd` loads nothing."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_oprd"
LEVELS = [
    {"types", "config", "platform", "files", "cli", "environment", "progress"},
    {"losses", "data"},
    {"parallel"},
    {"hf"},
    {"models"},
    {"rollout"},
    {"training", "evaluation", "resilience"},
    {"bridge"},
    {"layouts", "lengths"},
    {"inputs"},
    {"assemble"},
    {"health_watch"},
    {"run_folder"},
    {"bridge.fitting"},
    {"train", "evaluate", "fp8_error", "bridge.fit"},
]
MEGATRON_ALLOWED = ("platform.py", "parallel/", "hf/", "models/", "rollout/megatron", "training/")
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> set[str]:
    """Every absolute module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(package: Path = PACKAGE) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        part = name.removesuffix(".py").replace("/", ".")
        part = part if part in LEVEL else part.split(".")[0]  # a command may stand above its folder
        for module in sorted(imports(path)):
            names = module.split(".")
            if names[0] == "megatron_oprd" and len(names) > 1 and part in LEVEL and names[1] in LEVEL:
                higher = LEVEL[names[1]] > LEVEL[part]
                beside = LEVEL[names[1]] == LEVEL[part] >= 6 and names[1] != part
                if higher or beside:
                    wrong.append(f"{name} imports {module}")
            if module.startswith("megatron.core") and not name.startswith(MEGATRON_ALLOWED):
                wrong.append(f"{name} imports {module}")
            if module.startswith("megatron.training"):
                wrong.append(f"{name} imports {module}")
            if "parallel_state" in names and name != "parallel/topology.py":
                wrong.append(f"{name} reads parallel_state")
    return wrong


def test_imports_point_downward():
    assert violations() == []


def test_every_part_has_a_level():
    parts = {p.stem if p.suffix else p.name for p in PACKAGE.iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert parts <= set(LEVEL)


def test_an_upward_import_is_seen(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.py").write_text(
        "def f():\n    from megatron_oprd.models import build\n    import megatron.core\n"
    )
    assert len(violations(tmp_path)) == 2


def test_importing_the_package_loads_neither_torch_nor_megatron():
    code = "import sys, megatron_oprd; sys.exit(any(m in sys.modules for m in ('torch', 'megatron.core')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
