"""Prompts as token ids with holes for visual prefixes: demonstrations first, the most similar last, then the question.

GEMEL's layout (Shi et al., 2024, section 3.3, and its released code). Each block is tokenised on its own, a name apart
from the block it answers, so that a demonstration has the same tokens in every prompt and a name the same tokens as in
the prefix trie. Text is only ever text: nothing in it can become a special token.

P prefix length, D language-model width, T tokens, K demonstrations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gemel_engine.bounds import Count
from gemel_engine.errors import ArtifactError, ConfigurationError, PromptTooLongError

if TYPE_CHECKING:  # the settings are read where no model is
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

Terminator = Literal["newline", "eos"]

GEMEL_TEMPLATE = "[Text]{text}\n[Question]What does {mention} mentioned in the text refer to?\n[Answer]"
VISUAL_PLACEHOLDER = 0  # token id that stands where an embedding goes; never looked up
_MAX_CHARACTERS_PER_TOKEN = 128  # more than in the longest tokens there are


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """How prompts are laid out.

    Attributes:
        template: Question layout with the fields `{text}` and `{mention}`; the name follows it directly.
        terminator: What ends a generated name: the first token of the newline with which demonstrations
            end, or the end-of-text token. Demonstrations end with a newline in either case.
        max_prompt_tokens: Upper limit of T.
        query_reserve: Tokens kept free for the question. Demonstrations get the rest, so that which ones fit depends on
            the surface form alone and equal surface forms share their prefix.
        begin_with_bos: Put the tokenizer's BOS token first (GEMEL puts none).
        demonstration_pictures: Give demonstrations the visual prefixes of their own pictures, as GEMEL does.
    """

    template: str = GEMEL_TEMPLATE
    terminator: Terminator = "newline"
    max_prompt_tokens: Count = 2048
    query_reserve: Count = 512
    begin_with_bos: bool = False
    demonstration_pictures: bool = True


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


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """Token ids of a text, whose spelling of a special token stays plain text."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def check_embedded(
    tokenizer: PreTrainedTokenizerFast, num_embeddings: int, name: str, added: Iterable[int] = ()
) -> None:
    """Raise unless a model has an embedding for each token that its input can contain.

    A special token may lack one, as padding added for training often does, if no text becomes it.

    Args:
        tokenizer: The model's tokenizer.
        num_embeddings: Rows of the model's embedding matrix.
        name: The model, for the message.
        added: Special tokens that are put beside the tokens of a text.

    Raises:
        ArtifactError: A token has no embedding.
    """
    special = _special_tokens(tokenizer)
    missing = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= num_embeddings}
    reachable = [
        token
        for token_id, token in sorted(missing.items())
        if token_id not in special or token_id in {*added, *encode_text(tokenizer, token)}
    ]
    if reachable:
        raise ArtifactError(
            f"{name} has {num_embeddings} token embeddings, and its tokenizer makes {len(reachable)} tokens beyond "
            f"them, such as {reachable[0]!r}: resize the model's embeddings, or remove the tokens from the tokenizer"
        )


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
        _check_special_tokens(tokenizer)
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


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Special tokens by their ids, without the one that replaces what a vocabulary lacks."""
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    special.pop(tokenizer.unk_token_id, None)
    return special


def _check_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """See that no text becomes a special token: a vocabulary may spell them, beside listing them as added."""
    special = _special_tokens(tokenizer)
    for token in special.values():
        if not special.keys().isdisjoint(encode_text(tokenizer, token)):
            raise ConfigurationError(
                f"the tokenizer of the language model reads the text {token!r} as its special token, which a corpus "
                "could then put into prompts: use another language model"
            )


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
