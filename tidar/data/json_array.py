"""The elements of a JSON array in a file, found without holding the file in memory."""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

from tidar.data.corpus import BadDocument

CHUNK = 2**20  # bytes read at a time, more inside a longer element
STRUCTURE = re.compile(rb'["\[\]{},]')


def begins_array(head: bytes) -> bool:
    """Whether a file that begins with these bytes is one JSON array, not a record on each line."""
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def split_array(stream: BinaryIO, position: int = 0) -> Iterator[tuple[int, bytes]]:
    """The byte offset and the unparsed JSON of each element of an array.

    position: where the stream stands: 0, or the offset of an element. An element's offset is that of the byte after
    the bracket or comma before it. Elements are divided at commas outside of strings and brackets, so an element that
    is not JSON does not hide later ones. Raises BadDocument where the array has no end, and for anything but blanks
    after it.
    """
    text = b""  # from the start of an element
    scanned = depth = 0
    is_open = position > 0  # the array's own bracket has been read
    while block := stream.read(max(CHUNK, len(text))):
        text += block
        if not is_open:
            head = text.removeprefix(codecs.BOM_UTF8).lstrip()
            if not head:
                continue
            position, text, is_open = len(text) - len(head) + 1, head[1:], True
        start = 0
        while token := STRUCTURE.search(text, scanned):
            character = token[0]
            scanned = token.end()
            if character == b'"':
                end = _end_of_string(text, scanned)
                if not end:
                    scanned = token.start()  # the string continues after what has been read
                    break
                scanned = end
            elif character in b"[{":
                depth += 1
            elif depth:
                depth -= character in b"]}"
            elif character in b",]":
                yield position + start, text[start : token.start()]
                start = scanned
                if character == b"]":
                    _refuse_more(stream, text[start:])
                    return
        else:
            scanned = len(text)
        text, position, scanned = text[start:], position + start, scanned - start
    raise BadDocument("the JSON array has no end: the file is cut short, or a bracket or quotation mark is missing")


def _end_of_string(text: bytes, start: int) -> int:
    """The index after the quotation mark that ends the string whose first character is at `start`; 0: none does."""
    end = start - 1
    while (end := text.find(b'"', end + 1)) >= 0:
        first = end
        while first > start and text[first - 1] == ord("\\"):
            first -= 1
        if (end - first) % 2 == 0:
            return end + 1
    return 0


def _refuse_more(stream: BinaryIO, text: bytes) -> None:
    while not text.strip():
        text = stream.read(CHUNK)
        if not text:
            return
    raise BadDocument("there is more after the end of the JSON array")
