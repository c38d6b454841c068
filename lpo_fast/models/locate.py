"""Finding models: a local diffusers directory, a name on the hub, or a single-file checkpoint → a local directory.

A hub name is ORG/NAME, ORG/NAME/FOLDER, either with @REVISION behind it. Only the parts that are needed are downloaded,
in full precision where there is any, and the commit is recorded (``RESOLVED``, environment.json, lrm.json).
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

import huggingface_hub
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from lpo_fast.config import Model, Reward, RewardNetwork
from lpo_fast.errors import InputError
from lpo_fast.models import families
from lpo_fast.system import reading, writing

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
WEIGHTS = ("diffusion_pytorch_model", "model")
# A pipeline, an LRM directory, or a VAE of its own (the files at the top).
PART = ("config.json", "*.safetensors.index.json",
        *(f"{stem}{end}" for stem in WEIGHTS for end in (".safetensors", "-*.safetensors")))
MODEL = (*(f"{part}/{name}" for part in PARTS for name in PART),
         "tokenizer/*", "tokenizer_2/*", "scheduler/*", "model_index.json", "state_dict.pt", "lrm.json",
         "config.json", "diffusion_pytorch_model.safetensors")
CLIP = ("config.json", "model.safetensors")
TOKENIZER = ("tokenizer/*", "tokenizer_2/*", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
             "merges.txt")
VARIANTS = ("*.fp16*", "*.non_ema*")
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(/(?P<folder>[\w./-]+))?(@(?P<revision>[\w./-]+))?")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last: diffusers' own safety checker
CONTEXT = "attn2.to_k.weight"  # a matrix over the text's features, as wide as those: 768, 1024 or 2048
RESOLVED: dict[str, str] = {}  # names that were looked up in this process → ORG/NAME[/FOLDER]@COMMIT


def locate(name: str, flag: str, revision: str = "", wanted: tuple[str, ...] = MODEL) -> Path:
    """The local path of a model; a path that is none is returned as it is. Raises InputError if it cannot be had."""
    path, hub = Path(name), NAME.fullmatch(name)
    if path.exists() or not hub:
        if revision:
            raise InputError(revision, f"{name} is no hub name, and files have no revisions", "drop --revision", "--revision")
        return single_file(path, flag) if path.is_file() and path.suffix in (".safetensors", ".ckpt") else path
    if revision and hub["revision"]:
        raise InputError(revision, f"{name} names a revision already", "drop one of the two", "--revision")
    folder = download(hub["repo"], hub["folder"] or "", revision or hub["revision"] or "", wanted, name, flag)
    RESOLVED[name] = origin(folder)
    return folder


@lru_cache
def download(repo: str, inside: str, revision: str, wanted: tuple[str, ...], name: str, flag: str) -> Path:
    """The folder ``inside`` of a hub repository, from the cache where it is there."""
    prefix = f"{inside}/" if inside else ""
    try:
        root = Path(huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=[prefix + file for file in wanted], ignore_patterns=list(VARIANTS)))
        half = [f"{prefix}{part}/*.fp16*" for part in PARTS  # parts that exist in half precision alone
                if (root / prefix / part / "config.json").is_file() and not families.weight_files(root / prefix / part)]
        if half:
            huggingface_hub.snapshot_download(repo, revision=root.name, allow_patterns=half)
    except GatedRepoError as error:
        raise InputError(name, "asks its users to accept a licence", "accept it on its page, then `hf auth login`",
                         flag) from error
    except RevisionNotFoundError as error:
        raise InputError(name, f"has no revision {revision!r}", "name a branch, a tag or a whole commit",
                         "--revision" if flag == "--model" else flag) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(name, "is no directory here, and the hub has no such model (or it is private)",
                         "correct the name, or `hf auth login`", flag) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached ({type(error).__name__})"
        raise InputError(name, f"is no directory here and not in the Hugging Face cache, and {why}",
                         f"run `hf download {repo}` where there is a network, or name a directory", flag) from error
    return root / inside


def origin(path: Path) -> str:
    """Where a model came from: its hub name with the commit, or the path."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]+)(/.*)?$", path.absolute().as_posix())
    return f"{cached[1]}/{cached[2]}{cached[4] or ''}@{cached[3]}" if cached else str(path.absolute())


def single_file(file: Path, flag: str) -> Path:
    """A checkpoint in one file, converted once into the Hugging Face cache.

    diffusers takes configs and tokenizers from the directory of the same name beside it (FILE without its suffix), else
    from the hub. Pickles are read only if they hold nothing but tensors.
    """
    stat = file.stat()
    key = hashlib.sha256(f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder, configs = Path(constants.HF_HOME) / "lpo_fast" / f"{file.stem}-{key}", file.with_suffix("")
    if folder.is_dir():
        return folder
    found = single_file_unet(file, flag)
    if configs.is_dir():
        check_index(configs, flag)
    cls = StableDiffusionXLPipeline if found.get("addition_embed_type") else StableDiffusionPipeline
    with writing.make_once(folder) as aside:
        if aside:
            try:
                pipeline = cls.from_single_file(str(file), config=str(configs) if configs.is_dir() else None,
                                                local_files_only=constants.HF_HUB_OFFLINE or configs.is_dir())
            except Exception as error:  # diffusers raises many kinds, the hub others
                raise InputError(
                    str(file), f"cannot be converted ({type(error).__name__}: {str(error).splitlines()[0][:160]})",
                    f"its configs and tokenizers are not in one file: put those of its base model into {configs}/ (or let "
                    "diffusers reach the hub)", flag) from error
            pipeline.save_pretrained(aside)
    return folder


def single_file_unet(file: Path, flag: str = "") -> dict:
    """What the tensors of a checkpoint in one file tell of its denoiser's config. Raises InputError if they tell nothing."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys() if CONTEXT in name]
        else:
            state = reading.read_pickle(file, flag, mmap=True)
            shapes = [tensor.shape for name, tensor in state.get("state_dict", state).items() if CONTEXT in name]
        if len(widths := {width for _, width in shapes}) != 1:
            raise ValueError(f"{len(shapes)} of them, of {len(widths)} widths")
    except (SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(file), f"is no checkpoint of SD1.5, SD2.1 or SDXL, which are told apart by {CONTEXT} ({error})",
                         "name a whole Stable Diffusion checkpoint, or download it again", flag) from error
    width = widths.pop()
    return {"cross_attention_dim": width} | ({"addition_embed_type": "text_time"} if width == 2048 else {})


def check_index(folder: Path, flag: str) -> None:
    """Refuse a model_index.json that names other libraries than a pipeline's own: diffusers would import what it names."""
    index = reading.read_json(folder / "model_index.json", flag) if (folder / "model_index.json").is_file() else {}
    for name, value in index.items():
        if isinstance(value, list) and value and value[0] not in (None, *LIBRARIES):
            raise InputError(str(folder / "model_index.json"), f"takes its {name} from {value[0]!r}, which is imported",
                             f"use parts of {', '.join(LIBRARIES)}", flag)


def unet_config(name: str, revision: str = "") -> dict:
    """What is known of a model's denoiser before it is located, for the choice of a recipe; {} if nothing."""
    path, hub = Path(name), NAME.fullmatch(name)
    try:
        if path.is_file():
            return single_file_unet(path)
        if hub and not path.exists():
            file = "/".join(filter(None, (hub["folder"], "unet/config.json")))
            path = Path(huggingface_hub.hf_hub_download(hub["repo"], file, revision=revision or hub["revision"])).parent.parent
        return dict(json.loads((path / "unet" / "config.json").read_text()))
    except Exception:  # preflight says what is wrong with the model
        return {}


def model(config: Model) -> Path:
    """--model."""
    return locate(config.model, "--model", config.revision)


def vae(config: Model) -> Path:
    """--vae, or the model, whose VAE it is by default."""
    return locate(config.vae, "--vae") if config.vae else model(config)


def lrm(config: Reward) -> Path:
    """--lrm."""
    return locate(config.lrm, "--lrm")


def base(config: Reward) -> Path:
    """--lrm-base, or the model."""
    return locate(config.lrm_base, "--lrm-base") if config.lrm_base else model(config)


def tokenizer(config: Reward) -> Path:
    """--lrm-tokenizer, or the LRM with its own tokenizers, or its base."""
    if config.lrm_tokenizer:
        return locate(config.lrm_tokenizer, "--lrm-tokenizer", wanted=TOKENIZER)
    return lrm(config) if (lrm(config) / "tokenizer").is_dir() else base(config)


def clip(config: RewardNetwork) -> str | None:
    """--clip, or None."""
    return str(locate(config.clip, "--clip", wanted=CLIP)) if config.clip else None
