"""Every training and scoring graph compiles whole, in the form a GPU runs; all are made before the clocks, none inside them."""

from __future__ import annotations

import pytest
import torch
from conftest import NoCompiler
from test_recipes import small

import train_gpt as tg
from benchmarks.compile import gpu_form, model_of, outcomes, random_tokens, scoring, training

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


@pytest.mark.parametrize("length", [16, 32])  # that of training and of the table of positions; the width of the network
def test_a_lora_a_document_is_one_graph_however_long_and_many_they_are(length):
    knobs = {"NUM_LAYERS": 1, "DOC_MASK": 1, "TTT_ENABLED": 1, "TTT_RESET": "document", "TTT_LORA_SITES": "q,mlp,head", "TTT_LORA_BLOCKS": 0,
             "TTT_LORA_RANK": 2, "TTT_EVAL_SEQ_LEN": length, "TTT_CHUNK_SIZE": 4, "TTT_BATCH_SIZE": 4}  # fmt: skip
    env = small("baseline", **{**FEWER, **knobs})
    with gpu_form():
        found = list(scoring(env, "aot_eager"))[-1]
    assert (found.stage, found.primed, found.later) == ("ttt", 1, 0) and found.difference < 2e-3


def no_forward(*_: object) -> None:
    raise NoCompiler


class NoBackward(torch.autograd.Function):
    """Passes a tensor on, and fails where its gradient is asked for."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx, dy):  # noqa: ARG004
        raise NoCompiler


@pytest.mark.parametrize(
    "kernel", [no_forward, lambda *args: NoBackward.apply(tg.last_logits(*args))], ids=["forward", "backward"]
)
def test_documents_outlive_a_failing_compiler(kernel):
    env = small(
        "baseline",
        **FEWER,
        TTT_ENABLED=1,
        TTT_RESET="document",
        TTT_EVAL_SEQ_LEN=16,
        TTT_CHUNK_SIZE=4,
        TTT_BATCH_SIZE=4,
        TTT_EPOCHS=2,
    )
    scores = []
    for compiled in (None, kernel):
        cfg, run, model = model_of(env)
        tokens = torch.from_numpy(random_tokens(cfg, 300))
        text = tg.ValidationText(tokens, torch.ones(len(tokens), dtype=torch.int64), complete=True)
        network = tg.Evaluation(cfg, run, model.eval(), text).network("ttt")
        network.compiled, notices = compiled, []
        run.notice = notices.append
        scores.append(network.score(tokens, 1, len(tokens)))
    assert torch.equal(*scores) and len(notices) == 1 and "no compiler" in notices[0]
