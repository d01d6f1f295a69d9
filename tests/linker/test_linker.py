"""The Python API: what it refuses before it opens anything."""

from __future__ import annotations

import pytest

from gemel_engine import LinkConfig, Linker
from gemel_engine.config.components import EngineSettings
from gemel_engine.errors import ConfigurationError
from gemel_engine.linking.job import describe_run


def test_a_wrong_configuration_made_in_python_is_refused() -> None:
    wrong = LinkConfig(
        input="i", output="o", knowledge_base="k", language_model=EngineSettings(name="m"), rows_per_shard=0
    )
    for use in (Linker, describe_run):
        with pytest.raises(ConfigurationError, match="the configuration is wrong: "):
            use(wrong)
