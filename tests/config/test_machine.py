"""Defaults by machine: the data type of the language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.corpus import write_mentions

from gemel_engine.config import machine
from gemel_engine.config.components import EngineSettings
from gemel_engine.config.loading import load_config, validated
from gemel_engine.config.resources import PoolSettings, ResourceSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.pipeline.corpus import with_rows_per_shard

pytestmark = pytest.mark.unit

REQUIRED = """
input = "mentions.parquet"
output = "linked"
knowledge_base = "kb"
[language_model]
name = "model"
"""
AVX2, AMX = "flags\t\t: fpu avx2 avx512f avx512_vnni", "flags\t\t: fpu avx512f amx_bf16 amx_tile"
ARM_WITH, ARM_WITHOUT = "Features\t: fp asimd bf16", "Features\t: fp asimd"


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What stands for /proc/cpuinfo."""
    machine.cpu_flags.cache_clear()
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    yield tmp_path / "cpuinfo"
    machine.cpu_flags.cache_clear()


def load(tmp_path: Path, *overrides: str) -> LinkConfig:
    (tmp_path / "link.toml").write_text(REQUIRED)
    return load_config(LinkConfig, tmp_path / "link.toml", overrides)


@pytest.mark.parametrize(
    ("info", "dtype"),
    [(AVX2, "float32"), (AMX, "bfloat16"), (ARM_WITH, "bfloat16"), (ARM_WITHOUT, "float32"), (None, "float32")],
)
def test_auto_is_what_the_processor_is_fast_in(cpu: Path, info: str | None, dtype: str, tmp_path: Path) -> None:
    if info is not None:
        cpu.write_text(f"processor\t: 0\n{info}\n")
    assert load(tmp_path).language_model.dtype == dtype
    assert load(tmp_path, "--resources.generation.num-gpus", "1").language_model.dtype == "bfloat16"
    assert load(tmp_path, "--language-model.dtype", "float16").language_model.dtype == "float16"


def test_a_configuration_made_in_python_is_resolved_too(cpu: Path) -> None:
    config = LinkConfig(input="m", output="o", knowledge_base="k", language_model=EngineSettings(name="model"))
    assert validated(config).language_model.dtype == "float32"
    on_gpu = ResourceSettings(generation=PoolSettings(num_gpus=1.0))
    assert validated(replace(config, resources=on_gpu)).language_model.dtype == "bfloat16"


@pytest.mark.parametrize(("given", "num_seqs", "expected"), [(5, 64, 5), (None, 64, 64), (None, 256, 256)])
def test_few_rows_are_several_shards(given: int | None, num_seqs: int, expected: int, tmp_path: Path) -> None:
    mentions = write_mentions(tmp_path / "mentions.parquet")
    model = EngineSettings(name="model", max_num_seqs=num_seqs)
    config = LinkConfig(input=str(mentions), output="o", knowledge_base="k", language_model=model, rows_per_shard=given)
    assert with_rows_per_shard(config, config.input).rows_per_shard == expected
