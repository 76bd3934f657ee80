"""What the site takes from elsewhere: first page, configuration, Python interface, measurements of accelerators."""

from __future__ import annotations

import html
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages of the Python interface, which mkdocs.yml cannot know."""
    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    reference.append({"Python interface": sorted(interface())})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the written pages."""
    pages = {"index.md": home(), "configuration.md": configuration(), **interface()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the measurements of accelerators into the page of benchmarks."""
    return markdown.replace("<!-- measurements of accelerators -->", accelerators(ROOT / "results" / "accelerator"))


def accelerators(folder: pathlib.Path) -> str:
    """Returns a section with the table of every measured card, or that there is none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        return "No accelerator was measured."
    sys.path.insert(0, str(ROOT))
    from tests.benchmarks.accelerator import table  # imports jax: only if it is needed

    reports = [json.loads(path.read_text()) for path in paths]
    return "\n\n".join(f"### {report['card']}\n\n{report.get('note', '')}\n\n{table(report)}" for report in reports)


def home() -> str:
    """Returns the README with its links as they are within docs/."""
    text = (ROOT / "README.md").read_text()
    return text.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")


def configuration() -> str:
    """Returns a table of every key: its default and the comment beside or above its line in config.py."""
    lead = (
        "# Configuration\n\n"
        "Written from `detclipv2_jax/config.py`, whose `base()` has every key with the value of the paper's Swin-T. "
        "`configs/*.py` set others; `--config.KEY=VALUE` on the command line wins. What the comments leave to be "
        "explained is in [decisions](decisions.md).\n"
    )
    parts, section = [lead], None
    for key, value, comment in keys():
        own = key.rpartition(".")[0]
        if own != section:
            section = own
            parts.append(f"\n## {section or 'The run'}\n\n| key | default | |\n|---|---|---|\n")
        cells = (f"`{key}`", f"`{shown(value)}`", comment)
        parts.append(f"| {' | '.join(map(as_html, cells))} |\n")
    return "".join(parts)


def as_html(text: str) -> str:
    """Returns text with `code` as a cell of a table: Markdown knows no bar in one."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False)).replace("|", "&#124;")


def shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def keys() -> list[tuple[str, object, str]]:
    """Returns (dotted key, default, comment) of every key in the order of config.py, those of no section first."""
    lines: dict[tuple[int, str], int] = {}
    stored = ConfigDict.__setitem__

    def record(section: ConfigDict, key: str, value: object) -> None:
        frame = sys._getframe(1)
        while frame and pathlib.Path(frame.f_code.co_filename).name != "config.py":
            frame = frame.f_back
        if frame:
            lines[id(section), key] = frame.f_lineno
        stored(section, key, value)

    with mock.patch.object(ConfigDict, "__setitem__", record):
        made = config_lib.base()

    def walk(section: ConfigDict, prefix: str) -> Iterator[tuple[str, object, str]]:
        ordered = sorted(section, key=lambda key: lines[id(section), key])
        for key in ordered:
            if not isinstance(section[key], ConfigDict):
                yield prefix + key, section[key], comment_at(lines[id(section), key])
        for key in ordered:
            if isinstance(section[key], ConfigDict):
                yield from walk(section[key], f"{prefix}{key}.")

    return list(walk(made, ""))


SOURCE = inspect.getsource(config_lib).splitlines()


def comment_at(number: int) -> str:
    """Returns the comment of a line (from 1) of config.py: what stands above it, then what stands beside it."""
    beside = re.search(r"\s# (.*)$", SOURCE[number - 1])
    above: list[str] = []
    for line in reversed(SOURCE[: number - 1]):
        if not line.lstrip().startswith("# ") or line.lstrip().startswith("# ---"):
            break
        above.insert(0, line.strip()[2:])
    return " ".join([*above, beside.group(1)] if beside else above)


def interface() -> dict[str, str]:
    """Returns a page for every room: its modules, with what their docstrings say."""
    package = ROOT / "detclipv2_jax"
    rooms: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        if not path.name.startswith("__"):
            room, name = (".".join(path.relative_to(package).with_suffix("").parts[:-1]), path.stem)
            rooms.setdefault(room.split(".")[0], []).append(".".join(filter(None, ("detclipv2_jax", room, name))))
    titles = {room: room or "the run" for room in sorted(rooms)}
    pages = {
        f"api/{room or 'run'}.md": f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in rooms[room]) + "\n"
        for room, title in titles.items()
    }
    return pages
