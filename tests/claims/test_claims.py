"""The table of the paper's claims: its runs, their scores, its verdicts; how it goes on where it was stopped."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from detclipv2_jax import commands, config_json, session, validation
from detclipv2_jax.claims import __main__ as claims
from detclipv2_jax.claims import ablations
from detclipv2_jax.visualize import charts

REAL_RUN = subprocess.run
TOKENS = next(finding for finding in ablations.FINDINGS if finding.rows.keys() == {"phrases", "tokens"})
RECIPE = str(pathlib.Path(__file__).parents[2] / "configs" / "demo.py")


def test_every_row_is_a_valid_run_of_its_own():
    rows = ablations.queue({})
    assert len(rows) == len(set(rows))
    assert {row for row, _ in rows} == set(ablations.ROWS) | set(ablations.STARTS)
    assert rows[:3] == [("start", 0), ("detection", 0), ("pairs", 0)]
    # a table that is stopped early has every finding with one seed before any with two
    assert rows.index(("detection", 4)) < rows.index(("pairs_128", 0)) < rows.index(("bilateral", 1))
    for row, seed in rows:
        if row in ablations.ROWS:  # its start has its model and comes before it
            before = (ablations.start_of(row), seed)
            assert rows.index(before) < rows.index((row, seed))
            one, other = (claims.configuration(RECIPE, *run) for run in (before, (row, seed)))
            assert one.model == other.model
            assert one.scenes.num_detection == other.scenes.num_detection
        config = claims.configuration(RECIPE, row, seed)
        if row.startswith("pair_steps"):
            assert config.detection.weight + config.image_text.weight == pytest.approx(2.0)
            assert config.image_text.weight / config.detection.weight == pytest.approx(int(row.rpartition("_")[2]))
    recipes = set()
    for row, seed in rows:
        config = claims.configuration(RECIPE, row, seed)
        validation.validate(config, num_devices=1)
        recipes.add(tuple(claims.recipe_of(RECIPE, row, seed)))
    assert len(recipes) == len(rows)
    assert {seed for _, seed in rows} == {0, 1, 2, 3, 4}
    assert len(rows) == 5 * (len(ablations.ROWS) + len(ablations.STARTS))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("row", ["grounding_pairs", "detection_twice", "classification", "pairs_64"])
def test_the_command_of_a_run_makes_its_configuration(tmp_path, row):
    config = claims.configuration(RECIPE, row, 1)
    config.scenes.folder = str(tmp_path)
    arguments = claims.command(RECIPE, config, tmp_path)
    assert arguments[:3] == [sys.executable, "-m", "detclipv2_jax.main"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments[2:])
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(arguments[2:])
    assert config_json.differences(values.config, config) == []
    assert values.workdir == str(tmp_path)


def test_the_start_is_scored_after_no_more_steps_on_boxes_than_the_demo_has():
    demo, start = runpy.run_path(RECIPE)["get_config"](), claims.configuration(RECIPE, "start", 0)
    assert demo.detection == start.detection
    steps_of = {c.name + str(c.epochs): c.scenes.num_detection / c.detection.batch_size for c in (demo, start)}
    assert steps_of == {"demo9": 260, "demo12": 100}
    assert start.eval.every_epochs * 100 <= demo.epochs * 260  # the demo's closing words compare the two


def test_the_demo_ends_with_its_scores_beside_those_of_boxes_alone(tmp_path):
    values = runpy.run_path(RECIPE)
    for seed, novel in enumerate((3.0, 4.0)):
        along = {"base_AP_by_step": {"400": 20.0, "1200": 40.0}, "novel_AP_by_step": {"400": 5.0, "1200": novel}}
        (tmp_path / f"start_{seed}.json").write_text(json.dumps(along))
    (tmp_path / "start_plain_0.json").write_text("{}")
    values["closing"].__globals__["RESULTS"] = tmp_path
    text = values["get_config"]().closing.format(APf=41.23, APr=21.0, AP=30.0, top1f=72.5, top1r=22.0)
    assert "base shapes had boxes, AP 41.2; of those found, 72.5 %" in text
    assert "AP 21.0, right names 22.0 %; their colours" in text
    assert text.endswith(" 1200 steps on boxes alone end at 40.0 and 3.5 (python -m detclipv2_jax.claims).")


def test_closing_words_on_other_data_are_left_out(capsys):
    session.print_closing("novel {APr:.1f}", {"AP": 0.5, "APr": 0.25})
    session.print_closing("novel {APr:.1f}", {"AP": 0.5})  # a COCO json without frequencies
    session.print_closing("", {})
    assert capsys.readouterr().out == "novel 25.0\n"


def world():
    """Returns two images, each with a base object, the second with a novel one, too."""
    boxes = [(1, 1, [0, 0, 10, 10], False), (2, 1, [0, 0, 10, 10], True), (2, 2, [40, 40, 20, 20], False)]
    return {
        "images": [{"id": i, "neg_category_ids": [1, 2], "not_exhaustive_category_ids": []} for i in (1, 2)],
        "categories": [{"id": 1, "name": "red star", "frequency": "f"}, {"id": 2, "name": "key", "frequency": "r"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "held_out": out}
            for i, (image, category, box, out) in enumerate(boxes, start=1)
        ],
    }


def found(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def test_scores_are_those_of_the_subsets():
    star = found(1, 1, [0, 0, 10, 10], 0.9)
    misnamed = [found(2, 1, [40, 40, 20, 20], 0.5), found(2, 2, [40, 40, 20, 20], 0.4)]
    perfect = [star, found(2, 1, [0, 0, 10, 10], 0.8), misnamed[1]]
    assert claims.score(world(), perfect) == dict.fromkeys(
        (
            "AP",
            "AP50",
            "base_AP",
            "base_AP50",
            "novel_AP",
            "novel_AP50",
            "held_out_AP",
            "held_out_AP50",
            "novel_AR",
            "base_top1",
            "novel_top1",
        ),
        100.0,
    )
    scores = claims.score(world(), [star, *misnamed])
    assert scores["held_out_AP"] == 0.0
    assert scores["base_AP"] == pytest.approx(100 * 51 / 101, abs=0.01)  # recall 0.5, at the better of two scores
    assert (scores["novel_AP"], scores["novel_AR"]) == (100.0, 100.0)
    assert (scores["base_top1"], scores["novel_top1"]) == (100.0, 0.0)  # the better name of the key is the star's
    scores = claims.score(world(), [star, misnamed[0]])
    assert (scores["novel_AP"], scores["novel_AR"]) == (0.0, 100.0)  # found, under a wrong name
    half = claims.score(world(), [star, found(2, 2, [40, 40, 20, 15], 0.4)])  # IoU 0.75: six of ten thresholds
    assert (half["novel_AP"], half["novel_AP50"], half["novel_AR"]) == (60.0, 100.0, 60.0)


def test_scores_are_rounded_and_every_place_counts_once(monkeypatch):
    boxes = [[x, y, 4, 4] for x in range(0, 60, 4) for y in range(0, 80, 4)]  # 300 places beside those of the truth
    rows = [found(2, category, box, 0.5) for box in boxes for category in (1, 2)]
    assert claims.score(world(), [*rows, found(2, 1, [40, 40, 20, 20], 0.6)])["novel_AR"] == 100.0
    assert claims.score(world(), [*rows[2:], found(2, 1, [40, 40, 20, 20], 0.4)])["novel_AR"] == 100.0  # 299 are better
    assert claims.score(world(), [*rows, found(2, 1, [40, 40, 20, 20], 0.4)])["novel_AR"] == 0.0
    monkeypatch.setattr(claims.lvis, "evaluate", lambda truth, rows: {"AP": 0.1, "AP50": 0.12345})
    monkeypatch.setattr(claims.names, "evaluate", lambda truth, rows: {"top1f": 0.34567, "top1r": 0.45678})
    monkeypatch.setattr(claims.proposals, "evaluate", lambda truth, rows: {"agnostic_ARr@300": 0.23456})
    scores = claims.score(world(), [])
    assert (scores["novel_AR"], scores["base_AP50"]) == (23.46, 12.35)
    assert (scores["base_top1"], scores["novel_top1"]) == (34.57, 45.68)


def results(margins, *, row="pairs", finding=ablations.FINDINGS[1]):
    """Returns results of a finding in which a row leads the others' AP by the margin of each seed."""
    made = {}
    for seed, margin in enumerate(margins):
        for name in finding.rows.values():
            scores = dict.fromkeys(claims.COLUMNS, 30.0 + seed) | {"AP": 30.0 + seed + margin * (name == row)}
            made[name, seed] = {"scores": scores, "cpu_seconds": 240}
    return made


# Student's t at 0.975 with 1, 2, 4 degrees of freedom, of a table: 12.706, 4.303, 2.776
@pytest.mark.parametrize(
    ("margins", "word", "mean", "half"),
    [
        ([3.0], "undecided", 3.0, np.inf),
        ([-3.0], "undecided", -3.0, np.inf),
        ([2.0, 4.0], "undecided", 3.0, 12.706),
        ([3.0, 3.0], "reproduced", 3.0, 0.0),
        ([1.0, 2.0, 3.0], "undecided", 2.0, 4.303 / 3**0.5),
        ([2.0, 3.0, 4.0], "reproduced", 3.0, 4.303 / 3**0.5),
        ([-2.0, -3.0, -4.0], "contradicted", -3.0, 4.303 / 3**0.5),
        ([-2.0, 1.0, 1.0, 1.0, 1.0], "undecided", 0.4, 2.776 * 0.6),
        ([0.0, 0.0, 0.0], "reproduced", 0.0, 0.0),
    ],
)
def test_a_claim_is_judged_by_the_interval_of_its_paired_margins(margins, word, mean, half):
    finding, (claim,) = TOKENS, TOKENS.claims
    verdict = ablations.judge(claim, finding, results(margins, finding=finding))
    assert verdict.word == word
    assert (verdict.mean, verdict.half) == (pytest.approx(mean), pytest.approx(half, rel=1e-3))
    assert verdict.num_seeds == len(margins)


def test_the_margin_that_is_nearest_to_failing_is_told():
    finding, (claim,) = ablations.FINDINGS[1], ablations.FINDINGS[1].claims
    assert ablations.judge(claim, finding, {}) is None
    # text to image leads by 5, bilateral and image to text are equal: both hold
    assert ablations.judge(claim, finding, results([5.0] * 3)) == ("reproduced", 0.0, 0.0, 3)
    # one of two fails for certain, whatever the other does
    text = ablations.judge(claim, finding, results([5.0, 5.0, 5.1], row="image_to_text"))
    assert (text.word, round(text.mean, 2)) == ("contradicted", -5.03)
    noisy = ablations.judge(claim, finding, results([9.0, 1.0, 9.0], row="bilateral"))
    assert (noisy.word, round(noisy.mean, 2)) == ("undecided", -6.33)

    def of(first, second):  # leads of text to image over bilateral, of that over image to text
        scores = {"pairs": 0.0, "bilateral": -np.array(first), "image_to_text": -np.array(first) - second}
        scores = {row: np.broadcast_to(values, 3) for row, values in scores.items()}
        return {(row, seed): {"scores": {"AP": x}} for row, values in scores.items() for seed, x in enumerate(values)}

    wide = ablations.judge(claim, finding, of([1.0, 1.0, 1.1], np.array([9.0, 1.0, 5.0])))
    assert (wide.word, wide.mean) == ("undecided", pytest.approx(5.0))  # from -5 on, where the other is about 1
    sure = ablations.judge(claim, finding, of([5.0, -20.0, -3.0], np.array([-5.0, -5.0, -5.1])))
    assert (sure.word, sure.mean) == ("contradicted", pytest.approx(-5.033, abs=1e-3))


def test_what_five_seeds_do_not_decide_has_more():
    decided, undecided = [3.0, 3.1, 2.9, 3.0, 3.0], [3.0, -3.0, 1.0, -1.0, 0.5]
    finding = TOKENS
    for first, wanted in (
        (decided, 5), ([*decided, -90.0], 5), (undecided, 6), (undecided[:4], 5), (undecided + decided[:2], 8)
    ):  # fmt: skip
        assert ablations.num_seeds(finding, results(first, finding=finding)) == wanted
        found = results(first, finding=finding)
        assert {seed for row, seed in ablations.queue(found) if row == "tokens"} == set(range(wanted))
    assert ablations.num_seeds(finding, results(undecided * 2, finding=finding)) == 10
    few = dataclasses.replace(finding, max_seeds=5)
    assert ablations.num_seeds(few, results(undecided, finding=finding)) == 5


def test_a_claim_is_judged_as_soon_as_the_rows_it_needs_are_there():
    finding = ablations.FINDINGS[0]
    scores = {"novel_AP": 5.0, "base_AP": 40.0, "novel_AR": 90.0}
    found = {(row, 0): {"scores": scores} for row in ("detection", "pairs_base_words")}
    found["detection", 1] = {"scores": scores}
    verdicts = [ablations.judge(claim, finding, found) for claim in finding.claims]
    assert verdicts == [None] * 4 + [("undecided", 3.0, np.inf, 1)]


def test_the_first_finding_wants_fifteen_points_and_a_control_that_stays():
    finding = ablations.FINDINGS[0]
    scores = {row: {"novel_AP": 5.0, "base_AP": 40.0, "novel_AR": 90.0} for row in finding.rows.values()}
    scores["pairs"] |= {"novel_AP": 20.5, "base_AP": 39.5}
    scores["grounding_pairs"] |= {"novel_AP": 21.0}
    held = [min(claim.margins(scores)) >= 0 for claim in finding.claims]
    assert held == [True] * 5
    scores["detection_twice"]["novel_AP"], scores["pairs"]["base_AP"] = 6.0, 38.5
    scores["pairs_base_words"]["novel_AP"], scores["grounding_pairs"]["novel_AR"] = 9.0, 89.0
    held = [min(claim.margins(scores)) >= 0 for claim in finding.claims]
    assert held == [False, True, False, False, False]


def test_the_table_tells_verdicts_means_spreads_and_what_is_missing():
    starts = {("start", seed): {"scores": {"AP": 20.0 + seed}, "cpu_seconds": 240} for seed in (0, 1)}
    text = "".join(claims.markdown(results([2.0, 1.0]) | starts))
    total = len(ablations.queue({}))
    assert f"8 of {total} runs are done; a run takes 4.0 minutes of one core" in text
    assert "| 2. text to image ≥ bilateral ≥ image to text | **reproduced** | +0.0 ± 0.0 | 2 |" not in text
    assert "| 2. text to image ≥ bilateral ≥ image to text | **undecided** | +1.5 ± 6.4 | 2 |" in text
    assert "| 4. the paper's choice is the best | not run yet | – | 0 |" in text
    assert "| text to image | 2 | 20.5 ± 0.5 | 32.0 ± 0.0 | 30.5 ± 0.5 |" in text
    assert "| k = 3 | 0 | – |" in text
    assert "base names right | novel names right |" in text
    older = {key: {**result, "scores": {"AP": 30.0, "base_AP": 30.0}} for key, result in results([2.0]).items()}
    assert "right" not in "".join(claims.markdown(older)).split("| claim |")[1].split("**1.")[0].split("–")[0]
    (row,) = [
        line for line in claims.markdown(results([2.0]) | {("pairs", 0): older["pairs", 0]}) if "| text to" in line
    ][:1]
    assert row.endswith(" – | – |\n")
    more = results([2.0, 1.0]) | {("pairs", 2): results([60.0])["pairs", 0]}
    text_of_more = "".join(claims.markdown(more))
    assert "| text to image | 2 | – | 32.0 ± 0.0 | 30.5 ± 0.5 |" in text_of_more  # not the others' third
    del more["bilateral", 1]
    assert "| text to image | 1 | – | 32.0 | 30.0 |" in "".join(claims.markdown(more))
    assert text.count("not run yet") == sum(len(finding.claims) for finding in ablations.FINDINGS) - 1


def test_the_page_has_the_table_of_the_stored_results():
    root = pathlib.Path(RECIPE).parents[1]
    results = root / "results" / "claims"
    claims.pending_runs(RECIPE, results, root)  # each is of the recipe as it is now
    found = claims.all_results(results)
    table = (root / "docs" / "claims.md").read_text()
    assert table == "".join(claims.markdown(found))
    told = collections.Counter(re.findall(r"\*\*(reproduced|contradicted|undecided)\*\*", table))
    counts = f"{told['reproduced']} are reproduced, {told['contradicted']} contradicted, {told['undecided']} undecided"
    assert counts in (root / "README.md").read_text()
    page = (root / "docs" / "laptop.md").read_text()
    assert '\n--8<-- "docs/claims.md"\n' in page
    before, after = (
        [
            np.mean([result["scores"][name] for (other, _), result in found.items() if other == row])
            for name in ("base_AP", "novel_AP", "novel_AR")
        ]
        for row in ("detection", "pairs")
    )
    words = " ".join(page.split())
    assert f"raise the AP of shapes without boxes from {before[1]:.0f} to {after[1]:.0f}." in words
    assert f"shapes with boxes keep their AP ({after[0] - before[0]:+.1f})" in words
    assert f"falls by {before[2] - after[2]:.1f} of {before[2]:.1f}," in words
    for row in ("max_size", "pair_steps_8", "weight_1", "wrong_60", "temperature_0.15", "tokens"):
        finding = dataclasses.replace(ablations.FINDINGS[0], rows={"with": "pairs", "other": row})
        cost = ablations.judge(ablations._best("pairs", row), finding, found)
        assert f" {cost.mean:.1f} ± {cost.half:.1f}" in words, row


FAKE = """
import json, pathlib, sys
workdir, row, seed, fails = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
if row == fails: sys.exit(3)
(workdir / "eval").mkdir()
(workdir / "checkpoints").mkdir()
rows = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9}]
(workdir / "eval" / "step_00000010_detections.json").write_text("[]")
(workdir / "eval" / "step_00000020_detections.json").write_text(json.dumps(rows))
scores = [{"step": 10, "eval/APr": 0.1, "eval/APf": 0.3}, {"step": 20, "eval/APr": 0.2, "eval/APf": 0.4}]
lines = [scores[0], {"step": 15, "detection/loss": 1.0}, scores[1]]
(workdir / "metrics.jsonl").write_text("\\n".join(map(json.dumps, lines)))
"""


def test_runs_are_stored_and_the_table_goes_on(tmp_path, monkeypatch, capsys):
    finding = ablations.FINDINGS[1]
    monkeypatch.setattr(ablations, "FINDINGS", (finding,))
    monkeypatch.setattr(ablations, "MIN_SEEDS", 1)
    monkeypatch.setattr(ablations, "SEEDS", (0,))
    monkeypatch.setattr(claims.scenes, "write", lambda folder, **_: write_world(pathlib.Path(folder)))
    fails, started = "bilateral", []

    def command(recipe, config, workdir):
        row, seed = workdir.name.rsplit("_", 1)
        started.append(row)
        return [sys.executable, "-S", "-c", FAKE, str(workdir), row, seed, fails]

    monkeypatch.setattr(claims, "command", command)
    folders = {name: tmp_path / name for name in ("results", "work", "output")}
    arguments = [f"--{name}={folder}" for name, folder in folders.items()] + ["--jobs=1", f"--config={RECIPE}"]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert commands.run(claims.main, arguments=arguments) == 1
    with pytest.raises(SystemExit, match="143"):  # what runs is stopped first
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    assert "the run bilateral, seed 0, failed" in capsys.readouterr().err
    assert started == ["start", "pairs", "bilateral"]
    assert (folders["work"] / "start_0" / "checkpoints").exists()
    assert (folders["work"] / "pairs_0" / "checkpoints").exists()  # which a filter is made of
    stored = json.loads((folders["results"] / "pairs_0.json").read_text())
    assert (stored["row"], stored["seed"], stored["steps"]) == ("pairs", 0, 20)
    assert stored["novel_AP_by_step"] == {"10": 10.0, "20": 20.0}
    assert stored["base_AP_by_step"] == {"10": 30.0, "20": 40.0}
    assert stored["scores"]["base_AP"] > 0
    assert stored["versions"].keys() >= {"jax", "python"}
    fails = ""
    assert commands.run(claims.main, arguments=arguments) == 0
    assert started == ["start", "pairs", "bilateral", "bilateral", "image_to_text"]
    printed = capsys.readouterr().out
    assert f"image_to_text, seed 0, begins: {folders['work']}/image_to_text_0/log.txt" in printed
    assert "[4/4] image_to_text, seed 0: AP" in printed
    assert not (folders["work"] / "image_to_text_0" / "checkpoints").exists()
    assert "**undecided** | +0.0 ± inf | 1 |" in (folders["output"] / "claims.md").read_text()

    # a table that is done
    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}

    before = state()
    assert commands.run(claims.main, arguments=arguments) == 0
    assert state() == before
    assert len(started) == 5

    # a damaged result
    path, whole = folders["results"] / "pairs_0.json", (folders["results"] / "pairs_0.json").read_bytes()
    for data in (b"", b"[]", b'{"row": "pairs"}', whole[:-9]):
        path.write_bytes(data)
        assert commands.run(claims.main, arguments=arguments) == 1
        assert f"error: {path} is " in capsys.readouterr().err
    path.write_bytes(whole)

    # a row whose start is gone needs it again
    shutil.rmtree(folders["work"])
    (folders["results"] / "image_to_text_0.json").unlink()
    assert commands.run(claims.main, arguments=arguments) == 0
    assert started[5:] == ["start", "image_to_text"]

    # a result of another recipe is not taken for one of this
    monkeypatch.setitem(ablations.ROWS, "pairs", ablations.ROWS["pairs"] | {"loss.temperature": 0.3})
    assert commands.run(claims.main, arguments=arguments) == 1
    assert "is of another recipe (loss.temperature: 0.5 -> 0.3); delete it" in capsys.readouterr().err


def test_the_recipe_comes_with_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    taken = []
    monkeypatch.setattr(claims, "_run_table", lambda recipe, **_: taken.append(recipe))
    assert commands.run(claims.main, arguments=[]) == 0
    assert taken == [RECIPE]
    assert commands.run(claims.main, arguments=["--jobs=0", "--config=mine"]) == 1
    assert "there is no such file, and no configuration mine: coco_json" in capsys.readouterr().err
    assert (tmp_path / "docs" / "claims.md").read_text().startswith("0 of ")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("row", "start", "world"),
    [("start_plain", "", "world_1"), ("plain_pairs", "start_plain_1", "world_1"),
     ("pairs_base_words", "start_1", "world_1_novel_captions_False"),
     ("all_named", "start_1", "world_1_named_share_1.0")],
)  # fmt: skip
def test_a_run_has_its_world_and_its_start(tmp_path, monkeypatch, row, start, world):
    written = []
    monkeypatch.setattr(claims.scenes, "write", lambda **options: written.append(options))
    code = "import os; print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    monkeypatch.setattr(claims, "command", lambda *_: [sys.executable, "-S", "-c", code])
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    config = claims.configuration(RECIPE, row, 1)
    process = claims.start(RECIPE, row, 1, config, work=tmp_path, core=min(os.sched_getaffinity(0)))
    assert process.wait() == 0
    assert (tmp_path / f"{row}_1" / "log.txt").read_text() == f"{tmp_path / 'compiled'}\n"
    assert config.init_from.checkpoint == (start and str(tmp_path / start))
    assert written == [config.scenes.to_dict()]
    assert written[0]["folder"] == str(tmp_path / world)


def test_what_a_row_needs_is_prepared_once_of_the_world_of_pairs(tmp_path, monkeypatch):
    ran = []
    code = "import pathlib, sys; pathlib.Path(sys.argv[-2].removeprefix('--output=')).mkdir()"

    def run(arguments, **options):
        ran.append(arguments)
        return REAL_RUN([sys.executable, "-S", "-c", code, *arguments], **options)

    written = []
    monkeypatch.setattr(claims.subprocess, "run", run)
    monkeypatch.setattr(claims.scenes, "write", lambda **options: written.append(options))
    monkeypatch.setattr(claims, "command", lambda *_: [sys.executable, "-S", "-c", ""])
    place = {"work": tmp_path, "core": min(os.sched_getaffinity(0))}
    for _ in range(2):
        config = claims.configuration(RECIPE, "pseudo_boxes", 1)
        claims.start(RECIPE, "pseudo_boxes", 1, config, **place).wait()
        (tmp_path / "pseudo_boxes_1" / "prepared" / "report.json").touch()
    prepared, world = tmp_path / "pseudo_boxes_1" / "prepared", str(tmp_path / "world_1")
    assert ran == [
        [
            sys.executable, "-m", "detclipv2_jax.prepare", "pseudo_boxes", f"--checkpoint={tmp_path}/start_1",
            f"--input={world}/pairs.tsv", f"--images={world}", f"--output={prepared}", "--pipeline=",
        ]
    ]  # fmt: skip
    assert (config.grounding.annotations, config.grounding.images) == (f"{prepared}/grounding.json", world)
    own, of_pairs = written[:2]
    assert (own["num_grounding"], own["num_image_text"]) == (0, 0)
    assert own["folder"] == f"{world}_num_grounding_0_num_image_text_0"
    assert of_pairs == claims.configuration(RECIPE, "pairs", 1).scenes.to_dict() | {"folder": world}
    monkeypatch.setattr(claims.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    config = claims.configuration(RECIPE, "pseudo_boxes", 2)
    with pytest.raises(ValueError, match=r"preparing pseudo_boxes, seed 2, failed; see .*pseudo_boxes_2/log.txt"):
        claims.start(RECIPE, "pseudo_boxes", 2, config, **place)


@pytest.mark.parametrize("row", ["class_names", "pairs_class_names"])
def test_class_names_are_photos_of_their_own_made_once(tmp_path, monkeypatch, row):
    ran, made = [], []
    monkeypatch.setattr(claims.subprocess, "run", lambda *args, **_: ran.append(args[0]) or REAL_RUN(["true"]))
    monkeypatch.setattr(claims.scenes, "write", lambda **options: None)
    monkeypatch.setattr(claims.scenes, "write_class_names", lambda *where, **options: made.append((where, options)))
    monkeypatch.setattr(claims, "command", lambda *_: [sys.executable, "-S", "-c", ""])
    prepared = tmp_path / f"{row}_1" / "prepared"
    for _ in range(2):
        config = claims.configuration(RECIPE, row, 1)
        claims.start(RECIPE, row, 1, config, work=tmp_path, core=min(os.sched_getaffinity(0))).wait()
        assert config.image_text.data == (str(prepared),)
        prepared.mkdir(exist_ok=True)
        (prepared / "report.json").touch()
    folder, sizes = f"{tmp_path}/world_1_classes", {"num_images": 1600, "size_px": config.scenes.size_px, "seed": 1}
    assert made == [((folder,), sizes)]
    assert [arguments[3:] for arguments in ran] == [
        ["classes", f"--input={folder}", f"--output={prepared}", "--workers=1"]
    ]
    assert config.scenes.num_image_text == (0 if row == "class_names" else 1600)
    assert config.image_text.class_weight == 1.0


def test_a_filter_is_the_run_of_the_captions_that_it_filters(tmp_path, monkeypatch):
    ran, written = [], []
    monkeypatch.setattr(claims.subprocess, "run", lambda *args, **_: ran.append(args[0]) or REAL_RUN(["true"]))
    monkeypatch.setattr(claims.scenes, "write", lambda **options: written.append(options))
    monkeypatch.setattr(claims, "command", lambda *_: [sys.executable, "-S", "-c", ""])
    config = claims.configuration(RECIPE, "filtered_60", 1)
    claims.start(RECIPE, "filtered_60", 1, config, work=tmp_path, core=min(os.sched_getaffinity(0))).wait()
    world, prepared = f"{tmp_path}/world_1_wrong_share_0.6", f"{tmp_path}/filtered_60_1/prepared"
    assert ran[0][3:] == [
        *("image_text", f"--input={world}/pairs.tsv", f"--images={world}", f"--output={prepared}", "--pipeline="),
        *(f"--filter={tmp_path}/wrong_60_1", "--workers=1"),
    ]
    assert (config.image_text.data, config.scenes.num_image_text) == ((prepared,), 0)
    assert config.init_from.checkpoint == f"{tmp_path}/start_1"
    assert [options["folder"] for options in written] == [f"{world}_num_image_text_0", world]
    assert (written[1]["wrong_share"], written[1]["num_image_text"]) == (0.6, 1600)
    assert ablations.needs("filtered_60") == ("start", "wrong_60")
    assert ablations.needs("filtered_0") == ("start", "pairs")
    assert ablations.needs("class_names") == ablations.needs("pseudo_boxes") == ("start",)
    assert ablations.needs("start") == ()
    recipe = claims.recipe_of(RECIPE, "filtered_60", 1)
    assert "after scenes.wrong_share: 0.0 -> 0.6" in recipe
    assert any(line.startswith("prepared by image_text --input=") for line in recipe)
    # the weights of what a missing row needs are made again, with those that these need
    found = {("wrong_60", 0): {}, ("start", 0): {}}
    monkeypatch.setattr(
        claims, "all_results", lambda _: {key: {"recipe": claims.recipe_of(RECIPE, *key)} for key in found}
    )
    pending = claims.pending_runs(RECIPE, tmp_path, tmp_path)
    assert ("wrong_60", 0) in pending
    assert pending.index(("start", 0)) < pending.index(("wrong_60", 0)) < pending.index(("filtered_60", 0))
    for row in ("wrong_60", "start"):
        (tmp_path / f"{row}_0").mkdir()
        (tmp_path / f"{row}_0" / "done").touch()
    assert not set(found) & set(claims.pending_runs(RECIPE, tmp_path, tmp_path))


def test_what_was_stopped_counts_to_the_time_of_a_run(tmp_path):
    for spent in (100, 200):
        process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        since = time.monotonic() - 100
        claims.stop(process, tmp_path, since=since)
        claims.stop(process, tmp_path, since=since)  # it has ended
        assert process.returncode == -signal.SIGTERM
        assert json.loads((tmp_path / "spent.json").read_text())["seconds"] == pytest.approx(spent, abs=10)
    usage = resource.struct_rusage([1.4, 0.4, *[0] * 14])
    added = claims.account(tmp_path / "other", since=time.monotonic(), usage=usage)
    assert added == {"seconds": 0, "cpu_seconds": 2}


def test_the_plot_counts_detection_steps(tmp_path, monkeypatch):
    number = {row: num_detection_steps(row) for row in ("start", "detection", "pairs", "detection_twice")}
    assert number["pairs"] == number["detection"] == number["detection_twice"] / 2
    for row, steps in (("start", 700), ("detection", 500), ("pairs", 1000), ("detection_twice", 1000)):
        result = {"row": row, "seed": 0, "novel_AP_by_step": {str(steps // 2): 1.0, str(steps): 2.0}}
        result |= {"cpu_seconds": 60, "seconds": 60, "recipe": []}
        (tmp_path / f"{row}_0.json").write_text(json.dumps(result | {"scores": dict.fromkeys(claims.COLUMNS, 1.0)}))
    drawn = {}
    monkeypatch.setattr(charts, "lines", lambda series, **_: drawn.update(series))
    claims.write_report(RECIPE, tmp_path, tmp_path)
    ends = {name: line[0][0].tolist() for name, line in drawn.items()}
    start = number.pop("start")
    assert list(ends) == ["detection", "+ pairs", "detection, twice the steps"]
    for steps, num in zip(ends.values(), number.values(), strict=True):
        assert steps == [start / 2, start, start + num / 2, start + num]


def num_detection_steps(row):
    config = claims.configuration(RECIPE, row, 0)
    return config.epochs * config.scenes.num_detection / config.detection.batch_size * config.detection.weight


def write_world(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(world()))


def test_seeds_that_all_rows_have():
    finding = ablations.Finding("", {"a": "x", "b": "y", "not run": "z"}, ())
    results = {(row, seed): {} for row, seed in (("x", 0), ("x", 1), ("y", 1), ("y", 2), ("x", 3))}
    assert ablations.common_seeds(finding, results) == [1]
    assert ablations.common_seeds(finding, {}) == list(range(10))
