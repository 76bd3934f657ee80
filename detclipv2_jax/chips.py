"""What is known of accelerators: one table, asked by preflight, by the utilisation in the log and by `config.chips`."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from typing import NamedTuple

from absl import logging

GIB = 1 << 30
_GPU_DEVICES = ("/dev/nvidia0", "/dev/dxg")  # the second in Windows' Linux
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
# of a GPU's memory, which `main` takes; jax by itself takes three quarters
CUDA_SHARE = 0.9


class Chip(NamedTuple):
    """An accelerator, by its maker's data sheet; arithmetic is dense, a multiplication and an addition are two."""

    name: str  # in `config.chips` and `preflight --topology`
    device_kind: str  # how jax's `device_kind` begins, a regular expression
    platform: str  # tpu | cuda
    peak: float  # bf16 FLOP/s
    bandwidth: float  # of its memory, byte/s
    memory: float  # bytes that a program may use
    network: float  # byte/s that a device sends to others of its host or slice at best; 0: it has no link of its own
    per_host: int  # devices a host has as a rule


# Sources: cloud.google.com/tpu/docs (peak, HBM, interchip interconnect; memory is what programs were seen to get);
# NVIDIA's data sheets of A100, H100, H200, B200, L4 and A10G; for RTX 4080, 4090 and 5090 its papers on the Ada and
# Blackwell architectures (bf16 with float32 accumulation). A GPU's memory is what CUDA says it has in all, less than it
# is sold with. Where one name begins another, the longer comes first.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", "tpu", 275e12, 1228e9, 30.75 * GIB, 300e9, 4),
        Chip("v5e", "TPU v5 lite", "tpu", 197e12, 819e9, 15.75 * GIB, 200e9, 4),
        Chip("v5p", "TPU v5", "tpu", 459e12, 2765e9, 95.74 * GIB, 600e9, 4),
        Chip("v6e", "TPU v6 lite", "tpu", 918e12, 1640e9, 31.25 * GIB, 448e9, 4),
        Chip("a100_40gb", "NVIDIA A100-(SXM4|PCIE)-40GB", "cuda", 312e12, 1555e9, CUDA_SHARE * 39.4 * GIB, 300e9, 8),
        Chip("a100_80gb", "NVIDIA A100", "cuda", 312e12, 2039e9, CUDA_SHARE * 79.1 * GIB, 300e9, 8),
        Chip("h100_pcie", "NVIDIA H100 PCIe", "cuda", 756e12, 2000e9, CUDA_SHARE * 79.1 * GIB, 0.0, 8),
        Chip("h100", "NVIDIA H100", "cuda", 989e12, 3350e9, CUDA_SHARE * 79.1 * GIB, 450e9, 8),
        Chip("h200", "NVIDIA H200", "cuda", 989e12, 4800e9, CUDA_SHARE * 140.0 * GIB, 450e9, 8),
        Chip("b200", "NVIDIA B200", "cuda", 2250e12, 8000e9, CUDA_SHARE * 178.0 * GIB, 900e9, 8),
        Chip("l4", r"NVIDIA L4\b", "cuda", 121e12, 300e9, CUDA_SHARE * 22.0 * GIB, 0.0, 1),
        Chip("a10g", "NVIDIA A10G", "cuda", 70e12, 600e9, CUDA_SHARE * 22.0 * GIB, 0.0, 1),
        Chip("rtx4080", "NVIDIA GeForce RTX 4080", "cuda", 97.5e12, 717e9, CUDA_SHARE * 15.5 * GIB, 0.0, 1),
        Chip("rtx4090", "NVIDIA GeForce RTX 4090", "cuda", 165e12, 1008e9, CUDA_SHARE * 23.5 * GIB, 0.0, 1),
        Chip("rtx5090", "NVIDIA GeForce RTX 5090", "cuda", 209e12, 1792e9, CUDA_SHARE * 31.4 * GIB, 0.0, 1),
    )
}

# How XLA compiles training and prediction, by platform. It would cut maps of fewer than eight images into strips, as
# images of their own, between convolutions: on v5e a tower of the head then moves eight times as much
COMPILER_OPTIONS = {
    "tpu": {"xla_tpu_run_space_to_batch": False, "xla_tpu_run_space_to_batch_on_new_platforms": False},
}


class Gpu(NamedTuple):
    """What XLA asks an NVIDIA GPU for beside what `CHIPS` has, to compile for one that is not there."""

    capability: tuple[int, int]  # of its architecture
    cores: int  # multiprocessors
    clock_ghz: float
    cache_mib: int
    shared_kib: int  # memory of a multiprocessor; a block may have 1 KiB less
    threads: int  # of a multiprocessor


# Sources: NVIDIA's papers on the architectures (multiprocessors, clock, cache), its CUDA programming guide (shared
# memory and threads by compute capability); A100, H100, H200 and B200 as XLA's own descriptions have them
GPUS = {
    "a100_40gb": Gpu((8, 0), 108, 1.41, 40, 164, 2048),
    "a100_80gb": Gpu((8, 0), 108, 1.41, 40, 164, 2048),
    "h100": Gpu((9, 0), 132, 1.98, 50, 228, 2048),
    "h200": Gpu((9, 0), 132, 1.98, 50, 228, 2048),
    "b200": Gpu((10, 0), 148, 1.965, 126, 228, 2048),
    "l4": Gpu((8, 9), 58, 2.04, 48, 100, 1536),
    "a10g": Gpu((8, 6), 80, 1.71, 6, 100, 1536),
    "rtx4080": Gpu((8, 9), 76, 2.505, 64, 100, 1536),
    "rtx4090": Gpu((8, 9), 128, 2.52, 72, 100, 1536),
    "rtx5090": Gpu((12, 0), 170, 2.407, 96, 100, 1536),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the accelerator with jax's name for a device, None where the table has none."""
    if re.search(r"\b(Laptop|Max-Q|MIG)\b", device_kind):  # less of everything under the same name
        return None
    return next((chip for chip in CHIPS.values() if re.match(chip.device_kind, device_kind)), None)


def has_device() -> bool:
    """Returns whether JAX may compute on something else than CPUs, without asking it."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(os.path.exists, (*_GPU_DEVICES, *_TPU_DEVICES)))


def has_nvidia_gpu() -> bool:
    """Returns whether the machine has an NVIDIA GPU with a driver, whatever JAX sees."""
    if os.path.exists(_GPU_DEVICES[0]):
        return True
    try:  # of Windows' Linux there are no such devices
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


@functools.cache
def warn_of_unused_accelerator() -> None:
    """Says in the log, once, how to install JAX for a GPU or TPU that the machine has and JAX does not use."""
    import jax  # here: --help needs none

    if os.environ.get("JAX_PLATFORMS") == "cpu" or jax.default_backend() != "cpu":  # as it was asked to, or well
        return
    found = {
        ("cuda13", "an NVIDIA GPU"): has_nvidia_gpu(),
        ("tpu", "a TPU"): any(map(os.path.exists, _TPU_DEVICES)),
    }
    for extra, what in (key for key, there in found.items() if there):
        install = f"pip install 'detclipv2_jax[{extra}]'"
        logging.warning("this machine has %s that JAX does not see, and runs on its CPUs: %s", what, install)
