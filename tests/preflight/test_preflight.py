"""The tool: sizes and steps of a run, tables and exit status from recorded figures, one program compiled for a TPU."""

import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest

from configs import swin_t
from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json
from detclipv2_jax.chips import CHIPS, GIB, GPUS
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import flops
from detclipv2_jax.preflight import __main__ as command
from detclipv2_jax.preflight import compile_step, data_plan
from detclipv2_jax.preflight import report as preflight
from detclipv2_jax.preflight.compile_step import Topology
from detclipv2_jax.runs import sharding

V5E = Topology.parse("v5e:4x8")
REAL_MESH = sharding.make_mesh


def result(total_gib, *, executed=4e14):
    memory = {"arguments": 1.25 * GIB, "temporaries": total_gib * GIB - 1.25 * GIB, "results": 0, "program": 0}
    return {
        "memory": memory | {"total": total_gib * GIB},
        "bytes": 250e9,
        "network": {"all-reduce": 0.5e9},
        "unknown_loops": 0,
        "flops": {"model": 3.2e14, "formula": 3.25e14, "executed": executed},
        "compile_cpu_s": 300.0,
        "versions": {"jax": "0.10.2", "compiler": "libtpu"},
    }


def test_topologies():
    assert (V5E.num_devices, V5E.num_hosts) == (32, 8)
    assert (Topology.parse("h100:8").num_hosts, Topology.parse("h100:32").num_hosts) == (1, 4)
    assert Topology.parse("v5p:4x4x4").num_devices == 64
    assert [Topology.parse(name).num_hosts for name in ("h100:9", "v5e:3x3", "v5e:1x1")] == [2, 3, 1]
    cards = {name for name, chip in CHIPS.items() if chip.platform == "cuda" and name != "h100_pcie"}
    assert set(GPUS) == cards
    for name in ("v7:4x4", "v5e", "h100:", "v5e:4x", "h100_pcie:1"):
        with pytest.raises(ValueError, match="v5e:4x8"):
            Topology.parse(name)


def test_a_gpu_is_described_as_xla_does():
    text = compile_step.description("a100_40gb")
    # xla/backends/gpu/target_config/specs/a100_sxm_40.txtpb
    for line in (
        "threads_per_core_limit: 2048", "shared_memory_per_block_optin: 166912", "shared_memory_per_core: 167936",
        "core_count: 108", "fpus_per_core: 64", "clock_rate_ghz: 1.41", "memory_bandwidth: 1555000000000",
        "l2_cache_size: 41943040", "cuda_compute_capability { major: 8 minor: 0 }",
    ):  # fmt: skip
        assert line in text
    size = int(re.search(r"device_memory_size: (\d+)", text)[1])
    assert size == pytest.approx(42331013120, rel=1e-3)
    for line in ("fpus_per_core: 128", "shared_memory_per_block_optin: 101376", "{ major: 8 minor: 6 }"):
        assert line in compile_step.description("a10g")


def test_steps_and_sizes_of_the_paper_s_run():
    config = swin_t.get_config()
    plan = data_plan.expected(config, num_hosts=8, num_devices=32)
    # docs/decisions.md: 5,156 / 6,016 / 2,116 steps an epoch
    totals = {kind: sum(num for name, num in plan.num_steps.items() if name.startswith(kind)) / 12 for kind in Kind}
    assert list(totals.values()) == pytest.approx([5156, 6016, 2116], rel=0.001)
    # a host has 16 images; names are known to be 365, phrases are not, pairs have a caption and 8 phrases
    assert plan.table_rows == {"detection": 8 * 368, "grounding": 8 * 1600, "image_text": 8 * 768 * 9}
    # groups of texts by length hold 0.16 and 0.54 of the rows of pairs, rounded up
    assert plan.num_concepts == plan.table_rows | {"detection": 365, "image_text": 8848 + 29860}
    config.optimizer.text_lengths.image_text = ()
    whole = data_plan.expected(config, num_hosts=8, num_devices=32)
    assert whole.num_concepts == plan.table_rows | {"detection": 365}
    names = compile_step.step_names(config)
    assert preflight._sizes_of(plan, names[0]) == (8 * 368, 365, 1203)
    assert preflight._sizes_of(plan, "prediction/800x1344") == (0, 0, 1203)
    given = {"table_rows": 8 * 368, "num_devices": 32, "num_concepts": 365}
    assert preflight._by_formula(config, V5E, names[0], plan) == flops.formula(
        config, Kind.DETECTION, config.detection.canvases[0], **given
    )
    # the largest size of every canvas is compiled, and steps are even over canvases and their sizes
    assert {name for name in compile_step.step_names(config) if not name.startswith("pred")} < set(plan.num_steps)
    boxes = [
        f"{h}x{w}" for long, short in ((1216, 800), (960, 640), (736, 480)) for h, w in ((short, long), (long, short))
    ]
    assert {name for name in plan.num_steps if name.startswith("det")} == {f"detection/{size}" for size in boxes}
    assert plan.num_steps["grounding/736x480"] == pytest.approx(12 * 770_000 / 128 / 6)
    assert plan.num_steps["image_text/256x320"] == pytest.approx(12 * 13_000_000 / 6144 / 3)


def test_steps_are_those_of_kinds_with_data():
    config = swin_t.get_config()
    for kind in Kind:
        config[kind.value].data = ()
    config.eval.canvases = ((320, 320),)
    assert compile_step.step_names(config) == ["prediction/320x320"]
    config.image_text.pairs = "pairs.tsv"
    assert compile_step.step_names(config)[0] == "image_text/320x320"
    config.image_text.pairs, config.grounding.annotations = "", "a.json"
    assert {name.split("/")[0] for name in compile_step.step_names(config)} == {"grounding", "prediction"}


def test_a_kind_that_begins_later_has_fewer_steps():
    config = swin_t.get_config()
    whole = data_plan.expected(config, num_hosts=8, num_devices=32).num_steps
    config.grounding.from_epoch = 9
    later = data_plan.expected(config, num_hosts=8, num_devices=32).num_steps
    assert {name: later[name] / num for name, num in whole.items()} == {
        name: pytest.approx(0.25 if name.startswith("grounding") else 1.0) for name in whole
    }


@pytest.mark.slow
def test_what_a_prediction_computes_is_near_the_formula_and_a_tpu_computes_more(micro):
    micro.eval.canvases = ((320, 320),)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    sizes = compile_step.Sizes(0, 0, 130)
    program = compile_step.program(micro, "prediction/320x320", mesh, "tpu", sizes)
    assert [x.shape for x in program.arguments[2:4]] == [(256, micro.model.embed_dim), (256,)]  # whole chunks of words
    counts = program.flops()
    assert counts["model"] == pytest.approx(counts["formula"], rel=0.05)
    assert counts["executed"] > counts["model"]  # the banded form of the deformable layer


def run(monkeypatch, tmp_path, measured, *, only=(), change=None, **more):
    """Runs the tool on configs/swin_t.py with recorded measurements; returns (report, exit status well?, compiled)."""
    compiled = []

    def measure(config, topology, step, sizes, cache):
        compiled.append((step, config.optimizer.accumulate.to_dict(), config.model.remat))
        return measured(step, config)

    monkeypatch.setattr(preflight, "measure", measure)
    config = swin_t.get_config()
    config.update(change or {})
    options = {"only": only, "cache": tmp_path, "check_data": False} | more
    return *preflight.run(config, ["v5e:4x8"], **options), compiled


def test_a_run_that_fits(monkeypatch, tmp_path):
    report, well, compiled = run(monkeypatch, tmp_path, lambda step, config: result(12.5))
    assert well
    assert [step for step, *_ in compiled] == compile_step.step_names(swin_t.get_config())
    row = next(line for line in report.splitlines() if line.startswith("| detection/800x1216"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "detection/800x1216", "1.25", "11.25", "12.50", "yes", "320.0 (325.0)", "+25%", "250", "all-reduce 0.50",
        "305: 63, 305, 2", "17%", "5.0 CPU min",
    ]  # fmt: skip
    assert len(cells) == len(preflight.COLUMNS)
    # 12 × (5,156 + 6,016 + 2,116) steps on the largest canvases move 250 GB on each of 32 devices, at 819 GB/s
    plan = data_plan.expected(swin_t.get_config(), num_hosts=8, num_devices=32)
    hours = 0.0
    for name, num in plan.num_steps.items():
        kind, canvas = name.split("/")
        sizes = [tuple(map(int, size.split("x"))) for size in (canvas, "800x1216")]
        small, large = (preflight._by_formula(swin_t.get_config(), V5E, f"{kind}/{h}x{w}", plan) for h, w in sizes)
        hours += num * 250 / 819 / 3600 * (1 if kind == "image_text" else small / large)
    assert f"at least {32 * hours:,.0f} chip-hours, {hours:.1f} hours" in report
    assert hours < 0.8 * 12 * (660_000 / 128 + 770_000 / 128 + 13_000_000 / 6144) * 250 / 819 / 3600


def test_a_canvas_that_was_not_compiled_is_estimated_by_the_largest():
    work = {"detection/64x96": 8.0, "detection/32x64": 3.0, "detection/32x48": 2.0, "grounding/64x96": 197e12 * 32}
    least = {"detection/64x96": 4.0, "detection/32x64": 3.5}
    found = {step: preflight._least_of(step, least, V5E, work.get) for step in work}
    assert found == least | {"detection/32x48": 1.0, "grounding/64x96": 1.0}


def test_values_that_would_fit_are_found(monkeypatch, tmp_path):
    def measured(step, config):
        return result(20.0 / config.optimizer.accumulate.detection + 1, executed=4e14)

    report, well, compiled = run(monkeypatch, tmp_path, measured, only=["detection/800x1216"])
    assert not well
    assert "--config.optimizer.accumulate.detection=2 (11.0 GiB, +0% FLOPs)" in report
    assert [accumulate["detection"] for _, accumulate, _ in compiled] == [1, 2]
    # two images a device are not enough, so they are not tried
    _, _, compiled = run(
        monkeypatch,
        tmp_path,
        lambda step, config: result(60.0 / config.optimizer.accumulate.detection),
        only=["detection/8"],
    )
    assert [accumulate["detection"] for _, accumulate, _ in compiled] == [1, 4]


def test_pairs_are_recomputed_before_they_are_embedded_twice(monkeypatch, tmp_path):
    def measured(step, config):
        return result(18.0) if config.model.remat == "blocks" else result(14.0, executed=6e14)

    report, well, compiled = run(monkeypatch, tmp_path, measured, only=["image_text/320x320"])
    assert not well
    assert "--config.model.remat=all (14.0 GiB, +50% FLOPs)" in report
    assert len(compiled) == 2


def test_a_compiler_that_dies_is_reported(monkeypatch, tmp_path):
    paper = {"canvases": config_lib.base().detection.canvases, "num_scales": 0}
    change = {"detection": paper, "grounding": paper, "image_text": {"canvases": ((320, 320),)}}
    error = {"error": "exit status -9: killed"}
    report, well, _ = run(monkeypatch, tmp_path, lambda step, config: error, only=["pred"], change=change)
    assert not well
    assert "exit status -9" in report
    # the FLOPs of steps that were not compiled are those of the formula: about 214, 339 and 1,145 TFLOP
    hours = 12 * (5156 * 214.2e12 + 6016 * 339.2e12 + 2116 * 1145e12) / 197e12 / 3600
    assert "where not compiled, by FLOPs beside its kind's largest, or by compute alone" in report
    assert float(re.search(r"(\d+) chip-hours", report)[1]) == pytest.approx(hours, rel=0.05)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 23.57G of 15.75G hbm. Exceeded by 7.82G.", 23.57),
        (
            "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(15.84G) exceeds available HBM (15.75G). HLO module: jit_step.",
            15.84,
        ),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (1536M) exceeds it", 1.5),
        ("Used 3145728K of 2G hbm.", 3.0),
        ("Used 2.5T of 15.75G hbm.", 2560.0),
        ("too large", math.inf),
    ],
)
def test_what_a_compiler_says_when_it_refuses(message, gib):
    assert compile_step._of_refusal(f"RESOURCE_EXHAUSTED: {message}")["total"] == pytest.approx(gib * GIB)


def test_a_refusal_without_a_number_is_no_number_and_all_is_tried(monkeypatch, tmp_path):
    def measured(step, config):
        return result(math.inf if config.optimizer.accumulate.detection < 4 else 9.0)

    report, well, compiled = run(monkeypatch, tmp_path, measured, only=["detection/800x1216"])
    assert not well
    assert "more than 15.8 GiB (the compiler does not say how much), DOES NOT FIT; would: --config." in report
    assert [accumulate["detection"] for _, accumulate, _ in compiled] == [1, 2, 4]


def test_one_report_of_the_data_and_one_of_each_topology(monkeypatch, tmp_path):
    config, totals = swin_t.get_config(), {32: 16.0, 64: 9.0}
    config.eval.batch_size = 64
    modules = {"modules": [["swin", "forward", 1e9]]}  # of which there is a table on demand
    monkeypatch.setattr(
        preflight, "measure", lambda config, topology, *_: result(totals[topology.num_devices]) | modules
    )
    options = {"only": ["prediction/8"], "cache": tmp_path, "check_data": False}
    text, well = preflight.run(config, ["v5e:4x8", "v5e:8x8"], **options)
    assert not well  # the first does not fit
    assert re.findall("### .*", text) == ["### Data", "### v5e:4x8: 32 × 15.8 GiB", "### v5e:8x8: 64 × 15.8 GiB"]
    assert "by module" not in text


def test_a_topology_is_measured_and_checked_with_the_values_of_its_chip(monkeypatch, tmp_path):
    config, asked = swin_t.get_config(), []
    config.chips.v5e = (("model.remat", "heads"),)
    monkeypatch.setattr(
        preflight,
        "measure",
        lambda config, topology, *_: asked.append((topology.chip, config.model.remat)) or result(9.0),
    )
    options = {"only": ["prediction/8"], "cache": tmp_path, "check_data": False}
    preflight.run(config, ["v5e:4x8", "h100:8"], **options)
    assert asked == [("v5e", "heads"), ("h100", config.model.remat)]
    assert config.model.remat != "heads"
    config.chips.v5e = (("detection.batch_size", 33),)
    with pytest.raises(ValueError, match=r"detection\.batch_size"):
        preflight.run(config, ["v5e:4x8"], **options)


def test_what_is_tried_for_a_step_that_does_not_fit():
    config = swin_t.get_config()
    config.eval.batch_size, config.model.remat = 128, "blocks"
    config.detection.batch_size = config.image_text.batch_size = 128
    assert list(preflight.alternatives(config, "prediction/8x8", 32)) == [{"eval.batch_size": n} for n in (64, 32)]
    remat = {"model.remat": "all"}
    for kind in ("detection", "image_text"):
        chunks = [{f"optimizer.accumulate.{kind}": n} for n in (2, 4)]
        first = chunks if kind == "detection" else [remat]
        expected = [*first, *(chunk | remat for chunk in chunks)]
        assert list(preflight.alternatives(config, f"{kind}/8x8", 32)) == expected
    config.model.remat = "all"
    assert list(preflight.alternatives(config, "detection/8x8", 32)) == [
        {"optimizer.accumulate.detection": n} for n in (2, 4)
    ]
    assert list(preflight.alternatives(config, "image_text/8x8", 128)) == []
    # of a step four times too large: what may be enough, and no more programs than are compiled in a while
    row = preflight.Row(V5E, "detection/8x8", {"memory": {"total": 4 * preflight.CHIPS["v5e"].memory}})
    tried = [{"a": 2}, {"a": 4}, remat | {"a": 2}, {"a": 8}, {"a": 16}, {"a": 32}]
    assert preflight._likely(row, tried) == [tried[i] for i in (1, 2, 3, 4)]
    barely = preflight.Row(V5E, "detection/8x8", {"memory": {"total": 1.9 * preflight.CHIPS["v5e"].memory}})
    assert preflight._likely(barely, tried) == tried[:4]


def test_a_step_that_takes_all_memory_fits():
    memory = preflight.CHIPS["v5e"].memory
    fits = [preflight.Row(V5E, "a/8x8", {"memory": {"total": total}}).fits for total in (memory, memory + 1)]
    assert fits == [True, False]


def test_why_a_process_ended():
    assert preflight.failure(-9, "") == (
        "killed by signal 9 (this machine ran out of memory: compiling takes 8 GB and more)"
    )
    assert preflight.failure(-15, "a\n") == "killed by signal 15"
    assert preflight.failure(1, "Traceback\n\nKeyError: 3\n \n") == "exit status 1: KeyError: 3"
    assert preflight.failure(2, "\n") == "exit status 2: without a message"


def test_a_program_is_measured_by_a_process_of_its_own(monkeypatch, tmp_path, micro):
    asked = []

    def process(command, *, env, **options):
        asked.append((command[:-1], json.loads(pathlib.Path(command[-1]).read_text()), env))
        return subprocess.CompletedProcess(command, status, 'noise\n{"a": 1}\n', "Traceback\nKeyError: 3\n")

    monkeypatch.setattr(preflight.subprocess, "run", process)
    status = 0
    sizes = compile_step.Sizes(3, 4, 5)
    assert preflight.measure(micro, V5E, "detection/64x64", sizes, tmp_path) == {"a": 1}
    ((command, job, env),) = asked
    assert command == [sys.executable, "-m", "detclipv2_jax.preflight.compile_step"]
    assert config_json.differences(config_json.from_json(job.pop("config")), micro) == []
    assert job == {
        "topology": "v5e:4x8", "step": "detection/64x64", "cache": str(tmp_path),
        "sizes": {"table_rows": 3, "num_concepts": 4, "num_words": 5},
    }  # fmt: skip
    assert env.items() >= V5E.environment.items()
    assert env["PATH"] == os.environ["PATH"]
    status = 1
    assert preflight.measure(micro, V5E, "a/8x8", sizes, tmp_path) == {"error": "exit status 1: KeyError: 3"}


def test_the_command_prints_and_keeps_the_report(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(
        preflight, "run", lambda *given, **options: asked.append((given, options)) or ("text", options["by_module"])
    )
    path = tmp_path / "report.md"
    assert command.main(config="c", topology=["v5e:4x8"], only=("a",), cache=tmp_path, output=path, by="module") == 0
    assert asked.pop() == (
        ("c", ["v5e:4x8"]), {"only": ("a",), "cache": tmp_path, "check_data": True, "by_module": True}
    )  # fmt: skip
    assert (path.read_text(), capsys.readouterr().out) == ("text\n", "text\n")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert command.main(config="c", topology=[], cache=pathlib.Path("~/x"), data=False) == 1
    ((_, options),) = asked
    assert (options["check_data"], options["by_module"]) == (False, False)
    assert options["cache"] == pathlib.Path.home() / "x"


@pytest.mark.parametrize(
    ("name", "platform", "options"),
    [("v5e:4x8", "tpu", {"topology_name": "v5e:4x8"}), ("h100:32", "cuda", {"topology": "1x4x8", "topology_name": ""})],
)
def test_devices_are_those_of_a_description(monkeypatch, name, platform, options):
    asked = []
    topology = Topology.parse(name)

    def describe(**given):
        asked.append(given)
        return types.SimpleNamespace(devices=("a", "b"))

    monkeypatch.setattr(compile_step.topologies, "get_topology_desc", describe)
    assert topology.devices() == ["a", "b"]
    assert asked[0].pop("target_config", "") == (compile_step.description("h100") if platform == "cuda" else "")
    assert asked == [{"platform": platform} | options]
    assert ("JAX_EXEC_TIME_OPTIMIZATION_EFFORT" in topology.environment) == (platform == "tpu")
    assert ("autotune_level=0" in topology.environment["XLA_FLAGS"]) == (platform == "cuda")

    def missing(**_):
        raise RuntimeError("no such plugin\nmore")

    monkeypatch.setattr(compile_step.topologies, "get_topology_desc", missing)
    jax_version = jax.__version__
    cuda = f"jax-cuda13-plugin=={jax_version} jax-cuda13-pjrt=={jax_version}"
    package = re.escape({"tpu": f"'jax[tpu]=={jax_version}'", "cuda": cuda}[platform])
    with pytest.raises(ValueError, match=rf"^{name}: no such plugin \(needs `pip install {package}`\)$"):
        topology.devices()


@pytest.mark.parametrize(("name", "installed", "named"), [
    ("v5e:4x8", "0.0.50.1", "libtpu 0.0.50.1, TFRT TPU v5 lite"), ("v5e:4x8", None, "TFRT TPU v5 lite"),
    ("h100:8", "0.0.50.1", "TFRT TPU v5 lite"),
])  # fmt: skip
def test_the_compiler_is_named_with_its_package(name, installed, named, monkeypatch):
    def version(package):
        if package != "libtpu" or not installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    device = types.SimpleNamespace(client=types.SimpleNamespace(platform_version="TFRT TPU\n v5 lite"))
    topology = Topology.parse(name)
    assert topology.versions([device]) == {"jax": jax.__version__, "compiler": named, **topology.environment}


@pytest.fixture
def measured(monkeypatch, micro, tmp_path):
    """Measures a stand-in for a lowered program; returns the result. `compiled` counts how often it was compiled."""

    def measure(text="program", *, refusal=None, **changes):
        def compile_it():
            measure.compiled += 1
            if refusal:
                raise jax.errors.JaxRuntimeError(refusal)
            return text

        def lower(*, lowering_platforms):
            measure.platforms = lowering_platforms
            return types.SimpleNamespace(as_text=lambda: text, compile=compile_it)

        jitted = types.SimpleNamespace(trace=lambda *_: types.SimpleNamespace(lower=lower))
        program = compile_step.Program(jitted, (), lambda: {"model": 1.0})
        monkeypatch.setattr(compile_step, "program", lambda config, name, mesh, platform, sizes: program)
        monkeypatch.setattr(compile_step, "_of_compiled", lambda compiled, *, num_concepts: {"text": compiled})
        client = types.SimpleNamespace(platform_version="of the compiler")
        devices = [types.SimpleNamespace(client=client)]
        monkeypatch.setattr(Topology, "devices", lambda self: devices)
        monkeypatch.setattr(sharding, "make_mesh", lambda *, fsdp, devices: REAL_MESH(devices=jax.devices()[:1]))
        job = {"config": config_json.to_json(micro), "topology": "v5e:4x8", "step": "detection/64x64"}
        job |= {"sizes": {"table_rows": 3, "num_concepts": 4, "num_words": 5}, "cache": str(tmp_path)}
        return compile_step.measure(job | changes)

    measure.compiled = 0
    return measure


def test_a_program_is_compiled_once_for_all_that_decides_what_comes_out(measured, tmp_path):
    first = measured()
    assert (first["text"], first["flops"], measured.platforms) == ("program", {"model": 1.0}, ("tpu",))
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"]["compiler"].endswith("of the compiler")
    assert measured() == first
    assert measured.compiled == 1
    others = (
        {"text": "another"},
        {"topology": "v5e:8x8"},
        {"topology": "h100:8"},
        {"sizes": {"table_rows": 3, "num_concepts": 5, "num_words": 5}},
    )
    for i, change in enumerate(others, start=2):
        measured(**change)
        assert measured.compiled == i, change
    for path in tmp_path.glob("*.json"):
        path.write_text("{")
    assert measured()["text"] == "program"
    assert measured.compiled == len(others) + 2


def test_a_program_that_does_not_fit_has_the_memory_that_it_needs(measured):
    refused = measured(refusal="RESOURCE_EXHAUSTED: Used 23.5G of 15.75G hbm.")
    assert refused["memory"] == {"total": 23.5 * GIB}
    assert "text" not in refused
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measured("other", refusal="INTERNAL: a fault of the compiler")


def test_the_memory_of_a_program_counts_donated_arguments_once(monkeypatch):
    rows = [types.SimpleNamespace(place=("swin", "forward"), memory=7)]
    moved = types.SimpleNamespace(memory=7.0, network={"all-reduce": 5.0}, unknown_loops=2, rows=rows)
    monkeypatch.setattr(compile_step.hlo, "traffic", lambda text, *, num_concepts: moved)
    monkeypatch.setattr(compile_step.hlo, "by_module", dict)
    sizes = types.SimpleNamespace(
        argument_size_in_bytes=1000, temp_size_in_bytes=200, output_size_in_bytes=900, alias_size_in_bytes=870,
        generated_code_size_in_bytes=4,
    )  # fmt: skip
    compiled = types.SimpleNamespace(memory_analysis=lambda: sizes, as_text=lambda: "a\nb\nc")
    assert compile_step._of_compiled(compiled, num_concepts=3) == {
        "memory": {"arguments": 1000, "temporaries": 200, "results": 30, "program": 4, "total": 1234},
        "bytes": 7.0, "network": {"all-reduce": 5.0}, "unknown_loops": 2, "instructions": 2,
        "modules": [["swin", "forward", 7]],
    }  # fmt: skip


def test_traffic_by_module(monkeypatch, tmp_path):
    modules = [["swin/stage1", "backward", 60e9], ["other", "forward", 1e9]]
    report, _, _ = run(
        monkeypatch, tmp_path, lambda step, config: result(9.0) | {"modules": modules}, only=["pred"], by_module=True
    )
    assert "#### v5e:4x8 prediction/800x1344: traffic of a device by module" in report
    assert "| swin/stage1 | backward | 60.00 | 73.26 |\n| other | forward | 1.00 | 1.22 |" in report


def test_wrong_arguments(tmp_path):
    config = swin_t.get_config()
    with pytest.raises(ValueError, match="detection/800x1216"):
        preflight.run(config, ["v5e:4x8"], only=["detect/8"], cache=tmp_path)
    with pytest.raises(ValueError, match="not divisible by 48 devices"):
        preflight.run(config, ["v5e:6x8"], cache=tmp_path)


def test_missing_data_is_listed_and_ends_with_status_1(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "measure", lambda *_: result(12.5))
    config = swin_t.get_config()
    config.model = config_lib.model("nano")  # traced in a moment
    report, well = preflight.run(config, ["v5e:4x8"], only=["detection"], cache=tmp_path)
    assert not well
    for missing in ("data/objects365", "data/gqa", "data/cc12m", "data/lvis", "weights/swin_tiny.safetensors"):
        assert missing in report


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install 'jax[tpu]' (no TPU)")
def test_a_tiny_step_compiles_for_tpus(micro, tmp_path):
    config = micro
    config.detection.annotations = "unused"
    sizes = compile_step.Sizes(64, 12, 8)
    measured = preflight.measure(config, Topology.parse("v5e:2x2"), "detection/64x64", sizes, tmp_path)
    assert measured.get("error") is None
    assert 0 < measured["memory"]["total"] < GIB
    assert measured["network"]["all-reduce"] > 0
    again = preflight.measure(config, Topology.parse("v5e:2x2"), "detection/64x64", sizes, tmp_path)
    assert again == measured
    assert len(list(pathlib.Path(tmp_path).glob("*.json"))) == 1


def test_a_step_takes_its_arithmetic_its_memory_or_its_network():
    result = {"flops": {"executed": 64 * 197e12}, "bytes": 1e12, "network": {"a": 1e9, "b": 2e9}}
    compute, memory, network = preflight.Row(V5E, "detection/8x8", result).least_seconds
    assert compute == pytest.approx(2.0)  # of 32 chips
    assert memory == pytest.approx(1e12 / preflight.CHIPS["v5e"].bandwidth)
    assert network == pytest.approx(3e9 / preflight.CHIPS["v5e"].network)


def test_the_table_for_one_gpu_has_every_program_and_all_fit():
    from tests.benchmarks import one_gpu

    text = (pathlib.Path(__file__).parents[2] / "docs" / "tables" / "one_gpu.md").read_text()
    lines = text.partition("[end:memory]")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "/" in line and line[0] == "|"]
    missing = [line[2:].split(": ")[:3] for line in lines if line.startswith("- ")]
    assert {(recipe, gpu, step) for recipe, step, gpu, *_ in rows + missing} == set(one_gpu.programs())
    for recipe, _, gpu, needed, limit, fits, *_ in rows:
        size, smallest = limit.rstrip(")").split(" (")
        assert smallest in (gpu, one_gpu.SMALLEST[recipe])
        assert float(needed) < float(size) == pytest.approx(CHIPS[smallest].memory / GIB, abs=0.05)
        assert fits == "yes"
