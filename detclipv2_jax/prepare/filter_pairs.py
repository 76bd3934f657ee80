"""Image-text pairs without those whose caption a trained model finds wrong, as BLIP filters captions.

Each text of a pair, its caption and its phrases, ranks the pair's photo among those of a group by their most similar
regions, as the contrastive loss compares them. The misfit of a pair is the share of other photos that are better, mean
over its texts: 0 where none is, a half for a caption of another photo. A group are pairs that follow each other. A
pair whose photo cannot be read has none (null); what builds the data set leaves it out and says why.

`<output>_filter/` has the misfit of every pair, shard by shard, and `report.json`; other limits read them again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from detclipv2_jax import files
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.schema import Kind, Record
from detclipv2_jax.inference.detect import Photos
from detclipv2_jax.prepare import model_passes
from detclipv2_jax.prepare.record_builder import Reader, Tally

DROPPED = "caption that fits other photos better (--filter)"
UNREADABLE = "photos that cannot be read"
_NUM_SHOWN = 20
_TEXTS_TOGETHER = 8  # few numbers of texts are compiled


class FilteredPairs:
    """A reader without the pairs whose misfit is above a limit."""

    kind = Kind.IMAGE_TEXT
    vocabulary = Vocabulary((), ())

    def __init__(self, reader: Reader, folder: Path, *, max_misfit: float, facts: dict[str, Any]):
        self._reader, self._folder, self._max_misfit = reader, folder, max_misfit
        self.num_shards, self.num_items = reader.num_shards, reader.num_items
        self.inputs, self.counters, self.facts = reader.inputs, reader.counters, reader.facts | facts

    def read(self, shard: int, tally: Tally) -> Iterator[tuple[str, Record]]:
        misfits = files.read_json(self._folder / f"{shard:06d}.json")["misfits"]
        for pair, misfit in zip(self._reader.read(shard, tally), misfits, strict=True):
            if misfit is None or misfit <= self._max_misfit:
                yield pair
            else:
                tally.noted[DROPPED] += 1


class Judge:
    """Tells how badly captions fit their photos."""

    def __init__(self, checkpoint: str, *, group_size: int):
        self._predictor, run = model_passes.open_run(checkpoint)
        config = self._predictor.config
        self._group_size = group_size
        # photos at the size of pairs in training
        config.eval.canvases = config.image_text.canvases[:1]
        config.eval.short_side, config.eval.long_side = config.image_text.short_side[1], config.image_text.long_side
        self.plan = {**run, "group_size": group_size, "canvas": config.eval.canvases}

    def misfits(self, shard: int, pairs: model_passes.Pairs) -> dict[str, Any]:
        """Returns the misfit of each pair, None where its photo cannot be read, and the first pairs by tenth of it."""
        misfits, examples = list[float | None](), collections.defaultdict[int, list[Any]](list)
        last: list[Photos] = []
        with concurrent.futures.ThreadPoolExecutor() as threads:
            while group := list(itertools.islice(pairs, self._group_size)):
                photos = list(threads.map(self._photo, [record for _, record in group]))
                found = self._rank([record.concepts for _, record in group], photos, last)
                misfits += found
                for (name, record), misfit in zip(group, found, strict=True):
                    shown = examples[min(int(10 * misfit), 9)] if misfit is not None else []
                    if misfit is not None and len(shown) < _NUM_SHOWN:
                        shown.append({"photo": name, "texts": record.concepts, "misfit": misfit})
                last = [photo for photo in photos if photo is not None]
        return {"misfits": misfits, "examples": examples}

    def _photo(self, record: Record) -> Photos | None:
        try:
            return self._predictor.photos([record.image])
        except ValueError:
            return None

    def _rank(
        self, texts: Sequence[Sequence[str]], photos: Sequence[Photos | None], last: Sequence[Photos]
    ) -> list[float | None]:
        """Returns the misfits of the pairs of a group; a small one is filled with photos of the last group."""
        readable = [i for i, photo in enumerate(photos) if photo is not None]
        misfits: list[float | None] = [None] * len(texts)
        if not readable:
            return misfits
        detector, params = self._predictor.detector, self._predictor.params
        batch = [photo for photo in photos if photo is not None]
        batch += last[len(batch) - self._group_size :] if len(batch) < self._group_size else []
        num_others = len(batch) - 1
        nothing = jax.tree.map(np.zeros_like, batch[0])._replace(scale=batch[0].scale)  # it has no region
        batch += [nothing] * (self._group_size - len(batch))
        distinct = list(dict.fromkeys(text for i in readable for text in texts[i]))
        row = dict(zip(distinct, detector.encode_vocabulary(params, distinct), strict=True))
        most = max(len(texts[i]) for i in readable)
        shape = (self._group_size, -(-most // _TEXTS_TOGETHER) * _TEXTS_TOGETHER, len(row[distinct[0]]))
        phrases: Float[np.ndarray, "p m d"] = np.zeros(shape, np.float32)
        for place, i in enumerate(readable):
            phrases[place, : len(texts[i])] = [row[text] for text in texts[i]]
        stacked = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batch)
        found = detector.align(params, stacked, phrases, np.arange(self._group_size, dtype=np.int32))
        better = (np.asarray(found.ranks) - 1) / max(num_others, 1)
        for place, i in enumerate(readable):
            misfits[i] = float(better[place, : len(texts[i])].mean())
        return misfits


def judge(
    reader: Reader, checkpoint: str, folder: Path, *, max_misfit: float, group_size: int, read_by: dict[str, Any]
) -> FilteredPairs:
    """Returns the reader without the pairs above a misfit, after writing the misfits and the report to a folder.

    `read_by` are the options of the reader.
    """
    judge = Judge(checkpoint, group_size=group_size)
    parts = model_passes.plan_of(reader, read_by, judge.plan)
    seen, tenths, examples = 0, np.zeros(10, int), collections.defaultdict[str, list[Any]](list)
    num_kept = num_dropped = 0
    for part in model_passes.over_shards(reader, folder, plan=parts, work=judge.misfits, what="judging captions"):
        misfits = np.array([misfit for misfit in part["misfits"] if misfit is not None])
        seen += len(part["misfits"])
        num_kept += int((misfits <= max_misfit).sum())
        num_dropped += int((misfits > max_misfit).sum())
        tenths += np.histogram(misfits, bins=10, range=(0.0, 1.0))[0]
        for row in itertools.chain.from_iterable(part["examples"].values()):
            shown = examples["kept" if row["misfit"] <= max_misfit else "dropped"]
            if len(shown) < _NUM_SHOWN:
                shown.append(row | {"misfit": round(row["misfit"], 6)})
    counts: dict[str, Any] = {
        "pairs": seen,
        "kept": num_kept,
        "dropped": num_dropped,
        UNREADABLE: seen - num_kept - num_dropped,
    }
    counts |= {"by misfit, in tenths": tenths.tolist()}
    plan = {"run": checkpoint, "max_misfit": max_misfit, **judge.plan}
    files.write_json(folder / "report.json", counts | {"examples": examples, **plan}, indent=1)
    return FilteredPairs(reader, folder, max_misfit=max_misfit, facts={"filter": counts | plan})
