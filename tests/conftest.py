"""Strict test settings: 8 simulated CPU devices, warnings are errors, rank promotion raises, one compilation cache."""

import contextlib
import functools
import gc
import importlib.metadata
import logging
import os
import pathlib
import signal
import subprocess

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
from micro import micro_config
from ml_collections import ConfigDict

from detclipv2_jax.runs import kept

jax.config.update("jax_numpy_rank_promotion", "raise")

# tests put other functions in the place of those that are traced, which nothing that is kept would show
kept.folder = functools.wraps(kept.folder)(lambda: None)

# tracing makes many objects that stay: to look for garbage among them so often takes a sixth of its time
gc.set_threshold(50_000, 20, 100)

# a process that was started in the background ignores Ctrl-C, and so would all that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


# files that take longest come first, so that no process is left with one of them while the others are done
HEAVY = (
    "test_train_step.py", "test_main.py", "test_runs.py", "test_two_processes.py", "test_finetune.py",
    "test_interrupts.py", "test_bucket_workdirs.py", "test_killed.py", "test_train_step_losses.py",
    "test_photographs.py", "test_export.py", "test_detclip.py", "test_house.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: HEAVY.index(item.path.name) if item.path.name in HEAVY else len(HEAVY))


@pytest.fixture(autouse=True)
def all_levels():
    """Every test begins with logs of all levels, whatever a command of the one before it has set."""
    logging.getLogger("absl").setLevel(logging.NOTSET)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
