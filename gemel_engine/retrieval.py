"""Demonstrations: training mentions chosen by the similarity of their surface forms, and their directory on disk.

GEMEL (section 3.3) retrieves by the surface form alone, so mentions with equal surface forms can share their
demonstrations and, in the engine, the key-value cache of that part of the prompt. That needs equal lists for equal surface
forms, in every batch and every process. Three things see to it: the encoder always runs on batches of one size, without
padding; every query is compared on its own; similarities are rounded before ties are broken by surface form and
`mention_id`. What remains is a similarity so close to a rounding boundary that another device or thread count moves it
across, which may cost a cache hit but never a wrong row.

Shapes: B batch, N demonstrations, M distinct surface forms, E width of the mention encoder, C vision width, K
demonstrations asked for, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors import SafetensorError
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
