"""What packaging must keep: the link to kernels/, no package of that name,
and an import that does not drag in models."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_relative_link_and_no_package():
    assert os.readlink(ROOT / "lpo_fast" / "kernels") == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_folder_does_not_shadow_hugging_faces_package():
    """From the repository root, as users run it."""
    code = "from transformers import CLIPModel; from diffusers import StableDiffusionPipeline; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fine"


def test_help_needs_no_model_code():
    code = "import sys; from lpo_fast import train; train.parse(['demo']); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
