"""Prompts as token ids with holes for visual prefixes: demonstrations first, the most similar last, then the question.

GEMEL's layout (Shi et al., 2024, section 3.3, and its released code). Each block is tokenised on its own, a name apart
from the block it answers, so that a demonstration has the same tokens in every prompt and a name the same tokens as in
the prefix trie. Text is only ever text: nothing in it can become a special token.

P prefix length, D language-model width, T tokens, K demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemel_engine.config.components import PromptSettings
from gemel_engine.errors import ConfigurationError, PromptTooLongError
from gemel_engine.tokenizer import check_special_tokens, encode_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


VISUAL_PLACEHOLDER = 0  # token id that stands where an embedding goes; never looked up
_MAX_CHARACTERS_PER_TOKEN = 128  # more than in the longest tokens there are


@dataclass(frozen=True, slots=True)
class Block:
    """A demonstration or a question: its token ids, and the visual prefix (P, D) that precedes them."""

    token_ids: tuple[int, ...]
    visual_prefix: Tensor | None

    def __len__(self) -> int:
        return len(self.token_ids) + (0 if self.visual_prefix is None else len(self.visual_prefix))


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the language model reads.

    Attributes:
        token_ids: T ids, `VISUAL_PLACEHOLDER` where a visual prefix goes.
        visual_prefixes: Position of the first embedding, and the embeddings (P, D), in order.
    """

    token_ids: tuple[int, ...]
    visual_prefixes: tuple[tuple[int, Tensor], ...]


class PromptBuilder:
    """Lays out prompts for one language model.

    Attributes:
        terminator: Token by which a generated name has ended; the first of the newline's, if it has several.
        beginning: Tokens in front of every prompt.

    Raises:
        ConfigurationError: The template lacks a field, the tokenizer has no such terminator or BOS token or can't write
            the spelling of its special tokens as text, or the question's reserve leaves no prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: PromptSettings) -> None:
        _check(settings)
        check_special_tokens(tokenizer)
        self._tokenizer = tokenizer
        self._settings = settings
        self._newline = _newline_tokens(tokenizer)
        self.terminator = self._terminator_token()
        self.beginning: tuple[int, ...] = ()
        if settings.begin_with_bos:
            if tokenizer.bos_token_id is None:
                raise ConfigurationError("prompt.begin_with_bos is set, but the tokenizer has no BOS token: unset it")
            self.beginning = (tokenizer.bos_token_id,)

    def question(self, text: str, mention: str, visual_prefix: Tensor | None) -> Block:
        """The block that asks for the mention's entity.

        Raises:
            PromptTooLongError: It exceeds the reserve kept for it.
        """
        self._check_length(len(text) + len(mention))
        block = Block(self._question_tokens(text, mention), visual_prefix)
        if len(block) > self._settings.query_reserve:
            raise PromptTooLongError(
                f"the mention's text takes {len(block)} tokens, but query_reserve is {self._settings.query_reserve}: "
                "shorten the text to the sentences around the mention, or raise the reserve"
            )
        return block

    def demonstration(self, text: str, mention: str, name: str, visual_prefix: Tensor | None) -> Block:
        """A question with its answer."""
        answer = encode_text(self._tokenizer, name) + self._newline
        return Block(self._question_tokens(text, mention) + answer, visual_prefix)

    def fitting(self, demonstrations: Sequence[Block], num_shared: int | None, question: Block) -> list[int]:
        """Places of the demonstrations that a prompt has room for; the first, least similar ones have to go.

        Args:
            demonstrations: All that were retrieved.
            num_shared: So many first ones are those of all mentions of a surface form: which of them stay does not
                depend on the question. The others share the question's reserve. None: all of them.
            question: What stands behind them.
        """
        room = self._settings.max_prompt_tokens - self._settings.query_reserve - len(self.beginning)
        shared = _last_that_fit(demonstrations[:num_shared], room)
        own = demonstrations[len(demonstrations[:num_shared]) :]
        room = self._settings.query_reserve - len(question)
        num_own = len(_last_that_fit(own, room))
        return [*shared, *range(len(demonstrations) - num_own, len(demonstrations))]

    def build(self, demonstrations: Sequence[Block], question: Block) -> Prompt:
        """Lay the blocks out one after the other, each behind its visual prefix."""
        token_ids = list(self.beginning)
        visual_prefixes = []
        for block in (*demonstrations, question):
            if block.visual_prefix is not None:
                visual_prefixes.append((len(token_ids), block.visual_prefix))
                token_ids.extend([VISUAL_PLACEHOLDER] * len(block.visual_prefix))
            token_ids.extend(block.token_ids)
        return Prompt(tuple(token_ids), tuple(visual_prefixes))

    def _check_length(self, num_characters: int) -> None:
        """Refuse a text that can't fit, since tokenising a megabyte takes seconds."""
        if num_characters > _MAX_CHARACTERS_PER_TOKEN * self._settings.query_reserve:
            raise PromptTooLongError(
                f"the mention's text has {num_characters} characters, and query_reserve is "
                f"{self._settings.query_reserve} tokens: shorten the text to the sentences around the mention"
            )

    def _question_tokens(self, text: str, mention: str) -> tuple[int, ...]:
        return encode_text(self._tokenizer, self._settings.template.format(text=text, mention=mention))

    def _terminator_token(self) -> int:
        if self._settings.terminator == "eos":
            if self._tokenizer.eos_token_id is None:
                raise ConfigurationError(
                    'prompt.terminator is "eos", but the tokenizer has no EOS token: use "newline"'
                )
            return int(self._tokenizer.eos_token_id)
        if not self._newline:
            raise ConfigurationError(
                'prompt.terminator is "newline", but the tokenizer writes no token for a newline: use "eos"'
            )
        return self._newline[0]


def _newline_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Tokens of a newline behind a name.

    Llama 2's tokenizer begins every text with a space, so that a newline alone becomes two tokens. Behind a letter it
    is the one that the model knows from the ends of lines.
    """
    alone = encode_text(tokenizer, "\n")
    letter, line = encode_text(tokenizer, "a"), encode_text(tokenizer, "a\n")
    if len(alone) == 1 or len(line) <= len(letter) or line[: len(letter)] != letter:
        return alone
    return line[len(letter) :]


def _last_that_fit(blocks: Sequence[Block], room: int) -> range:
    """Places of the last blocks that take no more than `room` tokens."""
    first = len(blocks)
    while first and len(blocks[first - 1]) <= room:
        first -= 1
        room -= len(blocks[first])
    return range(first, len(blocks))


def _check(settings: PromptSettings) -> None:
    try:
        filled = settings.template.format(text="\x01", mention="\x02")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigurationError(f"prompt.template {settings.template!r} is malformed: {error!r}") from error
    if "\x01" not in filled or "\x02" not in filled:
        raise ConfigurationError(f"prompt.template {settings.template!r} must hold the fields {{text}} and {{mention}}")
    longest = settings.max_prompt_tokens - settings.begin_with_bos
    if not 0 < settings.query_reserve <= longest:
        raise ConfigurationError(
            f"prompt.query_reserve is {settings.query_reserve}: it must be positive and at most {longest}, which is "
            "max_prompt_tokens, less one for a BOS token"
        )
