"""A page over the planted model and a few photos, served by this process."""

import contextlib
import http.client
import json

import planted
import pytest
from page_server import BLUE, RED, served
from PIL import Image

from detclipv2_jax.demo.album import Album
from detclipv2_jax.demo.answers import Answers
from detclipv2_jax.inference import Predictor


@pytest.fixture(scope="session")
def predictor():
    return Predictor(*planted.make())


@pytest.fixture
def photos(tmp_path):
    """A folder of photos, one in a sub-folder, with what is none of its photos inside and beside it."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(planted.paint((64, 128), {"red": RED, "blue": BLUE})).save(folder / "a.png")
    Image.fromarray(planted.paint((64, 128), {"red": (80, 10, 110, 50)})).save(folder / "b.png")
    Image.fromarray(planted.paint((100, 60), {"blue": (10, 20, 50, 60)})).save(folder / "more" / "c.png")
    (folder / "notes.txt").write_text("no photo")
    (folder / "broken.jpg").write_bytes(b"no image")
    Image.fromarray(planted.paint((64, 64), {})).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "z.png").symlink_to("a.png")  # it stays inside
    return folder


@pytest.fixture
def answers(predictor, photos):
    return Answers(predictor, Album(photos))


@pytest.fixture
def server(answers):
    with served(answers) as server:
        yield server


@pytest.fixture
def ask(server):
    """A function that sends a request and returns (status, headers, content; JSON as an object)."""

    def send(method, path, body=None, **headers):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
        kind = {"Content-Type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}
        content = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
        with contextlib.closing(connection):
            connection.request(method, path, content, kind | headers)
            answer = connection.getresponse()
            data = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, answer.headers, json.loads(data) if is_json else data

    return send
