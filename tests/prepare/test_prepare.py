import contextlib
import hashlib
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent))
import building
from raw_files import jpeg, write_coco

from detclipv2_jax.data.schema import Kind, Record
from detclipv2_jax.prepare import __main__ as prepare
from detclipv2_jax.prepare import box_json, dictionary, filter_pairs, inspect, pseudo_boxes, record_builder, shards


def command(*arguments):
    return [sys.executable, "-m", "detclipv2_jax.prepare", *map(str, arguments)]


def test_command_builds_and_says_what_to_put_in_the_config(tmp_path):
    path, out = write_coco(tmp_path / "raw"), tmp_path / "out"
    done = subprocess.run(
        command("coco_json", f"--input={path}", f"--output={out}"), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f'put in the config: config.detection.data = ("{out}",)'
    report = json.loads((out / "build_report.json").read_text())
    assert report["command"] == f"python -m detclipv2_jax.prepare coco_json --input={path} --output={out}"
    assert "example/s" in done.stderr


def test_scenes_are_a_data_set_to_build_from(tmp_path, capsys):
    prepare.scenes(output=str(tmp_path), num_examples=3, size_px=48, seed=1)
    assert str(tmp_path) in capsys.readouterr().out
    counts = [len(list((tmp_path / "images" / kind).iterdir())) for kind in ("detection", "image_text", "eval")]
    assert counts == [3, 3, 3]
    assert len(json.loads((tmp_path / "grounding.json").read_text())["images"]) == 3


def test_help_lists_kinds_and_flags():
    for options, words in (
        (["--help"], ("coco_json", "lvis", "grounding_json", "image_text", "inspect", "dictionary", "scenes")),
        (["image_text", "--help"], ("--input", "--output", "--pipeline")),
    ):
        done = subprocess.run(command(*options), capture_output=True, text=True, check=False)
        for word in words:
            assert word in done.stdout


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("coco", {}, "KIND is 'coco'; allowed are coco_json"),
        ("coco_json", {"input": "nowhere.json"}, "--input=nowhere.json does not exist"),
        ("grounding_json", {"num_examples": 3}, "grounding_json has none"),
        ("coco_json", {"shard_size": 0}, "--shard_size=0"),
        ("grounding_json", {}, "belongs in config.detection.annotations"),
        ("image_text", {}, "is a json; image_text takes a TSV"),
    ],
)
def test_wrong_arguments(tmp_path, kind, options, message):
    path = write_coco(tmp_path / "raw")
    with pytest.raises(ValueError, match=message):
        building.build(
            kind, **{"input": str(path), "output": str(tmp_path / "out"), "images": str(path.parent)} | options
        )


def test_every_option_of_a_build_reaches_it(tmp_path, monkeypatch, capsys):
    noted = {}

    def build(builder, reader, output, **options):
        noted.update(options, builder=builder, reader=reader)

    monkeypatch.setattr(shards, "build", build)
    path = write_coco(tmp_path / "raw")
    held_out = [f"{i:012d}" for i in range(2, 9)]
    names = [f"{photo}.jpg" for photo in held_out]
    (tmp_path / "val.json").write_text(json.dumps({"images": [{"file_name": name} for name in names[::-1]]}))
    options = {"input": str(path), "output": str(tmp_path / "out"), "images": str(tmp_path / "raw/images")}
    plain = {"images": options["images"], "shard_size": 4096, "validation": "", "drop_validation": False}
    prepare.run("coco_json", **options)
    assert noted["options"] == plain
    assert (noted["reader"].num_items, noted["part"], noted["command"]) == (6, shards.ALONE, "")
    photos = hashlib.sha256("\n".join(held_out).encode()).hexdigest()
    more = {"shard_size": 5, "drop_validation": True, "follow_links": True, "num_examples": 3, "seed": 7}
    more |= {"drop_categories": ("thing 1",), "max_bad_share": 0.5, "workers": 3, "index": 1, "count": 4}
    prepare.run("coco_json", **options, **more, validation=(str(tmp_path / "val.json"),), command="typed")
    planned = ("shard_size", "drop_validation", "follow_links", "num_examples", "seed", "drop_categories")
    assert noted["options"] == plain | {key: more[key] for key in planned} | {"validation": photos}
    assert noted["builder"] is box_json.CocoJson
    assert noted["reader"].vocabulary.names == ("thing 2", "thing 3")
    assert (noted["reader"].num_items, noted["reader"].num_shards) == (3, 1)
    expected = {"command": "typed", "max_bad_share": 0.5, "num_workers": 3, "drop_held_out": True}
    expected |= {"held_out": set(held_out), "part": shards.Part(1, 4)}
    assert {key: noted[key] for key in expected} == expected
    assert "part 1 of 4 is written; --count=4 joins all" in capsys.readouterr().out
    pairs = tmp_path / "raw" / "images" / "pairs.tsv"
    pairs.write_text("000000000002.jpg\ta dog\n")
    judged = []

    def judge(reader, checkpoint, folder, **options):
        judged.append((checkpoint, folder, options))
        reader.facts = {"filter": "by a run"}
        return reader

    def build_while_the_misfits_are_kept(*arguments, **options):
        build(*arguments, **options)
        judged.append([path.name for path in (tmp_path / "o_filter").iterdir()])

    monkeypatch.setattr(filter_pairs, "judge", judge)
    monkeypatch.setattr(shards, "build", build_while_the_misfits_are_kept)
    given = {"pipeline": "", "max_phrases": 3, "shard_size": 9, "follow_links": False}
    fit = {"max_misfit": 0.125, "filter": "run", "filter_group": 5}
    prepare.run("image_text", input=str(pairs), output=f"{tmp_path}/o/", **given, **fit)
    read_by = {**given, "images": options["images"]}
    assert judged == [
        ("run", tmp_path / "o_filter", {"read_by": read_by, "max_misfit": 0.125, "group_size": 5}), ["..lock"]
    ]  # fmt: skip
    assert noted["options"]["filter"] == "by a run"
    monkeypatch.setattr(shards, "build", build)
    prepare.run("image_text", input=str(pairs), output="out", pipeline="", max_phrases=3, count=2)
    assert noted["options"] == plain | {"pipeline": "", "max_phrases": 3}
    assert noted["part"] == shards.Part(None, 2)


def test_boxes_that_cannot_be_used_are_refused_above_the_share(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    image = {"id": 1, "file_name": "0.jpg", "caption": "a cat", "height": 24, "width": 32}
    rows = [{"image_id": 1, "bbox": [1, 1, size, 5], "tokens_positive": [[2, 5]]} for size in (5, 0)]
    (tmp_path / "g.json").write_text(json.dumps({"images": [image], "annotations": rows}))
    options = {"input": str(tmp_path / "g.json"), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"1 of 2 boxes .*max_bad_share allows 1\.00%"):
        building.build("grounding_json", **options)
    assert building.build("grounding_json", **options, max_bad_share=0.5)["boxes"] == 1


def test_numbers_that_may_be_given():
    fine = {"max_misfit": 0.0, "filter_group": 2, "shard_size": 1, "workers": 1}
    prepare._check_numbers(**fine)
    for change in ({"max_misfit": 1.0}, {"max_misfit": -0.1}, {"filter_group": 1}, {"shard_size": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match=f"--{next(iter(change))}="):
            prepare._check_numbers(**fine | change)
    for index, count in ((-1, 1), (0, 1), (-1, 9), (8, 9)):
        prepare._check_part(index, count=count, filter="")
    for index, count, by in ((1, 1, ""), (9, 9, ""), (-2, 3, ""), (0, 0, ""), (-1, 0, ""), (0, 1, "run")):
        with pytest.raises(ValueError, match=f"--index={index} must be below --count={count}"):
            prepare._check_part(index, count=count, filter=by)


def test_options_are_for_their_kinds(tmp_path):
    (tmp_path / "a").write_text("")
    none = {"by_category": {"num_examples": 0, "drop_categories": ()}, "filter": "", "names": ""}
    for kind in prepare.KINDS:
        prepare._check_kind(kind, str(tmp_path / "a"), **none)
        given = [
            ({"by_category": {"num_examples": 3}}, ("coco_json", "lvis")),
            ({"by_category": {"drop_categories": ("a",)}}, ("coco_json", "lvis")),
            ({"filter": "run"}, ("image_text",)),
            ({"names": "a.txt"}, ("classes",)),
        ]
        for change, kinds in given:
            fails = contextlib.nullcontext() if kind in kinds else pytest.raises(ValueError, match=kind)
            with fails:
                prepare._check_kind(kind, str(tmp_path / "a"), **none | change)


def test_photos_are_looked_for_where_they_usually_are(tmp_path):
    folder = tmp_path / "a" / "b"
    (folder / "images").mkdir(parents=True)
    content = {"images": [3, {"file_name": "../secret.jpg"}, *({"file_name": f"{i}.jpg"} for i in range(70))]}
    (folder / "d.json").write_text(json.dumps(content | {"annotations": []}))
    (folder / "p.tsv").write_text("".join(f"{image['file_name']}\tx\n" for image in content["images"][1:]))
    (tmp_path / "secret.jpg").touch()
    (tmp_path / "a" / "secret.jpg").touch()
    (folder / "69.jpg").touch()  # none of the first 64
    for kind, file in (("coco_json", "d.json"), ("image_text", "p.tsv")):
        with pytest.raises(ValueError, match=r"--images: no image of .* \(the first is 0\.jpg\)"):
            prepare._find_images(kind, folder / file)
    for found in (tmp_path / "a", folder / "images", folder):  # each is preferred to the one before
        (found / "60.jpg").touch()
        for kind, file in (("coco_json", "d.json"), ("image_text", "p.tsv")):
            assert prepare._find_images(kind, folder / file) == str(found)


def test_a_summary_of_a_build():
    report = {"examples": 5, "seen": 9, "boxes": 7, "concepts": 8, "kind": "grounding", "dropped": {}}
    report |= {"left out or repaired": {}, "validation photos": {"compared with": 0, "found": 0, "left out": False}}
    assert prepare.summary(report, "o").splitlines() == [
        "5 examples of 9, 7 boxes, 8 concepts", "dropped: nothing", "left out or repaired: nothing",
        'put in the config: config.grounding.data = ("o",)',
    ]  # fmt: skip
    report |= {"dropped": {"torn": 3, "burnt": 1}, "left out or repaired": {"turned": 2}}
    for found, left_out, fate in ((0, False, "KEPT"), (2, True, "left out"), (0, True, "left out"), (2, False, "KEPT")):
        report["validation photos"] = {"compared with": 4, "found": found, "left out": left_out}
        lines = prepare.summary(report, "o").splitlines()
        assert lines[1:3] == ["dropped: 3 torn, 1 burnt", "left out or repaired: 2 turned"]
        assert lines[3].startswith(f"photos of validation sets: {found} of 4 found, {fate}")


def test_options_of_the_other_commands_reach_them(tmp_path, monkeypatch, capsys):
    noted = []
    facts = {"images of an epoch": 9, "images counted": 8, "left out or repaired": {"torn photo": 2}}
    monkeypatch.setattr(inspect, "inspect", lambda *given, **options: noted.append((given, options)) or {"s": facts})
    output = str(tmp_path / "out")
    prepare.inspect(output=output, data=("a",), num_examples=7)
    assert noted.pop() == ((output,), {"config": None, "folders": ("a",), "num_examples": 7})
    assert capsys.readouterr().out.splitlines()[:2] == [
        "s: an epoch has 9 images, 8 were counted", "  2 × torn photo"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="inspect needs --data=FOLDER or --config=FILE"):
        prepare.inspect(output=output)
    monkeypatch.setattr(
        dictionary, "make", lambda *given, **options: noted.append((given, options)) or {"a": 3, "b": 4}
    )
    monkeypatch.setattr(dictionary, "coverage", lambda *given: [f"covered {given}"])
    file = str(tmp_path / "d.tsv")
    prepare.dictionary(input=("i",), output=file, wordnet="w", text="t", num_names=5)
    assert noted.pop() == ((("i",), file), {"wordnet": "w", "text": "t", "num_names": 5})
    said = capsys.readouterr().out
    assert "7 names; definitions by origin: {'a': 3, 'b': 4}" in said
    assert f"covered {(file, ('i',))}" in said


def test_options_of_pseudo_boxes_reach_them(tmp_path, monkeypatch):
    noted = {}

    def make(reader, output, labeller, **options):
        noted.update(options, reader=reader, output=output)
        return dict.fromkeys(
            ("boxes", "photos with a box", "pairs", "of them completed from the dictionary", "phrases with a box",
             "phrases without a box", "images"), 0,
        )  # fmt: skip

    monkeypatch.setattr(pseudo_boxes, "make", make)
    monkeypatch.setattr(pseudo_boxes, "Labeller", lambda checkpoint, **options: noted.update(options, run=checkpoint))
    write_coco(tmp_path / "raw")
    pairs = tmp_path / "raw" / "images" / "pairs.tsv"
    pairs.write_text("000000000002.jpg\ta dog\n" * 3)
    (tmp_path / "names.tsv").write_text("cat\ta pet\n")
    options = {"score_threshold": 0.3, "completion_threshold": 0.4, "nms_iou": 0.6, "max_boxes": 1}
    read_by = {"pipeline": "", "max_phrases": 5, "follow_links": True, "shard_size": 2}
    more = {"max_bad_share": 0.2, "command": "typed"}
    given = {"checkpoint": "run", "input": str(pairs), "output": "out", "dictionary": str(tmp_path / "names.tsv")}
    prepare.pseudo_boxes(**given, **options, **read_by, **more)
    folder = str(pairs.parent)
    assert noted.pop("reader").num_shards == 2
    assert noted.pop("dictionary").names == ("cat",)
    assert noted == options | more | {
        "run": "run", "output": pathlib.Path("out"), "images": folder, "read_by": read_by | {"images": folder}
    }  # fmt: skip
    for wrong in ({"max_boxes": 0}, {"shard_size": 0}, {"input": str(tmp_path / "absent")}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))}="):
            prepare.pseudo_boxes(**given | wrong)


def test_images_are_found_beside_the_input_or_asked_for(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(jpeg())
    pairs = tmp_path / "a" / "pairs.tsv"
    for name, folder in (("photos/0.jpg", tmp_path), ("0.jpg", None)):
        pairs.write_text(f"{name}\ta dog\n")
        if folder:
            report = building.build("image_text", input=str(pairs), output=str(tmp_path / "out"))
            assert report["plan"]["images"] == str(folder)
        else:
            with pytest.raises(ValueError, match=r"--images: no image of .* \(the first is 0.jpg\)"):
                building.build("image_text", input=str(pairs), output=str(tmp_path / "out2"))


@pytest.mark.slow
def test_a_killed_build_goes_on_and_leaves_no_process(tmp_path):
    path, out = write_coco(tmp_path / "raw", labels=[(1,)] * 400), tmp_path / "out"
    arguments = command("coco_json", f"--input={path}", f"--output={out}", "--shard_size=2", "--workers=2")
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
    finished = lambda: [p for p in (out / "building").glob("0*.json") if "index" not in p.name]  # noqa: E731
    while len(finished()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=120)  # the pipe ends when its workers have ended too
    inodes = {p.stem: p.with_suffix(".array_record").stat().st_ino for p in finished()}
    assert len(inodes) < 200
    subprocess.run(arguments, capture_output=True, check=True)
    final = {f"{i:06d}": p.stat().st_ino for i, p in enumerate(sorted(out.glob("*.array_record-*")))}
    assert len(final) == 200
    assert inodes.items() <= final.items()


def test_machines_that_share_a_build_write_what_one_writes(tmp_path, capsys):
    path = write_coco(tmp_path / "raw", labels=[(1,)] * 11)
    options = {"input": str(path), "shard_size": 2}
    whole = building.build("coco_json", output=str(tmp_path / "whole"), **options)
    output, shared = tmp_path / "shared", {**options, "output": str(tmp_path / "shared"), "count": 3}
    with pytest.raises(ValueError, match=r"these have not written their part: --index=0, 1, 2"):
        building.build("coco_json", **shared)
    with pytest.raises(ValueError, match=r"these have not written their part: --index=0, 1$"):
        building.build("coco_json", **shared | {"output": str(tmp_path / "by two"), "count": 2})
    assert building.build("coco_json", **shared, index=2) is None
    assert "part 2 of 3 is written" in capsys.readouterr().out
    assert sorted(path.name for path in (output / "building").glob("*.array_record")) == [
        "000002.array_record", "000005.array_record"
    ]  # fmt: skip
    (output / "building" / "000001.part9").touch()  # another machine is at it
    (output / "building" / "000002.part9").touch()  # and this one was killed
    assert building.build("coco_json", **shared, index=0) is building.build("coco_json", **shared, index=2) is None
    assert [path.name for path in (output / "building").glob("*.part*")] == ["000001.part9"]
    with pytest.raises(ValueError, match=r"these have not written their part: --index=1$"):
        building.build("coco_json", **shared)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holds = [sys.executable, "-S", "-c", code, str(output / "building" / "lock-1")]
    with subprocess.Popen(holds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        for index in (1, -1):
            with pytest.raises(ValueError, match="another process builds in"):
                building.build("coco_json", **shared, index=index)
        assert building.build("coco_json", **shared, index=0) is None
        other.communicate("\n")
    assert building.build("coco_json", **shared, index=1) is None
    report = building.build("coco_json", **shared)
    own = {"seconds of the last run": 0, "command": ""}
    assert report | own == whole | own
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in output.iterdir())
    for name in set(names) - {"build_report.json"}:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for wrong in ({"index": 3}, {"count": 0}, {"index": -2}, {"index": 0, "filter": "run"}):
        with pytest.raises(ValueError, match=r"must be below --count|compares captions"):
            building.build("coco_json", **(shared | wrong))


@pytest.mark.slow
def test_inspect_draws_what_a_configuration_or_a_folder_names(tmp_path):
    path = write_coco(tmp_path / "raw")
    values = {"annotations": path, "images": path.parent / "images", "canvases": "((64, 64),)", "batch_size": 3}
    overrides = [f"--config.detection.{key}={value}" for key, value in values.items()]
    arguments = command("inspect", "--config=configs/coco_json.py", *overrides, f"--output={tmp_path / 'out'}")
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "detection/64x64: an epoch has 6 images, 6 were counted"
    assert (tmp_path / "out" / "detection_64x64_1.jpg").stat().st_size > 1000
    done = subprocess.run(command("inspect", f"--output={tmp_path}"), capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("error: inspect needs --data=FOLDER or --config=FILE")
    mistyped = command("inspect", "--config=configs/coco_json.py", "--config.detection.batchsize=3", "--output=x")
    done = subprocess.run(mistyped, capture_output=True, text=True, check=False)
    assert 'Did you mean "batch_size" instead of "batchsize"?' in done.stderr.splitlines()[-1]


def test_what_is_stored_of_files_and_records(tmp_path):
    (tmp_path / "a").write_bytes(b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    assert box_json.describe_file(tmp_path / "a") == {"bytes": 4, "sha256": digest}
    record = Record(
        kind=Kind.DETECTION, source="s", example_id=0, image=b"i", size=(3, 4), boxes=np.ones((1, 4)), concepts=("c",),
        box_concepts=np.zeros(1, int), caption="t", negatives=("n",), not_negatives=("m",),
    )  # fmt: skip
    example = record_builder.to_example("name", record)
    assert example.pop("size").tolist() == [3, 4]
    assert example.pop("boxes") is record.boxes
    assert example.pop("box_concepts") is record.box_concepts
    assert example == {
        "image": b"i", "name": "name", "concepts": ("c",), "caption": "t", "negatives": ("n",), "not_negatives": ("m",)
    }  # fmt: skip
