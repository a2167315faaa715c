"""Text of tokens as they are decoded: whole characters only, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not a whole character yet


class TextStream:
    """The text of a growing list of tokens.

    decode: tokens to text. stop_strings: the text ends before the first of them.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()):
        self.decode = decode
        self.stop_strings = [text for text in stop_strings if text]
        self.shown = 0

    def stops(self, tokens: list[int]) -> bool:
        """Whether the text of these tokens holds a stop string."""
        return any(stop in self.decode(tokens) for stop in self.stop_strings)

    def text(self, tokens: list[int]) -> str:
        """All of the text, up to the first stop string."""
        text = self.decode(tokens)
        ends = [text.find(stop) for stop in self.stop_strings if stop in text]
        return text[: min(ends)] if ends else text

    def new(self, tokens: list[int], finished: bool) -> str:
        """What can be shown now and was not returned before. tokens: all so far."""
        text = self.text(tokens)
        if not finished:
            text = text.rstrip(REPLACEMENT)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop_strings), default=0)]
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
