"""Configurations as JSON, which a run leaves in its workdir: also those of earlier versions, and of strangers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from detclipv2_jax.config import base, flat

# keys that configurations of earlier versions hold, and the only value that is still computed
RETIRED = {
    "order": "shuffled",
    "loss.alignment_weight": 1.0,
    "loss.contrastive_impl": "xla",
    "model.logit.learnable_scale": True,
    "mesh.cpu_devices": 0,
}


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=1) + "\n"


def from_json(text: str, *, where: str = "the configuration") -> ConfigDict:
    """Returns the locked configuration that `to_json` wrote, in this version or an earlier one.

    Raises:
      ValueError: the text, which may be a stranger's, is none, or asks for what this version does not compute any more.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(entry) for key, entry in value.items()}
        return tuple(tuples(entry) for entry in value) if isinstance(value, list) else value

    try:
        content = tuples(json.loads(text))
    except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise ValueError(f"{where} is no valid json: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be an object of sections and keys, not {str(content)[:80]}")
    if problems := list(_unlike(content, base())):
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} is none of a run: {'; '.join(problems[:5])}{more}")
    try:
        config = ConfigDict(content)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:  # keys that cannot be keys
        raise ValueError(f"{where} cannot be read: {error}") from None
    for key, value in RETIRED.items():
        section, last = _place(config, key)
        if section.get(last, value) != value:
            raise ValueError(f"config.{key} is {section[last]!r}; this version computes {value!r} only")
        if last in section:
            del section[last]
    for key, value in flat(base()).items():  # keys that are younger than the text have their defaults
        section, last = _place(config, key)
        if last not in section:
            section[last] = value
    return config.lock()


def _unlike(content: dict[str, Any], known: ConfigDict, prefix: str = "config") -> Iterator[str]:
    """Yields what is wrong with the types and sizes of stored values; keys that are missing or unknown are not."""
    sizes = prefix.startswith("config.model")
    for key, default in known.items():
        if key not in content:
            continue
        value, name = content[key], f"{prefix}.{key}"
        if isinstance(default, ConfigDict):
            if isinstance(value, dict):
                yield from _unlike(value, default, name)
                continue
            wanted, fits = "a section of keys", False
        elif isinstance(default, bool):
            wanted, fits = "true or false", isinstance(value, bool)
        elif isinstance(default, int):
            largest = 1 << 15 if sizes else 1 << 53
            wanted = f"a whole number{f' from 0 to {largest}' if sizes else ''}"
            fits = _is_number(value) and isinstance(value, int) and (0 if sizes else -largest) <= value <= largest
        elif isinstance(default, float):
            wanted, fits = "a finite number", _is_number(value)
        elif isinstance(default, str):
            wanted, fits = "a text", isinstance(value, str)
        elif key == "classes":
            wanted, fits = "a list of texts", isinstance(value, tuple) and all(isinstance(x, str) for x in value)
        elif sizes:  # depths, numbers of heads
            wanted = f"{len(default)} whole numbers from 1 to 128"
            fits = isinstance(value, tuple) and len(value) == len(default)
            fits = fits and all(_is_number(x) and isinstance(x, int) and 1 <= x <= 128 for x in value)
        elif key == "canvases":
            wanted = "(height, width) pairs of multiples of 32, up to 16384"
            fits = isinstance(value, tuple) and 0 < len(value) <= 64 and all(map(_is_canvas, value))
        else:
            wanted, fits = "a list", isinstance(value, tuple | str)  # data: one folder may be a text
        if not fits:
            shown = str(value)[:40] if not isinstance(value, str) else repr(value[:40])
            yield f"{name} is {shown}, not {wanted}"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e308  # neither NaN nor infinite; a whole number may be larger than any float


def _is_canvas(value: Any) -> bool:
    sides = value if isinstance(value, tuple) and len(value) == 2 else (0,)
    return all(isinstance(side, int) and side % 32 == 0 and 32 <= side <= 1 << 14 for side in sides)


def _place(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the section that a dotted key is in, made if need be, and its name there."""
    *path, last = key.split(".")
    for part in path:
        if part not in config:
            config[part] = ConfigDict()
        config = config[part]
        if not isinstance(config, ConfigDict):
            raise ValueError(f"config.{'.'.join(path)} is {config!r}, not a section of keys")
    return config, last


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns "key: old -> new" for every key in which two configurations differ."""
    a, b = flat(old), flat(new)
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
    ]
