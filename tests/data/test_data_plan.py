"""The plan of a run from its files: steps, tables, and what is found wrong."""

import json

import building
import pytest

from configs import swin_t
from detclipv2_jax.data.built import REPORT
from detclipv2_jax.data.catalog import DATASETS
from detclipv2_jax.preflight import data_plan


def check(config, **changes):
    config.init_from.swin = config.init_from.text = ""
    config.optimizer.warmup_steps = 3
    config.update(changes)
    return data_plan.check(config, num_hosts=2, num_devices=4)


def test_a_run_on_raw_files(config):
    config.eval.annotations = config.eval.images = ""
    plan = check(config, epochs=2)
    assert not plan.problems
    # five landscape or square and two portrait photos, batches of four; seven pairs on one canvas
    assert plan.num_steps == {
        "detection/64x96": 2, "detection/96x64": 2, "grounding/64x96": 2, "grounding/96x64": 2, "image_text/64x64": 4
    }  # fmt: skip
    assert plan.table_rows == {"detection": 16, "grounding": 32, "image_text": 48}
    assert plan.num_concepts["detection"] == 6
    assert plan.num_words == data_plan.LVIS_NAMES  # there is nothing to evaluate
    notes = "\n".join(plan.notes)
    size = "7 images, 2 batches an epoch, 4 steps = 2.29 passes, concept table 24 rows a host"
    assert f"image_text/64x64: {size}" in notes
    assert "no evaluation" in notes
    assert "no image is largest" not in notes
    assert any(note.startswith("order: 12 of 12 steps; the learning rate ends at 0 ") for note in plan.notes)


def test_the_dictionary_is_counted(config, tmp_path):
    words = tmp_path / "words.tsv"
    words.write_text("cat\ta pet\ndog\ta friend\nred car\ta vehicle\nzebra\ta horse\n")
    for kind in ("detection", "grounding", "eval"):
        config[kind].dictionary = str(words)
    notes = check(config).notes
    found = "3 of 6 names have a definition (first without: tree, traffic light, cup)"
    assert f"detection, detection: {found}" in notes
    assert f"eval: {found}" in notes
    assert "grounding: 4 names to draw negatives from, those of the dictionary" in notes
    words.unlink()
    problems = "\n".join(check(config).problems)
    keys = "config.detection.dictionary, config.grounding.dictionary, config.eval.dictionary"
    assert problems.startswith(f"{keys}: the file {words} does not exist; make it with\n")
    assert (problems.count(str(words)), problems.count("prepare dictionary")) == (2, 1)


def test_the_dictionary_of_published_sets_is_planned_or_counted(tmp_path):
    def notes(config):
        return [note for note in data_plan.expected(config, num_hosts=8, num_devices=32).notes if "names" in note]

    config = swin_t.get_config()
    config.detection.dictionary = config.grounding.dictionary = words = str(tmp_path / "words.tsv")
    state = f"({words} does not exist yet)"
    assert notes(config) == [
        f"detection, objects365: 365 names, whose definitions were not counted {state}",
        f"grounding: 14,000 planned names to draw negatives from {state}",
    ]
    (tmp_path / "words.tsv").write_text("Person\ta human being\nSneakers\tshoes\nzebra\ta horse\n")
    assert notes(config) == [
        f"detection, objects365: in {words} 3 of 365 names have a definition (first without: Chair, Other Shoes, Hat, "
        "Car, Lamp, …)",
        "grounding: 3 names to draw negatives from",
    ]
    config.detection.dictionary = config.grounding.dictionary = ""
    detection, grounding = notes(config)
    assert detection.endswith("(config.detection.dictionary is empty)")
    assert grounding.endswith("its own phrases as names to draw negatives from (config.grounding.dictionary is empty)")
    config.detection.definitions = False
    assert notes(config) == [grounding]


def test_steps_of_a_stream_are_even_over_the_sizes_of_its_canvas_whatever_its_name(config):
    config.eval.annotations = config.eval.images = ""
    config.detection.canvases, config.detection.num_scales = ((128, 192), (192, 128)), 3
    config.detection.short_side, config.detection.source_weights = (64, 128), (3.0,)  # one source, of its own name
    config.grounding.num_scales = 3  # two canvases, of both 64 x 64 is the second size
    steps = check(config, epochs=2).num_steps
    assert {name: num for name, num in steps.items() if name.startswith("grounding")} == {
        f"grounding/{size}": pytest.approx(num)
        for size, num in {"64x96": 2 / 3, "64x64": 4 / 3, "32x64": 2 / 3, "96x64": 2 / 3, "64x32": 2 / 3}.items()
    }
    sizes = ("128x192", "96x128", "64x96", "192x128", "128x96", "96x64")
    assert {name: num for name, num in steps.items() if name.startswith("detection")} == {
        f"detection/{size}": pytest.approx(2) for size in sizes
    }


def test_photos_of_the_evaluation_and_other_problems(config, world):
    for image in (world / "images").iterdir():
        image.write_bytes(b"no picture")
    plan = check(config, epochs=2, optimizer={"warmup_steps": 12}, num_steps=5)
    text = "\n".join(plan.problems)
    assert "detection: 7 photos of the evaluation are among its 7" in text
    assert "pairs: 7 photos" in text
    assert "cannot be used" in text
    assert "warmup_steps is 12, but the run has only 12 steps" in text
    assert plan.num_words == 6
    assert "config.num_steps=5 ends the run early" in plan.notes


def test_a_built_folder_that_is_too_small_and_was_not_compared(config, world, monkeypatch):
    name, known = next((name, dataset) for name, dataset in DATASETS.items() if dataset.kind == "detection")
    folder = world / "built" / name
    building.build("coco_json", input=str(world / "detection.json"), output=str(folder))
    config.detection.data = (str(folder),)
    config.detection.annotations = config.detection.images = ""
    config.grounding.annotations = config.grounding.images = config.image_text.pairs = config.image_text.images = ""
    plan = check(config)
    assert f"has 7 examples; {known.title} has {known.num_examples:,}" in "".join(plan.problems)
    assert any("was not compared with photos of validation sets" in note for note in plan.notes)
    assert not any("no image is largest" in note for note in plan.notes)  # of kinds without data
    for published, enough in ((8, False), (7, True)):  # seven of eight are less than nine tenths
        monkeypatch.setitem(DATASETS, name, known._replace(num_examples=published))
        assert ("has 7 examples" not in "".join(check(config).problems)) == enough
    leaking = world / "built" / "leaking"
    building.build(
        "coco_json", input=str(world / "detection.json"), output=str(leaking), validation=(config.eval.annotations,)
    )
    config.detection.data = (str(leaking),)
    assert "leaking: 7 photos of the evaluation are among its 7" in "".join(check(config).problems)
    report = json.loads((leaking / REPORT).read_text())
    report["validation photos"]["left out"] = True
    (leaking / REPORT).write_text(json.dumps(report))
    assert "of the evaluation" not in "".join(check(config).problems)


def test_published_numbers_are_mixed_as_the_run_mixes_them():
    config = swin_t.get_config()
    plain = data_plan.expected(config, num_hosts=8, num_devices=32).num_steps
    config.mixing = ("capped", 0.1)
    capped = data_plan.expected(config, num_hosts=8, num_devices=32).num_steps
    pairs = {name for name in plain if name.startswith("image_text")}  # on three canvases
    boxes = sum(num for name, num in plain.items() if name not in pairs)
    assert capped == plain | dict.fromkeys(pairs, pytest.approx(0.1 * boxes / 3))
    assert plain["image_text/320x320"] == pytest.approx(12 * 13_000_000 / 6144 / 3)
    named = data_plan.expected(swin_t.get_config("o365_in1k"), num_hosts=8, num_devices=32)
    assert named.num_steps["image_text/320x320"] == pytest.approx(12 * 1_281_167 / 6144)  # passed 3 times an epoch
