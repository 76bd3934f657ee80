"""What is traced of the forms of a layer."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from detclipv2_jax.models import split
from detclipv2_jax.runs import sharding


@pytest.mark.parametrize("own", [False, True])
def test_forms_of_other_devices_are_traced_only_where_the_device_is_not_known(own):
    traced = []

    def form(name):
        return lambda x: (traced.append(name), x + len(name))[1]

    forms = {"tpu": form("tpu")} | ({"cpu": form("host")} if own else {})
    step = jax.jit(lambda x: split.by_platform(x, default=form("default"), **forms))
    assert not split.on_cpus()  # nothing says what it is for
    with jax.set_mesh(sharding.make_mesh(fsdp=1)):
        assert split.on_cpus()
        known = step(jnp.float32(1.0))
    assert traced == (["host"] if own else ["default"])
    traced.clear()
    assert step(jnp.float32(1.0)) == known == (5.0 if own else 8.0)
    assert "tpu" in traced
    for plain in (True, False):
        traced.clear()
        with split.plain_forms() if plain else contextlib.nullcontext():
            jax.jit(lambda x: split.by_platform(x, default=form("default"), tpu=form("tpu")))(jnp.float32(1.0))
        assert ("tpu" in traced) is not plain


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("DETCLIP_KERNELS", "off")
    with jax.set_mesh(sharding.make_mesh(fsdp=1)):
        assert jax.jit(lambda x: split.by_platform(x, default=lambda x: x, cpu=lambda x: x + 1))(1) == 1
    monkeypatch.setenv("DETCLIP_KERNELS", "0")
    with pytest.raises(ValueError, match="DETCLIP_KERNELS=0 is unknown; allowed are on"):
        split.by_platform(1, default=lambda x: x)


def test_the_kind_of_device_is_that_of_the_mesh():
    assert split.device_kind() == jax.devices()[0].device_kind
    with jax.set_mesh(sharding.make_mesh(fsdp=1)):
        assert split.device_kind() == jax.devices()[0].device_kind
    described = AbstractMesh(
        (1,), ("data",), abstract_device=AbstractDevice(device_kind="TPU v4", num_cores=None, platform="tpu")
    )
    with jax.sharding.use_abstract_mesh(described):
        assert split.device_kind() == "TPU v4"
