"""No knob does nothing without a word: where a knob's `needs` hold, another value changes what a run leaves; where they do not, nothing
changes and a notice says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from conftest import Data, tiny_env, write_shard

import train_gpt as tg

# Knobs that change no figure of a small run on a CPU, and what holds them instead.
ELSEWHERE = {
    **dict.fromkeys("MODE RECIPE DEVICE ATTENTION COMPILE TRAIN_DTYPE".split(), "the machine and the kind of run: test_main, test_runtime, test_kernels"),
    **dict.fromkeys("DATA_PATH TOKENIZER_PATH VOCAB_SIZE VAL_BYTES".split(), "other data: test_data, test_bytes"),
    **dict.fromkeys("FORCE RESUME CODE_FORM ARTIFACT_LIMIT".split(), "finished files and limits: test_lost_runs, test_pack_code, test_main"),
    **dict.fromkeys("VAL_BATCH_TOKENS MICRO_BATCH_TOKENS GPTQ_BLOCK_SIZE TTT_BATCH_SIZE".split(), "speed and memory, the same results: test_training, test_quantizer"),
    **dict.fromkeys("MAX_WALLCLOCK_SECONDS EVAL_WALLCLOCK_SECONDS GPTQ_RESERVE_SECONDS".split(), "the clock: test_main, test_training"),
    **dict.fromkeys("ARTIFACT RUN_ID LOG_DIR".split(), "names of files: test_main"),
    "WARMUP_STEPS": "undone before the first step: test_training", "SKIP_SPLIT": "halves an odd number of passes: test_formulas",
    "LINEAR_INIT": "leaves matrices narrower than 64 alone, as published: test_model",
    **dict.fromkeys("NGRAM_CLAIM_RANKS NGRAM_BUCKETS NGRAM_MIN_COUNT NGRAM_TABLE_BYTES".split(), "need longer texts: test_ngram, test_evaluation_oracles, test_table"),
    "TRAIN_LOG_EVERY": "the first steps are always logged: test_training",
}  # fmt: skip
OTHER = {
    "SEED": 7, "NUM_LAYERS": 3, "MODEL_DIM": 16, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "VE_LAYERS": "0", "GATE_WINDOW": 5, "LOOP_START": 0, "LOOP_END": 0,
    "TRAIN_SEQ_LEN": 16, "TRAIN_BATCH_TOKENS": 64, "TRAIN_SEQ_SCHEDULE": "8@0.5", "QUANT_OVERRIDES": "blocks.0.*=5",
    "QUANT_QUANTILES": "0.7,0.8", "EVAL_STAGES": "roundtrip", "SCORE_STAGE": "roundtrip", "EVAL_SEQ_LEN": 24, "NGRAM_TABLE_ORDER": 2, "TTT_LORA_SITES": "down",
    "TTT_SHORT_SCORE_FIRST_STEPS": "6:2", "TTT_EVAL_SEQ_LEN": 24, "NGRAM_BUCKETS": 16, "PARALLEL_START_LAYER": 1, "XSA_LAST_N": 1, "TARGET_BYTES": 0, "MUON_MOMENTUM_WARMUP_STEPS": 3,
    "VAL_TOKENS": 90, "CONTROL_BITS": 16, "ROPE_DIMS": 4, "ROPE_TRAIN_LEN": 8, "GPTQ_N_SAMPLES": 1, "NUM_LOOPS": 2, "MUON_BACKEND_STEPS": 2,
    "NGRAM_TABLE_BYTES": 1100, "NGRAM_TABLE_TOKENS": 300, "EMBED_WD": 0.5, "LOGIT_SOFTCAP": 3.0, "NGRAM_TILT_THRESHOLD": 0.1, "TTT_CHUNK_TOKENS": 20,
    "TTT_BLOCK_TOKENS": 60, "TTT_CHUNK_SIZE": 3, "TTT_BATCH_SEQS": 1, "GLOBAL_TTT_CHUNK_TOKENS": 12, "GLOBAL_TTT_BATCH_SEQS": 1, "TTT_ADAM_EPS": 1.0,
    "LQER_ASYM_GROUP": 8, "MIN_LR": 0.9, "ADAM_EPS": 1.0, "GPTQ_PERCDAMP": 1.0, "GRAD_CLIP_NORM": 0.01, "GLOBAL_TTT_GRAD_CLIP": 1e-4, "TTT_GRAD_CLIP": 1e-4,
    "ATTN_CLIP_SIGMAS": 0.5, "MLP_CLIP_SIGMAS": 0.5, "EMBED_CLIP_SIGMAS": 0.5, "MATRIX_CLIP_SIGMAS": 0.5, "COMPRESSOR": "lzma", "CHECKPOINT_KEEP": 1,
    "PRUNE_FRAC": 0.3, "QAT_BITS": 3, "QUANT_CLIP": "sigma", "QUANT_MIN_NUMEL": 10**6, "LZMA_PRESET": 0, "ZSTD_LEVEL": 1, "ENABLE_LOOPING_AT": 1.0, "SWA_START_SCALE": 0.01, "QAT_START_FRAC": 0.9,
}  # fmt: skip
PLAIN = {
    "NGRAM_SCORE": "off",
    "QUANT_MIN_NUMEL": 100,
    "EVAL_STRIDE": 8,
    "MUON_MOMENTUM_WARMUP_STEPS": 0,
    "WARMUP_STEPS": 0,
    "ITERATIONS": 3,
    "SWA_START_SCALE": 2,
}
PARTS = {**PLAIN, "NUM_LAYERS": 4, "SMEAR": 1, "BIGRAM_VOCAB_SIZE": 64, "BIGRAM_DIM": 8, "BIGRAM_TABLE_STD": 0.1, "VE_DIM": 8, "VE_LAYERS": "2,3", "ATTN_GATE": "input", "NUM_LOOPS": 1,
         "LOOP_START": 1, "LOOP_END": 1, "ENABLE_LOOPING_AT": 0.3, "SWA_EVERY": 1, "SWA_START_SCALE": 2, "EMA_DECAY": 0.5, "QAT": "ste", "NGRAM_SCORE": "exact,claimed", "NGRAM_CLAIM": "pr740",
         "NGRAM_TABLE": "exact", "NGRAM_TABLE_BYTES": 1500, "NGRAM_TILT_ENABLED": 1, "NGRAM_ORDER": 4, "NGRAM_TILT_ORDER": 3, "NGRAM_MIN_COUNT": 1, "NGRAM_TILT_GAMMA": 0.5,
         "GPTQ_ENABLED": 1, "GPTQ_N_SAMPLES": 4, "LQER_TOP_K": 2, "QUANT_CLIP": "row", "ATTN_BITS": 4, "MLP_BITS": 4, "PRUNE_FRAC": 0.1,
         "TTT_ENABLED": 1, "TTT_OPTIMIZER": "sgd", "TTT_BATCH_SEQS": 2, "TTT_CHUNK_TOKENS": 60, "TTT_POLYAK_DECAY": 0.5, "MUON_MOMENTUM_WARMUP_STEPS": 5, "GRAD_CLIP_NORM": 1.0,
         "MUON_WD": 0.1, "COMPLEMENT_ALPHA": 0.5, "CHECKPOINT_EVERY": 1, "TRAIN_SEQ_SCHEDULE": "16@0.4,32@1.0", "SEQ_CHANGE_WARMUP_STEPS": 2}  # fmt: skip
DOCUMENTS = {**PLAIN, "TTT_ENABLED": 1, "TTT_RESET": "document", "TTT_LORA_SITES": "q,v,o,mlp,head", "TTT_CHUNK_SIZE": 6, "TTT_BLOCK_TOKENS": 0, "PHASED_TTT_NUM_PHASES": 1, "PHASED_TTT_PREFIX": 0.7,
             "TTT_LR": 0.01, "DOC_MASK": 1, "SMEAR": 1, "SMEAR_FORM": "window", "ATTN_GATE": "sparse", "TARGET_BYTES": 600_000, "GPTQ_N_SAMPLES": 4, "LR_SCHEDULE": "wsd", "WSD_STABLE_FRAC": 0.3,
             "COMPRESSOR": "entropy", "TTT_EPOCHS": 1, "TIE_EMBEDDINGS": 0, "GLOBAL_TTT_CHUNK_TOKENS": 40, "GLOBAL_TTT_BATCH_SEQS": 2, "GLOBAL_TTT_WARMUP_CHUNKS": 1}  # fmt: skip
PACKED = {**PLAIN, "ADAPTER_RANK": 4, "QUANT_CLIP": "sigma", "COMPRESSOR": "zstd", "NGRAM_TABLE": "pr1095", "NGRAM_SCORE": "normalized", "NGRAM_CLAIM": "pr740", "NGRAM_MIN_COUNT": 1,
          "ENCODER_RECURRENCE": 1, "NUM_LAYERS": 3, "WARMDOWN_FRAC": 0.5, "PRUNE_FRAC": 0.1, "GPTQ_ENABLED": 1, "GPTQ_N_SAMPLES": 2, "LR_SCHEDULE": "warmdown"}  # fmt: skip
BASES = {"plain": PLAIN, "parts": PARTS, "documents": DOCUMENTS, "packed": PACKED}
VOLATILE = {"t", "seconds", "train_s", "eval_s", "step_ms", "tokens_per_s", "eta_s", "mfu", "calibration_s", "started", "peak_memory_mib", "path", "artifact", "run_id",
            "artifact_sha256", "artifact_bytes", "total_bytes"}  # fmt: skip


@pytest.fixture(scope="module")
def short(data: Data, tmp_path_factory) -> Data:
    """The tiny data with a short validation text."""
    folder = tmp_path_factory.mktemp("short")
    shutil.copy(data.tokenizer, folder)
    write_shard(folder / "fineweb_train_000000.bin", data.train)
    write_shard(folder / "fineweb_val_000000.bin", data.val[:300])
    return data._replace(folder=folder)


def left(env: dict[str, str]) -> tuple[list, list[str]]:
    """What a run leaves: its events without times and configuration, and the names of its files."""
    folder = Path(env["LOG_DIR"])
    shutil.rmtree(folder, ignore_errors=True)
    if tg.main([], env):
        return [], []
    lines = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    seen = [e for e in lines if e["event"] not in ("run", "config", "notice")]
    for e in seen:
        e.get("roles", {}).pop("container", None)  # it holds the configuration itself
    events = [{k: v for k, v in e.items() if k not in VOLATILE} for e in seen]
    return events, sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def other_value(name: str, now) -> str:
    """A value of the knob that is not the one now."""
    meta, kind = tg.FIELDS[name].metadata, tg.TYPES[tg.FIELDS[name].type]
    if name in OTHER and OTHER[name] != now:
        return str(OTHER[name])
    if kind is bool:
        return str(int(not now))
    if meta["choices"]:
        return str(next(c for c in meta["choices"] if c != now))
    changed = now * 2 + 1 if kind is int else now * 0.5 or 0.5
    return str(kind(changed if changed <= meta["hi"] else max(meta["lo"], now / 2 if kind is float else now // 2)))


@pytest.mark.parametrize("base", BASES)
def test_a_knob_acts_or_says_that_it_cannot(base, short, tmp_path, monkeypatch):
    """Each knob is set to another value in each base."""
    monkeypatch.setattr(tg, "tune_cpu", lambda _: torch.set_num_threads(1))
    env = {
        **tiny_env(short, tmp_path / "r", **{"NGRAM_BUCKETS": 256, "RUN_ID": "r", **BASES[base]}),
        "CODE_FORM": "source",
    }
    cfg, plain, wrong = tg.load_config(env, has_gpu=lambda: False).cfg, left(env), []
    assert plain != ([], [])
    every = "ALL_KNOBS" in os.environ  # else a sixteenth of them in each base
    for name in [n for n in tg.FIELDS if n not in ELSEWHERE]:
        if not every and zlib.crc32(f"{base}{name}".encode()) % 16:
            continue
        changed = {**env, name: other_value(name, getattr(cfg, name.lower()))}
        try:
            notices = tg.load_config(changed, has_gpu=lambda: False).notices
        except tg.ConfigError:
            continue  # does not fit this base
        idle = any(re.match(rf"{name}=.* has no effect with", notice) for notice in notices)
        found = left(changed)
        if found != ([], []) and (found == plain) != idle:
            wrong.append(
                f"{name}={changed[name]}: {'changes the run in spite of its notice' if idle else 'changes nothing and has no notice'}"
            )
    assert not wrong, "\n".join(wrong)
