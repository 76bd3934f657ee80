"""From image bytes and boxes to canvas pixels and canvas boxes.

A photo is decoded at the smallest JPEG scale that still holds the target, resized with its aspect ratio kept and put at
the top left of its canvas; below and to the right of it the canvas is zero. Sizes are (height, width).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from detclipv2_jax import files
from detclipv2_jax.data.schema import UnusableError

MAX_PIXELS = 1 << 26  # that are decoded (200 MB as RGB); of larger photos only JPEGs of one scan are read, reduced
MAX_REDUCED = 1 << 28  # pixels of a JPEG that is read at reduced scale; phones make 200 million
MAX_SCANNED = 1 << 30  # pixels times scans of a progressive JPEG; scans without content cost as much time as any
MAX_SIDE = 65_535  # px; of a JPEG
# OpenCV's REDUCED_COLOR flags say BGR; the scale bit alone combines with RGB
_REDUCED = {
    1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8
}  # fmt: skip
_DAMAGED = (  # what Pillow raises for damaged headers
    AttributeError, EOFError, LookupError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
_XMP_ORIENTATION = re.compile(r'tiff:Orientation(?:="|>)([1-8])')
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_ORIENTATION = 256, 257, 274
# with the bytes of the version in both orders: Pillow, which warns of much in a TIFF, takes all of them
_TIFF_MARKS = {order + version for order in (b"II", b"MM") for version in (b"*\0", b"\0*", b"+\0", b"\0+")}
_TIFF_FORMATS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # whole numbers
_PARAMETERLESS = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # one that ends a scan
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers that carry the size


class Header(NamedTuple):
    """What a file says of its image before it is decoded."""

    size: tuple[int, int]  # of the stored pixels
    orientation: int  # EXIF, 1-8; 5-8 swap height and width for display
    is_jpeg: bool
    tiff_orientation: tuple[tuple[int, str], ...] = ()  # where a TIFF has it, as struct formats; decoders follow it

    @property
    def displayed_size(self) -> tuple[int, int]:
        return self.size[::-1] if self.orientation >= 5 else self.size


def _exif_orientation(exif: bytes) -> int:
    """Returns the orientation in an EXIF block, which is made like a TIFF; 1 from a broken one: the pixels are whole.

    Pillow would warn of every broken block.
    """
    try:
        return _tiff_header(exif.removeprefix(b"Exif\0\0")).orientation
    except _DAMAGED:
        return 1


def _num_scans(data: bytes, offset: int) -> int:
    """Returns the scans of a JPEG from its first one at `offset` on; other images may follow it in the file."""
    if data.count(b"\xff\xda", offset) == 1:
        return 1
    num_scans = 0
    while offset + 4 <= len(data) and data[offset + 1] != 0xD9:
        num_scans += data[offset + 1] == 0xDA
        found = _MARKER.search(data, offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big"))
        offset = found.start() if found else len(data)
    return num_scans


def _jpeg_header(data: bytes) -> Header:
    size, orientation, offset = None, 1, 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        if marker in _PARAMETERLESS:
            offset += 2
            continue
        (length,) = struct.unpack_from(">H", data, offset + 2)
        if marker in _FRAMES and offset + 9 <= len(data):
            size = struct.unpack_from(">HH", data, offset + 5)
        elif marker == 0xE1 and data[offset + 4 : offset + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[offset + 4 : offset + 2 + length])
        elif marker == 0xDA:  # the scan: inside it FF D9 can only be the end of the image
            if size is None or data.rfind(b"\xff\xd9", offset) < 0:
                break
            num_scans = _num_scans(data, offset)
            if size[0] * size[1] * num_scans > MAX_SCANNED:
                raise UnusableError("too many scans")
            if num_scans > 1 and size[0] * size[1] > MAX_PIXELS:  # a decoder would hold all coefficients
                raise UnusableError(f"more than {MAX_PIXELS} pixels in several scans")
            return Header(size, orientation, is_jpeg=True)
        offset += 2 + length
    raise UnusableError("truncated image")


def _tiff_header(data: bytes) -> Header:
    order, big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+")
    (start,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, 8 if big else 4)
    (num_entries,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", data, start)
    start, length = (start + 8, 20) if big else (start + 2, 12)
    values: dict[int, list[int]] = {_TIFF_WIDTH: [0], _TIFF_HEIGHT: [0], _TIFF_ORIENTATION: []}
    places = []
    for offset in range(start, min(start + num_entries * length, len(data)), length):
        tag, number_format = struct.unpack_from(f"{order}HH", data, offset)
        if tag in values and number_format in _TIFF_FORMATS:
            place = offset + (12 if big else 8), order + _TIFF_FORMATS[number_format]
            values[tag] += struct.unpack_from(place[1], data, place[0])
            if tag == _TIFF_ORIENTATION:
                places.append(place)
    orientation = next((value for value in values[_TIFF_ORIENTATION] if value in range(1, 9)), 1)
    size = max(values[_TIFF_HEIGHT]), max(values[_TIFF_WIDTH])
    return Header(size, orientation, is_jpeg=False, tiff_orientation=tuple(places))


def _exif_of_png(data: bytes) -> bytes:
    """Returns the EXIF block of a PNG; it may stand behind the pixels, which Pillow's own search decodes.

    Raises:
      UnusableError: a chunk goes on after the file. OpenCV would make room for it first, up to 2 GB.
    """
    exif, offset, name = b"", 8, b""
    while name != b"IEND" and offset + 12 <= len(data):
        name, end = data[offset + 4 : offset + 8], offset + 12 + int.from_bytes(data[offset : offset + 4])
        if end > len(data):
            raise UnusableError("truncated image")
        if name == b"eXIf":
            exif = data[offset + 8 : end - 4]
        offset = end
    return exif


def _other_header(data: bytes) -> Header:
    image = Image.open(io.BytesIO(data))
    exif = (_exif_of_png(data) if image.format == "PNG" else image.info.get("exif")) or b""
    if not exif and (profile := image.info.get("Raw profile type exif")):  # ImageMagick's, before PNG had EXIF
        with contextlib.suppress(*_DAMAGED):
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    orientation = _exif_orientation(exif)
    xmp = str(image.info.get("XML:com.adobe.xmp") or image.info.get("xmp"))
    if not exif and (found := _XMP_ORIENTATION.search(xmp)):
        orientation = int(found[1])
    return Header((image.height, image.width), orientation, is_jpeg=False)


def read_header(data: bytes) -> Header:
    """Returns size and orientation of an encoded image, without decoding it.

    Raises:
      UnusableError: not an image, truncated (JPEG and PNG; others show when decoded), or more pixels than are decoded.
    """
    if data[:2] == b"\xff\xd8":
        header = _jpeg_header(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]) > MAX_PIXELS:
        raise UnusableError(f"more than {MAX_PIXELS} pixels")  # Pillow would warn of it
    else:
        try:
            header = _tiff_header(data) if data[:4] in _TIFF_MARKS else _other_header(data)
        except UnusableError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise UnusableError(f"more than {MAX_PIXELS} pixels") from None
        except _DAMAGED:
            raise UnusableError("not an image" if data else "empty file") from None
    height, width = header.size
    limit = MAX_REDUCED if header.is_jpeg else MAX_PIXELS
    if height * width > limit:
        raise UnusableError(f"more than {limit} pixels")
    if not height * width:
        raise UnusableError("image without pixels")
    return header


def _set_up_opencv() -> None:
    """Keeps OpenCV in the calling thread: the streams already use one thread or process a core.

    Lets it round sums of pixels either way: resizing takes 0.7 of the time and is off by 1 of 255 at most.
    """
    if not cv2.ipp.useIPP_NotExact():  # false in every new thread
        cv2.setNumThreads(1)
        cv2.ipp.setUseIPP_NotExact(True)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the pixels as displayed; EXIF orientation says where row 0 and column 0 of the stored pixels go."""
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.transpose(1, 0, 2)
        case 6:
            return np.rot90(pixels, -1)
        case 7:
            return pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            return np.rot90(pixels)
    return pixels


def frame(header: Header, annotated_size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Returns the size of the frame the annotation refers to, and the EXIF orientation to apply to the stored pixels.

    Photos are shown upright. Only where the annotated size fits the stored and not the upright pixels did the
    annotator ignore EXIF; then the stored pixels are the frame of the boxes.

    Raises:
      UnusableError: the annotated size is neither.
    """
    if annotated_size in ((0, 0), header.displayed_size):
        return header.displayed_size, header.orientation
    if annotated_size == header.size:
        return header.size, 1
    raise UnusableError("size differs from the annotation's")


def target_size(size: tuple[int, int], *, canvas: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Returns the (height, width) after resizing: short side as given unless the long side or the canvas bounds it."""
    scale = min(short_side / min(size), long_side / max(size), canvas[0] / size[0], canvas[1] / size[1])
    return min(max(round(size[0] * scale), 1), canvas[0]), min(max(round(size[1] * scale), 1), canvas[1])


def decode(data: bytes, header: Header, *, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns stored RGB pixels, of a JPEG possibly at 1/2, 1/4 or 1/8 scale.

    They are never smaller than `size`, but for a JPEG of more than MAX_PIXELS.

    Raises:
      UnusableError: the pixels cannot be decoded, or are not as many as the header says.
    """
    scales = (8, 4, 2) if header.is_jpeg else ()
    holds = (s for s in scales if -(-header.size[0] // s) >= size[0] and -(-header.size[1] // s) >= size[1])
    scale = next(holds, 1 if header.size[0] * header.size[1] <= MAX_PIXELS else 2)
    if header.is_jpeg and scale == 1:
        try:
            import simplejpeg  # not everywhere

            # the pixels of OpenCV in less time; what will be averaged may be a little rough
            shrinks = size[0] < header.size[0] and size[1] < header.size[1]
            return simplejpeg.decode_jpeg(data, fastdct=shrinks, fastupsample=shrinks)
        except (ImportError, ValueError):
            pass  # not installed, CMYK or damaged: OpenCV decides
    array = np.frombuffer(data, np.uint8)
    if header.tiff_orientation and header.orientation > 1:
        turned = bytearray(data)
        for offset, number_format in header.tiff_orientation:
            struct.pack_into(number_format, turned, offset, 1)
        array = np.frombuffer(turned, np.uint8)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCED[scale]
    try:
        pixels = cv2.imdecode(array, flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise UnusableError("undecodable image")
    if pixels.shape[:2] != (-(-header.size[0] // scale), -(-header.size[1] // scale)):
        raise UnusableError("size differs from the header's")
    return pixels


def place(
    image: bytes | UInt8[np.ndarray, "h w 3"],
    out: UInt8[np.ndarray, "canvas_h canvas_w 3"],
    *,
    annotated_size: tuple[int, int],
    short_side: int,
    long_side: int,
    flip: bool = False,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Writes an image into the top left of a zeroed canvas; returns (extent on the canvas, size of the photo).

    Args:
      image: encoded bytes, or RGB pixels.
      out: the canvas, written in place.
      annotated_size: (height, width) the boxes refer to, (0, 0) if unknown; see `frame`.
      short_side: wanted length of the shorter side, px.
      long_side: bound of the longer side, px.
      flip: mirror left and right.

    Raises:
      UnusableError: see `read_header`, `frame` and `decode`.
    """
    _set_up_opencv()
    header = read_header(image) if isinstance(image, bytes) else Header(image.shape[:2], 1, is_jpeg=False)
    size, orientation = frame(header, annotated_size)
    extent = target_size(size, canvas=out.shape[:2], short_side=short_side, long_side=long_side)
    stored = extent[::-1] if orientation >= 5 else extent
    pixels = decode(image, header, size=stored) if isinstance(image, bytes) else image
    view = out[: extent[0], : extent[1]]
    # averaging over areas is only needed where bilinear sampling would skip pixels
    shrinks = pixels.shape[0] > 2 * stored[0] or pixels.shape[1] > 2 * stored[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    if orientation == 1:
        cv2.resize(pixels, stored[::-1], dst=view, interpolation=method)
    else:
        view[:] = _upright(cv2.resize(pixels, stored[::-1], interpolation=method), orientation)
    if flip:
        cv2.flip(view, 1, dst=view)
    return extent, size


class Photo(NamedTuple):
    """A photo as it is displayed."""

    pixels: UInt8[np.ndarray, "h w 3"]  # RGB; at half size where it has more than MAX_PIXELS
    size: tuple[int, int]  # (height, width) px of the photo itself

    @property
    def scale(self) -> Float32[np.ndarray, " 4"]:
        """Returns px of `pixels` per px of the photo, for the coordinates of a box."""
        (height, width), size = self.pixels.shape[:2], self.size
        return np.array([width / size[1], height / size[0]] * 2, np.float32)


def read(path: str | os.PathLike[str]) -> Photo:
    """Returns a photo of a file.

    Raises:
      UnusableError: it is no image.
      OSError: it cannot be read.
    """
    return decode_photo(files.read_bytes(path))


def decode_photo(data: bytes) -> Photo:
    """Returns the photo of an encoded image; UnusableError if it is none."""
    header = read_header(data)
    factor = 1 if header.size[0] * header.size[1] <= MAX_PIXELS else 2
    height, width = (-(-side // factor) for side in header.displayed_size)
    pixels = np.zeros((height, width, 3), np.uint8)
    place(data, pixels, annotated_size=(0, 0), short_side=min(height, width), long_side=max(height, width))
    return Photo(pixels, header.displayed_size)


def place_boxes(
    boxes: Float32[np.ndarray, "n 4"], *, scale: Float32[np.ndarray, " 2"], width: int, flip: bool
) -> Float32[np.ndarray, "n 4"]:
    """Returns boxes of the photo in canvas pixels; `scale` is (y, x), `width` the valid width of the canvas."""
    boxes = boxes * scale[[1, 0, 1, 0]][None]
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    return boxes.astype(np.float32)


def check_boxes(
    boxes: Float[np.ndarray, "n 4"], sizes: Float[np.ndarray, "n 2"]
) -> tuple[Float32[np.ndarray, "n 4"], Bool[np.ndarray, " n"], dict[str, int]]:
    """Returns xyxy boxes clipped to their images, which of them are usable, and the numbers of bad ones by reason.

    Args:
      boxes: float64 [n, 4] xyxy px, anything.
      sizes: (height, width) of the image of each box; 0: unknown, any image's.
    """
    finite = np.isfinite(boxes).all(axis=1)
    boxes = np.where(finite[:, None], boxes, 0.0)
    inverted = finite & ((boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1]))
    empty = finite & ~inverted & ((boxes[:, 2] == boxes[:, 0]) | (boxes[:, 3] == boxes[:, 1]))
    height, width = np.where(sizes > 0, sizes, MAX_SIDE).T
    bounds = np.stack([width, height, width, height], axis=1)
    clipped = np.clip(boxes, 0.0, bounds).astype(np.float32)
    has_area = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    outside = finite & ~inverted & ~empty & ~has_area
    usable = finite & ~inverted & ~empty & ~outside
    reasons = {
        "box not finite": ~finite,
        "box inverted": inverted,
        "box without area": empty,
        "box outside the image": outside,
    }
    return clipped, usable, {reason: int(bad.sum()) for reason, bad in reasons.items() if bad.any()}
