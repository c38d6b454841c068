"""Find damaged files before they are used."""

import hashlib
import json
import zipfile
from pathlib import Path

from safetensors import safe_open

from lpo_fast.errors import InputError
from lpo_fast.system import reading, writing

SUMS = "checksums.json"  # in a directory: {file: SHA-256}


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file below a directory into SUMS."""
    sums = {file.relative_to(folder).as_posix(): sha256(file) for file in writing.contents(folder)}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damage(path: Path) -> str:
    """Return what is wrong with a file or a directory that was written completely; "" if no damage is found.

    A directory is compared with its SUMS. Without one (official directories, single files) each file is
    checked as far as its format allows: the CRC-32 that torch.save stores, the header of .safetensors, the
    syntax of JSON.
    """
    sums = path / SUMS
    if not sums.is_file():
        return next(filter(None, map(_damage, writing.contents(path) if path.is_dir() else [path])), "")
    try:
        recorded = reading.read_json(sums, "")
    except InputError:
        return f"{SUMS} cannot be read"
    for name, expected in recorded.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != expected:
            return f"{name} has changed since it was written"
    return ""


def _damage(file: Path) -> str:
    """Return what is wrong with a single file, as ``damage`` does."""
    try:
        if file.suffix in (".pt", ".bin"):
            reading.read_pickle(file, mmap=True)  # checks names and shapes, which checksums do not cover
            with open(file, "rb") as f:
                if f.read(2) == b"PK":  # files of torch before 1.6 have no checksums
                    with zipfile.ZipFile(file) as records:
                        return (f"{file.name}: {bad} does not match its checksum"
                                if (bad := records.testzip()) else "")
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return ""
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except InputError as error:
        return f"{file.name} {error.problem}"
    except Exception as error:  # zipfile raises many kinds
        return f"{file.name} cannot be read ({type(error).__name__})"
    return ""


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
