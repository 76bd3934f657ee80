"""Webdataset archives as tools and broken downloads leave them: nothing of them is lost without being counted."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import random
import tarfile
import time
import tracemalloc

import pytest

from detclipv2_jax.prepare import image_text
from detclipv2_jax.prepare.record_builder import Tally

EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))


def tar(files, *, end=True, file_format=tarfile.PAX_FORMAT):
    """Bytes of a tar of (name, content) pairs and members, without the zeros that end it unless `end`."""
    buffer = io.BytesIO()
    archive = tarfile.open(fileobj=buffer, mode="w", format=file_format)  # noqa: SIM115  (it is closed if it is to end)
    for file in files:
        if isinstance(file, tarfile.TarInfo):
            archive.addfile(file)
            continue
        name, content = file
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    if end:
        archive.close()
    return buffer.getvalue()


def samples(numbers, *, size=100):
    for number in numbers:
        yield f"{number}.jpg", random.Random(number).randbytes(size)
        yield f"{number}.txt", b"caption %d" % number


def read(tmp_path, data, name="0.tar"):
    """The pairs of an archive, as (key, image, caption), and what was counted."""
    (tmp_path / name).write_bytes(data)
    reader = image_text.open_reader(str(tmp_path / name), "", shard_size=10, pipeline="", max_phrases=8)
    tally = Tally()
    return [(pair.name, pair.image, pair.caption) for pair in reader.pairs(0, tally)], tally


def whole(pairs, numbers):
    return [pair[2] for pair in pairs] == [f"caption {number}" for number in numbers]


PACKERS = {
    "0.tar": bytes,
    "0.tar.gz": gzip.compress,
    "0.tgz": gzip.compress,
    "0.tar.bz2": bz2.compress,
    "0.tar.xz": lzma.compress,
}


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("parts", [1, 2, 3, 60])
def test_archives_in_several_parts_are_read_to_their_end(tmp_path, name, parts):
    pack = PACKERS[name]
    # one archive, cut and compressed in parts; and whole archives, one after the other
    one = tar(samples(range(60)))
    bounds = [len(one) * i // parts for i in range(parts + 1)]
    cut = b"".join(pack(one[start:end]) for start, end in itertools.pairwise(bounds))
    several = b"".join(pack(tar(samples(range(i * 60 // parts, (i + 1) * 60 // parts)))) for i in range(parts))
    for data in (cut, several):
        pairs, tally = read(tmp_path, data, name)
        assert whole(pairs, range(60))
        assert tally.seen == 60
        assert not tally.dropped
        assert not tally.noted


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.tar.bz2", "0.tar.xz"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_cut_anywhere_is_counted(tmp_path, name, parts):
    """But where a whole archive ends, which nobody can tell from the end of the file."""
    pack = PACKERS[name]
    one = tar(samples(range(10)))
    data = b"".join(map(pack, (one[: len(one) // 2], one[len(one) // 2 :]) if parts == 2 else (one,)))
    places = range(len(data)) if EXHAUSTIVE else random.Random(0).sample(range(len(data)), 150)
    for place in places:
        pairs, tally = read(tmp_path, data[:place], name)
        assert whole(pairs, range(10)) or tally.dropped["tar cut or damaged"] == 1, place
        assert whole(pairs, range(len(pairs)))
        assert tally.seen >= len(pairs) + sum(tally.dropped.values())


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tar.bz2", "0.tar.xz"])
def test_flipped_bits_of_compressed_archives_are_counted(tmp_path, name):
    data = PACKERS[name](tar(samples(range(10))))
    expected, _ = read(tmp_path, data, name)
    places = range(8 * len(data)) if EXHAUSTIVE else random.Random(1).sample(range(8 * len(data)), 150)
    for place in places:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        pairs, tally = read(tmp_path, bytes(flipped), name)
        assert pairs == expected or tally.dropped["tar cut or damaged"] == 1, place


@pytest.mark.parametrize("file_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path, file_format):
    data = tar(samples(range(10)), file_format=file_format)
    for header in range(0, 20 * 1024, 1024):
        for place in (0, 100, 124, 148, 156):  # name, mode, size, checksum, type
            damaged = bytearray(data)
            damaged[header + place] ^= 1
            pairs, tally = read(tmp_path, bytes(damaged))
            assert whole(pairs, range(10)) or tally.dropped["tar cut or damaged"] == 1, (header, place)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"x" * 2000,
        gzip.compress(b"", mtime=0),
        b"\x1f\x8b",
        tar(samples(range(2))) + b"garbage" * 100,
        bytes(600),
    ],
)
def test_what_is_no_archive_is_counted(tmp_path, data):
    pairs, tally = read(tmp_path, data)
    assert tally.dropped["tar cut or damaged"] == 1
    assert len(pairs) in (0, 2)


@pytest.mark.parametrize("apart", [True, False])
def test_a_key_that_is_used_twice_gives_two_pairs(tmp_path, apart):
    first, other, again = (list(samples([n])) for n in (1, 2, 3))
    again = [(name.replace("3", "1"), content) for name, content in again]
    files = first + (other if apart else []) + again
    pairs, tally = read(tmp_path, tar(files))
    assert [caption for *_, caption in pairs] == [f"caption {n}" for n in ((1, 2, 3) if apart else (1, 3))]
    assert tally.noted == {"sample with the key of another": 1}
    # the files of two samples in turns: none is taken for the other's
    turns = [first[0], other[0], first[1], other[1]]
    pairs, tally = read(tmp_path, tar(turns))
    assert not pairs
    assert sum(tally.dropped.values()) == tally.seen == 4


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_samples_that_are_links_are_counted(tmp_path, kind, name):
    """As tar packs a file that has two names; the first one is behind when a stream comes to the second."""
    links = [tarfile.TarInfo(f"{number}.{suffix}") for number, suffix in ((7, "jpg"), (7, "txt"), (8, "txt"))]
    for link in links:
        link.type, link.linkname = kind, f"1.{link.name[2:]}"
    data = tar([*samples([1]), *links, ("8.jpg", b"image"), *samples([2])])
    pairs, tally = read(tmp_path, PACKERS[name](data), name)
    assert whole(pairs, [1, 2])
    assert tally.seen == 4
    assert tally.dropped == {"sample without an image": 1, "sample without a caption": 1}
    assert tally.noted == {"link in an archive left out": 3}


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"txt": b"", "json": b'{"caption": "of the json"}'}, "of the json"),
        ({"txt": b" \n\t", "json": b'\xef\xbb\xbf{"caption": "of the json"}'}, "of the json"),
        ({"json": b'{"caption": "of the json"}', "txt": b""}, "of the json"),
        ({"txt": b"\xef\xbb\xbf", "json": b'{"caption": "of the json"}'}, "of the json"),
        ({"txt": "text".encode("utf-16"), "json": b'{"caption": "of the json"}'}, "of the json"),
        ({"txt": b"\xef\xbb\xbfof the text", "json": b'{"caption": "of the json"}'}, "of the text"),
        ({"txt": b"", "json": b'{"caption": ["a"]}'}, None),
        ({"txt": b"", "json": b'{"caption": ""}'}, None),
        ({"json": b"[" * 100_000}, None),
        ({"json": b'{"caption": null}'}, None),
        ({"txt": "text".encode("utf-16")}, None),
    ],
)
def test_the_caption_is_the_first_that_says_something(tmp_path, files, caption):
    content = [("0.jpg", b"image"), *((f"0.{suffix}", data) for suffix, data in files.items())]
    pairs, tally = read(tmp_path, tar(content))
    assert [text for *_, text in pairs] == ([caption] if caption else [])
    assert sum(tally.dropped.values()) == (not caption)


def test_a_sample_is_bounded_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(image_text, "_MAX_SAMPLE_BYTES", 1 << 20)
    files = [("0.jpg", b"image"), ("0.txt", b"caption")]
    files += [(f"0.{suffix}", bytes(1 << 19)) for suffix in ("png", "webp", "bmp", "gif", "tif", "tiff")]
    files += [(f"0.part{i}", bytes(1 << 19)) for i in range(64)]  # what is not read does not count
    data = gzip.compress(tar([*files, *samples([1])]))
    tracemalloc.start()
    pairs, tally = read(tmp_path, data, "0.tar.gz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [caption for *_, caption in pairs] == ["caption", "caption 1"]
    assert tally.noted == {f"file beyond {1 << 20} bytes of a sample left out": 5}
    assert peak < 4 << 20


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_without_end_takes_no_memory(tmp_path, kind):
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 1 << 28
    data = gzip.compress(tar(samples([0]), end=False) + member.tobuf() + bytes(member.size), 1)
    assert len(data) < 2 << 20
    tracemalloc.start()
    pairs, tally = read(tmp_path, data, "0.tar.gz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole(pairs, [0])
    assert tally.dropped == {"tar cut or damaged": 1}
    assert peak < 8 << 20


def test_headers_without_end_and_zeros_without_end_are_counted(tmp_path):
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 0
    for more in (member.tobuf() * 20_000, bytes(1 << 26)):
        pairs, tally = read(tmp_path, gzip.compress(tar(samples([0]), end=False) + more, 1), "0.tar.gz")
        assert whole(pairs, [0])
        assert tally.dropped == {"tar cut or damaged": 1}


@pytest.mark.parametrize("size", [1 << 50, 1 << 80, -512, -(1 << 50)])
@pytest.mark.parametrize("in_header", [True, False])
@pytest.mark.parametrize("suffix", ["jpg", "txt", "cls"])
def test_a_file_of_any_size_in_an_archive_takes_no_time(tmp_path, size, in_header, suffix):
    member = tarfile.TarInfo(f"1.{suffix}")
    member.size = size if in_header else 0
    if not in_header:
        member.pax_headers = {"size": str(size)}
    header = member.tobuf(tarfile.GNU_FORMAT if in_header else tarfile.PAX_FORMAT)
    data = tar(samples([0]), end=False) + header + tar([("1.jpg", b"image"), ("1.txt", b"caption 1")])
    for name, pack in (("0.tar", bytes), ("0.tar.gz", gzip.compress)):
        start = time.process_time()
        pairs, tally = read(tmp_path, pack(data), name)
        assert time.process_time() - start < 5
        assert whole(pairs[:1], [0])
        assert tally.dropped["tar cut or damaged"] == 1


def test_a_folder_is_read_whatever_packs_its_archives(tmp_path):
    for number, (suffix, pack) in enumerate(PACKERS.items()):
        (tmp_path / f"{number}{suffix[1:]}").write_bytes(pack(tar(samples([number]))))
    (tmp_path / "notes.txt").write_text("x")
    reader = image_text.open_reader(str(tmp_path), "", shard_size=10, pipeline="", max_phrases=8)
    assert reader.num_shards == len(PACKERS)
    for shard in range(reader.num_shards):
        assert whole(reader.pairs(shard, Tally()), [shard])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    (tmp_path / "0.tar").write_bytes(b"")
    make(tmp_path / "1.tar")
    for place in (tmp_path, tmp_path / "1.tar"):
        with pytest.raises(ValueError, match=r"1\.tar (is no file|has no \.tar)|has no \.tar"):
            image_text.open_reader(str(place), "", shard_size=10, pipeline="", max_phrases=8)


def test_a_damaged_parquet_is_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "0.parquet").write_bytes(b"PAR1" + bytes(40))
    reader = image_text.open_reader(str(tmp_path), "", shard_size=10, pipeline="", max_phrases=8)
    with pytest.raises(ValueError, match=r"0\.parquet is damaged: .*download it again"):
        list(reader.pairs(0, Tally()))


def test_a_parquet_whose_times_are_out_of_range_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"key": ["0"], "caption": pyarrow.array([2**31 - 1], pyarrow.date32())}
    parquet.write_table(pyarrow.table(table), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet is damaged: .*download it again, or remove it"):
        read(tmp_path, tar([("0.jpg", b"image")]))


def test_the_caption_of_the_parquet_is_the_last_that_is_taken(tmp_path):
    table = pytest.importorskip("pyarrow").table({"key": ["0"], "caption": ["of the table"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "0.parquet")
    for content, caption in (({"caption": "of the json"}, "of the json"), ({"caption": " "}, "of the table")):
        files = [("0.jpg", b"image"), ("0.txt", b""), ("0.json", json.dumps(content).encode())]
        ((*_, found),), _ = read(tmp_path, tar(files))
        assert found == caption
