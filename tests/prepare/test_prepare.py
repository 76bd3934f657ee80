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
from detclipv2_jax.prepare import box_json, record_builder


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
