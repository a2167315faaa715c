"""What a run reads before anything is computed: its tokenizer, its data and its model's description."""

from dataclasses import dataclass, replace

from tidar.config import Config
from tidar.data import Dataset, Tokenizer, check_token_ids, data_tokenizer, end_of_turn, load_data, load_tokenizer
from tidar.models.huggingface import ModelSpec, read_model, resolve_model


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
