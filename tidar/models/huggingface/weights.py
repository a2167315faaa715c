"""Weights in: from Hugging Face folders, 16-bit state dicts and distributed checkpoints, straight into shards."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from tidar.config import UserError, first_line
from tidar.config.files import parse_json
from tidar.config.hub import local_folder, named
from tidar.models.decoder import Decoder
from tidar.models.huggingface.checkpoint_files import CheckpointTensors
from tidar.models.huggingface.config_json import decoder_config, read_config_json, refuse_other_folders
from tidar.models.huggingface.layout import RowRange, pieces, published_name, published_shapes, row_ranges
from tidar.models.huggingface.manifest import check_whole
from tidar.models.huggingface.spec import ModelSpec, assets_folder
from tidar.models.shards import local_blocks

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAFETENSORS_FLOATS = ("F32", "BF16", "F16", "F64")
EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"
VOCABULARY_ROWS = (EMBEDDING, OUTPUT)


def _prefix(names: Iterable[str]) -> str:
    """The prefix that all names share: `module.` after DDP, `_orig_mod.` after torch.compile, or more."""
    embedding = next((name for name in names if name.endswith(EMBEDDING)), EMBEDDING)
    prefix = embedding.removesuffix(EMBEDDING).removesuffix("model.")
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _with_model(name: str, names: Iterable[str]) -> str:
    """The published name of a tensor. A model saved without its head has no `model.` before the names."""
    return published_name(name) if EMBEDDING in names else name


def _other_dtype(path: Path, name: str, dtype: str) -> UserError:
    return UserError(f"{path}: {name} is {dtype}: must be bfloat16, float16, float32 or float64, not quantised")


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: of its one safetensors file or of those that its index names."""

    def __init__(self, folder: Path):
        """Raises UserError for an index or file that is missing, damaged or contradicts the other."""
        self.path = folder
        index = folder / "model.safetensors.index.json"
        # as in transformers, a single file takes precedence over an index
        weight_map = _read_index(index) if index.is_file() and not (folder / "model.safetensors").is_file() else None
        files = sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]
        self.slices: dict[str, Any] = {}
        held: dict[str, str] = {}
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"{folder / file}: is missing" + (f"; {index.name} names it" if weight_map else ""))
            try:
                handle = safe_open(folder / file, framework="pt")
                names = list(handle.keys())
                self.slices |= {name: handle.get_slice(name) for name in names}
                held |= dict.fromkeys(names, file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / file}: is not a whole safetensors file ({error})") from None
        for name, file in (weight_map or {}).items():
            # a tied output weight may be named and not saved; where it is not tied, check_weights misses it
            if held.get(name) != file and name != OUTPUT:
                raise UserError(f"{folder / file}: misses {name}, which {index.name} says it holds")
        for name, part in self.slices.items():
            if part.get_dtype() not in SAFETENSORS_FLOATS:
                raise _other_dtype(folder / held[name], name, part.get_dtype())
        prefix = _prefix(self.slices)
        if prefix:
            raise UserError(
                f"{folder}: the names of all its tensors begin with {prefix}: strip it, and save them again"
            )
        self.slices = {_with_model(name, self.slices): part for name, part in self.slices.items()}
        self.shapes = {name: tuple(part.get_shape()) for name, part in self.slices.items()}

    def rows(self, name: str, start: int, stop: int, columns: slice | None = None) -> Tensor:
        """Rows of a tensor, or some of their columns, read from the file."""
        return self.slices[name][start:stop] if columns is None else self.slices[name][start:stop, columns]


class StateDictFile:
    """The tensors of a state dict saved with torch.save: pytorch_model.bin. Executes no code of it.

    The file is mapped, not read. Names may share a prefix: that of the attribute that held the model.
    """

    def __init__(self, path: Path):
        """Raises UserError for what is not a dict of tensors by name."""
        self.path = path
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged or malicious pickle may raise anything
            reason = first_line(error)
            raise UserError(f"{path}: is not a state dict that can be read safely ({reason})") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
            for name, tensor in tensors.items()
        ):
            raise UserError(f"{path}: must be a state dict: dense tensors by name, saved with torch.save")
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOAT_TYPES:
                raise _other_dtype(path, name, str(tensor.dtype).removeprefix("torch."))
        prefix = _prefix(tensors)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        self.tensors = {_with_model(name, tensors): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int, columns: slice | None = None) -> Tensor:
        """Rows of a tensor, or some of their columns, mapped from the file."""
        return self.tensors[name][start:stop] if columns is None else self.tensors[name][start:stop, columns]


class StepFolder:
    """The model in a step's folder of a run. Its tensors are the decoder's parameters, fused ones too."""

    def __init__(self, folder: Path):
        self.path = folder
        self.tensors = CheckpointTensors(folder)
        self.names = {
            published_name(name.removeprefix("model.")): name
            for name in self.tensors.shapes
            if name.startswith("model.")
        }
        self.shapes = {name: self.tensors.shapes[saved] for name, saved in self.names.items()}

    def rows(self, name: str, start: int, stop: int, columns: slice | None = None) -> Tensor:
        """Rows of a tensor, or some of their columns, read from the files."""
        rows = self.tensors.rows(self.names[name], start, stop)
        return rows if columns is None else rows[:, columns]

    def published_pieces(self, parts: list[tuple[str, RowRange]]) -> Iterator[Tensor]:
        """All rows of a published tensor, a few at a time. parts: as `published_ranges` has them."""
        for parameter, rows in parts:
            name = published_name(parameter)
            for start, stop in pieces(self.shapes[name], rows.at, rows.at + rows.length):
                yield self.rows(name, start, stop)


Weights = SafetensorsFolder | StateDictFile | StepFolder


def open_weights(path: str, option: str = "") -> Weights | None:
    """The weights at `path`: a Hugging Face folder, an id of the hub, a step's folder or a file of torch.save.

    None for a folder with a config.json and no weights. option: names it in messages. Raises UserError where there is
    nothing of these.
    """
    found = local_folder(path, option)
    if found.is_file():
        return StateDictFile(found)
    refuse_other_folders(found)
    if any(found.glob("*.safetensors*")):
        return SafetensorsFolder(found)
    if (found / ".metadata").is_file():
        return StepFolder(found)
    if (found / "pytorch_model.bin").is_file():
        return StateDictFile(found / "pytorch_model.bin")
    others = [file.name for end in ("bin", "index.json", "pt", "pth", "gguf") for file in found.glob(f"*.{end}")]
    if others:
        raise UserError(f"{found}: its weights, {min(others)}, must be model.safetensors or pytorch_model.bin")
    if (found / "config.json").is_file():
        return None
    raise UserError(
        f"{named(option, found)}: must be a Hugging Face folder (config.json, model.safetensors), a checkpoint's "
        "step-<n> or a state dict in a file"
    )


def check_weights(weights: Weights, model: Decoder, vocab_size: int | None = None) -> int:
    """Raises UserError, naming the tensor, unless the weights are exactly those of `model`, on any device.

    vocab_size: another number of rows that the vocabulary may have there. Returns the number that it has.
    """
    expected = {name: model.shard.whole_shape(name, parameter.shape) for name, parameter in model.named_parameters()}
    if isinstance(weights, StepFolder):
        expected = {published_name(name): shape for name, shape in expected.items()}
    else:
        expected = published_shapes(expected, model.config)
    found = weights.shapes
    embedding = published_name("embed_tokens.weight")
    rows = model.config.vocab_size
    if vocab_size is not None and found.get(embedding) == (vocab_size, model.config.dim):
        rows = vocab_size
    expected[embedding] = (rows, model.config.dim)
    if "lm_head.weight" in expected or (model.config.tie_embeddings and "lm_head.weight" in found):
        # tied, it may be saved a second time
        expected["lm_head.weight"] = (rows, model.config.dim)
    for what, names in (("misses", expected.keys() - found.keys()), ("has", found.keys() - expected.keys())):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            model_has = "" if what == "misses" else ", which the model does not have"
            raise UserError(f"{weights.path}: {what} the tensor {min(names)}{others}{model_has}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{weights.path}: {name} has shape {list(found[name])}: must be {list(shape)}")
    return rows


@torch.no_grad()
def load_weights(model: Decoder, weights: Weights, vocab_size: int | None = None) -> int:
    """Copies weights into the parameters of `model`, of any dtype, sharded or not.

    Returns how many rows of the vocabulary they fill, as `check_weights` does, which see for `vocab_size`. A rank reads
    the rows that it keeps, a piece at a time. Raises UserError as `check_weights` does, and for an output weight that
    differs from the embedding where the two are tied.
    """
    vocab_size = check_weights(weights, model, vocab_size)
    for name, parameter in model.named_parameters():
        n_rows = vocab_size if name in VOCABULARY_ROWS else model.shard.whole_shape(name, parameter.shape)[0]
        if isinstance(weights, StepFolder):
            ranges = [RowRange(published_name(name), 0, n_rows, 0)]
        else:
            ranges = row_ranges(name, n_rows, model.config)
        for rows in ranges:
            for local, start, columns in _pieces(model, name, rows.at, rows.at + rows.length):
                start += rows.start - rows.at
                values = weights.rows(rows.name, start, start + len(local), columns)
                if values.dtype not in FLOAT_TYPES:
                    raise UserError(f"{weights.path}: {rows.name} is {values.dtype}: must be floating-point")
                local.copy_(values)
    if model.config.tie_embeddings and "lm_head.weight" in weights.shapes:
        _check_tied(model, weights, vocab_size)
    return vocab_size


@torch.no_grad()
def fill_new_rows(model: Decoder, spec: ModelSpec, loaded_rows: int, mask_row: bool) -> None:
    """Gives the rows of the vocabulary from `loaded_rows` on the mean of the used ones, and the embedding of the mask
    token too where `mask_row` says so.
    """
    for name in VOCABULARY_ROWS:
        if name not in dict(model.named_parameters()):
            continue
        new = set(range(loaded_rows, spec.decoder.vocab_size))
        if mask_row and name == "embed_tokens.weight":
            new.add(spec.mask_token_id)
        if new:
            mean = _mean_of_rows(model, name, spec.used_rows)
            for local, start, _ in _pieces(model, name, 0, spec.decoder.vocab_size):
                for row in new & set(range(start, start + len(local))):
                    local[row - start] = mean


def open_model(folder: Path) -> tuple[Decoder, Weights]:
    """The model of a Hugging Face folder or a checkpoint's step-<n>, on the meta device, and its weights.

    Raises UserError as `from_pretrained` does, but for weights that are not the model's.
    """
    config_folder = assets_folder(folder)
    config = decoder_config(read_config_json(config_folder), str(config_folder / "config.json"))
    weights = open_weights(str(folder))
    if weights is None:
        raise UserError(f"{folder}: holds no weights: no model.safetensors, no index and no pytorch_model.bin")
    if isinstance(weights, StepFolder):
        check_whole(folder, str(folder))
    with torch.device("meta"):
        return Decoder(config), weights


def from_pretrained(path: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The model in a Hugging Face folder, on the hub or in a checkpoint's step-<n>, as one module on `device`.

    Its `forward(input_ids, position_ids=None, mask=None)` returns logits `[batch, positions, vocab]`; no mask is
    causal. Raises UserError for a folder without a config.json or weights, for a checkpoint that is not whole, and for
    an architecture or weights that are not supported, and as `local_folder` does.
    """
    model, weights = open_model(local_folder(path))
    model.to(dtype).to_empty(device=device)
    load_weights(model, weights)
    return model.eval()


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("a file's name is not a text")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: is not an index of safetensors files ({error})") from None
    return weight_map


def _pieces(model: Decoder, name: str, start: int, stop: int) -> Iterator[tuple[Tensor, int, slice | None]]:
    """This rank's part of rows `start` to `stop` of a parameter, in pieces: (the rows, index of the first, columns).

    columns: None where it has all of them.
    """
    local, blocks = local_blocks(model.shard, name, model.get_parameter(name))
    has_all = model.shard.whole_shape(name, local.shape)[1:] == local.shape[1:]
    for block in blocks:
        columns = None if has_all else slice(block.column, block.column + local.shape[1])
        for begin, end in pieces(local.shape, max(start, block.row), min(stop, block.row + block.length)):
            at = begin - block.row + block.at
            yield local[at : at + end - begin], begin, columns


def _mean_of_rows(model: Decoder, name: str, end: int) -> Tensor:
    """Mean of rows 0 to `end`, summed in float64 over all ranks, `[dim]`."""
    parameter = model.get_parameter(name)
    total = torch.zeros(parameter.shape[1], dtype=torch.float64, device=parameter.device)
    for local, *_ in _pieces(model, name, 0, end):
        total += local.sum(dim=0, dtype=torch.float64)
    return _sum_over_shards(total, model, name) / end


def _sum_over_shards(value: Tensor, model: Decoder, name: str) -> Tensor:
    """Sum of a value over the ranks that share the rows of a parameter; replicas of it hold the same value."""
    parameter = model.get_parameter(name)
    if isinstance(parameter, DTensor):
        placements = [Partial() if isinstance(one, Shard) else one for one in parameter.placements]
        value = DTensor.from_local(value, parameter.device_mesh, placements, run_check=False).full_tensor()
    return model.shard.total(value)


def _check_tied(model: Decoder, weights: Any, vocab_size: int) -> None:
    """Raises UserError where the file's output weight differs from its embedding. Ranks agree on the answer."""
    names = published_name(EMBEDDING), OUTPUT
    different = torch.zeros((), device=model.get_parameter(EMBEDDING).device)
    for local, start, _ in _pieces(model, EMBEDDING, 0, vocab_size):
        first, second = (weights.rows(name, start, start + len(local)) for name in names)
        different += not first.equal(second)
    if _sum_over_shards(different, model, EMBEDDING):
        raise UserError(
            f"{weights.path}: lm_head.weight differs from {names[0]}, but tie_word_embeddings = true ties the two"
        )
