"""The ready scorers against their formulas on tiny CLIPs, what their packages are called with, and refusals.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from lpo_fast.errors import InputError
from lpo_fast.evaluation import scorers
from tests.helpers.models import CLIP_DIM, pictures

PROMPTS = ["a red circle", "two blue squares on a green background", "three"]


@torch.no_grad()
def embeddings(folder: Path) -> tuple[torch.Tensor, torch.Tensor, CLIPModel]:
    """Unit embeddings of the pictures and prompts, one by one, pixels normalised by hand."""
    model, tokenizer = (CLIPModel.from_pretrained(folder / "clip").eval(),
                        CLIPTokenizer.from_pretrained(folder / "clip"))
    mean, std = (torch.tensor([0.48145466, 0.4578275, 0.40821073]),
                 torch.tensor([0.26862954, 0.26130258, 0.27577711]))
    seen, said = [], []
    for picture, prompt in zip(pictures(), PROMPTS, strict=True):
        pixels = ((torch.from_numpy(np.array(picture)) / 255 - mean) / std).permute(2, 0, 1)[None]
        seen.append(model.visual_projection(model.vision_model(pixels).pooler_output)[0])
        said.append(model.text_projection(model.text_model(tokenizer(prompt, return_tensors="pt").input_ids)
                                          .pooler_output)[0])
    unit = [torch.stack(x) / torch.stack(x).norm(dim=-1, keepdim=True) for x in (seen, said)]
    return *unit, model


def test_pickscore_and_clipscore(clips):
    seen, said, model = embeddings(clips)
    cosines = (seen * said).sum(-1)
    assert scorers.resolve("clipscore")(pictures(), PROMPTS) == pytest.approx(cosines.tolist(), abs=1e-6)
    wanted = (cosines * model.logit_scale.exp()).tolist()
    assert model.logit_scale.item() == pytest.approx(1.7)
    assert (scorers.resolve("lpo_fast.evaluation.scorers:pickscore")(pictures(), PROMPTS)
            == pytest.approx(wanted, abs=1e-5))
    assert scorers.pickscore(pictures()[1:2], PROMPTS[1:2]) == pytest.approx(wanted[1:2], abs=1e-5)


def test_aesthetic_does_not_look_at_the_prompt(clips):
    seen, _, _ = embeddings(clips)
    layers = nn.Sequential(nn.Linear(CLIP_DIM, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1),
                           nn.Linear(4, 1)).eval()
    state = torch.load(clips / "head.pth", weights_only=True)
    layers.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    wanted = layers(seen).squeeze(-1).tolist()
    assert scorers.resolve("aesthetic")(pictures(), PROMPTS) == pytest.approx(wanted, abs=1e-6)
    assert scorers.aesthetic(pictures(), [""] * 3) == pytest.approx(wanted, abs=1e-6)


def test_too_long_prompts_are_cut(clips):
    assert len(scorers.pickscore(pictures(1), ["a red circle " * 40])) == 1


def test_a_head_in_a_directory_and_one_that_is_none(clips, monkeypatch):
    (clips / "hub").mkdir()
    (clips / "head.pth").rename(clips / "hub" / "aesthetic-model.pth")
    monkeypatch.setenv("LPO_FAST_AESTHETIC_HEAD", str(clips / "hub"))
    assert len(scorers.aesthetic(pictures(1), [""])) == 1
    scorers.head.cache_clear()
    torch.save({"conv.weight": torch.zeros(1)}, clips / "hub" / "aesthetic-model.pth")
    with pytest.raises(InputError, match="is not an aesthetic head"):
        scorers.head()


@pytest.mark.parametrize("name", scorers.HUB)
def test_absent_weights_are_refused_with_the_remedy(name, monkeypatch, tmp_path):
    monkeypatch.setattr(scorers, "snapshot_download",
                        lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(InputError, match=f"--scorer {name}: .* is not on this machine; run `hf download "
                       f".*LPO_FAST_{name.upper()}"):
        scorers.resolve(name)
    monkeypatch.setenv(f"LPO_FAST_{name.upper()}_MODEL", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="does not exist"):
        scorers.resolve(name)


def test_the_hub_s_cache_is_asked_without_the_network(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(scorers, "snapshot_download",
                        lambda name, **how: asked.append((name, how)) or str(tmp_path))
    scorers.resolve("pickscore")
    assert asked == [(repository, {"local_files_only": True})
                     for repository in scorers.HUB["pickscore"].values()]


@pytest.mark.parametrize("name", scorers.PACKAGES)
def test_absent_packages_are_refused(name, monkeypatch):
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=f"{name}: the package .* is not installed; pip install"):
        scorers.resolve(name)


def stub(monkeypatch, name: str, **content) -> None:
    module = ModuleType(name)
    module.__spec__ = SimpleNamespace(name=name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_hpsv2_is_called_once_a_prompt(monkeypatch):
    calls = []

    def score(images, prompt, hps_version):
        calls.append((len(images), prompt, hps_version))
        return [np.float32(0.25 + image.size[0]) for image in images]
    stub(monkeypatch, "hpsv2", score=score)
    images = [Image.new("RGB", (width, 4)) for width in (1, 2, 3)]
    assert scorers.resolve("hpsv2")(images, ["a", "b", "a"]) == [1.25, 2.25, 3.25]
    assert calls == [(2, "a", "v2.1"), (1, "b", "v2.1")]


def test_imagereward_is_loaded_once(monkeypatch):
    loaded = []
    model = SimpleNamespace(score=lambda prompt, picture: picture.size[0] + len(prompt))
    stub(monkeypatch, "ImageReward", load=lambda name, device: loaded.append((name, device)) or model)
    score = scorers.resolve("imagereward")
    for _ in range(2):
        assert score([Image.new("RGB", (5, 4))] * 2, ["a", "bc"]) == [6.0, 7.0]
    assert [name for name, _ in loaded] == ["ImageReward-v1.0"]
    scorers._imagereward.cache_clear()


@pytest.mark.parametrize("spec, message", [
    ("brightness", "is neither module:function"), ("module:", "is neither"),
    (":f", "is neither"), ("", "is neither"), ("no_such_module:f", "cannot be imported"),
    ("json:nothing", "has no function 'nothing'"), ("sys:path", "has no function"),
    ("broken_scorer:f", "cannot be imported .*ZeroDivisionError"),
])
def test_specs_that_are_none(spec, message, tmp_path, monkeypatch):
    (tmp_path / "broken_scorer.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"--scorer .*{message}"):
        scorers.resolve(spec)


def test_what_a_scorer_returns_is_checked():
    assert scorers.call(lambda p, t: torch.tensor([[1.0], [2.0]]), "f", [None] * 2, ["a", "b"]) == [1.0, 2.0]
    for wrong in ([1.0], [1.0, float("nan")], [1.0, 2.0, 3.0]):
        with pytest.raises(InputError, match="--scorer f: gave"):
            scorers.call(lambda p, t, wrong=wrong: wrong, "f", [None] * 2, ["a", "b"])
