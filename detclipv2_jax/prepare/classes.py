"""Image classification data as pairs: the caption is the name of the image's class (paper's appendix C, Table 13).

* A folder of class folders, as ImageNet's `train/`: every photo below `n01440764/` is of that class.
* A data set that TFDS has prepared, the folder with its `dataset_info.json`: features `image` and `label`.

A class is called as `--names` says: lines `class <tab or space> name`, of which synonyms after a comma are left out, so
that ImageNet's LOC_synset_mapping.txt fits. Without it the name is that of the folder, or what TFDS calls the label.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detclipv2_jax import buckets, files
from detclipv2_jax.data.checks import resolve
from detclipv2_jax.data.concepts import Vocabulary, display_name
from detclipv2_jax.data.schema import UnusableError
from detclipv2_jax.prepare.box_json import describe_file
from detclipv2_jax.prepare.image_text import Pair, PairReader
from detclipv2_jax.prepare.record_builder import Tally

_TFDS_FEATURES = "tensorflow_datasets.core.features."  # TFDS imports whatever module a features.json names


class ClassReader(PairReader):
    """What folders and TFDS share; classes that the list of names lacks are dropped with their images."""

    def __init__(self, classes: list[str], names: Path | None, *, num_items: int, shard_size: int):
        listed = read_names(names) if names else {name: display_name(name) for name in classes}
        if not any(name in listed for name in classes):
            raise ValueError(
                f"--names={names} has none of the {len(classes)} classes of the input, like {classes[:3]}; its lines "
                "are `class <tab or space> name`"
            )
        super().__init__([], num_shards=-(-num_items // shard_size), pipeline="", max_phrases=0)
        self.names = [listed.get(name, "") for name in classes]
        self.num_items, self._shard_size = num_items, shard_size
        self.inputs = {str(names): describe_file(names)} if names else {}
        self.facts = {"class names": True}
        found = tuple(dict.fromkeys(filter(None, self.names)))
        self.vocabulary = Vocabulary(found, ("",) * len(found))

    def images(self, items: range) -> Iterator[tuple[str, int, str | bytes | UnusableError]]:
        """Yields name, number of the class and image of items, or why there is none."""
        raise NotImplementedError

    def pairs(self, shard: int, tally: Tally) -> Iterator[Pair]:
        start = shard * self._shard_size
        for name, label, image in self.images(range(start, min(start + self._shard_size, self.num_items))):
            tally.seen += 1
            if isinstance(image, UnusableError):
                tally.dropped[image.reason] += 1
            elif not 0 <= label < len(self.names) or not self.names[label]:
                tally.dropped["class without a name"] += 1
            else:
                yield Pair(name, image, self.names[label], [])


class FolderReader(ClassReader):
    """Photos in a folder a class, in the order of their names."""

    def __init__(self, folder: Path, names: Path | None, *, shard_size: int, follow_links: bool):
        self._folder, self._follow_links = os.path.realpath(folder), follow_links
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        self._photos = [
            (str(photo.relative_to(folder)), label)
            for label, name in enumerate(classes)
            for photo in sorted((folder / name).rglob("*"))
            if photo.suffix.lower() in buckets.IMAGE_SUFFIXES
        ]
        if not self._photos:
            raise ValueError(
                f"--input={folder} has no photos in folders of classes, like {folder}/n01440764/a.jpg, and no "
                "dataset_info.json of TFDS"
            )
        super().__init__(classes, names, num_items=len(self._photos), shard_size=shard_size)
        listing = "\n".join(name for name, _ in self._photos)
        self.inputs[str(folder)] = {"photos": len(self._photos), "sha256": hashlib.sha256(listing.encode()).hexdigest()}

    def images(self, items: range) -> Iterator[tuple[str, int, str | UnusableError]]:
        for name, label in self._photos[items.start : items.stop]:
            try:
                yield name, label, resolve(self._folder, name, follow_links=self._follow_links)
            except UnusableError as error:
                yield name, label, error


class TfdsReader(ClassReader):
    """Examples of one split of a data set that TFDS has prepared, whatever its file format."""

    def __init__(self, folder: Path, names: Path | None, *, split: str, shard_size: int):
        _check_features(files.read_json(folder / "features.json"), folder)
        self._folder, self._split = folder, split
        info = self._builder().info
        if missing := [name for name in ("image", "label") if name not in info.features]:
            raise ValueError(f"--input={folder} has no feature {' and no '.join(missing)}, only {[*info.features]}")
        if split not in info.splits:
            raise ValueError(f"--input={folder} has no split {split!r}, only {', '.join(info.splits)}")
        label = info.features["label"]
        classes = [str(name) for name in getattr(label, "names", None) or range(getattr(label, "num_classes", 0) or 0)]
        num_items = info.splits[split].num_examples
        super().__init__(classes, names, num_items=num_items, shard_size=shard_size)
        self.inputs[str(folder)] = {"name": info.full_name, "split": split, "examples": num_items}

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self._folder)

    def images(self, items: range) -> Iterator[tuple[str, int, bytes]]:
        import tensorflow_datasets as tfds

        builder = self._builder()
        part: dict[str, Any] = {"split": f"{self._split}[{items.start}:{items.stop}]"}
        part["decoders"] = {"image": tfds.decode.SkipDecoding()}
        if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
            examples = builder.as_data_source(**part)
        else:
            examples = tfds.as_numpy(builder.as_dataset(**part))
        for i, example in zip(items, examples, strict=True):
            name = example.get("file_name", example.get("filename", f"{self._split}/{i}".encode()))
            yield name.decode(errors="replace"), int(example["label"]), bytes(example["image"])


def _check_features(content: Any, folder: Path) -> None:
    """Raises a ValueError where a features.json, which may be a stranger's, names classes that are not TFDS's own."""
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _check_features(part, folder)
    name = content.get("pythonClassName", _TFDS_FEATURES) if isinstance(content, dict) else _TFDS_FEATURES
    if not str(name).startswith(_TFDS_FEATURES):
        raise ValueError(f"{folder}/features.json names the class {name!r}, which is none of TFDS's features")


def read_names(path: Path) -> dict[str, str]:
    """Returns the name of each class of a list: `class <tab or space> name[, synonym …]`, a line each."""
    found = {}
    for i, line in enumerate(files.read_lines(path), 1):
        if not line.strip():
            continue
        key, _, text = line.strip().partition("\t" if "\t" in line else " ")
        name = display_name(text.split(",")[0])
        if not name:
            raise ValueError(f"--names={path} has no name in line {i}: {line[:80]!r}")
        found[key.strip()] = name
    return found


def open_reader(source: str, *, names: str, split: str, shard_size: int, follow_links: bool) -> ClassReader:
    """Returns the reader of a folder of class folders, or of one that TFDS has prepared.

    Raises:
      ValueError: the input is neither, or the list of names does not fit.
    """
    folder, listed = Path(source), Path(names) if names else None
    if not folder.is_dir():
        raise ValueError(f"--input={source} is no folder; classes takes a folder of class folders, or one of TFDS")
    if listed and not listed.is_file():
        raise ValueError(f"--names={names} does not exist; its lines are `class <tab or space> name`")
    if (folder / "dataset_info.json").is_file():
        return TfdsReader(folder, listed, split=split, shard_size=shard_size)
    return FolderReader(folder, listed, shard_size=shard_size, follow_links=follow_links)
