"""Chats: records of turns, or of prompts and responses, rendered with the tokenizer's chat template."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tidar.config import UserError
from tidar.config.options import Data
from tidar.data.chat_records import Conversation, conversation, without_nulls
from tidar.data.chat_template import encode_chats, template_variables
from tidar.data.corpus import BadDocument, Corpus, Document
from tidar.data.source import Part, batched
from tidar.data.text import RecordSource, is_table
from tidar.data.tokenizer import Tokenizer


class Chat(RecordSource):
    """Targets are what the assistant says, with the token that ends its turn."""

    meaning = ("prompt_field", "response_field", "end_of_document", "end_is_target")

    def __init__(self, options: Data, tokenizer: Tokenizer | None, vocab_size: int | None = None):
        super().__init__(options, tokenizer, vocab_size)
        if not self.tokenizer.chat_template:
            raise UserError(f"data.tokenizer = {self.tokenizer.name}: has no chat template, which chats need")
        self.variables = template_variables(self.tokenizer.backend)

    def documents(self, part: Part) -> Iterator[Document | BadDocument | None]:
        end = self.end_of_document(None)  # the template ends turns, and so the last one

        def encode(chats: list[Conversation]) -> list[Document | BadDocument]:
            return [
                chat if isinstance(chat, BadDocument) else self.finish(np.array(chat[0]), np.array(chat[1], bool), end)
                for chat in encode_chats(self.tokenizer.backend, chats)
            ]

        def size(chat: Conversation) -> int:
            return sum(len(message["content"]) for message in chat.messages)

        yield from batched(self._conversations(part), encode, size)

    def _conversations(self, part: Part) -> Iterator[Conversation | BadDocument | None]:
        fields = self.options.prompt_field, self.options.response_field
        for record in self.records(part):
            if record is None or isinstance(record, BadDocument):
                yield record
                continue
            try:
                yield conversation(without_nulls(record) if is_table(part) else record, *fields, self.variables)
            except BadDocument as error:
                yield error


def end_of_turn(corpora: list[Corpus], tokenizer: Any) -> int | None:
    """Id of the token that ends an assistant's turn, as the chat template of `tokenizer` renders it.

    None where no corpus was made from chats, and without a chat template.
    """
    if not any(corpus.meta.get("source") == "chat" for corpus in corpora) or not getattr(tokenizer, "chat_template", 0):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (chat,) = encode_chats(tokenizer.backend, [Conversation(turns)])
    if isinstance(chat, BadDocument):
        return None
    return [token for token, is_target in zip(*chat) if is_target][-1]
