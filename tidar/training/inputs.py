"""What a run reads before anything is computed: its tokenizer, its data and its model's description."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from tidar.config import Config
from tidar.config.hub import HUB_ID, Needs, cached_folder, commit_of, hub_id, local_folder, pin
from tidar.data import Dataset, Tokenizer, check_token_ids, data_tokenizer, end_of_turn, load_data, load_tokenizer
from tidar.distributed import World, rank_zero_first
from tidar.models.huggingface import ModelSpec, read_model, resolve_model
from tidar.models.huggingface.manifest import saved_steps


@dataclass
class Inputs:
    """tokenizer: of the data, None where they were prepared elsewhere and the model has none.

    warning: a line for the user about the data, if there is one.
    """

    data: Dataset
    spec: ModelSpec
    tokenizer: Tokenizer | None
    warning: str | None

    @property
    def n_unusable(self) -> int:
        """Training documents that were dropped at preparation: malformed or empty ones."""
        return sum(corpus.meta.get("dropped", 0) for corpus in self.data.training)


def hub_names(config: Config) -> dict[str, tuple[str, Needs]]:
    """Option -> name and what is needed of it, for the options that name models and tokenizers.

    Weights are needed unless the run resumes from its own checkpoint.
    """
    start = config.checkpoint.initial_load_path
    resumes = config.checkpoint.enable and saved_steps(Path(config.job.dump_folder))
    names: dict[str, tuple[str, Needs]] = {
        "model.hf_path": (config.model.hf_path, "config" if start or resumes else "weights"),
        "checkpoint.initial_load_path": (start, "config" if resumes else "weights"),
        "data.tokenizer": (config.data.tokenizer, "tokenizer"),
    }
    return {option: named for option, named in names.items() if named[0]}


def missing_on_disk(config: Config) -> list[str]:
    """A line for each option whose model or tokenizer the run will download."""
    names = hub_names(config).items()
    missing = {option: name for option, (name, needs) in names if hub_id(name) and not cached_folder(name, needs)}
    return [f"{option} = {name}: is not in the hub's cache; the run downloads it" for option, name in missing.items()]


def read_inputs(config: Config, world: World, group: dist.ProcessGroup) -> Inputs:
    """The inputs of a run, on all of its ranks. Rank 0 downloads and prepares them first.

    Other ranks read the same commits from the same cache; nodes with a separate cache download them there.
    group: all ranks, on gloo.
    """

    names = hub_names(config)

    def download(is_first: bool) -> dict[str, str | None]:
        if not is_first:
            return {}
        return {name: commit_of(name, local_folder(name, option, needs)) for option, (name, needs) in names.items()}

    if any(HUB_ID.fullmatch(name) for name, _ in names.values()):
        found = [rank_zero_first(world, download)]
        dist.broadcast_object_list(found, src=0, group=group)
        pin(found[0])
        for option, (name, needs) in names.items():
            local_folder(name, option, needs)
    return rank_zero_first(world, lambda is_first: load_inputs(config, prepares=is_first))


def load_inputs(config: Config, prepares: bool = True) -> Inputs:
    """The data and the model of a run, which fit each other. Data that are not prepared yet are prepared.

    prepares: false on ranks that run after one that has prepared them.
    Raises UserError for options, files or documents that cannot be used.
    """
    files = read_model(config)
    model_tokenizer = load_tokenizer(files.tokenizer) if files.tokenizer else None
    tokenizer = data_tokenizer(config.data, model_tokenizer)
    data = load_data(config, tokenizer, files.options.get("vocab_size"), prepares)
    spec = resolve_model(
        files, config.tidar.mask_token_id, data.n_ids, model_tokenizer.size if model_tokenizer else None
    )
    warning = check_token_ids(
        data, spec.vocab_size_before, spec.mask_token_id, mask_is_explicit=config.tidar.mask_token_id != -1
    )
    spec = replace(spec, end_of_turn=end_of_turn(data.training, model_tokenizer))
    return Inputs(data, spec, tokenizer, warning)
