"""Checkpoints that lack something, hold something else, or are no files: found before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    save_mention_encoder,
    write_image_encoder,
)
from support.trouble import make_endless
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from gemel_engine.decoding.language_model import FrozenLanguageModel, check_language_model, language_model_fingerprint
from gemel_engine.errors import ArtifactError
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.vision.encoder import ImageEncoder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
WEIGHTS = "model.safetensors"
TINY_VIT = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 1}

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(language_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a language model, to be damaged."""
    return Path(shutil.copytree(language_models["llama"], tmp_path / "model"))


@pytest.fixture
def encoder(mention_encoder_directory: Path, tmp_path: Path) -> Path:
    """A copy of a mention encoder, to be damaged."""
    return Path(shutil.copytree(mention_encoder_directory, tmp_path / "encoder"))


def edit_weights(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def drop_a_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if "layer" in name and ".1." in name]:
        del tensors[name]


def add_a_tensor(tensors: Tensors) -> None:
    tensors["encoder.extra.weight"] = torch.zeros(2)


def reshape_a_tensor(tensors: Tensors) -> None:
    name = min(name for name in tensors if "layer" in name)
    tensors[name] = torch.zeros(3, 3)


DAMAGES = {"lacks the tensors": drop_a_layer, "unexpected tensors": add_a_tensor, "another shape": reshape_a_tensor}


def split_weights(directory: Path) -> Path:
    """Put the weights into two files with an index, which is returned."""
    tensors = load_file(directory / WEIGHTS)
    shards = {f"model-0000{n}-of-00002.safetensors": dict(list(tensors.items())[n - 1 :: 2]) for n in (1, 2)}
    for name, part in shards.items():
        save_file(part, directory / name, {"format": "pt"})
    (directory / WEIGHTS).unlink()
    index = directory / f"{WEIGHTS}.index.json"
    places = {name: shard for shard, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_whole_language_model_passes(language_models: dict[str, Path], family: str) -> None:
    check_language_model(str(language_models[family]), verify=True)


def test_a_language_model_in_several_files_passes(model: Path) -> None:
    split_weights(model)
    check_language_model(str(model), verify=True)


@pytest.mark.parametrize("found", DAMAGES)
def test_a_language_model_without_its_own_tensors_is_refused(model: Path, found: str) -> None:
    edit_weights(model, DAMAGES[found])
    with pytest.raises(ArtifactError, match=f"the language model .*{found}"):
        check_language_model(str(model))
    with pytest.raises(ArtifactError):
        FrozenLanguageModel(str(model))


def test_tied_embeddings_may_lack_the_head(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ArtifactError, match=r"lm_head\.weight"):
        check_language_model(str(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    check_language_model(str(model))
    FrozenLanguageModel(str(model))


def test_pickled_weights_are_checked_without_being_run(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    check_language_model(str(model), verify=True)
    torch.save(dict(list(tensors.items())[1:]), model / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="lacks the tensors"):
        check_language_model(str(model))
    torch.save(tensors | {"x": Path("x")}, model / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="damaged or holds more than tensors"):
        check_language_model(str(model))


def test_a_missing_shard_is_named(model: Path) -> None:
    split_weights(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match="model-00002-of-00002"):
        check_language_model(str(model))


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "", "..", "a\0b"])
@pytest.mark.parametrize("whole", [WEIGHTS, "pytorch_model.bin"])
def test_an_index_that_leads_out_of_the_directory_is_refused(model: Path, whole: str, place: str) -> None:
    (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
    (model / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": place}}))
    with pytest.raises(ArtifactError, match=r"is no index of weights|cannot be read"):
        check_language_model(str(model))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_told_from_a_file(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    with pytest.raises(ArtifactError, match=rf"{name} is a pointer of git-lfs.*git lfs pull"):
        check_language_model(str(model))


def test_pointers_to_weights_of_another_format_do_no_harm(model: Path) -> None:
    (model / "pytorch_model.bin").write_text(POINTER)
    check_language_model(str(model))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_what_is_no_regular_file_of_a_model_is_refused(model: Path, name: str) -> None:
    make_endless(model / name)
    for use in (check_language_model, load_tokenizer, language_model_fingerprint, FrozenLanguageModel, MentionEncoder):
        with pytest.raises(ArtifactError, match="not a regular file"):
            use(str(model))


@pytest.mark.parametrize("size", [0, 7, 100, -10])
def test_cut_weights_are_refused(model: Path, size: int) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:size])
    with pytest.raises(ArtifactError, match="is damaged"):
        check_language_model(str(model))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_found_where_all_are_read(model: Path, value: float) -> None:
    edit_weights(model, lambda tensors: tensors["lm_head.weight"][0].fill_(value))
    check_language_model(str(model))
    with pytest.raises(ArtifactError, match=r"not finite in lm_head\.weight"):
        check_language_model(str(model), verify=True)


def test_weights_that_only_one_engine_would_read_are_refused(model: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "other.safetensors")
    with pytest.raises(ArtifactError, match=r"engines would read different ones: remove other\.safetensors"):
        check_language_model(str(model))


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": "llama", "hidden_size": "x"}', "[" * 100_000])
def test_a_configuration_that_makes_no_model_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ArtifactError):
        check_language_model(str(model))


@pytest.mark.parametrize("found", DAMAGES)
def test_a_mention_encoder_without_its_own_tensors_is_refused(encoder: Path, found: str) -> None:
    edit_weights(encoder, DAMAGES[found])
    with pytest.raises(ArtifactError, match="mention encoder"):
        MentionEncoder(str(encoder))


def test_an_encoder_of_another_task_embeds_without_its_head(encoder: Path, tmp_path: Path) -> None:
    expected = MentionEncoder(str(encoder)).encode(["bear"])
    other = tmp_path / "masked"
    model, tokenizer = BertForMaskedLM.from_pretrained(encoder), load_tokenizer(str(encoder))
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    first, second = MentionEncoder(str(other)), MentionEncoder(str(other))
    assert first.fingerprint == second.fingerprint, "nothing of it is random"
    assert (first.encode(["bear"]) == expected).all()
    edit_weights(other, lambda tensors: tensors.update({"bert.encoder.extra": torch.zeros(2)}))
    with pytest.raises(ArtifactError, match="unexpected"):
        MentionEncoder(str(other))


def test_encoders_with_numbers_that_are_not_finite_are_refused(encoder: Path, tmp_path: Path) -> None:
    edit_weights(encoder, lambda tensors: min(tensors.items())[1].view(-1)[0].fill_(torch.nan))
    with pytest.raises(ArtifactError, match=r"mention encoder .* not finite"):
        MentionEncoder(str(encoder))
    directory = tmp_path / "images"
    directory.mkdir()
    write_image_encoder(directory, TINY_VIT)
    path = directory / "open_clip_model.safetensors"
    tensors = load_file(path)
    tensors["visual.conv1.weight"].view(-1)[0] = torch.nan
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(ArtifactError, match=r"image encoder .* not finite"):
        ImageEncoder(str(directory))
    path.write_text(POINTER)
    with pytest.raises(ArtifactError, match="git lfs pull"):
        ImageEncoder(str(directory))


def test_models_in_use_are_no_mappings_of_their_files(model: Path, tmp_path: Path) -> None:
    encoder = save_mention_encoder(tmp_path / "encoder")
    language_model, mention_encoder = FrozenLanguageModel(str(model)), MentionEncoder(str(encoder))
    modules = (language_model.module, mention_encoder._model)
    before = [[parameter.clone() for parameter in module.parameters()] for module in modules]
    for directory in (model, encoder):
        size = (directory / WEIGHTS).stat().st_size
        with (directory / WEIGHTS).open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\1" * (size - size // 2))
    for module, parameters in zip(modules, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), parameters, strict=True))


def test_a_tokenizer_file_with_anything_in_it_is_an_error(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ArtifactError, match="no tokenizer can be loaded"):
        load_tokenizer(str(model))
