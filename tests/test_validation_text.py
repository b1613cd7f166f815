"""The check of the validation text: copies, gaps, another text than the manifest's, and documents that were trained on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import BOS, VOCAB, process_env, run_ranks, write_shard

import train_gpt as tg

RNG = np.random.default_rng(7)
DOCS = [np.array([BOS, *RNG.integers(4, VOCAB, int(RNG.integers(200, 400)))]) for _ in range(400)]
TRAIN = [np.array([BOS, *RNG.integers(4, VOCAB, 300)]) for _ in range(200)]
PLAIN = RNG.integers(4, VOCAB, 60_000)  # no BOS


def folder_of(path: Path, val, train=None, numbers=None) -> Path:
    """A folder with these validation shards (lists of documents or arrays) and these training shards, without a manifest."""
    path.mkdir(exist_ok=True)
    for split, shards in (("val", val), ("train", [TRAIN] if train is None else train)):
        for n, shard in zip(numbers if split == "val" and numbers else range(99), shards, strict=False):
            write_shard(
                path / f"fineweb_{split}_{n:06d}.bin", np.concatenate(shard) if isinstance(shard, list) else shard
            )
    return path


def mistake(folder: Path, training: bool = True, everything: bool = False) -> str:
    with pytest.raises(tg.ConfigError) as error:
        tg.check_data(folder, training, everything)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def flat(docs) -> np.ndarray:
    return np.concatenate(docs)


def spread(docs: list, copies: int) -> list:
    """The documents with `copies` of them a second time, each behind one of the others."""
    out = list(docs)
    for i in range(copies):
        out.insert(200 + 3 * i, docs[2 * i])
    return out


COPIES = {
    "the shard under the next number": ([DOCS, DOCS], None, "same content"),
    "the shard under another number": ([DOCS, DOCS], (0, 7), "same content"),
    "the middle of three": ([DOCS[:200], DOCS[200:], DOCS[:200]], None, "same content"),
    "shards that overlap": ([DOCS[:250], DOCS[200:]], None, "occurs before"),
    "shards that overlap, cut anywhere": ([flat(DOCS)[:50_000], flat(DOCS)[33_333:]], None, "occurs before"),
    "a text twice in a shard": ([DOCS + DOCS], None, "occurs before"),
    "a copy across a shard's end": ([DOCS + DOCS[:100], DOCS[100:200]], None, "occurs before"),
    "20 documents in order": ([DOCS + DOCS[40:60]], None, "occurs before"),
    "scattered, above 1 %": ([spread(DOCS, 12)], None, "occurs before"),
    "text without BOS twice": ([np.tile(PLAIN, 2)], None, "occurs before"),
    "text without BOS that overlaps": ([PLAIN[:40_000], PLAIN[30_011:]], None, "occurs before"),
    "little text without BOS": ([np.tile(PLAIN[:3001], 2)], None, "occurs before"),
    "one document that holds a text twice": ([[[BOS], PLAIN, PLAIN[:30_000]]], None, "occurs before"),
    "a gap": ([DOCS[:100], DOCS[100:]], (0, 2), "fineweb_val_000002.bin stands where number 1 belongs"),
    "a start at 1": ([DOCS[:100], DOCS[100:]], (1, 2), "fineweb_val_000001.bin stands where number 0 belongs"),
}


@pytest.mark.parametrize("case", COPIES)
def test_text_that_is_no_validation_text_is_refused(case, tmp_path):
    val, numbers, words = COPIES[case]
    folder = folder_of(tmp_path / "d", val, numbers=numbers)
    for training in (True, False):
        assert words in mistake(folder, training)


@pytest.mark.parametrize(
    "val", [[DOCS], [DOCS[:99], DOCS[99:]], [PLAIN], [PLAIN[:301]], [flat(DOCS)[:999], flat(DOCS)[999:]]]
)
def test_sound_text_passes_without_a_word(val, tmp_path):
    assert tg.check_data(folder_of(tmp_path / "d", val), True) == []


def test_a_few_repeats_are_a_notice(tmp_path):
    """Both sides of 1 % of the tokens and of 20 documents in order."""
    few = tg.check_data(folder_of(tmp_path / "few", [spread(DOCS, 3)]), True)
    assert len(few) == 1 and "occurs before" in few[0]
    many = [d[:201] for d in DOCS] + [np.array([BOS, *RNG.integers(4, VOCAB, 2000)]) for _ in range(300)]
    assert "occurs before" in tg.check_data(folder_of(tmp_path / "row", [many + many[:19]]), True)[0]
    assert "occurs before" in mistake(folder_of(tmp_path / "more", [many + many[:20]]))
    assert "occurs before" in mistake(
        folder_of(tmp_path / "mixed", [many + [x for d in many[:20] for x in (d, d[:9])]])
    )


def test_a_set_of_the_challenge_s_size_is_not_refused_for_scattered_repeats(tmp_path, monkeypatch):
    val = spread(DOCS, 12) + DOCS[60:40:-1]  # twenty in another order are scattered too
    monkeypatch.setitem(tg.CHALLENGE_COUNTS, "sp1024", (len(flat(val)),) * 2)
    size, repeats = tg.check_data(folder_of(tmp_path / "d", [val]), True)
    assert "has the token count of the challenge's sp1024 export" in size and "occurs before" in repeats
    twenty = [*val, *DOCS[40:60]]
    monkeypatch.setitem(tg.CHALLENGE_COUNTS, "sp1024", (len(flat(twenty)),) * 2)
    assert "occurs before" in mistake(folder_of(tmp_path / "d", [twenty]))


def test_the_challenge_s_counts():
    """Those of the specs: 62,021,632, 47,853,343 and 40,540,160 targets, two of them whole windows of 2,048."""
    counts = tg.CHALLENGE_COUNTS
    assert counts["sp1024"] == (62_021_633, 62_023_680) and 62_021_632 % 2048 == 0
    assert counts["CaseOps"] == (47_853_344,) * 2 and counts["sp8192"][0] <= 40_540_161 <= counts["sp8192"][1]


def test_validation_documents_in_the_training_text(tmp_path, monkeypatch):
    for n, words in ((3, "3 of 400 validation documents stand in the training text"), (4, "")):
        folder = folder_of(tmp_path / f"{n}", [DOCS], [[*TRAIN[:50], *DOCS[:n]], TRAIN[50:]])
        if words:
            assert [words in text for text in tg.check_data(folder, True)] == [True]
        else:
            assert "4 of 400 validation documents stand in the training text (1.00%)" in mistake(folder)
        assert tg.check_data(folder, False) == []
    half = flat([*TRAIN, *DOCS[:9]])
    assert "9 of 400" in mistake(folder_of(tmp_path / "across", [DOCS], [half[:-1000], half[-1000:-100], half[-100:]]))
    plain = np.concatenate([flat(TRAIN), PLAIN[5_003:9_000]])
    assert "validation pieces" in mistake(folder_of(tmp_path / "plain", [PLAIN], [plain]))
    late = folder_of(tmp_path / "late", [DOCS], [TRAIN, DOCS[:9]])
    monkeypatch.setattr(tg, "LEAK_TOKENS", len(flat(TRAIN)) + len(flat(DOCS[:3])) + 9)
    assert "3 of 400" in tg.check_data(late, True)[0] and "9 of 400" in mistake(late, everything=True)


def test_missing_training_shards_are_a_notice(tmp_path):
    folder = folder_of(tmp_path / "d", [DOCS], [TRAIN[:50], TRAIN[50:100], TRAIN[100:]])
    (folder / "fineweb_train_000001.bin").unlink()
    assert "fineweb_train_000002.bin stands where number 1 belongs" in tg.check_data(folder, True)[0]
    assert tg.check_data(folder, False) == []


# ---- a manifest of make_shards


def with_manifest(path: Path) -> Path:
    """Three validation shards, two of equal size, and three training shards with their manifest."""
    cut = flat(DOCS)
    folder_of(path, [cut[:9000], cut[9000:18000], cut[18000:]], [TRAIN[:50], TRAIN[50:100], TRAIN[100:]])
    manifest = {"format": tg.MANIFEST_FORMAT, "tokenizer": {"file": "t.model", "sha256": ""}}
    for split in ("val", "train"):
        files = [(p.name, len(tg.load_shard(p)), hashlib.sha256(p.read_bytes())) for p in tg.shard_paths(path, split)]
        manifest[split] = {"shards": [{"file": f, "tokens": n, "sha256": h.hexdigest()} for f, n, h in files]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def alter(path: Path, how: str) -> None:
    """Change a shard, which stays one."""
    tokens = np.array(tg.load_shard(path))
    if how == "cut":
        tokens = tokens[:-7]
    else:
        tokens[len(tokens) // 2] = 9 if tokens[len(tokens) // 2] != 9 else 10
    write_shard(path, tokens)


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("how", ["missing", "extra", "swapped", "altered", "cut"])
def test_shards_that_differ_from_their_manifest(split, how, tmp_path):
    folder = with_manifest(tmp_path / "d")
    assert tg.check_data(folder, True, everything=True) == []
    zero, one, two, three = (folder / f"fineweb_{split}_{n:06d}.bin" for n in range(4))
    if how == "missing":
        two.unlink()
    elif how == "extra":
        shutil.copy(zero, three)
    elif how == "swapped":
        zero.rename(three)
        one.rename(zero)
        three.rename(one)
    else:
        alter(two, how)
    name = {"extra": three, "swapped": zero}.get(how, two).name
    if split == "val" or how in ("swapped", "altered", "cut"):
        text = mistake(folder)
        assert name in text and "manifest.json" in text and (how != "cut" or "not " in text), text
    else:
        (text,) = tg.check_data(folder, True)
        assert name in text
    if split == "train":
        assert tg.check_data(folder, False) == []


def test_contents_of_training_shards_beyond_the_budget_are_compared_on_demand(tmp_path, monkeypatch):
    folder = with_manifest(tmp_path / "d")
    alter(folder / "fineweb_train_000002.bin", "altered")
    monkeypatch.setattr(tg, "LEAK_TOKENS", 20_000)
    assert tg.check_data(folder, True) == []
    assert "fineweb_train_000002.bin has other content" in mistake(folder, everything=True)


def test_shards_lie_in_the_order_of_their_numbers(tmp_path):
    for n in (10, 9, 2):
        write_shard(tmp_path / f"fineweb_val_{n}.bin", [n, 5, 6])
    assert [int(shard[0]) for shard in tg.load_split(tmp_path, "val")] == [2, 9, 10]


# ---- the script


def test_the_script_refuses_once_on_all_ranks(data, tiny, script, tmp_path):
    """Training, scoring and audit end with status 2 and one message, before anything is written."""
    assert script(tiny, VAL_TOKENS=40).status == 0
    folder = tmp_path / "copied"
    shutil.copytree(data.folder, folder)
    shutil.copy(folder / "fineweb_val_000000.bin", folder / "fineweb_val_000002.bin")
    for mode in ("train", "eval", "audit"):
        result = script({**tiny, "RUN_ID": mode}, MODE=mode, DATA_PATH=folder,
                        ARTIFACT=f"{tiny['LOG_DIR']}/{'new' if mode == 'train' else 'tiny'}.pgz")  # fmt: skip
        assert result.status == 2 and result.err.count("same content") == 1, result
    with pytest.raises(AssertionError) as two:
        run_ranks(process_env({**tiny, "RUN_ID": "two", "DATA_PATH": str(folder)}), 2)
    assert str(two.value).count("have the same content") == 1 and "Traceback" not in str(two.value)
    assert not [p for p in Path(tiny["LOG_DIR"]).iterdir() if not p.name.startswith("tiny")]


@pytest.mark.parametrize("spacing", [0, 16])
def test_units_do_not_depend_on_where_shards_end(spacing):
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 300, 4000).astype("<u2")
    tokens[rng.choice(4000, 30)] = tg.BOS
    whole = [*tg.text_units([tokens], spacing)]
    for cuts in ([1], [63, 64, 65, 200], sorted(rng.choice(4000, 20)), np.flatnonzero(tokens == tg.BOS)):
        parts = [*tg.text_units(np.split(tokens, cuts), spacing)]
        assert np.array_equal(*(np.concatenate([hashes for hashes, _ in found]) for found in (whole, parts)))
