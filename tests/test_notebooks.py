"""The notebooks, run from a clean kernel on the run that DETCLIP_RUN names; `.ci/run` names the demo's."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# pictures that each shows
PICTURES = {"word_region_alignment": 4, "example_boxes": 3, "look_at_a_batch": 4, "your_own_data": 3}


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_listed_and_without_outputs():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(PICTURES)
    for name in PICTURES:
        for cell in read(name).cells:
            assert not cell.get("outputs"), name
            assert not cell.get("execution_count"), name


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_notebook_runs(name, monkeypatch, tmp_path):
    run = os.environ.get("DETCLIP_RUN")
    if not run:
        pytest.skip("set DETCLIP_RUN to the workdir of a run, e.g. of configs/demo.py")
    monkeypatch.setenv("DETCLIP_RUN", str(pathlib.Path(run).absolute()))
    monkeypatch.setenv("DETCLIP_STEPS", "20")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS")  # a kernel of its own: one device, as users have
    for folder in ("configs", "notebooks"):  # what the notebook writes goes elsewhere
        (tmp_path / folder).symlink_to(ROOT / folder)
    book = read(name)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]
    printed = "".join(output.get("text", "") for output in outputs)
    assert not re.search("^error: ", printed, re.MULTILINE)  # how our commands end that fail
    if folder := os.environ.get("DETCLIP_KEEP"):
        nbformat.write(book, pathlib.Path(folder) / f"{name}.ipynb")
