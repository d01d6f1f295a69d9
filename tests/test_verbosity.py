"""What libraries print in commands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit
LOG = """
import logging, sys
from gemel_engine.verbosity import quiet_libraries

quiet_libraries()
logging.basicConfig()
for name in sys.argv[1:]:
    logging.getLogger(name).warning("of %s", name)
    logging.getLogger(name).error("an error of %s", name)
"""


@pytest.mark.parametrize("is_verbose", [False, True])
def test_warnings_that_nobody_can_act_on_are_hidden_and_errors_are_not(is_verbose: bool) -> None:
    names = ("torch.utils.cpp_extension", "vllm.triton_utils.importing", "gemel_engine")
    result = subprocess.run(
        [sys.executable, "-c", LOG, *names],
        env=os.environ | {"GEMEL_VERBOSE": "1" if is_verbose else ""},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = {name for name in names if f":of {name}" in result.stderr}
    assert shown == ({*names} if is_verbose else {"gemel_engine"})
    assert result.stderr.count("an error of") == len(names)
