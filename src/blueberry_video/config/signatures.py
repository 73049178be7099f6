"""What a constructor takes, read from its source file: checking a config imports neither torch nor lightning.

``_target_: lightning.Trainer`` is followed through re-exports (``lightning/__init__.py``, …, ``trainer/trainer.py``)
with ``ast`` alone, in milliseconds instead of the seconds that the import takes. A name that no source file shows (a
function written in C, a lazily loaded package) is imported and inspected instead.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

OWN_PACKAGE = __name__.partition(".")[0]
UNKNOWN: Any = object()  # a default that is not a literal

_NO_CONSTRUCTOR = {"object", "ABC", "Protocol", "Generic"}
_SCALARS = {"int", "float", "bool", "str"}
_CONTAINERS = {
    **dict.fromkeys(("list", "List", "tuple", "Tuple", "Sequence", "Iterable", "set"), "list"),
    **dict.fromkeys(("dict", "Dict", "Mapping", "MutableMapping"), "dict"),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        required: it has no default.
        default: its default, ``UNKNOWN`` where that is not a literal.
        kinds: the kinds of YAML value it takes (``int``, ``list``, ``None``, …); None where its annotation says more.
        choices: the values of a ``Literal``.
    """

    required: bool
    default: Any = UNKNOWN
    kinds: frozenset[str] | None = None
    choices: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a class or function takes.

    Attributes:
        home: the module that defines it.
        parameters: by name.
        open: whether it takes ``**kwargs``.
        positional: the names that ``_args_`` fills, in order.
        is_method: whether it is a function inside a class.
    """

    home: str
    parameters: dict[str, Parameter]
    open: bool = False
    positional: tuple[str, ...] = ()
    is_method: bool = False


@dataclasses.dataclass(frozen=True)
class _Definition:
    """A name found in a source file; ``node`` is None for a module."""

    module: str
    node: ast.ClassDef | ast.FunctionDef | None


@lru_cache(maxsize=512)
def signature(target: str) -> Signature:
    """Signature of the dotted name ``target``.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such name.
        TypeError: it is not callable.
    """
    found = _resolve(target)
    if found is not None and found.node is not None:
        static = _of_definition(found, bound=True)
        if static is not None:
            owner = _resolve(target.rpartition(".")[0])
            in_class = owner is not None and isinstance(owner.node, ast.ClassDef)
            return dataclasses.replace(static, is_method=in_class and isinstance(found.node, ast.FunctionDef))
    if found is not None and found.node is None:
        raise TypeError(f"{target} is a module, not a class or a function")
    if found is None and target.startswith(f"{OWN_PACKAGE}."):  # nothing of ours is hidden from its sources
        raise AttributeError(f"there is no {target}")
    return _of_object(_import(target))


def names(target: str) -> list[str]:
    """Dotted names like ``target`` with the first part that is wrong replaced by each of those that exist there."""
    parts = target.split(".")
    known = 1
    while known < len(parts) and _file(".".join(parts[: known + 1])):
        known += 1
    module = ".".join(parts[:known])
    file = _file(module)
    if file is None:
        return []
    here = {name for name in _bindings(file) if not name.startswith(("_", "*"))}
    if file.name == "__init__.py":
        here |= {path.stem for path in file.parent.iterdir() if _file(f"{module}.{path.stem}")} - {"__init__"}
    return [".".join([module, name, *parts[known + 1 :]]) for name in here]


# ---- from a dotted name to a definition ------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _file(module: str) -> Path | None:
    """Source file of a module. The import system is asked for the top-level package only: more would import it."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # `__main__` has no spec
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for root in spec.submodule_search_locations or ():
        base = Path(root, *rest)
        for file in (base / "__init__.py", base.with_name(base.name + ".py")):
            if file.is_file():
                return file
    return None


@lru_cache(maxsize=512)
def _bindings(file: Path) -> dict[str, tuple[ast.stmt, str]]:
    """Top-level name → (statement that binds it, name at its origin); star imports under ``*0``, ``*1``, …"""
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

    visit(ast.parse(file.read_bytes()).body)
    return bound


def _resolve(target: str) -> _Definition | None:
    """Definition of a dotted name, or None where the sources do not show it."""
    found: _Definition | None = None
    for part in target.split("."):
        found = _member(found, part) if found else _Definition(part, None)
        if found is None:
            return None
    return found


def _member(owner: _Definition, name: str, depth: int = 0) -> _Definition | None:
    """What ``owner.name`` is. ``depth`` stops circular re-exports."""
    if depth > 20:
        return None
    if isinstance(owner.node, ast.ClassDef):
        for node in owner.node.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return _Definition(owner.module, node)
        inherited = (_member(base, name, depth + 1) for base in _bases(owner) if base)
        return next((found for found in inherited if found), None)
    if owner.node is not None:
        return None
    file = _file(owner.module)
    bound = _bindings(file) if file else {}
    if name in bound and not _imports_itself(owner.module, *bound[name]):
        return _follow(owner.module, *bound[name], depth + 1)
    if _file(f"{owner.module}.{name}") or (file is None and _is_folder(f"{owner.module}.{name}")):
        return _Definition(f"{owner.module}.{name}", None)
    for key, (node, _) in bound.items():
        if key.startswith("*") and isinstance(node, ast.ImportFrom):
            found = _member(_Definition(_absolute(owner.module, node), None), name, depth + 1)
            if found:
                return found
    return None


def _follow(module: str, node: ast.stmt, name: str, depth: int) -> _Definition | None:
    """Where a binding leads: itself, what it imports, or the name it is an alias of."""
    match node:
        case ast.ClassDef() | ast.FunctionDef():
            return _Definition(module, node)
        case ast.Import():
            return _Definition(name, None)
        case ast.ImportFrom():
            return _member(_Definition(_absolute(module, node), None), name, depth)
        case ast.Assign(value=ast.Name(id=other)) if other != name:
            return _member(_Definition(module, None), other, depth)
    return None


def _imports_itself(module: str, node: ast.stmt, name: str) -> bool:
    """``from . import name`` in a package: the submodule of that name."""
    return isinstance(node, ast.ImportFrom) and _absolute(module, node) == module and bool(_file(f"{module}.{name}"))


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that ``from … import`` names, seen from ``module``."""
    if not node.level:
        return node.module or ""
    file = _file(module)
    up = node.level - (1 if file and file.name == "__init__.py" else 0)
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def _is_folder(module: str) -> bool:
    """A namespace package: a folder of modules without ``__init__.py``, such as ``experiments/``."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    roots = spec.submodule_search_locations if spec else None
    return any(Path(root, *rest).is_dir() for root in roots or ())


def _bases(owner: _Definition) -> list[_Definition | None]:
    """Base classes; None stands for one that the sources do not show."""
    assert isinstance(owner.node, ast.ClassDef)
    found: list[_Definition | None] = []
    for base in owner.node.bases:
        chain = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).split(".")
        here: _Definition | None = _Definition(owner.module, None)
        for part in chain:
            here = _member(here, part) if here else None
        if chain[-1] not in _NO_CONSTRUCTOR:
            found.append(here)
    return found


# ---- from a definition to a signature --------------------------------------------------------------------------------


def _of_definition(found: _Definition, bound: bool) -> Signature | None:
    """Signature of a class or function; None where a base hides it. ``bound``: ``self`` and ``cls`` do not count."""
    if isinstance(found.node, ast.FunctionDef):
        method = bound and found.node.args.args[:1] and found.node.args.args[0].arg in ("self", "cls")
        return _of_arguments(found.module, found.node.args, skip=1 if method else 0)
    assert isinstance(found.node, ast.ClassDef)
    if any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list):
        return _of_dataclass(found)
    for node in found.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return _of_arguments(found.module, node.args, skip=1)
    for base in _bases(found):
        inherited = _of_definition(base, bound) if base and base.node else None
        if inherited is None:
            return None
        if inherited.parameters or inherited.open:
            return dataclasses.replace(inherited, home=found.module)
    return Signature(found.module, {})


def _of_arguments(module: str, arguments: ast.arguments, skip: int) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*([None] * (len(positional) - len(arguments.defaults))), *arguments.defaults]
    pairs = [*zip(positional, defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)][skip:]
    parameters = {argument.arg: _parameter(argument.annotation, default) for argument, default in pairs}
    return Signature(module, parameters, arguments.kwarg is not None, tuple(a.arg for a in positional[skip:]))


def _of_dataclass(found: _Definition) -> Signature:
    assert isinstance(found.node, ast.ClassDef)
    parameters: dict[str, Parameter] = {}
    for base in _bases(found):
        inherited = _of_definition(base, bound=True) if base and base.node else None
        parameters.update(inherited.parameters if inherited else {})
    for node in found.node.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parameters[node.target.id] = _parameter(node.annotation, node.value)
    return Signature(found.module, parameters, positional=tuple(parameters))


def _parameter(annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    if default is None:
        value = UNKNOWN
    else:
        try:
            value = ast.literal_eval(default)
        except ValueError:  # an expression, such as `nn.GELU`
            value = UNKNOWN
    choices: list[Any] = []
    kinds = _kinds(annotation, choices)
    if kinds is not None and default is not None and value is None:
        kinds = kinds | {"None"}
    return Parameter(default is None, value, kinds, tuple(choices))


def _kinds(annotation: ast.expr | None, choices: list[Any]) -> frozenset[str] | None:
    """Kinds of YAML value an annotation takes, None where it says more; values of a ``Literal`` go to ``choices``."""
    parts: list[ast.expr] = []
    match annotation:
        case ast.Constant(value=None):
            return frozenset({"None"})
        case ast.Constant(value=str() as text):
            return _kinds(ast.parse(text, mode="eval").body, choices)
        case ast.Name(id="Tensor"):  # no YAML value is one: `float | Tensor` takes a float
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


# ---- what the sources do not show ------------------------------------------------------------------------------------


def _import(target: str) -> Any:
    """The object itself, imported.

    Raises:
        ImportError: no such module. AttributeError: no such name in it.
    """
    parts = target.split(".")
    found = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 1):
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                importlib.import_module(".".join(parts[: index + 1]))
            except ModuleNotFoundError as error:
                raise AttributeError(f"{'.'.join(parts[:index])} has no name {part}") from error
        found = getattr(found, part)
    return found


def _of_object(target: Any) -> Signature:
    """Signature of an imported object; open where Python cannot tell (a C function).

    Raises:
        TypeError: it is not callable.
    """
    home = getattr(target, "__module__", None) or type(target).__module__
    in_class = "." in getattr(target, "__qualname__", "").rpartition("<locals>.")[2]
    is_method = in_class and not inspect.isclass(target)
    if not callable(target):
        raise TypeError(f"{target!r} is not callable")
    try:
        found = inspect.signature(target).parameters
    except ValueError:
        return Signature(home, {}, open=True, is_method=is_method)
    takes = {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    parameters = {name: Parameter(p.default is p.empty) for name, p in takes.items()}
    positional = tuple(name for name, p in takes.items() if p.kind is not p.KEYWORD_ONLY)
    is_open = any(p.kind is p.VAR_KEYWORD for p in found.values())
    return Signature(home, parameters, is_open, positional, is_method)
