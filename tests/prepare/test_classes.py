"""Folders of classes and TFDS's labels as pairs: names, repetition, streams, and a few steps of a run on them."""

import pathlib
import types

import building
import pytest
import tensorflow_datasets as tfds
from raw_files import jpeg

from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.data.streams import train_streams
from detclipv2_jax.prepare import classes
from detclipv2_jax.prepare.record_builder import Tally

NAMES = "n01 tench, Tinca tinca\nn02 great_white shark, man-eater\n\nn04 red fox\n"
PHOTOS = ("n02/b.JPEG", "n01/a.jpg", "n01/deep/c.png", "n03/d.jpg", "n02/notes.txt", ".git/e.jpg", "f.jpg")


def build(source, output, **options):
    return building.build("classes", input=str(source), output=str(output), **options)


@pytest.fixture
def folder(tmp_path):
    """Three classes, one of them without a name, and files that are no photos of a class."""
    for i, name in enumerate(PHOTOS):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(jpeg(seed=i))
    (tmp_path / "names.txt").write_text(NAMES)
    return tmp_path / "train"


def pairs(output):
    source = read_built(str(output), Kind.IMAGE_TEXT)
    assert source.class_names
    return [(source.describe(i).split(" of ")[0], source[i].concepts) for i in range(len(source))]


def test_a_folder_of_class_folders(folder, tmp_path):
    report = build(folder, tmp_path / "out", names=str(tmp_path / "names.txt"), shard_size=3, max_bad_share=0.25)
    assert pairs(tmp_path / "out") == [
        ("n01/a.jpg", ("tench",)),
        ("n01/deep/c.png", ("tench",)),
        ("n02/b.JPEG", ("great white shark",)),
    ]
    assert (report["seen"], report["dropped"]) == (4, {"class without a name": 1})
    assert (report["left out or repaired"], report["distinct concepts"], report["class names"]) == ({}, 2, True)
    build(folder, tmp_path / "plain")
    assert dict(pairs(tmp_path / "plain"))["n03/d.jpg"] == ("n03",)
    (folder / "n01" / "a.jpg").rename(folder / "n03" / "a.jpg")
    with pytest.raises(ValueError, match="holds a build of other files or options"):
        build(folder, tmp_path / "plain")


def test_links_and_classes_of_one_name(folder, tmp_path):
    (folder / "n03" / "d.jpg").rename(tmp_path / "d.jpg")
    (folder / "n03" / "d.jpg").symlink_to(tmp_path / "d.jpg")
    (tmp_path / "names.txt").write_text("n01 fox\nn02 fox, x\nn03 cat\n")
    options = {"names": str(tmp_path / "names.txt"), "max_bad_share": 0.25}
    report = build(folder, tmp_path / "out", **options)
    assert [*report["dropped"].values()] == [1]
    assert (report["distinct concepts"], report["seen"]) == (2, 4)
    report = build(folder, tmp_path / "followed", **options, follow_links=True)
    assert (report["examples"], report["dropped"]) == (4, {})


@pytest.mark.parametrize(("label", "name"), [(-1, None), (0, "a"), (1, "b"), (2, None), (3, None)])
def test_labels_without_a_name_are_dropped(label, name):
    class Reader(classes.ClassReader):
        def images(self, items):
            assert items == range(2, 3)  # of three items the second shard of two
            yield "x.jpg", label, b"photo"

    reader, tally = Reader(["a", "b", ""], None, num_items=3, shard_size=2), Tally()
    found = [pair.caption for pair in reader.pairs(1, tally)]
    assert (found, tally.seen) == ([name] if name else [], 1)
    assert dict(tally.dropped) == ({} if name else {"class without a name": 1})


def test_photos_are_in_the_order_of_their_names_whatever_the_disk_says(folder, monkeypatch):
    rglob = pathlib.Path.rglob
    monkeypatch.setattr(pathlib.Path, "rglob", lambda path, pattern: reversed(sorted(rglob(path, pattern))))
    reader = classes.FolderReader(folder, None, shard_size=9, follow_links=False)
    assert [name for name, *_ in reader.images(range(4))] == ["n01/a.jpg", "n01/deep/c.png", "n02/b.JPEG", "n03/d.jpg"]


def test_examples_of_tfds_are_called_as_their_files():
    reader, parts = classes.TfdsReader.__new__(classes.TfdsReader), []
    rows = [{"filename": b"a.jpg"}, {"file_name": b"b.jpg", "filename": b"x"}, {}]
    examples = [row | {"label": i, "image": b"photo"} for i, row in enumerate(rows)]
    info = types.SimpleNamespace(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    builder = types.SimpleNamespace(info=info, as_data_source=lambda split, decoders: parts.append(split) or examples)
    reader._builder, reader._split = lambda: builder, "val"
    assert [*reader.images(range(4, 7))] == [("a.jpg", 0, b"photo"), ("b.jpg", 1, b"photo"), ("val/6", 2, b"photo")]
    assert parts == ["val[4:7]"]


def test_lists_of_names(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("red fox\tVulpes_vulpes \nn02\tshark, man-eater\nn03 a b,c\n")
    assert classes.read_names(path) == {"red fox": "Vulpes vulpes", "n02": "shark", "n03": "a b"}
    path.write_text("n01\tfox\nn02 , b\n")
    with pytest.raises(ValueError, match="has no name in line 2"):
        classes.read_names(path)


def test_what_does_not_fit_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "others.txt").write_text("n99 whale\n")
    for source, options, message in (
        (folder / "f.jpg", {}, "is no folder; classes takes a folder of class folders, or one of TFDS"),
        (tmp_path / "empty", {}, "has no photos in folders of classes"),
        (folder, {"names": "absent.txt"}, "--names=absent.txt does not exist"),
        (folder, {"names": str(tmp_path / "others.txt")}, r"has none of the 3 classes of the input, like \['n01'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="--names says what classes are called; image_text names its own"):
        building.build("image_text", input=str(folder), output=str(tmp_path / "out"), names="names.txt")


class Labelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Photos with the labels 2, 1, 0, as TFDS writes them."""

    VERSION = tfds.core.Version("1.0.0")
    LABEL = {"names": ["n01", "n02", "n03"]}  # noqa: RUF012

    def _info(self):
        label = tfds.features.ClassLabel(**self.LABEL)
        features = {"image": tfds.features.Image(), "label": label, "file_name": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {"image": jpeg(seed=i), "label": 2 - i, "file_name": f"{i}.JPEG"}


@pytest.mark.parametrize("form", ["tfrecord", "array_record"])
def test_a_data_set_of_tfds(tmp_path, form):
    (tmp_path / "names.txt").write_text("n01 tench\nn02 shark\nn03 fox\n")
    builder = Labelled(data_dir=str(tmp_path / "tfds"), file_format=form)
    builder.download_and_prepare()
    options = {"names": str(tmp_path / "names.txt"), "shard_size": 2}
    report = build(builder.data_dir, tmp_path / "out", split="validation", **options)
    assert pairs(tmp_path / "out") == [("0.JPEG", ("fox",)), ("1.JPEG", ("shark",)), ("2.JPEG", ("tench",))]
    assert read_built(str(tmp_path / "out"), Kind.IMAGE_TEXT)[1].image == jpeg(seed=1)
    assert report["inputs"][str(builder.data_dir)]["examples"] == 3
    with pytest.raises(ValueError, match="has no split 'train', only validation"):
        build(builder.data_dir, tmp_path / "other")
    path = tmp_path / "tfds" / "labelled" / "1.0.0" / "features.json"
    path.write_text(path.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "os.Evil"))
    with pytest.raises(ValueError, match=r"names the class 'os\.Evil', which is none of TFDS's features"):
        build(builder.data_dir, tmp_path / "other", split="validation")


class Numbered(Labelled, skip_registration=True):
    """The same without names of its labels."""

    LABEL = {"num_classes": 3}  # noqa: RUF012


def test_labels_without_names_are_numbers(tmp_path):
    (tmp_path / "names.txt").write_text("0 tench\n1 shark\n2 fox\n")
    builder = Numbered(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    build(builder.data_dir, tmp_path / "out", split="validation", names=str(tmp_path / "names.txt"))
    assert pairs(tmp_path / "out") == [("0.JPEG", ("fox",)), ("1.JPEG", ("shark",)), ("2.JPEG", ("tench",))]


def test_streams_of_class_names_are_apart_and_repeated(folder, tmp_path, micro):
    build(folder, tmp_path / "in1k")
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(seed=i))
    (tmp_path / "pairs.tsv").write_text("".join(f'{i}.jpg\ta {i}\t["b", "c"]\n' for i in range(9)))
    micro.image_text.pairs, micro.image_text.images = str(tmp_path / "pairs.tsv"), str(tmp_path)
    micro.image_text.data, micro.image_text.weight = (str(tmp_path / "in1k"),), 2.0
    pairs, named = train_streams(micro)
    assert (pairs.name, pairs.class_names, pairs.weight) == ("image_text/64x64", False, 2.0)
    assert (named.name, named.class_names, named.weight) == ("image_text/64x64/classes", True, 6.0)
    assert (named.capacities["table"], named.capacities["captions"], pairs.capacities["captions"]) == (8, 1, 9)
    assert (pairs.num_examples, named.num_examples) == (9, 4)
    batch = named.batch(0)
    assert batch.class_names.all()
    assert batch.concept_mask.sum() == 3  # a name once, whatever the number of its images
    assert pairs.batch(0).class_names is None
    micro.image_text.source_weights = (1.0, 0.5)
    assert [(stream.class_names, stream.weight) for stream in train_streams(micro)] == [(False, 2.0), (True, 1.0)]
    micro.image_text.batch_size = 16
    assert train_streams(micro)[1].capacities["table"] == 8  # three names, however many images
