"""Pictures, tables of pairs and score tables, and what comes out of them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lpo_fast.config import Columns
from lpo_fast.data import dataset as data_dataset
from lpo_fast.data import preferences

HEADER = ["different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap"]


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Encode a picture as a file."""
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def plain(colour: tuple[int, int, int], size: int = 8) -> bytes:
    """Return a file of one colour."""
    return encoded(Image.new("RGB", (size, size), colour))


RED, GREEN, BLUE = plain((255, 0, 0)), plain((0, 255, 0)), plain((0, 0, 255))


def columns(captions: list[str], **changed) -> dict:
    """Return columns of a table: a win, a loss and a tie in turn."""
    n = len(captions)
    labels = np.array([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])[np.arange(n) % 3]
    return {"caption": captions, "jpg_0": [RED] * n, "jpg_1": [BLUE] * n, "label_0": labels[:, 0].tolist(),
            "label_1": labels[:, 1].tolist(), "extra": range(n)} | changed


def table(path: Path, captions: list[str], **changed) -> Path:
    """Write a table of pairs."""
    pq.write_table(pa.table(columns(captions, **changed)), path)
    return path


def scores(path: Path, rows: list, header: list[str] = HEADER, bom: bytes = b"") -> Path:
    """Write a score table."""
    lines = [",".join(map(str, row)) for row in [header, *rows]]
    path.write_bytes(bom + ("\n".join(lines) + "\n").encode())
    return path


def dataset(path: Path, chosen: np.ndarray | None = None,
            columns: Columns | None = None) -> data_dataset.PairDataset:
    """Read pairs of a file, all or those chosen."""
    table = preferences.read(str(path), columns=columns)
    if chosen is not None:
        table = preferences.replace(table, rows=chosen, pictures=table.pictures[chosen],
                                    compare=table.compare[chosen])
    return data_dataset.PairDataset(table, 8)


def colours(item: dict) -> str:
    """Return the two pictures of an item as letters."""
    names = {(1, -1, -1): "r", (-1, 1, -1): "g", (-1, -1, 1): "b", (0, 0, 0): "-"}
    return "".join(names[tuple(picture[:, 4, 4].int().tolist())] for picture in item["pixels"])
