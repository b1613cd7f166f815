"""Section 3: shards are what they claim, bytes are those of the text, ranks partition one stream."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import BOS, SEQ, VOCAB, config, documents, events, write_shard

import train_gpt as tg


def message(call, *args) -> str:
    with pytest.raises(tg.ConfigError) as error:
        call(*args)
    return str(error.value)


# ---- shards


def test_a_shard_reads_back(tmp_path):
    tokens = np.arange(1000) % 300
    assert np.array_equal(tg.load_shard(write_shard(tmp_path / "s.bin", tokens)), tokens)


def test_a_bad_shard_is_refused_by_name(tmp_path):
    good = np.arange(10)
    cases = [
        (write_shard(tmp_path / "magic.bin", good, magic=1), "expected magic 20240520"),
        (write_shard(tmp_path / "version.bin", good, version=2), "shard version 2"),
        (write_shard(tmp_path / "long.bin", good, count=9), "1044 bytes, its header promises 1042"),
        (write_shard(tmp_path / "short.bin", good, count=11), "1044 bytes, its header promises 1046"),
        (write_shard(tmp_path / "negative.bin", good, count=-1), "1044 bytes"),
        (write_shard(tmp_path / "empty.bin", []), "holds no tokens"),
    ]
    (tmp_path / "tiny.bin").write_bytes(b"abc")
    (tmp_path / "nothing.bin").write_bytes(b"")
    cases += [(tmp_path / "tiny.bin", "not a token shard"), (tmp_path / "nothing.bin", "not a token shard")]
    cases += [(tmp_path / "absent.bin", "no such shard")]
    for path, words in cases:
        text = message(tg.load_shard, path)
        assert words in text and str(path) in text, text


def test_a_token_beyond_the_vocabulary_is_found_before_training(tmp_path, data):
    shard = data.train.copy()
    shard[len(shard) // 2] = VOCAB
    write_shard(tmp_path / "fineweb_train_000000.bin", shard)
    text = message(tg.TokenStream, tg.load_split(tmp_path, "train"), VOCAB)
    assert f"token id {VOCAB} with VOCAB_SIZE={VOCAB}" in text and "fineweb_train_000000.bin" in text


def test_a_shard_is_its_split_and_digits_and_nothing_else(data, tmp_path):
    shutil.copytree(data.folder, tmp_path / "d")
    for name in ("fineweb_val_old_000000.bin", "fineweb_val_000000.bin.bin", "fineweb_val_.bin", "fineweb_val_0a.bin"):
        write_shard(tmp_path / "d" / name, [5] * 999)
    whole = np.concatenate(tg.load_split(tmp_path / "d", "val"))
    assert np.array_equal(whole, data.val)
    assert "no fineweb_dev_<digits>.bin" in message(tg.load_split, tmp_path / "d", "dev")


# ---- where the data are


def test_missing_and_empty_data_paths_are_told_apart(tmp_path, tiny):
    assert "no such folder" in message(tg.find_data, config(tiny, DATA_PATH=tmp_path / "absent"))
    assert "no fineweb_*.bin" in message(tg.find_data, config(tiny, DATA_PATH=tmp_path))


def test_the_sample_is_the_default_and_is_marked(monkeypatch, tmp_path, tiny):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tg, "FINEWEB_DIR", tmp_path / "absent")
    cfg = config({**tiny, "DATA_PATH": ""})
    for vocab_size, folder in ((0, tg.SAMPLE_CASEOPS), (2048, tg.SAMPLE_CASEOPS), (1024, tg.SAMPLE_DIR)):
        paths = tg.find_data(cfg, vocab_size=vocab_size)
        assert paths.sample and paths.folder == folder and paths.tokenizer.parent == folder
    named = tg.find_data(config({**tiny, "DATA_PATH": "", "TOKENIZER_PATH": tg.SAMPLE_DIR / "tokenizer_1024.model"}))
    assert named.folder == tg.SAMPLE_DIR


def test_a_downloaded_folder_finds_the_tokenizer_of_its_own_vocabulary(monkeypatch, tmp_path, tiny, data):
    tokenizers = tmp_path / "tokenizers"
    tokenizers.mkdir()
    for variant, stem in (("sp1024", "1024_bpe"), ("sp8192", "8192_bpe"), ("sp8192_caps", "8192_bpe_caps")):
        folder = tmp_path / "datasets" / f"fineweb10B_{variant}"
        folder.mkdir(parents=True)
        shutil.copy(data.folder / "fineweb_val_000000.bin", folder)
        (tokenizers / f"fineweb_{stem}.model").touch()
        assert tg.find_data(config(tiny, DATA_PATH=folder)).tokenizer == tokenizers / f"fineweb_{stem}.model"
        monkeypatch.chdir(folder)
        assert tg.find_data(config(tiny, DATA_PATH=".")).tokenizer == tokenizers / f"fineweb_{stem}.model"
    (tokenizers / "fineweb_8192_bpe.model").unlink()
    assert "TOKENIZER_PATH=none beside" in message(
        tg.find_data, config(tiny, DATA_PATH=tmp_path / "datasets" / "fineweb10B_sp8192")
    )


def with_manifest(data, folder: Path, **changes) -> Path:
    """A copy of the data with a second tokenizer, of the first name in the folder, and the manifest of make_shards."""
    shutil.copytree(data.folder, folder)
    (folder / "a.model").write_bytes((tg.SAMPLE_DIR / "tokenizer_1024.model").read_bytes())
    (folder / "tokenizer_300.model").rename(folder / "my own.model")
    sha256 = hashlib.sha256(data.tokenizer.read_bytes()).hexdigest()
    manifest = {"format": tg.MANIFEST_FORMAT, "tokenizer": {"file": "my own.model", "sha256": sha256}, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_manifest_names_the_tokenizer(data, tmp_path, tiny):
    folder = with_manifest(data, tmp_path / "d")
    cfg = config(tiny, DATA_PATH=folder)
    assert tg.find_data(cfg).tokenizer == folder / "my own.model"
    assert (
        tg.find_data(config(tiny, DATA_PATH=folder, TOKENIZER_PATH=data.tokenizer)).tokenizer == data.tokenizer
    )  # a copy
    text = message(tg.find_data, config(tiny, DATA_PATH=folder, TOKENIZER_PATH=folder / "a.model"))
    assert f"TOKENIZER_PATH={folder / 'a.model'}: the shards in {folder} were made with another tokenizer" in text
    assert "my own.model" in text and text.endswith("unset it")
    shutil.copy(folder / "a.model", folder / "my own.model")
    assert message(tg.find_data, cfg).endswith("make the shards again")
    (folder / "my own.model").unlink()
    assert f"TOKENIZER_PATH={folder / 'my own.model'}: no such file" in message(tg.find_data, cfg)


def test_a_manifest_that_cannot_be_read_is_no_guess(data, tmp_path, tiny):
    folder = with_manifest(data, tmp_path / "d")
    path, good = folder / "manifest.json", json.loads((folder / "manifest.json").read_text())
    tokenizers = (3, {}, {"file": "../a.model", "sha256": ""})
    others = [{"format": "parameter-golf shards, version 9"}, *({"tokenizer": value} for value in tokenizers)]
    for text in ("{", "[" * 99_999, "[]", "{}", '{"format": 3}', *(json.dumps({**good, **other}) for other in others)):
        path.write_text(text)
        foreign = text in ("{}", '{"format": 3}')  # of another tool: two tokenizers, and nobody says which
        words = (
            "name the one that the shards were made with"
            if foreign
            else f"{path}: not a manifest that this script reads"
        )
        assert words in message(tg.find_data, config(tiny, DATA_PATH=folder)), text
    path.write_bytes(b"\xff\xfe")
    assert "not a manifest" in message(tg.find_data, config(tiny, DATA_PATH=folder))


def test_two_tokenizers_and_no_manifest_is_a_question(data, tmp_path, tiny):
    folder = with_manifest(data, tmp_path / "d")
    (folder / "manifest.json").unlink()
    text = message(tg.find_data, config(tiny, DATA_PATH=folder))
    assert f"{folder} holds a.model, my own.model" in text
    (folder / "a.model").unlink()
    assert tg.find_data(config(tiny, DATA_PATH=folder)).tokenizer == folder / "my own.model"


def test_of_two_tokenizers_beside_a_download_the_named_one_is_taken(data, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(tg, "FINEWEB_DIR", tmp_path / "fineweb10B_sp1024")
    folder = with_manifest(data, tmp_path / "fineweb10B_sp8192")
    (folder / "manifest.json").unlink()
    env = {**tiny, "DATA_PATH": ""}
    assert f"{folder} holds a.model, my own.model; name the one" in message(tg.find_data, config(env))
    for path in (folder / "a.model", folder / "my own.model"):
        assert tg.find_data(config(env, TOKENIZER_PATH=path))[:2] == (folder, path)
    assert tg.find_data(config(env, TOKENIZER_PATH=tg.SAMPLE_CASEOPS / "tokenizer_2048.model")).sample


def test_every_mode_asks_the_manifest(data, tmp_path, tiny, script):
    folder = with_manifest(data, tmp_path / "d")
    assert script(tiny, DATA_PATH=folder, ITERATIONS=1, EVAL_STRIDE=0, NGRAM_SCORE="off").status == 0
    for mode in ("train", "eval", "audit"):
        result = script(tiny, MODE=mode, DATA_PATH=folder, TOKENIZER_PATH=folder / "a.model", ARTIFACT=tmp_path / "logs" / "tiny.pgz",
                        RUN_ID=mode)  # fmt: skip
        assert result.status == 2 and "were made with another tokenizer" in result.err, mode
    audited = script(
        tiny, MODE="audit", DATA_PATH=folder, ARTIFACT=tmp_path / "logs" / "tiny.pgz", RUN_ID="a", EVAL_STRIDE=0
    )
    assert audited.status == 0 and "audit text: bytes are the text's: passed" in audited.out


def test_a_checkpoint_goes_on_with_its_own_data_alone(data, tmp_path, tiny, script):
    quick = {"ITERATIONS": 2, "CHECKPOINT_EVERY": 1, "EVAL_STRIDE": 0, "NGRAM_SCORE": "off"}
    assert script(tiny, **quick).status == 0
    moved, again = shutil.copytree(data.folder, tmp_path / "moved"), {**quick, "RESUME": "auto", "FORCE": 1}
    assert script(tiny, **again, DATA_PATH=moved).status == 0
    shard = np.array(tg.load_shard(moved / "fineweb_train_000001.bin"))
    shard[-1] ^= 1
    write_shard(moved / "fineweb_train_000001.bin", shard)
    result = script(tiny, **again, DATA_PATH=moved)
    assert result.status == 2
    assert "made with other data" in result.err
    assert "set DATA_PATH to what the run began with" in result.err
    other = tmp_path / "other.model"  # of equal size: an empty field more
    other.write_bytes(data.tokenizer.read_bytes() + b"\x2a\x00")
    result = script(tiny, **again, TOKENIZER_PATH=other)
    assert result.status == 2 and "set TOKENIZER_PATH to what the run began with" in result.err


def test_unset_data_is_the_best_download_that_fits(monkeypatch, data, tmp_path, tiny):
    monkeypatch.setattr(tg, "FINEWEB_DIR", tmp_path / "datasets" / "fineweb10B_sp1024")
    env = {**tiny, "DATA_PATH": ""}
    shipped = tg.SAMPLE_DIR / "tokenizer_1024.model"
    (tmp_path / "tokenizers").mkdir()
    expected = tg.SAMPLE_CASEOPS
    for variant, model in (
        ("sp1024", shipped),
        ("sp8192", data.tokenizer),
        ("sp8192_lossless_caps_caseops_v1", data.tokenizer),
    ):
        assert tg.find_data(config(env)).folder == expected
        expected = tmp_path / "datasets" / f"fineweb10B_{variant}"
        shutil.copytree(data.folder, expected, ignore=shutil.ignore_patterns("*.model"))
        size, rest = re.fullmatch(r"sp(\d+)(.*)", variant).groups()
        (tmp_path / "tokenizers" / f"fineweb_{size}_bpe{rest}.model").write_bytes(
            model.read_bytes() + b"\x2a\x00" * len(rest)
        )
    assert tg.find_data(config(env)).folder == expected and not tg.find_data(config(env)).sample
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    assert tg.find_data(config(env), vocab_size=1024).folder == folder  # VOCAB_SIZE chooses
    assert tg.find_data(config(env, TOKENIZER_PATH=shipped)).folder == folder
    hashed = hashlib.sha256(data.tokenizer.read_bytes()).hexdigest()  # so does an artifact
    assert tg.find_data(config(env), tokenizer_sha256=hashed, vocab_size=300).folder.name == "fineweb10B_sp8192"
    assert tg.find_data(config(env), vocab_size=999).sample


def test_an_unset_vocabulary_is_the_tokenizer_s(tiny, script):
    env = {**tiny, "ITERATIONS": "1", "EVAL_STRIDE": "0", "NGRAM_SCORE": "off"}
    del env["VOCAB_SIZE"]
    assert script(env).status == 0
    values, sources = (events(tiny, "config")[0][key] for key in ("values", "sources"))
    assert values["VOCAB_SIZE"] == VOCAB and sources["VOCAB_SIZE"] == "tokenizer"
    result = script(env, VOCAB_SIZE=1024, RUN_ID="other")
    assert result.status == 2 and "has 300 pieces but VOCAB_SIZE=1024" in result.err
    assert script(env, MODE="eval", ARTIFACT=Path(tiny["LOG_DIR"]) / "tiny.pgz", RUN_ID="again").status == 0


def test_a_tokenizer_of_another_size_is_refused(data, tmp_path):
    assert f"{VOCAB} pieces but VOCAB_SIZE=301" in message(tg.Tokenizer, data.tokenizer, 301)
    (tmp_path / "t.model").write_bytes(b"no model at all")
    assert "not a SentencePiece model" in message(tg.Tokenizer, tmp_path / "t.model", VOCAB)


# ---- bytes


def test_a_stream_of_documents_counts_the_bytes_of_each(data, tiny):
    cfg = config(tiny)
    text = tg.load_validation(cfg, data.folder, tg.Tokenizer(data.tokenizer, VOCAB))
    assert np.array_equal(text.tokens.numpy(), data.val) and text.complete
    assert int(text.bytes.sum()) == sum(len(t.encode()) for t in data.val_texts)
    assert int(text.bytes[0]) == 0


def test_boundary_pieces_are_no_text_and_eat_the_space_after_them(data, tmp_path):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(data.tokenizer))
    tokenizer = tg.Tokenizer(data.tokenizer, VOCAB)
    spaced = next(i for i in range(VOCAB) if sp.id_to_piece(i).startswith("▁") and len(sp.id_to_piece(i)) > 2)
    length = len(sp.id_to_piece(spaced)) - 1
    plain = next(i for i in range(VOCAB) if sp.id_to_piece(i) == "a")
    counts = tokenizer.count_bytes(np.array([BOS, spaced, spaced, plain, 2, spaced]))
    assert counts.tolist() == [length, length + 1, 1, 0, length]
    unused = b"\x0a\x0b\x0a\x02zz\x15" + struct.pack("<f", -9.0) + b"\x18\x05"  # one more piece, of type UNUSED
    (tmp_path / "t.model").write_bytes(data.tokenizer.read_bytes() + unused)
    tokenizer = tg.Tokenizer(tmp_path / "t.model", VOCAB + 1)
    assert tokenizer.count_bytes(np.array([BOS, spaced, VOCAB, spaced])).tolist() == [length, 0, length]


# ---- validation


def test_a_prefix_of_the_validation_stream_is_no_score(data, tiny):
    tokenizer = tg.Tokenizer(data.tokenizer, VOCAB)
    cut = tg.load_validation(config(tiny, VAL_TOKENS=100), data.folder, tokenizer)
    assert len(cut.tokens) == 100 and not cut.complete
    whole = tg.load_validation(config(tiny, VAL_TOKENS=len(data.val)), data.folder, tokenizer)
    assert whole.complete and len(whole.tokens) == len(data.val)
    assert not tg.load_validation(config(tiny, VAL_TOKENS=len(data.val) - 1), data.folder, tokenizer).complete


def test_the_tail_is_scored_unless_it_is_dropped_on_purpose(data, tiny):
    tokenizer = tg.Tokenizer(data.tokenizer, VOCAB)
    dropped = tg.load_validation(config(tiny, VAL_DROP_TAIL=1), data.folder, tokenizer)
    assert (len(dropped.tokens) - 1) % SEQ == 0 and 0 < len(data.val) - len(dropped.tokens) < SEQ


def test_validation_shorter_than_a_window_is_refused(data, tiny):
    tokenizer = tg.Tokenizer(data.tokenizer, VOCAB)
    text = message(tg.load_validation, config(tiny, EVAL_SEQ_LEN=2**16), data.folder, tokenizer)
    assert f"{len(data.val)} validation tokens are fewer than one window of 65536" in text


# ---- batches


class Rank:
    """The part of Run that a Batcher uses."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.device = rank, world, tg.torch.device("cpu")

    share = tg.Run.share


def stream(data) -> tg.TokenStream:
    return tg.TokenStream(tg.load_split(data.folder, "train"), VOCAB)


def batchers(cfg, data, world: int) -> list[tg.Batcher]:
    return [tg.Batcher(cfg, stream(data), Rank(r, world)) for r in range(world)]


def gathered(ranks: list[tg.Batcher], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one step, of all ranks in order."""
    parts = [b.next(seq_len) for b in ranks]
    return tuple(np.concatenate([p[i].numpy() for p in parts]) for i in (0, 1))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_partition_every_step_of_one_stream(data, tiny, world):
    cfg, batch = config(tiny), 4 * SEQ
    ranks = batchers(cfg, data, world)
    endless = np.concatenate([data.train, data.train])
    for step in range(len(data.train) // batch + 2):  # into the second pass
        inputs, targets = gathered(ranks, SEQ)
        at = step * batch
        assert np.array_equal(inputs.ravel(), endless[at : at + batch])
        assert np.array_equal(targets.ravel(), endless[at + 1 : at + batch + 1])


def test_the_curriculum_changes_rows_not_tokens(data, tiny):
    cfg = config(tiny, TRAIN_SEQ_SCHEDULE="8@0.3,16@0.6")
    assert [tg.switches_at(cfg, f)["seq_len"] for f in (0.0, 0.29, 0.3, 0.59, 0.6, 1.0)] == [8, 8, 16, 16, 32, 32]
    ranks = batchers(cfg, data, 3)
    flat = []
    for seq_len in (8, 16, 32):
        inputs, _ = gathered(ranks, seq_len)
        assert inputs.shape == (4 * SEQ // seq_len, seq_len)
        flat.append(inputs.ravel())
    assert np.array_equal(np.concatenate(flat), data.train[: 3 * 4 * SEQ])


def test_fewer_sequences_than_ranks_names_the_nearest_batch_that_works(tiny):
    text = message(tg.check_batch, config(tiny), 5)
    assert "TRAIN_BATCH_TOKENS=128 holds 4 sequences of 32, fewer than the 5 ranks" in text
    assert "the nearest that works is 160" in text
    tg.check_batch(config(tiny), 4)  # one for each


def test_documents_differ_between_the_splits():
    assert not set(documents(1, 220)) & set(documents(2, 40))
