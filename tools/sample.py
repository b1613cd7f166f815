"""Let an artifact write: continue a prompt, on the terminal.

    python tools/sample.py --artifact logs/run.pgz --prompt "The river" --tokens 200 --temperature 0.8

SEED in the environment chooses another text. Exit status: 0 done, 2 a mistake (one message).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # before torch, since it sets how torch's threads wait

# isort: split
import torch
from torch import Tensor

from tools.artifact import (
    Predictor,
    add_artifact,
    number_in,
    open_predictor,
    read_artifact,
    run_tool,
    tool_parser,
    utf8,
)


def choose_token(p_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw from p^(1/temperature) (0: the likeliest) within the fewest tokens that hold `top_p` of it."""
    if temperature == 0:
        return int(p_V.argmax())
    p, order = (p_V.clamp_min(1e-300).log() / temperature).softmax(0).sort(descending=True, stable=True)
    kept = p * (p.cumsum(0) - p < top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def sample_text(
    predictor: Predictor, prompt: str, tokens: int, temperature: float, top_p: float, ngram: bool
) -> Iterator[str]:
    """Continue `prompt` by at most `tokens` tokens, in pieces of text as they are complete; ends early where a document does.

    With `ngram` the network is corrected as in stage ngram: by the n-grams of prompt and text so far, and the artifact's.
    """
    text, sp = predictor.text, predictor.text.sp
    ids = text.encode(prompt)
    lanes = predictor.lanes(1, len(ids) + tokens, "ngram" if ngram else "sliding")
    generator = torch.Generator().manual_seed(tg.derive_seed(predictor.cfg.seed, "sample"))
    for token in ids:
        lanes.dist()
        lanes.take(np.array([token]))
    shown, control = text.decode(ids), torch.tensor([sp.is_control(i) for i in range(predictor.cfg.vocab_size)])
    for _ in range(tokens):
        p_V = lanes.dist()[0]
        if not ids:  # an empty document says nothing
            p_V = p_V.masked_fill(control, 0.0)
        token = choose_token(p_V, temperature, top_p, generator)
        if sp.is_control(token):
            return
        lanes.take(np.array([token]))
        ids.append(token)
        written = text.decode(ids)
        if not written.endswith("\ufffd"):  # else bytes of a character are still missing
            yield written[len(shown) :]
            shown = written


def sample(args: argparse.Namespace) -> None:
    """Print the prompt and what follows it."""
    predictor = open_predictor(*read_artifact(args.artifact))
    print(args.prompt, end="", flush=True)
    for text in sample_text(predictor, args.prompt, args.tokens, args.temperature, args.top_p, args.ngram):
        print(text, end="", flush=True)
    print()


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    parser = tool_parser(__doc__)
    add_artifact(parser)
    parser.add_argument(
        "--prompt", type=utf8, metavar="TEXT", default="", help="what to continue; without it a new document"
    )
    parser.add_argument("--tokens", type=number_in(1, 10**6), default=256, help="most tokens to write (default 256)")
    parser.add_argument(
        "--temperature",
        type=number_in(0, 100, float),
        default=0.8,
        help="draw from p^(1/T); 0: always the likeliest token (default 0.8)",
    )
    parser.add_argument(
        "--top-p",
        type=number_in(0.01, 1, float),
        default=0.95,
        help="only the fewest tokens that hold this probability (default 0.95)",
    )
    parser.add_argument("--ngram", action="store_true", help="correct the network by n-grams, as the score does")
    return run_tool(sample, parser, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
