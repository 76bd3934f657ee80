"""What the data of a run are, in hashes: annotation files, dictionaries, and the indices of built folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from detclipv2_jax import buckets
from detclipv2_jax.data.built import INDEX, REPORT, VOCABULARY
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.files import read_json, sha256

_OF_A_FOLDER = (INDEX, VOCABULARY, "dataset_info.json")  # sizes and concepts, names, shards
_BUILT_OF = ", files it was built of,"
_EVALUATIONS = ("eval", "forgetting")


def of_run(config: Any) -> dict[str, str]:
    """Returns the SHA-256 of each file that says what a configuration is trained and evaluated on, by its key.

    The key of a file of an evaluation holds its path, too: a run may go on with another evaluation. Photos are not
    read: an exchanged one shows only where the annotation gives its size.
    """
    found: dict[str, str] = {}
    for kind in Kind:
        section = config[kind.value]
        key = "pairs" if kind is Kind.IMAGE_TEXT else "annotations"
        paths = {name: Path(section[name]) for name in (key, "dictionary") if section[name]}
        folders = (section.data,) if isinstance(section.data, str) else section.data
        paths |= {f"data[{i}] {name}": Path(folder) / name for i, folder in enumerate(folders) for name in _OF_A_FOLDER}
        found |= {f"config.{kind.value}.{name}": sha256(path) for name, path in paths.items() if path.is_file()}
        reports = [Path(folder, REPORT) for folder in folders]
        found |= {
            f"config.{kind.value}.data[{i}]{_BUILT_OF}": _built_of(path)
            for i, path in enumerate(reports)
            if path.is_file()
        }
    for section in _EVALUATIONS:
        given = {key: Path(config[section][key]) for key in ("annotations", "dictionary") if config[section][key]}
        found |= {
            f"config.{section}.{key} {buckets.name_of(path)}": sha256(path)
            for key, path in given.items()
            if path.is_file()
        }
    return found


def _built_of(report: Path) -> str:
    """Returns a digest of the contents of the files, wherever they were, that a folder was built of.

    Built again of others it may have the same index: records are not in it.
    """
    content = read_json(report)
    inputs = content.get("inputs") if isinstance(content, dict) else None
    facts = [inputs[name] for name in sorted(inputs)] if isinstance(inputs, dict) else inputs
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns what is different, one line each."""
    leads = tuple(f"config.{section}." for section in _EVALUATIONS)
    different = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        # what those evaluations are that a run began with is no matter, nor what older programs did not note
        and ((name in before and name in now) or not (name.startswith(leads) or name.endswith(_BUILT_OF)))
    ]
    return [
        f"{name} " + ("is gone" if name not in now else "is new" if name not in before else "changed")
        for name in different
    ]
