"""Programs compiled on another thread."""

import functools
import threading

import jax
import jax.monitoring
import numpy as np
import pytest

from detclipv2_jax import session, train
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs.ahead import Ahead, is_compiling


def test_programs_follow_each_other_and_errors_wait_for_the_call():
    done, go = [], threading.Event()

    def failing():
        raise ValueError("does not fit")

    ahead = Ahead(
        {"a": lambda: done.append("a"), "b": failing, "c": lambda: go.wait(60) and done.append("c"), "d": go.set}
    )
    ahead.wait("b", what="the step")
    ahead.wait("nothing of that name", what="the step")
    assert done == ["a"]
    go.set()
    ahead.wait("c", what="the step")
    assert done == ["a", "c"]
    ahead.close()


def test_what_is_waited_for_is_said_once(caplog):
    go = threading.Event()
    ahead = Ahead({"a": lambda: None, "b": lambda: go.wait(60)})
    with caplog.at_level("INFO", logger="absl"):
        ahead._compiled["a"].result()
        ahead.wait("a", what="what is there")
        threading.Timer(0.1, go.set).start()
        for _ in range(2):
            ahead.wait("b", what="what takes long")
            ahead.wait("c", what="what its call compiles")
    ahead.close()
    assert [record.message for record in caplog.records] == [
        "compiling what takes long", "compiling what its call compiles",
    ]  # fmt: skip


def test_a_program_is_left_alone_where_it_is_not_waited_for():
    go, done = threading.Event(), []
    ahead = Ahead({"first": lambda: (go.wait(60), done.append("first"))})
    ahead.close(wait=False)
    assert is_compiling()
    assert not done
    go.set()
    ahead.close()
    assert not is_compiling()
    assert done == ["first"]


def test_what_waits_is_left_when_the_run_ends():
    started, go, done = threading.Event(), threading.Event(), []
    ahead = Ahead({"first": str, "a": lambda: (started.set(), go.wait(60)), "b": lambda: done.append("b")})
    for _ in range(2):
        ahead.wait("first", what="the step")
    started.wait(60)
    threading.Timer(0.05, go.set).start()
    ahead.close()
    assert not done


def test_only_the_first_program_is_compiled_before_the_first_step_has_run():
    done = []
    ahead = Ahead({key: functools.partial(done.append, key) for key in "abc"})
    ahead.wait("a", what="the step")
    ahead._thread.submit(str).result()  # after whatever else was to be compiled
    assert done == ["a"]
    assert [ahead.ready(key) for key in "abc"] == [True, False, False]
    ahead.wait("a", what="the step")
    ahead._compiled["c"].result()
    assert done == ["a", "b", "c"]
    assert ahead.ready("b")
    ahead.close()


@pytest.mark.slow
def test_a_step_compiled_ahead_is_not_compiled_when_called(micro, tmp_path):
    micro.model.head.deformable = False  # much to compile
    micro.scenes.num_grounding = micro.scenes.num_image_text = 0
    run = train.make_run(session.with_scenes(micro, tmp_path), tmp_path)
    (stream,) = run.streams
    key = stream.kind, stream.canvas
    step = train.jitted_step(run, *key)
    state = train.initial_state(run, train.checkpoints_lib.Checkpoints(tmp_path))
    batch = sharding.to_global(stream.batch(0), run.mesh)
    rows = stream.capacities["table"]
    shapes = sharding.batch_shapes(micro, *key, table_rows=rows, mesh=run.mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), shapes
    )
    ahead = train.compile_ahead(run, {key: step}, state, start=0)
    ahead.wait(key, what="the step")
    ahead.close()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        with jax.set_mesh(run.mesh):
            _, metrics = step(state, batch)
    finally:
        jax.monitoring.clear_event_listeners()
    assert np.isfinite(metrics["loss"])
    assert not [name for name in compiled if "backend_compile" in name]
