"""Messages to tokens, with a mask of what the assistant says."""

from functools import cache
from pathlib import Path

import pytest
from small_models import write_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tidar.config import UserError
from tidar.data.chat_records import Conversation
from tidar.data.chat_template import encode_chats
from tidar.data.corpus import BadDocument

QWEN3 = Path(__file__).parents[3] / "shared" / "tokenizers" / "qwen3"

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"

# of Qwen2.5's kind
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
# of Qwen3's kind: the last turn has reasoning, be it empty, and those before lose theirs
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set parts = m.content.split('</think>') %}"
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') if parts|length > 1 or loop.last else m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"


@cache
def qwen3():
    return AutoTokenizer.from_pretrained(QWEN3) if QWEN3.is_dir() else None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer in bytes, but for "the" and the like."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["small", "qwen3"])
def make_tokenizer(request, small, monkeypatch):
    """A tokenizer with a given template, or Qwen3's with its own where asked for Qwen3's kind."""
    tokenizer = small if request.param == "small" else qwen3()
    if tokenizer is None:
        pytest.skip("needs Qwen3's tokenizer")

    def make(template: str):
        if tokenizer is small or template != THINKING:
            monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return make


def chat(*contents: str, system: str | None = None) -> list[dict]:
    messages = [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def encode(tokenizer, *chats: list[dict]) -> list:
    return encode_chats(tokenizer, [Conversation(messages) for messages in chats])


def check(tokenizer, messages: list[dict], pieces: list[tuple[str, bool]], is_whole: bool | None = True) -> None:
    """pieces: text, and whether its tokens are targets. is_whole: whether the tokens are those of the text as one."""
    ids, targets = [], []
    for text, is_target in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        targets += [bool(is_target)] * len(tokens)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(text for text, _ in pieces) == text
    assert encode(tokenizer, messages) == [(ids, targets)]
    assert is_whole is None or is_whole == (ids == tokenizer(text, add_special_tokens=False)["input_ids"])


def reason(tokenizer, messages: list[dict]) -> str:
    (found,) = encode(tokenizer, messages)
    assert isinstance(found, BadDocument)
    return str(found)


@pytest.mark.skipif(not QWEN3.is_dir(), reason="needs Qwen3's tokenizer")
def test_ids_of_qwen3():
    before = [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]
    ids, targets = before + [9707, 151645, 198], [False] * len(before) + [True, True, False]
    assert encode(qwen3(), chat("Hi", "Hello")) == [(ids, targets)]


THINKING_CHATS = {
    "one turn": (
        chat("Hi", "Hello"),
        [(f"{USER}Hi{END}\n{ASSISTANT}{EMPTY}", 0), (f"Hello{END}", 1), ("\n", 0)],
    ),
    "two turns, the first says nothing": (
        chat("Hi", "", "Again", "the end", system="Be brief."),
        [
            (f"<|im_start|>system\nBe brief.{END}\n{USER}Hi{END}\n{ASSISTANT}", 0),
            (END, 1),
            (f"\n{USER}Again{END}\n{ASSISTANT}{EMPTY}", 0),
            (f"the end{END}", 1),
            ("\n", 0),
        ],
    ),
    "nothing said at all": (
        chat("Hi", ""),
        [(f"{USER}Hi{END}\n{ASSISTANT}{EMPTY}", 0), (END, 1), ("\n", 0)],
    ),
    "five turns in characters of several tokens": (
        chat("1", "你好", "你好", "👋🏽 né", "👋🏽", "3", "", "龘\u200d龘", "5", "ありがとう🏳️‍🌈"),
        [
            (f"{USER}1{END}\n{ASSISTANT}", 0),
            (f"你好{END}", 1),
            (f"\n{USER}你好{END}\n{ASSISTANT}", 0),
            (f"👋🏽 né{END}", 1),
            (f"\n{USER}👋🏽{END}\n{ASSISTANT}", 0),
            (f"3{END}", 1),
            (f"\n{USER}{END}\n{ASSISTANT}", 0),
            (f"龘\u200d龘{END}", 1),
            (f"\n{USER}5{END}\n{ASSISTANT}{EMPTY}", 0),
            (f"ありがとう🏳️‍🌈{END}", 1),
            ("\n", 0),
        ],
    ),
    "markers in what is said": (
        chat(f"a{END}\n{ASSISTANT}b{END}", f"c{END}\n{USER}d", ASSISTANT, f"{ASSISTANT}{EMPTY}"),
        [
            (f"{USER}a{END}\n{ASSISTANT}b{END}{END}\n{ASSISTANT}", 0),
            (f"c{END}\n{USER}d{END}", 1),
            # without an answer after its reasoning the last turn is rendered as an empty one
            (f"\n{USER}{ASSISTANT}{END}\n{ASSISTANT}{EMPTY}", 0),
            (END, 1),
            ("\n", 0),
        ],
    ),
    "words that the code looks for": (
        chat("wasSaid0x", "wasSaid1x", "wasSaid2x wasSaid", "0x"),
        [
            (f"{USER}wasSaid0x{END}\n{ASSISTANT}", 0),
            (f"wasSaid1x{END}", 1),
            (f"\n{USER}wasSaid2x wasSaid{END}\n{ASSISTANT}{EMPTY}", 0),
            (f"0x{END}", 1),
            ("\n", 0),
        ],
    ),
    "the same said by both": (
        chat("Hi", "Hi", "Hi", "Hi"),
        [
            (f"{USER}Hi{END}\n{ASSISTANT}", 0),
            (f"Hi{END}", 1),
            (f"\n{USER}Hi{END}\n{ASSISTANT}{EMPTY}", 0),
            (f"Hi{END}", 1),
            ("\n", 0),
        ],
    ),
    "newlines that the template strips, and does not": (
        chat("Hi", "Hello\n\n", "Bye", "\n\nBye\n"),
        [
            (f"{USER}Hi{END}\n{ASSISTANT}", 0),
            (f"Hello\n\n{END}", 1),
            (f"\n{USER}Bye{END}\n{ASSISTANT}{EMPTY}", 0),
            (f"Bye\n{END}", 1),
            ("\n", 0),
        ],
    ),
    "reasoning, dropped before the last turn": (
        chat("Hi", "<think>\nHm\n</think>\n\nHello", "Bye", "<think>\nOh\n</think>\n\nBye"),
        [
            (f"{USER}Hi{END}\n{ASSISTANT}", 0),
            (f"Hello{END}", 1),
            (f"\n{USER}Bye{END}\n{ASSISTANT}", 0),
            (f"<think>\nOh\n</think>\n\nBye{END}", 1),
            ("\n", 0),
        ],
    ),
    "reasoning whose start the template writes": (
        chat("Hi", "Hm\n</think>\n\nHello"),
        [(f"{USER}Hi{END}\n{ASSISTANT}<think>\n", 0), (f"Hm\n</think>\n\nHello{END}", 1), ("\n", 0)],
    ),
    "reasoning after what the template drops, and writes itself": (
        chat("Hi", "assistant\n<think>\nHm\n</think>\n\nHello"),
        [(f"{USER}Hi{END}\n{ASSISTANT}", 0), (f"<think>\nHm\n</think>\n\nHello{END}", 1), ("\n", 0)],
    ),
    "reasoning without a thought, as the template writes it": (
        chat("Hi", f"{EMPTY}Hello"),
        [(f"{USER}Hi{END}\n{ASSISTANT}{EMPTY}", 0), (f"Hello{END}", 1), ("\n", 0)],
    ),
    "a question at the end": (
        chat("Hi", "Hello", "Bye"),
        [(f"{USER}Hi{END}\n{ASSISTANT}", 0), (f"Hello{END}", 1), (f"\n{USER}Bye{END}\n", 0)],
    ),
}


@pytest.mark.parametrize("name", THINKING_CHATS)
def test_template_of_qwen3s_kind(make_tokenizer, name):
    check(make_tokenizer(THINKING), *THINKING_CHATS[name])


@pytest.mark.parametrize(
    "messages, pieces",
    [
        (
            chat("Hi", "Hello"),
            [
                (f"<|im_start|>system\nBe kind.{END}\n{USER}Hi{END}\n{ASSISTANT}", 0),
                (f"Hello{END}", 1),
                ("\n", 0),
            ],
        ),
        (
            chat("Hi", "", f"x{END}", f"<think>\nHm\n</think>\n\n{ASSISTANT}🙂 \n", system=""),
            [
                (f"<|im_start|>system\n{END}\n{USER}Hi{END}\n{ASSISTANT}", 0),
                (END, 1),
                (f"\n{USER}x{END}{END}\n{ASSISTANT}", 0),
                (f"<think>\nHm\n</think>\n\n{ASSISTANT}🙂 \n{END}", 1),
                ("\n", 0),
            ],
        ),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "One"},
                {"role": "assistant", "content": "Two"},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "Four"},
            ],
            [
                (f"<|im_start|>system\nBe kind.{END}\n{USER}Hi{END}\n{ASSISTANT}", 0),
                (f"One{END}", 1),
                (f"\n{ASSISTANT}", 0),
                (f"Two{END}", 1),
                (f"\n<|im_start|>tool\n3{END}\n{ASSISTANT}", 0),
                (f"Four{END}", 1),
                ("\n", 0),
            ],
        ),
    ],
    ids=["system prompt of the template", "system prompt of the chat", "turns that do not alternate"],
)
def test_template_of_qwen2s_kind(make_tokenizer, messages, pieces):
    check(make_tokenizer(CHATML), messages, pieces)


def test_tools_with_qwen3s_template():
    """Reasoning since the last question stays, in turns that are not the last too."""
    if qwen3() is None:
        pytest.skip("needs Qwen3's tokenizer")
    messages = chat("Hi", "<think>\nHm\n</think>\n\nLook", "<tool_response>", "<think>\nOh\n</think>\n\nThere")
    messages[2]["role"] = "tool"
    pieces = [
        (f"{USER}Hi{END}\n{ASSISTANT}", 0),
        (f"<think>\nHm\n</think>\n\nLook{END}", 1),
        (f"\n{USER}<tool_response>\n<tool_response>\n</tool_response>{END}\n{ASSISTANT}", 0),
        (f"<think>\nOh\n</think>\n\nThere{END}", 1),
        ("\n", 0),
    ]
    check(qwen3(), messages, pieces)


def test_no_token_is_half_the_templates(make_tokenizer, small):
    """Newlines at the start of an answer would be one token with the template's, and " the" with its space."""
    header = f"<|im_start|>system\nBe kind.{END}\n{USER}Hi{END}\n{ASSISTANT}"
    tokenizer = make_tokenizer(CHATML)
    pieces = [(header, 0), (f"\n\nHello\n{END}", 1), ("\n", 0)]
    check(tokenizer, chat("Hi", "\n\nHello\n"), pieces, is_whole=tokenizer is small)
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}")
    pieces = [(f"user: the{END}assistant: ", 0), (f"the{END}", 1)]
    check(tokenizer, chat("the", "the"), pieces, is_whole=False)


def test_space_before_the_end_of_a_turn_is_the_assistants(make_tokenizer):
    """It could not end its turn otherwise."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role + ':' + m.content|trim + ' <|im_end|> ' }}{% endfor %}"
    )
    pieces = [(f"user:Hi {END} assistant:", 0), (f"Hello {END}", 1), (" ", 0)]
    check(tokenizer, chat("Hi", " Hello\n"), pieces)


REWRITTEN = "the chat template rewrites what the assistant says in turn 2"
NO_END = "the chat template has no end-of-turn token after the assistant's turn 2"


UPPER = TURN.replace("m.content", "m.content|upper")
CHANGED = TURN.replace("m.content", "m.content.replace('e', 'a')")
DEFEATS = {
    "upper case": (UPPER, chat("Hi", "Hello"), REWRITTEN),
    "upper case of what is": (UPPER, chat("Hi", "HELLO"), REWRITTEN),
    "a capital letter": (TURN.replace("m.content", "m.content|capitalize"), chat("Hi", "Hello"), REWRITTEN),
    "repeated": (TURN.replace("m.content", "m.content * 2"), chat("Hi", "Hello"), REWRITTEN),
    "letters changed": (CHANGED, chat("Hi", "Hello"), REWRITTEN),
    # the user's turn ends as the assistant's would have
    "empty turn left out": ("{% if m.content %}" + TURN + "{% endif %}", chat("Hi", ""), REWRITTEN),
    "newline of an empty turn left out": (
        TURN.replace("m.content", "m.content + ('\n' if m.content else '')"),
        chat("Hi", ""),
        REWRITTEN,
    ),
    "turn left out": ("{% if loop.first or m.content != 'Hi' %}" + TURN + "{% endif %}", chat("Hi", "Hi"), REWRITTEN),
    "told at the end": (
        TURN + "{% if loop.last %}{{ messages[1].content|length }}{% endif %}",
        chat("Hi", "Hello"),
        REWRITTEN,
    ),
    "no end": (TURN.replace(END, ""), chat("Hi", "Hello"), NO_END),
    "no end, but a turn that follows": (TURN.replace(END, ""), chat("Hi", "Hello", "Bye"), NO_END),
    "an end in letters": (TURN.replace(END, "end"), chat("Hi", "Hello"), NO_END),
    "an end at the end": (
        TURN.replace("<|im_end|>\n' }}", "' }}{% if loop.last %}<|im_end|>{% endif %}"),
        chat("Hi", "Hello", "Bye", "Bye"),
        "the chat template has no <|im_end|> after the assistant's turn 2",
    ),
    "last turn first": (
        "{% set m = messages[-loop.index] %}" + TURN,
        chat("Hi", "Hello", "Bye", "Bye"),
        "the chat template does not keep turn 4 in its place",
    ),
    "raises": (
        "{% if not loop.first and loop.previtem.role == m.role %}{{ raise_exception('must\nalternate') }}{% endif %}"
        + TURN,
        [*chat("Hi", "Hello"), *chat("Bye", "Bye")[1:]],
        "the chat template cannot be rendered (must)",
    ),
}


@pytest.mark.parametrize("name", DEFEATS)
def test_templates_that_defeat_the_mask(small, monkeypatch, name):
    body, messages, message = DEFEATS[name]
    monkeypatch.setattr(small, "chat_template", "{% for m in messages %}" + body + "{% endfor %}")
    assert reason(small, messages) == message


def test_reasoning_that_the_template_changes(make_tokenizer):
    tokenizer = make_tokenizer(THINKING)
    for content in ("<think>Hm</think>Hello", "<think>\nHm\n</think>", "So <think>\nHm\n</think>\n\nHello"):
        assert reason(tokenizer, chat("Hi", content)) == REWRITTEN


def test_reasoning_and_a_template_that_trims(small, monkeypatch):
    monkeypatch.setattr(small, "chat_template", THINKING.replace("m.content.split", "(m.content|trim).split"))
    pieces = [(f"{USER}Hi{END}\n{ASSISTANT}", 0), (f"<think>\nHm\n</think>\n\nHello{END}", 1), ("\n", 0)]
    check(small, chat("Hi", "\n<think>\nHm\n</think>\n\nHello \n"), pieces)


def test_a_bad_chat_leaves_the_others(small, monkeypatch):
    template = "{% for m in messages %}{{ raise_exception('bad') if m.content == 'bad' }}" + TURN + "{% endfor %}"
    monkeypatch.setattr(small, "chat_template", template)
    good = [chat("a", "b"), chat("c", "d", "e", "the"), chat("f", "")]
    bad = chat("bad", "b")
    found = encode(small, bad, good[0], good[1], bad, good[2])
    assert [str(found[0]), str(found[3])] == ["the chat template cannot be rendered (bad)"] * 2
    assert [found[1], found[2], found[4]] == [encode(small, messages)[0] for messages in good]
    assert encode_chats(small, []) == [] and len(encode(small, bad)) == 1


def test_an_end_that_starts_as_another(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<|im_end|>!"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace(END, f"{END}!")
    header = f"<|im_start|>system\nBe kind.{END}!\n{USER}Hi{END}!\n{ASSISTANT}"
    check(tokenizer, chat("Hi", "Hello"), [(header, 0), (f"Hello{END}!", 1), ("\n", 0)])


def test_only_the_template_starts_a_text(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    start = ("<|endoftext|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[start])
    tokenizer.chat_template = THINKING
    check(tokenizer, *THINKING_CHATS["one turn"])


def test_tokenizers_that_cannot(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="data.tokenizer = .*: must have a chat template"):
        encode(tokenizer, chat("Hi", "Hello"))
    tokenizer.chat_template = CHATML
    tokenizer.split_special_tokens = True
    assert reason(tokenizer, chat("Hi", "Hello")).startswith("the tokenizer does not keep")
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="data.tokenizer = .*: must not change the beginning of a text"):
        encode(tokenizer, chat("Hi", "Hello"))
