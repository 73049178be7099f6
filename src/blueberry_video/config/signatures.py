"""Signatures of classes and functions, read from their source files with ``ast``.

Checking a config therefore imports neither torch nor lightning, which takes seconds. ``lightning.Trainer`` is followed
through its re-exports (``lightning/__init__.py``, …, ``trainer/trainer.py``) in milliseconds. A name that no source
file shows (a C function, a lazily loaded package) is imported and inspected.
"""

import ast
import dataclasses
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cached_property, lru_cache
from inspect import Parameter
from pathlib import Path
from typing import Any

UNKNOWN: Any = object()
"""Default that is not a literal, e.g. ``nn.GELU``."""

_PACKAGE = __name__.partition(".")[0]
_NO_CONSTRUCTOR = {"object", "ABC", "Protocol", "Generic"}
_SCALARS = {"int", "float", "bool", "str"}
_CONTAINERS = {
    **dict.fromkeys(("list", "List", "tuple", "Tuple", "Sequence", "Iterable", "set"), "list"),
    **dict.fromkeys(("dict", "Dict", "Mapping", "MutableMapping"), "dict"),
}

_TEXT_TYPES = {"Path", "PathLike", "Literal", "Backend", "Optional", "Union", "Tensor"}


@dataclasses.dataclass(frozen=True)
class Signature:
    """Signature of a class or function, without ``self``.

    Attributes:
        home: the module that defines it.
        arguments: all parameters. An annotation read from a source file is an ``ast.expr`` or None.
        is_method: True for a function defined in a class.
        is_class: True for a class.
        parameters: the named parameters by name.
        open: True if it takes ``**kwargs``.
    """

    home: str
    arguments: tuple[Parameter, ...] = ()
    is_method: bool = False
    is_class: bool = False

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        return {p.name: p for p in self.arguments if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}

    @cached_property
    def open(self) -> bool:
        return any(p.kind is Parameter.VAR_KEYWORD for p in self.arguments)


@dataclasses.dataclass(frozen=True)
class _Definition:
    """Definition found in a source file; ``node`` is None for a module."""

    module: str
    node: ast.ClassDef | ast.FunctionDef | None = None


@lru_cache(maxsize=512)
def signature(target: str) -> Signature:
    """Returns the signature of the dotted name ``target``.

    Raises:
        ImportError: the module does not exist.
        AttributeError: the module does not define the name.
        TypeError: the object is not callable.
    """
    found = _resolve(target)
    if found is None:
        if target.startswith(f"{_PACKAGE}."):  # the sources of this package define every name
            raise AttributeError(f"there is no {target}")
        return _of_object(pkgutil.resolve_name(target))
    if found.node is None:
        raise TypeError(f"{target} is a module, not a class or a function")
    read = _of_definition(found) or _of_object(pkgutil.resolve_name(target))
    owner = _resolve(target.rpartition(".")[0])
    in_class = owner is not None and isinstance(owner.node, ast.ClassDef)
    is_class = isinstance(found.node, ast.ClassDef)
    return dataclasses.replace(read, is_method=in_class and not is_class, is_class=is_class)


def names(target: str) -> list[str]:
    """Returns existing alternatives to ``target``: its first invalid part is replaced by each name defined there."""
    parts = target.split(".")
    known = 1
    while known < len(parts) and _file(".".join(parts[: known + 1])):
        known += 1
    module = ".".join(parts[:known])
    file = _file(module)
    if file is None:
        return []
    here = {name for name in _bindings(file) if not name.startswith(("_", "*"))}
    if file.is_dir() or file.name == "__init__.py":
        folder = file if file.is_dir() else file.parent
        here |= {path.stem for path in folder.glob("[!_]*") if _file(f"{module}.{path.stem}")}
    return [".".join([module, name, *parts[known + 1 :]]) for name in here]


# ---- from a dotted name to a definition ------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _file(module: str) -> Path | None:
    """Source file of a module, or folder of a namespace package such as ``experiments``.

    ``find_spec`` gets the top-level package only, because it imports the parents of any other module.
    """
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # `__main__` has no spec
        return None
    if spec is None or (spec.origin and not spec.origin.endswith(".py")):
        return None
    if not rest and spec.origin:
        return Path(spec.origin)
    for root in spec.submodule_search_locations or ():
        base = Path(root, *rest)
        for file in (base / "__init__.py", base.with_name(f"{base.name}.py"), base):
            if file.is_file() or (file is base and file.is_dir()):
                return file
    return None


@lru_cache(maxsize=512)
def _bindings(file: Path) -> dict[str, tuple[ast.stmt, str]]:
    """Top-level name → (statement that binds it, name at its origin). Star imports have the keys ``*0``, ``*1``, …"""
    bound: dict[str, tuple[ast.stmt, str]] = {}

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.ClassDef() | ast.FunctionDef():
                    bound[node.name] = (node, node.name)
                case ast.Import() | ast.ImportFrom():
                    for alias in node.names:
                        name = f"*{len(bound)}" if alias.name == "*" else alias.asname or alias.name.partition(".")[0]
                        bound[name] = (node, alias.name if alias.asname or isinstance(node, ast.ImportFrom) else name)
                case ast.Assign(targets=[ast.Name(id=name)]):
                    bound[name] = (node, name)
                case ast.If() | ast.Try():
                    visit(node.body)
                    visit(node.orelse)
                    for handler in getattr(node, "handlers", ()):
                        visit(handler.body)

    if file.is_file():
        visit(ast.parse(file.read_bytes()).body)
    return bound


def _resolve(target: str) -> _Definition | None:
    """Definition of a dotted name, or None if the sources do not show it."""
    top, *rest = target.split(".")
    return _path(_Definition(top), rest)


def _path(owner: _Definition, parts: list[str]) -> _Definition | None:
    found: _Definition | None = owner
    for part in parts:
        found = _member(found, part) if found else None
    return found


def _member(owner: _Definition, name: str, depth: int = 0) -> _Definition | None:
    """Definition of ``owner.name``. ``depth`` ends circular re-exports."""
    if depth > 20 or isinstance(owner.node, ast.FunctionDef):
        return None
    if isinstance(owner.node, ast.ClassDef):
        for node in owner.node.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return _Definition(owner.module, node)
        inherited = (_member(base, name, depth + 1) for base in _bases(owner) if base)
        return next((found for found in inherited if found), None)
    file, submodule = _file(owner.module), f"{owner.module}.{name}"
    bound = _bindings(file) if file else {}
    node, origin = bound.get(name, (None, name))  # type: ignore[assignment]
    source = _Definition(_absolute(owner.module, node)) if isinstance(node, ast.ImportFrom) else owner
    imports_submodule = isinstance(node, ast.ImportFrom) and source == owner and _file(submodule)  # from . import name
    match None if imports_submodule else node:
        case ast.ClassDef() | ast.FunctionDef() as definition:
            return _Definition(owner.module, definition)
        case ast.Import():
            return _Definition(origin)
        case ast.ImportFrom():
            return _member(source, origin, depth + 1)
        case ast.Assign(value=ast.Name(id=alias)) if alias != name:
            return _member(owner, alias, depth + 1)
        case ast.Assign():
            return None
    if _file(submodule):
        return _Definition(submodule)
    stars = (node for key, (node, _) in bound.items() if key.startswith("*") and isinstance(node, ast.ImportFrom))
    starred = (_member(_Definition(_absolute(owner.module, node)), name, depth + 1) for node in stars)
    return next((found for found in starred if found), None)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """Absolute name of the module in ``from … import`` within ``module``."""
    if not node.level:
        return node.module or ""
    file = _file(module)
    up = node.level - (1 if file and file.name == "__init__.py" else 0)
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def _bases(owner: _Definition) -> Iterator[_Definition | None]:
    """Base classes; None for one that the sources do not show."""
    assert isinstance(owner.node, ast.ClassDef)
    for base in owner.node.bases:
        parts = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).split(".")
        if parts[-1] not in _NO_CONSTRUCTOR:
            yield _path(_Definition(owner.module), parts)


# ---- from a definition to a signature --------------------------------------------------------------------------------


def _of_definition(found: _Definition) -> Signature | None:
    """Signature of a class or function; None if the sources do not show a base class."""
    if isinstance(found.node, ast.FunctionDef):
        return Signature(found.module, _arguments(found.node.args))
    assert isinstance(found.node, ast.ClassDef)
    bases = (_of_definition(base) if base and base.node else None for base in _bases(found))
    if any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list):
        fields = {name: parameter for base in bases if base for name, parameter in base.parameters.items()}
        for node in found.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = _parameter(node.target.id, node.annotation, node.value)
        return Signature(found.module, tuple(fields.values()))
    for node in found.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return Signature(found.module, _arguments(node.args))
    for inherited in bases:
        if inherited is None:
            return None
        if inherited.arguments:
            return dataclasses.replace(inherited, home=found.module)
    return Signature(found.module)


def _arguments(arguments: ast.arguments) -> tuple[Parameter, ...]:
    """Parameters of a function, without a leading ``self`` or ``cls``."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*([None] * (len(positional) - len(arguments.defaults))), *arguments.defaults]
    found = [_parameter(a.arg, a.annotation, default) for a, default in zip(positional, defaults)]
    if found and found[0].name in ("self", "cls"):
        del found[0]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        found.append(_parameter(argument.arg, argument.annotation, default, Parameter.KEYWORD_ONLY))
    if arguments.kwarg is not None:
        found.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return tuple(found)


def _parameter(
    name: str, annotation: ast.expr | None, default: ast.expr | None, kind: Any = Parameter.POSITIONAL_OR_KEYWORD
) -> Parameter:
    try:
        value = Parameter.empty if default is None else ast.literal_eval(default)
    except ValueError:
        value = UNKNOWN
    return Parameter(name, kind, default=value, annotation=annotation)


def _of_object(target: Any) -> Signature:
    """Signature of an imported object; open if ``inspect`` cannot read it (a C function).

    Raises:
        TypeError: the object is not callable.
    """
    if not callable(target):
        raise TypeError(f"{target!r} is not callable")
    try:
        arguments = tuple(inspect.signature(target).parameters.values())
    except ValueError:
        arguments = (Parameter("kwargs", Parameter.VAR_KEYWORD),)
    in_class = "." in getattr(target, "__qualname__", "").rpartition("<locals>.")[2]
    home = getattr(target, "__module__", None) or type(target).__module__
    is_class = inspect.isclass(target)
    return Signature(home, arguments, in_class and not is_class, is_class)


# ---- YAML values that an annotation accepts --------------------------------------------------------------------------


def accepted(parameter: Parameter) -> tuple[frozenset[str] | None, tuple[Any, ...]]:
    """Returns the kinds of YAML value (``int``, ``list``, ``None``, …) and the ``Literal`` values of a parameter.

    The kinds are None if the annotation is missing or more complex.
    """
    choices: list[Any] = []
    kinds = _kinds(parameter.annotation, choices)
    if kinds is not None and parameter.default is None:
        kinds |= {"None"}
    return kinds, tuple(choices)


def takes_object(parameter: Parameter) -> bool:
    """Returns whether a parameter takes an instance of a class or a function, or None, and no number or text."""
    annotation = parameter.annotation
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    names = []
    for part in _union(annotation):
        match part:
            case ast.Constant(value=None):
                continue
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(value=ast.Name(id=name)):
                names.append(name)
            case _:
                return False
    return bool(names) and all(name[0].isupper() and name not in _TEXT_TYPES and name != "Any" for name in names)


def _union(annotation: Any) -> list[Any]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [*_union(annotation.left), *_union(annotation.right)]
    return [annotation]


def _kinds(annotation: Any, choices: list[Any]) -> frozenset[str] | None:
    """Kinds that an annotation accepts; appends the values of a ``Literal`` to ``choices``."""
    parts: list[ast.expr] = []
    match annotation:
        case ast.Constant(value=None):
            return frozenset({"None"})
        case ast.Constant(value=str() as text):
            return _kinds(ast.parse(text, mode="eval").body, choices)
        case ast.Name(id="Tensor"):  # no YAML value is a tensor: `float | Tensor` accepts a float
            return frozenset()
        case ast.Name(id=name) if name in _SCALARS:
            return frozenset({name})
        case ast.Name(id=name) | ast.Subscript(value=ast.Name(id=name)) if name in _CONTAINERS:
            return frozenset({_CONTAINERS[name]})
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            parts = [left, right]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            parts = [inner, ast.Constant(None)]
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=inner)):
            parts = inner
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            choices.extend(ast.literal_eval(value) for value in values)
            return frozenset()
        case _:
            return None
    kinds = [_kinds(part, choices) for part in parts]
    return None if any(kind is None for kind in kinds) else frozenset().union(*(kind or () for kind in kinds))
