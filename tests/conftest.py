"""Strict test settings: 8 simulated CPU devices, warnings are errors, rank promotion raises, one compilation cache."""

import importlib.metadata
import os
import pathlib

# before jax is imported anywhere
os.environ["JAX_PLATFORMS"] = "cpu"
# the suite compiles far more than it computes: code without optimisation is ready in a third of the time
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # newer versions know no such flag
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest
from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real photographs named by DETCLIP_SHARED_DATA (default ../shared/data); skips where it is absent."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("DETCLIP_SHARED_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the photographs: {folder} is not a folder (set DETCLIP_SHARED_DATA)")
    return folder


@pytest.fixture
def micro() -> ConfigDict:
    """See `micro_config`; a fresh copy a test."""
    return micro_config()


@pytest.fixture(scope="session")
def micro_session() -> ConfigDict:
    """See `micro_config`; copy it before changing it."""
    return micro_config()


def micro_config() -> ConfigDict:
    """A configuration of the real architecture, as small as it gets, on a generated world of 64 px scenes."""
    c = config_lib.base()
    c.name = "micro"
    c.epochs = 50
    c.model = config_lib.model("nano")
    c.model.embed_dim = 16
    c.model.swin.embed_dim = 8
    c.model.swin.depths = (1, 1, 1, 1)
    c.model.swin.num_heads = (1, 1, 2, 2)
    c.model.head.channels = 16
    c.model.head.num_convs = 1
    c.model.head.num_groups = 4
    c.model.text.width = 16
    c.model.text.num_layers = 1
    c.model.text.num_heads = 1
    c.scenes.num_detection = c.scenes.num_grounding = c.scenes.num_image_text = 24
    c.scenes.num_eval = 12
    c.scenes.size_px = 64
    for kind in config_lib.KINDS:
        c[kind].canvases = ((64, 64),)
        c[kind].short_side = (48, 64)
        c[kind].long_side = 64
        c[kind].batch_size = 8
    c.detection.definitions = c.eval.definitions = False
    c.detection.max_boxes = c.grounding.max_boxes = 8
    c.detection.num_concepts = c.grounding.num_concepts = 12
    c.eval.canvases = ((64, 64),)
    c.eval.short_side = c.eval.long_side = 64
    c.eval.batch_size = 8
    c.eval.num_pictures = 1
    c.loss.num_proposals = 8
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 50
    c.log_every_steps = 1
    c.checkpoint.every_steps = 100
    return c
