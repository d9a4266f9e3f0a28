"""What a wheel's modules offer, as type stubs of those classes and functions that somebody uses.

A stub has every public member of a class, so that it also says what there is not. Types are followed as far as `attributes` go: the type
of a member that nobody touches is Any, with what it stands for in a comment.
"""

from __future__ import annotations

import ast
import builtins
from collections import defaultdict
from dataclasses import dataclass, field

from engine_wheel import Wheel

HEADER = [
    "# mypy: disable-error-code=overload-cannot-match",  # of overloads that differ in what became Any
    "from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence",
    "from dataclasses import dataclass, field",
    "from typing import Any, ClassVar, NotRequired, Protocol, Self, TypedDict, overload",
]
"""What each stub begins with."""

UNFOLLOWED = "  # "
"""What stands before the classes for which a stub says Any."""

_GENERIC = {"AsyncGenerator", "AsyncIterator", "Awaitable", "ClassVar", "Generator", "Iterable", "Iterator", "Mapping", "NotRequired"}
_GENERIC |= {"Sequence", "dict", "list", "set", "tuple", "type"}
_PLAIN = {"Any", "Self", "bool", "bytes", "dict", "float", "int", "list", "object", "set", "str", "tuple", "type"}
_DECORATORS = {name: name for name in ("classmethod", "overload", "property", "staticmethod")} | {"cached_property": "property"}
_BASES = {"Protocol", "TypedDict", *dir(builtins)}
_DATACLASSES = {"config", "dataclass", "Struct"}
"""What makes a class's fields its constructor's arguments: vLLM's own decorator, the standard one, msgspec's base class."""


@dataclass(frozen=True)
class Symbol:
    """A name in a module of the wheel."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """With dots."""
        return f"{self.module}.{self.name}"


@dataclass
class Stubs:
    """Collects stubs of symbols and of what they lead to."""

    wheel: Wheel
    attributes: set[str]
    modules: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _seen: set[Symbol] = field(default_factory=set)

    def add(self, symbol: Symbol) -> None:
        """Add a symbol, where it is defined and where it is imported from; one that does not exist is left out."""
        if symbol in self._seen:
            return
        self._seen.add(symbol)
        defined = self.find(symbol)
        if defined is None:
            return
        origin, node = defined
        if origin != symbol:
            self.add(origin)
            self.modules[symbol.module] += [f"from {origin.module} import {origin.name} as {symbol.name}"]
        elif isinstance(node, ast.ClassDef):
            self._class(origin, node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self.modules[origin.module] += self._function(origin.module, node, "")
        else:
            self.modules[origin.module] += [self._variable(origin.module, origin.name, getattr(node, "annotation", None), "")]

    # names

    def find(self, symbol: Symbol) -> tuple[Symbol, ast.AST] | None:
        """Where a symbol is defined, through any number of imports; None if it is not."""
        tree = self.wheel.tree(symbol.module)
        if tree is None:
            return None
        found: tuple[Symbol, ast.AST] | None = None
        for node in _statements(tree.body):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if name == symbol.name:
                    return symbol, node
                case ast.AnnAssign(target=ast.Name(id=symbol.name)):
                    return symbol, node
                case ast.Assign() if any(isinstance(t, ast.Name) and t.id == symbol.name for t in node.targets):
                    found = found or (symbol, node)
                case ast.ImportFrom():
                    for alias in node.names:
                        if (alias.asname or alias.name) == symbol.name:
                            elsewhere = Symbol(self._absolute(symbol.module, node), alias.name)
                            found = self.find(elsewhere) or found
                case _:
                    pass
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.wheel.path(module) or ""
        parts = module.split(".")
        base = parts[: len(parts) - node.level + path.endswith("__init__.py")]
        return ".".join([*base, *([node.module] if node.module else [])])

    def _class_of(self, module: str, annotation: ast.AST | None) -> tuple[Symbol, ast.ClassDef] | None:
        """The class of the wheel that an annotation names, also as `X | None` or in quotes."""
        match annotation:
            case ast.Constant(value=str(text)):
                return self._class_of(module, ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, right=ast.Constant(value=None)):
                return self._class_of(module, left)
            case ast.Name(id=name):
                found = self.find(Symbol(module, name))
                if found is not None and isinstance(found[1], ast.ClassDef):
                    return found[0], found[1]
        return None

    # definitions

    def _class(self, symbol: Symbol, node: ast.ClassDef) -> None:
        module, bases = symbol.module, []
        marks = {_last(decorator) for decorator in node.decorator_list} | {_last(base) for base in node.bases}
        for base in node.bases:
            if (found := self._class_of(module, base)) is not None:
                self.add(found[0])
                bases.append(found[0].path)
            elif isinstance(base, ast.Name) and base.id in _BASES:
                bases.append(base.id)
        lines = ["@dataclass"] if marks & _DATACLASSES else []
        inherits = f"({', '.join(bases)})" if bases else ""
        lines.append(f"class {symbol.name}{inherits}:")
        members: dict[str, list[str]] = {}
        overloaded = {
            part.name for part in node.body if isinstance(part, ast.FunctionDef) and "overload" in map(_last, part.decorator_list)
        }
        for part in _statements(node.body):
            match part:
                case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                    comment, text = self._value(module, part.annotation, name)
                    members[name] = [f"    {name}: {text}{_default(part.value)}{comment}"]
                case ast.Assign(targets=[ast.Name(id=name)]) if not name.startswith("_"):
                    members[name] = [f"    {name}: Any"]
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if not name.startswith("_") or name == "__init__":
                    if name not in overloaded or "overload" in map(_last, part.decorator_list):
                        members.setdefault(name, []).extend(self._function(module, part, "    "))
        for name, annotation, where in self._instance_attributes(module, node):
            if not name.startswith("_") and name not in members:
                members[name] = [self._variable(where, name, annotation, "    ")]
        self.modules[module] += lines + ([line for member in members.values() for line in member] or ["    ..."])

    def _instance_attributes(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.AST | None, str]]:
        """What ``__init__`` sets on self: name, annotation, and the module in which that is to be read."""
        init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
        if init is None:
            return []
        types = {arg.arg: (arg.annotation, module) for arg in [*init.args.args, *init.args.kwonlyargs]}
        found: list[tuple[str, ast.AST | None, str]] = []
        for part in ast.walk(init):
            match part:
                case ast.AnnAssign(target=ast.Attribute(value=ast.Name(id="self"), attr=name), annotation=annotation):
                    found.append((name, annotation, module))
                case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name), *_], value=value):
                    found.append((name, *self._type(module, value, types)))
        return found

    def _type(self, module: str, value: ast.AST, types: dict[str, tuple[ast.expr | None, str]]) -> tuple[ast.AST | None, str]:
        """The annotation of an expression: an argument, an attribute of one, or a new object."""
        match value:
            case ast.Name(id=name) if name in types:
                return types[name]
            case ast.Call(func=ast.Name() as made) if self._class_of(module, made) is not None:
                return made, module
            case ast.Attribute(value=inner, attr=name):
                annotation, where = self._type(module, inner, types)
                if (owner := self._class_of(where, annotation)) is not None:
                    for part in owner[1].body:
                        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id == name:
                            return part.annotation, owner[0].module
        return None, module

    def _function(self, module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, indent: str) -> list[str]:
        lines = [f"{indent}@{kept}" for decorator in node.decorator_list if (kept := _DECORATORS.get(_last(decorator)))]
        comment, returns = ("", "None") if node.name == "__init__" else self._value(module, node.returns, node.name)
        # an asynchronous generator is not awaited
        yields = any(isinstance(part, ast.Yield) for part in ast.walk(node))
        word = "async def" if isinstance(node, ast.AsyncFunctionDef) and not yields else "def"
        return [*lines, f"{indent}{word} {node.name}({self._arguments(module, node.args)}) -> {returns}: ...{comment}"]

    def _arguments(self, module: str, given: ast.arguments) -> str:
        def one(arg: ast.arg, optional: bool) -> str:
            if arg.arg in ("self", "cls"):
                return arg.arg
            return f"{arg.arg}: {self._annotation(module, arg.annotation, [])}{' = ...' if optional else ''}"

        positional = [*given.posonlyargs, *given.args]
        first = len(positional) - len(given.defaults)
        parts = [one(arg, index >= first) for index, arg in enumerate(positional)]
        if given.posonlyargs:
            parts.insert(len(given.posonlyargs), "/")
        if given.vararg or given.kwonlyargs:
            parts.append("*" + (one(given.vararg, False) if given.vararg else ""))
        parts += [one(arg, default is not None) for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        if given.kwarg:
            parts.append("**" + one(given.kwarg, False))
        return ", ".join(parts)

    def _variable(self, module: str, name: str, annotation: ast.AST | None, indent: str) -> str:
        comment, text = self._value(module, annotation, name)
        return f"{indent}{name}: {text}{comment}"

    def _value(self, module: str, annotation: ast.AST | None, name: str) -> tuple[str, str]:
        """A comment on what was not followed, and the annotation of what a member gives."""
        left: list[str] = []
        text = self._annotation(module, annotation, None if name in self.attributes else left)
        return (f"{UNFOLLOWED}{', '.join(left)}" if left else ""), text

    def _annotation(self, module: str, node: ast.AST | None, left: list[str] | None) -> str:
        """An annotation in a stub's words.

        Args:
            module: where it is written.
            node: the annotation.
            left: takes the classes that are not followed; None follows them.
        """
        match node:
            case ast.Constant(value=None):
                return "None"
            case ast.Constant(value=str(text)):
                return self._annotation(module, ast.parse(text, mode="eval").body, left)
            case ast.Constant(value=value) if value is ...:
                return "..."
            case ast.Name(id=name):
                if name in _PLAIN:
                    return name
                if (found := self._class_of(module, node)) is None:
                    return "Any"
                if left is not None:
                    left.append(found[0].path)
                    return "Any"
                self.add(found[0])
                return found[0].path
            case ast.BinOp(left=one, op=ast.BitOr(), right=other):
                return f"{self._annotation(module, one, left)} | {self._annotation(module, other, left)}"
            case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, *_])):
                return self._annotation(module, inner, left)
            case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _GENERIC:
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                return f"{name}[{', '.join(self._annotation(module, part, left) for part in parts)}]"
        return "Any"


def _last(node: ast.expr) -> str:
    """The last word of a dotted name, called or not."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements, also those that only type checkers see."""
    found = []
    for node in body:
        match node:
            case ast.If():
                found += _statements(node.body) + _statements(node.orelse)
            case ast.Try():
                found += _statements(node.body)
            case _:
                found.append(node)
    return found


def _default(value: ast.expr | None) -> str:
    """A field's default; what a constructor does not take stays so."""
    if value is None:
        return ""
    inner = isinstance(value, ast.Call) and any(k.arg == "init" and ast.unparse(k.value) == "False" for k in value.keywords)
    return " = field(init=False)" if inner else " = ..."
