"""What the data of a run are, in hashes: annotation files, dictionaries, and the indices of built folders."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from detclipv2_jax.data.built import INDEX, VOCABULARY
from detclipv2_jax.data.schema import Kind

_OF_A_FOLDER = (INDEX, VOCABULARY, "dataset_info.json")  # sizes and concepts, names, shards


def of_training(config: Any) -> dict[str, str]:
    """Returns the SHA-256 of each file that says what a configuration is trained on, by its key and place there.

    Photos are not read: an exchanged one shows only where the annotation gives its size.
    """
    found: dict[str, str] = {}
    for kind in Kind:
        section = config[kind.value]
        key = "pairs" if kind is Kind.IMAGE_TEXT else "annotations"
        paths = {name: Path(section[name]) for name in (key, "dictionary") if section[name]}
        folders = (section.data,) if isinstance(section.data, str) else section.data
        paths |= {f"data[{i}] {name}": Path(folder) / name for i, folder in enumerate(folders) for name in _OF_A_FOLDER}
        found |= {f"config.{kind.value}.{name}": _sha256(path) for name, path in paths.items() if path.is_file()}
    return found


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns what is different, one line each."""
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [
        f"{name} " + ("is gone" if name not in now else "is new" if name not in before else "changed")
        for name in different
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
