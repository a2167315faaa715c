"""Datasets on the Hugging Face hub, streamed by the library datasets.

data.paths names one as hf://datasets/OWNER/NAME[@REVISION][/SUBSET[/SPLIT]]; the split is train where none is named. A
part is a shard, which is a file of the dataset. Its name in messages and in the plan of prepared data holds the commit:
hf://datasets/OWNER/NAME@COMMIT/SUBSET/SPLIT/00003-of-00012.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

from tidar.config import UserError, first_line
from tidar.config.hub import hub_errors
from tidar.config.packages import install
from tidar.data.corpus import BadDocument
from tidar.data.source import unreadable

FORM = "hf://datasets/OWNER/NAME[@REVISION][/SUBSET[/SPLIT]]"
ADDRESS = re.compile(
    r"hf://datasets/(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(convert|pr)/[^/@]+|[^/@]+))?"
    r"(/(?P<subset>[^/]+)(/(?P<split>[^/]+))?)?",
    re.ASCII,
)


def is_on_hub(path: str) -> bool:
    return path.startswith("hf://")


def find_shards(path: str) -> list[str]:
    """Names of a dataset's shards, in order, at the commit that its revision has now.

    Raises UserError for a dataset, subset or split that is not there or cannot be read, and where the hub cannot be
    reached.
    """
    match = ADDRESS.fullmatch(path)
    if not match:
        raise UserError(f"{path}: must be {FORM}")
    datasets = _datasets(path)
    repo_id, revision, subset = match["id"], match["revision"] or "main", match["subset"]
    with hub_errors(path, repo_id, revision, "dataset"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import LocalEntryNotFoundError

        commit = HfApi().dataset_info(repo_id, revision=revision).sha
        HfApi().auth_check(repo_id, repo_type="dataset")  # dataset_info answers for gated datasets too
        try:
            name, splits = _open(repo_id, str(commit), subset)
        except LocalEntryNotFoundError:  # no connection; it is a ValueError too, so it comes before the next clause
            raise
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise UserError(
                f"{path}: is defined by a loading script, which is never run; the hub may have its rows as Parquet: "
                f"hf://datasets/{repo_id}@refs/convert/parquet"
            ) from None
        except ValueError as error:
            names = datasets.get_dataset_config_names(repo_id, revision=commit)
            if subset in names or (not subset and len(names) == 1):
                raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
            problem = f"has no subset {subset}" if subset else "has several subsets"
            raise UserError(f"{path}: {problem}: must be one of {', '.join(names)} ({FORM})") from None
        except FileNotFoundError as error:
            raise UserError(f"{path}: holds no data ({first_line(error)})") from None
    split = match["split"] or "train"
    if split not in splits:
        raise UserError(f"{path}: has no split {split}: must be one of {', '.join(splits)} ({FORM})")
    count = splits[split].num_shards
    return [f"hf://datasets/{repo_id}@{commit}/{name}/{split}/{i:05}-of-{count:05}" for i in range(count)]


def read_shard(name: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any] | BadDocument]:
    """The rows of a shard, with those of these columns that exist; with all columns if none exists.

    Of a damaged one the last item is a BadDocument. Raises UserError where the hub does not answer.
    """
    address, _, shard = name.rpartition("/")
    number, count = map(int, shard.split("-of-"))
    match = ADDRESS.fullmatch(address)
    assert match
    datasets = _datasets(name)
    with hub_errors(name, match["id"], match["revision"], "dataset"):
        rows = _open(match["id"], match["revision"], match["subset"])[1][match["split"]].shard(count, number)
        there = [column for column in columns if column in (rows.column_names or [])]
        rows = rows.select_columns(there) if there else rows
        rows = rows.decode(False) if rows.features else rows  # pictures and sounds stay bytes
        try:
            yield from rows
        except OSError:
            raise
        except (ValueError, datasets.exceptions.DatasetsError) as error:  # of its content
            yield unreadable(error)


@functools.lru_cache(maxsize=8)
def _open(repo_id: str, commit: str, subset: str | None) -> tuple[str, dict[str, Any]]:
    """The name of a subset, and its splits as streams."""
    builder = _datasets(repo_id).load_dataset_builder(repo_id, subset, revision=commit)
    if builder.hash != commit:  # without an answer of the hub, datasets silently takes what it has prepared before
        raise ConnectionError("the hub did not answer")
    return builder.config.name, builder.as_streaming_dataset()


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: needs datasets: {install('data')}") from None
    return datasets
