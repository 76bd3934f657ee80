"""Which photos are looked at, and the names of what is written for them."""

from __future__ import annotations

import collections
import glob
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import tqdm
from absl import logging

from detclipv2_jax.data import transforms
from detclipv2_jax.files import IMAGE_SUFFIXES, printable, safe_names


def read(paths: Iterable[tuple[int, pathlib.Path]], progress: tqdm.tqdm) -> Iterator[tuple[int, transforms.Photo]]:
    """Yields (position, photo) of files; the log names those that cannot be read, and `progress` counts them."""
    for i, path in paths:
        try:
            yield i, transforms.read(path)
        except (OSError, ValueError) as error:
            logging.error("cannot read %s: %s", printable(path), getattr(error, "strerror", None) or error)
            progress.update()


def list_images(images: str, *, output: str = "") -> list[pathlib.Path]:
    """Returns the files of a pattern, a folder and its sub-folders, a file or "-" (paths on stdin), without `output`.

    What a folder has beside images is said in the log.

    Raises:
      ValueError: there are none.
    """
    if images == "-":
        stdin = getattr(sys.stdin, "buffer", None)  # names need not be UTF-8
        lines = [os.fsdecode(line) for line in stdin] if stdin else list(sys.stdin)
        paths = [pathlib.Path(line.strip()) for line in lines if line.strip()]
        where = "stdin"
    elif os.path.isdir(images):
        paths = _images_of_folder(images, without=os.path.realpath(output) if output else "")
        where = f"the folder {images} (it looks for {' '.join(IMAGE_SUFFIXES)})"
    elif os.path.isfile(images):  # before the pattern: names may hold brackets
        return [pathlib.Path(images)]
    else:
        paths = sorted(path for path in map(pathlib.Path, glob.glob(images, recursive=True)) if path.is_file())
        where = f"{images!r}; quote the pattern so that the shell leaves it alone"
    if not paths:
        raise ValueError(f"--images: no image in {where}")
    return paths


def _images_of_folder(folder: str, *, without: str) -> list[pathlib.Path]:
    """Returns the images of a folder and its sub-folders; counts in the log what is left out."""
    paths: list[pathlib.Path] = []
    left_out: collections.Counter[str] = collections.Counter()
    for place, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        left_out["linked folder"] += len(linked)
        inside = os.path.realpath(place)
        folders[:] = [name for name in folders if name not in linked and os.path.join(inside, name) != without]
        for name in names:
            suffix = pathlib.Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                paths.append(pathlib.Path(place, name))
            else:
                left_out[suffix or "without suffix"] += 1
    if counts := ", ".join(f"{num} {what}" for what, num in left_out.most_common(10) if num):
        logging.warning("--images=%s: left out: %s", folder, counts)
    return sorted(paths)


def name_pictures(paths: Sequence[pathlib.Path], folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns a different file in `folder` for every image; ValueError if one is itself an image of the input."""
    pictures = [folder / f"{name}.jpg" for name in safe_names(path.stem for path in paths)]
    overwritten = {path.resolve() for path in paths} & {picture.resolve() for picture in pictures}
    if overwritten:
        raise ValueError(
            f"--output: the picture {min(overwritten)} would overwrite an image of the input; choose another folder"
        )
    return pictures
