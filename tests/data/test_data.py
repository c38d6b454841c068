"""Prompts of every format and every way to get them wrong; pictures; the filter."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lpo_fast.data import images, mpcf, prompts
from lpo_fast.errors import InputError
from tests.helpers.pairs import HEADER, encoded, plain, scores

MESSY = ["a red circle", "naïve café ☕ 日本語", "emoji 👩‍👩‍👧 and \u200bzero width", "right to left مرحبا",
         'quotes " and , commas; tabs\tinside', "line\u2028separator \x0c form feed \x85 next line"]


def write(path: Path, kind: str, prompts: list[str], bom: bool = False, newline: str = "\n") -> Path:
    """The prompts in one of the formats."""
    if kind == "parquet":
        pq.write_table(pa.table({"caption": prompts, "n": range(len(prompts))}), path)
        return path
    if kind == "strings":
        text = json.dumps(prompts, indent=1, ensure_ascii=False)
    elif kind == "objects":
        text = json.dumps([{"caption": p, "id": i} for i, p in enumerate(prompts)])
    elif kind == "jsonl":
        text = "".join(json.dumps({"id": 1, "caption": p}, ensure_ascii=False) + "\n\n  \n" for p in prompts)
    elif kind == "txt":
        text = "\n" + "\n \n\n".join(prompts) + "\n\n"
    else:
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerows([["id", "caption"], *([i, p] for i, p in enumerate(prompts))])
        text = out.getvalue()
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.replace("\n", newline).encode())
    return path


FORMATS = [("strings", ".json"), ("objects", ".json"), ("jsonl", ".jsonl"), ("txt", ".txt"), ("csv", ".csv"),
           ("parquet", ".parquet")]


@pytest.mark.parametrize("kind, suffix", FORMATS)
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_format(tmp_path: Path, kind: str, suffix: str, bom: bool, newline: str) -> None:
    file = write(tmp_path / f"prompts{suffix}", kind, MESSY, bom, newline)
    assert prompts.read_prompts(str(file)) == MESSY


def test_jsonl_of_strings_and_another_key(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"one"\n"two"')
    assert prompts.read_prompts(str(tmp_path / "p.jsonl")) == ["one", "two"]
    (tmp_path / "p.json").write_text('[{"text": "one"}, "two"]')
    assert prompts.read_prompts(str(tmp_path / "p.json"), "text") == ["one", "two"]
    (tmp_path / "p.csv").write_text("text\none\n\ntwo\n")
    assert prompts.read_prompts(str(tmp_path / "p.csv"), "text") == ["one", "two"]
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "p.parquet")
    assert prompts.read_prompts(str(tmp_path / "p.parquet"), "text") == ["one"]


@pytest.mark.parametrize("name, content, message", [
    ("p.json", b"", "line 1 is not JSON"),
    ("p.json", b'[\n"a",\n"b"\n"c"]', "line 4 is not JSON"),
    ("p.json", b'{"caption": "a"}', "is not a list"),
    ("p.json", b"[]", "holds no prompt"),
    ("p.json", b'[{"caption": "a"}, {"text": "b"}]', "record 1 has no 'caption'"),
    ("p.json", b'["a", "b", 3]', "record 2 is int, not text"),
    ("p.json", b'["a", {"caption": null}]', "record 1 is NoneType, not text"),
    ("p.json", b'["a", ["b"]]', "record 1 is list, not text"),
    ("p.json", b"[" * 200_000, "nested too deeply"),
    ("p.json", b'["caf\xe9"]', "byte 5 is not UTF-8"),
    ("p.jsonl", b'"a"\n\n{"caption": \n', "line 3 is not JSON"),
    ("p.jsonl", b'"a"\n{"text": "b"}\n', "line 2 has no 'caption'"),
    ("p.jsonl", b"[" * 200_000, "nested too deeply"),
    ("p.jsonl", b"\n \n", "holds no prompt"),
    ("p.jsonl", b'"a"\n\n7', "line 3 is int, not text"),
    ("p.txt", b"\n  \n\t\n", "holds no prompt"),
    ("p.txt", "ok\nutf-16".encode("utf-16"), "byte 0 is not UTF-8"),
    ("p.csv", b"id,text\n1,a\n", "has no column 'caption'"),
    ("p.csv", b"", "has no column 'caption'"),
    ("p.csv", b"caption\n", "holds no prompt"),
    ("p.csv", b"id,caption\n1,a\n2\n", "line 3 is NoneType, not text"),
    ("p.csv", b"caption\ncaf\xe9\n", "is not UTF-8"),
    ("p.json", b"[" + b"1" * 5000 + b"]", "cannot be read"),
    ("p.jsonl", b"1" * 5000, "line 1 is not JSON"),
    ("p.jsonl", b'"a"\n{"caption": "b", "caption": "c"}',
     "line 2 is not JSON (the key 'caption' occurs twice)"),
    ("p.json", b'[{"caption": "b", "caption": "c"}]', "the key 'caption' occurs twice"),
    ("p.csv", b"caption\n" + b"a" * 200_000, "cannot be read"),
    ("p.json", b'["a", " \\n"]', "record 1 is blank"),
    ("p.csv", b"id,caption\n1,a\n2,\n", "line 3 is blank"),
    ("p.json", b'["a", "\\ud83d"]', "record 1 holds a lone surrogate"),
    ("p.parquet", b"PAR1", "is not a parquet file"),
    ("p.parquet", b"", "is not a parquet file"),
    ("p.yaml", b"- a", "unknown file type '.yaml'"),
    ("p", b"a", "unknown file type ''"),
])
def test_wrong_prompts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        prompts.read_prompts(str(tmp_path / name))
    assert caught.value.key == "--prompts" and name in str(caught.value) and message in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("columns, message", [
    ({"text": ["a"]}, "has no column 'caption', only text"),
    ({"caption": pa.array([], pa.string())}, "holds no prompt"),
    ({"caption": pa.array(["a", None])}, "row 1 is NoneType"),
    ({"caption": [1, 2]}, "row 0 is int"),
])
def test_wrong_prompt_tables(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=message):
        prompts.read_prompts(str(tmp_path / "p.parquet"))


@pytest.mark.parametrize("name, problem",
                         [("", "is required"), ("nowhere.json", "no such file"), (".", "is a directory")])
def test_no_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=problem):
        prompts.read_prompts(name)


# Pictures, and a table of pairs for other tests


def test_decode_range_and_order() -> None:
    ramp = np.zeros((4, 4, 3), np.uint8)
    ramp[0, 1], ramp[3, 2] = (10, 20, 30), (255, 128, 0)
    pixels = images.decode(encoded(Image.fromarray(ramp)), 4)
    assert pixels.shape == (3, 4, 4) and pixels.min() == -1 and pixels.max() == 1
    assert torch.allclose(pixels[:, 0, 1], torch.tensor([10, 20, 30]) / 255 * 2 - 1, atol=1e-6)
    assert torch.allclose(pixels[:, 3, 2], torch.tensor([255, 128, 0]) / 255 * 2 - 1, atol=1e-6)


def test_decode_turns_upright() -> None:
    picture = Image.new("RGB", (32, 32), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 16, 16))  # the dark corner is top left …
    exif = picture.getexif()
    exif[0x0112] = 6  # … in a camera that was held upright: turn clockwise, and it is top right
    corners = images.decode(encoded(picture, "JPEG", quality=100, exif=exif), 32)[0][8::16, 8::16]
    assert (corners > 0).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("mode, kind, colour", [
    ("CMYK", "JPEG", (0, 255, 255, 0)), ("L", "JPEG", 255), ("L", "PNG", 255), ("P", "PNG", 0),
    ("RGBA", "PNG", (255, 0, 0, 9)), ("1", "PNG", 1), ("LA", "PNG", (255, 255)), ("P", "GIF", 0),
    ("RGB", "WEBP", (255, 0, 0)),
])
def test_decode_modes(mode: str, kind: str, colour: object) -> None:
    picture = Image.new(mode, (16, 16), colour)
    if mode == "P":
        picture.putpalette([255, 0, 0] * 256)
    pixels = images.decode(encoded(picture, kind), 16)[:, 8, 8]
    expected = [1.0, 1.0, 1.0] if mode in ("L", "LA", "1") else [1.0, -1.0, -1.0]
    assert pixels.tolist() == pytest.approx(expected, abs=0.05)


def test_decode_resizes_to_the_square() -> None:
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (20, 0, 40, 20))
    pixels = images.decode(encoded(picture), 8)
    assert pixels.shape == (3, 8, 8)
    assert (pixels[0, :, :3] == 1).all() and (pixels[2, :, 5:] == 1).all()  # nothing is cropped
    assert images.decode(plain((9, 9, 9), 2), 16).shape == (3, 16, 16)


# The multi-preference consistent filter

ROWS = [  # the gaps, and the strategies that keep the row
    ((1, 0.1, 0.01, 0.01), {1, 2, 3}),
    ((1, 0.0, 0.01, 0.01), {2, 3}),  # bounds are not kept
    ((1, -0.4, 0.01, 0.01), {2, 3}),
    ((1, -0.5, 0.01, 0.01), {3}),
    ((1, -0.9, 0.01, 0.01), {3}),
    ((1, -1.0, 0.01, 0.01), set()),
    ((1, 5.0, 0.0, 1.0), set()),
    ((1, 5.0, 1.0, 0.0), set()),
    ((1, 5.0, -0.1, 1.0), set()),
    ((1, 5.0, 1.0, -0.1), set()),
    ((0, 0.19, 0.029, 0.069), {1, 2, 3}),
    ((0, 0.2, 0.0, 0.0), set()),
    ((0, 0.0, 0.03, 0.0), set()),
    ((0, 0.0, 0.0, 0.07), set()),
    ((0, 0.0, 0.0, 0.0), {1, 2, 3}),
]


@pytest.mark.parametrize("strategy", [1, 2, 3])
def test_filter(tmp_path: Path, strategy: int) -> None:
    expected = [i for i, (_, kept) in enumerate(ROWS) if strategy in kept]
    file = scores(tmp_path / "s.csv", [gaps for gaps, _ in ROWS])
    kept, count = mpcf.mpcf(file, strategy)
    assert kept.tolist() == expected and count == len(ROWS)
    other = [("x", *gaps[::-1]) for gaps, _ in ROWS]
    swapped = scores(tmp_path / "t.csv", other, ["uid", *HEADER[::-1]], b"\xef\xbb\xbf")
    assert mpcf.mpcf(swapped, strategy)[0].tolist() == expected


def test_strategy_0_keeps_all(tmp_path: Path) -> None:
    kept, count = mpcf.mpcf(scores(tmp_path / "s.csv", [gaps for gaps, _ in ROWS]), 0)
    assert kept.tolist() == list(range(count)) == list(range(len(ROWS)))


def test_a_gap_that_is_not_known_is_never_kept(tmp_path: Path) -> None:
    rows = [(flag, *(("nan", 1e-9)[i != j] for j in range(3))) for flag in (0, 1) for i in range(3)]
    assert mpcf.mpcf(scores(tmp_path / "s.csv", rows), 3)[0].tolist() == []


@pytest.mark.parametrize("content, message", [
    (b"", "has no column 'different_flag'"),
    (b"different_flag,aesthetic_gap,clipscore_gap\n1,1,1\n", "has no column 'vqascore_gap'"),
    (",".join(HEADER).encode() + b"\n1,1,one,1\n", "a value is not a number .*'one'"),
    (",".join(HEADER).encode() + b"\n1,1,,1\n", "a value is not a number"),
    (",".join(HEADER).encode() + b"\n1,1\n", "a value is not a number"),
    (b"\xff\xfe", "cannot be read"),
    (",".join(HEADER).encode() + b"\n" + b"1" * 200_000 + b",1,1,1\n", "cannot be read"),
])
def test_wrong_score_table(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        mpcf.mpcf(tmp_path / "s.csv", 2)
    assert caught.value.key == "--scores"


def test_empty_and_absent_score_table(tmp_path: Path) -> None:
    kept, count = mpcf.mpcf(scores(tmp_path / "s.csv", []), 2)
    assert kept.tolist() == [] and count == 0
    with pytest.raises(InputError, match="cannot be read"):
        mpcf.mpcf(tmp_path / "nowhere.csv", 2)
