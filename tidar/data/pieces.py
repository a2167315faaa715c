"""Long texts in pieces that give the same tokens as the whole.

A piece ends with a newline before a character that is no white space. A tokenizer is known to split there where its
pre-tokenizer is one of CUTS, its normalizer acts on each side alone, and no added token holds a newline or takes the
adjacent white space. Any other tokenizer gets a text whole.
"""

import re
from typing import Any

# UTF-8: first bytes that no white space has
_NEXT = rb"(?=[!-~\xc3-\xe0\xe4-\xf4])"
_AFTER_NEWLINES = re.compile(rb"\n" + _NEXT)
# \s+(?!\S) leaves the last character of white space to the next match, so the newline must be the only one
_AFTER_ONE_NEWLINE = re.compile(rb"(?<=[!-~])\n" + _NEXT)
BETWEEN_CHARACTERS = re.compile(rb"(?=[\x00-\x7f\xc0-\xff])")

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# In these no alternative matches a newline and then a character that is no white space, none looks behind, and what
# they match before such a newline does not depend on what comes after it.
CUTS = {
    _WORDS + r"\p{N}|" + _TAIL: _AFTER_NEWLINES,  # Qwen2, Qwen2.5, Qwen3
    _WORDS + r"\p{N}{1,3}|" + _TAIL: _AFTER_NEWLINES,  # Llama 3
}
LOCAL_NORMALIZERS = (None, "NFC", "NFD", "NFKC", "NFKD")  # nothing composes with a newline


def cut_pattern(state: dict[str, Any]) -> re.Pattern[bytes] | None:
    """Matches up to where a text, in UTF-8, may be cut. None where no cut is known to be safe.

    state: of a tokenizer, as in tokenizer.json.
    """
    if (state["normalizer"] or {"type": None})["type"] not in LOCAL_NORMALIZERS:
        return None
    if any("\n" in token["content"] or token["lstrip"] or token["rstrip"] for token in state["added_tokens"]):
        return None
    steps = state["pre_tokenizer"] or {"type": None}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if [step["type"] for step in steps] == ["Split", "ByteLevel"]:
        split, byte_level = steps
        isolates = split["behavior"] == "Isolated" and not split["invert"]
        if isolates and not byte_level["use_regex"] and not byte_level["add_prefix_space"]:
            return CUTS.get(split["pattern"].get("Regex", ""))
    if [step["type"] for step in steps] == ["ByteLevel"] and steps[0]["use_regex"]:
        return None if steps[0]["add_prefix_space"] else _AFTER_ONE_NEWLINE  # GPT-2
    return None


def cut_points(text: Any, pattern: re.Pattern[bytes] | None, piece_bytes: int) -> list[int]:
    """Where the pieces of a text end, in bytes: each at the first cut after `piece_bytes`, the last with the text.

    text: bytes, or a mapped file.
    """
    ends, at = [], piece_bytes
    while pattern and at < len(text) and (match := pattern.search(text, at)):
        ends.append(match.end())
        at = match.end() + piece_bytes
    return ends if ends and ends[-1] == len(text) else [*ends, len(text)]
