"""Bounds of the numbers that settings and options may be; pydantic checks them where these types annotate a field.

All are strict: a string or a truth value is no number. Neither NaN nor infinity lies within any of them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

_MOST = 1_000_000  # far above what makes sense for rows, tokens or actors, and below what overflows

Count = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
NumBytes = Annotated[int, Field(strict=True, ge=1, le=1 << 32)]
NumPixels = Annotated[int, Field(strict=True, ge=1, le=1 << 32)]
NumSteps = Annotated[int, Field(strict=True, ge=1, le=10**9)]
NumRetries = Annotated[int, Field(strict=True, ge=0, le=10)]  # the pauses between them double
Seed = Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=86_400, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Factor = Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)]
Amount = Annotated[float, Field(strict=True, ge=0, le=1e6, allow_inf_nan=False)]
