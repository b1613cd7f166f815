"""Section 1: every knob declared once, bounded, read, documented; mistakes caught all at once, by name."""

from __future__ import annotations

import ast
import contextlib
import math
import re

import pytest
from conftest import SCRIPT

import train_gpt as tg

NO_GPU = {"has_gpu": lambda: False}
BASE = {"RECIPE": "baseline"}


def load(**env: str) -> tg.LoadedConfig:
    return tg.load_config(env, **NO_GPU)


def message(**env: str) -> str:
    with pytest.raises(tg.ConfigError) as error:
        load(**{**BASE, **env})
    return str(error.value)


# ---- precedence and sources


def test_environment_beats_recipe_beats_default():
    loaded = load(RECIPE="cpu", NUM_LAYERS="3")
    assert (loaded.cfg.num_layers, loaded.source["NUM_LAYERS"]) == (3, "env")
    assert (loaded.cfg.model_dim, loaded.source["MODEL_DIM"]) == (tg.RECIPES["cpu"]["MODEL_DIM"], "recipe cpu")
    assert (loaded.cfg.rope_base, loaded.source["ROPE_BASE"]) == (10000.0, "default")
    assert set(loaded.source) == set(tg.FIELDS)


@pytest.mark.parametrize("env, gpu, recipe", [
    ({}, False, "cpu"),
    ({}, True, tg.GPU_RECIPE),
    ({"DEVICE": "cpu"}, True, "cpu"),
    ({"RECIPE": "pr164"}, False, "pr164"),
])  # fmt: skip
def test_the_recipe_is_chosen_by_the_machine_and_the_log_can_say_why(env, gpu, recipe):
    loaded = tg.load_config(env, has_gpu=lambda: gpu)
    assert loaded.cfg.recipe == recipe
    assert (loaded.recipe_reason == "RECIPE is set") == ("RECIPE" in env)
    assert loaded.source["RECIPE"] == ("env" if "RECIPE" in env else "default")


def test_an_artifact_header_stands_between_defaults_and_environment():
    header = {"RECIPE": "cpu", "NUM_LAYERS": 4, "EVAL_STRIDE": 64}
    loaded = tg.load_config({"EVAL_STRIDE": "32"}, header, **NO_GPU)
    assert (loaded.cfg.num_layers, loaded.source["NUM_LAYERS"]) == (4, "artifact")
    assert (loaded.cfg.eval_stride, loaded.source["EVAL_STRIDE"]) == (32, "env")
    # the recipe's other values are the artifact's business alone: what it does not name had its default
    assert loaded.cfg.model_dim == tg.FIELDS["MODEL_DIM"].default and loaded.cfg.recipe == "cpu"


@pytest.mark.parametrize("header, text", [({"NUM_LAYERS": 4}, "4"), ({}, "9")])
def test_what_shapes_the_model_cannot_be_changed_under_an_artifact(header, text):
    with pytest.raises(tg.ConfigError, match=f"NUM_LAYERS=5: the artifact was made with {text}; unset NUM_LAYERS"):
        tg.load_config({"NUM_LAYERS": "5"}, {"RECIPE": "baseline", **header}, **NO_GPU)


@pytest.mark.parametrize("name, value", [
    ("NUM_LAYERS", "9"), ("NUM_LAYERS", 9.5), ("NUM_LAYERS", 10**9), ("NUM_LAYERS", True), ("NUM_LAYERS", None),
    ("MLP_MULT", float("nan")), ("MLP_MULT", [2]), ("SMEAR", 1), ("LN_SCALE", "sideways"), ("VE_LAYERS", 3),
    ("RECIPE", ["cpu"]), ("RECIPE", "../elsewhere"), ("OUTPUT", "train_gpt.py"), ("FORCE", True), ("LOG_DIR", "elsewhere"),
    ("RUN_ID", "other"), ("DATA_PATH", "elsewhere"), ("ARTIFACT_LIMIT", 10**9),
])  # fmt: skip
def test_a_hostile_header_is_refused_by_name(name, value):
    with pytest.raises(tg.ConfigError, match=name):
        tg.load_config({}, {"RECIPE": "baseline", name: value}, **NO_GPU)


def test_every_recipe_sets_only_known_knobs_to_values_in_bounds():
    for recipe, values in tg.RECIPES.items():
        for name, value in values.items():
            assert tg.check_value(name, value) == value
        assert load(RECIPE=recipe).cfg.recipe == recipe


# ---- mistakes


@pytest.mark.parametrize("env, words", [
    ({"NUM_LAYERS": "four"}, ["NUM_LAYERS='four'", "an integer"]),
    ({"NUM_LAYERS": "4.0"}, ["NUM_LAYERS='4.0'", "an integer"]),
    ({"MATRIX_LR": "fast"}, ["MATRIX_LR='fast'", "a number"]),
    ({"MATRIX_LR": "nan"}, ["MATRIX_LR=nan"]),
    ({"MATRIX_LR": "inf"}, ["MATRIX_LR=inf"]),
    ({"SMEAR": "yes"}, ["SMEAR='yes'", "0 or 1"]),
    ({"MUON_BACKEND_STEPS": "11"}, ["MUON_BACKEND_STEPS=11", "1 to 10 iterations"]),
    ({"SEED": "-1"}, ["SEED=-1", "0 to "]),
    ({"TRAIN_LOG_EVERY": "0"}, ["TRAIN_LOG_EVERY=0", "at least 1 steps"]),
    ({"MODE": "trian"}, ["MODE='trian'", "train, eval, audit"]),
    ({"ATTENTION": ""}, ["ATTENTION=''", "one of auto"]),
    ({"NGRAM_SCORE": ""}, ["NGRAM_SCORE=''", "expected off or a list of exact"]),
    ({"ATTENTION": "fast"}, ["ATTENTION='fast'", "auto, fa3, fa2, sdpa"]),
    ({"RECIPE": "pr999"}, ["RECIPE='pr999'", *tg.RECIPES]),
    ({"ATTN_BITS": "9"}, ["ATTN_BITS='9'", "2, 3, 4, 5, 6, 7, 8, 16, 32"]),
    ({"MODEL_DIM": "100"}, ["MODEL_DIM=100 is not a multiple of NUM_HEADS=8"]),
    ({"NUM_KV_HEADS": "3"}, ["NUM_HEADS=8 is not a multiple of NUM_KV_HEADS=3"]),
    ({"MODEL_DIM": "24"}, ["MODEL_DIM=24 / NUM_HEADS=8", "odd head width"]),
    ({"ROPE_DIMS": "7"}, ["ROPE_DIMS=7", "even number", "64"]),
    ({"ROPE_DIMS": "66"}, ["ROPE_DIMS=66", "at most the head width 64"]),
    ({"ROPE_TRAIN_LEN": "64", "ROPE_DIMS": "2"}, ["ROPE_TRAIN_LEN=64", "more than 2"]),
    ({"XSA_LAST_N": "10"}, ["XSA_LAST_N=10 exceeds NUM_LAYERS=9"]),
    ({"VE_DIM": "8", "VE_LAYERS": "one"}, ["VE_LAYERS='one'", "0 to 8"]),
    ({"VE_DIM": "8", "VE_LAYERS": "9"}, ["VE_LAYERS='9'", "0 to 8"]),
    ({"VE_DIM": "8"}, ["VE_DIM=8 with VE_LAYERS=''"]),
    ({"BIGRAM_VOCAB_SIZE": "1"}, ["BIGRAM_VOCAB_SIZE=1", "at least 2"]),
    ({"ADAPTER_B_INIT": "published"}, ["ADAPTER_B_INIT='published': expected zero", "base"]),
    ({"MLP_MULT": "3", "MLP_MULT_ENCODER": "2"}, ["MLP_MULT_ENCODER='2': expected 0 or MLP_MULT=3"]),
    ({"GATED_ATTN": "1"}, ["GATED_ATTN='1': expected 0", "ATTN_GATE=input"]),
    ({"ENCODER_RECURRENCE": "1", "NUM_LAYERS": "1"}, ["ENCODER_RECURRENCE=1", "NUM_LAYERS=1"]),
    ({"VALUE_RESIDUAL": "softmax", "NUM_LAYERS": "1"}, ["VALUE_RESIDUAL=softmax", "at least 2"]),
    ({"PROG_SEQ_ENABLED": "1", "PROG_SEQ_FRACS": "0.5"}, ["PROG_SEQ_LENS='512,1024'", "PROG_SEQ_FRACS='0.5'"]),
    ({"PROG_SEQ_ENABLED": "1", "PROG_SEQ_FRACS": "0.6,0.5"}, ["PROG_SEQ_FRACS='0.6,0.5'", "rising"]),
    ({"PROG_SEQ_ENABLED": "1", "PROG_SEQ_FRACS": "0.5,0.5"}, ["PROG_SEQ_FRACS='0.5,0.5'", "rising"]),
    ({"PROG_SEQ_ENABLED": "yes"}, ["PROG_SEQ_ENABLED='yes': expected 0 or 1"]),
    ({"TRAIN_SEQ_SCHEDULE": "512@0.6,1024@0.5"}, ["TRAIN_SEQ_SCHEDULE='512@0.6,1024@0.5'", "rising"]),
    ({"TRAIN_SEQ_SCHEDULE": "512@0.5,1024@0.5"}, ["TRAIN_SEQ_SCHEDULE='512@0.5,1024@0.5'", "rising"]),  # 1024 would never be used
    ({"TRAIN_SEQ_SCHEDULE": "512@0,1024@1"}, ["TRAIN_SEQ_SCHEDULE='512@0,1024@1'", "rising"]),
    ({"TRAIN_BATCH_TOKENS": "2000"}, ["TRAIN_BATCH_TOKENS=2000", "sequence length 1024", "nearest: 2048"]),
    ({"TRAIN_BATCH_TOKENS": "512"}, ["TRAIN_BATCH_TOKENS=512", "nearest: 1024"]),
    ({"LOG_DIR": "$HOME/l"}, ["LOG_DIR='$HOME/l'", "the shell has not replaced $HOME", "write the path itself"]),
    ({"DATA_PATH": "/x/${SCRATCH}"}, ["DATA_PATH='/x/${SCRATCH}'", "not replaced ${SCRATCH}"]),
    ({"ARTIFACT": "%TEMP%/a.pgz"}, ["ARTIFACT='%TEMP%/a.pgz'", "not replaced %TEMP%"]),
    ({"MLP_MULT": "0.01", "MODEL_DIM": "32"}, ["MLP_MULT=0.01 leaves no hidden unit at MODEL_DIM=32"]),
    ({"SWA_EVERY": "10", "SWA_SOURCE": "ema"}, ["SWA_SOURCE=ema needs EMA_DECAY"]),
    ({"ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "0"}, ["MAX_WALLCLOCK_SECONDS=0 and ITERATIONS=0"]),
    ({"RESUME": "auto"}, ["RESUME=auto needs RUN_ID"]),
    ({"EVAL_STRIDE": "2048"}, ["EVAL_STRIDE=2048 exceeds", "1024"]),
    ({"EVAL_STAGES": "roundtrip,slding"}, ["EVAL_STAGES='roundtrip,slding'", "expected auto or a list of roundtrip"]),
    ({"EVAL_STAGES": "auto,roundtrip"}, ["EVAL_STAGES='auto,roundtrip'", "expected auto or a list"]),
    ({"PROG_SEQ_ENABLED": "2"}, ["PROG_SEQ_ENABLED='2'", "expected 0 or 1"]),
    ({"SCORE_STAGE": "sliding"}, ["SCORE_STAGE=sliding", "switched on: roundtrip"]),
    ({"GATED_ATTN_BIAS_INIT": "x"}, ["GATED_ATTN_BIAS_INIT='x': ATTN_GATE_INIT='x'", "a number"]),
    ({"TARGET_BYTES": "1", "MAX_WALLCLOCK_SECONDS": "8"}, ["GPTQ_RESERVE_SECONDS=8", "MAX_WALLCLOCK_SECONDS=8", "lower"]),
    ({"VE_ENABLED": "yes"}, ["VE_ENABLED='yes'", "expected 0 or 1"]),
    ({"RECIPE": "cpu", "QUANT_TRELLIS": "6"}, ["QUANT_TRELLIS"]),
    ({"RECIPE": "cpu", "QUANT_TRELLIS": "8", "COMPRESSOR": "zstd"}, ["needs COMPRESSOR=entropy"]),
    ({"RECIPE": "cpu", "QUANT_TRELLIS": "4", "PRUNE_FRAC": "0.1", "PRUNE_SCOPE": "global"}, ["PRUNE_SCOPE=tensor"]),
    ({"RECIPE": "cpu", "AWQ_LITE_ENABLED": "1"}, ["AWQ_LITE_ENABLED='1': expected 0: with QUANT_TRELLIS every column has its own step"]),
    ({"RECIPE": "cpu", "LQER_ASYM_ENABLED": "0"}, ["LQER_ASYM_ENABLED='0': expected 1"]),
    ({"RECIPE": "cpu", "GPTQ_CALIBRATION": "self"}, ["GPTQ_CALIBRATION='self': expected train"]),
    ({"RECIPE": "cpu", "LQER_ENABLED": "2"}, ["expected 0 or 1"]),
    ({"NGRAM_SCORE": "exactly"}, ["NGRAM_SCORE='exactly'"]),
    ({"NGRAM_ORDER": "1"}, ["NGRAM_ORDER=1"]),
    ({"NGRAM_BUCKETS": "1000"}, ["nearest below: 512"]),
    ({"NGRAM_MIX": "mixture"}, ["NGRAM_MIX='mixture': expected cascade: every other way"]),
    ({"EVAL_STRIDE": "64", "EVAL_STAGES": "sliding,tilt"}, ["EVAL_STAGES=sliding,tilt: stage tilt needs NGRAM_TILT_ENABLED=1"]),
    ({"NGRAM_CLAIM": "pr1"}, ["NGRAM_CLAIM"]),
    ({"NGRAM_TABLE": "all"}, ["NGRAM_TABLE='all': expected none or a list of pr1095, exact"]),
    ({"NGRAM_SCORE": "claimed", "NGRAM_CLAIM": "pr1095"}, ["NGRAM_TABLE=none lacks pr1095"]),
    ({"EVAL_STAGES": "table"}, ["stage table needs NGRAM_TABLE=exact"]),
    ({"NGRAM_TABLE_BYTES": "10"}, ["NGRAM_TABLE_BYTES=10"]),
    ({"RECIPE": "pr1095", "NGRAM_ORDERS": "2,3"}, ["NGRAM_ORDERS='2,3': expected 2,3,4,5,6,7: the published scorer is kept"]),
    ({"RECIPE": "pr187", "RUN_CONFIG": "B"}, ["RUN_CONFIG='B': expected A or C"]),
    ({"RECIPE": "pr850", "VE_ENABLED": "yes"}, ["VE_ENABLED='yes': expected 0 or 1"]),
    ({"RECIPE": "pr850", "LATE_QAT_THRESHOLD": "late"}, ["LATE_QAT_THRESHOLD='late': expected a number"]),
    ({"RECIPE": "pr850", "NGRAM_EVAL_ORDER": "7"}, ["NGRAM_EVAL_ORDER='7': expected 9: the published scorer is kept as it was"]),
    ({"VE_ENABLED": "1"}, ["VE_DIM=128 with VE_LAYERS"]),
    ({"TTT_ENABLED": "1", "TTT_RESET": "none", "TTT_LORA_BLOCKS": "10"}, ["TTT_LORA_BLOCKS=10 exceeds NUM_LAYERS=9"]),
    *(({"TRAIN_SEQ_SCHEDULE": text}, ["TRAIN_SEQ_SCHEDULE='"]) for text in ("8", "8@0.6,16@0.3", "x@0.3", "4@0.3", "8@1.2", "8@0.3@0.4", "8@nan")),
    *(({"RECIPE": "frontier", name: value}, [f"{name}='{value}': expected"]) for name, value in (
        ("GATED_ATTN_ENABLED", "1"), ("ROPE_YARN", "1"), ("PARALLEL_FINAL_LANE", "attn"), ("MUON_HUBER_WD", ".1"),
        ("QK_GAIN_INIT_SCHEDULE", "5,4"), ("GPTQ_CALIBRATION_MODE", "doc_start"), ("PREQUANT_ONLY", "1"))),
])  # fmt: skip
def test_a_bad_value_is_named_with_what_would_do(env, words):
    text = message(**env)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) == 1, text


def test_all_bad_knobs_are_reported_at_once():
    lines = message(RECIPE="best", NUM_LAYERS="0", MATRIX_LR="big", SMEAR="maybe", NUM_LAYRES="3").splitlines()
    named = [re.match(r"[A-Z_]+", line).group() for line in lines]
    assert sorted(named) == ["MATRIX_LR", "NUM_LAYERS", "NUM_LAYRES", "RECIPE", "SMEAR"]
    assert len(message(MODEL_DIM="100", EVAL_STRIDE="4096", RESUME="auto").splitlines()) == 3


# ---- names that are no knobs


@pytest.mark.parametrize("typo, knob", [
    ("NUM_LAYER", "NUM_LAYERS"), ("NUMLAYERS", "NUM_LAYERS"), ("NUM_LAYRES", "NUM_LAYERS"), ("MODEL_DIMS", "MODEL_DIM"),
    ("MATIX_LR", "MATRIX_LR"), ("MUON_MOMENTM", "MUON_MOMENTUM"), ("EVAL_STIDE", "EVAL_STRIDE"), ("ITERATION", "ITERATIONS"),
    ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"), ("VAL_LOSS_EVRY", "VAL_LOSS_EVERY"), ("DATAPATH", "DATA_PATH"),
    ("WARMDOWN_ITER", "WARMDOWN_ITERS"), ("RECIPES", "RECIPE"), ("SEEED", "SEED"), ("SED", "SEED"), ("MDOE", "MODE"),
    ("XMODE", "MODE"), ("VE_ENABLE", "VE_ENABLED"),
])  # fmt: skip
def test_a_misspelt_knob_is_an_error_that_names_the_right_one(typo, knob):
    assert message(**{typo: "1"}) == f"{typo} is no knob; did you mean {knob}?"


def test_most_single_typos_of_all_knobs_are_caught():
    def typos(name: str) -> set[str]:
        middle = len(name) // 2
        swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
        return {name[:-1], name + "S", name[:middle] + name[middle + 1 :], swapped} - set(tg.FIELDS)

    made = [typo for name in tg.FIELDS if len(name) > 4 for typo in typos(name)][::3]
    assert len(made) > 150 and all(tg.nearest_knob(typo)[1] for typo in made if typo not in tg.FOREIGN)


def test_one_edit_is_one_insertion_deletion_substitution_or_swap():
    def edits(word: str) -> set[str]:
        cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
        return {
            w
            for a, b in cuts
            for w in (a + "X" + b, a + b[1:], a + "X" + b[1:] if b else a + "X", a + b[1:2] + b[:1] + b[2:])
        } - {word}

    for word in ("SEED", "TOP_P", "AA", "ABAB"):
        one = edits(word)
        assert all(tg.one_edit_apart(word, w) and tg.one_edit_apart(w, word) for w in one)
        two = {w for near in one for w in edits(near) if abs(len(w) - len(word)) > 1}
        assert two and not any(tg.one_edit_apart(word, w) for w in two)
    for a, b in (("SEED", "SEED"), ("SEED", "DEER"), ("ABCD", "BADC"), ("ABC", "CAB")):
        assert not tg.one_edit_apart(a, b)


@pytest.mark.parametrize("name, knob", [
    ("MAX_WALLCLOCK_SECS", "MAX_WALLCLOCK_SECONDS"), ("num_layers", "NUM_LAYERS"), ("NGRAM_ALPHA_MIN", "NGRAM_ALPHA"), ("TTT_STEPS", "TTT_"),
    ("DATASET", "DATA_PATH"), ("RUNID", "RUN_ID"), ("LR", "MATRIX_LR"), ("LEARNING_RATE", "MATRIX_LR"), ("EPOCHS", "ITERATIONS"),
    ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"), ("SEQ_LEN", "TRAIN_SEQ_LEN"), ("D_MODEL", "MODEL_DIM"), ("N_LAYER", "NUM_LAYERS"),
])  # fmt: skip
def test_what_is_merely_alike_or_the_name_of_another_trainer_is_a_notice(name, knob):
    loaded = load(**BASE, **{name: "0.1"})
    assert loaded.cfg == load(**BASE).cfg
    assert [n for n in loaded.notices if n.startswith(f"{name} is no knob and is ignored (the nearest knob is {knob}")]


@pytest.mark.parametrize("name", ["ARTIFACT_DIR", "DATA_DIR", "RUN_CONFIG"])
def test_a_published_name_of_another_recipe_is_a_notice(name):
    loaded = load(**BASE, **{name: "x"})
    assert loaded.cfg == load(**BASE).cfg
    assert loaded.notices == [f"{name} is a name of another recipe and is ignored with RECIPE=baseline"]


def test_names_of_other_trainers_lead_to_knobs():
    assert set(tg.ELSEWHERE.values()) <= tg.FIELDS.keys() and not tg.ELSEWHERE.keys() & tg.FIELDS.keys()


ENVIRONMENTS = re.findall(
    r"^\[(.+)\]\n((?:[^\[\n].*\n)+)", (SCRIPT.parent / "tests" / "environments.txt").read_text(), re.M
)


@pytest.mark.parametrize(
    "names", [names.split() for _, names in ENVIRONMENTS], ids=[title for title, _ in ENVIRONMENTS]
)
def test_the_environment_of_other_programs_is_left_alone(names):
    loaded = load(**BASE, **dict.fromkeys({*names} - tg.FIELDS.keys(), "1"))
    assert loaded.cfg == load(**BASE).cfg and not loaded.notices


@pytest.mark.parametrize("name, text, value", [
    *(("SMEAR", text, text.lower() in ("1", "true")) for text in ("0", "1", "true", "True", "TRUE", "false", "False", "FALSE", "tRuE")),
    ("COMPILE", "False", "0"), ("COMPILE", "true", "1"), ("COMPILE", "auto", "auto"),
])  # fmt: skip
def test_booleans_in_any_case(name, text, value):
    assert getattr(load(**BASE, **{name: text}).cfg, name.lower()) == value


def test_published_switches_are_booleans_in_any_case_too():
    for text in ("1", "true", "True"):
        assert load(**BASE, VRL_ENABLED=text).cfg.value_residual == "softmax"
        assert load(**BASE, EMA_ENABLED=text).cfg.ema_decay == 0.997
    assert load(**BASE, EMA_DECAY="0.9", EMA_ENABLED="FALSE").cfg.ema_decay == 0


# ---- paths


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [name for name, f in tg.FIELDS.items() if f.metadata["unit"] in ("file", "folder")] + ["RESUME"]
    assert {"LOG_DIR", "DATA_PATH", "TOKENIZER_PATH", "ARTIFACT"} <= set(paths)
    for name in paths:
        assert getattr(load(**BASE, **{name: "~/l"}).cfg, name.lower()) == f"{tmp_path}/l"
        assert getattr(load(**BASE, **{name: "a/~/l"}).cfg, name.lower()) == "a/~/l"
        text = message(**{name: "~nobody.of.that.name/l"})
        assert f"{name}='~nobody.of.that.name/l': no such home folder" in text


@pytest.mark.parametrize("run_id", ["../x", "/tmp/x", "a/b", "a/../../b", "..//x", "a\nb"])
def test_a_run_id_is_a_name_and_no_path(run_id):
    text = message(RUN_ID=run_id)
    assert f"RUN_ID={run_id!r}: expected a name" in text and len(text.splitlines()) == 1
    assert load(**BASE, RUN_ID="v1.2_lr-0.04~..").cfg.run_id == "v1.2_lr-0.04~.."


def test_every_published_name_leads_to_knobs_that_exist():
    for recipe, table in tg.PUBLISHED_NAMES.items():
        for name, fate in table.items():
            for value in ("0", "1", "C"):
                with contextlib.suppress(tg.ConfigError):
                    if not isinstance(fate, tg.Dead):
                        assert {knob for knob, _, _ in tg.settings_of(name, value, fate, {})} <= tg.FIELDS.keys(), (
                            recipe,
                            name,
                        )


# ---- nothing declared in vain


def knob_reads() -> set[str]:
    """Attributes read anywhere in the script but for Config's own declarations."""
    tree = ast.parse(SCRIPT.read_text())
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    # policies by role: getattr(cfg, f"{role}_bits") and the like
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[-1], ast.Constant):
            suffix = str(node.values[-1].value)
            found |= {
                name.lower()
                for name in tg.FIELDS
                if re.fullmatch(r"_[a-z_]+", suffix) and name.lower().endswith(suffix)
            }
    return found


def test_every_knob_is_read():
    read = knob_reads()
    unread = {name for name in tg.FIELDS if name.lower() not in read}
    assert not unread, f"declared and never read: {sorted(unread)}"


def test_every_knob_has_a_text_and_a_default_within_its_bounds():
    for name, f in tg.FIELDS.items():
        assert len(f.metadata["doc"]) >= 5, name
        assert tg.check_value(name, f.default) == f.default
        assert f.type in tg.TYPES, name


# ---- views


def test_help_lists_every_knob_once_in_its_section(script):
    text = script({}, "--help").out
    shown = re.findall(r"^  ([A-Z][A-Z0-9_]+)=", text, re.M)
    assert sorted(shown) == sorted(tg.FIELDS)
    sections = re.findall(r"^\[(.+)\]$", text, re.M)
    banners = re.findall(r"^# ==== (\d+ [A-Z]+)", SCRIPT.read_text(), re.M)
    heads = re.findall(r"^    # ---- (.+)\n    (\w+):", SCRIPT.read_text(), re.M)
    assert {name.upper(): section for section, name in heads} == tg.GROUPS
    assert sections == [b for b in banners if b in sections] and len(sections) >= 8
    assert "MUON_BACKEND_STEPS=5 (1 to 10 iterations)" in text and "GRAD_CLIP_NORM=0.0 (at least 0)" in text
    assert "ATTN_GATE=none (none|input|sparse)" in text and "most optimizer steps; 0: no limit" in text


def test_dump_shows_value_and_source_and_feeds_itself(script):
    text = script({"RECIPE": "cpu", "NUM_LAYERS": "3", "DEVICE": "cpu"}, "--dump-config").out
    lines = dict(re.findall(r"^([A-Z0-9_]+)=(.*?)  # (?:.*)$", text, re.M))
    assert "NUM_LAYERS=3  # env" in text and f"MODEL_DIM={tg.RECIPES['cpu']['MODEL_DIM']}  # recipe cpu" in text
    assert lines.keys() == tg.FIELDS.keys()
    assert "# notice: LR is no knob" in script({"RECIPE": "cpu", "LR": "1"}, "--dump-config").out
    again = tg.load_config(lines, **NO_GPU).cfg
    assert again == load(RECIPE="cpu", NUM_LAYERS="3", DEVICE="cpu").cfg


def test_a_wrong_argument_is_a_mistake(script):
    result = script({}, "--halp")
    assert result.status == 2 and "--halp" in result.err and "--help" in result.err


def test_baseline_is_the_challenges_baseline():
    cfg = load(RECIPE="baseline").cfg
    assert (cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.mlp_mult) == (9, 512, 8, 4, 2.0)
    d, kv, hidden = 512, 4 * 64, 1024
    block = 2 * d * d + 2 * d * kv + 2 * d * hidden + 2 * d + 2 * d + 8  # matrices, scales, mix, q_gain
    assert 1024 * d + 9 * block + 4 * d == 17_059_912
    assert math.isclose(cfg.tied_embed_lr, 0.05) and cfg.grad_clip_norm == 0 and cfg.iterations == 20000


@pytest.mark.parametrize("mode", ["pack_code", "plan", "codec", "sample", "explain"])
def test_a_mode_that_is_a_program_names_it(script, mode):
    result = script({"MODE": mode, "INPUT": "notes.txt", "ARTIFACT": "a.pgz", "TEMPERATURE": "0.8"})
    assert result.status == 2 and (SCRIPT.parent / "tools" / f"{mode}.py").is_file()
    assert mode in result.err.split("expected")[1] and "python tools/NAME.py" in result.err


def test_former_knobs_are_at_most_a_notice():
    names = "INPUT OUTPUT PROMPT CODEC_LANES EXPLAIN_TOKENS SAMPLE_TOKENS SAMPLE_NGRAM TEMPERATURE TOP_P".split()
    loaded = tg.load_config({"RECIPE": "cpu", **dict.fromkeys(names, "1")})
    assert loaded.cfg == tg.load_config({"RECIPE": "cpu"}).cfg


def test_the_published_curriculum_is_a_schedule():
    def schedule(**env) -> str:
        return tg.load_config({"RECIPE": "pr850", **env}, has_gpu=lambda: False).cfg.train_seq_schedule

    assert schedule() == schedule(PROG_SEQ_ENABLED="0", PROG_SEQ_LENS="1") == schedule(PROG_SEQ_LENS="512") == ""
    assert schedule(PROG_SEQ_ENABLED="1") == "512@0.33,1024@0.55"
    assert schedule(PROG_SEQ_ENABLED="1", PROG_SEQ_LENS="256", PROG_SEQ_FRACS=".5") == "256@.5"
    assert schedule(PROG_SEQ_ENABLED="1", TRAIN_SEQ_SCHEDULE="512@0.1") == "512@0.1"  # ours wins
