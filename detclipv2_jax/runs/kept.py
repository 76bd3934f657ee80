"""What a process need not trace again: functions and parameter shapes that an earlier one kept.

JAX keeps compiled programs (`--compilation_cache`), but traces a function in Python to know which one is meant, which
takes longer than all the rest of a short command. So exports of traces stand beside the programs, each under a hash of
what it depends on: the package's sources, the versions of JAX and Flax, the model, and the arguments' shapes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from detclipv2_jax import atomic, files


def folder() -> pathlib.Path | None:
    """Returns where traces are kept; None without a compilation cache, without flatbuffers, and on accelerators.

    JAX writes exports with flatbuffers, which it does not bring. Kernels of accelerators have no form to export.
    """
    place = jax.config.values["jax_compilation_cache_dir"]
    if not place or jax.default_backend() != "cpu" or importlib.util.find_spec("flatbuffers") is None:
        return None
    return pathlib.Path(place) / "traced"


def jit(function: Callable, *, of: Any, result: type | None = None) -> Callable:
    """Returns `jax.jit(function)`, which traces only what no process has traced before.

    Args:
      function: of arrays and trees of them.
      of: what the function depends on beside its arguments; two with the same text are the same.
      result: class of what it returns, a Flax dataclass of arrays; None: an array.
    """
    plain, loaded = jax.jit(function), dict[str, Callable]()

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        if (place := folder()) is None or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return plain(*arguments)  # within another trace it is a part of that
        types = [(str(kind), kind.weak_type) for kind in map(jax.typeof, leaves)]
        name = _hash(function.__qualname__, str(of), str(tree), types)
        if name not in loaded:
            loaded[name] = jax.jit(_export(function, leaves, tree, path=place / f"{name}.bin").call)
        values = loaded[name](*leaves)
        return values[0] if result is None else result(*values)

    return call


def value(compute: Callable[[], Any], *, of: Any) -> Any:
    """Returns what `compute` makes, in the types of JSON, or what an earlier process kept of it.

    Args:
      compute: depends on `of` alone.
      of: two with the same text are the same.
    """
    if (place := folder()) is None:
        return compute()
    path = place / f"{_hash(str(of))}.json"
    with _again(path):
        return files.read_json(path)
    found = compute()
    with contextlib.suppress(OSError):
        files.write_json(path, found)
    return found


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr((_environment(), *parts)).encode()).hexdigest()[:40]


@functools.cache
def _environment() -> tuple[str, ...]:
    """Returns what every trace depends on."""
    sources = [files.sha256(path) for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    settings = [str(jax.config.values[name]) for name in ("jax_enable_x64", "jax_default_matmul_precision")]
    return (*sources, *versions, *settings)


def _export(function: Callable, leaves: Sequence[Any], tree: Any, *, path: pathlib.Path) -> Any:
    """Returns the function of leaves as an export, which the file holds or will hold."""
    with _again(path):
        return jax.export.deserialize(bytearray(path.read_bytes()))

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    exported = jax.export.export(jax.jit(flat))(*leaves)
    with contextlib.suppress(OSError), atomic.whole(path) as partial:  # a full disk costs time alone
        partial.write_bytes(exported.serialize())
    return exported


@contextlib.contextmanager
def _again(path: pathlib.Path) -> Iterator[None]:
    """Goes on behind its block where a kept file is missing, or damaged in whatever way."""
    try:
        yield
    except FileNotFoundError:
        pass
    except Exception as error:
        logging.info("%s is made again: %s", path, error)
