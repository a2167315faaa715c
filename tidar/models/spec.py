"""What a model is apart from its weights: its config.json, its tokenizer's files, and its mask token."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.config import Config, UserError
from tidar.models.config_json import decoder_config, read_config_json
from tidar.models.decoder import DecoderConfig
from tidar.models.sizes import TOKENIZER_SIZES, size_config

# inside a step's folder: everything of an exported model but its weights
ASSETS = "huggingface"
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


@dataclass(frozen=True)
class ModelSpec:
    """options: the model's config.json. decoder: what it describes.
    tokenizer: folder that holds the tokenizer's files, None where there is none.
    used_rows: ids below it belong to tokens; those from it on are free rows of the embedding.
    mask_token_id, mask_row_is_trained: the mask token, and whether its row is one that must not be overwritten.
    vocab_size_before: rows of the embedding that config.json knows, fewer than `decoder.vocab_size` where it has grown.
    """

    options: dict[str, Any]
    decoder: DecoderConfig
    tokenizer: Path | None
    used_rows: int
    mask_token_id: int
    mask_row_is_trained: bool
    vocab_size_before: int

    def write(self, folder: Path, tidar: dict[str, Any]) -> None:
        """Writes all of an exported model but its weights: config.json, generation_config.json, the tokenizer's files.

        tidar: what config.json keeps of the method, beside the mask token.
        """
        folder.mkdir()
        tidar = {**self.options.get("tidar", {}), **tidar, "mask_token_id": self.mask_token_id}
        if self.vocab_size_before < self.decoder.vocab_size:
            tidar["vocab_size_before_mask_token"] = self.vocab_size_before
        options = {**self.options, "vocab_size": self.decoder.vocab_size, "tidar": tidar}
        (folder / "config.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if self.tokenizer and (self.tokenizer / name).is_file():
                shutil.copyfile(self.tokenizer / name, folder / name)
        if not (folder / "generation_config.json").exists():
            ends = {name: options[name] for name in ("bos_token_id", "eos_token_id") if options.get(name) is not None}
            text = json.dumps({"_from_model_config": True, **ends}, indent=2) + "\n"
            (folder / "generation_config.json").write_text(text, encoding="utf-8")


def resolve_model(config: Config, data_ids: int) -> ModelSpec:
    """The model that model.hf_path or else model.name describes, with the mask token of tidar.mask_token_id.

    data_ids: number of token ids that the data may hold. Raises UserError for a model that is not supported, one that
    is not that of checkpoint.initial_load_path, and a mask token without a row.
    """
    folder = Path(config.model.hf_path) if config.model.hf_path else None
    origin = str(folder / "config.json") if folder else f"model.name = {config.model.name}"
    options = read_config_json(folder) if folder else size_config(config.model.name)
    start_folder = _config_folder(Path(config.checkpoint.initial_load_path)) if _starts_elsewhere(config) else None
    start_options = read_config_json(start_folder) if start_folder else options
    tokenizer = next((place for place in (folder, start_folder) if place and _tokenizer_files(place)), None)

    vocab_size = options.get("vocab_size")
    if tokenizer:
        used_rows = tokenizer_size(tokenizer)
    else:
        used_rows = TOKENIZER_SIZES.get(options.get("model_type"), 0)
        if not vocab_size or used_rows >= vocab_size:
            used_rows = data_ids  # nothing is known of the model's tokens but those of the data
    if not vocab_size:
        vocab_size = used_rows + 1
    decoder = decoder_config({**options, "vocab_size": vocab_size}, origin)
    if start_folder:
        _check_same_model(decoder, start_options, start_folder)

    recorded = [place["tidar"].get("mask_token_id") for place in (start_options, options) if place.get("tidar")]
    mask_token_id = config.tidar.mask_token_id
    if mask_token_id == -1:
        mask_token_id = recorded[0] if recorded else used_rows
        if mask_token_id >= vocab_size:
            decoder = dataclasses.replace(decoder, vocab_size=(mask_token_id // 64 + 1) * 64)
    elif mask_token_id >= vocab_size:
        raise UserError(
            f"tidar.mask_token_id = {mask_token_id}: must be from 0 to {vocab_size - 1}, a row of the embedding"
        )
    return ModelSpec(
        options=options,
        decoder=decoder,
        tokenizer=tokenizer,
        used_rows=min(used_rows, vocab_size),
        mask_token_id=mask_token_id,
        mask_row_is_trained=mask_token_id < used_rows or mask_token_id in recorded,
        vocab_size_before=vocab_size,
    )


def tokenizer_size(folder: Path) -> int:
    """One more than the last token id of the tokenizer in `folder`. Raises UserError where it cannot be read."""
    from transformers import AutoTokenizer  # takes seconds, and most runs of the debug model need none

    try:
        return max(AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab().values()) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from None


def _starts_elsewhere(config: Config) -> bool:
    return config.checkpoint.initial_load_path not in ("", config.model.hf_path)


def _config_folder(path: Path) -> Path | None:
    """Where the config.json of weights at `path` lies: a Hugging Face folder's own, or that kept in a step's folder."""
    return next((place for place in (path, path / ASSETS) if (place / "config.json").is_file()), None)


def _tokenizer_files(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _check_same_model(decoder: DecoderConfig, start_options: dict[str, Any], folder: Path) -> None:
    """The weights' own config.json must say what the model's does, where shapes do not show it too."""
    start = decoder_config(start_options, str(folder / "config.json"))
    for name, value in dataclasses.asdict(start).items():
        ours = dataclasses.asdict(decoder)[name]
        if ours != value and name not in ("vocab_size", "initializer_range"):
            raise UserError(
                f"checkpoint.initial_load_path: {folder / 'config.json'}: {name} is {value}, but the model's is "
                f"{ours}; name the model with model.hf_path = {folder}"
            )
