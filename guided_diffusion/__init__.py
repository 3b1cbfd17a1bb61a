"""Ambiguous medical image segmentation with diffusion models (CIMD, CVPR 2023).

    from guided_diffusion import Segmenter
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sampling.segmenter import Segmenter as Segmenter

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "Segmenter":  # loaded on use, so that importing a part of the library stays cheap
        from .sampling.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
