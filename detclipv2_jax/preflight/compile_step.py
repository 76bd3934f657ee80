"""One step of a configuration, lowered from shapes and compiled for accelerators that are not there.

    python -m detclipv2_jax.preflight.compile_step JOB.json

is what `detclipv2_jax.preflight` runs, one process a program: the last line of stdout is the measured program as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from detclipv2_jax import config_json, files, inference, train
from detclipv2_jax.chips import CHIPS, CUDA_SHARE, GIB, GPUS
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import flops, split
from detclipv2_jax.preflight import hlo
from detclipv2_jax.runs import sharding
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.optimizer import make_optimizer
from detclipv2_jax.runs.order import StepOrder

MAX_CHUNK_BYTES = 1 << 50  # no loss is cut into chunks
READER = 5  # counts what changed in what is read from a program; results of before are not used
DESCRIBED = ("v4", "v5e", "v5p", "v6e", *GPUS)  # of `chips`, those that programs can be compiled for


def description(name: str) -> str:
    """Returns what XLA compiles for, of a GPU that is not there."""
    chip, gpu = CHIPS[name], GPUS[name]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {(gpu.shared_kib - 1) << 10}
  shared_memory_per_core: {gpu.shared_kib << 10}
  core_count: {gpu.cores} fpus_per_core: {64 if gpu.capability == (8, 0) else 128} clock_rate_ghz: {gpu.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {gpu.cache_mib << 20}
  device_memory_size: {chip.memory / CUDA_SHARE:.0f}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Accelerators named like "v5e:4x8" or "h100:32"."""

    name: str
    chip: str
    num_devices: int

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Returns the topology of a name; ValueError for another chip or form."""
        chip, _, shape = name.partition(":")
        if chip not in DESCRIBED or not re.fullmatch(r"\d+(x\d+)*", shape):
            raise ValueError(
                f"--topology={name} is unknown; allowed are {', '.join(DESCRIBED)}, each with its shape: v5e:4x8, "
                "v5p:4x4x4, h100:8, rtx4090:1"
            )
        return cls(name, chip, math.prod(map(int, shape.split("x"))))

    @property
    def num_hosts(self) -> int:
        return -(-self.num_devices // CHIPS[self.chip].per_host)

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which its programs are compiled on any machine."""
        common = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if CHIPS[self.chip].platform == "tpu":
            # a third of the compiler's time, for a program that is a little slower and takes a little more memory
            return common | {"XLA_FLAGS": "", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}
        # GPU kernels cannot be timed without a GPU; Triton's need one for its choice of tiles. What LLVM
        # optimises takes long, and changes neither memory nor traffic
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_backend_optimization_level=0"
        return common | {"XLA_FLAGS": flags}

    def devices(self) -> list[jax.Device]:
        """Returns the described devices; ValueError without the package that compiles for them."""
        platform = CHIPS[self.chip].platform
        options: dict[str, Any] = {"topology_name": self.name}
        if platform == "cuda":
            shape = f"1x{self.num_hosts}x{self.num_devices // self.num_hosts}"
            options = {"topology_name": "", "target_config": description(self.chip), "topology": shape}
        try:
            return list(topologies.get_topology_desc(platform=platform, **options).devices)
        except Exception as error:  # of several types, each for a missing package or an unknown shape
            version = f"=={jax.__version__}"  # each jax has its own compilers
            cuda = f"jax-cuda13-plugin{version} jax-cuda13-pjrt{version}"
            package = {"tpu": f"'jax[tpu]{version}'", "cuda": cuda}[platform]
            raise ValueError(f"{self.name}: {str(error).splitlines()[0]} (needs `pip install {package}`)") from error

    def versions(self, devices: Sequence[jax.Device]) -> dict[str, str]:
        """Returns what compiles for its described devices."""
        compiler = " ".join(devices[0].client.platform_version.split())
        if CHIPS[self.chip].platform == "tpu":
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # it may come another way
                compiler = f"libtpu {importlib.metadata.version('libtpu')}, {compiler}"
        return {"jax": jax.__version__, "compiler": compiler, **self.environment}


def step_names(config: ConfigDict) -> list[str]:
    """Returns the names of the step programs of kinds with data, each canvas at its largest: smaller ones need less."""
    sections = {kind: config[kind.value] for kind in Kind}
    used = {kind: x for kind, x in sections.items() if x.data or x.get("annotations") or x.get("pairs")}
    names = [f"{kind}/{h}x{w}" for kind, section in used.items() for h, w in section.canvases]
    return names + [f"prediction/{h}x{w}" for h, w in config.eval.canvases]


class Sizes(NamedTuple):
    """What the shapes of a step depend on beside the configuration."""

    table_rows: int  # of the concept tables of all hosts
    num_concepts: int  # distinct ones in the global batch
    num_words: int  # of the vocabulary of an evaluation


class Program(NamedTuple):
    """One step: the jitted function, its arguments as shapes with shardings, and what counts its FLOPs."""

    jitted: Any
    arguments: tuple[Any, ...]
    flops: Callable[[], dict[str, float]]


def _assemble(config: ConfigDict, mesh: jax.sharding.Mesh) -> train.Run:
    """Returns the run of a configuration on a mesh, without files and data."""
    total_steps = 100_000  # a number in the formula of the learning rate
    model = train_state.make_model(config.model)
    shapes = train_state.param_shapes(model, context_length=config.model.text.context_length)
    tx = make_optimizer(config.optimizer, shapes, total_steps)
    return train.Run(
        config=config,
        workdir=pathlib.Path(),
        mesh=mesh,
        streams=[],
        order=StepOrder([total_steps], epochs=1, seed=0),
        model=model,
        tx=tx,
        shardings=train_state.state_shardings(mesh, tx, shapes, ema=config.optimizer.ema_decay > 0),
        detector=inference.Detector(model, mesh=mesh),
        evaluator=None,
        second=None,
        with_text=lambda _, batch: batch,
        shapes=shapes,
    )


def program(config: ConfigDict, name: str, mesh: jax.sharding.Mesh, platform: str, sizes: Sizes) -> Program:
    """Returns the program of a step."""
    kind, canvas = name.split("/")
    height, width = map(int, canvas.split("x"))
    size = (height, width)
    if kind == "prediction":
        return _prediction(config, size, mesh, platform, sizes)
    return _training(config, Kind(kind), size, mesh, platform, sizes)


def _training(
    config: ConfigDict, kind: Kind, canvas: tuple[int, int], mesh: jax.sharding.Mesh, platform: str, sizes: Sizes
) -> Program:
    run = _assemble(config, mesh)
    params = train_state.param_shapes(run.model, context_length=config.model.text.context_length)
    state = jax.eval_shape(lambda p: train_state.create(p, run.tx, ema=run.shardings.ema is not None), params)
    state = jax.tree.map(_placed, state, run.shardings)
    batch = sharding.batch_shapes(config, kind, canvas, table_rows=sizes.table_rows, mesh=mesh)

    def count() -> dict[str, float]:
        counts = {"table_rows": sizes.table_rows, "num_devices": mesh.size}
        by_trace = flops.of_step(config, kind, canvas, **counts)
        whole = _with_deform(config, platform)
        whole.loss.chunk_bytes = MAX_CHUNK_BYTES
        whole.optimizer.text_lengths[kind.value] = ()  # a count would take the second pass, which runs rarely
        step = train.jitted_step(_assemble(whole, mesh), kind, canvas)
        with jax.set_mesh(mesh), split.plain_forms():
            executed = flops.of(step, state, batch)
        # chunks without concepts are skipped
        executed -= flops.of_step(whole, kind, canvas, **counts)(sizes.table_rows) - by_trace(sizes.num_concepts)
        return {
            "model": by_trace(sizes.num_concepts),
            "formula": flops.formula(config, kind, canvas, num_concepts=sizes.num_concepts, **counts),
            "executed": executed,
        }

    return Program(train.jitted_step(run, kind, canvas), (state, batch), count)


def _with_deform(config: ConfigDict, platform: str) -> ConfigDict:
    """Returns a copy whose deformable layer has one platform's form; else the dearer of two forms would be counted."""
    config = config.copy_and_resolve_references()
    if config.model.head.deform_impl == "auto":
        config.model.head.deform_impl = "banded" if platform == "tpu" else "gather"
    return config


def _placed(shape: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _prediction(
    config: ConfigDict, canvas: tuple[int, int], mesh: jax.sharding.Mesh, platform: str, sizes: Sizes
) -> Program:
    run = _assemble(config, mesh)
    params = train_state.param_shapes(run.model, context_length=config.model.text.context_length)
    params = jax.tree.map(_placed, params, run.shardings.params)
    place, whole = (NamedSharding(mesh, spec) for spec in (sharding.BATCH, sharding.REPLICATED))
    b, embed_dim = config.eval.batch_size, config.model.embed_dim
    pairs = jax.ShapeDtypeStruct((b, 2), jnp.int32, sharding=place)
    image = jax.ShapeDtypeStruct((b, *canvas, 3), jnp.uint8, sharding=place)
    shapes: list[Any] = [image, pairs, jax.ShapeDtypeStruct((b, 2), jnp.float32, sharding=place), pairs]
    photos = inference.Photos(*shapes)
    num_words = -(-sizes.num_words // inference.WORD_CHUNK) * inference.WORD_CHUNK
    text = jax.ShapeDtypeStruct((num_words, embed_dim), jnp.float32, sharding=whole)
    mask = jax.ShapeDtypeStruct((num_words,), bool, sharding=whole)
    predict, limits = run.detector.predict, inference.Limits.from_config(config.eval)

    def count() -> dict[str, float]:
        per_image = flops.formula_image(config.model, canvas) + flops.num_anchors(canvas) * num_words * embed_dim
        detectors = {name: _assemble(_with_deform(config, name), mesh).detector for name in ("cpu", platform)}
        model, executed = (
            flops.of(detectors[name].predict, params, photos, text, mask, limits) for name in ("cpu", platform)
        )
        return {"model": model, "formula": 2.0 * b * per_image, "executed": executed}

    return Program(predict, (params, photos, text, mask, limits), count)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Returns a compiled program's memory in bytes a device, traffic, FLOPs of all devices, and times.

    `job` has config (JSON text), topology, step, sizes (of `Sizes`) and cache, the folder where results are kept by the
    hash of the lowered program and of what compiles it.
    """
    config = config_json.from_json(job["config"])
    topology = Topology.parse(job["topology"])
    platform = CHIPS[topology.chip].platform
    devices = topology.devices()
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, devices=devices)
    step = program(config, job["step"], mesh, platform, Sizes(**job["sizes"]))
    with jax.set_mesh(mesh):
        start = time.process_time()
        lowered = step.jitted.trace(*step.arguments).lower(lowering_platforms=(platform,))
        lowering_s = time.process_time() - start
    versions = topology.versions(devices)
    known = json.dumps([job["topology"], versions, job["sizes"], READER]) + lowered.as_text()
    path = pathlib.Path(job["cache"]) / f"{hashlib.sha256(known.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError):  # it is not there, or damaged
        return json.loads(path.read_text())
    counts = step.flops()
    start, clock = time.process_time(), time.monotonic()
    try:
        result = _of_compiled(lowered.compile(), num_concepts=job["sizes"]["num_concepts"])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result = {"memory": _of_refusal(str(error))}
    result |= {
        "flops": counts,
        "lowering_cpu_s": lowering_s,
        "compile_cpu_s": time.process_time() - start,
        "compile_s": time.monotonic() - clock,
        "compiler_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions,
    }
    files.write_json(path, result)
    return result


def _of_compiled(compiled: Any, *, num_concepts: int) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    moved = hlo.traffic(text, num_concepts=num_concepts)
    # donated arguments are results, too
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": results,
        "program": memory.generated_code_size_in_bytes,
    }
    return {
        "memory": parts | {"total": sum(parts.values())},
        "bytes": moved.memory,
        "modules": [[*key, size] for key, size in hlo.by_module((row.place, row.memory) for row in moved.rows).items()],
        "network": moved.network,
        "unknown_loops": moved.unknown_loops,
        "instructions": text.count("\n"),
    }


def _of_refusal(message: str) -> dict[str, float]:
    """Returns the memory that a program needs, from the message of the compiler that refuses it.

    Compilers word it in two ways; the newer one names temporaries alone. In a third way it is unknown, and infinite.
    """
    found = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT]?)", message)
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
    return {"total": float(found[1]) * units[found[2]] if found else math.inf}


def main() -> None:
    print(json.dumps(measure(json.loads(pathlib.Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
