"""benchmarks/strength.py: what its figures are made of. The networks themselves take hours."""

import numpy as np
import pytest
import torch
from conftest import write_shard

import benchmarks.strength as strength
import train_gpt as tg


def test_a_point_is_reached_from_the_fork_before_it_and_every_fork_is_a_checkpoint():
    steps = list(strength.POINTS.values())
    assert all(n * 4 % (5 * strength.EVERY) == 0 for n in steps) and steps == sorted(steps)
    assert all(before * 4 // 5 <= after * 4 // 5 for before, after in zip(steps, steps[1:], strict=False))
    # As many saves as follow the fork of any point but the last, and the fork itself, are kept.
    assert tg.load_config(strength.Network("5x320", 2, 6).knobs, has_gpu=lambda: False).cfg.num_kv_heads == 5
    assert all(n // 5 // strength.EVERY <= int(strength.TRAINING["CHECKPOINT_KEEP"]) for n in steps[:-1])


def test_documents_are_whole_short_enough_and_keep_their_bytes(monkeypatch):
    monkeypatch.setattr(strength, "LONGEST", 4)
    lengths, bos = [3, 9, 2, 4, 4], tg.BOS
    tokens = torch.tensor([t for n in lengths for t in [bos, *range(10 * n, 10 * n + n - 1)]] + [bos])
    text = strength.whole_documents(tg.ValidationText(tokens, torch.arange(len(tokens)), complete=False), 9)
    short = [bos, 30, 31, bos, 20, bos, 40, 41, 42]  # the 9 are too long, the last 4 too many
    assert text.tokens.tolist() == [*short, bos]
    assert text.bytes.tolist()[:-1] == [0, 1, 2, 12, 13, 14, 15, 16, 17]
    sums = strength.by_document(text, torch.ones(len(text.tokens) - 1))
    assert sums == [3.0, 2.0, 4.0]


def test_a_document_is_fresh_where_few_of_its_runs_were_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    train, new = rng.integers(4, 500, 400), rng.integers(4, 500, 300)
    documents = [new[:100], [*new[100:170], *train[50:80]], train[200:300], new[200:]]  # 0, 15 of 86, all and 0 runs
    write_shard(tmp_path / "fineweb_train_000000.bin", train)
    write_shard(tmp_path / "fineweb_val_000000.bin", [t for d in [*documents, new[:9]] for t in (tg.BOS, *d)])
    for share, fresh in ((0.17, [True, False, False, True]), (0.18, [True, True, False, True])):
        assert strength.fresh_documents(tmp_path, 10_000, share) == fresh


def test_a_gain_is_paired_by_document_and_its_error_shrinks_with_what_they_share():
    rng = np.random.default_rng(0)
    sizes, noise = rng.integers(100, 900, 400), rng.normal(1, 0.3, 400)
    before = {"nats": list(sizes * noise), "bytes": list(sizes)}
    after = {"nats": list(sizes * (noise - 0.1) + rng.normal(0, 2, 400)), "bytes": list(sizes)}
    gain, error = strength.gain(before, after)
    drawn = []
    for _ in range(300):
        at = rng.integers(0, 400, 400)
        pick = [{k: list(np.array(row[k])[at]) for k in row} for row in (before, after)]
        drawn.append(strength.bpb(pick[0]) - strength.bpb(pick[1]))
    assert gain == pytest.approx(0.1 / np.log(2), rel=0.02)
    assert error == pytest.approx(np.std(drawn), rel=0.2) and error < 0.01


def test_the_guess_spans_the_lines_through_the_last_three_points():
    network = strength.Network("4x256", 1, 6)
    points = [
        strength.Point(network, bpb, gain, 0.0) for bpb, gain in ((2.0, 9.0), (1.8, 0.4), (1.6, 0.3), (1.5, 0.22))
    ]
    aim = strength.AIM
    ends = sorted(0.22 + slope * (aim - 1.5) for slope in (0.5, 0.8, 0.6))
    assert strength.guessed(points) == pytest.approx((ends[0], ends[-1]))
