"""Builds data sets as `prepare` does, in this process and without noun phrases unless told otherwise."""

from typing import Any

from detclipv2_jax.prepare import __main__ as prepare


def build(kind: str, **options: Any) -> dict[str, Any]:
    return prepare.run(kind, **{"workers": 1, "pipeline": ""} | options)
