"""A model apart from its weights: its config.json, its tokenizer's files and its mask token."""

import dataclasses
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.config import Config, UserError
from tidar.config.hub import TOKENIZER_FILES, holds_tokenizer, local_folder
from tidar.models.decoder import DecoderConfig
from tidar.models.huggingface.card import describe_base
from tidar.models.huggingface.config_json import decoder_config, read_config_json
from tidar.models.sizes import TOKENIZER_SIZES, size_config

# inside a step's folder: everything of an exported model but its weights
ASSETS = "huggingface"


@dataclass(frozen=True)
class ModelSpec:
    """options: the model's config.json. decoder: what it describes.
    folder: may hold a generation_config.json. tokenizer: folder of the tokenizer's files. None: no folder.
    used_rows: rows of the embedding that belong to tokens; the rows after them are free.
    mask_token_id, mask_row_is_trained: the mask token, and whether its row is trained and must not be overwritten.
    vocab_size_before: rows of the embedding by config.json, fewer than `decoder.vocab_size` if it has grown.
    trained_with: the section `tidar` of the config.json of the first weights, empty where there is none.
    end_of_turn: the token that ends what the model says in a chat, None where it is not trained on chats.
    """

    options: dict[str, Any]
    decoder: DecoderConfig
    folder: Path | None
    tokenizer: Path | None
    used_rows: int
    mask_token_id: int
    mask_row_is_trained: bool
    vocab_size_before: int
    trained_with: dict[str, Any]
    end_of_turn: int | None = None

    def write(self, folder: Path, tidar: dict[str, Any]) -> None:
        """Writes an exported model without its weights: config.json, generation_config.json, the tokenizer's files.

        tidar: options of the method that config.json keeps, in addition to the mask token.
        """
        folder.mkdir()
        before = self.options.get("tidar") or {}
        base = describe_base(self.folder) if self.folder and not before else {}
        tidar = {**({"base": base} if base else {}), **before, **tidar, "mask_token_id": self.mask_token_id}
        if self.vocab_size_before < self.decoder.vocab_size:
            tidar["vocab_size_before_mask_token"] = self.vocab_size_before
        options = {**self.options, "vocab_size": self.decoder.vocab_size, "tidar": tidar}
        _write_json(folder / "config.json", options)
        files = [self.tokenizer / name for name in TOKENIZER_FILES] if self.tokenizer else []
        files += [self.folder / "generation_config.json"] if self.folder else []
        for file in files:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        generation = folder / "generation_config.json"
        if not generation.exists():
            ends = {name: options[name] for name in ("bos_token_id", "eos_token_id") if options.get(name) is not None}
            _write_json(generation, {"_from_model_config": True, **ends})
        if self.end_of_turn is not None:
            _add_end_token(generation, self.end_of_turn, options.get("eos_token_id"))


@dataclass(frozen=True)
class ModelFiles:
    """The folders that describe a model. Only their config.json has been read and checked.

    options: the model's config.json. origin: names it in messages. folder: the model's, None for a size by name.
    start_options, start_folder: the same of checkpoint.initial_load_path, if it has a config.json of its own.
    tokenizer: folder of the tokenizer: data.tokenizer, the model's or that of the first weights.
    trained_with: see `ModelSpec`.
    """

    options: dict[str, Any]
    origin: str
    folder: Path | None
    start_options: dict[str, Any]
    start_folder: Path | None
    tokenizer: str | None
    trained_with: dict[str, Any]


def read_model(config: Config) -> ModelFiles:
    """Reads the config.json of model.hf_path, or else of model.name, and that of checkpoint.initial_load_path.

    Those that are ids of the hub are downloaded, without weights, if the cache has not got them.

    Raises UserError as `decoder_config` does.
    """
    folder = local_folder(config.model.hf_path, "model.hf_path", "config") if config.model.hf_path else None
    origin = str(folder / "config.json") if folder else f"model.name = {config.model.name}"
    options = read_config_json(folder) if folder else size_config(config.model.name)
    start_folder = None
    starts_elsewhere = config.checkpoint.initial_load_path not in ("", config.model.hf_path)
    if starts_elsewhere:
        start = local_folder(config.checkpoint.initial_load_path, "checkpoint.initial_load_path", "config")
        start_folder = _config_folder(start)
    start_options = read_config_json(start_folder) if start_folder else {}
    for path, content in ((folder, options), (start_folder, start_options)):
        if path:
            decoder_config(content, str(path / "config.json"))
            _recorded_mask_token(content, str(path / "config.json"))
    folders = [str(path) for path in (folder, start_folder) if path and holds_tokenizer(path)]
    named = config.data.tokenizer if config.data.tokenizer != "bytes" else ""
    named = named and str(local_folder(named, "data.tokenizer", "tokenizer"))
    tokenizer = named or (folders[0] if folders else None)
    section = (start_options if starts_elsewhere else options).get("tidar")
    trained_with = section if isinstance(section, dict) else {}
    return ModelFiles(options, origin, folder, start_options, start_folder, tokenizer, trained_with)


def resolve_model(files: ModelFiles, mask_token_id: int, data_ids: int, tokenizer_size: int | None) -> ModelSpec:
    """The model that `files` describe. mask_token_id: -1 for the first id after the tokenizer's last.

    data_ids: number of token ids that the data may hold. tokenizer_size: ids of the tokenizer in `files.tokenizer`.
    Raises UserError for a model that is not that of checkpoint.initial_load_path, and a mask token without a row.
    """
    vocab_size = files.options.get("vocab_size")
    if tokenizer_size:
        used_rows = tokenizer_size
    else:
        used_rows = TOKENIZER_SIZES[files.options["model_type"]]
        if not vocab_size or used_rows >= vocab_size:
            used_rows = data_ids  # only the data's tokens are known
    if not vocab_size:
        vocab_size = used_rows + 1
    decoder = decoder_config({**files.options, "vocab_size": vocab_size}, files.origin)
    if files.start_folder:
        _check_same_model(decoder, files.start_options, files.start_folder)
    found = (_recorded_mask_token(options, "") for options in (files.start_options, files.options))
    recorded = [number for number in found if number is not None]
    if mask_token_id == -1:
        mask_token_id = recorded[0] if recorded else used_rows
        if mask_token_id >= vocab_size:
            decoder = dataclasses.replace(decoder, vocab_size=(mask_token_id // 64 + 1) * 64)
    elif mask_token_id >= vocab_size:
        raise UserError(
            f"tidar.mask_token_id = {mask_token_id}: must be from 0 to {vocab_size - 1}, a row of the embedding"
        )
    return ModelSpec(
        options=files.options,
        decoder=decoder,
        folder=files.folder or files.start_folder,
        tokenizer=Path(files.tokenizer) if files.tokenizer else None,
        used_rows=min(used_rows, vocab_size),
        mask_token_id=mask_token_id,
        mask_row_is_trained=mask_token_id < used_rows or mask_token_id in recorded,
        vocab_size_before=vocab_size,
        trained_with=files.trained_with,
    )


def recorded_model(step: Path) -> tuple[DecoderConfig, int | None]:
    """Decoder and mask token of the model in a step's folder. Raises UserError where its config.json is damaged."""
    options = read_config_json(step / ASSETS)
    origin = str(step / ASSETS / "config.json")
    return decoder_config(options, origin), _recorded_mask_token(options, origin)


def model_differences(before: DecoderConfig, now: DecoderConfig, ignored: Collection[str] = ()) -> list[str]:
    """The options in which two decoders differ, each as "name: before -> now"."""
    pairs = {name: (value, getattr(now, name)) for name, value in vars(before).items() if name not in ignored}
    return [f"{name}: {first} -> {second}" for name, (first, second) in pairs.items() if first != second]


def _recorded_mask_token(options: dict[str, Any], origin: str) -> int | None:
    """The mask token in the config.json of a model that TiDAR has trained."""
    tidar = options.get("tidar") or {}
    number = tidar.get("mask_token_id") if isinstance(tidar, dict) else tidar
    if number is not None and not (type(number) is int and 0 <= number < options["vocab_size"]):
        raise UserError(f"{origin}: tidar = {json.dumps(tidar)}: must keep a mask_token_id below vocab_size")
    return number


def _add_end_token(path: Path, token: int, default: int | list[int] | None) -> None:
    """Adds a token to eos_token_id of a generation_config.json, which is `default` where the file has none."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        ends = options.get("eos_token_id", default)
    except (ValueError, AttributeError):
        return  # no generation_config.json that anything reads
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if token not in ends:
        _write_json(path, {**options, "eos_token_id": [*ends, token]})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def assets_folder(path: Path) -> Path:
    """Where config.json and the tokenizer of a model at `path` are: a Hugging Face folder, or a step's folder."""
    return path / ASSETS if (path / ASSETS).is_dir() else path


def _config_folder(path: Path) -> Path | None:
    """Folder of the config.json of weights at `path`, which is a Hugging Face folder, a step's folder or a file."""
    places = (path.parent,) if path.is_file() else (path, path / ASSETS)
    return next((place for place in places if (place / "config.json").is_file()), None)


def _check_same_model(decoder: DecoderConfig, start_options: dict[str, Any], folder: Path) -> None:
    """Raises UserError unless the config.json of the first weights describes the same decoder."""
    start = decoder_config(start_options, str(folder / "config.json"))
    # the vocabulary may grow, and loaded weights are not initialized
    if found := model_differences(start, decoder, ignored=("vocab_size", "initializer_range")):
        raise UserError(
            f"checkpoint.initial_load_path: {folder / 'config.json'} is of another model than the run's: "
            f"{'; '.join(found)}",
            f"name the model of the weights with model.hf_path = {folder}",
        )
