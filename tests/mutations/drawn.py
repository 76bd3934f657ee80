"""Faults that nobody chose: places of the package drawn at random, each changed in one small way."""

from __future__ import annotations

import ast
import functools
import pathlib
import random
from collections.abc import Iterator

from tests.mutations.fault import Fault
from tests.mutations.listed import FAULTS

_COMPARED = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}  # fmt: skip
_COMPUTED = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum",
          "floor": "ceil", "ceil": "floor", "argmax": "argmin", "zeros_like": "ones_like"}  # fmt: skip
_EITHER_WAY = {
    *_NAMES, "isinstance", "gcd", "lcm", "hypot", "fmin", "fmax", "equal", "not_equal", "array_equal", "logical_and",
    "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "logaddexp", "union1d", "intersect1d",
    "swapaxes", "iou",
}  # fmt: skip  # functions of two arguments in any order, and isinstance, which refuses the other one
_SAID = {"info", "warning", "error", "print", "debug", "update", "set_description"}  # what people read


def draw(root: pathlib.Path, *, num: int, seed: int, only: str = "") -> list[Fault]:
    """Returns `num` faults of files in whose path `only` stands; every file is as likely as it is long."""
    rng, found = random.Random(seed), {}
    files = {path: path.read_text() for path in sorted((root / "detclipv2_jax").rglob("*.py"))}
    files = {path: text for path, text in files.items() if only in str(path.relative_to(root)) and tests_of(path, root)}
    weights = [text.count("\n") for text in files.values()]
    changes_of = functools.cache(lambda path: list(_changes(files[path])))
    while len(found) < num:
        path = rng.choices(list(files), weights)[0]
        if not changes_of(path):
            continue
        place = rng.choice(changes_of(path))
        fault = _fault(path.relative_to(root), files[path], *place, tests_of(path, root))
        if fault.mutated == fault.original:
            continue
        try:
            compile(files[path].replace(fault.original, fault.mutated), str(path), "exec")
        except SyntaxError:
            continue
        found[fault.name] = fault
    return list(found.values())


def tests_of(path: pathlib.Path, root: pathlib.Path) -> tuple[str, ...]:
    """Returns the files of tests that mirror a file of the package, and those that its listed faults name."""
    name = path.relative_to(root / "detclipv2_jax")
    mirror = name.with_name(f"test_{name.parent.name if name.stem == '__main__' else name.stem}.py")
    listed = [test.split("::")[0] for fault in FAULTS if fault.file == f"detclipv2_jax/{name}" for test in fault.tests]
    files = [f"tests/{mirror}", *sorted(set(listed), key=listed.count, reverse=True), "tests/test_defaults.py"]
    found = dict.fromkeys(file for file in files if (root / file).is_file())
    return tuple(found) if len(found) > 1 else ()


def _changes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yields (start, end, replacement) of every change; messages, types and docstrings stay."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def source(node: ast.expr | ast.stmt) -> str:
        start, end = span(node)
        return text.encode()[start:end].decode()

    def between(left: ast.expr, right: ast.expr, change: tuple[str, str]) -> tuple[int, int, str]:
        start, end = span(left)[1], span(right)[0]
        return start, end, text.encode()[start:end].decode().replace(*change, 1)

    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        called = getattr(node, "func", None)
        if (
            isinstance(node, ast.Raise | ast.JoinedStr | ast.arg | ast.Import | ast.ImportFrom | ast.Assert)
            or (isinstance(node, ast.keyword) and node.arg in ("strict", "indent"))
            or (isinstance(node, ast.Call) and _name(called) in _SAID)
            or (isinstance(node, ast.If) and ast.unparse(node.test).startswith(("TYPE_CHECKING", "__name__ ==")))
        ):
            continue
        types = [
            getattr(node, "annotation", None),
            getattr(node, "returns", None),
            *getattr(node, "decorator_list", ()),
        ]
        waiting += [child for child in ast.iter_child_nodes(node) if child not in types]
        match node:
            case ast.Compare(left=left, ops=[operation], comparators=[right]):
                yield between(left, right, _COMPARED[type(operation)])
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _COMPUTED:
                if not isinstance(getattr(left, "value", None), str) and not isinstance(left, ast.JoinedStr):
                    yield between(left, right, _COMPUTED[type(operation)])
            case ast.BoolOp(op=operation, values=[left, right]):
                yield between(left, right, _COMPUTED[type(operation)])
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield (*span(node), f"({source(operand)})")
            case ast.Constant(value=bool(value)):
                yield (*span(node), str(not value))
            case ast.Constant(value=int(value)):
                yield (*span(node), str(value + 1))
            case ast.Constant(value=float(value)):
                yield (*span(node), repr(1.25 * value if value else 0.5))
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                yield (*span(test), f"(not ({source(test)}))")
            case ast.Call(func=called, args=[first, second]) if _name(called) not in _EITHER_WAY:
                yield span(first)[0], span(second)[1], f"{source(second)}, {source(first)}"
            case ast.Name(id=name) if name in _NAMES:
                yield (*span(node), _NAMES[name])
            case ast.Attribute(value=value, attr=name) if name in _NAMES:
                yield (*span(node), f"{source(value)}.{_NAMES[name]}")
            case ast.Expr(value=ast.Call(func=called)) if _name(called) not in _SAID:
                yield (*span(node), "pass")
            case ast.AugAssign() | ast.Continue() | ast.Break():
                yield (*span(node), "pass")


def _name(function: ast.expr | None) -> str:
    """Returns the last name of a function: "maximum" of `maximum` and of `jnp.maximum`; "" of what has none."""
    return getattr(function, "attr", getattr(function, "id", ""))


def _fault(file: pathlib.Path, text: str, start: int, end: int, new: str, tests: tuple[str, ...]) -> Fault:
    """Returns a fault whose original is as many whole lines as it takes to stand once in the file."""
    data = text.encode()
    first, last = data.rfind(b"\n", 0, start) + 1, data.find(b"\n", end)
    while data.count(data[first:last]) > 1:
        first, last = max(data.rfind(b"\n", 0, first - 1) + 1, 0), data.find(b"\n", last + 1) % (len(data) + 1)
    mutated = data[first:start] + new.encode() + data[end:last]
    return Fault(str(file), data[first:last].decode(), mutated.decode(), tests, False, "")
