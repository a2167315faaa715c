"""Hugging Face's config.json of the dense Qwen2, Qwen2.5 and Qwen3 models."""

import json
import math
from pathlib import Path
from typing import Any

from tidar.config import UserError
from tidar.config.files import parse_json
from tidar.kernels.rotary import RopeScaling
from tidar.models.decoder import DecoderConfig

# model_type: the class that reads it
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPE_NAMES = ("torch_dtype", "dtype")  # of transformers 4 and of transformers 5
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
DEFAULT_ROPE_THETA = 10000.0


def read_config_json(folder: Path) -> dict[str, Any]:
    """The options in `folder`/config.json. Raises UserError where there is none or it is not a JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: must be a local folder with a Hugging Face model, or an id of the hub (ORG/NAME)")
    refuse_other_folders(folder)
    if not path.exists():
        raise UserError(f"{folder}: holds no config.json: must be a Hugging Face model, or a checkpoint's step-<n>")
    try:
        options = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return options


def refuse_other_folders(folder: Path) -> None:
    """Raises UserError for a folder that people take for a model's: a LoRA adapter, or a model in the hub's cache."""
    adapter = next((name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if adapter:
        raise UserError(
            f"{folder}: holds a LoRA adapter ({adapter}): merge it into its model, and name the merged folder"
        )
    if (folder / "snapshots").is_dir() and not (folder / "config.json").exists():
        snapshots = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
        if not snapshots:
            raise UserError(
                f"{folder}: is a cache of the Hugging Face hub without a snapshot: download the model again"
            )
        main = folder / "refs" / "main"
        revision = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
        newest = max(snapshots, key=lambda path: (path.name == revision, path.stat().st_mtime))
        raise UserError(f"{folder}: is a cache of the Hugging Face hub: name its snapshot, {newest}")


def decoder_config(options: dict[str, Any], origin: str = "config.json") -> DecoderConfig:
    """The decoder that a config.json describes, with transformers' defaults for missing options.

    origin: names the file in messages. Raises UserError for another architecture, for features that this decoder
    lacks (sliding windows, other scalings of rotary positions, dropout, quantised weights) and for bad values.
    """
    read = _Reader(options, origin)
    family = options.get("model_type")
    expected = ARCHITECTURES.get(family) if isinstance(family, str) else None
    architectures = options.get("architectures") or [expected]
    if not expected or architectures != [expected]:
        supported = " and ".join(f"{name} ({kind})" for kind, name in ARCHITECTURES.items())
        raise UserError(
            f"{origin}: model_type = {family}, architectures = {json.dumps(architectures)}: "
            f"supported are {supported}: the dense Qwen2, Qwen2.5 and Qwen3 models"
        )
    n_layers = read.integer("num_hidden_layers")
    n_heads = read.integer("num_attention_heads")
    n_kv_heads = read.integer("num_key_value_heads", n_heads)
    dim = read.integer("hidden_size")
    head_dim = read.integer("head_dim", 128 if family == "qwen3" else dim // n_heads)
    bias = read.boolean("attention_bias", False) if family == "qwen3" else False
    if n_heads % n_kv_heads:
        raise UserError(
            f"{origin}: num_attention_heads = {n_heads}: must be a multiple of num_key_value_heads = {n_kv_heads}"
        )
    if head_dim % 2:
        raise UserError(f"{origin}: head_dim = {head_dim}: must be even")
    for name, allowed in (("hidden_act", "silu"), ("attention_dropout", 0), ("quantization_config", None)):
        if options.get(name, allowed) != allowed:
            raise UserError(
                f"{origin}: {name} = {json.dumps(options[name])}: is not supported, only {json.dumps(allowed)}"
            )
    _refuse_contradiction({name: options.get(name) for name in DTYPE_NAMES}, origin)
    _refuse_sliding_windows(options, n_layers, origin)
    theta, scaling = _rope(options, origin)
    return DecoderConfig(
        vocab_size=read.integer("vocab_size"),
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=read.integer("intermediate_size"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        qk_norm=family == "qwen3",
        tie_embeddings=read.boolean("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        initializer_range=read.number("initializer_range", 0.02),
    )


class _Reader:
    """Typed access to the options of a config.json; UserError where one is missing or of another type."""

    def __init__(self, options: dict[str, Any], origin: str):
        self.options = options
        self.origin = origin

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(name, default)
        if type(value) is not int or value < minimum:
            raise UserError(f"{self.origin}: {name} = {json.dumps(value)}: must be an integer >= {minimum}")
        return value

    def number(self, name: str, default: float | None = None, above: float = 0) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise UserError(f"{self.origin}: {name} = {json.dumps(value)}: must be a number > {above}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise UserError(f"{self.origin}: {name} = {json.dumps(value)}: must be true or false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.options.get(name)
        if value is None and default is None:
            raise UserError(f"{self.origin}: {name} is missing")
        return default if value is None else value


def _refuse_sliding_windows(options: dict[str, Any], n_layers: int, origin: str) -> None:
    types = options.get("layer_types") or []
    if not isinstance(types, list):
        raise UserError(f"{origin}: layer_types = {json.dumps(types)}: must be a list")
    windowed = [kind for kind in types if kind != "full_attention"]
    if windowed:
        raise UserError(f"{origin}: layer_types has {json.dumps(windowed[0])}: only full_attention is supported")
    if types or not options.get("use_sliding_window") or options.get("sliding_window", 4096) is None:
        return
    first_windowed = _Reader(options, origin).integer("max_window_layers", 28, minimum=0)
    if first_windowed < n_layers:
        raise UserError(
            f"{origin}: use_sliding_window = true: layers from {first_windowed} on would have a window; "
            "only full attention is supported"
        )


def _refuse_contradiction(values: dict[str, Any], origin: str) -> None:
    """Raises UserError where options that mean the same, by name, have different values. None: not given."""
    given = [(name, value) for name, value in values.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            found = f"{given[0][0]} = {json.dumps(given[0][1])}, but {name} = {json.dumps(value)}"
            raise UserError(f"{origin}: {found}: remove the wrong one")


def _rope(options: dict[str, Any], origin: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from `rope_parameters` or, older, `rope_theta` and `rope_scaling`."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = options.get(name) or {}
        if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
            raise UserError(f"{origin}: {name}: must be one set of parameters for all layers")
    name, parameters, kind, scaling = _rope_parameters(options)
    old_form = {"rope_scaling": options.get("rope_scaling")}
    if old_form["rope_scaling"] and _rope_parameters(old_form)[2:] != (kind, scaling):
        raise UserError(f"{origin}: rope_parameters and rope_scaling are both there and differ: leave one out")
    sections = {"": options} | {
        f"{section}.": options.get(section) or {} for section in ("rope_parameters", "rope_scaling")
    }
    _refuse_contradiction(
        {f"{prefix}rope_theta": found.get("rope_theta") for prefix, found in sections.items()}, origin
    )
    if kind == "default" and parameters.get("factor", 1) != 1:
        raise UserError(f"{origin}: {name} = {json.dumps(parameters)}: has a factor, but no rope_type")
    if kind not in ("default", "linear", "yarn"):
        raise UserError(f"{origin}: {name} = {json.dumps(parameters)}: supported are default, linear and yarn")
    for place in (options, parameters):
        if place.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{origin}: partial_rotary_factor = {place['partial_rotary_factor']}: only 1 is supported")
    theta = _Reader({"rope_theta": options.get("rope_theta"), **parameters}, origin).number(
        "rope_theta", DEFAULT_ROPE_THETA, above=1
    )
    if kind == "default":
        return theta, None
    read = _Reader(parameters, f"{origin}: {name}")
    factor = read.number("factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        usual = _magnitude(factor, read.number("mscale")) / _magnitude(factor, read.number("mscale_all_dim"))
    else:
        usual = _magnitude(factor, 1.0)
    name = "original_max_position_embeddings"
    length = options.get(name) or parameters.get(name) or options.get("max_position_embeddings") or 32768
    yarn = RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=_Reader({name: length}, origin).integer(name),
        attention_factor=read.number("attention_factor", usual),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        truncate=read.boolean("truncate", True),
    )
    return theta, yarn


def _rope_parameters(options: dict[str, Any]) -> tuple[str, dict[str, Any], str, dict[str, Any]]:
    """The option that holds the rotary parameters, its value, the type that it names, and the other parameters."""
    name = "rope_parameters" if options.get("rope_parameters") else "rope_scaling"
    parameters = options.get(name) or {}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type", "type")}
    return name, parameters, parameters.get("rope_type", parameters.get("type", "default")), scaling


def with_old_and_new_names(options: dict[str, Any]) -> dict[str, Any]:
    """A config.json that `decoder_config` admits, with rotary parameters under the names of transformers 4 and of 5.

    Each version knows its own names only, and silently takes its defaults where these are missing.
    """
    _, parameters, kind, scaling = _rope_parameters(options)
    theta = parameters.get("rope_theta", options.get("rope_theta")) or DEFAULT_ROPE_THETA
    return options | {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
        "rope_parameters": {"rope_theta": theta, "rope_type": kind, **scaling},
    }


def _magnitude(factor: float, scale: float) -> float:
    """Factor of cosines and sines under YaRN (arXiv 2309.00071, eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
