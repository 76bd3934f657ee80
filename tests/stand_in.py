"""Whole runs with a stand-in for the model, for tests of what stands around a step: they compile the losses alone."""

import contextlib
from collections.abc import Iterator

import pytest
from oracle.towers import StandIn

from detclipv2_jax.models import detclip


def model(config, *, class_tokens=None):
    """Returns the stand-in for the model of `config.model`."""
    return StandIn(embed_dim=config.embed_dim)


def install() -> None:
    """Every model that this process makes from now on is a stand-in."""
    detclip.from_config = model


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The same until the end of the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detclip, "from_config", model)
        yield
