import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something only the user can mend. Its text is one or two lines that say what is wrong and what is allowed."""


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """Around a command: a UserError is printed, once on each machine, and ends the process with 1."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
