"""Files: written beside their target and renamed into place, so a killed run leaves no half file; read without running code.

Names that begin with a dot and end in .new (being written), .old (being replaced) or .gone (being removed) are a writer's own.
Whatever is read may be damaged or hostile: it is refused with an InputError, and never takes much more memory than its size.
"""

import json
import resource
import stat
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lpo_fast.errors import InputError

LARGEST_CONFIG = 100_000  # bytes; the official ones have 3,000. YAML's sexagesimal numbers take time quadratic in it
LARGEST_PICTURE = 2**28  # bytes of a picture that is named by its file


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Within the block this process may take so many bytes more than it has; ValueError beyond. The net below other limits.

    Threads that start there count with their stacks and heaps, of which a machine with many cores has many: start none.
    """
    limits, have = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    most = have * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most if limits[0] < 0 else min(most, limits[0]), limits[1]))
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"it takes more than {size:,} bytes of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def read_pickle(file: Path, key: str = "", mmap: bool = False) -> dict:
    """The dictionary in a .pt, .bin or .ckpt file, read without running code (mmap: only the tensors that are used).

    Raises InputError if it is damaged, holds anything but tensors and plain values, or claims more than the file has.
    """
    try:
        if zipped := zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as members:
                if sum(member.file_size for member in members.infolist()) > file.stat().st_size:
                    raise ValueError("it is compressed, which torch never does")  # 10 MB may become 10 GB
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipped)
        if not isinstance(state, dict):
            raise ValueError("it is no dictionary")
        for leaf in tree_leaves(state):  # a stride of 0 makes terabytes of one number
            if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.nbytes > leaf.untyped_storage().nbytes()):
                raise ValueError("a tensor is larger than what is stored of it")
        return state
    except Exception as error:  # torch raises many kinds for damaged or hostile files
        reason = type(error).__name__ + (f": {error}" if type(error) is ValueError else "")
        raise InputError(str(file), f"cannot be read safely ({reason})",
                         "use a file written by the official code or by lpo_fast", key) from error


def read_safetensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. Raises InputError if it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(str(file), f"cannot be read ({error})", "copy or download it again", key) from error


def parse_json(text: str) -> object:
    """JSON's value. Raises ValueError, also for keys that occur twice and for what is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} occurs twice")
        found[name] = value
    return found


def read_json(file: Path, key: str, remedy: str = "download it again") -> dict:
    """The object in a .json file. Raises InputError naming it."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        return value
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(str(file), f"cannot be read as JSON ({error})", remedy, key) from error


def read_config(file: Path, key: str) -> dict:
    """The nested dictionary of a .json, .toml or .yaml file: data alone, nothing in it runs. Raises InputError naming it."""
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        text = file.read_text(encoding="utf-8")
        value = {".json": parse_json, ".toml": tomllib.loads}.get(file.suffix, _yaml)(text)
        if not isinstance(value, dict):
            raise ValueError("it is no mapping")
        if any(isinstance(leaf, int) and abs(leaf) >= 2**63 for leaf in tree_leaves(value)):
            raise ValueError("a number has more than 64 bits")
        return value
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:  # also TOMLDecodeError, UnicodeDecodeError
        kind = file.suffix.removeprefix(".").upper().replace("YML", "YAML") or "YAML"
        raise InputError(str(file), f"is no {kind} ({(str(error).splitlines() or [type(error).__name__])[0]})", "mend it",
                         key) from error


def _yaml(text: str) -> object:
    """YAML of plain values. Aliases are refused: a few of them, nested, name a billion values."""
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
        raise ValueError("it has aliases (*name); write the values")
    return yaml.safe_load(text)


def read_picture(path: Path, most: int = LARGEST_PICTURE) -> bytes:
    """A regular file's bytes. Raises ValueError for a device or a pipe, which may never end, and for more than ``most``."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        raise ValueError(f"{path} is no file of at most {most:,} bytes")
    return path.read_bytes()
