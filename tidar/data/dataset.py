"""The data of a run: from the options of [data] and [validation] to rows to train on and rows held out."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tidar.config import Config, UserError, derive_seed
from tidar.config.options import Data
from tidar.data.chat import Chat
from tidar.data.corpus import Corpus
from tidar.data.gumiho import Gumiho
from tidar.data.hub_dataset import is_on_hub
from tidar.data.order import held_out_documents
from tidar.data.packing import PackedRows
from tidar.data.preparation import Progress, prepare
from tidar.data.python_source import PythonSource
from tidar.data.source import Source
from tidar.data.text import RecordSource, Text
from tidar.data.tokenizer import BytesTokenizer, Tokenizer

SOURCES: dict[str, type[Source]] = {"python_source": PythonSource, "text": Text, "chat": Chat, "gumiho": Gumiho}


@dataclass
class Dataset:
    """training, validation: prepared corpora; where `validation` is empty, a share of `training` is held out.
    n_ids: all token ids of the data are below it. padding_token_id: fills rows, and is never attended to.
    """

    training: list[Corpus]
    validation: list[Corpus]
    n_ids: int
    padding_token_id: int

    def identity(self, config: Config) -> int:
        """64 bits that differ where a run would see other samples, or in another order, in training or validation.

        Made of the checksums of the prepared folders, in order.
        """
        digests = [[corpus.digest for corpus in corpora] for corpora in (self.training, self.validation)]
        packing = config.training.seq_len, config.data.packing, config.data.long_documents, config.data.weights
        share = 0 if self.validation or not config.validation.enable else config.validation.share
        return derive_seed(config.training.seed, digests, packing, share)


def data_tokenizer(options: Data, model_tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The model's, unless data.tokenizer says bytes; bytes for python_source where the model has none."""
    if options.tokenizer == "bytes" or (model_tokenizer is None and options.source == "python_source"):
        return BytesTokenizer()
    return model_tokenizer


def make_source(options: Data, tokenizer: Tokenizer | None, vocab_size: int | None = None) -> Source:
    """The source of data.source. Raises UserError for an unknown one, and for options that it cannot serve."""
    if options.source not in SOURCES:
        raise UserError(f"data.source = {options.source}: must be one of {', '.join(SOURCES)}, prepared")
    source = SOURCES[options.source]
    if source.needs_paths and not options.paths:
        raise UserError(f"data.paths: is empty: data.source = {options.source} needs files or folders")
    on_hub = next(filter(is_on_hub, options.paths), None)
    if on_hub and not issubclass(source, RecordSource):
        raise UserError(f"data.paths = {on_hub}: must be read with data.source = text or chat")
    return source(options, tokenizer, vocab_size)


def load_data(
    config: Config, tokenizer: Tokenizer | None, vocab_size: int | None = None, prepares: bool = True
) -> Dataset:
    """The corpora of a run, memory-mapped. Data that are not prepared yet are prepared in job.dump_folder/data.

    vocab_size: rows of the model's embedding, where they are known. prepares: true on the rank that prepares data and
    compares prepared folders with their checksums; the others come after it.
    Raises UserError for bad options or documents, and for a prepared folder that is damaged or made with another
    tokenizer.
    """
    options, validation_paths = config.data, config.validation.paths if config.validation.enable else []
    if options.source == "prepared":
        if not options.paths:
            raise UserError("data.paths: is empty: data.source = prepared needs folders of tidar.prepare_data")
        training, validation = (
            [Corpus.open(Path(path), verify=prepares) for path in paths] for paths in (options.paths, validation_paths)
        )
        _check_tokenizers([*options.paths, *validation_paths], training + validation, tokenizer)
    else:
        source = make_source(options, tokenizer, vocab_size)
        folder = Path(config.job.dump_folder) / "data"
        paths = {"training": source.training_paths(options.paths), "validation": validation_paths}
        if prepares:
            # a run that nothing is saved of has no other data than those that its options name now
            is_new = not any(folder.parent.glob("checkpoint/step-*"))
            replaces = is_new or config.checkpoint.allow_changes
            # reading bytes takes less time than starting a process
            processes = 1 if isinstance(tokenizer, BytesTokenizer) else os.cpu_count() or 1
            for name in paths:
                if paths[name]:
                    prepare(source, make_source, paths[name], folder / name, processes, progress_printer(), replaces)
        training, validation = ([Corpus.open(folder / name, verify=prepares)] if paths[name] else [] for name in paths)
    if not any(len(corpus.tokens) for corpus in training):
        raise UserError(f"data.source = {options.source}: holds no documents to train on")
    recorded = [corpus.meta["tokenizer"]["size"] for corpus in training + validation if corpus.meta.get("tokenizer")]
    largest = max(len(corpus.counts) for corpus in training + validation)
    end = tokenizer.end_of_text if tokenizer else None
    return Dataset(training, validation, max([largest, *recorded]), end or 0)


def make_rows(config: Config, data: Dataset) -> tuple[PackedRows, PackedRows]:
    """Rows to train on and rows held out: those of the validation corpora, or of a share of the documents.

    Raises UserError for weights that do not fit, and where one of the two has no row, or none with a target.
    """
    options, validation, training = config.data, config.validation, config.training
    weights = _weights_by_document_group(options, data.training)
    share = 0.0 if data.validation or not validation.enable else validation.share
    firsts = np.cumsum([0, *(len(corpus) for corpus in data.training)])
    held_out = held_out_documents(int(firsts[-1]), share, training.seed)

    def is_held_out(corpus: int, documents: np.ndarray) -> np.ndarray:
        documents = documents + firsts[corpus]
        return held_out[np.searchsorted(held_out, documents).clip(max=len(held_out) - 1)] == documents

    def copies(corpus: int, documents: np.ndarray) -> np.ndarray:
        taken = ~is_held_out(corpus, documents) if len(held_out) else np.ones(len(documents), bool)
        if weights is None:
            return taken
        ends, weight = weights[corpus]
        weight = weight[np.searchsorted(ends, documents, side="right")]
        # the fraction of a weight is the probability of one more copy
        draws = _draw(documents + firsts[corpus], training.seed)
        return taken * (weight.astype(np.int64) + (draws < weight % 1))

    rows: dict[str, Any] = {"seq_len": training.seq_len, "padding_token_id": data.padding_token_id}
    rows |= {"packing": options.packing, "long_documents": options.long_documents}
    train_rows = PackedRows(data.training, **rows, copies=copies if len(held_out) or weights else None)
    if data.validation or not len(held_out):
        validation_rows = PackedRows(data.validation, **rows)
    else:
        validation_rows = PackedRows(data.training, **rows, copies=is_held_out)
    _require_targets(train_rows, options, training.seq_len, "to train on")
    if validation.enable:
        if not len(validation_rows) + validation_rows.n_dropped + validation_rows.n_rows_dropped:
            raise UserError(
                f"validation.enable = true: validation.share = {validation.share} of the documents holds none; "
                "raise it, name validation.paths, or set validation.enable = false"
            )
        _require_targets(validation_rows, options, training.seq_len, "held out")
    return train_rows, validation_rows


def _require_targets(rows: PackedRows, options: Data, seq_len: int, use: str) -> None:
    """Raises UserError where there is no row, or none with a target."""
    if rows.n_dropped and not rows.n_documents:
        raise UserError(
            f"data.long_documents = drop: all {rows.n_dropped:,} documents {use} are longer than "
            f"training.seq_len = {seq_len}; raise training.seq_len, or split them (data.long_documents = split)"
        )
    if len(rows) > rows.n_without_targets:
        return
    n_rows = len(rows) + rows.n_rows_dropped
    if not n_rows:
        if options.weights and use == "to train on":
            weights = ", ".join(map(str, options.weights))
            raise UserError(f"data.weights = {weights}: leave no documents {use}; raise one")
        raise UserError(f"data.source = {options.source}: holds no documents {use}")
    remedy = "raise training.seq_len" + ("" if options.packing else ", or set data.packing = true")
    raise UserError(
        f"data.source = {options.source}: none of the {n_rows:,} rows {use} of training.seq_len = {seq_len} tokens "
        f"holds a token to predict; {remedy}"
    )


def check_token_ids(data: Dataset, vocab_size: int, mask_token_id: int, mask_is_explicit: bool) -> str | None:
    """Raises UserError for a token without a row in the embedding, and where the data hold the mask token.

    mask_is_explicit: tidar.mask_token_id names the mask token. The data may hold it then, and a warning is returned.
    """
    corpora = data.training + data.validation
    largest = max(len(corpus.counts) for corpus in corpora) - 1
    if largest >= vocab_size:
        raise UserError(f"data: holds the token {largest}, but the model's embedding has {vocab_size} rows")
    masks = sum(int(corpus.counts[mask_token_id]) for corpus in corpora if mask_token_id < len(corpus.counts))
    if not masks:
        return None
    text = f"tidar.mask_token_id = {mask_token_id}: occurs {masks:,} times in the data"
    if not mask_is_explicit:
        raise UserError(f"{text}; name a token that does not occur, or name this one to train with it")
    return f"warning: {text}, where the model cannot distinguish it from a masked position"


def progress_printer() -> Callable[[Progress], None]:
    """Shows the progress of a preparation on stderr: one line that is updated on a terminal, else a line every 10 s."""
    last = time.perf_counter()

    def show(progress: Progress) -> None:
        nonlocal last
        done = progress.parts == progress.all_parts
        if time.perf_counter() - last < (0.2 if sys.stderr.isatty() else 10) and not done:
            return
        last = time.perf_counter()
        rate = progress.tokens / max(progress.seconds, 1e-9)
        filled = 24 * progress.parts // progress.all_parts
        text = f"preparing data [{'#' * filled}{'.' * (24 - filled)}] {progress.parts}/{progress.all_parts} parts, "
        text += f"{progress.documents:,} documents, {progress.tokens:,} tokens, {rate:,.0f} tokens/s"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if done else "", file=sys.stderr, flush=True)
        elif progress.seconds > 10 or not done:
            print(text, file=sys.stderr, flush=True)

    return show


def _check_tokenizers(paths: list[str], corpora: list[Corpus], tokenizer: Tokenizer | None) -> None:
    """Raises UserError where prepared folders were made with another tokenizer than the run's, or than each other."""
    known = tokenizer and (tokenizer.digest, f"this run's is {tokenizer.name} ({tokenizer.size} ids)")
    for path, corpus in zip(paths, corpora):
        if made_with := corpus.meta.get("tokenizer"):
            name = f"{made_with['name']} ({made_with['size']} ids)"
            if known and made_with["sha256"] != known[0]:
                raise UserError(f"{path}: was prepared with the tokenizer {name}, and {known[1]}: prepare it again")
            known = known or (made_with["sha256"], f"that of {path} is {name}")


def _weights_by_document_group(options: Data, corpora: list[Corpus]) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """For each corpus, where its groups of documents end, and their weights; None: each document is taken once."""
    if not options.weights:
        return None
    # a prepared folder is one path; a corpus made of several has a group for each
    groups = [[len(corpus)] for corpus in corpora] if options.source == "prepared" else [corpora[0].groups]
    n_groups = sum(len(group) for group in groups)
    if len(options.weights) != n_groups:
        raise UserError(f"data.weights: {len(options.weights)} numbers for {n_groups} paths: must be one for each")
    weights = iter(options.weights)
    return [(np.cumsum(group), np.array([next(weights) for _ in group])) for group in groups]


def _draw(documents: np.ndarray, seed: int) -> np.ndarray:
    """A number from 0 to 1 for each document, a function of (seed, number of the document)."""
    mixed = documents.astype(np.uint64) + np.uint64(derive_seed(seed, "weights") % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the mixer of SplitMix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53
