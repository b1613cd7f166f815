"""The codec: bytes come back exactly, and the size of the file is the score."""

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as tg

SMALL = {
    "NUM_LAYERS": 2, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 32, "EVAL_STRIDE": 8,
    "TRAIN_BATCH_TOKENS": 64, "DEVICE": "cpu",
}  # fmt: skip
HERE = Path(__file__).parent


def load(recipe: str = "cpu", **knobs) -> tg.Config:
    env = {"RECIPE": recipe, **SMALL, **knobs}
    return tg.load_config({k: str(v) for k, v in env.items()}).cfg


def tiny_model(cfg: tg.Config) -> tg.GPT:
    """A model with random weights, the ones that start at zero included."""
    torch.manual_seed(0)
    model = tg.GPT(cfg).place(torch.device("cpu"), tg.attend_sdpa).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products run best in one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_run(cfg: tg.Config) -> tg.Run:
    run = tg.Run(cfg, 0, 0, 1, 1)
    torch.set_num_threads(1)
    return run


@pytest.fixture(scope="module")
def tokenizer() -> tg.Tokenizer:
    return tg.Tokenizer(tg.SAMPLE_DIR / "tokenizer_1024.model", 1024)


@pytest.fixture(scope="module")
def codec(tokenizer) -> tg.Codec:
    cfg = load(CODEC_LANES=8)
    return tg.Codec(cfg, make_run(cfg), tiny_model(cfg), tokenizer.sp, "0123456789abcdef")


@pytest.fixture(scope="module")
def sample_text(tokenizer) -> str:
    """100 kB of the sample's validation text, which is normalised already."""
    tokens = np.array(tg.load_split(tg.SAMPLE_DIR, "val")[0][:60_000])
    return tokenizer.sp.decode(tokens[tokens != 1].tolist())[:100_000].rsplit(" ", 1)[0]


def texts(sample: str) -> dict[str, bytes]:
    rng = random.Random(0)
    return {
        "empty": b"",
        "one byte": b"a",
        "one newline": b"\n",
        "prose": sample[:3000].encode(),
        "code": (HERE / "test_codec.py").read_bytes()[:4000],
        "crlf and tabs": b"  one\r\n\ttwo \r\n\r\n three\t\t\n" * 9,
        "other scripts": "Привет, мир. 你好，世界。 ＡＢＣ ｶﾞ 한국어 مرحبا Ελληνικά ½ ﬁne… ´ ¨ e\u0301 \u3000\ufeff\u200b▁ <s>".encode(),
        "emoji": "👩\u200d👩\u200d👧 🙂🙃 ❤️ 🇫🇷 e".encode() * 3,
        "NULs": b"\0a\0\0 b\0\n\x01\x7f\x02\x03" * 5,
        "broken UTF-8": b"Hello \xff\xfe world \xc3 and \xe2\x82 more \xed\xa0\x80.\n" * 4,
        "latin-1": "Il était déjà trop tard".encode("latin-1") * 3,
        "random bytes": rng.randbytes(300),
    }


def test_every_kind_of_bytes_comes_back(codec, sample_text):
    for name, data in texts(sample_text).items():
        for packed in (codec.compress(data), codec.compress_text(data)):
            if packed is not None:
                assert codec.decompress(packed.blob) == data, name


def test_which_form_is_chosen(codec, sample_text):
    kinds = texts(sample_text)
    assert codec.compress_text(kinds["random bytes"]) is None and codec.compress_text(b"") is None
    assert tg.FORMS[codec.compress(kinds["random bytes"]).header.form] == "stored"
    assert tg.FORMS[codec.compress(b"ab" * 500).header.form] == "lzma"


def test_actual_size_is_the_evaluators_score_of_the_same_segmentation(codec, tokenizer, sample_text):
    packed = codec.compress_text(sample_text.encode())
    assert packed.restoration_bits == 0, "normalisation leaves this text alone"
    tokens = np.array(tokenizer.sp.encode(sample_text), np.int64)
    counts = tg.lane_counts(len(tokens), 8)
    nats = 0.0
    for lane in tg.to_lanes(tokens, counts):
        stream = torch.from_numpy(np.concatenate([[1], lane[: counts[-1]]]))
        text = tg.ValidationText(stream, torch.zeros_like(stream), True)
        network = tg.NetworkExpert(codec.cfg, codec.run, codec.model, text, codec.cfg.eval_stride)
        nats -= float(network.score(stream, 1, len(stream)).sum())
    score = nats / math.log(2)
    assert packed.ideal == pytest.approx(score, rel=1e-3)
    assert packed.token_bits == pytest.approx(score, rel=1e-3)
    assert 8 * len(packed.blob) == pytest.approx(score, rel=2e-3), "the header is small"


TECHNIQUES = {
    "baseline": {},
    "cpu": {},
    "pr164": {},
    "pr740": {"XSA_LAST_N": 2, "ROPE_DIMS": 4},
    "pr187": {"NUM_LAYERS": 4, "ENCODER_RECURRENCE": 1},
    "pr850": {"NUM_LAYERS": 3, "XSA_LAST_N": 2, "VE_LAYERS": "1,2", "ROPE_DIMS": 4},
    "pr1095": {"NUM_LAYERS": 3, "XSA_LAST_N": 3, "VE_LAYERS": "1,2", "ROPE_DIMS": 4, "ADAPTER_RANK": 4},
}


@pytest.mark.parametrize("recipe", TECHNIQUES)
def test_lanes_give_the_evaluators_distributions(recipe):
    cfg = load(recipe, **{**TECHNIQUES[recipe], "RESUME": ""})
    model, run, n = tiny_model(cfg), make_run(cfg), 90
    tokens = torch.randint(2, 1024, (2, n))
    tokens[:, 0] = 1
    tokens[0, 50] = 1
    lanes = tg.LaneNetwork(cfg, run, model, 2, n - 1)
    found = []
    for t in range(1, n):
        found.append(lanes.dist())
        lanes.take(tokens[:, t].numpy())
    for lane in (0, 1):
        text = tg.ValidationText(tokens[lane], torch.zeros(n), True)
        network = tg.NetworkExpert(cfg, run, model, text, cfg.eval_stride)
        for t in (1, 2, 31, 32, 33, 40, 41, 51, 60, 88, 89):
            assert torch.allclose(found[t - 1][lane], network.dist(tokens[lane], t), atol=1e-6), (lane, t)
        mine = torch.stack(found)[:, lane].gather(1, tokens[lane, 1:, None])[:, 0].log()
        assert torch.allclose(mine, network.score(tokens[lane], 1, n), atol=1e-4)


def test_edits_restore_what_normalisation_changes_and_cost_little(tokenizer):
    source = (HERE.parent / "train_gpt.py").read_bytes()[:30_000]
    normal, edits = tg.Normalizer(tokenizer.sp).split(source)
    assert "\n" not in normal and "  " not in normal and len(edits) > 300
    coder = tg.SymbolEncoder()
    tg.code_edits(coder, normal, edits)
    packed = coder.finish()
    assert tg.code_edits(tg.SymbolDecoder(packed), normal, None) == edits
    assert tg.restore_bytes(normal, edits) == source
    assert len(packed) < 0.012 * len(source), "newlines and indentation of code"


def test_frequencies_lose_less_than_a_thousandth():
    rng = np.random.default_rng(0)
    for size in (1024, 8192):
        coder = tg.SymbolEncoder()
        p = rng.dirichlet(np.full(size, 0.01), 400)
        for row in p:
            coder.code(row, int(rng.choice(size, p=row)))
        assert 8 * len(coder.finish()) < coder.bits * 1.001 + 64
    coder = tg.SymbolEncoder()
    coder.code(np.array([1.0, 1e-300]), 1)
    assert tg.SymbolDecoder(coder.finish()).code(np.array([1.0, 1e-300])) == 1, "every symbol keeps a floor"


def test_damage_and_strangers_are_refused(codec, sample_text):
    blob = codec.compress_text(sample_text[:2000].encode()).blob
    for bad in (
        b"",
        b"PK\3\4" + blob,
        blob[:-1],
        blob[:30],
        blob + b"x",
        blob[:60] + bytes([blob[60] ^ 1]) + blob[61:],
    ):
        with pytest.raises(tg.ArtifactError):
            codec.decompress(bad)
    other = tg.Codec(codec.cfg, codec.run, codec.model, codec.sp, "f" * 16)
    with pytest.raises(tg.ArtifactError, match="compressed with artifact 0123456789abcdef"):
        other.decompress(blob)
    other = tg.Codec(codec.cfg, codec.run, codec.model, codec.sp, codec.artifact)
    other.machine = "2.0.0 cpu ABACUS"
    with pytest.raises(tg.ArtifactError, match="the arithmetic differs"):
        other.decompress(blob)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer) -> Path:
    """An artifact of random weights."""
    cfg = load()
    model = tiny_model(cfg)
    stored = tg.quantize(
        cfg, {n: p.detach() for n, p in model.named_parameters()}, {n: p.store for n, p in model.named_parameters()}
    )
    path = tmp_path_factory.mktemp("artifact") / "tiny.pgz"
    path.write_bytes(tg.pack(cfg, tg.artifact_header(cfg, tokenizer), stored))
    return path


def call(artifact: Path, capfd, **env) -> tuple[int, str]:
    status = tg.main([], {"ARTIFACT": str(artifact), "DEVICE": "cpu", **{k: str(v) for k, v in env.items()}})
    torch.set_num_threads(1)
    out = capfd.readouterr()
    return status, out.out + out.err


def test_files_go_through_the_command_line_and_back(artifact, tmp_path, capfd, sample_text):
    data = b"def f(x):\n    return x\n\n" + sample_text[:2500].encode()
    source, packed, back = tmp_path / "a.txt", tmp_path / "a.txt.pgz", tmp_path / "b.txt"
    source.write_bytes(data)
    status, text = call(artifact, capfd, MODE="compress", INPUT=source, EVAL_STRIDE=16)
    assert status == 0 and "form:text" in text or "form:lzma" in text
    assert packed.stat().st_size == int(re.search(r"compressed_bytes:(\d+)", text)[1])
    status, text = call(artifact, capfd, MODE="compress", INPUT=source)
    assert status == 2 and "exists" in text and "FORCE=1" in text
    status, text = call(artifact, capfd, MODE="decompress", INPUT=packed, OUTPUT=back)
    assert status == 0 and back.read_bytes() == data
    status, text = call(artifact, capfd, MODE="decompress", INPUT=packed, OUTPUT=tmp_path / "c", NUM_LAYERS=3)
    assert status == 2 and "NUM_LAYERS" in text
    packed.write_bytes(packed.read_bytes()[:-3])
    status, text = call(artifact, capfd, MODE="decompress", INPUT=packed, OUTPUT=tmp_path / "c")
    assert status == 2 and text.count("error:") == 1 and "truncated" in text
    assert not (tmp_path / "c").exists()


def test_the_file_says_which_settings_it_was_coded_with(artifact, tmp_path, capfd, monkeypatch, sample_text):
    monkeypatch.setattr(tg.Codec, "compress", tg.Codec.compress_text)
    source, packed = tmp_path / "a.txt", tmp_path / "a.txt.pgz"
    source.write_text(sample_text[:1500])
    assert call(artifact, capfd, MODE="compress", INPUT=source, EVAL_STRIDE=16)[0] == 0
    status, text = call(artifact, capfd, MODE="decompress", INPUT=packed, OUTPUT=tmp_path / "b", EVAL_STRIDE=8)
    assert status == 2 and "EVAL_STRIDE=8: the file was coded with 16" in text
    assert call(artifact, capfd, MODE="decompress", INPUT=packed, OUTPUT=tmp_path / "b")[0] == 0
    assert (tmp_path / "b").read_text() == sample_text[:1500]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"MODE": "compress", "INPUT": "/nowhere/a"}, "cannot read it"),
        ({"MODE": "compress"}, "INPUT"),
        ({"MODE": "decompress", "INPUT": __file__}, "does not end in .pgz"),
        ({"MODE": "compress", "INPUT": __file__, "OUTPUT": __file__}, "exists"),
        (
            {"MODE": "compress", "INPUT": __file__, "TOKENIZER_PATH": "/nowhere/t.model", "OUTPUT": "x"},
            "TOKENIZER_PATH",
        ),
        ({"MODE": "sample", "ARTIFACT": "/nowhere/a.pgz"}, "no such file"),
    ],
)
def test_mistakes_are_one_message(artifact, capfd, env, words):
    env = {"ARTIFACT": str(artifact), "DEVICE": "cpu", **env}
    assert tg.main([], env) == 2
    text = capfd.readouterr().err
    assert text.count("error:") == 1 and words in text and "Traceback" not in text


def test_samples_follow_the_seed(artifact, capfd):
    env = {"MODE": "sample", "PROMPT": "The parser", "SAMPLE_TOKENS": 24}
    first, second = (call(artifact, capfd, **env, SEED=5)[1] for _ in range(2))
    assert first == second and first.startswith("The parser") and len(first) > 20
    assert call(artifact, capfd, **env, SEED=6)[1] != first
    greedy = [call(artifact, capfd, **env, TEMPERATURE=0, SEED=s)[1] for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    p = torch.tensor([0.1, 0.5, 0.3, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = {tg.choose_token(p, 1.0, 0.7, generator) for _ in range(200)}
    assert drawn == {1, 2}
    assert {tg.choose_token(p, 1.0, 0.01, generator) for _ in range(20)} == {1}
    counts = np.bincount([tg.choose_token(p, 1.0, 1.0, generator) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - p.numpy()).max() < 0.03
