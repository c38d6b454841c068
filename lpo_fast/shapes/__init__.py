"""The built-in toy world: pictures of colored shapes, and a tiny Stable Diffusion pipeline that often draws
them wrong.

world.py renders and measures the pictures; pretrain.py trained pipeline/ from scratch.
"""

from pathlib import Path

PIPELINE = Path(__file__).parent / "pipeline"
