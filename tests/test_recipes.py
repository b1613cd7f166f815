"""RECIPES and PUBLISHED_NAMES: each published system, field by field, its command line, and its run at a small size."""

from __future__ import annotations

import math
import shlex

import numpy as np
import pytest
import torch
from conftest import SCRIPT, events

import train_gpt as tg

SYSTEMS = ("pr164", "pr740", "pr187", "pr850", "pr1095")


def load(recipe: str, **env) -> tg.LoadedConfig:
    return tg.load_config({"RECIPE": recipe, **{k: str(v) for k, v in env.items()}}, has_gpu=lambda: False)


def on_meta(cfg: tg.Config) -> tg.GPT:
    """The model at full size, without memory."""
    with torch.device("meta"):
        return tg.GPT(cfg)


# ---- full size

PARAMETERS = {"baseline": 17_059_912, "pr164": 22_368_841, "pr740": 17_650_248, "pr187": 25_254_992,
              "pr850": 27_301_064, "pr1095": 3_452_460}  # fmt: skip


@pytest.mark.parametrize("recipe", PARAMETERS)
def test_parameter_counts_are_the_published_ones(recipe):
    assert sum(p.numel() for p in on_meta(load(recipe).cfg).parameters()) == PARAMETERS[recipe]


def test_the_parts_of_the_counts():
    def elements(module, trained=True) -> int:
        return sum(p.numel() for p in (module.parameters() if trained else module.buffers()))

    pr164, pr740, pr850, pr1095 = (on_meta(load(r).cfg) for r in ("pr164", "pr740", "pr850", "pr1095"))
    assert elements(pr164.blocks[0]) == 2_361_352 and elements(pr740.blocks[0]) == 1_837_064
    assert elements(pr850.blocks[0]) == 2_361_352 + 4_104 and elements(pr850.blocks[1]) == 2_361_352 + 4_104 + 2
    adapters = [p.numel() for b in pr1095.blocks for n, p in b.named_parameters() if p.store == "adapter"]
    assert sum(adapters) == 2_293_760 and sum(adapters) // 5 == 458_752
    assert sum(elements(b, trained=False) for b in pr1095.blocks) == 11_796_480


# Values as the record runs had them (the systems' comparison table), where they differ between systems.
SHAPES = {
    "num_layers": (9, 9, 10, 11, 5), "encoder_layers": (4, 4, 5, 5, 2), "model_dim": (512,) * 5, "num_heads": (8,) * 5,
    "num_kv_heads": (4,) * 5, "mlp_mult": (3, 2, 3, 3, 3), "leaky_slope": (0, 0.5, 0, 0.9, 0.5), "rope_dims": (0, 32, 0, 16, 16),
    "rope_train_len": (1024, 0, 0, 1024, 0), "qk_gain_init": (1.5,) * 5, "logit_softcap": (30,) * 5, "tie_embeddings": (True,) * 5,
    "xsa_layers": (range(9, 9), range(9), range(6, 10), range(7, 11), range(5)), "kv_fused": (False,) * 4 + (True,),
    "ln_scale": ("none", "in", "none", "in", "in"), "attn_gate": ("none", "none", "none", "input", "none"), "attn_gate_init": (4,) * 5,
    "value_residual": ("none", "none", "none", "softmax", "none"), "value_layers": ((), (), (), (9, 10), (3, 4)),
    "ve_dim": (0, 0, 0, 128, 128), "smear": (True,) * 5, "smear_init": (0, 0, -3, 0, 0), "smear_cross_doc": (False,) * 5,
    "smear_before_norm": (False, True, True, False, False), "pre_enrich_dim": (0, 0, 768, 0, 0), "overtone_init": (False, False, True, False, False),
    "bigram_vocab_size": (4096, 4096, 2048, 4096, 3072), "bigram_dim": (128,) * 5, "bigram_scale": (0.05, 0, 0, 0.05, 0.05),
    "bigram_hash": ("pr164", "pr740", "pr187", "pr164", "pr164"), "bigram_table_std": (0, 1, 0.01, 0, 0),
    "bigram_table_role": ("embed", "scalar", "matrix", "embed", "embed"), "bigram_proj_role": ("matrix", "scalar", "matrix", "matrix", "matrix"),
    "linear_init": ("orthogonal", "orthogonal", "default", "orthogonal", "orthogonal"), "out_init": ("zero",) * 5,
    "branch_proj_scaled": (True, False, False, True, False), "embed_init_std": (0.005,) * 5,
    "encoder_recurrence": (False,) * 5, "adapter_rank": (0, 0, 0, 0, 64), "adapter_seed": (42,) * 5,
}  # fmt: skip
STORAGE = {
    "attn_bits": (6, 8, 6, 5, 8), "mlp_bits": (6, 8, 6, 5, 8), "embed_bits": (8, 8, 16, 8, 8), "table_bits": (8, 8, 6, 8, 8),
    "control_bits": (16, 32, 32, 16, 32), "quant_min_numel": (65536,) * 5, "compressor": ("zstd", "zstd", "lzma", "lzma", "lzma"),
    "ngram_score": ("off", "exact,claimed", "exact,claimed", "exact,claimed", "exact,claimed"),
}  # fmt: skip
TRAINING = {
    "train_batch_tokens": (786432, 786432, 524288, 786432, 524288), "train_seq_len": (2048,) * 5, "eval_len": (2048,) * 5,
    "iterations": (9000, 20000, 20000, 20000, 20000), "max_wallclock_seconds": (600,) * 5, "warmup_steps": (20,) * 5,
    "tied_embed_lr": (0.03, 0.03, 0.035, 0.035, 0.035), "matrix_lr": (0.02, 0.02, 0.025, 0.025, 0.04),
    "scalar_lr": (0.02, 0.02, 0.025, 0.025, 0.025), "decoder_lr_mult": (1, 1, 1, 2, 1), "muon_momentum": (0.99,) * 5,
    "muon_momentum_warmup_start": (0.92,) * 5, "muon_momentum_warmup_steps": (1500,) * 5, "muon_backend_steps": (5,) * 5,
    "muon_wd": (0, 0.04, 0.04, 0.04, 0.04), "adam_wd": (0, 0, 0.04, 0.04, 0.04), "grad_clip_norm": (0.3, 0.3, 0, 0.3, 0.1),
    "muon_wd_order": ("before", "before", "after", "before", "before"), "beta1": (0.9,) * 5, "beta2": (0.95,) * 5,
    "lr_schedule": ("warmdown", "warmdown", "warmdown", "wsd", "warmdown"), "wsd_stable_frac": (0.75,) * 5,
    "ema_decay": (0, 0, 0.997, 0.997, 0.997), "swa_every": (0, 0, 50, 50, 0), "swa_start_scale": (0.2,) * 5,
    "complement_alpha": (0, 0, 0, 0.5, 0), "train_seq_schedule": ("",) * 5,
    "qat": ("none", "none", "ste", "soft_round", "ste"), "val_loss_every": (1000, 1000, 1000, 4000, 4000), "seed": (1337,) * 5,
}  # fmt: skip
ONLY = {  # where another system has no such thing
    ("pr164", "warmdown_iters"): 3000, ("pr740", "warmdown_iters"): 3500, ("pr187", "warmdown_iters"): 3500,
    ("pr1095", "warmdown_iters"): 5000, ("pr187", "swa_blend"): 0.5, ("pr187", "swa_source"): "weights",
    ("pr850", "swa_blend"): 0.3, ("pr850", "swa_source"): "ema", ("pr187", "qat_bits"): 6, ("pr187", "qat_start_frac"): 0,
    ("pr850", "qat_bits"): 5, ("pr850", "qat_start_frac"): 0.85, ("pr1095", "qat_bits"): 6, ("pr164", "eval_stride"): 256,
    ("pr740", "eval_stride"): 64, ("pr187", "eval_stride"): 64, ("pr850", "eval_stride"): 64, ("pr1095", "eval_stride"): 64,
    ("pr850", "ttt_lora_rank"): 8, ("pr850", "ttt_lora_blocks"): 2, ("pr850", "ttt_lr"): 0.003, ("pr850", "ttt_epochs"): 1,
    ("pr850", "ttt_chunk_tokens"): 65536, ("pr850", "ttt_polyak_decay"): 0.998, ("pr850", "ttt_temperature"): 0.98,
    ("pr850", "ttt_grad_clip"): 1, ("pr850", "ttt_enabled"): True, ("pr1095", "ttt_enabled"): False, ("pr187", "quant_clip"): "tensor", ("pr850", "quant_clip"): "row",
    ("pr850", "gptq_enabled"): True, ("pr850", "gptq_n_samples"): 256, ("pr850", "gptq_block_size"): 128, ("pr850", "gptq_percdamp"): 0.01,
    ("pr850", "prune_frac"): 0.03, ("pr850", "prune_scope"): "tensor", ("pr850", "lzma_preset"): 9, ("pr187", "lzma_preset"): 6,
    ("pr1095", "lzma_preset"): 6, ("pr1095", "adapter_bits"): 8, ("pr164", "zstd_level"): 22, ("pr740", "zstd_level"): 22,
    ("pr740", "ngram_claim"): "pr740", ("pr187", "ngram_claim"): "pr187", ("pr850", "ngram_claim"): "pr850",
    ("pr1095", "ngram_claim"): "pr1095", ("pr1095", "ngram_table"): "pr1095", ("pr850", "ngram_table"): "none",
    ("pr850", "gptq_variant"): "pr850", ("pr850", "gptq_order"): "ascending",
}  # fmt: skip


@pytest.mark.parametrize("i, recipe", list(enumerate(SYSTEMS)), ids=SYSTEMS)
def test_a_recipe_is_its_record_run_field_by_field(i, recipe):
    cfg = load(recipe).cfg
    table = {
        **{k: v[i] for k, v in {**SHAPES, **TRAINING, **STORAGE}.items()},
        **{k: v for (r, k), v in ONLY.items() if r == recipe},
    }
    assert {k: getattr(cfg, k) for k in table} == table


def test_the_bases_of_rope_at_full_size():
    bases = [tg.rope_base(load(recipe).cfg) for recipe in SYSTEMS]
    assert bases == pytest.approx([20452.2, 10000, 10000, 22081.8, 10000], abs=0.05)


# ---- the published command lines

PUBLISHED = {
    "pr164": "ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600 MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 MUON_MOMENTUM=0.99 "
             "MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3000 SEED=42",
    "pr740": "SEED=1337 NUM_LAYERS=9 MLP_MULT=2 QUANT_BITS=8 GPTQ_ENABLED=0 PRUNE_PCT=0 NGRAM_ENABLED=1",
    "pr187": "",
    "pr850": "SEED=1337 MAX_WALLCLOCK_SECONDS=600 PROG_SEQ_ENABLED=0",
    "pr1095": "MAX_WALLCLOCK_SECONDS=600 SEED=1337",
}  # fmt: skip


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_published_command_line_changes_nothing_but_the_seed(recipe):
    env = dict(word.split("=") for word in shlex.split(PUBLISHED[recipe]))
    loaded, plain = load(recipe, **env), load(recipe)
    changed = {n: getattr(loaded.cfg, n.lower()) for n in tg.FIELDS
               if getattr(loaded.cfg, n.lower()) != getattr(plain.cfg, n.lower())}  # fmt: skip
    assert changed == ({"SEED": 42} if recipe == "pr164" else {}) and not loaded.notices


# Every name of the systems' table of knobs, with a value that its script took.
KNOBS = {
    "pr164": "NUM_LAYERS=9 MLP_MULT=3.0 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2048 ITERATIONS=20000 WARMDOWN_ITERS=1200 "
             "WARMUP_STEPS=20 MAX_WALLCLOCK_SECONDS=600 TIED_EMBED_LR=.05 MATRIX_LR=.04 SCALAR_LR=.04 EMBED_LR=.6 HEAD_LR=.008 MUON_MOMENTUM=.95 "
             "MUON_MOMENTUM_WARMUP_START=.85 MUON_MOMENTUM_WARMUP_STEPS=500 MUON_BACKEND_STEPS=5 BETA1=.9 BETA2=.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=.3 "
             "SWA_ENABLED=0 SWA_EVERY=200 QAT_ENABLED=0 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=128 QK_GAIN_INIT=1.5 LOGIT_SOFTCAP=30 ROPE_BASE=10000 "
             "TIE_EMBEDDINGS=1 TIED_EMBED_INIT_STD=.005 EVAL_STRIDE=256 VAL_LOSS_EVERY=1000 VAL_BATCH_SIZE=524288 MTP_NUM_HEADS=0 MTP_LOSS_WEIGHT=.2 "
             "MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 VOCAB_SIZE=1024 TRAIN_LOG_EVERY=200",
    "pr740": "NUM_LAYERS=11 MLP_MULT=3 QUANT_BITS=6 GPTQ_ENABLED=1 GPTQ_BLOCK_SIZE=128 GPTQ_DAMP=.01 GPTQ_N_SAMPLES=256 PRUNE_PCT=25 WEIGHT_DECAY=.04 "
             "EMA_ENABLED=0 SWA_ENABLED=0 NGRAM_ENABLED=1 NGRAM_ORDER=5 NGRAM_ALPHA=.20 NGRAM_MIN_COUNT=2 NGRAM_BUCKETS=4194304 VAL_BATCH_SIZE=524288",
    "pr187": "NUM_LAYERS=10 MLP_MULT=3 MLP_MULT_ENCODER=3 MLP_MULT_DECODER=3 MUON_WD=.04 ADAM_WD=.04 GRAD_CLIP_NORM=0.0 EMA_DECAY=.997 XSA_LAST_N=4 "
             "ROPE_DIMS=0 LN_SCALE=0 VALUE_RESIDUAL=0 GATED_ATTN=0 LEAKY_RELU=0 RUN_CONFIG=A ENCODER_RECURRENCE=0 EVAL_ONLY=0",
    "pr850": "NUM_LAYERS=11 DECODER_LR_MULT=2.0 MUON_WD=.04 ADAM_WD=.04 QAT_TRIGGER_FRAC=.85 LATE_QAT_THRESHOLD=.15 QAT_ENABLED=0 XSA_LAST_N=4 ROPE_DIMS=16 "
             "LN_SCALE=1 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10 VRL_ENABLED=1 GATED_ATTN_ENABLED=1 GATED_ATTN_BIAS_INIT=4.0 WSD_STABLE_FRAC=.75 "
             "PROG_SEQ_ENABLED=0 WARMDOWN_ITERS=3500 SWA_ENABLED=1 MUON_BETA2=.95 MTP_NUM_HEADS=0 DTG_ENABLED=0 COMPLEMENT_ALPHA=.5 GPTQ_N_SAMPLES=256 "
             "GPTQ_BLOCK_SIZE=128 GPTQ_PERCDAMP=.01 PRUNE_PCT=.03 NGRAM_ENABLED=1 NGRAM_EVAL_ORDER=9 NGRAM_EVAL_MIN_ORDER=2 NGRAM_EVAL_BUCKETS=4194304 "
             "NGRAM_EVAL_MIN_COUNT=2 NGRAM_EVAL_ALPHA_MIN=.12 NGRAM_EVAL_ALPHA_MAX=.60 NGRAM_EVAL_ENTROPY_SCALE=2 NGRAM_EVAL_ENTROPY_CENTER=3.0 "
             "NGRAM_EVAL_ADAPTIVE=1 NGRAM_EVAL_ALPHA=.30 NGRAM_EVAL_BATCH_SEQS=32 NGRAM_EVAL_CHUNK_TOKENS=1000000 TTT_ENABLED=1 TTT_LORA_RANK=8 TTT_LR=.003 "
             "TTT_EPOCHS=1 TTT_CHUNK_TOKENS=65536 TTT_GRAD_CLIP=1.0 TTT_POLYAK_DECAY=.998 TTT_TEMPERATURE=.98 TTT_FREEZE_BLOCKS=9 TTT_MOMENTUM=.9",
    "pr1095": "NUM_LAYERS=5 XSA_LAST_N=5 ROPE_DIMS=16 LN_SCALE=1 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=3,4 ADAPTER_RANK=64 LATE_QAT_THRESHOLD=.5 SWA_ENABLED=1 "
              "GRAD_CLIP_NORM=.1 BIGRAM_VOCAB_SIZE=3072 EVAL_STRIDE=0 FULL_GPTQ=0 NGRAM_ENABLED=1 NGRAM_ORDERS=2,3,4,5,6,7 NGRAM_ALPHA_MAX=.95 "
              "NGRAM_MIN_COUNT=2 TTT_ENABLED=0 TTT_LR=.002 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=2 TTT_MOMENTUM=.9 TTT_BATCH_SEQS=32 "
              "TTT_GRAD_CLIP=1.0",
}  # fmt: skip


@pytest.mark.parametrize("recipe, word", [(r, w) for r, line in KNOBS.items() for w in line.split()])
def test_every_published_knob_is_taken(recipe, word):
    """As our knob, by conversion, or with a notice that it has no effect and why; never silently."""
    name, value = word.split("=")
    loaded = load(recipe, **{name: value})
    fate = {**tg.PUBLISHED_NAMES["*"], **tg.PUBLISHED_NAMES[recipe]}.get(name)
    assert fate is not None or name in tg.FIELDS
    told = [notice for notice in loaded.notices if notice.startswith(f"{name}={value} has no effect: ")]
    assert bool(told) == isinstance(fate, tg.Dead)
    assert all(" has no effect" in notice for notice in loaded.notices)


CONVERSIONS = [
    ("pr187", "LN_SCALE=1", {"ln_scale": "out"}), ("pr850", "LN_SCALE=0", {"ln_scale": "none"}),
    ("pr1095", "LN_SCALE=1", {"ln_scale": "in"}), ("pr187", "VALUE_RESIDUAL=0", {"value_residual": "none"}),
    ("pr850", "VRL_ENABLED=0", {"value_residual": "none"}), ("pr187", "GATED_ATTN=0", {"attn_gate": "none"}),
    ("pr850", "GATED_ATTN_ENABLED=0", {"attn_gate": "none"}), ("pr850", "GATED_ATTN_BIAS_INIT=2", {"attn_gate_init": 2.0}),
    ("pr187", "LEAKY_RELU=1", {"leaky_slope": 0.5}), ("pr740", "WEIGHT_DECAY=.1", {"muon_wd": 0.1}),
    ("pr850", "VE_ENABLED=0", {"ve_dim": 0, "value_layers": ()}), ("pr740", "EMA_ENABLED=1", {"ema_decay": 0.997, "ema_start_frac": 0.1}),
    ("pr740", "SWA_ENABLED=1", {"swa_every": 50, "swa_start_scale": 1.0}), ("pr740", "TIED_EMBED_INIT_STD=.01", {"embed_init_std": 0.01}),
    ("pr164", "SWA_ENABLED=1", {"swa_every": 200, "swa_start_scale": 1.0, "swa_blend": 1.0}), ("pr164", "QAT_ENABLED=1", {"qat": "ste"}),
    ("pr850", "QAT_ENABLED=1", {"qat": "soft_round", "qat_start_frac": 0.0}), ("pr850", "QAT_TRIGGER_FRAC=.5", {"qat_start_frac": 0.5}),
    ("pr850", "LATE_QAT_THRESHOLD=0", {"qat": "none"}), ("pr850", "LATE_QAT_THRESHOLD=.3", {"qat": "soft_round", "qat_start_frac": 0.85}),
    ("pr1095", "LATE_QAT_THRESHOLD=0", {"qat": "none"}), ("pr1095", "LATE_QAT_THRESHOLD=.25", {"qat": "ste", "qat_start_frac": 1 - 1250 / 9912}),
    ("pr187", "RUN_CONFIG=C", {"num_layers": 12, "mlp_mult": 2.0, "train_seq_len": 1024, "warmdown_iters": 2600, "encoder_layers": 6}),
    ("pr740", "PRUNE_PCT=25", {"prune_frac": 0.25, "prune_scope": "global"}), ("pr850", "PRUNE_PCT=.05", {"prune_frac": 0.05, "prune_scope": "tensor"}),
    ("pr740", "QUANT_BITS=6", {"attn_bits": 6, "mlp_bits": 6, "embed_bits": 8}), ("pr740", "GPTQ_DAMP=.02", {"gptq_percdamp": 0.02}),
    ("pr1095", "FULL_GPTQ=1", {"gptq_enabled": True}), ("pr740", "NGRAM_ENABLED=0", {"ngram_score": "off"}),
    ("pr850", "NGRAM_EVAL_BUCKETS=1024", {"ngram_buckets": 1024}), ("pr850", "NGRAM_EVAL_MIN_COUNT=3", {"ngram_min_count": 3}),
    ("pr850", "NGRAM_EVAL_BATCH_SEQS=32", {"val_batch_tokens": 65536}),
    ("frontier", "SPARSE_ATTN_GATE_ENABLED=0", {"attn_gate": "none"}), ("frontier", "SMEAR_GATE_ENABLED=0", {"smear": False}),
    ("frontier", "LEAKY_RELU_SQ_SLOPE=0.3", {"leaky_slope": 0.3}), ("frontier", "FORCE_STOP_STEP=4000", {"iterations": 4000}),
    ("frontier", "GPTQ_CALIBRATION_BATCHES=16", {"gptq_n_samples": 768}), ("frontier", "EVAL_INCLUDE_TAIL=0", {"val_drop_tail": True}),
    ("frontier", "COMPRESSOR=lzma QUANT_TRELLIS=0", {"compressor": "lzma"}), ("frontier", "ARTIFACT_DIR=out", {"log_dir": "out"}),
    ("frontier", "TTT_MASK=no_qv TTT_K_LORA=0", {"ttt_sites": {"o", "mlp", "head"}}), ("frontier", "TTT_SHORT_SCORE_FIRST_ENABLED=0", {"ttt_chunk_steps": [(math.inf, 48)]}),
    ("frontier", "TTT_LORA_LR=8e-4 TTT_WEIGHT_DECAY=2.5 TTT_OPTIMIZER=adam", {"ttt_lr": 8e-4, "ttt_wd": 2.5, "ttt_optimizer": "adamw"}),
    ("frontier", "TOKEN_ORDER=15 TOKEN_THRESHOLD=.7 TOKEN_BOOST=2", {"ngram_tilt_order": 15, "ngram_tilt_threshold": 0.7, "ngram_tilt_beta": 2.0}),
    ("frontier", "ADAPTIVE_BOOST_GAMMA=1 NGRAM_SCORE=off", {"ngram_tilt_gamma": 1.0, "stages": ("roundtrip", "ttt", "tilt")}),
    ("cpu", "LQER_ENABLED=1", {"lqer_top_k": 3}), ("cpu", "LQER_ENABLED=1 LQER_TOP_K=4", {"lqer_top_k": 4}), ("cpu", "LQER_ENABLED=0 LQER_TOP_K=4", {"lqer_top_k": 0}),
    ("pr1095", "NGRAM_ENABLED=0", {"ngram_tables": (), "ngram_scores": ()}),
    ("pr850", "WARMDOWN_ITERS=7", {"warmdown_iters": 1200}), ("pr164", "VAL_BATCH_SIZE=4096", {"val_batch_tokens": 4096}),
    # what a switch turns off stays off however it is set, in either order
    ("pr164", "SWA_ENABLED=0 SWA_EVERY=200", {"swa_every": 0}),
    ("pr164", "SWA_EVERY=200 SWA_ENABLED=0", {"swa_every": 0}),
    ("pr164", "SWA_EVERY=100 SWA_ENABLED=1", {"swa_every": 100, "swa_blend": 1.0}),
    ("pr740", "EMA_ENABLED=0 EMA_DECAY=.997", {"ema_decay": 0.0}),
    ("pr850", "VE_ENABLED=0 VE_DIM=128 VE_LAYERS=9,10", {"ve_dim": 0, "value_layers": ()}),
    ("pr850", "VE_DIM=64 VE_ENABLED=1", {"ve_dim": 64, "value_layers": (9, 10)}),
    ("pr850", "GATED_ATTN_ENABLED=0 GATED_ATTN_BIAS_INIT=4.0", {"attn_gate": "none"}),
]  # fmt: skip


def test_a_dead_name_lives_again_where_our_knob_of_that_name_has_an_effect():
    cfg = load("pr850", LR_SCHEDULE="warmdown", WARMDOWN_ITERS="3000", TTT_OPTIMIZER="sgd", TTT_MOMENTUM="0.8").cfg
    assert (cfg.warmdown_iters, cfg.ttt_momentum) == (3000, 0.8)


@pytest.mark.parametrize("recipe, word, values", CONVERSIONS, ids=[f"{r} {w}" for r, w, _ in CONVERSIONS])
def test_published_values_are_converted(recipe, word, values):
    cfg = load(recipe, **dict(one.split("=") for one in word.split())).cfg
    assert {k: getattr(cfg, k) for k in values} == values


def test_our_knob_wins_over_a_published_name_in_either_order():
    for env in ({"WEIGHT_DECAY": "1", "MUON_WD": "2"}, {"MUON_WD": "2", "WEIGHT_DECAY": "1"}):
        assert load("pr740", **env).cfg.muon_wd == 2.0


@pytest.mark.parametrize("recipe", KNOBS)
def test_all_published_knobs_of_a_system_load_together(recipe):
    """Their switches are those of the record run here, so that they hide nothing."""
    env = dict(word.split("=") for word in KNOBS[recipe].split())
    loaded = load(recipe, **env)
    fates = {**tg.PUBLISHED_NAMES["*"], **tg.PUBLISHED_NAMES[recipe]}
    dead = {name for name in env if isinstance(fates.get(name), tg.Dead)}
    assert {n.split("=")[0] for n in loaded.notices if " has no effect: " in n} == dead


def test_what_is_left_out_says_why():
    for name in ("MTP_NUM_HEADS", "DTG_ENABLED"):
        assert "left out because" in load("pr850", **{name: 1}).notices[0]


# ---- at a small size

SMALL = {
    "NUM_LAYERS": 4, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "XSA_LAST_N": 2, "ROPE_DIMS": 4, "ROPE_TRAIN_LEN": 16,
    "VE_DIM": 8, "VE_LAYERS": "2,3", "PRE_ENRICH_DIM": 24, "BIGRAM_VOCAB_SIZE": 60, "BIGRAM_DIM": 8, "ADAPTER_RANK": 4,
    "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 128, "EVAL_STRIDE": 16, "MUON_MOMENTUM_WARMUP_STEPS": 20, "WARMDOWN_ITERS": 60,
    "LOOP_START": 1, "LOOP_END": 1, "PARALLEL_START_LAYER": 3, "EVAL_SEQ_LEN": 48, "WARMDOWN_FRAC": 0.4,
    "QUANT_MIN_NUMEL": 100, "GPTQ_N_SAMPLES": 4, "TTT_CHUNK_TOKENS": 256, "SWA_EVERY": 1, "VAL_LOSS_EVERY": 0,
}  # fmt: skip
ALWAYS = "NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS TRAIN_SEQ_LEN TRAIN_BATCH_TOKENS VAL_LOSS_EVERY".split()


def small(recipe: str, **more) -> dict[str, str]:
    """Environment of the recipe shrunk: what it uses is small, what it does not use stays off, its switches stay."""
    used = [
        k for k in SMALL if k in ALWAYS or (tg.RECIPES[recipe].get(k) and (k, recipe) != ("WARMDOWN_ITERS", "pr850"))
    ]
    env = {"RECIPE": recipe, "DEVICE": "cpu", "COMPILE": 0, "ATTENTION": "sdpa", "MAX_WALLCLOCK_SECONDS": 0,
           **{k: SMALL[k] for k in used}, **more}  # fmt: skip
    if tg.RECIPES[recipe].get("XSA_LAST_N") == -1:
        del env["XSA_LAST_N"]
    return {k: str(v) for k, v in env.items()}


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_a_recipe_trains_packs_reloads_and_scores(recipe, data, tmp_path, script):
    env = small(recipe, DATA_PATH=data.folder, VOCAB_SIZE=300, LOG_DIR=tmp_path, RUN_ID="r", ITERATIONS=3, WARMUP_STEPS=2,
                TRAIN_LOG_EVERY=1, VAL_TOKENS=700)  # fmt: skip
    result = script(env)
    assert result.status == 0, result.err
    assert [e["step"] for e in events(env, "step")] == [1, 2, 3]
    assert events(env, "train_end")[0]["steps"] == 3
    assert events(env, "score")[-1]["val_bpb"] > 0
    weighted = [e.get("complement_weight") for e in events(env, "step")]
    assert weighted[0] == (1.0 if recipe == "pr850" else None)
    if recipe == "pr850":
        assert 0.5 <= weighted[2] < 1


@pytest.mark.parametrize("recipe", ["pr187", "pr1095"])
def test_200_steps_learn(recipe):
    """A smoke test: that each technique is right is test_formulas' business. On the shipped sample, three blocks of width 32: from ln 1024 = 6.93 to 0.8 nats below on text not yet seen."""
    env = small(recipe, ITERATIONS=200, TRAIN_BATCH_TOKENS=256, NUM_LAYERS=3, SWA_EVERY=10)
    env.update({"VE_LAYERS": "1,2"} if "VE_LAYERS" in env else {})
    cfg = tg.load_config(env, has_gpu=lambda: False).cfg
    run = tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1)
    torch.set_num_threads(1)  # products this small only wait for one another
    torch.manual_seed(0)
    stream = tg.TokenStream([tg.load_shard(SCRIPT.parent / "data" / "sample" / "fineweb_train_000000.bin")], 1024)
    trainer = tg.Trainer(cfg, run, tg.GPT(cfg), stream)
    held_out = torch.from_numpy(np.asarray(stream.shards[0][-32 * 32 - 1 :]).astype(np.int64))

    def held_out_loss() -> float:
        with torch.no_grad():
            return trainer.model.nll(held_out[:-1].view(32, 32), held_out[1:].view(32, 32)).mean().item()

    before = held_out_loss()
    for step in range(200):
        trainer.train_step(step / 200, tg.lr_scale(cfg, step, 0.0, 0.0))
    trainer.average.apply()
    assert before == pytest.approx(6.93, abs=0.15)
    assert held_out_loss() < before - 0.8
