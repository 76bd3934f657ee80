"""The benchmark of an accelerator, at sizes that a CPU times in seconds."""

import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's driver and programs."""
    monkeypatch.syspath_prepend(str(ROOT))
    from tests.benchmarks import accelerator, accelerator_inputs, accelerator_programs

    return accelerator, accelerator_inputs, accelerator_programs


@pytest.fixture
def bench(modules, micro, tmp_path):
    """A benchmark with a minute left."""
    accelerator, inputs, programs = modules
    device = jax.devices()[0]
    report = accelerator.Report(tmp_path, device, time.monotonic() + 60)
    report.values["ceilings"] = {"bytes_per_s": 1e9, "flops_per_s": 1e10}
    mesh = accelerator.sharding.make_mesh(devices=[device])
    setting = programs.Setting(inputs.of_one_device(micro, share=4), mesh)
    with accelerator.Bench(setting, report, only="") as bench:
        bench.state = np.zeros(())  # not needed by what follows
        yield bench


def rows(bench):
    return json.loads(bench.report.path.read_text())["rows"]


def product(modules, name, **options):
    _, inputs, programs = modules
    x = inputs.Normal((64, 32))
    return programs.Program(name, lambda a: (a @ a.T) / 3, lambda state: (x,), num_images=2, **options)


def test_a_row_has_times_arithmetic_traffic_and_bound(modules, bench):
    bench.run(lambda: iter([product(modules, "product")]))
    (row,) = rows(bench)
    assert row["flops"] == 2 * 64 * 64 * 32
    assert row["bytes"] >= 4 * (64 * 32 + 64 * 64)
    assert 0 < row["min_s"] <= row["median_s"]
    assert row["first_s"] > 0
    assert row["calls"] >= 5
    assert row["images_per_s"] == pytest.approx(2 / row["median_s"])
    bound = max(row["flops"] / 1e10, row["bytes"] / 1e9)
    assert row["bound_s"] == pytest.approx(bound)
    assert row["bound_share"] == pytest.approx(bound / row["median_s"])


def test_a_failure_is_a_row_and_the_others_are_timed(modules, bench):
    _, _, programs = modules

    def broken(x):
        raise ValueError("no such form")

    failing = programs.Program("broken", broken, lambda state: (modules[1].Normal((2,)),))
    bench.run(lambda: iter([product(modules, "first"), failing, product(modules, "last")]))
    first, second, last = rows(bench)
    assert "median_s" in first
    assert "median_s" in last
    assert second == {"name": "broken", "error": "ValueError: no such form"}


def test_what_was_measured_stays_when_time_runs_out(modules, bench):
    def late(state, calls=[]):  # noqa: B006 (counts its calls: the second one is that of the run)
        calls.append(state)
        if len(calls) == 2:
            bench.report.deadline = time.monotonic()
        return (modules[1].Normal((64, 32)),)

    program = modules[2].Program("first", lambda a: a @ a.T, late)
    bench.run(lambda: iter([program, product(modules, "second")]))
    first, second = rows(bench)
    assert first["name"] == "first"
    assert first["median_s"] > 0
    assert second == {"name": "second", "error": "time ran out"}


def test_forms_are_compared(modules, bench):
    _, inputs, programs = modules
    x = inputs.Normal((64, 32))
    other = programs.Program("other", lambda a: (a @ a.T) * 0.5, lambda state: (x,), reference="product")
    bench.run(lambda: iter([product(modules, "product"), other]))
    assert rows(bench)[1]["differences"] == pytest.approx([0.5])


def test_inputs_are_those_of_a_run(modules, micro):
    _, inputs, _ = modules
    for kind in inputs.Kind:
        batch = inputs.batch(micro, kind, (64, 64), num_names=5 * (kind is inputs.Kind.DETECTION))
        assert batch.concept_tokens.shape == (len(batch.concept_mask), micro.model.text.context_length)
        used = batch.box_mask if kind is not inputs.Kind.IMAGE_TEXT else batch.caption_mask
        rows_of = batch.box_concepts if kind is not inputs.Kind.IMAGE_TEXT else batch.caption_concepts
        assert used.any(axis=1).all()
        assert batch.concept_mask[rows_of[used]].all()
        assert (batch.boxes[..., 2:] <= batch.extent[:, None, ::-1] + 1e-3).all()
        assert (batch.concept_tokens.max(axis=1) == inputs.EOS).all()
        assert 1 <= inputs.num_distinct(batch) <= batch.concept_mask.sum()


@pytest.mark.slow
@pytest.mark.parametrize(("only", "num_rows"), [("nms 8", 1), ("step detection 4 x 64x64, without", 1)])
def test_command(only, num_rows, tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.accelerator", "--tiny", f"--only={only}", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert report["complete"]
    assert report["ceilings"]["bytes_per_s"] > 0
    assert len(report["rows"]) == num_rows
    for row in report["rows"]:
        assert row["name"].startswith(only)
        assert row["median_s"] > 0
        assert row["name"] in done.stdout
        if only == "nms 8":
            continue
        assert row["metrics"]["finite"] == 1.0
        profile = row["profile"]
        assert sum(seconds for *_, seconds, _ in profile["modules"]) == pytest.approx(profile["seconds"])
        assert sum(moved for *_, moved in profile["modules"]) <= 1.001 * row["bytes"]
        modules = {(module, direction): seconds for module, direction, seconds, _ in profile["modules"]}
        assert {("optimizer", "forward"), ("swin/stage1/mlp_in", "backward")} <= modules.keys()
        slowest = [seconds for _, _, _, seconds, _ in profile["instructions"]]
        assert slowest == sorted(slowest, reverse=True)
        assert f"{row['name']}: " in done.stdout


def test_the_demo_is_a_row(modules, tmp_path, monkeypatch):
    accelerator, _, _ = modules
    report = accelerator.Report(tmp_path, jax.devices()[0], time.monotonic() + 1000)
    assert "No such file" in accelerator.demo(report, config=str(tmp_path / "none.py"))["error"]

    def trained(command, **_):
        workdir = pathlib.Path(command[-1].partition("=")[2])
        workdir.mkdir()
        lines = [{"step": 20, "timing/step_seconds": 0.5}, {"step": 40, "timing/step_seconds": 0.7},
                 {"step": 40, "eval/AP": 0.25, "eval/top1f": 0.5, "eval/top1r": 0.125}]  # fmt: skip
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(accelerator.subprocess, "run", trained)
    row = accelerator.demo(report)
    assert (row["steps"], row["step_s"], row["scores"]["eval/AP"]) == (40, 0.6, 0.25)
    assert "| 600.00 |" in accelerator._line(row)
    assert "AP 25.0, top1f 50.0, top1r 12.5 after 40 steps" in accelerator._line(row)
    report.deadline = time.monotonic() + 10
    assert accelerator.demo(report) == {"name": "demo", "error": "time ran out"}
