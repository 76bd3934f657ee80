"""A step that is run again: which batches come before it, and what is said of it."""

import types

import jax
import numpy as np
import pytest

from detclipv2_jax.data.schema import Kind
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs.order import Draw
from detclipv2_jax.runs.replay import replay

DRAWS = [Draw(0, 0), Draw(1, 0), Draw(0, 1), Draw(1, 1), Draw(0, 2)]


@pytest.fixture
def run(monkeypatch):
    """Arguments of `replay`: a state counts what it was given, and a batch is the place it was drawn from."""
    monkeypatch.setattr(sharding, "to_global", lambda batch, mesh: batch)

    class Stream:
        def __init__(self, kind):
            self.kind, self.name, self.examples = kind, f"{kind.value}/8x4", []

        def canvas_of(self, position):
            return 8, 4 + position

        def batch(self, position):
            self.examples = [(0, 10 * position), (1, 7)]
            return self.kind.value, position

        def named(self, examples):
            return str(examples)

    def compiled(kind, canvas):
        def step(state, batch):
            batch, params = batch
            assert (batch, params) == ((kind.value, canvas[1] - 4), "parameters")
            seen = (*state.seen, batch)
            after = types.SimpleNamespace(step=state.step + 1, seen=seen, params=state.params)
            return after, {"loss": np.float32(len(seen)), "finite": 1.0}

        return step

    return {
        "state": types.SimpleNamespace(step=np.int32(1), seen=(), params="parameters"),
        "order": types.SimpleNamespace(draw=lambda step: DRAWS[step]),
        "streams": [Stream(Kind.DETECTION), Stream(Kind.IMAGE_TEXT)],
        "compiled": compiled,
        "with_text": lambda params, batch: (batch, params),
        "mesh": jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
    }


@pytest.mark.parametrize(
    ("number", "num_steps", "name", "examples"),
    [(2, 1, "image_text", "[(0, 0), (1, 7)]"), (5, 4, "detection", "[(0, 20), (1, 7)]")],
)
def test_the_steps_from_the_state_to_the_one_asked_for_are_done(run, number, num_steps, name, examples, capsys):
    assert replay(number, **run) == {f"{name}/loss": num_steps, f"{name}/finite": 1.0}
    assert capsys.readouterr().out == (
        f"step {number}, batch {DRAWS[number - 1].position} of {name}/8x4:\n  {name}/finite 1\n"
        f"  {name}/loss {num_steps}\nexamples of process 0: {examples}\n"
    )
