"""Prompts as token ids with placeholders for visual prefixes.

Demonstrations come first, the most similar last, then the question, in GEMEL's layout (Shi et al.,
2024, section 3.3, and its released code). Each block is tokenised separately, and each name
separately from its question: a demonstration has the same tokens in every prompt, and a name the
same tokens as in the prefix trie. Nothing in a text can become a special token.

P prefix length, D language-model width, T tokens, K demonstrations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemel_engine.config.components import PromptSettings
from gemel_engine.errors import ConfigurationError, PromptTooLongError
from gemel_engine.retrieval.window import place_of, window
from gemel_engine.tokenizer import check_special_tokens, encode_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


VISUAL_PLACEHOLDER = 0  # token id at the position of a visual embedding; never looked up
_MAX_CHARACTERS_PER_TOKEN = 128  # more than the longest known tokens have
_WINDOW_CHARACTERS_PER_TOKEN = 8  # twice as many as tokens have in most texts


@dataclass(frozen=True, slots=True)
class Block:
    """Token ids of a demonstration or a question, and the visual prefix (P, D) in front of them.

    Attributes:
        token_ids: Token ids.
        visual_prefix: Embeddings of the picture; None without one.
        num_characters_dropped: Number of characters of the text that are left out.
    """

    token_ids: tuple[int, ...]
    visual_prefix: Tensor | None
    num_characters_dropped: int = 0

    def __len__(self) -> int:
        return len(self.token_ids) + (0 if self.visual_prefix is None else len(self.visual_prefix))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Prompt:
    """Input of the language model.

    Attributes:
        token_ids: T token ids, with `VISUAL_PLACEHOLDER` at the positions of visual prefixes.
        visual_prefixes: Position of the first embedding and the embeddings (P, D) of each visual
            prefix, in order.
        num_characters_dropped: Number of characters of the mention's text that are left out.
    """

    token_ids: tuple[int, ...]
    visual_prefixes: tuple[tuple[int, Tensor], ...]
    num_characters_dropped: int = 0


class PromptBuilder:
    """Lays out prompts for one language model.

    Attributes:
        terminator: Token that ends a generated name; of a newline with several tokens, the first.
        beginning: Tokens at the beginning of every prompt.

    Raises:
        ConfigurationError: The template lacks a field, the tokenizer has no such terminator or BOS
            token or can't encode the spelling of its special tokens as text, or `query_reserve` is
            not between 1 and the length of a prompt.
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

    def question(self, text: str, mention: str, visual_prefix: Tensor | None, start: int | None = None) -> Block:
        """Return the block that asks for the mention's entity.

        Of a text for which `query_reserve` has no room, a window around the mention is left.

        Args:
            text: Sentence, caption or article.
            mention: Surface form.
            visual_prefix: Embeddings (P, D) of the picture; None without one.
            start: Character offset of the surface form; None: its first occurrence, or the
                beginning of a text that does not contain it.

        Raises:
            PromptTooLongError: The block exceeds `query_reserve` with the surface form alone.
        """
        reserve = self._settings.query_reserve
        if len(text) + len(mention) <= _MAX_CHARACTERS_PER_TOKEN * reserve:  # a megabyte takes seconds to tokenise
            block = Block(self._question_tokens(text, mention), visual_prefix)
            if len(block) <= reserve:
                return block
        place = place_of(text, mention, start)

        def shortened(num_characters: int) -> Block:
            kept = window(text, *place, num_characters)
            return Block(self._question_tokens(kept, mention), visual_prefix, len(text) - len(kept))

        sizes = range(min(len(text), _WINDOW_CHARACTERS_PER_TOKEN * reserve) + 1)
        num_fitting = bisect_left(sizes, True, key=lambda size: len(shortened(size)) > reserve)
        if num_fitting == 0:
            raise PromptTooLongError(
                f"the mention takes {len(shortened(0))} tokens without the text around it, but query_reserve is "
                f"{reserve}: raise the reserve"
            )
        return shortened(num_fitting - 1)

    def demonstration(self, text: str, mention: str, name: str, visual_prefix: Tensor | None) -> Block:
        """Return the block of a question with its answer."""
        answer = encode_text(self._tokenizer, name) + self._newline
        return Block(self._question_tokens(text, mention) + answer, visual_prefix)

    def fitting(self, demonstrations: Sequence[Block], num_shared: int | None, question: Block) -> list[int]:
        """Return the places of the demonstrations that fit into a prompt, dropping the first ones.

        Args:
            demonstrations: All retrieved demonstrations, the most similar last.
            num_shared: Number of leading demonstrations that all mentions of a surface form have in
                common. Which of these fit does not depend on the question; the others must fit into
                `query_reserve` together with the question. None: all of them.
            question: The block after the demonstrations.
        """
        room = self._settings.max_prompt_tokens - self._settings.query_reserve - len(self.beginning)
        shared = _last_that_fit(demonstrations[:num_shared], room)
        own = demonstrations[len(demonstrations[:num_shared]) :]
        room = self._settings.query_reserve - len(question)
        num_own = len(_last_that_fit(own, room))
        return [*shared, *range(len(demonstrations) - num_own, len(demonstrations))]

    def build(self, demonstrations: Sequence[Block], question: Block) -> Prompt:
        """Join the blocks, each after its visual prefix."""
        token_ids = list(self.beginning)
        visual_prefixes = []
        for block in (*demonstrations, question):
            if block.visual_prefix is not None:
                visual_prefixes.append((len(token_ids), block.visual_prefix))
                token_ids.extend([VISUAL_PLACEHOLDER] * len(block.visual_prefix))
            token_ids.extend(block.token_ids)
        return Prompt(tuple(token_ids), tuple(visual_prefixes), question.num_characters_dropped)

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
    """Return the tokens of a newline after a name.

    Llama 2's tokenizer begins every text with a space, so a newline alone becomes two tokens. After
    a letter it becomes the one token that the model knows from the ends of lines.
    """
    alone = encode_text(tokenizer, "\n")
    letter, line = encode_text(tokenizer, "a"), encode_text(tokenizer, "a\n")
    if len(alone) == 1 or len(line) <= len(letter) or line[: len(letter)] != letter:
        return alone
    return line[len(letter) :]


def _last_that_fit(blocks: Sequence[Block], room: int) -> range:
    """Return the places of the last blocks that take at most `room` tokens in all."""
    first = len(blocks)
    while first and len(blocks[first - 1]) <= room:
        first -= 1
        room -= len(blocks[first])
    return range(first, len(blocks))


def _check(settings: PromptSettings) -> None:
    try:
        filled = settings.template.format(text="\x01", mention="\x02")
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"prompt.template {settings.template!r} is malformed: {error!r}") from error
    if "\x01" not in filled or "\x02" not in filled:
        raise ConfigurationError(f"prompt.template {settings.template!r} must hold the fields {{text}} and {{mention}}")
    longest = settings.max_prompt_tokens - settings.begin_with_bos
    if not 0 < settings.query_reserve <= longest:
        raise ConfigurationError(
            f"prompt.query_reserve is {settings.query_reserve}: it must be positive and at most {longest}, which is "
            "max_prompt_tokens, less one for a BOS token"
        )
