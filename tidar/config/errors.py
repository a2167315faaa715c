import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO


def printable(text: str) -> str:
    """The text as one line that is safe to print, whatever file it comes from.

    Newlines, control characters, marks of writing direction and lone surrogates are shown as escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has no text. Errors of libraries may fill a page."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def named_error(error: BaseException) -> str:
    """The type of an error and the first line of its text, if it has one."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def aligned(rows: Sequence[Sequence[str]], n_left: int = 0) -> list[str]:
    """Lines of a table. The first `n_left` columns are justified to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if number < n_left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]


def print_lines(*lines: str, file: TextIO | None = None) -> None:
    """Prints each argument as one line (see `printable`), to stdout if no file is given."""
    print(*map(printable, lines), sep="\n", file=file, flush=True)


class UserError(Exception):
    """An error that only the user can correct. lines: one or two, which say what is wrong and what is allowed.

    Each argument is one line (see `printable`): a value that it quotes cannot begin another one.
    """

    def __init__(self, *lines: str):
        super().__init__(*map(printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """Around a command: prints a UserError, once on each machine, and exits with status 1. So it does, without a
    word, where nobody reads its output any more.
    """
    try:
        yield
    except UserError as error:
        if _is_first_of_machine():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout):  # another pipe: of a worker that has died
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will flush it again
        sys.exit(1)


def _has_lost_its_reader(stream: TextIO) -> bool:
    """Whether the other end of a pipe has been closed, as `| head` does."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def print_first_error(error: BaseException) -> None:
    """Prints a UserError that this rank has had before all others, and maybe alone, unless `user_errors_exit` will."""
    if isinstance(error, UserError) and not _is_first_of_machine():
        print(f"error: rank {os.environ.get('RANK')}: {error}", file=sys.stderr, flush=True)


def _is_first_of_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
