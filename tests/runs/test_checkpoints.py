"""What a checkpoint holds, which ones stay, which are damaged, and how it is compared with a model."""

import contextlib
import types

import jax
import numpy as np
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json
from detclipv2_jax.runs import checkpoints, sharding
from detclipv2_jax.runs.state import TrainState

SHAPES = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}, "b": jax.ShapeDtypeStruct((), np.float32)}


def test_the_best_step_is_what_its_file_says(tmp_path, caplog):
    path = tmp_path / "best.json"
    assert checkpoints.read_best(path) is None
    assert not caplog.records
    path.write_text('{"step": 7, "score": "AP", "value": 1, "more": 0}')
    assert checkpoints.read_best(path) == {"step": 7, "score": "AP", "value": 1.0}
    for text in ("{", "[]", '{"step": 7, "score": "AP"}', '{"step": null, "score": "AP", "value": 1}',
                 '{"step": 1e999, "score": "AP", "value": 1}'):  # fmt: skip
        caplog.clear()
        path.write_text(text)
        assert checkpoints.read_best(path) is None
        assert "the newest checkpoint counts" in caplog.text


def test_differences_are_all_listed():
    checkpoints.report_differences(SHAPES, SHAPES, what="it")
    stored = {"a": {"kernel": np.zeros((3, 2))}, "c": np.zeros(())}
    with pytest.raises(ValueError, match=r"(?s)it does not fit .*missing \(1\): b.*unexpected \(1\): c.*a/kernel"):
        checkpoints.report_differences(stored, SHAPES, what="it")


def test_a_folder_without_a_configuration_is_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"is no workdir: it has no config\.json"):
        checkpoints.read_config(tmp_path)
    config = config_lib.base()
    config.epochs = 3
    (tmp_path / "config.json").write_text(config_json.to_json(config))
    assert config_json.differences(checkpoints.read_config(tmp_path), config) == []


def test_a_start_from_another_model_says_which_values_differ(tmp_path, monkeypatch):
    stored = types.SimpleNamespace(stored=lambda step, item: {"b": np.zeros(())})
    theirs, ours = config_lib.base(), config_lib.base()
    theirs.model.embed_dim = 7
    opened = contextlib.nullcontext((theirs, stored, 3, "params"))
    monkeypatch.setattr(checkpoints, "_opened", lambda workdir: opened)
    checkpoints.check_start(tmp_path, ours.model, {"b": SHAPES["b"]})
    with pytest.raises(
        ValueError, match=r"(?s)init_from.checkpoint .*missing \(1\): a/kernel.*config.model.embed_dim.*7"
    ):
        checkpoints.check_start(tmp_path, ours.model, SHAPES)


@pytest.mark.parametrize(("best", "kept"), [(None, [3, 4]), (1, [1, 3, 4]), (4, [3, 4])])
def test_the_newest_and_the_best_stay(best, kept):
    policy = checkpoints._NewestAndBest(2)
    policy.best = best
    stored = [types.SimpleNamespace(step=step) for step in (1, 2, 3, 4)]
    stays = policy.should_preserve(stored, context=None)
    assert [checkpoint.step for checkpoint, stay in zip(stored, stays, strict=True) if stay] == kept


def state(step, *, ema=True):
    """Returns a small state whose arrays are all different."""
    arrays = [np.float32(100 * step + i) + np.arange(6, dtype=np.float32).reshape(2, 3) for i in range(3)]
    params, moments, average = ({"a": {"kernel": jax.numpy.asarray(array)}} for array in arrays)
    return TrainState(jax.numpy.int32(step), params, {"mu": moments}, average if ema else None)


def change(path, *, item):
    """Flips a bit of the largest file of an item of a checkpoint."""
    files = [file for file in (path / item).rglob("*") if file.is_file() and file.name != "sha256.json"]
    file = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    return str(file.relative_to(path / item))


def test_what_was_saved_comes_back_and_damage_is_told(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "checkpoints"
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=2)) as ours:
        assert (ours.latest_step(), ours.best_step(), ours.intact_step(["params"])) == (None, None, None)
        for step in (1, 2, 3, 4):
            ours.save(step, state(step))
            if step == 2:
                ours.mark_best(2, score="AP", value=0.5)
            restored = ours.restore(jax.eval_shape(lambda: state(0)), step=step)  # which waits for it
            jax.tree.map(np.testing.assert_array_equal, restored, state(step))
        assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]
        assert (ours.latest_step(), ours.best_step()) == (4, 2)
        ours.save(4, state(9))  # is there
        ours.mark_best(5, score="AP", value=0.6)
        assert ours.best_step() == 4  # the best one is marked before it is written
        ours.mark_best(2, score="AP", value=0.5)
        for step in (2, 4):
            restored = ours.restore(jax.eval_shape(lambda: state(0)), step=step)
            jax.tree.map(np.testing.assert_array_equal, restored, state(step))
        assert ours.restore(jax.eval_shape(lambda: state(0, ema=False)), step=3).ema is None
        other = jax.eval_shape(lambda: state(0)).replace(params={"b": jax.ShapeDtypeStruct((2, 3), np.float32)})
        with pytest.raises(ValueError, match=r"(?s)checkpoint of step 3 .*missing \(1\): b.*unexpected \(1\): a/kern"):
            ours.restore(other, step=3)
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
        for_all = ours._restore_for_all(placed, step=3)
        jax.tree.map(np.testing.assert_array_equal, for_all, state(3))
        assert jax.tree.map(lambda x: x.sharding, for_all) == jax.tree.map(lambda x: x.sharding, placed)
        with monkeypatch.context() as patch:  # another process has nothing before process 0 sends it
            patch.setattr(jax, "process_index", lambda: 1)
            for_all = ours._restore_for_all(placed, step=3)
            jax.tree.map(np.testing.assert_array_equal, for_all, jax.tree.map(np.zeros_like, state(3)))
        np.testing.assert_array_equal(ours.restore_params(3)["a"]["kernel"], state(3).params["a"]["kernel"])
        np.testing.assert_array_equal(ours.restore_params(3, "ema")["a"]["kernel"], state(3).ema["a"]["kernel"])
        everything = ["params", "optimizer", "ema"]
        assert ours.damage(4, everything) == []
        assert ours.intact_step(everything) == 4
        assert ours.intact_step(everything, first=2) == 2
        assert ours.intact_step(everything, before=4) == 3
        name = change(folder / "4", item="optimizer")
        assert ours.damage(4, everything) == [f"optimizer/{name} has changed"]
        assert ours.intact_step(["params", "ema"]) == 4
        assert ours.intact_step(everything) == 3
        assert f"checkpoint {folder / '4'} is damaged: optimizer/{name} has changed" in caplog.text
        for text in ("[]", "{"):
            (folder / "3" / "params" / "sha256.json").write_text(text)
            assert ours.damage(3, ["params"]) == ["params/sha256.json has changed"]
        (folder / "3" / "params" / "sha256.json").unlink()
        assert ours.damage(3, ["params"]) == ["params/sha256.json is missing"]
        assert ours.intact_step(everything, set_aside=True) == 2
        assert sorted(path.name for path in folder.iterdir()) == ["2"]
        assert sorted(path.name[:2] for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["3_", "4_"]
        assert ours.latest_step() == 2
        for path in [path for path in (folder / "2" / "params").rglob("*") if path.is_file()]:
            if path.name != "sha256.json":
                path.unlink()
        assert len(ours.damage(2, everything)) > 5
        with pytest.raises(
            checkpoints.DamagedError, match=r"(?s)2 is damaged: .*no checkpoint is intact; move"
        ) as told:
            ours.intact_step(everything, set_aside=True)
        assert str(told.value).count(" is missing") == 5  # no more are named
        assert (folder / "2").exists()


@pytest.mark.parametrize(("shape", "num_slices"), [((8, 23), 0), ((8, 1 << 18), 8)])
def test_only_large_arrays_are_written_in_slices(tmp_path, caplog, shape, num_slices):
    place = jax.sharding.NamedSharding(sharding.make_mesh(), sharding.REPLICATED)
    array = jax.device_put(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), place)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=1)) as ours:
        with jax.log_compiles():
            ours.save(1, TrainState(jax.numpy.int32(1), {"a": array}, (), None))
        ours.wait()
        np.testing.assert_array_equal(ours.restore_params(1)["a"], array)
    assert sum("Compiling jit(slice)" in message for message in caplog.messages) == num_slices


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_what_a_workdir_predicts_with(tmp_path, ema_decay):
    config = config_lib.base()
    config.optimizer.ema_decay = ema_decay
    (tmp_path / "config.json").write_text(config_json.to_json(config))
    with pytest.raises(ValueError, match="has no checkpoints"):
        checkpoints.load_for_inference(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="checkpoints is empty"):
        checkpoints.load_for_inference(tmp_path)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=3)) as ours:
        for step in (1, 2, 3):
            ours.save(step, state(step, ema=ema_decay > 0))
        ours.mark_best(2, score="AP", value=0.5)
    being_written = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp" / "params"
    being_written.mkdir(parents=True)
    for step in (2, 3):  # the best one, or where it is damaged the newest
        found, params, number = checkpoints.load_for_inference(tmp_path)
        assert (found.optimizer.ema_decay, number) == (ema_decay, step)
        expected = state(step).ema if ema_decay else state(step).params
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        change(tmp_path / "checkpoints" / "2", item="ema" if ema_decay else "params")
    assert being_written.is_dir()  # a reader leaves it to the run
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=1)) as ours:
        ours.save(4, state(4, ema=ema_decay > 0))
    assert not being_written.exists()


def test_what_cannot_be_read_although_it_is_as_it_was_written_is_damaged(tmp_path, monkeypatch):
    def fails(step, item):
        raise KeyError("first line\nsecond line")

    opened = contextlib.nullcontext((None, types.SimpleNamespace(restore_params=fails), 3, "ema"))
    monkeypatch.setattr(checkpoints, "_opened", lambda workdir: opened)
    with pytest.raises(checkpoints.DamagedError, match=r"the ema of checkpoint 3 in .* cannot be read .*first line"):
        checkpoints.load_for_inference(tmp_path)


def test_a_save_asks_for_the_room_that_its_arrays_take(tmp_path, monkeypatch):
    asked = []

    def room(folder, needed=0, *, what):
        asked.append((folder.name, needed, what))
        return contextlib.nullcontext()

    monkeypatch.setattr(checkpoints, "room", room)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=3)) as ours:
        ours.save(7, state(7))
        ours.wait()
    num_bytes = 4 + 3 * 6 * 4
    assert asked[0] == ("checkpoints", num_bytes, "the checkpoint of step 7")
    assert asked[1:] == [("checkpoints", 0, "a checkpoint of 0.00 MB")] * 2


def test_the_state_before_the_first_step_is_a_checkpoint_too(tmp_path):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=3)) as ours:
        for step in (0, 3):
            ours.save(step, state(step))
        ours.wait()
        assert (ours.latest_step(), ours.intact_step(["params"], before=3)) == (3, 0)
        change(tmp_path / "checkpoints" / "3", item="params")
        assert ours.intact_step(["params"], set_aside=True) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("in_bucket", [False, True])
def test_one_of_several_processes_is_alone_with_a_workdir_in_a_bucket(tmp_path, monkeypatch, in_bucket, num_processes):
    asked = []
    monkeypatch.setattr(checkpoints.ocp, "CheckpointManager", lambda folder, **given: asked.append(given["options"]))
    monkeypatch.setattr(checkpoints.buckets, "is_workdir", lambda folder: in_bucket)
    monkeypatch.setattr(jax, "process_count", lambda: num_processes)
    monkeypatch.setattr(jax, "process_index", lambda: num_processes - 1)
    for _ in range(2):  # the second finds the folder of the first
        ours = checkpoints.Checkpoints(tmp_path / "new" / "run", keep=3)
    alone = in_bucket and num_processes > 1
    assert ours._is_alone == alone
    assert (tmp_path / "new" / "run" / "checkpoints").is_dir() == alone  # orbax makes it where all are together
    for options in asked:
        assert options.create != alone
        processes = options.multiprocessing_options
        assert processes.active_processes == ({1} if alone else None)
        assert (processes.primary_host, processes.barrier_sync_key_prefix) == ((1, "process1") if alone else (0, None))


def test_where_one_process_has_the_files_it_writes_and_reads_for_all(tmp_path, monkeypatch):
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=3)) as ours:
        monkeypatch.setattr(ours, "_is_alone", True)
        for process in (1, 0):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            ours.save(process + 5, state(process + 5))
            ours.mark_best(process + 5, score="AP", value=0.5)
        ours.wait()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]
        assert checkpoints.read_best(tmp_path / "best.json")["step"] == 5
        jax.tree.map(np.testing.assert_array_equal, ours.restore(placed, step=5), state(5))


def test_what_the_first_process_finds_intact_or_saved_counts_for_all(tmp_path, monkeypatch):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=3)) as ours:
        for step in (3, 4):
            ours.save(step, state(step))
        ours.wait()
        told, sent = [], []
        monkeypatch.setattr(
            checkpoints.multihost_utils, "broadcast_one_to_all", lambda x: sent.append(int(x)) or np.asarray(told[0])
        )
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        monkeypatch.setattr(ours, "damage", None)  # the others read no file
        for found, step in ((3, 3), (4, 4), (-2, None)):
            told[:] = [found]
            assert ours.intact_step(["params"]) == step
        told[:] = [-1]
        with pytest.raises(checkpoints.DamagedError, match="no checkpoint is intact"):
            ours.intact_step(["params"])
        monkeypatch.setattr(ours, "_is_alone", True)
        monkeypatch.setattr(checkpoints, "_whole", None)  # nothing is gathered
        told[:], sent[:] = [True], []
        ours.save(9, state(9))  # the first process has it
        assert sent == [0]


def test_arrays_that_are_split_over_devices_are_saved_whole():
    mesh, array = sharding.make_mesh(), np.arange(24.0).reshape(8, 3)
    for spec in (sharding.REPLICATED, sharding.BATCH):
        placed = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
        np.testing.assert_array_equal(checkpoints._whole(placed), array)
