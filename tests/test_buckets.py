"""Files in buckets of real servers on this machine; without the packages moto and gcp-storage-emulator: skipped."""

import functools
import os
import pathlib
import threading
import time
import urllib.parse

import bucket_servers
import jax
import numpy as np
import pytest
from bucket_servers import url
from micro import micro_config
from ml_collections import ConfigDict

from detclipv2_jax import bucket_store, buckets, commands, files
from detclipv2_jax.bucket_store import BucketError, place
from detclipv2_jax.data import checks, identity, scenes, sources, streams
from detclipv2_jax.prepare import __main__ as prepare

needs_servers = pytest.mark.skipif(not bucket_servers.ARE_THERE, reason="needs moto and gcp-storage-emulator")


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request):
    with bucket_servers.served(request.param) as started:
        yield started


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """Returns the scheme of a server that works, with an empty cache and little patience."""
    with bucket_servers.asked(server, tmp_path / "cache", monkeypatch):
        yield server.scheme


def next_run(monkeypatch):
    time.sleep(0.02)
    monkeypatch.setenv("DETCLIP_BUCKETS_SINCE", repr(time.time()))
    time.sleep(0.02)  # the time of a file is that of the kernel's last tick


def test_names():
    assert place("gs://bucket/a/b.json") == ("gs", "bucket", "a/b.json")
    assert str(place("s3://bucket/run/")) == "s3://bucket/run"
    assert place("runs/a") is place("hf://x") is place(3) is place("") is None
    assert place("gs://a_1").below("x") == ("gs", "a_1", "x")
    for wrong in ("gs://ab/x", "gs://-ab/x", "gs://ab-/x", "s3://Abc/x", "gs://bucket/a\0b", "gs://bucket/./a"):
        with pytest.raises(ValueError, match="names no bucket and path"):
            place(wrong)
    for wrong in ("gs://", "gs:///a", "s3://bucket/../a", "gs://bucket/a/../../b", "gs://../a", "gs://bucket/a//b"):
        with pytest.raises(ValueError, match="names no bucket and path"):
            place(wrong)


def test_paths_of_the_cache_are_names_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE", str(tmp_path))
    where = place("gs://bucket/a/b")
    assert buckets.place_of(buckets.path_of(where)) == where
    assert buckets.name_of(buckets.path_of(where)) == "gs://bucket/a/b"
    assert buckets.name_of(buckets.path_of(where, part="workdirs/0")) == "gs://bucket/a/b"
    assert buckets.name_of("a/b") == "a/b"
    assert buckets.place_of(tmp_path / "other") is None
    assert buckets.is_workdir(buckets.path_of(where, part="workdirs/0"))
    assert not buckets.is_workdir(buckets.path_of(where))
    monkeypatch.delenv("DETCLIP_BUCKET_CACHE_GB", raising=False)
    assert buckets.limit_bytes() == 100 * 10**9
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE_GB", "0.5")
    assert buckets.limit_bytes() == 5 * 10**8


def test_photos_alone_are_asked_for_ahead_and_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE", str(tmp_path))
    monkeypatch.setenv("DETCLIP_BUCKETS_SINCE", "100.5")
    monkeypatch.setattr(buckets, "_begun", {})
    monkeypatch.setattr(bucket_store, "begin", lambda where, known: asked.append((where.key, known)))
    names = ["a.jpg", "b.PNG", "c.json", "new.webp", "old.bmp", "another.bmp"]
    paths = [str(buckets.path_of(place(f"gs://bucket/{name}"))) for name in names]
    for path, when in zip(paths[3:], (100.5, 100, 100), strict=True):
        files.write_text(path, [])
        os.utime(path, (when, when))
    for path, number in ((paths[4], os.stat(paths[4]).st_ino), (paths[5], 0)):  # the other one was replaced
        files.write_text(buckets.path_of(buckets.place_of(path), part="versions"), [f"{number} v7"])
    buckets.begin([*paths, str(tmp_path / "elsewhere.jpg")])
    assert asked == [("a.jpg", b""), ("b.PNG", b""), ("old.bmp", b"v7"), ("another.bmp", b"")]
    buckets.begin(paths)
    assert len(asked) == 4


def test_a_cache_makes_room_where_it_must(tmp_path, monkeypatch):
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE_GB", "0.0001")  # 100 kB; 95 stay, and it looks at every 1,562 bytes
    folder, week = tmp_path / "files" / "gs" / "bucket", 7 * 24 * 3600

    def hold(**sizes):
        for age, (name, size) in enumerate(sizes.items()):
            files.write_text(folder / name.replace("_", "."), ["x" * 1000 * size])
            at = time.time() - 60 * (1 + len(sizes) - age) - week * name.startswith("old")
            os.utime(folder / name.replace("_", "."), (at, at))

    def held():
        return sorted(path.name for path in folder.iterdir())

    meter = buckets._Meter(str(tmp_path))
    hold(old_json=30, a_JPG=20, b_json=20, c_png=20, d_tif=9)
    meter.add(1)  # the first look
    assert held() == ["a.JPG", "b.json", "c.png", "d.tif"]  # of what was not used for a week
    hold(e_jpg=30)
    meter.add(1562)
    assert len(held()) == 5
    meter.add(1)
    assert held() == ["b.json", "c.png", "d.tif", "e.jpg"]  # the oldest photo, no file in use
    hold(f_json=16)
    meter.add(1000), meter.add(563)
    assert held() == ["b.json", "d.tif", "e.jpg", "f.json"]
    hold(g_json=62)
    meter.add(2000)
    assert held() == ["b.json", "f.json", "g.json"]  # all that it may hold
    with pytest.raises(BucketError, match=r"more than the 0\.0001 that the cache"):
        meter.add(2001)


def test_what_a_configuration_names_in_buckets_is_fetched(monkeypatch):
    monkeypatch.setattr(buckets, "here", lambda text: f"here/{text}")
    monkeypatch.setattr(buckets, "folder_here", lambda text: f"folder/{text}")
    config = ConfigDict({"closing": "c", "init_from": {"checkpoint": "a", "other": "b"}, "seed": 3})
    config.detection = {"images": "i", "data": ("x", "y"), "canvases": ((1, 2), (3, 4)), "closing": "z", "names": ["n"]}
    found = buckets.localized(config).to_dict()
    assert found == {
        "closing": "c", "init_from": {"checkpoint": "a", "other": "here/b"}, "seed": 3,
        "detection": {
            "images": "folder/i", "data": ("here/x", "here/y"), "canvases": ((1, 2), (3, 4)), "closing": "here/z",
            "names": ["here/n"],
        },
    }  # fmt: skip
    assert config.detection.images == "i"


def test_arguments_of_a_command_and_where_several_machines_write(tmp_path, monkeypatch, capsys):
    tmp_path = tmp_path / "new" / "cache"
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE", str(tmp_path))
    monkeypatch.setattr(buckets, "here", lambda text: text.replace("gs://", "/here/"))
    done = []
    parts = [place("gs://bucket/out/building/a")]
    monkeypatch.setattr(buckets, "download", lambda where, folder: done.append(("download", str(where))) or parts)
    monkeypatch.setattr(buckets, "upload", lambda path, where: done.append(("upload", path.name, str(where))) or 7)
    monkeypatch.setattr(buckets, "write", lambda where, content: done.append(("delete", str(where), content)))
    options = {"words": ["gs://bucket/w"], "workdir": "gs://bucket/r", "checkpoint": "gs://bucket/c", "num": 3}
    options |= {"input": "gs://bucket/i", "many": ("gs://bucket/m", "x"), "plain": "p", "output": "gs://bucket/out"}
    for index, count, steps in ((0, 1, 1), (-1, 3, 3), (0, 3, 1), (2, 3, 1)):
        done.clear()
        with buckets.arguments_here({**options, "index": index, "count": count}) as found:
            made = found.pop("output")
            assert made.startswith(f"{tmp_path}/output-")
            assert os.path.isdir(os.path.dirname(made))
        given = {key: value for key, value in options.items() if key != "output"} | {"index": index, "count": count}
        assert found == given | {"input": "/here/bucket/i", "many": ("/here/bucket/m", "x")}
        assert not os.path.exists(os.path.dirname(made))
        all_done = [
            ("download", "gs://bucket/out/building"), ("upload", "out", "gs://bucket/out"),
            ("delete", str(parts[0]), None),
        ]  # fmt: skip
        assert done == (all_done if steps == 3 else all_done[1:2])
    assert "uploaded to gs://bucket/out: 7 files" in capsys.readouterr().out
    for wrong in (
        {"finetuned": "gs://bucket/f"},
        {"finetuned": ["gs://bucket/f"]},
        {"log": pathlib.Path("gs:/bucket/f")},
    ):
        with pytest.raises(ValueError, match="must be on this machine"), buckets.arguments_here(wrong):
            pass
    with buckets.arguments_here({"finetuned": "here", "log": pathlib.Path("a")}) as found:
        assert found == {"finetuned": "here", "log": pathlib.Path("a")}


def test_what_names_the_rest_is_uploaded_last_and_gone_meanwhile(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(buckets, "write", lambda where, content: order.append((where.key, content)))
    for i, name in enumerate(("z/a", "b", "report", "c")):
        files.write_text(tmp_path / "out" / name, [name])
        os.utime(tmp_path / "out" / name, (i if name != "report" else 9,) * 2)
    where = place("gs://bucket/run")
    assert buckets.upload(tmp_path / "out", where) == 4
    assert (order[0], order[-1]) == (("run/report", None), ("run/report", b"report"))
    assert sorted(order[1:-1]) == [("run/b", b"b"), ("run/c", b"c"), ("run/z/a", b"z/a")]
    assert buckets.upload(tmp_path / "out" / "b", where) == 1
    assert order[-1] == ("run", b"b")
    (tmp_path / "none").mkdir()
    assert buckets.upload(tmp_path / "none", where) == 0


@needs_servers
def test_writes_on_condition(bucket):
    where = place(url(bucket, "conditions/é 1#?.txt"))
    first = bucket_store.write(where, b"1", known=b"")
    assert first
    assert bucket_store.write(where, b"2", known=b"") is None  # it is there
    second = bucket_store.write(where, b"3", known=first)
    assert second not in (first, None)
    assert bucket_store.write(where, b"4", known=first) is None  # another wrote
    assert bucket_store.read(where) == (b"3", second)
    assert bucket_store.read(where, known=second)[0] is None
    assert bucket_store.write(where, b"3", known=first) == second  # its answer was lost
    assert bucket_store.write(where, None, known=first) is None
    assert bucket_store.names_below(place(url(bucket, "conditions"))) == ["é 1#?.txt"]
    assert bucket_store.write(where, None, known=second) is not None
    with pytest.raises(FileNotFoundError, match="no such object"):
        bucket_store.read(where)


@needs_servers
def test_a_file_is_fetched_once_and_asked_for_once_a_run(server, bucket, monkeypatch):
    where = place(url(bucket, "once/a.json"))
    bucket_store.write(where, b"[1]")
    path = buckets.here(str(where))
    assert files.read_json(path) == [1]
    server.requests.clear()
    bucket_store.write(where, b"[2]")
    asked = len(server.requests)
    assert files.read_json(buckets.here(str(where))) == [1]
    assert len(server.requests) == asked
    next_run(monkeypatch)
    assert files.read_json(path) == [2]
    next_run(monkeypatch)
    stored = os.stat(path).st_ino
    assert files.read_json(path) == [2]
    assert os.stat(path).st_ino == stored  # it was only asked whether it changed
    asked = len(server.requests)
    assert files.read_json(path) == [2]
    assert len(server.requests) == asked  # once a run
    bucket_store.write(where, None)
    next_run(monkeypatch)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(path)
    assert not os.path.exists(path)
    assert not buckets.path_of(where, part="versions").exists()
    with pytest.raises(ValueError, match="no such object, and none below it"):
        buckets.here(str(where))


@needs_servers
def test_folders_and_patterns(bucket, monkeypatch):
    for name in ("a.tar", "b.tar", "sub/c.tar", "d.txt"):
        bucket_store.write(place(url(bucket, f"tree/{name}")), name.encode())
    bucket_store.write(place(url(bucket, "tree-2/x")), b"x")
    path = buckets.here(url(bucket, "tree/"))
    found = sorted(os.path.relpath(os.path.join(at, name), path) for at, _, names in os.walk(path) for name in names)
    assert found == ["a.tar", "b.tar", "d.txt", "sub/c.tar"]
    bucket_store.write(place(url(bucket, "tree/sub/c.tar")), None)
    next_run(monkeypatch)
    assert not os.path.exists(buckets.here(url(bucket, "tree")) + "/sub")
    bucket_store.write(place(url(bucket, "tree/sub/deep/e.tar")), b"e")
    fetched = []
    monkeypatch.setattr(
        buckets, "fetch_all", lambda paths: fetched.extend(os.path.relpath(name, path) for name in paths)
    )
    for pattern, names in (
        ("*.tar", ["a.tar", "b.tar", "sub/deep/e.tar"]),
        ("**/[ae].tar", ["a.tar", "sub/deep/e.tar"]),
    ):
        fetched.clear()
        assert buckets.here(url(bucket, f"tree/{pattern}")) == os.path.join(path, pattern)
        assert fetched == names


@needs_servers
@pytest.mark.parametrize("fault", ["503", "cut", "slow"])
def test_what_passes_is_tried_again(server, bucket, fault):
    where = place(url(bucket, f"passing/{fault}"))
    data = np.random.default_rng(0).bytes(1 << 20)
    left = iter([fault, fault])
    server.fault = lambda method, path: next(left, "")
    version = bucket_store.write(where, data, known=b"")
    assert version
    left = iter([fault, fault])
    assert buckets.content(buckets.path_of(where)) == data


@needs_servers
@pytest.mark.parametrize(
    ("fault", "reason"), [("503", "503|UNAVAILABLE|retry"), ("403", "PERMISSION_DENIED.*credentials"), ("cut", "retry")]
)
def test_what_stays_is_an_error_that_says_what(server, bucket, fault, reason):
    where = place(url(bucket, "staying/a.jpg"))
    bucket_store.write(where, b"a" * 4096)
    server.fault = lambda method, path: fault
    with pytest.raises(BucketError, match=f"{where} cannot be read: .*({reason})"):
        files.read_bytes(buckets.path_of(where))
    assert not buckets.path_of(where).exists()
    with pytest.raises(BucketError, match="cannot be written"):
        bucket_store.write(where, b"b") if fault != "cut" else bucket_store.write(
            where._replace(bucket="gone-bucket"), b""
        )


@needs_servers
def test_a_bucket_that_is_gone(bucket):
    where = place(f"{bucket}://gone-bucket/a.jpg")
    # TensorStore does not tell a bucket of Google's that is gone from one that is empty, unless it writes
    with pytest.raises(BucketError if bucket == "s3" else FileNotFoundError):
        files.read_bytes(buckets.path_of(where))
    with pytest.raises(BucketError, match=r"NOT_FOUND.*is there such a bucket"):
        bucket_store.write(where, b"1")


@needs_servers
def test_photos_make_room_and_files_in_use_do_not(bucket, monkeypatch):
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE_GB", "0.0001")  # 100 kB
    for i in range(12):
        bucket_store.write(place(url(bucket, f"room/{i}.jpg")), bytes([i]) * 20_000)
    bucket_store.write(place(url(bucket, "room/names.json")), b"[]")
    names = buckets.here(url(bucket, "room/names.json"))
    folder = buckets.folder_here(url(bucket, "room"))
    for _ in range(2):
        for i in range(12):
            assert files.read_bytes(f"{folder}/{i}.jpg") == bytes([i]) * 20_000
            kept = [path for path in os.scandir(folder) if path.name.endswith(".jpg")]
            assert sum(path.stat().st_size for path in kept) <= 100_000
            latest = {f"{k}.jpg" for k in range(max(i - 2, 0), i + 1)}
            assert latest <= {path.name for path in kept}  # what was fetched first goes
        assert len(kept) >= 4  # no more goes than must
    assert os.path.exists(names)
    bucket_store.write(place(url(bucket, "room/large.array_record")), b"x" * 200_000)
    with pytest.raises(BucketError, match=r"more than the 0\.0001 that the cache"):
        buckets.here(url(bucket, "room/large.array_record"))


def test_a_strangers_keys_stay_in_the_cache(monkeypatch):
    keys = [b"a/../../x", b"a//y", b"a/ok", b"a/", b"a//etc/x", b"a/./z", b"a/b/c"]
    monkeypatch.setattr(bucket_store, "_ask", lambda *_: keys)
    assert bucket_store.names_below(place("gs://bucket/a")) == ["b/c", "ok"]
    keys[:] = [b"z", b"b/c", b"/d", b"b/\0"]
    assert bucket_store.names_below(place("gs://bucket")) == ["b/c", "z"]


@needs_servers
def test_photos_of_an_evaluation_are_told_apart_by_their_versions(bucket, monkeypatch):
    where = place(url(bucket, "facts/a.jpg"))
    bucket_store.write(where, b"1")
    path = str(buckets.path_of(where))
    first = checks.photo_facts([path], where="x")
    os.unlink(path)
    assert checks.photo_facts([path], where="x") == first  # fetched again
    bucket_store.write(where, b"2")
    next_run(monkeypatch)
    assert checks.photo_facts([path], where="x") != first
    with pytest.raises(ValueError, match="1 of 1 photos do not exist"):
        checks.photo_facts([path + "x"], where="x")


@needs_servers
def test_photos_that_a_bucket_lacks_are_all_named(server, bucket):
    names = [f"{'ab'[i % 2]}/é {i}.jpg" for i in range(70)]
    for name in names:
        bucket_store.write(place(url(bucket, f"many/{name}")), b"1")
    folder = buckets.folder_here(url(bucket, "many"))
    options = {"where": "p.tsv", "max_bad_share": 0.01}
    server.requests.clear()
    checks.check_photos(folder, 70, names.__getitem__, **options)
    assert not [*pathlib.Path(folder).rglob("*.jpg")]  # none is read
    assert len(server.requests) <= 33
    assert bucket_store.names_that_begin(place(url(bucket, "many")), ["b/é 3", "a/é 66", "c"]) == [
        "b/é 3.jpg", *(f"b/é {i}.jpg" for i in range(31, 40, 2)), "a/é 66.jpg",
    ]  # fmt: skip
    names[0], names[9], names[69] = "0/0.jpg", "b/9.png", "c/69.jpg"
    server.fault = lambda method, path: "" if listed or "/é" in urllib.parse.unquote(path) else "403"  # of a listing
    listed = True
    for num, absent in ((60, [0, 9]), (70, [0, 9, 69])):
        with pytest.raises(ValueError, match=f"p.tsv: {len(absent)} of {num} photos do not exist") as error:
            checks.check_photos(folder, num, names.__getitem__, **options)
        assert str(error.value).splitlines()[1:] == [f"  {url(bucket, f'many/{names[i]}')}" for i in absent]
    listed, names[0], names[9] = False, names[2], names[11]  # photos may be read only
    checks.check_photos(folder, 70, names.__getitem__, **options)


@needs_servers
def test_data_of_a_bucket_are_those_of_a_folder(bucket, tmp_path):
    folder = tmp_path / "scenes"
    scenes.write(folder, num_detection=16, num_grounding=0, num_image_text=16, num_eval=8, size_px=64)
    assert buckets.upload(folder, place(url(bucket, "scenes"))) == sum(path.is_file() for path in folder.rglob("*"))

    def sources_in(where):
        config = micro_config()
        config.scenes.num_detection = config.scenes.num_grounding = config.scenes.num_image_text = 0
        for section, key, file in (
            ("detection", "annotations", "detection.json"), ("image_text", "pairs", "pairs.tsv"),
            ("eval", "annotations", "eval.json"),
        ):  # fmt: skip
            config[section][key], config[section].images = f"{where}/{file}", str(where)
        config.init_from.checkpoint = f"{where}/run"
        found = buckets.localized(config)
        assert found.init_from.checkpoint == config.init_from.checkpoint  # runs.checkpoints fetches it
        return identity.of_run(found), streams.train_streams(found), sources.open_evaluation(found.eval, prefix="eval")

    data, ours, (ours_eval, _) = sources_in(folder)
    same_data, theirs, (theirs_eval, _) = sources_in(url(bucket, "scenes"))
    assert [*data.values()] == [*same_data.values()]
    assert f"config.eval.annotations {url(bucket, 'scenes/eval.json')}" in same_data
    for one, other in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.batch(1), other.batch(1))
    assert len(ours_eval) == len(theirs_eval) == 8
    kept = buckets.path_of(place(url(bucket, "scenes/detection.json")))
    assert buckets.version_of(kept)
    buckets.remove_others(kept.parent, {kept})
    assert list(kept.parent.iterdir()) == [kept]
    buckets.fetch_all([kept.with_name("absent")], missing_ok=True)
    with pytest.raises(FileNotFoundError):
        buckets.fetch(kept.with_name("absent"))


@needs_servers
def test_photos_of_a_batch_are_fetched_at_once_and_those_of_the_next_meanwhile(server, bucket, tmp_path):
    folder, where = tmp_path / "scenes", url(bucket, "ahead")
    scenes.write(folder, num_detection=12, num_grounding=0, num_image_text=0, num_eval=0, size_px=64)
    buckets.upload(folder, place(where))
    config = micro_config()
    config.scenes.num_detection = config.scenes.num_grounding = config.scenes.num_image_text = 0
    config.detection.batch_size = 4

    def maker_in(where):
        config.detection.annotations, config.detection.images = f"{where}/detection.json", str(where)
        return streams.train_streams(buckets.localized(config))[0]._maker

    ours, theirs = maker_in(folder), maker_in(where)
    for path in buckets.path_of(place(where)).rglob("*.jpg"):  # of the first 64 one was looked at
        path.unlink()
    asked, late, all_asked = [], [], threading.Event()

    def fault(method, path):
        if "jpg" in path:
            asked.append(path.partition("?")[0])
            if len(asked) >= 8:
                all_asked.set()
            if not late and not all_asked.wait(timeout=10):  # none is answered before all are asked
                late.append(path)
        return ""

    server.fault = fault
    for n in (0, 1):
        made, notes = theirs.make(n, step=1 - n)
        jax.tree.map(np.testing.assert_array_equal, made, ours.make(n)[0])
        assert not notes.skipped
    assert not late
    assert len(asked) == len(set(asked)) == 8, asked  # those of batch 1 were asked for once, with those of batch 0
    assert not buckets._begun
    server.fault = lambda method, path: "403" * ("jpg" in path)
    with pytest.raises(BucketError, match="PERMISSION_DENIED"):
        theirs.make(2)
    buckets._begun.clear()
    server.fault = lambda method, path: ""
    for path in folder.rglob("*.jpg"):
        if not buckets.path_of(place(f"{where}/{path.relative_to(folder)}")).exists():
            bucket_store.write(place(f"{where}/{path.relative_to(folder)}"), None)
    _, notes = theirs.make(2)
    assert {skipped.reason for skipped in notes.skipped.values()} == {"missing file"}


@needs_servers
def test_a_build_of_several_machines_and_its_sets_in_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "scenes"
    scenes.write(folder, num_detection=12, num_grounding=0, num_image_text=12, num_eval=0, size_px=64)
    for kind, file in (("coco_json", "detection.json"), ("image_text", "pairs.tsv")):
        options = [f"--input={folder / file}", f"--images={folder}", "--shard_size=4", "--workers=1"]
        options += ["--pipeline="] if kind == "image_text" else []
        run = functools.partial(commands.run, {kind: functools.partial(prepare.run, kind)})
        assert run(arguments=[kind, *options, f"--output={tmp_path / kind}"]) == 0
        target = url(bucket, f"{pathlib.Path(folder).name}/{kind}")
        shared = [kind, *options, f"--output={target}", "--count=2"]
        assert run(arguments=[*shared, "--index=1"]) == 0
        assert run(arguments=shared) == 1
        assert "have not written their part: --index=0" in capsys.readouterr().err
        assert run(arguments=[*shared, "--index=0"]) == run(arguments=shared) == 0
        names = bucket_store.names_below(place(target))
        assert names == sorted(path.name for path in (tmp_path / kind).iterdir())
        for name in set(names) - {"build_report.json"}:
            assert bucket_store.read(place(target).below(name))[0] == (tmp_path / kind / name).read_bytes(), name
    next_run(monkeypatch)

    def batches(where):
        config = micro_config()
        config.scenes.num_detection = config.scenes.num_grounding = config.scenes.num_image_text = 0
        config.detection.data, config.image_text.data = (f"{where}/coco_json",), (f"{where}/image_text",)
        found = buckets.localized(config)
        return identity.of_run(found), [stream.batch(n) for stream in streams.train_streams(found) for n in range(2)]

    (data, ours), (same_data, theirs) = batches(tmp_path), batches(url(bucket, "scenes"))
    assert [*data.values()] == [*same_data.values()]
    for one, other in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_options_that_must_be_here(tmp_path, monkeypatch):
    monkeypatch.delenv("DETCLIP_BUCKET_CACHE_GB", raising=False)
    assert buckets.limit_bytes() == 100e9
    for options in ({"results": pathlib.Path("gs://b/c")}, {"finetuned": "s3://bucket/x"}):
        with pytest.raises(ValueError, match="must be on this machine"), buckets.arguments_here(options):
            pass
    left = {"workdir": "gs://bucket/x", "words": "gs://", "checkpoint": "s3://bucket/y", "num": 3, "config": None}
    with buckets.arguments_here(left) as found:
        assert found == left


@needs_servers
def test_a_command_reads_and_writes_buckets(bucket, capsys, server):
    bucket_store.write(place(url(bucket, "in/words.txt")), b"cat\ndog")
    bucket_store.write(place(url(bucket, "out/done.json")), b"old")
    order = []

    def fault(method, path):
        if method != "GET":
            order.append((method, path))
        return ""

    def command(*, words_file: str, output: str, many: tuple[str, ...] = (), fail: bool = False):
        """Writes what it read."""
        if fail:
            raise ValueError("it failed")
        files.write_text(f"{output}/sub/words.txt", files.read_lines(words_file))
        files.write_json(f"{output}/done.json", [files.read_lines(path) for path in many])

    arguments = [f"--words_file={url(bucket, 'in/words.txt')}", f"--output={url(bucket, 'out')}"]
    assert commands.run(command, arguments=[*arguments, "--fail"]) == 1
    assert bucket_store.read(place(url(bucket, "out/done.json")))[0] == b"old"
    server.fault = fault
    assert commands.run(command, arguments=[*arguments, f"--many={url(bucket, 'in')}/words.txt"]) == 0
    assert bucket_store.read(place(url(bucket, "out/sub/words.txt")))[0] == b"catdog"
    assert bucket_store.read(place(url(bucket, "out/done.json")))[0] == b'[["cat", "dog"]]\n'
    assert ["done" in path for _, path in order] == [True, False, True]  # what names the rest is last
    assert "uploaded to" in capsys.readouterr().out
    server.fault = lambda method, path: "403"
    assert commands.run(command, arguments=arguments) == 1
    assert "cannot be written: PERMISSION_DENIED" in capsys.readouterr().err
    assert not [name for name in os.listdir(buckets.root()) if name.startswith("output-")]
