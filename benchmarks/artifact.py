"""Bytes for the same codes against byte compressors, quantisation gap against bytes, seconds of pack, unpack and GPTQ.

    python benchmarks/artifact.py [--weights logs/weights.pgz] [--data FOLDER] [--seconds 600] [--parts bytes error gap speed encode]

Without a file at --weights it trains the `cpu` recipe for --seconds first and keeps the weights there in fp32. --data holds
shards and their tokenizer (default: the shipped sample): training and calibration read its training split, gaps are
measured on its validation split and choose nothing. Codes go to the byte compressors as row-major int8, and to lrzip also
with rows sorted by similarity, the permutation counted. `error` compares errors and losses at equal bytes of the file,
independent codes against trellises, and the bytes of both and of the compressors at equal error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import lzma
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

FP32 = {f"{role}_BITS": "32" for role in ("ATTN", "MLP", "EMBED", "TABLE", "PROJ", "CONTROL")}
RUN = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), share=lambda n: range(n), all_reduce=lambda t: t)
GAP_TOKENS = 40_960
PARTS = ("bytes", "error", "gap", "speed", "encode")
BYTE_CODES = {
    "int6 by row maximum": {"attn_bits": 6, "mlp_bits": 6, "embed_bits": 6, "table_bits": 6, "quant_clip": "max"},
    "int5 by row maximum": {"attn_bits": 5, "mlp_bits": 5, "embed_bits": 5, "table_bits": 5, "quant_clip": "max"},
    "int6 by deviation (11.5 to 14 sigmas)": {
        "attn_bits": 6,
        "mlp_bits": 6,
        "embed_bits": 7,
        "table_bits": 6,
        "proj_bits": 6,
        "quant_clip": "sigma",
    },
}


def train_weights(path: Path, data: Path, seconds: float) -> None:
    """Train the cpu recipe and store everything in fp32 at `path`."""
    env = {**os.environ, **FP32, "RECIPE": "cpu", "MAX_WALLCLOCK_SECONDS": str(seconds), "ARTIFACT": str(path)}
    env |= {"ARTIFACT_LIMIT": "100000000", "COMPRESSOR": "zstd", "ZSTD_LEVEL": "1", "EVAL_STRIDE": "0"}
    env |= {"DATA_PATH": str(data), "NGRAM_SCORE": "off", "NGRAM_TABLE": "none"}
    subprocess.run([sys.executable, tg.__file__], env=env, check=True)


class Subject:
    """The trained model, its tensors, and validation text to measure gaps on."""

    def __init__(self, path: Path, data: Path) -> None:
        blob = path.read_bytes()
        header = {
            k: v for k, v in tg.read_header(blob)[0]["config"].items() if k not in (*FP32, "COMPRESSOR", "ZSTD_LEVEL")
        }
        self.cfg = tg.load_config({"VAL_TOKENS": str(GAP_TOKENS), "DATA_PATH": str(data)}, header).cfg
        self.cfg = dataclasses.replace(self.cfg, quant_min_numel=4096, control_bits=16, gptq_n_samples=64)
        paths = tg.find_data(self.cfg)
        self.text = tg.load_validation(self.cfg, paths.folder, tg.Tokenizer(paths.tokenizer, self.cfg.vocab_size))
        self.stream = tg.TokenStream(tg.load_split(paths.folder, "train"), self.cfg.vocab_size)
        self.model = tg.load_model(self.cfg, RUN, blob)
        self.named = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.store = {n: p.store for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def bpb(self, named: dict[str, torch.Tensor]) -> float:
        """Bits a byte of the validation prefix, in non-overlapping windows."""
        self.model.load_state_dict(named)
        length = self.cfg.eval_len
        n = (len(self.text.tokens) - 1) // length * length
        inputs, targets = self.text.tokens[:n].view(-1, length), self.text.tokens[1 : n + 1].view(-1, length)
        nats = sum(
            float(self.model.nll(inputs[i : i + 8], targets[i : i + 8]).double().sum())
            for i in range(0, len(inputs), 8)
        )
        return nats / np.log(2) / int(self.text.bytes[1 : n + 1].sum())

    def gap(self, stored: dict[str, tg.QuantizedTensor], before: float) -> float:
        """bpb after minus before quantisation."""
        return self.bpb({n: tg.dequantize(s) for n, s in stored.items()}) - before


# ---- bytes for the same codes


def sorted_rows(codes_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy chain of nearest rows (L1), from row 0."""
    left, order, at = np.ones(len(codes_RC), bool), [0], 0
    wide = codes_RC.astype(np.float32)
    left[0] = False
    while left.any():
        rest = np.flatnonzero(left)
        at = int(rest[np.abs(wide[rest] - wide[at]).sum(axis=1).argmin()])
        order.append(at)
        left[at] = False
    return codes_RC[order], np.array(order, np.uint16)


def lrzip_bytes(raw: bytes) -> int:
    """Size after lrzip -z -L9 (ZPAQ)."""
    with tempfile.TemporaryDirectory() as room:
        Path(room, "raw").write_bytes(raw)
        subprocess.run(["lrzip", "-q", "-z", "-L9", "raw"], cwd=room, check=True, capture_output=True)
        return Path(room, "raw.lrz").stat().st_size


def compare_bytes(subject: Subject) -> None:
    """Our stream against each compressor that is installed, for each way of making codes."""
    for label, knobs in BYTE_CODES.items():
        stored = tg.quantize(dataclasses.replace(subject.cfg, **knobs), subject.named, subject.store)
        coded = {n: s for n, s in stored.items() if s.codes is not None}
        arrays = [s.codes.numpy() for s in coded.values()]
        raw, count = b"".join(a.tobytes() for a in arrays), sum(a.size for a in arrays)
        ours = 0
        for role in {s.role for s in coded.values()}:
            group = [s.codes.numpy() for s in coded.values() if s.role == role]
            ours += len(tg.encode_codes(group, predictable=role in tg.PREDICTED_ROLES))
        plain = len(tg.encode_codes(arrays))
        order0 = sum(tg.entropy_bits(np.unique(a, return_counts=True)[1]) for a in arrays) / 8
        print(f"{label}: {count:,} codes; ours {ours:,} bytes = {8 * ours / count:.4f} bits each "
              f"(without prediction {8 * plain / count:.4f}), order-0 {8 * order0 / count:.4f}")  # fmt: skip
        others = {
            "zstd-22": len(tg.zstd_pack(raw, 22)),
            "lzma-9e": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
        }
        if importlib.util.find_spec("brotli"):
            import brotli

            others["brotli-11"] = len(brotli.compress(raw, quality=11))
        if shutil.which("lrzip"):
            others["lrzip -z -L9"] = lrzip_bytes(raw)
            chains = [sorted_rows(a) for a in arrays]
            others["lrzip, rows sorted"] = lrzip_bytes(b"".join(a.T.tobytes() for a, _ in chains)) + sum(
                o.nbytes for _, o in chains
            )
        for name in {"brotli-11": "brotli", "lrzip -z -L9": "lrzip"}.items():
            if name[0] not in others:
                print(f"  {name[0]}: not measured, {name[1]} is not installed")
        for name, size in others.items():
            print(f"  {name:<20} {size:>10,} bytes {8 * size / count:.4f} bits   ours / it: {ours / size:.4f}")


# ---- gap against bytes


def timed_budget(cfg: tg.Config, named: dict, store: dict, calibration: tg.Calibration) -> tuple[tg.Budget, float, int]:
    """Fill TARGET_BYTES without code bytes, its seconds and how often it packed."""
    packs, pack, started = [], tg.pack, time.perf_counter()
    tg.pack = lambda *given: packs.append(0) or pack(*given)
    budget = tg.BudgetSearch(cfg, {}, named, store, calibration, 0).fill()
    tg.pack = pack
    return budget, time.perf_counter() - started, len(packs)


def compare_gaps(subject: Subject) -> None:
    """For widths 3 to 8: rounding by row maximum, GPTQ at the same steps, and GPTQ + allocation in rounding's bytes."""
    before = subject.bpb(subject.named)
    cfg = dataclasses.replace(subject.cfg, gptq_enabled=True, target_bytes=1)
    started = time.perf_counter()
    calibration = tg.calibrate(cfg, RUN, subject.model, tg.calibration_inputs(cfg, RUN, subject.stream))
    print(
        f"bpb before quantisation {before:.6f} ({GAP_TOKENS} tokens); calibration {time.perf_counter() - started:.1f}s"
    )
    print("bits   bytes rounding    gap   | bytes GPTQ    gap   | bytes GPTQ+allocation    gap   | ratio to rounding")
    for bits in range(3, 9):
        cfg = dataclasses.replace(
            subject.cfg, attn_bits=bits, mlp_bits=bits, embed_bits=bits, table_bits=bits, proj_bits=bits
        )
        nearest = tg.quantize(cfg, subject.named, subject.store)
        gptq = tg.quantize(cfg, subject.named, subject.store, calibration.hessians)
        size, gptq_size = len(tg.pack(cfg, {}, nearest)), len(tg.pack(cfg, {}, gptq))
        aim = dataclasses.replace(cfg, target_bytes=size, gptq_enabled=True)
        budget, seconds, packs = timed_budget(aim, subject.named, subject.store, calibration)
        gaps = [subject.gap(s, before) for s in (nearest, gptq, budget.stored)]
        print(f"{bits}   {size:>10,} {gaps[0]:+.6f}   {gptq_size:>10,} {gaps[1]:+.6f}   {budget.spent:>10,} {gaps[2]:+.6f}   "
              f"{gaps[1] / gaps[0]:.3f} {gaps[2] / gaps[0]:.3f}   budget {budget.spent / size:.2%} in {packs} packs, {seconds:.1f}s", flush=True)  # fmt: skip


# ---- error at equal bytes, bytes at equal error


class Damage(NamedTuple):
    """What quantisation does to a model, all tensors whose inputs were seen together, and what its text then costs."""

    hessian: float  # tr(E H E^T)
    fisher: float  # nats a token that the byte budget minimises: rows weighted by their Fisher information
    divergence: (
        float  # nats a token from the model before, on training text: quieter than the gap, which has a first order
    )
    gap: float  # bpb

    def against(self, plain: Damage) -> str:
        """As decibels and as a share of another's."""
        decibels = (
            f"{name} {10 * np.log10(a / b):+.2f} dB" for name, a, b in zip(self._fields[:3], self, plain, strict=False)
        )
        return f"{', '.join(decibels)}, gap {self.gap:+.6f} ({self.gap / plain.gap:.3f})"


@torch.no_grad()
def log_probabilities(subject: Subject, named: dict[str, torch.Tensor], sequences: int = 16) -> torch.Tensor:
    """(N, V) over a sample of the training text."""
    subject.model.load_state_dict(named)
    length, apart = subject.cfg.train_seq_len, subject.stream.total // (sequences + 1)
    text = np.stack([subject.stream.read(i * apart, length) for i in range(sequences)])
    parts = [
        subject.model.logits(subject.model.features(x, tg.Ctx()), tg.Ctx())
        for x in torch.from_numpy(text).long().split(4)
    ]
    return torch.cat(parts).flatten(0, 1).log_softmax(-1)


def damage(
    subject: Subject, stored: dict[str, tg.QuantizedTensor], moments: dict, fisher: dict, before: tuple
) -> Damage:
    """Measures `stored` against (bpb, log-probabilities) of the model before."""
    hessian, loss = 0.0, 0.0
    for name, h_CC in moments.items():
        if stored[name].codes is not None:
            error_RC = tg.matrix_of(tg.dequantize(stored[name]) - subject.named[name]).double()
            moved_RC = error_RC / error_RC.shape[1] if h_CC is None else error_RC @ h_CC.double()
            cost_R = (moved_RC * error_RC).sum(dim=1)
            hessian += 0.0 if h_CC is None else float(cost_R.sum())
            loss += float(fisher[name].double() @ cost_R) / (2 if h_CC is None else 2 * float(h_CC.double().trace()))
    now = log_probabilities(subject, {n: tg.dequantize(s) for n, s in stored.items()})
    divergence = float((before[1].exp() * (before[1] - now)).sum(dim=-1).double().mean())
    return Damage(hessian, loss, divergence, subject.gap(stored, before[0]))


class EvenColumns(tg.InputStats):
    """Steps of columns for independent codes too."""

    def columns(self, name: str) -> torch.Tensor | None:
        factors = self.factors[name]
        return None if factors is None else tg.column_steps(factors.weight_C)


def compare_errors(subject: Subject, rates: list[float], trellises: list[int]) -> None:
    """At equal bytes of the file, filled by the byte budget: damage of independent codes, of the same with steps of columns,
    and of each trellis."""
    cfg = dataclasses.replace(subject.cfg, gptq_enabled=True, target_bytes=1)
    calibration = tg.calibrate(cfg, RUN, subject.model, tg.calibration_inputs(cfg, RUN, subject.stream))
    policy = tg.Policy(cfg, subject.named, subject.store)
    moments, inputs = tg.InputStats(policy, calibration.hessians, None).moments, tg.InputStats
    before = subject.bpb(subject.named), log_probabilities(subject, subject.named)
    coded = sum(w.numel() for n, w in subject.named.items() if policy.bits(n) <= 8)
    print(f"{before[0]:.4f} bpb before, {coded:,} coded weights")
    for rate in rates:
        plain, paths = None, [(states, f"{states} states") for states in trellises]
        for states, label in ((0, "independent"), (0, "with steps of columns"), *paths):
            tg.InputStats = EvenColumns if label.startswith("with") else inputs
            aim = dataclasses.replace(cfg, target_bytes=int(coded * rate / 8) + 6000, quant_trellis=states)
            budget, seconds, packs = timed_budget(aim, subject.named, subject.store, calibration)
            found = damage(subject, budget.stored, moments, calibration.fisher, before)
            plain = plain or found
            print(f"{rate} bits, {label}: {budget.spent:,} bytes, {aim.target_bytes - budget.spent:,} left; "
                  f"{found.against(plain)}; {packs} packs, {seconds:.1f}s", flush=True)  # fmt: skip
    tg.InputStats = inputs


def compare_at_equal_error(states: int, shape: tuple[int, int] = (1024, 512)) -> None:
    """Bytes of Gaussian weights without Hessians: paths in our stream, independent codes of the same error in all others."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.rand(shape[1]).add(0.5)
    codes = tg.TrellisSearch((w / 0.2)[None], None, states).codes()[0]
    goal, step = float((codes * 0.2 - w).square().mean()), 0.4
    for _ in range(6):
        uniform = (w / step).round().clamp(-127, 127).to(torch.int8)
        step *= (goal / float((uniform * step - w).square().mean())) ** 0.5
    ours, raw = len(tg.encode_codes([codes.numpy()], False, states)), uniform.numpy().tobytes()
    others = {"our stream of independent codes": len(tg.encode_codes([uniform.numpy()])), "zstd-22": len(tg.zstd_pack(raw, 22)),
              "lzma-9e": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))}  # fmt: skip
    if importlib.util.find_spec("brotli"):
        import brotli

        others["brotli-11"] = len(brotli.compress(raw, quality=11))
    if shutil.which("lrzip"):
        others["lrzip -z -L9"] = lrzip_bytes(raw)
    print(f"equal error, {w.numel():,} weights: {states} states {ours:,} bytes = {8 * ours / w.numel():.4f} bits each")
    for name, size in others.items():
        print(f"  {name:<32} {size:>10,} bytes {8 * size / w.numel():.4f} bits   ours / it: {ours / size:.4f}")


# ---- speed


def recipe_of(name: str) -> tg.Config:
    return tg.load_config({"RECIPE": name}).cfg


def shapes_of(cfg: tg.Config) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Shape and storage role of each parameter."""
    with torch.device("meta"):
        model = tg.GPT(cfg)
    return {n: p.shape for n, p in model.named_parameters()}, {n: p.store for n, p in model.named_parameters()}


def time_packing(label: str, shapes: dict[str, torch.Size], store: dict[str, str]) -> tuple[float, float]:
    """(seconds to pack, to unpack) weights at about 3.4 bits: Gaussian, but embeddings of correlated columns."""
    cfg = tg.Config(quant_clip="sigma", control_bits=16)
    named = {n: torch.randn(shape) * 0.02 for n, shape in shapes.items()}
    for n in named:
        if store[n] in tg.PREDICTED_ROLES:
            named[n] = named[n] @ (
                torch.eye(shapes[n][1]) + torch.randn(shapes[n][1], shapes[n][1]) / shapes[n][1] ** 0.5
            )
    stored = tg.quantize(cfg, named, store)
    t0 = time.perf_counter()
    c0 = time.process_time()
    blob = tg.pack(cfg, {}, stored)
    t1, c1 = time.perf_counter(), time.process_time()
    tg.unpack(blob, {n: (tuple(shapes[n]), store[n]) for n in stored})
    t2, c2 = time.perf_counter(), time.process_time()
    total = sum(w.numel() for w in named.values())
    print(
        f"{label}: {total:,} weights, {len(blob):,} bytes; pack {t1 - t0:.2f}s ({c1 - c0:.2f}s of CPU), unpack {t2 - t1:.2f}s ({c2 - c1:.2f}s of CPU)"
    )
    return t1 - t0, t2 - t1


def time_gptq(cfg: tg.Config) -> float:
    """Seconds of GPTQ for every matrix of a configuration."""
    shapes, store = shapes_of(cfg)
    cfg = dataclasses.replace(
        cfg, gptq_enabled=True, gptq_variant="cholesky", gptq_order="descending", quant_min_numel=0
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = {n: torch.randn(shape, device=device) * 0.02 for n, shape in shapes.items()}
    matrices = {n: w for n, w in named.items() if w.dim() == 2 and store[n] in ("attn", "mlp", "embed")}
    hessians = {
        n.removesuffix(".weight"): (x := torch.randn(2 * w.shape[1], w.shape[1], device=device)).T @ x
        for n, w in matrices.items()
    }
    started, cpu = time.perf_counter(), time.process_time()
    tg.quantize(cfg, matrices, store, hessians)
    print(
        f"GPTQ of the {len(matrices)} matrices of {cfg.recipe} on {device.type}: {(seconds := time.perf_counter() - started):.1f}s ({time.process_time() - cpu:.1f}s of CPU)"
    )
    return seconds


@contextlib.contextmanager
def timed(spans: dict[str, list[float]], targets: dict[str, tuple[object, str]]) -> Iterator[None]:
    """Adds the CPU seconds of every call of the named functions to `spans`, but for calls inside another of them."""
    kept, inside = [(owner, name, getattr(owner, name)) for owner, name in targets.values()], []

    def wrapped(label: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            started = time.process_time()
            inside.append(label)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    spans.setdefault(label, []).append(time.process_time() - started)

        return call

    for label, (owner, name, function) in zip(targets, kept, strict=True):
        setattr(owner, name, wrapped(label, function))
    yield
    for owner, name, function in kept:
        setattr(owner, name, function)


def time_encode(run: tg.Run, shapes: dict[str, torch.Size], store: dict[str, str], states: int) -> None:
    """CPU seconds of this rank to fill 3.5 bits a weight with weights of uneven importance as trellis paths inside GPTQ, together
    with the other ranks, and to decode them."""
    torch.manual_seed(0)
    named, hessians = {n: torch.randn(shape) * 0.02 for n, shape in shapes.items()}, {}
    for n, shape in shapes.items():
        if store[n] in ("attn", "mlp", "embed"):
            x = torch.randn(2 * shape[1], shape[1]) * torch.logspace(-0.5, 0.5, shape[1])
            hessians[n.removesuffix(".weight")] = x.T @ x
    fisher = {n: torch.rand(tg.rows_and_columns(w.shape)[0]) * 10 ** (3 * torch.rand(())) for n, w in named.items()}
    total = sum(w.numel() for w in named.values())
    cfg = tg.Config(target_bytes=int(total * 3.54 / 8), control_bits=16, quant_trellis=states, gptq_enabled=True)
    spans: dict[str, list[float]] = {}
    parts = {"curves": (tg.BudgetSearch, "__init__"), "searches": (tg, "round_all"), "packing": (tg, "pack"),
             "last bytes": (tg.BudgetSearch, "spend_rest"), "unpack": (tg, "unpack")}  # fmt: skip
    started = time.perf_counter()
    with timed(spans, parts):
        budget = tg.BudgetSearch(cfg, {}, named, store, tg.Calibration(hessians, fisher), 0, run=run).fill()
        seconds = time.perf_counter() - started
        tg.unpack(budget.blob, {n: (s.shape, s.role) for n, s in budget.stored.items()})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    whole = sum(sum(span) for label, span in spans.items() if label != "unpack")
    print(f"{states} states, {total:,} weights, rank {run.rank} of {run.world}, {torch.get_num_threads()} threads: {budget.spent:,} bytes "
          f"{hashlib.sha256(budget.blob).hexdigest()[:8]}, {cfg.target_bytes - budget.spent:,} left; {whole:.1f} s of CPU in {seconds:.1f} s; "
          f"peak memory {peak:.0f} MiB\n" + "\n".join(f"  {label:<10} {sum(span):6.1f} s of CPU in {len(span)} calls: "
          f"{' '.join(f'{x:.1f}' for x in span[:12])}" for label, span in spans.items()), flush=True)  # fmt: skip


def large_shapes(layers: int = 11) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Of 36 M weights with 11 layers: 512 wide, MLP 4x, 8,192 pieces."""
    return shapes_of(tg.Config(num_layers=layers, mlp_mult=4.0, vocab_size=512 * layers * 8 // 11 * 2))


def measure_speed() -> None:
    """Pack and unpack of the baseline and of a 36 M shape, GPTQ of pr850."""
    time_packing("baseline", *shapes_of(recipe_of("baseline")))
    time_packing("36 M", *large_shapes())
    time_gptq(recipe_of("pr850"))


def measure_encode(trellises: list[int], layers: int) -> None:
    """The whole encoder, by all ranks of torchrun where it starts this: independent codes and each trellis."""
    shapes, store = large_shapes(layers)
    run = tg.Run.start(tg.Config(device="cpu"))
    for states in trellises:
        time_encode(run, shapes, store, states)
    run.close("ok")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("logs/weights.pgz"))
    parser.add_argument("--data", type=Path, default=tg.SAMPLE_DIR)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rates", type=float, nargs="+", default=[3.0, 3.5, 4.0, 4.5], help="bits a weight of `error`")
    parser.add_argument(
        "--states",
        type=int,
        nargs="+",
        choices=(0, *tg.TRELLISES),
        default=list(tg.TRELLISES),
        help="trellises of `error` and `encode`",
    )
    parser.add_argument("--layers", type=int, default=11, help="of the weights of `encode`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    if set(args.parts) - {"speed", "encode"}:
        if not args.weights.exists():
            train_weights(args.weights, args.data, args.seconds)
        subject = Subject(args.weights, args.data)
        if "bytes" in args.parts:
            compare_bytes(subject)
        if "error" in args.parts:
            compare_errors(subject, args.rates, args.states)
        if "gap" in args.parts:
            compare_gaps(subject)
    if "error" in args.parts:
        for states in args.states:
            compare_at_equal_error(states)
    if "speed" in args.parts:
        measure_speed()
    if "encode" in args.parts:
        measure_encode(args.states, args.layers)


if __name__ == "__main__":
    main()
