"""What the tools share: the command line, an artifact opened for use, and its next-token distributions in lanes.

A lane is one of several independent texts, or parts of a text, whose tokens are predicted side by side, one position at a
time. Its distributions are those of the stage that the evaluator scores with: its experts (`expert_chain`), with online weights;
each token is predicted first and learned from afterwards. Test-time training stays off: the network is as packed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import train_gpt as tg

sys.path.insert(0, str(Path(tg.__file__).resolve().parent / "data"))
import caseops

ARROWS = dict(zip(map(ord, caseops.OPERATORS), ("↑", "⇈", "↑", "\\"), strict=True))

# ---- the command line


def run_tool(job: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Exit status of `job` called with the parsed arguments: 0 done, 2 a mistake of the user, 1 a signal or a full disk.

    Each is one message on stderr; a reader that goes away (`| head`) ends the tool quietly. argparse ends the process
    itself, with status 2, on wrong arguments. What the terminal cannot show is written as an escape.
    """
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        ranks = os.environ.get("WORLD_SIZE", "1")
        if ranks != "1":
            raise tg.ConfigError(f"WORLD_SIZE={ranks!r}: this tool runs in one process; start it with python instead of torchrun, "
                                 "or unset WORLD_SIZE")  # fmt: skip
        job(args)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (what is left in the buffer goes nowhere)
    except (tg.ConfigError, tg.ArtifactError, tg.Interrupted, OSError) as e:
        if not os.environ.get("RANK", "").strip("0"):
            print("\n".join(f"error: {line}" for line in str(e).splitlines()), file=sys.stderr)
        unread = PermissionError | IsADirectoryError | NotADirectoryError  # a user's mistakes too
        return 2 if isinstance(e, tg.ConfigError | tg.ArtifactError | unread) else 1
    return 0


def tool_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the tool's docstring, as it is written there."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_artifact(parser: argparse.ArgumentParser) -> None:
    """Add --artifact."""
    parser.add_argument("--artifact", required=True, metavar="FILE", help="artifact of a finished run: logs/RUN_ID.pgz")


def number_in(low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` between low and high."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number between {low:g} and {high:g}")
        return value

    return read


def utf8(text: str) -> str:
    """An argparse type: text, of which no byte of the command line was anything else."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise argparse.ArgumentTypeError(f"not UTF-8 at character {e.start + 1}") from None
    return text


def read_bytes(path: str) -> bytes:
    """The bytes of a file that an argument names; ConfigError if it cannot be read."""
    return tg.read_named("FILE", path, "name a file that can be read")


def output_path(path: str, force: bool) -> Path:
    """The file to write; ConfigError where it exists, unless `force`, or is a folder."""
    if Path(path).is_dir() or (Path(path).exists() and not force):
        raise tg.ConfigError(f"{path} exists: choose another name with -o, or --force to overwrite it")
    return Path(path)


# ---- an artifact, opened


class TextTokens:
    """Text to token ids and back, with the artifact's tokenizer and, where its header names one, its transform of the text.

    The one place that knows of transforms: they encode before the tokenizer and decode after it. Raises ConfigError for a
    transform that is not known here.
    """

    def __init__(self, sp: Any, transform: str = "") -> None:
        if transform not in ("", "caseops"):
            raise tg.ConfigError(
                f"the artifact transforms its text by {str(transform)[:40]!r}; use the tools of its script"
            )
        self.sp, self.case_ops = sp, transform == "caseops"

    def normalize(self, text: str) -> str:
        """The text as tokens keep it, with plain spaces."""
        return caseops.normalize(text) if self.case_ops else self.sp.normalize(text).replace("▁", " ")

    def stream(self, normal: str) -> tuple[str, list[bool]]:
        """(what the tokenizer sees of a normalised text, whether each of its characters stands for one of the text)."""
        if not self.case_ops:
            return normal, [True] * len(normal)
        stream, visible = caseops.encode(normal), []
        for i, c in enumerate(stream):  # an operator acts, and is no text, unless an acting escape stands before it
            acts_before = i > 0 and stream[i - 1] == caseops.ESCAPE and not visible[-1]
            visible.append(c not in caseops.OPERATORS or acts_before)
        return stream, visible

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS."""
        return self.sp.encode(self.stream(self.normalize(text))[0] if self.case_ops else text)

    def decode(self, ids: list[int]) -> str:
        """The normalised text of token ids."""
        stream = self.sp.decode(ids)
        return caseops.decode(stream, strict=False) if self.case_ops else stream

    def piece(self, token: int) -> str:
        """How a token is spelled for people: with plain spaces, and arrows for capitals."""
        return self.sp.id_to_piece(token).replace("▁", " ").translate(ARROWS)


@dataclass
class Predictor:
    """An artifact's network, n-grams and tokenizer, ready to give distributions of the next token."""

    cfg: tg.Config
    run: tg.Run
    model: tg.GPT
    text: TextTokens
    name: str = ""  # first 16 digits of the artifact's SHA-256
    settings: Mapping[str, Any] = field(default_factory=dict)  # scoring knobs that the environment changed
    tables: tg.Tables = tg.NO_TABLES
    size: int = 0  # bytes of the artifact

    def lanes(self, lanes: int, length: int, stage: str = "") -> Lanes:
        """Distributions for `lanes` texts of at most `length` tokens, as a stage of the evaluator gives them: the one that is the
        score unless another is named."""
        stage = stage or self.cfg.final_stage
        network = LaneNetwork(self.cfg, self.run, self.model, stage, lanes, length)
        mixture = LaneMixture(self.cfg, network, stage, length, self.tables.trie)
        return mixture if mixture.chains[0] else network


# Knobs that change the distributions: a compressed file names those that differ from the artifact's.
SCORING_KNOBS = tuple(
    n for n in tg.FIELDS if n.startswith(("EVAL_SEQ_LEN", "EVAL_STRIDE", "EVAL_STAGES", "SCORE_STAGE", "NGRAM_"))
)


def read_artifact(path: str) -> tuple[bytes, dict[str, Any], tg.LoadedConfig]:
    """(bytes, header, configuration) of an artifact; the environment's knobs stand above those of the header."""
    blob, header = tg.open_artifact("--artifact", path)
    env = {**os.environ, "MODE": "eval", "ARTIFACT": path}
    return blob, header, tg.load_config(env, header["config"])


def open_predictor(blob: bytes, header: dict[str, Any], loaded: tg.LoadedConfig) -> Predictor:
    """The artifact's model on its device, with its tokenizer: one process, no data, no logs."""
    cfg = loaded.cfg
    transform = header.get("transform", "")
    tokenizer = tg.Tokenizer(tg.find_data(cfg, header["tokenizer_sha256"]).tokenizer, cfg.vocab_size, transform)
    tg.check_tokenizer(tokenizer, header, cfg)
    text = TextTokens(tokenizer.sp, transform)
    run = tg.Run.start(cfg)
    for notice in loaded.notices:
        run.notice(notice)
    if cfg.ttt_enabled:
        run.notice("test-time training is left out here: the network stays as it is packed")
    if cfg.final_stage == "normalized":
        run.notice(f"the n-grams of {cfg.ngram_claim} are left out here: the network predicts alone")
    settings = {n: getattr(cfg, n.lower()) for n in SCORING_KNOBS if loaded.source[n] == "env"}
    changed = {n: v for n, v in settings.items() if v != header["config"].get(n, tg.FIELDS[n].default)}
    name, model = hashlib.sha256(blob).hexdigest()[:16], tg.load_model(cfg, run, blob).eval()
    return Predictor(cfg, run, model, text, name, changed, tg.load_tables(cfg, blob), len(blob))


# ---- lanes


class LaneNetwork:
    """The network's distributions of the next token of L lanes, each a text that begins with BOS, from a key/value cache.

    Windows are the evaluator's (`window_at`): where one is full, the tokens that the next one keeps are computed again in
    one forward, because dropping keys and values would give other distributions. `length`: the most tokens of a lane.
    """

    def __init__(self, cfg: tg.Config, run: tg.Run, model: tg.GPT, stage: str, lanes: int, length: int) -> None:
        self.run, self.model, self.seq_len, self.stride = run, model, cfg.eval_len, tg.stage_stride(cfg, stage)
        self.tokens = torch.full((lanes, length + 1), tg.BOS, device=run.device)
        self.fresh_cache = lambda: tg.KVCache(cfg, lanes, min(self.seq_len, length), run.device, model.compute_dtype)
        self.t, self.window = 1, tg.Window(0, 0, 0)  # t: the next target

    @torch.no_grad()
    def dist(self) -> Tensor:
        """(L, V) float64 on the CPU: the distribution of the next token of each lane. Call it once before each `take`."""
        start = self.t - 1
        if self.t >= self.window.hi:
            self.window = tg.window_at(self.t, self.tokens.shape[1], self.seq_len, self.stride)
            start = self.window.start
            self.cache = self.fresh_cache()
        ctx = tg.Ctx(cache=self.cache)
        z = self.model.logits(self.model.features(self.tokens[:, start : self.t], ctx)[:, -1], ctx)
        self.network_p = z.cpu().double().softmax(-1)
        return self.network_p

    def mixture(self, lane: int) -> tuple[float, int, int]:  # noqa: ARG002
        """(weight of the network, tokens of the longest context seen before, how often): the network stands alone."""
        return 1.0, -1, 0

    def take(self, tokens_L: np.ndarray) -> None:
        """Take the next token of each lane, (L,)."""
        self.tokens[:, self.t] = torch.from_numpy(tokens_L).to(self.run.device)
        self.t += 1


class SeenContext:
    """A context that occurred twice or more: the tokens that followed it, how often, and the contexts one token longer."""

    __slots__ = ("counts", "longer", "total", "last")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.longer: dict[int, SeenContext | int] = {}  # an int stands for a context seen once: the position after it
        self.total, self.last = 0, -1

    def add(self, token: int, position: int) -> None:
        self.counts[token] = self.counts.get(token, 0) + 1
        self.total, self.last = self.total + 1, position


class GrowingTable:
    """NgramTable's statistics of a stream that grows by one token at a time to at most `length`: a tree of dictionaries.

    `path[k]` is the context of the last k tokens: a SeenContext, the position after its only occurrence, or None if it is new.
    Longer contexts below one seen once are made when it is seen again, so memory grows with what repeats.
    """

    device = torch.device("cpu")

    def __init__(self, vocab_size: int, order: int, length: int) -> None:
        self.vocab_size, self.order, self.n = vocab_size, order, 0
        self.tokens = torch.zeros(length, dtype=torch.int64)
        self.columns = tg.NgramStats(*(torch.full((order, length), fill, dtype=torch.int32) for fill in (0, 0, 0, -1)))
        self.root = SeenContext()
        self.path: list[SeenContext | int | None] = [self.root]
        self.holders: list[SeenContext | None] = [None]  # in whose `longer` each of them stands
        self._stream, self._columns = self.tokens.numpy(), [column.numpy() for column in self.columns]
        self._slot = np.zeros(vocab_size, np.int64)

    def counts(self, k: int) -> Tensor:
        """(length,) earlier occurrences of each token after its context of k tokens."""
        return self.columns.count[k]

    def add(self, token: int) -> None:
        """Store the statistics of the next token, then count it in the contexts of every length."""
        n, stream, before = self.n, self._stream, int(self._stream[self.n - 1])
        stream[n] = token
        parents: list[SeenContext | None] = []
        for k, (entry, holder) in enumerate(zip(self.path, self.holders, strict=True)):
            if isinstance(entry, int):  # its second occurrence
                context, follower = SeenContext(), int(stream[entry])
                context.add(follower, entry)
                context.longer[follower] = entry + 1
                holder.longer[before] = entry = context
            elif entry is None and holder is not None:
                holder.longer[before] = n
            parents.append(entry)
            if entry is not None:
                values = (entry.total, entry.counts.get(token, 0), len(entry.counts), entry.last)
                for column, value in zip(self._columns, values, strict=True):
                    column[k, n] = value
                entry.add(token, n)
        self.holders = [None, *parents][: self.order]
        self.path = [self.root, *(p and p.longer.get(token) for p in parents)][: self.order]
        self.n = n + 1

    def span(self, tokens: Tensor, lo: int, hi: int) -> tg.NgramStats:  # noqa: ARG002
        """Statistics of positions lo .. hi-1, (order, hi-lo) each, as they were when each came."""
        return tg.NgramStats(*(column[:, lo:hi] for column in self.columns))

    def contexts(self, tokens: Tensor, t: int) -> list[SeenContext | int | None]:  # noqa: ARG002
        """The contexts of the next token by length."""
        return self.path

    def followers(self, contexts: list[SeenContext | int | None]) -> Tensor:
        """Tokens that followed the last token before: whatever followed a longer context is among them."""
        entry = contexts[1] if len(contexts) > 1 else None
        if isinstance(entry, int):
            return torch.from_numpy(self._stream[entry : entry + 1].copy())
        return torch.from_numpy(
            np.fromiter(entry.counts, np.int64, len(entry.counts)) if entry is not None else np.zeros(0, np.int64)
        )

    def stats_of(self, contexts: list[SeenContext | int | None], token: Tensor) -> tg.NgramStats:
        """Statistics of the next position, (order, n), for these tokens; -1 stands for one that never followed."""
        tokens = token.numpy()
        total, count, kinds, last = (np.full((self.order, len(tokens)), fill, np.int32) for fill in (0, 0, 0, -1))
        known = tokens >= 0
        self._slot[:] = len(tokens)
        self._slot[tokens[known]] = np.flatnonzero(known)
        for k, entry in enumerate(contexts):
            if entry is None:
                continue
            if isinstance(entry, int):
                total[k], kinds[k], last[k] = 1, 1, entry
                count[k] = tokens == self._stream[entry]
                continue
            total[k], kinds[k], last[k] = entry.total, len(entry.counts), entry.last
            row = np.zeros(len(tokens) + 1, np.int32)
            size = len(entry.counts)
            row[self._slot[np.fromiter(entry.counts, np.int64, size)]] = np.fromiter(
                entry.counts.values(), np.int32, size
            )
            count[k] = row[:-1]
        return tg.NgramStats(*map(torch.from_numpy, (total, count, kinds, last)))


class LaneTable(tg.PackedTable):
    """PackedTable that also lists what followed."""

    def followers(self, contexts: list[int]) -> Tensor:
        """Tokens that were packed after the last token: those packed after a longer context are among them."""
        if self.order == 1 or contexts[1] < 0:
            return torch.zeros(0, dtype=torch.int64)
        return torch.from_numpy(self.tokens[1][slice(*self.starts[1][contexts[1] : contexts[1] + 2])])


class LaneExpert(NamedTuple):
    """One correction of a lane's distribution: the evaluator's expert, and what it corrected."""

    expert: tg.NgramExpert
    given: Tensor  # (length + 1,) float64: what its base gave the tokens so far


class LaneMixture:
    """LaneNetwork's distributions corrected by the n-gram experts of a stage, with weights learned online.

    The experts are the evaluator's (`expert_chain`) and so are the points where they learn; only the counting is incremental.
    """

    def __init__(
        self, cfg: tg.Config, network: LaneNetwork, stage: str, length: int, trie: list[tg.TrieLevel] | None
    ) -> None:
        self.network, lanes = network, len(network.tokens)
        self.span = tg.update_span(length + 1)
        self.tokens = torch.full((lanes, length + 1), tg.BOS)
        self.entropy, self.hint_prob = torch.zeros(2, lanes, length + 1, dtype=torch.float64)
        self.shares = [1.0] * lanes
        packed = LaneTable(trie, cfg.vocab_size) if trie else None
        self.chains: list[list[LaneExpert]] = []
        self.growing: list[list[GrowingTable]] = []
        for lane in range(lanes):
            features = SimpleNamespace(hint_prob=self.hint_prob[lane])
            counted = [GrowingTable(cfg.vocab_size, order, length + 1) for order in cfg.counted_orders]
            experts = tg.expert_chain(cfg, stage, features, counted, packed)[1:]
            self.chains.append([LaneExpert(e, torch.zeros(length + 1, dtype=torch.float64)) for e in experts])
            self.growing.append([table for table in counted if any(e.table is table for e in experts)])
            for table in self.growing[-1]:
                table.add(tg.BOS)
        self.bases: list[list[Tensor]] = [[] for _ in range(lanes)]  # what each expert corrected at the last `dist`
        self.t = self.learned = 1

    def dist(self) -> Tensor:
        """(L, V) float64: the mixed distribution of the next token of each lane."""
        self.network_p = self.network.dist()
        self.entropy[:, self.t] = -torch.xlogy(self.network_p, self.network_p).sum(1)
        return torch.stack([self.mixed(lane, p) for lane, p in enumerate(self.network_p)])

    def mixed(self, lane: int, p_V: Tensor) -> Tensor:
        """(V,) after all corrections of the network's distribution p_V."""
        self.shares[lane], self.bases[lane] = 1.0, []
        for expert, _ in self.chains[lane]:
            self.bases[lane].append(p_V)
            p_V = self.corrected(lane, expert, p_V)
        return p_V

    def corrected(self, lane: int, expert: tg.NgramExpert, p_V: Tensor) -> Tensor:
        """(V,) after one correction. It is computed for tokens that followed the context before; all others keep one share of p_V,
        the one that a token that never followed gets (-1)."""
        tokens, table = self.tokens[lane], expert.table
        contexts = table.contexts(tokens, self.t)
        followers = table.followers(contexts)
        if len(followers) == 0:
            return p_V
        token = torch.cat([followers, followers.new_full((1,), -1)])
        p, stats = torch.cat([p_V[followers], p_V.new_ones(1)]), table.stats_of(contexts, token)
        if isinstance(expert, tg.Tilt):
            self.hint_prob[lane, self.t] = p_V[tokens[stats.last[expert.k, 0]]]
        entropy, target = self.entropy[lane, self.t].expand(len(token)), torch.full_like(token, self.t)
        p, _ = expert.transform(tg.NgramQuery(p, stats, target, token, entropy, tokens, whole=False))
        self.shares[lane] *= float(p[-1])
        return (p_V * p[-1]).index_copy_(0, followers, p[:-1])

    def mixture(self, lane: int) -> tuple[float, int, int]:
        """(weight of the network, tokens of the longest context seen before, how often) of the last distribution."""
        table = self.chains[lane][-1].expert.table
        total = table.stats_of(table.contexts(self.tokens[lane], self.t), torch.tensor([-1])).total[:, 0]
        longest = int((total > 0).sum()) - 1
        return self.shares[lane], longest, int(total[longest])

    def take(self, tokens_L: np.ndarray) -> None:
        """Take the next token of each lane, (L,); after every `span` of them the weights learn."""
        for lane, token in enumerate(tokens_L.tolist()):
            for (_, given), p_V in zip(self.chains[lane], self.bases[lane], strict=True):
                given[self.t] = p_V[token]
            for table in self.growing[lane]:
                table.add(token)
        self.tokens[:, self.t] = torch.from_numpy(tokens_L)
        self.network.take(tokens_L)
        self.t += 1
        if self.t - self.learned == self.span:
            for lane in range(len(self.chains)):
                self.learn(lane, self.learned, self.t)
            self.learned = self.t

    def learn(self, lane: int, lo: int, hi: int) -> None:
        """Let the experts of a lane learn from targets lo .. hi-1, as the evaluator's do."""
        for expert, given in self.chains[lane]:
            query = expert.query(given[lo:hi], self.entropy[lane, lo:hi], self.tokens[lane], lo, hi)
            expert.learn(expert.transform(query)[1])


Lanes = LaneNetwork | LaneMixture
