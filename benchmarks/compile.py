"""Every graph of training and scoring through torch.compile, in the form a GPU runs: seconds, graphs, difference from eager.

    python benchmarks/compile.py [RECIPE ...] [--backend inductor]

A recipe keeps its blocks, passes and switches; widths, lengths and batches are small, since the time to compile does not depend
on them. Each stage is primed as a run primes it, then works on: graphs that are made only then would be compiled inside the clock.
Seconds are CPU time of this process and of the C++ compiler. `tests/test_graphs.py` does the same with aot_eager.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt as tg

SMALLER = {"MODEL_DIM": "256", "TRAIN_SEQ_LEN": "64", "TRAIN_BATCH_TOKENS": "256", "EVAL_SEQ_LEN": "64",
           "VAL_BATCH_TOKENS": "256", "TTT_EVAL_SEQ_LEN": "64", "TTT_CHUNK_SIZE": "16", "TTT_BATCH_SIZE": "4",
           "TTT_CHUNK_TOKENS": "256", "WARMUP_STEPS": "1"}  # fmt: skip


class Outcome(NamedTuple):
    """What compiling came to in one stage."""

    stage: str
    primed: int  # graphs made before the clock
    later: int  # and inside it
    seconds: float  # of priming, eager twins included
    difference: float  # most that an output differed from the eager one


class Twins:
    """A kernel in its compiled form, which is compared with the plain one at each call."""

    def __init__(self, kernel: Callable[..., Tensor], backend: str) -> None:
        self.kernel, self.counter, self.difference = kernel, CompileCounterWithBackend(backend), 0.0
        self.compiled = torch.compile(kernel, dynamic=False, fullgraph=True, backend=self.counter)

    def __call__(self, *args: Any) -> Tensor:
        y = self.compiled(*args)
        with torch.no_grad():
            self.difference = max(self.difference, float((y - self.kernel(*args)).abs().max()))
        return y

    def outcome(self, stage: str, prime: Callable[[], object], work: Callable[[], object]) -> Outcome:
        """Prime the stage, then let it work."""
        before = cpu_seconds()
        prime()
        primed, seconds = self.counter.frame_count, cpu_seconds() - before
        work()
        return Outcome(stage, primed, self.counter.frame_count - primed, seconds, self.difference)


def cpu_seconds() -> float:
    """CPU time of this process and of those it waited for."""
    return sum(os.times()[:4])


def attend_gpu(q: Tensor, k: Tensor, v: Tensor, segments: tg.Segments | None = None) -> Tensor:
    """One kernel, as on a GPU: heads that share keys are not expanded, and segments break no graph."""
    seen = None
    if segments is not None:
        at_T = torch.arange(q.shape[1], device=q.device)
        near = at_T[:, None] - at_T < segments.longest  # it always is; a packed kernel is made for this number
        seen = (near & (at_T >= (at_T - segments.offset_BT)[..., None]) & (at_T <= at_T[:, None]))[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped)
    return y.transpose(1, 2)


@contextlib.contextmanager
def gpu_form() -> Iterator[None]:
    """CUDA's branches of the forward pass, and dynamo as a run on a GPU sets it."""
    torch._dynamo.reset()
    norm = mock.patch.object(tg, "rms_norm", lambda x: F.rms_norm(x, (x.shape[-1],)))
    with norm, torch._dynamo.config.patch(recompile_limit=64, specialize_float=True):
        yield
    torch._dynamo.reset()


def model_of(env: dict[str, str]) -> tuple[tg.Config, tg.Run, tg.GPT]:
    """A network in fp32 whose zeros are not zero, so that every part counts."""
    plain = {"DEVICE": "cpu", "COMPILE": "0", "ATTENTION": "sdpa", "TRAIN_DTYPE": "fp32", "MAX_WALLCLOCK_SECONDS": "0",
             "EVAL_WALLCLOCK_SECONDS": "0"}  # fmt: skip
    cfg = tg.load_config({**plain, **env}, has_gpu=lambda: False).cfg
    run = tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1)
    run.log = lambda *_, **__: None
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return cfg, run, model.place(run.device, attend_gpu, cfg.train_dtype)


def random_tokens(cfg: tg.Config, n: int, longest: int = 90) -> np.ndarray:
    """Documents of 1 to `longest` tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, cfg.vocab_size, n)
    tokens[np.cumsum(rng.integers(1, longest, 2 * n // longest)).clip(max=n - 1)] = tg.BOS
    return tokens


def training(env: dict[str, str], backend: str, steps: int = 5) -> Outcome:
    """Priming, and `steps` steps from the start of the budget to its end."""
    cfg, run, model = model_of(env)
    trainer = tg.Trainer(cfg, run, model, tg.TokenStream([random_tokens(cfg, 20000)], cfg.vocab_size))
    trainer.forward = twins = Twins(model, backend)

    def work() -> None:
        for step in range(steps):
            trainer.train_step(step / (steps - 1), 1.0)
            model.eval().train()  # as validation does in between

    return twins.outcome("training", trainer.prime, work)


def scoring(env: dict[str, str], backend: str) -> Iterator[Outcome]:
    """Rehearsal of each stage of the network on the text that `rehearse` makes, before the training (MODE=train) or after it, and
    its scores of two texts of longer and of shorter documents by another network, as the artifact's is; without what a CPU
    scores eager for its odd shape, and without a LoRA a document, which always computes eager."""
    cfg, run, model = model_of(env)
    texts = []
    for longest in (90, 9):
        tokens = torch.from_numpy(random_tokens(cfg, 400, longest))
        texts.append(tg.ValidationText(tokens, torch.ones(len(tokens), dtype=torch.int64), complete=True))
    twins = {}

    class Compiled(tg.Evaluation):
        def network(self, stage: str) -> tg.NetworkExpert:
            network = super().network(stage)
            network.compiled = twins.setdefault(stage, Twins(tg.score_windows, backend))
            network.rehearsed = lambda rows: rows  # as a GPU does
            return network

    def rehearse(stage: str) -> None:
        rehearsal = Compiled(cfg, run, model.eval(), tg.rehearsal_text(cfg, gpu=True))
        for text in texts:
            rehearsal.network(stage).expected_seconds(text)
        model.train()

    def score(stage: str) -> None:
        for text in texts:
            Compiled(cfg, run, loaded, text).score(stage)

    for stage in (s for s in cfg.stages if s in tg.STAGES[: 2 + (cfg.ttt_reset != "document")]):
        loaded = model if cfg.mode == "eval" else copy.deepcopy(model)
        Compiled(cfg, run, model, texts[0]).network(stage)
        yield twins[stage].outcome(stage, lambda s=stage: rehearse(s), lambda s=stage: score(s))


def outcomes(env: dict[str, str], backend: str) -> Iterator[Outcome]:
    """Training and each stage of scoring."""
    with gpu_form():
        yield training(env, backend)
    with gpu_form():
        yield from scoring(env, backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(sorted(tg.RECIPES)))
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # CPU time of a pool would be told only at its end
    torch._inductor.config.fx_graph_cache = False
    for recipe in args.recipes or sorted(tg.RECIPES):
        stride = min(16, tg.load_config({"RECIPE": recipe}, has_gpu=lambda: False).cfg.eval_stride)
        for o in outcomes({"RECIPE": recipe, **SMALLER, "EVAL_STRIDE": str(stride)}, args.backend):
            print(f"{recipe:<9} {o.stage:<10} {o.seconds:6.1f} s, {o.primed} graphs primed, {o.later} later, "
                  f"differs by {o.difference:.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
