"""The replaced script's data: a file saved with torch.save for each document, `input_ids` and `loss_mask` in a dict."""

import os
from collections.abc import Iterator

import numpy as np
import torch

from tidar.data.corpus import BadDocument, Document
from tidar.data.source import Part, Source, find_files

FILES_IN_A_PART = 256
MOST_IDS = 2**24  # no vocabulary has more


class Gumiho(Source):
    """Folders of .ckpt files, searched at any depth. Other keys, as a `hidden_state`, are never read into memory."""

    needs_tokenizer = False

    def parts(self, paths: list[str]) -> list[Part]:
        found = []
        for group, path in enumerate(paths):
            files = find_files(path, (".ckpt",))
            for first in range(0, len(files), FILES_IN_A_PART):
                found.append(Part(group, tuple(files[first : first + FILES_IN_A_PART])))
        return found

    def documents(self, part: Part) -> Iterator[Document | BadDocument]:
        for file in part.files:
            try:
                yield self._read(file)
            except BadDocument as error:
                yield error

    def _read(self, file: str) -> Document:
        try:
            if os.path.getsize(file) == 0:
                raise BadDocument("is empty")
            # mapped: of tensors that are not touched nothing is read; no code of a pickle is run
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except BadDocument:
            raise
        except Exception as error:  # whatever a damaged or malicious file leads to
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadDocument(f"cannot be read safely as a file of torch.save: {reason}") from None
        if not isinstance(saved, dict):
            raise BadDocument(f"holds a {type(saved).__name__}: must be a dict with input_ids and loss_mask")
        tokens, targets = (_vector(saved, key) for key in ("input_ids", "loss_mask"))
        if len(tokens) != len(targets):
            raise BadDocument(
                f"has {len(tokens)} input_ids and {len(targets)} values of loss_mask: must be equally many"
            )
        if not len(tokens):
            raise BadDocument("holds no tokens")
        if tokens.dtype.kind not in "iu":
            raise BadDocument(f"input_ids are {tokens.dtype}: must be integers")
        limit = self.tokenizer.size if self.tokenizer else self.vocab_size or MOST_IDS
        if tokens.min() < 0 or tokens.max() >= limit:
            wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise BadDocument(f"holds the token {wrong}: must be from 0 to {limit - 1}")
        if not np.isin(targets, (0, 1)).all():
            raise BadDocument("loss_mask holds other values than 0 and 1")
        return Document(tokens, targets.astype(bool))


def _vector(saved: dict, key: str) -> np.ndarray:
    """A copy of what is saved under `key`, `[S]`."""
    if key not in saved:
        raise BadDocument(f"has no {key}")
    try:
        value = torch.as_tensor(saved[key]).detach()
        if value.ndim == 2 and value.shape[0] == 1:
            value = value[0]
        if value.ndim != 1:
            raise BadDocument(f"{key} has shape {list(value.shape)}: must be [S] or [1, S]")
        # a tensor of a few bytes can claim to be large
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise BadDocument(f"{key} has {value.numel()} values, more than the file holds of it")
        return (value.float() if value.is_floating_point() else value).numpy().copy()
    except BadDocument:
        raise
    except Exception as error:  # a tensor can be of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadDocument(f"{key} must be numbers of shape [S] or [1, S] ({reason})") from None
