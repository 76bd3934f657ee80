"""Photos of every format, orientation and size: read once, turned once, bounded before they are decoded."""

import contextlib
import io
import os
import pathlib
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from detclipv2_jax.data import sources, transforms
from detclipv2_jax.data.schema import UnusableError
from detclipv2_jax.predict import inputs

CORNERS = np.zeros((40, 60, 3), np.uint8)
CORNERS[:20, :30], CORNERS[20:, :30], CORNERS[:20, 30:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(file_format, image=None, **options):
    buffer = io.BytesIO()
    (image or Image.fromarray(CORNERS)).save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


FORMATS = {
    "tiff": lambda o: encoded("TIFF", tiffinfo={274: o}),
    "tiff, LZW": lambda o: encoded("TIFF", compression="tiff_lzw", tiffinfo={274: o}),
    "tiff, gray": lambda o: encoded("TIFF", Image.fromarray(CORNERS[..., 0]), tiffinfo={274: o}),
    "big tiff": lambda o: encoded("TIFF", big_tiff=True, tiffinfo={274: o}),
    "png": lambda o: encoded("PNG", exif=exif(o)),
    "webp": lambda o: encoded("WEBP", lossless=True, exif=exif(o)),
    "avif": lambda o: encoded("AVIF", quality=100, subsampling="4:4:4", exif=exif(o)),
    "jpeg": lambda o: encoded("JPEG", quality=100, subsampling=0, exif=exif(o)),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", FORMATS)
def test_photos_are_turned_once(tmp_path, name, orientation):
    data = FORMATS[name](orientation)
    stored = CORNERS if "gray" not in name else np.repeat(CORNERS[..., :1], 3, axis=2)
    expected = transforms._upright(stored, orientation)
    assert transforms.read_header(data).displayed_size == expected.shape[:2]
    (tmp_path / "photo").write_bytes(data)
    photo = transforms.read(tmp_path / "photo")
    np.testing.assert_allclose(photo.pixels.astype(int), expected, atol=8)
    # an annotator who ignored the orientation sees the stored pixels
    if orientation >= 5:
        out = np.zeros((*CORNERS.shape[:2], 3), np.uint8)
        transforms.place(data, out, annotated_size=(40, 60), short_side=40, long_side=60)
        np.testing.assert_allclose(out.astype(int), stored, atol=8)


@pytest.mark.parametrize("name", ["gif", "bmp", "ppm"])
def test_formats_without_an_orientation_are_read(tmp_path, name):
    (tmp_path / "photo").write_bytes(encoded(name.upper()))
    np.testing.assert_array_equal(transforms.read(tmp_path / "photo").pixels, CORNERS)


def test_orientations_that_are_written_in_other_ways():
    xmp = '<rdf:Description tiff:Orientation="6"/>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    profile = PngImagePlugin.PngInfo()
    block = exif(6)
    profile.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    for data in (encoded("PNG", pnginfo=info), encoded("PNG", pnginfo=profile), encoded("WEBP", xmp=xmp.encode())):
        assert transforms.read_header(data).orientation == 6
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (40, 60)


@pytest.mark.parametrize("block", [b"", b"II", exif(6)[:-7], b"Exif\0\0MM\0*" + bytes(4), b"\xff" * 40], ids=repr)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_broken_block_of_exif_spoils_no_pixels_and_warns_of_nothing(file_format, block):
    assert transforms.read_header(encoded(file_format, exif=block))[:2] == ((40, 60), 1)


@pytest.mark.parametrize("part", [b"IDAT", b"tEXt", b"IEND"])
def test_a_part_of_a_png_that_is_longer_than_the_file_gets_no_memory(monkeypatch, part):
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    data = encoded("PNG", pnginfo=text)
    at = data.index(part) - 4
    changed = data[:at] + struct.pack(">I", 0x7FFFFF00) + data[at + 4 :]
    monkeypatch.setattr(transforms.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnusableError, match=r"truncated image|not an image"):
        transforms.read_header(changed)
    assert transforms.read_header(data + b"behind its end").size == (40, 60)


@pytest.mark.parametrize("mark", [b"II\0*", b"MM*\0", b"II\0+", b"MM+\0"])
def test_a_tiff_whose_mark_is_swapped_warns_of_nothing(mark):
    for data in (encoded("TIFF"), encoded("TIFF")[:30]):
        with contextlib.suppress(UnusableError):
            transforms.read_header(mark + data[4:])


def test_the_orientation_of_a_png_may_stand_behind_its_pixels(monkeypatch):
    data = encoded("PNG", exif=exif(6))
    at = data.index(b"eXIf") - 4
    end = at + 12 + struct.unpack(">I", data[at : at + 4])[0]
    moved = data[:at] + data[end:-12] + data[at:end] + data[-12:]
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert transforms.read_header(moved) == transforms.read_header(data) == ((40, 60), 6, False, ())


@pytest.mark.parametrize("name", ["png", "webp", "tiff", "bmp", "gif", "avif"])
def test_no_format_is_decoded_for_its_size(name, monkeypatch):
    data = FORMATS[name](1) if name in FORMATS else encoded(name.upper())
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(transforms.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    assert transforms.read_header(data).size == (40, 60)


@pytest.mark.parametrize("name", ["png", "tiff", "bmp", "gif"])
def test_a_size_beyond_the_bound_is_refused_from_the_header(name, monkeypatch):
    data = bytearray(FORMATS[name](1) if name in FORMATS else encoded(name.upper()))
    side = 13_000
    match name:
        case "png":
            data[16:24] = struct.pack(">II", side, side)
            data[29:33] = struct.pack(">I", __import__("zlib").crc32(data[12:29]))
        case "tiff":
            (start,) = struct.unpack_from("<I", data, 4)
            for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
                if struct.unpack_from("<H", data, at)[0] in (256, 257):
                    struct.pack_into("<HII", data, at + 2, 4, 1, side)
        case "bmp":
            data[18:26] = struct.pack("<ii", side, side)
        case _:
            data[6:10] = struct.pack("<HH", side, side)
    monkeypatch.setattr(transforms.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnusableError, match="more than 67108864 pixels"):
        transforms.read_header(bytes(data))


@pytest.mark.slow
def test_a_photo_of_108_megapixels_is_read_at_reduced_scale(tmp_path):
    image = Image.new("RGB", (12_000, 9_000), (10, 200, 30))
    data = encoded("JPEG", image, exif=exif(6))
    assert transforms.decode(data, transforms.read_header(data), size=(9000, 12_000)).shape == (4500, 6000, 3)
    out = np.zeros((800, 800, 3), np.uint8)
    placed = transforms.place(data, out, annotated_size=(12_000, 9_000), short_side=600, long_side=800)
    assert placed == ((800, 600), (12_000, 9_000))
    np.testing.assert_allclose(out[:800, :600], np.broadcast_to([10, 200, 30], (800, 600, 3)), atol=3)
    (tmp_path / "photo.jpg").write_bytes(data)
    photo = transforms.read(tmp_path / "photo.jpg")
    assert photo.pixels.shape == (6000, 4500, 3)
    assert photo.size == (12_000, 9_000)
    np.testing.assert_array_equal(photo.scale, 0.5)
    # several scans need all coefficients at once; a second picture in the file, as phones add, is no scan
    with pytest.raises(UnusableError, match=r"(several|too many) scans"):
        transforms.read_header(encoded("JPEG", image, progressive=True))
    assert transforms.read_header(data + encoded("JPEG")).size == (9_000, 12_000)


def pairs_source(folder, names, **options):
    (folder / "pairs.tsv").write_text("".join(f"{name}\ta caption\n" for name in names))
    return sources.read_pairs(str(folder / "pairs.tsv"), str(folder / "images"), **options)


def test_links_out_of_the_folder_are_followed_only_if_wanted(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "0.jpg").write_bytes(encoded("JPEG"))
    for i, place in enumerate(("1.jpg", "sub/2.jpg"), 1):
        (tmp_path / "store" / f"hash{i}").write_bytes(encoded("JPEG"))
        (tmp_path / "images" / place).symlink_to(tmp_path / "store" / f"hash{i}")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "store")
    names = ["0.jpg", "1.jpg", "sub/2.jpg", "linked/hash1"]
    source = pairs_source(tmp_path, names)
    assert pathlib.Path(source[0].image).is_file()
    for i in range(1, 4):
        with pytest.raises(UnusableError, match="follow_links"):
            source[i]
    source = pairs_source(tmp_path, names, follow_links=True)
    for i in range(4):
        assert transforms.read(source[i].image).size == (40, 60)


def test_a_folder_is_searched_whole_and_what_is_left_out_is_counted(tmp_path, caplog):
    for name in (
        "a.jpg",
        "b/c.PNG",
        "b/d/e.avif",
        "b/f.gif",
        "g.txt",
        "h",
        "b/i.heic",
        "b/j.txt",
        "out/pictures/a.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    found = inputs.list_images(str(tmp_path), output=str(tmp_path / "out"))
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jpg", "b/c.PNG", "b/d/e.avif", "b/f.gif"]
    (message,) = (record.getMessage() for record in caplog.records)
    assert all(part in message for part in ("2 .txt", "1 .heic", "1 without suffix", "1 linked folder"))


def test_names_that_are_not_utf_8_get_pictures(tmp_path):
    paths = [pathlib.Path(os.fsdecode(name)) for name in (b"\xff.jpg", b"\xfe.jpg", b"plain.jpg", b"a/plain.jpg")]
    pictures = inputs.name_pictures(paths, tmp_path)
    assert len(set(pictures)) == 4
    for picture in pictures:
        picture.touch()
        str(picture).encode()
    assert pictures[2].name == "plain.jpg"
