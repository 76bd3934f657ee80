"""What is compared with the references; read by `make_fixtures.py` (with torch) and by the tests (without)."""

from typing import NamedTuple

import numpy as np
import seeded


class SwinSize(NamedTuple):
    """Architecture of a backbone."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int


SWIN_SIZES = {
    "tiny": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "small": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "base": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "base12": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "large": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    "narrow": SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8), 7),  # fast: not a published size
    "narrow12": SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8), 12),
}


class SwinCase(NamedTuple):
    """One backbone on one image; the libraries that can compute it the way we do."""

    size: str
    canvas: tuple[int, int]
    libraries: tuple[str, ...]

    @property
    def name(self) -> str:
        """Returns the key of the case."""
        return f"{self.size}_{self.canvas[0]}x{self.canvas[1]}"


def _libraries(window: int, canvas: tuple[int, int]) -> tuple[str, ...]:
    """Returns the libraries that compute a canvas the way we do (see models/swin.py)."""
    sizes = [tuple(-(-side // stride) for side in canvas) for stride in (4, 8, 16, 32)]
    libraries = ["torchvision"]
    if all(min(size) >= window for size in sizes):  # transformers shrinks the window, its table no longer fits
        libraries.append("transformers")
    if all(side % window == 0 for size in sizes for side in size):  # timm shifts before it pads
        libraries.append("timm")
    return tuple(libraries)


# what every test run computes; the rest on request
QUICK = ("narrow_333x500", "narrow_800x1344", "narrow12_224x224", "narrow12_384x384", "tiny_224x224")
SWIN = tuple(
    SwinCase(name, canvas, _libraries(size.window_size, canvas))
    for name, size in SWIN_SIZES.items()
    for canvas in ((224, 224), (320, 320), (333, 500), (384, 384), (800, 1344))
    if canvas != (384, 384) or size.window_size == 12
)


TEXT_SIZES = {"nano": (64, 2, 2, 64), "base": (512, 12, 8, 512)}  # width, layers, heads, joint dimension
TEXT_POSITIONS = 77  # of the references
START, END = 49406, 49407


def text_tokens() -> np.ndarray:
    """Returns int32[16, 16] rows with [EOS] in every position, the first one included."""
    words = (np.abs(seeded.uniform("tokens", (16, 16))) / 1.74 * 49_000).astype(np.int32) + 1
    words[:, 0] = START
    for row in range(16):
        words[row, row] = END
        words[row, row + 1 :] = 0
    return words


# checkpoints in every library's layout: as small as the libraries allow
LAYOUT_SWIN, LAYOUT_CANVAS = SwinSize(8, (1, 2, 1, 1), (1, 1, 2, 2), 2), (64, 64)
LAYOUT_TEXT = (64, 1, 1, 32)
TABLE_WINDOWS = ((7, 12), (12, 7), (4, 2))


def relative_position_table(window: int) -> np.ndarray:
    """Returns a table for 5 heads that changes smoothly but for some noise, as trained ones do."""
    side = np.arange(1 - window, window, dtype=np.float32)
    waves = [np.cos(np.add.outer(side * (head + 1), side) / window) for head in range(5)]
    table = np.stack(waves, axis=-1).reshape(-1, 5)
    return (table + 0.1 * seeded.uniform("table", table.shape)).astype(np.float32)


class DeformCase(NamedTuple):
    """Arguments of one deformable convolution, NHWC, and the gradient that comes from above."""

    features: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray
    kernel: np.ndarray
    gradient: np.ndarray


DEFORM_SIZES = ((13, 18), (8, 9), (3, 2), (1, 1))
DEFORM_OFFSETS = ("zero", "small", "medium", "large", "outside", "border")


def deform_case(size: tuple[int, int], kind: str, channels: int = 5, outputs: int = 4, batch: int = 2) -> DeformCase:
    """Returns the arguments for offsets of one kind."""
    height, width = size

    def draw(what, *shape):
        return seeded.uniform(f"{what}/{size}/{kind}", shape)

    noise = draw("offsets", batch, height, width, 9, 2)
    offsets = {
        "zero": noise * 0,
        "small": noise * 0.5,
        "medium": noise * 2.2,  # up to 3.8 cells: just within the band
        "large": noise * 11.5,  # up to 20 cells
        "outside": noise + 3 * max(size) * np.sign(noise),
        # exactly on cells and on the border of the map, and half a cell outside of it
        "border": np.round(noise * 3) * 0.5,
    }[kind].astype(np.float32)
    return DeformCase(
        draw("features", batch, height, width, channels),
        offsets,
        0.5 + 0.28 * draw("mask", batch, height, width, 9),
        draw("kernel", 3, 3, channels, outputs),
        draw("gradient", batch, height, width, outputs),
    )


class HeadSize(NamedTuple):
    """Architecture of a head."""

    channels: int
    num_convs: int
    num_groups: int
    embed_dim: int
    objectness: str


class GradientCase(NamedTuple):
    """A small detector and inputs of odd sizes; see `detector.py`."""

    swin: SwinSize
    head: HeadSize
    canvas: tuple[int, int]

    def features(self) -> list[np.ndarray]:
        """Returns what a backbone gives a pyramid: sizes n and 2n or 2n - 1, on both axes both."""
        sizes, width = ((13, 18), (7, 9), (4, 5)), self.swin.embed_dim
        return [seeded.uniform(f"feature{i}", (2, *size, width * 2**i)) for i, size in enumerate(sizes)]

    def levels(self) -> dict[int, np.ndarray]:
        """Returns two of the maps that a pyramid gives a head, by their place among the levels."""
        sizes = {1: (7, 9), 3: (2, 3)}
        return {i: seeded.uniform(f"level{i}", (2, *size, self.head.channels)) for i, size in sizes.items()}

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (uint8 images, extents), the second image smaller than the canvas."""
        images = (seeded.uniform("photo", (2, *self.canvas, 3)) * 73 + 127.5).astype(np.uint8)
        return images, np.array([self.canvas, (self.canvas[0] - 13, self.canvas[1] - 22)], np.int32)


# windows of 4: stages 1-3 are shifted on both axes, stage 4 along one alone; an odd side in every merging
PARTS = {
    objectness: GradientCase(
        SwinSize(8, (2, 2, 2, 2), (1, 1, 2, 2), 4), HeadSize(16, 2, 4, 8, objectness), canvas=(75, 170)
    )
    for objectness in ("classification", "iou")
}
WHOLE = GradientCase(
    SwinSize(8, (1, 2, 1, 1), (1, 1, 2, 2), 4), HeadSize(16, 1, 4, 8, "classification"), canvas=(75, 170)
)


class NmsCase(NamedTuple):
    """Boxes with scores and classes."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


NMS_KINDS = ("random", "clustered", "tied", "identical", "single")


def nms_case(kind: str) -> NmsCase:
    """Returns the boxes of one kind; coordinates are whole or quarter pixels, so that IoUs are exact enough."""
    count = {"random": 400, "clustered": 300, "tied": 200, "identical": 50, "single": 1}[kind]
    center = seeded.uniform(f"nms/center/{kind}", (count, 2)) * (40 if kind == "clustered" else 200) + 400
    size = np.abs(seeded.uniform(f"nms/size/{kind}", (count, 2))) * 60 + 4
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
    boxes = (np.round(boxes * 4) / 4).astype(np.float32)
    scores = seeded.uniform(f"nms/scores/{kind}", (count,))
    if kind == "tied":
        scores = np.round(scores * 2) / 2
    if kind == "identical":
        boxes, scores = np.repeat(boxes[:1], count, axis=0), np.zeros_like(scores)
    return NmsCase(boxes, scores, np.arange(count, dtype=np.int32) % 3)


def overlap_boxes() -> tuple[np.ndarray, np.ndarray]:
    """Returns two sets of 200 boxes that overlap in every way; none is degenerate (torchvision gives NaN there)."""
    out = []
    for name in ("a", "b"):
        center = seeded.uniform(f"overlap/center/{name}", (200, 2)) * 150 + 400
        size = np.abs(seeded.uniform(f"overlap/size/{name}", (200, 2))) * 200 + 1
        out.append(np.concatenate([center - size / 2, center + size / 2], axis=1).astype(np.float32))
    return out[0], out[1]
