"""Read files safely: no code runs, and damaged or hostile files are refused with an InputError.

No file takes much more memory than its size.
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

LARGEST_CONFIG = 100_000  # bytes; official configs have 3,000. YAML's base-60 numbers take quadratic time
LARGEST_PICTURE = 2**28  # bytes of a picture file


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Limit the memory that this process may allocate within the block to ``size`` bytes.

    Raises ValueError beyond that. This is the safety net below more specific limits. Start no threads in the
    block: each one counts with its stack and heap.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most if limits[0] < 0 else min(most, limits[0]), limits[1]))
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"it takes more than {size:,} bytes of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def read_pickle(file: Path, key: str = "", mmap: bool = False) -> dict:
    """Load the dictionary in a .pt, .bin or .ckpt file without running code.

    mmap: load only the tensors that are used.

    Raises InputError if it is damaged, holds anything but tensors and plain values, or claims more data than
    the file has.
    """
    try:
        if zipped := zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as members:
                if sum(member.file_size for member in members.infolist()) > file.stat().st_size:
                    # 10 MB could expand to 10 GB.
                    raise ValueError("it is compressed, which torch never does")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipped)
        if not isinstance(state, dict):
            raise ValueError("it is not a dictionary")
        for leaf in tree_leaves(state):  # a stride of 0 turns one number into terabytes
            if (isinstance(leaf, Tensor)
                    and (leaf.layout != torch.strided or leaf.nbytes > leaf.untyped_storage().nbytes())):
                raise ValueError("a tensor is larger than its stored data")
        return state
    except Exception as error:  # torch raises many kinds for damaged or hostile files
        reason = type(error).__name__ + (f": {error}" if type(error) is ValueError else "")
        raise InputError(str(file), f"cannot be read safely ({reason})",
                         "use a file written by the official code or by lpo_fast", key) from error


def read_safetensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load tensors and metadata of a .safetensors file. Raises InputError if it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(str(file), f"cannot be read ({error})", "copy or download it again", key) from error


def parse_json(text: str) -> object:
    """Return the value of a JSON text. Raises ValueError, also for duplicate keys and for excessive nesting.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    """Return the pairs as a dict. Raises ValueError if a key occurs twice."""
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} occurs twice")
        found[name] = value
    return found


def read_json(file: Path, key: str, remedy: str = "download it again") -> dict:
    """Load the object in a .json file. Raises InputError, which names the file."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        return value
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(str(file), f"cannot be read as JSON ({error})", remedy, key) from error


def read_config(file: Path, key: str) -> dict:
    """Load the nested dictionary of a .json, .toml or .yaml file: data only, no code runs.

    Raises InputError, which names the file.
    """
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        text = file.read_text(encoding="utf-8")
        value = {".json": parse_json, ".toml": tomllib.loads}.get(file.suffix, _yaml)(text)
        if not isinstance(value, dict):
            raise ValueError("it is not a mapping")
        if any(isinstance(leaf, int) and abs(leaf) >= 2**63 for leaf in tree_leaves(value)):
            raise ValueError("a number has more than 64 bits")
        return value
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:  # ValueError: also decode errors
        kind = file.suffix.removeprefix(".").upper().replace("YML", "YAML") or "YAML"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(str(file), f"is not valid {kind} ({reason})", "fix it", key) from error


def _yaml(text: str) -> object:
    """Load YAML with plain values. Aliases are refused: a few nested ones expand to a billion values."""
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
        raise ValueError("it has aliases (*name); write the values")
    return yaml.safe_load(text)


def read_picture(path: Path, most: int = LARGEST_PICTURE) -> bytes:
    """Read the bytes of a regular file.

    Raises ValueError for more than ``most`` bytes, and for a device or a pipe, which may never end.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        raise ValueError(f"{path} is not a file of at most {most:,} bytes")
    return path.read_bytes()


def component(name: str) -> bool:
    """Return whether a name stays in its directory: whether it is a single component of a path."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")
