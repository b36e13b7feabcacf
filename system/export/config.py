"""What is exported, for whom, and where to; apart from `export.py`, because help shall not wait for torch."""

from dataclasses import dataclass

from model.config import Layout
from system.choices import Tower


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    output: str
    """Folder to write: a local path or s3://bucket/prefix."""
    checkpoint: int | None = None
    """Step of the checkpoint; none means the newest committed one."""
    tower: Tower = "student"
    """Whose image encoder: the student's, or its moving average, the teacher's."""
    layout: Layout = "maskclip"
    """Who shall load it: this package, Hugging Face's CLIPModel or open_clip."""
