"""Find models: a local diffusers directory, a hub name, or a single-file checkpoint → a local directory.

A hub name is ORG/NAME or ORG/NAME/FOLDER, optionally followed by @REVISION. Only the required files are
downloaded, in full precision if available, and the commit is recorded (``RESOLVED``, environment.json,
lrm.json).
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
# Files of a pipeline, an LRM directory, or a separate VAE (the files at the top level).
PART = ("config.json", "*.safetensors.index.json",
        *(f"{stem}{end}" for stem in WEIGHTS for end in (".safetensors", "-*.safetensors")))
MODEL = (*(f"{part}/{name}" for part in PARTS for name in PART),
         "tokenizer/*", "tokenizer_2/*", "scheduler/*", "model_index.json", "state_dict.pt", "lrm.json",
         "config.json", "diffusion_pytorch_model.safetensors")
CLIP = ("config.json", "model.safetensors")
TOKENIZER = ("tokenizer/*", "tokenizer_2/*", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "vocab.json", "merges.txt")
VARIANTS = ("*.fp16*", "*.non_ema*")
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(/(?P<folder>[\w./-]+))?(@(?P<revision>[\w./-]+))?")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # stable_diffusion: diffusers' safety checker
CONTEXT = "attn2.to_k.weight"  # its width is that of the text features: 768, 1024 or 2048
RESOLVED: dict[str, str] = {}  # names located in this process → ORG/NAME[/FOLDER]@COMMIT


def locate(name: str, flag: str, revision: str = "", wanted: tuple[str, ...] = MODEL) -> Path:
    """Return the local path of a model.

    Anything that is neither a hub name nor a single file is returned unchanged.

    Raises InputError if the model cannot be downloaded or converted.
    """
    path, hub = Path(name), NAME.fullmatch(name)
    if path.exists() or not hub:
        if revision:
            raise InputError(revision, f"{name} is not a hub name, and files have no revisions",
                             "drop --revision", "--revision")
        return (single_file(path, flag) if path.is_file() and path.suffix in (".safetensors", ".ckpt") else
                path)
    if revision and hub["revision"]:
        raise InputError(revision, f"{name} already names a revision", "drop one of the two", "--revision")
    folder = download(hub["repo"], hub["folder"] or "", revision or hub["revision"] or "", wanted, name, flag)
    RESOLVED[name] = origin(folder)
    return folder


@lru_cache
def download(repo: str, inside: str, revision: str, wanted: tuple[str, ...], name: str, flag: str) -> Path:
    """Return the local folder ``inside`` of a hub repository, downloaded unless the cache has it."""
    prefix = f"{inside}/" if inside else ""
    try:
        root = Path(huggingface_hub.snapshot_download(repo, revision=revision or None,
                                                      allow_patterns=[prefix + file for file in wanted],
                                                      ignore_patterns=list(VARIANTS)))
        half = [f"{prefix}{part}/*.fp16*" for part in PARTS  # parts available in half precision only
                if (root / prefix / part / "config.json").is_file()
                and not families.weight_files(root / prefix / part)]
        if half:
            huggingface_hub.snapshot_download(repo, revision=root.name, allow_patterns=half)
    except GatedRepoError as error:
        raise InputError(name, "requires accepting a license",
                         "accept it on its page, then run `hf auth login`", flag) from error
    except RevisionNotFoundError as error:
        raise InputError(name, f"has no revision {revision!r}", "name a branch, a tag or a full commit hash",
                         "--revision" if flag == "--model" else flag) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(name, "is not a local directory, and the hub has no such model (or it is private)",
                         "correct the name, or run `hf auth login`", flag) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = ("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else
               f"the hub cannot be reached ({type(error).__name__})")
        raise InputError(name, f"is not a local directory and not in the Hugging Face cache, and {why}",
                         f"run `hf download {repo}` on a machine with network access, or name a directory",
                         flag) from error
    return root / inside


def origin(path: Path) -> str:
    """Return where a model came from: its hub name with the commit, or the path."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]+)(/.*)?$",
                       path.absolute().as_posix())
    return f"{cached[1]}/{cached[2]}{cached[4] or ''}@{cached[3]}" if cached else str(path.absolute())


def single_file(file: Path, flag: str) -> Path:
    """Convert a single-file checkpoint, once, into a folder of the Hugging Face cache; return that folder.

    diffusers takes configs and tokenizers from the directory next to FILE with the same name (without the
    suffix), else from the hub. Pickles are read only if they hold nothing but tensors. Raises InputError if
    the file cannot be converted.
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
            except Exception as error:  # diffusers and the hub raise many kinds
                raise InputError(str(file), f"cannot be converted ({type(error).__name__}: "
                                 f"{str(error).splitlines()[0][:160]})",
                                 "a single file has no configs and tokenizers: put those of its base model "
                                 f"into {configs}/ (or let diffusers reach the hub)", flag) from error
            pipeline.save_pretrained(aside)
    return folder


def single_file_unet(file: Path, flag: str = "") -> dict:
    """Return what a single-file checkpoint's tensors reveal about its denoiser's config.

    Raises InputError if it is not a checkpoint of a known family.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys() if CONTEXT in name]
        else:
            state = reading.read_pickle(file, flag, mmap=True)
            shapes = [tensor.shape for name, tensor in state.get("state_dict", state).items()
                      if CONTEXT in name]
        if len(widths := {width for _, width in shapes}) != 1:
            raise ValueError(f"found {len(shapes)}, with {len(widths)} widths")
    except (SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(file),
                         f"is not a checkpoint of SD1.5, SD2.1 or SDXL, which {CONTEXT} identifies ({error})",
                         "name a complete Stable Diffusion checkpoint, or download it again", flag) from error
    width = widths.pop()
    return {"cross_attention_dim": width} | ({"addition_embed_type": "text_time"} if width == 2048 else {})


def check_index(folder: Path, flag: str) -> None:
    """Refuse a model_index.json that names a library other than a pipeline's own: diffusers would import it.
    """
    index = (reading.read_json(folder / "model_index.json", flag) if (folder / "model_index.json").is_file()
             else {})
    for name, value in index.items():
        if isinstance(value, list) and value and value[0] not in (None, *LIBRARIES):
            raise InputError(str(folder / "model_index.json"),
                             f"takes its {name} from {value[0]!r}, which would be imported",
                             f"use parts of {', '.join(LIBRARIES)}", flag)


def unet_config(name: str, revision: str = "") -> dict:
    """Return what is known about a model's denoiser before it is located, to choose a recipe; {} if nothing
    is known.
    """
    path, hub = Path(name), NAME.fullmatch(name)
    try:
        if path.is_file():
            return single_file_unet(path)
        if hub and not path.exists():
            file = "/".join(filter(None, (hub["folder"], "unet/config.json")))
            path = Path(huggingface_hub.hf_hub_download(hub["repo"], file,
                                                        revision=revision or hub["revision"])).parent.parent
        return dict(json.loads((path / "unet" / "config.json").read_text()))
    except Exception:  # preflight reports what is wrong with the model
        return {}


def model(config: Model) -> Path:
    """Return the local path of --model."""
    return locate(config.model, "--model", config.revision)


def vae(config: Model) -> Path:
    """Return the local path of --vae, or of the model, whose VAE is the default."""
    return locate(config.vae, "--vae") if config.vae else model(config)


def lrm(config: Reward) -> Path:
    """Return the local path of --lrm."""
    return locate(config.lrm, "--lrm")


def base(config: Reward) -> Path:
    """Return the local path of --lrm-base, or of the model."""
    return locate(config.lrm_base, "--lrm-base") if config.lrm_base else model(config)


def tokenizer(config: Reward) -> Path:
    """Return the local path of --lrm-tokenizer, or of the LRM if it has its own tokenizers, or of its base.
    """
    if config.lrm_tokenizer:
        return locate(config.lrm_tokenizer, "--lrm-tokenizer", wanted=TOKENIZER)
    return lrm(config) if (lrm(config) / "tokenizer").is_dir() else base(config)


def clip(config: RewardNetwork) -> str | None:
    """Return the local path of --clip, or None."""
    return str(locate(config.clip, "--clip", wanted=CLIP)) if config.clip else None
