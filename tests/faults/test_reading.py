"""Readers that die, hang or meet damaged files, and images that cannot be read: real processes, pipes and shards."""

import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import signal
import time

import building
import numpy as np
import pytest
import test_main
from micro import micro_config

from detclipv2_jax.data import scenes
from detclipv2_jax.data.schema import DataError, StalledError
from detclipv2_jax.data.streams import train_streams

NUM_IMAGES = 200
EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))
STALL_S = 60 if EXHAUSTIVE else 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of generated scenes and, in built/, shards of ten of its images each."""
    folder = tmp_path_factory.mktemp("world")
    scenes.write(folder, num_detection=30, num_grounding=0, num_image_text=NUM_IMAGES, num_eval=0, size_px=64)
    options = {"input": str(folder / "detection.json"), "images": str(folder), "shard_size": 10}
    building.build("coco_json", output=str(folder / "built"), **options)
    return folder


def stream_of(kind, folder, **options):
    """The stream of one kind of data; `options` are of its section and of config.input."""
    config = micro_config()
    if kind == "detection":
        config.detection.data = (str(folder / "built"),)
    else:
        config.image_text.pairs, config.image_text.images = str(folder / "pairs.tsv"), str(folder)
    for name, value in options.items():
        section = config.input if name in config.input else config[kind]
        section[name] = value
    (stream,) = train_streams(config)
    return stream


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world, tmp_path / "world", copy_function=os.link)
    return tmp_path / "world"


def replace(path, data):
    """Writes a file anew, so that what is linked to it stays as it is."""
    path.unlink()
    path.write_bytes(data)


@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run_with_the_name_of_the_stream(world):
    batches = stream_of("image_text", world, num_workers=1).iterate()
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"^image_text/64x64: Worker process was .*exit code -9.*num_workers=0"):
        list(batches)  # what was read ahead comes first


class Stalling:
    """A source whose file answers late, as a network disk does."""

    def __init__(self, source, index, seconds):
        self._source, self._index, self._seconds = source, index, seconds

    def __len__(self):
        return len(self._source)

    def __getattr__(self, name):
        if name.startswith("__") or "_source" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._source, name)

    def __getitem__(self, index):
        if index == self._index:
            time.sleep(self._seconds)
        return self._source[index]


def stall(stream, example_id, seconds):
    stream.sources = (Stalling(stream.sources[0], example_id, seconds),)
    stream._maker = dataclasses.replace(stream._maker, sources=stream.sources)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reader_that_hangs_ends_the_run_in_time_with_the_name_of_the_file(world, num_workers):
    stream = stream_of("image_text", world, num_workers=num_workers, prefetch_batches=1)
    hanging = int(stream.batch(1).example_id[3])
    file = stream.sources[0].file(hanging)
    stall(stream, hanging, 90)
    batches = stream.iterate()
    next(batches)  # a worker takes its time to start
    stream._input.timeout_s = 2
    started = time.monotonic()
    try:
        with pytest.raises(StalledError, match=rf"^image_text/64x64: no batch 1 within 2 s .*; {file} does not answer"):
            next(batches)
        assert time.monotonic() - started < 60
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reader_that_hangs_is_closed_in_time(world, num_workers):
    stream = stream_of("image_text", world, num_workers=num_workers, prefetch_batches=1)
    stall(stream, int(stream.batch(2).example_id[3]), 40)  # of a batch that is read ahead
    batches = stream.iterate()
    next(batches), next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:  # as one that waits for a disk, it does not answer
        os.kill(worker.pid, signal.SIGSTOP)
    stream._input.timeout_s = 2
    started = time.monotonic()
    try:
        batches.close()  # as where another stream has ended the run
        assert time.monotonic() - started < 20
    finally:
        for worker in workers:
            worker.kill()


def test_a_reader_that_stalls_for_a_while_changes_no_value(world):
    stream = stream_of("image_text", world, prefetch_batches=1)
    expected = stream.batch(1)
    stall(stream, int(expected.example_id[3]), STALL_S)
    batches = stream.iterate()
    next(batches)
    started = time.monotonic()
    np.testing.assert_array_equal(next(batches).image, expected.image)
    assert time.monotonic() - started > STALL_S / 2
    batches.close()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_what_is_no_file_is_not_opened_but_counted(copy, make):
    stream = stream_of("image_text", copy, max_bad_share=0.1)
    index = int(stream.batch(0).example_id[2])
    path = pathlib.Path(stream.sources[0].file(index))
    path.unlink()
    make(path)
    assert index not in stream.batch(0).example_id
    ((reason, num),) = ((reason, num) for reason, num in stream.counters.items() if "skipped" in reason)
    assert num == 1
    assert "NotRegularError" in reason or "link out of the image folder" in reason


def flipped(data):
    at = data.index(b"JFIF")  # inside of a record
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "num_lost"),
    [(flipped, 1), (lambda data: data[: len(data) // 2], 10), (lambda data: b"", 10), (None, 10)],
)
def test_records_of_a_damaged_or_missing_shard_are_skipped_and_counted_or_end_the_run(copy, damage, num_lost):
    intact = stream_of("detection", copy, batch_size=30)
    assert intact.batch(0).image_mask.all()
    shard = sorted((copy / "built").glob("*array_record*"))[1]
    data = shard.read_bytes()
    if damage:
        replace(shard, damage(data))
    else:
        shard.unlink()
    np.testing.assert_array_equal(intact.batch(1).image_mask, True)  # it was opened before: the run goes on
    stream = stream_of("detection", copy, batch_size=30, max_bad_share=0.5)
    batch = stream.batch(0)
    assert batch.image_mask.all()
    skipped = {reason: num for reason, num in stream.counters.items() if "skipped" in reason}
    assert skipped == {f"image of built skipped: damaged or missing record in {shard}": num_lost}
    assert stream.overflow["num_images_skipped"] == num_lost
    assert len(set(range(10, 20)) - set(batch.example_id.tolist())) == num_lost
    message = rf"^detection/64x64: {num_lost} of 30 images cannot be used \({num_lost} .*{shard.name}"
    with pytest.raises(DataError, match=message):
        stream_of("detection", copy, batch_size=30, max_bad_share=(num_lost - 0.5) / 30).batch(0)


def test_one_image_in_a_hundred_is_counted_by_source_and_reason_and_more_ends_the_run(copy):
    stream = stream_of("image_text", copy, batch_size=8, max_bad_share=0.01)
    files = [pathlib.Path(stream.sources[0].file(i)) for i in range(NUM_IMAGES)]
    replace(files[20], files[20].read_bytes()[:200])
    files[70].unlink()
    for batch in map(stream.batch, range(NUM_IMAGES // 8)):
        assert batch.image_mask.all()
        assert not {20, 70} & set(batch.example_id.tolist())
    skipped = {reason: num for reason, num in stream.counters.items() if "skipped" in reason}
    assert skipped == {"image of pairs skipped: truncated image": 1, "image of pairs skipped: missing file": 1}
    replace(files[120], b"")
    with pytest.raises(DataError, match=r"^image_text/64x64: 3 of 200 .*1 empty file.*max_bad_share allows 1.00%"):
        list(map(stream.batch, range(NUM_IMAGES // 8)))


@pytest.mark.skipif(not EXHAUSTIVE, reason="compiles a step: set EXHAUSTIVE=1")
@pytest.mark.slow
def test_a_run_with_one_image_in_a_hundred_unreadable_completes_and_with_more_says_so(tmp_path, caplog):
    folder = tmp_path / "world"
    scenes.write(folder, num_detection=100, num_grounding=0, num_image_text=0, num_eval=0, size_px=64)
    config = micro_config()
    config.scenes.num_detection = config.scenes.num_grounding = config.scenes.num_image_text = 0
    config.scenes.num_eval = 0
    config.detection.annotations, config.detection.images = str(folder / "detection.json"), str(folder)
    config.model.head.deformable = False  # much to compile
    config.num_steps = 13  # all images once
    first, second, *_ = sorted(folder.rglob("*.jpg"))
    replace(first, first.read_bytes()[:200])
    with caplog.at_level("INFO", logger="absl"):
        test_main.start(config, tmp_path / "completes")
    assert "'image of detection skipped: truncated image': 1" in caplog.text
    rows = test_main.lines(tmp_path / "completes")
    assert sorted(rows) == list(range(1, 14))
    assert sum(row["detection/num_images_skipped"] for row in rows.values()) == 1
    second.unlink()
    with pytest.raises(DataError, match=r"^detection/64x64: 2 of 100 images .*max_bad_share allows 1.00%"):
        test_main.start(config, tmp_path / "ends")
