"""The codec's speed and size: cache against recomputing, tokens a second by lanes, files against general compressors.

    python benchmarks/codec.py                              speed, with random weights of the cpu recipe
    python benchmarks/codec.py logs/run.pgz FILE ...        size: each file by that artifact, xz -9e, zstd -22, PPMd (pip install pyppmd)

Prints wall seconds and seconds of processor time: on a busy machine only the second, and ratios, mean anything.
"""

from __future__ import annotations

import argparse
import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg
from tools.artifact import Lanes, Predictor, TextTokens, open_predictor, read_artifact
from tools.codec import Codec, SymbolEncoder


def random_predictor(threads: int) -> Predictor:
    """The cpu recipe with random weights."""
    cfg = tg.load_config({"RECIPE": "cpu", "DEVICE": "cpu"}).cfg
    run = tg.Run(cfg, 0, 0, 1, 1)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = tg.GPT(cfg).place(run.device, tg.choose_attention(cfg, run.device)[1]).eval()
    return Predictor(
        cfg, run, model, TextTokens(tg.Tokenizer(tg.SAMPLE_DIR / "tokenizer_1024.model", cfg.vocab_size).sp)
    )


def time_steps(lanes: Lanes, text: np.ndarray, steps: int) -> tuple[float, float]:
    """Code `steps` tokens of each lane as the decoder does; (wall seconds, processor seconds)."""
    coder, wall, processor = SymbolEncoder(), time.perf_counter(), time.process_time()
    for t in range(steps):
        p = lanes.dist().numpy()
        for lane in range(len(p)):
            coder.code(p[lane], int(text[lane, t]))
        lanes.take(text[:, t])
    return time.perf_counter() - wall, time.process_time() - processor


@torch.no_grad()
def time_recompute(cfg: tg.Config, model: tg.GPT, text: np.ndarray, steps: int) -> tuple[float, float]:
    """The same distributions without a cache: a whole window for every token."""
    window = torch.from_numpy(text[:, : cfg.eval_len])
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        model.logits(model.features(window)[:, -1]).double().softmax(-1)
    return time.perf_counter() - wall, time.process_time() - processor


def speed(threads: int) -> None:
    """Tokens a second by lanes, network alone and mixed, and what the cache saves."""
    val = np.asarray(tg.load_split(tg.SAMPLE_DIR, "val")[0][:200_000]).astype(np.int64)
    predictor = random_predictor(threads)
    print("lanes mixture  tokens/s  per processor second")
    for count in (1, 8, 16, 32, 64):
        for ngram in (False, True):
            steps = 640  # the first window of 512 and a prefill: what a long text averages to, and a little more
            lanes = predictor.lanes(count, steps, "ngram" if ngram else "sliding")
            text = val[: count * steps].reshape(count, steps)
            wall, processor = time_steps(lanes, text, steps)
            print(
                f"{count:5d} {'ngram' if ngram else 'none':7} {count * steps / wall:9.0f} {count * steps / processor:9.0f}"
            )
            if count == 16 and not ngram:
                other_wall, other = time_recompute(predictor.cfg, predictor.model, text, 4)
                print(f"      cache against recompute: {other / 4 / (processor / steps):.1f}x in processor time, "
                      f"{other_wall / 4 / (wall / steps):.1f}x in wall time")  # fmt: skip


def ppmd(data: bytes) -> bytes:
    """7-zip's text compressor, PPMd of variant H, without its container."""
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(32, 256 << 20)
    return encoder.encode(data) + encoder.flush()


OTHERS: dict[str, Callable[[bytes], bytes]] = {
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd -22": lambda data: zstandard.ZstdCompressor(level=22).compress(data),
    "PPMd": ppmd,
}


def sizes(artifact: Path, files: list[Path], threads: int) -> None:
    """A Markdown table of sizes; every file is decompressed again and compared."""
    predictor = open_predictor(*read_artifact(str(artifact)))
    codec = Codec(predictor)
    torch.set_num_threads(threads)
    print(f"artifact {predictor.size:,} bytes; sizes in bytes; restoration is part of ours\n")
    print(f"| file | bytes | ours | ours, bpb | loss | restoration | tokens/s back | {' | '.join(OTHERS)} |")
    print("|---" * (7 + len(OTHERS)) + "|")
    for path in files:
        data = path.read_bytes()
        packed = codec.compress(data)
        started = time.perf_counter()
        assert codec.decompress(packed.blob) == data, f"{path} did not come back"
        rate = packed.header.tokens / (time.perf_counter() - started)
        loss = packed.token_bits / packed.ideal - 1 if packed.ideal else 0.0
        cells = [path.name, f"{len(data):,}", f"{len(packed.blob):,}", f"{8 * len(packed.blob) / len(data):.3f}", f"{loss:.3%}",
                 f"{packed.restoration_bits // 8:,}", f"{rate:.0f}", *(f"{len(other(data)):,}" for other in OTHERS.values())]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.artifact is None:
        speed(args.threads)
    else:
        sizes(args.artifact, args.files, args.threads)


if __name__ == "__main__":
    main()
