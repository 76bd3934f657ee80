"""Videos: every n-th frame is a photo whose name says which; one that cannot be read is one error."""

import json
import logging
import types

import cv2
import numpy as np
import planted
import pytest

from detclipv2_jax.data import transforms
from detclipv2_jax.inference import Predictor
from detclipv2_jax.predict import __main__ as predict
from detclipv2_jax.predict import inputs

NUM_FRAMES = 12


def write_video(path):
    """Writes frames of which each has a red box 8 px further to the right."""
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (300, 100))
    assert writer.isOpened()
    for i in range(NUM_FRAMES):
        writer.write(planted.paint((100, 300), {"red": (8 * i, 20, 8 * i + 60, 80)})[..., ::-1])
    writer.release()
    return path


def test_frames_are_photos_with_names_of_their_own(tmp_path, monkeypatch):
    video = write_video(tmp_path / "clips" / "clip.avi")
    (tmp_path / "clips" / "photo.png").write_bytes(
        cv2.imencode(".png", planted.paint((100, 300), {"blue": (40, 10, 90, 50)})[..., ::-1])[1].tobytes()
    )
    predictor = Predictor(*planted.make())
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: predictor)
    given = {"checkpoint": "run", "images": str(video.parent), "words": "red, blue", "output": str(tmp_path / "out")}
    assert predict.run(**given, every_nth_frame=5, score_threshold=0.1, max_detections=1, formats=("coco",)) == 0
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    frames = [tmp_path / "out" / "frames" / "clip" / f"clip_{i:06d}.jpg" for i in (0, 5, 10)]
    assert [row["file_name"] for row in rows] == [*map(str, frames), str(video.parent / "photo.png")]
    assert [row["name"] for row in rows] == ["red", "red", "red", "blue"]
    for i, row in zip((0, 5, 10), rows[:3], strict=True):
        x, y, width, height = row["bbox"]  # colours of JPEGs are blurred: the middle is what stays
        np.testing.assert_allclose([x + width / 2, y + height / 2], [8 * i + 30, 50], atol=10)
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]][1] == "out/frames/clip/clip_000005.jpg"
    with pytest.raises(ValueError, match="--every_nth_frame=0 must be 1 or more"):
        predict.run(**given, every_nth_frame=0)


def test_frames_are_written_once_and_again_when_the_video_or_the_step_is_another(tmp_path):
    video = write_video(tmp_path / "clip.avi")
    (first,) = {path.parent for path in inputs.with_frames([video], output=tmp_path, every=4)}
    times = {path: path.stat().st_mtime_ns for path in sorted(first.glob("*.jpg"))}
    assert [path.name for path in times] == ["clip_000000.jpg", "clip_000004.jpg", "clip_000008.jpg"]
    assert inputs.with_frames([video], output=tmp_path, every=4) == list(times)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    next(iter(times)).unlink()
    assert inputs.with_frames([video], output=tmp_path, every=4) == list(times)
    assert next(iter(times)).exists()
    assert len(inputs.with_frames([video], output=tmp_path, every=1)) == NUM_FRAMES
    (first / "clip_000004.jpg").write_bytes(b"of the video before")
    assert len(inputs.with_frames([video], output=tmp_path, every=1)) == NUM_FRAMES
    write_video(video)
    inputs.with_frames([video], output=tmp_path, every=1)
    assert transforms.read(first / "clip_000004.jpg").size == (100, 300)


def test_a_video_that_cannot_be_read_is_one_error(tmp_path, caplog):
    video = write_video(tmp_path / "clip.avi")
    data = video.read_bytes()
    for content in (b"", b"no video", data[:300]):
        video.write_bytes(content)
        with pytest.raises(ValueError, match=r"clip\.avi is no video that can be read: it is damaged"):
            inputs.with_frames([video], output=tmp_path, every=1)
    with pytest.raises(ValueError, match="cannot read the video"):
        inputs.with_frames([tmp_path / "absent.mp4"], output=tmp_path, every=1)
    video.write_bytes(data[: len(data) * 6 // 10])
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert 0 < len(inputs.with_frames([video], output=tmp_path, every=1)) < NUM_FRAMES
    assert f"of {NUM_FRAMES} frames" in caplog.text


@pytest.mark.parametrize(
    ("announced", "missing", "said"), [(12, 0, 0), (12, 1, 0), (12, 2, 1), (300, 3, 0), (300, 4, 1)]
)
def test_a_video_that_ends_more_than_a_hundredth_too_early_is_said(
    announced, missing, said, tmp_path, monkeypatch, caplog
):
    video = tmp_path / "clip.MP4"
    video.write_bytes(b"")
    left = iter([True] * (announced - missing))
    capture = types.SimpleNamespace(
        get=lambda _: announced, grab=lambda: next(left, False), retrieve=lambda: (True, np.zeros((2, 2, 3), np.uint8)),
        release=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: capture)
    with caplog.at_level(logging.WARNING, logger="absl"):
        frames = inputs.with_frames([video, tmp_path / "a.png"], output=tmp_path, every=100)
    assert [path.name for path in frames] == [
        *(f"clip_{i:06d}.jpg" for i in range(0, announced - missing, 100)), "a.png"
    ]  # fmt: skip
    assert len(caplog.messages) == said
