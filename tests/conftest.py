"""Shared by all tests: a tiny tokenizer, tiny shards, a tiny configuration, and three ways to run the script."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import train_gpt as tg  # before torch, since it sets how torch's threads wait

# isort: split
import numpy as np
import pytest
import sentencepiece
import torch

from tools import pack_code

SCRIPT = Path(tg.__file__).resolve()
VOCAB, BOS, SEQ = 300, 1, 32
WORDS = (
    "apple river stone cloud engine garden letter mirror needle orange pencil quiet rocket silver table under".split()
)


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(4, 12)))) + f", number {int(rng.integers(1000))}."


def documents(seed: int, n: int) -> list[str]:
    """n short English-like documents, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [" ".join(sentence(rng) for _ in range(int(rng.integers(1, 5)))) for _ in range(n)]


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """A shard; `magic`, `version` and `count` can be made wrong."""
    head = np.zeros(256, dtype="<i4")
    head[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(head.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


class Data(NamedTuple):
    """Tiny data: two training shards and two validation shards beside their tokenizer."""

    folder: Path
    tokenizer: Path
    train: np.ndarray
    val: np.ndarray
    val_texts: list[str]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    model = folder / "tokenizer_300.model"
    texts, val_texts = documents(1, 220), documents(2, 40)
    blob = folder / "tokenizer_300"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(blob), vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=0, bos_id=BOS, eos_id=2,
        unk_id=3, minloglevel=2, num_threads=1, hard_vocab_limit=True,
    )  # fmt: skip
    (folder / "tokenizer_300.vocab").unlink()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    train, val = (np.array([i for t in ts for i in [BOS, *sp.encode(t)]]) for ts in (texts, val_texts))
    for split, tokens in (("train", train), ("val", val)):
        cut = len(tokens) * 2 // 3
        write_shard(folder / f"fineweb_{split}_000000.bin", tokens[:cut])
        write_shard(folder / f"fineweb_{split}_000001.bin", tokens[cut:])
    return Data(folder, model, train, val, val_texts)


def tiny_env(data: Data, folder: Path, **changes) -> dict[str, str]:
    """Environment of a run of seconds in `folder`: 2 blocks of width 32, 4 sequences of 32 tokens a step, 6 steps."""
    values = {
        "RECIPE": "baseline", "DEVICE": "cpu", "TRAIN_DTYPE": "fp32", "COMPILE": 0, "ATTENTION": "sdpa", "DATA_PATH": data.folder, "LOG_DIR": folder,
        "RUN_ID": "tiny", "VOCAB_SIZE": VOCAB, "NUM_LAYERS": 2, "MODEL_DIM": 32, "NUM_HEADS": 2, "NUM_KV_HEADS": 1,
        "TRAIN_SEQ_LEN": SEQ, "TRAIN_BATCH_TOKENS": 4 * SEQ, "ITERATIONS": 6, "MAX_WALLCLOCK_SECONDS": 0,
        "WARMUP_STEPS": 1, "WARMDOWN_ITERS": 3, "VAL_LOSS_EVERY": 0, "TRAIN_LOG_EVERY": 1, "EVAL_STRIDE": 8, **changes,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


@pytest.fixture
def tiny(data: Data, tmp_path: Path) -> dict[str, str]:
    """`tiny_env` in the test's own folder."""
    return tiny_env(data, tmp_path / "logs")


def config(env: dict[str, str], **more) -> tg.Config:
    """The Config of an environment with changes, as the script itself would load it."""
    changes = {name: str(value) for name, value in more.items()}
    return tg.load_config({**env, **changes}, has_gpu=lambda: False).cfg


@pytest.fixture
def run(tiny):
    """One rank's Run, without logs and without handlers."""
    return tg.Run(config(tiny), rank=0, local_rank=0, world=1, local_world=1)


@pytest.fixture(autouse=True)
def undisturbed():
    """Whatever a run in this process sets for the whole process is set back."""
    handlers = {s: signal.getsignal(s) for s in tg.STOP_SIGNALS}
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")  # a CPU's setting beside a GPU's cannot be read any more
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    tg.Run.current = None


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from threads that wait for each other on a busy machine; `undisturbed` sets the number back."""
    torch.set_num_threads(1)


class Uniform:
    """A base of the n-grams that takes every token for as likely as any other: log V nats each, whatever the prefix."""

    enrichment = None

    def __init__(self, vocab_size: int, n_tokens: int) -> None:
        self.vocab_size = vocab_size
        self.entropy = torch.full((n_tokens,), float(np.log(vocab_size)), dtype=torch.float64)

    def score(self, tokens, lo, hi):  # noqa: ARG002
        return -self.entropy[lo:hi]

    def dist(self, tokens, t):  # noqa: ARG002
        return torch.exp(-self.entropy[t]).expand(self.vocab_size)

    def update(self, tokens, lo, hi):
        """Nothing to learn."""


class NoCompiler(torch._dynamo.exc.BackendCompilerFailed):
    """What torch.compile raises where it cannot compile."""

    def __init__(self) -> None:
        RuntimeError.__init__(self, "no compiler\nand a long tail")


def assert_same(a, b) -> None:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# ---- running the script


REAL_PACKING = {"start_packing": tg.start_packing, "counted_code": tg.counted_code}


@functools.cache
def packed_code() -> bytes:
    """The script's packed form."""
    return pack_code.pack_code(tg.source_text())


@pytest.fixture(autouse=True)
def packed_once(monkeypatch):
    """Runs in this process count the packed script without a child process each; test_pack_code.py sets REAL_PACKING."""
    monkeypatch.setattr(tg, "start_packing", lambda _: None)
    monkeypatch.setattr(
        tg, "counted_code", lambda c: (packed_code() if c.code_form == "packed" else tg.script_bytes(), "")
    )


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def script(capsys):
    """script(env, *args, **changes) -> Result: the script's main in this process."""

    def call(env: dict[str, str], *args: str, **changes) -> Result:
        capsys.readouterr()
        status = tg.main(list(args), {**env, **{name: str(value) for name, value in changes.items()}})
        return Result(status, *capsys.readouterr())

    return call


def process_env(env: dict[str, str]) -> dict[str, str]:
    """The environment for a child: this one without knobs, one thread, the code not packed for its count, and `env`."""
    mine = {name: value for name, value in os.environ.items() if name not in tg.FIELDS}
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CODE_FORM": "source", **env}


def spawn(env: dict[str, str], *launcher: str) -> subprocess.Popen:
    """The script in a process of its own; `launcher` are options of torchrun, none for plain python."""
    start = ["-m", "torch.distributed.run", *launcher] if launcher else []
    return subprocess.Popen([sys.executable, *start, str(SCRIPT)], env=process_env(env), text=True, cwd=SCRIPT.parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


def children(pid: int) -> list[int]:
    """Process ids of the children of a process; none where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def finished(process: subprocess.Popen, seconds: float = 240) -> Result:
    """Wait for a process of `spawn`; a run that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in [*children(process.pid), process.pid]:  # torchrun's workers too: they hold the pipes open
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {seconds} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    return Result(process.returncode, out, err)


def torchrun(env: dict[str, str], ranks: int) -> Result:
    """The script under torchrun on this machine; `run_ranks` is faster where torchrun itself does not matter."""
    return finished(spawn(env, "--standalone", f"--nproc_per_node={ranks}"))


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train_gpt"])  # ranks begin with all modules loaded, seconds each


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_rank(env: dict[str, str], rank: int, program: str, output: Path) -> None:
    """The script's main, or the main of a module around it, as one rank of `run_ranks`; both streams end in a file."""
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    sys.exit(importlib.import_module(program).main() if program else tg.main([], os.environ))


def run_ranks(env: dict[str, str], n: int, program: str = "", seconds: float = 240) -> str:
    """What n ranks of the script on this machine print, with the variables that torchrun sets; all must end with status 0."""
    env = {**process_env(env), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port())}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"rank{i}") for i in range(n)]
        group = [forks.Process(target=run_rank, args=(env, i, program, out)) for i, out in enumerate(outputs)]
        for process in group:
            process.start()
        for process in group:
            process.join(seconds)
            process.kill()  # where it hangs
            process.join()
        text = "\n".join(out.read_text() for out in outputs)
    assert not any(process.exitcode for process in group), text[-6000:]
    return text


# ---- reading logs


def events(env: dict[str, str], kind: str | None = None) -> list[dict]:
    """Lines of a run's JSONL, all or of one kind."""
    path = Path(env["LOG_DIR"]) / f"{env['RUN_ID']}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def losses(env: dict[str, str]) -> dict[int, float]:
    """Step -> training loss; of a resumed run the later line of a step counts."""
    return {e["step"]: e["train_loss"] for e in events(env, "step")}


def score_of(env: dict[str, str]) -> float:
    return events(env, "score")[-1]["val_bpb"]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
