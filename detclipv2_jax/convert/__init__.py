"""Public checkpoints made into the files of `config.init_from`, and back; `python -m detclipv2_jax.convert --help`."""

from __future__ import annotations

import collections
import re
from pathlib import Path

from safetensors.numpy import save_file

from detclipv2_jax import atomic, files
from detclipv2_jax.convert import layouts
from detclipv2_jax.convert.reading import read
from detclipv2_jax.runs.pretrained import FRESH, KEYS, ROOTS

PARTS = tuple(layouts.LAYOUTS)


def run(part: str, *, input: str, output: str, layout: str = "") -> str:
    """Converts the checkpoint of a tower, or back; returns what was done, in lines for the user.

    Args:
      input: a public checkpoint; with --layout, a file with our names
      output: .safetensors file to write
      layout: for the way back: microsoft, timm, torchvision, transformers, …; else it is recognised

    Raises:
      ValueError: wrong arguments, or a source that is not one whole tower of a known layout.
    """
    if part not in PARTS:
        raise ValueError(f"PART is {part!r}; allowed are {', '.join(PARTS)}")
    source, target = Path(input), Path(output)
    if not source.is_file():
        raise ValueError(f"--input={source} is no file")
    if target.suffix != ".safetensors":
        raise ValueError(f"--output={output}: only .safetensors files are written, with that ending")
    weights = read(source)
    ours = any(name.startswith(f"{ROOTS[part]}/") for name in weights)
    if ours != bool(layout):
        known = ", ".join(layouts.LAYOUTS[part])
        raise ValueError(
            f"{source} has our names already; --layout writes it for another library: {known}"
            if ours
            else f"--layout={layout} is for the way back, but {source} has no parameter named {ROOTS[part]}/…"
        )
    if ours:
        found = layouts.to_checkpoint(part, weights, layout=layout, what=str(source))
    else:
        found = layouts.from_checkpoint(part, weights, what=str(source))
    metadata = {"layout": found.layout, "source": source.name, "source_sha256": files.sha256(source)}
    metadata |= {"source_bytes": str(source.stat().st_size), "format": "pt" if ours else "detclipv2_jax"}
    with atomic.whole(target) as partial:
        save_file(found.params, partial, metadata=metadata)
    return _report(part, found, target, back=ours)


def _report(part: str, found: layouts.Found, output: Path, *, back: bool) -> str:
    count = sum(value.size for value in found.params.values())
    lines = [f"{part} in the layout {found.layout}: {len(found.params)} arrays, {count:,} numbers, {output}"]
    if found.left_out:
        # numbers of stages and blocks say nothing here
        kinds = collections.Counter(re.sub(r"\d+", "*", name) for name in found.left_out)
        lines.append("left out: " + ", ".join(f"{kind} ({num})" for kind, num in kinds.items()))
    if not back:
        key = next(key for key, tower in KEYS.items() if tower == part)
        fresh = [name for name in FRESH if name.startswith(f"{ROOTS[part]}/")]
        lines += [f"not in such checkpoints, they start fresh: {', '.join(fresh)}"] if fresh else []
        lines.append(f'put in the config: config.init_from.{key} = "{output}"')
    return "\n".join(lines)
