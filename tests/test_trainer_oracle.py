"""A training step against a plain loop in float64, and against itself on other numbers of ranks and after a resume."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import train_gpt as tg

V, T, STEPS = 40, 8, 10
ROWS = 7  # sequences a step: no number of ranks divides it
BASE = {"vocab_size": V, "num_layers": 3, "model_dim": 24, "num_heads": 3, "num_kv_heads": 1, "mlp_mult": 3.0, "train_seq_len": T, "device": "cpu",
        "train_batch_tokens": ROWS * T, "iterations": STEPS, "embed_init_std": 0.5, "out_init": "scaled", "train_dtype": "fp32",
        "matrix_lr": 0.03, "tied_embed_lr": 0.02, "scalar_lr": 0.015, "muon_momentum": 0.9, "muon_momentum_warmup_start": 0.6,
        "muon_momentum_warmup_steps": 4, "beta1": 0.8, "beta2": 0.97, "adam_eps": 1e-3, "micro_batch_tokens": 3 * T}  # fmt: skip
OPTIONS = {
    "plain": {},
    "decay, clip, EMA and SWA": {"muon_wd": 0.7, "adam_wd": 0.5, "grad_clip_norm": 0.05, "ema_decay": 0.7, "ema_start_frac": 0.3, "swa_every": 2,
                                 "swa_start_scale": 0.6, "swa_blend": 0.3, "embed_wd": 0.0},
    "decay after, polar, rows, SWA of the EMA": {"muon_wd": 0.7, "muon_wd_order": "after", "newton_schulz": "polar", "muon_row_normalize": True,
                                                 "muon_backend_steps": 6, "adam_wd": 0.3, "embed_wd": 0.9, "ema_decay": 0.6, "swa_every": 3,
                                                 "swa_source": "ema", "swa_start_scale": 2.0},
    "a head of its own": {"tie_embeddings": False, "head_lr": 0.004, "embed_lr": 0.05, "decoder_lr_mult": 1.7, "muon_wd": 0.7,
                          "adam_wd": 0.3, "embed_wd": 0.9},
    "lengths and soft rounding": {"train_seq_schedule": "8@0.3,14@0.6", "train_seq_len": 28, "train_batch_tokens": 56, "micro_batch_tokens": 0,
                                  "seq_change_warmup_steps": 3, "qat": "soft_round", "qat_bits": 4, "qat_start_frac": 0.4},
    "loops, lanes and caps": {"num_loops": 1, "loop_start": 0, "loop_end": 1, "enable_looping_at": 0.3, "parallel_start_layer": 2,
                              "asym_logit_rescale": True, "ema_decay": 0.8},
    "complementary": {"complement_alpha": 0.9, "grad_clip_norm": 0.3},
    "complementary, plain mean": {"complement_alpha": 0.9},
    "documents apart": {"doc_mask": True, "smear": True, "bigram_vocab_size": 20, "bigram_dim": 6, "ema_decay": 0.9},
}  # fmt: skip


AVERAGES = {
    "plain": "last",
    "decay, clip, EMA and SWA": "0.7 ema(0.7) + 0.3 swa(2)",
    "documents apart": "ema(0.9)",
}  # what the log calls them


def stream() -> np.ndarray:
    """Skewed tokens with documents."""
    rng = np.random.default_rng(3)
    tokens = (2 + rng.zipf(1.5, 1500) % (V - 2)).astype(np.uint16)
    tokens[rng.random(1500) < 0.08] = tg.BOS
    return tokens


def make(rank: int = 0, world: int = 1, **knobs) -> tg.Trainer:
    cfg = tg.Config(**{**BASE, **knobs})
    torch.manual_seed(0)
    run, model = tg.Run(cfg, rank, rank, world, world), tg.GPT(cfg)
    return tg.Trainer(cfg, run, model, tg.TokenStream([stream()[:500], stream()[500:]], V))


def schedule(step: int) -> tuple[float, float]:
    """(share of the budget, learning-rate scale) that the loop would give; uneven on purpose."""
    return step / STEPS, 1.0 if step < 4 else (90 - 6 * step) / 100


class Plain:
    """The step as its definition, one parameter at a time."""

    def __init__(self, trainer: tg.Trainer) -> None:
        self.cfg, self.model, data = trainer.cfg, copy.deepcopy(trainer.model).double(), trainer.batcher.stream
        self.tokens = data.read(0, data.total)
        self.model.compute_dtype = torch.float64
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        zeros = lambda: {name: torch.zeros_like(p) for name, p in self.params.items()}  # noqa: E731
        self.momentum, self.mean, self.square = zeros(), zeros(), zeros()
        self.pairs, self.ema, self.swa = torch.zeros(V, V), {}, []
        self.step, self.length, self.changed = 0, None, -(10**9)

    def batch(self, length: int):
        n = self.cfg.train_batch_tokens
        ids = torch.tensor([self.tokens[(self.step * n + i) % len(self.tokens)] for i in range(n + 1)])
        return ids[:-1].view(-1, length), ids[1:].view(-1, length)

    def nll(self, ids, targets, ctx):
        if not self.cfg.doc_mask:
            return self.model.nll(ids, targets, ctx)
        out, flat, following = [], ids.flatten(), targets.flatten()
        for group in range(0, len(flat), 3 * T):  # micro-batches of three rows, laid end to end
            edges = [group]
            for t in range(group + 1, min(group + 3 * T, len(flat))):
                edges += [t] if flat[t] == tg.BOS or t - edges[-1] == T else []
            for lo, hi in zip(edges, [*edges[1:], min(group + 3 * T, len(flat))], strict=True):
                one = ctx._replace(one_document=True)
                out.append(self.model.nll(flat[None, lo:hi], following[None, lo:hi], one)[0])
        return torch.cat(out).view_as(ids)

    def quantised(self, frac: float):
        cfg, top = self.cfg, 2 ** (self.cfg.qat_bits - 1) - 1
        a = 1 + 15 * (frac - cfg.qat_start_frac) / (1 - cfg.qat_start_frac)

        def soft(w):
            rows = []
            for row in w.detach():
                u = row / (row.abs().max() / top)
                r = u.floor() + 0.5 + (a * (u - u.floor() - 0.5)).tanh() / (2 * math.tanh(a / 2))
                rows.append(r.clamp(-top, top) * row.abs().max() / top)
            return w + (torch.stack(rows) - w).detach()

        return soft

    def orthogonal(self, g):
        x = g / (g.norm() + 1e-7)
        tall = len(g) > g.shape[1]
        x, tuples = x.T if tall else x, tg.NEWTON_SCHULZ[self.cfg.newton_schulz]
        for i in range(self.cfg.muon_backend_steps):
            a, b, c = tuples[min(i, len(tuples) - 1)]
            A = x @ x.T
            x = a * x + (b * A + c * A @ A) @ x
        return x.T if tall else x

    def train_step(self, frac: float, scale: float) -> float:
        cfg, length = self.cfg, self.cfg.train_seq_len
        for part in reversed(cfg.train_seq_schedule.split(",") if cfg.train_seq_schedule else []):
            n, end = part.split("@")
            length = int(n) if frac < float(end) else length
        if length != self.length:
            self.changed, self.length = self.step if self.length else -(10**9), length
        rewarm = (
            min(1.0, (self.step - self.changed + 1) / cfg.seq_change_warmup_steps)
            if cfg.seq_change_warmup_steps
            else 1.0
        )
        ids, targets = self.batch(length)
        self.model.set_looped(bool(cfg.num_loops) and frac >= cfg.enable_looping_at)
        qat = cfg.qat != "none" and frac >= cfg.qat_start_frac
        nll = self.nll(ids, targets, tg.Ctx(fake_quant=self.quantised(frac)) if qat else tg.Ctx())
        weights = torch.ones_like(nll)
        if cfg.complement_alpha:
            share = self.pairs[ids, targets].double() / (self.pairs.sum(1)[ids] + 1)
            weights = (1 - cfg.complement_alpha * share).clamp_min(0.1)
        loss = (weights * nll).mean()
        grads = dict(
            zip(self.params, torch.autograd.grad(loss, [*self.params.values()], materialize_grads=True), strict=True)
        )
        if cfg.grad_clip_norm:
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
            grads = {name: g * min(1.0, cfg.grad_clip_norm / norm) for name, g in grads.items()}
        with torch.no_grad():
            self.optimize(grads, scale * rewarm)
            self.take_averages(frac, scale)
        for a, b in zip(ids.flatten().tolist(), targets.flatten().tolist(), strict=True):
            self.pairs[a, b] += 1
        self.step += 1
        return loss.item()

    def optimize(self, grads, rate: float) -> None:
        cfg, n = self.cfg, self.step + 1
        warm = min(self.step / cfg.muon_momentum_warmup_steps, 1.0)
        mu = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
        embed = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
        rates = {"embed": embed, "head": cfg.head_lr, "scalar": cfg.scalar_lr, "matrix": cfg.matrix_lr}
        for name, source in self.params.items():
            g = grads[name]
            role, mult = ROLES[name]
            lr = rate * rates[role] * mult
            if role == "matrix":
                self.momentum[name] = mu * self.momentum[name] + g
                u = g + mu * self.momentum[name]
                u = u / u.norm(dim=1, keepdim=True) if cfg.muon_row_normalize else u
                delta = lr * math.sqrt(max(1, len(g) / g.shape[1])) * self.orthogonal(u)
                keep = 1 - lr * cfg.muon_wd
                source.copy_(source * keep - delta if cfg.muon_wd_order == "before" else (source - delta) * keep)
                continue
            self.mean[name] = cfg.beta1 * self.mean[name] + (1 - cfg.beta1) * g
            self.square[name] = cfg.beta2 * self.square[name] + (1 - cfg.beta2) * g**2
            m, v = self.mean[name] / (1 - cfg.beta1**n), self.square[name] / (1 - cfg.beta2**n)
            decay = cfg.embed_wd if role != "scalar" and cfg.embed_wd >= 0 else cfg.adam_wd
            source.copy_(source * (1 - lr * decay) - lr * m / (v.sqrt() + cfg.adam_eps))

    def take_averages(self, frac: float, scale: float) -> None:
        cfg, w = self.cfg, {name: p.detach().clone() for name, p in self.params.items()}
        if cfg.ema_decay and frac >= cfg.ema_start_frac:
            e, decay = self.ema or w, cfg.ema_decay
            self.ema = {name: decay * e[name] + (1 - decay) * w[name] for name in w}
        if cfg.swa_every and scale < cfg.swa_start_scale and (self.step + 1) % cfg.swa_every == 0:
            self.swa.append(self.ema if cfg.swa_source == "ema" else w)


ROLES: dict[str, tuple[str, float]] = {}  # parameter -> (role, rate): a deep copy in float64 loses the tags


@pytest.mark.parametrize("name", OPTIONS)
def test_ten_steps_are_those_of_a_plain_loop(name):
    torch.set_num_threads(1)
    trainer = make(**OPTIONS[name])
    ROLES.update({name: (p.role, p.lr_mult) for name, p in trainer.model.named_parameters()})
    plain = Plain(trainer)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    for step in range(STEPS):
        frac, scale = schedule(step)
        assert float(trainer.train_step(frac, scale)) == pytest.approx(plain.train_step(frac, scale), rel=2e-5), step
    state = trainer.state_dict()
    near = lambda a, b: bool(((a.double() - b).abs() <= 3e-4 * (1 + b.abs().max())).all())  # noqa: E731
    for name, p in plain.params.items():
        assert near(state["model"][name], p), name
        if ROLES[name][0] == "matrix":
            assert near(state["optimizers"]["muon"][name], plain.momentum[name]), name
        else:
            adam = state["optimizers"]["adam"][name]
            assert near(adam["exp_avg"], plain.mean[name]) and near(adam["exp_avg_sq"], plain.square[name]), name
    assert all(torch.equal(trainer.model.get_parameter(name), p) for name, p in frozen.items())
    average = state["average"]
    assert average["swa_n"] == len(plain.swa)
    assert all(near(a, b) for a, b in zip(average["ema"], plain.ema.values(), strict=True))
    for mine, *theirs in zip(average["swa"], *(w.values() for w in plain.swa), strict=True):
        assert near(mine, sum(theirs) / len(theirs))
    if trainer.counts is not None:
        assert torch.equal(trainer.counts.pairs.view(V, V), plain.pairs.long())
    assert state["position"] == STEPS * trainer.cfg.train_batch_tokens and state["step"] == STEPS
    called, blend = trainer.average.apply(), trainer.cfg.swa_blend if plain.swa else 0.0
    assert called == AVERAGES.get(name, called)
    for n, p in (plain.ema or plain.params).items():
        mean = sum(w[n] for w in plain.swa) / max(len(plain.swa), 1)
        assert near(trainer.model.get_parameter(n), (1 - blend) * p + blend * mean), n


# ---- ranks and resumes: one property over all of the state

EVERYTHING = {
    "ema_decay": 0.7, "swa_every": 1, "swa_start_scale": 2.0, "grad_clip_norm": 0.3, "muon_wd": 0.5, "adam_wd": 0.3, "complement_alpha": 0.9,
    "ngram_table": "pr1095", "train_seq_schedule": "8@0.05",
    "train_seq_len": 2 * T, "train_batch_tokens": 2 * ROWS * T, "seq_change_warmup_steps": 4,
    "micro_batch_tokens": 0, "num_loops": 1, "loop_start": 1, "loop_end": 1, "enable_looping_at": 0.35,
}  # fmt: skip
HALF, END = 2, 5


def train(trainer: tg.Trainer, steps: range) -> None:
    for step in steps:
        trainer.train_step(*schedule(step))


def worker(rank: int, world: int, folder: str) -> None:
    """Half of the training, its state, the other half, and that half once more from the state of one process."""
    torch.set_num_threads(1)
    tg.HASHED_SIZES = dict.fromkeys(tg.HASHED_SIZES, 2**10)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    trainer = make(rank, world, **EVERYTHING)
    train(trainer, range(HALF))
    states = {"half": copy.deepcopy(trainer.state_dict())}
    train(trainer, range(HALF, END))
    states["end"] = trainer.state_dict()
    again = make(rank, world, **EVERYTHING)
    again.load_state_dict(states["half"] if world == 1 else torch.load(f"{folder}/1-0.pt", weights_only=True)["half"])
    states["loaded"] = copy.deepcopy(again.state_dict())
    train(again, range(HALF, END))
    states["resumed"] = again.state_dict()
    torch.save(states, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        tg.end_process_group()


def differences(a, b, where: str = "") -> list[str]:
    """Where two states differ: integers and counts at all, numbers by more than rounding."""
    if isinstance(a, dict):
        return [x for key in a.keys() | b.keys() for x in differences(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        pairs = zip(a, b, strict=True) if len(a) == len(b) else [(a, None)]
        return [x for i, pair in enumerate(pairs) for x in differences(*pair, f"{where}[{i}]")]
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return [] if a == b else [where]
    same = torch.allclose(a, b, rtol=1e-3, atol=2e-4) if a.is_floating_point() else torch.equal(a, b)
    return [] if same else [where]


def test_all_of_the_state_is_the_same_on_one_two_and_three_ranks_and_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "HASHED_SIZES", tg.HASHED_SIZES)  # set back afterwards
    worker(0, 1, str(tmp_path))
    for world in (2, 3):
        mp.start_processes(worker, (world, str(tmp_path)), nprocs=world, start_method="forkserver")
    load = lambda world, rank: torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True)  # noqa: E731
    one = load(1, 0)
    assert {"model", "optimizers", "average", "counts", "ngrams", "curriculum", "position", "step"} <= one["end"].keys()
    for world in (1, 2, 3):
        for rank in range(world):
            states = load(world, rank)
            theirs = {name: one["half" if name in ("half", "loaded") else "end"] for name in states}
            found = {name: differences(theirs[name], state) for name, state in states.items()}
            assert not any(found.values()), (world, rank, found)
    trainer = make(**EVERYTHING)  # one process goes on from three
    trainer.load_state_dict(load(3, 2)["half"])
    train(trainer, range(HALF, END))
    assert not differences(one["end"], trainer.state_dict())


def test_a_mistake_of_the_first_rank_is_the_same_mistake_on_all(monkeypatch):
    cfg, box = tg.Config(**BASE), []
    ranks = [tg.Run(cfg, r, r, 2, 2) for r in (0, 1)]
    monkeypatch.setattr(
        tg.Run, "broadcast", lambda self, value: box.append(value) or value if self.rank == 0 else box[-1]
    )

    def fail(error):
        raise error

    for error, kind in (
        (tg.ConfigError("a knob"), tg.ConfigError),
        (tg.BrokenRun("a disk"), tg.BrokenRun),
        (OSError("x"), tg.BrokenRun),
    ):
        for run, expected in zip(ranks, (type(error), kind), strict=True):
            with pytest.raises(expected, match=str(error)) as found:
                run.on_first(lambda error=error: fail(error))
            assert type(found.value) is expected
    assert [run.on_first(lambda: 7) for run in ranks] == [7, 7]


@pytest.mark.parametrize("looped", [False, True])
def test_weights_that_are_kept_go_on_with_their_plan_position_and_counts(tmp_path, looped):
    knobs = {"num_loops": 1, "loop_start": 0, "loop_end": 1, "log_dir": str(tmp_path), "ngram_table": "pr1095"}
    trainer, fresh = make(**knobs), make(**{**knobs, "seed": 5})
    trainer.run.run_id, trainer.batcher.stream.position = "kept", 77
    trainer.model.set_looped(looped)
    checkpoints = tg.Checkpoints(trainer.cfg, trainer.run)
    result = tg.TrainResult(9, 3.5, "iterations", 24, {2: np.array([1, 65535], np.uint16)})
    with pytest.raises(KeyError), checkpoints.keep_weights(trainer.model, trainer.batcher.stream, result):
        raise KeyError
    with torch.no_grad():
        fresh.model.tok_emb.weight.zero_()
    state, stream = checkpoints.read(tmp_path / "kept.ckpt" / "trained.pt"), fresh.batcher.stream
    again = tg.train(fresh.cfg, fresh.run, fresh.model, stream, checkpoints, state, lambda _: (0.0, 0.0))
    assert again._replace(cells=None) == result._replace(cells=None) and again.cells[2].tolist() == [1, 65535]
    assert fresh.model.looped is looped and stream.position == 77 and fresh.run.training_began
    assert all(torch.equal(p, trainer.model.state_dict()[name]) for name, p in fresh.model.state_dict().items())


def test_the_loop_leaves_the_time_that_is_in_reserve():
    for knobs, seconds in (
        ({}, 60),
        ({"gptq_enabled": True}, 53),
        ({"target_bytes": 9000}, 53),
        ({"ngram_table": "exact"}, 53),
    ):
        cfg = tg.Config(**{**BASE, "max_wallclock_seconds": 60.0, "gptq_reserve_seconds": 7.0, **knobs})
        assert tg.training_budget(cfg) == seconds
    assert tg.training_budget(tg.Config(**{**BASE, "max_wallclock_seconds": 0.0, "gptq_enabled": True})) == 0


# ---- what must be fp32 under bf16


def wide(a: torch.Tensor, b: torch.Tensor, tol: float) -> bool:
    return ((a.double() - b.double()).abs() / (1 + b.double().abs())).max().item() <= tol


@pytest.mark.parametrize("asym", [False, True])
def test_logits_caps_and_losses_are_fp32_of_bf16_products(asym):
    cfg = tg.Config(**{**BASE, "asym_logit_rescale": asym, "logit_softcap": 20.0})
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
        if asym:
            model.softcap.caps.copy_(torch.tensor([17.0, 23.0]))
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(2, V, (3, T + 1))
    features = model.features(ids[:, :-1])
    z = F.linear(features, model.tok_emb.weight.bfloat16())
    assert features.dtype == z.dtype == torch.bfloat16
    z = z.double()
    cap = torch.where(z >= 0, 17.0, 23.0).double() if asym else torch.tensor(20.0).double()
    logits, nll = cap * (z / cap).tanh(), model.nll(ids[:, :-1], ids[:, 1:])
    assert model.logits(features).dtype == nll.dtype == torch.float32
    assert wide(model.logits(features), logits, 1e-6)
    assert wide(nll, -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0], 2e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_norms_and_rotations_of_bf16_are_rounded_once(size):
    x = (size * (1 + 0.1 * torch.randn(4, 2000))).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    assert wide(tg.rms_norm(x), exact, 2**-7) and tg.rms_norm(x).dtype == torch.bfloat16
    cfg = tg.Config(**{**BASE, "train_seq_len": 4096, "train_batch_tokens": 4096})
    table, at = tg.rope_table(cfg).double(), torch.arange(4096).double()[:, None]
    angles = at * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    assert wide(table[0], angles.cos(), 5e-4) and wide(table[1], angles.sin(), 5e-4)  # positions are no bf16


def test_sums_states_and_averages_are_fp32_under_bf16():
    trainer = make(train_dtype="bf16", ema_decay=0.9999, adam_wd=0.1)
    trainer.model.compute_dtype = torch.bfloat16
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for step in range(2):
        trainer.train_step(*schedule(step))
    state = trainer.state_dict()
    floats = [
        t
        for part in (state["model"], state["optimizers"]["muon"], *state["optimizers"]["adam"].values())
        for t in part.values()
    ]
    assert {t.dtype for t in [*floats, *state["average"]["ema"]]} == {torch.float32}
    for ema, (name, p) in zip(state["average"]["ema"], trainer.model.named_parameters(), strict=True):
        assert not torch.equal(ema, p.bfloat16().float()) and not torch.equal(p, before[name])
    g = torch.full((1, 2, 3), 1.0)
    bank = trainer.optimizers.banks[0]
    bank.momentum.fill_(256.0)
    bank.shard.fill_(0.5)
    bank.update(1.0)
    assert torch.equal(bank.momentum, torch.full_like(bank.momentum, 256.5)), "bf16 would keep 256"
    assert bank.updates.dtype == torch.bfloat16 and g.dtype == torch.float32
