"""RECIPE=frontier: its published command line, depth recurrence, lanes, gates, softcap, and a run from end to end."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from conftest import BOS, config, events, losses, run_ranks, score_of, tiny_env
from test_model import V, build, like, tokens
from test_model import config as model_config

import train_gpt as tg

T = 24
LOOPS = {"num_loops": 2, "loop_start": 1, "loop_end": 2}
# ---- the recipe

# The environment of #2135's run (Appendix A of its description), and the names of the branches near it at the values it had.
PUBLISHED = """
    VOCAB_SIZE=8192 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_SEQ_LEN=2560
    VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=500 WARMUP_STEPS=20 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=4.0
    XSA_LAST_N=-1 ROPE_BASE=1e4 ROPE_DIMS=16 ROPE_TRAIN_SEQ_LEN=2048 ROPE_YARN=0 LN_SCALE=1 QK_GAIN_INIT=5.0
    QK_GAIN_INIT_SCHEDULE= TIE_EMBEDDINGS=1 TIED_EMBED_INIT_STD=.005 LOGIT_SOFTCAP=30 ASYM_LOGIT_RESCALE=1
    SKIP_GATES_ENABLED=1 NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=.35 PARALLEL_START_LAYER=8
    PARALLEL_FINAL_LANE=mean SMEAR_GATE_ENABLED=1 SMEAR_GATE_BOS_FIX=0 GATE_WINDOW=12 SPARSE_ATTN_GATE_ENABLED=1
    SPARSE_ATTN_GATE_INIT_STD=0 SPARSE_ATTN_GATE_SCALE=.5 GATED_ATTN_ENABLED=0 GATED_ATTN_INIT_STD=.01
    ATTN_OUT_GATE_ENABLED=0 ATTN_OUT_GATE_SRC=proj GATED_ATTN_QUANT_GATE=0 FUSED_CE_ENABLED=1 MATRIX_LR=.028
    TIED_EMBED_LR=.03 EMBED_LR=.6 SCALAR_LR=.02 MUON_MOMENTUM=.97 MUON_MOMENTUM_WARMUP_START=.92
    MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_BACKEND_STEPS=5 MUON_ROW_NORMALIZE=1 MUON_WD=.095 EMBED_WD=.085 ADAM_WD=.02
    MUON_HUBER_WD=0 MUON_HUBER_DELTA=.1 BETA1=.9 BETA2=.99 ADAM_EPS=1e-8 GRAD_CLIP_NORM=.3 WARMDOWN_FRAC=.85 MIN_LR=.1
    EMA_DECAY=.9965 MATRIX_BITS=6 EMBED_BITS=7 MATRIX_CLIP_SIGMAS=12.85 ATTN_CLIP_SIGMAS=13 MLP_CLIP_SIGMAS=11.5
    EMBED_CLIP_SIGMAS=14 GPTQ_CALIBRATION_BATCHES=32 GPTQ_CALIBRATION_MODE=random OPTROT_ENABLED=0 COMPRESSOR=pergroup
    PERGROUP_ROUNDTRIP_CHECK=0 PREQUANT_ONLY=0 VAL_DOC_FRACTION=1.0 COMPILE_SHAPE_WARMUP=1 EVAL_INCLUDE_TAIL=1
    FORCE_STOP_STEP=0 LEAKY_RELU_SQ_SLOPE=.5 RECUR_ALPHA_ENABLED=0 ALIAS_PREV_SMEAR_SCALE=1 TTT_LORA_EMA_DECAY=0
    TTT_UPDATE_EVERY=1 TTT_EVAL_BATCHES= WITHIN_TAU=99.0 WITHIN_BOOST=0 WORD_TAU=99 WORD_BOOST=0 AGREE_ADD_BOOST=0
    TTT_SHORT_DOC_LEN=2000 TTT_SHORT_CHUNK_SIZE=24 TRAIN_SEQ_SCHEDULE_MODE=wallclock
    SEED=1337 RUN_ID= DATA_DIR=. ARTIFACT_DIR=logs DATA_PATH= TOKENIZER_PATH= VAL_BATCH_TOKENS=0 CASEOPS_ENABLED=1 GPTQ_RESERVE_SECONDS=.5
    LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=3 LQER_FACTOR_BITS=4 LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=32 AWQ_LITE_ENABLED=0
    AWQ_LITE_BITS=8 AWQ_LITE_GROUP_TOP_K=1 AWQ_LITE_GROUP_SIZE=64 TTT_ENABLED=1 TTT_EVAL_SEQ_LEN=2560 TTT_BATCH_SIZE=64
    TTT_CHUNK_SIZE=48 TTT_LORA_RANK=80 TTT_LORA_ALPHA=144 TTT_LORA_LR=8e-5 TTT_WEIGHT_DECAY=2.0 TTT_BETA1=0 TTT_BETA2=.99
    TTT_OPTIMIZER=adam TTT_GRAD_STEPS=1 TTT_K_LORA=0 TTT_O_LORA=1 TTT_MLP_LORA=1 TTT_Q_LORA=1 TTT_V_LORA=1 TTT_MASK=
    TTT_WARM_START_A=1 PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=1 GLOBAL_TTT_LR=.001 GLOBAL_TTT_MOMENTUM=.9
    GLOBAL_TTT_EPOCHS=1 GLOBAL_TTT_CHUNK_TOKENS=32768 GLOBAL_TTT_BATCH_SEQS=32 GLOBAL_TTT_GRAD_CLIP=1.0
    GLOBAL_TTT_RESPECT_DOC_BOUNDARIES=1 GLOBAL_TTT_WARMUP_CHUNKS=0 GLOBAL_TTT_OPTIMIZER=sgd NGRAM_TILT_ENABLED=1 TOKEN_ORDER=16
    TOKEN_THRESHOLD=.8 TOKEN_BOOST=2.625 NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 ADAPTIVE_BOOST_GAMMA=0 TTT_EVAL_ONLY=0
    TRAIN_SEQ_SCHEDULE= SEQ_CHANGE_WARMUP_STEPS=0 EVAL_STRIDE=0 TTT_SHORT_SCORE_FIRST_ENABLED=0
    TTT_SHORT_SCORE_FIRST_STEPS=256:8,2000:24 TTT_LOCAL_LR_MULT=1
"""
OTHER = {
    "val_bytes": "sidecar",
    "gptq_reserve_seconds": 0.5,
    "asym_logit_rescale": True,
}  # the recipe finds the sidecar by itself, keeps the time that the rules ask for, and has no caps that the script never moves
ENV = dict(word.split("=") for word in PUBLISHED.split())


def load(**env) -> tg.LoadedConfig:
    return tg.load_config({"RECIPE": "frontier", **{k: str(v) for k, v in env.items()}}, has_gpu=lambda: False)


def test_the_published_environment_is_the_recipe():
    """Each name is a knob, an alias, or reported as without effect; none changes what the recipe already says."""
    loaded = load(**ENV)
    assert loaded.cfg == dataclasses.replace(load().cfg, **OTHER)
    with torch.device("meta"):
        sites = tg.lora_sites(loaded.cfg, tg.GPT(loaded.cfg))
    assert loaded.cfg.ttt_sites == {"q", "v", "o", "mlp", "head"} and len(sites) == 17 * 4 + 1, "17 passes"
    fates = {**tg.PUBLISHED_NAMES["*"], **tg.PUBLISHED_NAMES["frontier"]}
    dead = {name for name in ENV if isinstance(fates.get(name), tg.Dead)}
    assert {notice.split("=")[0] for notice in loaded.notices if " has no effect: " in notice} == dead
    for name, value in ENV.items():
        assert name in {**tg.FIELDS, **fates}
        assert any(" has no effect: " in n for n in load(**{name: value}).notices) == (name in dead), name


def test_parameters_of_the_full_size():
    """Published: 35,945,673 with AsymLogit, 35,945,671 without. 48 of those are lane scalars of the 8 blocks without lanes,
    which no pass reads; ours has only the 18 of blocks 8 to 10."""
    counts = []
    for on in (1, 0):
        with torch.device("meta"):
            model = tg.GPT(load(ASYM_LOGIT_RESCALE=on).cfg)
        counts.append(sum(p.numel() for p in model.parameters()))
    lanes = [p.numel() for name, p in model.named_parameters() if name.endswith("lane_mix")]
    assert counts == [35_945_673 - 48, 35_945_671 - 48] and lanes == [6, 6, 6]
    assert sum(p.numel() for n, p in model.named_parameters() if ".gate." in n) == 1056
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith("smear.")) == 13


# ---- depth recurrence


def test_the_plans_before_and_after_the_switch():
    cfg = load().cfg
    plain, looped = tg.layer_plan(cfg, looped=False), tg.layer_plan(cfg, looped=True)
    assert [s.block for s in plain] == list(range(11))
    assert [s.skip for s in plain] == [None] * 5 + [0, 1, 2, 3, 4, None]
    assert [s.block for s in looped] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [s.skip for s in looped] == [None] * 8 + [0, 1, 2, 3, 4, 5, 6, 7, None]
    saved, pairs = [], []
    for s in looped:
        pairs += [(s.block, saved.pop())] if s.skip is not None else []
        saved += [s.block] if s.save else []
    assert pairs == list(zip([5, 3, 4, 5, 6, 7, 8, 9], [4, 3, 5, 4, 3, 2, 1, 0], strict=True)) and not saved
    assert tg.layer_plan(load(NUM_LOOPS=0).cfg) == plain


# ---- lanes, gates, softcap


def test_the_softcap_of_two_sides_equals_one_until_its_scalars_move():
    plain = build(noise=0.3)
    model = like(build(asym_logit_rescale=True), plain)
    ids = tokens()
    assert torch.equal(model.nll(ids[:, :-1], ids[:, 1:]), plain.nll(ids[:, :-1], ids[:, 1:]))
    caps = model.softcap.caps
    assert not caps.requires_grad and caps.store == "control" and "softcap.caps" in model.state_dict()
    with torch.no_grad():
        caps.copy_(torch.tensor([20.0, 40.0]))
    z = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0])
    c = torch.tensor([40.0, 40.0, 20.0, 20.0, 20.0])
    assert torch.allclose(model.softcap(z), c * torch.tanh(z / c))


def test_the_gradient_of_the_two_sided_cap():
    softcap = tg.Softcap(model_config(asym_logit_rescale=True)).double()
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    caps = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    call = torch.func.functional_call
    assert torch.autograd.gradcheck(lambda z, caps: call(softcap, {"caps": caps}, (z,)), (z, caps))


# ---- mistakes

BAD = [
    ({"num_loops": 1, "loop_start": 3, "loop_end": 5}, "NUM_LOOPS=1 through LOOP_START=3 to LOOP_END=5: expected rising block numbers of 0 to 3"),
    ({"num_loops": 1, "loop_start": 2, "loop_end": 1}, "LOOP_START=2 to LOOP_END=1: expected rising"),
    ({**LOOPS, "parallel_start_layer": 2}, "reaches into the lanes: PARALLEL_START_LAYER=2 must lie above LOOP_END"),
    ({**LOOPS, "encoder_recurrence": True}, "NUM_LOOPS=2 and ENCODER_RECURRENCE=1 both repeat blocks"),
    ({"encoder_recurrence": True, "parallel_start_layer": 1}, "ENCODER_RECURRENCE=1 repeats blocks with lanes"),
    ({"parallel_start_layer": 4}, "PARALLEL_START_LAYER=4 is no block with NUM_LAYERS=4"),
    ({"attn_gate": "sparse", "gate_window": 33}, "GATE_WINDOW=33 is wider than the model: MODEL_DIM=32"),
    ({"smear": True, "smear_form": "window", "gate_window": 40}, "GATE_WINDOW=40 is wider than the model"),
]  # fmt: skip


@pytest.mark.parametrize("knobs, message", BAD, ids=[m for _, m in BAD])
def test_a_combination_that_makes_no_sense_is_refused(knobs, message):
    with pytest.raises(tg.ConfigError) as error:
        model_config(**knobs)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_all_mistakes_are_reported_at_once():
    env = {"NUM_LAYERS": "4", "GATE_WINDOW": "900", "EMA_DECAYS": ".9,.99", "MODEL_DIM": "256"}
    with pytest.raises(tg.ConfigError) as error:
        load(**env)
    named = sorted(re.match(r"[A-Z_]+", line).group() for line in str(error.value).splitlines())
    assert named == ["EMA_DECAYS", "GATE_WINDOW", "NUM_LOOPS", "PARALLEL_START_LAYER"]
    assert (
        "EMA_DECAYS='.9,.99': expected nothing: choosing between averages gained nothing; EMA_DECAY keeps one"
        in str(error.value)
    )
    with pytest.raises(tg.ConfigError, match="ENABLE_LOOPING_AT=1.5: expected 0 to 1"):
        load(ENABLE_LOOPING_AT="1.5")


# ---- runs


NARROW = {"MODEL_DIM": 32, "NUM_HEADS": 2, "NUM_KV_HEADS": 1}


def frontier_env(data, folder, **changes) -> dict[str, str]:
    """The recipe at 4 blocks of 256, one looped pass, lanes in the last; 6 steps, the loops from the third on."""
    sizes = {"RECIPE": "frontier", "NUM_LAYERS": 4, "MODEL_DIM": 256, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "MLP_MULT": 2,
             "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2, "PARALLEL_START_LAYER": 3, "EVAL_SEQ_LEN": 48, "EVAL_STRIDE": 48,
             "TTT_ENABLED": 0, "NGRAM_TILT_ENABLED": 0,
             "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 128, "GPTQ_N_SAMPLES": 4, "TARGET_BYTES": 0, "WARMUP_STEPS": 2,
             "QUANT_MIN_NUMEL": 1000, "NGRAM_SCORE": "off", "VAL_TOKENS": 600}  # fmt: skip
    return tiny_env(data, folder, **{**sizes, **changes})


def test_a_run_of_the_recipe_from_end_to_end(data, tmp_path, script):
    """Trains through the switch, fills its bytes, reloads, trains by document while it scores, scores the same in a fresh
    process, and passes the audit."""
    env = frontier_env(
        data, tmp_path, RUN_ID="f", EVAL_STRIDE=0, TTT_ENABLED=1, TTT_EVAL_SEQ_LEN=48, TTT_CHUNK_SIZE=16, TTT_LORA_RANK=2, TTT_BATCH_SIZE=4,
        NGRAM_TILT_ENABLED=1, NGRAM_TILT_ORDER=3, NGRAM_TILT_THRESHOLD=0.4, NGRAM_SCORE="exact", NGRAM_ORDER=4, TARGET_BYTES=112_000, **NARROW,
    )  # fmt: skip
    result = script(env)
    assert result.status == 0, result.err
    switch = [e for e in events(env, "switch") if e["name"] == "loop"]
    assert [(e["step"], e["value"]) for e in switch] == [(3, True)]  # ENABLE_LOOPING_AT=.35 of 6 steps
    assert all(math.isfinite(loss) for loss in losses(env).values()) and len(losses(env)) == 6
    blob = (tmp_path / "f.pgz").read_bytes()
    stored = tg.unpack(blob, tg.model_layout(config(env), blob))[1]
    assert tg.read_header(blob).fields["looped"] is True and {s.trellis for s in stored.values()} == {0, 64}
    assert events(env, "pack")[0]["total_bytes"] <= 112_000
    assert [e["stage"] for e in events(env, "stage")] == ["roundtrip", "ttt", "tilt", "ngram"]
    assert "ttt: trained all weights on" in result.out and "evaluation projected: roundtrip " in result.out
    fresh = {name: env[name] for name in ("DATA_PATH", "LOG_DIR", "DEVICE", "ATTENTION", "VAL_TOKENS")}
    fresh["RUN_ID"] = "again"
    run_ranks({**fresh, "MODE": "eval", "ARTIFACT": str(tmp_path / "f.pgz")}, 1)
    assert score_of(fresh) == pytest.approx(score_of(env), abs=1e-6)
    less = {"RUN_ID": "audit", "VAL_TOKENS": 100, "PHASED_TTT_NUM_PHASES": 0, "EVAL_STAGES": "ngram"}
    audit = script(env, MODE="audit", ARTIFACT=tmp_path / "f.pgz", **less)
    assert audit.status == 0, audit.out + audit.err


def test_a_document_of_its_own_needs_no_mask(data, tmp_path):
    """Test-time training scores the same with and without DOC_MASK."""
    tokens = torch.randint(2, V, (200,), generator=torch.Generator().manual_seed(0))
    tokens[::40] = BOS
    text, scores = tg.ValidationText(tokens, torch.ones_like(tokens), complete=True), []
    for mask in (0, 1):
        env = frontier_env(data, tmp_path, TTT_ENABLED=1, TTT_EVAL_SEQ_LEN=48, TTT_CHUNK_SIZE=16, TTT_LORA_RANK=2,
                           DOC_MASK=mask, PHASED_TTT_NUM_PHASES=0, **NARROW)  # fmt: skip
        cfg = config(env)
        torch.manual_seed(0)
        model, run = tg.GPT(cfg), tg.Run(cfg, 0, 0, 1, 1)
        scores.append(tg.Evaluation(cfg, run, model, text).score("ttt").val_loss)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_run_that_ends_before_the_switch_scores_the_plan_it_trained(data, tmp_path, script):
    env = frontier_env(data, tmp_path, RUN_ID="p", ENABLE_LOOPING_AT=1, ITERATIONS=2, **NARROW)
    result = script(env)
    assert result.status == 0, result.err
    assert "the plain plan is scored: training ended before ENABLE_LOOPING_AT=1" in result.out
    blob = (tmp_path / "p.pgz").read_bytes()
    assert tg.read_header(blob).fields["looped"] is False
    again = {**env, "MODE": "eval", "ARTIFACT": str(tmp_path / "p.pgz"), "RUN_ID": "again"}
    assert script(again).status == 0 and score_of(again) == score_of(env)
    cfg = config(env)
    run = tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1)
    model = tg.load_model(cfg, run, blob)
    assert not model.looped
    ids = tokens(length=12)
    plain = model.features(ids)
    model.set_looped(True)
    assert not torch.allclose(plain, model.features(ids), atol=1e-4)
    header, stored = tg.unpack(blob, tg.model_layout(cfg, blob))
    with pytest.raises(tg.ArtifactError, match="'maybe' as its plan"):
        names = ("config", "tokenizer_sha256")
        tg.load_model(cfg, run, tg.pack(cfg, {**{n: header[n] for n in names}, "looped": "maybe"}, stored))


def test_a_resumed_run_keeps_its_averages_and_its_loops(data, tmp_path, script):
    env = frontier_env(data, tmp_path, EMA_DECAY="0.7", **NARROW)
    whole, halves = {**env, "RUN_ID": "whole"}, {**env, "RUN_ID": "halves", "CHECKPOINT_EVERY": "4"}
    assert script(whole).status == 0 and script(halves).status == 0
    again = script(halves, RESUME=str(tmp_path / "halves.ckpt" / "step_000004.pt"), FORCE=1)
    assert again.status == 0, again.err
    assert losses(halves) == losses(whole)
    assert (tmp_path / "halves.pgz").read_bytes() == (tmp_path / "whole.pgz").read_bytes()
