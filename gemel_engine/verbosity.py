"""Whether commands print the lines of Ray, vLLM and other libraries.

The choice is an environment variable, so that it reaches the processes that a command starts.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

VARIABLE = "GEMEL_VERBOSE"
_WARN_IN_VAIN = (
    "ray._private.authentication.authentication_token_setup",
    "torch.utils.cpp_extension",  # no CUDA runtime on a CPU
    "vllm.triton_utils.importing",  # no Triton on a CPU
)
SECONDS_BETWEEN_LINES = 30.0  # of progress, where the output is no terminal


def is_verbose() -> bool:
    """Return whether libraries print all of their lines.

    They also do where Ray is asked for structured logs: these are read by machines.
    """
    return bool(os.environ.get(VARIABLE) or os.environ.get("RAY_LOGGING_CONFIG_ENCODING"))


def bar_interval() -> float:
    """Return the least number of seconds between two states of a progress bar."""
    return 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES


def quiet_libraries() -> None:
    """Hide what libraries print that a user cannot change; no error is hidden.

    To be called before vLLM, Ray and transformers are imported. A variable that is already set
    stays as it is.
    """
    if is_verbose():
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of vLLM, too, which binds memory to NUMA nodes
    # vLLM: what it looks up in PyTorch.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.reduce_op` is deprecated", FutureWarning)
    # Ray: what a later version will do with CUDA_VISIBLE_DEVICES, and that its tokens can be turned off.
    warnings.filterwarnings("ignore", r"Tip: In future versions of Ray", FutureWarning)
    for name in _WARN_IN_VAIN:
        logging.getLogger(name).setLevel(logging.ERROR)
