"""The folders that `python -m detclipv2_jax.prepare` builds, read with random access and without TensorFlow.

`detclipv2_jax.prepare.shards` documents the files of a folder, `detclipv2_jax.prepare.record_builder` an example.
TFDS, which can read them too, is not needed: its 220 MB are for `prepare`. The `tf.train.Example` protos are taken
apart here, in 0.03 ms an example where TFDS's own NumPy decoding takes 0.3 ms, and photos stay encoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detclipv2_jax import files
from detclipv2_jax.data.catalog import command_of
from detclipv2_jax.data.checks import documented
from detclipv2_jax.data.concepts import Vocabulary, display_name
from detclipv2_jax.data.schema import Kind, Record, UnusableError
from detclipv2_jax.data.selection import NOTHING, say_unused

INDEX, VOCABULARY, REPORT = "index.npz", "vocabulary.json", "build_report.json"
PHRASES = "phrases.tsv"
_NUM_LOOKED_AT = 64  # examples, evenly spread; LVIS lists absent names of nearly every image
FEATURES, INFO = "features.json", "dataset_info.json"  # of TFDS
_CLASSES = {  # of features; TFDS imports whatever module a features.json names
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "features_dict.FeaturesDict", "image_feature.Image", "sequence_feature.Sequence", "tensor_feature.Tensor",
        "text_feature.Text",
    )
}  # fmt: skip
_NAMES = {
    "image", "name", "size", "boxes", "concepts", "box_concepts", "caption", "negatives", "not_negatives",
}  # fmt: skip
_KEYS = _NAMES | {
    "pythonClassName", "featuresDict", "features", "feature", "tensor", "text", "sequence", "dtype", "encoding",
    "shape", "dimensions", "length",
}  # fmt: skip


class _Shard(NamedTuple):
    """What ArrayRecord asks of a file."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class BuiltSource:
    """The examples of a built folder, in the order of its raw files; see `read_built`."""

    def __init__(
        self,
        folder: Path,
        *,
        kind: Kind,
        vocabulary: Vocabulary,
        counters: dict[str, int],
        num: int,
        dropped: frozenset[str] = frozenset(),
        federated: bool | None = False,
        class_names: bool = False,
    ):
        self.name, self.kind, self.vocabulary, self.counters = folder.name, kind, vocabulary, counters
        self.folder, self._dropped, self.federated = folder, dropped, bool(federated)
        self.class_names = class_names
        try:
            index = files.read_arrays(folder / INDEX, ("sizes", "num_concepts"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; build the folder again") from None
        sizes, num_concepts = index["sizes"], index["num_concepts"]
        if (
            not num_concepts.size
            or sizes.shape != (num_concepts.size, 2)
            or sizes.dtype.kind + num_concepts.dtype.kind != "ii"
        ):
            raise ValueError(f"{folder / INDEX} has sizes of the shape {sizes.shape}; build the folder again")
        self.sizes, self.most_concepts = sizes[: num or None], int(num_concepts[: num or None].max())
        self._examples: Any = None  # and the files that hold them, once one was read
        self._shards: list[_Shard] = []
        if federated is None:  # a build of before does not say it
            self.federated = self._lists_absent()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_examples": None}  # open files do not travel to worker processes

    def __len__(self) -> int:
        return len(self.sizes)

    def _open(self) -> None:
        """Opens the records, once."""
        if self._examples is None:
            from array_record.python import array_record_data_source  # here: only where examples are read

            self._shards = check_metadata(self.folder)
            for shard in self._shards:  # a pipe would be waited for
                if os.path.exists(shard.filename) and not os.path.isfile(shard.filename):
                    raise ValueError(f"{shard.filename} is not a regular file; build the folder again")
            self._examples = array_record_data_source.ArrayRecordDataSource(self._shards)

    def _example(self, index: int) -> Any:
        """Returns the features of an example by name: protos of bytes_list, float_list or int64_list."""
        from google.protobuf.message import DecodeError

        self._open()
        try:
            example = _example_class().FromString(self._examples[index]).features.feature
            if example["image"].bytes_list.value:  # ArrayRecord gives empty records where a file was cut
                return example
        except (DecodeError, IndexError, OSError, RuntimeError):  # RuntimeError: ArrayRecord's
            pass
        raise UnusableError(f"damaged or missing record in {self.file(index)}")

    def file(self, index: int) -> str:
        if not self._shards:
            return str(self.folder)
        ends = np.cumsum([shard.take for shard in self._shards])
        return self._shards[int(np.searchsorted(ends, index, side="right"))].filename

    def describe(self, index: int) -> str:
        try:
            return f"{_texts(self._example(index)['name'])[0]} of {self.folder}"
        except (IndexError, ValueError):  # UnusableError, too
            return f"example {index} of {self.folder}"

    def __getitem__(self, index: int) -> Record:
        self._open()
        try:
            record = self._record(index)
        except UnusableError:
            raise
        except (IndexError, ValueError):
            record = None
        if record is None or not _is_whole(record):
            raise UnusableError(f"record that is no example in {self.file(index)}")
        record = dataclasses.replace(record, box_concepts=record.box_concepts.astype(np.int32))
        return _without(record, self._dropped) if self._dropped else record

    def _record(self, index: int) -> Record:
        example = self._example(index)
        concepts = _texts(example["concepts"])
        return Record(
            kind=self.kind,
            source=self.name,
            example_id=index,
            image=example["image"].bytes_list.value[0],
            size=tuple(example["size"].int64_list.value),
            boxes=np.array(example["boxes"].float_list.value, np.float32).reshape(-1, 4),
            concepts=concepts,
            box_concepts=np.array(example["box_concepts"].int64_list.value, np.int64),
            caption=_texts(example["caption"])[0] if self.kind is not Kind.IMAGE_TEXT else concepts[0],
            negatives=_texts(example["negatives"]),
            not_negatives=_texts(example["not_negatives"]),
            federated=self.federated,
        )

    def _lists_absent(self) -> bool:
        """Returns whether examples, of those looked at, list absent names, as those of federated jsons alone do."""
        for index in np.unique(np.linspace(0, len(self) - 1, _NUM_LOOKED_AT).round().astype(int)).tolist():
            with contextlib.suppress(LookupError, ValueError):  # it is damaged
                record = self._record(index)
                if record.negatives or record.not_negatives:
                    return True
        return False


@functools.cache
def _example_class() -> Any:
    """Returns the message `tf.train.Example`, whose definition TensorFlow and TFDS bring along, too."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="built", syntax="proto3")
    repeated = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, kind in repeated.items():
        file.message_type.add(name=name).field.add(name="value", number=1, label=field.LABEL_REPEATED, type=kind)

    def add(message: Any, number: int, name: str, of: str, **more: Any) -> None:
        options = {"label": field.LABEL_OPTIONAL, "type": field.TYPE_MESSAGE, "type_name": f".built.{of}"} | more
        message.field.add(name=name, number=number, **options)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        add(feature, number, name, [*repeated][number - 1], oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    add(entry, 2, "value", "Feature")
    add(features, 1, "feature", "Features.FeatureEntry", label=field.LABEL_REPEATED)
    add(file.message_type.add(name="Example"), 1, "features", "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("built.Example"))


def _is_whole(record: Record) -> bool:
    used = record.box_concepts
    in_range = ((used >= 0) & (used < len(record.concepts))).all()
    return bool(
        len(record.size) == 2 and len(record.boxes) == len(used) and in_range and np.isfinite(record.boxes).all()
    )


def _without(record: Record, dropped: Collection[str]) -> Record:
    """Returns a record without some concepts and their boxes."""
    stays = np.array([name not in dropped for name in record.concepts], bool)
    rows = stays[record.box_concepts]
    lists = (record.concepts, record.negatives, record.not_negatives)
    concepts, negatives, not_negatives = (tuple(name for name in names if name not in dropped) for names in lists)
    return dataclasses.replace(
        record,
        boxes=record.boxes[rows],
        box_concepts=(np.cumsum(stays) - 1)[record.box_concepts[rows]].astype(np.int32),
        concepts=concepts,
        negatives=negatives,
        not_negatives=not_negatives,
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a json object; ValueError for a key that it has twice, of which another reader may take the other one."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"an object has a key twice: {sorted(key for key, _ in pairs)}")
    return content


def check_metadata(folder: Path) -> list[_Shard]:
    """Returns the shards of a built folder, which may come from a stranger, after checking its files of TFDS.

    Raises:
      ValueError: they are damaged, or name files or classes, which TFDS would import, that `prepare` does not write.
    """

    def check(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                if name not in _KEYS:
                    raise ValueError(f"{folder / FEATURES} has the key {name!r}, which `prepare` does not write")
                check(part, name)
        elif isinstance(value, list):
            for part in value:
                check(part, key)
        elif key == "pythonClassName" and value not in _CLASSES:
            raise ValueError(f"{folder / FEATURES} names the class {value!r}, which is none of `prepare`'s features")

    features, info = (files.read_json(folder / name, object_pairs_hook=_once) for name in (FEATURES, INFO))
    if not isinstance(features, dict) or not isinstance(info, dict):
        raise ValueError(f"{folder}: {FEATURES} and {INFO} must be json objects; build the folder again")
    check(features)
    check(features.get("pythonClassName"), "pythonClassName")
    if info.get("fileFormat") != "array_record":
        raise ValueError(f"{folder / INFO} names the format {info.get('fileFormat')!r}; `prepare` writes array_record")
    return _shards_of(info, folder)


def _shards_of(info: dict[str, Any], folder: Path) -> list[_Shard]:
    """Returns the shards that a dataset_info.json names; raises as `check_metadata`."""
    splits = info.get("splits")
    splits = splits if isinstance(splits, list) and all(isinstance(split, dict) for split in splits) else []
    split: dict[str, Any] = next((split for split in splits if split.get("name") == "train"), {})
    lengths = split.get("shardLengths")
    lengths = lengths if isinstance(lengths, list) else []
    if not lengths or not all(re.fullmatch("[0-9]{1,15}", str(length)) for length in lengths):
        raise ValueError(f"{folder / INFO} has no split train with the lengths of its shards; build the folder again")
    name = str(split.get("filepathTemplate"))
    for key, value in {"DATASET": info.get("name"), "SPLIT": "train", "FILEFORMAT": "array_record"}.items():
        name = name.replace(f"{{{key}}}", str(value))
    if os.path.basename(name) != name or "{SHARD_X_OF_Y}" not in name or "filepath_template" in split:
        raise ValueError(f"{folder / INFO} names no shards, or files outside of the folder; build the folder again")
    return [
        _Shard(str(folder / name.replace("{SHARD_X_OF_Y}", f"{i:05d}-of-{len(lengths):05d}")), 0, int(n), int(n))
        for i, n in enumerate(lengths)
    ]


@documented
@documented
def read_names(folder: str) -> list[str]:
    """Returns the names of a built folder's categories."""
    return list(map(str, files.read_json(Path(folder) / VOCABULARY)["names"]))


@documented
def read_built(
    folder: str, kind: Kind, *, dictionary: Vocabulary | None = None, max_examples: int = 0, dropped: Iterable[str] = ()
) -> BuiltSource:
    """Returns the source of a built folder.

    Args:
      folder: made by `python -m detclipv2_jax.prepare`.
      kind: what the folder must hold.
      dictionary: definitions for the categories that have none.
      max_examples: the first n examples; 0: all.
      dropped: names of categories that are left out with their boxes, where the folder has them.

    Raises:
      ValueError: the folder holds another kind of data, or no category is left.
    """
    path = Path(folder)
    check_metadata(path)
    report = files.read_json(path / REPORT)
    if report["kind"] != kind:
        raise ValueError(f"{folder} holds {report['kind']} data; it belongs in config.{report['kind']}.data")
    content = files.read_json(path / VOCABULARY)
    names, definitions = tuple(content["names"]), tuple(content["definitions"])
    if dictionary and kind is Kind.DETECTION:
        pairs = zip(names, definitions, strict=True)
        definitions = tuple(definition or dictionary.definition(name) for name, definition in pairs)
    counters = {f"{reason} (when built)": num for reason, num in report["dropped"].items()}
    columns: Sequence[tuple[Any, ...]] = (names, definitions, tuple(content["category_ids"]))
    if without := frozenset(map(display_name, dropped)).intersection(names):
        stays = [name not in without for name in names]
        columns = [tuple(itertools.compress(column, stays)) for column in columns]
        counters["dropped category"] = len(without)
        if not any(stays):
            raise ValueError(f"{folder} has no category beside those that drop_categories names")
    vocabulary = Vocabulary(*columns)
    without_boxes = report.get("categories without a box", ())  # builds of before do not say it
    rows = [{"id": i, "name": name} for i, name in enumerate(vocabulary.names)]
    used = {row["id"] for row in rows if row["name"] not in without_boxes}
    say_unused(rows, used, folder, option=NOTHING.option)
    return BuiltSource(
        path,
        kind=kind,
        vocabulary=vocabulary,
        counters=counters,
        num=max_examples,
        dropped=without,
        federated=report.get("federated", None if kind is Kind.DETECTION else False),
        class_names=bool(report.get("class names")),
    )
