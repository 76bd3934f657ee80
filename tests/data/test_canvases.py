"""Canvases that fit photos: which photo is on which, which size a batch has, and that nothing is left out by it."""

import itertools
import logging
import pathlib

import numpy as np
import pytest
from conftest import SIZES
from test_streams import assert_equal, rows_of

from configs import swin_t
from detclipv2_jax import config as config_lib
from detclipv2_jax.data import canvases
from detclipv2_jax.data.streams import eval_streams, train_streams


@pytest.fixture
def fitted(config):
    """The small world with boxes on two canvases in three sizes each, and pairs on three canvases."""
    for section in (config.detection, config.grounding):
        section.canvases, section.short_side, section.num_scales = ((128, 192), (192, 128)), (64, 128), 3
        section.long_side = 192
    config.image_text.canvases = ((64, 64), (32, 64), (64, 32))
    return config


def boxes(config, **place):
    return [stream for stream in train_streams(config, **place) if stream.kind.value != "image_text"]


def test_sizes_are_even_over_the_range_of_the_short_side():
    sizes = canvases.sizes((800, 1216), short_side=(480, 800), num_scales=3)
    assert sizes == ((800, 1216), (640, 960), (480, 736))
    assert canvases.sizes((1216, 800), short_side=(480, 800), num_scales=2) == ((1216, 800), (736, 480))
    assert canvases.sizes((800, 1216), short_side=(480, 800), num_scales=1) == ((800, 1216),)
    assert canvases.sizes((800, 1340), short_side=(480, 800), num_scales=0) == ((800, 1340),)
    assert canvases.sizes((64, 32), short_side=(1, 64), num_scales=2) == ((64, 32), (32, 32))  # no side is 0


@pytest.mark.parametrize(
    "given", [((64, 64), (32, 64), (64, 32)), ((96, 64), (64, 96), (64, 64)), ((64, 96), (96, 64)), ((96, 96),)]
)
def test_photos_are_where_they_are_largest_and_of_such_canvases_padded_least(fitted, given):
    """Also pairs, whose sizes are those of the headers of their files."""
    for section in (fitted.detection, fitted.grounding, fitted.image_text):
        section.canvases, section.num_scales = given, 0
    expected = {canvas: [] for canvas in given}
    for i, size in enumerate(SIZES):
        best = max(given, key=lambda c, size=size: (min(c[0] / size[0], c[1] / size[1]), -c[0] * c[1]))
        expected[best].append(i)
    assert sum(map(bool, expected.values())) > 1 or len(given) == 1
    for kind in config_lib.KINDS:
        streams = [stream for stream in train_streams(fitted) if stream.kind.value == kind]
        found = {
            stream.canvas: sorted({*stream.batch(0).example_id, *stream.batch(1).example_id}) for stream in streams
        }
        assert found == {canvas: photos for canvas, photos in expected.items() if photos}


def test_photos_of_which_nothing_is_known_have_a_canvas_too(fitted, caplog):
    """They are skipped when they are read, and reported."""
    caplog.set_level(logging.INFO, logger="absl")
    (pathlib.Path(fitted.image_text.images) / "2.jpg").write_bytes(b"no photo")
    fitted.image_text.max_bad_share = 0.2
    streams = [stream for stream in train_streams(fitted) if stream.kind.value == "image_text"]
    assert sum(stream.num_examples for stream in streams) == len(SIZES)
    (source,) = streams[0].sources
    assert source.sizes.tolist() == [list(size) if i != 2 else [0, 0] for i, size in enumerate(SIZES)]
    assert "pairs: reading the sizes of 7 images" in caplog.text
    caplog.clear()
    canvases.fill_sizes(source)
    assert "pairs: reading the sizes of 1 images" in caplog.text


def test_the_size_of_a_batch_is_a_pure_function_of_seed_stream_and_number(fitted):
    numbers = range(60)
    one, other = boxes(fitted), boxes(fitted)
    drawn = [[stream.canvas_of(n) for n in numbers] for stream in one]
    assert drawn == [[stream.canvas_of(n) for n in reversed(numbers)][::-1] for stream in other]
    for stream, sizes in zip(one, drawn, strict=True):
        assert len(stream.canvases) == 3
        for start in range(0, 60, 3):  # no size is drawn less often than another
            assert sorted(sizes[start : start + 3]) == sorted(stream.canvases)
        assert len({tuple(sizes[start : start + 3]) for start in range(0, 60, 3)}) > 3  # and in any order
    places = [[stream.canvases.index(size) for size in sizes] for stream, sizes in zip(one, drawn, strict=True)]
    assert len(set(map(tuple, places))) == 4  # every stream has its own
    fitted.seed += 1
    assert [[stream.canvas_of(n) for n in numbers] for stream in boxes(fitted)] != drawn


def test_a_stream_goes_on_from_anywhere_as_it_was(fitted):
    for one, other in zip(boxes(fitted), boxes(fitted), strict=True):
        other.batch(7)
        iterator = one.iterate(4)
        for n in range(4, 8):
            batch = next(iterator)
            assert_equal(batch, other.batch(n))
            assert batch.image.shape == (4, *one.canvas_of(n), 3)
        iterator.close()


def test_all_hosts_have_one_canvas_and_together_what_one_host_has(fitted):
    whole = boxes(fitted)
    for count in (2, 4):
        hosts = [boxes(fitted, process_index=i, process_count=count) for i in range(count)]
        for stream, *parts in zip(whole, *hosts, strict=True):
            for n in range(3):
                rows = itertools.chain.from_iterable(rows_of(part.batch(n)) for part in parts)
                assert {part.canvas_of(n) for part in parts} == {stream.canvas_of(n)}
                assert list(rows) == rows_of(stream.batch(n))


def test_every_photo_comes_once_an_epoch_and_in_every_size(fitted):
    fitted.detection.batch_size = 1
    seen = []
    for stream in boxes(fitted)[:2]:
        sizes = {}
        for epoch in range(6):
            batches = [stream.batch(epoch * stream.num_examples + i) for i in range(stream.num_examples)]
            ids = [int(batch.example_id[0]) for batch in batches]
            assert len(set(ids)) == stream.num_examples
            for i, batch in zip(ids, batches, strict=True):
                sizes.setdefault(i, set()).add(batch.image.shape[1])
        assert max(map(len, sizes.values())) == 3
        assert not stream.counters
        seen += sizes
    assert sorted(seen) == list(range(len(SIZES)))


def test_photos_fill_their_canvas_and_keep_their_boxes(fitted):
    for stream in boxes(fitted):
        for n in range(3):
            batch = stream.batch(n)
            canvas = np.array(batch.image.shape[1:3])
            assert (batch.extent == canvas).any(axis=1).all()  # one side of each photo is the canvas'
            assert (batch.extent <= canvas).all()
            ratio = batch.extent / batch.original_size
            np.testing.assert_allclose(ratio[:, 0], ratio[:, 1], rtol=0.02)
            limit = np.concatenate([batch.extent[:, ::-1]] * 2, axis=1)[:, None]
            assert (batch.boxes <= limit + 1e-3).all()
            assert batch.box_mask.any(axis=1).all()


def test_evaluation_has_its_own_canvases(fitted):
    def batches():
        return [stream.batch(0) for stream in eval_streams(fitted.eval, input_config=fitted.input)]

    before = batches()
    fitted.detection.num_scales = fitted.grounding.num_scales = 0
    for one, other in zip(before, batches(), strict=True):
        assert_equal(one, other)
        assert one.image.shape[1:3] in fitted.eval.canvases


def valid_share(config, kind, *, num_batches):
    """Returns the share of a kind's canvases that photos cover, over streams weighted by their photos."""
    valid = whole = 0.0
    for stream in train_streams(config):
        if stream.kind.value != kind:
            continue
        made = [stream.batch(n) for n in range(num_batches)]
        weight = stream.num_examples / len(made)
        valid += weight * sum(batch.extent.prod(axis=1).mean() for batch in made)
        whole += weight * sum(np.prod(batch.image.shape[1:3]) for batch in made)
    return valid / whole


@pytest.mark.parametrize("kind", config_lib.KINDS)
def test_four_fifths_of_the_canvases_are_photo(shared_data, kind):
    """Of real photographs, drawn as pretraining draws them, and as the paper does."""
    shares = {}
    for name, given in (("fitted", swin_t.get_config()), ("paper", config_lib.base())):
        config = config_lib.base()
        section = config[kind]
        for key in ("canvases", "num_scales", "short_side", "long_side"):
            section[key] = given[kind][key]
        section.batch_size = 4 if kind == "image_text" else 3
        folder = {"detection": "coco_train/images", "grounding": "", "image_text": "image_text"}[kind]
        section.images = str(shared_data / folder)
        if kind == "image_text":
            section.pairs = str(shared_data / "image_text/pairs.tsv")
        else:
            file = {"detection": "coco_train/instances.json", "grounding": "grounding/coco_train_derived.json"}[kind]
            section.annotations = str(shared_data / file)
        shares[name] = valid_share(config, kind, num_batches=9)
    print(kind, shares)
    assert shares["fitted"] > 0.8
    assert shares["paper"] < (0.75 if kind == "image_text" else 0.62)
