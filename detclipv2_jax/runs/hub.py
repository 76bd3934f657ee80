"""Exports on the model hub: a folder for a name there, and a folder put there. The only module that knows its library.

`huggingface_hub` is optional: pip install 'detclipv2_jax[hub]'. HF_ENDPOINT names another hub, HF_HOME the cache.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

PATTERNS = ("README.md", "config.json", "weights*.safetensors", "weights.safetensors.index.json", "vocabulary.*")
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def local_folder(source: str | os.PathLike[str], *, revision: str | None = None) -> pathlib.Path:
    """Returns a folder as it is, or the one to which a model of the hub is downloaded, without its code.

    Raises:
      ValueError: there is no such folder or model, the hub cannot be reached, or its library is not installed.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else repr(source)
    folder = pathlib.Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not _NAME.fullmatch(name):
        raise ValueError(f"{name} is no folder; give the folder of an export, or USER/NAME of a model on the hub")
    library = _library(f"{name} is no folder here, and models of the hub need")
    try:
        return pathlib.Path(library.snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # of the library, its HTTP client, the disk: there are many
        raise ValueError(f"{name} is no folder here, and {_explained(error, revision)}") from error


def check_push(name: str) -> None:
    """Raises a ValueError unless `push` has its library and a name as the hub has them."""
    _library("--push needs")
    if not _NAME.fullmatch(name):
        raise ValueError(f"--push={name} must be USER/NAME, of letters, digits, '-', '_' and '.'")


def push(folder: pathlib.Path, name: str, *, private: bool) -> str:
    """Puts a folder on the hub as the model USER/NAME, which is made if need be; returns the address of its page."""
    check_push(name)
    hub = _library("--push needs").HfApi()
    try:
        page = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(PATTERNS))
    except Exception as error:
        raise ValueError(f"--push={name}: {_explained(error, None)}; the export itself is whole in {folder}") from error
    return str(page)


def _library(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{what} huggingface_hub: pip install 'detclipv2_jax[hub]' ({error})") from None
    return huggingface_hub


def _explained(error: Exception, revision: str | None) -> str:
    """Returns what an error of the library means, and what to do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "RevisionNotFoundError" in kinds:
        return f"the hub's model of that name has no revision {revision}; look at its page, or leave the revision out"
    if "GatedRepoError" in kinds:
        return "the hub gives it to those who asked: do so on its page, then `hf auth login`"
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return "the hub shows you no model of that name: check USER/NAME, or `hf auth login` if it is private"
    reason = str(error).strip().partition("\n")[0]
    return f"the hub fails ({type(error).__name__}: {reason}): check the network, or give the folder of an export"
