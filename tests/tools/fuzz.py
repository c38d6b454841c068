"""Feed damage to every reader of outside data: python tests/tools/fuzz.py [--seconds 60] [READER …].

A reader may return or raise InputError; of a picture anything that is no MemoryError, since those are left
out and counted. Whatever else comes out, a call that takes longer than SLOW, or a reader that takes none of
its inputs is a bug: the input is printed, and the exit code is 1.
``tests/robustness/test_bad_data.py`` takes a fixed thousand of the same inputs.
"""

import argparse
import copy
import datetime
import io
import json
import math
import os
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lpo_fast import config, export
from lpo_fast.data import dataset, images, mpcf, preferences, tables
from lpo_fast.data.prompts import read_prompts
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.models import loras
from lpo_fast.official import lpo, lrm
from lpo_fast.preflight import models as preflight_models
from lpo_fast.preflight import settings as preflight_settings
from lpo_fast.run import states
from tests.helpers.models import make_sd

SLOW = 5.0  # seconds
OFFICIAL = Path(__file__).parent.parent / "official"
ODD = st.sampled_from([None, True, -1, 0, 2, 2**31, 2**63, 10**30, 1.5, -0.0, math.nan, math.inf, 1e400, "",
                       " ", "x", "../../x", "a\0b", "\ud83d", "مرحبا", "👩‍👩‍👧", "<script>", "1e-5", "yes",
                       "9" * 5000, [], [1], [[1], [2]], [None], {}, {"a": 1}, {"": {}}, [[[[]]]]])


class Reader(NamedTuple):
    """read: a file, which may be damaged. contents: what the file holds. suffix: how it is named."""

    read: Callable[[Path], object]
    contents: st.SearchStrategy[bytes]
    suffix: str
    refusals: tuple[type[BaseException], ...] = (InputError,)


def damaged(*whole: bytes) -> st.SearchStrategy[bytes]:
    """Whole files cut off, with bytes changed, put in, taken out, or said twice."""
    @st.composite
    def draw(draw: st.DrawFn) -> bytes:
        content = bytearray(draw(st.sampled_from(whole)))
        for _ in range(draw(st.integers(0, 4))):
            at, size = draw(st.integers(0, len(content))), draw(st.integers(0, 64))
            how = draw(st.sampled_from(("cut", "change", "put in", "take out", "twice", "zero")))
            if how == "cut":
                del content[at:]
            elif how == "change":
                content[at:at + size] = draw(st.binary(min_size=1, max_size=8))
            elif how == "put in":
                content[at:at] = draw(st.binary(max_size=64))
            elif how == "take out":
                del content[at:at + size]
            elif how == "twice":
                content[at:at] = content[at:at + size]
            else:
                content[at:at + size] = bytes(len(content[at:at + size]))
        return bytes(content)
    return draw()


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    picture.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it is so large."""
    out = io.BytesIO(b"")
    out.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(out, b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    PngImagePlugin.putchunk(out, b"IDAT", data)
    PngImagePlugin.putchunk(out, b"IEND")
    return out.getvalue()


def pictures() -> dict[str, bytes]:
    """Odd but right pictures by name."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    rgb, frames = (Image.fromarray(noise[..., :3]),
                   [Image.fromarray(noise[::step, ::step, :3].copy()) for step in (1, 2)])
    frames[1] = frames[1].resize((16, 16))
    palette = rgb.quantize(8)
    grey16 = Image.fromarray(noise[..., :1].astype(np.uint16).squeeze() * 257)
    more = {"save_all": True, "append_images": frames[1:]}
    return {
        "rgb.png": encoded(rgb, "PNG"), "rgb.jpg": encoded(rgb, "JPEG"), "rgb.webp": encoded(rgb, "WEBP"),
        "rgb.bmp": encoded(rgb, "BMP"), "rgb.tiff": encoded(rgb, "TIFF"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"), "cmyk.tiff": encoded(rgb.convert("CMYK"), "TIFF"),
        "rgba.png": encoded(Image.fromarray(noise), "PNG"), "animated.gif": encoded(frames[0], "GIF", **more),
        "animated.webp": encoded(frames[0], "WEBP", **more),
        "animated.png": encoded(frames[0], "PNG", **more),
        "palette.png": encoded(palette, "PNG", transparency=1),
        "palette.gif": encoded(palette, "GIF", transparency=1), "grey.png": encoded(rgb.convert("L"), "PNG"),
        "grey16.png": encoded(grey16, "PNG"), "one bit.png": encoded(rgb.convert("1"), "PNG"),
        "one pixel.png": encoded(rgb.crop((0, 0, 1, 1)), "PNG"),
        "long.png": encoded(rgb.resize((20_000, 1)), "PNG"),
        "tall.jpg": encoded(rgb.resize((1, 20_000)), "JPEG")}


def parquet(columns: dict) -> bytes:
    pq.write_table(pa.table(columns), out := io.BytesIO())
    return out.getvalue()


@st.composite
def wrong_pairs(draw: st.DrawFn) -> bytes:
    """Pairs with columns missing, renamed, null, or of another type."""
    red = pictures()["rgb.png"]
    columns = {"caption": ["a", "b"], "jpg_0": [red, red], "jpg_1": [red, red],
               "label_0": [1.0, 0.5], "label_1": [0.0, 0.5],
               "num_example_per_prompt": [1, 1], "image_0_uid": ["k", "l"], "image_1_uid": ["m", "n"]}
    for name in draw(st.lists(st.sampled_from([*columns]), min_size=1, max_size=3, unique=True)):
        how = draw(st.sampled_from(("missing", "renamed", "null", "values", "values", "half null")))
        values = columns.pop(name)
        if how == "renamed":
            columns[draw(st.sampled_from([name.upper(), name + " ", "", "x[0]"]))] = values
        elif how == "null":
            columns[name] = [None, None]
        elif how == "half null":
            columns[name] = [values[0], None]
        elif how == "values":
            columns[name] = draw(st.sampled_from([
                ["x", "y"], [b"x", b"\xff"], [1, 2**62], [math.nan, math.inf], [True, False], [[1], [0]],
                [[1], []], [{"bytes": b"x", "path": None}, None], [{"bytes": None, "path": "/dev/zero"}] * 2,
                [{"a": 1}] * 2, ["/dev/zero", "../x"], ["a\0b", "c" * 100_000],
                [datetime.date(2020, 1, 1)] * 2, [-1.0, 1e-30]]))
    return parquet(columns) if columns else b""


def read_pairs(file: Path) -> object:
    """Read and check a table of pairs, and choose from it as a run does."""
    table = preferences.read(str(file))
    dataset.check_pictures(table)
    best = config.LRM(only_on_best=True) if table.uids else config.LRM()
    return preferences.choose(preferences.choose(table, best), config.LRM(compare_between_timestep=True))


@st.composite
def odd_json(draw: st.DrawFn, lines: bool = False) -> bytes:
    """Prompts as JSON with odd values, keys twice, and depth."""
    value = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["caption", "a"]), inner, max_size=2), max_leaves=4)
    records = draw(st.lists(st.just("a cat") | value | value.map(lambda v: {"caption": v}), max_size=4))
    texts = [json.dumps(record) for record in records]
    texts += draw(st.lists(st.sampled_from(['{"caption": "a", "caption": "b"}', "[" * 100_000,
                                            "1" * 5000, "NaN", "{" * 50, "-", '"\\ud83d"',
                                            '{"a":' * 5000 + "1" + "}" * 5000]), max_size=1))
    return ("\n".join(texts) if lines else f"[{','.join(texts)}]").encode()


@st.composite
def odd_csv(draw: st.DrawFn, names: tuple[str, ...], *good: str) -> bytes:
    """A table whose cells are odd, with NULs, quotes, huge fields and lines of other lengths."""
    cells = st.sampled_from([*good, *good, "", "nan", "inf", "-1", "1e999", "x", "a\0b", '"', '"a\nb"',
                             "9" * 5000, "a" * 140_000, "é"])
    rows = draw(st.lists(st.lists(cells, min_size=0, max_size=len(names) + 2), max_size=5))
    head = draw(st.sampled_from([names, names[1:], names + names[:1], ()]))
    return "\n".join(",".join(row) for row in [head, *rows]).encode()


LORA = {"down.to_q.lora_A.weight": torch.zeros(2, 4), "down.to_q.lora_B.weight": torch.zeros(4, 2)}


def pickled(value: object, **how) -> bytes:
    torch.save(value, out := io.BytesIO(), **how)
    return out.getvalue()


def official_config() -> dict:
    """configs/sd15.py as nested dicts, without None."""
    before = os.getcwd()
    try:
        os.chdir(OFFICIAL)
        return without_none(lpo.load("configs/sd15.py"))
    finally:
        os.chdir(before)


def without_none(tree: dict) -> dict:
    return {key: without_none(value) if isinstance(value, dict) else value for key, value in tree.items()
            if value is not None}


@st.composite
def odd_config(draw: st.DrawFn, tree: dict, dump: Callable[[dict], str]) -> bytes:
    """A configuration with odd values in place of some of its own, and odd text around."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        at = tree
        while True:
            key = draw(st.sampled_from([*at]))
            if not isinstance(at[key], dict) or not at[key] or draw(st.integers(0, 5)) == 0:
                break
            at = at[key]
        at[key] = copy.deepcopy(draw(ODD))  # the next turn may write into it
    text = draw(st.sampled_from(["{}", "{}", "{}", "a: &a [1]\nb: *a\n{}", "{}\n" + "[" * 3000,
                                 "{}\nz: !!python/object/apply:os.abort []",
                                 "{}\n\x00", "{}\nz: 0x" + "f" * 6000, "{}\nz: 2020-99-99", "{}\n? [a]\n: 1",
                                 "{}\nz: " + "1:" * 3_000 + "1"]))
    return text.replace("{}", dump(tree), 1).encode("utf-8", "surrogatepass")


def models(folder: Path) -> tuple[Path, st.SearchStrategy[bytes]]:
    """A tiny model, and odd values for the keys of its configs: [[file, key], value]."""
    make_sd(folder)
    configs = [file for file in sorted(folder.glob("*/*config.json")) if "tokenizer" not in str(file)]
    keys = [(str(file.relative_to(folder)), key) for file in configs for key in json.loads(file.read_text())]
    return folder, st.tuples(st.sampled_from(keys), ODD).map(lambda odd: json.dumps(odd).encode())


def readers(work: Path) -> dict[str, Reader]:
    """Every reader of outside data by name."""
    whole, (model, odd_models) = pictures(), models(work / "sd")
    tree, lrm_tree = official_config(), yaml.safe_load((OFFICIAL / "step_sd15.yaml").read_text())
    tensors = (pickled(LORA), pickled(LORA, _use_new_zipfile_serialization=False),
               pickled({"a": [1, {"b": torch.ones(3)}]}))
    lora = [save(LORA), *(save(LORA, {"lora_adapter_metadata": text}) for text in (
        '{"unet.lora_alpha": 2}', '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1e999}', "[" * 5000, "3"))]
    heads = pickled({"visual_projection.weight": torch.zeros(16, 88), "logit_scale": torch.tensor(1.0)})
    lrm_tree["dataset"]["pseudo_preference_path"] = "scores.csv"

    def with_config(file: Path) -> object:
        (part, key), value = json.loads(file.read_bytes())
        before = (model / part).read_text()
        try:
            (model / part).write_text(json.dumps(json.loads(before) | {key: value}))
            return preflight_models.pipeline(str(model), "--model")
        finally:
            (model / part).write_text(before)

    def lpo_config(file: Path) -> object:
        return preflight_settings.lpo(lpo.settings(lrm.flat(lpo.load(str(file))))[0])

    def lrm_json(file: Path) -> object:
        (file.parent / "lrm.json").write_bytes(file.read_bytes())
        return checkpoint.recorded_settings(file.parent)
    lrm_values = st.dictionaries(st.sampled_from(["base", "guidance_scale", "multi_scale_cfg", "resolution",
                                                  "x"]), ODD)
    prompts = (lambda file: read_prompts(str(file)))  # noqa: E731
    return {
        "pictures": Reader(lambda file: images.decode(file.read_bytes(), 8), damaged(*whole.values()), ".png",
                           (OSError, ValueError, SyntaxError, Exception)),
        "prompts .json": Reader(prompts, odd_json() | damaged(b'[{"caption": "a cat"}, "a dog"]'), ".json"),
        "prompts .jsonl": Reader(prompts, odd_json(lines=True) | damaged(b'"a"\n{"caption": "b"}\n'),
                                 ".jsonl"),
        "prompts .csv": Reader(prompts, odd_csv(("caption", "id"), "a cat"), ".csv"),
        "prompts .txt": Reader(prompts, st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
                               ".txt"),
        "prompts .parquet": Reader(prompts, damaged(parquet({"caption": ["a", "b"]})), ".parquet"),
        "pairs": Reader(read_pairs, wrong_pairs(), ".parquet"),
        "score table": Reader(lambda file: mpcf.kept(mpcf.read_scores(str(file)), 2),
                              odd_csv((*mpcf.GAPS, *mpcf.KEYS), "1", "0", "0.5", "k"), ".csv"),
        "table .csv": Reader(lambda file: tables.read(str(file), "prompt", "image", "score"),
                             odd_csv(("prompt", "image"), "a cat", "input.csv", "/dev/zero"), ".csv"),
        "table .jsonl": Reader(lambda file: tables.read(str(file), "caption", "a", "score"), odd_json(
            lines=True) | damaged(b'{"caption": "a cat", "a": "input.jsonl"}\n' * 3), ".jsonl"),
        "LoRA .pt": Reader(loras.read_lora, damaged(*tensors), ".pt"),
        "LoRA .safetensors": Reader(lambda file: export.read(str(file)), damaged(*lora), ".safetensors"),
        "LRM .pt": Reader(lambda file: checkpoint.read_heads(file, [8, 16, 16, 24]), damaged(heads), ".pt"),
        "state.pt": Reader(state, damaged(pickled(
            {"at": {}, "lora": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}})), ".pt"),
        "CLIP .bin": Reader(lambda file: checkpoint.read_text_projection(str(file)), damaged(pickled({
            "text_projection.weight": torch.ones(3, 3)}), pickled({"text_projection.weight": 3})), ".bin"),
        "lrm.json": Reader(lrm_json, lrm_values.map(lambda v: json.dumps(v).encode())
                           | damaged(b'{"base": "x"}'), ".json"),
        "model configs": Reader(with_config, odd_models, ".odd"),
        **{f"official LPO {suffix}": Reader(lpo_config, odd_config(tree, dump), suffix)
           for suffix, dump in ((".json", json.dumps), (".yaml", yaml.safe_dump), (".toml", toml))},
        "official LRM .yaml": Reader(lambda file: preflight_settings.lrm(lrm.parse(["--config-path", str(
            file.parent), "--config-name", file.name])), odd_config(lrm_tree, yaml.safe_dump), ".yaml"),
    }


def state(file: Path) -> dict:
    """What a run goes on from, under the name that it looks for."""
    parts = {"lora": states.Trained(torch.nn.Linear(2, 2))}
    return states.load_state(file.rename(file.with_name(states.STATE)), parts)


def toml(tree: dict, before: str = "") -> str:
    """TOML of nested dicts of plain values: JSON's scalars and lists are TOML's."""
    lines = [f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in tree.items()
             if not isinstance(value, dict)]
    groups = [f"[{before}{json.dumps(key)}]\n" + toml(value, f"{before}{json.dumps(key)}.")
              for key, value in tree.items() if isinstance(value, dict)]
    return "\n".join([*lines, *groups]) + "\n"


def attempt(reader: Reader, content: bytes, folder: Path) -> bool:
    """Whether the reader took it; raises whatever a reader must not raise,
    and TimeoutError if it took too long."""
    file = folder / f"input{reader.suffix}"
    file.write_bytes(content)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(file)
        taken = True
    except MemoryError:
        raise
    except reader.refusals as error:
        taken = False
        if isinstance(error, InputError) and not (error.problem and error.remedy and error.value):
            raise AssertionError(f"a refusal that does not say what is wrong: {error}") from error
    if (seconds := time.perf_counter() - started) > SLOW:
        raise TimeoutError(f"{seconds:.1f} s")
    return taken


def run(name: str, reader: Reader, folder: Path, seconds: float) -> tuple[int, int, str]:
    """Inputs tried, those that were taken, and the first failure ("": none)."""
    tried, taken, end, start = 0, 0, time.monotonic() + seconds, 0
    while time.monotonic() < end:
        start += 1

        @seed(start)
        @settings(max_examples=100, database=None, deadline=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(reader.contents)
        def batch(content: bytes) -> None:
            nonlocal tried, taken
            if time.monotonic() < end:
                tried += 1
                taken += attempt(reader, content, folder)
        try:
            batch()
        except Exception:
            return tried, taken, f"{name}, seed {start}\n{traceback.format_exc()}"
    return tried, taken, ""


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each reader")
    parser.add_argument("readers", nargs="*", metavar="READER", help="default: all")
    options, failures = parser.parse_args(), 0
    os.environ["RANK"] = "1"  # nothing is printed by the readers
    with tempfile.TemporaryDirectory() as folder:
        (work := Path(folder) / "inputs").mkdir()
        print("| reader | inputs tried | taken | refused | result |\n|---|---|---|---|---|")
        for name, reader in readers(Path(folder)).items():
            if not options.readers or name in options.readers:
                tried, taken, failure = run(name, reader, work, options.seconds)
                failures += bool(failure)
                failures += not taken  # then something else stands before the reader
                result = "FAILED" if failure else "ok" if taken else "TAKES NOTHING"
                print(f"| {name} | {tried} | {taken} | {tried - taken - bool(failure)} | {result} |",
                      flush=True)
                if failure:
                    print(failure, file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
