import dataclasses

import jax
import numpy as np
import pytest

from detclipv2_jax.data.schema import Batch, Kind, Record, UnusableError


def test_kinds_are_the_configuration_names():
    assert [kind.value for kind in Kind] == ["detection", "grounding", "image_text"]
    assert Kind("grounding") is Kind.GROUNDING
    assert f"{Kind.IMAGE_TEXT}" == "image_text"


def test_batch_is_a_pytree_of_its_fields():
    batch = Batch(*(np.full(2, i) for i in range(len(Batch._fields))))
    assert Batch._field_defaults == {"class_names": None, "federated": None, "concept_text": None}
    doubled = jax.tree.map(lambda x: 2 * x, batch)
    assert isinstance(doubled, Batch)
    assert doubled.caption_mask[0] == 2 * Batch._fields.index("caption_mask")


def test_record_cannot_be_changed():
    record = Record(Kind.IMAGE_TEXT, "s", 0, b"", (0, 0), np.zeros((0, 4), np.float32), (), np.zeros(0, np.int32))
    assert (record.caption, record.negatives, record.not_negatives, record.federated) == ("", (), (), False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.caption = "x"


def test_unusable_error_carries_its_reason():
    with pytest.raises(ValueError, match="empty file") as caught:
        raise UnusableError("empty file")
    assert caught.value.reason == "empty file"
