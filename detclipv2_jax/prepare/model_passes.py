"""What a trained model makes of image-text pairs, shard by shard; what is done is not done again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tqdm

from detclipv2_jax import files
from detclipv2_jax.data.schema import Record
from detclipv2_jax.inference import Predictor
from detclipv2_jax.inference.vocabulary import weights_key
from detclipv2_jax.prepare.record_builder import Reader, Tally

Pairs = Iterator[tuple[str, Record]]


def open_run(checkpoint: str) -> tuple[Predictor, dict[str, Any]]:
    """Returns the predictor of a run, which keeps no vocabularies, and what its answers depend on."""
    predictor = Predictor.from_checkpoint(checkpoint, keep_vocabularies=False)
    return predictor, {"weights": weights_key(predictor.params), "step": predictor.step}


def plan_of(reader: Reader, *options: dict[str, Any]) -> Any:
    """Returns everything that decides what comes out, as json has it: the files, how they are read and looked at."""
    return json.loads(json.dumps({"inputs": reader.inputs, "options": options}))


def over_shards(
    reader: Reader, folder: Path, *, plan: Any, work: Callable[[int, Pairs], dict[str, Any]], what: str
) -> Iterator[dict[str, Any]]:
    """Yields for each shard what `work` makes of its pairs, beside what was "seen", "dropped" and "noted" of them.

    Args:
      reader: the pairs.
      folder: has a json for every shard that is done.
      plan: of `plan_of`; a shard that was done by another one is done anew.
      work: (shard, its pairs) → what is kept as json; it reads all pairs.
      what: of the progress.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm.tqdm(desc=what, unit="pair", total=reader.num_items or None, mininterval=interval) as progress:

        def counted(pairs: Pairs) -> Pairs:
            for pair in pairs:
                yield pair
                progress.update()

        for shard in range(reader.num_shards):
            path = folder / f"{shard:06d}.json"
            done = files.read_json(path) if path.is_file() else {}
            if isinstance(done, dict) and done.get("plan") == plan:
                progress.update(done["seen"])
            else:
                tally = Tally()
                found = work(shard, counted(reader.read(shard, tally)))
                done = {"plan": plan, "seen": tally.seen, "dropped": tally.dropped, "noted": tally.noted, **found}
                files.write_json(path, done)
            yield done
