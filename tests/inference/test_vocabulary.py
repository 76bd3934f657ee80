"""Stored vocabularies: used when they fit, refused when they do not."""

import json
import logging

import numpy as np
import pytest

from detclipv2_jax.inference import vocabulary

TEXT_CONFIG = {"width": 4, "context_length": 16}


class _Tower:
    """Counts what it encodes."""

    def __init__(self):
        self.encoded = []

    def __call__(self, texts):
        self.encoded.append(list(texts))
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)


def _cache(folder, *, params=1.0, **config):
    tower = _Tower()
    params = {"layer": {"kernel": np.full((2, 2), params, np.float32)}}
    return vocabulary.Cache(tower, config=TEXT_CONFIG | config, params=params, folder=folder), tower


def test_stored_words_are_not_encoded_again(tmp_path):
    cache, tower = _cache(tmp_path / "words")
    first = cache(["cat", "red car"])
    np.testing.assert_array_equal(cache(["cat", "red car"]), first)
    assert tower.encoded == [["cat", "red car"]]
    again, tower = _cache(tmp_path / "words")
    np.testing.assert_array_equal(again(["cat", "red car"]), first)
    assert not tower.encoded
    again.remember(["dog"], first)
    assert again(["dog"]) is first
    assert not tower.encoded
    assert len(again.path(["cat"]).stem) == 16  # digits of a hash
    assert [path.suffix for path in (tmp_path / "words").iterdir()] == [".npz"]


def test_the_last_words_are_kept_in_memory():
    cache, tower = _cache(None)
    for texts in (["cat"], ["cat"], ["dog"], ["cat"]):
        cache(texts)
    assert tower.encoded == [["cat"], ["dog"], ["cat"]]


def test_anything_that_changes_embeddings_changes_the_key(tmp_path, monkeypatch):
    keys = [_cache(None)[0].key(texts) for texts in (["cat"], ["dog"], ["cat", "dog"], ["dog", "cat"], ["cat, a pet"])]
    keys += [_cache(None, params=2.0)[0].key(["cat"]), _cache(None, width=8)[0].key(["cat"])]
    monkeypatch.setattr(vocabulary.tokenizer, "tokenize", lambda texts, max_length: np.zeros((len(texts), max_length)))
    keys.append(_cache(None)[0].key(["cat"]))  # another tokenizer
    assert len(set(keys)) == len(keys)


def test_a_stale_file_is_refused_and_replaced(tmp_path, caplog):
    dog, _ = _cache(tmp_path)
    dog(["dog"])
    cat, tower = _cache(tmp_path)
    path = cat.path(["cat"])
    dog.path(["dog"]).rename(path)  # under the wrong name
    with pytest.raises(ValueError, match=r"is stale: its words, template, tokenizer or text weights were others"):
        vocabulary.load(path, key=cat.key(["cat"]))
    with caplog.at_level(logging.WARNING, logger="absl"):
        np.testing.assert_array_equal(cat(["cat"]), [[3, ord("c")]])
    assert "is stale" in caplog.text
    assert tower.encoded == [["cat"]]
    np.testing.assert_array_equal(vocabulary.load(path, key=cat.key(["cat"])), [[3, ord("c")]])


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04broken"])
def test_a_broken_file_is_refused(tmp_path, caplog, content):
    cache, tower = _cache(tmp_path)
    cache.path(["cat"]).write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="absl"):
        cache(["cat"])
    assert "cannot be read" in caplog.text
    assert tower.encoded == [["cat"]]


def test_objects_are_never_unpickled(tmp_path):
    cache, _ = _cache(tmp_path)
    path = cache.path(["cat"])
    np.savez(path, embeddings=np.array([{}], object), key=np.array(cache.key(["cat"])))
    with pytest.raises(ValueError, match=r"cannot be read: .*allow_pickle=False"):
        vocabulary.load(path, key=cache.key(["cat"]))


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache, _ = _cache(tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert len(cache(["cat"])) == 1
    assert "is not kept" in caplog.text


def test_padding():
    padded, mask = vocabulary.pad(np.ones((5, 3), np.float32), multiple=4)
    assert padded.shape == (8, 3)
    assert mask.tolist() == [True] * 5 + [False] * 3
    assert not padded[5:].any()
    assert vocabulary.pad(np.ones((4, 3), np.float32), multiple=4)[0].shape == (4, 3)


def test_long_texts_are_named_once(caplog):
    long = "a very long description of something with many more words than sixteen tokens can ever hold at once"
    with caplog.at_level(logging.WARNING, logger="absl"):
        vocabulary.warn_truncated(["cat", long, long + " again"], max_length=16)
        vocabulary.warn_truncated(["cat", "a b c d e f g h i j k l m n"], max_length=16)  # the second has just 16
    (record,) = caplog.records
    with caplog.at_level(logging.WARNING, logger="absl"):
        vocabulary.warn_truncated([f"{i} {long}" for i in range(4)], max_length=16)
    assert [f"“{i} {long}”" in caplog.records[1].getMessage() for i in range(4)] == [True, True, True, False]
    assert caplog.records[1].getMessage().endswith("” …")
    assert record.getMessage().startswith("2 of 3 concepts have more than 16 tokens and lose their end: “a very long")


def test_words(tmp_path):
    assert vocabulary.parse_words(" cat, red car ,cat,") == {"cat": "", "red car": ""}
    assert vocabulary.parse_words("ram: male sheep, dog") == {"ram": "male sheep", "dog": ""}
    path = tmp_path / "words.txt"
    path.write_text("aerosol_can\nram: an adult, male sheep\nowl\ta bird: of prey\n\ncat\n", encoding="utf-8")
    words = vocabulary.parse_words("cat", words_file=str(path))
    assert words == {"cat": "", "aerosol can": "", "ram": "an adult, male sheep", "owl": "a bird: of prey"}
    assert vocabulary.parse_words("ram", words_file=str(path))["ram"] == "an adult, male sheep"
    categories = [{"id": 4, "name": "wild_cat", "def": "not tame"}, {"id": 9, "name": "dog"}]
    (tmp_path / "lvis.json").write_text(
        json.dumps({"images": [{"id": 1}], "annotations": [], "categories": categories})
    )
    assert vocabulary.parse_words("owl", words_file=str(tmp_path / "lvis.json")) == {
        "wild cat": "not tame", "dog": "", "owl": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match='no words: give --words="cat, red car"'):
        vocabulary.parse_words(" , ")
    with pytest.raises(ValueError, match=r"--words_file: cannot read .*absent\.txt"):
        vocabulary.parse_words("cat", words_file=str(tmp_path / "absent.txt"))


def test_vocabularies_by_name(shared_data):
    """In the order of the published ids."""
    published = json.loads((shared_data / "categories" / "lvis_v1_categories.json").read_text())
    words = vocabulary.parse_words("unicorn, mug: of mine", vocabulary="lvis")
    expected = dict.fromkeys((category["name"].replace("_", " ") for category in published), "")
    assert words == expected | {"mug": "of mine", "unicorn": ""}
    assert len(words) == 1204
    assert list(words)[:2] == ["aerosol can", "air conditioner"]
    coco = json.loads((shared_data / "categories" / "coco_to_synset.json").read_text())
    ordered = sorted(coco, key=lambda name: coco[name]["coco_cat_id"])
    assert vocabulary.parse_words("", vocabulary="coco") == dict.fromkeys(ordered, "")
    assert len(vocabulary.named("objects365")) == 365
    with pytest.raises(ValueError, match=r"'LVS'; there are lvis, coco, objects365; did you mean lvis\?"):
        vocabulary.parse_words("", vocabulary="LVS")


def test_vocabularies_have_the_categories_in_their_order():
    for name, num, first in (("lvis", 1203, "aerosol can"), ("coco", 80, "person"), ("objects365", 365, "person")):
        words = vocabulary.parse_words("mug: of mine, unicorn", vocabulary=name)
        assert next(iter(words)).casefold() == first
        assert len(vocabulary.named(name).names) == num
        assert words["mug"] == "of mine"
        assert list(words)[-1] == "unicorn"
    with pytest.raises(
        ValueError, match=r"--vocabulary is 'LVS'; there are lvis, coco, objects365; did you mean lvis\?"
    ):
        vocabulary.named("LVS")
    with pytest.raises(ValueError, match=r"'zebra'; there are lvis, coco, objects365$"):
        vocabulary.named("zebra")


def test_the_key_of_weights_tells_names_shapes_types_and_values():
    kernel = np.arange(6, dtype=np.float32)
    others = [
        {"b": kernel},
        {"a": kernel.reshape(2, 3)},
        {"a": kernel.astype(np.int32)},
        {"a": np.maximum(kernel, 1)},
    ]
    keys = {vocabulary.weights_key(tree) for tree in ({"a": kernel}, *others)}
    assert len(keys) == 5
    assert vocabulary.weights_key({"a": kernel.reshape(2, 3).T}) != vocabulary.weights_key({"a": kernel.reshape(3, 2)})
    assert vocabulary.weights_key({"a": kernel.copy()}) in keys
