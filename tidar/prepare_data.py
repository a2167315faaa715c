"""Tokenises any source once: python -m tidar.prepare_data --output DIR --data.source text --data.paths FILE ...

Takes the options of [data], in a TOML file or on the command line. Started again after it was killed, it resumes.
Train on the folder with data.source = "prepared" and data.paths = ["DIR"].
"""

import os
import time
from pathlib import Path
from typing import Any

from tidar.config import ArgumentParser, UserError, in_range, load_config, print_lines, user_errors_exit
from tidar.data import Corpus, data_tokenizer, load_tokenizer, make_source, prepare
from tidar.data.dataset import progress_printer
from tidar.models.huggingface import read_model


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tidar.prepare_data",
        description=__doc__.split("\n\n")[1],
        epilog="Further arguments: --job.config_file FILE and the options of [data], as tidar.train --help lists them.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that tokenise [all cores]")
    with user_errors_exit():
        arguments, options = parser.parse_known_args()
        config = load_config(options, prog=parser.prog)
        if arguments.processes < 1:
            raise UserError(f"--processes {arguments.processes}: must be integer {in_range(1, None)}")
        if config.data.source == "prepared":
            raise UserError("data.source = prepared: is prepared already")
        if config.data.weights:
            print_lines("warning: data.weights: not used: a prepared folder is one path, which a run gives a weight")
        started = time.perf_counter()
        folder = read_model(config).tokenizer
        tokenizer = data_tokenizer(config.data, load_tokenizer(folder) if folder else None)
        source = make_source(config.data, tokenizer)
        paths = source.training_paths(config.data.paths)
        prepare(source, make_source, paths, arguments.output, arguments.processes, progress_printer())
        meta = Corpus.open(arguments.output, verify=False).meta
        print_lines(*summary(arguments.output, meta, time.perf_counter() - started))
        if not meta["documents"]:
            raise UserError(f"data.paths = {', '.join(config.data.paths)}: hold no documents to train on")


def summary(folder: Path, meta: dict[str, Any], seconds: float) -> list[str]:
    """What a prepared folder holds, and what was dropped. meta: of its meta.json."""
    lines = [
        f"{folder}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, {meta['target_tokens']:,} of them "
        f"targets, ids {meta['smallest_id']} to {meta['largest_id']}, {meta['dtype']}, in {seconds:.1f} s"
    ]
    if meta["dropped"]:
        lines.append(f"dropped: {meta['dropped']:,} documents, listed in {folder / 'dropped.txt'}")
        lines += [f"  {count:,}: {reason}" for reason, count in meta["dropped_reasons"].items()]
    return lines


if __name__ == "__main__":
    main()
