"""Where the repository is, for tests at any depth."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIP_TOKENS = ROOT / "tests/data/clip_tokens.json"
