"""What many tests use. What makes models is imported by those that ask for one: the unit tests start without torch."""

from __future__ import annotations

import os
import sys

# Before Ray, vLLM or transformers are imported: no usage reports, no hub, an engine in the test's own process, and one
# thread for each of the small models, whose further threads would only wait for each other.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings
from support.s3_server import run_s3_server  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gemel_engine.retrieval.encoder import MentionEncoder

# The same examples in every run: a test that fails fails for a change of the code.
fixed = settings(derandomize=True, deadline=None)
settings.register_profile("fixed", fixed)
settings.register_profile("thorough", fixed, max_examples=1000)  # chosen by `--hypothesis-profile`
settings.load_profile("fixed")


LONGEST = (  # in descending order; they start Ray
    "tests/linking/test_on_ray.py",
    "tests/training/test_job.py",
    "tests/linking/test_plan.py",
    "tests/pipeline/test_knowledge_bases.py",
    "tests/finding/test_job.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the tests marked `gpu` compute")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        import torch

        if torch.cuda.is_available():
            return
        raise pytest.UsageError("there is no GPU here that PyTorch can use: nothing was checked; try --device cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    rank = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_report_header(config: pytest.Config) -> str:
    name = "CPU"
    if config.getoption("--device") == "cuda":
        import torch

        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"device: {name}, torch {version('torch')}, ray {version('ray')}"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where to compute: a CPU, unless pytest was told otherwise."""
    name: str = request.config.getoption("--device")
    return name


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the entity names."""
    from support.models import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Random causal language models of two architectures."""
    from support.models import save_tiny_model

    return {family: save_tiny_model(family, tokenizer, tmp_path_factory.mktemp(family)) for family in ("llama", "opt")}


@pytest.fixture(scope="session")
def mention_encoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random BERT."""
    from support.models import save_mention_encoder

    return save_mention_encoder(tmp_path_factory.mktemp("mention_encoder"))


@pytest.fixture(scope="session")
def encoder(mention_encoder_directory: Path) -> MentionEncoder:
    """The random BERT, in passes of fewer forms than the tests give it."""
    from gemel_engine.retrieval.encoder import MentionEncoder

    return MentionEncoder(str(mention_encoder_directory), tokens_per_pass=16)


@pytest.fixture(scope="session")
def artifacts(
    tmp_path_factory: pytest.TempPathFactory, language_models: dict[str, Path], mention_encoder_directory: Path
) -> dict[str, Path]:
    """The artifacts of tiny models."""
    from support.models import save_artifacts

    return save_artifacts(tmp_path_factory.mktemp("artifacts"), language_models["llama"], mention_encoder_directory)


@pytest.fixture(scope="module", autouse=True)
def ray_ends_with_its_module() -> Iterator[None]:
    """Stop Ray after the tests of a module, whoever started it: small runs would go on there, which takes longer."""
    yield
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A Ray of this test module's own."""
    import ray

    # Two clusters that start at once on two cores time out.
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        for attempts_left in (2, 1, 0):  # Ray gives its own processes 15 seconds to start: a busy machine may take more
            try:
                ray.init(address="local", num_cpus=4, include_dashboard=False)
                return
            except Exception:
                ray.shutdown()
                if not attempts_left:
                    raise
