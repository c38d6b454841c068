"""Models by hub name, directory and single file.
The hub is a fake that copies a directory; no test needs a network."""

import fnmatch
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from lpo_fast import config, train, train_lpo
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.models import denoisers, families, locate, texts, vaes
from lpo_fast.preflight import models, runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name; ``snapshot_download`` copies the files that the patterns allow and
    ``fails`` if told to."""

    def __init__(self, cache: Path):
        self.cache, self.repos, self.calls, self.fails = cache, {}, [], None

    def snapshot_download(self, repo: str, *, revision=None, allow_patterns=None, ignore_patterns=()) -> str:
        self.calls.append((repo, revision))
        if self.fails:
            raise self.fails
        root = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
        for file in (p for p in self.repos[repo].rglob("*") if p.is_file()):
            name = file.relative_to(self.repos[repo]).as_posix()
            if any(fnmatch.fnmatch(name, p) for p in allow_patterns) and not any(
                    fnmatch.fnmatch(name, p) for p in ignore_patterns):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, root / name)
        return str(root)


@pytest.fixture
def hub(tmp_path: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with ``org/sd``: the model, beside duplicates and things that nobody needs."""
    fake = Hub(tmp_path / "cache")
    repo = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    for extra in ("sd.safetensors", "unet/diffusion_pytorch_model.bin",
                  "unet/diffusion_pytorch_model.non_ema.safetensors",
                  "unet/diffusion_pytorch_model.fp16.safetensors", "vae/model.onnx",
                  "safety_checker/model.safetensors", "text_encoder/model-00001-of-00002.fp16.safetensors",
                  "text_encoder/flax_model.msgpack", "README.md"):
        (repo / extra).parent.mkdir(exist_ok=True)
        (repo / extra).write_text("large")
    fake.repos["org/sd"] = repo
    monkeypatch.setattr(locate.huggingface_hub, "snapshot_download", fake.snapshot_download)
    locate.download.cache_clear()
    locate.RESOLVED.clear()
    yield fake
    locate.download.cache_clear()
    locate.RESOLVED.clear()


def test_only_the_needed_files_are_downloaded_once(hub: Hub, tiny_sd: Path) -> None:
    folder = locate.locate("org/sd", "--model")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {p.relative_to(tiny_sd).as_posix() for p in tiny_sd.rglob("*") if p.is_file()}
    assert locate.locate("org/sd", "--model") == folder and hub.calls == [("org/sd", None)]
    assert locate.RESOLVED == {"org/sd": f"org/sd@{COMMIT}"}
    locate.locate("org/sd", "--model", "fp16")
    locate.locate("org/sd@main", "--vae")
    assert hub.calls[1:] == [("org/sd", "fp16"), ("org/sd", "main")]


def test_half_precision_where_there_is_nothing_else(hub: Hub) -> None:
    repo = hub.repos["org/sd"]
    file = repo / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(repo / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    folder = locate.locate("org/sd", "--model")
    assert hub.calls == [("org/sd", None), ("org/sd", COMMIT)]  # the second time of the same commit
    assert ([f.name for f in families.weight_files(folder / "unet")]
            == ["diffusion_pytorch_model.fp16.safetensors"])
    assert not list(folder.glob("text_encoder/*fp16*"))


def test_a_folder_of_a_repository(hub: Hub, tiny_lrm: Path, tmp_path: Path) -> None:
    repo = tmp_path / "collection"
    shutil.copytree(tiny_lrm, repo / "lrm_sd15")
    shutil.copytree(tiny_lrm, repo / "lrm_sdxl")
    hub.repos["org/LRM"] = repo
    folder = locate.locate("org/LRM/lrm_sd15", "--lrm")
    assert ({p.name for p in folder.iterdir()} == {p.name for p in tiny_lrm.iterdir()}
            and folder.name == "lrm_sd15")
    assert not (folder.parent / "lrm_sdxl").exists()
    assert locate.origin(folder) == f"org/LRM/lrm_sd15@{COMMIT}"


def test_paths_go_before_names(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate.locate("org/sd", "--model") == Path("org/sd") and not hub.calls
    assert locate.origin(Path("org/sd")) == str(tmp_path / "org" / "sd")
    for name in ("./no/where", "/no/where", "nowhere", "~/no/where", "no/where/../x y"):
        assert locate.locate(name, "--model") == Path(name) and not hub.calls
    for name, revision in (("org/sd", "main"), ("/no/where", "main")):
        with pytest.raises(InputError, match="is not a hub name") as caught:
            locate.locate(name, "--model", revision)
        assert caught.value.key == "--revision"
    with pytest.raises(InputError, match="already names a revision"):
        locate.locate("org/other@abc", "--model", "main")


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize("error, message, flag", [
    (errors.RepositoryNotFoundError("no", response=RESPONSE), "the hub has no such model", "--model"),
    (errors.GatedRepoError("no", response=RESPONSE), "requires accepting a license", "--model"),
    (errors.RevisionNotFoundError("no", response=RESPONSE), "has no revision 'abc'", "--revision"),
    (errors.HfHubHTTPError("no", response=RESPONSE), "not in the Hugging Face cache", "--model"),
    (errors.LocalEntryNotFoundError("no"), "not in the Hugging Face cache, and HF_HUB_OFFLINE is set",
     "--model"),
    (ConnectionError("no"), "not in the Hugging Face cache", "--model"),
])
def test_what_the_hub_refuses(hub: Hub, error: Exception, message: str, flag: str,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fails = error
    with pytest.raises(InputError, match=message) as caught:
        locate.locate("org/sd", "--model", "abc")
    assert caught.value.key == flag and caught.value.value == "org/sd" and caught.value.remedy
    if isinstance(error, errors.LocalEntryNotFoundError):
        monkeypatch.setattr(locate.constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(InputError, match="the hub cannot be reached"):
            locate.locate("org/sd", "--model", "abc")
    hub.fails = None
    assert locate.locate("org/sd", "--model", "abc").is_dir()  # a failure is not remembered


def test_a_run_records_the_commit_and_resumes_with_it(hub: Hub, tiny_lrm: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.json").write_text('["a red circle", "two"]')
    settings = LPO(model="org/sd", lrm=str(tiny_lrm), prompts=str(tmp_path / "prompts.json"),
                   out=str(tmp_path / "run"), max_batches=1, num_steps=2, num_candidates=2, batch_size=2,
                   threshold_min=0, threshold_max=0, pictures=0)
    out = train_lpo.train(settings)
    assert json.loads((out / "config.json").read_text())["model"] == "org/sd"
    assert json.loads((out / "environment.json").read_text())["models"] == {"org/sd": f"org/sd@{COMMIT}"}
    runs.lpo(replace(settings, resume=True))
    (out / "environment.json").write_text(json.dumps({"models": {"org/sd": "org/sd@feed"}}))
    with pytest.raises(InputError, match=r"org/sd has changed: .* used org/sd@feed"):
        runs.lpo(replace(settings, resume=True))


def test_an_lrm_names_its_base(hub: Hub, tmp_path: Path) -> None:
    base = locate.locate("org/sd", "--model")
    lrm = checkpoint.new_lrm(base, generator=torch.Generator())
    checkpoint.save_lrm(lrm, texts.load_tokenizers(base, lrm.family), tmp_path / "lrm")
    assert json.loads((tmp_path / "lrm" / "lrm.json").read_text())["base"] == f"org/sd@{COMMIT}"
    assert checkpoint.load_lrm(tmp_path / "lrm").base == f"org/sd@{COMMIT}"  # and needs no base


def test_what_is_known_before_a_model_is_located(hub: Hub, tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate.unet_config(str(tiny_sd))["cross_attention_dim"] == 16
    assert locate.unet_config(str(tiny_sdxl))["addition_embed_type"] == "text_time"
    for name in ("", "nowhere", "no/such", str(tmp_path)):
        assert locate.unet_config(name) == {}
    asked = []
    monkeypatch.setattr(locate.huggingface_hub, "hf_hub_download",
                        lambda *repo_and_file, revision: asked.append((*repo_and_file, revision)) or str(
                            tiny_sdxl / "unet" / "config.json"))
    assert locate.unet_config("org/name/part@v1")["addition_embed_type"] == "text_time"
    assert asked == [("org/name", "part/unet/config.json", "v1")]
    for width, kind in ((768, {}), (1024, {}), (2048, {"addition_embed_type": "text_time"})):
        save_file({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight":
                       torch.zeros(4, width)}, tmp_path / "one.safetensors")
        torch.save({"state_dict": load_file(tmp_path / "one.safetensors"), "global_step": 1},
                   tmp_path / "one.ckpt")
        torch.save(load_file(tmp_path / "one.safetensors"), tmp_path / "bare.ckpt")
        for name in ("one.safetensors", "one.ckpt", "bare.ckpt"):
            assert locate.unet_config(str(tmp_path / name)) == {"cross_attention_dim": width} | kind
            assert train.recipe(["lpo", "--model", str(tmp_path / name)]).lpo.rank == (64 if kind else 4)


def test_the_recipe_follows_the_model_that_is_named(tiny_sd: Path, tiny_sdxl: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    assert (train.recipe(["lpo", "--model", str(tiny_sdxl)]) == train.recipe(["lpo", f"--model={tiny_sdxl}"])
            == config.sdxl())
    assert train.recipe(["lpo", "--model", str(tiny_sd)]) == train.recipe(["lpo"]) == config.sd15()
    asked = []
    monkeypatch.setattr(locate, "unet_config",
                        lambda *a: asked.append(a) or {"addition_embed_type": "text_time"})
    assert (train.recipe(["lrm", "--model=org/xl", "--revision", "v1"]) == config.sdxl()
            and asked == [("org/xl", "v1")])


# Single files


def original_names(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny SD1.5 under the names of CompVis's single-file checkpoints, for four stages of two layers,
    and a VAE of two."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}

    def block(base: str, rest: str, kind: str) -> str:
        if kind == "resnets":
            first, _, last = rest.partition(".")
            return f"{base}.{resnet[first]}.{last}"
        return f"{base}.{rest}"

    def unet(name: str) -> str:
        top, _, rest = name.partition(".")
        if top == "time_embedding":
            return rest.replace("linear_1", "time_embed.0").replace("linear_2", "time_embed.2")
        if top in ("conv_in", "conv_norm_out", "conv_out"):
            return ({"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}[top] + "."
                    + rest)
        parts = rest.split(".")
        if top == "mid_block":
            kind, i, tail = parts[0], int(parts[1]), ".".join(parts[2:])
            return block(f"middle_block.{1 if kind == 'attentions' else 2 * i}", tail, kind)
        stage, kind, i, tail = int(parts[0]), parts[1], int(parts[2]), ".".join(parts[3:])
        if top == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{3 * (stage + 1)}.0.op.{tail.removeprefix('conv.')}"
            return block(f"input_blocks.{3 * stage + 1 + i}.{int(kind == 'attentions')}", tail, kind)
        if kind == "upsamplers":
            return f"output_blocks.{3 * stage + 2}.{2 if stage else 1}.{tail}"
        return block(f"output_blocks.{3 * stage + i}.{int(kind == 'attentions')}", tail, kind)

    def vae(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            stage = int(parts[2]) if parts[1] == "down_blocks" else 1 - int(parts[2])
            way = parts[1].partition("_")[0]
            if parts[3].endswith("samplers"):
                name = f"{parts[0]}.{way}.{stage}.{way}sample.conv.{parts[-1]}"
            else:
                name = f"{parts[0]}.{way}.{stage}.block.{'.'.join(parts[4:])}".replace(
                    "conv_shortcut", "nin_shortcut")
        elif parts[1] == "mid_block" and parts[2] == "resnets":
            name = f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{'.'.join(parts[4:])}"
        elif parts[1] == "mid_block":
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            name = f"{parts[0]}.mid.attn_1.{names[parts[4]]}.{parts[-1]}"
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        return name.replace("conv_norm_out", "norm_out"), tensor.contiguous()

    def tensors(part: str) -> dict[str, torch.Tensor]:
        (file,) = families.weight_files(folder / part)
        return load_file(file)
    text = {n if n.startswith("text_model.") else f"text_model.{n}": t
            for n, t in tensors("text_encoder").items()}
    return ({f"model.diffusion_model.{unet(n)}": t for n, t in tensors("unet").items()}
            | {f"first_stage_model.{n}": t for n, t in (vae(*pair) for pair in tensors("vae").items())}
            | {f"cond_stage_model.transformer.{n}": t for n, t in text.items()})


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_is_converted_once(tiny_sd: Path, tmp_path: Path, suffix: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs are those of the directory of the same name beside it;
    the weights are the file's, all of them."""
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
    state, file = original_names(tiny_sd), tmp_path / f"tuned{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    with pytest.raises(InputError, match="cannot be converted") as caught:
        locate.locate(str(file), "--model")
    assert str(tmp_path / "tuned") in caught.value.remedy and not list((tmp_path / "home").rglob("[!.]*.*"))
    shutil.copytree(tiny_sd, tmp_path / "tuned", ignore=shutil.ignore_patterns("*.safetensors"))
    folder = locate.locate(str(file), "--model")
    assert folder.parent == tmp_path / "home" / "lpo_fast"
    models.pipeline(str(file), "--model")
    for load in (denoisers.load_unet, vaes.load_vae, lambda path: texts.load_text(path, families.SD)[0]):
        first, second = load(folder).state_dict(), load(tiny_sd).state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in second)
    made = (folder / "model_index.json").stat().st_mtime_ns
    assert (locate.locate(str(file), "--model") == folder
            and (folder / "model_index.json").stat().st_mtime_ns == made)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("tensors", [{"a": (2, 3)}, {"x.attn2.to_k.weight": (3,)},
                                     {"x.attn2.to_k.weight": (3, 768),
                                      "y.attn2.to_k.weight": (3, 1024)}])
def test_a_single_file_of_no_known_family(tmp_path: Path, tensors: dict, suffix: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
    state, file = {name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / f"one{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    assert locate.unet_config(str(file)) == {}
    with pytest.raises(InputError, match="is not a checkpoint of SD1.5, SD2.1 or SDXL") as caught:
        locate.locate(str(file), "--lrm-base")
    assert caught.value.key == "--lrm-base" and not (tmp_path / "home").exists()


def test_two_processes_convert_a_single_file_once(tiny_sd: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, and takes what that made; what a killed one left goes."""
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
    save_file({"x.attn2.to_k.weight": torch.zeros(4, 768)}, tmp_path / "one.safetensors")
    made = []

    class Slow:
        def save_pretrained(self, folder: Path) -> None:
            made.append(folder)
            for part in ("unet", "vae"):
                shutil.copytree(tiny_sd / part, folder / part)
                time.sleep(0.3)
    monkeypatch.setattr(locate.StableDiffusionPipeline, "from_single_file", lambda *_, **__: Slow())
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: locate.locate(str(tmp_path / "one.safetensors"), "--model"),
                               range(3)))
    (folder,) = folders
    assert len(made) == 1 and {part.name for part in folder.iterdir()} == {"unet", "vae"}
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_a_pickle_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
    torch.save({"state_dict": Path("x")}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="cannot be read safely"):
        locate.locate(str(tmp_path / "evil.ckpt"), "--model")
