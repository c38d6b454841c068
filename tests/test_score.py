"""Scores of pictures against plain calls of the parts, the tables, and what is refused."""

import csv
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image

from lpo_fast import errors, score
from lpo_fast.lrm import checkpoint
from lpo_fast.method import noise
from lpo_fast.models import texts
from lpo_fast.score import Scorer

PROMPTS = ["a red circle", "a blue square on a green background", "a red circle", "three cats",
           "a blue square"]


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3),
                                                                dtype=np.uint8))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(len(PROMPTS))]
    for i, path in enumerate(paths):
        picture(i).save(path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def scorer(tiny_sd: Path, tiny_lrm: Path) -> Scorer:
    return Scorer(tiny_lrm, base=tiny_sd)


@torch.no_grad()
def plain(sd: Path, lrm: Path, pictures: list[Image.Image], prompts: list[str], t: int, draws: int,
          seed: int = 0) -> torch.Tensor:
    """The same scores picture by picture, with diffusers' VAE and DDPM scheduler."""
    model, vae = checkpoint.load_lrm(lrm, sd), AutoencoderKL.from_pretrained(sd, subfolder="vae")
    tokenizers = texts.load_tokenizers(sd, model.family)
    ddpm, scores = DDPMScheduler.from_pretrained(sd, subfolder="scheduler"), []
    for row, (one, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        pixels = torch.from_numpy(np.array(one)).permute(2, 0, 1)[None] / 127.5 - 1
        x0 = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        text = model.encode(texts.tokenize(tokenizers, [prompt]), texts.tokenize(tokenizers, [""]))
        z = noise.normal(seed, 0, torch.tensor([row]), t, draws, tuple(x0.shape[1:]))
        scores.append(sum(model.score(ddpm.add_noise(x0, n, torch.tensor([t])), torch.tensor([t]), text)
                          for n in z) / draws)
    return torch.cat(scores)


@pytest.mark.parametrize("timestep, draws, seed", [(1, 1, 0), (501, 3, 0), (951, 1, 7), (0, 1, 0)])
def test_scores_are_those_of_plain_calls(tiny_sd, tiny_lrm, timestep, draws, seed):
    pictures = [picture(i) for i in range(5)]
    scores = Scorer(tiny_lrm, base=tiny_sd, seed=seed,
                    batch_size=2)(pictures, PROMPTS, timestep=timestep, draws=draws)
    wanted = plain(tiny_sd, tiny_lrm, pictures, PROMPTS, timestep, draws, seed)
    assert scores.shape == (5,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=2e-5)
    assert wanted.std() > 1e-3  # the pictures are told apart


def test_sdxl_scores_are_those_of_plain_calls(tiny_sdxl, tmp_path):
    model = checkpoint.new_lrm(tiny_sdxl, generator=torch.Generator().manual_seed(1))
    checkpoint.save_lrm(model, texts.load_tokenizers(tiny_sdxl, model.family), tmp_path / "lrm")
    pictures = [picture(i) for i in range(2)]
    scores = Scorer(tmp_path / "lrm", base=tiny_sdxl)(pictures, PROMPTS[:2])
    torch.testing.assert_close(scores, plain(tiny_sdxl, tmp_path / "lrm", pictures, PROMPTS[:2], 1, 1),
                               rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_the_resolution_of_its_training(name, tmp_path, request):
    """Is recorded for every family; pictures are resized to it, or to another that is asked for,
    and time ids say so."""
    base = request.getfixturevalue(name)
    model = checkpoint.new_lrm(base, generator=torch.Generator().manual_seed(1), resolution=32)
    checkpoint.save_lrm(model, texts.load_tokenizers(base, model.family), tmp_path / "lrm")
    assert json.loads((tmp_path / "lrm" / "lrm.json").read_text())["resolution"] == 32
    shapes = []
    for resolution, size in ((0, 32), (16, 16)):
        scorer = Scorer(tmp_path / "lrm", resolution=resolution)
        sizes = scorer.lrm.sizes
        assert (scorer.resolution == size
                and (sizes is None or sizes.tolist() == [[size, size, 0, 0, size, size]]))
        image_features = scorer.lrm.image_features
        scorer.lrm.image_features = (lambda x, *rest, f=image_features: shapes.append(tuple(x.shape[1:]))
                                     or f(x, *rest))
        scorer([picture(0)], PROMPTS[:1])
    assert shapes == [(4, 16, 16), (4, 8, 8)]


def test_another_vae_encodes(tiny_sd, tiny_lrm, scorer, tmp_path):
    torch.manual_seed(5)
    AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_sd / "vae")).save_pretrained(tmp_path / "vae")
    same, other = (Scorer(tiny_lrm, base=tiny_sd, vae=str(path))([picture(0)], PROMPTS[:1]) for path in (
        tiny_sd / "vae", tmp_path / "vae"))
    assert same == scorer([picture(0)], PROMPTS[:1]) != other


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_do_not_matter(tiny_sd, tiny_lrm, scorer, size):
    pictures = [picture(i) for i in range(5)]
    split = Scorer(tiny_lrm, base=tiny_sd, batch_size=size)(pictures, PROMPTS, timestep=601, draws=2)
    torch.testing.assert_close(split, scorer(pictures, PROMPTS, timestep=601, draws=2), rtol=1e-5, atol=2e-5)


def test_rows_key_the_noise(scorer):
    pictures = [picture(0)] * 3
    scores = scorer(pictures, "a red circle", timestep=801, rows=[4, 9, 4])
    assert abs(scores[0] - scores[2]) < 2e-5 < 1e-3 < abs(scores[0] - scores[1])
    again = scorer(pictures[:1], "a red circle", timestep=801, rows=[9])
    torch.testing.assert_close(again, scores[1:2], rtol=1e-5, atol=2e-5)


def test_draws_average_noise_out(scorer):
    pictures = [picture(0)] * 16
    spread = [scorer(pictures, "a red circle", timestep=801, draws=draws).std() for draws in (1, 16)]
    assert spread[1] < 0.5 * spread[0]


def test_every_form_of_a_picture_scores_the_same(scorer, tmp_path):
    one, data = picture(3), io.BytesIO()
    one.save(data, "PNG")
    (tmp_path / "p.png").write_bytes(data.getvalue())
    forms = [one, data.getvalue(), tmp_path / "p.png", str(tmp_path / "p.png"), one.convert("RGBA")]
    scores = scorer(forms, "a red circle", rows=[0] * 5)
    torch.testing.assert_close(scores, scores[:1].expand(5), rtol=1e-5, atol=2e-5)


def test_pictures_are_turned_upright(scorer):
    one, data = picture(3), io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise
    one.transpose(Image.Transpose.ROTATE_90).save(data, "PNG", exif=exif)
    scores = scorer([one, data.getvalue()], "a red circle", rows=[0, 0])
    assert abs(scores[0] - scores[1]) < 2e-5


def test_none_and_unequal_numbers(scorer):
    assert scorer([], []).shape == (0,)
    with pytest.raises(errors.InputError, match="2 pictures: come with 1 prompts"):
        scorer([picture(0)] * 2, ["a"])
    with pytest.raises(errors.InputError, match="picture 1: row 1 cannot be decoded"):
        scorer([picture(0), b"no picture"], "a")


# The command


def command(tiny_sd: Path, tiny_lrm: Path, *more: str) -> int:
    return score.main(["--lrm", str(tiny_lrm), "--lrm-base", str(tiny_sd), *more])


def test_a_line_a_picture(tiny_sd, tiny_lrm, scorer, files, capsys):
    assert command(tiny_sd, tiny_lrm, "--prompt", "a red circle", "--batch-size", "2", *files) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [path for _, path in lines] == files
    assert ([float(number) for number, _ in lines]
            == pytest.approx(scorer(files, "a red circle").tolist(), abs=1e-4))


def write(file: Path, rows: list[dict]) -> str:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        with open(file, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(file)


def read(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".csv", ".jsonl", ".parquet"])
def test_a_table_gets_a_column(tiny_sd, tiny_lrm, scorer, files, tmp_path, kind, out):
    rows = [{"id": f"n{i}", "text": prompt, "file": os.path.basename(files[i])}
            for i, prompt in enumerate(PROMPTS)]
    table = write(tmp_path / f"rows{kind}", rows)
    target = tmp_path / "new" / f"scored{out}"
    keys = "--prompt-key", "text", "--image-key", "file"
    assert command(tiny_sd, tiny_lrm, "--table", table, "--out", str(target), *keys) == 0
    scored = read(target)
    assert [{key: row[key] for key in rows[0]} for row in scored] == rows
    assert ([float(row["lrm_score"]) for row in scored]
            == pytest.approx(scorer(files, PROMPTS).tolist(), abs=1e-5))
    assert [p.name for p in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: {"bytes": b, "path": None}])
def test_a_table_with_bytes(tiny_sd, tiny_lrm, scorer, files, tmp_path, wrap, capsys):
    encoded = [Path(file).read_bytes() for file in files]
    rows = [{"prompt": p, "image": wrap(b)} for p, b in zip(PROMPTS, encoded, strict=True)]
    table = write(tmp_path / "rows.parquet", rows)
    assert command(tiny_sd, tiny_lrm, "--table", table, "--out", str(tmp_path / "o.parquet"),
                   "--score-key", "s") == 0
    scored = pq.read_table(tmp_path / "o.parquet")
    assert scored["image"].to_pylist() == [row["image"] for row in rows]
    assert scored["s"].to_pylist() == pytest.approx(scorer(encoded, PROMPTS).tolist(), abs=1e-5)
    assert command(tiny_sd, tiny_lrm, "--table", table, "--out", str(tmp_path / "o.csv")) == 2
    assert "--out" in capsys.readouterr().err and not (tmp_path / "o.csv").exists()


def test_the_base_that_the_lrm_names(tiny_sd, tiny_lrm, copied, files, capsys):
    lrm = copied(tiny_lrm)
    recorded = json.loads((lrm / "lrm.json").read_text())
    (lrm / "lrm.json").write_text(json.dumps(recorded | {"base": ""}))
    assert score.main(["--lrm", str(lrm), "--prompt", "a", files[0]]) == 2
    assert "--lrm-base" in capsys.readouterr().err
    (lrm / "lrm.json").write_text(json.dumps(recorded | {"base": str(tiny_sd)}))
    assert score.check_lrm(str(lrm), "") == tiny_sd


BAD = [
    (["--prompt", "a", "nowhere.png"], "nowhere.png: no such picture"),
    (["--prompt", "a", "{text}"], "is not a picture"),
    (["{0}"], "--prompt (none): is required"),
    (["--prompt", "a"], "give either pictures or a table"),
    (["--prompt", "a", "--table", "{csv}", "{0}"], "give either pictures or a table"),
    (["--prompt", "a", "--timestep", "1000", "{0}"], "--timestep 1000"),
    (["--prompt", "a", "--timestep", "-1", "{0}"], "--timestep -1"),
    (["--prompt", "a", "--draws", "0", "{0}"], "--draws 0"),
    (["--prompt", "a", "--batch-size", "0", "{0}"], "--batch-size 0"),
    (["--prompt", "a", "--seed", "-1", "{0}"], "--seed -1"),
    (["--table", "{csv}"], "--out (none): is required"),
    (["--table", "{csv}", "--out", "{csv}"], "already exists"),
    (["--table", "{csv}", "--out", "{dir}/o.xls"], "unknown file type '.xls'"),
    (["--table", "{csv}", "--out", "{0}/o.csv"], "cannot be written"),
    (["--table", "{dir}/none.csv", "--out", "{dir}/o.csv"], "no such file"),
    (["--table", "{text}", "--out", "{dir}/o.csv"], "unknown file type"),
    (["--table", "{csv}", "--out", "{dir}/o.csv", "--prompt-key", "p"], "no column 'p'"),
    (["--table", "{csv}", "--out", "{dir}/o.csv", "--image-key", "p"], "no column 'p'"),
    (["--table", "{csv}", "--out", "{dir}/o.csv", "--score-key", "prompt"], "--score-key prompt"),
    (["--table", "{lost}", "--out", "{dir}/o.csv"], "row 1: no such picture"),
    (["--table", "{corrupt}", "--out", "{dir}/o.csv"], "row 1 is not a picture"),
    (["--table", "{cut}", "--out", "{dir}/o.csv"], "row 1 cannot be decoded"),
    (["--table", "{ragged}", "--out", "{dir}/o.csv"], "line 3 has a different number of fields"),
    (["--table", "{null}", "--out", "{dir}/o.csv"], "row 0: the prompt is None"),
    (["--table", "{json}", "--out", "{dir}/o.csv"], "cannot be read"),
    (["--table", "{list}", "--out", "{dir}/o.csv"], "line 2 is not an object"),
    (["--table", "{fake}", "--out", "{dir}/o.csv"], "cannot be read"),
    (["--table", "{empty}", "--out", "{dir}/o.csv"], "holds no row"),
]


@pytest.mark.parametrize("argv, message", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tiny_sd, tiny_lrm, files, tmp_path, capsys, argv, message):
    def file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    whole = Path(files[0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    names = {"dir": tmp_path, "text": file("t.txt", "text"),
             "csv": file("good.csv", "prompt,image\na,0.png\n"),
             "lost": file("lost.csv", "prompt,image\na,0.png\na,gone.png\n"),
             "corrupt": file("corrupt.csv", "prompt,image\na,0.png\na,t.txt\n"),
             "cut": file("cut.csv", "prompt,image\na,0.png\na,cut.png\n"),
             "ragged": file("ragged.csv", "prompt,image\na,0.png\na,0.png,c\n"),
             "null": file("null.jsonl", '{"prompt": null, "image": "0.png"}\n'),
             "json": file("bad.jsonl", '{"prompt": \n'),
             "list": file("list.jsonl", '{"prompt": "a", "image": "0.png"}\n[1]\n'),
             "fake": file("fake.parquet", "text"), "empty": file("empty.csv", "prompt,image\n")}
    assert command(tiny_sd, tiny_lrm, *[part.format(*files, **names) for part in argv]) == 2
    error = capsys.readouterr().err
    line = error[error.index("error: "):]  # after a progress bar, where the model had been loaded
    assert message in line and line.count("\n") == 1 and (error == line or "cut.png" in line)
    assert not (tmp_path / "o.csv").exists()


def test_wrong_models_are_refused(tiny_sd, tiny_sdxl, tiny_lrm, files, capsys):
    for lrm, base, message in [("nowhere", tiny_sd, "--lrm nowhere: no such directory"),
                               (tiny_sd, tiny_sd, "state_dict.pt is missing"),
                               (tiny_lrm, "nowhere", "--lrm-base nowhere: no such directory"),
                               (tiny_lrm, tiny_sdxl, "scores sd latents"),
                               ("", tiny_sd, "--lrm (none): is required")]:
        assert score.main(["--lrm", str(lrm), "--lrm-base", str(base), "--prompt", "a", files[0]]) == 2
        assert message in capsys.readouterr().err


def test_the_score_is_a_cosine_by_the_scale(scorer):
    limit = float(scorer.lrm.logit_scale.exp())
    assert math.isclose(limit, math.exp(2.6592), rel_tol=1e-5)
    assert (scorer([picture(i) for i in range(3)], "a").abs() <= limit + 1e-4).all()
