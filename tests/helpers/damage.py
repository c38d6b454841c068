"""Damage to files, as disks and killed processes leave it."""

from pathlib import Path


def hurt(file: Path, harm: str) -> None:
    """Damage a file."""
    data = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
        return
    # behind the padding lie a tensor's numbers
    at = data.find(b"ZZZZ") + 64 if b"ZZZZ" in data else len(data) // 2
    data[at] ^= 4
    file.write_bytes(data if harm == "flipped" else data[:len(data) // 2])
