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


__all__ = [
    "SOURCES",
    "Batch",
    "Corpus",
    "PackedRows",
    "TrainingOrder",
    "Vocabulary",
    "load_rows",
    "make_loader",
    "validation_order",
]
