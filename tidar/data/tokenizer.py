"""Text to tokens: the tokenizer of a Hugging Face folder, or plain bytes."""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tidar.config import UserError, first_line
from tidar.config.hub import holds_tokenizer, local_folder, named
from tidar.data.pieces import BETWEEN_CHARACTERS, cut_pattern, cut_points

PIECE_BYTES = 2**18  # of a long text, tokenised at a time; the library takes 150 bytes of memory for each


class BytesTokenizer:
    """A token is a byte of UTF-8; 256 ends a text. Needs no file, and every text has tokens in it."""

    name = "bytes"
    size = 257
    end_of_text = 256
    digest = "bytes"
    chat_template = None
    cuts = BETWEEN_CHARACTERS

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Tokens of each text."""
        return [np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; U+FFFD where bytes are no whole character."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")

    def token(self, text: str) -> int | None:
        return None


class FolderTokenizer:
    """The tokenizer in a local folder, as transformers loads it.

    size: one more than its last id. end_of_text: the id of <|endoftext|>, else of its eos_token, None without either.
    digest: SHA-256 of all that determines the tokens. cuts: where a long text may be split, see `pieces.cut_pattern`.
    """

    def __init__(self, folder: Path):
        """Raises UserError where there is no tokenizer that can be loaded."""
        # processes share the work, not threads, which a fork for background workers would not survive
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer  # takes seconds, and bytes need none

        try:
            self.backend: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            vocabulary = self.backend.get_vocab()
        except Exception as error:  # files of any kind, read by a library
            reason = first_line(error)
            raise UserError(f"{folder}: its tokenizer cannot be read ({reason})", *_saved_by_newer(folder)) from None
        if not self.backend.is_fast:
            raise UserError(f"{folder}: its tokenizer must be a fast one, with a tokenizer.json or vocab.json")
        self.name = str(folder)
        self.size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary.get("<|endoftext|>", self.backend.eos_token_id)
        self.chat_template = self.backend.chat_template
        # packing truncates texts, not the tokenizer, whatever limits were saved with it
        self.backend.model_max_length = 10**30
        self.backend.backend_tokenizer.no_truncation()
        self.backend.backend_tokenizer.no_padding()
        state = json.loads(self.backend.backend_tokenizer.to_str())
        meaning = {name: state.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        self.digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
        self.cuts = cut_pattern(state)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Tokens of each text. A long one is tokenised in pieces."""
        if self.cuts and any(len(text) > PIECE_BYTES for text in texts):
            return [np.concatenate([self._encode([piece])[0] for piece in self._pieces(text)]) for text in texts]
        return self._encode(texts) if texts else []

    def _pieces(self, text: str) -> list[str]:
        content = text.encode("utf-8", "surrogatepass")
        ends = cut_points(content, self.cuts, PIECE_BYTES)
        return [content[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends)]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.backend.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens without special ones; U+FFFD where they end inside a character."""
        return self.backend.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token(self, text: str) -> int | None:
        """Id of the token that is written so, None where there is none."""
        return self.backend.get_vocab().get(text)


def _saved_by_newer(folder: Path) -> list[str]:
    """The line of an error that says so where transformers 5 saved a tokenizer and an older version is installed."""
    try:
        saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        is_newer = "backend" in saved or saved.get("tokenizer_class") == "TokenizersBackend"
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    version = importlib.metadata.version("transformers")
    if not is_newer or int(version.partition(".")[0]) >= 5:
        return []
    return [f"transformers 5 or later saved it, and transformers {version} is installed: upgrade transformers"]


Tokenizer = BytesTokenizer | FolderTokenizer


def load_tokenizer(name: str, option: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer "bytes", or that of a folder or hub id. Raises UserError, which names `option`, for any other."""
    if name == "bytes":
        return BytesTokenizer()
    folder = local_folder(name, option, "tokenizer")
    if not holds_tokenizer(folder):
        raise UserError(
            f"{named(option, name)}: must be bytes, a local folder with a tokenizer.json or vocab.json, "
            "or an id of the hub (ORG/NAME)"
        )
    return FolderTokenizer(folder)
