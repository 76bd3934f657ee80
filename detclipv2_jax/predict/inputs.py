"""Which photos are looked at, and the names of what is written for them."""

from __future__ import annotations

import collections
import contextlib
import glob
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import cv2
import tqdm
from absl import logging

from detclipv2_jax import atomic, buckets, files
from detclipv2_jax.data import transforms
from detclipv2_jax.files import printable, safe_names

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def read(paths: Iterable[tuple[int, pathlib.Path]], progress: tqdm.tqdm) -> Iterator[tuple[int, transforms.Photo]]:
    """Yields (position, photo) of files; the log names those that cannot be read, and `progress` counts them."""
    for i, path in paths:
        try:
            yield i, transforms.read(path)
        except (OSError, ValueError) as error:
            logging.error("cannot read %s: %s", printable(path), getattr(error, "strerror", None) or error)
            progress.update()


def with_frames(paths: Sequence[pathlib.Path], *, output: pathlib.Path, every: int) -> list[pathlib.Path]:
    """Returns the photos among the paths, and in place of each video every n-th of its frames, from the first on.

    Frames become files of their own, <output>/frames/<video>/<video>_<number of the frame>.jpg.

    Raises:
      ValueError: a video has no frame that can be read.
    """
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    folder_of = dict(zip(videos, safe_names(path.stem for path in videos), strict=True))
    listed: list[pathlib.Path] = []
    for path in paths:
        if path in folder_of:
            listed += _frames(path, output / "frames" / folder_of[path], every=every)
        else:
            listed.append(path)
    return listed


def _frames(video: pathlib.Path, folder: pathlib.Path, *, every: int) -> list[pathlib.Path]:
    """Returns the files of a video's frames, which are written unless they are there already."""
    try:
        known = os.stat(video)
    except OSError as error:
        raise ValueError(f"--images: cannot read the video {printable(video)}: {error.strerror}") from error
    made_of = {"video": str(video), "facts": [known.st_size, known.st_mtime_ns], "every": every}
    marker = folder / ".made_of.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        before = files.read_json(marker)
        names = _names(folder, before.pop("num_frames"), every)
        if before == made_of and all(name.exists() for name in names):
            return names
    num_frames, announced = 0, 0
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # it would print lines of its own
    with contextlib.suppress(cv2.error, TypeError, UnicodeError):
        capture = cv2.VideoCapture(os.path.abspath(video), cv2.CAP_FFMPEG)  # no other address than of a file
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        with tqdm.tqdm(total=max(announced, 0), desc=video.name, unit="frame", disable=None) as progress:
            while capture.grab():
                if num_frames % every == 0:
                    good, pixels = capture.retrieve()
                    if not good:
                        break
                    with atomic.whole(_name(folder, num_frames)) as partial:
                        cv2.imwrite(str(partial), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
                num_frames += 1
                progress.update()
        capture.release()
    if not num_frames:
        raise ValueError(f"--images: {printable(video)} is no video that can be read: it is damaged or of another kind")
    if announced - num_frames > max(1, announced // 100):
        logging.warning("%s ends after %d of %d frames", printable(video), num_frames, announced)
    files.write_json(marker, made_of | {"num_frames": num_frames})
    return _names(folder, num_frames, every)


def _names(folder: pathlib.Path, num_frames: int, every: int) -> list[pathlib.Path]:
    return [_name(folder, number) for number in range(0, num_frames, every)]


def _name(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{folder.name}_{number:06d}.jpg"


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
        where = f"the folder {images} (it looks for {' '.join(buckets.IMAGE_SUFFIXES)})"
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
            if suffix in (*buckets.IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
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
