"""The folders that `python -m detclipv2_jax.prepare` builds, read with random access and without TensorFlow.

`detclipv2_jax.prepare.shards` documents the files of a folder, `detclipv2_jax.prepare.record_builder` an example.
TFDS finds the records of the ArrayRecord files; their `tf.train.Example` protos are taken apart here, in 0.03 ms an
example where TFDS's own NumPy decoding of any features takes 0.3 ms, and photos stay encoded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.data.catalog import command_of
from detclipv2_jax.data.checks import documented
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.schema import Kind, Record, UnusableError

INDEX, VOCABULARY, REPORT = "index.npz", "vocabulary.json", "build_report.json"
PHRASES = "phrases.tsv"


class BuiltSource:
    """The examples of a built folder, in the order of its raw files; see `read_built`."""

    def __init__(self, folder: Path, *, kind: Kind, vocabulary: Vocabulary, counters: dict[str, int], num: int):
        self.name, self.kind, self.vocabulary, self.counters = folder.name, kind, vocabulary, counters
        self.folder = folder
        with np.load(folder / INDEX) as index:
            self.sizes = index["sizes"][: num or None]
            self.most_concepts = int(index["num_concepts"][: num or None].max())
        self._examples: Any = None  # and the split that they are, once one was read
        self._split: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_examples": None}  # open files do not travel to worker processes

    def __len__(self) -> int:
        return len(self.sizes)

    def _example(self, index: int) -> Any:
        """Returns the features of an example by name: protos of bytes_list, float_list or int64_list."""
        # takes a second: only where examples are read
        import tensorflow_datasets as tfds
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        if self._examples is None:
            builder = tfds.builder_from_directory(self.folder)
            self._split = builder.info.splits["train"]
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._examples = builder.as_data_source("train", deserialize_method=raw)
        try:
            example = tf_example_pb2.Example.FromString(self._examples[index]).features.feature
            if example["image"].bytes_list.value:  # ArrayRecord gives empty records where a file was cut
                return example
        except (DecodeError, IndexError, OSError, RuntimeError):  # RuntimeError: ArrayRecord's
            pass
        raise UnusableError(f"damaged or missing record in {self.file(index)}")

    def file(self, index: int) -> str:
        if self._split is None:
            return str(self.folder)
        shard = int(np.searchsorted(np.cumsum(self._split.shard_lengths), index, side="right"))
        return str(self._split.filepaths[shard])

    def describe(self, index: int) -> str:
        try:
            return f"{_texts(self._example(index)['name'])[0]} of {self.folder}"
        except UnusableError:
            return f"example {index} of {self.folder}"

    def __getitem__(self, index: int) -> Record:
        example = self._example(index)
        return Record(
            kind=self.kind,
            source=self.name,
            example_id=index,
            image=example["image"].bytes_list.value[0],
            size=tuple(example["size"].int64_list.value),
            boxes=np.array(example["boxes"].float_list.value, np.float32).reshape(-1, 4),
            concepts=_texts(example["concepts"]),
            box_concepts=np.array(example["box_concepts"].int64_list.value, np.int32),
            caption=_texts(example["caption"])[0],
            negatives=_texts(example["negatives"]),
            not_negatives=_texts(example["not_negatives"]),
        )


def _texts(feature: Any) -> tuple[str, ...]:
    return tuple(text.decode() for text in feature.bytes_list.value)


def missing_folders(folders: tuple[str, ...], kind: Kind, *, prefix: str) -> list[str]:
    """Returns a message for each folder that is not built, with the command that builds it."""
    problems = []
    for folder in folders:
        if not (Path(folder) / REPORT).is_file():
            state = "its build is not finished" if Path(folder).is_dir() else "it does not exist"
            problems.append(f"{prefix}.data: {folder}: {state}; build it with\n    {command_of(folder, kind)}")
    return problems


@documented
def read_built(folder: str, kind: Kind, *, dictionary: Vocabulary | None = None, max_examples: int = 0) -> BuiltSource:
    """Returns the source of a built folder.

    Args:
      folder: made by `python -m detclipv2_jax.prepare`.
      kind: what the folder must hold.
      dictionary: definitions for the categories that have none.
      max_examples: the first n examples; 0: all.

    Raises:
      ValueError: the folder holds another kind of data.
    """
    path = Path(folder)
    report = json.loads((path / REPORT).read_bytes())
    if report["kind"] != kind:
        raise ValueError(f"{folder} holds {report['kind']} data; it belongs in config.{report['kind']}.data")
    content = json.loads((path / VOCABULARY).read_bytes())
    names, definitions = tuple(content["names"]), tuple(content["definitions"])
    if dictionary and kind is Kind.DETECTION:
        pairs = zip(names, definitions, strict=True)
        definitions = tuple(definition or dictionary.definition(name) for name, definition in pairs)
    vocabulary = Vocabulary(names, definitions, tuple(content["category_ids"]))
    counters = {f"{reason} (when built)": num for reason, num in report["dropped"].items()}
    return BuiltSource(path, kind=kind, vocabulary=vocabulary, counters=counters, num=max_examples)
