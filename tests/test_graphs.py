"""Every training and scoring graph compiles whole, in the form a GPU runs; all are made before the clocks, none inside them."""

from __future__ import annotations

import pytest
from test_recipes import small

import train_gpt as tg
from benchmarks.compile import gpu_form, outcomes, training

FEWER = {"NUM_LAYERS": 2, "TRAIN_SEQ_LEN": 16, "TRAIN_BATCH_TOKENS": 32, "EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 4, "VAL_BATCH_TOKENS": 32,
         "WARMUP_STEPS": 1}  # fmt: skip
LOOPED = {
    "NUM_LAYERS": 3,
    "LOOP_START": 1,
    "LOOP_END": 1,
    "PARALLEL_START_LAYER": 2,
    "TTT_ENABLED": 0,
    "EVAL_STRIDE": 0,
}


def shrunken(recipe: str) -> dict[str, str]:
    """A recipe of few blocks, and with QAT in the second half where it has none of its own."""
    own = {"VE_LAYERS": 1} if tg.RECIPES[recipe].get("VE_DIM") else LOOPED if recipe == "frontier" else {}
    qat = {} if tg.RECIPES[recipe].get("QAT") else {"QAT": "soft_round", "QAT_BITS": 6, "QAT_START_FRAC": 0.5}
    return small(recipe, **{**FEWER, **own, **qat})


# Graphs of training: without and with QAT; with it from the start; without it by both plans, with it by the looped one.
TRAINING = {"pr187": 1, "frontier": 3}


CASES = [*((recipe, {}) for recipe in sorted(tg.RECIPES)), ("baseline", {"DOC_MASK": 1, "MODE": "eval", "EVAL_STRIDE": 4}),
         ("frontier", {"MODE": "eval", "ARTIFACT": "a"}), ("frontier", {"DOC_MASK": 0}), ("pr850", {"MODE": "eval"}),
         ("pr850", {"DOC_MASK": 1})]  # fmt: skip


@pytest.mark.parametrize(("recipe", "knobs"), CASES, ids=[f"{r}{k or ''}" for r, k in CASES])
def test_a_recipe_compiles_whole_before_the_clocks(recipe, knobs):
    """Whatever the documents of the text that is scored."""
    env = {**shrunken(recipe), **{name: str(value) for name, value in knobs.items()}}
    found, cfg = list(outcomes(env, "aot_eager")), tg.load_config(env, has_gpu=lambda: False).cfg
    assert [o.stage for o in found] == ["training", *(s for s in cfg.stages if s in ("roundtrip", "sliding", "ttt"))]
    assert [o.primed for o in found] == [TRAINING.get(recipe, 2), *(1 for _ in found[1:])]
    assert not any(o.later for o in found)
    assert max(o.difference for o in found) < 2e-3


def test_each_length_of_a_schedule_is_one_graph_however_its_documents_lie():
    env = small("baseline", **FEWER, DOC_MASK=1, TRAIN_SEQ_SCHEDULE="8@0.4")
    with gpu_form():
        found = training(env, "aot_eager")
    assert (found.primed, found.later) == (2, 0) and found.difference < 2e-3
