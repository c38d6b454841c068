"""The command line: what is wrong with it is one line, and the recipe follows the model."""

import json
from pathlib import Path

import pytest

from lpo_fast import train


@pytest.mark.parametrize("argv, said", [
    (["lpo", "--optimizer", "foo"],
     "'foo' for argument '--optimizer'. Expected one of ('adamw', 'adamw8bit', "
     "'paged_adamw8bit', 'adafactor'); For full helptext, run python -m lpo_fast.train lpo --help"),
    (["lpo", "--rank", "x"],
     "Error parsing --rank: invalid literal for int() with base 10: 'x'; Argument helptext:"),
    (["lop"], "Unrecognized options: lop; Available subcommands: demo, lrm, lpo; "),
    (["--config", f"{Path(__file__).parent}/official/configs/sd15.py", "--nosuch"],
     "--nosuch: is not an option here; see "),
    (["lrm", "--checkpointing", "full"], "--checkpointing: is not an option here, but of lpo; "),
    (["lpo", "--batchsize", "3"], "--batchsize: is not an option here; did you mean --batch-size?"),
])
def test_a_wrong_command_line_is_one_line(argv, said, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent / "official")
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize("flags, key", [(["--rank", "8"], "--rank"), (["--alpha", "3"], "--alpha"),
                                        (["--targets", "to_q"], "--targets")])
def test_flags_of_a_lora_do_not_go_with_full(flags, key, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent / "official")
    official = ["--config", "configs/sd15.py", "--config.use_lora=False", "--config.lora_rank=9"]
    for argv in (["lpo", "--full"], official):
        assert train.parse(argv).full
        assert train.main([*argv, *flags]) == 2
        assert f"error: {key} " in (said := capsys.readouterr().err) and f"drop {key} or --full" in said


def test_control_c_before_the_loop(monkeypatch, capsys):
    def stop(settings):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "run", stop)
    assert train.main([]) == 130 and "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("model, rank, threshold", [("sdxl", 64, 0.45), ("sd", 4, 0.35)])
def test_the_recipe_follows_the_model(tmp_path, model, rank, threshold):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"addition_embed_type": "text_time"}
                                                              if model == "sdxl" else {}))
    for argv in (["lpo", "--model", str(tmp_path)], ["lpo", f"--model={tmp_path}"]):
        parsed = train.parse(argv)
        assert (parsed.rank, parsed.threshold_min) == (rank, threshold)


@pytest.mark.parametrize("argv, key", [
    (["lpo"], "--prompts"), (["lpo", "--num-candidates", "1"], "--num-candidates"), (["lrm"], "--pairs"),
    (["demo", "--pictures", "0"], "--pictures"),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, key, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key} ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_demo_removes_nothing_but_a_demo(tmp_path, capsys):
    (tmp_path / "lpo").mkdir()
    (tmp_path / "lpo" / "two days of work").write_text("…")
    assert train.main(["demo", "--out", str(tmp_path)]) == 2
    assert ("is not an earlier demo" in capsys.readouterr().err
            and (tmp_path / "lpo" / "two days of work").is_file())


@pytest.mark.parametrize("words",
                         [["--handed-on", "last"], ["--handed_on=last"], ["--final-checkpoint", "last"]])
def test_the_earlier_name_of_a_flag_still_works(words: list[str]) -> None:
    assert train.parse(["lrm", "--pairs", "p.parquet", *words]).final_checkpoint == "last"
