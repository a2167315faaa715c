"""Sources to documents to packed rows to batches."""

from tidar.config import Config, UserError
from tidar.data import python_source
from tidar.data.corpus import Corpus, Vocabulary
from tidar.data.loader import Batch, TrainingOrder, make_loader, validation_order
from tidar.data.packing import PackedRows

# name of the source: its vocabulary, and paths -> training corpus, held-out corpus
SOURCES = {"python_source": (python_source.VOCABULARY, python_source.load)}


def load_rows(config: Config) -> tuple[PackedRows, PackedRows, Vocabulary]:
    """Training rows, held-out rows and the vocabulary of data.source. Raises UserError for an unknown or empty one."""
    if config.data.source not in SOURCES:
        raise UserError(f"data.source = {config.data.source}: must be one of {', '.join(SOURCES)}")
    vocabulary, load = SOURCES[config.data.source]
    training, held_out = (
        PackedRows(corpus, config.training.seq_len, vocabulary.padding_token_id) for corpus in load(config.data.paths)
    )
    if not len(training):
        raise UserError(f"data.source = {config.data.source}: holds no documents to train on")
    if config.validation.enable and not len(held_out):
        raise UserError(f"validation.enable = true: data.source = {config.data.source} holds no held-out documents")
    return training, held_out, vocabulary


def check_token_ids(corpora: list[Corpus], vocab_size: int, mask_token_id: int, mask_is_explicit: bool) -> str | None:
    """Raises UserError for a token without a row in the embedding, and for the mask token where it stands in the data.

    Where tidar.mask_token_id named it, the mask token may stand there: the warning returned then says how often.
    """
    largest = max((int(corpus.tokens.max()) for corpus in corpora if len(corpus.tokens)), default=0)
    if largest >= vocab_size:
        raise UserError(f"data: holds the token {largest}, but the model's embedding has {vocab_size} rows")
    masks = sum(int((corpus.tokens == mask_token_id).sum()) for corpus in corpora)
    if not masks:
        return None
    text = f"tidar.mask_token_id = {mask_token_id}: stands {masks:,} times in the data"
    if not mask_is_explicit:
        raise UserError(f"{text}; name a token that does not, or this one to train all the same")
    return f"warning: {text}, where the model cannot tell it from a masked position"


__all__ = [
    "SOURCES",
    "Batch",
    "Corpus",
    "PackedRows",
    "TrainingOrder",
    "Vocabulary",
    "check_token_ids",
    "load_rows",
    "make_loader",
    "validation_order",
]
