"""From documents to token ids: text and chats by the tokenizer, tokens as they are."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from flashsae.errors import ConfigError, DataError, require
from flashsae.lm.framing import Framing, encode
from flashsae.text.content import Block, Chat, Content, Tokens

_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """The tokens of a document, without those that are put around it anyway.

    Args:
        ids: [n], int64.
        keep: [n], bool, which tokens may become rows; None: all.
    """

    ids: np.ndarray
    keep: np.ndarray | None


class Encoder:
    """Turns documents into token ids that the model knows.

    Args:
        tokenizer: of the model, from transformers.
        framing: of its inputs.
        special: ids of special tokens.
        vocabulary: how many ids the model knows; None: those of the tokenizer.
        assistant_only: keep only what the assistant says.
        is_packed: documents stand behind one another, with a token between them.
    """

    def __init__(
        self,
        tokenizer: Any,
        framing: Framing,
        special: frozenset[int],
        vocabulary: int | None,
        *,
        assistant_only: bool = False,
        is_packed: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only
        self._vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1 if vocabulary is None else vocabulary
        closing = framing.closing if is_packed else ()
        self._at_start = special.intersection((*framing.first, *closing))
        self._at_end = special.intersection((*framing.suffix, *closing))

    def __call__(self, block: Block) -> list[Encoded]:
        """Return the tokens of the documents of a block.

        Raises:
            ConfigError: there is a chat and no template for it, or only the assistant is wanted where nobody knows it.
            DataError: the template refuses a chat, or the model does not know a token.
        """
        # a template gives text, so that chats go through the tokenizer with all that is text in one call of its threads
        texts = {place: self._text(number, content) for place, (number, content) in enumerate(block)}
        wanted = [text for text in texts.values() if isinstance(text, str)]
        ids = iter(encode(self._tokenizer, wanted) if wanted else ())
        found = []
        for (number, _), text in zip(block, texts.values(), strict=True):
            tokens = Tokens(next(ids)) if isinstance(text, str) else text
            self._check_known(number, tokens.ids)
            found.append(self._without_added(tokens))
        return found

    def _text(self, number: int, content: Content) -> str | Tokens:
        """Return the text that a document stands for, or its tokens where these are known."""
        if isinstance(content, Chat):
            return self._said_by_assistant(number, content) if self._assistant_only else self._rendered(number, content)
        if self._assistant_only:
            raise ConfigError(
                "assistant_only: expected chats, a column of messages, and document "
                f"{number} is {'text' if isinstance(content, str) else 'tokens'}. Leave the setting out."
            )
        return content

    def _rendered(self, number: int, chat: Chat, **how: Any) -> Any:
        """Return a chat as the template of the tokenizer writes it."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError(
                "model: its tokenizer has no chat template, and the documents are chats. Name the model that was "
                "trained on chats, or a column of text."
            )
        require("jinja2", "report")
        messages = [dict(message) for message in chat.messages]
        try:
            return self._tokenizer.apply_chat_template(messages, **{"tokenize": False, **how})
        except Exception as error:  # whatever a template raises, or its language, about what it was not written for
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(".")
            raise DataError(
                f"document {number}: the chat template of the tokenizer cannot write this chat ({reason}). Take it "
                "out, or correct its messages."
            ) from error

    def _said_by_assistant(self, number: int, chat: Chat) -> Tokens:
        """Return the tokens of a chat, of which those are kept that the template marks as the assistant's."""
        template = getattr(self._tokenizer, "chat_template", None)
        if template and not _MARKS_ASSISTANT.search(str(template)):
            raise ConfigError(
                "assistant_only: the chat template of this tokenizer does not mark what the assistant says "
                "({% generation %}). Leave the setting out."
            )
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self._rendered(number, chat, **how)
        return Tokens(found["input_ids"], found["assistant_masks"])

    def _check_known(self, document: int, ids: np.ndarray) -> None:
        """Raise DataError for an id that the model has no embedding of; on a GPU it would end the process."""
        largest = int(ids.max(initial=0))
        if largest >= self._vocabulary:
            raise DataError(
                f"document {document} has the token {largest}{self._named(largest)}, and the model knows the ids 0 to "
                f"{self._vocabulary - 1}. Use the tokenizer that belongs to the model."
            )

    def _named(self, token: int) -> str:
        """Return what a tokenizer calls a token, for messages; "" where it does not know it."""
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, OverflowError):
            name = None
        return "" if name is None else f" ({name!r})"

    def _without_added(self, tokens: Tokens) -> Encoded:
        """Return tokens without the special ones at their ends that are added anyway: none comes twice."""
        ids, keep = tokens.ids, tokens.keep
        start, stop = 0, len(ids)
        while start < stop and int(ids[start]) in self._at_start:
            start += 1
        while start < stop and int(ids[stop - 1]) in self._at_end:
            stop -= 1
        return Encoded(ids[start:stop].astype(np.int64), None if keep is None else keep[start:stop])
