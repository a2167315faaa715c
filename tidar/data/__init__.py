"""Sources to documents to tokens to packed rows to batches."""

from tidar.data.chat import end_of_turn
from tidar.data.corpus import BadDocument, Corpus, Document
from tidar.data.dataset import (
    SOURCES,
    Dataset,
    check_token_ids,
    data_tokenizer,
    load_data,
    make_rows,
    make_source,
)
from tidar.data.loader import Batch, make_loader
from tidar.data.order import TrainingOrder, held_out_documents, shuffled, validation_order
from tidar.data.packing import PackedRows
from tidar.data.preparation import prepare
from tidar.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "SOURCES",
    "BadDocument",
    "Batch",
    "Corpus",
    "Dataset",
    "Document",
    "PackedRows",
    "Tokenizer",
    "TrainingOrder",
    "check_token_ids",
    "data_tokenizer",
    "end_of_turn",
    "held_out_documents",
    "load_data",
    "load_tokenizer",
    "make_loader",
    "make_rows",
    "make_source",
    "prepare",
    "shuffled",
    "validation_order",
]
