"""The CUDA paths on a machine without CUDA: what the pretend GPU refuses, the script under its rules, and mistakes that it must catch."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from conftest import SCRIPT, SEQ, config, events, run_ranks, score_of, tiny_env
from fake_cuda import DeviceMismatch, FakeCuda
from test_recipes import small

import train_gpt as tg
from benchmarks.compile import attend_gpu
from tools.plan import EvaluationPlan, FlashFootprint, activation_bytes, state_bytes


@pytest.fixture
def gpu():
    with FakeCuda() as gpu:
        yield gpu
    assert not gpu.faults


# ---- the rules themselves: what CUDA refuses, what it lets pass

A = lambda: torch.randn(4, 4, device="cuda")  # noqa: E731
REFUSED = {
    "add": lambda: A() + torch.randn(4, 4),
    "mm": lambda: A() @ torch.randn(4, 4),
    "cat": lambda: torch.cat([A(), torch.randn(4, 4)]),
    "index on the GPU": lambda: torch.randn(4)[A()[0].argsort()],
    "gather": lambda: A().gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "in place": lambda: torch.randn(4).add_(A()[0, 0]),
    "where": lambda: torch.where(A() > 0, A(), torch.zeros(4, 4)),
    "generator": lambda: torch.multinomial(A().softmax(-1), 1, generator=torch.Generator()),
    "numpy": lambda: A().numpy(),
    "asarray": lambda: np.asarray(A()),
    "another GPU": lambda: torch.zeros(1, device="cuda:3"),
    "loss": lambda: torch.nn.functional.cross_entropy(A(), torch.arange(4)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("gpu")
def test_what_cuda_refuses(name):
    with pytest.raises((DeviceMismatch, TypeError)):
        REFUSED[name]()


def test_what_cuda_allows(gpu):
    a, x = A(), torch.randn(4, 4)
    a[torch.tensor([0, 1])] = a[0] + torch.tensor(1.0)
    a[1] = x[1]
    x.copy_(a)
    model = torch.nn.Linear(4, 4).to("cuda")
    model(a).sum().backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    assert model.weight.is_cuda and model.weight.grad.device.type == "cuda" and not a.cpu().is_cuda
    assert gpu.peak > 0 and gpu.syncs and torch.multinomial(a.exp(), 1, generator=torch.Generator("cuda")).is_cuda


def test_streams_and_late_copies():
    with FakeCuda() as gpu:
        x, side = torch.ones(5, device="cuda"), torch.cuda.Stream()
        with torch.cuda.stream(side):
            y = x * 2  # before x is known to be there
        assert len(gpu.faults) == 1
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = x * 2
        del x  # while the other stream uses it
        assert len(gpu.faults) == 2
        torch.cuda.synchronize()
        (y + z).to("cpu", non_blocking=True).tolist()
        assert len(gpu.faults) == 3


# ---- the whole script

RUNS = {
    **{recipe: small(recipe, TRAIN_LOG_EVERY=1, GPTQ_N_SAMPLES=1) for recipe in ("pr187", "pr850", "pr1095")},
    "all stages": {"NGRAM_SCORE": "exact,normalized,claimed", "NGRAM_TABLE": "pr1095,exact", "TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": 64},
    "bytes": {"TARGET_BYTES": 150000, "CODE_FORM": "packed", "NGRAM_SCORE": "exact", "NGRAM_TILT_ENABLED": 1, "CHECKPOINT_EVERY": 2},
    "documents": {"TTT_ENABLED": 1, "TTT_RESET": "document", "TTT_LORA_SITES": "o,mlp,head", "TTT_LORA_BLOCKS": 0, "TTT_CHUNK_SIZE": 16,
                  "TTT_ORDER": "length", "NGRAM_SCORE": "off"},
    "frontier": small("frontier", TRAIN_LOG_EVERY=1, TTT_EVAL_SEQ_LEN=48, TTT_CHUNK_SIZE=48, TTT_BATCH_SIZE=4, TTT_LORA_RANK=2, NGRAM_ORDER=4,
                      NGRAM_TILT_ORDER=4, TARGET_BYTES=0, VAL_TOKENS=250),
    "corrections": {"GPTQ_ENABLED": 1, "GPTQ_N_SAMPLES": 2, "LQER_TOP_K": 2, "NGRAM_SCORE": "off"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_script_keeps_cudas_rules(gpu, data, tmp_path, script, monkeypatch, name):
    monkeypatch.setattr(tg, "CLAIM_SAMPLES", 4)
    env = {**tiny_env(data, tmp_path), "VAL_TOKENS": 130, **RUNS[name], "DATA_PATH": data.folder, "VOCAB_SIZE": 300, "ITERATIONS": 2,
           "WARMUP_STEPS": 1, "DEVICE": "cuda", "COMPILE": "auto", "TRAIN_DTYPE": "fp32", "RUN_ID": "r",
           "ATTENTION": "sdpa" if name == "frontier" else "auto",  # the kernel of its document mask needs a GPU
           "LOG_DIR": tmp_path, "NGRAM_BUCKETS": 4096, "VAL_BATCH_TOKENS": 256}  # fmt: skip
    env = {k: str(v) for k, v in env.items()}
    result = script(env)
    assert result.status == 0, result.err
    assert gpu.launches > 1000
    if name not in ("bytes", "frontier"):  # which fill their bytes by other roundings
        with monkeypatch.context() as patch:  # in fp32 a CPU's score is the same
            patch.setattr(torch.cuda, "is_available", lambda: False)
            assert script(env, DEVICE="cpu", RUN_ID="cpu").status == 0
        assert score_of({**env, "RUN_ID": "cpu"}) == pytest.approx(score_of(env), rel=1e-3)
    assert "evaluation projected: roundtrip" in result.out
    if name == "all stages":
        base = {
            "DATA_PATH": env["DATA_PATH"],
            "LOG_DIR": env["LOG_DIR"],
            "ARTIFACT": f"{tmp_path}/r.pgz",
            "DEVICE": "cuda",
        }
        assert (
            script(base, MODE="audit", RUN_ID="audit", VAL_TOKENS=90, EVAL_STAGES="ngram", NGRAM_SCORE="exact").status
            == 0
        )


def test_two_ranks_keep_cudas_rules(data, tmp_path):
    """Reduced gradients, calibration, a checkpoint, learning and n-grams, each rank on its own GPU, Gloo in NCCL's place."""
    env = tiny_env(data, tmp_path, DEVICE="cuda", ITERATIONS=2, NUM_HEADS=2, GPTQ_ENABLED=1, GPTQ_N_SAMPLES=2, CHECKPOINT_EVERY=1,
                   EMA_DECAY=0.9, COMPLEMENT_ALPHA=0.5, TTT_ENABLED=1, TTT_CHUNK_TOKENS=48, NGRAM_TABLE="pr1095", NGRAM_SCORE="exact",
                   VAL_TOKENS=80, VAL_BATCH_TOKENS=256, EVAL_STRIDE=16)  # fmt: skip
    assert run_ranks(env, 2, "fake_cuda").count(" kernels") == 2 and events(env, "score")[-1]["val_bpb"] > 0


def test_less_memory_makes_the_same_steps(data, tmp_path, script):
    changes = {"DEVICE": "cuda", "COMPILE": "auto", "TRAIN_BATCH_TOKENS": 32 * SEQ, "NUM_HEADS": 2, "MODEL_DIM": 64, "VAL_TOKENS": 130,
               "NGRAM_SCORE": "off", "ITERATIONS": 2, "EVAL_STRIDE": 0, "VAL_BATCH_TOKENS": 256}  # fmt: skip
    losses = []
    for capacity in (float("inf"), 3.5 * 2**20):
        env = tiny_env(data, tmp_path / str(capacity), **changes)
        with FakeCuda(capacity) as gpu:
            assert script(env).status == 0
        losses.append([e["train_loss"] for e in events(env, "step")])
    assert gpu.out_of_memory and losses[1] == pytest.approx(losses[0], abs=1e-3)


# ---- parts, by budget


def parts(module: types.ModuleType, recipe: str, **changes):
    """Trainer and consensus of a shrunken recipe on the pretend GPU."""
    cfg = module.load_config(small(recipe, DEVICE="cuda", **changes), has_gpu=lambda: False).cfg
    run = module.Run(cfg, 0, 0, 1, 1)
    stream = module.TokenStream([np.random.default_rng(0).integers(2, cfg.vocab_size, 20000)], cfg.vocab_size)
    model = module.GPT(cfg).place(run.device, module.attend_sdpa)
    return cfg, run, stream, module.Trainer(cfg, run, model, stream), module.StopConsensus(run)


@pytest.mark.parametrize("recipe", sorted(tg.RECIPES))
def test_a_step_waits_neither_for_itself_nor_for_the_next(gpu, recipe):
    *_, trainer, consensus = parts(tg, recipe)
    for block in trainer.model.blocks if recipe == "frontier" else ():
        block.attn.attend = (
            attend_gpu  # the kernel of its document mask needs a GPU, what stands in for it asks for the bounds
        )
    for step in range(5):
        if step == 2:
            gpu.syncs.clear()
        consensus.exchange(step, False, trainer.train_step(0.5, 1.0), 0.0)
    waits = dict(gpu.syncs)
    torch.cuda.synchronize()  # or what is freed here might still be in use
    assert not waits


def test_a_step_with_more_documents_than_expected_makes_room_for_them(gpu):
    """Segments are found on the host, where the room can grow; found on the device they would end the run."""
    *_, trainer, _ = parts(tg, "frontier")
    for block in trainer.model.blocks:
        block.attn.attend = attend_gpu
    stream = trainer.batcher.stream
    stream.shards = [np.where(np.arange(len(shard)) % 2, shard, tg.BOS) for shard in stream.shards]
    assert math.isfinite(float(trainer.train_step(0.5, 1.0)))
    gpu.syncs.clear()


# Kernels of one eager forward of the shrunken recipe, as measured: what adds some to every block shows here.
KERNELS = {
    "baseline": 339,
    "cpu": 366,
    "pr164": 366,
    "pr740": 397,
    "pr187": 383,
    "pr850": 434,
    "pr1095": 427,
    "frontier": 616,
}


@pytest.mark.parametrize("recipe", sorted(tg.RECIPES))
def test_the_kernels_of_an_eager_forward(gpu, recipe):
    cfg = tg.load_config(small(recipe, DEVICE="cuda", DOC_MASK=0), has_gpu=lambda: False).cfg
    model = tg.GPT(cfg).place(tg.Run(cfg, 0, 0, 1, 1).device, tg.attend_sdpa)
    ids = torch.randint(2, cfg.vocab_size, (2, 16)).to("cuda")
    before = gpu.launches
    with torch.no_grad():
        model.nll(ids, ids)
    assert gpu.launches - before <= KERNELS[recipe]


@pytest.mark.parametrize("doc_mask", [0, 1])
def test_a_scored_batch_waits_for_nothing(gpu, doc_mask):
    cfg, run, _, trainer, _ = parts(tg, "pr850", VAL_BATCH_TOKENS=64, DOC_MASK=doc_mask)
    for block in trainer.model.blocks:
        block.attn.attend = attend_gpu
    evaluation = tg.Evaluation(cfg, run, trainer.model, text_of(tg, 600, cfg.vocab_size))
    for stage in ("roundtrip", "sliding", "ttt"):
        network = evaluation.network(stage)
        plan = network.plan(600)
        fresh = torch.zeros(3, 600, device=run.device)
        gpu.syncs.clear()
        for i in range(2, 8, network.rows):
            network.score_batch(evaluation.text.tokens, plan[i : i + network.rows], fresh)
        assert not gpu.syncs, stage


def test_a_chunk_of_documents_waits_only_to_put_its_scores_in_place(gpu):
    knobs = {"TTT_RESET": "document", "TTT_EVAL_SEQ_LEN": 16, "TTT_CHUNK_SIZE": 4, "TTT_BATCH_SIZE": 4}
    cfg, run, _, trainer, _ = parts(tg, "pr850", **knobs)
    text, chunks = text_of(tg, 101, cfg.vocab_size), 7
    text.tokens[::25] = tg.BOS
    network = tg.Evaluation(cfg, run, trainer.model, text).network("ttt")
    gpu.syncs.clear()
    network.run_batch(network.tokens, network.documents[:4], torch.zeros(3, 101, device=run.device), 0)
    often = {place: n for place, n in gpu.syncs.items() if n >= chunks - 1}
    assert sum(often.values()) <= 2 * chunks and all("run_batch" in place for place in often), gpu.syncs


def text_of(module: types.ModuleType, n: int, vocab: int):
    tokens = torch.from_numpy(np.random.default_rng(1).integers(2, vocab, n))
    return module.ValidationText(tokens, torch.ones(n, dtype=torch.int64), complete=True)


def test_statistics_stay_on_the_host_and_the_scores_are_those_of_a_cpu(tiny):
    scores = []
    for device in ("cuda", "cpu"):
        cfg = config(tiny, DEVICE=device, NGRAM_SCORE="exact", NGRAM_ORDER=12, NGRAM_TILT_ENABLED=1, NGRAM_TILT_ORDER=5)
        with FakeCuda() as gpu:
            run = tg.Run(cfg, 0, 0, 1, 1)
            torch.manual_seed(0)
            model = tg.GPT(cfg).place(run.device, tg.attend_sdpa)
            evaluation = tg.Evaluation(cfg, run, model, text_of(tg, 3000, cfg.vocab_size))
            scores.append(evaluation.score("ngram").val_bpb)
            assert not gpu.faults and all(table.columns[0].device.type == "cpu" for table in evaluation.counted)
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize("recipe", ["pr164", "pr187", "pr850", "pr1095", "frontier"])
def test_the_plan_predicts_the_peak_of_a_step(recipe, monkeypatch):
    """Within 10 %, with what lies there between steps, of an eager step whose attention keeps what FlashAttention keeps."""
    monkeypatch.setattr(tg, "rms_norm", tg.UnitRMS.apply)  # the pretend GPU's own keeps more than CUDA's
    with FakeCuda() as gpu:
        cfg, *_, trainer, _ = parts(tg, recipe, TRAIN_BATCH_TOKENS=1024, VOCAB_SIZE=1024)
        for block in trainer.model.blocks:
            block.attn.attend = FlashFootprint.apply
        for _ in range(2):
            trainer.train_step(0.5, 1.0)
        torch.cuda.synchronize()
    with torch.device("meta"):
        model = tg.GPT(cfg)
    kept, peak = activation_bytes(cfg, model, torch.device("cuda"), 1024)
    assert kept < peak
    assert gpu.peak == pytest.approx(state_bytes(cfg, model) + peak, rel=0.1)


EVALUATIONS = {  # not in proportion: no constant fits both
    "a long text": ({"MODEL_DIM": 32, "VOCAB_SIZE": 512, "TTT_EVAL_SEQ_LEN": 512, "TTT_CHUNK_SIZE": 256, "TTT_BATCH_SIZE": 4, "TTT_LORA_RANK": 4,
                     "NGRAM_ORDER": 6, "NGRAM_TILT_ORDER": 6, "NGRAM_TABLE": "exact", "NGRAM_TABLE_ORDER": 3, "EVAL_STRIDE": 128,
                     "VAL_BATCH_TOKENS": 1024, "GLOBAL_TTT_CHUNK_TOKENS": 2048}, [900, 500, 1040, 300, 1200, 260, 780, 1000] * 2),
    "a wide network": ({"MODEL_DIM": 128, "NUM_LAYERS": 5, "VOCAB_SIZE": 1024, "TTT_EVAL_SEQ_LEN": 128, "TTT_CHUNK_SIZE": 64, "TTT_BATCH_SIZE": 3,
                        "TTT_LORA_RANK": 9, "NGRAM_ORDER": 4, "NGRAM_TILT_ORDER": 8, "VAL_BATCH_TOKENS": 512, "GLOBAL_TTT_CHUNK_TOKENS": 96},
                       [190, 140, 60, 170, 45, 120]),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_plan_predicts_the_peak_of_each_part_of_an_evaluation(name, monkeypatch):
    """Within 10 %, the statistics included; the rehearsal needs no more."""
    knobs, lengths = EVALUATIONS[name]
    monkeypatch.setattr(tg, "rms_norm", tg.UnitRMS.apply)
    cfg = tg.load_config(small("frontier", DEVICE="cuda", EVAL_SEQ_LEN=128, **knobs), has_gpu=lambda: False).cfg
    same = text_of(tg, 1 + max(lengths), cfg.vocab_size).tokens  # all contexts of all documents but one are known
    same[0] = tg.BOS
    tokens = torch.cat([*(same[:n] for n in lengths), same[:1]])
    text = tg.ValidationText(tokens, torch.ones_like(tokens), complete=True)
    stored = tg.build_trie(tokens.numpy().astype(np.uint16), cfg.vocab_size, cfg.ngram_table_order, 10**5)
    trie = tg.unpack_trie(stored, cfg.vocab_size) if "exact" in cfg.ngram_tables else []
    plan = EvaluationPlan(cfg, np.array(lengths)).peaks
    measured = dict.fromkeys(plan, 0)
    with FakeCuda() as gpu:

        def note(part, action):
            before, gpu.peak = gpu.peak, gpu.live
            out = action()
            measured[part], gpu.peak = max(measured[part], gpu.peak), before
            return out

        train = tg.DocumentLoraNetwork.train_weights
        monkeypatch.setattr(tg.DocumentLoraNetwork, "train_weights", lambda *args: note("phase", lambda: train(*args)))
        run = tg.Run(cfg, 0, 0, 1, 1)
        model = tg.GPT(cfg).place(run.device, FlashFootprint.apply).eval()
        gpu.capacity = 1.1 * max(plan.values())
        tg.rehearse(cfg, run, model, text)
        evaluation = tg.Evaluation(cfg, run, model, text, tg.Tables(trie=trie))
        for stage in cfg.stages:
            note("hints" if stage == "ttt" else stage, lambda: evaluation.experts(stage))  # noqa: B023
            note(stage, lambda: evaluation.score(stage))  # noqa: B023
    assert not gpu.out_of_memory and not gpu.faults
    assert set(plan) == {*cfg.stages, "hints", "phase"}
    assert measured == pytest.approx(plan, rel=0.1)


# ---- mistakes put in by hand: a harness that lets them pass proves nothing

MUTANTS = {
    "the batch stays on the host": ("    return t.to(device, non_blocking=True)", "    return t"),
    "the loss is summed on the host": ("torch.zeros((), device=self.run.device), inputs.shape[1]", "torch.zeros(()), inputs.shape[1]"),
    "flags are read before their copy is complete": ("copied.synchronize()", "pass"),
    "n-grams are counted without waiting for the batch": ("self.stream.wait_stream(torch.cuda.current_stream())", "pass"),
    "a batch is freed while n-grams are counted": ("rows.record_stream(self.stream)", "pass"),
    "a generator of the host draws on the GPU": ("generator = torch.Generator(run.device).manual_seed(derive_seed(cfg.seed, \"fisher\", run.rank))",
                                                "generator = torch.Generator().manual_seed(derive_seed(cfg.seed, \"fisher\", run.rank))"),
    "codes are packed from the GPU": ("scale=chosen.cpu(),", "scale=chosen,"),
    "windows are scored on the host": ("self.score_rows(*rows.to(self.run.device)", "self.score_rows(*rows.cpu()"),
    "statistics lie on the host": ("NgramStats(*(column.to(tokens.device) for column in", "NgramStats(*(column for column in"),
    "momentum lies on the host": ("self.grads = torch.zeros(self.owned * run.world, rows, cols, device=run.device)",
                                  "self.grads = torch.zeros(self.owned * run.world, rows, cols)"),
}  # fmt: skip


def mutant(name: str, old: str, new: str) -> types.ModuleType:
    """The script as a module of its own with one place changed."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{name}: the place to change stands {source.count(old)} times in the script"
    module = types.ModuleType("mutant")
    module.__file__ = str(SCRIPT)
    sys.modules["mutant"] = module  # dataclasses look their module up
    exec(compile(source.replace(old, new), "train_gpt.py", "exec"), module.__dict__)
    return module


def exercise(module: types.ModuleType) -> list[str]:
    """Train, calibrate, quantize, pack and score a shrunken recipe with every kind of transfer; the faults that were noted."""
    with FakeCuda() as gpu:
        cfg, run, stream, trainer, consensus = parts(module, "pr1095")
        for step in range(3):
            consensus.exchange(step, False, trainer.train_step(0.5, 1.0), 0.0)
        trainer.ngrams.total()
        cfg = module.load_config(
            small("pr850", DEVICE="cuda", NGRAM_SCORE="exact", TARGET_BYTES=90000), has_gpu=lambda: False
        ).cfg
        model = module.GPT(cfg).place(run.device, module.attend_sdpa)
        ids = torch.randint(2, cfg.vocab_size, (2, 16)).to(run.device)
        found = module.calibrate(cfg, run, model, [ids])
        named, store = (
            {n: f(p) for n, p in model.named_parameters()} for f in (torch.Tensor.detach, lambda p: p.store)
        )
        module.pack(cfg, {}, module.quantize(cfg, named, store, found.hessians))
        evaluation = module.Evaluation(cfg, run, model, text_of(module, 60, cfg.vocab_size))
        list(module.evaluate(evaluation, ("sliding", "ngram")))
    return gpu.faults


def test_the_exercise_itself_is_clean():
    assert exercise(tg) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_about_devices_is_caught(name):
    module = mutant(name, *MUTANTS[name])
    try:
        faults = exercise(module)
    except (DeviceMismatch, TypeError):  # what CUDA would have raised
        return
    assert faults


def test_the_first_look_at_a_gpu_runs_through(tmp_path, monkeypatch, capsys):
    """Every part of benchmarks/gpu.py, shrunken, writes figures and no error."""
    from benchmarks import gpu as first_look

    monkeypatch.setenv("DATA_PATH", str(tg.SAMPLE_DIR))
    monkeypatch.setenv("ATTENTION", "sdpa")  # the kernel of the document mask needs a GPU
    names = [name for name, _ in first_look.parts() if name != "profile"]  # the profiler sees no pretend kernels
    with FakeCuda() as pretend:
        status = first_look.main(["--tiny", "--out", str(tmp_path / "gpu.json"), "--parts", *names])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert status == 0, capsys.readouterr().out
    assert set(report["parts"]) == set(names) and not pretend.faults
    assert report["parts"]["losses"]["largest difference, nats"] < 0.05
