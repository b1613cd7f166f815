"""tools/plan.py: bytes, memory and FLOPs told before a run are those of the run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SEQ, config

import train_gpt as tg
from benchmarks import ttt
from tools import plan


@pytest.fixture
def tool(capsys, monkeypatch):
    """tool(*arguments, **environment) -> (status, stdout, stderr) of the plan."""

    def call(*arguments: str, **env: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name in tg.FIELDS:
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            status = plan.main(arguments)
        return status, *capsys.readouterr()

    return call


def test_plan_tells_sizes_memory_and_flops_without_data_or_training(tool, tmp_path):
    text = tool("--device", "cpu", RECIPE="baseline", DATA_PATH=str(tmp_path / "absent"))[1]
    assert "recipe baseline: 17,059,912 trainable parameters" in text
    matrices = 9 * (2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 1024)
    flops = 6 * (matrices + 1024 * 512) + 6 * 9 * 1024 * 512
    assert f"FLOPs: {flops:.3g} a token, {flops * 524288:.3g} a step of 524,288 tokens" in text
    small = 17_059_912 - matrices
    buffers = 2 * 1024 * 32  # the table of RoPE
    state = 4 * (3 * (matrices + small) + matrices + 2 * small + buffers) / 2**20
    assert f"{state:,.0f} MiB weights, gradients, optimizer, averages" in text
    assert "with one rank and 8,192 tokens at once" in text and "limit 16,000,000" in text
    assert "has no effect" in tool(RECIPE="pr850", TTT_MOMENTUM="0.9")[1]


def test_the_plan_for_a_gpu_needs_none_and_counts_what_a_fused_kernel_keeps(tool):
    def mebibytes(**knobs) -> list[int]:
        """Of state, with what a compiled pass holds, at an eager peak."""
        out = tool("--device", "cuda", RECIPE="pr164", MICRO_BATCH_TOKENS="98304", **knobs)[1]
        return [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) MiB", out)]

    state, fused, peak, *_ = mebibytes()
    assert fused == pytest.approx(16093, rel=0.1) and fused < peak  # the published peak
    wide = mebibytes(TRAIN_DTYPE="fp32")[1]
    assert 1.4 * (fused - state) < wide - state < 2 * (fused - state)  # logits are fp32 in both


def test_activations_are_what_autograd_keeps(tiny):
    """Against the tensors that a real forward saves."""
    cfg = config(tiny, ATTENTION="blocks")
    with torch.device("meta"):
        predicted, peak = plan.activation_bytes(cfg, tg.GPT(cfg), torch.device("cpu"), 4 * SEQ)
    model, kept = tg.GPT(cfg).place(torch.device("cpu"), tg.attend_blocks), {}
    ids = torch.zeros(4, SEQ, dtype=torch.int64)
    storage = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage())  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: storage(t) and t, lambda t: t):
        model.nll(ids, ids)
    real = sum(
        s.nbytes() for p, s in kept.items() if p not in {w.untyped_storage().data_ptr() for w in model.parameters()}
    )
    assert predicted == pytest.approx(real, rel=0.1) and peak > predicted


@pytest.mark.parametrize("bits", [5, 8])
def test_predicted_bytes_are_those_of_normal_weights_packed(tiny, bits):
    """Against the file's own account of its streams."""
    cfg = config(tiny, MODEL_DIM=128, ATTN_BITS=bits, MLP_BITS=bits, OUT_INIT="scaled")
    torch.manual_seed(0)
    named = {n: torch.randn(p.shape) * 0.02 for n, p in tg.GPT(cfg).named_parameters() if p.store in ("attn", "mlp")}
    store = {n: n.split(".")[2] for n in named}
    blob = tg.pack(cfg, {}, tg.quantize(cfg, named, store))
    policy = tg.Policy(cfg, named, store)
    predicted = sum(plan.predicted_bytes(policy, n, w) for n, w in named.items())
    assert predicted == pytest.approx(len(blob), rel=0.03)


def test_mistakes_are_one_message(tool):
    status, _, text = tool(RECIPE="none")
    assert status == 2 and text.startswith("error: RECIPE='none'") and text.count("\n") == 1
    status, _, text = tool(RECIPE="baseline", NUM_HEADS="5", MODE="plan")  # MODE is no business of the plan's
    assert status == 2 and text.startswith("error: MODEL_DIM=512 is not a multiple of NUM_HEADS=5\n")


def test_the_estimate_takes_knobs_and_counts_what_a_step_moves(monkeypatch, capsys):
    """512 documents of 480 targets in 36 batches, each of ten chunks or twenty; a step follows each but the last."""
    monkeypatch.setattr(ttt, "synthetic_lengths", lambda: np.full(512, 480))
    monkeypatch.setattr(ttt, "EvaluationPlan", lambda *_: SimpleNamespace(peaks={}))
    monkeypatch.setattr(ttt, "BANDWIDTH", 1e9)
    for chunk, steps in ((48, 9), (24, 19)):
        monkeypatch.setenv("TTT_CHUNK_SIZE", str(chunk))
        ttt.estimate()
        said = capsys.readouterr().out
        assert f"optimizer steps {36 * steps} " in said and "5,918,720 numbers each" in said
        assert f" its steps {36 * steps / 8 * 64 * 5_918_720 * 44 / 1e9:.0f} " in said
