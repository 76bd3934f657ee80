"""Concepts of a frozen tower: encoded when first met, in one size, and refused where a step would change them."""

import types

import numpy as np
import pytest

from detclipv2_jax.runs import text_once

SHAPES = {"head": {"kernel": np.zeros(1)}, "text_encoder": {"projection": np.zeros(1), "scale": np.zeros(1)}}


class Batch(types.SimpleNamespace):
    def _replace(self, **fields):
        return Batch(**vars(self) | fields)


def settings(micro, *, frozen="text_encoder/.*"):
    micro.optimizer.text_once, micro.optimizer.frozen = True, frozen
    return micro


def test_a_concept_is_encoded_when_first_met_and_by_batches_of_one_size(micro):
    asked = []

    def encode(params, tokens):
        asked.append((params, tokens))
        return np.stack([tokens[:, 0] * 10.0, tokens[:, 1] + 0.5], axis=1)

    with_text = text_once.make(settings(micro), SHAPES, encode)
    rows = np.array([[3, 1], [0, 0], [3, 1], [7, 2]], np.int32)
    first = with_text("params", Batch(concept_tokens=rows, image="image"))
    assert first.concept_text.tolist() == [[30, 1.5], [0, 0.5], [30, 1.5], [70, 2.5]]
    assert (first.image, first.concept_tokens is rows) == ("image", True)
    with_text("params", Batch(concept_tokens=rows[::-1]))
    many = np.stack([np.arange(300), np.zeros(300)], axis=1).astype(np.int32)
    assert with_text("later", Batch(concept_tokens=many)).concept_text[:, 0].tolist() == list(range(0, 3000, 10))
    assert [(params, tokens.shape) for params, tokens in asked] == [("params", (256, 2)), ("later", (512, 2))]
    assert asked[1][1][:3].tolist() == [[1, 0], [2, 0], [3, 0]]  # (0, 0) is known


def test_without_it_a_batch_stays_as_it_is(micro):
    batch = object()
    assert text_once.make(micro, SHAPES, None)("params", batch) is batch


@pytest.mark.parametrize("frozen", ["", "head/.*", "text_encoder/scale"])
def test_a_tower_that_learns_is_refused(micro, frozen):
    with pytest.raises(ValueError, match=rf"optimizer.frozen is '{frozen}', set it to 'text_encoder/\.\*'"):
        text_once.make(settings(micro, frozen=frozen), SHAPES, None)


def test_tokens_and_several_processes_are_refused(micro, monkeypatch):
    micro.loss.interaction = "tokens"
    with pytest.raises(ValueError, match=r"config\.loss\.interaction tokens needs each token"):
        text_once.make(settings(micro), SHAPES, None)
    micro.loss.interaction = "phrases"
    monkeypatch.setattr(text_once.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"text_once is for one process"):
        text_once.make(settings(micro), SHAPES, None)
