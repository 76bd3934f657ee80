"""The table of accelerators against the makers' data sheets."""

import os
import subprocess

import jax
import pytest

from detclipv2_jax import chips
from detclipv2_jax.chips import CHIPS, CUDA_SHARE, GIB, chip_of


@pytest.mark.parametrize(
    ("name", "peak", "bandwidth", "gigabytes"),
    [("v4", 275e12, 1228e9, 32), ("v5e", 197e12, 819e9, 16), ("v5p", 459e12, 2765e9, 95), ("v6e", 918e12, 1640e9, 32),
     ("a100_80gb", 312e12, 2039e9, 80), ("h100", 989e12, 3350e9, 80), ("h200", 989e12, 4800e9, 141),
     ("l4", 121e12, 300e9, 24), ("b200", 2250e12, 8000e9, 180), ("a100_40gb", 312e12, 1555e9, 40),
     ("a10g", 70e12, 600e9, 24), ("rtx4080", 97.5e12, 717e9, 16), ("rtx4090", 165e12, 1008e9, 24),
     ("rtx5090", 209e12, 1792e9, 32)],
)  # fmt: skip
def test_peaks_and_memories_of_the_data_sheets(name, peak, bandwidth, gigabytes):
    chip = CHIPS[name]
    assert (chip.peak, chip.bandwidth) == (peak, bandwidth)
    usable = {"tpu": 1.0, "cuda": CUDA_SHARE}[chip.platform] * gigabytes * 2**30
    assert 0.9 * usable < chip.memory < 1.02 * usable
    assert (GIB, CUDA_SHARE) == (1_073_741_824, 0.9)


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("NVIDIA H100 80GB HBM3", "h100"),
     ("NVIDIA H100 PCIe", "h100_pcie"), ("NVIDIA A100-SXM4-40GB", "a100_40gb"), ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
     ("NVIDIA A100-PCIE-40GB", "a100_40gb"), ("NVIDIA A100 80GB PCIe", "a100_80gb"), ("NVIDIA L4", "l4"),
     ("NVIDIA GeForce RTX 4080 SUPER", "rtx4080"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA A10G", "a10g"),
     # others of the same beginning, which have more or less of everything
     ("NVIDIA L40S", None), ("NVIDIA A10", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GB200", None)],
)  # fmt: skip
def test_devices_are_known_by_the_beginning_of_their_name(device_kind, name):
    chip = chip_of(device_kind)
    assert (chip.name if chip else None) == name
    assert chip_of("cpu") is None
    assert chip_of("TPU") is None


@pytest.mark.parametrize(
    ("present", "status", "platforms", "said"),
    [
        ("/dev/nvidia0", None, "", ["pip install 'detclipv2_jax[cuda13]'"]),
        ("", 0, "", ["pip install 'detclipv2_jax[cuda13]'"]),
        ("", 9, "", []),  # nvidia-smi without a GPU
        ("/dev/accel0", None, "", ["pip install 'detclipv2_jax[tpu]'"]),
        ("/dev/nvidia0", None, "cpu", []),  # as it was asked to
        ("", None, "", []),
        ("/dev/vfio/0", None, "", ["pip install 'detclipv2_jax[tpu]'"]),
        ("/dev/dxg", None, "", []),  # Windows' Linux, without a driver
    ],
)
def test_an_accelerator_that_jax_does_not_see_is_said_once(present, status, platforms, said, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    if status is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    exists = os.path.exists
    monkeypatch.setattr(chips.os.path, "exists", lambda path: exists(path) if path[:5] != "/dev/" else path == present)
    warned = []
    monkeypatch.setattr(chips.logging, "warning", lambda text, what, install: warned.append(install))
    chips.warn_of_unused_accelerator.cache_clear()
    with monkeypatch.context() as patch:  # JAX sees it
        patch.setattr(jax, "default_backend", lambda: "gpu")
        chips.warn_of_unused_accelerator()
        assert not warned
    chips.warn_of_unused_accelerator.cache_clear()
    for _ in range(2):
        chips.warn_of_unused_accelerator()
    assert warned == said
    assert chips.has_nvidia_gpu() == (present == "/dev/nvidia0" or status == 0)
    assert chips.has_device() == (bool(present) and platforms != "cpu")
    chips.warn_of_unused_accelerator.cache_clear()


def test_a_driver_that_does_not_answer_is_none(monkeypatch):
    def run(command, *, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(chips.os.path, "exists", lambda path: False)
    monkeypatch.setattr(chips.subprocess, "run", run)
    assert not chips.has_nvidia_gpu()
