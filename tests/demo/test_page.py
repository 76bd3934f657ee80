"""What the page's server answers, without a browser: photos, boxes, maps, pictures; what it refuses."""

import base64
import contextlib
import http.client
import importlib.resources
import io
import logging
import re
import select
import socket
import time
import types

import numpy as np
import planted
import pytest
from page_server import BLUE, RED, served
from PIL import Image

from detclipv2_jax import demo
from detclipv2_jax.colors import color_of, hex_color
from detclipv2_jax.data import transforms
from detclipv2_jax.demo import album as album_lib
from detclipv2_jax.demo import answers as answers_lib
from detclipv2_jax.demo import server as server_lib
from detclipv2_jax.demo.__main__ import run
from detclipv2_jax.demo.album import Album
from detclipv2_jax.demo.answers import Answers
from detclipv2_jax.inference import Alignment, Predictor
from detclipv2_jax.runs import kept
from detclipv2_jax.visualize import drawing, figures


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def best_of(rows):
    """Returns the best row of every name."""
    return {row["name"]: row for row in reversed(rows)}


# --- photos


def test_an_album_has_the_photos_of_its_folder_only(photos, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        entries = Album(photos).entries
    assert [(entry.id, entry.name, entry.width, entry.height) for entry in entries] == [
        ("p0", "a.png", 128, 64), ("p1", "b.png", 128, 64), ("p2", "z.png", 128, 64), ("p3", "c.png", 60, 100)
    ]  # fmt: skip
    assert "broken.jpg: not an image" in caplog.text
    assert Album(None).entries == []
    assert album_lib.LONG_SIDES["thumb"] < 200 < 1000 < album_lib.LONG_SIDES["photo"]
    album = Album(photos)
    assert album.pixels("p0") is album.pixels("p0")  # decoded once
    with pytest.raises(ValueError, match=r"--photos: .*absent is no folder"):
        Album(photos / "absent")


def test_folders_come_in_their_order(tmp_path):
    for name in "cafbed":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(png(planted.paint((8, 8), {})))
    (tmp_path / "a" / "b.PNG").write_bytes(png(planted.paint((8, 8), {})))
    assert [entry.name for entry in Album(tmp_path).entries] == ["a.png", "b.PNG", *(f"{x}.png" for x in "bcdef")]


def test_a_large_folder_is_shown_in_part(photos, monkeypatch, caplog):
    monkeypatch.setattr(album_lib, "MAX_LISTED", 2)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert [entry.name for entry in Album(photos).entries] == ["a.png", "b.png"]
    assert "the page shows the first 2 photos" in caplog.text
    caplog.clear()
    monkeypatch.setattr(album_lib, "MAX_LISTED", 4)  # as many as there are
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert len(Album(photos).entries) == 4
    assert "the page shows" not in caplog.text


def test_uploads_are_bounded(monkeypatch):
    album, photo = Album(None), png(planted.paint((20, 30), {}))
    monkeypatch.setattr(album_lib, "MAX_UPLOADS", 2)
    ids = [album.add(photo, name="x.png").id for _ in range(3)]
    assert [entry.id for entry in album.entries] == ids[1:]
    with pytest.raises(album_lib.UnknownPhotoError, match="no such photo any more"):
        album.pixels(ids[0])
    for wrong in ("../a.png", None, 3, ["p0"]):
        with pytest.raises(album_lib.UnknownPhotoError):
            album.get(wrong)
    monkeypatch.setattr(album_lib, "MAX_PIXELS", 599)
    with pytest.raises(ValueError, match="the photo has 0 million pixels; at most 0 can be"):
        album.add(photo, name="x.png")
    monkeypatch.setattr(album_lib, "MAX_UPLOAD_BYTES", len(photo) - 1)
    with pytest.raises(ValueError, match="the file has more than 0 MB"):
        album.add(photo, name="x.png")
    assert len(album.entries) == 2
    monkeypatch.setattr(album_lib, "MAX_PIXELS", 600)
    monkeypatch.setattr(album_lib, "MAX_UPLOAD_BYTES", len(photo))
    assert album.add(photo, name="n" * 99).name == "n" * 80  # just as large as may be


def test_a_damaged_upload_is_refused_at_once(monkeypatch):
    def damaged(data):
        raise transforms.UnusableError("undecodable image")

    monkeypatch.setattr(transforms, "decode_photo", damaged)
    album = Album(None)
    with pytest.raises(transforms.UnusableError, match="undecodable image"):
        album.add(png(planted.paint((20, 30), {})), name="x.png")
    assert album.entries == []


def test_a_photo_that_was_exchanged_is_not_shown_in_the_old_size(photos):
    album = Album(photos)
    assert transforms.decode_photo((photos / "a.png").read_bytes()).size == (64, 128)
    for size in ((40, 50), (64, 50), (50, 128)):
        Image.fromarray(planted.paint(size, {})).save(photos / "a.png")
        with pytest.raises(ValueError, match=r"the photo a\.png has changed; start the page anew"):
            album.pixels("p0")


def test_a_photo_is_shown_upright_and_without_what_cameras_write(photos):
    image = Image.fromarray(np.ascontiguousarray(np.rot90(planted.paint((64, 128), {"red": RED}))))
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "where it was taken"
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95)
    album = Album(None)
    entry = album.add(out.getvalue(), name="turned.jpg")
    assert (entry.width, entry.height) == (128, 64)
    shown = album.jpeg(entry.id, long_side=1600)
    assert b"where it was taken" in out.getvalue()
    assert b"where it was taken" not in shown
    assert tuple(opened(shown)[30, 40]) == pytest.approx((255, 0, 0), abs=12)
    assert opened(album.jpeg(entry.id, long_side=32)).shape == (16, 32, 3)


# --- answers


def test_words_are_found(answers, monkeypatch):
    times = iter([10.0, 12.34567])
    with monkeypatch.context() as patched:
        patched.setattr(answers_lib, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
        found = answers.find({"photo": "p0", "words": "blue, red"})
    assert found["seconds"] == 2.346
    best = best_of(found["rows"])
    np.testing.assert_allclose(best["red"]["bbox"], [20, 10, 40, 40], atol=1)
    np.testing.assert_allclose(best["blue"]["bbox"], [70, 5, 40, 40], atol=1)
    assert best["red"]["file_name"] == "a.png"
    assert (best["blue"]["category_id"], best["red"]["category_id"]) == (1, 2)
    assert found["num_names"] == 2
    scores = [row["score"] for row in found["rows"]]
    assert scores == sorted(scores, reverse=True)
    assert answers.find({"photo": "p3", "words": "blue\nred"})["rows"][0]["name"] == "blue"


def test_a_list_of_names_is_asked_for_beside_words(answers):
    found = answers.find({"photo": "p0", "words": "red", "vocabulary": "coco"})
    assert found["num_names"] == 81
    start = answers.start()
    assert start["vocabularies"] == ["lvis", "coco", "objects365"]
    assert start["max_bytes"] == album_lib.MAX_UPLOAD_BYTES
    assert start["photos"][3] == {"id": "p3", "name": "c.png", "width": 60, "height": 100}
    assert start["model"].endswith("step 0, photos shown to it at 64 × 128 or 128 × 64 px")


def test_an_example_is_found_on_another_photo(answers):
    examples = [{"name": "like this", "photo": "p0", "box": list(RED)}]
    for words in ("", "blue"):
        best = best_of(answers.find({"photo": "p1", "words": words, "examples": examples})["rows"])
        np.testing.assert_allclose(best["like this"]["bbox"], [80, 10, 30, 40], atol=1)
        assert best["like this"]["score"] == pytest.approx(0.25)  # the logit of its own kind is 0, the centerness too


def test_what_was_found_is_not_looked_for_again(answers, monkeypatch):
    asked = []
    monkeypatch.setattr(answers, "_predictor", lambda *given, **options: asked.append(given) or found)
    found = [Predictor(*planted.make())(planted.paint((64, 128), {"red": RED}), ["red"])]
    monkeypatch.setattr(answers_lib, "_NUM_KEPT", 2)
    for words in ("red", "red", "blue", "red", "green", "red", "blue"):
        answers.find({"photo": "p0", "words": words})
    assert len(asked) == 4  # red, blue, green, and blue again, which was forgotten
    answers.find({"photo": "p1", "words": "red"})
    example = {"name": "a", "photo": "p0", "box": list(BLUE)}
    for changes in ({}, {"box": list(RED)}, {"photo": "p1"}, {"name": "b"}):
        answers.find({"photo": "p1", "words": "red", "examples": [example | changes]})
    answers.find({"photo": "p1", "words": "red: a colour"})
    answers.find({"photo": "p1", "words": "red", "vocabulary": "coco"})
    assert len(asked) == 11  # whatever differs is asked


def test_the_picture_shows_what_scores_enough(answers, monkeypatch):
    request = {"photo": "p0", "words": "red"}
    best = answers.find(request)["rows"][0]["score"]
    titles, draw = [], figures.detections
    monkeypatch.setattr(
        figures, "detections", lambda *given, title, **more: titles.append(title) or draw(*given, title=title, **more)
    )
    drawn = opened(answers.picture(request | {"threshold": best - 0.01}))
    assert titles == ["a.png"]
    assert drawn.shape[1] > 900
    with_fewer = opened(answers.picture(request | {"threshold": min(best + 0.01, 1.0)}))
    assert with_fewer.shape != drawn.shape or (with_fewer != drawn).any()
    for allowed in (0, 1):
        assert answers.picture(request | {"threshold": allowed})[:4] == b"\x89PNG"
    for wrong in (None, "0.5", -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="the threshold must be a number between 0 and 1"):
            answers.picture(request | {"threshold": wrong})


def test_a_name_looks_as_in_pictures(answers):
    looks = answers.find({"photo": "p0", "words": "red, blue"})["looks"]
    assert looks["red"] == {"color": hex_color(color_of("red")), "ink": "#000000", "plain": "red"}
    assert answers_lib.look_of("b") == {"color": hex_color(color_of("b")), "ink": "#ffffff", "plain": "b"}
    assert answers_lib.look_of("\ue000 قطة")["plain"] == "U+E000 qth"
    (phrase,) = answers.align({"photo": "p0", "caption": "a red"})["phrases"]
    assert phrase["look"] == looks["red"]


def test_phrases_of_a_caption_are_located(answers):
    found = answers.align({"photo": "p0", "caption": "a picture of a red and the blue on grass"})
    phrases = {row["text"]: row for row in found["phrases"]}
    assert list(phrases) == ["red", "blue", "grass"]
    assert phrases["red"]["score"] == phrases["red"]["high"] == 10.0
    assert phrases["red"]["low"] == 0.0
    np.testing.assert_allclose(phrases["red"]["box"], RED, atol=1)
    maps = {}
    for text in ("red", "blue"):
        kind, _, data = phrases[text]["map"].partition(",")
        assert kind == "data:image/png;base64"
        maps[text] = opened(base64.b64decode(data)).sum(-1)
        assert maps[text].shape == (64, 128)
    assert maps["red"][30, 40] > maps["red"][25, 90]
    assert maps["blue"][30, 40] < maps["blue"][25, 90]
    marked = answers.align({"photo": "p0", "caption": "a red and the blue", "phrase": "the blue"})
    assert [row["text"] for row in marked["phrases"]] == ["the blue", "red", "blue"]


def test_as_many_phrases_as_the_page_has_room_for_with_their_numbers(answers, monkeypatch):
    asked = []

    def align(images, phrases):
        asked.append(phrases)
        num = len(phrases)
        maps = np.tile([[-0.12344, 0.98766]], (num, 1, 1))
        return Alignment(np.full((num, 4), 1.2345), np.full(num, 0.12345), np.ones(num, int), maps)

    monkeypatch.setattr(answers, "_predictor", types.SimpleNamespace(align=align))
    monkeypatch.setattr(answers_lib, "MAP_SIDE_PX", 32)
    times = iter([10.0, 12.34567])
    monkeypatch.setattr(answers_lib, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    answer = answers.align({"photo": "p0", "caption": ", ".join(f"thing{i}" for i in range(12))})
    rows, seconds = answer["phrases"], answer["seconds"]
    assert seconds == 2.346
    assert asked == [[f"thing{i}" for i in range(8)]]
    assert [rows[7][name] for name in ("box", "score", "low", "high")] == [[1.23] * 4, 0.123, -0.123, 0.988]
    assert opened(base64.b64decode(rows[0]["map"].partition(",")[2])).shape == (16, 32, 3)


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a picture of an old red star, and two blue houses on the grass", ["old red star", "blue houses", "grass"]),
        ("there is a cat on a car to the left of the cat", ["cat", "car"]),
        ("The dog's black-and-white ball!", ["dog's black", "white ball"]),
        ("一只猫", ["一只猫"]),
        ("on the ,. of", []),
    ],
)
def test_phrases_stand_between_small_words(caption, phrases):
    assert answers_lib.phrases_of(caption) == phrases


def test_small_words_are_no_part_of_a_phrase_in_capitals_neither():
    words = "a an the and or on in at with of to by behind beside near under over above below from is are there "
    for word in (words + "picture photo left right front some two three").split():
        for written in (word, word.upper()):
            assert answers_lib.phrases_of(f"old cat {written} x{word}") == ["old cat", f"x{word}"]


def test_as_much_text_and_as_many_names_as_may_be(answers, monkeypatch):
    monkeypatch.setattr(
        answers, "_predictor", lambda images, words, exemplars: asked.append((words, exemplars)) or found
    )
    asked, found = [], [Predictor(*planted.make())(planted.paint((64, 128), {"red": RED}), ["red"])]
    examples = [{"name": f"n{i}", "photo": "p0", "box": list(RED)} for i in range(20)]
    answers.find({"photo": "p1", "words": "x" * 5000, "examples": examples})
    ((words, shown),) = asked
    assert (words, list(shown)) == ({"x" * 5000: ""}, [f"n{i}" for i in range(20)])
    ((pixels, box),) = shown["n7"]
    assert box == list(RED)
    np.testing.assert_array_equal(pixels, answers.album.pixels("p0"))


WRONG = [
    ("find", {"photo": "p0"}, "type what to look for, choose a list of names, or draw an example"),
    ("find", {"photo": "p0", "words": " , :,"}, "type what to look for"),
    ("find", {"photo": "p0", "words": "\x00,: a definition"}, "type what to look for"),
    ("find", {"photo": "p9", "words": "red"}, "there is no such photo any more"),
    ("find", {"words": "red"}, "there is no such photo any more"),
    ("find", {"photo": "p0", "words": ["red"]}, "words must be a text"),
    ("find", {"photo": "p0", "words": "x" * 5001}, "5001 characters are too many; there may be 5000"),
    ("find", {"photo": "p0", "vocabulary": "imagenet"}, "there is no list of names 'imagenet'; there are lvis, coco"),
    ("find", {"photo": "p0", "examples": {"name": "a"}}, "an example must be a name, a photo and a box"),
    ("find", {"photo": "p0", "examples": ["a"]}, "an example must be a name, a photo and a box"),
    ("find", {"photo": "p0", "examples": 3}, "an example must be a name, a photo and a box"),
    ("find", {"photo": "p0", "examples": [{"name": "a", "photo": "p0", "box": [1, 2, 3]}]}, "an example must be"),
    ("find", {"photo": "p0", "examples": [{"name": "a", "photo": "p0", "box": [*RED, 9]}]}, "an example must be"),
    ("find", {"photo": "p0", "examples": [{"name": "", "photo": "p0", "box": list(RED)}]}, "an example must be"),
    ("find", {"photo": "p0", "examples": [{"name": "a", "photo": "p0", "box": [0, 0, True, 9]}]}, "an example must be"),
    ("find", {"photo": "p0", "examples": [{"name": "a", "photo": "p0", "box": [0, 0, float("inf"), 9]}]}, "an example"),
    ("find", {"photo": "p0", "examples": [{"name": "a", "photo": "p9", "box": list(RED)}]}, "no such photo any more"),
    ("find", {"photo": "p0", "examples": [{"name": "a", "photo": "p0", "box": [5, 5, 5, 9]}]}, "has no area"),
    ("find", {"photo": "p0", "examples": [{"name": "a", "photo": "p0", "box": [0, 0, 300, 9]}]}, "does not lie on the"),
    (
        "find",
        {"photo": "p0", "examples": [{"name": f"n{i}", "photo": "p0", "box": list(RED)} for i in (*range(21), 0)]},
        "the examples have 21 names; there may be 20",
    ),
    (
        "find",
        {"photo": "p0", "examples": [{"name": "a", "photo": "p0", "box": list(RED)}] * 6},
        "'a' has 6 examples; there must be 1 to 5",
    ),
    (
        "find",
        {"photo": "p0", "words": "Red", "examples": [{"name": "red", "photo": "p0", "box": list(RED)}]},
        "the name 'red' is taken",
    ),
    ("align", {"photo": "p0", "caption": " "}, "type a caption of the photo"),
    ("align", {"photo": "p0", "caption": "of the"}, "type a caption of the photo"),
    ("align", {"photo": "p0", "caption": 3}, "caption must be a text"),
]


@pytest.mark.parametrize(("method", "request_", "message"), WRONG)
def test_what_is_wrong_is_said_in_words(answers, method, request_, message):
    with pytest.raises(ValueError, match=message):
        getattr(answers, method)(request_)
    assert answers.find({"photo": "p0", "words": "red"})["rows"]  # nobody is locked out


def test_nobody_waits_for_ever(answers, monkeypatch):
    monkeypatch.setattr(answers_lib, "MAX_WAITING_S", 0.05)
    with answers._turn(), pytest.raises(answers_lib.BusyError, match="others are using the model"):
        answers.find({"photo": "p0", "words": "red"})


# --- the server


def test_the_page_and_its_photos(ask):
    status, headers, page = ask("GET", "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"Any words on any photos" in page
    for path, kind in (("/page.js", "text/javascript"), ("/labels.js", "text/javascript"), ("/page.css", "text/css")):
        status, headers, content = ask("GET", path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert content
    status, _, start = ask("GET", "/api/start")
    assert status == 200
    assert [photo["name"] for photo in start["photos"]] == ["a.png", "b.png", "z.png", "c.png"]
    assert str(planted.CANVASES[0][0]) in start["model"]
    status, headers, data = ask("GET", "/photo/p3")
    assert (status, headers.get_content_type(), opened(data).shape) == (200, "image/jpeg", (100, 60, 3))
    assert opened(ask("GET", "/thumb/p0")[2]).shape == (64, 128, 3)


def test_the_scale_has_the_colours_of_the_maps():
    css = (importlib.resources.files(demo) / "page" / "page.css").read_text()
    gradient = re.search(r"linear-gradient\((.*?)\)", css)[1]
    stops = [list(bytes.fromhex(stop)) for stop in re.findall("#([0-9a-f]{6})", gradient)]
    shown = drawing.heat(np.full((1, 6, 3), 128, np.uint8), np.linspace(-3, 5, 6)[None], low=-3, high=5)  # of grey
    np.testing.assert_allclose(stops, shown[0], atol=2)


def test_the_page_asks_nobody_else():
    for name, _ in server_lib.FILES.values():
        text = (importlib.resources.files(demo) / "page" / name).read_text()
        assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"(?m)^\s*//.*|[^:]// .*$", "", text)), name


def test_every_answer_forbids_other_hosts(ask):
    for answer in (ask("GET", "/"), ask("GET", "/absent"), ask("POST", "/api/find", {})):
        assert answer[1]["Content-Security-Policy"] == (
            "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"
        )
        assert (answer[1]["Cache-Control"], answer[1]["Referrer-Policy"]) == ("no-store", "no-referrer")
        assert answer[1]["X-Content-Type-Options"] == "nosniff"
        assert answer[1]["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize(
    "path",
    [
        "/photos/a.png", "/photo/../../secret.png", "/photo/%2e%2e%2fsecret.png", "/photo//etc/passwd", "/photo/p9",
        "/photo/", "/page/page.html", "/../page.js", "//etc/passwd", "/page.py", "/api/find", "/thumb/a.png", "/.git",
    ],
)  # fmt: skip
def test_no_file_is_served(ask, path):
    status, _, content = ask("GET", path)
    assert status == 404
    assert list(content) == ["error"]


def test_questions_over_http(ask):
    request = {"photo": "p0", "words": "red", "threshold": 0.1}
    status, _, found = ask("POST", "/api/find", request)
    assert (status, found["rows"][0]["name"]) == (200, "red")
    status, headers, picture = ask("POST", "/api/picture", request)
    assert (status, headers.get_content_type()) == (200, "image/png")
    assert opened(picture).shape[1] > 900
    status, _, aligned = ask("POST", "/api/align", {"photo": "p0", "caption": "a red"})
    assert (status, aligned["phrases"][0]["text"]) == (200, "red")
    status, _, answer = ask("POST", "/api/find", {"photo": "p0"})
    assert (status, answer["error"][:21]) == (400, "type what to look for")
    assert ask("POST", "/api/find", {"photo": "p9", "words": "red"})[0] == 404
    for body in ("{", "[]", "[" * 50_000):
        status, _, answer = ask("POST", "/api/find", body)
        assert status == 400
        assert answer["error"] in ("the request is no JSON", "the request must be a JSON object")


def test_a_photo_is_uploaded(ask):
    data = png(planted.paint((64, 128), {"blue": BLUE}))
    status, _, photo = ask("POST", "/api/upload", data, **{"X-Name": "my%20photo%0a.png"})
    assert status == 200
    assert (photo["width"], photo["height"]) == (128, 64)
    assert photo["name"].startswith("my photo") or "my photo" in photo["name"]
    assert "\n" not in photo["name"]
    assert ask("POST", "/api/upload", data)[2]["name"] == "photo"
    assert ask("POST", "/api/find", {"photo": photo["id"], "words": "blue, red"})[2]["rows"][0]["name"] == "blue"
    for wrong, message in ((b"", "the file is empty"), (b"no image", "this cannot be used as a photo: not an image")):
        status, _, answer = ask("POST", "/api/upload", wrong)
        assert (status, answer["error"]) == (400, message)


def test_uploads_over_http_are_bounded(ask, monkeypatch, server):
    monkeypatch.setattr(album_lib, "MAX_UPLOAD_BYTES", 1000)
    status, _, answer = ask("POST", "/api/upload", b"x" * 1001)
    assert (status, answer["error"]) == (413, "that is too large: at most 0.001 MB")
    assert ask("POST", "/api/upload", b"x" * 1000)[0] == 400  # it is only no photo
    monkeypatch.setattr(server_lib, "MAX_JSON_BYTES", 100)
    assert ask("POST", "/api/find", {"photo": "p0", "words": "x" * 100})[0] == 413
    for length in ("-1", "abc", "1e3", "9" * 5000, "\u00b2"):
        assert ask("POST", "/api/find", "{}", **{"Content-Length": length})[0] in (411, 413)
    assert ask("POST", "/api/find", "{}", **{"Content-Type": "text/plain"})[0] == 415
    assert ask("POST", "/api/upload", "{}")[0] == 415


def upload_begun(server):
    """Returns a connection that promised the content of a photo."""
    connection = socket.create_connection(server.server_address[:2], timeout=10)
    lines = ("POST /api/upload HTTP/1.0", "Host: 127.0.0.1", "Content-Type: application/octet-stream")
    connection.sendall("\r\n".join((*lines, "Content-Length: 1000", "", "")).encode())
    return connection


def test_no_more_is_read_than_a_client_promised(server, monkeypatch):
    monkeypatch.setattr(server_lib.Handler, "timeout", 2.0)
    with upload_begun(server) as connection:
        connection.sendall(b"x" * 1010)
        assert connection.recv(12) == b"HTTP/1.0 400"  # at once: it is no photo


def test_slow_clients_are_let_go(server, monkeypatch):
    monkeypatch.setattr(server_lib, "MAX_UPLOAD_S", 0.3)
    with upload_begun(server) as connection:
        for _ in range(150):  # a byte now and then
            connection.sendall(b"x")
            if select.select([connection], [], [], 0.1)[0]:
                break
        assert connection.recv(12) == b"HTTP/1.0 408"


def test_idle_clients_are_let_go(server, monkeypatch):
    monkeypatch.setattr(server_lib.Handler, "timeout", min(server_lib.Handler.timeout, 0.3))
    with upload_begun(server) as connection:
        assert connection.recv(12) == b"HTTP/1.0 408"


def test_connections_are_bounded(answers, monkeypatch):
    """`process_request` closes one too many, `process_request_thread` makes room again."""
    monkeypatch.setattr(server_lib, "MAX_CONNECTIONS", 2)
    with served(answers) as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(server.server_address[:2], timeout=10)) for _ in range(3)]
        assert held[2].recv(1) == b""  # closed
        for connection in held[:2]:
            connection.sendall(b"GET /api/start HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert connection.makefile("rb").read(12) == b"HTTP/1.0 200"
        answer = b""
        for _ in range(100):  # a thread that has answered makes room a moment later
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(server.server_address[:2], timeout=10) as another,
            ):
                another.sendall(b"GET /api/start HTTP/1.0\r\nHost: localhost\r\n\r\n")
                answer = another.makefile("rb").read(12)
            if answer:
                break
            time.sleep(0.02)
        assert answer == b"HTTP/1.0 200"


def test_nothing_is_printed_of_requests(ask, server, capfd):
    assert ask("GET", "/api/start")[0] == 200
    server_lib.Handler.log_message(None, "%s", "GET /secret")
    try:
        raise ConnectionResetError("the browser went away")
    except ConnectionResetError:
        server.handle_error(None, ("127.0.0.1", 1))
    assert capfd.readouterr() == ("", "")


def test_only_two_kinds_of_requests_are_answered(ask):
    assert {name for name in vars(server_lib.Handler) if name.startswith("do_")} == {"do_GET", "do_POST"}
    assert ask("PUT", "/photo/p0", b"x")[0] == 501


def test_other_sites_get_nothing(ask, server):
    port = server.server_address[1]
    for headers in (
        {"Host": f"evil.example:{port}"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ):
        status, _, answer = ask("POST", "/api/find", {"photo": "p0", "words": "red"}, **headers)
        assert status == 403, headers
        assert "error" in answer
    assert ask("GET", "/photo/p0", Host="evil.example")[0] == 403
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]"):
        assert ask("GET", "/api/start", Host=host, Origin=f"http://{host}")[0] == 200


def test_it_is_bound_to_this_machine_unless_told_otherwise(answers, ask, server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_address[1]}"
    for host, here in (
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("LocalHost", True),
        ("0.0.0.0", False),
        ("example.org", False),
    ):
        assert server_lib.is_loopback(host) is here
    by_six = types.SimpleNamespace(server_address=("::1", 80, 0, 0))
    assert server_lib.Server.address.fget(by_six) == "http://[::1]:80"
    with served(answers, host="0.0.0.0") as everywhere:
        assert not everywhere.only_here
        connection = http.client.HTTPConnection("127.0.0.1", everywhere.server_address[1], timeout=60)
        for headers, status in (({"Host": "my.machine"}, 200), ({"Host": "my.machine", "Origin": "http://other"}, 403)):
            with contextlib.closing(connection):
                connection.request("GET", "/api/start", headers=headers)
                assert connection.getresponse().status == status


def test_a_fault_of_ours_is_told_and_logged(ask, server, monkeypatch, caplog):
    def broken(request):
        raise KeyError("inside")

    monkeypatch.setattr(server.answers, "find", broken)
    status, _, answer = ask("POST", "/api/find", {"photo": "p0", "words": "red"})
    assert (status, answer["error"]) == (500, "this went wrong here; the terminal says more")
    assert "inside" in caplog.text

    def busy(request):
        raise answers_lib.BusyError("later")

    monkeypatch.setattr(server.answers, "find", busy)
    status, _, answer = ask("POST", "/api/find", {"photo": "p0", "words": "red"})
    assert (status, answer["error"]) == (503, "later")


# --- the command


def test_the_command_serves_the_photos_of_a_run(predictor, photos, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    (workdir / "data" / "images").mkdir(parents=True)
    photos.rename(workdir / "data" / "images" / "eval")
    seen = {}

    class Stopped(server_lib.Server):
        def __init__(self, answers, *, host, port):
            seen["port"] = port
            super().__init__(answers, host=host, port=0)

        def serve_forever(self, poll_interval=0.5):
            seen["photos"] = [entry.name for entry in self.answers.album.entries]
            seen["host"] = self.server_address[0]

    def from_checkpoint(checkpoint, *, keep_vocabularies):
        assert (checkpoint, keep_vocabularies) == (str(workdir), False)
        return predictor

    warmed = []
    monkeypatch.setattr(Answers, "warm_up", lambda self: warmed.append(self))
    monkeypatch.setattr(server_lib, "Server", Stopped)
    monkeypatch.setattr(Predictor, "from_checkpoint", from_checkpoint)
    run(checkpoint=str(workdir), port=0)
    assert seen == {"photos": ["a.png", "b.png", "z.png", "c.png"], "host": "127.0.0.1", "port": 0}
    assert len(warmed) == 1
    said = capsys.readouterr().out
    assert re.search(r"the page is at http://127\.0\.0\.1:\d+ \(Ctrl-C ends it\)", said)
    assert "password" not in said
    run(checkpoint=str(workdir), photos=str(workdir / "data" / "images" / "eval" / "more"), host="0.0.0.0", port=65535)
    assert seen == {"photos": ["c.png"], "host": "0.0.0.0", "port": 65535}
    assert "there is no password" in capsys.readouterr().out
    for port in (65536, -1):
        with pytest.raises(ValueError, match=f"--port is {port}"):
            run(checkpoint=str(workdir), port=port)
    photos = workdir / "data" / "images" / "eval"
    monkeypatch.setattr(predictor, "config", predictor.config.copy_and_resolve_references())
    predictor.config.eval.images = str(photos.rename(tmp_path / "elsewhere") / "more")
    run(checkpoint=str(workdir))  # the run has none of its own
    assert (seen["photos"], seen["port"]) == (["c.png"], 8765)
    predictor.config.eval.images = ""
    run(checkpoint=str(workdir))
    assert seen["photos"] == []


def test_what_finds_words_is_compiled_before_the_first_question(photos, tmp_path, monkeypatch):
    place = tmp_path / "traced"
    monkeypatch.setattr(kept, "folder", lambda: place)
    predictor = Predictor(*planted.make())
    Answers(predictor, Album(photos)).warm_up()
    assert len(list(place.iterdir())) == len(planted.CANVASES) + 2
    answers = Answers(predictor, Album(photos))
    for photo, request in (("p0", {"words": "red"}), ("p3", {"vocabulary": "coco"})):
        answers.find({"photo": photo, **request})
    assert len(list(place.iterdir())) == len(planted.CANVASES) + 3  # COCO's words are encoded at once; photos as before
