"""A torch.compile custom-op and graph-fusion pass library for DeepSeek-V4."""

from . import ops
from .backend import backend, explain, fuse
from .options import FusionOptions
from .report import NearMiss, Report, Site

__version__ = "0.1.0"
__all__ = ["FusionOptions", "NearMiss", "Report", "Site", "backend", "explain", "fuse", "ops"]
