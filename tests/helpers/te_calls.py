"""Collect every name and keyword of Transformer Engine that source code uses, with `ast`.

Version guards are evaluated for one version: code under `if is_te_min_version("3.0")` counts only from 3.0 on.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

from packaging.version import Version

from tests.helpers.te_wheel import PACKAGE, Source

_COMPARE = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}


@dataclass(frozen=True)
class Use:
    where: str  # file:line
    name: str  # dotted, from the package on
    is_call: bool = False
    positional: int = 0
    keywords: tuple[str, ...] = ()
    opaque: bool = False  # a `*` or `**` whose content is not known from the source


def uses(tree: ast.Module, file: str, version: str) -> list[Use]:
    """Everything that the file asks of the package at this version of it."""
    return list(_Reader(tree, file, Version(version)).read(tree.body, {}, None, None))


def lacks(use: Use, source: Source) -> list[str]:
    """Return the parts of a use that the package lacks: "name", "name(keyword=)" or "name(... required)"."""
    definition = source.find(use.name)
    if definition is None:
        return [use.name]
    if not use.is_call:
        return []
    missing = [f"{use.name}({keyword}=)" for keyword in use.keywords if not source.accepts(definition, keyword)]
    parameters = source.signature(definition) or []
    positional = [p for p in parameters if p.kind == "positional"]
    if parameters and use.positional > len(positional) and not any(p.kind == "*" for p in parameters):
        missing.append(f"{use.name}({use.positional} arguments)")
    if not use.opaque:
        given = {p.name for p in positional[: use.positional]} | set(use.keywords)
        required = [p.name for p in parameters if p.kind in ("positional", "keyword") and p.default is None]
        missing += [f"{use.name}({name} required)" for name in required if name not in given]
    return missing


class _Reader:
    def __init__(self, tree: ast.Module, file: str, version: Version):
        self.tree, self.file, self.version = tree, file, version
        self.derived: dict[str, tuple[str, set[str]]] = {}
        self.functions = {s.name: s for s in tree.body if isinstance(s, ast.FunctionDef)}

    def read(self, body: list, names: dict[str, str], owner: str | None, function: ast.AST | None) -> Iterator[Use]:
        """`names`: what the file calls things of the package; `owner`: the class of the package that the class around
        derives from; `function`: the one around."""
        names = dict(names)
        statements = list(self.live(body))
        for statement in statements:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                yield from self._imports(statement, names)
        for statement in statements:
            if isinstance(statement, ast.ClassDef):
                found = [self._dotted(base, names) for base in statement.bases]
                base = next((name for name in found if name), None)
                yield from (self._use(statement, name) for name in found if name)
                yield from self._of_self(statement, base)
                yield from self.read(statement.body, names, base, None)
            elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for expression in self._own_expressions(statement):
                    yield from self._expression(expression, names, owner, function)
                yield from self.read(statement.body, names, owner, statement)
            elif not isinstance(statement, (ast.Import, ast.ImportFrom)):
                for expression in self._own_expressions(statement):
                    yield from self._expression(expression, names, owner, function)

    def live(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        """Yield the statements that this version reaches, without those of nested functions and classes.

        Exception handlers run only when the package lacks something, so they are left out.
        """
        for statement in body:
            yield statement
            if isinstance(statement, ast.If):
                holds = self.holds(statement.test)
                yield from self.live(statement.body if holds is not False else [])
                yield from self.live(statement.orelse if holds is not True else [])
            elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                for part in ("body", "orelse", "finalbody"):
                    yield from self.live(getattr(statement, part, []))

    def holds(self, test: ast.expr) -> bool | None:
        """Return a guard's value at this version, or None for a guard about something else."""
        if isinstance(test, ast.BoolOp):
            values = [self.holds(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in values else None if None in values else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self.holds(test.operand)
            return None if value is None else not value
        if isinstance(test, ast.Name):
            return True if test.id == "HAVE_TE" else None
        if isinstance(test, ast.Call) and ast.unparse(test.func).endswith("is_te_min_version"):
            bound = Version(test.args[0].value)  # type: ignore[attr-defined]
            equal = [ast.unparse(argument) for argument in [*test.args[1:], *(k.value for k in test.keywords)]]
            return self.version > bound if equal == ["False"] else self.version >= bound
        if isinstance(test, ast.Compare) and ast.unparse(test.left) == "get_te_version()":
            compare = _COMPARE.get(type(test.ops[0]))
            constants = [n.value for n in ast.walk(test.comparators[0]) if isinstance(n, ast.Constant)]
            return compare(self.version, Version(constants[0])) if compare else None
        return None

    def _use(self, node: ast.AST, name: str) -> Use:
        return Use(f"{self.file}:{node.lineno}", name)  # type: ignore[attr-defined]

    def _imports(self, statement: ast.Import | ast.ImportFrom, names: dict[str, str]) -> Iterator[Use]:
        for alias in statement.names:
            origin = f"{statement.module}.{alias.name}" if isinstance(statement, ast.ImportFrom) else alias.name
            if origin.split(".")[0] == PACKAGE:
                names[alias.asname or alias.name.split(".")[0]] = (
                    origin
                    if alias.asname or "." not in alias.name or (isinstance(statement, ast.ImportFrom))
                    else PACKAGE
                )
                yield self._use(statement, origin)

    def _of_self(self, statement: ast.ClassDef, base: str | None) -> Iterator[Use]:
        """Return what a class uses from its base class in the package, directly or through a class of the same file."""
        near = next((self.derived[ast.unparse(b)] for b in statement.bases if ast.unparse(b) in self.derived), None)
        base, own = (base, set()) if base or near is None else near
        if base is None:
            return
        nodes = list(ast.walk(statement))
        own = own | {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        of_self = [n for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"]
        own |= {n.attr for n in of_self if isinstance(n.ctx, ast.Store)}
        self.derived[statement.name] = (base, own)
        yield from (self._use(n, f"{base}.{n.attr}") for n in of_self if n.attr not in own)

    @staticmethod
    def _own_expressions(statement: ast.stmt) -> Iterator[ast.expr]:
        """Yield the expressions of a statement, not those of the statements inside it."""
        for _, value in ast.iter_fields(statement):
            for node in value if isinstance(value, list) else [value]:
                if isinstance(node, ast.arguments):
                    yield from (d for d in [*node.defaults, *node.kw_defaults] if d is not None)
                    yield from (a.annotation for a in [*node.args, *node.kwonlyargs] if a.annotation is not None)
                elif isinstance(node, ast.withitem):
                    yield node.context_expr
                elif isinstance(node, ast.expr):
                    yield node

    def _expression(self, node: ast.AST, names: dict, owner: str | None, function: ast.AST | None) -> Iterator[Use]:
        if isinstance(node, ast.IfExp):
            holds = self.holds(node.test)
            parts = [node.test] + [node.body] * (holds is not False) + [node.orelse] * (holds is not True)
            for part in parts:
                yield from self._expression(part, names, owner, function)
            return
        if isinstance(node, ast.Call):
            name = self._super(node.func, owner) or self._dotted(node.func, names)
            if name:
                keywords, opaque = self._keywords(node.keywords, function)
                positional = [a for a in node.args if not isinstance(a, ast.Starred)]
                opaque = opaque or len(positional) < len(node.args)
                yield replace(
                    self._use(node, name),
                    is_call=True,
                    positional=len(positional),
                    keywords=tuple(keywords),
                    opaque=opaque,
                )
                for part in [*node.args, *(k.value for k in node.keywords)]:
                    yield from self._expression(part, names, owner, function)
                return
        elif isinstance(node, ast.Attribute):
            name = self._dotted(node, names)
            if name:
                yield self._use(node, name)
                return
        for child in ast.iter_child_nodes(node):
            yield from self._expression(child, names, owner, function)

    @staticmethod
    def _super(node: ast.expr, owner: str | None) -> str | None:
        if owner and isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()":
            return owner if node.attr == "__init__" else f"{owner}.{node.attr}"
        return None

    @staticmethod
    def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in names:
            return ".".join([names[node.id], *parts])
        return None

    def _keywords(self, keywords: list[ast.keyword], function: ast.AST | None) -> tuple[list[str], bool]:
        """Return the keywords of a call, with those of `**`, and True if some keyword stays unknown."""
        found, opaque = [], False
        for keyword in keywords:
            if keyword.arg:
                found.append(keyword.arg)
            else:
                more, unknown = self._entries(keyword.value, function)
                found, opaque = found + more, opaque or unknown
        return sorted(set(found)), opaque

    def _entries(self, node: ast.expr, function: ast.AST | None) -> tuple[list[str], bool]:
        """Return the keys of a dictionary that is built in `function`."""
        if isinstance(node, ast.Dict):
            found, opaque = [k.value for k in node.keys if isinstance(k, ast.Constant)], False
            for key, value in zip(node.keys, node.values, strict=True):
                if key is None:
                    more, unknown = self._entries(value, function)
                    found, opaque = found + more, opaque or unknown
            return found, opaque
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
            return self._keywords(node.keywords, function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            called = self.functions[node.func.id]
            returned = [s.value for s in self.live(called.body) if isinstance(s, ast.Return) and s.value]
            results = [self._entries(value, called) for value in returned]
            return [key for keys, _ in results for key in keys], any(unknown for _, unknown in results)
        if isinstance(node, ast.Name) and isinstance(function, ast.FunctionDef):
            return self._variable(node.id, function)
        return [], True

    def _variable(self, name: str, function: ast.FunctionDef) -> tuple[list[str], bool]:
        found: list[str] = []
        opaque = known = False
        for statement in self.live(function.body):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name) and target.id == name and statement.value is not None:
                    more, unknown = self._entries(statement.value, function)
                    found, opaque, known = found + more, opaque or unknown, True
                elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == name:
                    found += [target.slice.value] if isinstance(target.slice, ast.Constant) else []
        return found, opaque or not known
