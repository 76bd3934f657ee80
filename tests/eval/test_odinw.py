"""The list of ODinW's members; the command on members with a planted model; the real ones read."""

import json
import shutil

import jax
import numpy as np
import planted
import pytest

from detclipv2_jax import commands, config_json
from detclipv2_jax.eval import loop, odinw
from detclipv2_jax.inference import Detector
from detclipv2_jax.runs import checkpoints, sharding


def test_members():
    members = odinw.members()
    assert len({member.name for member in members}) == 35
    assert [member.name for member in members if member.odinw13] == [
        "AerialMaritimeDrone_large", "Aquarium", "CottontailRabbits", "EgoHands_generic", "NorthAmericaMushrooms",
        "Packages", "PascalVOC", "Raccoon", "ShellfishOpenImages", "VehiclesOpenImages", "pistols", "pothole",
        "thermalDogsAndPeople",
    ]  # fmt: skip


def test_members_are_found_in_both_layouts(tmp_path):
    for path in ("pistols/export/test_annotations_without_background.json", "PascalVOC/valid/annotations.json"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("{}")
    (tmp_path / "dice" / "train").mkdir(parents=True)
    found = {member.name: member.find(tmp_path) for member in odinw.members()}
    assert {name for name, path in found.items() if path} == {"pistols", "PascalVOC"}
    for member in odinw.members():  # GLIP's folder first, in each the file without background
        split = "valid" if member.folder.endswith("/valid") else "test"
        places = [tmp_path / "all" / member.folder, tmp_path / "all" / member.name / split]
        names = [name.format("val" if split == "valid" else split) for name in odinw.FILES]
        files = list(dict.fromkeys(place / name for place in places for name in names))
        for path in reversed(files):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            assert member.find(tmp_path / "all") == path


def test_splits_stand_beside_the_test_photos(tmp_path):
    pistols, voc, dice = (m for m in odinw.members() if m.name in ("pistols", "PascalVOC", "dice"))
    for path in (
        "pistols/export/train_annotations_without_background.json", "PascalVOC/train/annotations.json",
        "pistols/export/val_annotations_without_background.json", "dice/train/_annotations.coco.json",
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    found = {(m.name, split): m.find(tmp_path, split) for m in (pistols, voc, dice) for split in ("train", "valid")}
    assert {key: str(path.relative_to(tmp_path)) for key, path in found.items() if path} == {
        ("pistols", "train"): "pistols/export/train_annotations_without_background.json",
        ("pistols", "valid"): "pistols/export/val_annotations_without_background.json",
        ("PascalVOC", "train"): "PascalVOC/train/annotations.json",
        ("dice", "train"): "dice/train/_annotations.coco.json",
    }


def test_members_of_roboflow_and_the_parent_of_its_exports(tmp_path):
    groups = odinw.groups("roboflow")
    assert {name: len(group) for name, group in groups.items()} == {"mean_20": 20, "mean_100": 100}
    assert set(groups["mean_20"]) < set(groups["mean_100"])
    first, *_, last = groups["mean_100"]
    assert "/" not in first.name + last.name
    for split in ("train", "valid", "test"):  # as Roboflow exports them
        path = tmp_path / first.name / split / "_annotations.coco.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert (first.find(tmp_path, split), last.find(tmp_path, split)) == (path, None)
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "pets"},
    ]
    path = tmp_path / "_annotations.coco.json"
    for used, listed, expected in (
        ([1], categories, ("pets",)),  # the dog has no box either, but is nobody's parent
        ([0, 1], categories, ()),
        ([1], [*categories, {"id": 3, "name": "car", "supercategory": "things"}], ()),
        ([], categories[:1], ()),
    ):
        path.write_text(json.dumps({"categories": listed, "annotations": [{"category_id": i} for i in used]}))
        assert odinw.parents(path) == expected


def test_the_real_members(shared_data):
    found = {member.name: member.find(shared_data / "odinw") for member in odinw.members()}
    paths = {name: path for name, path in found.items() if path}
    assert set(paths) == {"NorthAmericaMushrooms", "Packages"}
    for member in odinw.members():
        if member.name in paths:
            names = {category["name"] for category in json.loads(paths[member.name].read_text())["categories"]}
            assert set(member.prompts) == names


def test_what_is_missing_is_said(tmp_path, capsys):
    assert commands.run(odinw.main, arguments=[f"--data={tmp_path}", "--checkpoint=run"]) == 1
    assert "holds no member of odinw as <name>" in capsys.readouterr().err
    (tmp_path / "Packages" / "test").mkdir(parents=True)
    (tmp_path / "Packages" / "test" / "annotations.json").write_text("{}")
    assert commands.run(odinw.main, arguments=[f"--data={tmp_path}"]) == 1
    assert "give --checkpoint, a run scored on all members, or --finetuned" in capsys.readouterr().err


def test_a_member_is_read_as_it_is_with_its_own_photos(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_streams", lambda config: [])
    config, *_ = planted.make()
    own = {
        "dictionary": "words.tsv",
        "definitions": True,
        "max_examples": 2,
        "drop_categories": ("x",),
        "batch_size": 9,
    }
    config.eval.update(own)
    path = tmp_path / "annotations.json"
    categories = [{"id": 0, "name": "pets"}, {"id": 1, "name": "cat", "supercategory": "pets"}]
    path.write_text(json.dumps({"categories": categories, "annotations": [{"category_id": 1}]}))
    prepared, _ = odinw.setup(config, odinw.members()[0], path, plain_names=False)
    expected = {
        "annotations": str(path), "images": str(tmp_path), "dictionary": "", "definitions": False, "max_examples": 0,
        "drop_categories": ("pets",), "batch_size": 16,
    }  # fmt: skip
    assert {key: prepared.eval[key] for key in expected} == expected
    assert {key: config.eval[key] for key in own} == own  # the caller's stays


@pytest.mark.slow
def test_command_scores_what_is_there(tmp_path, monkeypatch, capsys):
    for name in ("Packages", "Raccoon"):
        dataset = planted.write_dataset(tmp_path / "made" / name, num_images=5)
        shutil.copytree(dataset.parent / "images", tmp_path / "data" / name / "test")
        shutil.copy(dataset, tmp_path / "data" / name / "test" / "annotations.json")
    prompts = odinw.Member("Packages", "Packages/Raw/test", True, {"red": "blue", "blue": "red"})  # wrong on purpose
    others = [member for member in odinw.members() if member.name != "Packages"]
    monkeypatch.setattr(odinw, "members", lambda: [prompts, *others])
    config, model, params = planted.make()
    config.eval.num_pictures, config.eval.batch_size = 0, 3
    config.eval.max_examples, config.eval.definitions = 2, True  # of the run's own evaluation
    detector = Detector(model, mesh=sharding.make_mesh())
    loaded = []

    def load(workdir, *, fsdp=1):
        loaded.append(str(workdir))
        return loop.Checkpoint(config, detector, params, 4)

    monkeypatch.setattr(loop.Checkpoint, "load", load)
    runs = [tmp_path / "run", tmp_path / "tuned" / "Raccoon"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "config.json").write_text(config_json.to_json(config))
    arguments = [f"--data={tmp_path}/data", f"--output={tmp_path}/out", f"--checkpoint={runs[0]}"]
    assert commands.run(odinw.main, arguments=[*arguments, f"--finetuned={tmp_path}/tuned"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["protocol"]["prompts"].startswith("GLIP's")
    assert result == json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["zero_shot"]["Raccoon"] > 0.5
    assert result["zero_shot"]["Packages"] < 0.7 * result["zero_shot"]["Raccoon"]  # every box has a low score too
    assert set(result["finetuned"]) == {"Raccoon", "mean_13", "mean_35"}
    assert result["finetuned"]["Raccoon"] == result["zero_shot"]["Raccoon"]
    assert result["zero_shot"]["mean_13"] is None  # eleven are missing
    assert loaded == [str(run) for run in runs]
    evaluate = loop.Evaluator.__call__
    monkeypatch.setattr(loop.Evaluator, "__call__", None)  # what is scored is not scored again
    assert commands.run(odinw.main, arguments=[*arguments, "--only=Raccoon"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["zero_shot"] == {
        "Raccoon": result["zero_shot"]["Raccoon"], "mean_13": None, "mean_35": None
    }  # fmt: skip
    monkeypatch.setattr(loop.Evaluator, "__call__", evaluate)
    folder = tmp_path / "out" / "zero_shot" / "Packages" / "eval"
    protocol = json.loads((folder / "step_00000004_scores.json").read_text())["protocol"]
    assert protocol["prompts"] == ["blue", "red"]
    assert (protocol["images_evaluated"], protocol["definitions"]) == (5, False)
    assert any(line.startswith("not scored (33)") for line in lines)
    assert jax.device_count() == 8  # a batch of 3 was made one of 8
    assert commands.run(odinw.main, arguments=[*arguments, "--plain_names"]) == 0
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plain["zero_shot"]["Packages"] == result["zero_shot"]["Raccoon"]
    assert plain["protocol"]["prompts"] == "category names"


def test_means_are_of_the_ap_of_all_members_and_of_the_thirteen(tmp_path, monkeypatch):
    everyone = odinw.members()
    aps = {member.name: i / 50 for i, member in enumerate(everyone)}
    thirteen = [aps[member.name] for member in everyone if member.odinw13]
    assert np.mean(thirteen) != np.mean(list(aps.values()))
    monkeypatch.setattr(odinw.Member, "find", lambda self, data: data / self.name)
    monkeypatch.setattr(odinw, "_setup_all", lambda found, **_: {"zero_shot": {m: m.name for m in found}})
    monkeypatch.setattr(odinw, "evaluate", lambda _, name, output: {"AP50": 1.0, "AP": aps[name]})
    monkeypatch.setattr(loop.Checkpoint, "load", lambda workdir: None)
    result = odinw.run(data=tmp_path, output=tmp_path, checkpoint="run")["zero_shot"]
    assert result == aps | {
        "mean_13": pytest.approx(np.mean(thirteen)), "mean_35": pytest.approx(np.mean(list(aps.values())))
    }  # fmt: skip
    some = odinw.run(data=tmp_path, output=tmp_path, checkpoint="run", only="pothole,Aquarium")["zero_shot"]
    assert some == {name: aps[name] for name in ("Aquarium", "pothole")} | {"mean_13": None, "mean_35": None}


def test_all_members_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "read_config", lambda workdir: None)

    def setup(config, member, path, *, plain_names):
        raise ValueError(f"no boxes in {path}")

    monkeypatch.setattr(odinw, "setup", setup)
    first, second, *_ = odinw.members()
    with pytest.raises(ValueError, match=f"{first.name}: no boxes in 1\n{second.name}: no boxes in 2"):
        odinw._setup_all({first: 1, second: 2}, checkpoint="c", finetuned="", plain_names=False)


def test_means_need_every_member():
    scores = dict.fromkeys((member.name for member in odinw.members()), 0.5)
    tuned = {"zero_shot": {"pistols": 0.25, "mean_13": None}, "finetuned": {"dice": 0.0, "mean_35": 0.125}}
    *rows, missing = odinw.table(tuned, odinw.groups("odinw")).splitlines()
    assert sorted(row.split() for row in rows) == [
        ["dice", "-", "0.0"], ["mean_13", "-", "-"], ["mean_35", "-", "12.5"], ["pistols", "25.0", "-"],
        ["zero_shot", "finetuned"],
    ]  # fmt: skip
    assert missing.startswith("not scored (33): ")
    text = odinw.table({"zero_shot": scores | {"mean_13": 0.5, "mean_35": 0.5}}, odinw.groups("odinw"))
    assert "not scored" not in text
    assert text.splitlines()[-1].split() == ["mean_35", "50.0"]


def test_a_fine_tuned_run_is_asked_with_the_names_it_was_trained_with(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(odinw, "setup", lambda config, member, path, *, plain_names: asked.append(plain_names))
    monkeypatch.setattr(checkpoints, "read_config", lambda workdir: None)
    first, second, *_ = odinw.members()
    (tmp_path / first.name).mkdir()
    found = dict.fromkeys((first, second), tmp_path)
    for plain_names in (False, True):
        prepared = odinw._setup_all(found, checkpoint="c", finetuned=str(tmp_path), plain_names=plain_names)
        assert {kind: list(of_kind) for kind, of_kind in prepared.items()} == {
            "zero_shot": [first, second], "finetuned": [first]
        }  # fmt: skip
    assert asked == [False, False, True, True, True, True]
