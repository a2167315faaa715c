"""What a run is made of, before anything is computed: its tokenizer, its data and its model."""

from dataclasses import dataclass, replace

from tidar.config import Config
from tidar.data import Dataset, check_token_ids, data_tokenizer, end_of_turn, load_data, load_tokenizer
from tidar.models.huggingface import ModelSpec, read_model, resolve_model


@dataclass
class Inputs:
    """warning: what the user should know of the data, None where there is nothing."""

    data: Dataset
    spec: ModelSpec
    warning: str | None


def load_inputs(config: Config, prepares: bool = True) -> Inputs:
    """The data and the model of a run, which fit each other. Prepares what data is not prepared yet.

    prepares: false on ranks that come after one that has.
    Raises UserError for options, files or documents that cannot be used.
    """
    files = read_model(config)
    model_tokenizer = load_tokenizer(files.tokenizer) if files.tokenizer else None
    tokenizer = data_tokenizer(config.data, model_tokenizer)
    data = load_data(config, tokenizer, files.options.get("vocab_size"), prepares)
    spec = resolve_model(files, config.tidar.mask_token_id, data.n_ids, model_tokenizer and model_tokenizer.size)
    warning = check_token_ids(
        data, spec.vocab_size_before, spec.mask_token_id, mask_is_explicit=config.tidar.mask_token_id != -1
    )
    return Inputs(data, replace(spec, end_of_turn=end_of_turn(data.training, model_tokenizer)), warning)
