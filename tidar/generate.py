"""Decodes with a trained model: python -m tidar.generate --model FOLDER --prompt TEXT …

FOLDER is an exported model, any Qwen2, Qwen2.5 or Qwen3 folder (--mode ar), or a checkpoint's step-<n>. Text is printed
as it is decoded. --chat holds a conversation with the model's chat template. --prompts answers a file in batches.
"""

import json
import os
import sys
import time
import unicodedata
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import torch

from tidar.config import ArgumentParser, UserError, print_lines, printable, user_errors_exit
from tidar.config.files import check_output
from tidar.config.hub import local_folder
from tidar.data import BadDocument, Tokenizer
from tidar.data.chat_records import Messages
from tidar.decoding import Completion, Engine, load
from tidar.decoding.answers import read_done, write_answers
from tidar.decoding.prompts import chat_reader, end_tokens, model_tokenizer, read_prompts
from tidar.decoding.text import TextStream

# colours of consecutive steps, for --show_drafts
COLOURS, RESET = ("\x1b[36m", "\x1b[33m"), "\x1b[0m"


def main(arguments: list[str] | None = None) -> None:
    try:
        with user_errors_exit():
            run(_parser().parse_args(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tidar.generate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of the model, or a checkpoint's step-<n>")
    parser.add_argument(
        "--tokenizer", help="tokenizer's folder or hub id, or bytes (default: the tokenizer in the model's folder)"
    )
    parser.add_argument("--prompt", nargs="+", help="texts to continue")
    parser.add_argument("--chat", action="store_true", help="read turns of a conversation from standard input")
    parser.add_argument("--prompts", help="JSON lines: chats or prompts to answer, texts to continue")
    parser.add_argument("--output", help="with --prompts: JSON lines of chats and texts; resumed where it ended")
    parser.add_argument(
        "--chat_template_kwargs", type=json_object, default={},
        help="variables of the chat template as JSON, for --chat and for records of --prompts that do not have them",
    )  # fmt: skip
    parser.add_argument("--mode", choices=["tidar", "ar"], default="tidar", help="ar: plain autoregressive decoding")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="[256]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy [0]")
    parser.add_argument("--top_k", type=int, default=0, help="most likely tokens to draw from; 0: all [0]")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability of the tokens to draw from; 1: all [1]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--stop", nargs="+", default=[], help="strings that end the text; they are not printed")
    parser.add_argument(
        "--draft_mix", type=float, default=1.0,
        help="share of the autoregressive logits, mixed with those of the diffusion half; only 1 is lossless [1]",
    )  # fmt: skip
    parser.add_argument(
        "--lookup", type=int, default=0,
        help="draft what followed the last tokens where LOOKUP or more of them occurred before; 0: nowhere [0]",
    )  # fmt: skip
    parser.add_argument("--show_drafts", action="store_true", help="colour what was accepted in one step")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences decoded at a time [32]")
    return parser


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f"{text}: must be a JSON object")
    return found


def run(options: Namespace) -> None:
    if options.chat_template_kwargs and options.prompt:
        raise UserError("--chat_template_kwargs: is for --chat and --prompts")
    kinds = [name for name in ("prompt", "chat", "prompts") if getattr(options, name)]
    if len(kinds) != 1:
        given = " and ".join(f"--{name}" for name in kinds) or "none of them is given"
        raise UserError(f"--prompt, --chat, --prompts: exactly one is needed, but {given}")
    if bool(options.prompts) != bool(options.output):
        raise UserError("--prompts and --output: one needs the other")
    if options.output:
        check_output(Path(options.output))
    if options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size}: must be at least 1")
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    model = local_folder(options.model, "--model")
    engine = load(model, device=device, max_batch_size=options.batch_size)
    tokenizer = model_tokenizer(model, options.tokenizer, engine.model.config.vocab_size)
    session = Session(engine, tokenizer, options)
    if options.prompts:
        session.answer_file(Path(options.prompts), Path(options.output))
    elif options.chat:
        session.chat()
    else:
        session.complete(options.prompt)


def safe_text(text: str) -> str:
    """Control characters but newline and tab as escapes: what a model writes cannot steer the terminal."""
    return "".join(printable(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


class Session:
    """What the command does with one model."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: Namespace):
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.settings: dict[str, Any] = {
            name: getattr(options, name)
            for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "draft_mix", "mode", "lookup")
        }
        self.settings["stop_token_ids"] = end_tokens(engine, tokenizer)
        self.tokens = self.forwards = 0
        self.seconds = 0.0

    def complete(self, texts: list[str]) -> None:
        for text in texts:
            self._print([int(token) for token in self.tokenizer.encode([text])[0]], before=text)
            print(flush=True)
        self._report()

    def chat(self) -> None:
        """Turns are lines of standard input, until it ends."""
        read = chat_reader(self.tokenizer, self.options.chat_template_kwargs, "--chat")
        messages: Messages = []
        while line := self._read_turn():
            messages.append({"role": "user", "content": line.rstrip("\n")})
            try:
                _, tokens = read({"messages": messages})
            except BadDocument as error:
                raise UserError(f"--chat with tokenizer {self.tokenizer.name}: {error}") from None
            messages.append({"role": "assistant", "content": self._print(tokens)})
            print(flush=True)
            self._report()

    @staticmethod
    def _read_turn() -> str:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        return sys.stdin.readline()

    def _print(self, prompt: list[int], before: str = "") -> str:
        """Decodes one prompt and prints its text, after `before`, as it is decoded. Returns the text."""
        stream = TextStream(self.tokenizer.decode, self.options.stop)
        started = time.perf_counter()
        completion = Completion(0)
        completions = self.engine.stream([prompt], stop=self._stop(stream), **self.settings)
        print(before, end="", flush=True)
        for step, completion in enumerate(completions):
            text = stream.new(completion.tokens, completion.finished)
            shown = safe_text(text)
            print(f"{COLOURS[step % 2]}{shown}{RESET}" if self.options.show_drafts else shown, end="", flush=True)
        self._count(len(completion.tokens), completion.n_forwards, started)
        return stream.text(completion.tokens)

    def _stop(self, stream: TextStream):
        return (lambda _, tokens: stream.stops(tokens)) if self.options.stop else None

    def answer_file(self, prompts: Path, output: Path) -> None:
        """Under torchrun each process answers its share, and all write to one file."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        stream = TextStream(self.tokenizer.decode, self.options.stop)
        started = time.perf_counter()
        done = read_done(output)
        records = read_prompts(prompts, self.tokenizer, self.options.chat_template_kwargs)
        answers, empty, tokens, forwards = write_answers(
            self.engine,
            (prompt for prompt in records if prompt[0] % world == rank),
            output,
            stream.text,
            done,
            stop=self._stop(stream),
            **self.settings,
        )
        self._count(tokens, forwards, started)
        before = f", which held {len(done)} before" if done else ""
        print(f"{f'rank {rank}: ' if world > 1 else ''}{answers} new answers in {output}{before}")
        if empty:
            print_lines(
                f"warning: {empty} of {answers} answers are empty; a model of chats without reasoning may need "
                """--chat_template_kwargs '{"enable_thinking": false}'""",
                file=sys.stderr,
            )
        self._report()

    def _count(self, tokens: int, forwards: int, started: float) -> None:
        self.tokens, self.forwards = self.tokens + tokens, self.forwards + forwards
        self.seconds += time.perf_counter() - started

    def _report(self) -> None:
        if self.forwards:
            print_lines(
                f"{self.tokens} tokens in {self.forwards} forward passes: {self.tokens / self.forwards:.2f} tokens per "
                f"forward, {self.tokens / self.seconds:,.1f} tokens/s",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
