import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from conftest import pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from detclipv2_jax.data import transforms
from detclipv2_jax.data.schema import UnusableError


def encode(image: np.ndarray | Image.Image, form: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def placed(data: bytes, canvas=(64, 64), annotated=(0, 0), **options):
    out = np.zeros((*canvas, 3), np.uint8)
    options = {"short_side": max(canvas), "long_side": max(canvas), **options}
    extent, size = transforms.place(data, out, annotated_size=annotated, **options)
    return out, extent, size


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG that claims a size; its pixels are missing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(pixels((16, 16), 0), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png16(bgr: np.ndarray) -> bytes:
    return cv2.imencode(".png", bgr)[1].tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("flip", [False, True])
def test_exif_rotation_is_honoured_as_pillow_does(orientation, form, flip):
    options = {"quality": 97, "subsampling": 0} if form == "JPEG" else {}
    data = encode(pixels((40, 56), 3), form, exif=exif(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    expected = expected[:, ::-1] if flip else expected
    assert transforms.read_header(data).displayed_size == expected.shape[:2]
    out, extent, size = placed(data, canvas=(56, 56), short_side=40, flip=flip)
    assert extent == size == expected.shape[:2]
    difference = np.abs(out[: size[0], : size[1]].astype(int) - expected)
    assert difference.max() <= 3  # two JPEG decoders
    assert not out[size[0] :].any()
    assert not out[:, size[1] :].any()


def test_annotated_size_decides_whether_exif_was_ignored():
    data = encode(pixels((40, 56), 3), "JPEG", exif=exif(6))
    assert placed(data, annotated=(56, 40))[2] == (56, 40)
    out, _, size = placed(data, annotated=(40, 56))
    assert size == (40, 56)  # boxes refer to the stored pixels
    plain = placed(encode(pixels((40, 56), 3), "JPEG"), annotated=(40, 56))[0]
    assert np.abs(out.astype(float) - plain).mean() < 1  # and is shown as it is stored
    with pytest.raises(UnusableError, match="size differs"):
        placed(data, annotated=(40, 57))


def test_broken_exif_block_does_not_lose_the_image():
    data = bytearray(encode(pixels((40, 56), 3), "JPEG", exif=exif(6)))
    at = data.index(b"Exif\0\0") + 6
    data[at : at + 12] = b"\xff" * 12
    assert placed(bytes(data))[2] == (40, 56)


@pytest.mark.parametrize(
    ("name", "data", "mean"),
    [
        ("grayscale jpeg", encode(Image.new("L", (30, 20), 100), "JPEG"), (100, 100, 100)),
        ("grayscale png", encode(Image.new("L", (30, 20), 100), "PNG"), (100, 100, 100)),
        ("alpha", encode(Image.new("RGBA", (30, 20), (200, 100, 50, 128)), "PNG"), (200, 100, 50)),
        ("palette", encode(Image.new("RGB", (30, 20), (200, 100, 50)).quantize(4), "PNG"), (200, 100, 50)),
        ("cmyk", encode(Image.new("RGB", (30, 20), (200, 100, 50)).convert("CMYK"), "JPEG"), (200, 100, 50)),
        ("16-bit", png16(np.full((20, 30, 3), (50, 100, 200), np.uint16) * 257), (200, 100, 50)),
        ("16-bit gray", png16(np.full((20, 30), 100, np.uint16) * 257), (100, 100, 100)),
        ("webp", encode(Image.new("RGB", (30, 20), (200, 100, 50)), "WEBP", lossless=True), (200, 100, 50)),
        ("bmp", encode(Image.new("RGB", (30, 20), (200, 100, 50)), "BMP"), (200, 100, 50)),
        ("progressive", encode(Image.new("RGB", (30, 20), (200, 100, 50)), "JPEG", progressive=True), (200, 100, 50)),
        ("one pixel", encode(Image.new("RGB", (1, 1), (200, 100, 50)), "PNG"), (200, 100, 50)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_odd_encodings_become_rgb(name, data, mean):
    out, extent, size = placed(data)
    assert size == ((1, 1) if name == "one pixel" else (20, 30))
    np.testing.assert_allclose(out[: extent[0], : extent[1]].mean((0, 1)), mean, atol=3)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    assert placed(encode(pixels((40, 56), 3), "JPEG") + b"trailer" * 100)[2] == (40, 56)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text", "not an image"),
        (encode(pixels((40, 56), 3), "JPEG")[:-400], "truncated image"),
        (encode(pixels((40, 56), 3), "JPEG")[:30], "truncated image"),
        (b"\xff\xd8", "truncated image"),
        (encode(pixels((40, 56), 3), "PNG")[:20], "not an image"),
        (png_header(20_000, 20_000), "more than"),
        (png_header(10_000, 9_000), "more than"),
        (jpeg_claiming(20_000, 20_000), "more than"),
        (jpeg_claiming(0, 16), "image without pixels"),
    ],
)
def test_unusable_files_say_why(data, reason):
    with pytest.raises(UnusableError, match=reason):
        placed(data)


def test_truncated_png_is_not_passed_on_half_empty():
    data = encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "PNG")
    with pytest.raises(UnusableError):
        placed(data[: len(data) // 2])


def test_jpeg_is_decoded_no_smaller_than_the_target():
    image = pixels((256, 384), 1)
    data = encode(image, "JPEG", quality=95)
    header = transforms.read_header(data)
    for target, decoded in [
        ((256, 384), 256),
        ((129, 193), 256),
        ((128, 192), 128),
        ((128, 193), 256),
        ((60, 90), 64),
        ((10, 15), 32),
    ]:
        assert transforms.decode(data, header, size=target).shape[0] == decoded
    # nothing is rough where a side keeps its size
    data = encode(image, "JPEG", quality=95, subsampling=2)
    exact = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    for target in ((256, 384), (256, 383), (255, 384)):
        np.testing.assert_array_equal(transforms.decode(data, header, size=target), exact)
    # the reduced picture is the large one, averaged
    small = placed(data, canvas=(64, 96), short_side=64)[0].astype(float)
    expected = image.reshape(64, 4, 96, 4, 3).mean((1, 3))
    assert np.abs(small - expected).mean() < 2


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.integers(8, 1500), st.integers(8, 1500)),
    st.integers(8, 900),
    st.integers(8, 1500),
)
def test_target_fits_and_keeps_the_aspect(size, canvas, short_side, long_side):
    target = transforms.target_size(size, canvas=canvas, short_side=short_side, long_side=long_side)
    for side, bound in zip(target, canvas, strict=True):
        assert 1 <= side <= bound
    assert max(target) <= max(long_side, 1)
    assert min(target) <= max(short_side, 1)
    scale = [t / s for t, s in zip(target, size, strict=True)]
    # each side was rounded by at most half a pixel, or lifted to one pixel
    if min(target) > 1:
        assert abs(scale[0] - scale[1]) <= 0.5 / size[0] + 0.5 / size[1] + 1e-9


def test_paper_sizes():
    size = {"canvas": (800, 1344), "short_side": 800, "long_side": 1333}
    assert transforms.target_size((480, 640), **size) == (800, 1067)
    assert transforms.target_size((400, 1200), **size) == (444, 1333)
    assert transforms.target_size((640, 480), canvas=(1344, 800), short_side=480, long_side=1333) == (640, 480)
    assert transforms.target_size((375, 500), canvas=(320, 320), short_side=320, long_side=320) == (240, 320)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_follow_the_pixels(flip):
    image = np.zeros((90, 120, 3), np.uint8)
    image[30:60, 20:80] = 255
    out, extent, size = placed(encode(image, "PNG"), canvas=(60, 96), short_side=60, flip=flip)
    scale = np.array(extent, np.float32) / np.array(size, np.float32)
    box = transforms.place_boxes(np.array([[20, 30, 80, 60]], np.float32), scale=scale, width=extent[1], flip=flip)[0]
    ys, xs = np.nonzero(out[..., 0] > 127)
    np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.0)
    assert box.dtype == np.float32


def test_boxes_are_scaled_by_their_own_axis():
    box, scale = np.array([[10, 20, 30, 50]], np.float32), np.array([2, 3], np.float32)  # (y, x)
    placed_box = transforms.place_boxes(box, scale=scale, width=200, flip=False)
    np.testing.assert_array_equal(placed_box, [[30, 40, 90, 100]])


def test_boxes_are_clipped_or_dropped_by_reason():
    nan = float("nan")
    boxes = np.array(
        [
            [10, 10, 20, 20],
            [-5, -5, 20, 20],  # clipped
            [90, 40, 110, 60],  # clipped
            [30, 10, 20, 20],
            [10, 30, 20, 20],
            [10, 10, 10, 20],
            [120, 10, 130, 20],
            [nan, 0, 1, 1],
            [0, 0, float("inf"), 1],
        ]
    )
    clipped, usable, reasons = transforms.check_boxes(boxes, np.tile([50.0, 100.0], (9, 1)))
    assert usable.tolist() == [True] * 3 + [False] * 6
    assert clipped[usable].tolist() == [[10, 10, 20, 20], [0, 0, 20, 20], [90, 40, 100, 50]]
    assert reasons == {
        "box inverted": 2,
        "box without area": 1,
        "box outside the image": 1,
        "box not finite": 2,
    }


def test_boxes_of_images_of_unknown_size_are_not_clipped():
    clipped, usable, _ = transforms.check_boxes(np.array([[0.0, 0, 900, 900]]), np.zeros((1, 2)))
    assert usable.all()
    assert clipped.tolist() == [[0, 0, 900, 900]]


@pytest.mark.parametrize("factor", [3, 8])
def test_shrinking_averages_over_all_pixels(factor):
    image = np.random.default_rng(0).integers(0, 256, (24 * factor, 40 * factor, 3)).astype(np.uint8)
    out, extent, _ = placed(encode(image, "PNG"), canvas=(24, 40), short_side=24)
    assert extent == (24, 40)
    expected = image.reshape(24, factor, 40, factor, 3).mean((1, 3))
    assert np.abs(out - expected).max() <= 1.0


@pytest.mark.parametrize("turned", [False, True])
def test_a_side_alone_that_shrinks_is_averaged(turned):
    image = np.zeros((2, 2000, 3), np.uint8)  # a line of the canvas; the other side becomes a twentieth
    image[:, ::20] = 200
    data = encode(image.transpose(1, 0, 2).copy() if turned else image, "PNG")
    out, extent, _ = placed(data, canvas=(100, 100), short_side=100)
    assert extent == ((100, 1) if turned else (1, 100))
    line = out[:, 0] if turned else out[0]
    np.testing.assert_allclose(line, 10, atol=1)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photo_of_a_file_is_whole_or_half_as_large(orientation, tmp_path, monkeypatch):
    image = Image.fromarray(pixels((40, 56), 3))
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(image, "JPEG", exif=exif(orientation), quality=97, subsampling=0))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    photo = transforms.read(path)
    assert photo.size == upright.shape[:2]
    assert np.abs(photo.pixels.astype(int) - upright).max() <= 3
    assert photo.scale.tolist() == [1, 1, 1, 1]
    # of a JPEG with more than MAX_PIXELS every second pixel is read; nothing else of that size, nor in several scans
    monkeypatch.setattr(transforms, "MAX_PIXELS", 40 * 56 - 1)
    photo = transforms.read(path)
    assert photo.size == upright.shape[:2]
    assert photo.pixels.shape[:2] == tuple(side // 2 for side in photo.size)
    assert photo.scale.tolist() == [0.5] * 4
    averaged = upright.reshape(photo.pixels.shape[0], 2, photo.pixels.shape[1], 2, 3).mean((1, 3))
    assert np.abs(photo.pixels - averaged).mean() < 3
    for data, reason in (
        (encode(image, "WEBP"), "more than 2239 pixels"),
        (encode(image, "PNG"), "more than 2239 pixels"),
        (encode(image, "JPEG", progressive=True), "more than 2239 pixels in several scans"),
    ):
        path.write_bytes(data)
        with pytest.raises(UnusableError, match=reason):
            transforms.read(path)
    for name in ("MAX_REDUCED", "MAX_SCANNED"):
        with monkeypatch.context() as patch:
            patch.setattr(transforms, name, 2239)
            with pytest.raises(UnusableError, match=r"more than 2239 pixels|too many scans"):
                transforms.read_header(encode(image, "JPEG"))


def test_the_sides_of_a_scale_are_those_of_a_box():
    photo = transforms.Photo(np.zeros((30, 80, 3), np.uint8), (60, 320))
    assert photo.scale.tolist() == [0.25, 0.5, 0.25, 0.5]


def tiff(order, *, big, width=30, height=20, orientation=6, more=()):
    """Returns the header of a TIFF whose numbers are of different lengths; its pixels are missing."""
    entries = [(256, 3, "H", width), (257, 4, "I", height), (274, 3, "H", orientation), *more]
    data = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    data += struct.pack(f"{order}HHQ", 8, 0, 24) if big else struct.pack(f"{order}I", 16)
    data = data.ljust(24 if big else 16, b"\0") + struct.pack(f"{order}{'Q' if big else 'H'}", len(entries))
    for tag, number_format, letter, value in entries:
        packed = struct.pack(f"{order}{letter}", value).ljust(8 if big else 4, b"\0")
        data += struct.pack(f"{order}HH{'Q' if big else 'I'}", tag, number_format, 1) + packed
    return data


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_headers_of_tiffs_of_both_orders_and_lengths(order, big):
    header = transforms.read_header(tiff(order, big=big))
    assert (header.size, header.orientation, header.displayed_size) == ((20, 30), 6, (30, 20))
    # a second orientation, of which decoders may take either; both have their place
    data = tiff(order, big=big, orientation=9, more=[(274, 3, "H", 8), (999, 3, "H", 5)])
    header = transforms.read_header(data)
    assert header.orientation == 8
    assert [struct.unpack_from(form, data, offset)[0] for offset, form in header.tiff_orientation] == [9, 8]
    with pytest.raises(UnusableError, match="image without pixels"):
        transforms.read_header(tiff(order, big=big, width=0))


@pytest.mark.parametrize("orientation", [1, 2, 6])
def test_a_tiff_is_turned_once(orientation):
    image = Image.fromarray(pixels((20, 30), 0))
    data = encode(image, "TIFF", exif=exif(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    out, extent, size = placed(data, canvas=(30, 30), short_side=20)
    assert extent == size == expected.shape[:2]
    assert np.abs(out[: size[0], : size[1]].astype(int) - expected).max() <= 1


def test_orientations_of_a_png_before_and_behind_its_pixels_and_as_texts():
    image = Image.fromarray(pixels((20, 30), 0))
    whole = encode(image, "PNG", exif=exif(6))
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4])
    chunk, rest = whole[start:end], whole[:start] + whole[end:]
    behind = rest[:-12] + chunk + rest[-12:]
    for data in (whole, behind):
        assert transforms.read_header(data).orientation == 6
    for cut in (1, 12):  # the last chunk has 12 bytes, and nothing of the picture
        assert transforms.read_header(whole[:-cut]).orientation == 6
    with pytest.raises(UnusableError, match="truncated image"):
        transforms.read_header(whole[:-13])
    info = PngInfo()
    raw = exif(8).tobytes().hex()
    info.add_text("Raw profile type exif", f"\nexif\n{len(raw) // 2:8}\n{raw[:40]}\n{raw[40:]}\n")
    assert transforms.read_header(encode(image, "PNG", pnginfo=info)).orientation == 8
    for form in ('tiff:Orientation="5"', "<tiff:Orientation>5</tiff:Orientation>"):
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", f"<rdf {form}/>")
        assert transforms.read_header(encode(image, "PNG", pnginfo=info)).orientation == 5


def test_markers_of_a_jpeg_that_say_nothing_are_passed():
    data = encode(pixels((20, 30), 0), "JPEG", exif=exif(6))
    for more in (b"\xff" * 5, b"\xff\x01", b"\xff\xd3\xff\xd0", b"\xff\xfe\0\x05abc"):
        header = transforms.read_header(data[:2] + more + data[2:])
        assert (header.size, header.orientation) == ((20, 30), 6)


def test_scans_of_a_jpeg_are_those_of_its_own_pixels(monkeypatch):
    plain = encode(pixels((40, 56), 3), "JPEG")
    progressive = encode(pixels((40, 56), 3), "JPEG", progressive=True)
    num = progressive.count(b"\xff\xda")
    assert num > 5
    far = bytes(1 << 16) + progressive
    for data, scans in ((plain, 1), (plain + far, 1), (progressive, num), (progressive + plain, num)):
        for limit in (scans * 40 * 56, scans * 40 * 56 - 1):
            monkeypatch.setattr(transforms, "MAX_SCANNED", limit)
            if limit % 56:
                with pytest.raises(UnusableError, match="too many scans"):
                    transforms.read_header(data)
            else:
                assert transforms.read_header(data).size == (40, 56)


@pytest.mark.parametrize(
    ("form", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_as_many_pixels_as_are_decoded_are_read_whole(form, options, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    data = encode(image, form, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    for name in ("MAX_PIXELS", "MAX_REDUCED"):
        monkeypatch.setattr(transforms, name, 40 * 56)
    assert np.abs(transforms.decode_photo(data).pixels - expected).mean() < 3


def test_pixels_are_averaged_where_more_than_two_become_one():
    """A line of every third pixel: bilinear sampling would meet it or miss it."""
    for factor, averaged in ((2, False), (2.5, True)):
        image = np.random.default_rng(0).integers(0, 256, (int(40 * factor), 40, 3)).astype(np.uint8)
        out, extent, _ = placed(encode(image, "PNG"), canvas=(40, int(40 / factor)), short_side=40)
        assert extent == (40, int(40 / factor))
        plain = cv2.resize(image, extent[::-1], interpolation=cv2.INTER_AREA if averaged else cv2.INTER_LINEAR)
        assert np.abs(out.astype(int) - plain).max() <= 1
    for shape in ((250, 2), (2, 250)):  # the other side becomes a half
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
        out, extent, _ = placed(encode(image, "PNG"), canvas=(100, 100), short_side=100)
        assert sorted(extent) == [1, 100]
        plain = cv2.resize(image, extent[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(out[: extent[0], : extent[1]].astype(int) - plain).max() <= 1


def test_pixels_of_another_size_than_the_header_says_are_refused():
    data = encode(pixels((20, 30), 0), "PNG")
    assert transforms.decode(data, transforms.Header((20, 30), 1, is_jpeg=False), size=(20, 30)).shape == (20, 30, 3)
    for size in ((20, 31), (21, 30), (30, 20)):
        with pytest.raises(UnusableError, match="size differs from the header's"):
            transforms.decode(data, transforms.Header(size, 1, is_jpeg=False), size=size)


def test_exif_counts_before_xmp():
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="3"/>')
    image = Image.fromarray(pixels((20, 30), 0))
    assert transforms.read_header(encode(image, "PNG", pnginfo=info)).orientation == 3
    assert transforms.read_header(encode(image, "PNG", pnginfo=info, exif=exif(6))).orientation == 6
    for orientation in (1, 8, 9):
        header = transforms.read_header(encode(image, "TIFF", exif=exif(orientation)))
        assert (header.size, header.orientation) == ((20, 30), 8 if orientation == 8 else 1)


def test_the_frame_of_an_annotation_is_upright_unless_it_fits_the_stored_pixels_only():
    header = transforms.read_header(encode(Image.new("RGB", (30, 20)), "JPEG", exif=exif(6)))
    assert (header.size, header.displayed_size) == ((20, 30), (30, 20))
    assert transforms.frame(header, (0, 0)) == transforms.frame(header, (30, 20)) == ((30, 20), 6)
    assert transforms.frame(header, (20, 30)) == ((20, 30), 1)
    with pytest.raises(UnusableError, match="size differs from the annotation's"):
        transforms.frame(header, (20, 20))
