"""Every configuration that section 1 accepts goes the whole way: train, pack, reload, score, and eval in a fresh process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SEQ, Data, events, forks, score_of, tiny_env, write_shard
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import train_gpt as tg

# Numbers that are small enough for a run of a second; knobs of other kinds are drawn from their choices.
NUMBERS = {
    "NUM_LAYERS": (1, 2, 3), "MODEL_DIM": (8, 16, 32), "NUM_HEADS": (1, 2, 4), "NUM_KV_HEADS": (1, 2, 4), "MLP_MULT": (0.2, 1.0, 3.0),
    "LEAKY_SLOPE": (0.0, 0.5, 1.0), "ROPE_DIMS": (0, 2, 4, 8),
    "ROPE_TRAIN_LEN": (0, 16), "QK_GAIN_INIT": (0.0, 1.5), "XSA_LAST_N": (-1, 0, 1, 2), "VE_DIM": (0, 1, 8), "VE_LAYERS": ("", "0", "0,1"),
    "BIGRAM_VOCAB_SIZE": (0, 2, 64), "BIGRAM_DIM": (1, 8), "BIGRAM_SCALE": (0.0, 0.05), "BIGRAM_TABLE_STD": (0.0, 0.1),
    "PRE_ENRICH_DIM": (0, 1, 8), "EMBED_INIT_STD": (0.0, 0.02), "ADAPTER_RANK": (0, 1, 4, 64),
    "ADAPTER_SEED": (0, 42), "LOGIT_SOFTCAP": (0.1, 30.0), "TRAIN_SEQ_LEN": (8, 32), "TRAIN_BATCH_TOKENS": (32, 64), "MICRO_BATCH_TOKENS": (0, 1, 32),
    "ITERATIONS": (1, 2, 3), "WARMUP_STEPS": (0, 1), "WARMDOWN_ITERS": (0, 1, 10), "WSD_STABLE_FRAC": (0.0, 1.0), "VAL_LOSS_EVERY": (0, 1),
    "MUON_MOMENTUM": (0.0, 0.95), "MUON_MOMENTUM_WARMUP_STEPS": (0, 500), "MUON_WD": (0.0, 0.1), "ADAM_WD": (0.0, 0.1), "GRAD_CLIP_NORM": (0.0, 0.3),
    "EMA_DECAY": (0.0, 0.9), "EMA_START_FRAC": (0.0, 1.0), "SWA_EVERY": (0, 1), "SWA_START_SCALE": (0.2, 2.0), "SWA_BLEND": (0.5, 1.0),
    "QAT_START_FRAC": (0.0, 0.5, 1.0), "QAT_BITS": (4, 6), "COMPLEMENT_ALPHA": (0.0, 0.5), "TRAIN_SEQ_SCHEDULE": ("", "8@0.3,16@0.6", "8@0.5,64@1.0"),
    "CHECKPOINT_EVERY": (0, 1), "QUANT_MIN_NUMEL": (0, 100, 10**9), "QUANT_QUANTILES": ("1.0", "0.9,0.99"), "PRUNE_FRAC": (0.0, 0.5, 0.99),
    "GPTQ_PERCDAMP": (0.01, 1.0), "GPTQ_BLOCK_SIZE": (1, 128), "GPTQ_N_SAMPLES": (1, 3), "LQER_TOP_K": (0, 1, 99), "LQER_RANK": (1, 4, 256),
    "TARGET_BYTES": (0, 400_000), "ZSTD_LEVEL": (1, 22), "LZMA_PRESET": (0, 6), "EVAL_SEQ_LEN": (0, 16, 64), "EVAL_STRIDE": (0, 1, 8),
    "VAL_BATCH_TOKENS": (0, 1, 64), "NGRAM_SCORE": ("off", "exact", "normalized", "claimed", "exact,normalized,claimed"), "NGRAM_CLAIM_RANKS": (1, 3),
    "NGRAM_BUCKETS": (2, 256), "NGRAM_TABLE": ("none", "exact", "exact,pr1095"), "NGRAM_TABLE_BYTES": (1000, 5000), "NGRAM_TABLE_ORDER": (2, 5),
    "NGRAM_TABLE_TOKENS": (1, 500), "NGRAM_ORDER": (2, 5, 64), "NGRAM_RATE": (0.0, 2.0),
    "NGRAM_MIN_COUNT": (1, 3), "NGRAM_TILT_THRESHOLD": (0.0, 1.0), "TTT_LORA_RANK": (1, 8),
    "TTT_LORA_SITES": ("q", "q,v", "kv", "up,down", "head", "q,out,head"), "TTT_LORA_BLOCKS": (1, 2), "TTT_CHUNK_TOKENS": (1, 50, 200), "TTT_EPOCHS": (1, 2),
    "TTT_BATCH_SEQS": (0, 1), "TTT_WD": (0.0, 0.1), "TTT_POLYAK_DECAY": (0.0, 0.9), "TTT_TEMPERATURE": (0.5, 1.0), "SEED": (0, 2**31 - 1),
    "VAL_TOKENS": (0, 120),
}  # fmt: skip
FIXED = set(
    "MODE VAL_BYTES RECIPE DEVICE ATTENTION COMPILE TRAIN_DTYPE FORCE PROFILE CODE_FORM EVAL_STAGES SCORE_STAGE".split()
)


def choices() -> dict[str, tuple]:
    """Knob -> values that a configuration is drawn from."""
    found = {name: values for name, values in NUMBERS.items() if name in tg.FIELDS}
    for name, f in tg.FIELDS.items():
        if name not in found and name not in FIXED and (f.type == "bool" or f.metadata["choices"]):
            found[name] = f.metadata["choices"] or (False, True)
    return found


@st.composite
def changes(draw) -> dict[str, str]:
    """Up to 14 knobs off the tiny run's values, any with any."""
    table = choices()
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=14, unique=True))
    return {name: tg.as_text(draw(st.sampled_from(table[name]))) for name in names}


@pytest.fixture(scope="module")
def small(data: Data, tmp_path_factory) -> Data:
    """The tiny data with a short validation text."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copy(data.tokenizer, folder)
    write_shard(folder / "fineweb_train_000000.bin", data.train)
    write_shard(folder / "fineweb_val_000000.bin", data.val[:200])
    return data._replace(folder=folder)


def trained(env: dict[str, str], drawn: dict[str, str]) -> bool:
    """Train, pack, reload and score; False where section 1 refuses the configuration, which it must do by itself."""
    try:
        tg.load_config(env, has_gpu=lambda: False)
    except tg.ConfigError:
        return False
    status = tg.main([], env)
    assert status == 0, (status, drawn)
    assert all(math.isfinite(e["val_bpb"]) for e in events(env, "stage")), drawn
    return True


def score_again(evals: list[dict[str, str]], output: Path) -> None:
    """The statuses of MODE=eval in a process that trained none of them."""
    torch.set_num_threads(1)
    output.write_text(json.dumps([tg.main([], env) for env in evals]))


@pytest.mark.parametrize("part", range(3))
def test_what_section_1_accepts_goes_the_whole_way(small, tmp_path, monkeypatch, part):
    monkeypatch.setattr(tg, "tune_cpu", lambda _: torch.set_num_threads(1))
    done: list[dict[str, str]] = []

    @seed(part)
    @settings(max_examples=5, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes())
    def train(drawn: dict[str, str]) -> None:
        env = {**tiny_env(small, tmp_path, ITERATIONS=2, WARMUP_STEPS=0, NGRAM_BUCKETS=256, VAL_TOKENS=0), **drawn,
               "RUN_ID": f"r{len(done)}", "FORCE": "1"}  # fmt: skip
        if trained(env, drawn):
            done.append(env)

    train()
    assert len(done) >= 2
    evals = [{"MODE": "eval", "ARTIFACT": str(tmp_path / f"{env['RUN_ID']}.pgz"), "RUN_ID": f"{env['RUN_ID']}-again",
              **{n: env[n] for n in ("DATA_PATH", "LOG_DIR", "DEVICE", "ATTENTION", "VAL_TOKENS")}} for env in done]  # fmt: skip
    fresh = forks.Process(target=score_again, args=(evals, tmp_path / "statuses"))
    fresh.start()
    fresh.join(240)
    assert fresh.exitcode == 0 and json.loads((tmp_path / "statuses").read_text()) == [0] * len(done)
    for env, again in zip(done, evals, strict=True):
        assert score_of(again) == pytest.approx(score_of(env), abs=1e-6), env
        assert SEQ and [e["stage"] for e in events(again, "stage")] == [e["stage"] for e in events(env, "stage")]
