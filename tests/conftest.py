"""What several tests need: the golden vectors, and the smallest model and reward model that
the real loaders accept."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# before torch is imported; tensors are small, and tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers and transformers are imported
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lpo_fast_datasets_")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are defined
from diffusers import UNet2DConditionModel

from lpo_fast.evaluation import scorers
from lpo_fast.lrm import checkpoint
from lpo_fast.models import texts
from lpo_fast.system import launch as system_launch
from lpo_fast.verify.vectors import Golden
from tests.helpers.models import GOLDEN, make_clip, make_sd, make_sd21, make_sdxl, two_stages

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
system_launch.INTERPRETED = False  # the references run, except in tests that ask for ``kernels``


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """Kernels run in this test, under Triton's interpreter without a GPU,
    and fresh memory holds NaN (or huge integers)."""
    monkeypatch.setattr(system_launch, "INTERPRETED", not torch.cuda.is_available())
    before = (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills torch.empty and the like
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """The golden vectors that lie beside the tests."""
    return Golden(GOLDEN, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory in the layout of SD1.5; not to be changed."""
    return make_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def tiny_sd21(tiny_sd: Path) -> Path:
    """A diffusers directory in the layout of SD2.1, v-prediction; not to be changed."""
    return make_sd21(tiny_sd.parent / "sd21")


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_sd: Path) -> Path:
    """A diffusers directory in the layout of SDXL; not to be changed."""
    return make_sdxl(tiny_sd.parent / "sdxl", tiny_sd)


@pytest.fixture(scope="session")
def tiny_lrm(tiny_sd: Path) -> Path:
    """An LRM directory made of ``tiny_sd``, trained on nothing; not to be changed."""
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(1))
    folder = tiny_sd.parent / "lrm"
    checkpoint.save_lrm(lrm, texts.load_tokenizers(tiny_sd, lrm.family), folder)
    return folder


@pytest.fixture
def copied(tmp_path: Path):
    """copied(folder): a copy of a directory that the test may break."""
    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy_of_{folder.name}"))
    return copy


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random CLIP with its processor and an aesthetic head, named by the variables of all ready scorers."""
    make_clip(tmp_path)
    for name, parts in scorers.HUB.items():
        for part in parts:
            monkeypatch.setenv(f"LPO_FAST_{name}_{part}".upper(),
                               str(tmp_path / ("head.pth" if part == "head" else "clip")))
    yield tmp_path
    scorers.clip.cache_clear()
    scorers.head.cache_clear()


@pytest.fixture
def small(copied, tiny_sd: Path) -> Path:
    """A model whose denoiser has two stages: tracing takes longer with more."""
    folder = copied(tiny_sd)
    torch.manual_seed(0)
    UNet2DConditionModel(**two_stages("unet_sd15")).save_pretrained(folder / "unet")
    return folder
