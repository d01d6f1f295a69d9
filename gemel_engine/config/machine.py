"""Defaults that depend on the machine on which a configuration is read."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_CPU_INFO = Path("/proc/cpuinfo")
# Flags of x86, and the one of ARM. AVX512 alone has no bfloat16: it would be slower than float32.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def resolve_dtype(config: Any) -> Any:
    """Return a configuration of a job whose `language_model.dtype` is not `auto`.

    It becomes `bfloat16` on GPUs and on CPUs with instructions for it, `float32` on others. The
    driver decides for all actors, so that no run mixes them, and the choice is part of the run's
    identity.
    """
    model = getattr(config, "language_model", None)
    if model is None or model.dtype != "auto":
        return config
    workers = getattr(config, "workers", None)  # of training
    on_gpu = config.resources.generation.num_gpus > 0 if workers is None else workers.use_gpu
    dtype = "bfloat16" if on_gpu else fast_dtype()
    return replace(config, language_model=replace(model, dtype=dtype))


def warn_of_slow_dtype(config: Any) -> None:
    """Log a warning if the language model would be much slower than in float32 on CPUs like this one."""
    is_on_cpu = not config.resources.generation.num_gpus
    if config.language_model.dtype == "bfloat16" and is_on_cpu and fast_dtype() != "bfloat16":
        logger.warning(
            "this CPU has no instructions for bfloat16, in which it multiplies matrices up to a hundred times slower "
            'than in float32: set language_model.dtype to "auto"'
        )


def fast_dtype() -> str:
    """Return the data type in which the CPU multiplies matrices fast."""
    return "bfloat16" if _BFLOAT16_FLAGS & cpu_flags() else "float32"


@cache
def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that Linux lists for the CPU; none if it lists none."""
    try:
        listed = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPU_INFO.read_text(), re.MULTILINE)
    except OSError:
        listed = None
    return frozenset(listed[1].split()) if listed else frozenset()
