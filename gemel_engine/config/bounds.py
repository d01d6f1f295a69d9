"""Types of settings and options; numeric ones have bounds that pydantic validates.

All numeric types are strict: strings and booleans are rejected, and so are NaN and infinity.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

# Far above any sensible number of rows, tokens or actors, and low enough that nothing overflows.
_MOST = 1_000_000

Count = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
NumBytes = Annotated[int, Field(strict=True, ge=1, le=1 << 32)]
NumPixels = Annotated[int, Field(strict=True, ge=1, le=1 << 32)]
NumSteps = Annotated[int, Field(strict=True, ge=1, le=10**9)]
NumRetries = Annotated[int, Field(strict=True, ge=0, le=10)]  # each pause is twice the previous one
Seed = Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=86_400, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Factor = Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)]
Amount = Annotated[float, Field(strict=True, ge=0, le=1e6, allow_inf_nan=False)]
EvaluationProtocol = Literal["entity", "name", "candidates"]  # when an answer is right
Width = Annotated[int, Field(gt=0, le=1 << 20)]  # of vectors in an artifact
