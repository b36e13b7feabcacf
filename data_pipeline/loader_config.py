"""How a rank makes its batches; apart from `loader.py`, because configuration shall not wait for torch."""

import math
from dataclasses import dataclass

MOST_WORKERS = 1024


