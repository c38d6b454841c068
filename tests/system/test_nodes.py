"""Run on ranks that do not share a disk."""

from pathlib import Path

from tests.helpers.pairs import table
from tests.helpers.processes import processes

APART = """
import os, sys
from pathlib import Path
folder = Path(sys.argv.pop(1)) / os.environ["RANK"]
folder.mkdir()
os.chdir(folder)
from lpo_fast import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_each_process_may_have_a_disk_of_its_own(tiny_sd: Path, tmp_path: Path) -> None:
    """--out is relative, the working directories differ, and the best LRM is another than the last one."""
    (tmp_path / "apart.py").write_text(APART)
    pairs = str(table(tmp_path / "p.parquet", list("abcd")))
    done = processes(2, str(tmp_path / "apart.py"), str(tmp_path), "lrm", "--model", str(tiny_sd),
                     "--pairs", pairs, "--validation-pairs", pairs, "--out", "out", "--batch-size", "4",
                     "--max-steps", "3", "--warmup-steps", "0", "--num-workers", "0", "--validate-steps", "2",
                     folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0" / "out" / "checkpoint-final").is_dir() and not (tmp_path / "1" / "out").exists()
