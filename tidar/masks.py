"""Shows a pattern's mask and its cost: python -m tidar.masks show|plot|stats|bench --pattern P [...]

Patterns are those of tidar.pattern: built in, or your own as my_package.my_file:MyPattern (docs/patterns.md). show and
plot also know the pattern "decode", a decoding step after --seq_len tokens.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from tidar.config import ArgumentParser, Config, UserError, load_config, user_errors_exit
from tidar.laboratory import bench, picture, stats, text
from tidar.laboratory.row_mask import RowMask, make_row_mask, make_step_mask
from tidar.patterns import TILE, Pattern, check_pattern, configured_pattern

# mask token of the rows that are shown; all their tokens are 0
MASK_TOKEN = 1


def show(arguments: argparse.Namespace, pattern: Pattern, name: str, lengths: list[int]) -> None:
    if arguments.command == "plot":
        picture.check_size(pattern.model_positions(sum(lengths)))  # before a mask of so many is made
    show_mask(arguments, make_row_mask(pattern, name, lengths, arguments.seed, MASK_TOKEN))


def show_mask(arguments: argparse.Namespace, row_mask: RowMask) -> None:
    if arguments.command == "plot":
        picture.save_picture(row_mask, arguments.output)
        print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
        return
    print(text.as_csv(row_mask) if arguments.format == "csv" else text.as_text(row_mask))


def print_stats(arguments: argparse.Namespace, pattern: Pattern, name: str, lengths: list[int]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads, head_dim = arguments.heads, arguments.head_dim
    rows = [lengths] if arguments.seq_len or arguments.documents else [[seq_len] for seq_len in stats.SEQ_LENS]
    print(f"{name}, rows of {_count(len(lengths), 'document')}, tiles of {TILE} x {TILE}")
    print(f"TFLOPs of a layer of {heads} heads of {head_dim}, forward and backward: of the allowed pairs (useful), of")
    print("all pairs of tiles that are not empty (computed), of all pairs (dense)")
    print(stats.HEADER)
    for row in rows:
        print(stats.mask_stats(pattern, row, arguments.seed, device).line(heads, head_dim), flush=True)


def print_bench(arguments: argparse.Namespace, pattern: Pattern, name: str, lengths: list[int]) -> None:
    if not torch.cuda.is_available():
        raise UserError("masks bench: needs a CUDA GPU; show, plot and stats run anywhere")
    shape = arguments.heads, arguments.kv_heads, arguments.head_dim
    print(f"{name}, {arguments.rows} rows of {sum(lengths)} tokens in {_count(len(lengths), 'document')}, bfloat16")
    print(f"heads {shape[0]} / {shape[1]} x {shape[2]}, TFLOP/s of allowed pairs")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    lines, wrong = bench.bench(pattern, lengths, arguments.rows, *shape)
    print("\n".join(lines))
    if wrong:
        raise UserError(f"masks bench: results of {', '.join(wrong)} are wrong: more than {bench.TOLERANCE} off")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number > 1 else ''}"


COMMANDS = {
    "show": (show, "the mask in the terminal", 16),
    "plot": (show, "the mask as a PNG picture", 32),
    "stats": (print_stats, "allowed pairs, tiles and FLOPs for rows of 512 to 32768 tokens", 512),
    "bench": (print_bench, "speed and correctness of each attention backend (CUDA)", 4096),
}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tidar.masks", description=__doc__.split("\n\n")[0].split(":")[0] + ".")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (_, help, seq_len) in COMMANDS.items():
        more = "Further arguments: --job.config_file FILE and the options of [tidar], as tidar.train --help lists them."
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=more)
        command.add_argument("--pattern", help="tidar.pattern [tidar]")
        default = f"{stats.SEQ_LENS[0]} to {stats.SEQ_LENS[-1]}" if name == "stats" else seq_len
        command.add_argument("--seq_len", type=_at_least(1), help=f"tokens of the row [{default}]")
        command.add_argument("--block_size", help="tidar.block_size [8]")
        command.add_argument("--documents", help="lengths of its documents: 5,3,8 [one document]")
        if name != "bench":
            command.add_argument(
                "--seed", type=int, default=0, help="seed of the row, for patterns that draw at random [0]"
            )
        if name == "show":
            command.add_argument("--format", choices=["text", "csv"], default="text", help="csv: only 0 and 1 [text]")
        if name == "plot":
            command.add_argument("--output", type=_png, required=True, help="file to write: mask.png")
        if name in ("stats", "bench"):
            command.add_argument("--heads", type=_at_least(1), default=12, help="query heads [12, Qwen2.5-1.5B's]")
            command.add_argument("--head_dim", type=_at_least(1), default=128, help="[128]")
        if name == "bench":
            command.add_argument("--kv_heads", type=_at_least(1), default=2, help="heads of keys and values [2]")
            command.add_argument("--rows", type=_at_least(1), default=2, help="rows of the batch [2]")
    return parser


def _at_least(minimum: int):
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text}: must be integer >= {minimum}")
        return int(text)

    return integer


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: must end with .png")
    return Path(text)


def document_lengths(documents: str | None, seq_len: int | None, default: int) -> list[int]:
    """Document lengths of a row. Raises UserError for invalid ones, or if they do not add up to a given `seq_len`."""
    if documents is None:
        return [seq_len or default]
    words = documents.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--documents {documents}: must be integers >= 1, separated by commas")
    lengths = [int(word) for word in words]
    if seq_len is not None and sum(lengths) != seq_len:
        raise UserError(f"--documents {documents}: add up to {sum(lengths)}, must add up to --seq_len {seq_len}")
    return lengths


def make_config(arguments: argparse.Namespace, options: list[str], seq_len: int) -> Config:
    """The options of [tidar], overridden by --pattern and --block_size."""
    block_size = arguments.block_size
    if block_size is None and not options:
        block_size = str(min(Config().tidar.block_size, seq_len))
    named = {"--tidar.pattern": arguments.pattern, "--tidar.block_size": block_size}
    given = [word for name, value in named.items() if value is not None for word in (name, value)]
    return load_config([*options, *given, "--training.seq_len", str(max(seq_len, 2))], prog="python -m tidar.masks")


def step_mask(arguments: argparse.Namespace) -> RowMask:
    block_size = arguments.block_size or "8"
    if not block_size.isdecimal() or not 1 <= int(block_size) <= 32:
        raise UserError(f"--block_size {block_size}: must be integer from 1 to 32, to show a decoding step")
    return make_step_mask(int(block_size), arguments.seq_len or int(block_size))


def main() -> None:
    with user_errors_exit():
        arguments, options = make_parser().parse_known_args()
        run, _, seq_len = COMMANDS[arguments.command]
        if arguments.pattern == "decode" and arguments.command in ("show", "plot"):
            show_mask(arguments, step_mask(arguments))
            return
        lengths = document_lengths(arguments.documents, arguments.seq_len, seq_len)
        config = make_config(arguments, options, sum(lengths))
        pattern = configured_pattern(config, MASK_TOKEN)
        check_pattern(pattern, config.tidar.pattern, sum(lengths))
        try:
            run(arguments, pattern, config.tidar.pattern, lengths)
            sys.stdout.flush()
        except BrokenPipeError:
            # the reader, such as head, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
