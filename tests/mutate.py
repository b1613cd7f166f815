"""Small plausible bugs, one at a time in a copy of the repository: does a test notice? `python tests/mutate.py --help`; not in CI.

    python tests/mutate.py                       all of them, a process a core
    python tests/mutate.py --only techniques E5  an area, a name, or the beginning of one
    python tests/mutate.py --list

A mutant is (what, tests, edits ..., file): each edit (text, text in its place) stands once in the file, train_gpt.py where none is named. What survives is a
missing test. A text that is gone or repeats is told as such: its mutant needs a new place, or its code was removed. Exit status
1 unless all are killed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 400  # a mutant whose tests take longer hangs them, and so is noticed
LEFT_OUT = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "logs", "track_*")

# fmt: off
MUTANTS = {
    "bytes": [
        ("B1: space dropped only after BOS, not after other boundary pieces", "data.py -k boundary", ("(self.spaced[target] & ~self.boundary[prev])", "(self.spaced[target] & (prev != BOS))")),
        ("B2: shards in the order that the folder lists them", "data.py -k digits", ("return sorted(found, key=lambda path: (shard_number(path), path.name))", "return list(found)")),
        ("B3: sidecar tolerance is one-sided (too few bytes pass)", "bytes.py -k sums", ("if abs(theirs.sum() - ours.sum()) > SIDECAR_TOLERANCE * ours.sum():", "if theirs.sum() - ours.sum() > SIDECAR_TOLERANCE * ours.sum():")),
        ("B4: escaped escape escapes the next operator too", "bytes.py -k 'fused or case'", ("escaped[i + 1] = not escaped[i] and self.operators[tokens[i + 1]]", "escaped[i + 1] = self.operators[tokens[i + 1]] > 0")),
        ("B5: audit's bytes check one-sided: more bytes counted than in the text passes", "bytes.py -k sums", ("return AuditCheck(name, abs(total - counted) <= SIDECAR_TOLERANCE * total, detail)", "return AuditCheck(name, total - counted <= SIDECAR_TOLERANCE * total, detail)")),
        ("bytes-escaped", "bytes.py -k fused", ("return counts + OPERATOR_BYTES * self.escaped(tokens)[1:]", "return counts + OPERATOR_BYTES * self.escaped(tokens)[:-1]")),
        ("bytes-first", "bytes.py -k sums", ("    sidecar[0] = 0  # no target\n", "")),
        ("bytes-tail", "data.py -k tail", ("n = (n - 1) // cfg.eval_len * cfg.eval_len + 1", "n = n // cfg.eval_len * cfg.eval_len")),
        ("bytes-complete", "data.py -k prefix", ("complete = not cfg.val_tokens or cfg.val_tokens >= len(tokens)", "complete = not cfg.val_tokens or cfg.val_tokens >= len(tokens) - 1")),
        ("bytes-meter", "evaluator.py -k meter", ("self.bytes += int(byte_counts.sum())", "self.bytes += int(byte_counts.clamp_min(1).sum())")),
        ("data-share", "data.py -k partition", ("tokens = self.stream.read(rows.start * seq_len, len(rows) * seq_len + 1)", "tokens = self.stream.read(self.run.rank * len(rows) * seq_len, len(rows) * seq_len + 1)")),
        ("data-wrap", "data.py -k 'partition or reads'", ("at = (at + len(part)) % self.total", "at = (at + len(part)) % (self.total + 1)")),
        ("bytes-sidecar-length", "bytes.py -k other_shards", ("if (n := len(parts[-1])) != (tokens := len(load_shard(path))):", "if (n := len(parts[-1])) < (tokens := len(load_shard(path))):")),
        ("bytes-unused", "data.py -k boundary", ("boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])", "boundary = np.array([sp.is_control(i) or sp.is_unknown(i) for i in ids])")),
    ],
    "causality": [
        ("E1: window start moves with the end of the text", "evaluator.py -k context_promised", ("return Window(max(0, full - 1 - seq_len), lo, min(full, end))", "return Window(max(0, min(full, end) - 1 - seq_len), lo, min(full, end))")),
        ("E2: hints of the first n targets instead of the last n", "evaluation_oracles.py", ("return score_logits(z, ids[:, -n:], hints[:, -n:])", "return score_logits(z, ids[:, -n:], hints[:, :n])")),
        ("E3: LearnedWeights: step taken before its squares are added", "evaluation_oracles.py", ("            square += torch.zeros_like(square).index_add_(1, bucket, squared)\n            step = torch.zeros_like(table).index_add_(1, bucket, gradient) / (square + self.CAUTION)", "            step = torch.zeros_like(table).index_add_(1, bucket, gradient) / (square + self.CAUTION)\n            square += torch.zeros_like(square).index_add_(1, bucket, squared)")),
        ("E4: tilt fires for unseen contexts (hint = last token of the stream)", "evaluation_oracles.py", ("fires = (total > 0) & (seen >= self.threshold * total)", "fires = seen >= self.threshold * total")),
        ("E5: TTT KV cache keeps window + chunk positions", "block_ttt.py -k definition", ("skip = max(0, self.slots[slot][0].shape[1] + k_RTGK.shape[1] - self.window)", "skip = max(0, self.slots[slot][0].shape[1] - self.window)")),
        ("E6: global TTT phase trains past the scored text", "causality.py -k phase", ("            hi = min(lo + cfg.global_ttt_chunk_tokens, end)\n", "            hi = min(lo + cfg.global_ttt_chunk_tokens, len(tokens))\n")),
        ("E7: padded targets of short TTT sequences keep their weight", "ttt.py block_ttt.py -k 'definition or fit or any_order'", ("weights = torch.where(inside, self.weights[at], 0.0)[:, 1:].to(self.run.device)", "weights = self.weights[at][:, 1:].to(self.run.device)")),
        ("E8: packed table: longest context cut at the start of each span", "evaluation_oracles.py", ("inside = tokens[max(0, lo - self.order) : hi]", "inside = tokens[max(0, lo - self.order + 2) : hi]")),
        ("E9: table counted on text after the position, not on the start", "evaluation_oracles.py -k start_of_the_training", ("tokens = stream.read(-stream.position, n)", "tokens = stream.read(0, n)")),
        ("eval-driver", "evaluator.py -k driver", ("        yield lo, hi, chain[-1].score(tokens, lo, hi)\n        for expert in chain:\n            expert.update(tokens, lo, hi)\n", "        for expert in chain:\n            expert.update(tokens, lo, hi)\n        yield lo, hi, chain[-1].score(tokens, lo, hi)\n")),
        ("eval-chain", "evaluation_oracles.py -k corrects", ("chain.append(PackedCascade(packed, chain[-1], cfg.ngram_rate))", "chain.append(PackedCascade(packed, chain[0], cfg.ngram_rate))")),
        ("eval-bucket", "evaluation_oracles.py -k kept_apart", ("log2_floor(total).clamp_max(15) * 8", "log2_floor(total).clamp_max(14) * 8")),
        ("eval-own-copy", "block_ttt.py -k trace", ("super().__init__(cfg, run, copy.deepcopy(model).requires_grad_(False), text, stride)", "super().__init__(cfg, run, model.requires_grad_(False), text, stride)")),
        ("eval-document-weights", "block_ttt.py -k definition", ("self.loss = (nll * weights).sum(1).div(weights.sum(1)).sum()", "self.loss = nll.mean(1).sum()")),
        ("eval-phase-edge", "block_ttt.py -k phases_come", ("due = (bisect_left(edges, 1 + prefix * total * i / phases)", "due = (bisect_left(edges, prefix * total * i / phases)")),
        ("eval-block-edge", "block_ttt.py -k 'documents_have or where_a_block'", ("        if end - begin >= size:", "        if end - begin > size:")),
        ("eval-table-order", "table.py -k statistics_are", ("np.full(max(0, self.order - lo), self.NO_TOKEN)", "np.full(max(0, self.order - lo), 2)")),
        ("eval-audit-cuts", "causality.py -k more", ("n // 4, n // 2, 3 * n // 4, n - 1, *self.edges()}", "n // 4, n // 2, 3 * n // 4, n - 1}")),
        ("eval-polyak", "ttt.py -k definition", ("self.mean.lerp_(self.params, 1 - self.cfg.ttt_polyak_decay)", "self.mean.lerp_(self.params, self.cfg.ttt_polyak_decay)")),
        ("eval-room", "evaluator.py -k room_for", ("begins = begun[ends] - begun[start + 1] + 1", "begins = begun[ends] - begun[start + 1]")),
        ("eval-room-chunks", "evaluator.py -k room_for", ("return math.gcd(self.stride, self.seq_len, self.cfg.ttt_chunk_tokens)", "return self.stride")),
    ],
    "techniques": [
        ("T1: Smear: BOS zeroes the neighbour, not the share", "formulas.py", ("        if self.scale is None:\n", "        shifted = shifted * (ids_BT != BOS)[..., None]\n        if self.scale is None:\n"), ("            s = s * (ids_BT != BOS)[..., None]\n", "            pass\n")),
        ("T2: XSA: values of the groups in the wrong order (the gated form is gone)", "formulas.py", ("along = (y * unit).sum(-1, keepdim=True)", "along = (y * unit.flip(2)).sum(-1, keepdim=True)")),
        ("T3: skips are merged in the order they were saved (the carry is gone)", "formulas.py", ("* saved.pop()\n", "* saved.pop(0)\n")),
        ("T4: partial RoPE: frequencies divided by head_dim", "formulas.py", ("freqs = rope_base(cfg) ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)", "freqs = rope_base(cfg) ** (-torch.arange(0, dims, 2, dtype=torch.float32) / cfg.head_dim)")),
        ("T5: softcap in the compute dtype (bf16), cast to fp32 afterwards", "trainer_oracle.py -k logits", ("return self.softcap(z.to(torch.promote_types(z.dtype, torch.float32)))", "return self.softcap(z).to(torch.promote_types(z.dtype, torch.float32))")),
        ("T6: DOC_MASK: cuts at fixed positions, not since the segment's start", "docmask.py -k segments_begin", ("offset = (at_T - start) % longest", "offset = torch.minimum(at_T - start, at_T % longest)")),
        ("T7: looped plan: encoder half of the blocks, not of the passes", "formulas.py", ("half = len(order) - (cfg.num_layers - last) if cfg.encoder_recurrence else cfg.encoder_share(len(order))", "half = len(order) - (cfg.num_layers - last) if cfg.encoder_recurrence else cfg.encoder_share(cfg.num_layers) + (len(order) - cfg.num_layers) // 2")),
        ("model-ntk", "formulas.py", ("** (dims / (dims - 2))", "** ((dims - 2) / dims)")),
        ("model-gqa", "formulas.py", ("y = y_BTHK.view(b, t, g, h // g, k)", "y = y_BTHK.view(b, t, h // g, g, k).transpose(2, 3)")),
        ("model-mix", "formulas.py", ("return mix[0] * x + mix[1] * s.x0_BTD", "return mix[0] * x + mix[1] * x")),
        ("model-lanes", "formulas.py", ("r * lane + p * y + q * z for lane", "r * lane + q * y + p * z for lane")),
        ("model-first-values", "formulas.py", ("v0_BTGK = v if v0_BTGK is None else v0_BTGK", "v0_BTGK = v")),
        ("model-norm-dtype", "trainer_oracle.py -k rounded_once", ("widest = torch.promote_types(x.dtype, torch.float32)", "widest = x.dtype")),
        ("model-cache-last", "formulas.py -k prefix", ("ctx.cache.last_embedding = x_BTD[:, -1:]", "ctx.cache.last_embedding = x_BTD[:, :1]")),
    ],
    "optimizer": [
        ("O1: Muon decay forgets the learning-rate multiplier", "trainer_oracle.py -k ten_steps", ("keep = [1.0 - lr * mult * weight_decay for mult in self.lr_mults]", "keep = [1.0 - lr * weight_decay for _ in self.lr_mults]")),
        ("O2: head decays with the scalars' rate", "trainer_oracle.py -k ten_steps", ('decay = cfg.adam_wd if p.role == "scalar" else embed_wd', 'decay = embed_wd if p.role == "embed" else cfg.adam_wd')),
        ("O3: momentum warm-up one step ahead", "trainer_oracle.py -k ten_steps", ("frac = min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0", "frac = min((step + 1) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0")),
        ("O4: EMA takes the weights before the optimizer's step", "trainer_oracle.py -k ten_steps", ("        self.optimizers.step(self.step, scale * self.rewarm)\n        self.average.update(self.step, frac, scale)\n", "        self.average.update(self.step, frac, scale)\n        self.optimizers.step(self.step, scale * self.rewarm)\n")),
        ("optim-embed-decay", "trainer_oracle.py -k ten_steps", ('decay = cfg.adam_wd if p.role == "scalar" else embed_wd', "decay = cfg.adam_wd")),
        ("optim-nesterov", "trainer_oracle.py -k ten_steps", ("self.shard.add_(self.momentum, alpha=momentum)", "self.shard.copy_(self.momentum)")),
        ("optim-aspect", "trainer_oracle.py -k ten_steps", ("aspect = math.sqrt(max(1.0, rows / cols))", "aspect = math.sqrt(max(rows / cols, cols / rows))")),
        ("train-swa-step", "trainer_oracle.py -k ten_steps", ("(step + 1) % cfg.swa_every == 0", "step % cfg.swa_every == 0")),
        ("train-loop-edge", "trainer_oracle.py -k ten_steps", ("frac >= cfg.enable_looping_at}", "frac > cfg.enable_looping_at}")),
        ("train-rewarm", "trainer_oracle.py -k ten_steps", ("(self.step - self.changed_at + 1) / steps", "(self.step - self.changed_at) / steps")),
        ("train-reserve", "trainer_oracle.py -k reserve", ("return cfg.max_wallclock_seconds - cfg.reserved_seconds", "return cfg.max_wallclock_seconds")),
        ("optim-embed-decay", "trainer_oracle.py -k ten_steps", ("embed_wd = cfg.adam_wd if cfg.embed_wd < 0 else cfg.embed_wd", "embed_wd = cfg.adam_wd if cfg.embed_wd <= 0 else cfg.embed_wd")),
    ],
    "quantizer": [
        ("Q1: GPTQ codes gathered, not scattered, back into column order", "quantizer.py -k gptq", ("return torch.empty_like(codes_NRC).scatter_(2, as_rows, codes_NRC).to(torch.int8)", "return codes_NRC.gather(2, as_rows).to(torch.int8)")),
        ("Q2: trellis search: survivors of another past are not dropped", "trellis.py -k 'search or compensation'", ("        self.cost_NSR.masked_fill_((errors != decided).any(dim=0), self.DROPPED)\n", "")),
        ("Q3: the upper bits of a large count are lost (the study's path reader is gone)", "table.py -k numbers", ("(2 + (symbol & 1)) << width), width", "(2 + (symbol & 1)) << np.minimum(width, 13)), width")),
        ("Q4: byte budget: the code is forgotten in the final fill", "trellis.py -k last_bytes", ("if best.spent < found.spent <= self.cfg.target_bytes:", "if best.spent < found.spent and len(found.blob) <= self.cfg.target_bytes:")),
        ("Q5: pack reuses a coded stream if the number of arrays is the same", "artifact.py trellis.py -k 'budget or last_bytes'", ("if len(before) != len(arrays) or any(a is not b for a, b in zip(before, arrays, strict=True)):", "if len(before) != len(arrays):")),
        ("Q6: calibration: gradients of batches add up", "quantizer.py -k fisher", ("                        p.grad = None\n        tokens += inputs.numel()", "        tokens += inputs.numel()")),
        ("quant-damp", "quantizer.py -k gptq", ("(damp * diagonal_C.mean()).clamp_min", "(damp * diagonal_C.amax()).clamp_min")),
        ("quant-quantile", "quantizer.py", ("at_Q = torch.tensor(quantiles, dtype=torch.float64) * (w_RC.shape[1] - 1)", "at_Q = torch.tensor(quantiles, dtype=torch.float64) * max(w_RC.shape[1] - 2, 0)")),
        ("quant-step-fp16", "quantizer.py", ("return (clip_R / top).clamp(SCALE_EPS, 65504.0).half()", "return (clip_R / top).clamp(SCALE_EPS, 65504.0)")),
        ("quant-columns", "trellis.py -k columns", ("octaves_C = -0.5 * weight_C.double().log2()", "octaves_C = -0.25 * weight_C.double().log2()")),
        ("quant-fisher", "quantizer.py -k fisher", ("{n: (total + total.sum() / tokens) / tokens for n, total in fisher.items()}", "dict(fisher.items())")),
        ("quant-prune-alone", "trellis.py -k pruned_together", ("return self.spend_rest(best) if alone else best", "return self.spend_rest(best)")),
        ("quant-fisher-unmet", "quantizer.py -k fisher", ("(total + total.sum() / tokens) / tokens", "total / tokens")),
        ("quant-small", "quantizer.py -k policy", ("return max(bits, 16) if self.named[name].numel() <= self.cfg.quant_min_numel else bits", "return max(bits, 16) if self.named[name].numel() < self.cfg.quant_min_numel else bits")),
        ("quant-spread", "trellis.py -k 'compensation or columns or gain'", ("weight_C = self.weight_C * step_C.square()", "weight_C = self.weight_C * step_C")),
        ("coder-floor", "trellis.py -k whatever", ("top = max(folded.nonzero()[0].max(initial=0), 1)", "top = folded.nonzero()[0].max(initial=0)")),
        ("quant-dead", "quantizer.py -k dead_inputs", ("weight_C = torch.where(dead_C, 1e-3 * weight_C[~dead_C].mean().nan_to_num(1.0), weight_C)", "weight_C = weight_C")),
        ("quant-prune", "quantizer.py -k pruning", ("w_RC.abs() <= w_RC.abs().flatten().kthvalue(count).values", "w_RC.abs() < w_RC.abs().flatten().kthvalue(count).values")),
        ("quant-low-rank", "quantizer.py -k low_rank", ("right_scale = row_scale(padded.abs().amax(dim=2), half - 0.5)", "right_scale = row_scale(padded.abs().amax(dim=2).amax(dim=1, keepdim=True).expand(-1, padded.shape[1]), half - 0.5)")),
        ("coder-flat-levels", "artifact.py -k sparse_codes", ("    return [(rows_GR[0], columns_GC[0]), (rows_GR[i], columns_GC[j])][: 1 if i == j == 0 else 2]", "    return [(rows_GR[i], columns_GC[j])]")),
        ("coder-layout", "artifact.py -k another_model", ("json.dumps([[n, *layout[n]] for n in layout])", "json.dumps([[n, layout[n][0]] for n in layout])")),
        ("quant-prune", "quantizer.py -k pruning", ("    sizes = [matrix_of(dequantize(item)).abs() for item in coded]", "    sizes = [item.codes.abs().float() for item in coded]")),
        ("quant-sdclip", "quantizer.py -k sdclip", ("    deviation_R = w_RC.std(dim=1) if", "    deviation_R = w_RC.square().mean(dim=1).sqrt() if")),
        ("quant-ranks", "trellis.py -k together", ("    results = [iter(found) for found, _ in parts]", "    results = [iter(found) for found, _ in reversed(parts)]")),
        ("coder-checksum", "artifact.py -k 'bad_file or mutated'", ("if hashlib.sha256(memoryview(blob)[:-CHECKSUM_BYTES]).digest() != blob[-CHECKSUM_BYTES:]:", "if False:")),
        ("coder-fields", "table.py -k numbers", ("if len(part) != count or (count and not low <= part.min() <= part.max() <= high):", "if len(part) != count or (count and not low <= part.min()):")),
    ],
    "checkpoints": [
        ("K1: the curriculum's position is not restored", "trainer_oracle.py -k ranks", ('        self.seq_len, self.changed_at = state["curriculum"]\n', "")),
        ("K2: keeps the newest by step, also those of a run taken back", "training.py -k checkpoint", ("{*saved[: saved.index(path) + 1][-self.cfg.checkpoint_keep :]}", "{*saved[-self.cfg.checkpoint_keep :]}")),
        ("K3: a signal between the last look and the end of the loop is lost", "runtime.py training.py lost_runs.py -k 'signal or sigterm or hangup or stop'", ('        self.graceful = False\n        if self.signal is not None:\n            raise Interrupted(f"stopped by {signal.Signals(self.signal).name}")\n', "        self.graceful = False\n")),
        ("K4: lock file that its owner removed meanwhile is taken for a lock", "lost_runs.py -k 'owner_removes or twins or under_one_name or one_artifact or names_of_their_own'", ("                if os.path.samestat(os.fstat(file.fileno()), os.stat(aside)):\n                    return file\n", "                return file\n")),
        ("K5: the clock starts at 0 after a resume", "training.py lost_runs.py runtime.py -k 'resumed or sigterm or limit or last_steps or clock'", ("self.clock, self.stop = Clock(run, elapsed), StopConsensus(run, elapsed)", "self.clock, self.stop = Clock(run), StopConsensus(run, elapsed)")),
        ("ckpt-zip", "lost_runs.py -k damaged", ("if broken := archive.testzip():", "if broken := None:")),
        ("ckpt-raised", "lost_runs.py -k 'limits or longer'", ('return name in RAISED_ON_RESUME and now > was and "finished" not in state', 'return name in RAISED_ON_RESUME and "finished" not in state')),
        ("ckpt-looped", "trainer_oracle.py -k kept", ('"elapsed": result.seconds, "looped": model.looped,', '"elapsed": result.seconds, "looped": True,')),
        ("ckpt-swa", "trainer_oracle.py -k ranks", ('move(state["swa"]), state["swa_n"]', 'move(state["swa"]), 0')),
        ("ckpt-aside", "runtime.py -k whole", ("        os.replace(aside, path)\n", "        path.write_bytes(blob)\n")),
    ],
    "ranks": [
        ("D1: pairs of this rank alone are counted (the normalised weights are gone)", "trainer_oracle.py -k ranks", ("self.pairs += self.run.all_reduce(torch.zeros_like(self.pairs).index_add_(0, keys, torch.ones_like(keys)))", "self.pairs.index_add_(0, keys, torch.ones_like(keys))")),
        ("D2: clip by each rank's own matrices", "trainer_oracle.py -k ranks", ("        if self.run.world > 1:\n            dist.all_reduce(squares)\n", "")),
        ("D3: after a resume every rank begins with all hashed counts", "trainer_oracle.py -k ranks", ("cells.copy_(state[n] if self.run.rank == 0 else torch.zeros_like(cells))", "cells.copy_(state[n])")),
        ("D4: the shared clock is the sum over the ranks", "training.py -k 'rank_that_wants or late'", ("flags[0], flags[1], flags[2] = float(stop), loss, 0.0 if self.run.rank else seconds", "flags[0], flags[1], flags[2] = float(stop), loss, seconds")),
        ("ranks-descend", "block_ttt.py -k number_of_ranks", ("            p.grad = self.run.all_reduce(g)\n", "            p.grad = g\n")),
        ("ranks-momentum", "trainer_oracle.py -k ranks", ("mine = self.names[self.run.rank * self.owned : (self.run.rank + 1) * self.owned]", "mine = self.names[: self.owned]")),
        ("ranks-fresh", "block_ttt.py -k number_of_ranks", ("self.done = self.run.all_reduce(fresh), end", "self.done = fresh, end")),
        ("ranks-shared-mistake", "trainer_oracle.py -k mistake", ("raise (ConfigError if result else BrokenRun)(error)", "raise BrokenRun(error)")),
    ],
    "CUDA": [
        ("C1: clip asks the device whether the norm is above the limit", "fake_cuda.py -k 'neither_for_itself or exercise or baseline'", ("        scale = (limit / (norm + 1e-6)).clamp(max=1.0)\n        torch._foreach_mul_([self.small.flat, *(bank.shard for bank in self.banks)], scale)\n", "        if norm.item() > limit:\n            torch._foreach_mul_([self.small.flat, *(bank.shard for bank in self.banks)], limit / (norm + 1e-6))\n")),
        ("C2: RoPE table of the TTT cache stays on the host", "fake_cuda.py -k 'documents and rules'", ("self.model.rope = rope_table(cfg, self.chunks[-1]).to(self.model.rope)", "self.model.rope = rope_table(cfg, self.chunks[-1]).to(self.model.rope.dtype)")),
        ("C3: DOC_MASK: segments found on the device, where their room cannot grow", "fake_cuda.py -k more_documents", ('host = ids if ids.device.type == "cpu" else self.batcher.host[at]', "host = ids")),
        ("C4: Hessians summed in float64 on the device", "quantizer.py -k hessians", ("flat_NC = x.detach().reshape(-1, x.shape[-1]).float()", "flat_NC = x.detach().reshape(-1, x.shape[-1]).double()")),
        ("C5: QAT sharpness is a Python float: a new graph each step", "techniques.py -k 'rounding or quantisation or late or pr850'", ("self.fake_quant.sharpness.fill_(1.0 + 15.0 * ((frac - start) / max(1.0 - start, 1e-9)))", "self.fake_quant.sharpness = 1.0 + 15.0 * ((frac - start) / max(1.0 - start, 1e-9))"), ('        self.register_buffer("sharpness", torch.ones(()), persistent=False)  # a tensor: changing it recompiles nothing\n', "        self.sharpness = 1.0\n"), ("            r = u.floor() + 0.5 + torch.tanh(a * (u - u.floor() - 0.5)) / (2 * torch.tanh(a / 2))", "            r = u.floor() + 0.5 + torch.tanh(a * (u - u.floor() - 0.5)) / (2 * math.tanh(a / 2))")),
        ("X1: hashed counts read without waiting for their stream", "fake_cuda.py -k exercise", ("        self.run.sync()\n        return {n: self.run.all_reduce(cells.long())", "        return {n: self.run.all_reduce(cells.long())")),
        ("cuda-flags", "fake_cuda.py -k neither_for_itself", ('host = self.run.all_reduce(flags).to("cpu", non_blocking=True)', "host = self.run.all_reduce(flags).cpu()")),
        ("cuda-bincount", "evaluation_oracles.py fake_cuda.py -k 'waits or rules'", ("square += torch.zeros_like(square).index_add_(1, bucket, squared)", "square += torch.stack([torch.bincount(bucket, row, square.shape[1]) for row in squared])")),
        ("cuda-pin", "fake_cuda.py -k neither_for_itself", ("        t = t.pin_memory()\n", "        pass\n")),
    ],
    "tools": [
        ("codec-crc", "tools.py -k forged", ("if len(data) != header.size or zlib.crc32(data) != header.check:", "if len(data) != header.size:"), "tools/codec.py"),
        ("codec-lanes", "tools.py -k 'lanes_give or every_kind'", ("return n // lanes + (np.arange(lanes) < n % lanes)", "return n // lanes + (np.arange(lanes) <= n % lanes)"), "tools/codec.py"),
        ("codec-artifact", "tools.py -k damage", ("if header.artifact != self.predictor.name:", "if False:"), "tools/codec.py"),
        ("codec-end", "tools.py -k every_kind", ('return text[len(START) : -1].encode("utf-8", "surrogateescape")', 'return text[len(START) : -1].encode("utf-8", "replace")'), "tools/codec.py"),
        ("shards-tokenizer", "data_tools.py -k never_sees", ("        if count <= args.val_docs:\n            continue", "        if count < args.val_docs:\n            continue"), "data/make_shards.py"),
        ("shards-length", "data_tools.py -k exact_size", ("room = self.shard_tokens - self.held", "room = self.shard_tokens - self.held - 1"), "data/make_shards.py"),
        ("shards-copies", "data_tools.py -k copies", ("self.digests.add(item.digest.hex())", "self.digests = {item.digest.hex()}"), "data/make_shards.py"),
        ("shards-resume", "data_tools.py -k interrupted", ('self.read, self.copies, self.digests = state["read"], state["copies"], set(state["digests"])', 'self.read, self.copies = state["read"], state["copies"]'), "data/make_shards.py"),
        ("caseops-title", "caseops.py", ("if inside is None and run[1:].islower() | (len(run) == 1):", "if inside is None and run[1:].islower():"), "data/caseops.py"),
        ("shards-limit", "data_tools.py -k so_many", ("if self.val.documents == self.args.val_docs and tokens > limit:", "if self.val.documents == self.args.val_docs and tokens >= limit:"), "data/make_shards.py"),
        ("codec-varint", "tools.py -k any_width", ("while n > 127:", "while n > 128:"), "tools/codec.py"),
    ],
    "checker": [
        ("check-bytes", "records_check.py", ("    if worst <= LIMIT_BYTES:\n", "    if worst < LIMIT_BYTES + 1000:\n"), "records/check/rules.py"),
        ("check-helpers", "records_check.py -k 'helper or limit'", ("if total + extra > LIMIT_BYTES:", "if total > LIMIT_BYTES:"), "records/check/rules.py"),
        ("check-claims", "records_check.py records.py -k 'claim or figure'", ('        return FAIL, rule, f"{bpb:.5f} is a claimed figure (no code length); {scores}"', '        return WARN, rule, f"{bpb:.5f} is a claimed figure (no code length); {scores}"'), "records/check/rules.py"),
        ("check-hardware", "records_check.py -k hardware", ('good = all("H100" in (device or "H100") and ranks in (8, None)', 'good = any("H100" in (device or "H100") and ranks in (8, None)'), "records/check/rules.py"),
        ("check-layers", "records_check.py -k 'literal or layers or wherever or packed'", ("held = _programs(tree) if depth[text] < MAX_LAYERS else {}", "held = _programs(tree) if depth[text] < 1 else {}"), "records/check/source.py"),
        ("check-evaluation", "records_check.py -k verdicts", ('    if max(seconds) > LIMIT_SECONDS:\n        return _over(\n            entry, "evaluation time"', '    if max(seconds) > LIMIT_SECONDS + 1:\n        return _over(\n            entry, "evaluation time"'), "records/check/rules.py"),
    ],
}
# fmt: on


def tests_of(words: str) -> list[str]:
    """Arguments of pytest for 'model.py ttt.py -k words'."""
    return [f"tests/test_{word}" if word.endswith(".py") else word for word in shlex.split(words)]


def edited(root: Path, edits: list[tuple[str, str]], file: str) -> str:
    """The file with a mutant's edits; LookupError unless the text of each stands once."""
    source = (root / file).read_text(encoding="utf-8")
    for old, new in edits:
        if (n := source.count(old)) != 1:
            raise LookupError(f"{old.strip()[:60]!r} stands {n} times in {file}")
        source = source.replace(old, new)
    return source


def parts(mutant: tuple) -> tuple[str, str, list[tuple[str, str]], str]:
    """(what, tests, edits, file) of an entry of MUTANTS."""
    what, tests, *edits = mutant
    return what, tests, edits, edits.pop() if isinstance(edits[-1], str) else "train_gpt.py"


def verdict(root: Path, tests: str, edits: list[tuple[str, str]], file: str) -> str:
    """killed, SURVIVES, GONE or BROKEN (the tests cannot run), of one mutant in the copy `root`, which is left as it was."""
    path = root / file
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(edited(root, edits, file), encoding="utf-8")
    except LookupError as e:
        return f"GONE: {e}"
    command = [sys.executable, "-m", "pytest", "-n0", "-qx", "--tb=no", "-pno:cacheprovider", *tests_of(tests)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS, env=quiet)
    except subprocess.TimeoutExpired:
        return "killed (they hang)"
    finally:
        path.write_text(before, encoding="utf-8")
    first = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    outcome = {0: "SURVIVES", 1: "killed", 2: "killed"}.get(done.returncode, f"BROKEN: status {done.returncode}")
    return f"{outcome}{' by ' if first else ''}{first.partition(' ')[2].partition(' - ')[0]}"


def main() -> int:
    """Run them and print a table; exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="areas, names or beginnings of names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (a core each)")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    args = parser.parse_args()
    chosen = [(area, *mutant) for area, mutants in MUTANTS.items() for mutant in mutants
              if not args.only or any(area == word or mutant[0].startswith(word) for word in args.only)]  # fmt: skip
    if args.list:
        print("\n".join(f"{area:12}{what}" for area, what, *_ in chosen))
        return 0
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(args.jobs):
            copies.put(Path(shutil.copytree(ROOT, Path(folder, str(i)), ignore=LEFT_OUT)))

        def judge(mutant: tuple) -> None:
            area, (what, tests, edits, file) = mutant[0], parts(mutant[1:])
            root, started = copies.get(), time.perf_counter()
            found = verdict(root, tests, edits, file)
            copies.put(root)
            counts[area, found.split()[0].rstrip(":")] += 1
            print(f"{area:12}{what[:60]:62}{time.perf_counter() - started:4.0f}s  {found}", flush=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(judge, chosen))
    for area in dict.fromkeys(area for area, *_ in chosen):
        total = sum(n for (where, _), n in counts.items() if where == area)
        print(f"{area:12}{counts[area, 'killed']} of {total} killed")
    print(f"{'all':12}{sum(n for (_, found), n in counts.items() if found == 'killed')} of {len(chosen)} killed")
    return int(any(found != "killed" for _, found in counts))


if __name__ == "__main__":
    sys.exit(main())
