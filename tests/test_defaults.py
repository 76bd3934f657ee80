"""Defaults are promises: keys of the configuration, what functions and classes assume, constants that have a name.

golden/defaults.txt holds them. REWRITE_GOLDEN=1 writes it anew after a deliberate change, whose diff says what changed.
"""

import dataclasses
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import types

import numpy as np

import detclipv2_jax
from detclipv2_jax import config as config_lib

ROOT = pathlib.Path(detclipv2_jax.__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "defaults.txt"
NEED_TENSORFLOW = {"detclipv2_jax.export.saved_model", "detclipv2_jax.prepare.record_builder"}
SIZES = ("nano", "swin_t", "swin_s", "swin_b", "swin_l")


def told(value):
    """Returns a value as text that is the same in every process."""
    if isinstance(value, pathlib.Path) and value.is_absolute():
        return f"Path({str(value.relative_to(ROOT))!r})"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.tolist()}"
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {told(one)}" for key, one in value.items()) + "}"
    if type(value) in (tuple, list):
        return "(" + ", ".join(map(told, value)) + ")"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(told, value))) + "}"
    return re.sub(r"<dataclasses\._HAS_DEFAULT_FACTORY_CLASS [^>]*>", "made", re.sub(r" at 0x\w+", "", repr(value)))


def defaults_of(thing):
    """Yields (parameter, default) of a function or class."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return
    for one in parameters:
        if one.default is not inspect.Parameter.empty and one.name not in ("parent", "name"):
            yield one.name, one.default


def lines_of_module(module):
    """Yields what a module promises."""
    for name, value in vars(module).items():
        if name.startswith("__"):
            continue
        if re.fullmatch(r"_?[A-Z][A-Z0-9_]+", name) and not isinstance(value, types.ModuleType):
            if is_value(value) and not imported(module, name):
                yield f"{name} = {told(value)}"
            elif isinstance(value, dict) and len(value) <= 60 and not imported(module, name):
                yield from (
                    f"{name}[{key!r}] = {told(row)}"
                    for key, row in value.items()
                    if isinstance(row, tuple) and is_value(row)
                )
        elif getattr(value, "__module__", "") == module.__name__ and not name.startswith("_"):
            owners = {name: value}
            if inspect.isclass(value):
                methods = {key: one for key, one in vars(value).items() if not key.startswith("_")}
                owners |= {f"{name}.{key}": getattr(one, "__func__", one) for key, one in methods.items()}
            for owner, one in owners.items():
                if callable(one) and not isinstance(one, dataclasses.Field):
                    yield from (f"{owner}({key}={told(default)})" for key, default in defaults_of(one))


def is_value(value):
    """Returns whether a constant is numbers, or a small table of numbers and texts."""
    leaves = list(leaves_of(value))
    numbers = [leaf for leaf in leaves if isinstance(leaf, int | float)]
    return numbers and all(isinstance(leaf, int | float | str) for leaf in leaves) and len(told(value)) < 200


def leaves_of(value):
    """Yields what containers hold."""
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple | list | set | frozenset):
        for one in value:
            yield from leaves_of(one)
    else:
        yield value


def imported(module, name):
    return not re.search(rf"^(?:.*, )?{name}\b.*=", inspect.getsource(module), re.MULTILINE)


def test_defaults_are_those_that_were_promised():
    found = [f"config.{key} = {value!r}" for key, value in sorted(config_lib.flat(config_lib.base()).items())]
    for size in SIZES:
        found += [
            f"model({size!r}).{key} = {value!r}"
            for key, value in sorted(config_lib.flat(config_lib.model(size)).items())
        ]
    for info in pkgutil.walk_packages(detclipv2_jax.__path__, "detclipv2_jax."):
        if info.name not in NEED_TENSORFLOW:
            module = importlib.import_module(info.name)
            found += [
                f"{info.name.removeprefix('detclipv2_jax.')}: {line}" for line in sorted(set(lines_of_module(module)))
            ]
    if os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.write_text("\n".join(found) + "\n")
    promised = GOLDEN.read_text().splitlines()
    assert not (changed := sorted(set(promised) - set(found))), changed
    assert len(new := sorted(set(found) - set(promised))) < 0.02 * len(found), (
        new
    )  # what is new is written now and then
