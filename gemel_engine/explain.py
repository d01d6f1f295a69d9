"""Why a mention is linked as it is: demonstrations, the prompt, and the same without the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from gemel_engine.errors import ConfigurationError, MentionError
from gemel_engine.linker import Linker
from gemel_engine.prompt import Prompt
from gemel_engine.retrieval import Demonstration
from gemel_engine.types import Mention, Prediction


@dataclass(frozen=True, slots=True)
class VisualMark:
    """Stands where a prompt has a picture's embeddings, so many of them."""

    num_embeddings: int


@dataclass(frozen=True, slots=True)
class UsedDemonstration:
    """A demonstration, and the cosine of its surface form to the mention's."""

    demonstration: Demonstration
    similarity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One mention, what was said of it, and what from.

    Attributes:
        mention: What was linked.
        prediction: What was said of it.
        demonstrations: In the order of the prompt: the last stands right before the question.
        prompt: What the language model read: its text, as the tokenizer writes it, and marks of pictures.
        without_picture: The same mention without its picture; None if it has none.
    """

    mention: Mention
    prediction: Prediction
    demonstrations: tuple[UsedDemonstration, ...]
    prompt: tuple[str | VisualMark, ...]
    without_picture: Explanation | None = None


def explain(linker: Linker, mention: Mention, picture: bytes | None = None) -> Explanation:
    """Link one mention and say what led there.

    Args:
        linker: All parts of a run.
        mention: What to link.
        picture: Content of an image file; with one, the mention is linked once more without it.

    Raises:
        ConfigurationError: There is a picture, but no image encoder.
        MentionError: It can't be linked.
    """
    with linker.lock:
        return _explain(linker, mention, picture)


def _explain(linker: Linker, mention: Mention, picture: bytes | None) -> Explanation:
    (features,), (rows,) = linker.prepare([mention], [picture])
    if isinstance(features, MentionError):
        raise features
    if picture is not None and features is None:
        raise ConfigurationError("a picture needs vision.image_encoder: set it, or leave the picture out")
    generator = linker.generator
    prompt, used = generator.prompt(mention, features, rows)
    generator.search(mention)  # raises what would be the prediction's error
    (prediction,) = generator.generate([mention], [features], [rows])
    return Explanation(
        mention=mention,
        prediction=prediction,
        demonstrations=tuple(_demonstrations(linker, mention.mention, used)),
        prompt=tuple(_pieces(prompt, generator.artifacts.tokenizer)),
        without_picture=None if picture is None else _explain(linker, mention, None),
    )


def _demonstrations(linker: Linker, surface_form: str, rows: Sequence[int]) -> Iterator[UsedDemonstration]:
    index = linker.generator.artifacts.index
    if index is not None and linker.retriever is not None:
        for row, similarity in zip(rows, linker.retriever.similarities(surface_form, rows), strict=True):
            yield UsedDemonstration(index[row], similarity)


def _pieces(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> Iterator[str | VisualMark]:
    start = 0
    for position, prefix in prompt.visual_prefixes:
        if position > start:
            yield _text(prompt.token_ids[start:position], tokenizer)
        yield VisualMark(len(prefix))
        start = position + len(prefix)
    yield _text(prompt.token_ids[start:], tokenizer)


def _text(token_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
