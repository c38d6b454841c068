"""Which pairs a run uses: labels, limits, the best of a chain, pairs of timesteps,
and the score table joined to them."""

from pathlib import Path

import numpy as np
import pytest

from lpo_fast.config import LRM
from lpo_fast.data import dataset, mpcf, preferences
from lpo_fast.errors import InputError
from tests.helpers.pairs import GREEN, HEADER, RED, colours, plain, scores, table


def used(path: Path, scores: Path | None = None, training: bool = True, **options) -> preferences.PairTable:
    """The pairs that a run with these options uses."""
    return preferences.choose(preferences.read(str(path)), LRM(**options),
                              scores and mpcf.read_scores(str(scores)), training)


def test_ties_and_pairs_without_a_label(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", list("abcdef"), has_label=[True, True, True, False, True, False],
                 label_0=[1, 0, 0.5, 0, 1, None], label_1=[0, 1, 0.5, 0, 0, None])
    everything = preferences.read(str(path))
    assert everything.labels.tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0, 0], [1, 0], [0, 0]]
    assert used(path).rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert used(path, training=False).rows.tolist() == [0, 1, 2, 4]
    assert (used(path, training=False, keep_only_with_label_in_validation=False).rows.tolist()
            == [0, 1, 2, 3, 4, 5])
    assert used(path, keep_only_with_label=True).rows.tolist() == [0, 1, 2, 4]
    for training in (True, False):
        assert used(path, training=training, keep_only_different=True).rows.tolist() == [0, 1, 4]
    other = table(tmp_path / "q.parquet", list("abc"), are_different=[False, True, True])
    assert used(other, keep_only_different=True).rows.tolist() == [1, 2]  # the column goes before the labels
    with pytest.raises(InputError, match="no pairs are left"):
        used(table(tmp_path / "r.parquet", ["a"], has_label=[False]), keep_only_with_label=True)


@pytest.mark.parametrize("limit, expected",
                         [(0, range(7)), (1, [0, 1, 5]), (2, [0, 1, 2, 4, 5]), (9, range(7))])
def test_limit_of_a_prompt(tmp_path: Path, limit: int, expected: list) -> None:
    path = table(tmp_path / "p.parquet", list("abaabca"))
    assert used(path, limit_examples_per_prompt=limit).rows.tolist() == list(expected)


def test_the_limit_counts_pairs_that_other_options_leave(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a"] * 6)  # rows 2 and 5 are ties
    assert used(path, limit_examples_per_prompt=3, keep_only_different=True).rows.tolist() == [0, 1, 3]


def chain(tmp_path: Path, judgements: list[tuple[str, str]], name: str = "p.parquet") -> Path:
    """Pairs (uid_0, uid_1): a capital letter won; the picture of uid x has a red channel of its own."""
    uids = [[pair[i].lower() for pair in judgements] for i in (0, 1)]
    labels = [[1.0 if pair[i].isupper() else 0.0 if pair[1 - i].isupper() else 0.5 for pair in judgements]
              for i in (0, 1)]
    pictures = [[plain((ord(uid), 0, 0)) for uid in side] for side in uids]
    return table(tmp_path / name, ["p"] * len(judgements), jpg_0=pictures[0], jpg_1=pictures[1],
                 label_0=labels[0], label_1=labels[1], image_0_uid=uids[0], image_1_uid=uids[1])


def shown(chosen: preferences.PairTable) -> list[str]:
    made = dataset.PairDataset(chosen, 8)
    return ["".join(chr(round((p[0, 0, 0].item() + 1) * 127.5)) for p in made[i]["pixels"])
            for i in range(len(made))]


def test_only_on_best(tmp_path: Path) -> None:
    """a < b < c < d: the winner of every pair becomes d, the end of the loser's chain;
    a tie keeps its pictures."""
    path = chain(tmp_path, [("a", "B"), ("C", "b"), ("c", "D"), ("x", "y"), ("E", "f")])
    chosen = used(path, only_on_best=True)
    assert shown(chosen) == ["ad", "db", "cd", "xy", "ef"] and chosen.rows.tolist() == [0, 1, 2, 3, 4]
    assert (shown(used(path)) == ["ab", "cb", "cd", "xy", "ef"]
            == shown(used(path, only_on_best=True, training=False)))


def test_only_on_best_leaves_out_circles(tmp_path: Path) -> None:
    path = chain(tmp_path, [("a", "B"), ("b", "C"), ("c", "A"), ("d", "E")])
    assert shown(used(path, only_on_best=True)) == ["de"]
    with pytest.raises(InputError, match="has no picture keys") as caught:
        used(table(tmp_path / "q.parquet", ["a"]), only_on_best=True)
    assert caught.value.key == "--only-on-best"


def official_best(judgements: list[tuple[str, str]]) -> tuple[dict, set]:
    """What the official data set does with pandas, for judgements without ties:
    the best of each loser, circular ones."""
    worse = {a.lower(): b.lower() for a, b in judgements if b.isupper()}
    worse |= {b.lower(): a.lower() for a, b in judgements if a.isupper()}
    circular = set()
    for bad in list(worse):
        good, passed = worse[bad], [bad]
        while good in worse:
            if good in passed:
                circular.add(bad)
                break
            passed.append(good)
            good = worse[good]
        worse[bad] = good
    return worse, circular


@pytest.mark.parametrize("seed", range(20))
def test_only_on_best_as_official(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    judgements = []
    for _ in range(8):
        a, b = draw.choice(list("abcdefgh"), 2, replace=False)
        judgements.append((a.upper(), b) if draw.random() < 0.5 else (a, b.upper()))
    best, circular = official_best(judgements)
    expected = []
    for a, b in judgements:
        if {a.lower(), b.lower()} & circular:
            continue
        expected.append(best[b] + b if a.isupper() else a + best[a])
    path = chain(tmp_path, judgements)
    if expected:
        assert shown(used(path, only_on_best=True)) == expected
    else:
        with pytest.raises(InputError, match="no pairs are left"):
            used(path, only_on_best=True)


def test_compare_between_timestep_adds_the_preferred_pictures(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", list("abcd"), jpg_0=[RED, GREEN, RED, GREEN])  # 1/0, 0/1, a tie, 1/0
    chosen = used(path, scores(tmp_path / "s.csv", [(1, 1, 1, 1), (1, 1, 1, 1), (0, 0, 0, 0), (1, -9, 1, 1)]),
                  compare_between_timestep=True)
    assert chosen.rows.tolist() == [0, 1, 2, 0, 1] and chosen.compare.tolist() == [False] * 3 + [True] * 2
    made = dataset.PairDataset(chosen, 8)
    assert [colours(made[i]) for i in range(5)] == ["rb", "gb", "rb", "rr", "bb"]
    assert [made[i]["row"] for i in range(5)] == [0, 1, 2, 4, 5]  # keys of randomness are their own
    assert len(used(path, training=False, compare_between_timestep=True)) == 4


# The score table


KEYED = ["image_0_uid", "image_1_uid", *HEADER]


def test_scores_by_position(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b", "c"])  # 1/0, 0/1, a tie
    good = [(1, 1, 1, 1), (1, -9, 1, 1), (0, 0, 0, 0)]
    assert used(path, scores(tmp_path / "s.csv", good)).rows.tolist() == [0, 2]
    assert used(path, scores(tmp_path / "s.csv", good), filter_strategy=0).rows.tolist() == [0, 1, 2]
    for rows in (good[:2], good * 2):
        with pytest.raises(InputError, match=f"t.csv: has {len(rows)} rows, .*p.parquet 3 pairs") as caught:
            used(path, scores(tmp_path / "t.csv", rows))
        assert caught.value.key == "--scores"
    with pytest.raises(InputError,
                       match="different_flag contradicts the labels in 2 of 3 pairs, the first: rows 0, 2 "):
        used(path, scores(tmp_path / "t.csv", good[::-1]))
    with pytest.raises(InputError, match="the filter keeps none of its 3 rows"):
        used(path, scores(tmp_path / "t.csv", [(1, -9, 1, 1), (1, -9, 1, 1), (0, 9, 9, 9)]))


def test_scores_by_key(tmp_path: Path) -> None:
    """Shuffled, the two keys in either order, rows of other pairs among them."""
    path = table(tmp_path / "p.parquet", ["a", "b", "c"], image_0_uid=["x", "y", "x"],
                 image_1_uid=["y", "z", "w"])
    rows = [("w", "x", 0, 0, 0, 0), ("q", "q", 1, 1, 1, 1), ("y", "x", 1, -9, 1, 1), ("y", "z", 1, 1, 1, 1)]
    assert used(path, scores(tmp_path / "s.csv", rows, KEYED)).rows.tolist() == [1, 2]
    with pytest.raises(InputError, match="has no row for 2 of the 3 pairs, the first of them row 0 "
                       ".counting from 0.") as caught:
        used(path, scores(tmp_path / "s.csv", [rows[0], rows[1]], KEYED))
    assert caught.value.key == "--scores"
    with pytest.raises(InputError, match="different_flag contradicts the labels in 1 of 3 pairs"):
        used(path, scores(tmp_path / "s.csv", [("w", "x", 1, 1, 1, 1), *rows[1:]], KEYED))


def test_a_pair_judged_twice_takes_the_rows_in_turn(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"], image_0_uid=["x", "x"], image_1_uid=["y", "y"])
    rows = [("x", "y", 1, -9, 1, 1), ("x", "y", 1, 9, 1, 1)]
    assert used(path, scores(tmp_path / "s.csv", rows, KEYED)).rows.tolist() == [1]
    with pytest.raises(InputError, match="has no row for 1 of the 2 pairs, the first of them row 1"):
        used(path, scores(tmp_path / "s.csv", rows[:1], KEYED))
