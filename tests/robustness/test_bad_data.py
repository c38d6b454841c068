"""Bad data: a thousand damaged inputs, and those that would take memory, time or the run; each is refused, or
left out and counted. What is damaged, and how, is in fuzz.py."""

import datetime
import multiprocessing
import os
import resource
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from transformers import CLIPTokenizer

from lpo_fast.data import dataset, images, mpcf, parquet, preferences, prompts, sources, tables
from lpo_fast.errors import InputError
from lpo_fast.models import texts
from lpo_fast.system import reading
from tests.helpers.models import TOKENIZER
from tests.tools import fuzz

EXAMPLES = 52  # of each of the readers but one: 1,000 in all
FEW = {"model configs": 12, "pairs": 36, "official LRM .yaml": 36}  # which take longest


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Reader]:
    return fuzz.readers(tmp_path_factory.mktemp("readers"))


NAMES = ["pictures", "prompts .json", "prompts .jsonl", "prompts .csv", "prompts .txt", "prompts .parquet",
         "pairs", "score table", "table .csv", "table .jsonl", "LoRA .pt", "LoRA .safetensors", "LRM .pt",
         "state.pt", "CLIP .bin", "lrm.json", "model configs", "official LPO .json", "official LPO .yaml",
         "official LPO .toml", "official LRM .yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_are_refused_in_one_line(name: str, readers: dict[str, fuzz.Reader], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    results = []

    @settings(max_examples=FEW.get(name, EXAMPLES), derandomize=True, database=None, deadline=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(readers[name].contents)
    def tried(content: bytes) -> None:
        results.append(fuzz.attempt(readers[name], content, tmp_path))
    tried()
    assert not all(results)


def test_every_reader_is_tried_and_there_are_a_thousand_inputs(readers: dict[str, fuzz.Reader]) -> None:
    assert [*readers] == NAMES and sum(FEW.get(name, EXAMPLES) for name in NAMES) >= 1000


# Pictures


@pytest.mark.parametrize("name", fuzz.pictures())
def test_odd_pictures_are_read(name: str) -> None:
    """CMYK, animations (the first frame), palettes, transparency, 16 bits, one pixel, 20,000×1."""
    pixels = images.decode(fuzz.pictures()[name], 16)
    assert pixels.shape == (3, 16, 16) and pixels.min() >= -1 and pixels.max() <= 1
    if "pixel" not in name and "long" not in name and "tall" not in name:
        assert pixels.std() > 0.1  # not cut off to white


def test_sixteen_bits_are_scaled_and_thirty_two_refused() -> None:
    grey = np.array([[0, 65535], [32896, 257]], np.uint16)
    assert (np.asarray(images.picture(fuzz.encoded(Image.fromarray(grey), "PNG")))[..., 0].tolist()
            == [[0, 255], [128, 1]])
    with pytest.raises(ValueError, match="no known range"):
        images.picture(fuzz.encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_postscript_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands it to Ghostscript, which is a program of its own."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was called"))
    with pytest.raises(OSError, match="cannot identify"):
        images.picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


BOMBS = {"50,000 × 50,000": lambda: fuzz.png(50_000, 50_000), "9,000 × 9,000": lambda: fuzz.png(9_000, 9_000),
         "zero bytes": lambda: b"", "an endless row": lambda: fuzz.png(2**31 - 1, 1)}


def test_bad_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    red = fuzz.pictures()["rgb.png"]
    cuts = [red[:len(red) * k // 9] for k in range(9)]
    cells = [red, *cuts, *(bomb() for bomb in BOMBS.values()), b"text", red]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"caption": ["a"] * len(cells), "jpg_0": cells, "jpg_1": [red] * len(cells),
                             "label_0": [1.0] * len(cells), "label_1": [0.0] * len(cells)}), path)
    table = preferences.read(str(path))
    dataset.check_pictures(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        batch = dataset.collate([dataset.PairDataset(table, 8)[i] for i in range(len(table))])
    good = {0, len(cells) - 1}
    assert {i for i, corrupt in enumerate(batch["corrupt"].tolist()) if not corrupt} == good
    seen = dataset.Corrupt(table, limit=3)
    seen.count(batch)
    with pytest.raises(InputError, match=f"pictures of {len(cells) - 2} pairs cannot be decoded, the first: "
                       "rows 1, 2, 3"):
        seen.share()


def within(room: int, attempts: list[Callable[[], object]]) -> None:
    """Make them in a process that may not take so much more than it has;
    the exit code is how many raised nothing."""
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + room,) * 2)
    done = 0
    for attempt in attempts:
        try:
            attempt()
            done += 1
        except MemoryError:
            os._exit(100)
        except Exception:
            pass
    os._exit(done)


def forked(room: int, attempts: list[Callable[[], object]]) -> int:
    process = multiprocessing.get_context("fork").Process(target=within, args=(room, attempts))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_take_no_memory() -> None:
    assert forked(200_000_000, [partial(images.decode, make(), 8) for make in BOMBS.values()]) == 0


@pytest.mark.parametrize("cell", ["/dev/zero", "fifo", "large", "gone", "a\0b", "x" * 5000])
def test_a_named_picture_is_a_file_of_some_size(cell: str, tmp_path: Path) -> None:
    """A table of pairs is somebody else's: what it names may be a device or a pipe, which never end."""
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(reading.LARGEST_PICTURE + 1)
    for name in (cell, str(tmp_path / cell)):
        with pytest.raises((ValueError, OSError)):
            sources.Source(str(tmp_path / "p.parquet"), "--pairs", []).encoded({"bytes": None, "path": name})


# Tables that are small files and large in memory


def same(value: object, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([value]))


def varint(number: int, size: int = 0) -> bytes:
    """As Thrift writes an i64, in at least so many bytes."""
    number *= 2
    digits = [number >> shift & 127 for shift in range(0, max(7 * size, number.bit_length()), 7)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def bomb(file: Path, size: int, rows: int, kind: str) -> None:
    """So many rows of a text of that size. kind: how it is stored."""
    stored = ({"store_schema": kind == "numbers"} if kind in ("numbers", "dictionary", "lies") else
              {"use_dictionary": False})
    if kind == "prefixes":
        stored["column_encoding"] = {"caption": "DELTA_BYTE_ARRAY"}
    text = same("x" * size, rows) if "store_schema" in stored else ["x" * size] * rows
    others = {"jpg_0": same(b"x", rows), "jpg_1": same(b"x", rows), "label_0": same(1.0, rows),
              "label_1": same(0.0, rows)}
    pq.write_table(pa.table({"caption": text, **others}), file, compression="zstd", **stored)
    if kind == "lies":
        content, true = (file.read_bytes(),
                         pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size)
        assert content.count(varint(true)) == 1
        file.write_bytes(content.replace(varint(true), varint(1, len(varint(true)))))
        assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 1


def refused(read: Callable[[str], object], file: Path) -> None:
    with pytest.raises(InputError, match=f"{file.name}.* (holds|takes) more than [0-9,]+ bytes"):
        read(str(file))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("kind, size, rows", [
    ("dictionary", 10**6, 10**6), ("numbers", 10**6, 10**6), ("plain", 10**6, 150), ("prefixes", 10**7, 15),
    ("dictionary", 1, 1_500_000), ("dictionary", 4 * 10**7, 99), ("lies", 4 * 10**7, 99)])
def test_a_text_bomb_is_refused(kind: str, size: int, rows: int, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """As prompts, pairs and a table: a file of kilobytes, with a limit a thirty-second of what it is."""
    monkeypatch.setattr(parquet, "LARGEST_TEXT", 2**26)
    bomb(tmp_path / "p.parquet", size, rows, kind)
    assert (tmp_path / "p.parquet").stat().st_size < 100_000
    readers = (prompts.read_prompts, preferences.read,
               lambda table: tables.read(table, "caption", "jpg_0", "score"))
    assert forked(6 * 2**26, [partial(refused, read, tmp_path / "p.parquet") for read in readers]) == 3


def test_a_picture_bomb_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LARGEST_TEXT", 2**26)
    pq.write_table(pa.table({"caption": ["a"] * 999, "jpg_0": same(b"x" * 10**6, 999),
                             "jpg_1": same(b"x", 999), "label_0": [1.0] * 999, "label_1": [0.0] * 999}),
                   tmp_path / "p.parquet", store_schema=False)
    with pytest.raises(InputError, match="p.parquet: cannot be converted .*its pictures take more than"):
        dataset.PairDataset(preferences.read(str(tmp_path / "p.parquet"), cache_dir=str(tmp_path / "cache")),
                            8)
    assert [file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [".lock"]


def test_columns_are_counted_and_come_as_they_are(tmp_path: Path) -> None:
    """Ten texts of 100 letters; values by number, lists, two files."""
    texts = [str(i) * 100 for i in range(10)]
    table = pa.table({"a": texts, "b": pa.array(texts).dictionary_encode(), "c": [[text] for text in texts],
                      "d": range(10)})
    for name in ("1.parquet", "2.parquet"):
        pq.write_table(table, tmp_path / name, row_group_size=3)
    both = sorted(tmp_path.iterdir())
    assert parquet.read_columns(both).equals(pa.concat_tables([table, table]))
    for name in "abc":
        assert parquet.read_columns(both, [name], most=4_000)[name].to_pylist() == table[name].to_pylist() * 2
        with pytest.raises(ValueError, match=r"2.parquet holds more than 3,270 bytes"):
            parquet.read_columns(both, [name], most=2 * 10 * (100 + 64) - 10)


def test_the_net_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with (pytest.raises(ValueError, match="takes more than 100,000,000 bytes of memory"),
          reading.memory_limit(10**8)):
        bytearray(2 * 10**8)
    assert resource.getrlimit(resource.RLIMIT_AS) == before and bytearray(2 * 10**8)


# Prompts


@pytest.mark.parametrize("prompt", ["a\0b", "x" * 100_000, "a " * 50_000, "שלום עולם مرحبا",
                                    "👩\u200d👩\u200d👧 🏳️\u200d🌈", "\u202egnirts", "\ufeffa"])
@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_odd_prompts_are_prompts(prompt: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"caption": [prompt]}), file)
    else:
        file.write_text(fuzz.json.dumps([prompt]) if suffix == ".json" else f'caption\n"{prompt}"\n',
                        encoding="utf-8")
    assert prompts.read_prompts(str(file)) == [prompt]
    ids = texts.tokenize([CLIPTokenizer.from_pretrained(TOKENIZER)], [prompt])[0]
    assert ids.shape[0] == 1 and ids.shape[1] <= 77


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    """Parquet says that it is text; its bytes are not."""
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)),
                                                    pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"caption": column, "jpg_0": [b""], "jpg_1": [b""], "label_0": [1.0],
                             "label_1": [0.0]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="--prompts .*is not UTF-8"):
        prompts.read_prompts(str(tmp_path / "p.parquet"))
    with pytest.raises(InputError, match="--columns.caption caption: cannot be read from"):
        preferences.read(str(tmp_path / "p.parquet"))


def test_keys_and_columns_that_occur_twice(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "image": "x"}\n{"prompt": "a", "prompt": "b", '
                                      '"image": "x"}\n')
    with pytest.raises(InputError, match="line 2: the key 'prompt' occurs twice"):
        tables.read(str(tmp_path / "t.jsonl"), "prompt", "image", "score")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["caption", "caption"])
    pq.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(InputError, match="has no column 'caption'"):
        prompts.read_prompts(str(tmp_path / "p.parquet"))


def test_a_score_table_of_junk_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"{','.join(mpcf.GAPS)}\n1,1,1,1\n1,1,x,1\n")
    with pytest.raises(InputError, match="line 3: a value is not a number"):
        mpcf.read_scores(str(tmp_path / "s.csv"))


@pytest.mark.parametrize("changed, message", [
    ({"label_0": [[1.0]], "label_1": [[0.0]]}, "a label is not a number (it is a list)"),
    ({"num_example_per_prompt": [float("inf")]}, "below 1 or too large"),
    ({"image_0_uid": [["k"]], "image_1_uid": ["l"]}, "a picture's key is ['k']"),
    ({"label_0": [datetime.date(2020, 1, 1)]}, "a label is not a number"),
])
def test_columns_of_another_type(changed: dict, message: str, tmp_path: Path) -> None:
    good = {"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"x"], "label_0": [1.0], "label_1": [0.0]}
    pq.write_table(pa.table(good | changed), tmp_path / "p.parquet")
    with pytest.raises(InputError) as caught:
        preferences.read(str(tmp_path / "p.parquet"))
    assert message in caught.value.problem and "p.parquet" in str(caught.value)


# Configurations as data


def test_a_compressed_checkpoint_and_a_tensor_larger_than_its_file(tmp_path: Path) -> None:
    from zipfile import ZIP_DEFLATED, ZipFile
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "whole.pt")
    with ZipFile(tmp_path / "whole.pt") as old, ZipFile(tmp_path / "small.pt", "w", ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert (tmp_path / "small.pt").stat().st_size < 50_000
    # torch itself takes it
    assert torch.load(tmp_path / "small.pt", weights_only=True)["a"].numel() == 1_000_000
    with pytest.raises(InputError, match="it is compressed"):
        reading.read_pickle(tmp_path / "small.pt")
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "wide.pt")
    with pytest.raises(InputError, match="larger than its stored data"):
        reading.read_pickle(tmp_path / "wide.pt")
    assert reading.read_pickle(tmp_path / "whole.pt")["a"].numel() == 1_000_000
