"""Strict test settings: 8 simulated CPU devices, warnings are errors, rank promotion raises, one compilation cache."""

import os
import pathlib

# before jax is imported anywhere
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real photographs named by DETCLIP_SHARED_DATA (default ../shared/data); skips where it is absent."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("DETCLIP_SHARED_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the photographs: {folder} is not a folder (set DETCLIP_SHARED_DATA)")
    return folder
