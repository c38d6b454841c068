"""The embedded world: pictures of coloured shapes, and a tiny Stable Diffusion pipeline that draws them, often wrongly.

world.py renders and measures the pictures, pretrain.py made pipeline/ from nothing.
"""

from pathlib import Path

PIPELINE = Path(__file__).parent / "pipeline"
