"""Sources of examples: random access to `Record`s by position, reading no image.

Raw files are read in place: a COCO json or an MDETR-style json with its image folder (`box_json`), and a TSV
`image <tab> caption [<tab> JSON list of noun phrases]` with its image folder: UTF-8, no header, no quoting.
Folders built by `python -m detclipv2_jax.prepare` (`built`) may stand beside raw files and beside each other.
What cannot be used is counted by reason in `counters`; above a share of the whole it is an error.
"""

from __future__ import annotations

import collections
import io
import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging
from jaxtyping import Int32

from detclipv2_jax import files
from detclipv2_jax.data.box_json import BoxSource, read_detection, read_grounding
from detclipv2_jax.data.built import missing_folders, read_built, read_names
from detclipv2_jax.data.checks import check_photos, missing_paths, refuse_above_share, resolve, unsafe_path
from detclipv2_jax.data.concepts import Vocabulary, is_visible, read_dictionary
from detclipv2_jax.data.evaluation_set import GroundTruth, read_evaluation
from detclipv2_jax.data.schema import Kind, Record
from detclipv2_jax.data.selection import Dropped, dropped_names


class Source(Protocol):
    """Random access to the examples of one data set."""

    name: str
    kind: Kind
    sizes: Int32[np.ndarray, "n 2"]  # annotated (height, width); 0 where unknown
    vocabulary: Vocabulary  # categories or distinct phrases; empty for image-text
    most_concepts: int  # of one example
    class_names: bool  # whether captions are the names of images' classes
    federated: bool  # whether examples are annotated for some concepts only
    counters: dict[str, int]  # what was repaired or dropped while loading, by reason

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Returns an example; raises UnusableError if its file may not be read."""
        ...

    def file(self, index: int) -> str:
        """Returns the path of the file that holds an example's image, without reading it."""
        ...

    def describe(self, index: int) -> str:
        """Returns how messages name an example: the annotation and the file."""
        ...


class PairSource:
    """Captioned images of a TSV; lines are parsed when asked for."""

    class_names = False

    def __init__(self, path: Path, folder: str, *, max_examples: int, max_bad_share: float, follow_links: bool):
        self.name, self.path, self.kind = path.stem, path, Kind.IMAGE_TEXT
        self.vocabulary, self.federated = Vocabulary((), ()), False
        self._folder, self._follow_links = folder, follow_links
        self._text = files.read_bytes(path)
        bad: collections.Counter[str] = collections.Counter()
        repaired: collections.Counter[str] = collections.Counter()
        spans, self.most_concepts, has_phrases = [], 1, False
        for start, line in files.byte_lines(io.BytesIO(self._text), where=path):
            if not line.strip():
                continue
            fields = line.split(b"\t")
            if len(fields) < 2:
                bad["without a tab"] += 1
            elif unsafe_path(fields[0].decode(errors="replace")):
                bad["with a file name outside the folder"] += 1
            elif not is_visible(fields[1].decode(errors="ignore")):
                bad["with an empty caption"] += 1
            else:
                spans.append((start, start + len(line)))
                _, _, phrases, problems = parse_pair(line)
                repaired.update(problems)
                has_phrases |= len(fields) > 2
                self.most_concepts = max(self.most_concepts, 1 + len(phrases))
            if max_examples and len(spans) == max_examples:
                break
        if not spans and not bad:
            raise ValueError(f"{path} is empty; it must be a TSV `image <tab> caption`")
        refuse_above_share(bad, len(spans) + sum(bad.values()), max_bad_share, what="lines", where=path)
        if not has_phrases:
            logging.warning("%s has no column of noun phrases: the caption alone is the concept of its image", path)
        self._spans = np.array(spans, np.int64).reshape(-1, 2)
        self.sizes = np.zeros((len(spans), 2), np.int32)
        self.counters = dict(bad + repaired)
        check_photos(folder, len(spans), self._file_name, where=path, max_bad_share=max_bad_share)

    def _file_name(self, index: int) -> str:
        return self._line(index).partition(b"\t")[0].decode(errors="ignore")

    def _line(self, index: int) -> bytes:
        start, end = self._spans[index]
        return self._text[start:end]

    def __len__(self) -> int:
        return len(self._spans)

    def file(self, index: int) -> str:
        return f"{self._folder}/{self._file_name(index)}"

    def describe(self, index: int) -> str:
        return f"{self._file_name(index)} of {self.path}"

    def __getitem__(self, index: int) -> Record:
        name, caption, phrases, _ = parse_pair(self._line(index))
        return Record(
            kind=self.kind,
            source=self.name,
            example_id=index,
            image=resolve(self._folder, name, follow_links=self._follow_links),
            size=(0, 0),
            boxes=np.zeros((0, 4), np.float32),
            concepts=(caption, *phrases),
            box_concepts=np.zeros(0, np.int32),
            caption=caption,
        )


def parse_pair(line: bytes) -> tuple[str, str, list[str], list[str]]:
    """Returns image, caption, phrases and what had to be repaired, of a line with at least one tab."""
    repaired = []
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = line.decode(errors="ignore")
        repaired.append("invalid UTF-8 left out")
    name, caption, *rest = text.split("\t")
    phrases: list[str] = []
    if rest and rest[0].strip():
        try:
            column = json.loads(rest[0])
        except (ValueError, RecursionError):  # ValueError: also of a number with thousands of digits
            column = None
        if isinstance(column, list) and all(isinstance(phrase, str) for phrase in column):
            phrases = [phrase.strip() for phrase in column if phrase.strip()]
        else:
            repaired.append("phrase column that is no JSON list of texts left out")
    return name, caption.strip(), phrases, repaired


def read_pairs(
    pairs: str, images: str, *, max_examples: int = 0, max_bad_share: float = 0.0, follow_links: bool = False
) -> PairSource:
    """Returns the source of an image-text TSV and its image folder; arguments as for `read_detection`."""
    path = Path(pairs)
    if is_json(path):
        raise ValueError(f"{path} is a json; config.image_text.pairs takes a TSV `image <tab> caption`")
    return PairSource(
        path,
        os.path.realpath(images),
        max_examples=max_examples,
        max_bad_share=max_bad_share,
        follow_links=follow_links,
    )


def is_json(path: Path) -> bool:
    """Returns whether a file that should be a TSV looks like a json."""
    return files.beginning(path).lstrip().startswith((b"{", b"[{"))


def _missing_files(kind: Kind, section: Any, prefix: str) -> list[str]:
    """Returns what is missing of the raw files that a section of the configuration names, and of its dictionary."""
    key = "pairs" if kind is Kind.IMAGE_TEXT else "annotations"
    paths = {}
    if _names_raw_files(kind, section):
        paths = {f"{prefix}.{key}": (section[key], "file"), f"{prefix}.images": (section.images, "folder")}
    if section.dictionary:
        paths[f"{prefix}.dictionary"] = (section.dictionary, "file")
    return missing_paths(paths)


def _names_raw_files(kind: Kind, section: Any) -> bool:
    return bool(section["pairs" if kind is Kind.IMAGE_TEXT else "annotations"] or section.images)


def open_sources(kind: Kind, section: Any, *, prefix: str) -> list[Source]:
    """Returns the sources that one section of the configuration (config.detection, …) names: raw files, then folders.

    Raises:
      ValueError: everything that is wrong with the section's files, one line each; keys are led by `prefix`.
    """
    folders = (section.data,) if isinstance(section.data, str) else tuple(section.data)
    if not folders and not _names_raw_files(kind, section):
        return []
    if problems := _missing_files(kind, section, prefix) + missing_folders(folders, kind, prefix=prefix):
        raise ValueError("\n".join(problems))
    limits = {key: section[key] for key in ("max_examples", "max_bad_share", "follow_links")}
    drop = section.drop_categories if kind is Kind.DETECTION else ()
    sources: list[Source] = []
    try:
        built_names = [name for folder in folders for name in read_names(folder)] if drop else []
        if _names_raw_files(kind, section):
            match kind:
                case Kind.DETECTION:
                    dropped = Dropped(drop, f"{prefix}.drop_categories", built_names)
                    more = limits | {"dictionary": section.dictionary, "dropped": dropped}
                    more |= {"num_shots": section.num_shots, "few_shot_seed": section.few_shot_seed}
                    sources.append(read_detection(section.annotations, section.images, **more))
                case Kind.GROUNDING:
                    sources.append(read_grounding(section.annotations, section.images, **limits))
                case Kind.IMAGE_TEXT:
                    sources.append(read_pairs(section.pairs, section.images, **limits))
        dictionary = read_dictionary(section.dictionary) if folders and section.dictionary else None
        options = {"dictionary": dictionary, "max_examples": section.max_examples, "dropped": drop}
        if built_names and not sources:
            dropped_names(drop, built_names, " ".join(folders))
        sources.extend(read_built(folder, kind, **options) for folder in folders)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None
    return sources


def open_evaluation(section: Any, *, prefix: str) -> tuple[BoxSource, GroundTruth] | None:
    """Returns the images of an evaluation section, without boxes, and its truth; None if it names none.

    Raises:
      ValueError: as `open_sources`.
    """
    if not _names_raw_files(Kind.DETECTION, section):
        return None
    if problems := _missing_files(Kind.DETECTION, section, prefix):
        raise ValueError("\n".join(problems))
    try:
        return read_evaluation(
            section.annotations,
            section.images,
            dictionary=section.dictionary,
            max_examples=section.max_examples,
            max_bad_share=section.max_bad_share,
            follow_links=section.follow_links,
            dropped=Dropped(section.drop_categories, f"{prefix}.drop_categories"),
            definitions=section.definitions,
        )
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None
