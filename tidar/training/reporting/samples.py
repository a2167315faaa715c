"""What a validation has decoded, as lines of the log and as TensorBoard's text."""

import json

from tidar.training.validation import DecodedPrompts

# characters of a sample in the log: the end of its prompt, and the beginning of what follows
PROMPT_CHARACTERS, NEW_CHARACTERS = 40, 160


def decoded_lines(decoded: DecodedPrompts) -> list[str]:
    """Log lines about the prompts, the cost of decoding them, and a sample."""
    lines = [
        f"  decoded {decoded.prompts} prompts: {decoded.tokens_per_forward:.3f} tokens per forward, "
        f"{decoded.tokens:,} tokens in {decoded.seconds:.1f} s, {decoded.gathering:.1f} s of them to gather the weights"
    ]
    if decoded.sample:
        prompt, new = decoded.sample
        end = prompt if len(prompt) <= PROMPT_CHARACTERS else "…" + prompt[-PROMPT_CHARACTERS:]
        begin = new if len(new) <= NEW_CHARACTERS else new[:NEW_CHARACTERS] + "…"
        lines.append(f"  after {_quoted(end)}: {_quoted(begin)}")
    return lines


def sample_markdown(prompt: str, new: str) -> str:
    """Both as code: indented, so that nothing in them ends it."""
    parts = [f"**{title}**\n\n" + _indented(text) for title, text in (("prompt", prompt), ("decoded", new))]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.split("\n"))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
