"""Models by their id on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION, wherever a folder can be named.

The hub's cache comes first: an id that is in it is used as it is there, without a call. Only files that are read are
downloaded: config.json, the tokenizer, generation_config.json and safetensors.
"""

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tidar.config.errors import UserError, named_error

Needs = Literal["weights", "config", "tokenizer"]

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
CONFIG_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
SIGN_IN = "set HF_TOKEN, or sign in with huggingface-cli login"

# what rank 0 has found: the commit of an id, None for a folder
_pinned: dict[str, str | None] = {}


def pin(found: dict[str, str | None]) -> None:
    """Makes names stand for what rank 0 has found, whatever is in this node's cache: commits, None for a folder."""
    _pinned.update(found)


def hub_id(name: str | Path) -> re.Match[str] | None:
    """The parts of a name that is an id and nothing on this machine: `id` and `revision`."""
    return None if os.path.lexists(name) else HUB_ID.fullmatch(str(name))


def named(option: str, value: object) -> str:
    """An option and its value for a message, as in a TOML file or as on the command line. option: may be empty."""
    return f"{option} = {value}" if "." in option else f"{option} {value}".strip()


def local_folder(name: str | Path, option: str = "", needs: Needs = "weights") -> Path:
    """The folder, or file, called `name`, or else that of the hub's model of this id, downloaded where it has to be.

    option: names it in messages. Raises UserError where neither this machine nor the hub has it.
    """
    match, where = hub_id(name), named(option, name)
    if not match:
        if not os.path.lexists(name):
            bytes_too = ", nor bytes" * (needs == "tokenizer")
            raise UserError(f"{where}: does not exist, and is no id of the hub (ORG/NAME){bytes_too}")
        return Path(name)
    if _pinned.get(str(name), "") is None:
        raise UserError(f"{where}: is a folder on the node of rank 0, but not on this one")
    if cached := cached_folder(name, needs):
        return cached
    return _download(match["id"], _revision(name, match), where, needs)


def cached_folder(name: str | Path, needs: Needs = "weights") -> Path | None:
    """The folder of an id in the hub's cache, None where it misses files that the hub may have."""
    match = hub_id(name)
    folder = _snapshot(match["id"], _revision(name, match)) if match else None
    has_all = folder and _holds(folder, needs) and _holds(folder, "tokenizer")
    return folder if has_all else None


def commit_of(name: str | Path, folder: Path) -> str | None:
    """The commit of an id whose folder in the cache is `folder`; None for a folder's own name."""
    return folder.name if hub_id(name) else None


def _revision(name: str | Path, match: re.Match[str]) -> str:
    return _pinned.get(str(name)) or match["revision"] or "main"


def _snapshot(repo_id: str, revision: str) -> Path | None:
    """The folder of a revision in the hub's cache, whole or not."""
    from huggingface_hub import snapshot_download  # takes a second, and folders need none
    from huggingface_hub.errors import HFValidationError

    try:
        # with a pattern that nothing matches, no file is missed: what is needed is looked for by `_holds`
        path = snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[".tidar"])
    except (OSError, HFValidationError):
        return None
    return Path(path)


def _download(repo_id: str, revision: str, where: str, needs: Needs) -> Path:
    files = CONFIG_FILES + WEIGHT_FILES if needs == "weights" else CONFIG_FILES
    held = _snapshot(repo_id, revision)
    try:
        folder = _downloaded(repo_id, where, revision, list(files))
    except UserError:
        if held and _holds(held, needs):
            return held
        raise
    if not _holds(folder, needs):
        missing = {"weights": "weights in safetensors files", "config": "config.json", "tokenizer": "tokenizer.json"}
        raise UserError(f"{where}: the hub's model holds no {missing[needs]} (downloaded to {folder})")
    return folder


def _downloaded(repo_id: str, where: str, revision: str, files: list[str]) -> Path:
    """The folder of a revision in the cache, after those of `files` that it has have been downloaded."""
    import huggingface_hub

    with hub_errors(where, repo_id, revision):
        # where the hub does not answer, snapshot_download would return what the cache has, whole or not
        huggingface_hub.HfApi().repo_info(repo_id, revision=revision)
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=files))


@contextmanager
def hub_errors(where: str, repo_id: str, revision: str, kind: Literal["model", "dataset"] = "model") -> Iterator[None]:
    """Turns what the hub's libraries raise about a model or a dataset into a UserError of one line.

    where: the option and its value, with which the line begins.
    """
    from huggingface_hub import constants, errors

    no_folder, near, prefix = "", "", "datasets/"
    if kind == "model":
        no_folder, near, prefix = "no folder is there, and ", _near(repo_id), ""
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{prefix}{repo_id}"
        raise UserError(f"{where}: is gated: accept its terms at {page}, then {SIGN_IN}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{where}: {no_folder}the hub shows no such {kind}: if it is private, {SIGN_IN}{near}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{where}: the hub's {kind} has no revision {revision}: must be a branch, a tag or a commit"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{where}: is no folder and no id of the hub ({named_error(error)})") from None
    except Exception as error:  # of any of the libraries that it downloads with
        cause = error.__cause__ or error
        if constants.HF_HUB_OFFLINE or isinstance(cause, errors.OfflineModeIsEnabled):
            held = f"no folder is there, revision {revision} is not whole in the hub's cache, and " * (kind == "model")
            raise UserError(f"{where}: {held}HF_HUB_OFFLINE forbids a download: unset it{near}") from None
        if getattr(getattr(cause, "response", None), "status_code", 0) in (401, 403):
            raise UserError(f"{where}: the hub denies access ({named_error(cause)}): {SIGN_IN}") from None
        raise UserError(
            f"{where}: {no_folder}it cannot be downloaded ({named_error(cause)}): start again when "
            f"{constants.ENDPOINT} can be reached; finished {'files' if kind == 'model' else 'parts'} are kept{near}"
        ) from None


def _near(repo_id: str) -> str:
    """For a misspelt folder: the end of a message that names the closest folder in the same place."""
    parent, name = os.path.split(repo_id)
    try:
        names = os.listdir(parent)
    except OSError:
        return ""
    match = difflib.get_close_matches(name, names, n=1)
    return f"; the folder {parent} holds {match[0]}" if match else f"; the folder {parent} has no {name}"


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _holds(folder: Path, needs: Needs) -> bool:
    """Whether a folder has what is needed; of weights, all files of the index."""
    if needs == "tokenizer":
        return holds_tokenizer(folder)
    if needs == "config" or not (folder / "config.json").is_file():
        return (folder / "config.json").is_file()
    if (folder / "model.safetensors").is_file():
        return True
    try:
        text = (folder / "model.safetensors.index.json").read_text(encoding="utf-8")
    except OSError:
        return False
    files = set(re.findall(r'"([^"/]+\.safetensors)"', text))
    return bool(files) and all((folder / file).is_file() for file in files)
