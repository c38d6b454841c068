"""Refuse damaged and hostile configs with their key and a remedy."""

from pathlib import Path

import pytest

from lpo_fast.errors import InputError
from lpo_fast.official import lpo, lrm
from tests.tools import fuzz


def test_a_config_of_data_equals_the_one_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fuzz.OFFICIAL)
    argv = ["--config.train.beta=250"]
    for name in ("sd15", "sd21", "sdxl"):
        tree = fuzz.without_none(lpo.load(f"configs/{name}.py"))
        code = lpo.parse(["--config", f"configs/{name}.py", *argv])
        for suffix, dump in ((".json", fuzz.json.dumps), (".yaml", fuzz.yaml.safe_dump),
                             (".toml", fuzz.toml)):
            (file := tmp_path / f"{name}{suffix}").write_text(dump(tree))
            assert lpo.parse(["--config", str(file), *argv]) == code


@pytest.mark.parametrize("suffix, text, message", [
    (".yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "it has aliases"),
    (".yaml", "seed: !!python/object/apply:os.system ['true']",
     "is not valid YAML (could not determine a constructor"), (".yaml", "- 1", "it is not a mapping"),
    (".json", '{"seed": 1, "seed": 2}', "the key 'seed' occurs twice"),
    (".json", '{"a":' * 50_000, "more than 100,000 bytes"), (".json", '{"a":' * 15_000, "nested too deeply"),
    (".toml", "seed = 1\nseed = 2", "is not valid TOML"),
    (".yaml", "seed: 0x" + "f" * 6000, "more than 64 bits"), (".txt", "", "unknown file type '.txt'"),
])
def test_configs_that_are_refused(suffix: str, text: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / f"c{suffix}").write_text(text)
    with pytest.raises(InputError) as caught:
        lpo.parse(["--config", str(file)])
    assert caught.value.key == "--config" and message in caught.value.problem


@pytest.mark.parametrize("key, value", [("seed", "x"), ("seed", True), ("seed", 1.5), ("train.beta", "high"),
                                        ("validation_prompts", "a cat"), ("use_lora", 1),
                                        ("compare_func_cfg.threshold_min", None), ("sample.num_steps", [20]),
                                        ("compare_func_cfg.dynamic_threshold", "steep")])
def test_values_of_another_kind_name_the_key(key: str, value: object) -> None:
    config = lrm.flat(fuzz.official_config()) | {key: value}
    if value is None:  # left out: the official default
        assert lpo.settings(config)[0].threshold_min == 0.2
        return
    with pytest.raises(InputError) as caught:
        lpo.settings(config)
    assert caught.value.key == f"config.{key}"
