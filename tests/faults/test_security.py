"""Hostile files: pickles, archives with paths out, images that cost more than they hold.

Pickled weights: tests/convert/test_convert.py; names and links out of the image folder: tests/data/test_sources.py;
what an exported loader allocates: tests/test_export.py; secrets: test_environment.py.
"""

import hashlib
import io
import os
import pathlib
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.data import transforms
from detclipv2_jax.data.built import INDEX, BuiltSource
from detclipv2_jax.data.schema import Kind, UnusableError
from detclipv2_jax.eval.result import Parts, Rows
from detclipv2_jax.prepare import image_text
from detclipv2_jax.prepare.record_builder import Tally


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def test_arrays_of_objects_are_never_unpickled(tmp_path):
    trap = np.array([Trap(tmp_path / "sprung")], object)
    np.savez(tmp_path / INDEX, sizes=trap, num_concepts=trap)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        BuiltSource(tmp_path, kind=Kind.DETECTION, vocabulary=None, counters={}, num=0)
    # what a killed evaluation left: a part that cannot be read is predicted again
    parts = Parts(tmp_path, fingerprint={})
    rows = Rows(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, 4), np.float32), np.zeros(1, np.float32))
    parts.add(rows)
    parts.write()
    (path,) = tmp_path.glob(".partial*/*.rows")
    buffer = io.BytesIO()
    np.savez(buffer, batches=np.array([0, 1]), image_ids=trap, category_ids=trap, boxes=trap, scores=trap)
    path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    assert Parts(tmp_path, fingerprint={}).done == 0
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / INDEX, allow_pickle=True)["sizes"]
    assert (tmp_path / "sprung").exists()  # the trap works


def test_nothing_of_an_archive_is_written_anywhere(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name in ("../evil", str(tmp_path / "evil"), "a/../../evil"):
            for suffix, content in ((".jpg", b"image"), (".txt", b"a caption")):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../secret")):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, target
            archive.addfile(link)
    reader = image_text.open_reader(str(folder), "", shard_size=10, pipeline="", max_phrases=8)
    assert [pair.image for pair in reader.pairs(0, Tally())] == [b"image"] * 3
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [
        pathlib.Path("inside"), pathlib.Path("inside/0.tar")
    ]  # fmt: skip


def progressive_jpeg(side, num_scans):
    """A progressive JPEG whose last scan comes again and again; each costs a pass over all pixels."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num_scans + b"\xff\xd9"


def png(side):
    """A PNG of a few bytes that says it has side × side pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: progressive_jpeg(4096, 500), "too many scans"),
        (lambda: png(20_000), "pixels"),
        (lambda: png(2**31 - 1), "pixels"),
    ],
)
def test_images_that_cost_more_than_they_hold_are_refused_before_they_are_decoded(data, message, monkeypatch):
    data = data()
    assert len(data) < 1_000_000
    monkeypatch.setattr(transforms, "decode", None)
    with pytest.raises(UnusableError, match=message):
        transforms.place(data, np.zeros((64, 64, 3), np.uint8), annotated_size=(0, 0), short_side=64, long_side=64)


def test_progressive_photos_are_read():
    out = np.ones((64, 64, 3), np.uint8)
    transforms.place(progressive_jpeg(512, 3), out, annotated_size=(0, 0), short_side=64, long_side=64)
    assert not out.any()
