"""README and site: commands parse, those that share a workdir agree, keys and files exist, tables follow formulas."""

import ast
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, session
from detclipv2_jax.chips import CHIPS, CUDA_SHARE, GIB, GPUS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PROGRAM = "detclipv2_jax"


def pieces(text):
    """Returns (blocks of commands, blocks of Python, inline code) of a page."""
    blocks = BLOCK.findall(text)
    commands, programs = ([body for name, body in blocks if (name == "python") == python] for python in (False, True))
    return commands, programs, [code.replace("\n", " ") for code in INLINE.findall(BLOCK.sub("", text))]


def variants(words):
    """Yields a command with each of its alternatives (--format=a|b), and without and with what is in brackets."""
    choices = []
    for word in words:
        if word.startswith("[") and word.endswith("]"):
            choices.append([None, word[1:-1]])
        elif "|" in word and not re.search(r"[?*()]", word):
            key, equals, value = word.rpartition("=")
            choices.append([key + equals + one for one in value.split("|")])
        else:
            choices.append([word])
    for command in itertools.product(*choices):
        yield [word for word in command if word is not None]


def commands_of(text):
    """Returns the commands of this repository that a page gives, as lists of a module and its arguments."""
    blocks, _, inline = pieces(text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline
    found = []
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):  # variables of the environment
                words = words[1:]
            if words[:1] == ["python"] and words[1].endswith(".py"):
                words[:2] = ["python", "-m", words[1].removesuffix(".py").replace("/", ".")]
            if words[:2] == ["python", "-m"] and words[2].split(".")[0] in (PROGRAM, "tests"):
                found += variants(words[2:])
            elif words and words[0].startswith("--config.") and "=" in line:
                start = [f"{PROGRAM}.main", "--config=configs/finetune_odinw.py", f"--workdir=runs/{words[0]}"]
                found += variants([*start, *words])
    return found


COMMANDS = {page: commands_of(page.read_text()) for page in PAGES}


def named_as_a_program(command):
    """Returns whether text only speaks of a program: `python -m detclipv2_jax.prepare`."""
    return len(command) == 1 and command[0] not in (f"{PROGRAM}.claims",)


@functools.cache
def parsed():
    """Returns [(page, command, what its program makes of it)] in the order of the pages."""
    given = [(page, command) for page in PAGES for command in COMMANDS[page] if not named_as_a_program(command)]
    results = parse_all([command for _, command in given])
    return [(page.name, command, result) for (page, command), result in zip(given, results, strict=True)]


def parse_all(commands):
    script = [sys.executable, str(ROOT / "tests" / "parse_commands.py")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        script, input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def clashes(results, folder):
    """Returns the commands of `main` that end with "holds another run" when all are given one after the other."""
    found = []
    for page, command, result in results:
        if command[0] == f"{PROGRAM}.main" and "error" not in result:
            workdir, config = folder / result["workdir"], config_json.from_json(result["config"])
            try:
                session.check_workdir(workdir, config, fresh_allowed=True)
            except ValueError as error:
                found.append(f"{page}: {shlex.join(command)}: {error}")
                continue
            if result["mode"] == "train" or not (workdir / "config.json").exists():
                workdir.mkdir(parents=True, exist_ok=True)
                (workdir / "config.json").write_text(config_json.to_json(config))
    return found


@pytest.mark.slow
def test_every_command_is_understood_by_its_program():
    results = parsed()
    assert len(results) > 40
    errors = [(page, command, result["error"]) for page, command, result in results if "error" in result]
    wrong = [f"{page}: {shlex.join(command)}\n{error}" for page, command, error in errors]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
def test_two_commands_do_not_meet_in_one_workdir(tmp_path):
    assert clashes(parsed(), tmp_path) == []


@pytest.mark.slow
def test_wrong_commands_are_found(tmp_path):
    start = [f"{PROGRAM}.main", "--config=configs/coco_json.py"]
    commands = [
        [f"{PROGRAM}.predict", "--checkpoint=a", "--images=b", "--output=c", "--wrods=d"],
        [f"{PROGRAM}.main", "--config=configs/coco.py"],
        [*start, "--config.detection.nms_iou=0.5"],
        [*start, "--config.epochs=many"],
        [*start, "--config.loss.side=left"],
        [f"{PROGRAM}.eval.lvis", "--annotations=a", "--detection"],
    ]
    assert all(result.get("error") for result in parse_all(commands))
    several = [[*start, "--config.detection.annotations=a"], [*start, "--config.detection.annotations=b"]]
    results = [("page", command, result) for command, result in zip(several, parse_all(several), strict=True)]
    assert len(clashes(results, tmp_path)) == 1
    results[1][2]["workdir"] = "runs/other"
    assert clashes(results, tmp_path / "fresh") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_files_and_keys_exist(page):
    text = page.read_text()
    _, programs, inline = pieces(text)
    for program in programs:
        imports = [node for node in ast.parse(program).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page.name, "exec"), {})
    for module in re.findall(r"python -m (detclipv2_jax[\w.]*\w)", text):
        assert importlib.util.find_spec(module), module
    for link in re.findall(r"\]\(([^)#\s:]+)(?:#[\w-]+)?\)", text):
        written = {"configuration.md", "index.md"} if page.parent.name == "docs" else set()
        assert link in written or (page.parent / link).exists(), link
    for code in inline + [body for block in pieces(text)[0] for body in block.split()]:
        for path in re.findall(
            r"(?:^|[\s=])((?:configs|tests|launch|notebooks|results)/[\w/]+(?:\.\w+)?)(?![\w*</])", code
        ):
            assert (ROOT / path).exists(), path
        for key in re.findall(r"(?:--|^)config\.(?!json\b)([a-z_.]+[a-z])", code):
            assert key in flat() or key in sections(), f"{page.name}: config.{key}"


def test_sources_cite_pages_that_the_repository_holds():
    sources = [
        path for folder in ("detclipv2_jax", "configs", "tests", "launch") for path in (ROOT / folder).rglob("*")
    ]
    for path in (path for path in sources if path.suffix in (".py", ".sh") and path != pathlib.Path(__file__)):
        text = path.read_text()
        assert not re.search(r"\bspec(ification)? section\b|\bpaper\.md\b|\bdesign\.md\b", text), path
        for page in re.findall(r"\bdocs/[\w-]+\.\w+", text):
            assert (ROOT / page).exists(), f"{path}: {page}"


@functools.cache
def flat():
    return config_lib.flat(config_lib.base())


@functools.cache
def sections():
    return {key.rsplit(".", depth)[0] for key in flat() for depth in range(1, key.count(".") + 1)}


def test_decisions_name_keys_that_exist():
    rows = [line for line in (ROOT / "docs" / "decisions.md").read_text().splitlines() if line.startswith("| ")]
    named = 0
    for row in rows[1:]:
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 5, row
        section = ""
        for code in INLINE.findall(cells[3]):
            if code.startswith(("prepare", "=")):
                continue
            key = code.split("=")[0]
            if key.startswith("."):
                key = section + key
            elif key.startswith("*."):
                key = f"detection.{key[2:]}"
            section = key.rpartition(".")[0]
            assert key in flat(), f"{code} of {row}"
            named += 1
    assert named > 40


def test_times_of_the_preflight_follow_from_its_traffic():
    page, tables = ((ROOT / "docs" / name).read_text() for name in ("preflight.md", "tables/preflight.md"))
    device = r"^\| (\w+)(?: SXM)? \| ([\d,]+) TFLOP/s \| ([\d,]+) GB/s \|$"
    devices = {
        name.lower(): (float(peak), float(bandwidth.replace(",", "")))
        for name, peak, bandwidth in re.findall(device, page, re.MULTILINE)
    }
    known = {name: (CHIPS[name].peak / 1e12, CHIPS[name].bandwidth / 1e9) for name in devices}
    assert devices == known
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| swin")]
    steps, runs, newest = ([row for row in rows if len(row) == length] for length in (10, 4, 11))
    per_epoch = {"detection": 5156, "grounding": 6016, "image_text": 2116}
    hours = dict.fromkeys(((run[0], run[1]) for run in runs), 0.0)
    assert len(newest) == 6  # the same of another compiler
    others = [(*row[:3], *row[5:], "") for row in newest]
    for row in (*steps, *others):
        config, topology, step, work, recomputed, traffic, *stated, _ = row
        chip, num_devices = chip_and_number(topology)
        peak, bandwidth = devices[chip]
        by_compute = 1000 * float(work) * (1 + float(recomputed.strip("%")) / 100) / (num_devices * peak)
        by_memory = 1000 * float(traffic) / bandwidth
        bound = max(by_compute, by_memory)
        expected = (by_compute, by_memory, 1e5 * float(work) / (bound * num_devices * peak))
        # recomputation and traffic are rounded, too
        half_a_percent = 0.005 * 1000 * float(work) / (num_devices * peak)
        half_a_gb = 0.5 / float(traffic)
        roundings = (half_a_percent, by_memory * half_a_gb, expected[2] * half_a_gb)
        for cell, value, rounding in zip(stated, expected, roundings, strict=True):
            assert float(cell.strip("%")) == pytest.approx(value, abs=0.51 + rounding)
        if row in others:
            continue
        kind = step.split("/")[0]
        halved = config == "swin_l" and kind != "image_text"
        hours[config, topology] += 12 * per_epoch[kind] * bound / 3.6e6 / (1 + halved)
    assert len(runs) == 5
    for config, topology, chip_hours, run_hours in runs:
        expected = hours[config, topology]
        assert float(run_hours) == pytest.approx(expected, abs=0.06)
        assert float(chip_hours) == pytest.approx(expected * chip_and_number(topology)[1], abs=0.6)


def test_the_table_of_gpus_is_that_of_the_program():
    row = r"^\| `(\w+):1` \| ([\d.,]+) TFLOP/s \| ([\d,]+) GB/s \| ([\d.]+) GiB \| \[.+\]\(https://\S+\).* \|$"
    found = re.findall(row, (ROOT / "docs" / "preflight.md").read_text(), re.MULTILINE)
    stated = {name: tuple(float(x.replace(",", "")) for x in figures) for name, *figures in found}
    known = {
        name: pytest.approx((chip.peak / 1e12, chip.bandwidth / 1e9, chip.memory / CUDA_SHARE / GIB))
        for name, chip in ((name, CHIPS[name]) for name in GPUS)
    }
    assert stated == known


def chip_and_number(topology):
    chip, _, shape = topology.partition(":")
    return chip, math.prod(map(int, shape.split("x")))


def test_the_readme_takes_three_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_site_is_built_and_has_every_key(tmp_path):
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "configuration" / "index.html").read_text()
    rows = re.findall(r"<tr>\s*<td>\s*<code>([\w.]+)</code></td>\s*<td>.*?</td>\s*<td>(.*?)</td>", page, re.DOTALL)
    assert {key for key, _ in rows} == flat().keys()
    assert [key for key, words in rows if not words.strip()] == []
