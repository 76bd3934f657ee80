"""Texts of every encoding and names of every kind, in each of the readers."""

import collections
import json
import struct

import ml_dtypes
import numpy as np
import pytest

from detclipv2_jax.convert import reading
from detclipv2_jax.data import box_json, phrases, sources
from detclipv2_jax.data.concepts import read_dictionary
from detclipv2_jax.inference.vocabulary import parse_words
from detclipv2_jax.prepare import __main__ as prepare
from detclipv2_jax.prepare import dictionary, image_text, record_builder

MARK = b"\xef\xbb\xbf"
IMAGES = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60, "caption": "a cat and a dog"} for i in range(3)]
BOXES = [{"id": 1 + i, "image_id": i, "category_id": 1, "bbox": [1, 2, 20, 10]} for i in range(3)]
DETECTION = {"images": IMAGES, "annotations": BOXES, "categories": [{"id": 1, "name": "Käfer"}]}
GROUNDING = {"images": IMAGES, "annotations": [{**box, "tokens_positive": [[0, 5]]} for box in BOXES]}


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"is not decoded here")
    return tmp_path


def with_ends(text, end, mark):
    return mark + text.replace("\n", end).encode()


READERS = {
    "pairs": ("0.jpg\tein Käfer\n1.jpg\ta dog\n2.jpg\tan owl\n", lambda path, folder: [
        sources.read_pairs(str(path), str(folder))[i].caption for i in range(3)
    ]),
    "dictionary": ("Käfer\tsix legs\nowl\ta bird\n", lambda path, _: read_dictionary(path)),
    "dictionary with a header": ("name\tdefinition\nKäfer\tsix legs\n", lambda path, _: read_dictionary(path)),
    "words": ("Käfer: six legs\nowl\nred car\ta car\n", lambda path, _: parse_words("", words_file=str(path))),
    "detection json": (json.dumps(DETECTION, ensure_ascii=False), lambda path, folder: (
        box_json.read_detection(str(path), str(folder)).vocabulary
    )),
    "grounding json": (json.dumps(GROUNDING), lambda path, folder: (
        box_json.read_grounding(str(path), str(folder)).vocabulary
    )),
    "words of a json": (json.dumps(DETECTION), lambda path, _: parse_words("", words_file=str(path))),
    "names of a csv": ("1,x,Käfer\n2,y,owl\n", lambda path, _: list(dictionary.read_names(path, {}))),
    "names of a json": (json.dumps(DETECTION), lambda path, _: list(dictionary.read_names(path, {}))),
}  # fmt: skip
SUFFIXES = {
    "pairs": "tsv",
    "dictionary": "tsv",
    "dictionary with a header": "tsv",
    "words": "txt",
    "names of a csv": "csv",
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_change_nothing(folder, name, mark, end):
    text, read = READERS[name]
    path = folder / f"text.{SUFFIXES.get(name, 'json')}"
    path.write_bytes(text.encode())
    expected = read(path, folder)
    assert "\ufeff" not in str(expected)
    path.write_bytes(with_ends(text, end, mark))
    assert read(path, folder) == expected


@pytest.mark.parametrize("name", ["pairs", "dictionary", "words", "names of a csv"])
def test_a_mark_within_a_file_that_was_joined_of_several_is_no_letter(folder, name):
    text, read = READERS[name]
    path = folder / f"text.{SUFFIXES[name]}"
    path.write_bytes(text.encode())
    expected = read(path, folder)
    path.write_bytes(b"".join(MARK + line.encode() for line in text.splitlines(keepends=True)))
    assert read(path, folder) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", '1,"cat\n2,dog\n'), ("a.csv", f"1,{'x' * 200_000}\n"), ("a.csv", "1,cat\n2,\n"), ("a.csv", "1,_\n"),
        ("b/vocabulary.json", "null"), ("b/vocabulary.json", "[]"), ("b/vocabulary.json", "{}"),
        ("b/vocabulary.json", '{"names": ["cat"], "definitions": [], "category_ids": [1]}'),
        ("b/phrases.tsv", "cat\n"), ("b/phrases.tsv", "cat\t1\t2\n"), ("b/phrases.tsv", "cat\tmany\n"),
    ],
)  # fmt: skip
def test_damaged_inputs_of_a_dictionary_are_one_error_that_names_them(tmp_path, name, text):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/vocabulary.json").write_text('{"names": ["cat"], "definitions": [""], "category_ids": []}')
    assert dictionary.read_names(tmp_path / "b", collections.Counter()) == []
    (tmp_path / name).write_text(text)
    path = tmp_path / name.split("/")[0]
    with pytest.raises(ValueError, match=f"^--input: {path}"):
        dictionary.read_names(path, collections.Counter())


@pytest.mark.parametrize(
    "text", ['{"cat": "an animal"}', '[{"name": "cat"}]', ' ["cat", "dog"]', '{"cat": ""}\n{"dog": ""}']
)
def test_a_json_is_no_dictionary(tmp_path, text):
    (tmp_path / "d.tsv").write_text(text)
    with pytest.raises(ValueError, match=r"d\.tsv is a json; it is to be a TSV"):
        read_dictionary(tmp_path / "d.tsv")


@pytest.mark.parametrize("caption", ["", " ", "\u200b\u200d", "\u2060", "\u00a0", "\u200e"])
def test_captions_of_which_nothing_is_seen_are_empty(folder, caption):
    path = folder / "pairs.tsv"
    path.write_text(f"0.jpg\ta cat\n1.jpg\t{caption}\n2.jpg\t…\n", encoding="utf-8")
    source = sources.read_pairs(str(path), str(folder), max_bad_share=0.5)
    assert [source[i].caption for i in range(len(source))] == ["a cat", "…"]
    assert source.counters == {"with an empty caption": 1}
    reader = image_text.open_reader(str(path), str(folder), shard_size=9, pipeline="", max_phrases=1)
    tally = record_builder.Tally()
    assert len(list(reader.read(0, tally))) == 2
    assert tally.dropped == {"empty caption": 1}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("index.noun", "cat n\n"), ("index.noun", "cat n 1 x 1 0 1\n"), ("index.noun", "cat n 1 0 1 0 99\n"),
        ("noun.exc", "cats\n"), ("data.noun", "00000000\n"), ("data.noun", ""),
    ],
)  # fmt: skip
def test_a_damaged_wordnet_is_one_error_that_names_it(tmp_path, file, text):
    whole = {"index.noun": "cat n 1 0 1 0 0\n", "noun.exc": "cats cat\n", "data.noun": "00000000 05 n | an animal\n"}
    for name, content in whole.items():
        (tmp_path / name).write_text(content)
    assert dictionary.WordNet(str(tmp_path)).senses("cats")[0].gloss == "an animal"
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"--wordnet: {tmp_path} is damaged or of another form"):
        dictionary.WordNet(str(tmp_path)).senses("cat")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_refused_by_name_in_every_reader(folder, name, encoding):
    text, read = READERS[name]
    path = folder / f"text.{SUFFIXES.get(name, 'json')}"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"{path.name} is UTF-(16|32).*save it as UTF-8"):
        read(path, folder)


@pytest.mark.parametrize(
    "name", [None, "", " ", "_", "\t", "__", "\u200b\x01", True, ["cat"], {"en": "cat"}, "missing"]
)
def test_a_category_without_a_name_is_one_error_that_shows_it(folder, name):
    category = {"id": 1} if name == "missing" else {"id": 1, "name": name}
    content = DETECTION | {"categories": [{"id": 2, "name": "owl"}, category]}
    (folder / "boxes.json").write_text(json.dumps(content))
    for read in (
        lambda: box_json.read_detection(str(folder / "boxes.json"), str(folder)),
        lambda: parse_words("", words_file=str(folder / "boxes.json")),
        lambda: list(dictionary.read_names(folder / "boxes.json", {})),
    ):
        with pytest.raises(ValueError, match=r"boxes\.json.*name") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["\tdefinition", " \tdefinition", "_\tdefinition", "\u200b\tdefinition"])
def test_a_dictionary_names_the_line_without_a_name(tmp_path, line):
    (tmp_path / "dictionary.tsv").write_text(f"name\tdefinition\n\ncat\tan animal\n\n{line}\n")
    with pytest.raises(ValueError, match="has no name in line 5"):
        read_dictionary(tmp_path / "dictionary.tsv")


@pytest.mark.parametrize("kind", ["file_name", "coco_url"])
@pytest.mark.parametrize("place", ["", "images", ".."])
def test_images_of_lvis_are_found_without_being_told_where(tmp_path, kind, place):
    url = "http://images.example/val2017/000000000042.jpg"
    image = {"id": 42, "height": 40, "width": 60, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    image |= {"coco_url": url} if kind == "coco_url" else {"file_name": "val2017/000000000042.jpg"}
    (tmp_path / "annotations").mkdir()
    photo = (tmp_path / "annotations" / place / "val2017" / "000000000042.jpg").resolve()
    photo.parent.mkdir(parents=True)
    photo.touch()
    path = tmp_path / "annotations" / "lvis.json"
    path.write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
    assert (tmp_path / "annotations" / place).samefile(prepare._find_images("lvis", path))


def test_captions_are_normalised_without_tensorflow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow", None)
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_text", None)
    assert phrases.normalize(["ﬁne  café", "e\u0301t\u00e9\u2003x", "Ｆｕｌｌ", "a  b"]) == [
        "fine café",
        "été x",
        "Full",
        "a b",
    ]


def write_tensor(path, kind, data, shape):
    header = json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2), ("BF16", ml_dtypes.bfloat16)],
)
def test_small_floats_of_safetensors_are_read(tmp_path, kind, dtype):
    values = np.array([[1.5, -2.0], [0.25, 448.0]], np.float32)
    values = values.astype(dtype).astype(np.float32)  # what the type holds of them
    write_tensor(tmp_path / "x.safetensors", kind, values.astype(dtype).tobytes(), [2, 2])
    read = reading.read(tmp_path / "x.safetensors")["w"]
    np.testing.assert_array_equal(read.astype(np.float32), values)
    assert read.dtype.name == ("bfloat16" if kind == "BF16" else "float32")


def test_other_types_of_safetensors_are_one_error(tmp_path):
    write_tensor(tmp_path / "x.safetensors", "F8_E8M0", bytes(4), [4])
    with pytest.raises(ValueError, match=r"tensors of a type other than .*: w \(F8_E8M0\)"):
        reading.read(tmp_path / "x.safetensors")
