"""Text of any encoding, file names from data, what is no file, and locks."""

import concurrent.futures
import io
import json
import os
import re
import socket
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pytest

from detclipv2_jax import atomic, files

TEXT = "name\tdéf\nа\tb\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_are_the_same_with_any_end_and_mark(tmp_path, end, mark):
    path = tmp_path / "text"
    data = mark + TEXT.replace("\n", end).encode()
    path.write_bytes(data)
    assert files.read_lines(path) == TEXT.split("\n")
    lines = list(files.byte_lines(io.BytesIO(data), where=path))
    assert [line.decode() for _, line in lines] == TEXT.splitlines()
    assert all(data[at : at + len(line)] == line for at, line in lines)


def test_only_line_ends_end_lines(tmp_path):
    (tmp_path / "text").write_text("a\x0bb\x0cc\u2028d\x85e\nf", encoding="utf-8")
    assert files.read_lines(tmp_path / "text") == ["a\x0bb\x0cc\u2028d\x85e", "f"]


def test_marks_of_files_that_were_joined_go(tmp_path):
    data = b"\xef\xbb\xbfa\n\xef\xbb\xbfb\xef\xbb\xbf\nc"
    (tmp_path / "text").write_bytes(data)
    assert files.read_lines(tmp_path / "text") == ["a", "b\ufeff", "c"]
    lines = list(files.byte_lines(io.BytesIO(data), where="x"))
    assert lines == [(3, b"a"), (8, b"b\xef\xbb\xbf"), (13, b"c")]


def test_a_line_without_end_is_no_text(monkeypatch):
    monkeypatch.setattr(files, "_MAX_LINE_BYTES", 2 << 20)
    whole = b"a" * (2 << 20)
    assert list(files.byte_lines(io.BytesIO(whole), where="x")) == [(0, whole)]
    with pytest.raises(ValueError, match=r"^x has a line of more than 2 MiB; it is no text"):
        list(files.byte_lines(io.BytesIO(whole + b"a"), where="x"))


def test_lines_that_are_cut_by_a_block_are_whole():
    data = b"".join(b"%d" % i * 50_000 + b"\r\n" for i in range(90))
    lines = list(files.byte_lines(io.BytesIO(data), where="x"))
    assert [line for _, line in lines] == data.split(b"\r\n")[:-1]
    assert all(data[at : at + len(line)] == line for at, line in lines)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_utf_16_is_refused_by_name(tmp_path, encoding):
    path = tmp_path / "text"
    path.write_bytes(json.dumps({"images": ["a"]}).encode(encoding))
    # with a mark the text says which it is
    name = {"utf-16": "UTF-16", "utf-32": "UTF-32"}.get(encoding, "UTF-16 or UTF-32")
    for read in (files.read_lines, files.read_json):
        with pytest.raises(ValueError, match=f"{path} is {name}; save it as UTF-8"):
            read(path)
    with pytest.raises(ValueError, match="is UTF-"), path.open("rb") as file:
        list(files.byte_lines(file, where=path))


@pytest.mark.parametrize("data", [b"", b"{", b"\xe9", b"[" * 100_000, b"9" * 10_000, b"{'a': 1}", b"\0"])
def test_what_is_no_json_is_one_error_that_names_the_file(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json is"):
        files.read_json(tmp_path / "x.json")
    assert files.parse_json('{"a": 1}', where="y.json", object_pairs_hook=list) == [("a", 1)]
    with pytest.raises(ValueError, match=r"y\.json is no valid json: Expecting"):
        files.parse_json("{", where=tmp_path / "y.json")


def test_pipes_devices_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(files.NotRegularError):
            files.read_bytes(path)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(files.NotRegularError):
        files.read_bytes(tmp_path / "link")


HOSTILE = (
    "x/../../../../PWNED", "/etc/passwd", "..", ".", "", "a\0b", "a\nb", "..\\..\\x", "C:\\x", "CON", "nul.txt",
    "a" * 5000, "é" * 300, " x", "x.", ".hidden", "-rf", "\udcff", "a:b", "a*b?", "\u202etxt", None, -1, 1.5, [1, "/"],
    {"a": "b"},
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_any_name_becomes_one_part_of_a_path(tmp_path, name):
    safe = files.safe_name(name)
    path = tmp_path / f"{safe}.orbax-partial-12345.jpg"
    path.write_bytes(b"x")
    assert path.resolve().parent == tmp_path.resolve()
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert len(safe.encode()) <= 120
    assert safe[0] not in ".- "


def test_different_names_stay_different_and_plain_ones_as_they_are():
    assert re.fullmatch(r"a_b-[0-9a-f]{12}", files.safe_name("a/b"))
    names = [*map(str, HOSTILE), "a/b", "a_b", "a\\b", "é", "e\u0301", "a" * 200 + "1", "a" * 200 + "2"]
    assert len({unicodedata.normalize("NFC", files.safe_name(name)) for name in names}) == len(names)
    assert len(files.safe_name("a" * 121)) == 120
    assert files.safe_name("a" * 120) == "a" * 120
    assert re.fullmatch(rf"{'a' * 105}-[0-9a-f]{{12}}", files.safe_name("a" * 105 + ". b" * 9))
    for plain in (42, "42", "red car", "000000000042", "Käse", "cat_1-2.jpg"):
        assert files.safe_name(plain) == str(plain)


def test_names_that_a_file_system_may_take_for_one_are_told_apart(tmp_path):
    names = ["IMG", "img", "Img", "img_2", "é", "É", "e\u0301", "a/b", "A/B", "ß", "SS", "img", 3, "3", "\udcff"]
    safe = files.safe_names(names)
    assert len({unicodedata.normalize("NFD", name.casefold()) for name in safe}) == len(names)
    assert safe[:4] == ["IMG", "img_2", "Img_3", "img_2_2"]
    assert files.safe_names(["b", "a"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a b/é.png", "a b/é.png"),
        ("\udcfe", r"'\udcfe'"),
        ("a\nb", r"'a\nb'"),
        ("é\n", r"'\xe9\n'"),
        ("\x1b[2J", r"'\x1b[2J'"),
        (7, "7"),
    ],
)
def test_a_name_in_a_line_of_a_log(name, expected):
    assert files.printable(name) == expected


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_arrays_of_objects_run_no_code(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([Trap(tmp_path / "sprung")], object), b=np.arange(3))
    with pytest.raises(ValueError, match=r"a\.npz cannot be read \(ValueError: Object arrays"):
        files.read_arrays(tmp_path / "a.npz", ("b", "a"))
    assert not (tmp_path / "sprung").exists()
    assert files.read_arrays(tmp_path / "a.npz", ["b"])["b"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"a\.npz cannot be read \(KeyError"):
        files.read_arrays(tmp_path / "a.npz", ["c"])


def test_names_of_devices_and_marks_apart_from_their_letters():
    for name in ("con", "Nul.png", "com1.tar"):
        assert files.safe_name(name).startswith(f"_{name}-")
    assert files.safe_name("console.png") == "console.png"
    assert files.safe_name("cafe\u0301").startswith("caf\u00e9-")  # one letter where it was two


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "folder" / "scores.json"
    files.write_json(path, {"AP": 1, "name": "é"})
    assert path.read_text(encoding="utf-8") == '{"AP": 1, "name": "é"}\n'

    def interrupted():
        with atomic.whole(path) as partial:
            assert (partial.parent, partial.suffix) == (path.parent, ".json")
            assert str(os.getpid()) in partial.name  # another process has its own
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files.read_json(path)["AP"] == 1
    assert list(path.parent.iterdir()) == [path]
    with path.open() as reader:  # whoever reads the old file has it whole
        files.write_json(path, "half \udcff")
        assert json.load(reader)["AP"] == 1
    assert files.read_json(path) == "half \udcff"
    files.write_text(path, ["a", "b"])
    assert path.read_text() == "ab"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_of_the_same_content_stays_and_any_other_is_replaced(tmp_path):
    path = tmp_path / "file.txt"
    for content in ("", "a" * (1 << 20), "a" * (1 << 20) + "b"):
        files.write_text(path, [content])
        before = path.stat().st_ino
        files.write_text(path, [content])
        assert path.stat().st_ino == before
        changed = content[:-1] + "c"
        files.write_text(path, [changed])
        assert path.read_text() == changed


def test_a_lock_keeps_other_processes_out_until_its_process_is_gone(tmp_path):
    code = (
        "import pathlib, sys\nfrom detclipv2_jax import files\n"
        f"with files.locked(pathlib.Path({str(tmp_path / 'lock')!r})): print('in', flush=True), sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as first:
        assert first.stdout.readline() == "in\n"
        said = rf"^process {first.pid} on {socket.gethostname()}\Z"
        with pytest.raises(files.LockedError, match=said), files.locked(tmp_path / "lock"):
            pass
        (tmp_path / "lock").write_text(" \n")
        with pytest.raises(files.LockedError, match="it does not say which"), files.locked(tmp_path / "lock"):
            pass
        first.kill()
    (tmp_path / "lock").write_text("process 12345678 on a host with a long name\n")
    with files.locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_lock_whose_file_was_replaced_meanwhile_is_none(tmp_path, monkeypatch):
    def replaced(file, flags):
        (tmp_path / "lock").unlink()
        (tmp_path / "other").rename(tmp_path / "lock")

    (tmp_path / "other").write_text("")
    monkeypatch.setattr(files.fcntl, "lockf", replaced)
    with pytest.raises(files.LockedError, match="it has just ended"), files.locked(tmp_path / "lock"):
        pass


def test_a_folder_that_was_written_keeps_no_lock(tmp_path):
    for name, lock in (("", "..lock"), ("a.json", ".a.json.lock")):
        with files.only_writer(tmp_path / "new" / "folder", name):
            assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [lock]
        assert not list((tmp_path / "new" / "folder").iterdir())


def test_threads_write_a_file_apart_from_each_other(tmp_path):
    def place():
        with atomic.whole(tmp_path / "a.json") as partial:
            partial.write_text("{}")
            return partial

    with concurrent.futures.ThreadPoolExecutor(1) as thread, atomic.whole(tmp_path / "a.json") as partial:
        partial.write_text("[]")
        assert thread.submit(place).result() != partial
    assert (tmp_path / "a.json").read_text() == "[]"


def test_arrays_are_read_by_name_and_nothing_else_is(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x", "yz"]), "c": np.zeros(0)}
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    data = path.read_bytes()
    for found in (files.read_arrays(path, ("b", "a")), files.read_arrays("x", ("b", "a"), data=data)):
        assert list(found) == ["b", "a"]
        for name, array in found.items():
            np.testing.assert_array_equal(array, arrays[name], strict=True)
    with pytest.raises(ValueError, match=r"arrays\.npz cannot be read \(KeyError: .*d is not a file"):
        files.read_arrays(path, ("a", "d"))
    with pytest.raises(ValueError, match=r"^x cannot be read \(BadZipFile"):
        files.read_arrays("x", ("a",), data=data[:-30])
    np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError, match="its arrays are compressed"):
        files.read_arrays(path, ("a",))
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:  # one of several
        archive.writestr("d.npy", b"", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its arrays are compressed"):
        files.read_arrays(path, ("a",))
    np.savez(path, a=np.array([None, {}]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        files.read_arrays(path, ("a",))
    with pytest.raises(FileNotFoundError):
        files.read_arrays(tmp_path / "absent.npz", ("a",))


def test_marks_are_taken_off_and_wide_characters_refused():
    assert files.without_mark(b"\xef\xbb\xbfa\xef\xbb\xbf", where="w") == b"a\xef\xbb\xbf"
    assert files.without_mark(b"", where="w") == b""
    assert files.without_mark(b"a\0bcd", where="w") == b"a\0bcd"
    for data in ("ab".encode("utf-16"), "ab".encode("utf-16-le"), "ab".encode("utf-32")):
        with pytest.raises(ValueError, match=r"^w is UTF-(16|32).*; save it as UTF-8"):
            files.without_mark(data, where="w")


def test_the_beginning_of_a_text_is_read_and_of_a_pipe_nothing(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfab" + b"c" * 9000)
    assert files.beginning(tmp_path / "text") == b"ab" + b"c" * 4091
    (tmp_path / "text").write_bytes("ab".encode("utf-16"))
    with pytest.raises(ValueError, match="text is UTF-16"):
        files.beginning(tmp_path / "text")
    os.mkfifo(tmp_path / "pipe")
    for read in (files.beginning, lambda path: files.read_arrays(path, ("a",))):
        with pytest.raises((OSError, ValueError), match="pipe is not a regular file"):
            read(tmp_path / "pipe")


def test_what_is_neither_here_nor_in_a_bucket():
    for place in ("runs/demo", "/data/a", "gs", "gs:a", "a b", "", "gs://bucket/run", "s3://bucket"):
        files.check_here(place, where="--workdir")
    for place in ("hf://bucket/run", "https://x", "GS://x", "file:///x", "gs:/x", "s3:/x/y"):
        with pytest.raises(ValueError, match=f"^--workdir={place} is neither on this machine nor in a bucket"):
            files.check_here(place, where="--workdir")


def test_lines_that_are_no_json_objects_are_counted(tmp_path):
    (tmp_path / "lines").write_text('{"a": 1}\n\n[1]\n{"a"\n3\n{"b": [2]}\n{"c')
    assert files.read_json_lines(tmp_path / "lines") == ([{"a": 1}, {"b": [2]}], 4)


def test_a_folder_to_write_is_new_or_empty(tmp_path):
    files.check_empty(tmp_path)
    files.check_empty(tmp_path / "new")
    (tmp_path / "a").write_text("")
    for path in (tmp_path, tmp_path / "a"):
        with pytest.raises(ValueError, match=r"--output: .* holds something already; give a new folder"):
            files.check_empty(path)


def test_errors_of_a_full_disk_are_known_and_name_the_file(tmp_path):
    reason = "No space left on device"
    assert (
        files.no_room(RuntimeError(f"write() failed: {reason}; writing x"))
        == files.no_room(OSError(28, reason))
        == reason
    )
    assert files.no_room(OSError(13, "Permission denied")) == files.no_room(ValueError("no room")) == ""

    def fails(*error):
        with atomic.whole(tmp_path / "a.json"):
            raise OSError(*error)

    with pytest.raises(OSError, match=rf"{reason}: '{tmp_path}/a\.json'$"):
        fails(28, reason)
    with pytest.raises(OSError, match=r"reason: 'of another file'$"):
        fails(28, "reason", "of another file")
    with pytest.raises(OSError, match=r"^a text alone$"):
        fails("a text alone")
    assert not list(tmp_path.iterdir())
