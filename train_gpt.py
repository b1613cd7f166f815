"""Train the best language model that fits 16,000,000 bytes, pack it, reload it and score it as a code length.

    python train_gpt.py                                            on a laptop: the `cpu` recipe on the shipped sample
    torchrun --standalone --nproc_per_node=8 train_gpt.py          on 8xH100: the `frontier` recipe
    RECIPE=pr164 SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py
    MODE=eval ARTIFACT=logs/run.pgz python train_gpt.py            score an artifact in a fresh process
    MODE=audit ARTIFACT=logs/run.pgz python train_gpt.py           is that score a code length?
    python train_gpt.py --help | --dump-config | --toc
    python tools/codec.py --help                                   also sample, explain: what an artifact is good for; plan, pack_code

Every knob is an environment variable, declared once in section 1. The file is ordered as data flows; a name is used only
below its definition, so a reader can stop anywhere and have understood all above.

    0 HEAD        imports, optional kernels
    1 CONFIG      every knob declared once; recipes; load_config(env)
    2 RUNTIME     device, ranks, clock, logging, seeding
    3 DATA        shards, byte counts per token, batches
    4 MODEL       GPT and its parts
    5 OPTIMIZER   Muon, AdamW, parameter roles, reductions
    6 TRAINING    schedules, averaging, the loop
    7 QUANTIZER   rounding, GPTQ, low-rank correction; bits and steps a tensor
    8 ARTIFACT    container, entropy coding, size account
    9 EVALUATOR   sliding window, n-gram statistics, mixing, test-time training, audit
    10 MAIN       MODE -> a short list of calls

Two walks. A batch: TokenStream §3 -> Batcher.next §3 -> GPT.features §4 -> GPT.nll §4 -> Optimizers.step §5 -> Run.log §2.
A weight: its tags (role, store) §4 -> Muon §5 -> WeightAverage §6 -> quantize §7 -> pack, unpack §8 -> the same GPT
scored by the one score-first driver §9.
"""

# ==== 0 HEAD ==========================================================================================================
from __future__ import annotations

import bz2
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import filecmp
import fnmatch
import functools
import hashlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import string
import struct
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

# OpenMP reads these once, when torch is imported. Threads that spin long at a barrier keep each other from a core that another program uses.
os.environ.update({} if {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"} & {*os.environ} else
                  {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"})  # GNU's: rounds; Intel's and LLVM's: ms  # fmt: skip


def bound_cpus() -> set[int]:
    """The numbers of the CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}


def busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """CPU seconds that other processes have used since boot on the CPUs that this one may run on; 0 where the system does not say."""
    try:
        rows = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
    except OSError:
        return 0.0
    own = {f"cpu{n}" for n in bound_cpus()}  # columns: user, nice, system, idle, iowait, irq, softirq, steal
    ticks = sum(sum(map(int, row[1:9])) - int(row[4]) - int(row[5]) for row in rows if row[0] in own)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


try:
    os.getcwd()
except OSError as e:  # oneMKL aborts where torch is imported
    print(f"error: the working folder cannot be used ({e.strerror}); cd to one that exists", file=sys.stderr)
    sys.exit(2)
else:
    BEGUN = time.monotonic(), busy_seconds()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.adamw import adamw

BUSY_CPUS = (busy_seconds() - BEGUN[1]) / (time.monotonic() - BEGUN[0])  # by other programs, while torch was imported
SCRIPT = Path(__file__).resolve()
PACKED = "__source__" in globals()  # tools/pack_code.py leaves out what stands below `if not PACKED`

# ==== 1 CONFIG ========================================================================================================

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16, 32)  # bits a weight may be stored in: codes up to 8, floats above
# Of the evaluation, in the order they are scored.
STAGES = ("roundtrip", "sliding", "ttt", "normalized", "tilt", "table", "ngram")


class ConfigError(ValueError):
    """A user's mistake: the message names the knob or file, the value and the remedy. Exit status 2."""


KNOB_DEFAULTS = {"choices": (), "several": "", "lo": -math.inf, "hi": math.inf, "shape": False, "needs": ""}


def knob(default: Any, unit: str, doc: str, **limits: Any) -> Any:
    """Declare one knob; `limits` are those of KNOB_DEFAULTS that differ.

    `shape` marks those that fix the model or its tokenizer, which an artifact's header binds. `several`: the default word; the knob
    also takes a comma-separated list of choices. `needs`: where the knob acts, as terms of which all must hold: KNOB (it is on),
    !KNOB (off), KNOB=a/b (one of these values), a stage's name (it is scored), a|b (one of these terms).
    """
    assert limits.keys() <= KNOB_DEFAULTS.keys(), limits
    return field(default=default, metadata={"unit": unit, "doc": doc, **KNOB_DEFAULTS, **limits})


def listed(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b")."""
    return tuple(word.strip() for word in text.split(","))


def as_text(value: Any) -> str:
    """A value as the environment writes it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def setting(f: dataclasses.Field, value: Any) -> str:
    """KNOB=value as messages show it: free text in quotes."""
    if f.type == "float":
        return f"{f.name.upper()}={value:g}"
    free = f.type == "str" and not f.metadata["choices"]
    return f"{f.name.upper()}={repr(value) if free else as_text(value)}"


def parse_schedule(text: str) -> list[tuple[float, int]]:
    """ "1024@0.1,2048@0.7" -> [(0.1, 1024), (0.7, 2048)]: lengths of 8 tokens or more up to rising fractions. ValueError if not that."""
    pairs = [part.split("@") for part in text.split(",")] if text.strip() else []
    steps = [(float(end), int(length)) for length, end in pairs]
    ends = [end for end, _ in steps]
    if ends != sorted(set(ends)) or not all(0 < end <= 1 and length >= 8 for end, length in steps):
        raise ValueError
    return steps


# ---- what fits together: rows (condition of a mistake, message), one table a section. Every row is tried; in a message $KNOB stands for
# KNOB=value. A condition that raises ValueError met a text that cannot be read, which `wrong` rows report and others pass over.

Rule = tuple[Callable[[Any], Any], str | Callable[[Any], str]]


def wrong(condition: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The condition, met too where the text that it reads raises ValueError."""

    def met(c: Any) -> Any:
        try:
            return condition(c)
        except ValueError:
            return True

    return met


SHAPE_RULES: tuple[Rule, ...] = (
    (lambda c: c.model_dim % c.num_heads, "$MODEL_DIM is not a multiple of $NUM_HEADS"),
    (lambda c: c.num_heads % c.num_kv_heads, "$NUM_HEADS is not a multiple of $NUM_KV_HEADS"),
    (lambda c: c.head_dim % 2, "$MODEL_DIM / $NUM_HEADS gives an odd head width; RoPE needs an even one"),
    (lambda c: c.rope_dims % 2 or c.rope_dims > c.head_dim,
     lambda c: f"$ROPE_DIMS: expected an even number of at most the head width {c.head_dim}"),
    (lambda c: c.rope_train_len and (c.rope_dims or c.head_dim) <= 2, "$ROPE_TRAIN_LEN: the NTK rule needs more than 2 rotated dims"),
    (lambda c: c.xsa_last_n > c.num_layers, "$XSA_LAST_N exceeds $NUM_LAYERS; XSA_LAST_N=-1 means all blocks"),
    (lambda c: c.mlp_mult * c.model_dim < 1, "$MLP_MULT leaves no hidden unit at $MODEL_DIM"),
    (wrong(lambda c: c.ve_dim and not 0 < len(c.value_layers) == len({*c.value_layers} & {*range(c.num_layers)})),
     lambda c: f"$VE_DIM with $VE_LAYERS: expected different blocks of 0 to {c.num_layers - 1}, with commas between, or VE_DIM=0"),
    (lambda c: c.bigram_vocab_size == 1, "$BIGRAM_VOCAB_SIZE: expected 0 (off) or at least 2 rows"),
    (lambda c: c.adapter_rank and c.out_init != "zero", "$OUT_INIT has no matrices to act on with $ADAPTER_RANK: unset one of them"),
    (lambda c: c.value_residual != "none" and c.num_layers < 2, "$VALUE_RESIDUAL needs at least 2 blocks, $NUM_LAYERS"),
    (lambda c: c.gate_window > c.model_dim and (c.attn_gate == "sparse" or (c.smear and c.smear_form == "window")), "$GATE_WINDOW is wider than the model: $MODEL_DIM"),
    (lambda c: c.num_loops and not c.loop_start <= c.loop_end < c.num_layers,
     lambda c: f"$NUM_LOOPS through $LOOP_START to $LOOP_END: expected rising block numbers of 0 to {c.num_layers - 1} with $NUM_LAYERS"),
    (lambda c: c.num_loops and 0 < c.parallel_start_layer <= c.loop_end,
     "$NUM_LOOPS through $LOOP_START to $LOOP_END reaches into the lanes: $PARALLEL_START_LAYER must lie above LOOP_END"),
    (lambda c: c.encoder_recurrence and 0 < c.parallel_start_layer < c.encoder_layers,
     lambda c: f"$ENCODER_RECURRENCE repeats blocks with lanes: $PARALLEL_START_LAYER, expected at least {c.encoder_layers}"),
    (lambda c: c.num_loops and c.encoder_recurrence, "$NUM_LOOPS and $ENCODER_RECURRENCE both repeat blocks: unset one of them"),
    (lambda c: c.parallel_start_layer >= c.num_layers, "$PARALLEL_START_LAYER is no block with $NUM_LAYERS; 0: no lanes"),
    (lambda c: c.encoder_recurrence and c.encoder_layers == 0, "$ENCODER_RECURRENCE needs an encoder block: $NUM_LAYERS has none"),
)  # fmt: skip


def uneven_length(c: Any) -> int:
    """The first sequence length of the curriculum that does not divide the batch; 0: all do."""
    return next((t for _, t in c.seq_curriculum if c.train_batch_tokens % t), 0)


TRAINING_RULES: tuple[Rule, ...] = (
    (wrong(lambda c: not c.seq_curriculum), "$TRAIN_SEQ_SCHEDULE: expected LENGTH@FRACTION,LENGTH@FRACTION..., lengths of 8 tokens or more and rising "
     "fractions between 0 and 1, as in 1024@0.1,2048@0.7,3072@1.0"),
    (uneven_length, lambda c: f"$TRAIN_BATCH_TOKENS is not a multiple of the sequence length {(t := uneven_length(c))}; nearest: "
                              f"{max(1, round(c.train_batch_tokens / t)) * t}"),
    (lambda c: c.complement_alpha and c.vocab_size > 16384,
     "$COMPLEMENT_ALPHA counts all pairs of tokens, too many at $VOCAB_SIZE: set it to 0"),
    (lambda c: c.swa_every and c.swa_source == "ema" and not c.ema_decay, "$SWA_SOURCE needs EMA_DECAY above 0"),
    (lambda c: c.mode == "train" and not c.max_wallclock_seconds and not c.iterations,
     "$MAX_WALLCLOCK_SECONDS and $ITERATIONS: one of them must end the training"),
    (lambda c: c.mode == "train" and 0 < c.max_wallclock_seconds <= c.reserved_seconds,
     "$GPTQ_RESERVE_SECONDS leaves nothing of $MAX_WALLCLOCK_SECONDS to train in: lower the one or raise the other"),
    (lambda c: re.search(r"[/\x00-\x1f]", c.run_id), "$RUN_ID: expected a name, which becomes LOG_DIR/NAME.txt; name folders with LOG_DIR"),
    (lambda c: c.resume == "auto" and not c.run_id, "RESUME=auto needs RUN_ID, the name of the run to continue"),
    (wrong(lambda c: not 0 < c.quantiles[0] <= c.quantiles[-1] <= 1), "$QUANT_QUANTILES: expected numbers in (0, 1] with commas between, like 0.999,1.0"),
    (lambda c: c.mode == "train" and c.target_bytes > c.artifact_limit, "$TARGET_BYTES exceeds $ARTIFACT_LIMIT: fill the limit at most"),
    (lambda c: c.quant_trellis and c.compressor != "entropy",
     "$QUANT_TRELLIS needs COMPRESSOR=entropy: $COMPRESSOR knows no states, and the codes would grow"),
    (lambda c: c.quant_trellis and c.prune_frac and c.prune_scope == "global",
     "$QUANT_TRELLIS leaves no code to set to zero afterwards: PRUNE_SCOPE=tensor, or PRUNE_FRAC=0"),
)  # fmt: skip


def lora_sites_of(c: Any) -> set[str]:
    """Where the model could have LoRA."""
    return {"q", "out", "up", "down", "o", "mlp", "head", *(("kv",) if c.kv_fused else ("k", "v"))}


def by_document(c: Any) -> bool:
    """Whether stage ttt trains a LoRA for each document."""
    return "ttt" in c.stages and c.ttt_reset == "document"


def longest_chunk(c: Any) -> int:
    """Targets of the longest chunk of a document."""
    return max(size for _, size in c.ttt_chunk_steps)


EVALUATION_RULES: tuple[Rule, ...] = (
    (lambda c: c.eval_stride > c.eval_len, lambda c: f"$EVAL_STRIDE exceeds the window of {c.eval_len}: some tokens would never be scored"),
    (lambda c: "ttt" in c.stages and (not c.ttt_sites or c.ttt_sites - lora_sites_of(c)),
     lambda c: f"$TTT_LORA_SITES: this model has the sites {', '.join(sorted(lora_sites_of(c)))}; name some of them"),
    (lambda c: "ttt" in c.stages and c.ttt_lora_blocks > c.num_layers, "$TTT_LORA_BLOCKS exceeds $NUM_LAYERS"),
    (lambda c: "ttt" in c.stages and c.phased_ttt_num_phases and c.ttt_reset != "document",
     "$PHASED_TTT_NUM_PHASES: phases come at the ends of blocks of documents; set TTT_RESET=document, or no phases"),
    (lambda c: by_document(c) and c.ttt_optimizer != "adamw",
     "$TTT_OPTIMIZER: a document's own LoRA is trained with adamw (TTT_RESET=document)"),
    (lambda c: by_document(c) and c.ttt_epochs > 1,
     "$TTT_EPOCHS: a document's LoRA takes one step on each chunk (TTT_RESET=document)"),
    (lambda c: by_document(c) and c.phased_ttt_num_phases and not c.phased_ttt_prefix,
     "$PHASED_TTT_PREFIX leaves no text to train on before a phase: raise it, or PHASED_TTT_NUM_PHASES=0"),
    (wrong(lambda c: by_document(c) and not c.ttt_chunk_steps),
     "$TTT_SHORT_SCORE_FIRST_STEPS: expected POSITION:SIZE pairs of rising positions and sizes of at least 1, as in 256:8,2000:24"),
    (lambda c: by_document(c) and 0 < c.ttt_block_tokens < longest_chunk(c),
     lambda c: f"$TTT_BLOCK_TOKENS is shorter than a chunk of {longest_chunk(c)} targets: raise it, or 0 for a fraction of the text"),
    (lambda c: by_document(c) and longest_chunk(c) > c.ttt_eval_len,
     lambda c: f"TTT_CHUNK_SIZE={longest_chunk(c)} exceeds the context of {c.ttt_eval_len}: some targets would never be scored; raise TTT_EVAL_SEQ_LEN"),
    (lambda c: c.ttt_order != "text" and not (c.ttt_enabled and c.ttt_reset == "document"),
     "$TTT_ORDER orders the documents of TTT_ENABLED=1 TTT_RESET=document: set both, or TTT_ORDER=text"),
    (lambda c: c.score_stage not in ("auto", *c.stages), lambda c: f"$SCORE_STAGE is not among the stages switched on: {', '.join(c.stages)}"),
    (lambda c: c.ngram_claim == "pr1095" and "pr1095" not in c.ngram_tables and {*c.ngram_scores} - {"exact"},
     "$NGRAM_CLAIM scores with a table of the training text: $NGRAM_TABLE lacks pr1095"),
    (lambda c: "table" in c.stages and "exact" not in c.ngram_tables, "$EVAL_STAGES: stage table needs NGRAM_TABLE=exact"),
    (lambda c: "tilt" in c.stages and not c.ngram_tilt_enabled, "$EVAL_STAGES: stage tilt needs NGRAM_TILT_ENABLED=1"),
    (lambda c: c.ngram_buckets & (c.ngram_buckets - 1),
     lambda c: f"$NGRAM_BUCKETS: the published hashes need a power of two; nearest below: {1 << (c.ngram_buckets.bit_length() - 1)}"),
)  # fmt: skip


def mistakes(c: Any) -> Iterator[str]:
    """The messages of the rules that a configuration breaks."""
    for condition, message in (*SHAPE_RULES, *TRAINING_RULES, *EVALUATION_RULES):
        with contextlib.suppress(ValueError):
            if condition(c):
                yield message if isinstance(message, str) else message(c)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob: field `muon_momentum` is the environment variable MUON_MOMENTUM. Defaults are the challenge's baseline."""

    # fmt: off
    # ---- 1 CONFIG
    recipe: str = knob("auto", "", "named set of values; auto: frontier on a GPU, cpu without one")
    mode: str = knob("train", "", "what to do; pack_code, plan, codec, sample and explain are programs: python tools/NAME.py", choices=("train", "eval", "audit"))
    # ---- 2 RUNTIME
    seed: int = knob(1337, "", "the one seed; every other stream of random numbers derives from it", lo=0, hi=2**31 - 1)
    run_id: str = knob("", "", "names the logs; empty: time-recipe-seed, and -2, -3 ... where that is taken")
    log_dir: str = knob("logs", "folder", "where logs, checkpoints and artifacts go")
    device: str = knob("auto", "", "where to compute; auto: a CUDA device, else the CPU, on a Mac too", choices=("auto", "cuda", "cpu"))
    force: bool = knob(False, "", "overwrite finished files")
    profile: bool = knob(False, "", "write a torch.profiler trace of a few training steps")
    # ---- 3 DATA
    data_path: str = knob("", "folder", "shards fineweb_train_*.bin, fineweb_val_*.bin; empty: a download (CaseOps sp8192, sp8192, sp1024), else the sample")
    tokenizer_path: str = knob("", "file", "SentencePiece model; empty: the one that belongs to DATA_PATH")
    vocab_size: int = knob(1024, "pieces", "size of the vocabulary; not set: the tokenizer's", lo=2, hi=65536, shape=True)
    val_bytes: str = knob("auto", "", "where the bytes of each validation token come from; auto: fineweb_val_bytes_*.bin if there, else the tokenizer", choices=("auto", "tokenizer", "sidecar"))
    val_tokens: int = knob(0, "tokens", "score only a prefix of the validation stream: a quick look, no score; 0: all", lo=0)
    val_drop_tail: bool = knob(False, "", "drop the last partial sequence of the validation stream, as the published scripts do")
    # ---- 4 MODEL
    num_layers: int = knob(9, "blocks", "depth", lo=1, hi=256, shape=True)
    model_dim: int = knob(512, "", "width of the residual stream", lo=8, hi=16384, shape=True)
    num_heads: int = knob(8, "heads", "query heads", lo=1, hi=512, shape=True)
    num_kv_heads: int = knob(4, "heads", "key/value heads; each serves NUM_HEADS / NUM_KV_HEADS query heads", lo=1, hi=512, shape=True)
    kv_fused: bool = knob(False, "", "one projection for keys and values (#1095)", shape=True)
    mlp_mult: float = knob(2.0, "x MODEL_DIM", "hidden width of the MLP", lo=0.01, hi=64, shape=True)
    leaky_slope: float = knob(0.0, "", "a of the MLP's leaky_relu(z, a)^2; 0: relu^2", lo=0, hi=1, shape=True)
    tie_embeddings: bool = knob(True, "", "the output head is the token embedding", shape=True)
    logit_softcap: float = knob(30.0, "", "logits = c tanh(z / c)", lo=0.1, hi=1e6, shape=True)
    asym_logit_rescale: bool = knob(False, "", "a cap each for logits above and below 0, both LOGIT_SOFTCAP until global test-time training moves them", shape=True)
    rope_base: float = knob(10000.0, "", "RoPE base", lo=1, hi=1e9, shape=True)
    rope_dims: int = knob(0, "dims a head", "dims that RoPE rotates, the rest pass through; 0: all", lo=0, hi=4096, shape=True)
    rope_train_len: int = knob(0, "tokens", "NTK-aware base: scaled by (len/this)^(d/(d-2)) where longer; 0: off", lo=0, shape=True)
    qk_gain_init: float = knob(1.5, "", "initial per-head gain on normalised queries", lo=0, hi=100, shape=True)
    ln_scale: str = knob("none", "", "1/sqrt(layer+1) on normalised block inputs (in) or on block outputs (out)", choices=("none", "in", "out"), shape=True)
    xsa_last_n: int = knob(0, "blocks", "exclusive self attention in the last N blocks; -1: all", lo=-1, hi=256, shape=True)
    attn_gate: str = knob("none", "", "gate on each head's output: from the input, or from GATE_WINDOW dims of it", choices=("none", "input", "sparse"), shape=True)
    attn_gate_init: float = knob(4.0, "", "ATTN_GATE=input: initial logit of the gate", lo=-20, hi=20, shape=True, needs="ATTN_GATE=input")
    sparse_attn_gate_scale: float = knob(1.0, "", "ATTN_GATE=sparse: factor on the gate's logits", lo=0.01, hi=100, shape=True, needs="ATTN_GATE=sparse")
    gate_window: int = knob(12, "dims", "leading dims that ATTN_GATE=sparse and SMEAR_FORM=window read", lo=1, hi=16384, shape=True, needs="ATTN_GATE=sparse|SMEAR_FORM=window")
    value_residual: str = knob("none", "", "mix the first block's values into every later block's", choices=("none", "softmax"), shape=True)
    ve_dim: int = knob(0, "", "width of the shared value embedding; 0: none", lo=0, hi=4096, shape=True)
    ve_layers: str = knob("", "block numbers", "blocks that add the value embedding, e.g. 9,10", shape=True, needs="VE_DIM")
    smear: bool = knob(False, "", "SmearGate: blend each embedding with the one before it", shape=True)
    smear_form: str = knob("channel", "", "weight of the previous token: learned a channel, or from GATE_WINDOW dims of the token", choices=("channel", "window"), shape=True, needs="SMEAR")
    smear_init: float = knob(0.0, "", "SMEAR_FORM=channel: initial logit g of the previous token's weight sigmoid(g)", lo=-20, hi=20, shape=True, needs="SMEAR SMEAR_FORM=channel")
    smear_before_norm: bool = knob(False, "", "smear before the embedding's RMSNorm instead of after it", shape=True, needs="SMEAR")
    smear_cross_doc: bool = knob(False, "", "published leak: blend across a BOS", shape=True, needs="SMEAR !DOC_MASK")
    bigram_vocab_size: int = knob(0, "rows", "hashed bigram embedding; 0: none", lo=0, hi=2**24, shape=True)
    bigram_dim: int = knob(128, "", "width of the bigram table", lo=1, hi=4096, shape=True, needs="BIGRAM_VOCAB_SIZE")
    bigram_hash: str = knob("pr164", "", "hash of (previous, current)", choices=("pr164", "pr740", "pr187"), shape=True, needs="BIGRAM_VOCAB_SIZE")
    bigram_scale: float = knob(0.05, "", "initial learned scale of the bigram branch; 0: no scale", lo=0, hi=10, shape=True, needs="BIGRAM_VOCAB_SIZE")
    bigram_table_std: float = knob(0.0, "", "initial standard deviation of the bigram table; 0: zeros", lo=0, hi=10, shape=True, needs="BIGRAM_VOCAB_SIZE")
    bigram_table_role: str = knob("embed", "", "optimizer group of the bigram table", choices=("embed", "scalar", "matrix"), shape=True, needs="BIGRAM_VOCAB_SIZE")
    bigram_proj_role: str = knob("matrix", "", "optimizer group of the bigram projection", choices=("embed", "scalar", "matrix"), shape=True, needs="BIGRAM_VOCAB_SIZE")
    pre_enrich_dim: int = knob(0, "", "hidden width of the GELU pre-enrichment of embeddings; 0: none", lo=0, hi=65536, shape=True)
    skip_split: str = knob("floor", "", "encoder half of an odd number of blocks", choices=("floor", "ceil"), shape=True)
    skip_gates_enabled: bool = knob(False, "", "skips blend by a learned gate a channel, sigmoid(g), initially 1/2, instead of being added", shape=True)
    num_loops: int = knob(0, "passes", "depth recurrence: further passes through blocks LOOP_START to LOOP_END; 0: none", lo=0, hi=16, shape=True)
    loop_start: int = knob(3, "", "first looped block", lo=0, hi=255, shape=True, needs="NUM_LOOPS")
    loop_end: int = knob(5, "", "last looped block", lo=0, hi=255, shape=True, needs="NUM_LOOPS")
    enable_looping_at: float = knob(0.35, "", "fraction of the training budget at which the loops start", lo=0, hi=1, needs="NUM_LOOPS")
    parallel_start_layer: int = knob(0, "", "first block with attention and MLP on two parallel lanes; 0: none", lo=0, hi=255, shape=True)
    encoder_recurrence: bool = knob(False, "", "run the encoder blocks twice", shape=True)
    resid_mix_init: str = knob("plain", "", "initial mix with the embedding: (1, 0), or by depth", choices=("plain", "phase"), shape=True)
    linear_init: str = knob("default", "", "init of projections: torch's Kaiming-uniform or orthogonal", choices=("default", "orthogonal"), shape=True, needs="!ADAPTER_RANK|BIGRAM_VOCAB_SIZE|VE_DIM")
    out_init: str = knob("zero", "", "init of attention and MLP output projections; scaled: orthogonal / sqrt(2 L)", choices=("zero", "scaled"), shape=True)
    branch_proj_scaled: bool = knob(False, "", "1/sqrt(2 L) on the projections of bigram and value embeddings", shape=True, needs="BIGRAM_VOCAB_SIZE|VE_DIM")
    embed_init_std: float = knob(0.005, "", "initial standard deviation of the token embedding", lo=0, hi=10, shape=True)
    overtone_init: bool = knob(False, "", "spectrum S_k = S_1 / sqrt(k) for the initial token embedding", shape=True)
    adapter_rank: int = knob(0, "", "matrices = frozen random orthogonal base + rank-r adapter (#1095); 0: off", lo=0, hi=4096, shape=True)
    adapter_seed: int = knob(42, "", "seed of the frozen bases", lo=0, hi=2**31 - 1, shape=True, needs="ADAPTER_RANK")
    attention: str = knob("auto", "", "attention kernel", choices=("auto", "fa3", "fa2", "sdpa", "blocks"))
    train_dtype: str = knob("auto", "", "arithmetic of training; auto: bf16 on a GPU, else fp32; fast: bf16 also on CPUs that have it in hardware", choices=("auto", "fast", "fp32", "bf16"))
    compile: str = knob("auto", "", "torch.compile: where it pays, never, or always", choices=("auto", "0", "1"))
    # ---- 5 OPTIMIZER
    tied_embed_lr: float = knob(0.05, "", "Adam rate of embedding tables when the head shares the token table", lo=0, needs="TIE_EMBEDDINGS")
    embed_lr: float = knob(0.6, "", "Adam rate of embedding tables when the head has its own matrix", lo=0, needs="!TIE_EMBEDDINGS")
    head_lr: float = knob(0.008, "", "Adam rate of a head with its own matrix", lo=0, needs="!TIE_EMBEDDINGS")
    matrix_lr: float = knob(0.04, "", "Muon rate of the matrices", lo=0)
    scalar_lr: float = knob(0.04, "", "Adam rate of gains, gates and other small parameters", lo=0)
    decoder_lr_mult: float = knob(1.0, "", "multiplier on MATRIX_LR in the second half of the blocks", lo=0)
    muon_momentum: float = knob(0.95, "", "Muon momentum after its warm-up", lo=0, hi=1)
    muon_momentum_warmup_start: float = knob(0.85, "", "Muon momentum at step 0", lo=0, hi=1, needs="MUON_MOMENTUM_WARMUP_STEPS")
    muon_momentum_warmup_steps: int = knob(500, "steps", "steps over which Muon's momentum rises; 0 skips it", lo=0)
    muon_row_normalize: bool = knob(False, "", "MuonEq-R: rows of Muon's momentum are brought to length 1 before orthogonalisation")
    newton_schulz: str = knob("classic", "", "coefficients of the iterations: one tuple for all, or Polar Express's of each", choices=("classic", "polar"))
    muon_backend_steps: int = knob(5, "iterations", "Newton-Schulz iterations a step", lo=1, hi=10)
    muon_wd: float = knob(0.0, "", "decoupled weight decay of the matrices, times their rate", lo=0)
    muon_wd_order: str = knob("before", "", "decay a matrix before or after its update", choices=("before", "after"), needs="MUON_WD")
    adam_wd: float = knob(0.0, "", "decoupled weight decay of Adam's parameters, times their rate", lo=0)
    embed_wd: float = knob(-1.0, "", "the same of embedding tables and heads; -1: ADAM_WD", lo=-1)
    beta1: float = knob(0.9, "", "Adam's decay of the gradient's mean", lo=0, hi=0.9999)
    beta2: float = knob(0.95, "", "Adam's decay of the gradient's square", lo=0, hi=0.99999)
    adam_eps: float = knob(1e-8, "", "Adam's epsilon", lo=0)
    grad_clip_norm: float = knob(0.0, "", "largest global norm of the gradient; 0 leaves it alone", lo=0)
    # ---- 6 TRAINING
    doc_mask: bool = knob(False, "", "documents do not see each other: attention, smear and bigram stay inside each", shape=True)
    train_seq_len: int = knob(1024, "tokens", "sequence length in training", lo=8, hi=2**20, shape=True)
    train_batch_tokens: int = knob(524288, "tokens", "targets of one optimizer step, over all ranks", lo=8, hi=2**30)
    micro_batch_tokens: int = knob(0, "tokens", "most tokens of one forward on one rank; 0: on a GPU as many as fit, found while priming, else 8192", lo=0)
    iterations: int = knob(20000, "steps", "most optimizer steps; 0: no limit", lo=0)
    max_wallclock_seconds: float = knob(600.0, "s", "training time, validation excluded; 0: no limit", lo=0)
    warmup_steps: int = knob(20, "steps", "priming steps that compile kernels and are undone completely, before the clock", lo=0, hi=10000)
    lr_schedule: str = knob("warmdown", "", "flat then linear down, or flat then cosine down (wsd)", choices=("warmdown", "wsd"))
    warmdown_iters: int = knob(1200, "steps", "length of the linear warmdown, in steps or their measured time", lo=0, needs="LR_SCHEDULE=warmdown !WARMDOWN_FRAC")
    warmdown_frac: float = knob(0.0, "", "length of the linear warmdown as a fraction of the budget; 0: WARMDOWN_ITERS", lo=0, hi=1, needs="LR_SCHEDULE=warmdown")
    min_lr: float = knob(0.0, "", "least learning-rate scale of both schedules", lo=0, hi=1)
    wsd_stable_frac: float = knob(0.75, "", "fraction of the budget before the cosine of wsd", lo=0, hi=1, needs="LR_SCHEDULE=wsd")
    train_seq_schedule: str = knob("", "", "lengths instead of TRAIN_SEQ_LEN, each up to a fraction of the budget: 1024@0.1,2048@0.7,3072@1.0; what is left has TRAIN_SEQ_LEN", shape=True)
    seq_change_warmup_steps: int = knob(0, "steps", "after each change of length the learning rates rise from nearly nothing over so many steps", lo=0, needs="TRAIN_SEQ_SCHEDULE")
    val_loss_every: int = knob(1000, "steps", "validate during training; 0: only at the end", lo=0)
    train_log_every: int = knob(200, "steps", "step lines in the log", lo=1)
    ema_decay: float = knob(0.0, "", "exponential moving average of the weights; 0: off", lo=0, hi=0.999999)
    ema_start_frac: float = knob(0.0, "", "fraction of the budget before the EMA starts", lo=0, hi=1, needs="EMA_DECAY")
    swa_every: int = knob(0, "steps", "stochastic weight averaging; 0: off", lo=0)
    swa_start_scale: float = knob(0.2, "", "SWA collects while the learning-rate scale is below this", lo=0, hi=2, needs="SWA_EVERY")
    swa_source: str = knob("weights", "", "what SWA averages", choices=("weights", "ema"), needs="SWA_EVERY")
    swa_blend: float = knob(0.5, "", "final = (1 - b) (EMA or weights) + b SWA", lo=0, hi=1, needs="SWA_EVERY")
    qat: str = knob("none", "", "fake quantisation of projections while training", choices=("none", "ste", "soft_round", "soft_round_pr850"))
    qat_bits: int = knob(6, "bits", "width of the fake quantisation", lo=2, hi=8, needs="QAT")
    qat_start_frac: float = knob(0.0, "", "fraction of the budget at which QAT starts", lo=0, hi=1, needs="QAT")
    complement_alpha: float = knob(0.0, "", "complementary training: weight 1 - alpha p_bigram on each token (#803); 0: off", lo=0, hi=1)
    checkpoint_every: int = knob(0, "steps", "save a checkpoint, and one when a signal stops the training (TERM INT HUP USR1 USR2 XCPU; torchrun passes on only those in TORCHELASTIC_SIGNALS_TO_HANDLE); 0: never", lo=0)
    checkpoint_keep: int = knob(2, "files", "how many checkpoints stay", lo=1, needs="CHECKPOINT_EVERY")
    resume: str = knob("", "", "auto: the newest checkpoint of RUN_ID if there is one; or a checkpoint file")
    # ---- 7 QUANTIZER
    attn_bits: int = knob(6, "bits", "width of attention matrices; 16 and 32 pass floats through", choices=WIDTHS, needs="!ADAPTER_RANK !TARGET_BYTES|ATTN_BITS=16/32")
    mlp_bits: int = knob(6, "bits", "width of MLP matrices", choices=WIDTHS, needs="!ADAPTER_RANK !TARGET_BYTES|MLP_BITS=16/32")
    embed_bits: int = knob(8, "bits", "width of the token embedding (and head)", choices=WIDTHS, needs="!TARGET_BYTES|EMBED_BITS=16/32")
    table_bits: int = knob(8, "bits", "width of hashed and value embedding tables", choices=WIDTHS, needs="BIGRAM_VOCAB_SIZE|VE_DIM !TARGET_BYTES|TABLE_BITS=16/32")
    proj_bits: int = knob(8, "bits", "width of matrices beside the blocks (table projections)", choices=WIDTHS, needs="BIGRAM_VOCAB_SIZE|VE_DIM|PRE_ENRICH_DIM !TARGET_BYTES|PROJ_BITS=16/32")
    adapter_bits: int = knob(8, "bits", "width of adapters on a random base", choices=WIDTHS, needs="ADAPTER_RANK !TARGET_BYTES|ADAPTER_BITS=16/32")
    control_bits: int = knob(32, "bits", "width of gains, mixes and other small control parameters", choices=WIDTHS)
    quant_overrides: str = knob("", "", "bits by parameter name, first match wins: blocks.9.attn.k=16,blocks.*.mlp.up=5")
    quant_min_numel: int = knob(4096, "elements", "tensors this small pass through as fp16 whatever their role", lo=0)
    quant_clip: str = knob("max", "", "what a row's largest code stands for", choices=("max", "quantile", "row", "tensor", "sigma"), needs="!TARGET_BYTES")
    quant_quantiles: str = knob("0.999,0.9995,0.9999,0.99999,1.0", "", "quantiles of |row|: QUANT_CLIP=quantile takes the last, row and tensor search all by squared error", needs="!TARGET_BYTES QUANT_CLIP=quantile/row/tensor")
    attn_clip_sigmas: float = knob(13.0, "std", "QUANT_CLIP=sigma: clip of attention rows", lo=0.1, needs="!ADAPTER_RANK !TARGET_BYTES QUANT_CLIP=sigma")
    mlp_clip_sigmas: float = knob(11.5, "std", "QUANT_CLIP=sigma: clip of MLP rows", lo=0.1, needs="!ADAPTER_RANK !TARGET_BYTES QUANT_CLIP=sigma")
    embed_clip_sigmas: float = knob(14.0, "std", "QUANT_CLIP=sigma: clip of token embedding rows", lo=0.1, needs="!TARGET_BYTES QUANT_CLIP=sigma")
    matrix_clip_sigmas: float = knob(12.85, "std", "QUANT_CLIP=sigma: clip of all other rows", lo=0.1, needs="!TARGET_BYTES QUANT_CLIP=sigma")
    prune_frac: float = knob(0.0, "", "fraction of coded weights set to zero, smallest first; 0: none", lo=0, hi=0.99)
    prune_scope: str = knob("tensor", "", "smallest weights of each tensor before rounding, or smallest codes over all tensors after it", choices=("tensor", "global"), needs="PRUNE_FRAC")
    gptq_enabled: bool = knob(False, "", "round with error compensation from the inputs' second moments (GPTQ)")
    gptq_variant: str = knob("cholesky", "", "cholesky: the algorithm; pr850: the published full-inverse sweep", choices=("cholesky", "pr850"), needs="GPTQ_ENABLED")
    gptq_order: str = knob("descending", "", "columns by input energy", choices=("descending", "ascending"), needs="GPTQ_ENABLED !QUANT_TRELLIS")
    gptq_percdamp: float = knob(0.01, "", "damping of the Hessian, times its mean diagonal", lo=1e-6, hi=10, needs="GPTQ_ENABLED")
    gptq_block_size: int = knob(128, "columns", "lazy block of GPTQ; changes speed, not results", lo=1, needs="GPTQ_ENABLED")
    gptq_n_samples: int = knob(256, "sequences", "most calibration sequences of TRAIN_SEQ_LEN; fewer where the time runs out, one a rank at least", lo=1, needs="GPTQ_ENABLED|TARGET_BYTES")
    gptq_reserve_seconds: float = knob(8.0, "s", "part of MAX_WALLCLOCK_SECONDS kept for what follows the training loop, if anything does (GPTQ_ENABLED, TARGET_BYTES, NGRAM_TABLE=exact)", lo=0, needs="MAX_WALLCLOCK_SECONDS GPTQ_ENABLED|TARGET_BYTES|NGRAM_TABLE=exact")
    quant_trellis: int = knob(0, "states", "codes are paths through a trellis of this many states: 8 make about 1 dB less error at equal bytes, 64 another .15 dB in 4 times the time; columns as they stand; 0: independent codes", choices=(0, 4, 8, 64))
    lqer_top_k: int = knob(0, "tensors", "low-rank correction of the tensors with the largest residual (#1797); 0: none", lo=0)
    lqer_rank: int = knob(4, "", "rank of the correction", lo=1, hi=256, needs="LQER_TOP_K")
    lqer_factor_bits: int = knob(4, "bits", "width of its right factor; the left one has 2 bits and one step", lo=2, hi=8, needs="LQER_TOP_K")
    lqer_asym_group: int = knob(64, "columns", "columns of the right factor that share a step", lo=1, needs="LQER_TOP_K")
    # ---- 8 ARTIFACT
    artifact: str = knob("", "file", "the artifact to write or score; empty: LOG_DIR/RUN_ID.pgz")
    artifact_limit: int = knob(16_000_000, "bytes", "limit on artifact + code", lo=0)
    compressor: str = knob("entropy", "", "coder of the weight streams: our model and a range coder, or a byte compressor", choices=("entropy", "zstd", "lzma"))
    target_bytes: int = knob(0, "bytes", "total of artifact and code to fill, by one step a tensor; the widths of codes are then ignored; 0: off", lo=0)
    code_form: str = knob("packed", "", "the form of this script that is counted and submitted", choices=("packed", "source"))
    zstd_level: int = knob(22, "", "zstd level", lo=1, hi=22, needs="COMPRESSOR=zstd")
    lzma_preset: int = knob(9, "", "LZMA preset; 9 is run as 9|EXTREME", lo=0, hi=9)
    # ---- 9 EVALUATOR
    eval_seq_len: int = knob(0, "tokens", "window of the evaluation; 0: TRAIN_SEQ_LEN", lo=0, hi=2**20)
    eval_stride: int = knob(0, "tokens", "targets that each sliding window scores; 0: no sliding pass", lo=0, needs="sliding")
    val_batch_tokens: int = knob(0, "tokens", "tokens of one evaluation forward on one rank; 0: by device, halved until it fits", lo=0)
    eval_wallclock_seconds: float = knob(600.0, "s", "evaluation time limit; 0: none", lo=0)
    eval_stages: str = knob("auto", "", "stages to score; auto: all that are switched on", choices=STAGES, several="auto")
    score_stage: str = knob("auto", "", "the stage that is the score, fixed before scoring; auto: the last valid one switched on", choices=("auto", *STAGES))
    ngram_score: str = knob("exact", "", "n-gram passes", choices=("exact", "normalized", "claimed"), several="off")
    ngram_claim: str = knob("pr850", "", "published scorer that normalized and claimed run", choices=("pr740", "pr740b", "pr187", "pr850", "pr1095"), needs="NGRAM_SCORE=normalized/claimed")
    ngram_claim_ranks: int = knob(8, "ranks", "caches that #740 and #187 kept apart; the claimed pass emulates them", lo=1, hi=1024, needs="NGRAM_SCORE=normalized/claimed NGRAM_CLAIM=pr740/pr740b/pr187")
    ngram_buckets: int = knob(2**22, "cells", "size of a published hash table, a power of two", lo=2, hi=2**28, needs="NGRAM_SCORE=normalized/claimed")
    ngram_table: str = knob("none", "", "n-grams of the training text that the artifact carries: pr1095 (hashed, counted while training, for its claim), exact (an expert)", choices=("pr1095", "exact"), several="none")
    ngram_table_bytes: int = knob(1_000_000, "bytes", "NGRAM_TABLE=exact: size of the packed n-grams, the most useful ones and all single tokens", lo=1000, hi=2**28, needs="NGRAM_TABLE=exact")
    ngram_table_order: int = knob(5, "tokens", "NGRAM_TABLE=exact: longest n-gram, the target included", lo=2, hi=8, needs="NGRAM_TABLE=exact")
    ngram_table_tokens: int = knob(2**23, "tokens", "NGRAM_TABLE=exact: how much of the training text is counted, from its start, trained on or not", lo=1, needs="NGRAM_TABLE=exact")
    ngram_order: int = knob(12, "tokens", "longest n-gram, the target included", lo=2, hi=64, needs="ngram")
    ngram_rate: float = knob(0.8, "", "step of the mixing weights", lo=0, hi=2, needs="ngram|table")
    ngram_min_count: int = knob(2, "", "occurrences a context needs in the published scorers", lo=1, needs="NGRAM_SCORE=normalized/claimed")
    ngram_tilt_enabled: bool = knob(False, "", "stage tilt: raise the logit of the token that followed the same context before; table and ngram build on it")
    ngram_tilt_order: int = knob(12, "tokens", "length of its n-gram, the target included; above NGRAM_ORDER it costs statistics of its own", lo=2, hi=64, needs="NGRAM_TILT_ENABLED")
    ngram_tilt_threshold: float = knob(0.8, "", "fraction of its context's successors a hint needs", lo=0, hi=1, needs="NGRAM_TILT_ENABLED")
    ngram_tilt_beta: float = knob(2.625, "nats", "what is added to the hint's logit", lo=0, hi=20, needs="NGRAM_TILT_ENABLED")
    ngram_tilt_gamma: float = knob(0.0, "", "that times (1 - q)^gamma, q the network's probability of the hint", lo=0, hi=20, needs="NGRAM_TILT_ENABLED")
    ttt_enabled: bool = knob(False, "", "test-time training: stage ttt, LoRA on the network, learning from scored text")
    ttt_reset: str = knob("none", "", "none: one LoRA learns along the text; document: each document trains a LoRA of its own", choices=("none", "document"), needs="ttt")
    ttt_lora_rank: int = knob(8, "", "rank of the LoRA", lo=1, hi=1024, needs="ttt")
    ttt_lora_alpha: float = knob(0.0, "", "the LoRA's output is scaled by alpha / rank; 0: by 1", lo=0, hi=1e6, needs="ttt")
    ttt_lora_sites: str = knob("q,v", "", "where LoRA acts: projections q,k,v,kv,out,up,down of the blocks; o, mlp: from the input to the output of attention, MLP; head", needs="ttt")
    ttt_lora_blocks: int = knob(2, "blocks", "how many of the last blocks have LoRA; 0: all", lo=0, hi=256, needs="ttt")
    ttt_epochs: int = knob(1, "epochs", "gradient passes over each scored chunk", lo=1, hi=100, needs="ttt")
    ttt_optimizer: str = knob("adamw", "", "optimizer of the LoRA", choices=("adamw", "sgd"), needs="ttt")
    ttt_lr: float = knob(0.003, "", "learning rate of the LoRA", lo=0, needs="ttt")
    ttt_local_lr_mult: float = knob(1.0, "", "multiplies TTT_LR", lo=0, needs="ttt")
    ttt_wd: float = knob(0.0, "", "decoupled weight decay of the LoRA with adamw", lo=0, needs="ttt TTT_OPTIMIZER=adamw")
    ttt_beta1: float = knob(0.9, "", "adamw: decay of the gradient's mean", lo=0, hi=0.9999, needs="ttt TTT_OPTIMIZER=adamw")
    ttt_beta2: float = knob(0.999, "", "adamw: decay of the gradient's square", lo=0, hi=0.99999, needs="ttt TTT_OPTIMIZER=adamw")
    ttt_adam_eps: float = knob(1e-8, "", "adamw: epsilon", lo=0, needs="ttt TTT_OPTIMIZER=adamw")
    ttt_momentum: float = knob(0.9, "", "momentum of sgd", lo=0, hi=1, needs="ttt TTT_OPTIMIZER=sgd")
    ttt_grad_clip: float = knob(1.0, "", "largest gradient norm of a LoRA's step; 0: no limit", lo=0, needs="ttt")
    ttt_byte_weighted: bool = knob(True, "", "TTT loss weighs each token by its bytes (at least 1)", needs="ttt")
    ttt_temperature: float = knob(1.0, "", "logits are divided by this constant in stage ttt", lo=0.1, hi=10, needs="ttt")
    ttt_chunk_tokens: int = knob(65536, "tokens", "TTT_RESET=none: text scored before each learning", lo=1, needs="ttt TTT_RESET=none")
    ttt_batch_seqs: int = knob(0, "sequences", "TTT_RESET=none: sequences of one step; 0: the whole chunk", lo=0, needs="ttt TTT_RESET=none")
    ttt_polyak_decay: float = knob(0.0, "", "TTT_RESET=none: score with an average of the LoRA that decays so a chunk; 0: the latest", lo=0, hi=0.99999, needs="ttt TTT_RESET=none")
    ttt_eval_seq_len: int = knob(0, "tokens", "TTT_RESET=document: longest context, of which keys and values are kept as they were computed; 0: EVAL_SEQ_LEN", lo=0, hi=2**20, needs="ttt TTT_RESET=document")
    ttt_batch_size: int = knob(64, "documents", "TTT_RESET=document: documents of one forward; changes speed, not results", lo=1, needs="ttt TTT_RESET=document")
    ttt_chunk_size: int = knob(48, "tokens", "TTT_RESET=document: targets scored before each step of their document's LoRA", lo=1, needs="ttt TTT_RESET=document")
    ttt_short_score_first_steps: str = knob("", "", "TTT_RESET=document: smaller chunks at the start of a document, 256:8,2000:24 for 8 below position 256, then 24 below 2,000", needs="ttt TTT_RESET=document")
    ttt_block_tokens: int = knob(0, "tokens", "TTT_RESET=document: what all documents start from may change once so much is scored, at a document's end; 0: PHASED_TTT_PREFIX / PHASED_TTT_NUM_PHASES of the text, without phases 1/24", lo=0, needs="ttt TTT_RESET=document")
    ttt_warm_start_a: bool = knob(True, "", "TTT_RESET=document: A starts as the mean of the A that the block before learned, not as it was drawn", needs="ttt TTT_RESET=document")
    ttt_order: str = knob("text", "", "length: also run the published order, longest document first, as a claim", choices=("text", "length"))
    phased_ttt_num_phases: int = knob(0, "phases", "TTT_RESET=document: how often all weights are trained on all scored text; 0: never", lo=0, hi=100, needs="ttt TTT_RESET=document")
    phased_ttt_prefix: float = knob(0.3, "", "fraction of the text after which the last phase comes, the others at equal steps before", lo=0, hi=1, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_lr: float = knob(0.001, "", "phases: learning rate, falling to 0 as a cosine", lo=0, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_momentum: float = knob(0.9, "", "phases: momentum", lo=0, hi=1, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_epochs: int = knob(1, "epochs", "phases: passes over the scored text", lo=1, hi=100, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_chunk_tokens: int = knob(32768, "tokens", "phases: text of equal learning rate", lo=1, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_batch_seqs: int = knob(32, "sequences", "phases: a step has as many tokens as so many full sequences; 0: the whole chunk", lo=0, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_warmup_chunks: int = knob(0, "chunks", "phases: the rate rises linearly over these", lo=0, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_grad_clip: float = knob(1.0, "", "phases: largest gradient norm; 0: no limit", lo=0, needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    global_ttt_respect_doc_boundaries: bool = knob(True, "", "phases: no sequence runs over the start of a document", needs="ttt TTT_RESET=document PHASED_TTT_NUM_PHASES")
    # fmt: on

    def __post_init__(self) -> None:
        if errors := "\n".join(mistakes(self)):
            shown = {f.name.upper(): setting(f, getattr(self, f.name)) for f in dataclasses.fields(self)}
            raise ConfigError(string.Template(errors).safe_substitute(shown))

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def encoder_layers(self) -> int:
        """Blocks whose outputs are kept for the U-Net skips."""
        return self.encoder_share(self.num_layers)

    def encoder_share(self, passes: int) -> int:
        """How many of that many passes through blocks are the encoder: half of them, rounded as SKIP_SPLIT says."""
        return (passes + (self.skip_split == "ceil")) // 2

    @property
    def xsa_layers(self) -> range:
        """Blocks with exclusive self attention."""
        return range(0 if self.xsa_last_n < 0 else self.num_layers - self.xsa_last_n, self.num_layers)

    @property
    def eval_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def ttt_eval_len(self) -> int:
        """Longest context of per-document test-time training."""
        return self.ttt_eval_seq_len or self.eval_len

    @property
    def ttt_sites(self) -> set[str]:
        """Where LoRA acts."""
        return {*listed(self.ttt_lora_sites)}

    @property
    def ttt_chunk_steps(self) -> list[tuple[float, int]]:
        """[(position in its document below which a chunk starts, its targets)], rising; the last is without bound. ValueError if not that."""
        pairs = [step.split(":") for step in self.ttt_short_score_first_steps.split(",") if step.strip()]
        steps = [*((float(int(below)), int(size)) for below, size in pairs), (math.inf, self.ttt_chunk_size)]
        positions = [0.0, *(below for below, _ in steps)]
        if positions != sorted(set(positions)) or any(size < 1 for _, size in steps):
            raise ValueError
        return steps

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Blocks that add the value embedding."""
        return tuple(int(i) for i in self.ve_layers.split(",") if i.strip()) if self.ve_dim else ()

    @property
    def seq_curriculum(self) -> list[tuple[float, int]]:
        """[(fraction of the budget at which this sequence length ends, length)], rising; the last ends at 1."""
        steps = parse_schedule(self.train_seq_schedule)
        return steps if steps and steps[-1][0] == 1 else [*steps, (1.0, self.train_seq_len)]

    @property
    def longest_seq(self) -> int:
        """Positions that the model must know: the longest sequence in training or window in evaluation."""
        return max(self.train_seq_len, self.eval_len, self.ttt_eval_len, *(length for _, length in self.seq_curriculum))

    @property
    def quantiles(self) -> tuple[float, ...]:
        """Rising quantiles at which a row may be clipped."""
        return tuple(sorted(float(part) for part in self.quant_quantiles.split(",")))

    @property
    def calibrates(self) -> bool:
        """Whether training data are looked at once more after training, to quantise by them."""
        return self.gptq_enabled or self.target_bytes > 0

    @property
    def reserved_seconds(self) -> float:
        """Training time kept for what follows the loop and looks at training data: calibration, counting n-grams."""
        busy = self.calibrates or "exact" in self.ngram_tables
        return self.gptq_reserve_seconds if busy and self.max_wallclock_seconds else 0.0

    @property
    def stages(self) -> tuple[str, ...]:
        """Evaluation stages in the order they are scored."""
        if self.eval_stages != "auto":
            return tuple(s for s in STAGES if s in listed(self.eval_stages))
        on = {"roundtrip": True, "sliding": self.eval_stride > 0, "ttt": self.ttt_enabled,
              "normalized": "normalized" in self.ngram_scores, "tilt": self.ngram_tilt_enabled, "table": "exact" in self.ngram_tables,
              "ngram": "exact" in self.ngram_scores}  # fmt: skip
        return tuple(s for s in STAGES if on[s])

    @property
    def ngram_scores(self) -> tuple[str, ...]:
        """The n-gram passes asked for."""
        return () if self.ngram_score == "off" else listed(self.ngram_score)

    @property
    def ngram_tables(self) -> tuple[str, ...]:
        """The n-gram tables that the artifact carries."""
        return () if self.ngram_table == "none" else listed(self.ngram_table)

    @property
    def counted_orders(self) -> tuple[int, ...]:
        """Orders of the statistics of the scored text: NGRAM_ORDER, and NGRAM_TILT_ORDER where the hints' contexts are longer."""
        longer = self.ngram_tilt_enabled and self.ngram_tilt_order > self.ngram_order
        return (self.ngram_order, self.ngram_tilt_order) if longer else (self.ngram_order,)

    @property
    def final_stage(self) -> str:
        """The stage that is the score."""
        return self.stages[-1] if self.score_stage == "auto" else self.score_stage


FIELDS = {f.name.upper(): f for f in dataclasses.fields(Config)}
# The first knob of each section, which heads its group in --help.
GROUPS = {"RECIPE": "1 CONFIG", "SEED": "2 RUNTIME", "DATA_PATH": "3 DATA", "NUM_LAYERS": "4 MODEL", "TIED_EMBED_LR": "5 OPTIMIZER",
          "DOC_MASK": "6 TRAINING", "ATTN_BITS": "7 QUANTIZER", "ARTIFACT": "8 ARTIFACT", "EVAL_SEQ_LEN": "9 EVALUATOR"}  # fmt: skip
SECTIONS = dict(
    zip(FIELDS, itertools.accumulate((GROUPS.get(n, "") for n in FIELDS), lambda old, new: new or old), strict=True)
)
TYPES = {"bool": bool, "int": int, "float": float, "str": str}
TYPE_WORDS = {bool: "0 or 1", int: "an integer", float: "a number", str: "text"}

_MUON_99 = {"MUON_MOMENTUM": 0.99, "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_MOMENTUM_WARMUP_STEPS": 1500}
_BIGRAM = {"SMEAR": True, "BIGRAM_VOCAB_SIZE": 4096, "BIGRAM_DIM": 128}
# All published exports pass tensors of 65,536 elements or fewer through; two of them keep control tensors in fp32.
_INT8 = {"ATTN_BITS": 8, "MLP_BITS": 8, "QUANT_MIN_NUMEL": 65536, "QUANT_CLIP": "quantile",
         "QUANT_QUANTILES": "0.9999984"}  # fmt: skip
_INT6_ZSTD = {"QUANT_MIN_NUMEL": 65536, "CONTROL_BITS": 16, "COMPRESSOR": "zstd"}
_SEQ_2048 = {"TRAIN_SEQ_LEN": 2048, "TRAIN_BATCH_TOKENS": 786432}

# What each published system sets, as its record run did (pull requests #164, #740, #187, #850, #1095). The defaults are `baseline`.
RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {"NGRAM_SCORE": "off"},
    "cpu": {
        "NUM_LAYERS": 4, "MODEL_DIM": 256, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 512,
        "TRAIN_BATCH_TOKENS": 8192, "MAX_WALLCLOCK_SECONDS": 240, "WARMUP_STEPS": 1, "WARMDOWN_FRAC": 0.5,
        "VAL_LOSS_EVERY": 0, "TRAIN_LOG_EVERY": 20, "EVAL_STRIDE": 128, "TRAIN_DTYPE": "fast", "SMEAR": True,
        "SMEAR_INIT": -3.0, "BIGRAM_VOCAB_SIZE": 8192, "BIGRAM_DIM": 128,
        "LEAKY_SLOPE": 0.5, "TIED_EMBED_LR": 0.03, "NGRAM_TABLE": "exact",
    },
    "pr164": {
        **_SEQ_2048, **_MUON_99, **_BIGRAM, "MLP_MULT": 3.0, "ITERATIONS": 9000, "MATRIX_LR": 0.02, "SCALAR_LR": 0.02,
        "TIED_EMBED_LR": 0.03, "WARMDOWN_ITERS": 3000, "GRAD_CLIP_NORM": 0.3, "LINEAR_INIT": "orthogonal",
        "BRANCH_PROJ_SCALED": True, "ROPE_TRAIN_LEN": 1024, "EVAL_STRIDE": 256, "NGRAM_SCORE": "off",
        **_INT6_ZSTD,
    },
    "pr740": {
        **_SEQ_2048, **_MUON_99, **_BIGRAM, "MLP_MULT": 2.0, "LEAKY_SLOPE": 0.5, "XSA_LAST_N": -1, "ROPE_DIMS": 32,
        "LN_SCALE": "in", "SMEAR_BEFORE_NORM": True, "BIGRAM_HASH": "pr740", "BIGRAM_SCALE": 0.0,
        "BIGRAM_TABLE_STD": 1.0, "BIGRAM_TABLE_ROLE": "scalar", "BIGRAM_PROJ_ROLE": "scalar",
        "LINEAR_INIT": "orthogonal", "MATRIX_LR": 0.02, "SCALAR_LR": 0.02, "TIED_EMBED_LR": 0.03,
        "WARMDOWN_ITERS": 3500, "MUON_WD": 0.04, "GRAD_CLIP_NORM": 0.3, "EVAL_STRIDE": 64,
        "NGRAM_SCORE": "exact,claimed", "NGRAM_CLAIM": "pr740",
        **_INT8, "GPTQ_ORDER": "ascending", "PRUNE_SCOPE": "global", "COMPRESSOR": "zstd",
    },
    "pr187": {
        **_MUON_99, "TRAIN_SEQ_LEN": 2048, "TRAIN_BATCH_TOKENS": 524288, "NUM_LAYERS": 10, "MLP_MULT": 3.0,
        "SKIP_SPLIT": "ceil", "XSA_LAST_N": 4, "SMEAR": True, "SMEAR_INIT": -3.0, "SMEAR_BEFORE_NORM": True,
        "PRE_ENRICH_DIM": 768, "OVERTONE_INIT": True, "BIGRAM_VOCAB_SIZE": 2048, "BIGRAM_HASH": "pr187",
        "BIGRAM_SCALE": 0.0, "BIGRAM_TABLE_STD": 0.01, "BIGRAM_TABLE_ROLE": "matrix", "TIED_EMBED_LR": 0.035,
        "MATRIX_LR": 0.025, "SCALAR_LR": 0.025, "MUON_WD": 0.04, "MUON_WD_ORDER": "after", "ADAM_WD": 0.04,
        "WARMDOWN_ITERS": 3500, "EMA_DECAY": 0.997, "SWA_EVERY": 50, "SWA_BLEND": 0.5, "QAT": "ste", "QAT_BITS": 6,
        "EVAL_STRIDE": 64,
        "NGRAM_SCORE": "exact,claimed", "NGRAM_CLAIM": "pr187",
        "EMBED_BITS": 16, "TABLE_BITS": 6, "PROJ_BITS": 6, "QUANT_MIN_NUMEL": 65536, "QUANT_CLIP": "tensor",
        "QUANT_QUANTILES": "0.999,0.9999,0.99999,0.999999,0.9999999", "COMPRESSOR": "lzma", "LZMA_PRESET": 6,
    },
    "pr850": {
        **_SEQ_2048, **_MUON_99, **_BIGRAM, "NUM_LAYERS": 11, "MLP_MULT": 3.0, "LEAKY_SLOPE": 0.9, "XSA_LAST_N": 4,
        "ROPE_DIMS": 16, "ROPE_TRAIN_LEN": 1024, "LN_SCALE": "in", "VE_DIM": 128, "VE_LAYERS": "9,10",
        "VALUE_RESIDUAL": "softmax", "ATTN_GATE": "input", "LINEAR_INIT": "orthogonal", "BRANCH_PROJ_SCALED": True,
        "TIED_EMBED_LR": 0.035, "MATRIX_LR": 0.025, "SCALAR_LR": 0.025, "DECODER_LR_MULT": 2.0, "MUON_WD": 0.04,
        "ADAM_WD": 0.04, "GRAD_CLIP_NORM": 0.3, "LR_SCHEDULE": "wsd", "EMA_DECAY": 0.997, "SWA_EVERY": 50,
        "SWA_SOURCE": "ema", "SWA_BLEND": 0.3, "COMPLEMENT_ALPHA": 0.5, "QAT": "soft_round", "QAT_BITS": 5,
        "QAT_START_FRAC": 0.85, "VAL_LOSS_EVERY": 4000, "EVAL_STRIDE": 64,
        "TTT_ENABLED": True, "TTT_POLYAK_DECAY": 0.998, "TTT_TEMPERATURE": 0.98,
        "NGRAM_SCORE": "exact,claimed", "NGRAM_CLAIM": "pr850",
        "ATTN_BITS": 5, "MLP_BITS": 5, "QUANT_MIN_NUMEL": 65536, "CONTROL_BITS": 16, "QUANT_CLIP": "row", "PRUNE_FRAC": 0.03,
        "GPTQ_ENABLED": True, "GPTQ_VARIANT": "pr850", "GPTQ_ORDER": "ascending", "COMPRESSOR": "lzma",
    },
    "pr1095": {
        **_MUON_99, **_BIGRAM, "NUM_LAYERS": 5, "MLP_MULT": 3.0, "LEAKY_SLOPE": 0.5, "XSA_LAST_N": 5, "ROPE_DIMS": 16,
        "LN_SCALE": "in", "BIGRAM_VOCAB_SIZE": 3072, "VE_DIM": 128, "VE_LAYERS": "3,4", "KV_FUSED": True,
        "ADAPTER_RANK": 64, "LINEAR_INIT": "orthogonal", "TRAIN_SEQ_LEN": 2048,
        "TRAIN_BATCH_TOKENS": 524288, "WARMDOWN_ITERS": 5000, "TIED_EMBED_LR": 0.035, "MATRIX_LR": 0.04,
        "SCALAR_LR": 0.025, "MUON_WD": 0.04, "ADAM_WD": 0.04, "GRAD_CLIP_NORM": 0.1, "EMA_DECAY": 0.997,
        "QAT": "ste", "QAT_START_FRAC": 0.75, "VAL_LOSS_EVERY": 4000, "EVAL_STRIDE": 64,
        "TTT_LORA_SITES": "q,kv", "TTT_OPTIMIZER": "sgd", "TTT_LR": 0.002, "TTT_EPOCHS": 3, "TTT_CHUNK_TOKENS": 32768,
        "TTT_BATCH_SEQS": 32,
        "NGRAM_SCORE": "exact,claimed", "NGRAM_CLAIM": "pr1095", "NGRAM_TABLE": "pr1095",
        **_INT8, "COMPRESSOR": "lzma", "LZMA_PRESET": 6,
    },
    # #2135, but for the coding of weights (one step a tensor fills the limit, trellis paths; a low-rank correction only where it pays its
    # bytes) and the order of the text, in which documents train: 3.5 blocks up to whose ends it holds what was scored.
    # Documents keep keys and values where the published windows were computed anew: the figure is ours. Evaluation on 8xH100:
    # benchmarks/ttt.py --estimate writes the sum down, 179 of 600 s at 11 % of peak, not measured. Sliding windows would add 100, and no
    # stage builds on them: a chunk of a document sees as much context.
    "frontier": {
        **_SEQ_2048, "VOCAB_SIZE": 8192, "NUM_LAYERS": 11, "MLP_MULT": 4.0, "LEAKY_SLOPE": 0.5, "XSA_LAST_N": -1,
        "ROPE_DIMS": 16, "LN_SCALE": "in", "QK_GAIN_INIT": 5.0, "LINEAR_INIT": "orthogonal",
        "NUM_LOOPS": 2, "LOOP_START": 3, "LOOP_END": 5, "PARALLEL_START_LAYER": 8, "SKIP_GATES_ENABLED": True,
        "ATTN_GATE": "sparse", "SPARSE_ATTN_GATE_SCALE": 0.5, "SMEAR": True, "SMEAR_FORM": "window",
        "SMEAR_BEFORE_NORM": True, "MATRIX_LR": 0.028, "TIED_EMBED_LR": 0.03, "SCALAR_LR": 0.02, "MUON_MOMENTUM": 0.97,
        "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_MOMENTUM_WARMUP_STEPS": 1500, "MUON_ROW_NORMALIZE": True,
        "NEWTON_SCHULZ": "polar", "MUON_WD": 0.095, "EMBED_WD": 0.085, "ADAM_WD": 0.02, "BETA2": 0.99,
        "GRAD_CLIP_NORM": 0.3, "WARMDOWN_FRAC": 0.85, "MIN_LR": 0.1, "EMA_DECAY": 0.9965, "VAL_LOSS_EVERY": 0,
        "TRAIN_LOG_EVERY": 500, "DOC_MASK": True, "EVAL_SEQ_LEN": 2560, "TARGET_BYTES": 16_000_000,
        "EMBED_BITS": 7, "CONTROL_BITS": 16, "QUANT_CLIP": "sigma", "QUANT_MIN_NUMEL": 65536, "GPTQ_ENABLED": True,
        "GPTQ_N_SAMPLES": 1536, "QUANT_TRELLIS": 64, "LQER_TOP_K": 3, "LQER_RANK": 4, "LQER_FACTOR_BITS": 4,
        "LQER_ASYM_GROUP": 32,
        "TTT_ENABLED": True, "TTT_RESET": "document", "TTT_EVAL_SEQ_LEN": 2560, "TTT_BATCH_SIZE": 64, "TTT_CHUNK_SIZE": 48,
        "TTT_LORA_SITES": "q,v,o,mlp,head", "TTT_LORA_BLOCKS": 0, "TTT_LORA_RANK": 80, "TTT_LORA_ALPHA": 144.0,
        "TTT_LR": 8e-5, "TTT_WD": 2.0, "TTT_BETA1": 0.0, "TTT_BETA2": 0.99, "TTT_ADAM_EPS": 1e-10, "TTT_GRAD_CLIP": 0.0,
        "TTT_BYTE_WEIGHTED": False, "PHASED_TTT_NUM_PHASES": 1, "PHASED_TTT_PREFIX": 0.3, "NGRAM_TILT_ENABLED": True,
        "NGRAM_TILT_ORDER": 16, "NGRAM_ORDER": 16, "NGRAM_TILT_THRESHOLD": 0.8, "NGRAM_TILT_BETA": 2.625,
    },
}  # fmt: skip
GPU_RECIPE = "frontier"  # the default on a GPU


class Only(NamedTuple):
    """A published name of which one value is left, and why; another is an error."""

    value: str
    why: str


class Dead(NamedTuple):
    """A published name that never did anything, or nothing but cost: accepted and reported, with the reason. Where `unless`, a setting, holds
    it is a knob of ours that acts."""

    why: str
    unless: str = ""


def computed(knob_name: str, value: Callable[[float], Any]) -> Callable[[str, Mapping[str, str]], dict[str, str]]:
    """A published name whose number, put through `value`, is that of a knob of ours; None leaves the knob alone."""

    def settings(text: str, env: Mapping[str, str]) -> dict[str, str]:  # noqa: ARG001
        try:
            found = value(float(text))
        except ValueError:
            raise ConfigError("expected a number") from None
        return {} if found is None else {knob_name: str(found)}

    return settings


def as_digit(text: str) -> str:
    """true and false, in any case, as 1 and 0; any other text unchanged."""
    return {"false": "0", "true": "1"}.get(text.lower(), text)


def late_qat(text: str, env: Mapping[str, str]) -> dict[str, str]:
    """LATE_QAT_THRESHOLD of #1095: QAT starts where the learning-rate scale falls below it, 5000 steps of warmdown in 9912."""
    start = computed("QAT_START_FRAC", lambda v: 1 - v * 5000 / 9912 if v > 0 else None)(text, env)
    return start or {"QAT": "none"}


def same_width(text: str, env: Mapping[str, str]) -> dict[str, str]:
    """MLP_MULT_ENCODER and MLP_MULT_DECODER of #187, of which 0 and MLP_MULT itself are left."""
    width = env.get("MLP_MULT", as_text(FIELDS["MLP_MULT"].default))
    with contextlib.suppress(ValueError):
        if text == width or float(text) in (0, float(width)):
            return {}
    raise ConfigError(f"expected 0 or MLP_MULT={width}: no published run gave each half a width of its own")


def curriculum(env: Mapping[str, str]) -> dict[str, str]:
    """PROG_SEQ_ENABLED=1 of #850 with its two lists as a TRAIN_SEQ_SCHEDULE."""
    lens, fracs = env.get("PROG_SEQ_LENS", "512,1024"), env.get("PROG_SEQ_FRACS", "0.33,0.55")
    try:
        schedule = ",".join(f"{n}@{f}" for n, f in zip(lens.split(","), fracs.split(","), strict=True))
        parse_schedule(schedule)
    except ValueError:
        raise ConfigError(f"with PROG_SEQ_LENS={lens!r} and PROG_SEQ_FRACS={fracs!r}: expected as many lengths (8 or more) as rising fractions "
                          "between 0 and 1") from None  # fmt: skip
    return {"TRAIN_SEQ_SCHEDULE": schedule}


# What becomes of a published name. Text: the knobs that take its value. A table: settings of ours for each value; those of 0 win even over
# explicit settings; KNOB+=a and KNOB-=a,b change a list. A function: settings of its value and the environment.
Fate = str | dict[str, Any] | Only | Dead | Callable[[str, Mapping[str, str]], dict[str, str]]

KEPT = "the published scorer is kept as it was"
ENTIRE = "VAL_TOKENS scores a prefix of the text"
PEEKS = "hints that look at the target's own word or pieces are no prediction"
CLAIMS = {"0": "NGRAM_SCORE=off", "1": "NGRAM_SCORE=exact,claimed"}
# Names common to all recipes under "*", then recipe by recipe.
PUBLISHED_NAMES: dict[str, dict[str, Fate]] = {
    "*": {
        "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",
        "LN_SCALE": {"0": "LN_SCALE=none", "1": "LN_SCALE=in"},
        "VRL_ENABLED": {"0": "VALUE_RESIDUAL=none", "1": "VALUE_RESIDUAL=softmax"},
        "VALUE_RESIDUAL": {"0": "VALUE_RESIDUAL=none"},
        "GATED_ATTN_ENABLED": {"0": "ATTN_GATE=none", "1": "ATTN_GATE=input"},
        "GATED_ATTN": Only("0", "no published run switched it on; ATTN_GATE=input is #850's gate"),
        "GATED_ATTN_BIAS_INIT": "ATTN_GATE_INIT",
        "LEAKY_RELU": {"0": "LEAKY_SLOPE=0", "1": "LEAKY_SLOPE=0.5"},
        "TIED_EMBED_INIT_STD": "EMBED_INIT_STD",
        "VE_ENABLED": {"0": "VE_DIM=0 VE_LAYERS=", "1": "VE_DIM=128"},
        "EVAL_ONLY": {"0": "", "1": "MODE=eval"},
        "CASEOPS_ENABLED": {"0": "VAL_BYTES=tokenizer", "1": "VAL_BYTES=sidecar"},
        "EMA_ENABLED": {"0": "EMA_DECAY=0", "1": "EMA_DECAY=0.997"},
        "EMA_DECAYS": Only("", "choosing between averages gained nothing; EMA_DECAY keeps one"),
        "QAT_ENABLED": {"0": "QAT=none", "1": "QAT=ste"},
        "SWA_ENABLED": {"0": "SWA_EVERY=0", "1": "SWA_EVERY=50"},
        "WEIGHT_DECAY": "MUON_WD",
        "QUANT_BITS": "ATTN_BITS MLP_BITS",
        "MATRIX_BITS": "ATTN_BITS MLP_BITS",
        "GPTQ_DAMP": "GPTQ_PERCDAMP",
        "FULL_GPTQ": "GPTQ_ENABLED",
        "LQER_ENABLED": {"0": "LQER_TOP_K=0", "1": "LQER_TOP_K=3"},
        "LQER_ASYM_ENABLED": Only("1", "the left factor always has 2 bits and one step, the right one a step a group"),
        "AWQ_LITE_ENABLED": Only("0", "with QUANT_TRELLIS every column has its own step, which this did for a few groups"),
        **{f"AWQ_LITE_{name}": Dead("belongs to AWQ_LITE_ENABLED") for name in ("BITS", "GROUP_TOP_K", "GROUP_SIZE")},
        "GPTQ_CALIBRATION": Only("train", "calibration looks at windows of the training stream"),
        "PRUNE_PCT": "PRUNE_FRAC",
        "NGRAM_ENABLED": {"0": "NGRAM_SCORE=off", "1": "NGRAM_SCORE=exact"},
        "NGRAM_TILT_RATE": Only("0", "learning the tilt's strength gained .0001 bits per byte; NGRAM_TILT_BETA sets it"),
        "NGRAM_MIX": Only("cascade", "every other way for exact counts to correct the network scored worse"),
        "ENCODER_PASSES": Only("2", "ENCODER_RECURRENCE runs the encoder twice, as published"),
        "MLP_MULT_ENCODER": same_width, "MLP_MULT_DECODER": same_width,
        "COMPLEMENT_SYNC": Only("1", "counts are those of all ranks, or the weights would depend on their number"),
        "COMPLEMENT_NORMALIZED": Only("0", "the weighted loss is divided by the number of tokens"),
        "GRAD_CLIP_LOCAL": Only("0", "the norm is that of the reduced gradient, whatever the number of ranks"),
        "ADAPTER_B_INIT": Only("zero", "B starts at 0, so that training starts from the base; the published start is much larger than the base"),
        "XSA_GATED": Only("0", "a learned weight of XSA a head gained nothing"),
        "LOOP_CARRY": Only("", "the frozen carry lost in every comparison"),
        "TTT_KV_CACHE": Only("1", "windows computed anew scored alike, at two to three times the cost"),
        "NGRAM_UPDATE_TOKENS": Only("0", "the mixing weights are updated every 1,024 targets, or 1/4096 of the text if more"),
        "TTT_LORA_LR": "TTT_LR",
        "TTT_WEIGHT_DECAY": "TTT_WD",
        "TTT_OPTIMIZER": {"adam": "TTT_OPTIMIZER=adamw"},
        "TTT_GRAD_STEPS": "TTT_EPOCHS",
        "TTT_MASK": {"": "", "none": "", "no_qv": "TTT_LORA_SITES-=q,v"},
        "TTT_SHORT_SCORE_FIRST_ENABLED": {"0": "TTT_SHORT_SCORE_FIRST_STEPS=", "1": ""},
        # The 2,500 longest documents hold 30 % of the published validation text.
        "PHASED_TTT_PREFIX_DOCS": computed("PHASED_TTT_PREFIX", lambda v: min(1.0, 0.3 * v / 2500)),
        "GLOBAL_TTT_OPTIMIZER": {"sgd": ""},
        "TTT_EVAL_ONLY": {"0": "", "1": "MODE=eval"},
        "TOKEN_ORDER": "NGRAM_TILT_ORDER",
        "TOKEN_THRESHOLD": "NGRAM_TILT_THRESHOLD",
        "TOKEN_BOOST": "NGRAM_TILT_BETA",
        "ADAPTIVE_BOOST_GAMMA": "NGRAM_TILT_GAMMA",
        "PROG_SEQ_ENABLED": {"0": "", "1": curriculum}, "PROG_SEQ_LENS": "", "PROG_SEQ_FRACS": "",
        "MUON_BETA2": Dead("read by no published update rule"),
        "MTP_NUM_HEADS": Dead("off in every published run; left out because it needs heads and a loss that no artifact holds"),
        "MTP_LOSS_WEIGHT": Dead("belongs to MTP_NUM_HEADS"),
        "NGRAM_HINT_PRECOMPUTE_OUTSIDE": Dead("hints are always computed inside the evaluation's clock"),
        "DTG_ENABLED": Dead("off in every published run; left out because every block would carry its gate and nothing shows that it helps"),
    },
    "pr164": {  # its average, collected through the whole warmdown, replaces the weights
        "SWA_ENABLED": {"0": "SWA_EVERY=0", "1": "SWA_EVERY=200 SWA_START_SCALE=1 SWA_BLEND=1"},
    },
    "pr740": {  # both start by the clock, at 10 % and 40 %; SWA here as the warmdown starts, at 49 % in the record run
        "EMA_ENABLED": {"0": "EMA_DECAY=0", "1": "EMA_DECAY=0.997 EMA_START_FRAC=0.1"},
        "SWA_ENABLED": {"0": "SWA_EVERY=0", "1": "SWA_EVERY=50 SWA_START_SCALE=1"},
        "PRUNE_PCT": computed("PRUNE_FRAC", lambda v: v / 100),  # a percentage here, a fraction in #850
        "NGRAM_ALPHA": Only("0.2", KEPT),
        "NGRAM_ENABLED": CLAIMS,
    },
    "pr187": {
        "LN_SCALE": {"0": "LN_SCALE=none", "1": "LN_SCALE=out"},
        "RUN_CONFIG": {"A": "", "C": "NUM_LAYERS=12 MLP_MULT=2 TRAIN_SEQ_LEN=1024 WARMDOWN_ITERS=2600"},
    },
    "pr850": {
        "QAT_TRIGGER_FRAC": "QAT_START_FRAC",
        "QAT_ENABLED": {"0": "", "1": "QAT_START_FRAC=0"},  # from the first step; late QAT has its own switch
        "LATE_QAT_THRESHOLD": computed("QAT", lambda v: None if v > 0 else "none"),  # was read as on or off
        "NGRAM_ENABLED": CLAIMS,
        "NGRAM_EVAL_BUCKETS": "NGRAM_BUCKETS",
        "NGRAM_EVAL_MIN_COUNT": "NGRAM_MIN_COUNT",
        "NGRAM_EVAL_BATCH_SEQS": computed("VAL_BATCH_TOKENS", lambda v: int(v * 2048)),
        **{f"NGRAM_EVAL_{name}": Only(value, KEPT) for name, value in (("ORDER", "9"), ("MIN_ORDER", "2"), ("ADAPTIVE", "1"),
           ("ALPHA_MIN", "0.12"), ("ALPHA_MAX", "0.60"), ("ENTROPY_SCALE", "2"))},
        "WARMDOWN_ITERS": Dead("the published schedule is WSD, which never reads it", "LR_SCHEDULE=warmdown"),
        "NGRAM_EVAL_CHUNK_TOKENS": Dead("the published pass is cut by TTT_CHUNK_TOKENS"),
        "NGRAM_EVAL_ENTROPY_CENTER": Dead("every order of the published scorer has a centre of its own"),
        "NGRAM_EVAL_ALPHA": Dead("the published scorer reads it only where NGRAM_EVAL_ADAPTIVE is 0"),
        "TTT_FREEZE_BLOCKS": Dead("the published adaptation freezes all base weights"),
        "TTT_MOMENTUM": Dead("the published adaptation uses AdamW", "TTT_OPTIMIZER=sgd"),
        "SWA_ENABLED": Dead("the published script always averaged; use SWA_EVERY"),
    },
    "pr1095": {
        "LATE_QAT_THRESHOLD": late_qat,
        "NGRAM_ENABLED": {"0": "NGRAM_SCORE=off NGRAM_TABLE=none", "1": "NGRAM_SCORE=exact,claimed NGRAM_TABLE=pr1095"},
        "NGRAM_ORDERS": Only("2,3,4,5,6,7", KEPT),
        "NGRAM_ALPHA_MAX": Only("0.95", KEPT),
        "SWA_ENABLED": Dead("the published sums were collected and never applied; use SWA_EVERY"),
        "TTT_FREEZE_BLOCKS": Dead("test-time training here leaves all base weights alone; use TTT_LORA_BLOCKS"),
    },
    "frontier": {
        "ARTIFACT_DIR": "LOG_DIR",
        "SMEAR_GATE_ENABLED": "SMEAR",
        "SPARSE_ATTN_GATE_ENABLED": {"0": "ATTN_GATE=none", "1": "ATTN_GATE=sparse"},
        "SPARSE_ATTN_GATE_INIT_STD": Only("0", "the gate starts at zero"),
        **dict.fromkeys(("GATED_ATTN_ENABLED", "ATTN_OUT_GATE_ENABLED"),
                        Only("0", "ATTN_GATE=sparse took this gate's place; ATTN_GATE=input is the dense one")),
        "LEAKY_RELU_SQ_SLOPE": "LEAKY_SLOPE",
        "QK_GAIN_INIT_SCHEDULE": Only("", "a gain by block showed no gain; QK_GAIN_INIT is that of all blocks"),
        "PARALLEL_FINAL_LANE": Only("mean", "the output is the mean of both lanes"),
        "ROPE_YARN": Only("0", "no published run of this stack rescaled its base; ROPE_TRAIN_LEN is the NTK rule"),
        "RECUR_ALPHA_ENABLED": Only("0", "the frozen carry lost in every comparison"),
        "MUON_HUBER_WD": Only("0", "the Huber form of the decay was an experiment that lost; MUON_WD is the decay"),
        "FORCE_STOP_STEP": computed("ITERATIONS", lambda v: int(v) if v > 0 else None),
        "GPTQ_CALIBRATION_BATCHES": computed("GPTQ_N_SAMPLES", lambda v: int(v * 98304 / 2048)),
        "GPTQ_CALIBRATION_MODE": Only("random", "calibration looks at windows of the training stream"),
        "COMPRESSOR": {"pergroup": "COMPRESSOR=entropy", "brotli": "COMPRESSOR=entropy"},
        "OPTROT_ENABLED": Only("0", "rotations before rounding gained nothing"),
        "PREQUANT_ONLY": Only("0", "a run always scores what its artifact holds"),
        "VAL_DOC_FRACTION": Only("1", ENTIRE),
        "EVAL_INCLUDE_TAIL": {"0": "VAL_DROP_TAIL=1", "1": "VAL_DROP_TAIL=0"},
        "ALIAS_PREV_SMEAR_SCALE": Only("1", "no shards here have fused case markers"),
        **{f"TTT_{site.upper()}_LORA": {"0": f"TTT_LORA_SITES-={site}", "1": f"TTT_LORA_SITES+={site}"} for site in ("q", "k", "v", "o", "mlp")},
        "TTT_LORA_EMA_DECAY": Only("0", "no published run scored with an average of a document's LoRA"),
        "TTT_UPDATE_EVERY": Only("1", "every scored chunk is learned"),
        "TTT_EVAL_BATCHES": Only("", ENTIRE),
        "WITHIN_TAU": Only("99", PEEKS), "WITHIN_BOOST": Only("0", PEEKS), "AGREE_ADD_BOOST": Only("0", PEEKS),
        "WORD_TAU": Only("99", PEEKS), "WORD_BOOST": Only("0", PEEKS),
        "DATA_DIR": Dead("DATA_PATH names the folder of the shards"),
        "SMEAR_GATE_BOS_FIX": Dead("no document sees the one before it, with either value; SMEAR_CROSS_DOC=1 is the published leak"),
        "ROPE_TRAIN_SEQ_LEN": Dead("was read only where ROPE_YARN is 1"),
        "GATED_ATTN_INIT_STD": Dead("belongs to GATED_ATTN_ENABLED"),
        "ATTN_OUT_GATE_SRC": Dead("belongs to ATTN_OUT_GATE_ENABLED"),
        "GATED_ATTN_QUANT_GATE": Dead("gates are stored as all control parameters are, in CONTROL_BITS"),
        "FUSED_CE_ENABLED": Dead("the loss is the same; the device decides what computes it"),
        "MUON_HUBER_DELTA": Dead("belongs to MUON_HUBER_WD"),
        "PERGROUP_ROUNDTRIP_CHECK": Dead("every artifact is read back before it is scored"),
        "TTT_SHORT_DOC_LEN": Dead("TTT_SHORT_SCORE_FIRST_STEPS holds the lengths"),
        "TTT_SHORT_CHUNK_SIZE": Dead("TTT_SHORT_SCORE_FIRST_STEPS holds the chunks"),
        "TRAIN_SEQ_SCHEDULE_MODE": Dead("the schedule always follows the fraction of the budget"),
        "COMPILE_SHAPE_WARMUP": Dead("priming always runs every shape of the training, before the clock"),
    },
}  # fmt: skip


# Variables of other programs whose names are like those of knobs: never taken for a misspelt one.
FOREIGN = frozenset("ARTIFACTS CODE COMPILER DEVICES FORCE_COLOR LMOD_DIR LOGDIR MODEL MODEL_DIR MORE NODE PAT PRE_COMMIT PROFILER "
                    "PROFILES PROJ_DATA PROJ_LIB RUNID SPEED".split())  # fmt: skip
# Beginnings of names that torch, its launchers, shells, clusters, CI systems and editors set.
FOREIGN_PREFIXES = tuple("TORCH NCCL_ GLOO_ CUDA_ NVIDIA_ NV_ SLURM_ SM_ PBS_ LSB_ OMPI_ PMI KUBERNETES_ AWS_ AZURE_ AGENT_ CI_ GITHUB_ "
                         "GITLAB_ RUNNER_ BUILD_ SYSTEM_ JENKINS_ CIRCLE_ VSCODE_ CONDA_ VIRTUAL_ENV PYTHON PYTEST_ PIP_ UV_ HF_ WANDB_ "
                         "MLFLOW_ OMP_ MKL_ KMP_ TRITON_ LC_ XDG_ SSH_ GROUP_ ROLE_ LOG_LEVEL".split())  # fmt: skip

# What other trainers call a knob of ours, or what comes nearest to theirs.
ELSEWHERE = {name: ours for ours, names in {
    "MATRIX_LR": "LR LEARNING_RATE MAX_LR MUON_LR", "TIED_EMBED_LR": "ADAM_LR",
    "TRAIN_BATCH_TOKENS": "BATCH BATCH_SIZE TRAIN_BATCH_SIZE GLOBAL_BATCH_SIZE TOTAL_BATCH_SIZE BATCH_TOKENS",
    "MICRO_BATCH_TOKENS": "MICRO_BATCH_SIZE DEVICE_BATCH_SIZE GRAD_ACCUM_STEPS GRADIENT_ACCUMULATION_STEPS",
    "ITERATIONS": "EPOCHS NUM_EPOCHS STEPS NUM_STEPS MAX_STEPS TRAIN_STEPS NUM_ITERATIONS MAX_ITERS",
    "MAX_WALLCLOCK_SECONDS": "MAX_SECONDS TIME_LIMIT MAX_TIME", "WARMDOWN_ITERS": "WARMDOWN WARMDOWN_STEPS COOLDOWN_STEPS",
    "TRAIN_SEQ_LEN": "SEQ_LEN MAX_SEQ_LEN SEQUENCE_LENGTH BLOCK_SIZE CONTEXT_LENGTH",
    "MODEL_DIM": "DIM D_MODEL HIDDEN_SIZE HIDDEN_DIM N_EMBD EMBED_DIM", "NUM_LAYERS": "LAYERS N_LAYER N_LAYERS DEPTH",
    "NUM_HEADS": "HEADS N_HEAD N_HEADS", "MUON_MOMENTUM": "MOMENTUM", "GRAD_CLIP_NORM": "GRAD_CLIP MAX_GRAD_NORM",
    "TRAIN_DTYPE": "DTYPE PRECISION BF16 FP16 AMP", "SEED": "RANDOM_SEED", "DATA_PATH": "DATA DATASET DATASET_PATH",
    "TOKENIZER_PATH": "TOKENIZER", "LOG_DIR": "OUT_DIR OUTPUT_DIR", "RUN_ID": "RUNID RUN_NAME EXPERIMENT EXPERIMENT_NAME",
    "RESUME": "CHECKPOINT CHECKPOINT_PATH RESUME_FROM", "CHECKPOINT_EVERY": "SAVE_EVERY SAVE_INTERVAL SAVE_STEPS",
    "VAL_LOSS_EVERY": "EVAL_EVERY EVAL_INTERVAL EVAL_STEPS", "TRAIN_LOG_EVERY": "LOG_EVERY LOG_INTERVAL LOGGING_STEPS",
}.items() for name in names.split()}  # fmt: skip


def bounds(name: str) -> str:
    """A number's bounds in words with its unit: "1 to 10 iterations", "at least 0 s"; empty where it has none."""
    meta = FIELDS[name].metadata
    lo, hi = (None if math.isinf(limit) else f"{limit:.10g}" for limit in (meta["lo"], meta["hi"]))
    words = f"{lo} to {hi}" if lo and hi else f"at least {lo}" if lo else f"at most {hi}" if hi else ""
    return f"{words} {meta['unit']}".strip()


def check_value(name: str, value: Any) -> Any:
    """The value itself; raises ConfigError with what is expected unless it has the knob's type and is within its bounds."""
    meta, kind = FIELDS[name].metadata, TYPES[FIELDS[name].type]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"{name}={str(value)[:80]!r}: expected {TYPE_WORDS[kind]}")
    words = listed(value) if meta["several"] else (value,)
    if meta["choices"] and not set(words) <= set(meta["choices"]) and value != (meta["several"] or None):
        which = f"{meta['several']} or a list" if meta["several"] else "one"
        expected = f"expected {which} of {', '.join(map(str, meta['choices']))} ({meta['doc']})"
        raise ConfigError(f"{name}={str(value)[:80]!r}: {expected}")
    if kind in (int, float) and not (math.isfinite(value) and meta["lo"] <= value <= meta["hi"]):
        raise ConfigError(f"{name}={value}: expected {bounds(name) or 'a finite number'}")
    return value


def expand_home(name: str, path: str) -> str:
    """The path with a leading ~ or ~user replaced by that home folder, which a shell does only to an unquoted word. A variable that the
    shell did not replace is refused, unless there is a file of that name."""
    expanded = os.path.expanduser(path)
    if (variable := re.search(r"\$\{?[A-Za-z_]\w*\}?|%[A-Za-z_]\w*%", expanded)) and not os.path.exists(path):
        raise ConfigError(
            f"{name}={path!r}: the shell has not replaced {variable[0]}, which single quotes prevent; write the path itself"
        )
    if expanded.startswith("~"):
        raise ConfigError(f"{name}={path!r}: no such home folder; write the whole path, or ./~ for a folder named so")
    return expanded


def parse_value(name: str, text: str) -> Any:
    """Text of one knob -> its typed value; raises ConfigError with the knob, the text and what is expected."""
    meta, kind = FIELDS[name].metadata, TYPES[FIELDS[name].type]
    if kind is bool or "0" in meta["choices"]:
        text = as_digit(text)
    elif meta["unit"] in ("file", "folder") or name == "RESUME":
        text = expand_home(name, text)
    try:
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name}={text!r}: expected {TYPE_WORDS[kind]}") from None
    return check_value(name, value)


def one_edit_apart(a: str, b: str) -> bool:
    """True if one insertion, deletion, substitution or swap of neighbours makes `b` of `a`."""
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[i:], b[i:]
    swapped = rest_a[1:2] + rest_a[:1] + rest_a[2:]
    return a != b and (rest_b in (rest_a[1:], swapped) or rest_b[1:] in (rest_a, rest_a[1:]))


@functools.cache
def nearest_knob(name: str) -> tuple[str | None, bool]:
    """(the knob or published name that `name` may stand for, or None; whether it is misspelt rather than merely alike)."""
    if name in ELSEWHERE:
        return ELSEWHERE[name], False
    if name in FOREIGN or name.startswith(FOREIGN_PREFIXES):
        return None, False
    known = [*FIELDS, *(name for table in PUBLISHED_NAMES.values() for name in table)]
    if misspelt := next((k for k in known if one_edit_apart(name, k)), None):
        return misspelt, True
    beginning = [k for k in FIELDS if "_" in name and k.startswith(name.split("_")[0] + "_")]
    alike = difflib.get_close_matches(name.upper(), known, 1, 0.8) or difflib.get_close_matches(name, beginning, 1, 0.6)
    return (alike[0] if alike else None), False


class LoadedConfig(NamedTuple):
    """A configuration with the source of every value ("default", "recipe NAME", "artifact", "env") and its notices."""

    cfg: Config
    recipe_reason: str
    source: dict[str, str]
    notices: list[str]


def term_holds(c: Config, term: str) -> bool:
    """Whether one term of a knob's `needs` holds."""
    if term.islower():
        return term in c.stages
    name, _, words = term.lstrip("!").partition("=")
    value = getattr(c, name.lower())
    if words:
        return bool({*listed(as_text(value))} & {*words.split("/")})
    return (value not in (0, "", "none")) != term.startswith("!")


def idle_notice(c: Config, name: str) -> str:
    """Why the knob cannot act in this configuration, as a notice that names what it needs; "" where it can."""
    meta, shown = FIELDS[name].metadata, {n: setting(f, getattr(c, n.lower())) for n, f in FIELDS.items()}
    train_only = SECTIONS[name][0] in "567" and not meta["shape"]
    for terms in (*["MODE=train"] * train_only, *meta["needs"].split()):
        any_of = terms.split("|")
        if not any(term_holds(c, term) for term in any_of):
            names = [re.match(r"!?(\w+)", term)[1] for term in any_of]
            now = " and ".join(shown[n] if n in FIELDS else f"no stage {n}" for n in names if n != name)
            wanted = " or ".join(f"stage {t}" if t.islower() else f"{t[1:]} off" if t[0] == "!" else t for t in any_of)
            return f"{shown[name]} has no effect with {now}: it needs {wanted}"
    return ""


def settings_of(name: str, text: str, fate: Fate, env: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """[(knob of ours, "=", "+=" or "-=", text)] that the published `name` with this value stands for; ConfigError with what is expected."""
    if isinstance(fate, str):
        return [(knob_name, "=", text) for knob_name in fate.split()]
    if isinstance(fate, Only):
        same = text == fate.value
        with contextlib.suppress(ValueError):
            same = same or float(text) == float(fate.value)
        if not same:
            raise ConfigError(f"expected {fate.value or 'nothing'}: {fate.why}")
        return []
    if isinstance(fate, dict):
        word = as_digit(text)
        if callable(fate.get(word)):
            return [(knob_name, "=", value) for knob_name, value in fate[word](env).items()]
        if word in fate:
            return [re.fullmatch(r"(\w+)([+-]?=)(.*)", pair).groups() for pair in fate[word].split()]
        if name not in FIELDS:  # our own name takes our own words too
            raise ConfigError(f"expected {' or '.join(filter(None, fate))}")
        return [(name, "=", text)]
    return [(knob_name, "=", value) for knob_name, value in fate(text, env).items()]


def translate(env: Mapping[str, str], recipe: str, errors: list[str], notices: list[str]) -> dict[str, str]:
    """Environment -> {knob: text}: published names become ours, dead ones are reported, misspelt ones are errors."""
    table = {**PUBLISHED_NAMES["*"], **PUBLISHED_NAMES.get(recipe, {})}
    base = {name: as_text(value) for name, value in RECIPES.get(recipe, {}).items()}
    steps: list[
        tuple[int, str, str, str]
    ] = []  # (turn, knob, how, text): ours and those of a published 0, which wins, then changes of lists
    for name, text in env.items():
        fate = table.get(name)
        if isinstance(fate, Dead) and fate.unless and env.get(fate.unless.split("=")[0]) == fate.unless.split("=")[1]:
            fate = None
        if isinstance(fate, Dead):
            notices.append(f"{name}={text} has no effect: {fate.why}")
        elif fate is not None:
            turn = int(isinstance(fate, dict) and as_digit(text) == "0")
            try:
                for knob_name, how, value in settings_of(name, text, fate, {**base, **env}):
                    parse_value(knob_name, value)
                    # An explicit knob of ours wins over a published name.
                    if turn or how != "=" or knob_name == name or knob_name not in env:
                        steps.append((turn if how == "=" else 2, knob_name, how, value))
            except ConfigError as e:
                errors.append(f"{name}={text!r}: {e}")
        elif name in FIELDS:
            steps.append((0, name, "=", text))
        else:
            guess, misspelt = nearest_knob(name)
            if misspelt:
                errors.append(f"{name} is no knob; did you mean {guess}?")
            elif guess == name:
                notices.append(f"{name} is a name of another recipe and is ignored with RECIPE={recipe}")
            elif guess:
                notices.append(f"{name} is no knob and is ignored (the nearest knob is {guess})")
    ours: dict[str, str] = {}
    for _, name, how, text in sorted(steps, key=lambda step: step[0]):
        if how != "=":
            now = [*filter(None, listed(ours.get(name, base.get(name, FIELDS[name].default))))]
            kept = [item for item in now if how == "+=" or item not in listed(text)]
            text = ",".join(kept + [item for item in listed(text) if how == "+=" and item not in kept])
        ours[name] = text
    return ours


def choose_recipe(env: Mapping[str, str], has_gpu: Callable[[], bool], errors: list[str]) -> tuple[str, str]:
    """(recipe, why). Without RECIPE: GPU_RECIPE on a GPU, `cpu` without one."""
    asked = env.get("RECIPE", "auto")
    if asked not in (*RECIPES, "auto"):
        errors.append(f"RECIPE={asked!r}: expected one of {', '.join(RECIPES)}")
        return "baseline", ""
    if asked != "auto":
        return asked, "RECIPE is set"
    if env.get("DEVICE", "auto") in ("cuda", "auto") and has_gpu():
        return GPU_RECIPE, "RECIPE is not set; this is the default on a GPU"
    return "cpu", "RECIPE is not set and there is no GPU"


# Knobs that belong to one machine or one call, not to the artifact.
LOCAL_KNOBS = frozenset("MODE RECIPE RUN_ID LOG_DIR DEVICE FORCE PROFILE DATA_PATH TOKENIZER_PATH VAL_BYTES VAL_TOKENS ATTENTION COMPILE ARTIFACT ARTIFACT_LIMIT "
                        "RESUME CHECKPOINT_EVERY CHECKPOINT_KEEP MICRO_BATCH_TOKENS VAL_BATCH_TOKENS".split())  # fmt: skip


def base_values(recipe: str, header: Mapping[str, Any] | None, errors: list[str]) -> dict[str, Any]:
    """The values that override the defaults and that the environment overrides: the recipe's, or those of an artifact's header."""
    if header is None:
        return RECIPES[recipe]
    values = {}
    for name, value in header.items():
        try:
            if name not in FIELDS or (name in LOCAL_KNOBS and name != "RECIPE"):
                raise ConfigError(f"{name[:40]} is no knob that an artifact names; use the script that wrote it")
            values[name] = check_value(name, value)
            if name == "RECIPE" and value not in RECIPES:
                raise ConfigError(f"RECIPE={value[:40]!r} is no recipe of this script; use the script that wrote it")
        except ConfigError as e:
            errors.append(f"the artifact's configuration: {e}")
    return values


def load_config(env: Mapping[str, str], header: Mapping[str, Any] | None = None,
                has_gpu: Callable[[], bool] = torch.cuda.is_available) -> LoadedConfig:  # fmt: skip
    """Resolve every knob: defaults < recipe < environment, or with an artifact's `header`: defaults < header < environment.

    The only reader of the environment but for torchrun's ranks. Raises ConfigError with one line for each bad knob.
    """
    errors: list[str] = []
    notices: list[str] = []
    recipe, why = choose_recipe(env, has_gpu, errors)
    values = dict(base_values(recipe, header, errors))
    if header is not None:
        recipe, why = values.get("RECIPE", recipe), "the artifact names it"
    base_source = f"recipe {recipe}" if header is None else "artifact"
    source = {name: base_source if name in values else "default" for name in FIELDS}
    for name, text in translate(env, recipe, errors, notices).items():
        try:
            value = parse_value(name, text)
        except ConfigError as e:
            errors.append(str(e))
            continue
        made_with = values.get(name, FIELDS[name].default)
        if header is not None and FIELDS[name].metadata["shape"] and value != made_with:
            errors.append(f"{name}={text}: the artifact was made with {as_text(made_with)}; unset {name}")
        values[name], source[name] = value, "env"
    values["RECIPE"] = recipe
    try:
        cfg = Config(**{k.lower(): v for k, v in values.items()})
    except ConfigError as e:
        errors.append(str(e))
    if errors:
        raise ConfigError("\n".join(errors))
    notices += filter(None, (idle_notice(cfg, name) for name in FIELDS if name in env))
    return LoadedConfig(cfg, why, source, notices)


@functools.cache  # main reads it before anything else: the file may be edited while a run is under way
def script_bytes() -> bytes:
    """This script's file."""
    return SCRIPT.read_bytes()


def source_text() -> str:
    """This script's text as it runs; the packed form leaves its unpacked text in `__source__`."""
    return __source__ if PACKED else script_bytes().decode()  # noqa: F821


def describe_knobs() -> str:
    """The text of --help: knobs by section, with default, unit and bounds."""
    lines = [__doc__.split("\n\n")[0]]
    for name, f in FIELDS.items():
        lines += ["", f"[{GROUPS[name]}]"] if name in GROUPS else []
        limits = "|".join(map(str, filter(None, (f.metadata["several"], *f.metadata["choices"])))) or bounds(name)
        lines.append(f"  {name}={as_text(f.default)}{f' ({limits})' if limits else ''}  {f.metadata['doc']}")
    return "\n".join([*lines, "", f"recipes: {', '.join(RECIPES)}"])


def dump_config(loaded: LoadedConfig, with_notices: bool = False) -> str:
    """One `NAME=value  # source` line a knob, below the notices that a run would give of its knobs, as comments."""
    notices = [f"# notice: {text}" for text in loaded.notices if with_notices]
    values = [f"{n}={as_text(getattr(loaded.cfg, n.lower()))}  # {loaded.source[n]}" for n in FIELDS]
    return "\n".join(notices + values)


# ==== 2 RUNTIME =======================================================================================================

LOG_SCHEMA = 1
# Dense bf16 peak of one device in FLOP/s, for MFU; looked up by part of torch.cuda.get_device_name().
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "A10G": 70e12, "L4": 121e12}  # fmt: skip


# Signals by which a user, torchrun, a terminal that closes or a cluster asks a process to end or warns that it will be killed.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
                     if hasattr(signal, name))  # fmt: skip


class Interrupted(RuntimeError):
    """One of STOP_SIGNALS arrived; the message says what was saved."""


class BrokenRun(RuntimeError):
    """The run failed, and not by a mistake of the user: a loss that is not finite, a full disk. Exit status 1."""


def say(text: str, to_stderr: bool = False, end: str = "\n") -> OSError | None:
    """Print on standard output or standard error; characters that its encoding lacks are escaped. Never raises.

    Returns the error of a stream that could not be written, which is discarded from then on; a closed pipe or terminal is none.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is None:  # closed before this process started
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)
    except (OSError, ValueError) as e:
        # Else the interpreter's exit fails at what is left.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return e if isinstance(e, OSError) and e.errno not in (errno.EPIPE, errno.EIO) else None
    return None


def cannot_write(path: Path, error: OSError) -> ConfigError | BrokenRun:
    """What to raise where `path` cannot be written: BrokenRun for a disk that is full or fails, else a user's mistake."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    remedy = "free space or choose another disk" if full else "choose a folder that can be written"
    remedy = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else remedy
    text = f"cannot write {path}: {error.strerror}; {remedy} (RUN_ID, LOG_DIR, ARTIFACT)"
    return BrokenRun(text) if full else ConfigError(text)


def atomic_write(path: Path, blob: bytes) -> None:
    """Write `blob` beside `path`, fsync it and rename it: `path` is complete or absent. Raises what `cannot_write` returns."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as e:
        raise cannot_write(path, e) from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def lock_file(path: Path) -> Any:
    """An open file `.NAME.lock` beside `path` that no other process can lock until it is closed; None if one has it now.

    Not filelock's: that leaves its files behind, and ends with an error where a file system has no locks.
    """
    aside = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(aside, "ab")  # noqa: SIM115
            with contextlib.suppress(ImportError, OSError):  # a system or a file system without locks
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(aside)):
                    return file
            file.close()  # its last owner has removed it since it was opened
    except OSError as e:
        raise cannot_write(path, e) from e


def unlock_file(file: Any) -> None:
    """Remove and release what `lock_file` gave."""
    with contextlib.suppress(OSError):
        os.unlink(file.name)
    file.close()


def derive_seed(seed: int, *purpose: Any) -> int:
    """A 63-bit seed for (seed, purpose...), so that each purpose has random numbers of its own."""
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:8], "little") >> 1


class Ranks(NamedTuple):
    """This process among all of the run, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """What torchrun's variables say; one process without them. Raises ConfigError for a part of them or for nonsense."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: env[name] for name in names if name in env}
    if not given:
        return Ranks()
    try:
        ranks = Ranks(*(int(env.get(name, default)) for name, default in zip(names, ("", "", 0, 1), strict=True)))
        fits = 0 <= ranks.rank < ranks.world and ranks.local_rank >= 0 and 1 <= ranks.local_world <= ranks.world
        fits = fits and (ranks.local_rank < ranks.local_world or "LOCAL_WORLD_SIZE" not in env)
        fits = fits and (ranks.world == 1 or (bool(env["MASTER_ADDR"]) and int(env["MASTER_PORT"]) > 0))
    except (KeyError, ValueError):
        fits = False
    if not fits:
        raise ConfigError(f"{', '.join(f'{n}={v!r}' for n, v in given.items())}: not as torchrun sets them (it needs {', '.join(names[:2])}, "
                          f"MASTER_ADDR and MASTER_PORT); left from another job? unset {' '.join(given)}, or start with torchrun")  # fmt: skip
    return ranks


# Variables of other launchers: how many processes they started.
LAUNCHED = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_apart() -> str:
    """A notice where a launcher that does not tell ranks as torchrun does started several processes: each trains a run of its own."""
    for name in LAUNCHED if "RANK" not in os.environ else ():
        if (n := os.environ.get(name, "")).isdecimal() and int(n) > 1:
            return (f"{name}={n} without RANK and WORLD_SIZE: this process trains alone, and so does every other that srun or mpirun started; one "
                    f"run of {n} processes: torchrun --standalone --nproc_per_node={n} train_gpt.py, on several machines srun "
                    "--ntasks-per-node=1 torchrun --nnodes=NODES --nproc_per_node=GPUS --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 "
                    "train_gpt.py")  # fmt: skip
    return ""


def pick_device(name: str, local_rank: int) -> torch.device:
    """DEVICE -> torch.device of this rank; raises ConfigError if the device is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("DEVICE=cuda: no CUDA device is visible; use DEVICE=cpu or DEVICE=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(f"rank {local_rank} finds {count} GPUs; lower --nproc_per_node to as many")
    return torch.device("cuda", local_rank)


def cpu_info(name: str) -> str:
    """The first processor's entry of this name in /proc/cpuinfo; empty where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{name}\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return ""


def cpu_features() -> set[str]:
    """Names of the instruction sets of this CPU, as torch and Linux spell them."""
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10
        return {*cpu_info("flags").split()}
    return {name for name, there in torch.cpu.get_capabilities().items() if there is True}


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs that the control groups of this process, those of a container, allow it on average; inf without a limit.

    Version 1 keeps quota and period in two files below `groups`/cpu, version 2 in one. A group is limited by all above it, and in
    a container `own` may name the host's path while the container's group is the root.
    """
    limits = [math.inf]
    with contextlib.suppress(OSError):
        for _, controllers, path in (line.split(":", 2) for line in own.read_text().splitlines()):
            names = controllers.split(",") if controllers else ["", "unified"]  # version 2, alone or beside version 1
            for base in {groups / name for name in (*names, controllers)} if {"", "cpu"} & {*names} else ():
                folder = base / path.lstrip("/")
                for group in (folder, *folder.parents):
                    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
                        with contextlib.suppress(OSError, ValueError):  # "max" is no number, as -1 none
                            quota, period = map(float, " ".join((group / f).read_text() for f in files).split())
                            limits += [quota / period] if min(quota, period) > 0 else []
    return min(limits)


def usable_cpus() -> int:
    """CPUs that this process may use: those it is bound to, as many as its quota pays for, at least one."""
    bound = len(bound_cpus())
    return max(1, min(bound, int(min(cpu_quota(), bound) + 0.5)))


def tune_cpu(local_world: int) -> None:
    """Set threads, matmul precision and malloc for fp32 training on a CPU: about twice as fast; `local_world` processes share the CPUs.

    One thread a CPU, but none for those that were busy with other programs at the start: a step waits for its last thread.
    """
    if local_world > 1 or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1 for several processes
        busy = BUSY_CPUS if local_world == 1 else 0  # other ranks were busy too
        torch.set_num_threads(max(1, min(usable_cpus(), round(len(bound_cpus()) - busy)) // local_world))
    # Sends products to oneDNN, twice as fast as MKL on AVX-512 that is not Intel's; rounding stays that of fp32 but where
    # the CPU has bf16 tiles (AMX).
    torch.set_float32_matmul_precision("medium")
    if sys.platform == "linux":
        # Large freed tensors go back to the kernel, which clears every page again at the next step: 1/6 of its time.
        with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what was freed
            mallopt(-4, 0)  # M_MMAP_MAX: no allocation beside the heap


def end_process_group(broken: bool = False) -> None:
    """Destroy the process group, if there is one, so that the interpreter can exit.

    After a failure NCCL's is left as it is: destroying it would wait for collectives that the other ranks never join.
    After Gloo's a short sleep gives its threads the interpreter's lock, which they need to let go of tensors: where they get it
    only while the interpreter ends, the process aborts (1 run of 46 on 2 CPU ranks with torch 2.13).
    """
    if dist.is_initialized():
        threads = dist.get_backend() == "gloo"
        if broken and not threads:
            return
        dist.destroy_process_group()
        if threads:
            time.sleep(0.2)


def group_store(rank: int, world: int) -> dist.Store:
    """torchrun's key-value store, under a prefix that the ranks of this attempt (start or restart) have in common.

    torchrun keeps one store over its restarts, and a Gloo mesh that reads addresses left by the attempt before never forms
    (torch 2.13). So each process says hello with a fresh name, rank 0 answers with the names it has heard until all have
    found their own among them, and rank 0's name is the prefix. Counting restarts would not do: nodes count their own.
    """
    store = next(dist.rendezvous("env://", rank, world))[0]
    name = uuid.uuid4().hex
    store.set(f"hello/{rank}", name)
    while rank == 0:
        store.set("group", " ".join(store.get(f"hello/{r}").decode() for r in range(world)))
        if world == 1 or store.check([f"{name}/{r}" for r in range(1, world)]):
            return dist.PrefixStore(name, store)
        time.sleep(0.02)
    while (group := store.get("group").decode().split())[rank : rank + 1] != [name]:
        time.sleep(0.02)
    store.set(f"{group[0]}/{rank}", "")
    return dist.PrefixStore(group[0], store)


# Of a collective: the slowest that a rank waits for is another's share of packing.
GROUP_TIMEOUT = timedelta(minutes=30)


class Run:
    """This process in its run: rank, device, logs, the stop signal, collectives. Made once, by `Run.start`."""

    current: Run | None = None  # for main, which closes the logs whatever happens
    first_on_node = True  # whether this rank reports a mistake that is found before the ranks have met
    packing: subprocess.Popen | None = None  # `start_packing`'s child, which no process leaves behind

    def __init__(self, cfg: Config, rank: int, local_rank: int, world: int, local_world: int) -> None:
        self.cfg, self.rank, self.local_rank, self.world = cfg, rank, local_rank, world
        self.device = pick_device(cfg.device, local_rank)
        self.started = time.perf_counter()
        self.run_id = ""
        self.signal: int | None = None
        self.signal_time = 0.0
        self.graceful = False  # True while a loop checks `signal` by itself
        self.training_began = False  # from then on a mistake exits with status 1, and the weights are kept
        self.on_terminal = rank == 0 and sys.stderr is not None and sys.stderr.isatty()
        self.lost: dict[str, str] = {}  # what could not be written -> the message
        self.moved_artifact: Path | None = None  # where the artifact is if ARTIFACT could not be written
        self._locks: list[Any] = []
        self._text = self._events = None  # the logs, once they are open
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32
            # A graph for each sequence length, size of micro-batch, state of QAT and stage: beyond 8 they would run eager unnoticed.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.specialize_float = True  # or a graph of all sizes is made twice, for its LoRA's scale
        elif self.device.type == "cpu":
            tune_cpu(local_world)

    @classmethod
    def start(cls, cfg: Config) -> Run:
        """Join the process group (torchrun's environment says which)."""
        rank, world, local_rank, local_world = read_ranks(os.environ)
        run = cls.current = cls(cfg, rank, local_rank, world, local_world)
        if world > 1:
            backend = "nccl" if run.device.type == "cuda" else "gloo"
            try:
                store = group_store(rank, world)
            except dist.DistError as e:
                address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                what = "reach rank 0" if rank else "listen"
                raise BrokenRun(f"rank {rank} cannot {what} at MASTER_ADDR:MASTER_PORT={address} ({str(e).splitlines()[0]}); if another program "
                                "has the port, choose another MASTER_PORT, or torchrun --standalone, which finds one") from None  # fmt: skip
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=GROUP_TIMEOUT,
                                    device_id=run.device if backend == "nccl" else None)  # fmt: skip
        for s in STOP_SIGNALS:
            if s != getattr(signal, "SIGHUP", None) or signal.getsignal(s) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(s, run._on_signal)
        torch.manual_seed(derive_seed(cfg.seed, "init"))
        return run

    def reserve_run_id(self) -> str:
        """Name the run, on rank 0; no other process can run under this name until it is closed."""
        asked, default = self.cfg.run_id, f"{time.strftime('%Y%m%d-%H%M%S')}-{self.cfg.recipe}-{self.cfg.seed}"
        for name in [asked] if asked else (default, *(f"{default}-{n}" for n in range(2, 1000))):
            self.run_id = name
            files = () if asked else (self.log_path.with_suffix(s) for s in (".txt", ".jsonl", ".pgz"))
            if not any(path.exists() for path in files) and self.lock(self.log_path):
                return name
        raise ConfigError(f"RUN_ID={self.run_id}: a process that still runs has this name; choose another RUN_ID")

    def lock(self, path: Path) -> bool:
        """Keep other runs from `path` until this one is closed; False if one has it."""
        file = lock_file(path)
        if file is not None:
            self._locks.append(file)
        return file is not None

    # ---- files

    @property
    def log_path(self) -> Path:
        return Path(self.cfg.log_dir) / f"{self.run_id}.txt"

    @property
    def artifact_path(self) -> Path:
        return self.moved_artifact or Path(self.cfg.artifact or self.log_path.with_suffix(".pgz"))

    def open_logs(self, append: bool) -> None:
        """Open both logs; refuses to overwrite those of another run unless FORCE=1 or `append`."""
        paths = (self.log_path, self.log_path.with_suffix(".jsonl"))
        old = [p for p in paths if p.exists()]
        if old and not append and not self.cfg.force:
            raise ConfigError(f"{old[0]} exists: choose another RUN_ID, or FORCE=1 to overwrite it")
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self._text, self._events = (io.FileIO(p, "ab" if append else "wb") for p in paths)
        except OSError as e:
            raise cannot_write(self.log_path, e) from e

    def _append(self, file: Any, line: str) -> None:
        """Add a whole line to a log, or nothing of it where the disk refuses."""
        data, end = f"{line}\n".encode("utf-8", "backslashreplace"), None
        try:
            end = file.tell()
            while data:  # a disk takes what it has room for and refuses the next write
                data = data[file.write(data) :]
        except OSError as e:
            with contextlib.suppress(OSError):
                file.seek(file.truncate(end))
            self.report_lost("log", f"{file.name} ({e.strerror})")

    def report_lost(self, kind: str, what: str) -> None:
        """Something could not be written: a notice the first time of its kind, once more at the end, and exit status 1."""
        if kind not in self.lost:
            self.lost[kind] = f"could not write the {kind} {what}"
            self.notice(f"{self.lost[kind]}; the run goes on")

    def log(self, text: str, to_terminal: bool = True) -> None:
        """A line for people, on rank 0: terminal and logs/RUN_ID.txt."""
        if self.rank:
            return
        if to_terminal and (error := say(("\r\033[K" if self.on_terminal else "") + text)):
            self.report_lost("standard output", f"({error.strerror})")
        if self._text:
            self._append(self._text, text)

    def event(self, kind: str, **fields: Any) -> None:
        """A line for programs, on rank 0: logs/RUN_ID.jsonl, schema LOG_SCHEMA."""
        if self._events:
            line = {"v": LOG_SCHEMA, "event": kind, "t": round(time.perf_counter() - self.started, 3), **fields}
            self._append(self._events, json.dumps(line, default=str))

    def notice(self, text: str) -> None:
        """Something a person should know that is no error."""
        self.log(f"notice: {text}")
        self.event("notice", text=text)

    def progress(self, what: str, done: int, total: int, since: float) -> None:
        """A progress bar on a terminal; nothing in a log."""
        if self.on_terminal and total:
            eta = (time.perf_counter() - since) * (total - done) / max(done, 1)
            bar = "#" * (24 * done // total)
            say(f"\r\033[K{what} [{bar:<24}] {100 * done // total}% eta {eta:.0f}s", to_stderr=True, end="")

    def close(self, status: str) -> None:
        """Write the end event, close the logs, release the name, leave the process group."""
        self.event("end", status=status)
        for f in filter(None, (self._text, self._events)):
            with contextlib.suppress(OSError):
                f.close()
        self._text = self._events = None
        while self._locks:
            unlock_file(self._locks.pop())
        end_process_group(broken=status not in ("ok", "limit broken", "incomplete"))

    def write_somewhere(self, asked: Path, blob: bytes) -> tuple[Path, str]:
        """Write a file where it is asked for, else under LOG_DIR, else in a new temporary folder: (its path, why it is no other)."""
        errors: list[str] = []
        for folder in (asked.parent, self.log_path.parent, None):
            try:
                path = Path(folder or tempfile.mkdtemp(prefix="train_gpt-")) / asked.name
                if folder and path != asked and path.exists():
                    raise ConfigError(f"{path} exists")
                atomic_write(path, blob)
                return path, "".join(errors[:1])
            except (ConfigError, BrokenRun, OSError) as e:
                errors.append(str(e))
        raise BrokenRun("; ".join(dict.fromkeys(errors)))

    def save_artifact(self, blob: bytes) -> None:
        """Write the artifact; where ARTIFACT cannot be written, elsewhere."""
        asked = self.artifact_path
        path, error = self.write_somewhere(asked, blob)
        if path != asked:
            self.moved_artifact = path
            self.report_lost("artifact", f"{asked}; it is {path} ({error})")

    # ---- signals

    def _on_signal(self, number: int, _frame: Any) -> None:
        first = self.signal is None
        if first:
            self.signal, self.signal_time = number, time.monotonic()
        # Ctrl-C reaches a process twice, from the terminal and from torchrun: only a later repeat means "at once".
        if not self.graceful or (not first and time.monotonic() - self.signal_time > 2):
            raise Interrupted(f"stopped by {signal.Signals(number).name}")

    def end_graceful(self) -> None:
        """Called after the loop that checks `signal`: a signal that it has not seen, and any later one, stops the run at once."""
        self.graceful = False
        if self.signal is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name}")

    # ---- ranks

    def all_reduce(self, t: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """In-place reduction over ranks; the tensor itself when there is one rank."""
        if self.world > 1:
            dist.all_reduce(t, op)
        return t

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The Python value of rank `source`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, on every rank; what it raises there ends all ranks, so that none waits for it."""
        result = None
        if self.rank == 0:
            try:
                result = action(), ""
            except Exception as e:
                self.broadcast((isinstance(e, ConfigError), str(e) or type(e).__name__))
                raise
        result, error = self.broadcast(result)
        if error:
            raise (ConfigError if result else BrokenRun)(error)
        return result

    def is_first(self, task: str) -> bool:
        """True on exactly one rank, the first that calls this for `task`, which it does whether one rank calls or all do; before the
        ranks have met, on one of each machine."""
        if not dist.is_initialized():
            return self.local_rank == 0
        try:
            return dist.distributed_c10d._get_default_store().add(task, 1) == 1
        except dist.DistError:  # rank 0, which has the store, is gone
            return True

    def share(self, n: int) -> range:
        """This rank's contiguous part of range(n); the parts differ by at most one."""
        return range(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def sync(self) -> None:
        """Wait until the device has finished its queue, so that the clock includes it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory_mib(self) -> float:
        """Peak memory of this process: device memory on a GPU, resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Clock:
    """Seconds of one activity without its pauses; each pause begins and ends with `Run.sync`.

    MAX_WALLCLOCK_SECONDS counts training's steps, the calibration of the quantizer and the counting of n-grams for the artifact.
    It does not count start-up and compilation, validation and checkpoints, nor what reads no data: quantising and packing the
    finished weights. EVAL_WALLCLOCK_SECONDS counts all from reading the artifact to the last score, but for compilation.
    """

    def __init__(self, run: Run, elapsed: float = 0.0) -> None:
        self.run, self.total, self.since = run, elapsed, time.perf_counter()

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.since)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body (periodic validation, checkpoints) from this clock."""
        self.run.sync()
        self.total = self.seconds()
        try:
            yield
        finally:
            self.run.sync()
            self.since = time.perf_counter()


# ==== 3 DATA ==========================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256  # header: 256 little-endian int32, then uint16 tokens
SAMPLE_DIR = SCRIPT.parent / "data" / "sample"
SAMPLE_CASEOPS = SAMPLE_DIR / "caseops_2048"  # the same text with case factored out, 2,048 pieces
FINEWEB_DIR = Path("data/datasets/fineweb10B_sp1024")
DOWNLOADS = ("fineweb10B_sp8192*caseops*", "fineweb10B_sp8192", FINEWEB_DIR.name)  # the first that is there is taken
HOW_TO_GET_SHARDS = "download them with data/cached_challenge_fineweb.py or make them with data/make_shards.py"
MANIFEST_FORMAT = "parameter-golf shards, version 1"  # what data/make_shards.py writes into manifest.json
TRANSFORMS = ("", "caseops")  # what text may have gone through before it was tokenized (frontier data: PR #1729)


def shard_number(path: Path) -> int:
    """The number in a shard's name."""
    return int(path.stem.rpartition("_")[2])


def shard_paths(folder: Path, kind: str) -> list[Path]:
    """The files fineweb_<kind>_<digits>.bin of `folder`, by number: fineweb_val_bytes_000000.bin is not of kind "val"."""
    names = os.listdir(folder) if folder.is_dir() else ()  # unlike glob it says what may not be read
    found = (folder / name for name in names if re.fullmatch(rf"fineweb_{kind}_[0-9]+\.bin", name))
    return sorted(found, key=lambda path: (shard_number(path), path.name))


def check_transform(name: str, where: str) -> None:
    """Raises ConfigError unless `name` is a transform of text that this script can undo."""
    if name not in TRANSFORMS:
        raise ConfigError(f"{where}: its text went through {str(name)[:40]!r}, and this script knows {', '.join(TRANSFORMS[1:])} alone; "
                          "take the script or the data that belong together")  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What data/make_shards.py says of the shards in `folder`; None where it did not make them. ConfigError if damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not str(manifest.get("format")).startswith("parameter-golf shards"):
            return None  # of another tool
        tokenizer, splits = manifest["tokenizer"], [manifest[name] for name in ("val", "train") if name in manifest]
        files = [shard for split in splits for shard in (*split["shards"], *split.get("sidecars", []))]
        typed = all([type(f[key]) for key in ("file", "tokens", "sha256")] == [str, int, str] for f in files)
        sound = typed and isinstance(tokenizer["sha256"], str) and Path(tokenizer["file"]).name == tokenizer["file"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound or manifest["format"] != MANIFEST_FORMAT:
        raise ConfigError(f"{path}: not a manifest that this script reads ({MANIFEST_FORMAT}); make the shards again")
    check_transform(manifest.get("transform", ""), str(path))
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def own_tokenizer(folder: Path, manifest: dict[str, Any] | None, wanted: str = "") -> Path | None:
    """The SentencePiece model that belongs to the shards in `folder`: the manifest's, the only one beside them (of the `wanted` hash),
    or the download's (datasets/fineweb10B_sp1024 belongs to tokenizers/fineweb_1024_bpe.model). ConfigError if there are several."""
    if manifest is not None:
        return folder / manifest["tokenizer"]["file"]
    shown = sorted(p for p in folder.glob("*.model") if not p.name.startswith("."))  # a Mac writes ._NAME beside NAME
    beside = [p for p in shown if wanted in ("", file_sha256(p))]
    if len(beside) > 1:
        raise ConfigError(f"TOKENIZER_PATH is unset and {folder} holds {', '.join(p.name for p in beside)}; name the one "
                          "that the shards were made with")  # fmt: skip
    pieces = re.fullmatch(r"fineweb10B_sp(\d+)(.*)", folder.resolve().name)
    name = f"fineweb_{pieces[1]}_bpe{pieces[2]}.model" if pieces else "fineweb_1024_bpe.model"
    path = beside[0] if beside else folder.resolve().parent.parent / "tokenizers" / name
    return path if path.is_file() else None


def find_tokenizer(cfg: Config, folder: Path, manifest: dict[str, Any] | None) -> Path:
    """TOKENIZER_PATH, or the shards' own. ConfigError if there is none, or if the shards' manifest names another."""
    path = Path(cfg.tokenizer_path) if cfg.tokenizer_path else own_tokenizer(folder, manifest)
    if path is None or not path.is_file():
        if not any(folder.glob("fineweb_*.bin")):
            raise ConfigError(f"DATA_PATH={folder}: no fineweb_*.bin there; {HOW_TO_GET_SHARDS}")
        named = path or f"none beside {folder}"
        raise ConfigError(f"TOKENIZER_PATH={named}: no such file; name the SentencePiece model of the shards")
    if manifest is not None and file_sha256(path) != manifest["tokenizer"]["sha256"]:
        remedy = "unset it" if cfg.tokenizer_path else "make the shards again"
        raise ConfigError(f"TOKENIZER_PATH={path}: the shards in {folder} were made with another tokenizer, says their manifest.json "
                          f"({manifest['tokenizer']['file']}, sha256 {manifest['tokenizer']['sha256'][:16]}); {remedy}")  # fmt: skip
    return path


class DataPaths(NamedTuple):
    """Where the data are; `sample` marks the shipped sample, whose results are no challenge results."""

    folder: Path
    tokenizer: Path
    sample: bool
    transform: str | None  # what the text went through; None: no manifest says, the tokenizer shows it


def open_tokenizer(path: Path) -> Any:
    """The SentencePiece model in a file; ConfigError if it is none."""
    import sentencepiece as spm

    try:
        return spm.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise ConfigError(f"TOKENIZER_PATH={path}: not a SentencePiece model") from None


def downloads(tokenizer_sha256: str, vocab_size: int) -> Iterator[Path]:
    """Folders with validation shards, the preferred first: downloads, the sample with case factored out, the plain sample; but for
    the last those alone whose tokenizer has this hash and this size, where they are given."""
    parents = (FINEWEB_DIR.parent, SCRIPT.parent / FINEWEB_DIR.parent)
    found = (path for name in DOWNLOADS for parent in parents for path in sorted(parent.glob(name)))
    for folder in (*found, SAMPLE_CASEOPS):
        path = own_tokenizer(folder, read_manifest(folder), tokenizer_sha256) if shard_paths(folder, "val") else None
        if path is None or (tokenizer_sha256 and file_sha256(path) != tokenizer_sha256):
            continue
        if not vocab_size or open_tokenizer(path).vocab_size() == vocab_size:
            yield folder
    yield SAMPLE_DIR


def find_data(cfg: Config, tokenizer_sha256: str = "", vocab_size: int = 0) -> DataPaths:
    """DATA_PATH and TOKENIZER_PATH, or a download whose tokenizer has that hash and size (where given), or the shipped sample.
    Raises ConfigError if nothing is there."""
    if cfg.data_path:
        folder = Path(cfg.data_path)
        if not folder.is_dir():
            raise ConfigError(f"DATA_PATH={cfg.data_path}: no such folder; unset it to use the shipped sample")
    else:
        if cfg.tokenizer_path and Path(cfg.tokenizer_path).is_file():
            tokenizer_sha256 = file_sha256(Path(cfg.tokenizer_path))
        folder = next(downloads(tokenizer_sha256, vocab_size))
    manifest = read_manifest(folder)
    tokenizer, sample = find_tokenizer(cfg, folder, manifest), folder.resolve() in (SAMPLE_CASEOPS, SAMPLE_DIR)
    return DataPaths(folder, tokenizer, sample, None if manifest is None else manifest.get("transform", ""))


def load_shard(path: Path) -> np.ndarray:
    """Tokens of one shard (n,) uint16, memory-mapped; the header is checked against the file's size."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such shard")
    size = path.stat().st_size
    head = np.fromfile(path, dtype="<i4", count=min(SHARD_HEADER, size // 4))
    if len(head) < SHARD_HEADER or head[0] != SHARD_MAGIC:
        raise ConfigError(f"{path}: not a token shard (expected magic {SHARD_MAGIC}); {HOW_TO_GET_SHARDS}")
    if head[1] != SHARD_VERSION:
        raise ConfigError(f"{path}: shard version {head[1]}, this script reads version {SHARD_VERSION}")
    if size != (promised := 4 * SHARD_HEADER + 2 * int(head[2])):
        raise ConfigError(f"{path}: {size} bytes, its header promises {promised}; download it again")
    if not head[2]:
        raise ConfigError(f"{path}: holds no tokens; remove it or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER)


def load_split(folder: Path, split: str) -> list[np.ndarray]:
    """Shards of `split` ("train" or "val") in name order."""
    if not (paths := shard_paths(folder, split)):
        raise ConfigError(f"DATA_PATH={folder}: no fineweb_{split}_<digits>.bin there; {HOW_TO_GET_SHARDS}")
    return [load_shard(p) for p in paths]


def check_ids(tokens: np.ndarray, vocab_size: int, what: str) -> np.ndarray:
    """The same tokens; raises ConfigError if an id is outside the vocabulary."""
    if int(tokens.max()) >= vocab_size:
        raise ConfigError(f"{what}: token id {int(tokens.max())} with VOCAB_SIZE={vocab_size}; set VOCAB_SIZE to the tokenizer's size, "
                          "or take the shards that were made with this tokenizer")  # fmt: skip
    return tokens


SPACE = "▁"  # how SentencePiece writes a space in a piece
BOS = 1  # the id of BOS in every export of this challenge
CHECKED_TOKENS = 2**20  # of each training shard before the start: all 8 B tokens would take longer than a run may wait


class TokenStream:
    """The training shards as one endless stream: sequential, wrapping to the first shard at the end.

    `tokenizer_sha256` is that of the tokenizer they were made with, a part of the stream's identity.
    """

    def __init__(self, shards: list[np.ndarray], vocab_size: int, tokenizer_sha256: str = "") -> None:
        self.shards, self.vocab_size, self.position = shards, vocab_size, 0
        self.tokenizer_sha256 = tokenizer_sha256
        self.starts = np.cumsum([0, *(len(s) for s in shards)])
        self.total = int(self.starts[-1])
        for shard in shards:  # a wrong tokenizer shows at once; a lone bad token deeper in is found when it is read
            check_ids(shard[:CHECKED_TOKENS], vocab_size, str(getattr(shard, "filename", "training shard")))

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What a resumed run must find again, wherever it lies: hashes of the shards (their lengths and both ends of each) and of
        the tokenizer."""
        digest = hashlib.sha256(self.starts.astype("<i8").tobytes())
        for shard in self.shards:
            digest.update(shard[: 2**16].tobytes() + shard[-(2**16) :].tobytes())
        return {"DATA_PATH": digest.hexdigest(), "TOKENIZER_PATH": self.tokenizer_sha256}

    def read(self, offset: int, n: int) -> np.ndarray:
        """Tokens [position + offset, position + offset + n) of the stream, (n,) int64; does not move."""
        parts, at = [], (self.position + offset) % self.total
        while n > 0:
            i = int(np.searchsorted(self.starts, at, side="right")) - 1
            part = self.shards[i][at - self.starts[i] : at - self.starts[i] + n]
            parts.append(check_ids(part, self.vocab_size, f"training shard {i}").astype(np.int64))
            n -= len(part)
            at = (at + len(part)) % self.total
        return np.concatenate(parts)


def check_batch(cfg: Config, world: int) -> None:
    """Raises ConfigError if a step has fewer sequences than there are ranks."""
    longest = max(t for _, t in cfg.seq_curriculum)
    if (n := cfg.train_batch_tokens // longest) < world:
        raise ConfigError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} holds {n} sequences of {longest}, fewer than the {world} ranks; "
                          f"the nearest that works is {world * longest}")  # fmt: skip


def upload(t: Tensor, device: torch.device) -> Tensor:
    """A copy of `t` on the device, for which nobody waits; a GPU waits for what comes from memory that is not pinned."""
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


class Batcher:
    """Cuts the stream into steps: TRAIN_BATCH_TOKENS + 1 tokens a step, whole sequences a rank, so that the data of a
    step do not depend on the number of ranks."""

    def __init__(self, cfg: Config, stream: TokenStream, run: Run) -> None:
        self.stream, self.run, self.batch_tokens = stream, run, cfg.train_batch_tokens
        start = stream.shards[0][:CHECKED_TOKENS]
        self.bos_share = float(np.mean(start == BOS))  # of all tokens, roughly: how many segments to have room for

    def next(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """This rank's (inputs, targets) of the next step, each (n, seq_len) int64 on the device; advances the stream."""
        rows = self.run.share(self.batch_tokens // seq_len)
        tokens = self.stream.read(rows.start * seq_len, len(rows) * seq_len + 1)
        self.stream.position += self.batch_tokens
        t = torch.from_numpy(tokens)
        self.host = t[:-1].view(-1, seq_len)  # the inputs, on the CPU
        t = upload(t, self.run.device)
        return t[:-1].view(-1, seq_len), t[1:].view(-1, seq_len)


def proto_field(message: bytes, wanted: int) -> bytes:
    """The bytes of field number `wanted` of a serialized protocol buffer, b"" where it is absent (the last one where it repeats)."""
    at, found = 0, b""

    def number() -> int:
        nonlocal at
        digits = re.compile(rb"[\x80-\xff]*[\0-\x7f]").match(message, at)[0]
        at += len(digits)
        return sum((digit & 127) << 7 * i for i, digit in enumerate(digits))

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            number()
            continue
        size = number() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        found = message[at : at + size] if tag >> 3 == wanted else found
        at += size
    return found


def piece_bytes(sp: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes (V,) int64, spaced (V,) bool, boundary (V,) bool): the bytes of text that each piece of a SentencePiece model adds.

    A piece adds its `bytes`, and one more if it is `spaced` and does not follow a `boundary` piece: decoding drops one space
    at the start of a text (a model that keeps it has no spaced piece). Control, unknown and unused pieces are boundaries and
    add nothing; a byte piece adds 1. All is read off what decoding does with a piece alone and behind another. Raises
    ConfigError, beginning with `name`, for a model whose decoded text is not the sum of its pieces.
    """
    ids = range(sp.vocab_size())
    boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    first = next((i for i in ids if not boundary[i] and sp.decode([i]).strip(" ")), None)
    remedy = "so its bytes cannot be counted piece by piece; train another with data/make_shards.py"
    if first is None:
        raise ConfigError(f"{name}: no piece stands for text, {remedy}")
    if proto_field(proto_field(sp.serialized_model_proto(), 5), 2):  # ModelProto.denormalizer_spec.precompiled_charsmap
        raise ConfigError(f"{name}: its denormalization rules rewrite decoded text, {remedy}")
    text = [i for i in ids if not boundary[i] and not sp.is_byte(i)]
    alone, behind = (
        np.array([len(t.encode()) for t in sp.decode([[*before, i] for i in text])], dtype=np.int64)
        for before in ([], [first])
    )
    behind -= len(sp.decode([first]).encode())
    surface = [len(sp.id_to_piece(i).replace(SPACE, " ").encode()) for i in text]
    odd = np.flatnonzero((behind != surface) | ((behind - alone) >> 1 != 0))
    if len(odd):
        raise ConfigError(f"{name}: its piece {sp.id_to_piece(text[odd[0]])!r} does not decode to itself, {remedy}")
    lengths = np.array([int(sp.is_byte(i)) for i in ids], dtype=np.int64)
    spaced = np.zeros(len(ids), dtype=bool)
    lengths[text], spaced[text] = alone, behind > alone
    added = sp.normalize("a")
    if added.endswith(SPACE) or (added[:1] in (SPACE, " ") and not spaced.any()):
        raise ConfigError(f"{name}: decoding leaves the space that encoding adds to each document (a dummy prefix with "
                          f"treat_whitespace_as_suffix), {remedy}")  # fmt: skip
    return lengths, spaced, boundary


# CaseOps (PR #1729): text in small letters with an operator before each letter or word that was capital, and before an operator
# that is text itself.
TITLE, ALLCAPS, CAPNEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"
OPERATOR_BYTES = 3  # of an operator in UTF-8
CASED = re.compile(f"{ESCAPE}([{OPERATORS}])|[{TITLE}{CAPNEXT}]([a-z])|{ALLCAPS}([A-Za-z]+)|[{OPERATORS}]")


class Tokenizer:
    """The SentencePiece model of the data, and the bytes of text that each token stands for: of the original text, where it went
    through `transform` (None: through CaseOps, if the model has its operators as pieces)."""

    def __init__(self, path: Path, vocab_size: int, transform: str | None = None) -> None:
        self.path, self.blob, self.sp = path, path.read_bytes(), open_tokenizer(path)
        self.sha256 = hashlib.sha256(self.blob).hexdigest()
        if (n := self.sp.vocab_size()) != vocab_size:
            raise ConfigError(f"TOKENIZER_PATH={path} has {n} pieces but VOCAB_SIZE={vocab_size}; set them equal")
        if (bos := self.sp.bos_id()) != BOS:
            raise ConfigError(f"TOKENIZER_PATH={path} has BOS at {bos}; documents begin with id {BOS} here")
        self.lengths, self.spaced, self.boundary = piece_bytes(self.sp, f"TOKENIZER_PATH={path}")
        self.lost = np.array([self.sp.is_unknown(i) or self.sp.is_unused(i) for i in range(vocab_size)])
        pieces = [self.sp.id_to_piece(i) for i in range(vocab_size)]
        cased = set(OPERATORS) <= set(pieces)
        if transform and not cased:
            raise ConfigError(f"TOKENIZER_PATH={path} lacks CaseOps' U+E001 to U+E004; name the data's tokenizer")
        self.transform = ("caseops" if cased else "") if transform is None else transform
        self.operators = np.array([sum(map(piece.count, OPERATORS)) if self.transform else 0 for piece in pieces])
        self.lengths -= OPERATOR_BYTES * self.operators

    def count_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of the original text that each target tokens[1:] adds, (n - 1,) int64: see `piece_bytes`. An operator adds none
        unless it is escaped, and so text."""
        prev, target = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        counts = self.lengths[target] + (self.spaced[target] & ~self.boundary[prev])
        return counts + OPERATOR_BYTES * self.escaped(tokens)[1:]

    def escaped(self, tokens: np.ndarray) -> np.ndarray:
        """(n,) bool: the operators that follow an escape which is itself not escaped."""
        escaped = np.zeros(len(tokens), dtype=bool)
        for i in np.flatnonzero(tokens[:-1] == self.sp.piece_to_id(ESCAPE)) if self.transform else ():
            escaped[i + 1] = not escaped[i] and self.operators[tokens[i + 1]]
        return escaped

    def decode(self, tokens: np.ndarray) -> tuple[str, int]:
        """(the original text of one document's tokens, operators in it that nothing follows)."""
        text = self.sp.decode(tokens.tolist())
        if not self.transform:
            return text, 0
        strays = sum(match.lastindex is None for match in CASED.finditer(text))
        return CASED.sub(lambda m: m[1] or (m[2] or m[3] or "").upper(), text), strays


class ValidationText(NamedTuple):
    """The validation stream: tokens (n,) int64 on the CPU, bytes (n,) int64 of original text that each adds as a target (0 for
    the first)."""

    tokens: Tensor
    bytes: Tensor
    complete: bool  # False when VAL_TOKENS cut it: no score
    bytes_from: str = "tokenizer"  # or "sidecar": where the bytes come from


SIDECAR_TOLERANCE = 1e-3  # between the bytes of a published sidecar, of the raw text, and those of the normalised text


def load_sidecar(folder: Path) -> np.ndarray:
    """fineweb_val_bytes_*.bin: bytes of original text for each validation token, (n,) int64. ConfigError unless there is one for
    each shard and of its length."""
    shards, parts = shard_paths(folder, "val"), []
    here = {path.name for path in shard_paths(folder, "val_bytes")}
    needed = {path.name.replace("_val_", "_val_bytes_"): path for path in shards}
    if odd := sorted(here ^ set(needed)):
        what = "has no shard" if odd[0] in here else "is missing beside its shard"
        raise ConfigError(f"{folder / odd[0]}: {what}; get shards and sidecars together, or set VAL_BYTES=tokenizer")
    for name, path in needed.items():
        parts.append(load_shard(folder / name))
        if (n := len(parts[-1])) != (tokens := len(load_shard(path))):
            raise ConfigError(f"{folder / name}: {n} numbers for the {tokens} tokens of {path.name}, not of this shard")
    return np.concatenate(parts).astype(np.int64)


def check_sidecar(
    folder: Path, tokens: np.ndarray, sidecar: np.ndarray, counts: np.ndarray, tokenizer: Tokenizer
) -> None:
    """Raises ConfigError if the sidecar's bytes (n,) cannot be those of these tokens, whose decoded text has `counts` (n,).

    Markers of documents have none, operators none, an operator fused with its space 1. Where data/make_shards.py made the set the
    sums of every document are equal; published sidecars count the raw text, and the totals differ a little.
    """
    fixed = np.flatnonzero(((tokenizer.operators[tokens] > 0) | tokenizer.boundary[tokens]) & (sidecar != counts))
    if len(fixed):
        at, piece = fixed[0], tokenizer.sp.id_to_piece(int(tokens[fixed[0]]))
        raise ConfigError(f"DATA_PATH={folder}: the sidecar gives {sidecar[at]} bytes to validation token {at}, {piece!r}, which stands "
                          f"for {counts[at]}; it is of other shards, or set VAL_BYTES=tokenizer")  # fmt: skip
    starts = np.unique([0, *np.flatnonzero(tokens == BOS)])
    ours, theirs = (np.add.reduceat(x, starts) for x in (counts, sidecar))
    differ = np.flatnonzero(ours != theirs)
    if len(differ) and read_manifest(folder) is not None:
        k = differ[0]
        raise ConfigError(f"DATA_PATH={folder}: the sidecar gives {theirs[k]} bytes to document {k}, at token {starts[k]}, whose text has "
                          f"{ours[k]}; make the shards again")  # fmt: skip
    if abs(theirs.sum() - ours.sum()) > SIDECAR_TOLERANCE * ours.sum():
        raise ConfigError(f"DATA_PATH={folder}: {theirs.sum()} bytes in the sidecar, {ours.sum()} in the decoded text, which is more than "
                          f"{SIDECAR_TOLERANCE:.1%} apart; it is of other shards, or set VAL_BYTES=tokenizer")  # fmt: skip


def validation_bytes(cfg: Config, folder: Path, tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """(bytes (n,) int64 of original text that each token adds, where they come from), by VAL_BYTES."""
    counts = np.concatenate([[0], tokenizer.count_bytes(tokens)])
    present = bool(shard_paths(folder, "val_bytes"))
    if cfg.val_bytes == "sidecar" and not present:
        raise ConfigError(f"VAL_BYTES=sidecar: {folder} has no fineweb_val_bytes_*.bin; set VAL_BYTES=tokenizer")
    if cfg.val_bytes == "tokenizer" or not present:
        return counts, "tokenizer"
    sidecar = load_sidecar(folder)
    sidecar[0] = 0  # no target
    check_sidecar(folder, tokens, sidecar, counts, tokenizer)
    return sidecar, "sidecar"


def load_validation(cfg: Config, folder: Path, tokenizer: Tokenizer) -> ValidationText:
    """All validation shards as one stream, cut only by VAL_TOKENS and VAL_DROP_TAIL."""
    shards = [check_ids(s, cfg.vocab_size, str(s.filename)) for s in load_split(folder, "val")]
    tokens = np.concatenate(shards).astype(np.int64)
    if len(at := np.flatnonzero(tokenizer.lost[tokens])):
        raise ConfigError(f"DATA_PATH={folder}: validation token {at[0]} is {tokenizer.sp.id_to_piece(int(tokens[at[0]]))!r}, whose "
                          "text is lost, so it cannot be scored; take a tokenizer with byte fallback")  # fmt: skip
    if len(tokens) - 1 < cfg.eval_len:
        raise ConfigError(f"DATA_PATH={folder}: {len(tokens)} validation tokens are fewer than one window of {cfg.eval_len} + 1; "
                          "lower EVAL_SEQ_LEN")  # fmt: skip
    counts, bytes_from = validation_bytes(cfg, folder, tokens, tokenizer)
    complete = not cfg.val_tokens or cfg.val_tokens >= len(tokens)
    n = len(tokens) if complete else max(cfg.val_tokens, cfg.eval_len + 1)
    if cfg.val_drop_tail:
        n = (n - 1) // cfg.eval_len * cfg.eval_len + 1
    if not counts[:n].any():
        raise ConfigError(f"DATA_PATH={folder}: the {n} validation tokens hold no byte of text, so there are no bits a byte; "
                          "give it documents")  # fmt: skip
    return ValidationText(torch.from_numpy(tokens[:n]), torch.from_numpy(counts[:n]), complete, bytes_from)


# Token counts of the challenge's validation text by its exports, from and to: a published count may be of whole windows of 2,048.
CHALLENGE_COUNTS = {"sp1024": (62_021_633, 62_023_680), "CaseOps": (47_853_344, 47_853_344), "sp8192": (40_540_160, 40_542_208)}  # fmt: skip
COPIED_SHARE = 0.01  # of the tokens or documents: from here on a copy of text is no chance
COPIED_ROW, ROW_TOKENS = 20, 200  # as many documents of as many tokens that repeat in order are a copy, too
PIECE = 64  # tokens that are compared where no BOS shows the documents
LEAK_TOKENS = 60_000_000  # of the training text, in which the validation's documents are looked for


def unit_hashes(tokens: np.ndarray, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """`text_units` of one part."""
    tokens = np.ascontiguousarray(tokens, dtype="<u2")
    if not spacing:
        starts = np.unique([0, *np.flatnonzero(tokens == BOS)])
        sizes, view = np.diff(starts, append=len(tokens)), memoryview(tokens.tobytes())
        ends = (2 * (starts + sizes)).tolist()
        digests = (hashlib.sha256(view[a:b]).digest()[:8] for a, b in zip((2 * starts).tolist(), ends, strict=True))
        hashes = np.frombuffer(b"".join(digests), dtype="<u8")
        return hashes[sizes > 1], sizes[sizes > 1]  # a lone BOS is no text
    if len(tokens) < PIECE:
        return np.empty(0, dtype="<u8"), np.empty(0, dtype=np.int64)
    t = tokens[: len(tokens) - PIECE + 3].astype(np.uint32)
    mixed = t[:-2] * 0x9E3779B1 + t[1:-1] * 0x85EBCA6B + t[2:] * 0xC2B2AE35
    anchors = np.flatnonzero(mixed >> 16 < 2**16 // spacing)
    pieces = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(tokens, PIECE)[anchors])
    odd = np.random.default_rng(0).integers(2**63, size=PIECE // 4, dtype=np.uint64) * 2 + 1
    return pieces.view("<u8") @ odd, np.diff(anchors, append=len(tokens))


def text_units(shards: Iterable[np.ndarray], spacing: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes (n,) uint64, tokens (n,) that each stands for) of the documents of consecutive shards, in parts and in order; documents
    run across shard ends. With a `spacing`: of pieces of 64 tokens behind anchors, which the three tokens there decide, so that a copy
    has the same ones wherever it begins."""
    rest, most = np.empty(0, dtype="<u2"), 2**22
    for tokens in (shard[at : at + most] for shard in shards for at in range(0, len(shard), most)):
        rest = np.concatenate([rest, tokens])
        last = len(rest) - PIECE if spacing else int(np.flatnonzero(rest == BOS)[-1:].sum())
        if last > 0:
            yield unit_hashes(rest[: last + PIECE - 1 if spacing else last], spacing)
            rest = rest[last:]
    yield unit_hashes(rest, spacing)


def find_copies(hashes: np.ndarray, sizes: np.ndarray, pieces: bool) -> tuple[int, int]:
    """(tokens of units that occurred before, tokens of the longest row of units that repeat an earlier row in order: of whole documents,
    those of at least ROW_TOKENS alone, which count as so many)."""

    def firsts(hashes: np.ndarray) -> np.ndarray:
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        return first[inverse]

    copied = int(sizes[firsts(hashes) < np.arange(len(hashes))].sum())
    if not pieces:
        hashes, sizes = hashes[sizes >= ROW_TOKENS], np.full(np.count_nonzero(sizes >= ROW_TOKENS), ROW_TOKENS)
    first, row, longest = firsts(hashes), 0, 0
    again = first < np.arange(len(hashes))
    for i in np.flatnonzero(again):
        row = sizes[i] + (row if again[i - 1] and first[i] == first[i - 1] + 1 else 0)
        longest = max(longest, row)
    return copied, int(longest)


def compare_manifest(folder: Path, listed: list[Any], kind: str, budget: float) -> tuple[list[str], list[str]]:
    """(shards of `kind` that differ from what the manifest lists, those that are missing or not listed); contents are compared up to
    `budget` tokens, counts always."""
    present, differ = {p.name: p for p in shard_paths(folder, kind)}, []
    for entry in listed:
        if (path := present.get(entry["file"])) is None:
            continue
        if (n := len(load_shard(path))) != entry["tokens"]:
            differ.append(f"{path.name} has {n} tokens, not {entry['tokens']}")
        elif (budget := budget - n) >= 0 and file_sha256(path) != entry["sha256"]:
            differ.append(f"{path.name} has other content")
    names = {entry["file"] for entry in listed}
    missing, extra = sorted(names - set(present)), sorted(set(present) - names)
    return differ, [f"{name} is missing" for name in missing] + [f"{name} is not listed" for name in extra]


def named_few(names: list[str]) -> str:
    """Names in words, the first three of them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def numbering_gap(paths: list[Path]) -> str:
    """What is wrong with the numbers of shards, which should be 0, 1, 2 and so on; "" if nothing."""
    numbers = [shard_number(path) for path in paths]
    wrong = next(((n, path.name) for n, path in enumerate(paths) if numbers[n] != n), None)
    return f"{wrong[1]} stands where number {wrong[0]} belongs" if wrong else ""


def check_shards(folder: Path, training: bool, everything: bool) -> tuple[list[str], bool]:
    """(notices, whether a manifest vouches for the validation shards); ConfigError where shards are not those of the manifest, or where
    without one their numbers or equal contents show that one is missing or too many."""
    manifest, notices = read_manifest(folder) or {}, []
    for split, part, kind in (("val", "shards", "val"), ("val", "sidecars", "val_bytes"), ("train", "shards", "train")):
        if split in manifest and (training or split == "val"):
            budget = math.inf if everything or split == "val" else LEAK_TOKENS
            differ, absent = compare_manifest(folder, manifest[split].get(part, []), kind, budget)
            differ += absent if kind == "val" else []
            what = f"its {'training' if split == 'train' else 'validation'} shards are not those of its manifest.json"
            if differ:
                raise ConfigError(f"DATA_PATH={folder}: {what}: {named_few(differ)}; make the shards again")
            notices += [f"{folder}: {what}: {named_few(absent)}"] if absent and split == "train" else []
    if "val" in manifest:
        return notices, True
    paths = shard_paths(folder, "val")
    for one, other in itertools.combinations(paths, 2):
        if filecmp.cmp(one, other, shallow=False):
            raise ConfigError(f"DATA_PATH={folder}: {one.name} and {other.name} have the same content; remove the copy")
    if gap := numbering_gap(paths):
        raise ConfigError(
            f"DATA_PATH={folder}: {gap}; a score needs the whole validation text: get all of its shards, numbered from 0"
        )
    if training and (gap := numbering_gap(shard_paths(folder, "train"))):
        notices.append(f"{folder}: {gap}; the training text lacks a part")
    return notices, False


def check_data(folder: Path, training: bool, everything: bool = False) -> list[str]:
    """What a person should know of the shards in `folder`; ConfigError where the validation text is not what a score may be taken on.

    It is compared with the manifest of make_shards, and without one looked through for copies of itself: text that occurs twice is
    predicted from its first occurrence, and the score falls to half. With `training` its documents are looked for in the training
    text as well, in the first LEAK_TOKENS or in `everything`, and the training shards are compared.
    """
    notices, vouched = check_shards(folder, training, everything)
    val = load_split(folder, "val")
    n, documents = sum(map(len, val)), sum(np.count_nonzero(shard == BOS) for shard in val)
    # Documents, or where hardly any BOS shows them pieces, at this mean distance.
    spacing, name = 0 if documents >= max(COPIED_ROW, n >> 14) else max(16, n >> 18), ""
    hashes, sizes = map(np.concatenate, zip(*text_units(val, spacing), strict=True))
    for export, (least, most) in CHALLENGE_COUNTS.items():
        if least <= n <= most:
            name = export
            notices.append(f"the validation text has the token count of the challenge's {export} export ({n}); its content "
                           "was compared with no copy of that")  # fmt: skip
    copied, row = find_copies(hashes, sizes, spacing > 0)
    found = f"{copied} of {n} validation tokens stand in text that occurs before ({copied / n:.2%}; {row} in order)"
    if not vouched and (row >= COPIED_ROW * ROW_TOKENS or (not name and copied >= COPIED_SHARE * n)):
        raise ConfigError(f"DATA_PATH={folder}: {found}, so the score would be of text that was seen; remove the copy from the "
                          "validation shards, or make them from documents without copies with data/make_shards.py")  # fmt: skip
    notices += [f"{found}: a score on them is of text that was seen"] if copied else []
    if training and shard_paths(folder, "train"):
        train = load_split(folder, "train")
        before = np.cumsum([0, *map(len, train)])
        most = before[-1] if everything else LEAK_TOKENS
        parts = (shard[: max(0, most - start)] for shard, start in zip(train, before, strict=False))
        seen = np.isin(hashes, np.concatenate([part for part, _ in text_units(parts, spacing)]))
        leaked, share = int(seen.sum()), float(seen.sum()) / max(1, len(seen))
        found = f"{leaked} of {len(hashes)} validation {'pieces' if spacing else 'documents'} stand in the training text ({share:.2%})"
        if share >= COPIED_SHARE:
            raise ConfigError(f"DATA_PATH={folder}: {found}, so the score would be of text that was trained on; make both splits from "
                              "documents that differ (data/make_shards.py --drop-copies)")  # fmt: skip
        notices += [found] if leaked else []
    return notices


# ==== 4 MODEL =========================================================================================================
# Shapes: B sequences, T positions, D model width, H query heads, G key/value heads, K head width, V vocabulary, R C rows
# and columns of a matrix. Every parameter is made with two tags: `role` is its optimizer group, `store` how it is stored.


class Ctx(NamedTuple):
    """What a caller may add to the forward pass; the default context is the plain model."""

    tap: Callable[[str, Tensor], None] | None = None  # sees the input of each projection (GPTQ Hessians)
    lora: Mapping[tuple[int, str], Callable[..., Tensor]] = MappingProxyType({})  # (pass, site) -> (x, y) -> adapted y
    slot: int = -1  # which pass through a block this is: a block that runs twice has two LoRAs; -1 outside the blocks
    cache: KVCache | None = None  # keys and values of earlier positions (incremental decoding)
    fake_quant: nn.Module | None = None  # weight -> weight as the quantizer will leave it (QAT)
    segments: Segments | None = None  # what each position may see (DOC_MASK=1); None: found from the ids
    one_document: bool = False  # each row is one document: nothing to mask


class Segments(NamedTuple):
    """Which positions see each other: those of one segment, a document or a part of one."""

    offset_BT: Tensor  # int64: how many positions of its segment stand before each position
    bounds_M: Tensor  # int32: where segments begin in all rows laid end to end, padded with B T
    longest: int  # no segment is longer


def find_segments(ids_BT: Tensor, longest: int, room: int = 0, cache: KVCache | None = None) -> Segments:
    """Segments begin with each row, at each BOS, and every `longest` positions after such a beginning.

    With a cache the ids continue its rows. The compiler makes code for each number of bounds: there are `room`, or on a CPU
    the next power of two where that is too few. A GPU that is not told waits to count them, and fails where it was told too few.
    """
    length, begun = (0, ids_BT.new_zeros(len(ids_BT), 1)) if cache is None else (cache.length, cache.start_B1)
    at_T = torch.arange(length, length + ids_BT.shape[1], device=ids_BT.device)
    start = torch.where(ids_BT == BOS, at_T, begun).cummax(dim=1).values
    offset = (at_T - start) % longest
    first = offset.flatten() == 0
    found = first.cumsum(0)
    if not room or ids_BT.device.type == "cpu":
        room = max(room, 1 << int(found[-1]).bit_length())  # at least one more than were found
    torch._assert_async(found[-1] < room)
    slot = torch.where(first, found - 1, room)  # the last one takes what begins no segment
    bounds = torch.full((room + 1,), ids_BT.numel(), dtype=torch.int32, device=ids_BT.device)
    bounds.scatter_(0, slot, torch.arange(ids_BT.numel(), dtype=torch.int32, device=ids_BT.device))
    return Segments(offset, bounds[:room], longest)


def adapted(y: Tensor, x: Tensor, site: str, ctx: Ctx) -> Tensor:
    """What the LoRA of this pass and site makes of x (..., in) and the projection y (..., out); y where there is none."""
    return ctx.lora[ctx.slot, site](x, y) if (ctx.slot, site) in ctx.lora else y


def tag(p: nn.Parameter, role: str, store: str, lr_mult: float = 1.0) -> nn.Parameter:
    """Mark a parameter with its optimizer role (matrix, scalar, embed), storage role and learning-rate multiplier."""
    p.role, p.store, p.lr_mult = role, store, lr_mult  # type: ignore[attr-defined]
    return p


def vector(*shape: int, value: float = 0.0) -> nn.Parameter:
    """A new control parameter of this shape, all `value`: fp32, trained by Adam at SCALAR_LR, stored in CONTROL_BITS."""
    return tag(nn.Parameter(torch.full(shape, value)), "scalar", "control")


class UnitRMS(torch.autograd.Function):
    """x (..., D) -> x / rms(x), for `rms_norm` on a CPU: saves y and 1 / rms, where PyTorch's own saves six tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        widest = torch.promote_types(x.dtype, torch.float32)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=widest).square_()
        inverse = squares.div_(x.shape[-1]).add_(torch.finfo(squares.dtype).eps).rsqrt_().to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        radial = torch.linalg.vecdot(y, dy).unsqueeze(-1)
        return torch.addcmul(dy, y, radial, value=-1 / y.shape[-1]).mul_(inverse)


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis, no learned weight. eps is fp32's in every dtype: bf16's, .0078, exceeds the embeddings' mean square."""
    return UnitRMS.apply(x) if x.device.type in ("cpu", "meta") else F.rms_norm(x, (x.shape[-1],))


def init_matrix(w_RC: Tensor, how: str, gain: float = 1.0) -> None:
    """Fill the matrix in place: `default` is torch's Linear (Kaiming-uniform, a = sqrt 5), `orthogonal`, `normal` N(0, gain^2), `zero`."""
    if w_RC.is_meta:
        return
    if how == "zero":
        nn.init.zeros_(w_RC)
    elif how == "normal":
        nn.init.normal_(w_RC, std=gain)
    elif how == "orthogonal" and min(w_RC.shape) >= 64:
        nn.init.orthogonal_(w_RC, gain=gain)
    else:  # the published orthogonal pass skips matrices narrower than 64
        nn.init.kaiming_uniform_(w_RC, a=math.sqrt(5))
        w_RC.data.mul_(gain)


class Linear(nn.Module):
    """y = x W^T without bias; W is kept in fp32 and cast to x's dtype. Taps and LoRA find the projection by its `site`."""

    def __init__(self, site: str, d_in: int, d_out: int, store: str, init: str, gain: float = 1.0,
                 role: str = "matrix", lr_mult: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        self.site, self.shape = site, torch.Size((d_out, d_in))
        self.weight = tag(nn.Parameter(torch.empty(d_out, d_in)), role, store, lr_mult)
        init_matrix(self.weight, init, gain)

    def matrix(self, ctx: Ctx) -> Tensor:
        """The effective weight (out, in), fp32."""
        return self.weight if ctx.fake_quant is None else ctx.fake_quant(self.weight)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        if ctx.tap is not None:
            ctx.tap(self.site, x)
        return adapted(F.linear(x, self.matrix(ctx).to(x.dtype)), x, self.site, ctx)


def random_words(seed: int, n: int) -> np.ndarray:
    """The first n uint64 of the SplitMix64 sequence of `seed`: integer arithmetic, so equal on every machine."""
    z = np.uint64(seed % 2**64) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mix_rows(x_NM: np.ndarray) -> np.ndarray:
    """x K, K = Hadamard(2^a) (x) (odd part I - 2 J): symmetric, K K = m^2 / 2^a I, and integers stay integers."""
    n, m = x_NM.shape
    two = m & -m
    odd = m // two
    x = x_NM.reshape(n, two, odd)
    x = odd * x - 2.0 * x.sum(-1, keepdims=True)
    half = 1
    while half < two:
        x = x.reshape(n, two // (2 * half), 2, half * odd)
        x = np.stack([x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]], axis=2)
        half *= 2
    return x.reshape(n, m)


def random_orthogonal(seed: int, m: int) -> np.ndarray:
    """A pseudo-random orthogonal matrix (m, m) fp64, bit-identical on every machine: Q = S P K S' P' K S'' P'' / norm with
    random signs S, permutations P and the integer mixing K of `mix_rows`.

    No QR: its last bits depend on the LAPACK build. All sums here are of integers below 2^53, exact in any order; one
    division rounds at the end, correctly by IEEE 754. Without the middle permutation K S' K would be a dyadic convolution
    (34 values fill 512 x 512); with it, entries and rows are distributed as those of a Gaussian QR.
    """
    signs, orders = random_words(seed, 6 * m).reshape(2, 3, m)
    flips = np.where(signs >> np.uint64(63), 1.0, -1.0)
    q = np.eye(m)
    for i, order in enumerate(np.argsort(orders, axis=1, kind="stable")):
        q = mix_rows(q) if i else q
        q = (q * flips[i])[:, order]
    return q / (m * m // (m & -m))


# #1095's numbering of the frozen bases; v only where keys and values are not fused.
ADAPTER_TYPES = {"q": 0, "kv": 1, "k": 1, "out": 2, "up": 3, "down": 4, "v": 5}


class AdapterLinear(Linear):
    """W = base + B A: a frozen random orthogonal base that is never stored, and a trained rank-r adapter (#1095).

    base = Q[:out, :in] / sqrt(in), so all its singular values are 1/sqrt(in). A ~ N(0, 1/in); B = 0 starts at the base
    (published: N(0, 1/r) on q, kv and up, much larger than the base). A and B are kept in fp32. They are what is
    stored, not W, so QAT does not round W.
    """

    def __init__(self, cfg: Config, layer: int, kind: str, site: str, d_in: int, d_out: int, lr_mult: float) -> None:
        nn.Module.__init__(self)
        self.site, self.shape = site, torch.Size((d_out, d_in))
        r = cfg.adapter_rank
        self.a = tag(nn.Parameter(torch.empty(r, d_in)), "matrix", "adapter", lr_mult)
        self.b = tag(nn.Parameter(torch.zeros(d_out, r)), "matrix", "adapter", lr_mult)
        init_matrix(self.a, "normal", 1 / math.sqrt(d_in))
        base = torch.empty(d_out, d_in)
        if not base.is_meta:
            q = random_orthogonal(cfg.adapter_seed + 100 * layer + ADAPTER_TYPES[kind], max(d_in, d_out))
            base = torch.from_numpy((q[:d_out, :d_in] / math.sqrt(d_in)).astype(np.float32))
        self.register_buffer("base", base, persistent=False)

    def matrix(self, ctx: Ctx) -> Tensor:  # noqa: ARG002
        return self.base + self.b @ self.a


def projection(cfg: Config, layer: int, part: str, kind: str, d_in: int, d_out: int) -> Linear:
    """The matrix `blocks.<layer>.<part>.<kind>` as the configuration builds it: trained, or adapter on a random base."""
    site = f"blocks.{layer}.{part}.{kind}"
    mult = cfg.decoder_lr_mult if layer >= cfg.encoder_layers else 1.0
    if cfg.adapter_rank:
        return AdapterLinear(cfg, layer, kind, site, d_in, d_out, mult)
    if kind in ("out", "down"):
        how, gain = ("zero", 1.0) if cfg.out_init == "zero" else ("orthogonal", 1 / math.sqrt(2 * cfg.num_layers))
    else:
        how, gain = cfg.linear_init, 1.0
    return Linear(site, d_in, d_out, part, how, gain, lr_mult=mult)


# ---- rotary positions


def rope_base(cfg: Config) -> float:
    """RoPE base with the NTK rule: base (len / T0)^(d / (d - 2)) where the longest window exceeds T0 = ROPE_TRAIN_LEN."""
    longest, dims = max(cfg.train_seq_len, cfg.eval_len), cfg.rope_dims or cfg.head_dim
    if not cfg.rope_train_len or longest <= cfg.rope_train_len:
        return cfg.rope_base
    return cfg.rope_base * (longest / cfg.rope_train_len) ** (dims / (dims - 2))


def rope_table(cfg: Config, positions: int = 0) -> Tensor:
    """(2, positions, rotated dims / 2) fp32: cosines and sines; as many as the longest window if not told otherwise."""
    dims, positions = cfg.rope_dims or cfg.head_dim, max(cfg.longest_seq, positions)
    table = torch.empty(2, positions, dims // 2)
    if table.is_meta:  # a shape; arithmetic there would import torch's compiler, a second of start-up
        return table
    freqs = rope_base(cfg) ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * freqs
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x_BTHK: Tensor, rope_2TC: Tensor) -> Tensor:
    """Half-split rotation of the first 2C dims of each head, (a cos + b sin, -a sin + b cos); the others pass through.

    The table is (2, T, C) for all rows, or (2, B, T, C)."""
    cos, sin = rope_2TC.to(x_BTHK.dtype)[..., None, :]
    half = cos.shape[-1]
    a, b = x_BTHK[..., :half], x_BTHK[..., half : 2 * half]
    parts = [a * cos + b * sin, b * cos - a * sin]
    if 2 * half < x_BTHK.shape[-1]:
        parts.append(x_BTHK[..., 2 * half :])
    return torch.cat(parts, dim=-1)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What TRAIN_DTYPE `name` means on this device. A CPU without bf16 units multiplies bf16 several times slower."""
    if name == "fast" and device.type == "cpu":
        return torch.bfloat16 if cpu_features() & {"avx512_bf16", "amx_bf16"} else torch.float32
    bf16 = name == "bf16" or (name != "fp32" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


# ---- attention kernels: (B, T, H, K), (B, S, G, K), (B, S, G, K) -> (B, T, H, K), causal, aligned at the last position;
# with segments a position sees those of its own alone


@torch._disable_dynamo  # the segments differ from step to step; unlike torch.compiler.disable it imports the compiler when called
def attend_segments(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    """SDPA one segment after the other."""
    n = q_BTHK.shape[2] // k_BTGK.shape[2]
    rows = (q_BTHK, k_BTGK.repeat_interleave(n, 2), v_BTGK.repeat_interleave(n, 2))
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in rows)
    spans = [slice(lo, hi) for lo, hi in itertools.pairwise(segments.bounds_M.tolist()) if lo < hi]
    parts = [F.scaled_dot_product_attention(q[:, x], k[:, x], v[:, x], is_causal=True) for x in spans]
    return torch.cat(parts, dim=1).transpose(0, 1).reshape(q_BTHK.shape)


def attend_sdpa(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, segments: Segments | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention. Key/value heads are expanded on the CPU, where enable_gqa is slower."""
    t, s = q_BTHK.shape[1], k_BSGK.shape[1]
    if segments is not None and t == s:
        return attend_segments(q_BTHK, k_BSGK, v_BSGK, segments)
    if segments is None and t == 1:  # decoding: query heads that share keys stand as query positions
        k, v = k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
        q_BGNK = q_BTHK.reshape(len(q_BTHK), k.shape[1], -1, q_BTHK.shape[3])
        return F.scaled_dot_product_attention(q_BGNK, k, v).reshape(q_BTHK.shape)
    grouped = q_BTHK.shape[2] != k_BSGK.shape[2]
    if grouped and q_BTHK.device.type != "cuda":
        n = q_BTHK.shape[2] // k_BSGK.shape[2]
        k_BSGK, v_BSGK, grouped = k_BSGK.repeat_interleave(n, 2), v_BSGK.repeat_interleave(n, 2), False
    mask = None
    if t < s:  # new positions after a cache: position i sees the first s - t + i + 1, of them its segment's
        at_S = torch.arange(s, device=q_BTHK.device)
        mask = at_S <= at_S[s - t :, None]
        if segments is not None:
            mask = (mask & (at_S >= (at_S[s - t :] - segments.offset_BT)[..., None]))[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


Blocks = tuple[tuple[int, int, int], ...]  # of queries: (first key, first query, end of both)


class BlockedAttention(torch.autograd.Function):
    """Causal softmax(q k^T / sqrt K) v by blocks of queries, products only up to the diagonal: 2.7x SDPA on a CPU.

    q (N, T, H, K), k and v (N, T, G, K). Query heads that share keys are rows of one product, so keys are never expanded.
    Keeps the probabilities for the backward pass, about N H T T / 2 numbers. The blocks are causal inside and have all of the T
    queries in order.
    """

    ROWS = 128  # queries a block: smaller wastes less above the diagonal, larger makes better products

    @staticmethod
    def forward(ctx: Any, q_NTHK: Tensor, k_NTGK: Tensor, v_NTGK: Tensor, blocks: Blocks) -> Tensor:
        (N, T, H, K), G = q_NTHK.shape, k_NTGK.shape[2]
        q = (q_NTHK * K**-0.5).transpose(1, 2).reshape(N * G, H // G, T, K)
        k, v = (x.transpose(1, 2).reshape(N * G, T, K) for x in (k_NTGK, v_NTGK))
        y, probs = torch.empty_like(q), []
        future = q.new_full((BlockedAttention.ROWS, BlockedAttention.ROWS), -math.inf).triu_(1)
        for first, lo, hi in blocks:
            scores = q[:, :, lo:hi].reshape(N * G, -1, K) @ k[:, first:hi].mT
            scores.view(N * G, -1, hi - lo, hi - first)[..., lo - first :].add_(future[: hi - lo, : hi - lo])
            p = scores.softmax(-1)
            y[:, :, lo:hi] = (p @ v[:, first:hi]).view(N * G, -1, hi - lo, K)
            probs += [p] if any(ctx.needs_input_grad) else []
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, *probs)
        return y.view(N, H, T, K).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NTHK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *probs = ctx.saved_tensors
        N, T, H, K = dy_NTHK.shape
        dy = dy_NTHK.transpose(1, 2).reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (first, lo, hi) in zip(probs, ctx.blocks, strict=True):
            dy_rows, q_rows = (x[:, :, lo:hi].reshape(len(q), -1, K) for x in (dy, q))
            dv[:, first:hi].baddbmm_(p.mT, dy_rows)
            ds = torch._softmax_backward_data(dy_rows @ v[:, first:hi].mT, p, -1, p.dtype)
            dq[:, :, lo:hi] = (ds @ k[:, first:hi]).view(len(q), -1, hi - lo, K)
            dk[:, first:hi].baddbmm_(ds.mT, q_rows)
        dk, dv = (x.view(N, -1, T, K).transpose(1, 2) for x in (dk, dv))
        return dq.mul_(K**-0.5).view(N, H, T, K).transpose(1, 2), dk, dv, None


def blocks_of(edges: list[int]) -> Blocks:
    """BlockedAttention's blocks of the causal segments between these edges."""
    rows, segments = BlockedAttention.ROWS, itertools.pairwise(edges)
    return tuple((first, lo, min(lo + rows, end)) for first, end in segments for lo in range(first, end, rows))


@torch._disable_dynamo  # the blocks differ from step to step
def attend_segment_blocks(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    """BlockedAttention over the segments of all rows: no product reaches into another document."""
    q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q_BTHK, k_BTGK, v_BTGK))
    return BlockedAttention.apply(q, k, v, blocks_of(segments.bounds_M.tolist())).reshape(q_BTHK.shape)


def attend_blocks(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, segments: Segments | None = None) -> Tensor:
    """BlockedAttention; SDPA where a cache makes the keys longer than the queries."""
    if q_BTHK.shape[1] != k_BSGK.shape[1]:
        return attend_sdpa(q_BTHK, k_BSGK, v_BSGK, segments)
    if segments is not None:
        return attend_segment_blocks(q_BTHK, k_BSGK, v_BSGK, segments)
    return BlockedAttention.apply(q_BTHK, k_BSGK, v_BSGK, blocks_of([0, q_BTHK.shape[1]]))


AttentionKernel = Callable[..., Tensor]  # (q, k, v, segments or None)


def attend_with(rows: Callable[..., Any], packed: Callable[..., Any]) -> AttentionKernel:
    """A kernel of rows, and one of packed sequences, (N, H, K) with bounds and the greatest length, over the segments of all rows."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> Tensor:
        if segments is None:
            y = rows(q, k, v)
        elif q.shape[1] != k.shape[1]:
            y = attend_sdpa(q, k, v, segments)
        else:
            bounds, most = segments.bounds_M, segments.longest
            y = packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, most, most)
        return (y[0] if isinstance(y, tuple) else y).view(q.shape)

    return attend


def attend_flash(module: str) -> AttentionKernel:
    """FlashAttention from `module` (flash_attn_interface is version 3, flash_attn version 2)."""
    functions = ("flash_attn_func", "flash_attn_varlen_func")
    kernels = __import__(module, fromlist=functions)
    return attend_with(*(functools.partial(getattr(kernels, name), causal=True) for name in functions))


def attend_varlen() -> AttentionKernel:
    """PyTorch's own FlashAttention of packed sequences, in bf16 on a GPU; SDPA without segments. New in torch 2.10; 2.11 and 2.12 changed its
    options."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def packed(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, *bounds: Any) -> Any:
        n = q_NHK.shape[1] // k_NGK.shape[1]
        if "enable_gqa" in known:
            return varlen_attn(q_NHK, k_NGK, v_NGK, *bounds, **causal, enable_gqa=n > 1)
        return varlen_attn(q_NHK, k_NGK.repeat_interleave(n, 1), v_NGK.repeat_interleave(n, 1), *bounds, **causal)

    return attend_with(attend_sdpa, packed)


PLAIN_ATTENTION = {"sdpa": attend_sdpa, "blocks": attend_blocks}  # run wherever PyTorch does
# Kernel -> how to make it, the package to ask for, and the major compute capabilities that it runs on.
GPU_ATTENTION: dict[str, tuple[Callable[[], AttentionKernel], str, range]] = {
    "fa3": (lambda: attend_flash("flash_attn_interface"), "flash_attn_interface", range(9, 10)),
    "fa2": (lambda: attend_flash("flash_attn"), "flash_attn", range(8, 99)),
    "varlen": (attend_varlen, "", range(8, 99)),
}


def check_kernel(attend: AttentionKernel, cfg: Config, device: torch.device) -> None:
    """Raises RuntimeError unless outputs and gradients on a small input are SDPA's but for rounding to bf16, with and without segments:
    an installed kernel may be of another version, or built for another GPU or another torch."""
    random = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(2, 48, n, cfg.head_dim, generator=random).to(device, torch.bfloat16).requires_grad_()
                   for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads, cfg.num_heads))  # fmt: skip
    for segments in (None, find_segments(torch.zeros(2, 48, dtype=torch.long, device=device), 20)):
        found = [kernel(q, k, v, segments) for kernel in (attend, attend_sdpa)]
        ours, theirs = ([y, *torch.autograd.grad(y, (q, k, v), dy)] for y in found)
        errors = [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(ours, theirs, strict=True)]
        if not all(error <= 0.03 for error in errors):  # bf16 keeps 8 bits: .004 for a sum, NaN for garbage
            raise RuntimeError(f"its results on a small input differ from PyTorch's by {max(errors):.0%}")


class ChosenKernel(NamedTuple):
    """A kernel, its name, and a notice for each better one that is there and of no use."""

    name: str
    kernel: AttentionKernel
    notices: tuple[str, ...] = ()


def choose_attention(cfg: Config, device: torch.device) -> ChosenKernel:
    """The kernel of ATTENTION on this device; `auto`: blocks on a CPU, else FlashAttention 3, then 2, then what PyTorch has.

    Raises ConfigError if a kernel is forced that is not installed or cannot run here.
    """
    name, notices = "blocks" if cfg.attention == "auto" and device.type == "cpu" else cfg.attention, []
    if name in PLAIN_ATTENTION:
        return ChosenKernel(name, PLAIN_ATTENTION[name])
    auto = name == "auto"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    for candidate in ("fa3", "fa2", *(["varlen"] if cfg.doc_mask else [])) if auto else (name,):
        make, module, capabilities = GPU_ATTENTION[candidate]
        if major not in capabilities:
            reason = f"it needs a CUDA device of compute capability {capabilities[0]}.0, this is {device.type}"
        elif cfg.head_dim > 256 or compute_dtype(cfg.train_dtype, device) == torch.float32:
            reason = "it computes in bf16 on heads of up to 256 dims"
        else:
            try:
                kernel = make()
                with torch.enable_grad():
                    check_kernel(kernel, cfg, device)
                return ChosenKernel(candidate, kernel, tuple(notices))
            except Exception as e:  # whatever an extension raises on import or on its first call
                missing = isinstance(e, ModuleNotFoundError) and e.name == module
                reason = f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
            if missing:
                reason = f"{module} is not installed"
            elif auto:
                installed = module or f"torch {torch.__version__}"
                notices.append(f"{installed} is there and of no use for attention ({reason})")
        if not auto:
            raise ConfigError(f"ATTENTION={name}: {reason}; use ATTENTION=auto or ATTENTION=sdpa")
    return ChosenKernel("sdpa", attend_sdpa, tuple(notices))


# ---- operations on the heads' outputs


def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """XSA: y - (y . v^) v^ for each query head, v^ the unit value of its group at the query's own position.

    arXiv 2603.09078 and #265. Grouped: values are broadcast over their query heads, never expanded. A zero v leaves y.
    """
    b, t, h, k = y_BTHK.shape
    g = v_BTGK.shape[2]
    y = y_BTHK.view(b, t, g, h // g, k)
    unit = F.normalize(v_BTGK, dim=-1, eps=1e-12)[:, :, :, None]
    along = (y * unit).sum(-1, keepdim=True)
    return (y - along * unit).flatten(2, 3)


class HeadGate(nn.Module):
    """y_h *= sigmoid(c (W x + b))_h, x the block's normalised input; W = 0 at first.

    ATTN_GATE=input reads all of x, and b = 4 starts near identity (#850); sparse reads x[:GATE_WINDOW], has no b and starts at 1/2 (#1787).
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        sparse = cfg.attn_gate == "sparse"
        self.scale, self.window = (cfg.sparse_attn_gate_scale, cfg.gate_window) if sparse else (1.0, cfg.model_dim)
        self.weight_HW = vector(cfg.num_heads, self.window)
        self.bias_H = None if sparse else vector(cfg.num_heads, value=cfg.attn_gate_init)

    def forward(self, y_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        bias = None if self.bias_H is None else self.bias_H.to(x_BTD.dtype)
        z_BTH = F.linear(x_BTD[..., : self.window], self.weight_HW.to(x_BTD.dtype), bias)
        z_BTH = z_BTH if self.scale == 1.0 else self.scale * z_BTH
        return y_BTHK * torch.sigmoid(z_BTH)[..., None]


class ValueResidual(nn.Module):
    """v <- a v0 + b v, v0 the first block's values, (a, b) = softmax of two learned logits (arXiv 2410.17897, #850)."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = vector(2, value=0.5)

    def forward(self, v: Tensor, v0: Tensor) -> Tensor:
        a, b = torch.softmax(self.logits, dim=0).to(v.dtype).unbind()
        return a * v0 + b * v


# ---- embeddings


class Embedding(nn.Module):
    """ids (...) -> rows of the table (..., dim) in the compute dtype; the table itself is kept in fp32."""

    def __init__(self, rows: int, dim: int, std: float, role: str, store: str) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.empty(rows, dim)), role, store)
        init_matrix(self.weight, "normal" if std else "zero", std)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)


def overtone_(w_VD: Tensor) -> None:
    """Reshape the spectrum in place: S_k <- S_1 / sqrt(k), singular vectors kept (#60's lineage, #187)."""
    u, s, vt = torch.linalg.svd(w_VD.float(), full_matrices=False)
    w_VD.copy_((u * (s[0] * torch.arange(1, len(s) + 1, device=s.device) ** -0.5)) @ vt)


def hash_bigram(form: str, prev: Tensor, cur: Tensor, rows: int) -> Tensor:
    """Row of each (previous, current) pair in the table of that published system; `prev` is -1 where there is none."""
    none = prev < 0
    prev = prev.clamp_min(0)
    if form == "pr164":  # one row is reserved for "no previous token"
        return torch.where(none, rows - 1, ((36313 * cur) ^ (27191 * prev)) % (rows - 1))
    if form == "pr740":
        return (2654435761 * cur + 40503 * prev) % rows
    return (92821 * prev + cur) % rows


class BigramHash(nn.Module):
    """Adds scale * P E[hash(previous, current)] to the token embedding. Neutral where table or scale are zero."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.form, self.rows = cfg.bigram_hash, cfg.bigram_vocab_size
        gain = 1 / math.sqrt(2 * cfg.num_layers) if cfg.branch_proj_scaled else 1.0
        self.table = Embedding(self.rows, cfg.bigram_dim, cfg.bigram_table_std, cfg.bigram_table_role, "table")
        how, role = cfg.linear_init, cfg.bigram_proj_role
        self.proj = Linear("bigram.proj", cfg.bigram_dim, cfg.model_dim, "proj", how, gain, role)
        self.scale = vector(1, value=cfg.bigram_scale) if cfg.bigram_scale else None

    def forward(self, ids_BT: Tensor, dtype: torch.dtype, ctx: Ctx) -> Tensor:
        first = torch.full_like(ids_BT[:, :1], -1)
        if ctx.cache is not None and ctx.cache.last_id is not None:
            first = ctx.cache.last_id[:, None]
        prev = torch.cat([first, ids_BT[:, :-1]], dim=1)
        if ctx.segments is not None:
            prev = prev.masked_fill(ctx.segments.offset_BT == 0, -1)
        y = self.proj(self.table(hash_bigram(self.form, prev, ids_BT, self.rows), dtype), ctx)
        return y if self.scale is None else y * self.scale.to(dtype)


class Smear(nn.Module):
    """SmearGate: part of the embedding before is taken in, x_{-1} = 0.

    SMEAR_FORM=channel: y_t = (1 - s) x_t + s x_{t-1}, s = sigmoid(g) per channel; neutral at g = -inf. #740 and #187 put sigmoid(g) on the
    current token: their init 3 is -3 here. window: y_t = x_t + s x_{t-1}, s = l sigmoid(w . x_t[:GATE_WINDOW]); neutral at l = 0,
    its init (#1667). s = 0 where the current token is a BOS, so that no document sees the one before it (#1851; SMEAR_CROSS_DOC=1
    restores the published leak).
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cross_doc, self.scale = cfg.smear_cross_doc, None
        if cfg.smear_form == "channel":
            self.gate = vector(cfg.model_dim, value=cfg.smear_init)
        else:
            self.weight_W, self.scale = vector(cfg.gate_window), vector(1)

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, ctx: Ctx) -> Tensor:
        before_B1D = torch.zeros_like(x_BTD[:, :1])
        if ctx.cache is not None:
            before_B1D = before_B1D if ctx.cache.last_embedding is None else ctx.cache.last_embedding
            ctx.cache.last_embedding = x_BTD[:, -1:]
        shifted = torch.cat([before_B1D, x_BTD[:, :-1]], dim=1)
        if ctx.segments is not None:
            shifted = shifted.masked_fill((ctx.segments.offset_BT == 0)[..., None], 0)
        if self.scale is None:
            s, taken = torch.sigmoid(self.gate).to(x_BTD.dtype), shifted - x_BTD
        else:
            w, scale = self.weight_W.to(x_BTD.dtype), self.scale.to(x_BTD.dtype)
            s, taken = scale * torch.sigmoid(F.linear(x_BTD[..., : len(w)], w[None])), shifted
        if not self.cross_doc:
            s = s * (ids_BT != BOS)[..., None]
        return x_BTD + s * taken


class PreEnrich(nn.Module):
    """x <- W_b gelu(W_a x), exact GELU, no residual (#187)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.up = Linear("pre_enrich.up", cfg.model_dim, cfg.pre_enrich_dim, "mlp", "default")
        self.down = Linear("pre_enrich.down", cfg.pre_enrich_dim, cfg.model_dim, "mlp", "default")

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return self.down(F.gelu(self.up(x, ctx)), ctx)


class ValueEmbedding(nn.Module):
    """One shared table to the width of the values; each listed block adds it at its own learned scale (#850, #1095)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        gain = 1 / math.sqrt(2 * cfg.num_layers) if cfg.branch_proj_scaled else 1.0
        self.table = Embedding(cfg.vocab_size, cfg.ve_dim, 0.01, "embed", "table")
        self.proj = Linear("ve.proj", cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim, "proj", cfg.linear_init, gain)
        self.scale = vector(1, value=0.1)
        self.layer_scales = vector(len(cfg.value_layers), value=1.0)
        self.index = {layer: i for i, layer in enumerate(cfg.value_layers)}

    def forward(self, ids: Tensor, dtype: torch.dtype, ctx: Ctx) -> dict[int, Tensor]:
        """Block -> (B, T, G K) to add to its values."""
        shared = self.proj(self.table(ids, dtype), ctx) * self.scale.to(dtype)
        return {layer: shared * self.layer_scales[i].to(dtype) for layer, i in self.index.items()}


# ---- blocks


class BlockInputs(NamedTuple):
    """Inputs that are the same for every block of one forward pass."""

    x0_BTD: Tensor  # the embedding stream
    rope_2TC: Tensor  # cosines and sines of these positions
    values: dict[int, Tensor]  # value embeddings by block
    ctx: Ctx


class Attention(nn.Module):
    """Causal grouped-query attention: RMS-normalised queries and keys, RoPE, per-head gain, then XSA, gate, projection."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        d, kv = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.layer, self.head_dim = layer, cfg.head_dim
        self.q = projection(cfg, layer, "attn", "q", d, d)
        self.kv = projection(cfg, layer, "attn", "kv", d, 2 * kv) if cfg.kv_fused else None
        self.k = None if cfg.kv_fused else projection(cfg, layer, "attn", "k", d, kv)
        self.v = None if cfg.kv_fused else projection(cfg, layer, "attn", "v", d, kv)
        self.out = projection(cfg, layer, "attn", "out", d, d)
        self.q_gain_H = vector(cfg.num_heads, value=cfg.qk_gain_init)
        self.gate = None if cfg.attn_gate == "none" else HeadGate(cfg)
        self.value_residual = ValueResidual() if layer and cfg.value_residual == "softmax" else None
        self.excludes_self = layer in cfg.xsa_layers
        self.attend = attend_sdpa

    def heads(self, x_BTD: Tensor) -> Tensor:
        """(B, T, n K) -> (B, T, n, K)."""
        return x_BTD.view(*x_BTD.shape[:2], -1, self.head_dim)

    def forward(self, x_BTD: Tensor, v0_BTGK: Tensor | None, s: BlockInputs) -> tuple[Tensor, Tensor]:
        """(what the block adds (B, T, D), the first block's values (B, T, G, K))."""
        ctx = s.ctx
        k, v = (self.k(x_BTD, ctx), self.v(x_BTD, ctx)) if self.kv is None else self.kv(x_BTD, ctx).chunk(2, dim=-1)
        v = v + s.values[self.layer] if self.layer in s.values else v
        q, k, v = self.heads(self.q(x_BTD, ctx)), self.heads(k), self.heads(v)
        v0_BTGK = v if v0_BTGK is None else v0_BTGK
        if self.value_residual is not None:
            v = self.value_residual(v, v0_BTGK)
        q = rotate(rms_norm(q), s.rope_2TC) * self.q_gain_H.to(x_BTD.dtype)[:, None]
        k, all_v = rotate(rms_norm(k), s.rope_2TC), v
        if ctx.cache is not None:
            k, all_v = ctx.cache.extend(ctx.slot, k, v)
        y = self.attend(q, k, all_v, ctx.segments)
        y = exclude_self(y, v) if self.excludes_self else y
        y = y if self.gate is None else self.gate(y, x_BTD)
        return adapted(self.out(y.reshape(x_BTD.shape), ctx), x_BTD, f"blocks.{self.layer}.attn", ctx), v0_BTGK


class MLP(nn.Module):
    """W_down leaky_relu(W_up x, a)^2; a = 0 is relu^2."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.layer, self.slope = layer, cfg.leaky_slope
        self.up = projection(cfg, layer, "mlp", "up", cfg.model_dim, hidden)
        self.down = projection(cfg, layer, "mlp", "down", hidden, cfg.model_dim)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        z = self.up(x, ctx)
        y = self.down((F.leaky_relu(z, self.slope) if self.slope else F.relu(z)).square(), ctx)
        return adapted(y, x, f"blocks.{self.layer}.mlp", ctx)


class Block(nn.Module):
    """u = m0 x + m1 x0;  u += a Attn(norm u);  u += b MLP(norm u). Per-channel m, a, b; LN_SCALE = 1/sqrt(layer + 1).

    Every block takes and returns two lanes, one that attention reads and one that the MLP reads; here both are x.
    """

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer), MLP(cfg, layer)
        self.attn_scale, self.mlp_scale = vector(cfg.model_dim, value=1.0), vector(cfg.model_dim, value=1.0)
        self.resid_mix = vector(2, cfg.model_dim)
        self.resid_mix.data[0] = 1.0
        if cfg.resid_mix_init == "phase":  # early blocks lean on x0 (#60)
            part = 1 / (1 + math.exp(-3 * (layer / max(cfg.num_layers - 1, 1) - 0.5)))
            self.resid_mix.data[0], self.resid_mix.data[1] = part, 1.0 - part
        depth = 1 / math.sqrt(layer + 1)
        self.in_scale = depth if cfg.ln_scale == "in" else 1.0
        self.out_scale = depth if cfg.ln_scale == "out" else 1.0

    def norm(self, u: Tensor) -> Tensor:
        n = rms_norm(u)
        return n if self.in_scale == 1.0 else n * self.in_scale

    def mixed(self, x: Tensor, s: BlockInputs) -> Tensor:
        """m0 x + m1 x0."""
        mix = self.resid_mix.to(x.dtype)
        return mix[0] * x + mix[1] * s.x0_BTD

    def branch(self, y: Tensor, scale_D: Tensor) -> Tensor:
        """A branch's output as it is added to the stream."""
        y = scale_D.to(y.dtype) * y
        return y if self.out_scale == 1.0 else y * self.out_scale

    def forward(self, a: Tensor, m: Tensor, v0: Tensor | None, s: BlockInputs) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """(attention's lane, the MLP's lane, the first block's values)."""
        u = self.mixed(a, s)
        y, v0 = self.attn(self.norm(u), v0, s)
        u = u + self.branch(y, self.attn_scale)
        u = u + self.branch(self.mlp(self.norm(u), s.ctx), self.mlp_scale)
        return u, u, v0


class ParallelBlock(Block):
    """Attention reads lane A, the MLP lane M, and each lane takes from both (#1204, #1529):

    y = a Attn(norm(m0 A + m1 x0)), z = b MLP(norm M);  A <- ra A + paa y + pma z;  M <- rm M + pam y + pmm z.
    Scalars r = 1.1 and p = 1 at first. Both lanes start as the stream; the output is their mean.
    """

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__(cfg, layer)
        self.lane_mix = vector(2, 3, value=1.0)  # (A, M) x (r, p of y, p of z)
        self.lane_mix.data[:, 0] = 1.1

    def forward(self, a: Tensor, m: Tensor, v0: Tensor | None, s: BlockInputs) -> tuple[Tensor, Tensor, Tensor]:
        y, v0 = self.attn(self.norm(self.mixed(a, s)), v0, s)
        y, z = self.branch(y, self.attn_scale), self.branch(self.mlp(self.norm(m), s.ctx), self.mlp_scale)
        mix = self.lane_mix.to(a.dtype)
        a, m = (r * lane + p * y + q * z for lane, (r, p, q) in ((a, mix[0]), (m, mix[1])))
        return a, m, v0


# ---- the order of blocks


class BlockPass(NamedTuple):
    """One pass through a block."""

    block: int  # which weights
    norm: bool  # RMSNorm the stream first (start of a repeated encoder pass)
    save: bool  # push the output for a later skip
    skip: int | None  # which skip weight merges the popped output before the block


def layer_plan(cfg: Config, looped: bool = True) -> list[BlockPass]:
    """The passes through blocks in their order: encoder, whose outputs are pushed, then decoder, which pops them as skips.

    NUM_LOOPS repeats blocks LOOP_START..LOOP_END and halves what results, once `looped`; 11 blocks with 3..5 three times:
    0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8 9 10, 8 skips (#1344). ENCODER_RECURRENCE runs the encoder twice,
    normalises in between, and takes skips from its second pass (#187).
    """
    first, last, repeats = 0, 0, 0  # blocks first .. last - 1 are run `repeats` times more
    if cfg.encoder_recurrence:
        first, last, repeats = 0, cfg.encoder_layers, 1
    elif looped and cfg.num_loops:
        first, last, repeats = cfg.loop_start, cfg.loop_end + 1, cfg.num_loops
    order = [*range(last), *list(range(first, last)) * repeats, *range(last, cfg.num_layers)]
    half = len(order) - (cfg.num_layers - last) if cfg.encoder_recurrence else cfg.encoder_share(len(order))
    kept = range(half - last if cfg.encoder_recurrence else 0, half)
    skips = min(len(kept), len(order) - half)
    return [BlockPass(block, cfg.encoder_recurrence and block == 0 and i > 0, i in kept,
                      i - half if 0 <= i - half < skips else None)
            for i, block in enumerate(order)]  # fmt: skip


class Softcap(nn.Module):
    """c tanh(z / c), c = LOGIT_SOFTCAP. ASYM_LOGIT_RESCALE=1: a cap of its own for logits above and below 0, `caps` = (c+, c-), both
    LOGIT_SOFTCAP at first (#1923).

    Training leaves the pair alone (it is frozen) and equals the constant; only global test-time training may move it. It
    is stored with the weights. #2135's script switches it on, but its phase computes with the constant and never moves the pair:
    its recipe leaves it off.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cap = cfg.logit_softcap
        self.caps = vector(2, value=self.cap).requires_grad_(False) if cfg.asym_logit_rescale else None

    def forward(self, z: Tensor) -> Tensor:
        cap = self.cap if self.caps is None else torch.where(z >= 0, self.caps[0], self.caps[1])
        return cap * torch.tanh(z / cap)


class KVCache:
    """Keys and values of earlier positions for each pass through a block of the longest plan, the last token and embedding.

    B sequences of equal length, at most `limit` positions each, that advance together. `length` is the positions so far.
    """

    def __init__(self, cfg: Config, batch: int, limit: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (2, batch, limit, cfg.num_kv_heads, cfg.head_dim)
        self.slots = [torch.zeros(shape, device=device, dtype=dtype) for _ in layer_plan(cfg)]
        self.limit, self.length = limit, 0
        self.last_id: Tensor | None = None  # (B,)
        self.last_embedding: Tensor | None = None  # (B, 1, D) before the smear
        self.start_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # where each row's segment begins

    def extend(self, slot: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values; returns all so far."""
        end = self.length + k_BTGK.shape[1]
        assert end <= self.limit, f"cache of {self.limit} positions cannot hold {end}"
        self.slots[slot][0][:, self.length : end] = k_BTGK
        self.slots[slot][1][:, self.length : end] = v_BTGK
        return self.slots[slot][0][:, :end], self.slots[slot][1][:, :end]


class GPT(nn.Module):
    """The language model. One forward path: `features` -> `logits`, `nll`; callers differ only by their `Ctx`."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.plans = cfg, {looped: layer_plan(cfg, looped) for looped in (False, True)}
        self.set_looped(True)
        self.compute_dtype = torch.float32
        self.tok_emb = Embedding(cfg.vocab_size, cfg.model_dim, cfg.embed_init_std, "embed", "embed")
        if cfg.overtone_init and not self.tok_emb.weight.is_meta:
            overtone_(self.tok_emb.weight.data)
        self.head = None
        if not cfg.tie_embeddings:
            self.head = Linear("head", cfg.model_dim, cfg.vocab_size, "embed", "zero", role="head")
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        self.smear = Smear(cfg) if cfg.smear else None
        self.pre_enrich = PreEnrich(cfg) if cfg.pre_enrich_dim else None
        self.ve = ValueEmbedding(cfg) if cfg.ve_dim else None
        parallel = range(cfg.parallel_start_layer or cfg.num_layers, cfg.num_layers)
        self.blocks = nn.ModuleList((ParallelBlock if i in parallel else Block)(cfg, i) for i in range(cfg.num_layers))
        skips = max(sum(step.skip is not None for step in plan) for plan in self.plans.values())
        self.skip_weights = vector(skips, cfg.model_dim, value=1.0)
        self.skip_gates = vector(skips, cfg.model_dim) if cfg.skip_gates_enabled else None
        self.softcap = Softcap(cfg)
        self.register_buffer("rope", rope_table(cfg), persistent=False)

    def set_looped(self, looped: bool) -> None:
        """Follow the looped plan, as a new model does, or the plain one, as training does before ENABLE_LOOPING_AT."""
        self.looped, self.plan = looped, self.plans[looped]

    def sites(self) -> dict[str, torch.Size]:
        """Every projection's site and the shape (out, in) of its effective matrix."""
        return {m.site: m.shape for m in self.modules() if isinstance(m, Linear)}

    def place(self, device: torch.device, attend: AttentionKernel, dtype: str = "auto") -> GPT:
        """Move to the device and choose attention kernel and dtype (TRAIN_DTYPE's words); parameters stay fp32."""
        self.compute_dtype = compute_dtype(dtype, device)
        for block in self.blocks:
            block.attn.attend = attend
        return self.to(device)

    def embed_plain(self, ids: Tensor, ctx: Ctx) -> Tensor:
        """ids (B, T) -> (B, T, D): token (+ bigram), smeared where that comes before the norm."""
        x = self.tok_emb(ids, self.compute_dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, self.compute_dtype, ctx)
        return self.smear(x, ids, ctx) if self.smear is not None and self.cfg.smear_before_norm else x

    def embed(self, ids: Tensor, ctx: Ctx) -> Tensor:
        """ids (B, T) -> x0 (B, T, D): `embed_plain`, then enrichment, RMSNorm and smear as configured."""
        x = self.embed_plain(ids, ctx)
        if self.pre_enrich is not None:
            x = self.pre_enrich(x, ctx)
        x = rms_norm(x)
        return self.smear(x, ids, ctx) if self.smear is not None and not self.cfg.smear_before_norm else x

    @torch.no_grad()
    def enrichment(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T) fp32: how far the pre-enrichment moves each embedding, ||f(x) - x|| (#187's confidence)."""
        ctx = self.with_segments(ids, Ctx())
        x = self.embed_plain(ids, ctx)
        return (self.pre_enrich(x, ctx) - x).float().norm(dim=-1)

    def with_segments(self, ids: Tensor, ctx: Ctx, room: int = 0) -> Ctx:
        """The context with the segments of `ids` under DOC_MASK=1, unless it has them; `room`: see `find_segments`."""
        if not self.cfg.doc_mask or ctx.segments is not None or ctx.one_document or ids.is_meta:
            return ctx
        longest = ids.shape[1] if ctx.cache is None else ctx.cache.limit
        return ctx._replace(segments=find_segments(ids, longest, room, ctx.cache))

    def features(self, ids: Tensor, ctx: Ctx = Ctx()) -> Tensor:  # noqa: B008
        """ids (B, T) int64 -> final normalised stream (B, T, D). With a cache, ids continue the cached positions."""
        ctx, start = self.with_segments(ids, ctx), 0 if ctx.cache is None else ctx.cache.length
        a = m = x0 = self.embed(ids, ctx)
        values = {} if self.ve is None else self.ve(ids, self.compute_dtype, ctx)
        # Positions in the segment, since all rows of a step may be one stream.
        at = slice(start, start + ids.shape[1]) if ctx.segments is None else ctx.segments.offset_BT
        rope = self.rope[:, at]
        v0: Tensor | None = None
        saved: list[Tensor] = []
        for slot, step in enumerate(self.plan):
            if step.norm:
                a = rms_norm(a)
            if step.skip is not None:
                skip = self.skip_weights[step.skip].to(a.dtype) * saved.pop()
                if self.skip_gates is None:
                    a = a + skip
                else:  # s a + (1 - s) skip, s = sigmoid(gate)
                    a = torch.lerp(skip, a, torch.sigmoid(self.skip_gates[step.skip]).to(a.dtype))
            a, m, v0 = self.blocks[step.block](a, m, v0, BlockInputs(x0, rope, values, ctx._replace(slot=slot)))
            if step.save:
                saved.append(a)
        if ctx.cache is not None:
            ctx.cache.length, ctx.cache.last_id = start + ids.shape[1], ids[:, -1]
            if ctx.segments is not None:
                ctx.cache.start_B1 = ctx.cache.length - 1 - ctx.segments.offset_BT[:, -1:]
        return rms_norm(0.5 * (a + m) if self.cfg.parallel_start_layer else a)

    def logits(self, features: Tensor, ctx: Ctx = Ctx()) -> Tensor:  # noqa: B008
        """(..., D) -> softcapped logits (..., V) fp32."""
        if self.head is not None:
            z = self.head(features, ctx)
        else:
            if ctx.tap is not None:
                ctx.tap("tok_emb", features)
            z = F.linear(features, self.tok_emb.weight.to(features.dtype))
            z = adapted(z, features, "head", ctx)
        return self.softcap(z.to(torch.promote_types(z.dtype, torch.float32)))

    def nll(self, inputs: Tensor, targets: Tensor, ctx: Ctx = Ctx()) -> Tensor:  # noqa: B008
        """-log p(target) in nats, (B, T) fp32."""
        z = self.logits(self.features(inputs, ctx), ctx)
        return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    forward = nll


class FakeQuant(nn.Module):
    """w -> its rows rounded to signed `bits`-bit codes, with a straight-through gradient (QAT).

    `ste` rounds; `soft_round` (arXiv 2006.09952) is f + 1/2 + tanh(a (u - f - 1/2)) / (2 tanh(a / 2)), f = floor(u), which
    tends to rounding as a grows; `soft_round_pr850` is the published form, which tends to no rounding at all.
    """

    def __init__(self, kind: str, bits: int) -> None:
        super().__init__()
        self.kind, self.top = kind, 2 ** (bits - 1) - 1
        self.register_buffer("sharpness", torch.ones(()), persistent=False)  # a tensor: changing it recompiles nothing

    def forward(self, w_RC: Tensor) -> Tensor:
        w = w_RC.detach()
        scale = (w.abs().amax(dim=1, keepdim=True) / self.top).clamp_min(1e-12)
        u, a = w / scale, self.sharpness
        if self.kind == "ste":
            r = u.round()
        elif self.kind == "soft_round":
            r = u.floor() + 0.5 + torch.tanh(a * (u - u.floor() - 0.5)) / (2 * torch.tanh(a / 2))
        else:
            r = u + torch.tanh(a * (u.round() - u)) / (2 * a)
        return w_RC + (scale * r.clamp(-self.top, self.top) - w)


def flops_per_token(model: GPT, seq_len: int, plan: list[BlockPass] | None = None) -> float:
    """Training FLOPs a token: 6 a matrix weight and pass through it, 6 T D a pass for causal attention's two products."""
    weights = {site: shape.numel() for site, shape in model.sites().items()}
    passes = [step.block for step in plan or model.plan]
    blocks = sum(n * passes.count(int(site.split(".")[1])) for site, n in weights.items() if site.startswith("blocks."))
    others = sum(n for site, n in weights.items() if not site.startswith("blocks.") and site != "head")
    head = model.cfg.vocab_size * model.cfg.model_dim
    return 6.0 * (blocks + others + head) + 6.0 * len(passes) * seq_len * model.cfg.model_dim


# ==== 5 OPTIMIZER =====================================================================================================
#
# Muon trains the matrices, AdamW everything else. No wrapper around the model: after backward each gradient is this rank's
# part of the sum. A step (a) starts all reductions, (b) runs AdamW while the matrices' gradients are being reduced,
# (c) orthogonalises each matrix on the rank that owns it, (d) applies one bank's updates while the next bank computes.
# One process runs the same code with a world of one rank and no communication.

# PyTorch renamed these; FlashAttention's wheels often lag behind its newest version.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Coefficients (a, b, c) of each iteration; the last tuple serves all further ones.
NEWTON_SCHULZ = {
    "classic": ((3.4445, -4.7750, 2.0315),),  # steep at zero, so that small singular values rise within few iterations
    # Polar Express (arXiv 2505.16932) as #1787 damped it: singular values of .001 to 1 end within .85 to 1.15.
    "polar": ((8.156554524902461, -22.48329292557795, 15.878769915207462),
              (4.042929935166739, -2.808917465908714, 0.5000178451051316),
              (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
              (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
              (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
}  # fmt: skip


def orthogonalize(G: Tensor, steps: int, dtype: torch.dtype, coefficients: str = "classic") -> Tensor:
    """Brings the singular values of every matrix in G (n, R, C) near 1 and keeps its singular vectors; returns `dtype`.

    Newton-Schulz iteration X <- (a + bA + cA^2) X with A = X X^T (Keller Jordan, kellerjordan.github.io/posts/muon).
    Five steps bring all but tiny singular values into about 0.7..1.2. Tall matrices are multiplied from the right: the
    Gram matrix always has the short side, and a transposed input gives the transposed result. Zeros stay zeros.
    """
    tuples = NEWTON_SCHULZ[coefficients]
    tall = G.size(1) > G.size(2)
    # The Frobenius norm bounds the largest singular value, and the iteration converges only below sqrt(3).
    X = (G / (torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for i in range(steps):
        a, b, c = tuples[min(i, len(tuples) - 1)]
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def muon_momentum(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Momentum at `step` (from 0): linear from `start` to `end` over `warmup_steps`; with 0 of them `end` at once."""
    frac = min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return (1.0 - frac) * start + frac * end


def copy_grads(params: list[nn.Parameter], places: list[Tensor]) -> None:
    """Copies each parameter's gradient into its tensor of `places`; a parameter without a gradient gives zeros."""
    torch._foreach_copy_(places, [torch.zeros_like(p) if p.grad is None else p.grad for p in params])


class Collective:
    """Parameters and at most one collective operation on them in flight: reducing gradients or gathering updates."""

    work: Any = None

    def wait(self) -> None:
        """Waits until the operation in flight, if any, is complete; on a GPU only the CUDA stream waits."""
        if self.work is not None:
            self.work.wait()
            self.work = None


class MatrixBank(Collective):
    """Muon for all matrices of one shape (R, C), stacked; rank r owns the whole matrices in slots r n .. (r + 1) n, n = `owned`.

    The stack is padded with zero matrices to a multiple of the world size. The padding sits at the last ranks, so it
    never lengthens the step: the first rank is always full. Momentum lives on the owner alone.
    `dtype` is that of the Newton-Schulz products. Gradients are reduced in fp32 and updates return in the dtype they were
    computed in, so communication loses no accuracy.
    """

    def __init__(self, named: dict[str, nn.Parameter], run: Run, dtype: torch.dtype, cfg: Config):
        self.cfg = cfg
        self.names, self.params, self.run, self.dtype = list(named), list(named.values()), run, dtype
        rows, cols = self.params[0].shape
        self.owned = -(-len(self.params) // run.world)
        self.grads = torch.zeros(self.owned * run.world, rows, cols, device=run.device)
        self.shard = self.grads if run.world == 1 else torch.zeros(self.owned, rows, cols, device=run.device)
        self.momentum = torch.zeros_like(self.shard)
        aspect = math.sqrt(max(1.0, rows / cols))
        self.lr_mults = [p.lr_mult for p in self.params]
        self.scale = torch.tensor([m * aspect for m in self.lr_mults], device=run.device)[:, None, None]
        self.updates: Tensor | None = None

    def reduce(self) -> None:
        """Starts summing the gradients over the ranks; each rank receives the matrices it owns."""
        copy_grads(self.params, list(self.grads.unbind()[: len(self.params)]))
        if self.run.world > 1:
            self.work = reduce_scatter(self.shard, self.grads, async_op=True)

    def update(self, momentum: float) -> None:
        """Orthogonalises the owned matrices' Nesterov momentum and starts gathering the updates of all owners."""
        self.wait()
        self.momentum.mul_(momentum).add_(self.shard)
        self.shard.add_(self.momentum, alpha=momentum)
        if self.cfg.muon_row_normalize:  # MuonEq-R (#1285): rows of length 1; rows of zeros stay zeros
            self.shard.div_(torch.linalg.vector_norm(self.shard, dim=2, keepdim=True).clamp_min_(1e-7))
        self.updates = orthogonalize(self.shard, self.cfg.muon_backend_steps, self.dtype, self.cfg.newton_schulz)
        if self.run.world > 1:
            owned, self.updates = self.updates, self.updates.new_empty(self.grads.shape)
            self.work = all_gather(self.updates, owned, async_op=True)

    def apply(self, lr: float, weight_decay: float, order: str) -> None:
        """W <- W (1 - lr wd) - lr sqrt(max(1, R/C)) U, or with order "after" the decay acts on the sum of both."""
        self.wait()
        keep = [1.0 - lr * mult * weight_decay for mult in self.lr_mults]
        deltas = (self.updates[: len(self.params)] * (lr * self.scale)).unbind()
        self.updates = None
        if weight_decay > 0 and order == "before":
            torch._foreach_mul_(self.params, keep)
        torch._foreach_sub_(self.params, deltas)
        if weight_decay > 0 and order == "after":
            torch._foreach_mul_(self.params, keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Momentum of every matrix by name, gathered from its owner: all ranks must call it, all receive everything."""
        stack = self.momentum.clone()
        if self.run.world > 1:
            stack = torch.empty_like(self.grads)
            all_gather(stack, self.momentum)
        return dict(zip(self.names, stack.unbind(), strict=False))  # the rest is padding

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Keeps the owned part of what state_dict gave, at this or any other world size."""
        mine = self.names[self.run.rank * self.owned : (self.run.rank + 1) * self.owned]
        for slot, name in zip(self.momentum, mine, strict=False):
            slot.copy_(state[name])


class SmallParameters(Collective):
    """AdamW for every parameter that is not a matrix: one flat fp32 buffer of gradients is reduced; all ranks step alike."""

    def __init__(self, named: dict[str, nn.Parameter], rates: dict[str, float], cfg: Config, run: Run):
        self.names, self.params, self.run, self.cfg = list(named), list(named.values()), run, cfg
        sizes = [p.numel() for p in self.params]
        self.flat = torch.zeros(sum(sizes), device=run.device)
        self.grads = [g.view_as(p) for g, p in zip(self.flat.split(sizes), self.params, strict=True)]
        embed_wd = cfg.adam_wd if cfg.embed_wd < 0 else cfg.embed_wd
        self.groups: dict[tuple[float, float], list[int]] = {}  # (rate, decay) -> places of its parameters
        for i, p in enumerate(self.params):
            decay = cfg.adam_wd if p.role == "scalar" else embed_wd
            self.groups.setdefault((rates[p.role], decay), []).append(i)
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in ("exp_avg", "exp_avg_sq")]
        self.steps = [torch.zeros((), device=run.device) for _ in self.params]

    def reduce(self) -> None:
        """Starts summing the gradients over the ranks."""
        copy_grads(self.params, self.grads)
        if self.run.world > 1:
            self.work = dist.all_reduce(self.flat, async_op=True)

    def step(self, lr_scale: float) -> None:
        """One AdamW step on the reduced gradients."""
        self.wait()
        for (rate, decay), at in self.groups.items():
            columns = ([rows[i] for i in at] for rows in (self.params, self.grads, *self.moments))
            adamw(*columns, [], [self.steps[i] for i in at], lr=rate * lr_scale, weight_decay=decay, beta1=self.cfg.beta1,
                  beta2=self.cfg.beta2, eps=self.cfg.adam_eps, fused=True, amsgrad=False, maximize=False)  # fmt: skip

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Adam's buffers by parameter name."""
        rows = zip(self.names, self.steps, *self.moments, strict=True)
        return {name: {"step": step, "exp_avg": mean, "exp_avg_sq": square} for name, step, mean, square in rows}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """A copy of `state`."""
        return copy.deepcopy(self.state)

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes over what state_dict gave."""
        own = self.state
        for name, buffers in state.items():
            for key, buffer in buffers.items():
                own[name][key].copy_(buffer)


class Optimizers:
    """Muon for parameters of role "matrix", AdamW for the others; every trainable parameter has exactly one owner.

    Before `step`, each `p.grad` holds the sum over this rank's tokens of d nll / (tokens of the whole step), so that
    the sum over the ranks is the gradient of the mean. All ranks end a step with bit-identical weights.
    """

    def __init__(self, cfg: Config, model: nn.Module, run: Run):
        self.cfg, self.run = cfg, run
        embed_lr = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
        rates = {"embed": embed_lr, "head": cfg.head_lr, "scalar": cfg.scalar_lr}
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        small = {name: p for name, p in trainable.items() if getattr(p, "role", None) in rates}
        shapes: dict[torch.Size, dict[str, nn.Parameter]] = {}
        for name, p in trainable.items():
            if getattr(p, "role", None) == "matrix" and p.ndim == 2:
                shapes.setdefault(p.shape, {})[name] = p
        missing = trainable.keys() - small.keys() - {name for named in shapes.values() for name in named}
        assert not missing, f"no optimizer owns {sorted(missing)}"
        # Largest first: the longest reductions start earliest, and the gathering of the last bank, which overlaps with
        # no computation, is the shortest.
        banks = sorted(shapes.values(), key=lambda named: -sum(p.numel() for p in named.values()))
        self.banks = [MatrixBank(named, run, compute_dtype(cfg.train_dtype, run.device), cfg) for named in banks]
        self.small = SmallParameters(small, rates, cfg, run)

    @torch.no_grad()
    def step(self, step: int, lr_scale: float) -> None:
        """One optimizer step: `step` (from 0) sets Muon's momentum, `lr_scale` multiplies every learning rate."""
        cfg = self.cfg
        self.small.reduce()  # first, so that AdamW runs while the matrices' gradients are being reduced
        for bank in self.banks:
            bank.reduce()
        if cfg.grad_clip_norm > 0:
            self.clip(cfg.grad_clip_norm)
        self.small.step(lr_scale)
        start, warmup = cfg.muon_momentum_warmup_start, cfg.muon_momentum_warmup_steps
        momentum = muon_momentum(step, start, cfg.muon_momentum, warmup)
        for bank, previous in zip([*self.banks, None], [None, *self.banks], strict=True):
            if bank is not None:
                bank.update(momentum)
            if previous is not None:  # its updates were gathered while `bank` computed
                previous.apply(cfg.matrix_lr * lr_scale, cfg.muon_wd, cfg.muon_wd_order)

    def clip(self, limit: float) -> Tensor:
        """Scales the reduced gradient down to a global norm of `limit`; returns the norm it had (0-dim, on device)."""
        for part in (self.small, *self.banks):
            part.wait()
        squares = torch.zeros((), device=self.run.device)
        for bank in self.banks:
            squares += torch.linalg.vector_norm(bank.shard).square()
        if self.run.world > 1:
            dist.all_reduce(squares)
        norm = (squares + torch.linalg.vector_norm(self.small.flat).square()).sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([self.small.flat, *(bank.shard for bank in self.banks)], scale)
        return norm

    def zero_grad(self) -> None:
        """Sets every gradient to None."""
        for part in (self.small, *self.banks):
            for p in part.params:
                p.grad = None

    def state_dict(self) -> dict[str, dict]:
        """Everything a step depends on besides weights and gradients, whole on every rank; all ranks must call it."""
        momentum = {name: m for bank in self.banks for name, m in bank.state_dict().items()}
        return {"muon": momentum, "adam": self.small.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Continues from `state` bit for bit at the same world size, and to rounding at any other."""
        for bank in self.banks:
            bank.load_state_dict(state["muon"])
        self.small.load_state_dict(state["adam"])


# ==== 6 TRAINING ======================================================================================================

# ---- schedules: pure functions


def budget_frac(cfg: Config, step: int, elapsed: float, budget: float) -> float:
    """Fraction 0..1 of the training budget that is used: of the time or of the steps, whichever is further."""
    by_time = elapsed / budget if budget else 0.0
    by_steps = step / cfg.iterations if cfg.iterations else 0.0
    return min(max(by_time, by_steps), 1.0)


def lr_scale(cfg: Config, step: int, elapsed: float, budget: float) -> float:
    """Multiplier 0..1 on every learning rate at `step` (0-based) after `elapsed` of `budget` seconds (0: no limit).

    warmdown: flat, then linear to 0 over the last WARMDOWN_FRAC of the budget; without it over the last WARMDOWN_ITERS steps
    or, with a time limit, over the time they take at the measured pace; whichever of the two limits is nearer counts.
    wsd: flat to WSD_STABLE_FRAC, then cosine to 0. Never below MIN_LR.
    """
    frac, scale = budget_frac(cfg, step, elapsed, budget), 1.0
    if cfg.lr_schedule == "wsd":
        p = (frac - cfg.wsd_stable_frac) / max(1 - cfg.wsd_stable_frac, 1e-9)
        scale = 0.5 * (1 + math.cos(math.pi * min(max(p, 0.0), 1.0)))
    elif cfg.warmdown_frac:
        scale = (1.0 - frac) / cfg.warmdown_frac
    elif cfg.warmdown_iters:
        if cfg.iterations:
            scale = (cfg.iterations - step) / cfg.warmdown_iters
        if budget and step and elapsed:
            scale = min(scale, (budget - elapsed) / (cfg.warmdown_iters * elapsed / step))
    return min(max(scale, cfg.min_lr), 1.0)


def switches_at(cfg: Config, frac: float) -> dict[str, int]:
    """What changes in the course of the training, as it is at `frac` of the budget: the sequence length, and whether fake
    quantisation, the EMA and the loops are on."""
    return {"seq_len": next(t for end, t in cfg.seq_curriculum if frac < end or end >= 1.0),
            "qat": cfg.qat != "none" and frac >= cfg.qat_start_frac, "ema": cfg.ema_decay > 0 and frac >= cfg.ema_start_frac,
            "loop": cfg.num_loops > 0 and frac >= cfg.enable_looping_at}  # fmt: skip


# ---- averaging


class WeightAverage:
    """EMA and SWA of the weights, in fp32 on the device.

    EMA: e <- d e + (1 - d) w each step from EMA_START_FRAC of the budget, from the weights after its first step (published: from
    the initial ones, whose part in it is d^steps). SWA: plain mean, every SWA_EVERY steps while the learning-rate scale is
    below SWA_START_SCALE, of the weights (#187) or of the EMA (#850, which takes one after steps 1, 51, .. instead of 50, 100, ..).
    """

    def __init__(self, cfg: Config, model: nn.Module) -> None:
        self.cfg = cfg
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.ema: list[Tensor] = []
        self.swa: list[Tensor] = []
        self.swa_n = 0

    @torch.no_grad()
    def update(self, step: int, frac: float, scale: float) -> None:
        """Take in the weights after optimizer step `step` (0-based)."""
        cfg = self.cfg
        if switches_at(cfg, frac)["ema"]:
            self.ema = self.moved(self.ema, self.params, 1 - cfg.ema_decay)
        if cfg.swa_every and scale < cfg.swa_start_scale and (step + 1) % cfg.swa_every == 0:
            self.swa_n += 1
            source = self.ema or self.params if cfg.swa_source == "ema" else self.params
            self.swa = self.moved(self.swa, source, 1 / self.swa_n)

    def moved(self, mean: list[Tensor], new: list[Tensor], part: float) -> list[Tensor]:
        """The mean, moved in place by that part of the way to `new`; a copy of `new` where there is none yet."""
        if not mean:
            return [t.detach().clone() for t in new]
        torch._foreach_lerp_(mean, new, part)
        return mean

    @torch.no_grad()
    def apply(self) -> str:
        """Put the average in the model: EMA or weights, blended with SWA. Returns what it was, for the log."""
        base, blend = self.ema or self.params, self.cfg.swa_blend
        name = f"ema({self.cfg.ema_decay})" if self.ema else "last"
        if self.swa:
            base = torch._foreach_lerp(base, self.swa, blend)
            name = f"{1 - blend:g} {name} + {blend:g} swa({self.swa_n})"
        torch._foreach_copy_(self.params, base)
        return name

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema, "swa": self.swa, "swa_n": self.swa_n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        move = lambda ts: [t.to(p.device, copy=True) for t, p in zip(ts, self.params, strict=False)]  # noqa: E731
        self.ema, self.swa, self.swa_n = move(state["ema"]), move(state["swa"]), state["swa_n"]


# ---- complementary training


class BigramCounts:
    """Running counts C(a, b) of the training stream, which down-weight tokens that a bigram predicts (#803, #850).

    Weight of target b after a: max(0.1, 1 - alpha C(a, b) / (T(a) + 1)); 1 before anything is counted. Counted after the
    step (no look-ahead), never in evaluation. The step's counts are summed over ranks, so that the weights do not depend
    on their number (published: each rank counts the tokens it reads).
    """

    def __init__(self, cfg: Config, run: Run) -> None:
        self.cfg, self.run, self.vocab = cfg, run, cfg.vocab_size
        # Integers: an fp32 count stops growing at 2^24, which a frequent token passes within one run.
        self.pairs = torch.zeros(self.vocab * self.vocab, dtype=torch.int64, device=run.device)
        self.mean_weight = torch.ones((), device=run.device)  # of the last weights, for the log

    def weights(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(B, T) in [1 - alpha, 1]."""
        totals = self.pairs.view(self.vocab, self.vocab).sum(1)
        p = self.pairs[inputs * self.vocab + targets] / (totals[inputs] + 1)
        weights = (1 - self.cfg.complement_alpha * p).clamp_min(0.1)
        self.mean_weight = weights.mean()
        return weights

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Count this step's pairs."""
        keys = (inputs * self.vocab + targets).flatten()
        self.pairs += self.run.all_reduce(torch.zeros_like(self.pairs).index_add_(0, keys, torch.ones_like(keys)))

    def state_dict(self) -> dict[str, Tensor]:
        """The counts (V V), the same on every rank."""
        return {"pairs": self.pairs.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from these counts, at any world size."""
        self.pairs.copy_(state["pairs"])


# ---- n-grams of the training text, counted while training

HASHED_SIZES = {2: 2**20, 3: 2**21, 4: 2**21, 5: 2**20, 6: 2**19, 7: 2**19}  # order -> cells of its table (#1095)
HASHED_MULTIPLIERS = (36313, 27191, 51647, 81929, 131071, 196613, 262147)


def hash_sequence(tokens: Iterable[Tensor], multipliers: Iterable[int] = HASHED_MULTIPLIERS) -> Tensor:
    """h <- (h P_k + token_k) mod 2^32 over equally long columns of tokens, oldest first (#1095)."""
    h: Tensor | int = 0
    for multiplier, column in zip(multipliers, tokens, strict=False):
        h = (h * multiplier + column) & 0xFFFFFFFF
    return h


def count_cells(cells: Tensor, index: Tensor) -> None:
    """Add one to the int32 cell at each index (n,)."""
    cells.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))


class HashedNgrams:
    """Counts of every n-gram of orders 2 to 7 in the rows that are trained on, by the hash of the whole n-gram (#1095).

    No context is counted, so these are no conditional probabilities; only NGRAM_CLAIM=pr1095 reads them. On a GPU they are
    counted in a stream of their own beside the step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cells = {n: torch.zeros(size, dtype=torch.int32, device=run.device) for n, size in HASHED_SIZES.items()}
        self.stream = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None

    def count(self, rows_BT: Tensor) -> None:
        """Add the n-grams within each row."""
        width = rows_BT.shape[1]
        for n, cells in self.cells.items():
            h = hash_sequence(rows_BT[:, k : width - n + 1 + k] for k in range(n)).flatten()
            count_cells(cells, h & (len(cells) - 1))

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Count this rank's rows of the step: the inputs and the last target."""
        rows = torch.cat([inputs, targets[:, -1:]], dim=1)
        if self.stream is None:
            self.count(rows)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.count(rows)
        rows.record_stream(self.stream)

    def total(self) -> dict[int, np.ndarray]:
        """Order -> counts of all ranks, saturated to uint16; every rank must call it."""
        return {n: c.clamp(max=65535).cpu().numpy().astype(np.uint16) for n, c in self.state_dict().items()}

    def state_dict(self) -> dict[int, Tensor]:
        """Counts of all ranks; every rank must call it."""
        self.run.sync()
        return {n: self.run.all_reduce(cells.long()) for n, cells in self.cells.items()}

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        """Rank 0 goes on from all counts so far, the others from none: the sum is the same."""
        for n, cells in self.cells.items():
            cells.copy_(state[n] if self.run.rank == 0 else torch.zeros_like(cells))


class TrainResult(NamedTuple):
    """What training leaves behind, beside the weights, for calibration, the log and the account."""

    steps: int
    seconds: float
    reason: str
    micro_tokens: int  # tokens of a forward and backward pass that fitted
    cells: dict[int, np.ndarray] | None = None  # #1095's counts of all ranks


def training_budget(cfg: Config) -> float:
    """Seconds the loop may use (0: no limit): calibration is training too, so its reserve comes off."""
    return cfg.max_wallclock_seconds - cfg.reserved_seconds


# ---- checkpoints


# Knobs that may change between a checkpoint and its continuation: they do not change what is learned.
FREE_ON_RESUME = LOCAL_KNOBS | {"VAL_DROP_TAIL", "WARMUP_STEPS", "VAL_LOSS_EVERY", "TRAIN_LOG_EVERY"}
RAISED_ON_RESUME = ("ITERATIONS", "MAX_WALLCLOCK_SECONDS")  # 0: no limit
CHECKPOINT_KEYS = {"model", "step", "average", "position", "elapsed", "config"}


def binding_values(cfg: Config) -> dict[str, Any]:
    """Knobs that a resumed run must share with its checkpoint: those of sections 1 to 6 but for the free ones."""
    training = [*list(FIELDS)[: list(FIELDS).index("ATTN_BITS")], "NGRAM_TABLE"]
    return {n: getattr(cfg, n.lower()) for n in training if n not in FREE_ON_RESUME}


class Checkpoints:
    """Files logs/RUN_ID.ckpt/step_NNNNNN.pt, written whole by rank 0, the last CHECKPOINT_KEEP of them kept."""

    def __init__(self, cfg: Config, run: Run, identity: Mapping[str, str] | None = None) -> None:
        self.cfg, self.run, self.identity = cfg, run, dict(identity or {})  # of the training stream
        self.folder = run.log_path.with_suffix(".ckpt")
        self.damaged: list[str] = []  # newer ones that RESUME=auto could not read

    def save(self, step: int, state: dict[str, Any]) -> Path | None:
        """Write `state` as the checkpoint of `step`; returns its path, or None where it cannot be written.

        All ranks call it, rank 0 writes.
        """
        path: Path | None = self.folder / f"step_{step:06d}.pt"
        if self.run.rank == 0:
            try:
                atomic_write(path, self.packed(state))
                saved = [p for p in self.saved() if not p.is_dir()]
                # Later steps are of a run that was taken back, or that this one overwrites.
                for old in {*saved} - {*saved[: saved.index(path) + 1][-self.cfg.checkpoint_keep :]}:
                    old.unlink(missing_ok=True)
            except (ConfigError, BrokenRun, OSError) as e:
                self.run.report_lost("checkpoint", f"of step {step} ({e})")
                path = None
        return self.run.broadcast(path)

    def packed(self, state: dict[str, Any]) -> bytes:
        """A file of `state` and the knobs that it binds; removes what a process that was killed while it wrote has left."""
        for stale in self.folder.glob(".*.pt.*.partial"):
            if re.fullmatch(r"\.(step_[0-9]+|trained)\.pt\.[0-9]+\.partial", stale.name):
                stale.unlink(missing_ok=True)
        buffer = io.BytesIO()
        torch.save({**state, "config": binding_values(self.cfg), "identity": self.identity}, buffer)
        return buffer.getvalue()

    @contextlib.contextmanager
    def keep_weights(self, model: GPT, stream: TokenStream, result: TrainResult) -> Iterator[None]:
        """Where the body fails, however it does and on whatever rank, the trained weights are written as trained.pt, which RESUME
        packs and scores. The first rank that fails writes: the others may wait for it until they are killed."""
        try:
            yield
        except BaseException:
            self.run.graceful = True  # a second signal must not cut this short
            if self.run.is_first("kept"):
                cells = {n: torch.from_numpy(c.astype(np.int32)) for n, c in (result.cells or {}).items()}
                state = {"model": model.state_dict(), "step": result.steps, "average": {}, "position": stream.position,
                         "elapsed": result.seconds, "looped": model.looped, "finished": {**result._asdict(), "cells": cells}}  # fmt: skip
                path, _ = self.run.write_somewhere(self.folder / "trained.pt", self.packed(state))
                text = f"the trained weights are kept: RESUME={path} packs and scores them"
                say(f"notice: {text}") if self.run.rank else self.run.notice(text)
            raise

    def saved(self) -> list[Path]:
        """The checkpoints there are, step_<digits>.pt by their number; a copy under another name is none, and is left alone."""
        found = (p for p in self.folder.glob("step_*.pt") if re.fullmatch(r"step_[0-9]+\.pt", p.name))
        return sorted(found, key=lambda path: (int(path.stem[5:]), path.name))

    def find(self) -> Path | None:
        """The checkpoint that RESUME names, the newest that is whole for `auto` (None if there is none yet)."""
        if self.cfg.resume != "auto":
            if self.cfg.resume and not Path(self.cfg.resume).is_file():
                raise ConfigError(
                    f"RESUME={self.cfg.resume}: no such checkpoint; RESUME=auto takes the newest of RUN_ID"
                )
            return Path(self.cfg.resume) if self.cfg.resume else None
        for path in reversed(self.saved()):
            try:
                self.read(path)
                return path
            except ConfigError as e:
                self.damaged.append(str(e))
        if self.damaged:
            last = f"RESUME=auto: no checkpoint is left; remove {self.folder} to start anew"
            raise ConfigError("\n".join([*self.damaged, last]))
        return None

    def read(self, path: Path) -> dict[str, Any]:
        """The state in a file, data only, no code; ConfigError if it is damaged or none of ours."""
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if broken := archive.testzip():
                    raise ValueError(f"{broken} does not match its checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if missing := CHECKPOINT_KEYS - set(state):
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except Exception as e:
            why = f"{type(e).__name__}: {e}".splitlines()[0][:200]
            raise ConfigError(f"RESUME={path}: not a checkpoint of this script, or a damaged one ({why})") from None
        return {**state, "path": str(path)}

    def load(self) -> dict[str, Any] | None:
        """The state to continue from, the same on all ranks (they share the folder), or None.

        Raises ConfigError if the file is damaged, none of ours or belongs to another configuration.
        """
        path = self.run.on_first(self.find)
        if path is None:
            return None
        state, here = self.read(path), binding_values(self.cfg)
        other = [k for k, v in state["config"].items() if k in here and here[k] != v and not self.raised(state, k)]
        changed = [f"{k} was {as_text(state['config'][k])}, is {as_text(here[k])}" for k in other]
        if changed:
            raise ConfigError(f"RESUME={path}: made with another configuration: {'; '.join(changed)}")
        for name, sha256 in state.get("identity", {}).items():
            if self.identity.get(name, sha256) != sha256:
                raise ConfigError(f"RESUME={path}: made with other data: sha256 {sha256[:16]}, {name} has {self.identity[name][:16]}; "
                                  f"set {name} to what the run began with")  # fmt: skip
        return state

    def raised(self, state: dict[str, Any], name: str) -> bool:
        """True if `name` is a limit of the training that is higher here than in the checkpoint, whose training may go on."""
        was, now = (limit or math.inf for limit in (state["config"][name], getattr(self.cfg, name.lower())))
        return name in RAISED_ON_RESUME and now > was and "finished" not in state

    def notice_resumed(self, state: dict[str, Any]) -> None:
        """Say what the run continues from, what was passed over, and what a raised limit does to the schedule."""
        run, step, elapsed = self.run, state["step"], state["elapsed"]
        for text in self.damaged:
            run.notice(f"passed over {text.removeprefix('RESUME=')}")
        run.notice(f"resumed {state['path']} at step {step} after {elapsed:.1f}s of training")
        limits = {name: state["config"][name] for name in RAISED_ON_RESUME if self.raised(state, name)}
        if limits:
            was = dataclasses.replace(self.cfg, **{name.lower(): limit for name, limit in limits.items()})
            before, now = (lr_scale(cfg, step, elapsed, training_budget(cfg)) for cfg in (was, self.cfg))
            words = (f"{name} from {limit:g} to {getattr(self.cfg, name.lower()):g}" for name, limit in limits.items())
            run.notice(f"raised {' and '.join(words)}: the schedule follows the new end; lr_scale at step {step} was {before:.3f}, "
                       f"is {now:.3f}")  # fmt: skip


# ---- the step and the loop


COMPILE_PAYS_SECONDS = 300  # training that repays the compile on a CPU: 25 to 35 s for steps 13 to 20 % shorter


def wants_compile(cfg: Config, device: torch.device) -> tuple[bool, str]:
    """(whether to torch.compile, why)."""
    if cfg.compile != "auto":
        return cfg.compile == "1", f"COMPILE={cfg.compile}"
    if device.type == "cuda":
        return True, "a GPU"
    if not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        return False, "no C++ compiler was found"
    if not cfg.max_wallclock_seconds:
        return False, "no time limit tells whether it pays on a CPU; COMPILE=1 compiles"
    if cfg.max_wallclock_seconds < COMPILE_PAYS_SECONDS:
        return False, f"training for less than {COMPILE_PAYS_SECONDS} s does not repay compiling on a CPU"
    return True, "it pays at this training time"


def notice_failed_compile(run: Run, error: Exception) -> None:
    """Say that the compiler failed; the plain forward gives the same numbers."""
    run.notice(f"torch.compile failed ({str(error).splitlines()[0][:120]}); running eager")


def first_micro_batch(cfg: Config, device: torch.device) -> int:
    """Tokens of one forward on one rank that are tried first; out of memory halves them."""
    # A CPU gains nothing from more, and where it runs out of memory the system kills the process instead of telling it.
    first_try = 2**17 if device.type == "cuda" else 2**13
    return cfg.micro_batch_tokens or min(first_try, cfg.train_batch_tokens)


class Trainer:
    """Everything one training step touches. `train_step` is one optimizer step; the loop around it is `train`."""

    def __init__(self, cfg: Config, run: Run, model: GPT, stream: TokenStream) -> None:
        self.cfg, self.run, self.model = cfg, run, model
        self.batcher = Batcher(cfg, stream, run)
        self.optimizers = Optimizers(cfg, model, run)
        self.average = WeightAverage(cfg, model)
        self.counts = BigramCounts(cfg, run) if cfg.complement_alpha else None
        self.ngrams = HashedNgrams(run) if "pr1095" in cfg.ngram_tables else None
        counters = (("counts", self.counts), ("ngrams", self.ngrams))  # by their name in a checkpoint
        self.counters = {name: counter for name, counter in counters if counter is not None}
        self.fake_quant = FakeQuant(cfg.qat, cfg.qat_bits).to(run.device) if cfg.qat != "none" else None
        for p in model.parameters() if run.world > 1 else ():  # an initial QR or SVD may differ between machines
            dist.broadcast(p.data, src=0)
        self.forward: Callable[..., Tensor] = model
        self.micro_tokens = first_micro_batch(cfg, run.device)
        self.step = 0
        self.seq_len, self.changed_at = cfg.seq_curriculum[0][1], -cfg.seq_change_warmup_steps
        self.rewarm = 1.0  # factor on the learning rates after a change of length

    def compile(self) -> None:
        """Switch to the compiled forward, or say why not."""
        on, why = wants_compile(self.cfg, self.run.device)
        self.run.log(f"compile: {'on' if on else 'off'} ({why})")
        self.forward = torch.compile(self.model, dynamic=False) if on else self.model

    def context(self, frac: float) -> Ctx:
        """Context of a training forward at `frac` of the budget: fake quantisation once QAT has started, of sharpness 1 then, 16 at the end."""
        if not switches_at(self.cfg, frac)["qat"]:
            return Ctx()
        start = self.cfg.qat_start_frac
        self.fake_quant.sharpness.fill_(1.0 + 15.0 * ((frac - start) / max(1.0 - start, 1e-9)))
        return Ctx(fake_quant=self.fake_quant)

    def accumulate(self, inputs: Tensor, targets: Tensor, ctx: Ctx, weights: Tensor | None) -> Tensor:
        """Gradient and value of sum(weights * nll) / TRAIN_BATCH_TOKENS, one micro-batch after the other.

        Under DOC_MASK its rows are laid end to end, (1, B T), with segments of at most T tokens.
        """
        loss, longest = torch.zeros((), device=self.run.device), inputs.shape[1]
        rows = max(1, self.micro_tokens // longest)
        for i in range(0, len(inputs), rows):
            at = slice(i, i + rows)
            ids, following = inputs[at], targets[at]
            if self.cfg.doc_mask:
                # Found where the ids came from: asking a GPU how many there are would wait for it.
                expected = len(ids) * (1 + longest * self.batcher.bos_share)
                host = ids if ids.device.type == "cpu" else self.batcher.host[at]
                segments = find_segments(host.reshape(1, -1), longest, 1 << int(2 * expected).bit_length())
                moved = (upload(x, ids.device) for x in segments[:2])
                ids, following = ids.reshape(1, -1), following.reshape(1, -1)
                ctx = ctx._replace(segments=Segments(*moved, longest))
            nll = self.forward(ids, following, ctx)
            part = (nll if weights is None else nll * weights[at].view_as(nll)).sum() / self.cfg.train_batch_tokens
            part.backward()
            loss += part.detach()
        return loss

    def backward(self, inputs: Tensor, targets: Tensor, ctx: Ctx) -> Tensor:
        """Gradient of the step's mean loss over this rank's sequences; returns their part of that mean.

        Out of memory, it starts again with half the micro-batch; where the compiler fails, without it. No rank waits for
        another in here, so each may do so by itself.
        """
        weights = None if self.counts is None else self.counts.weights(inputs, targets)
        while True:
            self.optimizers.zero_grad()
            try:
                return self.accumulate(inputs, targets, ctx, weights)
            except torch.OutOfMemoryError:
                pass
            except torch._dynamo.exc.TorchDynamoException as e:
                notice_failed_compile(self.run, e)
                self.forward = self.model
                continue
            self.halve_micro_batch()  # out here, where the exception no longer holds the memory of the failed pass

    def train_step(self, frac: float, scale: float) -> Tensor:
        """One optimizer step on the next batch; returns this rank's part of the mean loss (0-dim, on the device).

        After a change of the sequence length the rates rise over SEQ_CHANGE_WARMUP_STEPS steps (#2014).
        """
        now, steps = switches_at(self.cfg, frac), self.cfg.seq_change_warmup_steps
        if now["seq_len"] != self.seq_len:
            self.seq_len, self.changed_at = now["seq_len"], self.step
        self.rewarm = min(1.0, (self.step - self.changed_at + 1) / steps) if steps else 1.0
        inputs, targets = self.batcher.next(self.seq_len)
        if self.cfg.num_loops:
            self.model.set_looped(now["loop"])
        loss = self.backward(inputs, targets, self.context(frac))
        self.optimizers.step(self.step, scale * self.rewarm)
        self.average.update(self.step, frac, scale)
        for counts in self.counters.values():
            counts.update(inputs, targets)
        self.step += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; every rank must call it."""
        return {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(), "step": self.step,
                "average": self.average.state_dict(), "position": self.batcher.stream.position,
                "curriculum": [self.seq_len, self.changed_at],
                **{name: counts.state_dict() for name, counts in self.counters.items()}}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict gave, to the same numbers."""
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.average.load_state_dict(state["average"])
        self.step, self.batcher.stream.position = state["step"], state["position"]
        self.seq_len, self.changed_at = state["curriculum"]
        for name, counts in self.counters.items():
            counts.load_state_dict(state[name])

    def prime(self) -> None:
        """Run WARMUP_STEPS steps of every graph the training will use, before the clock, and undo them completely.

        Compiles, allocates, and finds the micro-batch: halved on out-of-memory (the step stays the same).
        """
        state = self.state_dict()
        state["model"] = {name: w.clone() for name, w in state["model"].items()}
        qat_start = self.cfg.qat_start_frac if self.fake_quant is not None else 0.0
        loop_start = self.cfg.enable_looping_at if self.cfg.num_loops else 0.0
        fracs = sorted({0.0, qat_start, loop_start, *(end for end, _ in self.cfg.seq_curriculum[:-1])})
        started, steps = time.perf_counter(), max(self.cfg.warmup_steps, len(fracs)) if self.cfg.warmup_steps else 0
        for i in range(steps):
            self.train_step(fracs[i % len(fracs)], 1.0)
        self.run.sync()
        self.load_state_dict(state)
        if steps:
            seconds = time.perf_counter() - started
            self.run.log(f"primed: {steps} steps undone, {seconds:.1f}s, micro-batch {self.micro_tokens} tokens")

    def halve_micro_batch(self) -> None:
        """After an out-of-memory: half the micro-batch, on this rank alone (the data of a step do not change)."""
        seq = max(t for _, t in self.cfg.seq_curriculum)
        local = -(-self.cfg.train_batch_tokens // self.run.world)
        if self.cfg.micro_batch_tokens or min(self.micro_tokens, local) < 2 * seq:
            raise ConfigError(f"MICRO_BATCH_TOKENS={self.micro_tokens}: out of memory with {seq}-token sequences; use a smaller "
                              "model or TRAIN_SEQ_LEN")  # fmt: skip
        self.micro_tokens = min(self.micro_tokens, local) // 2 // seq * seq
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()


class StopConsensus:
    """Decides on all ranks alike, without stalling the device: off the CPU each step's flags are read one step later.

    Their copy to the host is queued right behind their step, and reading waits for that copy alone, not for the next step.

    Flags: [whether to stop, loss, rank 0's clock, and for each rank whether its loss is bad], summed over the ranks.
    `seconds` is that clock as last read: what several ranks schedule by, since their own clocks differ.
    """

    def __init__(self, run: Run, seconds: float = 0.0) -> None:
        self.run, self.late, self.seconds = run, int(run.device.type != "cpu"), seconds
        self.pending: list[tuple[int, Tensor, Any]] = []  # step, flags on the host, the event that completes their copy
        self.good: list[tuple[int, float]] = []  # the last (step, mean loss) that were finite

    def exchange(self, step: int, stop: bool, loss: Tensor, seconds: float) -> bool:
        """Send the flags of `step` with this rank's part of the mean loss; True if all ranks stop now."""
        flags = torch.zeros(3 + self.run.world, device=self.run.device)
        flags[0], flags[1], flags[2] = float(stop), loss, 0.0 if self.run.rank else seconds
        flags[3 + self.run.rank] = (~torch.isfinite(loss)).float()
        host = self.run.all_reduce(flags).to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if flags.is_cuda else None
        self.pending.append((step, host, copied))
        return self.read() if len(self.pending) > self.late else False

    def read(self) -> bool:
        """Whether the oldest flags not read yet ask to stop; BrokenRun names the step and ranks of a loss that is not finite."""
        step, flags, copied = self.pending.pop(0)
        if copied is not None:
            copied.synchronize()
        stop, loss, self.seconds, *bad = flags.tolist()
        if any(bad):
            ranks = ", ".join(str(rank) for rank, flag in enumerate(bad) if flag)
            good = ", ".join(f"step {s} loss {v:.4f}" for s, v in self.good) or "none"
            raise BrokenRun(f"loss is not finite at step {step} on rank {ranks}; last good: {good}; lower the rates")
        self.good = [*self.good[-2:], (step, loss)]
        return stop > 0


RECENT_STEPS = 20  # the slowest of them is the estimate for the next step


class TrainingLoop:
    """The loop around `train_step`: clock, schedule, stopping, validation, checkpoints, step lines."""

    def __init__(self, cfg: Config, run: Run, trainer: Trainer, checkpoints: Checkpoints,
                 validate: Callable[[GPT], tuple[float, float]]) -> None:  # fmt: skip
        self.cfg, self.run, self.trainer, self.checkpoints, self.validate = cfg, run, trainer, checkpoints, validate
        self.budget = training_budget(cfg)
        plans = trainer.model.plans.items()
        self.flops = {looped: flops_per_token(trainer.model, cfg.train_seq_len, plan) for looped, plan in plans}
        self.trained_flops = 0.0
        name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
        self.peak = next((v for k, v in PEAK_FLOPS.items() if k in name), None)
        self.was = {"seq_len": cfg.seq_curriculum[0][1], "qat": False, "ema": False, "loop": False}
        self.epoch = 0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds of the last steps
        self.profiler = None
        if cfg.profile and not run.rank:  # of four steps after a few have passed
            schedule = torch.profiler.schedule(wait=2, warmup=1, active=4, repeat=1)
            self.profiler = torch.profiler.profile(schedule=schedule, record_shapes=False)

    def run_until_done(self, elapsed: float, slowest: float = 0.0) -> TrainResult:
        """Train until the time or the steps are used up or a signal arrives; returns what the rest of the run needs.

        `elapsed` and `slowest` are of a checkpoint: its training time, and the slowest of the steps before it.
        """
        cfg, run, trainer = self.cfg, self.run, self.trainer
        self.clock, self.stop = Clock(run, elapsed), StopConsensus(run, elapsed)
        self.first_step = trainer.step
        self.first_elapsed = self.last_elapsed = elapsed
        self.first_frac = budget_frac(cfg, trainer.step, elapsed, self.budget)
        self.recent.append(slowest)
        over = self.past_limit(elapsed, slowest)  # a checkpoint of the last step leaves no time for another
        self.run.graceful, self.run.training_began, reason = True, True, "wallclock" if over else "iterations"
        if self.profiler:
            self.profiler.start()
        while not over and (not cfg.iterations or trainer.step < cfg.iterations):
            now = self.clock.seconds() if run.world == 1 else self.stop.seconds
            frac = budget_frac(cfg, trainer.step, now, self.budget)
            scale = lr_scale(cfg, trainer.step, now, self.budget)
            self.announce_switches(frac)
            loss = trainer.train_step(frac, scale)
            now = self.clock.seconds()
            self.recent.append(now - self.last_elapsed)
            self.last_elapsed = now
            stop = self.past_limit(now, max(self.recent)) or run.signal is not None
            stop = self.stop.exchange(trainer.step, stop, loss, now)
            self.after_step(loss, scale * trainer.rewarm)
            if stop:
                reason = "signal" if run.signal is not None else "wallclock"
                break
        run.sync()
        seconds = self.clock.seconds()
        while self.stop.pending:
            self.stop.read()
        self.stop_profiler()
        self.stop_for_signal(seconds)
        run.end_graceful()
        return TrainResult(trainer.step, seconds, reason, trainer.micro_tokens)

    def past_limit(self, now: float, step_s: float) -> bool:
        """True if the next step could pass the time limit, at so many seconds a step: those of the slowest recent one.

        On a CPU not to stop means one step more. Where flags are read a step late, the device has two steps to finish
        now, and a stop asked for after the next step comes after another two.
        """
        return 0 < self.budget < now + step_s * (4 if self.stop.late else 1)

    def after_step(self, loss: Tensor, scale: float) -> None:
        """Log, validate, save a checkpoint, advance profiler and progress bar, each where it is due after this step."""
        cfg, step = self.cfg, self.trainer.step
        self.trained_flops += cfg.train_batch_tokens * self.flops[self.trainer.model.looped]
        if step % cfg.train_log_every == 0 or step - self.first_step <= 10:
            self.log_step(loss, scale)
        if cfg.val_loss_every and step % cfg.val_loss_every == 0 and step != cfg.iterations:
            with self.clock.paused():
                self.report_validation(self.clock.total)
        if cfg.checkpoint_every and step % cfg.checkpoint_every == 0:
            with self.clock.paused():
                self.save(self.clock.total)
        if self.profiler:
            self.profiler.step()
        done = int(1000 * budget_frac(cfg, step, self.clock.seconds(), self.budget))
        self.run.progress(f"training step {step}", done, 1000, self.run.started)

    def log_step(self, loss: Tensor, scale: float) -> None:
        """One step line, with the mean loss over all ranks."""
        cfg, step = self.cfg, self.trainer.step
        mean = float(self.run.all_reduce(loss.clone()))
        now = self.clock.seconds()
        pace = (now - self.first_elapsed) / (step - self.first_step)
        rate = cfg.train_batch_tokens / pace
        mfu = self.trained_flops / ((now - self.first_elapsed) * self.peak * self.run.world) if self.peak else None
        frac = budget_frac(cfg, step, now, self.budget)
        eta = (now - self.first_elapsed) * (1 - frac) / max(frac - self.first_frac, 1e-6)
        line = (f"step:{step}/{cfg.iterations} train_loss:{mean:.4f} lr_scale:{scale:.3f} train_time:{1000 * now:.0f}ms "
                f"step_avg:{1000 * pace:.2f}ms tokens_per_s:{rate:.0f} mfu:{'n/a' if mfu is None else f'{mfu:.3f}'} eta:{eta:.0f}s")  # fmt: skip
        counts, extra = self.trainer.counts, {}
        if counts is not None:
            extra["complement_weight"] = float(self.run.all_reduce(counts.mean_weight.clone())) / self.run.world
            line += f" complement_weight:{extra['complement_weight']:.4f}"
        self.run.log(line)
        self.run.event("step", step=step, total=cfg.iterations, train_loss=mean, lr_scale=scale, train_s=now,
                       step_ms=1000 * pace, tokens_per_s=rate, mfu=mfu, eta_s=eta, **extra)  # fmt: skip

    def announce_switches(self, frac: float) -> None:
        """Log each change of sequence length, QAT, EMA and loops at this fraction of the budget, and each new pass over the data."""
        now = switches_at(self.cfg, frac)
        for name, new in now.items():
            if self.was[name] != new:
                self.run.log(f"switch:{name} step:{self.trainer.step} frac:{frac:.3f} value:{new}")
                self.run.event("switch", step=self.trainer.step, frac=frac, name=name, value=new)
        self.was = now
        epoch = self.trainer.batcher.stream.position // self.trainer.batcher.stream.total
        if epoch > self.epoch:
            self.epoch = epoch
            self.run.notice(f"epoch {epoch + 1} of the training data begins at step {self.trainer.step}")

    def report_validation(self, train_s: float) -> None:
        """Validate the current weights and log it."""
        (loss, bpb), step, total = self.validate(self.trainer.model), self.trainer.step, self.cfg.iterations
        self.run.log(f"step:{step}/{total} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1000 * train_s:.0f}ms")
        self.run.event("val", step=step, val_loss=loss, val_bpb=bpb, train_s=train_s)

    def save(self, elapsed: float) -> Path | None:
        """Write a checkpoint of this moment; None where it cannot be written."""
        state = {**self.trainer.state_dict(), "elapsed": elapsed, "slowest": max(self.recent)}
        path = self.checkpoints.save(self.trainer.step, state)
        if path is not None:
            self.run.event("checkpoint", step=self.trainer.step, path=str(path))
        return path

    def stop_for_signal(self, elapsed: float) -> None:
        """If a signal ended the loop: checkpoint if CHECKPOINT_EVERY asked for checkpoints, then leave."""
        number = torch.tensor(float(self.run.signal or 0), device=self.run.device)
        asked = self.run.all_reduce(number, dist.ReduceOp.MAX)
        if not asked:
            return
        where = "; no checkpoint was asked for"
        if self.cfg.checkpoint_every:
            path = self.save(elapsed)
            where = f"; saved {path}, go on with RESUME=auto" if path else "; its checkpoint could not be written"
        raise Interrupted(f"stopped by {signal.Signals(int(asked)).name} at step {self.trainer.step}{where}")

    def stop_profiler(self) -> None:
        """Write the trace beside the log."""
        if self.profiler is None:
            return
        self.profiler.stop()
        if self.profiler.profiler is None:
            self.run.notice(f"PROFILE=1: {self.trainer.step} steps are too few for a trace")
            return
        path = self.run.log_path.with_suffix(".trace.json")
        try:
            path.unlink(missing_ok=True)
            self.profiler.export_chrome_trace(str(path))
            with open(path, "rb") as f:  # torch does not tell when a trace could not be written
                f.seek(-8, os.SEEK_END)
                if not f.read().rstrip().endswith(b"}"):
                    raise OSError("it is not complete")
        except (OSError, RuntimeError) as e:
            self.run.report_lost("trace", f"{path} ({e})")
            return
        self.run.log(f"profile: {path} (open it in a Chrome trace viewer)")


def train(cfg: Config, run: Run, model: GPT, stream: TokenStream, checkpoints: Checkpoints, resumed: dict[str, Any] | None,
          validate: Callable[[GPT], tuple[float, float]]) -> TrainResult:  # fmt: skip
    """Train `model` in place until the budget ends; the averaged weights are in it afterwards, validated once more.

    `resumed` is a checkpoint's state to go on from. `validate` gives (nats a token, bits a byte) of the whole validation
    stream; its time is not counted.
    """
    if resumed is not None and "finished" in resumed:
        model.load_state_dict(resumed["model"])
        model.set_looped(resumed["looped"])
        stream.position, run.training_began = resumed["position"], True
        run.notice(f"{resumed['path']} is the result of a whole training; it is packed and scored as it is")
        result = TrainResult(**resumed["finished"])
        return result._replace(cells={n: c.numpy().astype(np.uint16) for n, c in result.cells.items()} or None)
    trainer, elapsed, slowest = Trainer(cfg, run, model, stream), 0.0, 0.0
    trainer.compile()
    trainer.prime()
    if resumed is not None:
        trainer.load_state_dict(resumed)
        elapsed, slowest = resumed["elapsed"], resumed.get("slowest", 0.0)
        checkpoints.notice_resumed(resumed)
    loop = TrainingLoop(cfg, run, trainer, checkpoints, validate)
    if cfg.lr_schedule == "warmdown" and not cfg.warmdown_frac and 0 < cfg.iterations < cfg.warmdown_iters:
        run.notice(f"WARMDOWN_ITERS={cfg.warmdown_iters} is longer than ITERATIONS={cfg.iterations}: "
                   "rates fall from the first step on")  # fmt: skip
    steps = f"{cfg.iterations} steps" if cfg.iterations else ""
    run.log("training ends after " + " or ".join(filter(None, (steps, f"{loop.budget:g}s" if loop.budget else ""))))
    result = loop.run_until_done(elapsed, slowest)
    if trainer.ngrams is not None:
        result = result._replace(cells=trainer.ngrams.total())
    with checkpoints.keep_weights(model, stream, result):
        what = trainer.average.apply()
    if cfg.num_loops and not model.looped:
        run.notice(f"the plain plan is scored: training ended before ENABLE_LOOPING_AT={cfg.enable_looping_at:g}")
    run.log(f"train_end steps:{result.steps} train_time:{1000 * result.seconds:.0f}ms reason:{result.reason} "
            f"weights:{what} peak_memory:{run.peak_memory_mib():.0f}MiB")  # fmt: skip
    run.event("train_end", steps=result.steps, train_s=result.seconds, reason=result.reason, weights=what,
              peak_memory_mib=run.peak_memory_mib())  # fmt: skip
    with checkpoints.keep_weights(model, stream, result):
        loop.report_validation(result.seconds)
    return result


# ==== 7 QUANTIZER =====================================================================================================

SCALE_EPS = 2.0**-24  # smallest fp16 number; only rows of zeros meet it


class LowRank(NamedTuple):
    """A rank-k matrix, the product of two factors of int8 codes times fp16 steps."""

    left: Tensor  # (R, k)
    left_scale: Tensor  # (1,)
    right: Tensor  # (k, C)
    right_scale: Tensor  # (k, G), a step for each `group` columns
    group: int

    def product(self) -> Tensor:
        """(R, C) fp32."""
        step_KC = self.right_scale.float().repeat_interleave(self.group, 1)[:, : self.right.shape[1]]
        return (self.left.float() * self.left_scale.float()) @ (self.right.float() * step_KC)


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor as the artifact keeps it: floats in `values`, or codes times a step by row and column. All parts lie on the CPU."""

    role: str
    bits: int  # 2..8: codes; 16, 32: values
    shape: tuple[int, ...]
    values: Tensor | None = None  # `shape`, fp16 or fp32
    codes: Tensor | None = None  # (R, C) int8, |code| <= 2**(bits-1) - 1; paths through a trellis: int16 of PATH_BITS
    scale: Tensor | None = None  # (R,) fp16, steps of the rows
    columns: Tensor | None = None  # (C,) int8, log2 of a column's step over the row's, in eighths; None: 0
    trellis: int = 0  # states of the trellis through which each row's codes are a path; 0: codes are independent
    low_rank: LowRank | None = None  # added to the codes' product


class ClipRule(NamedTuple):
    """How a row's clip is found; `quantiles` rise."""

    rule: str = "max"
    quantiles: tuple[float, ...] = (1.0,)
    sigmas: float = 12.0


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, C) under which a tensor of any rank is quantised: rows are its first axis, a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def matrix_of(w: Tensor) -> Tensor:
    """A tensor as the (R, C) fp32 that is quantised."""
    return w.detach().float().reshape(rows_and_columns(w.shape))


def octave_eighths(n: Tensor) -> Tensor:
    """2**(n/8) in fp32, the same on every machine: the power is rounded from float64."""
    return torch.exp2(n.double() / 8).float()


def dequantize(stored: QuantizedTensor) -> Tensor:
    """The fp32 tensor that `stored` stands for, exactly as training-side checks and the reloaded model see it."""
    if stored.values is not None:
        return stored.values.float()
    w_RC = stored.codes.float() * stored.scale.float()[:, None]
    if stored.columns is not None:
        w_RC *= octave_eighths(stored.columns)
    if stored.low_rank is not None:
        w_RC = w_RC + stored.low_rank.product()
    return w_RC.reshape(stored.shape)


def largest_code(bits: int) -> int:
    """Codes of `bits` bits run from -top to top: symmetric, so that zero is a code and signs cost the same."""
    return 2 ** (bits - 1) - 1


def row_scale(clip_R: Tensor, top: int) -> Tensor:
    """Step of each row, rounded to fp16 as the file keeps it: codes must be computed with the decoder's own step."""
    return (clip_R / top).clamp(SCALE_EPS, 65504.0).half()


def nearest_codes(x_RC: Tensor, top: int) -> Tensor:
    """The code next to each weight in steps, clamped to +-top: int8."""
    return x_RC.round().clamp(-top, top).to(torch.int8)


def row_quantiles(w_RC: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """(Q, R) quantiles of |row| with linear interpolation; torch.quantile refuses tensors above 16 M elements."""
    sorted_RC = w_RC.abs().sort(dim=1).values
    at_Q = torch.tensor(quantiles, dtype=torch.float64) * (w_RC.shape[1] - 1)
    low_Q = at_Q.floor().long()
    high_Q = at_Q.ceil().long()
    part_Q = (at_Q - low_Q).to(w_RC)
    return torch.lerp(sorted_RC[:, low_Q.to(w_RC.device)], sorted_RC[:, high_Q.to(w_RC.device)], part_Q).T


def clipped_scale(w_RC: Tensor, bits: int, clip: ClipRule) -> Tensor:
    """Step of each row (R,) fp16, whose largest code then stands for the weight at which `clip` cuts the row.

    `row` and `tensor` take the quantile with the least squared error, each row its own (GPTQ-lite, PR #414) or one for all (PR #187).
    `sigma`: so many sample standard deviations of the row about its mean (PR #1394), at least its root mean square, which only rows of
    nearly equal weights meet. At 11 to 14 deviations nothing is clipped: sigmas / top is the step, and an entropy coder makes it a rate.
    """
    top = largest_code(bits)
    if clip.rule == "max":
        return row_scale(w_RC.abs().amax(dim=1), top)
    if clip.rule == "sigma":
        deviation_R = w_RC.std(dim=1) if w_RC.shape[1] > 1 else torch.zeros_like(w_RC[:, 0])
        return row_scale(torch.maximum(clip.sigmas * deviation_R, w_RC.square().mean(dim=1).sqrt()), top)
    scales_QR = row_scale(row_quantiles(w_RC, clip.quantiles), top)
    if clip.rule == "quantile":
        return scales_QR[-1]
    steps = [scale_R.float()[:, None] for scale_R in scales_QR]
    errors_QR = torch.stack([(nearest_codes(w_RC / step, top) * step - w_RC).square().sum(dim=1) for step in steps])
    best_1R = errors_QR.sum(1).argmin().expand(1, len(w_RC)) if clip.rule == "tensor" else errors_QR.argmin(0)[None]
    return scales_QR.gather(0, best_1R)[0]


class Policy:
    """Bits and clip of every tensor: QUANT_OVERRIDES by name, else fp16 where small, else <ROLE>_BITS by its role."""

    def __init__(self, cfg: Config, named: Mapping[str, Tensor], store: Mapping[str, str]):
        self.cfg, self.named, self.store = cfg, named, store
        self.overrides: list[tuple[str, int]] = []  # (shell pattern over names without ".weight", bits)
        sites = [name.removesuffix(".weight") for name in named]
        for item in filter(None, listed(cfg.quant_overrides)):
            pattern, _, bits = (part.strip() for part in item.partition("="))
            if not bits.isdigit() or int(bits) not in WIDTHS:
                raise ConfigError(f"QUANT_OVERRIDES item {item!r}: expected name=bits with bits one of {WIDTHS}")
            if not fnmatch.filter(sites, pattern):
                known = ", ".join(sorted(sites)[:3])
                raise ConfigError(f"QUANT_OVERRIDES item {item} matches no parameter (they are {known}, ...)")
            self.overrides.append((pattern, int(bits)))

    @classmethod
    def of(cls, cfg: Config, model: nn.Module) -> Policy:
        """The policy of a model's parameters; raises ConfigError for what can only be found wrong once there is a model."""
        params = dict(model.named_parameters())
        policy = cls(cfg, params, {n: p.store for n, p in params.items()})
        if cfg.target_bytes:
            floats = sum(p.numel() * policy.bits(n) // 8 for n, p in params.items() if policy.bits(n) > 8)
            if all(policy.bits(n) > 8 for n in params):
                raise ConfigError(f"TARGET_BYTES={cfg.target_bytes} finds no tensor to code: all are kept as floats "
                                  f"(*_BITS, or QUANT_MIN_NUMEL={cfg.quant_min_numel})")  # fmt: skip
            if floats > cfg.target_bytes:
                raise ConfigError(f"TARGET_BYTES={cfg.target_bytes}: tensors that are kept as floats take {floats} bytes alone; "
                                  f"lower their *_BITS or QUANT_MIN_NUMEL={cfg.quant_min_numel}")  # fmt: skip
        return policy

    def bits(self, name: str) -> int:
        """Width of the tensor `name`."""
        for pattern, bits in self.overrides:
            if fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern):
                return bits
        bits = getattr(self.cfg, f"{self.store[name]}_bits")
        return max(bits, 16) if self.named[name].numel() <= self.cfg.quant_min_numel else bits

    def clip(self, name: str) -> ClipRule:
        """Clip rule of the tensor `name`."""
        role = self.store[name]
        sigmas = getattr(self.cfg, f"{role if role in ('attn', 'mlp', 'embed') else 'matrix'}_clip_sigmas")
        return ClipRule(self.cfg.quant_clip, self.cfg.quantiles, sigmas)


def pass_through(policy: Policy, name: str) -> QuantizedTensor:
    """Keep a tensor as fp16 or fp32; a value that fp16 cannot hold is an error, not an infinity."""
    w, bits = policy.named[name], policy.bits(name)
    values = w.to(torch.float16 if bits == 16 else torch.float32).cpu()
    if not torch.isfinite(values).all():
        site = name.removesuffix(".weight")
        raise ConfigError(f"{name} has values that fp16 cannot hold: store it with QUANT_OVERRIDES={site}=32")
    return QuantizedTensor(policy.store[name], bits, tuple(w.shape), values=values.contiguous())


# ---- GPTQ


class Hessians:
    """Tap of the forward pass that sums x^T x of every site: (C, C) fp32, proportional to the layer's output Hessian.

    All uses of a weight add up, as with looped blocks; sites that are handed the very same tensor (q, k, v) share a sum.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}  # site -> the site that holds its sum
        self.last: tuple[str, Tensor | None] = ("", None)

    def __call__(self, site: str, x: Tensor) -> None:
        if x is self.last[1]:
            assert self.owner.setdefault(site, self.last[0]) == self.last[0], f"{site} no longer shares its input"
            return
        flat_NC = x.detach().reshape(-1, x.shape[-1]).float()
        owner = self.owner.setdefault(site, site)
        if owner not in self.sums:
            self.sums[owner] = flat_NC.new_zeros(flat_NC.shape[1], flat_NC.shape[1])
        self.sums[owner].addmm_(flat_NC.T, flat_NC)
        self.last = (owner, x)

    def reduced(self, all_reduce: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Sums over all ranks by site; `all_reduce` adds a tensor up in place."""
        self.last = ("", None)
        for name in sorted(self.sums):
            all_reduce(self.sums[name])
        return {site: self.sums[owner] for site, owner in self.owner.items()}


class GptqFactors(NamedTuple):
    """GPTQ's view of the second moments of C inputs, columns as they stand."""

    order_C: Tensor  # the columns in the order in which they are coded
    dead_C: Tensor  # columns whose input is always 0
    spread_CC: Tensor  # fp64, by rows up to a factor: what an error moves the columns after it by, to make up for it
    weight_C: Tensor  # what a squared error in a column then still costs, on average 1
    gain: float  # that average, relative to what errors cost if no column makes up for them

    def to(self, device: Any) -> GptqFactors:
        """The same on another device."""
        return GptqFactors(*(part.to(device) for part in self[:4]), self.gain)

    @property
    def feedback_CC(self) -> Tensor:
        """fp32 with a diagonal of 1: what an error in a column moves the others by."""
        return (self.spread_CC / self.spread_CC.diagonal()[:, None]).float()

    def in_steps(self, columns_C: Tensor) -> GptqFactors:
        """The same for weights that are divided by the steps of their columns."""
        step_C = octave_eighths(columns_C)
        weight_C = self.weight_C * step_C.square()
        mean, spread_CC = weight_C.mean(), self.feedback_CC * step_C[:, None] / step_C
        return self._replace(spread_CC=spread_CC, weight_C=weight_C / mean, gain=self.gain * float(mean))


def gptq_factors(h_CC: Tensor, damp: float, variant: str, order: str = "natural") -> GptqFactors:
    """What (C, C) second moments, in any unit, mean to GPTQ: of H + damp * mean(diag) I, in float64.

    `order`: inputs of most energy first (`descending`), last (`ascending`), or as they stand (`natural`). `variant`: `cholesky` is
    the algorithm of arXiv 2210.17323; `pr850` repeats the published script, which takes rows of the full inverse: errors then
    land with coefficients of a problem in which no column is fixed yet. A dead input's errors cost next to nothing.
    """
    h_CC = h_CC.to(torch.float64, copy=True)
    diagonal_C = h_CC.diagonal()
    dead_C = diagonal_C <= 0
    diagonal_C += torch.where(dead_C, 1.0 - diagonal_C, (damp * diagonal_C.mean()).clamp_min(1e-30))
    key_C = torch.zeros_like(diagonal_C) if order == "natural" else diagonal_C
    order_C = key_C.argsort(descending=order == "descending", stable=True)
    back_C = order_C.argsort()
    # U^T U = H^-1 from one Cholesky factor read backwards, R R^T = H, and one triangular inverse.
    r_CC = torch.linalg.cholesky(h_CC[order_C][:, order_C].flip(0, 1)).flip(0, 1)
    u_CC = torch.linalg.solve_triangular(r_CC, torch.eye(len(r_CC)).to(r_CC), upper=True)
    weight_C = u_CC.diagonal().square().reciprocal()[back_C]
    weight_C = torch.where(dead_C, 1e-3 * weight_C[~dead_C].mean().nan_to_num(1.0), weight_C)
    spread_CC = (u_CC if variant == "cholesky" else u_CC.T @ u_CC)[back_C][:, back_C]
    mean = weight_C.mean()
    return GptqFactors(order_C, dead_C, spread_CC, (weight_C / mean).float(), float(mean / diagonal_C.mean()))


def gptq(w_NRC: Tensor, scale_NR: Tensor, factors: list[GptqFactors], top: int, block: int = 128) -> Tensor:
    """Codes (N, R, C) int8 of N equal shapes that minimise tr(E H E^T) greedily: each column's rounding error is spread over the
    columns not yet rounded (arXiv 2210.17323)."""
    order_NC, dead_NC = (torch.stack(part) for part in list(zip(*factors, strict=True))[:2])
    u_NCC = torch.stack([f.spread_CC[f.order_C][:, f.order_C].float() for f in factors])
    as_rows = order_NC[:, None, :].expand_as(w_NRC)
    w_NRC = w_NRC.masked_fill(dead_NC[:, None, :], 0.0).gather(2, as_rows)
    codes_NRC = torch.empty_like(w_NRC)
    for lo in range(0, w_NRC.shape[2], block):
        hi = min(lo + block, w_NRC.shape[2])
        error_NRB = torch.empty_like(w_NRC[:, :, lo:hi])
        for j in range(lo, hi):
            codes_NRC[:, :, j] = (w_NRC[:, :, j] / scale_NR).round().clamp(-top, top)
            error_NR = (w_NRC[:, :, j] - codes_NRC[:, :, j] * scale_NR) / u_NCC[:, j, j, None]
            w_NRC[:, :, j + 1 : hi].baddbmm_(error_NR[:, :, None], u_NCC[:, j, None, j + 1 : hi], alpha=-1)
            error_NRB[:, :, j - lo] = error_NR
        w_NRC[:, :, hi:].baddbmm_(error_NRB, u_NCC[:, lo:hi, hi:], alpha=-1)
    return torch.empty_like(codes_NRC).scatter_(2, as_rows, codes_NRC).to(torch.int8)


# ---- dependent quantization
#
# A row's codes are a path through a trellis, column by column. A state allows even codes or odd ones, and these lead by
# turns to its two next states: each state rounds with a step of 2, all states together with a step of 1. At equal rate the
# error is about 1 dB smaller than that of independent codes (Fischer and Wang 1992; JPEG 2000 part 2; VVC). Any codes of the
# right parities are a path. With the steps of columns chosen below, the order of columns does not matter, so it is natural.

MIN_TRELLIS_ROWS, MAX_TRELLIS_COLUMNS = 16, 1 << 16  # a vector's codes stay independent: all rows take a column at once
SURVIVORS_AT_ONCE = {"cpu": 2**14, "cuda": 2**19}  # rows times states that are searched together
RATE_PRICE = 0.45  # squared error, in steps^2, that a bit is worth: flat from 0.3 to 0.6 at 2 bits and more
COLUMN_RANGE = (-32, 32)  # steps of columns are up to 4 octaves finer or coarser than a tensor's
PATH_BITS = 12  # of a code: fine steps of rows, of columns and of a trellis multiply, and 8 bits would widen the finest

# By number of states: the bits of a state whose sum is odd where odd codes are allowed, and those whose sum flips the bit
# that is shifted in: the codes of greatest distance of Ungerboeck 1982 (IEEE IT-28). 64 states gain .17 dB over 8.
TRELLISES = {4: (0b1, 0b10), 8: (0b1, 0b110), 64: (0b1010, 0b100001)}


def trellis_states(states: int, shape: tuple[int, ...]) -> int:
    """`states`, or 0 for the shape of a tensor whose codes stay independent."""
    rows, columns = rows_and_columns(shape)
    return states if rows >= MIN_TRELLIS_ROWS and columns <= MAX_TRELLIS_COLUMNS else 0


@functools.cache
def trellis_bits(states: int) -> np.ndarray:
    """(2, S) uint8: whether each state allows odd codes, not even ones; whether it flips the bit that is shifted in."""
    return np.array([[(s & bits).bit_count() & 1 for s in range(states)] for bits in TRELLISES[states]], np.uint8)


def next_state(state: Any, code: Any, states: int) -> Any:
    """State after `code` in `state`, for numbers and integer arrays: the code's bit 1 is shifted in, flipped or not. Every row
    starts in state 0."""
    return (2 * state + ((code >> 1 & 1) ^ trellis_bits(states)[1][state])) % states


def column_steps(weight_C: Tensor) -> Tensor:
    """(C,) int8, log2 in eighths: steps with which an error of one step costs the same in every column.

    Equal steps cost the arithmetic mean of the columns' weights, these their geometric mean, at the same rate: reverse
    water-filling. The product of the weights is det H, whatever the order of columns.
    """
    octaves_C = -0.5 * weight_C.double().log2()
    return (8 * (octaves_C - octaves_C.mean())).round().clamp(*COLUMN_RANGE).to(torch.int8)


class TrellisSearch:
    """Viterbi search for the paths of N matrices (R, C) through a trellis of S states, each survivor with its own weights.

    `x_NRC` are weights in steps. A column costs its squared error times its weight in `factors`, and RATE_PRICE times the bits of its
    code, taken from a Gaussian of the row's and the column's power (`power_NC`, where these rows are only a part). A code's error
    moves the columns after it as `factors` say (None: not at all, and columns weigh the same). Errors of the last DELAY columns are
    kept for every survivor. Those before are the best survivor's, and survivors of another past are dropped. At 64 states that
    costs up to .03 dB, with a DELAY of 32 columns .17 dB.
    """

    BLOCK, DELAY = 32, 96  # columns
    DROPPED = 1e30  # cost of a path that is out

    @torch.no_grad()
    def __init__(self, x_NRC: Tensor, factors: list[GptqFactors] | None, states: int, power_NC: Tensor | None = None):
        self.x_NCR, self.feedback_NCC, self.states = x_NRC.transpose(1, 2).clone(), None, states
        x_NCR, weight_NC = self.x_NCR, x_NRC.new_ones(x_NRC.shape[::2])
        n, columns, rows = x_NCR.shape
        if factors is not None:
            self.feedback_NCC = torch.stack([f.feedback_CC for f in factors])
            weight_NC = torch.stack([f.weight_C for f in factors])
        power_NC = (x_NRC.square().mean(dim=1) if power_NC is None else power_NC) + 0.1
        power_NR = (x_NCR.square() / power_NC[:, :, None]).mean(dim=1) + 0.1
        bit_price = RATE_PRICE / (2 * math.log(2))
        self.price_NCR = ((bit_price / (power_NC * weight_NC))[:, :, None], power_NR.reciprocal()[:, None])
        self.ratio_NC = torch.cat([torch.ones_like(weight_NC[:, :1]), weight_NC[:, :-1] / weight_NC[:, 1:]], dim=1)
        # Transitions are (source's half, source within it, which of its two next states): both sources of next state 2 i + o
        # are the states i and i + S/2.
        odd, flips = torch.from_numpy(trellis_bits(states)).view(2, 1, 2, states // 2, 1, 1)
        self.least = (odd + 2 * (torch.arange(2)[:, None] ^ flips)).to(x_NCR)
        self.cost_NSR = x_NCR.new_full((n, states, rows), self.DROPPED)
        self.cost_NSR[:, 0] = 0
        self.codes_CNSR = torch.empty((columns, n, states, rows), dtype=torch.int16, device=x_NCR.device)
        self.upper_CNSR = torch.empty((columns, n, states, rows), dtype=torch.bool, device=x_NCR.device)
        self.error_ANSR, self.first = x_NCR.new_empty((0, n, states, rows)), 0  # undecided errors, from column `first`

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(N, R, C) int16: the path of least cost of each row."""
        n, columns, rows = self.x_NCR.shape
        for lo in range(0, columns, self.BLOCK):
            hi = min(lo + self.BLOCK, columns)
            self.advance(lo, hi)
            if self.feedback_NCC is not None and hi < columns:
                self.decide(hi)
            self.cost_NSR -= self.cost_NSR.amin(dim=1, keepdim=True)
        at_N1R = self.cost_NSR.argmin(dim=1, keepdim=True)
        found_NCR = torch.empty((n, columns, rows), dtype=torch.int16, device=self.x_NCR.device)
        for j in range(columns - 1, -1, -1):
            found_NCR[:, j] = self.codes_CNSR[j].gather(1, at_N1R)[:, 0]
            at_N1R = (at_N1R >> 1) + self.states // 2 * self.upper_CNSR[j].gather(1, at_N1R)
        return found_NCR.transpose(1, 2).contiguous()

    def advance(self, lo: int, hi: int) -> None:
        """Extend all survivors through columns lo..hi, each with what its own errors moved these columns by.

        `slots` hold, for every survivor, the errors of the columns it has passed, the targets of those to come, and the
        state in which it was before `lo`: one merge of all is cheaper than going back for them.
        """
        (n, _, rows), width = self.x_NCR.shape, hi - lo
        price_NBR = self.price_NCR[0][:, lo:hi] * self.price_NCR[1]
        shrinks_NBR, roots_NBR = 0.25 / (1 + price_NBR), price_NBR.sqrt()
        if self.feedback_NCC is None:
            for j in range(width):
                target_NSR = self.x_NCR[:, lo + j, None].expand_as(self.cost_NSR)
                self.step(lo + j, target_NSR, shrinks_NBR[:, j], roots_NBR[:, j])
            return
        slots = self.x_NCR.new_empty((width + 1, n, self.states, rows))
        slots[:width] = self.x_NCR[:, lo:hi].transpose(0, 1)[:, :, None]
        slots[width] = torch.arange(self.states, device=slots.device)[:, None]
        feedback_NBA = self.feedback_NCC[:, self.first : lo, lo:hi].transpose(1, 2)
        moved_NBX = feedback_NBA @ self.error_ANSR.transpose(0, 1).flatten(2)
        slots[:width] -= moved_NBX.view(n, width, self.states, rows).transpose(0, 1)
        for j in range(width):
            code, upper = self.step(lo + j, slots[j], shrinks_NBR[:, j], roots_NBR[:, j])
            sources = slots.unflatten(2, (2, -1, 1))
            slots = torch.lerp(sources[:, :, 0], sources[:, :, 1], upper).flatten(2, 3)
            slots[j] -= code
            feedback_BN = self.feedback_NCC[:, lo + j, lo + j + 1 : hi].T
            slots[j + 1 : width].addcmul_(feedback_BN[:, :, None, None], slots[j], value=-1)
        origin_X = (slots[width].long() * rows + torch.arange(rows, device=slots.device)).flatten(1)
        origin_X = (origin_X + torch.arange(n, device=slots.device)[:, None] * self.states * rows).flatten()
        before = self.error_ANSR.flatten(1).index_select(1, origin_X).view_as(self.error_ANSR)
        self.error_ANSR = torch.cat([before, slots[:width]])

    def step(self, j: int, target_NSR: Tensor, shrink_NR: Tensor, root_NR: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the cheaper way into each state at column j: its code (N, S, R), and 1 where it comes from the upper half, else
        0 (N, S/2, 2, R). Arithmetic chooses, several times as fast as torch.where."""
        target = target_NSR.unflatten(1, (2, -1, 1))
        code = torch.sub(target * shrink_NR[:, None, None, None], self.least / 4)
        most = largest_code(PATH_BITS) // 4
        code = code.round_().clamp_(-most, most).mul_(4).add_(self.least)
        priced = code * root_NR[:, None, None, None]
        cost = (target - code).square_().addcmul_(priced, priced)
        cost += (self.cost_NSR * self.ratio_NC[:, j, None, None]).unflatten(1, (2, -1, 1))
        upper = (cost[:, 0] - cost[:, 1]).sign_().clamp_(min=0)
        self.cost_NSR = torch.minimum(cost[:, 0], cost[:, 1]).flatten(1, 2)
        code = torch.lerp(code[:, 0], code[:, 1], upper).flatten(1, 2)
        self.codes_CNSR[j], self.upper_CNSR[j] = code, upper.flatten(1, 2)
        return code, upper

    def decide(self, hi: int) -> None:
        """Settle the errors of all columns but the last DELAY before `hi`, and move the columns from `hi` on by them."""
        old = (len(self.error_ANSR) - self.DELAY) // self.BLOCK * self.BLOCK
        if old <= 0:
            return
        errors, best_N1R = self.error_ANSR[:old], self.cost_NSR.argmin(dim=1, keepdim=True)
        decided = errors.gather(2, best_N1R.expand(old, *best_N1R.shape))
        self.cost_NSR.masked_fill_((errors != decided).any(dim=0), self.DROPPED)
        feedback_NBC = self.feedback_NCC[:, self.first : self.first + old, hi:].transpose(1, 2)
        self.x_NCR[:, hi:].baddbmm_(feedback_NBC, decided[:, :, 0].transpose(0, 1), alpha=-1)
        self.error_ANSR, self.first = self.error_ANSR[old:], self.first + old


# ---- calibration


@torch.no_grad()
def sample_text(model: GPT, length: int, seed: int, temperature: float = 0.8) -> Tensor:
    """(1, length) ids: BOS and what the model writes after it."""
    device = model.tok_emb.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(model.cfg, 1, length, device, model.compute_dtype)
    ids = [torch.full((1, 1), BOS, device=device)]
    for _ in range(1, length):
        p = (model.logits(model.features(ids[-1], Ctx(cache=cache))[:, -1]) / temperature).softmax(-1)
        ids.append(torch.multinomial(p, 1, generator=generator))
    return torch.cat(ids, dim=1)


def calibration_inputs(cfg: Config, run: Run, stream: TokenStream, most_tokens: int = 2**16) -> Iterator[Tensor]:
    """This rank's part of GPTQ_N_SAMPLES sequences (B, TRAIN_SEQ_LEN): even windows of the training data.

    A batch has at most `most_tokens` tokens or one sequence; a rank without any takes the first sequence.
    """
    length, mine = cfg.train_seq_len, run.share(cfg.gptq_n_samples) or range(1)
    rows = max(1, min(most_tokens, 2**16 if run.device.type == "cuda" else 2**12) // length)
    for lo in range(mine.start, mine.stop, rows):
        batch = range(lo, min(lo + rows, mine.stop))
        starts = [i * (stream.total - length) // cfg.gptq_n_samples - stream.position for i in batch]
        yield torch.from_numpy(np.stack([stream.read(start, length) for start in starts])).to(run.device)


def while_time(batches: Iterable[Tensor], seconds: float, run: Run) -> Iterator[Tensor]:
    """`batches` until one more, as slow as the slowest so far, would end after `seconds`; the first always comes."""
    started = before = time.perf_counter()
    slowest = 0.0
    for batch in batches:
        yield batch
        run.sync()
        now = time.perf_counter()
        slowest, before = max(slowest, now - before), now
        if now - started + slowest > seconds:
            return


class Calibration(NamedTuple):
    """What quantisation learns from calibration text, summed over all ranks."""

    hessians: dict[str, Tensor]  # site -> (C, C) second moments of its input
    fisher: dict[str, Tensor]  # parameter -> (R,) trace of its Fisher information by row, a token
    tokens: int = 0  # of the text


def calibrate(cfg: Config, run: Run, model: GPT, batches: Iterable[Tensor]) -> Calibration:
    """Walk calibration text once through the one forward path.

    Fisher information (only for TARGET_BYTES) is the squared gradient of log p(y) with y drawn from the model itself:
    such scores of different tokens are uncorrelated, so the square of a whole batch's gradient estimates their sum. Every row counts
    the mean token's once more than it was seen: a table's rows that this text lacks matter too.
    """
    tap, tokens = Hessians(), torch.zeros((), dtype=torch.int64, device=run.device)
    asked = model.named_parameters() if cfg.target_bytes else ()
    fisher = {n: torch.zeros(rows_and_columns(p.shape)[0], device=run.device) for n, p in asked}
    generator = torch.Generator(run.device).manual_seed(derive_seed(cfg.seed, "fisher", run.rank))
    ctx = Ctx(tap=tap if cfg.gptq_enabled else None)
    for inputs in batches:
        with torch.set_grad_enabled(cfg.target_bytes > 0):
            z = model.logits(model.features(inputs, ctx), ctx).flatten(0, 1)
            if cfg.target_bytes:
                y = torch.multinomial(z.detach().softmax(-1), 1, generator=generator)
                F.cross_entropy(z, y[:, 0], reduction="sum").backward()
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        fisher[name] += p.grad.float().reshape(rows_and_columns(p.shape)).square().sum(dim=1)
                        p.grad = None
        tokens += inputs.numel()
    for total in (tokens, *fisher.values()):
        run.all_reduce(total)
    hessians = tap.reduced(run.all_reduce)
    return Calibration(
        hessians, {n: (total + total.sum() / tokens) / tokens for n, total in fisher.items()}, int(tokens)
    )


def input_moments(name: str, named: Mapping[str, Tensor], hessians: Mapping[str, Tensor]) -> Tensor | None:
    """(C, C) second moments of what a tensor multiplies, if they were taken: its site's input; for an adapter's B, A times it."""
    site, _, part = name.rpartition(".")
    h_CC = hessians.get(site) if part in ("weight", "a", "b") else None
    if h_CC is None or part != "b":
        return h_CC
    a_RC = named[f"{site}.a"].double()  # TF32 would leave a matrix that Cholesky refuses
    return (a_RC @ h_CC.double() @ a_RC.T).float()


# ---- the whole model


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever training takes: what `tune_cpu` sets is 14 times slower here on a CPU without bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def share_out(run: Run | None, jobs: Sequence[tuple[float, Callable[[], Any]]], threads: int = 1) -> list[Any]:
    """Results of (cost, job) pairs in their order, on every rank of `run` (None: this process alone).

    Each job is done once: the costliest first, each by the rank with the least to do so far, `threads` at a time. Results lie on
    the host. What a job raises on any rank ends all ranks, so that none waits for it.
    """
    rank, world = (run.rank, run.world) if run else (0, 1)
    owner, load = [0] * len(jobs), [0.0] * world
    for i in sorted(range(len(jobs)), key=lambda i: -jobs[i][0]):
        owner[i] = min(range(world), key=load.__getitem__)
        load[owner[i]] += jobs[i][0]
    pool, mine = ThreadPoolExecutor(threads), [job for at, (_, job) in zip(owner, jobs, strict=True) if at == rank]
    found, error = [], None
    try:
        found = list(pool.map(lambda job: job(), mine))
    except Exception as e:
        error = e
    finally:
        pool.shutdown(cancel_futures=True)  # a signal waits for the jobs that have begun, not for all
    part = found, error and f"rank {rank}: {type(error).__name__}: {error}"
    parts = [run.broadcast(part, source) for source in range(world)] if world > 1 else [part]
    if error is not None:
        raise error
    if errors := [text for _, text in parts if text]:
        raise BrokenRun(errors[0])
    results = [iter(found) for found, _ in parts]
    return [next(results[rank]) for rank in owner]


class TensorToCode(NamedTuple):
    """A tensor that is to be coded."""

    w_RC: Tensor  # divided by the steps of its columns
    stored: QuantizedTensor  # but for its codes
    factors: GptqFactors | None  # None: its inputs were not looked at


def prune_codes_(coded: list[QuantizedTensor], fraction: float) -> None:
    """Zero the `fraction` of all non-zero codes that stand for the smallest weights, over all tensors, in place (PR #740)."""
    sizes = [matrix_of(dequantize(item)).abs() for item in coded]
    alive = torch.cat([size[size > 0] for size in sizes])
    if count := int(fraction * alive.numel()):
        threshold = alive.kthvalue(count).values
        for item, size in zip(coded, sizes, strict=True):
            item.codes[size <= threshold] = 0


def round_all(cfg: Config, items: list[TensorToCode], run: Run | None) -> list[Tensor]:
    """Codes of every tensor, on the host: trellis paths, GPTQ where inputs are known, else the nearest.

    Tensors of equal shape are coded together, as many rows at once as the device likes, and the ranks share these parts. A CPU
    searches paths with a thread a core.
    """

    def code(members: list[int], rows: slice) -> Tensor:
        group = [items[i] for i in members]
        (_, stored, factors), top = group[0], largest_code(group[0].stored.bits)
        w_NRC = torch.stack([item.w_RC for item in group])
        scale_NR = torch.stack([item.stored.scale for item in group]).to(w_NRC)
        factors = factors and [item.factors for item in group]
        if factors and not stored.trellis:
            return gptq(w_NRC[:, rows], scale_NR[:, rows], factors, top, cfg.gptq_block_size).cpu()
        x_NRC = w_NRC / scale_NR[:, :, None]
        if stored.trellis:
            return TrellisSearch(x_NRC[:, rows], factors, stored.trellis, x_NRC.square().mean(dim=1)).codes().cpu()
        return nearest_codes(x_NRC[:, rows], top).cpu()

    groups: dict[tuple, list[int]] = {}
    for i, (w_RC, stored, factors) in enumerate(items):
        groups.setdefault((w_RC.shape, stored.trellis, stored.bits, factors is None), []).append(i)
    parts, jobs = [], []
    for ((rows, columns), states, _, _), members in groups.items():
        most = SURVIVORS_AT_ONCE[items[members[0]].w_RC.device.type] // max(states, 1)
        together = max(1, most // rows)
        for at, row in itertools.product(range(0, len(members), together), range(0, rows, most)):
            parts.append((members[at : at + together], slice(row, min(row + most, rows))))
            cost = len(parts[-1][0]) * min(most, rows - row) * columns * max(states, 1)
            jobs.append((cost, functools.partial(code, *parts[-1])))
    codes = [torch.empty(w_RC.shape, dtype=torch.int16 if stored.trellis else torch.int8) for w_RC, stored, _ in items]
    threads = torch.get_num_threads() if cfg.quant_trellis else 1
    for (members, rows), found in zip(parts, share_out(run, jobs, threads), strict=True):
        for i, codes_RC in zip(members, found, strict=True):
            codes[i][rows] = codes_RC
    return codes


def low_rank_codes(residual_RC: Tensor, rank: int, bits: int, group: int) -> LowRank:
    """The best rank-`rank` approximation of a residual (LQER, PR #1797): left singular directions as the 2-bit codes -2..1 with one
    step, right ones in `bits` bits with a step for each `group` columns."""
    u, s, vt = torch.linalg.svd(residual_RC.float(), full_matrices=False)
    left, right, group = u[:, :rank] * s[:rank], vt[:rank], min(group, residual_RC.shape[1])
    left_scale = row_scale(left.abs().amax()[None], 1.5)
    half, width = 2 ** (bits - 1), right.shape[1]
    padded = F.pad(right, (0, -width % group)).unflatten(1, (-1, group))
    right_scale = row_scale(padded.abs().amax(dim=2), half - 0.5)
    right = (padded / right_scale.float()[:, :, None]).round().clamp(-half, half - 1).flatten(1)[:, :width]
    left = (left / left_scale.float()).round().clamp(-2, 1)
    parts = (left.to(torch.int8), left_scale, right.to(torch.int8), right_scale)
    return LowRank(*(part.contiguous().cpu() for part in parts), group)


class InputStats:
    """What is known of the inputs of every tensor: second moments, what they mean to GPTQ, and steps of columns."""

    def __init__(self, policy: Policy, hessians: Mapping[str, Tensor], run: Run | None):
        self.policy, cfg = policy, policy.cfg
        self.states = {name: trellis_states(cfg.quant_trellis, w.shape) for name, w in policy.named.items()}
        self.moments = {name: input_moments(name, policy.named, hessians) for name in policy.named}
        order = "natural" if cfg.quant_trellis else cfg.gptq_order
        found = {id(h): h for h in self.moments.values() if h is not None}
        jobs = [(len(h) ** 3, lambda h=h: gptq_factors(h, cfg.gptq_percdamp, cfg.gptq_variant, order).to("cpu"))
                for h in found.values()]  # fmt: skip
        known = {i: f.to(h.device) for (i, h), f in zip(found.items(), share_out(run, jobs), strict=True)}
        self.factors = {name: known.get(id(h)) for name, h in self.moments.items()}

    def columns(self, name: str) -> Tensor | None:
        """log2 of the steps of a tensor's columns over those of its rows, in eighths; None where all are equal."""
        factors = self.factors[name] if self.states[name] else None
        return None if factors is None else column_steps(factors.weight_C)

    def to_round(self, name: str) -> tuple[Tensor, GptqFactors | None]:
        """The weights (R, C) that are coded, divided by the steps of their columns, and what their inputs then mean to GPTQ."""
        cfg, w_RC = self.policy.cfg, matrix_of(self.policy.named[name])
        if cfg.prune_scope == "tensor" and (count := int(cfg.prune_frac * w_RC.numel())):  # the smallest (PR #850)
            w_RC = w_RC.masked_fill(w_RC.abs() <= w_RC.abs().flatten().kthvalue(count).values, 0.0)
        factors, columns_C = self.factors[name], self.columns(name)
        if columns_C is None:
            return w_RC, factors
        return w_RC / octave_eighths(columns_C), factors.in_steps(columns_C)


def steps_by_row(w_RC: Tensor, step: float, row_factor_R: Tensor, states: int = 0) -> Tensor:
    """fp16 steps (R,), widened where a row's largest weight would not fit 8 bits, or PATH_BITS along a trellis."""
    top = largest_code(PATH_BITS if states else 8)
    return row_scale(torch.maximum(step * row_factor_R.to(w_RC.device) * top, w_RC.abs().amax(dim=1)), top)


def to_code(inputs: InputStats, name: str, chosen: Tensor | None) -> TensorToCode:
    """How a tensor is to be coded; `chosen` are the steps of its rows, where the byte budget has set them."""
    policy, states, columns_C = inputs.policy, inputs.states[name], inputs.columns(name)
    w_RC, factors = inputs.to_round(name)
    bits = policy.bits(name) if chosen is None and not states else 8
    if chosen is None:
        chosen = clipped_scale(w_RC, policy.bits(name), policy.clip(name))
        if states:  # each of which sees every second code
            chosen = steps_by_row(w_RC, 0.5, chosen.float(), states)
    stored = QuantizedTensor(policy.store[name], bits, tuple(policy.named[name].shape), scale=chosen.cpu(),
                             columns=None if columns_C is None else columns_C.cpu(), trellis=states)  # fmt: skip
    return TensorToCode(w_RC, stored, factors)


def store_tensors(
    inputs: InputStats, names: Iterable[str], scales: Mapping[str, Tensor], run: Run | None
) -> dict[str, QuantizedTensor]:
    """The tensors `names` as the artifact keeps them, before corrections; `scales` (R,) fp16 by name are steps already chosen, coded in
    8 bits whatever the role's width."""
    policy, items, stored = inputs.policy, {}, {}
    for name in names:
        if not torch.isfinite(policy.named[name]).all():
            raise ConfigError(f"{name} holds NaN or Inf: the training diverged; lower the learning rates")
        if policy.bits(name) > 8:
            stored[name] = pass_through(policy, name)
        else:
            items[name] = to_code(inputs, name, scales.get(name))
    for (name, item), codes_RC in zip(items.items(), round_all(policy.cfg, list(items.values()), run), strict=True):
        stored[name] = dataclasses.replace(item.stored, codes=codes_RC)
    if policy.cfg.prune_scope == "global":
        prune_codes_([stored[name] for name in items], policy.cfg.prune_frac)
    return {name: stored[name] for name in names}


def correct_residuals_(policy: Policy, stored: dict[str, QuantizedTensor],
                      worth: Callable[[str, LowRank, Tensor], bool] | None = None) -> None:  # fmt: skip
    """Give the LQER_TOP_K tensors with the largest residual a low-rank correction, where it is `worth` its bytes, or lowers the
    error (None)."""
    coded = [name for name, item in stored.items() if item.codes is not None] if policy.cfg.lqer_top_k else []
    residuals = {name: matrix_of(policy.named[name]).cpu() - matrix_of(dequantize(stored[name])) for name in coded}
    for name in sorted(residuals, key=lambda name: -float(residuals[name].norm()))[: policy.cfg.lqer_top_k]:
        rank = min(policy.cfg.lqer_rank, *residuals[name].shape)
        low_rank = low_rank_codes(residuals[name], rank, policy.cfg.lqer_factor_bits, policy.cfg.lqer_asym_group)
        lowers = float((residuals[name] - low_rank.product()).norm()) < float(residuals[name].norm())
        if worth(name, low_rank, residuals[name]) if worth else lowers:
            stored[name] = dataclasses.replace(stored[name], low_rank=low_rank)


@torch.no_grad()
@exact_products()
def quantize(cfg: Config, named: dict[str, Tensor], store: dict[str, str], hessians: Mapping[str, Tensor] = MappingProxyType({}),
             run: Run | None = None) -> dict[str, QuantizedTensor]:  # fmt: skip
    """Store every tensor of `named` at the width its role in `store` and QUANT_OVERRIDES ask for.

    `hessians` (C, C) by site turn rounding into GPTQ. The ranks of `run` share the work, and each has all of the result; None: this
    process alone. Raises ConfigError where a weight is not finite, does not fit fp16, or an override names nothing.
    """
    policy = Policy(cfg, named, store)
    stored = store_tensors(InputStats(policy, hessians, run), named, {}, run)
    correct_residuals_(policy, stored)
    return stored


def quant_report(named: dict[str, Tensor], stored: dict[str, QuantizedTensor]) -> dict[str, dict[str, float]]:
    """By role: parameters, mean width and the rms error relative to the rms weight, for the `quant` event."""
    sums: dict[str, np.ndarray] = {}
    for name, item in stored.items():
        w = named[name].detach().float().cpu()
        error, power = (float(x.square().sum(dtype=torch.float64)) for x in (dequantize(item) - w, w))
        mine = sums.setdefault(item.role, np.array([0, 0, 0, 1e-30]))
        mine += (w.numel(), item.bits * w.numel(), error, power)
    return {role: {"bits": round(bits / params, 3), "params": int(params), "rmse_rel": (error / power) ** 0.5}
            for role, (params, bits, error, power) in sums.items()}  # fmt: skip


# ==== 8 ARTIFACT ======================================================================================================
#
# Layout, little-endian:  preamble | header (JSON, LZMA) | streams | sections | SHA-256 of all before it.
# The header carries the caller's fields (config ...), which make the model and so each tensor's name, shape and role, in order;
# a short record of how each tensor is coded; coders and sizes of the streams; names and sizes of the sections.
# Streams are cut by storage role, so the account of bytes by role is exact. A section is whatever else a model needs,
# under a name, with a coder of its own: n-grams of the training text.

MAGIC, VERSION = b"PGLM", 5
OLDER_READERS = {2: "92a44cb", 3: "92a44cb", 4: "c21dca8"}  # the commit whose script reads an older version
PREAMBLE = struct.Struct("<4sHQII")  # magic, version, bytes of the file, bytes of the header packed and unpacked
CHECKSUM_BYTES = 32
MAX_HEADER_BYTES = 1 << 24
MAX_LOW_RANK = 256
Layout = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape, storage role), in the model's order


def raw_limit(file_bytes: int) -> int:
    """Bytes that a file of this size may unpack to: enough for weights at 1/8 bit, or for a small model of zeros."""
    return (1 << 26) + 64 * file_bytes


class ArtifactError(ValueError):
    """The file is no artifact this script can load; the message says why and what to do."""


class TensorEntry(NamedTuple):
    """How a tensor lies in the file: shape and role as the layout says, then its record in the header, whose last zeros are left out."""

    shape: tuple[int, ...]
    role: str
    bits: int
    trellis: int = 0  # states
    columns: int = 0  # 1: columns have steps too
    rank: int = 0  # of the low-rank correction
    group: int = 0  # columns of a correction's right factor that share a step

    def is_possible(self) -> bool:
        """Whether a tensor of this shape can be coded like this."""
        _, columns = rows_and_columns(self.shape)
        walks = self.trellis in (0, *TRELLISES) and trellis_states(self.trellis, self.shape) == self.trellis
        corrected = 1 <= self.rank <= MAX_LOW_RANK and 1 <= self.group <= columns if self.rank else self.group == 0
        coded = walks and self.columns in (0, 1) and corrected
        return self.bits in WIDTHS and (coded if self.bits <= 8 else not any(self[3:]))

    def parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """Kind and shape of each of the arrays that make up the tensor, in the order of `arrays_of`."""
        if self.bits > 8:
            return [("half" if self.bits == 16 else "single", self.shape)]
        rows, columns = rows_and_columns(self.shape)
        parts = [(f"trellis{self.trellis}" if self.trellis else "codes", (rows, columns)), ("scale", (rows,))]
        if self.columns:
            parts.append(("columns", (1, columns)))
        if k := self.rank:
            right_scale = (k, -(-columns // self.group))
            parts += [("codes", (rows, k)), ("scale", (1,)), ("codes", (k, columns)), ("scale", right_scale)]
        return parts


def arrays_of(stored: QuantizedTensor) -> list[Tensor]:
    """The arrays that make up a stored tensor."""
    if stored.values is not None:
        return [stored.values]
    columns = [] if stored.columns is None else [stored.columns.reshape(1, -1)]
    return [stored.codes, stored.scale, *columns, *(stored.low_rank or ())[:4]]


# ---- byte coders: bytes -> bytes, with the size of the result known to the decoder


def lzma_filters(size: int, preset: int = 9) -> list[dict[str, int]]:
    """Raw LZMA2 with a window that the decoder fixes from the known size: a file cannot ask for more memory."""
    window = max(1 << 12, min(size, 1 << 26))
    level = preset | lzma.PRESET_EXTREME if preset == 9 else preset
    return [{"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": window}]


def lzma_pack(raw: bytes, preset: int = 9) -> bytes:
    """Raw LZMA2 stream without container headers."""
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=lzma_filters(len(raw), preset))


def lzma_unpack(packed: bytes, size: int) -> bytes:
    """Inverse of lzma_pack; stops at `size` bytes and refuses any other length."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_filters(size))
    try:
        raw = decoder.decompress(packed, max_length=size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"an LZMA stream does not decode: {error}") from None
    if len(raw) != size or not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"an LZMA stream does not hold the {size} bytes that the header announces")
    return raw


def zstd_pack(raw: bytes, level: int = 22) -> bytes:
    """One zstd frame that carries its content size."""
    import zstandard

    return zstandard.ZstdCompressor(level=level, write_checksum=False).compress(raw)


def zstd_unpack(packed: bytes, size: int) -> bytes:
    """Inverse of zstd_pack; refuses any length but `size`, and bytes after the frame."""
    import zstandard

    try:
        if zstandard.frame_content_size(packed) != size:
            raise ArtifactError(f"a zstd stream does not hold the {size} bytes that the header announces")
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"a zstd stream does not decode: {error}") from None


# ---- streams: all arrays of one kind of one role, in the model's order

# States by kind of small integers. In the account paths count as int8, in memory they are int16.
CODED_KINDS = {"codes": 0, "columns": 0, **{f"trellis{states}": states for states in TRELLISES}}
KINDS = dict.fromkeys(CODED_KINDS, torch.int8) | {
    "scale": torch.float16,
    "half": torch.float16,
    "single": torch.float32,
}


def to_bytes(arrays: list[Tensor]) -> bytes:
    """Concatenate flat arrays of one type, bytes split by significance: exponents beside exponents compress better."""
    flat = torch.cat([a.reshape(-1) for a in arrays]).numpy()
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def from_bytes(raw: bytes, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Inverse of to_bytes."""
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    flat = torch.from_numpy(planes.T.copy().reshape(-1)).view(dtype)
    return [part.reshape(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def stream_plan(entries: list[TensorEntry]) -> dict[tuple[str, str], dict[tuple[int, int], tuple[int, ...]]]:
    """(role, kind) of each stream, in order -> (tensor, part) of each array in it, in order -> its shape."""
    plan: dict[tuple[str, str], dict[tuple[int, int], tuple[int, ...]]] = {}
    for i, entry in enumerate(entries):
        for j, (kind, shape) in enumerate(entry.parts()):
            plan.setdefault((entry.role, kind), {})[i, j] = shape
    return dict(sorted(plan.items()))


# ---- streams of small integers
#
# A stream is a list of fields, packed by LZMA, and the words of a range coder. Fields are tables and whatever is rare; words
# are symbols, each under a table. A coder that writes takes values and returns them; one that reads ignores what it is given and
# returns what was written. So one function codes in both directions, and the two cannot differ.

# 2**(-i/8) for i in 0..254, by square roots and products alone: IEEE gives the same everywhere.
OCTAVE_EIGHTHS = np.cumprod(np.r_[1.0, np.full(254, math.sqrt(math.sqrt(math.sqrt(0.5))))])
MAX_SYMBOL = 6 + 2 * 24 + 1  # of numbers below 2^24


def table_weights(logs: np.ndarray) -> np.ndarray:
    """Integer-valued weights 2**(-log/8), at least 1: their sum is exact in any order."""
    return np.maximum(np.floor(OCTAVE_EIGHTHS[logs] * 2**24), 1.0)


def symbol_model(weights: np.ndarray) -> Any:
    """Coder model of symbols 0..n-1, n >= 2, from their weights."""
    import constriction

    return constriction.stream.model.Categorical(weights / weights.sum(), perfect=False)


def split_ints(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(symbol, width, rest): 0..15 are symbols of their own, larger ones have two symbols for each power of 2 and `width` bits of rest."""
    length = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    width = np.where(values < 16, 0, length - 2)
    symbol = np.where(values < 16, values, 6 + 2 * length + (values >> width & 1))
    return symbol, width, values & ((1 << width) - 1)


def join_symbols(symbol: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(least number of each symbol, width of its rest): the inverse of split_ints but for the rest."""
    width = np.where(symbol < 16, 0, (symbol - 6) // 2 - 2)
    return np.where(symbol < 16, symbol, (2 + (symbol & 1)) << width), width


def zigzag(values: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, .. as 0, 1, 2, 3, ..: small numbers of either sign as small ones without."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unzigzag(values: np.ndarray) -> np.ndarray:
    """Inverse of zigzag."""
    return np.where(values & 1, -(values + 1) // 2, values // 2)


class StreamCoder:
    """Writes a stream; reads the one that is given, never past its end. Raises ArtifactError."""

    def __init__(self, stream: bytes | None = None) -> None:
        import constriction

        self.reading, self.stored, self.at = stream is not None, [], 0
        if not self.reading:
            self.coder = constriction.stream.queue.RangeEncoder()
            return
        count, packed = struct.unpack_from("<II", stream) if len(stream) >= 8 else (0, 1)
        if packed > len(stream) - 8 or count > 1 << 20 or (len(stream) - packed) % 4:
            raise ArtifactError("a stream has impossible sizes")
        (stored,) = from_bytes(lzma_unpack(stream[8 : 8 + packed], 4 * count), torch.int32, [(count,)])
        self.stored = unzigzag(stored.numpy().astype(np.int64))
        words = np.frombuffer(stream, "<u4", offset=8 + packed).astype(np.uint32)
        self.coder = constriction.stream.queue.RangeDecoder(words)

    def fields(self, values: Any, count: int, low: int, high: int) -> Any:
        """`count` fields, each within low..high."""
        if not self.reading:
            assert count == len(values) and all(low <= value <= high for value in values), f"{values} are no fields"
            self.stored += map(int, values)
            return values
        part = self.stored[self.at : self.at + count]
        self.at += count
        if len(part) != count or (count and not low <= part.min() <= part.max() <= high):
            raise ArtifactError("a stream has impossible fields")
        return part

    def symbols(self, model: Any, count: int, values: np.ndarray | None) -> np.ndarray:
        """`count` symbols, int32."""
        if self.reading:
            try:
                return self.coder.decode(model, count)
            except AssertionError:  # what the decoder raises on words that no encoder writes
                raise ArtifactError("a stream does not decode") from None
        if count:
            self.coder.encode(values.astype(np.int32), model)
        return values

    def table(self, counts: np.ndarray | None, most: int) -> np.ndarray:
        """(n,) int16 in 0..254: -8 log2 of the fractions of n symbols, 2 <= n <= most, from their `counts`; what never occurred gets a
        quarter of a count."""
        logs = []
        if counts is not None:
            logs = np.round(8 * np.log2(max(counts.sum(), 1) / np.maximum(counts, 0.25))).clip(0, 254).astype(np.int16)
        size = int(self.fields([len(logs)], 1, 2, most)[0])
        logs = np.cumsum(self.fields(np.diff(logs, prepend=0), size, -254, 254)).astype(np.int16)
        if not 0 <= logs.min() <= logs.max() <= 254:
            raise ArtifactError("a stream has an impossible table")
        return logs

    def numbers(self, context: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """(n,) int64 in 0 .. 2^24 - 1, each coded under the table of its context."""
        import constriction

        symbol, _, rest = (None, None, None) if values is None else split_ints(values)
        part = lambda of, at: None if of is None else of[at]  # noqa: E731
        found = np.empty(len(context), np.int64)
        for c in np.unique(context):
            at = np.flatnonzero(context == c)
            counts = None if symbol is None else np.bincount(symbol[at], minlength=2)
            model = symbol_model(table_weights(self.table(counts, MAX_SYMBOL + 1)))
            found[at] = self.symbols(model, len(at), part(symbol, at))
        number, width = join_symbols(found)
        for w in np.unique(width[width > 0]):
            at = np.flatnonzero(width == w)
            number[at] += self.symbols(constriction.stream.model.Uniform(1 << int(w)), len(at), part(rest, at))
        return number

    def finish(self) -> bytes:
        """The stream that was written; ArtifactError if one that was read has more."""
        if self.reading:
            if not self.coder.maybe_exhausted() or self.at != len(self.stored):
                raise ArtifactError("a stream is longer than what it holds")
            return b""
        packed = lzma_pack(to_bytes([torch.from_numpy(zigzag(np.array(self.stored, np.int32)))]))
        words = self.coder.get_compressed().astype("<u4").tobytes()
        return struct.pack("<II", len(self.stored), len(packed)) + packed + words


# ---- entropy coding of codes
#
# A code's spread is modelled as 2**((row level + column level) / 8), both levels small integers that the stream carries
# where they pay for themselves. Codes of one level share a frequency table, whatever their tensor. Along a trellis the state
# before a code tells its parity: each level has one table for even and one for odd codes. An embedding's columns are
# correlated: there each code is predicted from the columns before it with a regression learned from the rows before it.
# The codes are written table by table, each table's in the order of one walk over the tensors, so that a decoder reads all
# codes in one call a table and hands them out in the order of the same walk. Everything a decoder derives is integer
# arithmetic or single IEEE operations, so that every machine derives the same.

LEVEL_BOUNDS = (-24, 95)  # 8 log2 of the spread: from 1/8 to 3756 steps
CHUNK = 16  # columns predicted at once
RIDGE_ROWS = 192  # rows of uncorrelated codes that a regression starts from: 1.3 % less than 32 on a trained embedding
PREDICTED_ROLES = ("embed", "table")  # rows of one space: their columns are correlated
REGION_ROWS, REGION_CODES = 4096, 1 << 21  # most that are decoded at once: what bounds a decoder's memory
MAX_TABLE = 4096  # magnitudes that a table may tell apart
MAX_PREDICTED_COLUMNS = 1024  # a regression takes C x C float64


class CodeLevels(NamedTuple):
    """Levels of one tensor, and whether its codes are predicted."""

    rows: np.ndarray  # (R,) int16
    columns: np.ndarray  # (C,) int16
    predicted: bool

    def levels(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """(R, C) int16 level of every code, or of a part of them."""
        return (self.rows[rows, None] + self.columns[columns]).clip(*LEVEL_BOUNDS)


def entropy_bits(counts: np.ndarray) -> float:
    """Bits that `counts` occurrences (..., K) cost under their own frequencies, those of each K by themselves."""
    totals, some = counts.sum(axis=-1), counts[counts > 1]
    return float((totals * np.log2(np.maximum(totals, 1))).sum() - some @ np.log2(some))


def level_bits(levels: np.ndarray) -> float:
    """Bits of the levels of one side of a tensor, their table included."""
    return entropy_bits(np.bincount(levels.astype(np.int32) - int(levels.min(initial=0)))) + 32 * (np.ptp(levels) > 0)


def fit_levels(codes_RC: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row and column levels (R,), (C,) int16: one for all, and those with the shortest description, levels included.

    Spreads solve the maximum-likelihood equations of a Gaussian with variance row x column (two rounds from a flat
    start); every pair of grids is priced in closed form. That price is a density's, which rates below a bit do not follow.
    """
    power_RC = np.square(codes_RC, dtype=np.float32)
    rows, columns = power_RC.shape
    column_C = np.ones(columns, np.float32)
    for _ in range(2):
        row_R = (power_RC @ (1 / column_C)) / columns + 1e-2
        column_C = (1 / row_R) @ power_RC / rows + 1e-2

    def on_grids(spread_N: np.ndarray, flat: float, other: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(4, N) levels of a side: one for all, and multiples of 4, 2, 1; the bits of each and of its codes' scale; 1 / variance."""
        one = np.full(len(spread_N), round(4 * np.log2(flat + 1e-4)))
        levels_GN = np.stack([one, *(np.round(4 * np.log2(spread_N) / grid) * grid for grid in (4, 2, 1))])
        price_G = np.array([x.sum() * other / 8 + level_bits(x) for x in levels_GN])
        return levels_GN.astype(np.int16), price_G, np.exp2(-levels_GN / 4).astype(np.float32)

    rows_GR, row_price_G, inverse_GR = on_grids(row_R, (power_RC @ (1 / column_C)).mean() / columns, columns)
    columns_GC, column_price_G, inverse_GC = on_grids(column_C, ((1 / row_R) @ power_RC).mean() / rows, rows)
    price_GG = row_price_G[:, None] + column_price_G + inverse_GR @ power_RC @ inverse_GC.T / (2 * math.log(2))
    i, j = np.unravel_index(price_GG.argmin(), price_GG.shape)
    return [(rows_GR[0], columns_GC[0]), (rows_GR[i], columns_GC[j])][: 1 if i == j == 0 else 2]


def regions(shape: tuple[int, int], predicted: bool) -> list[tuple[slice, slice]]:
    """Parts of a tensor in coding order: whole rows, or chunks of columns within blocks of rows that double up to REGION_ROWS."""
    rows, columns = shape
    if not predicted:
        step = max(1, REGION_CODES // columns)
        return [(slice(r, min(r + step, rows)), slice(0, columns)) for r in range(0, rows, step)]
    bounds = [0, min(rows, 48)]
    while bounds[-1] < rows:
        bounds.append(min(rows, bounds[-1] + min(bounds[-1], REGION_ROWS)))
    chunks = [slice(c, min(c + CHUNK, columns)) for c in range(0, columns, CHUNK)]
    return [(slice(lo, hi), chunk) for lo, hi in itertools.pairwise(bounds) for chunk in chunks]


# Elementwise steps only: a BLAS may sum in any order, and the decoder's machine must find the very same factor.
def regression(moments_CC: np.ndarray, rows: int) -> np.ndarray:
    """Unit lower factor L of X^T X + ridge = L D L^T in 1/4096, as integer-valued fp64, X the `rows` of codes seen so far; 0 before
    the first."""
    if rows == 0:
        return np.zeros_like(moments_CC)
    ridge = RIDGE_ROWS * (np.trace(moments_CC) // (rows * len(moments_CC)) + 1)
    work = (moments_CC + ridge * np.eye(len(moments_CC))).astype(np.float64)
    for j in range(len(work)):
        column = work[j + 1 :, j] / work[j, j]
        work[j + 1 :, j + 1 :] -= column[:, None] * work[j, j + 1 :]
        work[j + 1 :, j] = column
    return np.round(np.tril(work, -1).clip(-8, 8) * 4096)


def predict_codes(rows: int, columns: int, code: Callable[[slice, slice, np.ndarray], np.ndarray]) -> np.ndarray:
    """Walk `regions` of a tensor; `code(rows, columns, mean)` gives the codes there. Returns all of them, int16.

    `mean` (integers) is the regression of a chunk on all columns before it, fitted to the rows before its block whenever
    these have doubled. Encoder and decoder both are callbacks of this walk, so they cannot disagree.
    """
    codes_RC, moments_CC, fitted = np.zeros((rows, columns), np.int16), np.zeros((columns, columns)), 0
    for block, chunk in regions((rows, columns), True):
        if chunk.start == 0:
            if block.start >= 2 * fitted:
                factor_CC, fitted = regression(moments_CC, block.start), block.start
            error_CR = np.zeros((columns, block.stop - block.start))  # codes less their prediction, in 1/64
        # Integers below 2**53, so that these products are exact whatever the order of summation.
        mean = factor_CC[chunk, : chunk.start] @ error_CR[: chunk.start]
        codes_RC[block, chunk] = code(block, chunk, np.round(mean / 2**18).T)
        codes_CR = codes_RC[block, chunk].T * 64.0
        for i, j in enumerate(range(chunk.start, chunk.stop)):
            within = factor_CC[j, chunk.start : j] @ error_CR[chunk.start : j]
            error_CR[j] = codes_CR[i] - np.round((mean[i] + within) / 4096)
        if chunk.stop == columns:
            seen_RC = codes_RC[block].astype(np.float64)
            moments_CC += seen_RC.T @ seen_RC
    return codes_RC


class CodeTable(NamedTuple):
    """Frequencies of the symbols of all levels from `start` to the next table's. A symbol is a code; along a trellis, where its
    parity is known, half of it, rounded down."""

    start: int
    counts: np.ndarray  # (n,) of symbols 0..n-1 and their mirror images, or of those from -(n // 2) on
    mirrored: bool
    bits: float  # that its symbols take

    @property
    def price(self) -> float:
        """Bits of symbols and table."""
        return self.bits + 4 * (len(self.counts) + 2)


def mirror(weights: np.ndarray, odd: int) -> np.ndarray:
    """Weights of symbols 0..M, of both signs together, as weights of -M..M; of odd codes as those of -M-1..M."""
    return np.concatenate([weights[::-1], weights] if odd else [weights[:0:-1], 2 * weights[:1], weights[1:]])


def fold(joint: np.ndarray) -> np.ndarray:
    """Counts (..., n) of symbols from -(n // 2) on as counts of their magnitudes: the inverse of `mirror`."""
    half = joint.shape[-1] // 2
    below, folded = joint[..., :half][..., ::-1], joint[..., half:].copy()
    folded[..., folded.shape[-1] - half :] += below
    return folded


def code_table(start: int, counts: np.ndarray, mirrored: bool) -> CodeTable:
    """The table of these occurrences of symbols, for both signs together or for each."""
    folded, half, odd = fold(counts), len(counts) // 2, 1 - len(counts) % 2
    top = max(folded.nonzero()[0].max(initial=0), 1)  # a table tells two magnitudes apart
    if not mirrored:
        return CodeTable(start, counts[half - top - odd : half + top + 1], False, entropy_bits(counts))
    signs = counts.sum() - (0 if odd else counts[half])
    return CodeTable(start, folded[: top + 1], True, entropy_bits(folded) + float(signs))


def fit_tables(joint: np.ndarray) -> list[CodeTable]:
    """Tables from counts by (level, symbol): a level joins the table before it where that makes the file smaller, and a table holds
    both signs where they differ by more than it costs."""
    groups = [(LEVEL_BOUNDS[0], joint[0])]
    price = code_table(*groups[0], True).price
    for level in np.flatnonzero(joint[1:].any(axis=1)) + 1:
        (start, before), mine = groups[-1], joint[level]
        alone, together = (code_table(start, counts, True).price for counts in (mine, before + mine))
        if together <= price + alone:
            groups[-1], price = (start, before + mine), together
        else:
            groups.append((int(level) + LEVEL_BOUNDS[0], mine))
            price = alone
    return [min((code_table(*group, m) for m in (True, False)), key=lambda table: table.price) for group in groups]


def count_levels(levels: np.ndarray, values: np.ndarray, states: int) -> list[np.ndarray]:
    """Occurrences (levels, symbols) of each symbol at each level: of all values, or of even and of odd ones along a trellis."""
    top = max(int(np.abs(values).max(initial=0)), 1)
    top = 2 * max(top >> 1, 1) + 1 if states else top
    span, width, joint = LEVEL_BOUNDS[1] - LEVEL_BOUNDS[0] + 1, 2 * top + 1, 0
    levels, values = levels.ravel(), values.ravel()
    for lo in range(0, max(len(values), 1), REGION_CODES):
        cell = (levels[lo : lo + REGION_CODES].astype(np.int32) - LEVEL_BOUNDS[0]) * width + top
        joint = joint + np.bincount(cell + values[lo : lo + REGION_CODES], minlength=span * width)
    joint = joint.reshape(span, width)
    return [joint[:, 1::2], joint[:, ::2]] if states else [joint]


def described_bits(spread: CodeLevels, values: np.ndarray, states: int, rows: int = 0) -> float:
    """Bits of a tensor's values under the tables that fit them, of these and of the levels; if the values are a sample of its
    rows, of all `rows`."""
    tables = [table for joint in count_levels(spread.levels(), values, states) for table in fit_tables(joint)]
    by_rows, once = sum(table.bits for table in tables) + level_bits(spread.rows), level_bits(spread.columns)
    once += sum(table.price - table.bits for table in tables)
    return by_rows * (rows or len(values)) / len(values) + once


def plan_codes(codes_RC: np.ndarray, predictable: bool, states: int = 0) -> tuple[CodeLevels, np.ndarray, float]:
    """The shortest of coding a tensor plainly or predicted, with one level or several: its spread, the values to code, the
    estimated bits."""
    plans = [(CodeLevels(*sides, False), codes_RC) for sides in fit_levels(codes_RC)]
    if predictable and codes_RC.shape[1] <= MAX_PREDICTED_COLUMNS:
        errors_RC = np.zeros(codes_RC.shape, np.int32)

        def note(rows: slice, chunk: slice, mean: np.ndarray) -> np.ndarray:
            errors_RC[rows, chunk] = codes_RC[rows, chunk] - mean
            return codes_RC[rows, chunk]

        predict_codes(*codes_RC.shape, note)
        if np.abs(errors_RC).max(initial=0) < MAX_TABLE:  # else an outlier that prediction only makes worse
            plans += [(CodeLevels(*sides, True), errors_RC) for sides in fit_levels(errors_RC)]
    return min(((*plan, described_bits(*plan, states)) for plan in plans), key=lambda plan: plan[2])


def code_levels(
    coder: StreamCoder, shapes: list[tuple[int, int]], spreads: list[CodeLevels] | None = None
) -> list[CodeLevels]:
    """Write the levels of tensors of `shapes`, or read them (None). A side is a middle, a grid and, unless that is 0, how many
    grids each level lies above the middle (2n) or below it (2n - 1)."""
    lengths, sides, middles, grids = [n for shape in shapes for n in shape], None, None, None
    if spreads is not None:
        sides = [side.astype(np.int64) for spread in spreads for side in (spread.rows, spread.columns)]
        middles = [int(np.median(side)) for side in sides]
        grids = [int(np.gcd.reduce(side - middle)) for side, middle in zip(sides, middles, strict=True)]
    middles = coder.fields(middles, len(lengths), -999, 999)
    grids = coder.fields(grids, len(lengths), 0, 999)
    predicted = coder.fields(spreads and [int(spread.predicted) for spread in spreads], len(shapes), 0, 1)
    grid_N, middle_N = np.repeat(grids, lengths), np.repeat(middles, lengths)
    fine, above = grid_N > 0, None
    if sides is not None:
        above = zigzag((np.concatenate(sides) - middle_N)[fine] // grid_N[fine])
    above = coder.numbers(np.zeros(np.count_nonzero(fine), int), above)
    level_N = middle_N.copy()
    level_N[fine] += grid_N[fine] * unzigzag(above)
    parts = np.split(level_N.clip(-999, 999).astype(np.int16), np.cumsum(lengths)[:-1])
    return [CodeLevels(parts[2 * i], parts[2 * i + 1], bool(flag)) for i, flag in enumerate(predicted)]


def by_table(table_N: np.ndarray, tables: int) -> tuple[np.ndarray, np.ndarray]:
    """(order that sorts codes by table and keeps each table's as they come, (tables,) how many each has)."""
    return np.argsort(table_N, kind="stable"), np.bincount(table_N, minlength=tables)


def code_tables(
    coder: StreamCoder, states: int, total: int, levels: np.ndarray | None = None, values: np.ndarray | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Write all tables and under them `total` codes with their levels, in the order of their walk, or read them (None): (parities,
    levels) which table is that of a level and parity, and each table's codes, int16."""
    halved, tables, counts, symbols = int(states > 0), None, None, itertools.repeat(None)
    sizes = None
    if values is not None:
        fitted = [fit_tables(joint) for joint in count_levels(levels, values, states)]
        tables, sizes = sum(fitted, []), [len(part) for part in fitted]
    sizes = coder.fields(sizes, 1 + halved, 1, 99)
    starts = coder.fields(tables and [table.start for table in tables], sum(sizes), *LEVEL_BOUNDS)
    index, before, every = [], 0, np.arange(LEVEL_BOUNDS[0], LEVEL_BOUNDS[1] + 1)
    for mine in np.split(np.asarray(starts), np.cumsum(sizes)[:-1]):
        if mine[0] != LEVEL_BOUNDS[0] or (np.diff(mine) < 1).any():
            raise ArtifactError("a stream of codes has tables of impossible levels")
        index.append(before + np.searchsorted(mine, every, side="right") - 1)
        before += len(mine)
    index = np.stack(index).astype(np.uint8)
    if values is not None:
        order, counts = by_table(index[values & halved, levels.astype(np.int16) - LEVEL_BOUNDS[0]], before)
        symbols = np.split((values >> halved)[order], np.cumsum(counts)[:-1])
    mirrored = coder.fields(tables and [table.mirrored for table in tables], before, 0, 1)
    counts = coder.fields(counts, before, 0, total)
    if sum(map(int, counts)) != total:
        raise ArtifactError("a stream of codes holds other counts than its tensors")
    found = []
    for i, (odd, mine) in enumerate(zip(np.repeat(range(len(sizes)), sizes), symbols, strict=False)):
        weights = table_weights(coder.table(tables and tables[i].counts, 2 * MAX_TABLE + 2))
        weights = mirror(weights, odd) if mirrored[i] else weights
        least = -(len(weights) // 2)
        mine = coder.symbols(symbol_model(weights), int(counts[i]), None if mine is None else mine - least) + least
        found.append(((mine << halved) + odd).astype(np.int16))
    return index, found


Codes = list[np.ndarray]  # of several tensors, (R, C) each
# What a walk calls at each step, in both directions: (levels, parities, the codes to write or None) -> the codes.
CodeStep = Callable[[np.ndarray, Any, np.ndarray | None], np.ndarray]


def refuse_beyond(most: int, codes: np.ndarray) -> None:
    """ArtifactError for what a tensor of codes cannot hold, or for no number, before anything is computed from it."""
    if not -most <= codes.min(initial=0) <= codes.max(initial=0) <= most:
        raise ArtifactError(f"a stream of codes holds values beyond +-{most}")


def walk_paths(spreads: list[CodeLevels], states: int, code: CodeStep, known: Codes | None) -> Codes:
    """Codes (R, C) int16 of tensors without prediction, widest first, along a trellis: column by column, over the rows of all tensors
    that have the column."""
    rows = [len(spread.rows) for spread in spreads]
    found_CR = [np.empty((len(spread.columns), len(spread.rows)), np.int16) for spread in spreads]
    given_CR = known and [np.ascontiguousarray(codes_RC.T) for codes_RC in known]
    row_levels, ends = np.concatenate([spread.rows for spread in spreads]), np.cumsum(rows)
    state, odd_S = np.zeros(ends[-1], np.uint8), trellis_bits(states)[0]
    for j in range(len(spreads[0].columns)):
        live = sum(len(spread.columns) > j for spread in spreads)
        n = ends[live - 1]
        levels = row_levels[:n] + np.repeat([spread.columns[j] for spread in spreads[:live]], rows[:live])
        values = known and np.concatenate([codes_CR[j] for codes_CR in given_CR[:live]])
        values = code(levels.clip(*LEVEL_BOUNDS), odd_S[state[:n]], values)
        state[:n] = next_state(state[:n], values, states)
        for codes_CR, part in zip(found_CR, np.split(values, ends[: live - 1]), strict=False):
            codes_CR[j] = part
    return [codes_CR.T for codes_CR in found_CR]


def walk_predicted(spread: CodeLevels, states: int, code: CodeStep, known: np.ndarray | None) -> np.ndarray:
    """Codes (R, C) int16 of a tensor with prediction: a value is a code less its mean. Along a trellis both parities are known,
    from one column to the next; independent codes of a chunk are one step."""
    state, odd_S = np.zeros(len(spread.rows), np.uint8), trellis_bits(states)[0] if states else None

    def code_part(rows: slice, chunk: slice, mean: np.ndarray) -> np.ndarray:
        refuse_beyond(2 * MAX_TABLE, mean)
        codes, levels = mean.astype(np.int16), spread.levels(rows, chunk)
        for at in (np.s_[i : i + 1] for i in range(codes.shape[1])) if states else (np.s_[:],):
            values = None if known is None else known[rows, chunk][:, at] - codes[:, at]
            odd = (odd_S[state[rows], None] ^ codes[:, at]) & 1 if states else 0
            codes[:, at] += code(levels[:, at], odd, values)
            if states:
                state[rows] = next_state(state[rows], codes[:, at.start], states)
        refuse_beyond(largest_code(PATH_BITS if states else 8), codes)
        return codes

    return predict_codes(len(spread.rows), len(spread.columns), code_part)


def walk_codes(spreads: list[CodeLevels], states: int, code: CodeStep, known: Codes | None = None) -> Codes:
    """Codes of all tensors of a stream: paths without prediction together, then one tensor after the other. Independent codes without
    prediction are one step a tensor, cut into regions."""
    order = sorted(range(len(spreads)), key=lambda i: -len(spreads[i].columns))
    paths = [i for i in order if states and not spreads[i].predicted]
    walked = paths and walk_paths([spreads[i] for i in paths], states, code, known and [known[i] for i in paths])
    found = dict(zip(paths, walked, strict=True))
    for i, spread in enumerate(spreads):
        if spread.predicted:
            found[i] = walk_predicted(spread, states, code, known and known[i])
        elif not states:
            parts = [rows for rows, _ in regions((len(spread.rows), len(spread.columns)), False)]
            found[i] = np.concatenate([code(spread.levels(rows), 0, known and known[i][rows]) for rows in parts])
    return [found[i] for i in range(len(spreads))]


def encode_codes(arrays: Codes, predictable: bool = False, states: int = 0) -> bytes:
    """Codes of several tensors, each (R, C), as one stream: levels, tables, and the codes under them. With `states`, rows are
    paths through a trellis."""
    spreads = [plan_codes(codes_RC, predictable, states)[0] for codes_RC in arrays]
    coder, noted = StreamCoder(), []
    code_levels(coder, [codes_RC.shape for codes_RC in arrays], spreads)

    def note(levels: np.ndarray, odd: Any, values: np.ndarray) -> np.ndarray:
        assert not states or np.array_equal(odd, values & 1), "codes leave the trellis"
        noted.append((levels.astype(np.int8).ravel(), values.astype(np.int16).ravel()))
        return values

    walk_codes(spreads, states, note, arrays)
    levels, values = (np.concatenate(part) for part in zip(*noted, strict=True))
    code_tables(coder, states, len(values), levels, values)
    return coder.finish()


def decode_codes(stream: bytes, shapes: list[tuple[int, int]], states: int = 0) -> Codes:
    """Inverse of encode_codes: arrays of `shapes`, int8, or int16 along a trellis. Raises ArtifactError."""
    coder = StreamCoder(stream)
    spreads = code_levels(coder, shapes)
    if any(spread.predicted and len(spread.columns) > MAX_PREDICTED_COLUMNS for spread in spreads):
        raise ArtifactError(f"a stream of codes predicts more than {MAX_PREDICTED_COLUMNS} columns")
    index, tables = code_tables(coder, states, sum(rows * columns for rows, columns in shapes))
    coder.finish()
    ends, at = np.array([len(codes) for codes in tables]), np.zeros(len(tables), np.int64)

    def take(levels: np.ndarray, odd: Any, _values: np.ndarray | None) -> np.ndarray:
        order, counts = by_table(index[odd, levels - LEVEL_BOUNDS[0]].ravel(), len(tables))
        first = at.copy()
        at[:] += counts
        if (at > ends).any():
            raise ArtifactError("a stream of codes lacks codes of some table")
        found = np.empty(len(order), np.int16)
        found[order] = np.concatenate([codes[lo:hi] for codes, lo, hi in zip(tables, first, at, strict=True)])
        return found.reshape(levels.shape)

    found = walk_codes(spreads, states, take)
    for codes_RC in found:
        refuse_beyond(largest_code(PATH_BITS if states else 8), codes_RC)
    return [np.ascontiguousarray(codes_RC, np.int16 if states else np.int8) for codes_RC in found]


# ---- coders of streams

BYTE_UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {"zstd": zstd_unpack, "lzma": lzma_unpack}


def encode_stream(cfg: Config, role: str, kind: str, arrays: list[Tensor]) -> tuple[str, bytes]:
    """(coder, bytes) of one stream under COMPRESSOR; rows of embeddings and tables are worth predicting."""
    if cfg.compressor == "zstd":
        return "zstd", zstd_pack(to_bytes(arrays), cfg.zstd_level)
    if cfg.compressor == "entropy" and kind in CODED_KINDS:
        predictable = role in PREDICTED_ROLES and kind != "columns"
        return "codes", encode_codes([a.numpy() for a in arrays], predictable, CODED_KINDS[kind])
    return "lzma", lzma_pack(to_bytes(arrays), cfg.lzma_preset)


def decode_stream(kind: str, coder: str, packed: bytes, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Inverse of encode_stream."""
    if coder == "codes":
        return [torch.from_numpy(a) for a in decode_codes(packed, shapes, CODED_KINDS[kind])]
    raw = sum(map(math.prod, shapes)) * KINDS[kind].itemsize
    return from_bytes(BYTE_UNPACKERS[coder](packed, raw), KINDS[kind], shapes)


# ---- the container


def layout_of(stored: Mapping[str, QuantizedTensor]) -> Layout:
    """The layout of the model that these tensors are."""
    return {name: (item.shape, item.role) for name, item in stored.items()}


def layout_digest(layout: Layout) -> str:
    """16 digits: models whose tensors differ in name, order, shape or role have different ones."""
    return hashlib.sha256(json.dumps([[n, *layout[n]] for n in layout]).encode()).hexdigest()[:16]


def pack(cfg: Config, header: dict[str, Any], tensors: dict[str, QuantizedTensor], sections: Mapping[str, bytes] = MappingProxyType({}),
         coded: dict[tuple[str, str], tuple[list[Tensor], str, bytes]] | None = None) -> bytes:  # fmt: skip
    """The artifact as bytes: `header` (JSON values; "layout", "tensors", "streams" and "sections" are ours), every tensor in the
    model's order, and every section, checksummed.

    `coded` keeps streams between calls: one whose arrays are the same objects is not coded again.
    """
    entries, parts, streams = [], [arrays_of(s) for s in tensors.values()], []
    for s in tensors.values():
        correction = (s.low_rank.left.shape[1], s.low_rank.group) if s.low_rank else ()
        entries.append(TensorEntry(s.shape, s.role, s.bits, s.trellis, int(s.columns is not None), *correction))
    coded = {} if coded is None else coded
    for (role, kind), members in stream_plan(entries).items():
        arrays = [parts[i][j] for i, j in members]
        before = coded.get((role, kind), [()])[0]
        if len(before) != len(arrays) or any(a is not b for a, b in zip(before, arrays, strict=True)):
            coded[role, kind] = arrays, *encode_stream(cfg, role, kind, arrays)
        streams.append(coded[role, kind][1:])
    records = [entry[2 : max(i for i, value in enumerate(entry) if i == 2 or value) + 1] for entry in entries]
    fields = {**header, "layout": layout_digest(layout_of(tensors)), "tensors": records,
              "streams": [(coder, len(packed)) for coder, packed in streams],
              "sections": [(name, len(section)) for name, section in sections.items()]}  # fmt: skip
    return add_checksum(fields, b"".join([*(packed for _, packed in streams), *sections.values()]))


def add_checksum(header: dict[str, Any], body: bytes) -> bytes:
    """Put preamble, packed header and checksum around the streams."""
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    packed = lzma_pack(text)
    total = PREAMBLE.size + len(packed) + len(body) + CHECKSUM_BYTES
    blob = PREAMBLE.pack(MAGIC, VERSION, total, len(packed), len(text)) + packed + body
    return blob + hashlib.sha256(blob).digest()


class ParsedHeader(NamedTuple):
    """What a header says is in the file, as far as that can be checked without the model."""

    fields: dict[str, Any]  # the caller's
    layout: str  # digest of the model's layout
    records: list[list[int]]
    streams: list[tuple[str, bytes]]  # (coder, packed)
    sections: dict[str, bytes]
    limit: int  # bytes that the streams may unpack to


def is_list_of(rows: Any, *kinds: type) -> bool:
    """Whether `rows` is a list of lists of values of these types, numbers not negative."""
    return isinstance(rows, list) and all(isinstance(row, list) and [type(x) for x in row] == list(kinds) for row in rows) and all(
        x >= 0 for row in rows for x in row if type(x) is int)  # fmt: skip


def read_header(blob: bytes) -> ParsedHeader:
    """Validate everything but the contents of streams and sections.

    Raises ArtifactError for a foreign, future, truncated, damaged or inconsistent file. Allocates no tensor.
    """
    if blob[:4] != MAGIC:
        raise ArtifactError(f"not an artifact of this script: it begins with {bytes(blob[:4])!r}, not {MAGIC!r}")
    if len(blob) < PREAMBLE.size + CHECKSUM_BYTES:
        raise ArtifactError(f"the file is truncated: {len(blob)} bytes are less than an empty artifact; copy it again")
    _, version, total, packed, raw = PREAMBLE.unpack_from(blob)
    if version != VERSION:
        commit = OLDER_READERS.get(version)
        script = f"train_gpt.py as of commit {commit}" if commit else "the script that wrote it"
        raise ArtifactError(f"format version {version}, this script reads version {VERSION}: use {script}")
    if len(blob) != total:
        what = "is truncated" if len(blob) < total else "has bytes appended"
        raise ArtifactError(f"the file {what}: {len(blob)} bytes instead of {total}; copy it again")
    if hashlib.sha256(memoryview(blob)[:-CHECKSUM_BYTES]).digest() != blob[-CHECKSUM_BYTES:]:
        raise ArtifactError("the checksum differs: the file was damaged after it was written; copy it again")
    if packed > total - PREAMBLE.size - CHECKSUM_BYTES or raw > MAX_HEADER_BYTES:
        raise ArtifactError(f"the header claims {packed} bytes packed and {raw} unpacked, which cannot be")
    text = lzma_unpack(blob[PREAMBLE.size : PREAMBLE.size + packed], raw)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ArtifactError("the header is not a JSON object")
    layout, records, sizes, sections = (fields.pop(name, None) for name in ("layout", "tensors", "streams", "sections"))
    if not (isinstance(layout, str) and isinstance(records, list) and all(isinstance(row, list) for row in records)):
        raise ArtifactError("the header does not say how its tensors are coded")
    if not is_list_of(sizes, str, int) or not is_list_of(sections, str, int):
        raise ArtifactError("the header does not list its streams and sections")
    at, parts = PREAMBLE.size + packed, []
    for size in (size for _, size in [*sizes, *sections]):
        parts.append(blob[at : at + size])
        at += size
    if at != total - CHECKSUM_BYTES:
        raise ArtifactError("streams and sections do not fill the file")
    streams = [(coder, part) for (coder, _), part in zip(sizes, parts, strict=False)]
    named = {name: part for (name, _), part in zip(sections, parts[len(sizes) :], strict=True)}
    if len(named) < len(sections):
        raise ArtifactError("two sections have the same name")
    return ParsedHeader(fields, layout, records, streams, named, raw_limit(total))


def open_entries(header: ParsedHeader, layout: Layout) -> list[TensorEntry]:
    """How the file's tensors lie in it. Records and streams must be those that the model's layout implies, before any is decoded."""
    if header.layout != layout_digest(layout) or len(header.records) != len(layout):
        raise ArtifactError("its tensors are not those that this script makes of its configuration: use the script that "
                            "wrote it")  # fmt: skip
    entries = []
    for (name, (shape, role)), record in zip(layout.items(), header.records, strict=True):
        good = 1 <= len(record) <= 5 and all(type(n) is int for n in record)
        entries.append(TensorEntry(tuple(shape), role, *record if good else (0,)))
        if not entries[-1].is_possible():
            raise ArtifactError(f"tensor {name[:80]!r}: impossible record {str(record)[:80]}")
    plan, size = stream_plan(entries), 0
    if len(plan) != len(header.streams):
        raise ArtifactError("the streams are not those of its tensors")
    for ((role, kind), members), (coder, _) in zip(plan.items(), header.streams, strict=True):
        if coder not in BYTE_UNPACKERS and not (coder == "codes" and kind in CODED_KINDS):
            raise ArtifactError(f"stream {role}.{kind}: unknown coder {coder[:20]!r}")
        size += sum(map(math.prod, members.values())) * KINDS[kind].itemsize
    if size > header.limit:
        raise ArtifactError(f"the tensors would take more than {header.limit} bytes, too much for a file of this size")
    return entries


def unpack(blob: bytes, layout: Layout) -> tuple[dict[str, Any], dict[str, QuantizedTensor]]:
    """Inverse of pack: (header, tensors in the order of `layout`, the model's own). Data only, nothing in the file is executed.

    Raises ArtifactError, before any tensor is allocated where the file is not one of this layout.
    """
    header = read_header(blob)
    entries, found = open_entries(header, layout), {}
    for ((_, kind), members), (coder, packed) in zip(stream_plan(entries).items(), header.streams, strict=True):
        found.update(zip(members, decode_stream(kind, coder, packed, [*members.values()]), strict=True))
    arrays = [[found[i, j] for j in range(len(entry.parts()))] for i, entry in enumerate(entries)]
    return header.fields, {name: restore(name, *tensor) for name, *tensor in zip(layout, entries, arrays, strict=True)}


def restore(name: str, entry: TensorEntry, arrays: list[Tensor]) -> QuantizedTensor:
    """A tensor from its arrays; codes beyond its width and numbers that are not finite are refused."""
    if not all(torch.isfinite(part).all() for part in arrays if part.is_floating_point()):
        raise ArtifactError(f"tensor {name[:80]!r} holds NaN or Inf")
    if entry.bits > 8:
        return QuantizedTensor(entry.role, entry.bits, entry.shape, values=arrays[0])
    codes, scale, *correction = arrays
    columns = correction.pop(0)[0] if entry.columns else None
    top = largest_code(PATH_BITS if entry.trellis else entry.bits)
    if codes.min() < -top or codes.max() > top:
        raise ArtifactError(f"tensor {name[:80]!r} holds codes beyond +-{top}")
    low_rank = LowRank(*correction, entry.group) if correction else None
    return QuantizedTensor(entry.role, entry.bits, entry.shape, None, codes, scale, columns, entry.trellis, low_rank)


# ---- the size account


def role_bytes(blob: bytes, layout: Layout) -> dict[str, dict[str, float]]:
    """By role: parameters, bytes in the file, bits per weight; "ngram" are sections, "container" preamble, header, checksum."""
    header, params, sizes = read_header(blob), Counter(), Counter()
    for shape, role in layout.values():
        params[role] += math.prod(shape)
    for (role, _), (_, packed) in zip(stream_plan(open_entries(header, layout)), header.streams, strict=True):
        sizes[role] += len(packed)
    roles = {role: {"params": n, "bytes": sizes[role], "bits_per_weight": round(8 * sizes[role] / n, 4)}
             for role, n in sorted(params.items())}  # fmt: skip
    rest = {"ngram": sum(map(len, header.sections.values()))} if header.sections else {}
    rest["container"] = len(blob) - sum(sizes.values()) - sum(rest.values())
    return roles | {role: {"params": 0, "bytes": size, "bits_per_weight": 0.0} for role, size in rest.items()}


def size_table(roles: dict[str, dict[str, float]]) -> str:
    """The account of `role_bytes` as text, one line a role."""
    lines = [f"size {'role':<10}{'params':>12}{'bytes':>12}{'bits/weight':>13}"]
    lines += [f"size {r:<10}{s['params']:>12,}{s['bytes']:>12,}{s['bits_per_weight']:>13.3f}" for r, s in roles.items()]
    return "\n".join(lines)


# ---- the byte budget
#
# A tensor's codes cost about log2(spread / step) bits each, its error about step^2 times its Fisher information. One
# price of a byte for all tensors, found by bisection, sets every step. What the curves missed is corrected against the
# packed file, by a secant; two files do for models of millions of weights. The last bytes go to one tensor at a time.

STEP_GRID = np.exp2(np.arange(-11, 5) / 2)  # steps tried, in rms weights; along a trellis in halves of these
LEAST_BITS = 0.02  # a weight, at the coarsest steps of a tensor that has some entropy
BUDGET_FLOOR, BUDGET_AIM = 0.995, 0.9975  # fractions of TARGET_BYTES: accepted from, aimed at
MAX_PACKS = 8  # four, unless none of those fits
CURVE_ROWS = 256  # rows that a curve is measured on; paths are searched in half of them
PATH_COLUMNS = 128  # and in as many columns: nothing is compensated there, so any columns will do
LEFT_BYTES, LAST_TRIES = 2000, 8  # what may be left of TARGET_BYTES, and how often less is tried
# Seconds to try a code's prediction, over those to search it once in one state: by these the ranks share curves out evenly.
PREDICTION_COST = 20


class RateDistortion(NamedTuple):
    """What a tensor costs over `STEP_GRID`: bits of its codes, and expected added loss in nats a token."""

    unit: float  # the rms weight, along a trellis half of it
    row_factor_R: Tensor  # steps of rows relative to the tensor's
    bits: np.ndarray
    loss: np.ndarray

    def at(self, step: Any) -> tuple[Any, Any]:
        """Bits and added loss at a step, or at several, in units."""
        octave, grid = np.log2(step), np.log2(STEP_GRID)
        return np.interp(octave, grid, self.bits), np.exp(np.interp(octave, grid, np.log(self.loss)))

    def step_at(self, bits: float) -> float:
        """The step, in units, at which the codes take `bits`."""
        return 2.0 ** float(np.interp(-bits, -self.bits, np.log2(STEP_GRID)))

    def price(self, step: float) -> float:
        """Nats a token that one more bit saves at a step."""
        (bits, loss), (finer_bits, finer_loss) = self.at(step * 2**0.25), self.at(step * 2**-0.25)
        return max(loss - finer_loss, 0.0) / max(finer_bits - bits, 1.0)


def row_factors(fisher_R: Tensor) -> Tensor:
    """Steps of an embedding's rows: step ~ 1 / sqrt(Fisher information), rounded to powers of sqrt(2), within 1/4..4.

    Rare tokens' rows matter less in proportion to their frequency, and the equal split of the added loss is the optimal one.
    """
    importance_R = fisher_R + 0.02 * fisher_R.mean() + 1e-30
    octaves_R = -0.5 * torch.log2(importance_R / importance_R.log().mean().exp())
    return torch.exp2((2 * octaves_R).round().clamp(-4, 4) / 2)


def measure_curve(w_RC: Tensor, role: str, fisher_R: Tensor, gain: float, states: int = 0) -> RateDistortion:
    """Code a sample of rows at every step of the grid; `gain` is the fraction of the error that GPTQ leaves, `states` the trellis'."""
    unit = float(w_RC.square().mean().sqrt().clamp_min(1e-8)) / (2 if states else 1)
    by_row = role in PREDICTED_ROLES and w_RC.shape[0] > 1
    factor_R = row_factors(fisher_R) if by_row else torch.ones_like(fisher_R)
    most = CURVE_ROWS // 2 if states and not by_row else CURVE_ROWS
    pick = torch.linspace(0, len(w_RC) - 1, min(len(w_RC), most), device=w_RC.device).long()
    w, all_scales = w_RC[pick], [steps_by_row(w_RC, step, factor_R, states) for step in STEP_GRID * unit]
    scales = [scale[pick] for scale in all_scales]
    if states:
        w = w[:, torch.linspace(0, w.shape[1] - 1, min(w.shape[1], PATH_COLUMNS), device=w.device).long()]
        found = TrellisSearch(torch.stack([w / scale.float()[:, None] for scale in scales]), None, states).codes()
    else:
        found = [nearest_codes(w / scale.float()[:, None], largest_code(8)) for scale in scales]
    bits, loss = [], []
    for everywhere, scale, codes in zip(all_scales, scales, found, strict=True):
        error = (codes.float() * scale.float()[:, None] - w).square().mean(dim=1)
        # An error goes with its step: what sampled rows are off by is scaled by the steps and importance of all rows.
        sampled = float(fisher_R[pick] @ scale.float().square())
        factor = float(fisher_R @ everywhere.float().square()) / max(sampled, 1e-30)
        spread, values, _ = plan_codes(codes.cpu().numpy(), False, states)
        bits.append(described_bits(spread, values, states, len(w_RC)) * w_RC.shape[1] / w.shape[1])
        loss.append(0.5 * gain * float(fisher_R[pick] @ error) * factor + 1e-30)
    saved = 0.0
    if by_row:  # by predicting columns, nearly the same for all fine steps
        step_R1 = steps_by_row(w_RC, 0.25 * unit, factor_R).float()[:, None]
        codes_RC = nearest_codes(w_RC / step_R1, largest_code(8)).cpu().numpy()
        saved = plan_codes(codes_RC, predictable=False)[2] - plan_codes(codes_RC, predictable=True)[2]
    bits = np.maximum.accumulate(np.array(bits)[::-1])[::-1]  # of a coarser step never more: interpolation needs it
    return RateDistortion(unit, factor_R, np.maximum(bits - saved, LEAST_BITS * w_RC.numel()), np.array(loss))


def choose_steps(curves: dict[str, RateDistortion], budget_bits: float) -> tuple[dict[str, float], dict[str, float]]:
    """Steps (in units) and predicted bits by name with the least added loss within `budget_bits`."""
    steps = np.exp2(np.arange(-352, 129) / 64)
    bits, loss = (np.stack(part) for part in zip(*(curve.at(steps) for curve in curves.values()), strict=True))
    index = np.arange(len(curves))
    low, high = -80.0, 40.0  # log2 of the price of a bit in nats
    for _ in range(60):
        price = (low + high) / 2
        chosen = (loss + 2.0**price * bits).argmin(axis=1)
        low, high = (price, high) if bits[index, chosen].sum() > budget_bits else (low, price)
    chosen = (loss + 2.0**high * bits).argmin(axis=1)
    left = budget_bits - bits[index, chosen].sum()
    for i in np.argsort(-loss[index, chosen]):  # one price leaves a gap where a curve is not convex
        finer = np.where(bits[i] <= bits[i, chosen[i]] + left, loss[i], np.inf).argmin() if left > 0 else chosen[i]
        left += bits[i, chosen[i]] - bits[i, finer]
        chosen[i] = finer
    found = steps[chosen].tolist(), bits[index, chosen].tolist()
    return tuple(dict(zip(curves, part, strict=True)) for part in found)


class Budget(NamedTuple):
    """A packed model with the prediction that led to it."""

    stored: dict[str, QuantizedTensor]
    blob: bytes
    predicted: dict[str, float]  # role -> bytes of codes
    spent: int  # artifact and code
    steps: dict[str, float]  # in units of the curves


class BudgetSearch:
    """Fills TARGET_BYTES: curves of all tensors that are coded, and files made from them.

    All ranks of `run` do this with equal weights, share curves and searches, and go on in step with what the first of them packs.
    """

    @exact_products()
    def __init__(self, cfg: Config, header: dict[str, Any], named: dict[str, Tensor], store: dict[str, str], calibration: Calibration,
                 code_bytes: int, sections: Mapping[str, bytes] = MappingProxyType({}), run: Run | None = None):  # fmt: skip
        self.cfg, self.header, self.named, self.store, self.sections = cfg, header, named, store, sections
        self.fisher, self.code_bytes, self.run = calibration.fisher, code_bytes, run
        self.policy = Policy(cfg, named, store)
        self.inputs = InputStats(self.policy, calibration.hessians, run)
        coded = [name for name in named if self.policy.bits(name) <= 8]  # QUANT_OVERRIDES and small tensors keep floats
        jobs = [(self.curve_cost(name), functools.partial(self.curve, name)) for name in coded]
        self.curves = dict(zip(coded, share_out(run, jobs), strict=True))
        self.coded: dict = {}  # streams of the last file

    def curve(self, name: str) -> RateDistortion:
        """The curve of a tensor as it will be coded."""
        w_RC, factors = self.inputs.to_round(name)
        gain = 1.0 if factors is None else factors.gain
        return measure_curve(w_RC, self.store[name], self.fisher[name], gain, self.inputs.states[name])

    def curve_cost(self, name: str) -> float:
        """About the seconds of `curve`, relative to others'."""
        rows, columns = rows_and_columns(self.named[name].shape)
        sample = min(rows, CURVE_ROWS) * min(columns, PATH_COLUMNS) * (2 + self.inputs.states[name])
        return sample + (PREDICTION_COST * rows * columns if self.store[name] in PREDICTED_ROLES else 0)

    @exact_products()
    def fill(self) -> Budget:
        """Quantise and pack so that artifact + code fill TARGET_BYTES up to the last LEFT_BYTES or 0.5 %, never more.

        A model too small to fill it is packed at the finest steps. Raises ConfigError if the coarsest steps are too large.
        """
        target, slope, best, before = self.cfg.target_bytes, 1.0, None, None
        finest, coarsest = (sum(c.bits[i] for c in self.curves.values()) / 8 for i in (0, -1))
        floats = sum(2 * self.named[n].numel() for n in self.named.keys() - self.curves.keys())
        room = BUDGET_AIM * target - self.code_bytes - sum(map(len, self.sections.values())) - 2000 - floats
        for attempt in range(MAX_PACKS):
            room = max(room, coarsest)
            found = self.pack_at(room)
            fits = found.spent <= target
            if fits and (best is None or found.spent > best.spent):
                best = found
            full = found.spent >= BUDGET_FLOOR * target or room >= finest
            if (full if fits else room <= coarsest) or (attempt >= 3 and best is not None):
                break
            if before is not None and room != before[0]:
                slope = min(max((found.spent - before[1]) / (room - before[0]), 0.3), 2.0)
            before = room, found.spent
            room += (BUDGET_AIM * target - found.spent) / slope
        if best is None:
            sizes = ", ".join(f"{r} {s['bytes']:,}" for r, s in role_bytes(found.blob, layout_of(found.stored)).items())
            raise ConfigError(f"TARGET_BYTES={target} cannot be met: the smallest total is {found.spent:,} bytes (code {self.code_bytes:,}, {sizes}); "
                              "a smaller model or fewer high-precision tensors would do")  # fmt: skip
        # One tensor's codes are settled without the others' unless all are pruned together.
        alone = not self.cfg.prune_frac or self.cfg.prune_scope == "tensor"
        return self.spend_rest(best) if alone else best

    def pack_at(self, room: float) -> Budget:
        """The file whose codes are predicted to take `room` bytes."""
        steps, bits = choose_steps(self.curves, 8 * room)
        roles = sorted(set(self.store.values()))
        predicted = {role: sum(b for n, b in bits.items() if self.store[n] == role) / 8 for role in roles}
        stored = self.quantize_at(steps, self.named)
        correct_residuals_(self.policy, stored, lambda name, *found: self.correction_pays(name, *found, steps[name]))
        return self.pack_stored(steps, stored, predicted)

    def quantize_at(self, steps: dict[str, float], names: Iterable[str]) -> dict[str, QuantizedTensor]:
        """These tensors at `steps`."""
        scales = {}
        for name in filter(self.curves.__contains__, names):
            curve, w_RC = self.curves[name], self.inputs.to_round(name)[0]
            scales[name] = steps_by_row(w_RC, steps[name] * curve.unit, curve.row_factor_R, self.inputs.states[name])
        return store_tensors(self.inputs, names, scales, self.run)

    def pack_stored(
        self, steps: dict[str, float], stored: dict[str, QuantizedTensor], predicted: dict[str, float]
    ) -> Budget:
        """The file of these tensors, from the first rank."""
        make = functools.partial(pack, self.cfg, self.header, stored, self.sections, self.coded)
        blob = self.run.on_first(make) if self.run else make()
        return Budget(stored, blob, predicted, len(blob) + self.code_bytes, steps)

    def correction_pays(self, name: str, low_rank: LowRank, residual_RC: Tensor, step: float) -> bool:
        """Whether a low-rank correction saves more than its bytes would as finer steps."""
        h_CC, fisher_R, curve = self.inputs.moments[name], self.fisher[name].cpu(), self.curves[name]

        def loss(error_RC: Tensor) -> float:
            moved_RC = error_RC if h_CC is None else error_RC @ h_CC.cpu()
            return float(fisher_R @ (moved_RC * error_RC).sum(dim=1))

        saved = 1 - loss(residual_RC - low_rank.product()) / max(loss(residual_RC), 1e-30)
        bits = sum(plan_codes(part.numpy(), False)[2] for part in (low_rank.left, low_rank.right))
        bits += 16 * (low_rank.left_scale.numel() + low_rank.right_scale.numel())
        return saved * curve.at(step)[1] > curve.price(step) * bits

    def spend_rest(self, best: Budget) -> Budget:
        """Give what is left to one tensor after the other, until LEFT_BYTES or less are left or LAST_TRIES are over."""
        fraction = 1.0  # of what is left that a curve is asked for, so that the file takes about all of it
        for _ in range(LAST_TRIES):
            left = self.cfg.target_bytes - best.spent
            refined = self.refine(best, fraction * (left - LEFT_BYTES / 2)) if left > LEFT_BYTES else None
            if refined is None:
                break
            found = self.pack_stored(*refined, best.predicted)
            fraction *= min(max((left - LEFT_BYTES / 2) / max(found.spent - best.spent, 1.0), 0.25), 4.0)
            if best.spent < found.spent <= self.cfg.target_bytes:
                best = found
        return best

    def refine(self, best: Budget, wanted: float) -> tuple[dict[str, float], dict[str, QuantizedTensor]] | None:
        """Steps and tensors in which one tensor takes about `wanted` bytes more: the one whose loss falls most, but none of
        more than twice the mean size, since it is searched anew. None if no tensor can."""
        gains, most = {}, 2 * sum(self.named[n].numel() for n in self.curves) / len(self.curves)
        for name, curve in self.curves.items():
            bits, loss = curve.at(best.steps[name])
            room = bits + 8 * wanted < curve.bits[0] and best.stored[name].low_rank is None
            if room and self.named[name].numel() <= most:
                finer = curve.step_at(bits + 8 * wanted)
                gains[loss - curve.at(finer)[1]] = name, finer
        if not gains:
            return None
        name, finer = gains[max(gains)]
        steps = {**best.steps, name: finer}
        return steps, {**best.stored, **self.quantize_at(steps, [name])}


def budget_table(budget: Budget, target: int) -> str:
    """Predicted against real bytes by role, and what was left."""
    real = role_bytes(budget.blob, layout_of(budget.stored))
    lines = [
        f"budget {role:<10} predicted:{size:>12,.0f} real:{real[role]['bytes']:>12,} bits/weight:{real[role]['bits_per_weight']:.3f}"
        for role, size in sorted(budget.predicted.items())
        if size
    ]
    left = target - budget.spent
    return "\n".join([*lines, f"budget total:{budget.spent} target:{target} left:{left} ({100 * left / target:.2f}%)"])


# ---- the code's own bytes


def as_literal(packed: bytes) -> bytes:
    """Bytes as a string literal of a latin-1 source file: each stands for itself but for NUL, CR, backslash, and a quote before a quote."""
    escapes = {b"\r": b"\\r", b'"': b'\\"', b"\\": b"\\\\"}
    nul = lambda m: b"\\000" if packed[m.end() : m.end() + 1].isdigit() else b"\\0"  # noqa: E731
    return b'"""' + re.sub(rb'[\0\r\\]|"(?="|\Z)', lambda m: escapes.get(m[0]) or nul(m), packed) + b'"""'


def self_extracting(text: str) -> bytes:
    """A script that unpacks and runs the script `text`; it shows linecache its lines, for tracebacks and Triton.

    By bzip2 or LZMA, whichever is smaller: compressors that every Python has. tools/pack_code.py calls this copy of it.
    """
    lzma1 = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    raw = text.encode()
    forms = {b"bz2": bz2.compress(raw), b"lzma": lzma.compress(raw, lzma.FORMAT_ALONE, filters=lzma1)}
    name, packed = min(forms.items(), key=lambda form: len(form[1]))
    return (
        b"#coding:latin-1\nimport %b,linecache\n"
        b'__source__=%b.decompress(%b.encode("latin-1")).decode()\n'
        b'n=__file__+" (unpacked)"\n'
        b"linecache.cache[n]=(len(__source__),None,__source__.splitlines(True),n)\n"
        b'exec(compile(__source__,n,"exec"))\n'
    ) % (name, name, as_literal(packed))


def start_packing(cfg: Config) -> None:
    """Begin to pack this script in a process of its own, where CODE_FORM=packed counts that and tools/pack_code.py lies beside it."""
    Run.packing = None
    if not PACKED:
        tool = SCRIPT.parent / "tools" / "pack_code.py"
        if cfg.code_form == "packed" and tool.is_file():
            with tempfile.TemporaryFile() as text:
                text.write(script_bytes())
                text.seek(0)
                command = [sys.executable, tool, "-"]
                Run.packing = subprocess.Popen(command, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def counted_code(cfg: Config) -> tuple[bytes, str]:
    """(the bytes of this script that count against the limit, a notice or ""), once `start_packing` was called.

    A packed script counts as its file is, and so does any with CODE_FORM=source; another counts as it would be packed.
    """
    if not PACKED:
        if cfg.code_form == "packed" and Run.packing is None:
            packed = self_extracting(source_text())
            return packed, (f"the code counts {len(packed)} bytes with its comments: tools/pack_code.py, which takes them out, "
                            "is not beside it")  # fmt: skip
        if cfg.code_form == "packed":
            packed, errors = Run.packing.communicate()
            if Run.packing.returncode:
                last = errors.decode(errors="replace").strip().rpartition("\n")[2][:300]
                raise ConfigError(
                    f"tools/pack_code.py cannot pack this script ({last}): mend it, or set CODE_FORM=source"
                )
            return packed, ""
    return script_bytes(), ""


# ---- n-grams of the training text as sections of the artifact


def pack_hashed(cells: dict[int, np.ndarray], preset: int) -> bytes:
    """#1095's tables, uint16 in order of their sizes' table, as one LZMA stream."""
    return lzma_pack(b"".join(cells[n].astype("<u2").tobytes() for n in HASHED_SIZES), preset)


def unpack_hashed(packed: bytes) -> dict[int, np.ndarray]:
    """Inverse of pack_hashed."""
    flat = np.frombuffer(lzma_unpack(packed, 2 * sum(HASHED_SIZES.values())), "<u2")
    return dict(zip(HASHED_SIZES, np.split(flat, np.cumsum(list(HASHED_SIZES.values()))[:-1]), strict=True))


class TrieLevel(NamedTuple):
    """n-grams of one length in a trie, (n,) int64 each, sorted by (parent, token). Level 0 is the empty gram."""

    parent: np.ndarray  # row, in the level before, of the gram without its last token
    token: np.ndarray  # its last token
    size: np.ndarray  # 2 log2 of its count, rounded
    suffix: np.ndarray  # row, in the level before, of the gram without its first token

    def siblings(self, parents: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows by parent, frequent ones first; (parents + 1,) where each parent's begin)."""
        order = np.lexsort((self.token, -self.size, self.parent))
        return order, np.searchsorted(self.parent, np.arange(parents + 1))


ROOT = TrieLevel(*np.zeros((4, 1), np.int64))
MAX_GRAM = FIELDS["NGRAM_TABLE_ORDER"].metadata["hi"]


def group_equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct keys in rising order, which of them each is, how often each occurs), like np.unique but several times faster:
    plain integers that carry their index are sorted by vector instructions."""
    bits = max(len(keys) - 1, 1).bit_length()
    if int(keys.max(initial=0)).bit_length() + bits < 63:
        packed = np.sort(keys << bits | np.arange(len(keys)))
        keys, order = packed >> bits, packed & ((1 << bits) - 1)
    else:
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
    heads = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    counts = np.diff(heads, append=len(keys))
    group = np.empty(len(keys), np.int64)
    group[order] = np.repeat(np.arange(len(heads)), counts)
    return keys[heads], group, counts


def count_grams(tokens: np.ndarray, vocab_size: int, order: int) -> Iterator[tuple[TrieLevel, np.ndarray]]:
    """(level, counts) of every n-gram of 1 .. order tokens; those longer than 1 occur twice or more."""
    before, at = ROOT, np.zeros(len(tokens), np.int64)  # at[t]: row of the gram that ends at t - 1
    for n in range(1, order + 1):
        live = np.flatnonzero(at >= 0)
        keys, rows, counts = group_equal(at[live] * vocab_size + tokens[live])
        kept = counts >= min(n, 2)
        parent, token = np.divmod(keys[kept], vocab_size)
        suffix = np.zeros_like(parent)
        if n > 1:
            wanted = before.suffix[parent] * vocab_size + token
            suffix = np.searchsorted(before.parent * vocab_size + before.token, wanted)
        before = TrieLevel(parent, token, np.rint(2 * np.log2(counts[kept])).astype(np.int64), suffix)
        yield before, counts[kept]
        at = np.full(len(tokens), -1)
        at[live] = np.where(kept, np.cumsum(kept) - 1, -1)[rows]
        at = np.concatenate([[-1], at[:-1]])


def gram_gains(grams: list[tuple[TrieLevel, np.ndarray]]) -> list[np.ndarray]:
    """Bits that each gram's own probability saves over its suffix's in the text it was counted in; infinite for single tokens."""
    gains, before = [np.full(len(grams[0][1]), np.inf)], grams[0][1] / grams[0][1].sum()
    for level, counts in itertools.islice(grams, 1, None):
        rest = counts - 0.8  # a gram seen twice will not be seen as often again
        gains.append(rest * np.log2(rest / np.bincount(level.parent, counts)[level.parent] / before[level.suffix]))
        before = counts / np.bincount(level.parent, counts)[level.parent]
    return gains


def prune_grams(grams: list[tuple[TrieLevel, np.ndarray]], gains: list[np.ndarray], least: float) -> list[TrieLevel]:
    """Grams that gain `least` bits or more, with all their prefixes and suffixes."""
    kept = [gain >= least for gain in gains]
    for n in range(len(grams) - 1, 0, -1):
        level = grams[n][0]
        kept[n - 1][level.parent[kept[n]]] = True
        kept[n - 1][level.suffix[kept[n]]] = True
    rows = [np.zeros(1, np.int64), *(np.cumsum(k) - 1 for k in kept)]  # old row -> new row
    return [
        TrieLevel(rows[n][level.parent[k]], level.token[k], level.size[k], rows[n][level.suffix[k]])
        for n, ((level, _), k) in enumerate(zip(grams, kept, strict=True))
    ]


def code_level(
    coder: StreamCoder, levels: list[TrieLevel], vocab_size: int, level: TrieLevel | None, limit: int
) -> TrieLevel:
    """Write the level after `levels`, or read it (None): one function codes in both directions, so the two cannot drift apart.

    Each gram's followers are some of its suffix's followers. They are coded as gaps between their ranks there, by frequency,
    and their sizes as what they lack of the smaller of prefix and suffix. `limit` is the most grams that may be read.
    """
    parents, first = levels[-1], len(levels) == 1
    order, start = np.arange(vocab_size), np.array([0, vocab_size])
    if not first:
        order, start = parents.siblings(len(levels[-2].token))
    room = np.diff(start)[parents.suffix]
    kids = None if level is None else np.bincount(level.parent, minlength=len(room))
    kids = coder.numbers(parents.size.clip(max=40), kids)
    if kids.sum() > limit or (kids > room).any():
        raise ArtifactError("a table of n-grams holds more than it can")
    owner = np.repeat(np.arange(len(kids)), kids)
    begins = np.cumsum(kids) - kids
    nth = np.arange(len(owner)) - begins[owner]
    gap = missing = None
    if level is not None:
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        rank = place[level.token if first else level.suffix] - start[parents.suffix[level.parent]]
        sort = np.lexsort((rank, level.parent))
        gap = np.diff(rank[sort], prepend=-1) - 1
        gap[begins[kids > 0]] = rank[sort][begins[kids > 0]]
    spread = np.frexp((room // (kids + 1)).astype(np.float64))[1]
    steps = np.cumsum(coder.numbers(spread[owner] * 4 + nth.clip(max=3), gap) + 1)
    rank = steps - 1 - np.concatenate([[0], steps])[begins[owner]]
    if (rank >= room[owner]).any():
        raise ArtifactError("a table of n-grams names a follower that is none")
    row = order[start[parents.suffix[owner]] + rank]
    most = np.zeros_like(row) if first else np.minimum(parents.size[owner], parents.size[row])
    if level is not None:
        missing = level.size[sort] if first else most - level.size[sort]
    missing = coder.numbers(most.clip(max=30) * 4 + kids[owner].clip(max=3), missing)
    size = missing if first else most - missing
    if (size < 0).any() or (size > 80).any():
        raise ArtifactError("a table of n-grams holds an impossible count")
    token = row if first else parents.token[row]
    sort = np.argsort(owner * vocab_size + token, kind="stable")
    return TrieLevel(*(x[sort] for x in (owner, token, size, np.zeros_like(row) if first else row)))


def pack_trie(levels: list[TrieLevel], vocab_size: int) -> bytes:
    """Levels 1, 2 .. of a trie as one section."""
    coder = StreamCoder()
    coder.numbers(np.zeros(1, int), np.array([len(levels)]))
    for n, level in enumerate(levels):
        code_level(coder, [ROOT, *levels[:n]], vocab_size, level, len(level.token))
    return coder.finish()


def unpack_trie(packed: bytes, vocab_size: int) -> list[TrieLevel]:
    """Inverse of pack_trie. Raises ArtifactError."""
    coder, levels, left = StreamCoder(packed), [ROOT], (1 << 16) + 16 * len(packed)
    depth = int(coder.numbers(np.zeros(1, int))[0])
    if depth > MAX_GRAM:
        raise ArtifactError(f"a table of n-grams of up to {depth} tokens, {MAX_GRAM} at most")
    for _ in range(depth):
        levels.append(code_level(coder, levels, vocab_size, None, left))
        left -= len(levels[-1].token)
    coder.finish()
    return levels[1:]


def build_trie(tokens: np.ndarray, vocab_size: int, order: int, limit: int) -> bytes:
    """The n-grams of a text that gain the most bits, in at most `limit` bytes; all that gain anything if they fit.

    Single tokens are always there, also where they alone take more.
    """
    grams = list(count_grams(tokens, vocab_size, order))
    gains = gram_gains(grams)
    ranked = np.sort(np.concatenate([gain[gain > 0] for gain in gains]))[::-1]
    best, low, high = pack_trie([level for level, _ in grams[:1]], vocab_size), 0, len(ranked) + 1
    wanted = min(len(ranked), int(8 * limit / 7))  # grams chosen for themselves; their prefixes and suffixes come along
    for _ in range(8):
        if high - low < 2:
            break
        packed = pack_trie(prune_grams(grams, gains, ranked[wanted - 1]), vocab_size)
        fits = len(packed) <= limit
        low, high = (wanted, high) if fits else (low, wanted)
        if fits:
            best = max(best, packed, key=len)
            if len(packed) > 0.98 * limit:
                break
        wanted = int(0.992 * wanted * limit / len(packed))
        wanted = wanted if low < wanted < high else (low + high) // 2
    return best


# ==== 9 EVALUATOR =====================================================================================================
# The score is a code length: each target is scored once, from left to right, by a distribution that depends on the artifact
# and on the tokens before it alone; only then may anything learn from it. `score_first` is the one driver of this rule.
#
#   target        a token that is scored; position t of the stream, whose prefix is tokens[:t]
#   window        what one forward of the network reads; the targets that it scores are its last ones
#   span, chunk   targets that are scored before the next learning: span in the n-grams, chunk in test-time training
#   context       the k tokens before a target; an n-gram is a context of n - 1 tokens with its target; order: its n
#   C, c, U       occurrences of a context before, those of them that its target followed, distinct tokens that followed
#   expert        gives a distribution and learns from scored targets; its base is the expert that it corrects
#   score, dist, update    log-probabilities of targets; the whole distribution at one; learning
#   claim         the figure of a published scorer whose values do not sum to 1 over the vocabulary: never the score
#   stage         one pass over the validation text with one expert; the last valid one is the score


@dataclass
class StageResult:
    """What a stage has scored so far: nats in float64, tokens, bytes of text, and seconds of the whole."""

    stage: str = ""
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, logp: Tensor, byte_counts: Tensor) -> None:
        """Count targets with natural log-probabilities `logp` (n,) that add `byte_counts` (n,) bytes of text."""
        self.nats -= float(logp.double().sum())
        self.tokens += logp.numel()
        self.bytes += int(byte_counts.sum())

    @property
    def val_loss(self) -> float:
        """Mean nats a token."""
        return self.nats / max(self.tokens, 1)

    @property
    def val_bpb(self) -> float:
        """Bits a byte of text."""
        return self.nats / math.log(2) / max(self.bytes, 1)


class Expert(Protocol):
    """Gives a distribution of the next token; score() may use what update() learned from tokens before lo, nothing else."""

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        """Natural log of the probabilities of tokens[lo:hi], (hi-lo,) float64."""

    def dist(self, tokens: Tensor, t: int) -> Tensor:
        """The whole distribution at target t, (V,) float64, from tokens[:t] and what score(t) used; called after it."""

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:
        """Learn from tokens[lo:hi], all of them scored."""


def score_then_learn(
    tokens: Tensor, n: int, edge: Callable[[int], int], chain: Sequence[Expert]
) -> Iterator[tuple[int, int, Tensor]]:
    """The one loop of the evaluation. Yields (lo, hi, scores) of one span of the targets 1 .. n-1 after the other: the last expert of
    the chain scores it, the caller takes it, and only then all experts learn it. A span that begins at lo ends at edge(lo)."""
    lo = 1
    while lo < n:
        hi = edge(lo)
        yield lo, hi, chain[-1].score(tokens, lo, hi)
        for expert in chain:
            expert.update(tokens, lo, hi)
        lo = hi


class Window(NamedTuple):
    """One forward: inputs tokens[start:hi-1], of whose targets those in [lo, hi) are scored."""

    start: int
    lo: int
    hi: int


def window_at(lo: int, end: int, seq_len: int, stride: int) -> Window:
    """The window that scores target `lo` first: the whole first window, then `stride` targets each with full context.

    `end` (of the stream, or of what may be scored before the next learning) cuts it short, but never moves its start: where a
    document ends is the future.
    """
    full = lo + (seq_len if lo == 1 else stride)
    return Window(max(0, full - 1 - seq_len), lo, min(full, end))


def score_logits(z_BTV: Tensor, targets_BT: Tensor, hints_BT: Tensor) -> Tensor:
    """(3, B, T) from logits: log p of the targets, entropy in nats, probability of the hints."""
    lse = z_BTV.logsumexp(-1)
    p = torch.exp(z_BTV - lse[..., None])
    logp = z_BTV.gather(-1, targets_BT[..., None]).squeeze(-1) - lse
    hint_prob = p.gather(-1, hints_BT[..., None]).squeeze(-1)
    return torch.stack([logp, lse - (p * z_BTV).sum(-1), hint_prob])


def in_parts(items: list[Any], rows: int, work: Callable[[list[Any]], None], what: str) -> int:
    """work(part) on parts of `items` of at most `rows`, halved for good once memory runs out, when the part starts again; returns how
    many fit. ConfigError with `what`, a knob and one item, where not even that does."""
    while items:
        part, fits = items[:rows], False
        with contextlib.suppress(torch.OutOfMemoryError):
            work(part)
            fits = True
        if fits:
            items = items[len(part) :]
        elif len(part) == 1:
            raise ConfigError(f"{what} does not fit in memory; use a shorter one")
        else:
            rows = len(part) // 2
            torch.cuda.empty_cache()
    return rows


def last_logits(model: GPT, inputs: Tensor, n: int, ctx: Ctx) -> Tensor:
    """Logits of the last n targets of each row, (B, n, V)."""
    return model.logits(model.features(inputs, ctx)[:, -n:], ctx)


def score_windows(model: GPT, ids: Tensor, hints: Tensor, n: int, ctx: Ctx, temperature: float) -> Tensor:
    """`score_logits` of the last n of the targets ids[:, 1:] of each row, (3, B, n)."""
    z = last_logits(model, ids[:, :-1], n, ctx) / temperature
    return score_logits(z, ids[:, -n:], hints[:, -n:])


class NetworkExpert:
    """The network over sliding windows. `score` runs ahead in large batches shared by the ranks, up to the next of the targets
    `edges` at which the network learns (the end alone, without test-time training): so far a score is a function of the prefix.

    After `score(lo, hi)`, `entropy[lo:hi]` holds a prefix-only feature of its distributions, and `hint_prob[lo:hi]` what it gave
    to the tokens in `hints`, which a caller may fill with guesses from the prefix.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, text: ValidationText, stride: int) -> None:
        self.cfg, self.run, self.model, self.tokens, self.n_tokens = cfg, run, model, text.tokens, len(text.tokens)
        self.seq_len, self.stride = cfg.eval_len, min(stride, cfg.eval_len)
        self.ctx, self.temperature = Ctx(), 1.0
        default = 2**17 if run.device.type == "cuda" else 2**13
        self.rows = max(1, (cfg.val_batch_tokens or default) // self.seq_len)
        # How many targets to score ahead: all ranks agree on it, whatever memory each of them has left.
        self.ahead = 16 * self.rows * run.world * self.stride
        device, dtype = text.tokens.device, torch.promote_types(model.compute_dtype, torch.float32)
        self.scored = torch.zeros(3, self.n_tokens, device=device, dtype=dtype)
        self.logp, self.entropy, self.hint_prob = self.scored
        self.hints = torch.zeros(self.n_tokens, dtype=torch.int64, device=device)
        self.done = self.learned = 1  # targets below are scored, are learned
        self.edges = [self.n_tokens]  # rising, the end of the text last
        self.room = self.room_for(text.tokens)
        wanted = run.device.type == "cuda" and cfg.compile != "0"
        self.compiled = torch.compile(score_windows, dynamic=False) if wanted else None

    @property
    def window_step(self) -> int:
        """Full windows begin at multiples of this."""
        return self.stride

    def room_for(self, tokens: Tensor) -> int:
        """How many bounds of segments any full batch of windows of `tokens` has, one more at least, as a power of two; that of the
        rehearsal's windows, which hold one BOS at most, is never larger."""
        if not self.cfg.doc_mask:
            return 0
        begun = F.pad((tokens == BOS).cumsum(0), (1, 0))
        start = torch.arange(0, max(1, len(tokens) - self.seq_len), self.window_step, device=tokens.device)
        ends = (start + self.seq_len).clamp_max(len(tokens))
        begins = begun[ends] - begun[start + 1] + 1  # a row begins a segment anyway
        apart = self.stride // self.window_step
        sums = F.pad(F.pad(begins, (0, -len(begins) % apart)).view(-1, apart).cumsum(0), (0, 0, 1, 0))
        most = int((sums[self.rows :] - sums[: -self.rows]).max() if len(sums) > self.rows else sums[-1].max())
        return 1 << max(most, 2 * self.rows).bit_length()

    def timed(self, action: Callable[[], Any]) -> float:
        """Seconds of a second call, which finds graphs compiled and memory allocated; of the only one where a CPU needs a second for it."""
        seconds = 0.0
        for _ in range(2):
            if seconds <= 1 or self.run.device.type == "cuda":
                started = time.perf_counter()
                action()
                self.run.sync()
                seconds = time.perf_counter() - started
        return seconds

    @torch.no_grad()
    def expected_seconds(self, text: ValidationText) -> float:
        """Seconds that this network will take for `text` on all ranks, from one batch of its own text, which compiles its graph."""
        self.room = self.room_for(text.tokens)
        plan = self.plan(self.n_tokens)
        plan = plan[1 : 1 + self.rehearsed(self.rows)] or plan[:1]
        fresh = torch.zeros(3, self.n_tokens, device=self.run.device, dtype=self.logp.dtype)
        seconds = self.timed(lambda: self.score_batch(self.tokens, plan, fresh))
        return seconds / len(plan) * (len(text.tokens) / self.stride) / self.run.world

    def rehearsed(self, rows: int) -> int:
        """Rows of a batch that is timed: on a CPU one, where a row costs the same alone."""
        return rows if self.run.device.type == "cuda" else 1

    @functools.cached_property
    def enrichment(self) -> Tensor | None:
        """(N,) fp32: how far the pre-enrichment moved the embedding before each target, from its prefix; None without one."""
        if self.model.pre_enrich is None:
            return None
        tokens, reach = self.tokens, 2  # smear and bigram look at two tokens before
        steps = torch.zeros(self.n_tokens, device=self.logp.device)
        for lo in range(0, self.n_tokens - 1, 2**14):
            start, hi = max(0, lo - reach), min(lo + 2**14, self.n_tokens - 1)
            moved = self.model.enrichment(tokens[start:hi][None].to(self.run.device))[0, lo - start :]
            steps[lo + 1 : hi + 1] = moved.to(steps.device)
        return steps

    def next_update(self, t: int) -> int:
        """The first edge after target `t`; at the last one nothing is learned."""
        return self.edges[min(bisect_right(self.edges, t), len(self.edges) - 1)]

    def last_learned(self, t: int) -> int:
        """The first target that was scored by the network as it is at target `t`: the last edge up to it."""
        return self.edges[i - 1] if (i := bisect_right(self.edges, t)) else 1

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        """(hi - lo,) float64 natural log-probabilities of tokens[lo:hi]."""
        while self.done < hi:
            self.score_ahead(tokens, max(hi, self.done + self.ahead))
        return self.logp[lo:hi].double()

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:  # noqa: ARG002
        """Targets below `hi` are scored: learn up to every edge among them, but nothing after the last one."""
        while self.learned < hi and (end := self.next_update(self.learned)) <= hi < self.n_tokens:
            self.learn(tokens, self.learned, end)
            self.learned = end

    def learn(self, tokens: Tensor, lo: int, hi: int) -> None:
        """Learn from the targets [lo, hi), all of them scored."""
        raise NotImplementedError("without test-time training there is no edge before the end")

    @torch.no_grad()
    def dist(self, tokens: Tensor, t: int) -> Tensor:
        """(V,) float64: the whole distribution of target t as the network is now, in the window that scores it."""
        lo, end = self.last_learned(t), self.next_update(t)
        w = window_at(lo, end, self.seq_len, self.stride)
        if t >= w.hi:  # in one of those that follow it, a stride apart
            w = window_at(w.hi + (t - w.hi) // self.stride * self.stride, end, self.seq_len, self.stride)
        inputs = tokens[w.start : t][None].to(self.run.device)
        z = last_logits(self.model, inputs, 1, self.ctx) / self.temperature
        return z[0, 0].cpu().double().softmax(-1)

    def plan(self, until: int) -> list[Window]:
        """Windows from the first target not scored yet to target `until`, or to the next learning."""
        lo, end, windows = self.done, self.next_update(self.done), []
        while lo < min(until, end):
            windows.append(window_at(lo, end, self.seq_len, self.stride))
            lo = windows[-1].hi
        return windows

    @torch.no_grad()
    def score_ahead(self, tokens: Tensor, until: int) -> None:
        """Fill the buffers up to target `until` (or the next learning), each rank a contiguous share of the windows."""
        plan = self.plan(until)
        end = plan[-1].hi
        fresh = torch.zeros(3, end - self.done, device=self.run.device, dtype=self.logp.dtype)
        mine = (plan[i] for i in self.run.share(len(plan)))
        for _, equal in itertools.groupby(mine, lambda w: (w.hi - w.start, w.hi - w.lo)):
            self.score_batch(tokens, list(equal), fresh)
        self.scored[:, self.done : end], self.done = self.run.all_reduce(fresh), end

    def score_rows(self, ids: Tensor, hints: Tensor, n: int) -> Tensor:
        """`score_windows` of the last n targets of each row.

        Compiled for full batches of full windows alone: each odd shape, at the end of a chunk, would compile anew.
        """
        usual = n == self.stride and ids.shape == (self.rows, self.seq_len + 1)
        ctx = self.model.with_segments(ids[:, :-1], self.ctx, self.room if usual else 0)
        args = (self.model, ids, hints, n, ctx, self.temperature)
        if usual and self.compiled is not None:
            try:
                return self.compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as e:
                notice_failed_compile(self.run, e)
                self.compiled = None
        return score_windows(*args)

    def score_batch(self, tokens: Tensor, batch: list[Window], fresh: Tensor) -> None:
        """Score windows of equal shape, one after the other, into `fresh`, whose entry 0 is the first target not scored yet."""

        def score(part: list[Window]) -> None:
            rows = torch.stack([torch.stack([x[w.start : w.hi] for w in part]) for x in (tokens, self.hints)])
            values = self.score_rows(*rows.to(self.run.device), part[0].hi - part[0].lo)
            fresh[:, part[0].lo - self.done : part[-1].hi - self.done] = values.flatten(1)

        self.rows = in_parts(batch, self.rows, score, f"EVAL_SEQ_LEN={self.seq_len}: one window")


class Lora(NamedTuple):
    """y + (alpha / r) B A x at one site: A (r, in), B (out, r), or one pair a sequence with a leading axis. B = 0 at first, so it
    starts as nothing."""

    a: Tensor
    b: Tensor
    scale: float

    def __call__(self, x_BTC: Tensor, y_BTD: Tensor) -> Tensor:
        low_BTR = x_BTC @ self.a.mT  # one product a factor, however many sequences
        return torch.baddbmm(y_BTD, low_BTR, self.b.mT.expand(len(low_BTR), -1, -1), alpha=self.scale)


def lora_sites(cfg: Config, model: GPT) -> dict[tuple[int, str], tuple[int, int]]:
    """(pass through a block, site) -> (out, in) of every LoRA that the knobs choose; the head's pass is -1."""
    projections, chosen = model.sites(), {}
    first, width = cfg.num_layers - cfg.ttt_lora_blocks if cfg.ttt_lora_blocks else 0, cfg.model_dim
    for slot, step in enumerate(model.plan):
        block = f"blocks.{step.block}."
        kinds = cfg.ttt_sites & {"o", "mlp"}  # a whole branch; all others end in their projection's name
        branches = {block + {"o": "attn"}.get(kind, kind): (width, width) for kind in sorted(kinds, reverse=True)}
        inner = {site: tuple(shape) for site, shape in projections.items()
                 if site.startswith(block) and site.rsplit(".", 1)[-1] in cfg.ttt_sites}  # fmt: skip
        if step.block >= first:
            chosen.update({(slot, site): shape for site, shape in {**inner, **branches}.items()})
    return {**chosen, (-1, "head"): (cfg.vocab_size, width)} if "head" in cfg.ttt_sites else chosen


class LoraNetwork(NetworkExpert):
    """The network with LoRA that learn from scored text.

    It computes with a copy of the model, so that no other stage sees what was learned here. Ranks share the work and sum
    gradients, so that all of them learn the same.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, text: ValidationText, stride: int) -> None:
        super().__init__(cfg, run, copy.deepcopy(model).requires_grad_(False), text, stride)
        weights = text.bytes.clamp_min(1) if cfg.ttt_byte_weighted else torch.ones_like(text.bytes)
        self.weights = weights.to(self.logp.dtype)
        self.temperature, self.scale = cfg.ttt_temperature, cfg.ttt_lora_alpha / cfg.ttt_lora_rank or 1.0
        self.lr = cfg.ttt_lr * cfg.ttt_local_lr_mult
        self.learning_rows = max(1, self.rows // 4)  # sequences of full length that a backward pass takes at once
        generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "ttt"))  # the same on every rank
        self.shapes, rank = lora_sites(cfg, self.model), cfg.ttt_lora_rank
        drawn = [torch.empty(rank * d_in) for _, d_in in self.shapes.values()]
        # N(0, 1 / in), or U(-1, 1) / sqrt(in) by document.
        for a, (_, d_in) in zip(drawn, self.shapes.values(), strict=True):
            if cfg.ttt_reset == "none":
                a.normal_(std=d_in**-0.5, generator=generator)
            else:
                a.uniform_(-1, 1, generator=generator).div_(d_in**0.5)
        self.size_a, size_b = sum(map(len, drawn)), rank * sum(d_out for d_out, _ in self.shapes.values())
        self.drawn = torch.cat([*drawn, torch.zeros(size_b)]).to(run.device, self.logp.dtype)

    def adapters(self, params: Tensor) -> Ctx:
        """The context of a forward with the LoRA that are one row of numbers, A of all sites and then B; (R, P): a row a sequence."""
        rank, shapes = self.cfg.ttt_lora_rank, self.shapes.values()
        factors = [*((rank, d_in) for _, d_in in shapes), *((d_out, rank) for d_out, _ in shapes)]
        flat = params.to(self.model.compute_dtype).split([math.prod(shape) for shape in factors], dim=-1)
        views = [p.unflatten(-1, shape) for p, shape in zip(flat, factors, strict=True)]
        pairs = zip(self.shapes, views[: len(shapes)], views[len(shapes) :], strict=True)
        return Ctx(lora={site: Lora(a, b, self.scale) for site, a, b in pairs})

    def descend(self, tokens: Tensor, spans: list[tuple[int, int]], params: list[Tensor], ctx: Ctx, clip: float,
                optimizer: torch.optim.Optimizer, fraction: float = 1.0) -> None:  # fmt: skip
        """One step of the optimizer on `fraction` of the weighted mean nll of the targets in `spans`, whose sequences the ranks share."""
        for p, g in zip(params, self.gradient(tokens, spans, params, ctx), strict=True):
            p.grad = self.run.all_reduce(g)
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        torch._foreach_mul_([p.grad for p in params], fraction)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def gradient(self, tokens: Tensor, spans: list[tuple[int, int]], params: list[Tensor], ctx: Ctx) -> list[Tensor]:
        """This rank's part of it."""
        total = sum(float(self.weights[lo:hi].sum()) for lo, hi in spans)
        mine = sorted((spans[i] for i in self.run.share(len(spans))), key=lambda span: span[0] - span[1])
        grads = [torch.zeros_like(p) for p in params]

        def add(part: list[tuple[int, int]]) -> None:
            loss = self.weighted_nll(tokens, part, ctx) / total
            torch._foreach_add_(grads, torch.autograd.grad(loss, params, materialize_grads=True))

        for batch in self.like_lengths(mine):
            rows = in_parts(batch, len(batch), add, f"EVAL_SEQ_LEN={self.seq_len}: learning one sequence")
            self.learning_rows = max(1, self.learning_rows * rows // len(batch))
        return grads

    def like_lengths(self, spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Batches of spans, longest first, that are padded to `learning_rows` sequences of full length at most."""
        while spans:
            rows = max(1, self.learning_rows * self.seq_len // (spans[0][1] - spans[0][0]))
            yield spans[:rows]
            spans = spans[rows:]

    def weighted_nll(self, tokens: Tensor, spans: list[tuple[int, int]], ctx: Ctx) -> Tensor:
        """Sum over the targets in `spans` of weight times nats; the first is the longest, the others are padded to it."""
        lo, hi = (torch.tensor(ends, device=tokens.device)[:, None] for ends in zip(*spans, strict=True))
        at = (lo + torch.arange(-1, spans[0][1] - spans[0][0], device=tokens.device)).minimum(hi - 1)
        inside = F.pad(at[:, 1:] > at[:, :-1], (1, 0), value=True)
        ids = torch.where(inside, tokens[at], BOS).to(self.run.device)
        weights = torch.where(inside, self.weights[at], 0.0)[:, 1:].to(self.run.device)
        return (self.model.nll(ids[:, :-1], ids[:, 1:], ctx) * weights).sum()


class SharedLoraNetwork(LoraNetwork):
    """One LoRA that learns each chunk of TTT_CHUNK_TOKENS targets once it is scored (#850; arXiv 2411.07279's family).

    Scores use the Polyak average of the LoRA, P <- d P + (1 - d) W after each chunk.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, text: ValidationText, stride: int) -> None:
        super().__init__(cfg, run, model, text, stride)
        self.edges = [*range(1 + cfg.ttt_chunk_tokens, self.n_tokens, cfg.ttt_chunk_tokens), self.n_tokens]
        self.params, self.mean = self.drawn.clone().requires_grad_(), self.drawn
        self.ctx = self.adapters(self.mean)
        betas = cfg.ttt_beta1, cfg.ttt_beta2
        if cfg.ttt_optimizer == "adamw":
            self.optimizer = torch.optim.AdamW([self.params], self.lr, betas, cfg.ttt_adam_eps, cfg.ttt_wd)
        else:
            self.optimizer = torch.optim.SGD([self.params], self.lr, cfg.ttt_momentum)

    @property
    def window_step(self) -> int:
        """As after any chunk, where windows begin anew."""
        return math.gcd(self.stride, self.seq_len, self.cfg.ttt_chunk_tokens)

    def expected_seconds(self, text: ValidationText) -> float:
        """Seconds of scoring, and of learning from one batch's time."""
        rows = self.rehearsed(self.learning_rows)
        spans = [(1, 1 + self.seq_len)] * rows * self.run.world
        seconds = self.timed(lambda: self.gradient(self.tokens, spans, [self.params], self.adapters(self.params)))
        learning = self.cfg.ttt_epochs * len(text.tokens) / self.seq_len * seconds / len(spans)
        return super().expected_seconds(text) + learning

    def learn(self, tokens: Tensor, lo: int, hi: int) -> None:
        """TTT_EPOCHS passes over the targets [lo, hi), then one step of the average."""
        spans = [(s, min(s + self.seq_len, hi)) for s in range(lo, hi, self.seq_len)]
        size = self.cfg.ttt_batch_seqs or len(spans)
        for i in [*range(0, len(spans), size)] * self.cfg.ttt_epochs:
            ctx = self.adapters(self.params)
            self.descend(tokens, spans[i : i + size], [self.params], ctx, self.cfg.ttt_grad_clip, self.optimizer)
        with torch.no_grad():
            self.mean.lerp_(self.params, 1 - self.cfg.ttt_polyak_decay)
            self.ctx = self.adapters(self.mean)


# ---- test-time training document by document


class Document(NamedTuple):
    """Tokens start .. start + targets of the stream: a BOS, and after it the targets, of which the next document's BOS is the last."""

    start: int
    targets: int


def documents_of(tokens: Tensor) -> list[Document]:
    """The documents of a stream, which between them have each target 1 .. n-1 once; the first begins with the stream."""
    n = len(tokens)
    begins = [0, *(i for i in (tokens == BOS).nonzero().flatten().tolist() if 0 < i < n - 1)]
    return [Document(s, e - s) for s, e in zip(begins, [*begins[1:], n - 1], strict=True)]


def block_edges(documents: list[Document], size: int) -> list[int]:
    """Where blocks end (the first target of the next one): at the first document's end that brings a block to `size` targets."""
    edges, begin = [], 1
    for document in documents:
        end = document.start + document.targets + 1
        if end - begin >= size:
            edges.append(end)
            begin = end
    last = documents[-1].start + documents[-1].targets + 1
    return edges if edges and edges[-1] == last else [*edges, last]


def phase_edges(edges: list[int], prefix: float, phases: int) -> list[int]:
    """The block ends at which the weights are trained: the first past i / phases of the fraction `prefix` of the text, i = 1 .. phases."""
    total = edges[-1] - 1
    due = (bisect_left(edges, 1 + prefix * total * i / phases) for i in range(1, phases + 1))
    return sorted({edges[i] for i in due if i < len(edges) - 1})


def block_size(cfg: Config, n_tokens: int) -> int:
    """TTT_BLOCK_TOKENS; or the text between two phases, since all ranks wait for a block's longest document; without phases 1/24."""
    fraction = cfg.phased_ttt_prefix / cfg.phased_ttt_num_phases if cfg.phased_ttt_num_phases else 1 / 24
    return cfg.ttt_block_tokens or math.ceil((n_tokens - 1) * fraction)


def check_phases(cfg: Config, tokens: Tensor) -> None:
    """Raises ConfigError where the text has too few blocks for the phases of test-time training."""
    if not (cfg.ttt_enabled and cfg.ttt_reset == "document" and cfg.phased_ttt_num_phases):
        return
    edges = block_edges(documents_of(tokens), block_size(cfg, len(tokens)))
    found = len(phase_edges(edges, cfg.phased_ttt_prefix, cfg.phased_ttt_num_phases))
    if found < cfg.phased_ttt_num_phases:
        raise ConfigError(
            f"PHASED_TTT_NUM_PHASES={cfg.phased_ttt_num_phases}: the text's {len(edges)} blocks of TTT_BLOCK_TOKENS="
            f"{block_size(cfg, len(tokens))} have room for {found} up to PHASED_TTT_PREFIX={cfg.phased_ttt_prefix:g}; "
            "take shorter blocks or fewer phases"
        )


def chunk_starts(steps: list[tuple[float, int]], longest: int) -> Iterator[int]:
    """The target positions at which a document's chunks start: 1, and so on to the first past `longest`."""
    at = 1
    while at <= longest:
        yield at
        at += next(size for below, size in steps if at - 1 < below)
    yield at


def deal_documents(documents: list[Document], ranks: int, rows: int, chunks: list[int]) -> list[list[list[Document]]]:
    """Batches of each rank, documents of like length together. Work is counted in tokens sent through the network: a batch has at
    most `rows` documents and no more work than a rank has on average, so that no rank waits long for the one with the longest documents."""
    work = {d: chunks[bisect_right(chunks, d.targets)] - 1 for d in documents}
    most, loads = sum(work.values()) / ranks, [0] * ranks
    dealt: list[list[list[Document]]] = [[] for _ in range(ranks)]
    ordered = deque(sorted(documents, key=lambda d: -d.targets))
    while ordered:
        batch, load, rank = [], 0, loads.index(min(loads))
        while ordered and len(batch) < rows and (not batch or load + work[ordered[0]] <= most):
            batch.append(ordered.popleft())
            load += work[batch[-1]]
        dealt[rank].append(batch)
        loads[rank] += load
    return dealt


class DocumentCache:
    """Keys and values of a batch's earlier chunks as they were computed then, the last `window` positions with the new ones."""

    def __init__(self, window: int) -> None:
        self.window, self.length = window, 0
        self.slots: dict[int, list[Tensor]] = {}
        self.last_id: Tensor | None = None  # (R,)
        self.last_embedding: Tensor | None = None  # (R, 1, D) before the smear

    def first(self, rows: int) -> DocumentCache:
        """Drop all rows but the first ones."""
        self.slots = {slot: [x[:rows] for x in pair] for slot, pair in self.slots.items()}
        self.last_id = None if self.last_id is None else self.last_id[:rows]
        self.last_embedding = None if self.last_embedding is None else self.last_embedding[:rows].detach()
        return self

    def extend(self, slot: int, k_RTGK: Tensor, v_RTGK: Tensor) -> list[Tensor]:
        """Keys and values to attend to: the earlier ones, which are constants to what is learned now, and these."""
        new = [k_RTGK, v_RTGK]
        if slot in self.slots:
            skip = max(0, self.slots[slot][0].shape[1] + k_RTGK.shape[1] - self.window)
            new = [torch.cat([old[:, skip:], x], 1) for old, x in zip(self.slots[slot], new, strict=True)]
        self.slots[slot] = [x.detach() for x in new]
        return new


class DocumentBatch:
    """Documents of one block, scored and learned chunk by chunk side by side, each with LoRA, optimizer, keys and values of its own.

    Its targets are positions in the document, from 1; rows are sorted by length, so those that go on stand first.
    """

    def __init__(self, network: DocumentLoraNetwork, documents: list[Document]) -> None:
        self.network, rows = network, len(documents)
        self.documents = sorted(documents, key=lambda d: -d.targets)
        device, self.n = network.logp.device, self.documents[0].targets + 1
        self.start_R, self.targets_R = torch.tensor(self.documents, device=device).T
        self.params = network.drawn.repeat(rows, 1)  # (R, P), so that one kernel steps them all
        self.moments = [torch.zeros_like(self.params) for _ in range(2)]
        self.taken = torch.zeros((), device=network.run.device)
        self.steps_R = self.params.new_zeros(rows)
        self.cache = DocumentCache(network.seq_len)

    def rows(self, position: int) -> int:
        """How many documents have a target at `position`."""
        return bisect_left(self.documents, 1, key=lambda d: d.targets < position)

    def gather(self, stream: Tensor, lo: int, hi: int, rows: int, fill: int) -> Tensor:
        """(rows, hi - lo): entries lo .. hi-1 of each document, `fill` beyond its end."""
        offset = torch.arange(lo, hi, device=stream.device)
        start, inside = self.start_R[:rows, None], offset <= self.targets_R[:rows, None]
        return torch.where(inside, stream[torch.where(inside, start + offset, 0)], fill).to(self.network.run.device)

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        """(3, rows, hi - lo): see `score_logits`; keeps the loss of the documents that go on after the targets lo .. hi-1."""
        network, rows, learners = self.network, self.rows(lo), self.rows(hi)
        ids, hints = self.gather(tokens, lo - 1, hi, rows, BOS), self.gather(network.hints, lo, hi, rows, 0)
        self.live = self.params[:rows].detach().requires_grad_()
        with torch.enable_grad():
            ctx = network.adapters(self.live)._replace(cache=self.cache.first(rows), one_document=True)
            z = last_logits(network.model, ids[:, :-1], hi - lo, ctx)
            targets = ids[:learners, 1:]
            nll = F.cross_entropy(z[:learners].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            weights = self.gather(network.weights, lo, hi, learners, 0)
            self.loss = (nll * weights).sum(1).div(weights.sum(1)).sum()
        self.z = z.detach() / network.temperature
        return score_logits(self.z, ids[:, 1:], hints)

    @torch.no_grad()
    def update(self, tokens: Tensor, lo: int, hi: int) -> None:  # noqa: ARG002
        """Each document that goes on takes a step on the mean nll of its targets lo .. hi-1, as they were scored."""
        cfg, rows = self.network.cfg, self.rows(hi)
        if not rows:
            return
        grad = torch.autograd.grad(self.loss, self.live)[0][:rows]
        if cfg.ttt_grad_clip:
            grad *= (cfg.ttt_grad_clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1.0)
        params, mean, square = ([x[:rows]] for x in (self.params, *self.moments))
        adamw(params, [grad], mean, square, [], [self.taken], fused=True, amsgrad=False, beta1=cfg.ttt_beta1,
              beta2=cfg.ttt_beta2, lr=self.network.lr, weight_decay=cfg.ttt_wd, eps=cfg.ttt_adam_eps, maximize=False)  # fmt: skip
        self.steps_R[:rows] += 1


class DocumentLoraNetwork(LoraNetwork):
    """Every document has LoRA of its own, trained on its own scored chunks; what all start from changes at the ends of blocks (#1530).

    A block ends with the first document that brings it to TTT_BLOCK_TOKENS targets. Inside it all documents start from its state
    (model, A) with B = 0 and a fresh AdamW, so they may be computed in any order, on any rank. Chunks lie at fixed positions of
    a document and see at most TTT_EVAL_SEQ_LEN tokens, of which keys and values are kept as the LoRA of their time made them; the
    published windows were computed anew (1.5656 bpb where this has 1.5648, at 2.3 to 3.1 times the CPU seconds). After a block A
    becomes the mean of its documents' A by steps taken (#1767), and at PHASED_TTT_NUM_PHASES of the block ends all weights are
    trained on all scored text (#1610).
    The published order, longest document first, is no code for the text as it stands: see `order_claim`.
    """

    def __init__(self, cfg: Config, run: Run, model: GPT, text: ValidationText, stride: int) -> None:
        super().__init__(cfg, run, model, text, stride)
        self.rows, self.seq_len = cfg.ttt_batch_size, cfg.ttt_eval_len
        self.documents = documents_of(text.tokens)
        self.edges = block_edges(self.documents, block_size(cfg, self.n_tokens))
        self.phases = phase_edges(self.edges, cfg.phased_ttt_prefix, cfg.phased_ttt_num_phases)
        longest = max(document.targets for document in self.documents)
        self.chunks = list(chunk_starts(cfg.ttt_chunk_steps, longest))
        # Positions count from the document's start, however long it is.
        self.model.rope = rope_table(cfg, self.chunks[-1]).to(self.model.rope)
        # What the documents of the block leave behind.
        self.sum_a, self.steps = torch.zeros_like(self.drawn[: self.size_a]), self.drawn.new_zeros(1)

    def chunk_end(self, position: int) -> int:
        """The first target position after the chunk that holds `position`."""
        return self.chunks[bisect_right(self.chunks, position)]

    def deal(self, documents: list[Document]) -> list[list[Document]]:
        """This rank's batches of a block."""
        return deal_documents(documents, self.run.world, self.cfg.ttt_batch_size, self.chunks)[self.run.rank]

    def expected_seconds(self, text: ValidationText) -> float:
        """Seconds of the slowest rank of each block: a step is a constant and a time for each of its tokens, which the first
        document of this network's own text and a whole batch tell. Finds how many documents there is memory for."""
        cfg, documents, longest = self.cfg, documents_of(text.tokens), self.documents[0].targets
        rows = self.rehearsed(min(self.rows, len(self.documents)))
        fresh = torch.zeros(3, self.n_tokens, device=self.run.device, dtype=self.logp.dtype)
        whole = self.timed(lambda: self.run_block(self.tokens, self.documents[:rows], fresh, 0))
        one = self.timed(lambda: self.run_block(self.tokens, self.documents[:1], fresh, 0))
        at_once = min(rows, self.rows)
        each = (whole * at_once / rows - one) / (at_once - 1) if at_once > 1 else one
        step = max(0.0, one - each) / bisect_right(self.chunks, longest)
        token = each / (self.chunk_end(longest) - 1)
        chunks = list(chunk_starts(cfg.ttt_chunk_steps, max(document.targets for document in documents)))

        def cost(batch: list[Document]) -> float:
            steps = [bisect_right(chunks, document.targets) for document in batch]
            return step * steps[0] + token * sum(chunks[n] - 1 for n in steps)

        total, edges = 0.0, block_edges(documents, block_size(cfg, len(text.tokens)))
        for lo, hi in itertools.pairwise([1, *edges]):
            block = [document for document in documents if lo <= document.start + 1 < hi]
            dealt = deal_documents(block, self.run.world, cfg.ttt_batch_size, chunks)
            total += max(sum(map(cost, batches)) for batches in dealt)
        return total

    def score_ahead(self, tokens: Tensor, until: int) -> None:  # noqa: ARG002
        """Score the block that begins with the first target not scored yet: all of it, since its documents do not see each other."""
        lo, end = self.done, self.next_update(self.done)
        begins = [bisect_left(self.documents, edge - 1, key=lambda d: d.start) for edge in (lo, end)]
        fresh = torch.zeros(3, end - lo, device=self.run.device, dtype=self.logp.dtype)
        self.sum_a.zero_()
        self.steps.zero_()
        for batch in self.deal(self.documents[begins[0] : begins[1]]):
            self.run_block(tokens, batch, fresh, lo)
        for total in (fresh, self.steps, self.sum_a):
            self.run.all_reduce(total)
        self.scored[:, lo:end], self.done = fresh, end

    def run_block(self, tokens: Tensor, documents: list[Document], fresh: Tensor, first: int) -> None:
        """Score documents into `fresh`, whose entry 0 is target `first`, and add up their A."""

        def score(part: list[Document]) -> None:
            batch = self.run_batch(tokens, part, fresh, first)
            self.sum_a += batch.steps_R @ batch.params[:, : self.size_a]
            self.steps += batch.steps_R.sum()

        self.rows = in_parts(documents, self.rows, score, f"TTT_EVAL_SEQ_LEN={self.seq_len}: one document")

    def run_batch(self, tokens: Tensor, documents: list[Document], fresh: Tensor, first: int) -> DocumentBatch:
        """A batch that is scored and learned to its end."""
        batch = DocumentBatch(self, documents)
        for lo, hi, values in score_then_learn(tokens, batch.n, self.chunk_end, [batch]):
            offset = torch.arange(lo, hi, device=tokens.device)
            inside = offset <= batch.targets_R[: values.shape[1], None]
            at = (batch.start_R[: values.shape[1], None] + offset - first)[inside]
            fresh[:, at.to(fresh.device)] = values[:, inside.to(values.device)]
        return batch

    def dist(self, tokens: Tensor, t: int) -> Tensor:
        """(V,) float64: walks the document of target t up to it once more, from the block's state."""
        i = bisect_right(self.documents, t - 1, key=lambda d: d.start) - 1
        start = self.documents[i].start
        batch = DocumentBatch(self, [Document(start, t - start)])
        for lo, _, _ in score_then_learn(tokens[: t + 1], batch.n, self.chunk_end, [batch]):
            chunk = lo
        return batch.z[0, t - start - chunk].cpu().double().softmax(-1)

    def learn(self, tokens: Tensor, lo: int, hi: int) -> None:  # noqa: ARG002
        """The block is scored: its documents' A, and at a phase all scored text, change what the next one starts from."""
        if self.cfg.ttt_warm_start_a and self.steps > 0:
            self.drawn[: self.size_a] = self.sum_a / self.steps
        if hi in self.phases:
            self.train_weights(tokens, hi)

    def train_weights(self, tokens: Tensor, end: int) -> None:
        """A phase: GLOBAL_TTT_EPOCHS passes of SGD on all weights over the targets [1, end), in the order of the text."""
        cfg, started = self.cfg, time.perf_counter()
        params = list(self.model.requires_grad_().parameters())
        optimizer = torch.optim.SGD(params, cfg.global_ttt_lr, cfg.global_ttt_momentum)
        chunks = [*range(1, end, cfg.global_ttt_chunk_tokens)] * cfg.global_ttt_epochs
        # The published batch counts rows of a full context, however many documents they hold.
        most = min(cfg.global_ttt_batch_seqs * self.seq_len or end, cfg.global_ttt_chunk_tokens)
        for step, lo in enumerate(chunks):
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / max(len(chunks) - 1, 1))
            warmup = min(1.0, (step + 1) / max(cfg.global_ttt_warmup_chunks, 1))
            optimizer.param_groups[0]["lr"] = cfg.global_ttt_lr * cosine * warmup
            hi = min(lo + cfg.global_ttt_chunk_tokens, end)
            for first in range(lo, hi, most):
                spans = self.sequences(first, min(first + most, hi))
                fraction = sum(e - s for s, e in spans) / most  # a short step moves the weights less
                self.descend(tokens, spans, params, Ctx(), cfg.global_ttt_grad_clip, optimizer, fraction)
        self.model.requires_grad_(False)
        self.run.sync()
        self.run.log(f"ttt: trained all weights on {end - 1} scored tokens, {time.perf_counter() - started:.1f}s")

    def sequences(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """Targets [lo, hi) as sequences of TTT_EVAL_SEQ_LEN, new ones at the starts of documents unless told otherwise."""
        first, last = (bisect_right(self.documents, t - 1, key=lambda d: d.start) for t in (lo, hi - 1))
        starts = [d.start + 1 for d in self.documents[first:last]] if self.cfg.global_ttt_respect_doc_boundaries else []
        bounds = [lo, *starts, hi]
        return [(s, min(s + self.seq_len, end)) for begin, end in itertools.pairwise(bounds)
                for s in range(begin, end, self.seq_len)]  # fmt: skip


TEST_TIME = {"none": SharedLoraNetwork, "document": DocumentLoraNetwork}


# ---- exact n-gram statistics: one sort for each length gives what an online counter would have known at every position


class NgramStats(NamedTuple):
    """Counts of x_0 .. x_{t-1} for each target t and its context of k tokens x_{t-k} .. x_{t-1}; int32, one entry a target."""

    total: Tensor  # C: how often the context occurred before
    count: Tensor  # c: how many of them were followed by x_t
    kinds: Tensor  # U: distinct tokens that followed it
    last: Tensor  # position of the token that followed its latest occurrence, -1 where it is new


class RepeatedNgrams(NamedTuple):
    """All occurrences of n-grams of one length that occur twice or more, (n,) int32: equal ones form a group, in order of time."""

    end: np.ndarray  # position of the last token
    rank: np.ndarray  # earlier occurrences of the same n-gram; 0 starts a group


def split_between_groups(ngrams: RepeatedNgrams, size: int = 1 << 17) -> list[RepeatedNgrams]:
    """The occurrences in parts of about `size`, cut between groups: a part sorts in the processor's cache, in its own thread."""
    heads = np.flatnonzero(ngrams.rank == 0)
    at = np.searchsorted(heads, np.arange(size, len(ngrams.rank), size))
    edges = [*np.unique(np.append(heads[at[at < len(heads)]], 0)).tolist(), len(ngrams.rank)]
    return [RepeatedNgrams(ngrams.end[lo:hi], ngrams.rank[lo:hi]) for lo, hi in zip(edges[:-1], edges[1:], strict=True)]


def lengthen(context: RepeatedNgrams, symbol: np.ndarray, width: int, columns: list[np.ndarray]) -> RepeatedNgrams:
    """Occurrences one token longer than those of `context`. Writes into `columns` (N + 1,) the statistics of the contexts at each
    target (c, U, last) and the next `symbol`: the token, or -1 where the n-gram that it ends occurs once, as then all longer ones do.

    A key holds the context's group, the token and the index, which makes any sort stable: NumPy sorts plain integers about ten
    times as fast as it argsorts them.
    """
    target = context.end + np.int32(1)
    x, bits = symbol[target], max(len(target) - 1, 1).bit_length()
    live = np.flatnonzero(x >= 0)
    key = np.cumsum(context.rank == 0)[live]
    key = ((key << width) | x[live]) << bits | live
    key.sort()
    head = np.ones(len(key) + 1, bool)
    np.not_equal(key[1:] >> bits, key[:-1] >> bits, out=head[1 : len(key)])
    starts = np.flatnonzero(head).astype(np.int32)
    rank = np.arange(len(key), dtype=np.int32)
    rank -= np.repeat(starts[:-1], np.diff(starts))
    index = key & ((1 << bits) - 1)
    count, kinds, last, longer = columns
    c = np.zeros(len(target), np.int32)
    c[index] = rank
    new = c == 0
    u = np.cumsum(new, dtype=np.int32) - new
    count[target], kinds[target] = c, u - u[np.arange(len(target), dtype=np.int32) - context.rank]
    met = np.flatnonzero(context.rank)
    last[target[met]] = target[met - 1]
    again = ~(head[:-1] & head[1:])
    index = index[again]
    longer[target[index]] = x[index]
    return RepeatedNgrams(target[index], rank[again])


def ngram_stats(tokens_N: Tensor, vocab_size: int, order: int) -> list[Tensor]:
    """[c, U, last] of contexts of 0, 1 .. order-1 tokens, (order, N) int32 each, as a counter gives them that learns after every token.

    Equal n-grams are sorted by time, so the rank inside their group is the number of earlier occurrences: no hash and no
    collision. Computed on the host: .54 us a token on one core at order 12.
    """
    n, width = len(tokens_N), max(vocab_size - 1, 1).bit_length()
    columns = [np.full((order, n + 1), fill, np.int32) for fill in (0, 0, -1)]  # entry n belongs to no token
    symbol = np.append(tokens_N.cpu().numpy(), -1).astype(np.int32)
    ngrams = RepeatedNgrams(np.arange(-1, n - 1, dtype=np.int32), np.arange(n, dtype=np.int32))  # the empty one
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for level in zip(*columns, strict=True):
            longer = np.full(n + 1, -1, np.int32)
            extend = functools.partial(lengthen, symbol=symbol, width=width, columns=[*level, longer])
            parts = pool.map(extend, split_between_groups(ngrams))
            ngrams, symbol = RepeatedNgrams(*(np.concatenate(column) for column in zip(*parts, strict=True))), longer
    return [torch.from_numpy(column)[:, :n] for column in columns]


# ---- n-gram experts: each corrects a distribution by counts


class NgramTable:
    """Statistics of contexts of 0 .. order-1 tokens of one stream, 12 bytes a token and length.

    They are computed for the whole stream at once, which is no look ahead: entry t depends on x_0 .. x_t alone. They lie on
    the host, and a span of them goes to the stream's device when it is scored: no GPU need have room for all.
    """

    def __init__(self, vocab_size: int, order: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size, self.order, self.device = vocab_size, order, device
        self.tokens: Tensor | None = None

    def load(self, tokens: Tensor) -> None:
        """Compute the statistics of a stream, unless it is the one that is loaded."""
        if self.tokens is tokens:
            return
        self.tokens, self.latest_span = tokens, (0, 0, None)
        self.columns = ngram_stats(tokens, self.vocab_size, self.order)

    def span(self, tokens: Tensor, lo: int, hi: int) -> NgramStats:
        """Statistics of targets lo .. hi-1, (order, hi-lo) each."""
        self.load(tokens)
        if self.latest_span[:2] != (lo, hi):
            count, kinds, last = (column[:, lo:hi] for column in self.columns)
            total = torch.empty_like(count)
            total[0] = torch.arange(lo, hi)
            total[1:, 1 if lo == 0 else 0 :] = self.columns[0][:-1, max(lo - 1, 0) : hi - 1]
            if lo == 0:
                total[:, 0] = 0
            stats = NgramStats(*(column.to(tokens.device) for column in (total, count, kinds, last)))
            self.latest_span = (lo, hi, stats)
        return self.latest_span[2]

    def counts(self, k: int) -> Tensor:
        """(N,) c of contexts of k tokens, over the stream that was loaded; on the host."""
        return self.columns[0][k]

    def candidates(self, tokens: Tensor, t: int) -> NgramStats:
        """Statistics of target t for every token of the vocabulary, (order, V) each, counted again from x_0 .. x_{t-1}."""
        stats = NgramStats(*torch.zeros(4, self.order, self.vocab_size, dtype=torch.int32, device=tokens.device))
        stats.last.fill_(-1)
        follower = torch.arange(t, device=tokens.device)
        for k in range(min(self.order, t + 1)):
            if k > 0:
                follower = follower[follower >= k]
                follower = follower[tokens[follower - k] == tokens[t - k]]
            if len(follower) == 0:
                break
            count = torch.bincount(tokens[follower].long(), minlength=self.vocab_size)
            for column, values in zip(stats, (len(follower), count, (count > 0).sum(), follower[-1]), strict=True):
                column[k] = values
        return stats


def log2_floor(x: Tensor) -> Tensor:
    """Exact floor of log2 for positive integers, int64."""
    return x.double().frexp().exponent.long() - 1


class NgramQuery(NamedTuple):
    """Input of an n-gram expert: n targets, each with the token that came, or one target with every token (`whole`)."""

    p: Tensor  # (n,) float64: what the base gives `token`
    stats: NgramStats  # (order, n)
    target: Tensor  # (n,) positions
    token: Tensor  # (n,)
    entropy: Tensor  # (n,) of the base, nats
    tokens: Tensor  # (N,) the stream
    whole: bool


class NgramExpert(ABC):
    """Corrects the distribution of its base. score() and dist() share one `transform`, so what is scored is what sums to 1.

    A subclass may use p, count and token of a query for the probability of that token alone; all else is known before the
    target and may decide weights. The driver updates the base by itself.
    """

    def __init__(self, table: NgramTable, base: Expert) -> None:
        self.table, self.base = table, base
        self.pending: Any = None

    @abstractmethod
    def transform(self, query: NgramQuery) -> tuple[Tensor, Any]:
        """(probabilities of the query's tokens (n,) float64, what learn() needs of them)."""

    @property
    def entropy(self) -> Tensor:
        """(N,) of the network, nats: an expert may be the base of another."""
        return self.base.entropy

    def learn(self, pending: Any) -> None:  # noqa: B027 (optional: nothing is the default)
        """Learn from targets that are scored, given what transform() returned; by default only the counts learn."""

    def query(self, p: Tensor, entropy: Tensor, tokens: Tensor, lo: int, hi: int) -> NgramQuery:
        """The query for targets lo .. hi-1, whose tokens the base gave `p` (hi-lo,)."""
        target, stats = torch.arange(lo, hi, device=tokens.device), self.table.span(tokens, lo, hi)
        return NgramQuery(p, stats, target, tokens[lo:hi], entropy, tokens, whole=False)

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        p, entropy = self.base.score(tokens, lo, hi).exp(), self.base.entropy[lo:hi].double()
        p, self.pending = self.transform(self.query(p, entropy, tokens, lo, hi))
        return p.log()

    def dist(self, tokens: Tensor, t: int) -> Tensor:
        p = self.base.dist(tokens, t).to(tokens.device)
        every = torch.arange(len(p), device=tokens.device)
        stats, entropy = self.table.candidates(tokens, t), self.entropy[t].double().expand(len(p))
        query = NgramQuery(p, stats, torch.full_like(every, t), every, entropy, tokens, whole=True)
        return self.transform(query)[0]

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:  # noqa: ARG002
        self.learn(self.pending)


class LearnedWeights:
    """Weights of J parts: softmax of a prior and of one learned vector for the bucket of each feature, learned after scoring.

    A step is the summed gradient over all squared gradients so far, a diagonal Newton step for log loss whose rate needs no
    schedule; CAUTION is added to the squares, so that buckets with little data move little.
    """

    CAUTION = 3.0

    def __init__(self, prior: list[float], sizes: list[int], rate: float, device: torch.device | str) -> None:
        self.prior_J1 = torch.tensor(prior, dtype=torch.float64, device=device).log()[:, None]
        make = lambda: [torch.zeros(len(prior), size, dtype=torch.float64, device=device) for size in sizes]  # noqa: E731
        self.tables, self.squares = make(), make()
        self.rate = rate

    def weights(self, buckets: list[Tensor]) -> Tensor:
        """(J, M) weights of M items, given the bucket (M,) of each in every feature."""
        columns = (table.index_select(1, b) for table, b in zip(self.tables, buckets, strict=True))
        return sum(columns, self.prior_J1).softmax(0)

    def learn(self, buckets: list[Tensor], weights_JM: Tensor, posterior_JM: Tensor) -> None:
        """Move towards the posteriors w_j p_j(x) / p(x) (J, M) of items that are scored."""
        gradient = posterior_JM - weights_JM
        squared = gradient.square()
        for table, square, bucket in zip(self.tables, self.squares, buckets, strict=True):
            square += torch.zeros_like(square).index_add_(1, bucket, squared)
            step = torch.zeros_like(table).index_add_(1, bucket, gradient) / (square + self.CAUTION)
            table += self.rate * step


class Cascade(NgramExpert):
    """Corrects its base by contexts of 1 .. order-1 tokens, one length after the other, each a learned mixture of four parts.

    Length k has counts C, c, U of a context seen before, and p_{k-1} from the shorter ones. The parts: (1) c / C; (2) the
    counts discounted by 1, the rest by the shorter contexts, (max(c - 1, 0) + U p_{k-1}) / C; (3) p_{k-1}; (4) all on the token
    that followed last time. (1) and (2) together are absolute discounting with a learned discount. Weights depend on k, C, U,
    the age of the last occurrence and the base's entropy.
    """

    # Favours the shorter context, so that young weights do no harm to a strong network.
    PRIOR = [0.05, 0.15, 0.8, 0.02]  # fmt: skip

    def __init__(self, table: NgramTable, base: Expert, rate: float = 0.8) -> None:
        super().__init__(table, base)
        self.levels = table.order - 1
        self.mixing = LearnedWeights(self.PRIOR, [self.levels * n for n in (128, 10, 24)], rate, table.device)

    def buckets(self, level: Tensor, total: Tensor, kinds: Tensor, trust: Tensor, entropy: Tensor) -> list[Tensor]:
        """The bucket (M,) of each item in each of the three features; extreme values share one."""
        seen = level * 128 + log2_floor(total).clamp_max(15) * 8 + log2_floor(kinds).clamp_max(7)
        sure = level * 24 + (entropy * 3).long().clamp(0, 23)
        return [seen, level * 10 + trust, sure]

    def guess(self, query: NgramQuery, at: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(the token of part 4 (M,), 0..9 by the age of that occurrence)."""
        return query.tokens[last], (log2_floor(query.target[at] - last) // 2).clamp_max(9)

    def transform(self, query: NgramQuery) -> tuple[Tensor, Any]:
        level, at = (query.stats.total[1:] > 0).nonzero(as_tuple=True)  # one item a target and matched length
        C, c, U, last = (x[level + 1, at] for x in query.stats)
        guess, trust = self.guess(query, at, last)
        buckets = self.buckets(level, C, U, trust, query.entropy[at])
        w = self.mixing.weights(buckets)
        C, c = C.double(), c.double()
        slope, repeats = U / C, (guess == query.token[at]).double()
        parts = torch.stack([c / C, (c - 1).clamp_min(0) / C, torch.zeros_like(C), repeats])
        fixed, carry = (w * parts).sum(0), w[1] * slope + w[2]
        p, before = query.p.clone(), torch.empty_like(fixed)
        edges = torch.searchsorted(level, torch.arange(self.levels + 1, device=level.device)).tolist()
        for lo, hi in zip(edges[:-1], edges[1:], strict=True):
            before[lo:hi] = p[at[lo:hi]]
            p[at[lo:hi]] = torch.addcmul(fixed[lo:hi], carry[lo:hi], before[lo:hi])
        parts[1] += slope * before
        parts[2] = before
        return p, (buckets, w, parts)

    def learn(self, pending: Any) -> None:
        buckets, w, parts = pending
        joint = w * parts
        self.mixing.learn(buckets, w, joint / joint.sum(0))


class PackedTable:
    """Statistics like NgramTable's from the artifact's n-grams of the training text; nothing depends on the scored text.

    C counts the followers that were packed alone, so that c / C is a distribution. `last` is no position but the token that
    followed most often. All is looked up on the host: the tools ask for one target at a time.
    """

    NO_TOKEN = -(2**40)  # gives a key below 0 with any parent

    def __init__(self, levels: list[TrieLevel], vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size, self.order, self.device = vocab_size, len(levels), device
        self.keys = [np.append(level.parent * vocab_size + level.token, 2**62) for level in levels]
        self.tokens = [level.token for level in levels]
        occurrences = np.array([(math.isqrt(4 << size) + 1) // 2 for size in range(82)])  # round(2^(size / 2)), exactly
        # What is found nowhere has row -1: the last one, of zeros.
        self.counts = [np.append(occurrences[level.size], 0).astype(np.int32) for level in levels]
        self.context_stats, self.starts = [], []  # (4, contexts + 1) of each length: C, no c, U, likeliest
        for level, count, parents in zip(levels, self.counts, [1, *map(len, self.tokens)], strict=False):
            order, start = level.siblings(parents)
            first = np.append(level.token[order], 0)[start[:-1]]
            columns = (np.bincount(level.parent, count[:-1], parents), np.zeros(parents), np.diff(start), first)
            self.context_stats.append(np.stack([np.append(column, 0) for column in columns]).astype(np.int32))
            self.starts.append(start)

    def rows(self, tokens: Tensor, lo: int, hi: int) -> list[np.ndarray]:
        """[k] -> rows of the n-grams of k tokens that begin at lo - order or later and end before hi, in order; -1 where one is not
        packed or begins before the stream."""
        inside = tokens[max(0, lo - self.order) : hi].cpu().numpy()
        token = np.append(np.full(max(0, self.order - lo), self.NO_TOKEN), inside)
        rows = [np.zeros(len(token) + 1, np.int64)]
        for k, keys in enumerate(self.keys):
            rows.append(self.find(keys, rows[-1][:-1], token[k:]))
        return rows

    def find(self, keys: np.ndarray, parent: np.ndarray, token: np.ndarray) -> np.ndarray:
        """(n,) row of each (parent, token), -1 where there is none."""
        key = parent * self.vocab_size + token
        at = keys.searchsorted(key)
        return np.where(keys[at] == key, at, -1)

    def stats(self, contexts: list[np.ndarray], ngrams: list[np.ndarray]) -> NgramStats:
        """Statistics from the rows of contexts by length, and from the rows of the same with their target."""
        stats = np.empty((4, self.order, len(ngrams[0])), np.int32)
        for k, (context, ngram) in enumerate(zip(contexts, ngrams, strict=True)):
            stats[:, k] = self.context_stats[k][:, context]
            stats[1, k] = self.counts[k][ngram]
        return NgramStats(*torch.from_numpy(stats).to(self.device))

    def span(self, tokens: Tensor, lo: int, hi: int) -> NgramStats:
        """Statistics of targets lo .. hi-1, (order, hi-lo) each."""
        rows = self.rows(tokens, lo, hi)
        begins = [slice(self.order - k, self.order - k + hi - lo) for k in range(self.order)]
        contexts, ngrams = ([x[at] for x, at in zip(part, begins, strict=True)] for part in (rows[:-1], rows[1:]))
        return self.stats(contexts, ngrams)

    def contexts(self, tokens: Tensor, t: int) -> list[int]:
        """[k] -> row of the context of k tokens before target t, -1 where it is not packed: then no longer one is."""
        return [int(rows[-1]) for rows in self.rows(tokens, t, t)[:-1]]

    def stats_of(self, contexts: list[int], tokens: Tensor) -> NgramStats:
        """Statistics of one target for each of `tokens`, (order, n); -1 stands for a token that never followed."""
        token = np.where(tokens.cpu() < 0, self.NO_TOKEN, tokens.cpu())
        rows = [np.array([row]) for row in contexts]
        return self.stats(rows, [self.find(keys, row, token) for keys, row in zip(self.keys, rows, strict=True)])

    def candidates(self, tokens: Tensor, t: int) -> NgramStats:
        """Statistics of target t for every token of the vocabulary, (order, V) each."""
        return self.stats_of(self.contexts(tokens, t), torch.arange(self.vocab_size))


class PackedCascade(Cascade):
    """The cascade over n-grams of the training text: their counts are fixed, only the weights learn from scored text."""

    def guess(self, query: NgramQuery, at: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return last, torch.zeros_like(last)


def alpha_fixed(alpha: float) -> Callable[..., Tensor]:
    """A constant weight where a context matched. PR #740's first form: 0.20."""
    return lambda entropy, _order, _confidence: torch.full_like(entropy, alpha)


def alpha_pr740(entropy: Tensor, _order: Tensor, _confidence: Tensor) -> Tensor:
    """PR #740, second form: 0.05 + 0.55 sigmoid(2 (H - 4)), H in nats."""
    return 0.05 + 0.55 * torch.sigmoid(2.0 * (entropy - 4.0))


def alpha_pr187(entropy: Tensor, _order: Tensor, confidence: Tensor) -> Tensor:
    """PR #187: (0.05 + 0.55 sigmoid(3 (H - 3.5))) (0.5 + confidence), confidence in 0..1 from the pre-enrichment's step."""
    return (0.05 + 0.55 * torch.sigmoid(3.0 * (entropy - 3.5))) * (0.5 + confidence)


PR850_CENTRE = (3.0, 3.0, 4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 2.75, 2.5)  # by order; orders above 9 take the last
PR850_FACTOR = (0.3, 0.3, 0.3, 0.3, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)


def alpha_pr850(entropy: Tensor, order: Tensor, _confidence: Tensor) -> Tensor:
    """PR #850: (0.12 + 0.48 sigmoid(2 (H - centre))) factor, at most 0.95; centre and factor belong to the matched order."""
    row = order.clamp(0, len(PR850_CENTRE) - 1)
    centre, factor = entropy.new_tensor(PR850_CENTRE)[row], entropy.new_tensor(PR850_FACTOR)[row]
    return ((0.12 + 0.48 * torch.sigmoid(2.0 * (entropy - centre))) * factor).clamp(0, 0.95)


class Tilt(NgramExpert):
    """p(v) e^{s [v = hint]} / Z with Z = 1 + q (e^s - 1), q = p(hint), where the hint filled `threshold` of its context's successors.

    The hint is the token that followed the context of order-1 tokens last time; the most frequent one, as published, would fire at
    6 more of 2,659 targets and save .00005 bpb. Token-only form of PRs #1514 and #2018. The strength is s = beta (1 - q)^gamma (#2129):
    neutral at beta 0.
    """

    def __init__(self, table: NgramTable, base: Expert, order: int, beta: float = 2.625, threshold: float = 0.8,
                 gamma: float = 0.0) -> None:  # fmt: skip
        super().__init__(table, base)
        self.k, self.beta, self.threshold, self.gamma = order - 1, beta, threshold, gamma

    def transform(self, query: NgramQuery) -> tuple[Tensor, None]:
        total, last = query.stats.total[self.k], query.stats.last[self.k]
        hint = query.tokens[last]
        # How often the hint had followed its context, last time included.
        seen = self.table.counts(self.k)[last.cpu()].to(last.device) + 1
        fires = (total > 0) & (seen >= self.threshold * total)
        q = query.p[hint] if query.whole else self.base.hint_prob[query.target].double()
        strength = torch.where(fires, self.beta * (1 - q).clamp_min(0) ** self.gamma, 0.0)
        return query.p * torch.exp(strength * (hint == query.token)) / (1 + q * torch.expm1(strength)), None


# ---- the published scorers: hashed tables, looked up for the target alone ("claimed") or for every token ("normalized")


def xor_hash(*multipliers: int) -> tuple[Callable, Callable]:
    """(hash of contexts, hash of context and target) of PRs #740 and #850: XOR of token times multiplier, oldest first."""

    def context(context_nk: Tensor) -> Tensor:
        h = torch.zeros_like(context_nk[:, 0])
        for j, column in enumerate(context_nk.unbind(1)):
            h = h ^ (column * multipliers[j])
        return h

    def target(h: Tensor, order: int, token: Tensor) -> Tensor:
        return h ^ (token * multipliers[(order - 1) % len(multipliers)])

    return context, target


def polynomial_hash(multiplier: int, target_multiplier: int) -> tuple[Callable, Callable]:
    """(hash of contexts, hash of context and target) of PR #187.

    Its multiplier is a multiple of 8, so tokens nine or more back vanish modulo 2^22: orders 9 to 11 are the same.
    """

    def context(context_nk: Tensor) -> Tensor:
        return hash_sequence(context_nk.unbind(1), itertools.repeat(multiplier))

    return context, lambda h, _order, token: h * target_multiplier + token


class PublishedCache(NamedTuple):
    """Constants of one published cache."""

    orders: Sequence[int]  # tried in this order; the first whose context cell holds 2 or more wins
    hash: tuple[Callable, Callable]
    alpha: Callable[[Tensor, Tensor, Tensor], Tensor]
    window: int  # targets a window scores
    batch: int  # windows scored between two updates of a rank's tables
    layout: str  # "blocks": a rank owns a contiguous part of the text; "windows": every n-th; "shared": one table
    backs_off: bool = False  # an order counts the targets alone that no longer order has mixed


MULTIPLIERS_740 = (36313, 27191, 51647, 81929, 131071, 65537, 104729)
MULTIPLIERS_850 = (36313, 27191, 51647, 81929, 131071, 174763, 233021, 283721, 347239)
# Told here, not imitated, since no figure moves by 1e-4: #187 lets an order act from one target later, and #740's pass has a stride
# of its own, 128, where ours shares the stage's network.
PUBLISHED = {
    "pr740": PublishedCache((5,), xor_hash(*MULTIPLIERS_740), alpha_fixed(0.2), 128, 1, "blocks"),
    "pr740b": PublishedCache(
        range(7, 1, -1), xor_hash(*MULTIPLIERS_740), alpha_pr740, 128, 1, "blocks", backs_off=True
    ),
    "pr187": PublishedCache(range(11, 1, -1), polynomial_hash(265443576, 1000003), alpha_pr187, 64, 256, "windows"),
    "pr850": PublishedCache(range(9, 1, -1), xor_hash(*MULTIPLIERS_850), alpha_pr850, 64, 1024, "shared"),
}


class HashedScorer(ABC):
    """A published scorer: the base's probabilities, mixed with counts of hashed n-grams that are looked up for the target alone.

    As published (`normalize` False) these counts are no distribution, so the score is no code length; `normalize` divides by their
    sum over the vocabulary. The driver updates it every `span` targets.
    """

    WHOLE_ROWS = 2048  # targets whose whole vocabulary is gathered at once
    span = 2**16

    def __init__(self, base: Expert, vocab_size: int, normalize: bool, least: int, device: torch.device | str) -> None:
        self.base, self.normalize, self.least = base, normalize, least
        self.every_1V = torch.arange(vocab_size, device=device)[None]

    @abstractmethod
    def mixed(self, tokens: Tensor, target: Tensor, p: Tensor, token: Tensor) -> Tensor:
        """(n, m) float64: what becomes of the base's probabilities p of tokens `token` (n, m) at positions `target` (n,)."""

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        p, rows = self.base.score(tokens, lo, hi).exp(), self.WHOLE_ROWS if self.normalize else hi - lo
        parts = zip(p.split(rows), torch.arange(lo, hi, device=tokens.device).split(rows), strict=True)
        return torch.cat([self.mixed(tokens, t, q[:, None], tokens[t, None])[:, 0] for q, t in parts]).log()

    def dist(self, tokens: Tensor, t: int) -> Tensor:
        """(V,) float64: what score() gives every token at t; a distribution only with `normalize`."""
        p = self.base.dist(tokens, t).to(tokens.device)
        return self.mixed(tokens, torch.tensor([t], device=tokens.device), p[None], self.every_1V)[0]

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:  # noqa: B027 (a table of the training text is frozen)
        """Learn from tokens[lo:hi], all of them scored."""


class HashedCache(HashedScorer):
    """A published cache: for each order a table of counts of contexts and one of contexts with their target, mixed with the base.

    The count with the target over the count of the context is called a probability; collisions make its sum over the vocabulary
    exceed 1. There are `ranks` caches, each for its own part of the text, as on the published machines; normalised there is one.
    """

    def __init__(self, name: str, base: Expert, vocab_size: int, *, normalize: bool, buckets: int = 2**22, ranks: int = 8,
                 least: int = 2, device: torch.device | str = "cpu") -> None:  # fmt: skip
        super().__init__(base, vocab_size, normalize, least, device)
        self.spec, self.buckets = PUBLISHED[name], buckets
        self.ranks = 1 if normalize or self.spec.layout == "shared" else ranks
        self.span = self.spec.window * self.spec.batch * (self.ranks if self.spec.layout == "windows" else 1)
        shape = (len(self.spec.orders), 2, self.ranks * buckets)
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self.largest = torch.zeros(self.ranks, dtype=torch.float64, device=device)  # step of the enrichment

    def _rank(self, target: Tensor, tokens: Tensor) -> Tensor:
        window = (target - 1) // self.spec.window
        if self.spec.layout == "windows":
            return window % self.ranks
        return window * self.ranks // ((len(tokens) - 2) // self.spec.window + 1)

    def _context_cells(self, tokens: Tensor, target: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """(hash of each target's context, index of its count in `tables[i, 0]`)."""
        back = torch.arange(order - 1, 0, -1, device=tokens.device)
        h = self.spec.hash[0](tokens[(target[:, None] - back).clamp_min(0)])
        return h, self._rank(target, tokens) * self.buckets + (h & (self.buckets - 1))

    def _cells(self, h: Tensor, order: int, rank: Tensor, token: Tensor) -> Tensor:
        """Index in `tables[i, 1]` of the count of `token` after a context of hash h."""
        return rank * self.buckets + (self.spec.hash[1](h, order, token) & (self.buckets - 1))

    def _largest_steps(self, tokens: Tensor, target: Tensor) -> Tensor:
        """(ranks,) the largest step of the enrichment among each rank's targets, 0 without one."""
        if self.base.enrichment is None:
            return torch.zeros_like(self.largest)
        steps, rank = self.base.enrichment[target].double(), self._rank(target, tokens)
        return torch.zeros_like(self.largest).scatter_reduce(0, rank, steps, "amax")

    def _confidence(self, tokens: Tensor, target: Tensor) -> Tensor:
        """(n,) of PR #187 in 0..1: how far the pre-enrichment moved an embedding over the largest such step; 0.5 while there is none."""
        largest = self.largest[self._rank(target, tokens)]
        steps = largest if self.base.enrichment is None else self.base.enrichment[target].double()
        return torch.where(largest > 0, (steps / largest).clamp_max(1.0), 0.5)

    def mixed(self, tokens: Tensor, target: Tensor, p: Tensor, token: Tensor) -> Tensor:
        entropy, confidence = self.base.entropy[target].double(), self._confidence(tokens, target)
        result, todo = p.clone(), torch.arange(len(target), device=tokens.device)
        for (contexts, pairs), order in zip(self.tables, self.spec.orders, strict=True):
            h, cell = self._context_cells(tokens, target[todo], order)
            total = contexts[cell]
            hit = (total >= self.least) & (target[todo] >= order - 1)
            at, h, C = todo[hit], h[hit, None], total[hit, None]
            todo = todo[~hit]
            rank = self._rank(target[at], tokens)[:, None]
            ratio = (torch.minimum(pairs[self._cells(h, order, rank, token[at])], C) / C).double()
            alpha = self.spec.alpha(entropy[at], torch.full_like(at, order), confidence[at])[:, None]
            if self.normalize:
                every = torch.minimum(pairs[self._cells(h, order, rank, self.every_1V)], C) / C
                mass = every.double().sum(1, keepdim=True)
                alpha = torch.where(mass > 0, alpha, 0.0)
                ratio = ratio / mass.clamp_min(1e-300)
            result[at] = (1 - alpha) * p[at] + alpha * ratio
        return result

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        # The published form looks ahead: the largest step is that of the targets which it scores.
        if not self.normalize:
            self.largest = self._largest_steps(tokens, torch.arange(lo, hi, device=tokens.device))
        return super().score(tokens, lo, hi)

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:
        todo = torch.arange(lo, hi, device=tokens.device)
        if self.normalize:
            self.largest = torch.maximum(self.largest, self._largest_steps(tokens, todo))
        for (contexts, pairs), order in zip(self.tables, self.spec.orders, strict=True):
            target = todo[todo >= order - 1]
            h, cell = self._context_cells(tokens, target, order)
            if self.spec.backs_off:  # what this order mixed is none of the shorter ones'
                todo = torch.cat([todo[: len(todo) - len(target)], target[contexts[cell] < self.least]])
            count_cells(contexts, cell)
            count_cells(pairs, self._cells(h, order, self._rank(target, tokens), tokens[target]))


class HashedTable(HashedScorer):
    """The scorer of #1095: counts of hashed n-grams of the training text, fixed.

    The first order from 7 down whose count c of context and target is 2 or more gives alpha c / (c + 1024) + (1 - alpha) p,
    alpha = min(.95, ln(1 + c) / 10), never below 1e-10. No context is counted, so this is no conditional probability, and alpha
    looks at the target. `normalize` divides by the sum over the vocabulary, C, and takes the order and alpha from C. Contexts
    start anew every `length` targets.
    """

    def __init__(self, cells: dict[int, np.ndarray], base: Expert, vocab_size: int, length: int, *, normalize: bool, least: int = 2,
                 device: torch.device | str = "cpu") -> None:  # fmt: skip
        super().__init__(base, vocab_size, normalize, least, device)
        self.cells = {n: torch.from_numpy(cells[n].astype(np.int32)).to(device) for n in sorted(cells, reverse=True)}
        self.length = length

    def _counts(self, tokens: Tensor, target: Tensor, token: Tensor, n: int) -> Tensor:
        """(n, m) float64: counts of the n-grams that end in each `token` at each `target`."""
        before = hash_sequence(tokens[(target - k).clamp_min(0)] for k in range(n - 1, 0, -1))[:, None]
        h = (before * HASHED_MULTIPLIERS[n - 1] + token) & 0xFFFFFFFF
        return self.cells[n][h & (len(self.cells[n]) - 1)].double()

    def mixed(self, tokens: Tensor, target: Tensor, p: Tensor, token: Tensor) -> Tensor:
        result, todo = p.clone(), torch.ones_like(token, dtype=torch.bool)
        room = (target - 1) % self.length + 1  # tokens before the target in its sequence
        for n in self.cells:
            c = self._counts(tokens, target, token, n)
            C = self._counts(tokens, target, self.every_1V, n).sum(1, keepdim=True) if self.normalize else c
            hit = todo & (self.least <= C) & (room >= n - 1)[:, None]
            alpha = (torch.log1p(C) / 10).clamp_max(0.95)
            ratio = c / C.clamp_min(1) if self.normalize else c / (c + 1024)
            result = torch.where(hit, alpha * ratio + (1 - alpha) * p, result)
            todo = todo & ~hit
        return result if self.normalize else result.clamp_min(1e-10)


class Tables(NamedTuple):
    """The n-grams of the training text that an artifact carries."""

    hashed: dict[int, np.ndarray] | None = None  # #1095's counts
    trie: list[TrieLevel] | None = None


NO_TABLES = Tables()


# ---- the driver


def overtime(cfg: Config, since: float, deadline: float, done: int, n: int) -> str:
    """Whether `done` of n tokens, a tenth at least, or the clock tell that the deadline is missed, by a fifth of the limit if at the
    speed since the reading `since`: "passed", "will pass", or empty."""
    now = time.perf_counter()
    end = since + (now - since) * n / done if 10 * done >= n else now
    return "passed" if now > deadline else "will pass" if end > deadline + 0.2 * cfg.eval_wallclock_seconds else ""


def span_end(network: NetworkExpert, chunk: int, lo: int) -> int:
    """Where a span that begins at lo ends: after `chunk` targets, but before it crosses a point at which the network learns."""
    return min(lo + chunk, network.next_update(lo))


def score_first(
    chain: Sequence[Expert], text: ValidationText, span: int, deadline: float = math.inf, end: float = math.inf
) -> StageResult:
    """The driver of every stage: the account of what the last of the chain scores, span by span, before all of them learn it; the
    first is the network. It stops behind the span of target `end`.

    `deadline` is a reading of time.perf_counter(), rank 0's counts; BrokenRun if it passes or clearly will, since a score of a part
    is no score.
    """
    network, account, n, since = chain[0], StageResult(), len(text.tokens), time.perf_counter()
    run, new = network.run, network.done < n
    for lo, hi, logp in score_then_learn(text.tokens, n, functools.partial(span_end, network, span), chain):
        account.add(logp, text.bytes[lo:hi])
        if hi > end:
            break
        run.progress("evaluating", hi, n, since)
        due = 256 * lo // n < 256 * hi // n < 256 and deadline < math.inf  # now and then, since the ranks must agree
        if due and (late := run.broadcast(overtime(run.cfg, since, deadline, max(hi, network.done * new), n))):
            raise BrokenRun(f"EVAL_WALLCLOCK_SECONDS={run.cfg.eval_wallclock_seconds:g} {late} after {hi} of {n} tokens; "
                            "raise EVAL_STRIDE or switch a stage off: a score of a part is no score")  # fmt: skip
    run.sync()
    account.seconds = time.perf_counter() - since
    return account


# What a stage is, for the evaluator and for the tools that code with its distributions.


def stage_stride(cfg: Config, stage: str) -> int:
    """Targets that each window of the stage's network scores."""
    return cfg.eval_len if stage == "roundtrip" else cfg.eval_stride or cfg.eval_len


def update_span(n_tokens: int) -> int:
    """Targets between two updates of the mixing weights, in a stream of `n_tokens`."""
    return max(1024, n_tokens // 4096)


def expert_chain(
    cfg: Config, stage: str, network: NetworkExpert, counted: list[NgramTable], packed: PackedTable | None
) -> list[Expert]:
    """The network and the n-gram experts of the stage, each the base of the next; the last one's scores are the stage's.

    `counted` are tables of the scored text, one for each of `counted_orders`; `packed` is the artifact's, or None.
    """
    chain = [network]
    if cfg.ngram_tilt_enabled and stage in ("tilt", "table", "ngram"):
        chain.append(Tilt(counted[-1], network, cfg.ngram_tilt_order, cfg.ngram_tilt_beta, cfg.ngram_tilt_threshold,
                          cfg.ngram_tilt_gamma))  # fmt: skip
    if packed is not None and stage in ("table", "ngram"):
        chain.append(PackedCascade(packed, chain[-1], cfg.ngram_rate))
    if stage == "ngram":
        chain.append(Cascade(counted[0], chain[-1], cfg.ngram_rate))
    return chain


class Evaluation:
    """The experts of one evaluation. A network pass is made once and shared by the n-gram stages that build on it."""

    def __init__(self, cfg: Config, run: Run, model: GPT, text: ValidationText, tables: Tables = NO_TABLES) -> None:
        self.cfg, self.run, self.model, self.tables = cfg, run, model, tables
        self.device = run.device  # of the stream and of what is known by position
        self.text = text._replace(tokens=text.tokens.to(self.device), bytes=text.bytes.to(self.device))
        self.networks: dict[str, NetworkExpert] = {}
        self.counted = [NgramTable(cfg.vocab_size, order, self.device) for order in cfg.counted_orders]
        self.packed = PackedTable(tables.trie, cfg.vocab_size, self.device) if tables.trie else None

    @property
    def best_network(self) -> str:
        """The stage of the network that n-grams build on."""
        return "ttt" if self.cfg.ttt_enabled else "sliding" if self.cfg.eval_stride else "roundtrip"

    def network(self, stage: str) -> NetworkExpert:
        """The network of a stage; n-gram stages build on the best one that is switched on."""
        cfg = self.cfg
        if stage in ("normalized", "claimed") and cfg.ngram_claim == "pr1095":
            stage = "roundtrip"
        if stage not in ("roundtrip", "sliding", "ttt"):
            stage = self.best_network
        if stage not in self.networks:
            form = TEST_TIME[cfg.ttt_reset] if stage == "ttt" else NetworkExpert
            network = form(cfg, self.run, self.model, self.text, stage_stride(cfg, stage))
            if cfg.ngram_tilt_enabled and stage == self.best_network:
                self.counted[-1].load(self.text.tokens)  # a hint depends on its prefix alone
                hinted = self.counted[-1].columns[2][cfg.ngram_tilt_order - 1].to(self.device)
                network.hints = self.text.tokens[hinted]
            self.networks[stage] = network
        return self.networks[stage]

    def experts(self, stage: str) -> tuple[list[Expert], int]:
        """(the experts of the stage, the network first, of which the last one's scores are the stage's; targets between two updates)."""
        cfg, network, normalize = self.cfg, self.network(stage), stage == "normalized"
        if stage not in ("normalized", "claimed"):
            chain = expert_chain(cfg, stage, network, self.counted, self.packed)
            return chain, network.ahead if len(chain) == 1 else update_span(len(self.text.tokens))
        if cfg.ngram_claim == "pr1095":
            scorer = HashedTable(self.tables.hashed, network, cfg.vocab_size, cfg.eval_len, normalize=normalize,
                                 least=cfg.ngram_min_count, device=self.device)  # fmt: skip
        else:
            scorer = HashedCache(cfg.ngram_claim, network, cfg.vocab_size, normalize=normalize, device=self.device,
                                 buckets=cfg.ngram_buckets, ranks=cfg.ngram_claim_ranks, least=cfg.ngram_min_count)  # fmt: skip
        return [network, scorer], scorer.span

    def move_to_cpu(self) -> None:
        """Continue on the CPU with what is scored: small spans there cost less than launches on a GPU."""
        self.device = torch.device("cpu")
        self.text = self.text._replace(tokens=self.text.tokens.cpu(), bytes=self.text.bytes.cpu())
        for network in self.networks.values():
            for name in vars(network).keys() & {"logp", "entropy", "hint_prob", "hints", "weights", "enrichment"}:
                value = getattr(network, name)
                setattr(network, name, value.cpu() if value is not None else None)

    def score(self, stage: str, deadline: float = math.inf) -> StageResult:
        """Score the whole text in one stage."""
        chain, span = self.experts(stage)
        return dataclasses.replace(score_first(chain, self.text, span, deadline), stage=stage)


class RecordingScorer:
    """Behind the last expert of a chain: keeps its scores, and at targets `at` the whole distribution before the target is learned."""

    def __init__(self, scorer: Expert, at: Iterable[int]) -> None:
        self.scorer, self.at = scorer, sorted(at)
        self.scores: list[Tensor] = []
        self.dists: dict[int, Tensor] = {}

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        self.scores.append(self.scorer.score(tokens, lo, hi))
        for t in self.at[bisect_left(self.at, lo) : bisect_left(self.at, hi)]:
            self.dists[t] = self.scorer.dist(tokens, t)
        return self.scores[-1]

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:
        """What it watches learns by itself."""


CLAIM_SAMPLES = 64  # targets at which Z is measured


def claim(evaluation: Evaluation) -> None:
    """Run NGRAM_CLAIM as published and log what it claims beside the measured sum Z of its probabilities. It is no stage and
    never the score, so it runs once the score is reported, outside the evaluation's time."""
    cfg, run = evaluation.cfg, evaluation.run
    evaluation.model.eval()
    network = evaluation.network("claimed")
    score_first([network], evaluation.text, network.ahead)  # scored already unless its stage is off
    evaluation.move_to_cpu()
    chain, span = evaluation.experts("claimed")
    n = len(evaluation.text.tokens)
    recorded = RecordingScorer(chain[-1], range(1, n, max(1, n // CLAIM_SAMPLES)))
    r = score_first([*chain, recorded], evaluation.text, span)
    sums = [p.sum().item() for p in recorded.dists.values()]
    z_mean, z_max = sum(sums) / len(sums), max(sums)
    run.log(f"{cfg.ngram_claim} claimed_bpb:{r.val_bpb:.8f} z_mean:{z_mean:.3f} z_max:{z_max:.3f} (not a code length)")
    run.event("claim", name=cfg.ngram_claim, claimed_bpb=r.val_bpb, z_mean=z_mean, z_max=z_max, seconds=r.seconds,
              note="not a code length")  # fmt: skip


def longest_first(text: ValidationText) -> tuple[ValidationText, float]:
    """(the text with its documents in order of falling length, the bits that tell a decoder of it their true order).

    Documents of equal length stand in the order of the text, so log2(n! / product over lengths of m_l!) bits: n documents,
    m_l of length l.
    """
    begins = [document.start for document in documents_of(text.tokens)]
    pieces = sorted(itertools.pairwise([*begins, len(text.tokens)]), key=lambda piece: piece[0] - piece[1])
    order = torch.cat([torch.arange(*piece, device=text.tokens.device) for piece in pieces])
    equal = Counter(end - begin for begin, end in pieces)
    nats = math.lgamma(len(pieces) + 1) - sum(math.lgamma(m + 1) for m in equal.values())
    return text._replace(tokens=text.tokens[order], bytes=text.bytes[order]), nats / math.log(2)


def order_claim(evaluation: Evaluation) -> None:
    """Stage ttt as published, on the longest documents first, and the bits of order that its figure leaves out. Never the score."""
    cfg, run = evaluation.cfg, evaluation.run
    text, order_bits = longest_first(evaluation.text)
    r = Evaluation(cfg, run, evaluation.model, text).score("ttt")
    order_bpb = order_bits / max(r.bytes, 1)
    run.log(f"ttt_order:length claimed_bpb:{r.val_bpb:.8f} order_bits:{order_bits:.0f} order_bpb:{order_bpb:.8f} "
            f"with_order_bpb:{r.val_bpb + order_bpb:.8f} (not a code length of the text: its documents are reordered)")  # fmt: skip
    run.event("order_claim", name="ttt_order_length", claimed_bpb=r.val_bpb, order_bits=order_bits, order_bpb=order_bpb,
              seconds=r.seconds, note="not a code length of the text")  # fmt: skip


def evaluate(evaluation: Evaluation, stages: tuple[str, ...]) -> Iterator[StageResult]:
    """Score the validation text in `stages`, in order; all ranks get each result as soon as there is one."""
    evaluation.model.eval()
    deadline = time.perf_counter() + (evaluation.cfg.eval_wallclock_seconds or math.inf)
    for stage in stages:
        yield evaluation.score(stage, deadline)
    evaluation.model.train()


def rehearsal_text(cfg: Config, gpu: bool) -> ValidationText:
    """Documents of random tokens, longer than any window: as many as a batch has on a GPU, on a CPU two."""
    rows = max(cfg.ttt_batch_size * cfg.ttt_enabled, (cfg.val_batch_tokens or 2**17) // cfg.eval_len + 1) if gpu else 1
    generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "rehearsal"))
    shape = (rows + 1, max(cfg.eval_len, cfg.ttt_eval_len) + 1)
    ids = torch.randint(min(2, cfg.vocab_size - 1), cfg.vocab_size, shape, generator=generator)
    ids[:, 0] = BOS
    return ValidationText(ids.flatten(), torch.ones(ids.numel(), dtype=torch.int64), complete=True)


def rehearse(cfg: Config, run: Run, model: GPT, text: ValidationText) -> None:
    """Before the clocks: compile the evaluation's graphs on random tokens, and log what it will take for `text` on this many ranks."""
    limit = cfg.eval_wallclock_seconds
    if not limit:
        return
    evaluation = Evaluation(cfg, run, model.eval(), rehearsal_text(cfg, run.device.type == "cuda"))
    wanted = {stage if stage in STAGES[:3] else evaluation.best_network for stage in cfg.stages}
    seconds = {stage: evaluation.network(stage).expected_seconds(text) for stage in STAGES if stage in wanted}
    model.train()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the log tells the training's
    run.log(f"evaluation projected: {', '.join(f'{stage} {s:.0f}s' for stage, s in seconds.items())} of {limit:g}s")
    if sum(seconds.values()) > limit:
        run.notice(f"EVAL_WALLCLOCK_SECONDS={limit:g} will break: the network's stages take about {sum(seconds.values()):.0f}s on {run.world} ranks; "
                   "take more ranks, raise EVAL_STRIDE or switch a stage off")  # fmt: skip


# ---- the audit: is the score a code length?


class AuditCheck(NamedTuple):
    """One answer of the audit."""

    name: str
    passed: bool
    detail: str


AUDIT_TOKENS = 8192  # length of the audited prefix
AUDIT_SAMPLES, AUDIT_EDGES = 24, 8  # targets whose whole distribution is looked at


class Audit:
    """Puts one stage to the tests of a code length, on a prefix of the text, each time with fresh experts under the driver."""

    def __init__(
        self, cfg: Config, run: Run, model: GPT, text: ValidationText, stage: str, tables: Tables = NO_TABLES
    ) -> None:
        n = min(len(text.tokens), max(AUDIT_TOKENS, cfg.eval_len + 2))
        self.often = max(1, n // 8)  # learning comes within the prefix, or nothing would be seen of it
        block = min(cfg.ttt_block_tokens, max(self.often, *(size for _, size in cfg.ttt_chunk_steps)))
        chunk = min(cfg.ttt_chunk_tokens, self.often)
        self.cfg = dataclasses.replace(cfg, ttt_chunk_tokens=chunk, ttt_block_tokens=block)
        self.run, self.model, self.stage, self.tables = run, model, stage, tables
        # Learning on a GPU sums in no fixed order, and documents learn in batches of other shapes where the text differs.
        inexact = run.device.type == "cuda" or cfg.ttt_reset == "document"
        self.tolerance = 1e-3 if cfg.ttt_enabled and inexact else 1e-6
        self.text = text._replace(tokens=text.tokens[:n], bytes=text.bytes[:n])
        generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "audit"))
        self.noise = torch.randint(cfg.vocab_size, (n,), generator=generator)
        after_bos = (self.text.tokens[: n - 1] == BOS).nonzero().flatten()[: AUDIT_SAMPLES // 4] + 1
        self.cuts = sorted({1, n // 4, n // 2, 3 * n // 4, n - 1, *self.edges()} & {*range(1, n)})
        self.at = sorted({1, *self.cuts, *range(1, n, max(1, n // AUDIT_SAMPLES)), *after_bos.tolist()})

    def experts(self, tokens: Tensor) -> tuple[ValidationText, list[Expert], int]:
        """(a stream in the text's place, fresh experts of it, targets between two updates)."""
        text = self.text._replace(tokens=tokens)
        evaluation = Evaluation(self.cfg, self.run, self.model, text, self.tables)
        chain, span = evaluation.experts(self.stage)
        return evaluation.text, chain, min(span, self.often)

    def edges(self) -> list[int]:
        """The first targets behind what is learned, up to AUDIT_EDGES of each kind: by all experts, by the network alone, and by the
        longest document."""
        _, chain, span = self.experts(self.text.tokens)
        network, ends = chain[0], [1]
        while ends[-1] < len(self.text.tokens):
            ends.append(span_end(network, span, ends[-1]))
        found = [[1, *network.edges], ends][: len(chain)]
        if isinstance(network, DocumentLoraNetwork):
            longest = max(network.documents, key=lambda document: document.targets)
            found.append([longest.start + start for start in network.chunks if start <= longest.targets])
        return [t for edges in found for t in edges[1 :: max(1, -(-(len(edges) - 1) // AUDIT_EDGES))]]

    def walk(self, tokens: Tensor, at: Iterable[int] = (), end: float = math.inf) -> tuple[Tensor, dict, StageResult]:
        """Scores from target 1 to the span of target `end`, distributions, and the driver's account, of a stream in the text's place."""
        text, chain, span = self.experts(tokens)
        watched = RecordingScorer(chain[-1], at)
        account = score_first([*chain, watched], text, span, end=end)
        return torch.cat(watched.scores).cpu(), {t: p.cpu() for t, p in watched.dists.items()}, account

    def checks(self) -> Iterator[AuditCheck]:
        """All checks of this stage; the first walk serves three of them."""
        tokens = self.text.tokens
        scores, dists, account = self.walk(tokens, self.at)
        yield self.sums_to_one(dists)
        yield self.scores_are_of_the_distribution(scores, dists)
        counted = (account.tokens, account.bytes) == (len(tokens) - 1, int(self.text.bytes[1:].sum()))
        yield AuditCheck("every target once", counted, f"{account.tokens} targets, {account.bytes} bytes")
        yield from self.rest_is_unseen(scores, dists)
        cost = -self.walk(self.noise)[0].mean().item() / math.log(2)
        floor = math.log2(self.cfg.vocab_size)
        yield AuditCheck("noise costs its entropy", cost >= floor - 0.01, f"{cost:.3f} bits a token of {floor:.3f}")

    def sums_to_one(self, dists: dict[int, Tensor]) -> AuditCheck:
        t, z = max(((t, p.sum().item()) for t, p in dists.items()), key=lambda item: abs(item[1] - 1))
        positive = all(bool((p >= 0).all()) for p in dists.values())
        return AuditCheck("a distribution", positive and abs(z - 1) <= 1e-6, f"sum at target {t}: {z:.9f}")

    def scores_are_of_the_distribution(self, scores: Tensor, dists: dict[int, Tensor]) -> AuditCheck:
        gaps = {t: abs(p[self.text.tokens[t]].log().item() - scores[t - 1].item()) for t, p in dists.items()}
        t, mean = max(gaps, key=gaps.get), sum(gaps.values()) / len(gaps)
        # Another batch shape rounds differently: logits above 16 are an eighth apart in bf16.
        largest, on_average = (1e-4, 1e-4) if self.model.compute_dtype == torch.float32 else (0.3, 0.03)
        passed = gaps[t] <= largest and mean <= on_average
        detail = f"gap at target {t}: {gaps[t]:.2e} nats, mean {mean:.1e}"
        return AuditCheck("the score is the distribution's", passed, detail)

    def rest_is_unseen(self, scores: Tensor, dists: dict[int, Tensor]) -> Iterator[AuditCheck]:
        """Every token from a cut on is replaced: neither the scores before it nor the distribution at it may change."""
        vocab = self.cfg.vocab_size
        other = (self.text.tokens + 1 + self.noise % (vocab - 1)) % vocab  # another token at every place
        past, here = {}, {}
        for t in self.cuts:
            before, dist, _ = self.walk(torch.cat([self.text.tokens[:t], other[t:]]), [t], t)
            past[t] = (before[: t - 1] - scores[: t - 1]).abs().max().item() if t > 1 else 0.0
            here[t] = (dist[t] - dists[t]).abs().max().item()
        for name, gaps in (("future", past), ("target", here)):
            t, cuts = max(gaps, key=gaps.__getitem__), f"{len(gaps)} cuts"
            where = f"up to target {t - 1}" if name == "future" else f"at target {t}"
            passed = all(gap <= self.tolerance for gap in gaps.values())
            yield AuditCheck(f"prefix only: {name}", passed, f"largest change {where}: {gaps[t]:.2e}, {cuts}")


def replay_check(text: ValidationText, table: NgramTable, n: int = 2000) -> AuditCheck:
    """The engine's statistics against a dictionary fed one token at a time."""
    tokens = text.tokens[:n].tolist()
    stats = [x.tolist() for x in table.span(text.tokens, 0, len(tokens))]  # of the whole stream, cut after counting
    followers: dict[tuple[int, ...], list[int]] = {}  # context -> positions of the tokens that followed it
    for t, x in enumerate(tokens):
        for k in range(table.order):
            at = followers.setdefault(tuple(tokens[t - k : t]), []) if k <= t else []
            came = [tokens[i] for i in at]
            expected = (len(at), came.count(x), len({*came}), at[-1] if at else -1)
            if tuple(column[k][t] for column in stats) != expected:
                return AuditCheck("replay", False, f"target {t}, context of {k} tokens: expected {expected}")
            at.append(t)
    return AuditCheck("replay", True, f"{len(tokens)} targets, contexts of 0 to {table.order - 1} tokens")


DECODED_TOKENS = 2**20  # the prefix that is decoded for the check of its bytes


def bytes_check(text: ValidationText, tokenizer: Tokenizer, exact: bool) -> AuditCheck:
    """The bytes counted of each document of a prefix against the length of its decoded original text.

    Unless `exact`, the totals may differ as a published sidecar's may, and CaseOps operators may be out of place.
    """
    name = "bytes are the text's"
    tokens, counts = (x[:DECODED_TOKENS].cpu().numpy() for x in (text.tokens, text.bytes))
    starts = [0, *np.flatnonzero(tokenizer.boundary[tokens[1:]]) + 1]
    while len(tokens) > 1 and tokenizer.sp.is_byte(int(tokens[-1])):  # the cut may lie within a character
        tokens = tokens[:-1]
    total = -len(tokenizer.decode(tokens[:1])[0].encode())  # the first token is no target
    strays = 0
    for lo, hi in itertools.pairwise([*starts, len(tokens)]):
        original, odd = tokenizer.decode(tokens[lo:hi])
        total, strays = total + len(original.encode()), strays + odd
        counted = int(counts[:hi].sum())
        if exact and (total != counted or strays):
            detail = f"{strays} operators out of place, " if strays else ""
            return AuditCheck(name, False, f"up to target {hi - 1}: {detail}{counted} counted, {total} in the text")
    detail = f"{counted} counted by the {text.bytes_from}, {total} in the decoded text of {len(tokens)} tokens"
    return AuditCheck(name, abs(total - counted) <= SIDECAR_TOLERANCE * total, detail)


# ==== 10 MAIN =========================================================================================================


class OpenRun(NamedTuple):
    """What every mode that touches text needs."""

    loaded: LoadedConfig
    run: Run
    paths: DataPaths
    tokenizer: Tokenizer
    text: ValidationText
    code_bytes: int = 0  # of this script as it counts, from `log_start` on

    @property
    def cfg(self) -> Config:
        return self.loaded.cfg


def fit_data(loaded: LoadedConfig, tokenizer_sha256: str = "") -> tuple[LoadedConfig, DataPaths]:
    """Where the data are, and the configuration with VOCAB_SIZE of their tokenizer where nobody set it.

    An artifact's hash of its tokenizer, where it is given, chooses among downloads.
    """
    bound = loaded.source["VOCAB_SIZE"] == "env" or tokenizer_sha256 != ""
    paths = find_data(loaded.cfg, tokenizer_sha256, loaded.cfg.vocab_size if bound else 0)
    if not bound:
        cfg = dataclasses.replace(loaded.cfg, vocab_size=open_tokenizer(paths.tokenizer).vocab_size())
        loaded = loaded._replace(cfg=cfg, source={**loaded.source, "VOCAB_SIZE": "tokenizer"})
    return loaded, paths


def check_paths(run: Run, paths: DataPaths) -> None:
    """Raises ConfigError if the artifact is one of the run's own logs or checkpoints, or a file that it reads."""
    log, artifact = run.log_path, run.artifact_path.resolve()
    uses = {log: "its log", log.with_suffix(".jsonl"): "its log", log.with_suffix(".ckpt"): "its checkpoints"}
    if run.cfg.mode == "train":  # other modes read it
        uses |= {SCRIPT: "this script", paths.tokenizer: "the tokenizer", paths.folder / "manifest.json": "the data"}
        uses |= dict.fromkeys(paths.folder.glob("fineweb_*.bin"), "the data")
        uses |= {Path(run.cfg.resume): "the checkpoint of RESUME"} if run.cfg.resume not in ("", "auto") else {}
    for path, use in uses.items():
        same = path.is_file() and artifact.is_file() and path.samefile(artifact)
        if same or path.resolve() in (artifact, *artifact.parents):
            named = f"ARTIFACT={run.artifact_path}"
            raise ConfigError(f"{named}: {path} is {use}; choose another ARTIFACT, or another RUN_ID")


def open_run(loaded: LoadedConfig, tokenizer_sha256: str = "") -> OpenRun:
    """Read tokenizer and validation text, start and name the run, check the shards; logs are opened later, after all checks."""
    loaded, paths = fit_data(loaded, tokenizer_sha256)
    cfg = loaded.cfg
    tokenizer = Tokenizer(paths.tokenizer, cfg.vocab_size, paths.transform)
    if cfg.compressor == "zstd":
        zstd_pack(b"")  # a package that is missing is told before the training
    text = load_validation(cfg, paths.folder, tokenizer)
    check_phases(cfg, text.tokens)
    run = Run.start(cfg)
    run.run_id = run.on_first(run.reserve_run_id)
    run.on_first(lambda: check_paths(run, paths))
    found = run.on_first(lambda: check_data(paths.folder, training=cfg.mode != "eval"))
    loaded = loaded._replace(notices=[*loaded.notices, *found])
    return OpenRun(loaded, run, paths, tokenizer, text)


def shown_path(path: Path) -> str:
    """A path as logs show it: relative to the working folder where it lies below it, so that logs can be published."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(path)


def device_name(device: torch.device) -> str:
    """The model name of the GPU or CPU, or the architecture where the system does not tell it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_info("model name") or platform.processor() or platform.machine()


def log_head(opened: OpenRun, train_tokens: int, train_shards: int) -> int:
    """Write the head of the log, on rank 0: source, configuration with the origin of each value, versions, data, parameters; returns the bytes
    of the code."""
    cfg, run, source = opened.cfg, opened.run, source_text()
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(cfg).parameters())
    packed, notice = counted_code(cfg)
    source_sha256, packed_sha256 = (hashlib.sha256(code).hexdigest() for code in (source.encode(), packed))
    run.log(source, to_terminal=False)
    run.log("=" * 100, to_terminal=False)
    run.log(dump_config(opened.loaded), to_terminal=False)
    device = device_name(run.device)
    run.log(f"run_id:{run.run_id} recipe:{cfg.recipe} ({opened.loaded.recipe_reason}) mode:{cfg.mode} seed:{cfg.seed}")
    run.log(f"torch:{torch.__version__} python:{platform.python_version()} device:{run.device.type} ({device}) ranks:{run.world} "
            f"threads:{torch.get_num_threads()} busy_cpus:{BUSY_CPUS:.1f}")  # fmt: skip
    text, tokenizer = opened.text, opened.tokenizer
    data = {"train_shards": train_shards, "train_tokens": train_tokens, "val_tokens": len(text.tokens) - 1,
            "val_bytes": int(text.bytes.sum()), "bytes_from": text.bytes_from, "transform": tokenizer.transform}  # fmt: skip
    run.log(" ".join(f"{key}:{'none' if value == '' else value}" for key, value in data.items()))
    run.log(f"model_params:{params} source_sha256:{source_sha256} packed_sha256:{packed_sha256}")
    if opened.paths.sample:
        run.notice("training and scoring the sample that ships with the script; its numbers are no challenge results")
    for text_of_notice in filter(None, (*opened.loaded.notices, launched_apart(), notice)):
        run.notice(text_of_notice)
    run.event("run", run_id=run.run_id, recipe=cfg.recipe, recipe_reason=opened.loaded.recipe_reason, mode=cfg.mode,
              seed=cfg.seed, world_size=run.world, device=run.device.type, device_name=device, torch=torch.__version__,
              python=platform.python_version(), started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
              source_sha256=source_sha256, source_bytes=len(source.encode()), packed_sha256=packed_sha256, packed_bytes=len(packed), params=params,
              data={"path": shown_path(opened.paths.folder), "sample": opened.paths.sample, **data,
                    "val_sha256": hashlib.sha256(text.tokens.numpy().astype("<u2").tobytes()).hexdigest()},
              tokenizer={"path": shown_path(opened.paths.tokenizer), "sha256": tokenizer.sha256, "vocab_size": cfg.vocab_size})  # fmt: skip
    run.event("config", values={n: getattr(cfg, n.lower()) for n in FIELDS}, sources=opened.loaded.source)
    return len(packed)


def log_start(opened: OpenRun, train_tokens: int, train_shards: int) -> OpenRun:
    """Write the head of the log; returns the run with its `code_bytes`, on every rank."""
    return opened._replace(code_bytes=opened.run.on_first(lambda: log_head(opened, train_tokens, train_shards)))


def build_model(cfg: Config, run: Run) -> GPT:
    """The model on its device, with the attention kernel that ATTENTION names; the same weights on every rank."""
    attention = choose_attention(cfg, run.device)
    for text in attention.notices:
        run.notice(text)
    model = GPT(cfg).place(run.device, attention.kernel, cfg.train_dtype)
    run.log(f"attention:{attention.name} dtype:{str(model.compute_dtype).removeprefix('torch.')}")
    return model


def artifact_header(cfg: Config, tokenizer: Tokenizer, looped: bool = True) -> dict[str, Any]:
    """The artifact's header: recipe, every knob that differs from its default, the tokenizer's hash, the text's transform, and with
    NUM_LOOPS whether the training reached the looped plan."""
    values = {n: getattr(cfg, n.lower()) for n in FIELDS if n not in LOCAL_KNOBS}
    values = {n: value for n, value in values.items() if value != FIELDS[n].default}
    transform = {"transform": tokenizer.transform} if tokenizer.transform else {}
    plan = {"looped": looped} if cfg.num_loops else {}
    return {"config": {**values, "RECIPE": cfg.recipe}, "tokenizer_sha256": tokenizer.sha256, **transform, **plan}


def pack_model(
    opened: OpenRun, model: GPT, calibration: Calibration | None, calibration_s: float, sections: dict[str, bytes]
) -> bytes:
    """Quantise and pack the model on all ranks, write the artifact on the first and log its sizes; returns the file's bytes."""
    cfg, run = opened.cfg, opened.run
    filled = {n: p for n, p in model.named_parameters() if p.numel()}  # one block has no skip weights
    named, store = {n: p.detach() for n, p in filled.items()}, {n: p.store for n, p in filled.items()}
    header = artifact_header(cfg, opened.tokenizer, model.looped)
    started = time.perf_counter()
    if cfg.target_bytes:
        budget = BudgetSearch(cfg, header, named, store, calibration, opened.code_bytes, sections, run).fill()
        stored, blob = budget.stored, budget.blob
        run.log(budget_table(budget, cfg.target_bytes))
    else:
        stored = quantize(cfg, named, store, calibration.hessians if calibration else {}, run)
        blob = run.on_first(lambda: pack(cfg, header, stored, sections))
    seconds = time.perf_counter() - started

    def save() -> bytes:
        run.event("quant", seconds=seconds, calibration_s=calibration_s, roles=quant_report(named, stored))
        run.save_artifact(blob)
        return run.artifact_path.read_bytes()

    blob = run.on_first(save)
    sizes = size_table(role_bytes(blob, layout_of(stored)))
    run.log(f"quantized and packed {run.artifact_path} in {time.perf_counter() - started:.1f}s after {calibration_s:.1f}s of "
            f"calibration\n{sizes}")  # fmt: skip
    return blob


def calibrate_in_time(opened: OpenRun, model: GPT, stream: TokenStream, micro_tokens: int, left: float) -> Calibration:
    """Calibrate with the `left` seconds of MAX_WALLCLOCK_SECONDS, a tenth of them kept to sum over the ranks."""
    cfg, run = opened.cfg, opened.run
    # An eager backward pass keeps up to twice what the compiled one of training kept.
    batches = calibration_inputs(cfg, run, stream, micro_tokens // 2)
    calibration = calibrate(cfg, run, model, while_time(batches, 0.9 * left, run))
    done = calibration.tokens // cfg.train_seq_len
    if done < cfg.gptq_n_samples:
        run.notice(f"calibrated on {done} of GPTQ_N_SAMPLES={cfg.gptq_n_samples} sequences, as many as the {left:.1f}s left of "
                   "MAX_WALLCLOCK_SECONDS allow; GPTQ_RESERVE_SECONDS keeps more")  # fmt: skip
    return calibration


def make_artifact(opened: OpenRun, model: GPT, stream: TokenStream, result: TrainResult) -> tuple[bytes, float]:
    """Calibrate, quantise, pack and write the artifact: its bytes on every rank, as read back from the file, and
    the seconds of calibration and of counting the training text's n-grams."""
    cfg, run, started, sections = opened.cfg, opened.run, time.perf_counter(), {}
    if "exact" in cfg.ngram_tables and run.rank == 0:
        n = min(stream.total, cfg.ngram_table_tokens)
        tokens = stream.read(-stream.position, n)
        sections["exact"] = build_trie(tokens, cfg.vocab_size, cfg.ngram_table_order, cfg.ngram_table_bytes)
    counted = run.broadcast(time.perf_counter() - started)
    left = cfg.max_wallclock_seconds - result.seconds - counted if cfg.max_wallclock_seconds else math.inf
    calibration = calibrate_in_time(opened, model, stream, result.micro_tokens, left) if cfg.calibrates else None
    run.sync()
    calibration_s = run.broadcast(time.perf_counter() - started)
    if result.cells is not None and run.rank == 0:
        sections["pr1095"] = pack_hashed(result.cells, cfg.lzma_preset)
    return pack_model(opened, model, calibration, calibration_s, run.broadcast(sections)), calibration_s


def model_layout(cfg: Config, blob: bytes) -> Layout:
    """Names, shapes and roles of the tensors of an artifact's model; nothing is allocated for a file that cannot hold it."""
    with torch.device("meta"):
        skeleton = GPT(cfg)
    held = 4 * sum(t.numel() for t in (*skeleton.parameters(), *skeleton.buffers()))
    if held > 4 * raw_limit(len(blob)):
        raise ArtifactError(f"its configuration asks for {held} bytes of model, too much for a file of {len(blob)}")
    return {n: (tuple(p.shape), p.store) for n, p in skeleton.named_parameters() if p.numel()}


def load_model(cfg: Config, run: Run, blob: bytes) -> GPT:
    """The artifact's model, made from its bytes alone, on the device."""
    header, stored = unpack(blob, model_layout(cfg, blob))
    if type(looped := header.get("looped", True)) is not bool:
        raise ArtifactError(f"it names {str(looped)[:40]!r} as its plan of blocks")
    model = GPT(cfg)
    model.set_looped(looped)
    empty = {n: p for n, p in model.named_parameters() if not p.numel()}
    model.load_state_dict({**{n: dequantize(s) for n, s in stored.items()}, **empty}, strict=True)
    # A score must not depend on what a CPU computes with; a GPU scores in the arithmetic of the training.
    dtype = cfg.train_dtype if run.device.type == "cuda" else "fp32"
    return model.place(run.device, choose_attention(cfg, run.device).kernel, dtype)


def load_tables(cfg: Config, blob: bytes) -> Tables:
    """The n-grams that the artifact carries, as far as NGRAM_TABLE asks for them; ConfigError where it lacks them."""
    sections = read_header(blob).sections
    for name in cfg.ngram_tables:
        if name not in sections:
            raise ConfigError(f"NGRAM_TABLE={cfg.ngram_table}: the artifact carries no table {name}; unset NGRAM_TABLE")
    return Tables(unpack_hashed(sections["pr1095"]) if "pr1095" in cfg.ngram_tables else None,
                  unpack_trie(sections["exact"], cfg.vocab_size) if "exact" in cfg.ngram_tables else None)  # fmt: skip


def account_bytes(opened: OpenRun, blob: bytes) -> dict[str, int]:
    """Count artifact and code against ARTIFACT_LIMIT, and log it."""
    cfg, run, size, code = opened.cfg, opened.run, len(blob), opened.code_bytes
    total, limit = size + code, cfg.artifact_limit
    sizes = {"artifact_bytes": size, "code_bytes": code, "total_bytes": total, "limit": limit}
    if run.rank:  # the others need no table of the file, which is read for it
        return sizes
    run.log(f"Total submission size: {total} bytes = artifact {size} + code {code}, limit {limit}")
    run.event("pack", artifact=str(run.artifact_path), artifact_sha256=hashlib.sha256(blob).hexdigest(), **sizes,
              code_form=cfg.code_form, roles=role_bytes(blob, model_layout(cfg, blob)))  # fmt: skip
    return sizes


def report_score(opened: OpenRun, r: StageResult, sizes: dict[str, int], train_s: float, eval_s: float) -> bool:
    """Log the score, and before it each limit that was broken; returns whether all held."""
    cfg, run = opened.cfg, opened.run
    broken = []
    if not math.isfinite(r.val_bpb):
        broken.append(f"stage {r.stage} scored {r.val_bpb}")
    if sizes["total_bytes"] > sizes["limit"]:
        broken.append(f"total {sizes['total_bytes']} bytes exceed ARTIFACT_LIMIT={sizes['limit']}")
    if cfg.max_wallclock_seconds and train_s > cfg.max_wallclock_seconds:
        remedy = "; raise GPTQ_RESERVE_SECONDS" if cfg.reserved_seconds else ""
        limit = f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}"
        broken.append(f"training and calibration took {train_s:.1f}s, {limit}{remedy}")
    if cfg.eval_wallclock_seconds and eval_s > cfg.eval_wallclock_seconds:
        broken.append(f"evaluation took {eval_s:.1f}s, EVAL_WALLCLOCK_SECONDS={cfg.eval_wallclock_seconds:g}")
    for text in broken:
        run.log(f"limit broken: {text}")
        run.event("error", message=text)
    word = "score" if opened.text.complete else f"no_score (VAL_TOKENS={cfg.val_tokens} scored a prefix only)"
    counted = " ".join(f"{name}:{size}" for name, size in sizes.items())
    times = f"train_time:{train_s:.1f}s eval_time:{eval_s:.1f}s"
    run.log(f"{word} val_bpb:{r.val_bpb:.8f} stage:{r.stage} {counted} {times}")
    run.event("score", val_bpb=r.val_bpb, val_loss=r.val_loss, stage=r.stage, **sizes, train_s=train_s, eval_s=eval_s,
              complete=opened.text.complete, limits_ok=not broken)  # fmt: skip
    return not broken


def score_artifact(opened: OpenRun, blob: bytes, train_s: float = 0.0) -> int:
    """Load the model from the artifact's bytes, score it in every stage and log the score; returns the exit status."""
    cfg, run, clock = opened.cfg, opened.run, Clock(opened.run)
    model = load_model(cfg, run, blob)
    dtype = str(model.compute_dtype).removeprefix("torch.")
    memory = f"peak_memory:{run.peak_memory_mib():.0f}MiB"
    run.log(f"loaded the artifact load_time:{clock.seconds():.2f}s dtype:{dtype} {memory}")
    if cfg.mode == "eval":  # a training has done it
        with clock.paused():
            rehearse(cfg, run, model, opened.text)
    sizes = account_bytes(opened, blob)
    evaluation = Evaluation(cfg, run, model, opened.text, load_tables(cfg, blob))
    results = []
    for r in evaluate(evaluation, cfg.stages):
        gain = f" gain:{results[-1].val_bpb - r.val_bpb:.6f}" if results else ""  # over the stage before
        exact = f"val_loss:{r.val_loss:.8f} val_bpb:{r.val_bpb:.8f}{gain}"
        run.log(f"final_{r.stage}_exact {exact} eval_time:{1000 * r.seconds:.0f}ms")
        run.event("stage", stage=r.stage, val_loss=r.val_loss, val_bpb=r.val_bpb, tokens=r.tokens, bytes=r.bytes,
                  seconds=r.seconds, complete=opened.text.complete, dtype=dtype)  # fmt: skip
        results.append(r)
    final = next(r for r in results if r.stage == cfg.final_stage)
    held = report_score(opened, final, sizes, train_s, clock.seconds())
    if cfg.ttt_order == "length":
        order_claim(evaluation)
    if "claimed" in cfg.ngram_scores:
        claim(evaluation)
    # Clocks differ by rank, and ranks that end differently keep torchrun waiting.
    return 0 if run.broadcast(held) else 1


def check_target(cfg: Config, run: Run, code_bytes: int) -> None:
    """Raises ConfigError where the code alone leaves TARGET_BYTES no room; a notice where a model as random as any trained one does.

    Tensors without entropy cost next to nothing, so nothing else is certain before the training.
    """
    if not cfg.target_bytes:
        return
    if code_bytes >= cfg.target_bytes:
        raise ConfigError(f"TARGET_BYTES={cfg.target_bytes} counts the code too, which has {code_bytes} bytes; raise it, or set "
                          f"CODE_FORM={'packed' if cfg.code_form == 'source' else 'source'} if that is less")  # fmt: skip
    with torch.device("meta"):
        params = dict(GPT(cfg).named_parameters())
    policy = Policy(cfg, params, {n: p.store for n, p in params.items()})
    least = sum(p.numel() * (policy.bits(n) if policy.bits(n) > 8 else LEAST_BITS) / 8 for n, p in params.items())
    if code_bytes + least > cfg.target_bytes:
        run.notice(f"TARGET_BYTES={cfg.target_bytes} will hardly be met: code {code_bytes} bytes and about {least:.0f} at the coarsest "
                   "steps; raise it, or take a smaller model")  # fmt: skip


def check_artifact_path(run: Run, continuing: bool) -> None:
    """Raises ConfigError before the training, not after it, if the artifact may not or cannot be written."""
    path = run.artifact_path
    if path.is_dir():
        raise ConfigError(f"ARTIFACT={path}: expected a file, and this is a folder")
    if path.exists() and not (run.cfg.force or continuing):
        raise ConfigError(f"{path} exists: choose another RUN_ID or ARTIFACT, or FORCE=1 to overwrite it")
    if not run.lock(path):
        raise ConfigError(f"ARTIFACT={path}: a process that still runs will write it; choose another ARTIFACT")
    probe = path.with_name(f".{path.name}.probe")
    atomic_write(probe, b"")
    probe.unlink()


def run_train(loaded: LoadedConfig) -> int:
    """MODE=train: train -> quantize -> pack -> reload from the file -> score."""
    opened = open_run(loaded)
    cfg, run = opened.cfg, opened.run
    shards = load_split(opened.paths.folder, "train")
    stream = TokenStream(shards, cfg.vocab_size, opened.tokenizer.sha256)
    check_batch(cfg, run.world)
    if cfg.calibrates and stream.total < cfg.train_seq_len:
        raise ConfigError(f"calibration needs {cfg.train_seq_len} training tokens, DATA_PATH={opened.paths.folder} holds {stream.total}: "
                          "GPTQ_ENABLED=0, TARGET_BYTES=0 or more data")  # fmt: skip
    choose_attention(cfg, run.device)
    with torch.device("meta"):
        Policy.of(cfg, GPT(cfg))  # a mistake in it is found now, not after the training
    checkpoints = Checkpoints(cfg, run, stream.identity)
    resumed = checkpoints.load()
    run.on_first(lambda: check_artifact_path(run, continuing=cfg.resume == "auto" and resumed is not None))
    run.on_first(lambda: run.open_logs(append=cfg.resume != ""))
    opened = log_start(opened, stream.total, len(shards))
    check_target(cfg, run, opened.code_bytes)
    model = build_model(cfg, run)
    rehearse(cfg, run, model, opened.text)

    unlimited = dataclasses.replace(cfg, eval_wallclock_seconds=0.0)  # which is the limit of the evaluation afterwards

    def validate(model: GPT) -> tuple[float, float]:
        (result,) = evaluate(Evaluation(unlimited, run, model, opened.text), ("roundtrip",))
        return result.val_loss, result.val_bpb

    result = train(cfg, run, model, stream, checkpoints, resumed, validate)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise BrokenRun("the last update left NaN or Inf in the weights; lower the learning rates")
    with checkpoints.keep_weights(model, stream, result):
        blob, calibration_s = make_artifact(opened, model, stream, result)
    try:
        if run.rank == 0:
            seed, length = derive_seed(cfg.seed, "sample"), min(48, cfg.train_seq_len)
            written = sample_text(model.eval(), length, seed)
            run.log(f"sample: {opened.tokenizer.decode(written[0, 1:].cpu().numpy())[0]!r}")
        return score_artifact(opened, blob, result.seconds + calibration_s)
    except Exception:
        run.notice(f"the artifact is whole: MODE=eval ARTIFACT={run.artifact_path} scores it")
        raise


def check_tokenizer(tokenizer: Tokenizer, header: dict[str, Any], cfg: Config) -> None:
    """Raises ConfigError unless tokenizer and transform of the text are those that the artifact names."""
    if header["tokenizer_sha256"] != tokenizer.sha256:
        raise ConfigError(f"TOKENIZER_PATH={tokenizer.path}: not the tokenizer of {cfg.artifact}; name that one")
    if header.get("transform", "") != tokenizer.transform:
        raise ConfigError(f"ARTIFACT={cfg.artifact}: made for text that went through {header.get('transform') or 'nothing'}, these data went "
                          f"through {tokenizer.transform or 'nothing'}; name the data it was trained for in DATA_PATH")  # fmt: skip


def run_audit(opened: OpenRun, blob: bytes) -> int:
    """MODE=audit: are the scores of every stage that is switched on, with NGRAM_SCORE=claimed also the claim's, a code length? Logs each
    check; exit status 1 if one failed."""
    cfg, run, text = opened.cfg, opened.run, opened.text
    model, tables = load_model(cfg, run, blob).eval(), load_tables(cfg, blob)
    exact = text.bytes_from == "tokenizer" or opened.paths.transform is not None
    evaluation = Evaluation(cfg, run, model, text, tables)
    named = [("text", bytes_check(text, opened.tokenizer, exact))]
    named += [("counts", replay_check(evaluation.text, evaluation.counted[0]))]
    if cfg.ngram_score != "claimed" and "claimed" in cfg.ngram_scores:
        run.notice(f"the claim {cfg.ngram_claim} is no stage and not audited here: NGRAM_SCORE=claimed audits it")
    for stage in (*cfg.stages, *(["claimed"] if cfg.ngram_score == "claimed" else [])):
        named += [(stage, check) for check in Audit(cfg, run, model, text, stage, tables).checks()]
    for part, check in named:
        run.log(f"audit {part}: {check.name}: {'passed' if check.passed else 'FAILED'} ({check.detail})")
    passed = all(check.passed for _, check in named)
    rows = [{"name": f"{part}: {c.name}", "passed": c.passed, "detail": c.detail} for part, c in named]
    run.event("audit", passed=passed, artifact_sha256=hashlib.sha256(blob).hexdigest(), checks=rows)
    return 0 if passed else 1


def run_scoring(loaded: LoadedConfig, blob: bytes, header: dict[str, Any]) -> int:
    """MODE=eval: score an existing artifact with no training state and no training data; MODE=audit."""
    opened = open_run(loaded, header["tokenizer_sha256"])
    check_tokenizer(opened.tokenizer, header, loaded.cfg)
    choose_attention(loaded.cfg, opened.run.device)
    opened.run.on_first(lambda: opened.run.open_logs(append=False))
    return (run_audit if loaded.cfg.mode == "audit" else score_artifact)(log_start(opened, 0, 0), blob)


def read_named(name: str, path: str, purpose: str) -> bytes:
    """The bytes of the file that a knob names; ConfigError if it cannot be read."""
    try:
        if not path:
            raise ConfigError(f"{name} is not set; {purpose}")
        return Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"{name}={path!r}: {(e.strerror or str(e)).lower()}; {purpose}") from None


def open_artifact(named: str, path: str) -> tuple[bytes, dict[str, Any]]:
    """(bytes, header) of the file that the knob or argument `named` names; ConfigError if it is missing or no artifact."""
    path = expand_home(named, path)
    blob = read_named(named, path, "it takes the artifact of a finished run")
    try:
        header = read_header(blob)[0]
    except ArtifactError as e:
        raise ConfigError(f"{named}={path}: {e}") from None
    if not isinstance(header.get("config"), dict) or not isinstance(header.get("tokenizer_sha256"), str):
        raise ConfigError(f"{named}={path}: its header names no configuration and tokenizer")
    check_transform(header.get("transform", ""), f"{named}={path}")
    return blob, header


def dispatch(env: Mapping[str, str]) -> int:
    """Run what MODE names; returns the exit status."""
    mode = translate(env, env.get("RECIPE", ""), [], []).get("MODE")  # EVAL_ONLY=1 means MODE=eval
    scoring = mode in ("eval", "audit")
    blob, header = open_artifact("ARTIFACT", env.get("ARTIFACT", "")) if scoring else (b"", {})
    loaded = load_config(env, header.get("config"))
    if read_ranks(env).rank == 0:
        start_packing(loaded.cfg)
    return run_scoring(loaded, blob, header) if scoring else run_train(loaded)


def show_toc() -> str:
    """The file's sections with their line numbers, the text of --toc."""
    lines = enumerate(source_text().splitlines(), 1)
    return "\n".join(f"{i:5d}  {line[7:].rstrip(' =')}" for i, line in lines if line.startswith("# ==== "))


def finish(outcome: str, message: str, reported: bool) -> None:
    """Print the error, on one of the ranks and unless a traceback has `reported` it, then close the run."""
    run = Run.current
    if Run.packing is not None:
        Run.packing.kill()
    if run is not None:
        run.graceful = True  # a signal that arrives now must not cut this short
    if message and not reported and (Run.first_on_node if run is None else run.is_first("said")):
        say("\n".join(f"error: {line}" for line in message.splitlines()), to_stderr=True)
    if run is not None:
        for text in filter(None, (message, *run.lost.values())):
            run.event("error", message=text)
        run.close(outcome)
        for text in run.lost.values():
            say(f"error: {text}", to_stderr=True)


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Exit status: 0 all that was asked for was done and every limit held; 2 a user's mistake; 1 a failure."""
    views = {"--help": describe_knobs, "-h": describe_knobs, "--toc": show_toc,
             "--dump-config": lambda: dump_config(load_config(env), with_notices=True)}  # fmt: skip
    status, outcome, message, reported = 1, "failed", "", False
    Run.current, Run.first_on_node = None, True
    try:
        if argv and argv[0] not in views:
            raise ConfigError(f"unknown argument {argv[0]!r}; knobs are environment variables; try {', '.join(views)}")
        if argv:
            error = say(views[argv[0]]())
            return 0 if error is None else 1
        script_bytes()
        Run.first_on_node = read_ranks(env).local_rank == 0
        status = dispatch(env)
        outcome = "ok" if status == 0 else "limit broken"
        # Ranks that end differently keep torchrun waiting, and only the first has logs to lose.
        if Run.current is not None and Run.current.broadcast(bool(Run.current.lost)) and status == 0:
            status, outcome = 1, "incomplete"
    except (ConfigError, ArtifactError, ImportError, PermissionError, IsADirectoryError, NotADirectoryError) as e:
        begun = Run.current is not None and Run.current.training_began  # then the script should have found it before
        status, outcome, message = 1 if begun else 2, "failed" if begun else "mistake", str(e)
        if isinstance(e, OSError):
            message = f"cannot read {e.filename}: {e.strerror}; check what it is and its permissions"
        if isinstance(e, ImportError):
            message = f"{e}; pip install -r requirements.txt"
    except (Interrupted, BrokenRun, KeyboardInterrupt) as e:
        status, outcome, message = 1, "stopped", str(e) or "stopped by SIGINT"
    except Exception as e:
        # What torch's allocator says on a CPU.
        if not isinstance(e, MemoryError) and "can't allocate memory" not in str(e):
            message, reported = f"{type(e).__name__}: {e}", True
            if Run.current is None or Run.current.is_first("said"):
                raise  # with a traceback; on other ranks it is what comes of the failure that was told
            return 1
        message = f"out of memory ({str(e)[-160:] or 'MemoryError'}); raise the limit (ulimit -v), or take a smaller model or TRAIN_BATCH_TOKENS"
    finally:
        finish(outcome, message, reported)
    return status or int(Run.current is not None and bool(Run.current.lost))


def end(status: int) -> None:
    """End the process with its exit status. After a failure without the interpreter's farewell, which would wait for threads of
    libraries that the failure has left waiting."""
    if status:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    try:
        exit_status = main(sys.argv[1:], os.environ)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_status = 1
    end(exit_status)
