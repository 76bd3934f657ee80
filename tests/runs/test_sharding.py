"""Who holds what on the mesh."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracle.towers import make_batch

from detclipv2_jax import chips
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.optimizer import make_optimizer


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((64, 128), 1, P()),
        ((64, 128), 4, P(None, "fsdp")),
        ((128, 64), 4, P("fsdp", None)),
        ((3, 3, 6), 4, P()),
        ((3, 8), 8, P(None, "fsdp")),
        ((8, 8), 2, P(None, "fsdp")),
        ((), 2, P()),
    ],
)
def test_the_largest_divisible_axis_is_split(shape, fsdp, spec):
    assert sharding.param_spec(shape, fsdp=fsdp) == spec


def test_mesh_that_does_not_divide_is_an_error():
    for fsdp in (3, 0, -2, 16):
        with pytest.raises(ValueError, match=rf"mesh.fsdp={fsdp} must divide the number of devices, 8"):
            sharding.make_mesh(fsdp=fsdp)
    devices = jax.devices()
    mesh = sharding.make_mesh(fsdp=4, devices=devices[::-1])  # in the order of processes, rows together
    assert mesh.axis_names == ("data", "fsdp")
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch, caplog):
    options = {"xla_cpu_enable_fast_math": False, "xla_no_such_option": True}
    monkeypatch.setitem(chips.COMPILER_OPTIONS, "cpu", options)
    sharding.compiler_options.cache_clear()
    assert sharding.compiler_options(sharding.make_mesh()) == {"xla_cpu_enable_fast_math": False}
    sharding.compiler_options.cache_clear()
    assert "this compiler has no option xla_no_such_option: " in caplog.text
    assert "fast_math" not in caplog.text


def test_parameters_and_moments_shrink_with_fsdp(micro):
    model = detclip.from_config(micro.model)
    shapes = train_state.param_shapes(model, context_length=16)
    tx = make_optimizer(micro.optimizer, shapes, 10)

    def bytes_per_device(fsdp):
        mesh = sharding.make_mesh(fsdp=fsdp)
        placed = train_state.state_shardings(mesh, tx, shapes, ema=True)
        state = jax.eval_shape(lambda params: train_state.create(params, tx, ema=True), shapes)
        sizes = jax.tree.map(lambda x, s: np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, state, placed)
        return sum(jax.tree.leaves(sizes))

    whole, half, eighth = bytes_per_device(1), bytes_per_device(2), bytes_per_device(8)
    assert half < 0.52 * whole  # what is too small to split stays whole
    assert eighth < 0.16 * whole


@pytest.mark.parametrize("ema", [True, False])
def test_a_state_begins_at_step_zero_with_its_parameters_as_average(ema):
    params = {"a": np.arange(16, dtype=np.float32).reshape(8, 2), "b": np.float32(3.0)}
    tx = optax.adam(0.1)
    state = train_state.create(params, tx, ema=ema)
    assert (int(state.step), state.step.dtype) == (0, np.int32)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    placed = train_state.state_shardings(sharding.make_mesh(fsdp=4), tx, params, ema=ema)
    expected = {"a": P("fsdp", None), "b": P()}
    moments = [placed.opt_state[0].mu, placed.opt_state[0].nu]
    if ema:
        jax.tree.map(np.testing.assert_array_equal, state.ema, params)
    else:
        assert state.ema is placed.ema is None
    for tree in (placed.params, *moments, *([placed.ema] if ema else [])):
        assert {name: place.spec for name, place in tree.items()} == expected
    assert placed.step.spec == placed.opt_state[0].count.spec == P()


def test_shapes_of_batches_are_those_of_the_streams(micro, tmp_path):
    micro.scenes.update({"num_detection": 8, "num_grounding": 8, "num_image_text": 8, "num_eval": 0, "size_px": 32})
    pytest.importorskip("grain")
    from detclipv2_jax import session
    from detclipv2_jax.data.streams import train_streams

    config = session.with_scenes(micro, tmp_path)
    for stream in train_streams(config):
        sizes = {"table_rows": stream.capacities["table"], "num_verified": stream.num_verified}
        sizes["class_names"] = stream.class_names
        expected = sharding.batch_shapes(config, stream.kind, stream.canvas, **sizes)
        found = stream.batch(0)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for name, own, array in zip(found._fields, expected, found, strict=True):
            if isinstance(array, np.ndarray):
                assert (own.shape, own.dtype) == (array.shape, array.dtype), name


def test_shapes_of_a_batch_follow_from_its_kind_and_the_configuration(micro):
    micro.image_text.max_phrases, micro.detection.max_boxes, micro.optimizer.text_once = 5, 7, True
    mesh = sharding.make_mesh(fsdp=2)
    sizes = {"table_rows": 16, "mesh": mesh}
    for kind, options, boxes, captions, verified in (
        (Kind.IMAGE_TEXT, {}, 0, 6, None),
        (Kind.IMAGE_TEXT, {"class_names": True}, 0, 1, None),
        (Kind.DETECTION, {}, 7, 0, None),
        (Kind.DETECTION, {"num_verified": 3}, 7, 0, 3),
    ):
        found = sharding.batch_shapes(micro, kind, (32, 64), **sizes, **options)
        assert (found.image.shape, found.boxes.shape, found.caption_mask.shape) == (
            (8, 32, 64, 3), (8, boxes, 4), (8, captions)
        )  # fmt: skip
        assert (found.concept_text.shape, found.concept_text.dtype) == ((16, micro.model.embed_dim), np.float32)
        assert (found.class_names is not None) == ("class_names" in options)
        assert (found.federated and found.federated.concepts.shape) == (verified and (8, verified))
        for shape in jax.tree.leaves(found):
            assert shape.sharding == jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
    micro.optimizer.text_once = False
    found = sharding.batch_shapes(micro, Kind.DETECTION, (32, 64), table_rows=16)
    assert found.concept_text is None
    assert found.image.sharding is None


def test_rows_of_a_later_process_follow_those_of_the_ones_before(monkeypatch):
    monkeypatch.setattr(sharding.jax, "process_index", lambda: 2)
    batch = make_batch(Kind.IMAGE_TEXT, seed=0)
    assert batch.caption_concepts.size > 0
    placed = sharding.to_global(batch, sharding.make_mesh())
    np.testing.assert_array_equal(placed.caption_concepts, batch.caption_concepts + 2 * len(batch.concept_mask))
    batch = make_batch(Kind.DETECTION, seed=0, federated=True)
    placed = sharding.to_global(batch, sharding.make_mesh())
    rows = [(placed.box_concepts, batch.box_concepts), (placed.federated.concepts, batch.federated.concepts)]
    for moved, own in rows:
        np.testing.assert_array_equal(moved, own + 2 * len(batch.concept_mask))
    same = placed._replace(
        box_concepts=batch.box_concepts, federated=placed.federated._replace(concepts=batch.federated.concepts)
    )
    jax.tree.map(np.testing.assert_array_equal, same, batch)


def test_chunks_take_rows_of_every_device_and_are_joined_again():
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    rows = np.arange(16)
    tree = {"a": rows, "b": np.stack([rows, -rows], axis=1)}
    chunks = sharding.split_rows(tree, 2, mesh)
    assert chunks["a"].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]  # four rows a device
    np.testing.assert_array_equal(chunks["b"], np.stack([chunks["a"], -chunks["a"]], axis=2))
    jax.tree.map(np.testing.assert_array_equal, sharding.join_rows(chunks, mesh), tree)


def test_every_parameter_has_its_place_and_counts_are_those_of_processes(monkeypatch):
    mesh = sharding.make_mesh(fsdp=4)
    placed = sharding.param_shardings(mesh, {"a": jax.ShapeDtypeStruct((8, 3), np.float32), "b": np.zeros(())})
    assert {name: place.spec for name, place in placed.items()} == {"a": P("fsdp", None), "b": P()}
    assert all(place.mesh == mesh for place in placed.values())
    counts = {"x": 3, "y": 4}
    assert sharding.summed(counts, mesh) is counts
    monkeypatch.setattr(sharding.jax, "process_count", lambda: 2)  # the other one has no devices here
    assert sharding.summed(counts, mesh) == counts
