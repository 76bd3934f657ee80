"""Files that annotations name, ids that fit each other, and workers that ignore Ctrl-C."""

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import types
from zipfile import BadZipFile

import pytest

from detclipv2_jax.data import checks, leakage, selection, workers
from detclipv2_jax.data.schema import DataError, UnusableError


def test_a_share_may_be_bad_and_not_more():
    bad = {f"of kind {i}": i for i in (1, 6, 2, 5, 3, 4)}
    with pytest.raises(DataError, match=r"\(6 of kind 6, 5 of kind 5, 4 of kind 4, 3 of kind 3, 2 of kind 2\);"):
        checks.refuse_above_share(bad, 99, 0.1, what="photos", where="here")
    bad = {"torn": 1, "burnt": 3}
    checks.refuse_above_share(bad, 8, 0.5, what="photos", where="here")
    with pytest.raises(DataError, match=r"here: 4 of 8 photos cannot be used \(3 burnt, 1 torn\); .* allows 49\.00%"):
        checks.refuse_above_share(bad, 8, 0.49, what="photos", where="here")


def test_a_missing_dictionary_is_one_problem_of_all_its_keys():
    def missing(section, path="d.tsv"):
        return checks.missing_paths({f"config.{section}.dictionary": (path, "file")})[0]

    folder = "config.detection.images: the folder no does not exist"
    photos = "config.eval: 2 photos do not exist:\n  a.jpg\n  b.jpg"
    [command] = missing("eval").splitlines()[1:]
    problems = []
    for problem in (
        f"{folder}\n{missing('detection')}\n{missing('grounding')}",
        f"{missing('forgetting', 'other.tsv')}\n{photos}",
        missing("eval"),
    ):
        problems = checks.dictionary_once([*problems, problem])
    assert problems == [
        f"{folder}\nconfig.detection.dictionary, config.grounding.dictionary, config.eval.dictionary: "
        f"the file d.tsv does not exist; make it with\n{command}",
        f"{missing('forgetting', 'other.tsv')}\n{photos}",
    ]


@pytest.mark.parametrize(
    "error", [AttributeError, EOFError, IndexError, KeyError, OverflowError, RecursionError, TypeError, BadZipFile]
)
def test_a_file_of_another_form_is_one_error(error):
    @checks.documented
    def read(path, fails):
        if fails:
            raise error("of some kind")
        return path

    assert read("a.json", fails=False) == "a.json"
    with pytest.raises(
        DataError, match=rf"a\.json does not have the documented form \({error.__name__}: '?of some kind"
    ):
        read("a.json", fails=True)


def test_names_that_leave_their_folder():
    for name in ("", "/a.jpg", "../a.jpg", "b/../../a.jpg", "b\\..\\a.jpg", "a\0.jpg"):
        assert checks.unsafe_path(name)
    for name in ("a.jpg", "b/a.jpg", "b/..a.jpg", "a b.jpg"):
        assert not checks.unsafe_path(name)


def test_links_are_followed_where_they_may_be(tmp_path):
    for name in ("in", "in_another"):  # which begins like it
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_text("")
    folder = os.path.realpath(tmp_path / "in")
    os.symlink(tmp_path / "in_another" / "a.jpg", tmp_path / "in" / "out.jpg")
    os.symlink(tmp_path / "in_another", tmp_path / "in" / "outside")
    os.symlink(tmp_path / "in" / "a.jpg", tmp_path / "in" / "b.jpg")
    assert checks.resolve(folder, "a.jpg") == f"{folder}/a.jpg"
    assert checks.resolve(folder, "b.jpg") == f"{folder}/a.jpg"
    for name in ("out.jpg", "outside/a.jpg"):
        assert checks.resolve(folder, name, follow_links=True) == f"{folder}/{name}"  # as it is called
        with pytest.raises(UnusableError, match="link out of the image folder: follow_links allows them"):
            checks.resolve(folder, name)


def test_missing_paths_are_named_by_their_keys(tmp_path):
    (tmp_path / "file").write_text("")
    here, file, absent = str(tmp_path), str(tmp_path / "file"), str(tmp_path / "absent")
    assert checks.missing_paths({"a": (file, "file"), "b": (here, "folder")}) == []
    assert checks.missing_paths(
        {"a": (here, "file"), "b": (file, "folder"), "c": ("", "file"), "d": (absent, "file")}
    ) == [
        f"a: the file {here} does not exist",
        f"b: the folder {file} does not exist",
        "c is empty; it must name a file",
        f"d: the file {absent} does not exist",
    ]
    (message,) = checks.missing_paths({"config.eval.dictionary": (absent, "file")})
    assert message.startswith(f"config.eval.dictionary: the file {absent} does not exist; make it with")
    assert "python -m detclipv2_jax.prepare dictionary" in message
    assert f"--output={absent}" in message


def test_facts_of_photos_change_with_them(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        with open(path, "w") as file:
            file.write("x")
        os.utime(path, (1, 1))
    first = checks.photo_facts(paths, where="w")
    assert first == checks.photo_facts(paths, where="elsewhere")
    os.utime(paths[1], (1, 2))
    assert checks.photo_facts(paths, where="w") != first
    with open(paths[1], "w") as file:
        file.write("xx")
    os.utime(paths[1], (1, 1))
    assert checks.photo_facts(paths, where="w") != first  # of another size, at the same time
    os.utime(paths[1], (1, 1))
    with open(paths[1], "w") as file:
        file.write("x")
    os.utime(paths[1], (1, 1))
    assert checks.photo_facts(paths, where="w") == first
    os.rename(paths[1], tmp_path / "another name")
    assert checks.photo_facts([paths[0], str(tmp_path / "another name")], where="w") != first
    os.rename(tmp_path / "another name", paths[1])
    with pytest.raises(DataError, match=r"(?s)w: 2 of 4 photos do not exist:.*/c.*/d"):
        checks.photo_facts([*paths, str(tmp_path / "c"), str(tmp_path / "d")], where="w")


@pytest.mark.parametrize("num", [40, 200])  # asked for one by one, and listed
def test_photos_that_a_folder_lacks(tmp_path, num, caplog):
    names = [f"{'abc'[i % 3] * (i % 4)}{'/' * (i % 4 > 0)}é {i}.jpg" for i in range(num)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def missing():
        return checks.missing_photos(str(tmp_path), num, names.__getitem__)

    assert missing() == []
    (tmp_path / names[8]).unlink()
    (tmp_path / names[13]).unlink()
    (tmp_path / names[13]).symlink_to("nowhere")
    (tmp_path / names[18]).unlink()
    (tmp_path / names[18]).symlink_to(tmp_path / names[7])  # is there
    (tmp_path / names[20]).unlink()
    (tmp_path / names[20]).mkdir()
    names[21] = "no folder/\N{SNOWMAN}\n.jpg"
    expected = [f"{tmp_path}/{names[i]}" for i in (8, 13, 20, 21)]
    assert missing() == expected
    lines = "".join(f"\n  {path}" for path in expected[:3])
    message = f"p.tsv: 4 of {num} photos do not exist; max_bad_share allows {{}}:{lines}\n  '{tmp_path}/no folder/"
    with pytest.raises(DataError, match=re.escape(message.format("1.00%"))):
        checks.check_photos(str(tmp_path), num, names.__getitem__, where="p.tsv", max_bad_share=0.01)
    assert not caplog.records
    checks.check_photos(str(tmp_path), num, names.__getitem__, where="p.tsv", max_bad_share=0.1)
    assert message.format("10.00%") in caplog.text


def test_a_bucket_is_listed_by_the_beginnings_of_the_names(monkeypatch, caplog):
    """Its names are asked for in at most 32 parts, at once; nothing is asked of a photo that is listed."""
    names = [f"train/{i:06d}.jpg" for i in range(0, 400_000, 2_000)]
    folder = f"{checks.buckets.root()}/files/gs/bucket/photos"
    asked = []

    def listed(place, beginnings):
        assert str(place) == "gs://bucket/photos"
        asked.append(sorted(beginnings))
        return [name for name in names if name.startswith(tuple(beginnings)) and name != names[7]]

    monkeypatch.setattr(checks.bucket_store, "names_that_begin", listed)
    assert checks.missing_photos(folder, 200, names.__getitem__) == [f"{folder}/{names[7]}"]
    assert asked == [["train/0", "train/1", "train/2", "train/3"]]  # the next letter would make 40
    asked.clear()
    assert checks.missing_photos(folder, 160, names.__getitem__) == [f"{folder}/{names[7]}"]
    assert len(asked[0]) == 32

    def refused(place, beginnings):
        raise checks.bucket_store.BucketError("may not be listed")

    def fetch_all(paths, *, missing_ok=False):
        asked.append([*paths])
        assert missing_ok

    asked.clear()
    monkeypatch.setattr(checks.bucket_store, "names_that_begin", refused)
    monkeypatch.setattr(checks.buckets, "fetch_all", fetch_all)
    paths = [f"{folder}/{name}" for name in names[:64]]
    assert checks.missing_photos(folder, 200, names.__getitem__) == paths
    assert asked == [paths]
    assert "only the first 64 photos are looked for: may not be listed" in caplog.text

    def absent(path):
        raise FileNotFoundError

    monkeypatch.setattr(checks.buckets, "version_of", absent)
    with pytest.raises(DataError, match="64 of 64 photos do not exist"):
        checks.photo_facts(paths, where="p.json")
    assert asked[1] == paths  # fetched, as far as they are there, before they are looked at


def test_a_list_of_very_many_missing_photos_is_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DataError, match=r"1002 of 1002 photos do not exist \(`images` must name the folder") as error:
        checks.check_photos(f"{tmp_path}/no", 1002, "{}.jpg".format, where="p.tsv", max_bad_share=1 / 2)
    *lines, last = str(error.value).splitlines()
    assert lines[1:] == [f"  {tmp_path}/no/{i}.jpg" for i in range(1000)]
    (listed,) = tmp_path.iterdir()
    assert last == f"  and 2 more; all of them are in {listed}"
    assert listed.read_text().splitlines() == [f"{tmp_path}/no/{i}.jpg" for i in range(1002)]
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/absent")
    with pytest.raises(DataError, match=r"and 2 more; no list of them could be written: .*absent"):
        checks.photo_facts((f"{tmp_path}/{i}" for i in range(1002)), where="p.json")


def test_photos_of_other_sets_by_the_number_of_coco(tmp_path):
    images = [{"file_name": "x/COCO_val2014_000000000042.jpg"}, {"coco_url": "http://x/val2017/000000000007.JPG"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images}))
    (tmp_path / "b.json").write_text(json.dumps({"images": [{"file_name": "own/42.jpg"}]}))
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert leakage.held_out_photos(paths) == {"000000000042", "000000000007", "42.jpg"}
    for name in ("COCO_train2014_", "COCO_val2017_", "COCO_test2015_", "a/b/", ""):
        assert leakage.photo_of(f"{name}000000000042.jpeg") == "000000000042"
    for name in ("COCO_val2014_000000000042.jpg.png", "x000000000042.jpg", "100000000042.jpg", "0000042.jpg"):
        assert leakage.photo_of(name) == name
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match=r"--validation: .*b\.json is no COCO-format json"):
        leakage.held_out_photos(paths)


def test_ids_of_annotations_are_those_that_are_listed():
    content = {
        "images": [{"id": 1}, {"id": "x"}],
        "categories": [{"id": "3"}],
        "annotations": [
            {"image_id": "1", "category_id": 3},
            {"image_id": "x", "category_id": "3"},
            {"image_id": 1.5, "category_id": 9},
            5,
        ],
    }
    found, repaired = selection.with_fitting_ids(content)
    assert found["annotations"] == [
        {"image_id": 1, "category_id": "3"},
        {"image_id": "x", "category_id": "3"},
        {"image_id": None, "category_id": 9},
        {},
    ]
    assert repaired == {
        "annotation that is no object": 1,
        "image_id of another type than the id it names": 1,
        "category_id of another type than the id it names": 1,
    }


def test_an_id_that_may_have_been_rounded_names_nothing():
    content = {"images": [{"id": 1}], "annotations": [{"image_id": 1}, {"image_id": 1.5}, {"image_id": 7}]}
    found, repaired = selection.with_fitting_ids(content)
    assert [row["image_id"] for row in found["annotations"]] == [1, None, 7]
    assert repaired == {}


def test_paths_of_photos(tmp_path):
    folder = os.path.realpath(tmp_path)
    assert (
        selection.photo_path({"coco_url": "http://x/y/val2017/7.jpg"}, folder, where="f") == f"{folder}/val2017/7.jpg"
    )
    assert selection.photo_path({"file_name": "a/7.jpg", "coco_url": "x"}, folder, where="f") == f"{folder}/a/7.jpg"
    for name in ("../7.jpg", "/7.jpg"):
        with pytest.raises(ValueError, match=f"f: the file name '{name}' leads out of the folder"):
            selection.photo_path({"file_name": name}, folder, where="f")


def test_images_that_are_read():
    images = [
        {"id": 1, "file_name": "a.png"}, {"id": 1.0, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"},
        {"file_name": "c.png"}, {"id": 3, "file_name": "../c.png"}, {"id": 4, "file_name": "b.png"},
        {"id": "4", "file_name": "c.png"},
    ]  # fmt: skip
    options = {"folder": "", "path": "p", "max_bad_share": 1.0}
    kept, counts = selection.select_images({"images": images}, max_examples=0, **options)
    assert [image["id"] for image in kept] == [1, 2]
    assert counts == {
        "image listed twice": 1, "without id": 1, "with a file name outside the folder": 1,
        "sharing their id with another image": 2,
    }  # fmt: skip
    kept, counts = selection.select_images({"images": images}, max_examples=2, **options)
    assert ([image["id"] for image in kept], counts) == ([1], {"image listed twice": 1})
    with pytest.raises(DataError, match="p: 4 of 7 images cannot be used"):
        selection.select_images({"images": images}, max_examples=0, **options | {"max_bad_share": 0.5})


def test_dropped_names_are_known_ones():
    assert selection.dropped_names(["stop_sign", "cat"], ["stop sign", "cat", "dog"], "f") == {"stop sign", "cat"}
    with pytest.raises(DataError, match="f has no category 'cta', which drop_categories names; did you mean cat"):
        selection.dropped_names(["cta"], ["cat"], "f")
    with pytest.raises(DataError, match=r"did you mean stop sign, stop signs, shop sign\?"):
        selection.dropped_names(["stop sigm"], ["stop sign", "stop signs", "shop sign", "dog"], "f")


def test_categories_without_a_box_are_said(caplog):
    parent = [
        {"id": 0, "name": "animals"},
        *({"id": i, "name": n, "supercategory": "animals"} for i, n in ((1, "cat"), (2, "dog"))),
    ]
    with caplog.at_level(logging.WARNING, logger="absl"):
        selection.say_unused(parent, {0, 1, 2}, "f", option="drop")
        assert not caplog.records
        selection.say_unused(parent, {1, 2}, "f", option="drop")
    assert (
        "f: 1 of 3 categories have no box anywhere: 'animals'; 'animals' is the supercategory of all others"
        in caplog.text
    )


def test_ten_categories_without_a_box_are_named(caplog):
    for num, more in ((1, False), (10, False), (11, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="absl"):
            selection.say_unused([{"id": i, "name": str(i)} for i in range(num)], set(), "f", option="drop")
        assert (" …." in caplog.text) == more
        assert "supercategory" not in caplog.text  # of others, which there are none of
        assert f"'{min(num, 10) - 1}'" in caplog.text


def test_workers_do_not_get_ctrl_c_while_they_start():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with workers.starting():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_worker_waits_for_its_parent_and_does_not_get_ctrl_c(monkeypatch):
    done, started = [], []
    thread = types.SimpleNamespace(start=lambda: done.append("watches"))
    monkeypatch.setattr(workers.threading, "Thread", lambda **options: started.append(options) or thread)
    monkeypatch.setattr(workers.os, "_exit", lambda status: done.append(status))
    parent = types.SimpleNamespace(join=lambda: done.append("waited"))
    monkeypatch.setattr(workers.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(workers, "_name_memory", lambda: done.append("names"))
    before = signal.getsignal(signal.SIGINT)
    try:
        workers.end_with_parent()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    started[0]["target"]()
    assert done == ["names", "watches", "waited", 1]
    assert started[0]["daemon"]


def test_memory_of_runs_that_are_gone_is_removed_and_that_of_others_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_MEMORY", tmp_path)
    names = [f"psm_detclip{run}{end}" for run in "ab" for end in (".lock", "_1", "_2")]
    for name in [*names, "psm_other_1", "psm_detclipc_1"]:
        (tmp_path / name).write_bytes(b"")
    with open(tmp_path / "psm_detclipb.lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        workers._remove_left()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[3:], "psm_other_1", "psm_detclipc_1"}


def test_memory_of_a_run_is_called_by_a_file_that_it_holds(tmp_path, monkeypatch):
    known, ending, made = [], [], types.SimpleNamespace(_make_filename=lambda: "/psm_plain")
    tracker = types.SimpleNamespace(
        register=lambda *entry: known.append(entry), unregister=lambda *entry: known.remove(entry)
    )
    monkeypatch.setattr(workers, "_MEMORY", tmp_path)
    monkeypatch.setattr(workers, "_locks", [])
    monkeypatch.setattr(workers, "resource_tracker", tracker)
    monkeypatch.setattr(workers, "shared_memory", made)
    monkeypatch.setattr(workers.atexit, "register", ending.append)
    monkeypatch.delenv("DETCLIP_SHARED_MEMORY", raising=False)
    workers._name_memory()
    assert made._make_filename() == "/psm_plain"
    monkeypatch.setenv("DETCLIP_SHARED_MEMORY", "")  # for `monkeypatch` to restore it
    known.clear()
    workers._own_memory()
    (lock,) = tmp_path.iterdir()
    assert known == [(f"/{lock.name}", "shared_memory")]
    workers._remove_left()  # as another run does
    assert lock.exists()
    with open(lock, "rb") as other:  # workers may hold it, too
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    first, second = made._make_filename(), made._make_filename()
    assert first != second
    assert first.startswith(f"/{lock.stem}_")
    assert known[1:] == [(first, "shared_memory"), (second, "shared_memory")]
    (leave,) = ending
    with monkeypatch.context() as patch:  # of a worker, which is no owner
        patch.setattr(workers.os, "getpid", lambda: 0)
        leave()
    assert lock.exists()
    leave()
    assert not lock.exists()
    assert (f"/{lock.name}", "shared_memory") not in known
    os.close(workers._locks[0])


def test_memory_of_a_run_is_named_once(monkeypatch):
    owned = []
    monkeypatch.setattr(workers, "_locks", [])
    monkeypatch.setattr(workers, "_own_memory", lambda: owned.append(workers._locks.append(3)))
    for _ in range(2):
        with workers.starting():
            pass
    assert len(owned) == 1


def test_another_process_does_what_is_asked_of_it_once(tmp_path):
    path = str(tmp_path / "a" / "b")
    with workers.beside(os.makedirs, path, exist_ok=False):
        pass
    assert os.path.isdir(path)
    with pytest.raises(FileExistsError), workers.beside(os.makedirs, path, exist_ok=False):
        pass


def test_a_worker_ends_when_its_parent_does():
    code = "import time\nfrom detclipv2_jax.data import workers\nworkers.end_with_parent()\ntime.sleep(60)"
    # without a parent there is nobody to wait for: it ends at once
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 1
