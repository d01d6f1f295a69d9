"""Mentions by a token-classification model: one whose label depends on the token alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.tables import fast_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForTokenClassification

from gemel_engine.cli.main import main
from gemel_engine.config.finding import FindConfig, FinderSettings
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.finding.finders import finder_contents
from gemel_engine.finding.tagger import TaggerFinder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["paris", "new", "york", "may", "the", "##s", "##an"]
LABELS = ["O", "B-LOC", "I-LOC", "B-DATE", "I-DATE"]
LABEL_OF = {"paris": "B-LOC", "new": "B-LOC", "york": "I-LOC", "may": "B-DATE", "##an": "B-DATE", "[MASK]": "B-LOC"}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without layers, of 32 positions."""
    directory = tmp_path_factory.mktemp("tagger")
    tokens = [*SPECIAL, *WORDS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    fast_tokenizer(backend, **names).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=len(tokens),
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=34,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    model = BertForTokenClassification(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.bert.embeddings.parameters():
            parameter.zero_()
        model.bert.embeddings.word_embeddings.weight.copy_(torch.eye(len(tokens)))
        model.bert.embeddings.LayerNorm.weight.fill_(1)
        model.classifier.bias.zero_()
        wanted = torch.tensor([LABELS.index(LABEL_OF.get(token, "O")) for token in tokens])
        model.classifier.weight.copy_(torch.nn.functional.one_hot(wanted, len(LABELS)).T)
    model.save_pretrained(directory)
    return directory


def found(finder: TaggerFinder, *texts: str) -> list[list[str]]:
    return [
        [text[span.start : span.stop] for span in spans] for text, spans in zip(texts, finder.find(texts), strict=True)
    ]


@pytest.mark.gpu
def test_words_become_mentions(tagger: Path, device: str) -> None:
    finder = TaggerFinder(str(tagger), device=device, batch_size=3)
    texts = "The New York, Paris.", "May Parisan", "[MASK] the", "news"
    # A word has the label of its first token, and text is no special token.
    assert found(finder, *texts) == [["New York", "Paris"], ["May", "Parisan"], [], ["news"]]
    assert finder.find([]) == []


def test_labels_are_chosen(tagger: Path) -> None:
    assert found(TaggerFinder(str(tagger), ["DATE"]), "May, New York") == [["May"]]
    with pytest.raises(ConfigurationError, match=r"has 'PER', but the labels of .* are DATE, LOC"):
        TaggerFinder(str(tagger), ["PER"])


@pytest.mark.parametrize("shift", range(0, 40, 3))
def test_a_long_text_is_read_in_windows(tagger: Path, shift: int) -> None:
    text = "the " * shift + "New York " + "the " * 30 + "Paris " + "the " * 50 + "New York"
    assert found(TaggerFinder(str(tagger)), text) == [["New York", "Paris", "New York"]]


def test_another_model_is_refused(mention_encoder_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lacks the tensors classifier"):
        TaggerFinder(str(mention_encoder_directory))
    finder = FinderSettings(model=str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match=r"no token-classification model can be loaded from .*nowhere"):
        finder_contents(FindConfig(input="none", output="none", finder=finder))


def test_the_command_takes_a_model(tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"document_id": [7, 8], "text": ["the New York", "the"]}), tmp_path / "documents.parquet")
    config = tmp_path / "find.toml"
    config.write_text(
        f'input = "{tmp_path / "documents.parquet"}"\noutput = "{tmp_path / "found"}"\n[finder]\nmodel = "{tagger}"\n'
    )
    monkeypatch.setattr(sys, "argv", ["gemel", "find-mentions", str(config), "--finder.labels", "LOC"])
    main()
    (row,) = pq.read_table(tmp_path / "found" / "data").to_pylist()
    assert (row["mention_id"], row["mention"], row["mention_start"], row["group"]) == ("7:4", "New York", 4, "7")
