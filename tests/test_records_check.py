"""report.py check: one small folder for each kind of record that was misread or let pass, made here."""

import base64
import bz2
import contextlib
import json
import lzma
import math
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "records"))

import report  # noqa: E402
import runs as logs  # noqa: E402
from check import patterns, rules, source, syntax  # noqa: E402

VAL_TOKENS, NATS_PER_BPB = 40_540_160, math.log(2) * 151_075_000 / 40_540_160
SCRIPT = """import os

import torch


class Hyperparameters:
    val_files = "fineweb_val_*.bin"
    matrix_lr = float(os.environ.get("MATRIX_LR", "0.02"))


def eval_val(model, val_tokens):
    nll_sum = 0.0
    with torch.inference_mode():
        for start in range(0, val_tokens.numel() - 1, 1024):
            nll_sum += model(val_tokens[start : start + 1025])
    return nll_sum


def main():
    val_tokens = load_validation_tokens(Hyperparameters.val_files)
    for step in range(100):
        x, y = train_loader.next_batch()
        loss = model(x, y)
        loss.backward()
        if step % 50 == 0:
            val_loss = eval_val(model, val_tokens)
    print(eval_val(model, val_tokens))


main()
"""
BAR = "=" * 100
SEEDS = {1: 1.1003, 2: 1.1010, 3: 1.1002}


PARTS = {
    "head": f"{SCRIPT}\n{BAR}\n", "named": "", "shards": 80, "tokens": f"tokens:{VAL_TOKENS}", "gates": "", "stop": "599950", "steps": "",
    "code": f"Code size: {len(SCRIPT)} bytes", "total": 15_900_000, "artifact": 0, "stage": "final_int6_roundtrip_exact", "adapted": "",
    "eval": " eval_time:90000ms", "device": "NVIDIA H100 80GB HBM3", "config": "",
}  # fmt: skip


def log_text(seed: int, bpb: float, **change) -> str:
    """One run as the challenge's scripts print it; `change` replaces what a key of PARTS stands for."""
    part = {**PARTS, "named": f"seed:{seed}", "loss": bpb * NATS_PER_BPB, **change}
    return f"""{part["head"]}|   0  {part["device"]}          On  |   00000000:19:00.0 Off |
{BAR}
{part["config"]}train_loader:dataset:fineweb10B_sp8192 train_shards:{part["shards"]}
val_loader:shards pattern=./fineweb_val_*.bin {part["tokens"]}
world_size:8 grad_accum_steps:1
{part["named"]}
step:1/20000 train_loss:9.0 train_time:70ms step_avg:70.00ms
step:8000/20000 train_loss:2.{seed} train_time:560000ms step_avg:70.00ms
{part["steps"]}step:8570/20000 val_loss:2.9 val_bpb:1.12 train_time:{part["stop"]}ms step_avg:70.00ms
stopping_early: wallclock_cap train_time:{part["stop"]}ms step:8570/20000
Serialized model: 135418111 bytes
{part["code"]}
Serialized model int6+zstd: {part["artifact"] or part["total"] - len(SCRIPT)} bytes
Total submission size int6+zstd: {part["total"]} bytes
{part["adapted"]}{part["gates"]}{part["stage"]} val_loss:{part["loss"]:.8f} val_bpb:{bpb:.8f}{part["eval"]}
"""


def write_logs(folder: Path, **change) -> None:
    for seed, bpb in SEEDS.items():
        (folder / f"train_seed{seed}.log").write_text(log_text(seed, bpb, **change))


META = {"author": "A", "github_id": "a", "name": "Idea"}
META |= {"date": "2026-04-10", "track": "10min_16mb", "seeds": [1, 2, 3]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record of three seeds that nobody objects to."""
    made = tmp_path / "track_10min_16mb" / "2026-04-10_Idea"
    made.mkdir(parents=True)
    (made / "README.md").write_text("# Idea\n")
    (made / "requirements.txt").write_text("torch\n")
    (made / "train_gpt.py").write_text(SCRIPT)
    meta = META | {"val_bpb": 1.1005, "seed_results": {str(s): {"val_bpb": b} for s, b in SEEDS.items()}}
    (made / "submission.json").write_text(json.dumps(meta))
    write_logs(made)
    return made


def edit(folder: Path, **fields) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def verdicts(folder: Path) -> dict[str, rules.Check]:
    return {c.rule: c for c in rules.checks(rules.read_entry(folder))}


USUAL = {"validation documents in training", rules.AUDIT}  # what no folder shows


# ---- 1 newer Python, packed

NEWER = '''import os
import torch
type Pair[T] = tuple[T, T]
def show[T: int = int](args: T, *more: *tuple[int, ...]) -> str:
    return f"{args["name"]!r:>{args["width"]}} {"\\n".join(args)}" " and the rest"
class Cache[K]:
    def probability(self, ctx_hash, target):
        text = f"""{
            ctx_hash  # of the context
        } over
        three lines"""
        return (ctx_hash ^ target * 36313) % self.size
try:
    show({})
except* ValueError as error:
    last = Cache[*error]
'''


def latin1_packed(text: str, pack) -> bytes:
    """A source file declared latin-1 whose one literal holds the compressed bytes themselves."""
    literal, name = pack(text.encode()), pack.__module__.removeprefix("_").encode()
    for raw, written in ((b"\\", rb"\\"), (b"\0", rb"\x00"), (b"\n", rb"\n"), (b"\r", rb"\r"), (b'"', rb"\"")):
        literal = literal.replace(raw, written)
    script = b'# -*- coding: latin-1 -*-\nimport %s as c\nexec(c.decompress("%s".encode("latin-1")))\n'
    return script % (name, literal)


def packed(text: str) -> str:
    raw = base64.b85encode(lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])).decode()
    return f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{raw}"),format=L.FORMAT_RAW,filters=[]))\n'


def test_newer_syntax_is_read_by_every_interpreter_with_the_same_findings(folder):
    (folder / "train_gpt.py").write_text(packed(NEWER))
    script = source.read_script(folder / "train_gpt.py")
    assert (script.opaque, script.unread, script.layers, script.source) == (None, None, 1, NEWER)
    assert [(f.pattern, f.line) for f in script.findings] == [(patterns.TARGET_KEY, 12)]


def test_the_fallback_parser_keeps_lines_and_meaning():
    command = [sys.executable, str(syntax.DOWNGRADE)]
    old = subprocess.run(command, input=NEWER, capture_output=True, text=True, check=True).stdout
    tree = syntax.ast.parse(old, feature_version=(3, 10))
    assert [type(n).__name__ for n in tree.body] == ["Import", "Import", "Assign", "FunctionDef", "ClassDef", "Try"]
    assert [n.lineno for n in tree.body] == [1, 2, 3, 4, 6, 13]
    assert {"args", "name", "width"} <= {getattr(n, "id", getattr(n, "value", None)) for n in syntax.ast.walk(tree)}
    assert subprocess.run(command, input="def (", capture_output=True, text=True).returncode == 1


def test_what_no_parser_may_read_is_named_and_does_not_end_the_checker(folder, monkeypatch):
    (folder / "train_gpt.py").write_text("import os\ndef f(:\n" + "(" * 100_000)  # ends libcst's own process
    assert verdicts(folder)["code readable"].status == "FAIL"
    monkeypatch.setattr(syntax, "DOWNGRADE", folder / "none.py")
    monkeypatch.setattr(source, "find_spec", lambda _: None)
    syntax.parse.cache_clear()
    broken = "import os\n\n\ndef main():\n    return f'{os.environ['A']:%%%' + (]\n\n\ndef other():\n    return 1\n"
    broken += "".join(f"# {n * 7919 % 1009}\n" for n in range(300))
    (folder / "train_gpt.py").write_text(packed(broken))
    check = verdicts(folder)["code readable"]
    assert check.status == "WARN" and f"decoded, {len(broken):,} bytes, syntax that Python 3." in check.detail


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_bytes_in_a_latin_1_literal_are_opened(folder, pack):
    text = SCRIPT + "".join(f"# {n * 7919 % 1009}\n" for n in range(200))
    blob = latin1_packed(text, pack)
    (folder / "train_gpt.py").write_bytes(blob)
    script = source.read_script(folder / "train_gpt.py")
    assert (script.source, script.layers, script.opaque) == (text, 1, None) and len(blob) < len(text)


# ---- 3 seconds


def test_a_broken_limit_of_our_own_logs_is_judged_by_its_rule_alone(tmp_path):
    score, end = {"limits_ok": False, "train_s": 600.04, "val_bpb": 1.1}, {"steps": 10, "train_s": 600.04}
    run = logs.Run(tmp_path, score=score, train_end=end)
    run.steps = [{"step": 0, "train_s": 0.0}, {"step": 10, "train_s": 600.04}]
    lines = list(rules.limits(rules.Entry(tmp_path / "track_10min_16mb" / "x", runs=[run])))
    assert [s for s, rule, _ in lines if "600.0 s" in _ or "limits of" in rule] == ["WARN"]


# ---- 4 copies, 5 forms of logs


@pytest.mark.parametrize("line, stage", [
    ("final_sliding_window_eval_exact stride:64 val_loss:2.84 val_bpb:1.1", "sliding_window_eval"),
    ("[2026-04-10 12:00:01] final_int6_ttt_exact val_loss:2.84 val_bpb:1.1", "int6_ttt"),
    ("2026-04-10T12:00:01,123 INFO: final_x_exact val_loss: 2.84, val_bpb: 1.1", "x"),
    ("12:00:01 [rank0]: legal_ttt_exact val_loss:2.84 val_bpb:1.1 eval_time:297727ms", "legal_ttt"),
    ("ttt_sliding:done val_loss=2.84 val_bpb=1.1 elapsed=297.5s", "ttt_sliding"),
    ("quantized_ttt_phased val_bpb:1.1 val_loss:2.84", "quantized_ttt_phased"),
])  # fmt: skip
def test_every_form_of_a_score_line_is_a_stage(tmp_path, line, stage):
    path = tmp_path / "train.log"
    path.write_text(f"seed:5\n[2026-04-10 11:59:59] step:7/9 train_loss:3.0 train_time:70ms\n{line}\n")
    run = logs.read_log(path)
    assert (run.stage, run.bpb(), run.loss(), run.seed, run.last_step) == (stage, 1.1, 2.84, 5, 7)


def test_sizes_are_read_with_their_labels(tmp_path):
    text = log_text(1, 1.1, code="Code size (compressed): 37,155 bytes\nCode size (uncompressed): 191274 bytes")
    (tmp_path / "a.log").write_text(text + "Total submission size: 135600000 bytes\n")
    pack = logs.read_log(tmp_path / "a.log").pack
    assert (pack["code_bytes"], pack["code_uncompressed"], pack["total_bytes"]) == (37_155, 191_274, 15_900_000)
    (tmp_path / "b.log").write_text(
        "step:1/9 train_loss:3.0\ncode_size:56228 bytes total_submission_size:52625931 bytes\n"
        "serialized_model_int8_zlib:14179856 bytes (payload:15335872)\ntotal_submission_size_int8_zlib:14236084 bytes\n"
    )
    pack = logs.read_log(tmp_path / "b.log").pack
    assert pack == {"code_bytes": 56_228, "total_bytes": 14_236_084, "artifact_bytes": 14_179_856}


def test_a_hyperparameter_block_before_the_source_is_the_runs(folder):
    block = "Hyperparameters:\n  matrix_lr: 0.026\n  seed: {}\n" + BAR + "\n"
    for seed, bpb in SEEDS.items():
        head = block.format(seed) + f"{SCRIPT}\n{BAR}\n"
        (folder / f"train_seed{seed}.log").write_text(log_text(seed, bpb, head=head, named="warmup_step:1/20"))
    entry = rules.read_entry(folder)
    assert [r.seed for r in entry.scored] == [1, 2, 3] and entry.scored[0].config["MATRIX_LR"] == 0.026
    assert {c.status for c in verdicts(folder).values()} == {"PASS", "WARN"}
    assert verdicts(folder)["script that ran"].status == "PASS"


# ---- Missed: 1 training on validation text

ADAPT = """
def {name}(model, stream, opt):
    for start in range(0, stream.numel() - 1, 1024):
        piece = stream[start : start + 1025].to("cuda")
        loss = model(piece[:-1], piece[1:])
        loss.backward()
        opt.step()
"""


def with_call(call: str, more: str) -> str:
    return (
        SCRIPT.replace("    print(eval_val(model, val_tokens))", f"{call}    print(eval_val(model, val_tokens))") + more
    )


TAUGHT = with_call("    ttt_adapt(model, val_tokens, opt)\n", ADAPT.format(name="ttt_adapt"))


def found(text: str) -> set[str]:
    return {f.pattern for f in patterns.find_patterns(syntax.parse(text.encode()), text)}


# ---- Messages


KNOBS = """
class More:
    slot_enabled = bool(int(os.environ.get("SLOT_ENABLED", "0")))
    slot_steps = 8
    ppm_order = 5
    prequant_ttt_enabled = bool(int(os.environ.get("PREQUANT_TTT_ENABLED", "0")))
"""


def test_a_finding_in_a_one_line_program_shows_its_name():
    text = "import os;" + "".join(f"a{n}={n};" for n in range(400)) + "prequant_ttt_epochs=21;" + "b=1;" * 100
    (finding,) = patterns.find_patterns(syntax.parse(text.encode()), text)
    assert finding.name == "prequant_ttt_epochs"
    assert "prequant_ttt_epochs=21" in finding.text
    assert len(finding.text) < 160


def test_text_that_the_terminal_cannot_show_is_shown_escaped(folder):
    (folder / "train_gpt.py").write_bytes(b"# -*- coding: latin-1 -*-\nprequant_ttt = '\xe9\xff'\n" + SCRIPT.encode())
    tool = [sys.executable, str(ROOT / "records" / "report.py"), "check", str(folder)]
    done = subprocess.run(tool, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert b"Traceback" not in done.stderr and rb"prequant_ttt = '\udce9\udcff'" in done.stdout


# ---- Summary and numbers


def test_the_summary_stands_first_and_names_the_three_findings_that_matter_most(folder, capsys):
    write_logs(folder, stop="601900", total=16_100_000, device="NVIDIA H200")
    assert report.main(["check", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    figures = "1.10050 bpb; 16,100,000 bytes; train 601.9 s; eval 90.0 s; seeds 1, 2, 3; 3 FAIL"
    assert lines[1].startswith(f"  FAIL  {figures}")
    assert [line.strip()[:7] for line in lines[2:5]] == ["1. FAIL", "2. FAIL", "3. FAIL"]
    assert report.main(["check", str(folder), "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)[str(folder)]
    assert (listed[0]["rule"], listed[0]["status"]) == ("summary", "FAIL")


def test_check_needs_neither_scipy_nor_matplotlib_nor_torch(folder):
    edit(folder, comparison_baseline_bpb=1.2)
    blocked = "import sys\nfor m in ('scipy', 'matplotlib', 'torch', 'libcst'):\n    sys.modules[m] = None\n"
    code = f"{blocked}sys.path.insert(0, {str(ROOT / 'records')!r})\nimport report\nsys.exit(report.main(['check', {str(folder)!r}]))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the test of significance needs scipy" in done.stdout


def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_dropped(tmp_path):
    event = {"v": 1, "event": "run", "run_id": "a\u2028b\u0085c"}
    end = {"v": 1, "event": "end", "status": "ok"}
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(e, ensure_ascii=False) for e in (event, end)).encode())
    run = logs.read_log(path)
    assert (run.run_id, run.ended, run.damage) == ("a\u2028b\u0085c", "ok", None)
    path.write_text(json.dumps(event) + "\n" + json.dumps({"v": 1, "event": "error", "message": "\ud800"}) + "\n")
    assert logs.read_log(path).damage == "truncated or damaged at line 2"


def test_stages_of_any_name_stand_in_the_order_of_the_logs(tmp_path):
    runs = [logs.Run(tmp_path, stages=dict.fromkeys(names)) for names in (("a", "new", "c"), ("a", "c"), ("new", "c"))]
    assert logs.stage_order(runs) == ["a", "new", "c"]


def test_a_hundred_folders_take_seconds_each_fraction_of_one(folder):
    import time

    began = time.process_time()
    rules.checks(rules.read_entry(folder))
    assert time.process_time() - began < 2.0


# ---- Code in several places

KEYED = "\ndef probability(self, ctx_hash, target):\n    return self.counts[(ctx_hash ^ target * 36313) % self.size]\n"
TEXT = SCRIPT + KEYED + "".join(f"# {n * 7919 % 1009}\n" for n in range(200))
BLOB = packed(TEXT).partition('"')[2].rpartition('"')[0]
# ---- Scripts: whatever the names, the order and the structure, the verdict follows the text's way

NAMED = {
    "trained": patterns.TRAINED, "learned": patterns.LEARNED, "calibrated": patterns.IN_TRAINING, "key": patterns.TARGET_KEY,
    "oracle": patterns.ORACLE, "threshold": patterns.THRESHOLD, "no distribution": patterns.NO_DISTRIBUTION,
    "gate": patterns.GATE, "spaces": patterns.SPACES, "stored": patterns.STORED, "honest": None,
}  # fmt: skip
BASE, *BODIES = (ROOT / "tests" / "check_scripts.txt").read_text().split("\n=== ")
BODIES = dict(body.split("\n", 1) for body in BODIES)


def whole(body: str) -> str:
    """A script of check_scripts.txt: its functions in the base, and what main does before or instead of the evaluation."""
    if body.startswith("whole:\n"):
        return body.removeprefix("whole:\n")
    last = "    val_loss, val_bpb = eval_val(args, model, val_tokens)\n"
    functions, where, main = next((body.partition(w) for w in ("main:\n", "before:\n") if w in body), (body, "", ""))
    return BASE.replace("FUNCTIONS\n", functions).replace("MAIN\n", main if where == "main:\n" else f"{main}\n{last}")


@pytest.mark.parametrize("name", BODIES)
def test_a_script_is_judged_by_the_way_of_the_text(name):
    wanted = {NAMED[word] for word in name.partition(": ")[0].split(" + ")} - {None}
    assert found(whole(BODIES[name])) == wanted


def test_nesting_is_no_traceback_and_the_summary_has_the_rules_figures(folder, capsys):
    edit(folder, bytes_total=16_000_001)
    path = folder / "submission.json"
    path.write_text(path.read_text()[:-1] + ', "notes": ' + '{"a":' * 900 + "1" + "}" * 900 + "}")
    assert report.main(["check", str(folder)]) == 1 and "; 16,000,001 bytes; " in capsys.readouterr().out
    assert report.main(["check", str(folder), str(folder / "none"), str(folder / "README.md")]) == 2
    out, err = capsys.readouterr()
    assert not out and "none, " in err and "README.md: no such folder" in err


# ---- Verdicts on folders in one table: what is changed, and for each rule its status ("": it says nothing) and words of its detail


def put(text: str | bytes, quiet: bool = False, log: dict | None = None, **beside):
    """The script, and files beside it (`__` for `.`, `_of_` for `/`); logs that print what ran unless `quiet`, with changes."""

    def change(folder: Path) -> None:
        for name, content in {"train_gpt__py": text, **beside}.items():
            path = folder / name.replace("__", ".").replace("_of_", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if not quiet:
            write_logs(folder, **{"head": f"{text}\n{BAR}\n", "code": f"Code size: {len(text)} bytes", **(log or {})})

    return change


def logged(**change):
    return lambda folder: write_logs(folder, **change)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def meta(**fields):
    return lambda folder: edit(folder, **fields)


def each(**change):
    """Logs whose parts depend on their seed: functions of (seed, bpb), or texts."""

    def write(folder: Path) -> None:
        for seed, bpb in SEEDS.items():
            parts = {k: v(seed, bpb) if callable(v) else v for k, v in change.items()}
            (folder / f"train_seed{seed}.log").write_text(log_text(seed, **{"bpb": bpb, **parts}))

    return write


def one(seed: int, bpb: float = 0.0, name: str = "train_seed{}.log", **change):
    return lambda folder: (folder / name.format(seed)).write_text(log_text(seed, bpb or SEEDS[seed], **change))


def logs_as(change):
    """The logs' texts rewritten: text -> text."""
    return lambda folder: [path.write_text(change(path.read_text())) for path in folder.glob("*.log")]


def moved(place: str):
    def move(folder: Path) -> None:
        (folder / place).mkdir(parents=True)
        for path in folder.glob("*.log"):
            path.rename(folder / place / path.name)

    return move


def gone(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def implied(factor: float, **change):
    def loss(_, bpb):
        return bpb * NATS_PER_BPB * factor

    return each(loss=loss, **{k: lambda seed, bpb, v=v: v.format(loss=loss(seed, bpb)) for k, v in change.items()})


def appended(folder: Path) -> None:
    gone(*(f"train_seed{seed}.log" for seed in SEEDS))(folder)
    (folder / "train.log").write_text("".join(log_text(s, b) for s, b in SEEDS.items()))


def scored_apart(folder: Path) -> None:
    for seed, bpb in SEEDS.items():
        head, _, stage = log_text(seed, bpb).rpartition("final_int6_roundtrip_exact")
        (folder / f"train_seed{seed}.log").write_text(head + "diagnostic quantized val_loss:3.0 val_bpb:1.15\n")
        (folder / f"eval_seed{seed}.log").write_text(f"seed:{seed}\nfinal_int6_ttt_exact{stage}")


def odd_files(folder: Path) -> None:
    """Colours, UTF-16, the name that Slurm gives, and lines that take a bad pattern hours."""
    a, b, c = sorted(folder.glob("*.log"))
    a.write_text(a.read_text().replace("final_int6", "\x1b[32mfinal_int6"))
    b.write_bytes(b.read_text().encode("utf-16"))
    c.rename(c.with_suffix(".out"))
    (folder / "train_seed4.log").write_text("adapt " * 200_000 + "\n" + "val_loss:" * 100_000)


def no_file(folder: Path) -> None:
    (folder / "train_gpt.py").unlink()
    (folder / "train_gpt.py").mkdir()
    os.mkfifo(folder / "train_pipe.py")


def below_the_best(text: str = SCRIPT, **change):
    scores = each(
        bpb=lambda seed, _: 1.05 + seed / 1e4, head=f"{text}\n{BAR}\n", code=f"Code size: {len(text)} bytes", **change
    )
    return both(put(text, quiet=True), scores, meta(val_bpb=1.0502, seed_results={}))


GUARDED = """
    cache_on = int(os.environ.get("CACHE_ON", "{default}"))


def probability(ctx_hash, target):
    return counts[(ctx_hash ^ target * 36313) % size]


if {test}:
    print("cache:start now")
    probability(1, 2)
"""
KEY, TRAINED = f"code: {patterns.TARGET_KEY}", f"code: {patterns.TRAINED}"
NAME = "code: name of a rejected method: "
PPM = f"{NAME}byte-level PPM mixture (normalisation, denominator)"
SLOT = f"{NAME}SLOT (optimises on the positions it scores)"
OTHER = SCRIPT.replace('"0.02"', '"0.05"').replace("import os\n", "'Trains.'\nimport os  # and more\n", 1)
STUB = 'exec(open(__file__.replace("train_gpt", "core")).read())\n'
LONG = SCRIPT + "".join(f"x{n} = {n * 7919}\n" for n in range(2000))
HELPED, ITSELF = "import kernels\n" + SCRIPT, SCRIPT + "f = 'train_gpt.py.lzma'\n"
HINTS = "ngram_tilt:hints total=40540160 gated=628130 token_gate={} within_gate={} word_gate={} agree2plus=0\n"
SELF = {"train_under_600s": False, "artifact_under_16mb": True}
STOP = "step:8560/20000 val_loss:{loss:.8f} val_bpb:1.43 train_time:599000ms\n"
SLOW = "step:8569/20000 train_loss:2.0 train_time:599000ms step_avg:69.90ms\n"
CHUNKS = "ttt_chunk [1/99] bpb=1.2 time=5.1s\nttt_chunk [99/99] bpb=1.1 time=369.4s\n"
OFF = "slot_enabled: False\nslot_steps: 8\nppm_order: 0\nprequant_ttt_enabled: False\n"
REFINE = "    if args.prequant_ttt_enabled:\n        refine(model, val_tokens, opt)\n"
REFINED = with_call(REFINE, ADAPT.format(name="refine")) + KNOBS
HEIR = """import os, torch
import torch.nn.functional as F
class Hyperparameters:
    val_files = os.path.join("data", "fineweb_val_*.bin")
    prequant_label = "diagnostic pre-quantization post-ema"
def hash_bigrams(ids, vocab):
    return torch.bitwise_xor(36313 * ids[..., 1:], 27191 * ids[..., :-1]) % (vocab - 1)
def nll(model, x, targets):
    return F.cross_entropy(model(x), targets, reduction="none")
def train_model(h, device, val_data):
    log(f"val_tokens: {val_data.val_tokens.numel() - 1}")
    val_loss, val_bpb = eval_val(h, device, val_data)
def eval_val_ttt(h, val_data):
    for chunk in val_data.val_tokens.split(65536):
        loss = nll(h, chunk[:-1], chunk[1:])
def load(path):
    return torch.load(path, weights_only=True)
if __name__ == "__main__":
    train_model(Hyperparameters(), "cuda", None)
"""
PREPARE = "import urllib.request\nval = open('fineweb_val_000000.bin')\n"
LAST_WEEKS = {"val_loss": 1.1005 * NATS_PER_BPB, "comparison_baseline_bpb": 1.2, "bytes_total": 15_900_000, "technique_summary": "a stack", "attribution": [],
              "compliance": dict.fromkeys(rules.RULED, True) | {"no_ngram_cache": False, "no_slot": True}}  # fmt: skip
COUNTED, THREE = f"Code size: {len(SCRIPT)} bytes", "3 (1, 2, 3)"
ONE_SEED = {"val_bpb": None, "results": {"mean_val_bpb": 1.1005, "seeds": {"1": {"val_bpb": 1.1003}}}}


def guarded(test: str = "Hyperparameters.cache_on", default: str = "0") -> str:
    return SCRIPT.replace("\n\n\ndef eval_val", GUARDED.format(test=test, default=default) + "\n\ndef eval_val", 1)


FOLDERS = [
    ("nothing", logged(), {"*": "", "validation text": "PASS", "hardware": "PASS"}),
    *((f"of the last weeks, {form}", both(put(HEIR), put(pack(HEIR), True, prepare_data__py=PREPARE, tokenizers_of_a__model=b"model"), meta(**LAST_WEEKS)),
       {"gain": "PASS", "code patterns": "PASS", "hardware": "PASS", "own compliance list": "WARN"}) for form, pack in (("plain", str), ("packed", packed))),
    # ---- what entries were rejected for
    ("one seed", gone("train_seed2.log", "train_seed3.log"), {"seeds": "FAIL 1 (1); a record shows 3", "a log for each seed": "FAIL", "val_bpb": "FAIL"}),
    ("a seed that is not told", meta(seeds=[1, 2], seed_results={}), {"a log for each seed": "WARN", "val_bpb": "FAIL"}),
    ("its own account of the seconds", meta(train_wallclock_ms_max=601_937), {"training time": "FAIL"}),
    ("an honest no", meta(compliance={"eval_under_600s": False}), {"own compliance list": "FAIL"}),
    ("gain within noise", meta(comparison_baseline_bpb=1.1008), {"gain": "WARN"}),
    ("a late date", meta(date="2026-05-09"), {"date": "WARN"}),
    ("too good", meta(val_bpb=0.3212), {"plausible score": "FAIL", "val_bpb": "FAIL"}),
    ("mixed configurations", both(logged(config="matrix_lr: 0.02\n"), one(2, config="matrix_lr: 0.024\n")), {"one configuration": "WARN"}),
    ("self-made shards", logged(shards=1499), {"training shards": "WARN"}),
    ("a gate in code", put(SCRIPT + "within_gate = starts_word[targets]\n"), {f"code: {patterns.GATE}": "WARN"}),
    ("pickle", put(SCRIPT + "import pickle\nw = pickle.load(f)\n"), {"code: pickle loading": "WARN"}),
    *((text, put(f"{SCRIPT}{text}\n"), {NAME + method: "WARN"}) for text, method in (
        ("prequant_ttt_epochs = 21", "pre-quantisation TTT on validation text"), ("ngram_hint_precompute_outside = True", "hints computed outside the timer"))),
    ("a file opened and learned", put(SCRIPT + "def tune(h):\n    for piece in load(h.val_files):\n        model(piece).backward()\n"), {TRAINED: "FAIL"}),
    ("a helper's helper", put("import first\n" + SCRIPT, first__py="import second\n", second__py="#" * 200_000), {"helper files": "FAIL"}),
    *((content[:20], put(SCRIPT, submission__json=content), told) for content, told in (
        ("{", {"submission.json": "FAIL"}), ("[1]", {"submission.json": "FAIL"}), ('{"a":' * 50_000, {"submission.json": "FAIL"}),
        ('{"val_bpb": "low"}', {"val_bpb": "FAIL"}), ('{"val_bpb": NaN}', {"val_bpb": "FAIL"}), ("{}", {"submission fields": "FAIL"}))),
    # ---- gates that fired
    ("a gate of tokens", logged(gates=HINTS.format(628_130, 0, 0)), {"n-gram gate": "PASS"}),
    ("a gate within words", logged(gates=HINTS.format(628_130, 31, 0)), {"n-gram gate": "FAIL"}),
    ("a gate of words", logged(gates=HINTS.format(628_130, 0, 9)), {"n-gram gate": "FAIL"}),
    ("no gate", logged(gates=HINTS.format(0, 0, 0)), {"n-gram gate": ""}),
    ("a gate of another name", logged(gates=HINTS.format(5, 0, 0).replace("agree2plus", "doc_gate=7 agree2plus")), {"n-gram gate": "WARN doc_gate=7"}),
    # ---- seconds of training and evaluation
    *((f"a stop at {stop} ms", both(logged(stop=stop), meta(compliance=SELF)), {"training time": status, "own compliance list": status})
      for stop, status in (("600137", "WARN"), ("600038", "WARN"), ("600600", "FAIL"), ("601900", "FAIL"))),
    ("steps after the stop", logged(steps="step:8500/20000 train_loss:2.0 train_time:640000ms step_avg:75.00ms\n"), {"training time": "FAIL"}),
    ("minutes with one digit", logged(steps="8500/20000 train_loss: 2.0 train_time: 10.0m tok/s: 6500000\n"), {"training time": "PASS"}),
    ("calibration after the training", logged(steps="GPTQ:collected 67 Hessians in 35.2s\n"), {"training time": "WARN 635.2 s with the calibration"}),
    ("calibration inside the limit", logged(steps="GPTQ:collected 67 Hessians in 3.5s\n", stop="592000"), {"training time": "PASS"}),
    *((words.strip(), logged(eval=words), {"evaluation time": status}) for words, status in (
        ("\nEvaluation took 612.3 seconds", "FAIL"), ("\nTotal eval time: 612.3s", "FAIL"), ("\neval time: 10.3 min", "FAIL"),
        ("\nEvaluation took 480 seconds", "PASS"), (" eval_time:610000ms\nEvaluation took 4 seconds", "FAIL"),
        (" eval_time:600000ms", "PASS"), (" eval_time:600500ms", "FAIL"))),
    *((f"slow steps and a stop at {stop} ms", logged(steps=SLOW, stop=stop), {"training time": status}) for stop, status in (("600400", "WARN"), ("600900", "FAIL"))),
    *((f"{words.strip()}, then {ms} ms", logged(adapted=words, eval=f" eval_time:{ms}ms"), {"evaluation time": status}) for words, ms, status in (
        ("ttt_adapt: done in 430.0s\n", 280000, "FAIL"), ("adaptation time: 280000ms\n", 430000, "FAIL"), ("TTT phase elapsed: 500.0s\n", 150000, "FAIL"),
        ("ttt_adapt: done in 200.0s\n", 280000, "PASS"), ("ttt_lora:compile warmup done (500.0s)\n", 280000, "PASS"))),
    ("progress inside the score", logged(adapted=CHUNKS, stage="legal_ttt_exact", eval=" eval_time:370000ms"), {"evaluation time": "PASS"}),
    ("adaptation of unknown place", logged(adapted="ttt adaptation took 300.0s\n", stage="legal_ttt_exact", eval=" eval_time:370000ms"), {"evaluation time": "WARN"}),
    ("a total is believed", logged(adapted="adaptation took 300.0s\n", eval=" eval_time:370000ms\ntotal_eval_time:380.0s"), {"evaluation time": "PASS"}),
    # ---- which logs are runs
    ("the same run in two files", both(one(1, name="train.log"), gone("train_seed3.log")),
     {"seeds": "FAIL 2 (1, 2)", "copies of logs": "PASS train.log is train_seed1.log", "a log for each seed": "FAIL", "val_bpb": "FAIL"}),
    ("runs appended to one file", appended, {"seeds": f"PASS {THREE}"}),
    ("an aborted start in the same file", logs_as(lambda text: text.partition("step:8000")[0] + text), {"seeds": f"PASS {THREE}"}),
    ("an original and a rerun", one(1, 1.0912, "train_seed{}_rerun.log"),
     {"seeds": f"PASS {THREE}", "seeds differ": "WARN 1.10030 in train_seed1, 1.09120 in train_seed1_rerun"}),
    ("logs in a subfolder", moved("logs"), {"seeds": f"PASS {THREE}"}),
    ("logs two folders down", moved("runs/h100"), {"seeds": f"PASS {THREE}"}),
    ("scores in logs of their own", scored_apart, {"val_bpb": "PASS"}),
    ("files of other forms", odd_files, {"seeds": f"PASS {THREE}"}),
    ("a log of another seed", lambda folder: (folder / "train_seed3.log").write_text(log_text(1337, 1.1002)),
     {"a log for each seed": "FAIL none for seed 3: train_seed3.log holds seed 1337"}),
    ("the same, and no seeds told", both(lambda folder: (folder / "train_seed3.log").write_text(log_text(1337, 1.1002)), meta(seeds=[], seed_results={})),
     {"a log for each seed": "WARN train_seed3.log holds seed 1337"}),
    ("a cut log", lambda folder: (folder / "train_seed3.log").write_text(log_text(3, 1.1).partition("step:8570")[0]),
     {"a log for each seed": "FAIL train_seed3.log ends at step 8000 without a score", "seeds": "FAIL", "val_bpb": "FAIL"}),
    ("a cut log of a fourth seed", lambda folder: (folder / "train_seed4.log").write_text(log_text(4, 1.1).partition("step:8570")[0]),
     {"logs without a score": "WARN train_seed4.log (seed 4) at step 8000"}),
    ("one of three on other hardware", one(2, device="NVIDIA H200"), {"hardware": "FAIL 8 x NVIDIA H100 80GB HBM3, 8 x NVIDIA H200"}),
    ("one that names no hardware", one(2, device=""), {"hardware": "PASS 8 x NVIDIA H100 80GB HBM3; "}),
    # ---- bytes
    ("readable source, packed counted", logged(code=f"Code size (uncompressed): {len(SCRIPT)} bytes\nCode size (compressed): 311 bytes", total=15_999_990),
     {"code bytes": f"WARN {len(SCRIPT):,} bytes, the logs counted 311"}),
    ("another source was counted", logged(code="Code size (uncompressed): 99999 bytes\nCode size (compressed): 411 bytes", total=15_999_990),
     {"code bytes": "WARN differs from the 99,999 uncompressed"}),
    ("too small a size of the code", logged(code="Code size: 11 bytes", total=15_999_990 + len(SCRIPT)), {"bytes": "FAIL", "code bytes": "FAIL"}),
    ("packed, the source counted", both(put(LONG, log={"total": 16_010_000, "artifact": 16_010_000 - len(LONG)}), put(packed(LONG), quiet=True)), {"bytes": "WARN"}),
    *((f"a total of {size}", logs_as(lambda text, size=size: text.replace("size int6+zstd: 15900000 bytes", f"size int6+zstd: {size}")), {"bytes": status})
      for size, status in (("16.10 MB", "FAIL"), ("15.93 MB", "PASS"), ("15.4 MiB", "FAIL"), ("15,900,000", "PASS"))),
    *((f"the model's {total}, {code}", logged(code=code, total=total, artifact=total), {"bytes": f"{status} the code was not counted"})
      for code in ("Code size: 0 bytes", "", COUNTED) for total, status in ((15_999_900, "FAIL"), (15_000_000, "WARN"))),
    ("a helper that was not counted", put(HELPED, kernels__py="#" * 200_000), {"helper files": "FAIL"}),
    ("a helper that was counted", put(HELPED, kernels__py="#" * 200_000, log={"code": f"Code size: {len(HELPED) + 200_000} bytes"}),
     {"helper files": "PASS counted already", "*": ""}),
    ("a payload of any name", put(SCRIPT + "blob = open('prefix.xz', 'rb').read()\n", prefix__xz=b"#" * 200_000), {"helper files": "FAIL"}),
    # ---- the script that ran
    ("comments", put("# a comment\n" + SCRIPT.replace("        loss", "\n        loss"), quiet=True), {"script that ran": "PASS comments and formatting aside"}),
    ("packed", put(packed(SCRIPT), quiet=True), {"script that ran": "PASS"}),
    ("another constant", put(SCRIPT.replace("0.02", "0.03"), quiet=True), {"script that ran": "WARN"}),
    ("packed, an assignment less", put(packed(SCRIPT.replace("val_loss = ", "")), quiet=True), {"script that ran": "WARN"}),
    ("another statement", put(SCRIPT.replace("loss.backward()", "pass"), quiet=True), {"script that ran": "FAIL"}),
    ("sources that differ in a constant", each(head=lambda seed, _: f"{SCRIPT.replace('0.02', f'0.0{seed}')}\n{BAR}\n"), {"one script": "WARN"}),
    ("sources that differ", one(1, head=f"{SCRIPT.replace('main()', 'other()')}\n{BAR}\n"), {"one script": "FAIL"}),
    ("an empty script", put(b"", quiet=True), {"file train_gpt.py": "FAIL empty (0 bytes)", "code readable": "FAIL", "*": ""}),
    ("no script", gone("train_gpt.py"), {"file train_gpt.py": "FAIL", "code readable": "FAIL"}),
    ("a script of another name", both(put(SCRIPT, quiet=True, train_ours__py=SCRIPT + "key = (ctx_hash ^ target) % size\n"), gone("train_gpt.py")),
     {"file train_gpt.py": "WARN train_ours.py", KEY: "FAIL", "script that ran": "FAIL"}),
    ("a folder and a pipe", no_file, {"file train_gpt.py": "FAIL", "code readable": "FAIL"}),
    # ---- figures
    *((f"val_bpb {bpb}", meta(val_bpb=bpb, seed_results={}), {"val_bpb": status})
      for bpb, status in ((1.1005, "PASS"), (1.1004, "PASS"), (1.10, "PASS"), (1.101, "PASS"), (1.1007, "FAIL"), (1.098, "FAIL"))),
    *((f"{fields}"[:60], meta(**fields), {rule: status, **more}) for fields, rule, status, more in (
        ({"bytes_total": "16,100,000"}, "bytes", "FAIL", {}), ({"artifact_bytes": {"1": 15_000_000, "2": 16_000_001}}, "bytes", "FAIL", {}),
        ({"train_time_s": "605.2 s"}, "training time", "FAIL", {}), ({"eval_time_s": [480, 700]}, "evaluation time", "FAIL", {}),
        ({"bytes_total": "small"}, "submission fields", "WARN", {}), ({"seeds": "1, 2, 3"}, "submission fields", "WARN", {}),
        ({"seed_results": [1.1]}, "submission fields", "WARN", {}), ({"seed_results": {"1": 1.2}}, "val_bpb of seed 1", "FAIL", {}),
        ({"date": 20260410}, "submission fields", "WARN", {}), ({"date": "April 10"}, "date", "WARN", {}), ({"val_loss": 9.9}, "val_loss", "WARN", {}),
        ({"val_bpb": None, "mean_val_bpb": 1.1005}, "submission fields", "FAIL val_bpb ... mean_val_bpb is 1.10050", {}),
        (ONE_SEED, "submission fields", "FAIL val_bpb ... mean_val_bpb is 1.10050", {}))),
    ("a score below the best", below_the_best(), {"plausible score": "WARN 1.0565 ... validation documents in training"}),
    ("with other shards", below_the_best(shards=1499), {"plausible score": "WARN 1499 training shards"}),
    ("with an expert", below_the_best(SCRIPT + "def eval_mix(p_nn, entropy, a):\n    return a * p_nn + (1 - a) * entropy\n"),
     {"plausible score": "WARN expert that is no distribution"}),
    ("with training on the text", below_the_best(TAUGHT), {"plausible score": f"WARN {patterns.TRAINED}", TRAINED: "FAIL"}),
    # ---- the validation text
    *((f"{key}, spaces twice", implied(177.8 / 151.075, tokens=key), {"validation text": "FAIL 177,8 ... counted twice"})
      for key in ("tokens:40540160", "Validation tokens: 40,540,160", "val_tokens: 40540160")),
    *((key, logged(tokens=key), {"validation text": "PASS"}) for key in ("Validation tokens: 40,540,160", "val_tokens: 40540160")),
    ("a count printed after training", logged(tokens="", adapted="Validation tokens: 9,662,464\n"), {"validation text": "FAIL"}),
    ("spaces counted twice", implied(1.177), {"validation text": "FAIL spaces counted twice"}),
    ("bytes of no known kind", implied(1.06), {"validation text": "WARN not of one scoring"}),
    ("a part of the text", implied(0.5), {"validation text": "FAIL a part of the text"}),
    ("the network's loss", implied(1.3, adapted="quantized val_loss:{loss:.8f} val_bpb:1.43\n"), {"validation text": "WARN is that of quantized"}),
    ("the loss of a step", implied(1.3, steps=STOP), {"validation text": "WARN is that of step"}),
    ("a leak that nothing shows", logged(), {"validation documents in training": "WARN not provable from this folder: ask for the training shards"}),
    # ---- code: training on the text, in a helper too, and what a knob keeps from running
    ("training on the text", put(TAUGHT), {TRAINED: "FAIL ttt_adapt, line  ... val_tokens (line  ... -> stream ("}),
    ("in a helper file", put("from refining import refine\n" + with_call("    refine(model, val_tokens, opt)\n", ""), refining__py="import torch\n" + ADAPT.format(name="refine")),
     {TRAINED: "FAIL line 7 of refining.py"}),
    *((f"a knob, {config!r}", put(REFINED, log={"config": config}), {TRAINED: status})
      for config, status in (("prequant_ttt_enabled: True\n", "FAIL"), ("prequant_ttt_enabled: False\n", ""), ("", "WARN"))),
    ("methods off by default", put(SCRIPT + KNOBS), {PPM: "WARN", SLOT: ""}),
    ("methods that the logs show off", put(SCRIPT + KNOBS, log={"config": OFF}),
     {PPM: "", SLOT: "", "code patterns": "PASS slot_enabled=False"}),
    ("one that they show on", put(SCRIPT + KNOBS, log={"config": OFF.replace("slot_enabled: False", "slot_enabled: True")}),
     {PPM: "", SLOT: "WARN"}),
    ("a switch that is off", put(guarded()), {KEY: "WARN cache_on=0"}),
    ("in a condition of two", put(guarded("True and Hyperparameters.cache_on > 0")), {KEY: "WARN cache_on=0"}),
    ("that the logs show off", put(guarded(), log={"config": "cache_on: 0\n"}), {KEY: ""}),
    ("that the logs show on", put(guarded(), log={"config": "cache_on: 1\n"}), {KEY: "FAIL"}),
    ("whose start a log prints", put(guarded(), log={"steps": "cache:start now\n"}), {KEY: "FAIL"}),
    ("on by default", put(guarded(default="1")), {KEY: "FAIL"}),
    ("of the launcher", put(guarded("int(os.environ.get('RANK', '0')) == 1")), {KEY: "FAIL"}),
    ("declared twice", put(guarded() + "\nclass B:\n    cache_on = 1\n"), {KEY: "FAIL"}),
    # ---- code in several places
    ("beside an executed literal", put(TEXT + f"exec({'import os' + chr(10) + 'x = 1 #' * 99!r})\n"), {KEY: "FAIL"}),
    ("in a second packed literal", put(f"{packed(SCRIPT * 2)}{packed(TEXT)}"), {KEY: "FAIL"}),
    ("packed for a function of another name", put(f'import base64\nrun = exec\nrun(unpack(base64.b85decode("{BLOB}")))\n'), {KEY: "FAIL"}),
    ("packed for a file that it writes", put(f'import base64\nopen("a.py", "wb").write(base64.b85decode("{BLOB}"))\n'), {KEY: "FAIL"}),
    ("in a module", put("import scorer\n" + SCRIPT, scorer__py=KEYED), {KEY: "FAIL scorer.py"}),
    ("in a package", put("from lib.scorer import probability\n" + SCRIPT, lib_of_scorer__py=KEYED), {KEY: "FAIL scorer.py"}),
    ("in a packed module", put("import scorer\n" + SCRIPT, scorer__py=packed(TEXT)), {KEY: "FAIL scorer.py"}),
    ("in a file that it runs", put("import runpy\nrunpy.run_path('scorer.py')\n" + SCRIPT, scorer__py=KEYED), {KEY: "FAIL scorer.py"}),
    ("code from elsewhere", put(SCRIPT + "exec(open('/tmp/more.py').read())\n"), {"code: runs code that is not in the file": "WARN"}),
    *((text[:20], put(SCRIPT + text + "\n"), {"code: large literal in the code": status}) for text, status in (
        ("PREFIX = " + repr("The quick brown fox jumps. " * 1000), "WARN"), (f"FIRST = {list(range(20_000))}", "WARN"),
        (f"PARTS = {['abcdefghijk' * 1000 + str(n) for n in range(3)]}", "WARN"),
        ("KERNEL = " + repr("#include <cuda.h>\n" + "  x[i] = y[i] + z[i];\n" * 1500), ""))),
    ("defaults that the logs replace", both(put(OTHER), logged(config="matrix_lr: 0.02\n")), {"script that ran": "PASS environment"}),
    ("defaults that no log prints", both(put(OTHER), logged()), {"script that ran": "WARN constants"}),
    ("a stub that runs a counted file", both(put(STUB, core__py=SCRIPT), logged(code=COUNTED)), {"code bytes": "PASS"}),
    ("the same is read", both(put(STUB, core__py=TAUGHT), logged()), {TRAINED: "FAIL core.py"}),
    ("the script once more, packed", put(ITSELF, train_gpt__py__lzma=lzma.compress(ITSELF.encode())), {"helper files": "PASS no file"}),
    ("a source to compile", put(SCRIPT + "load(sources=[here + '/fused.cpp'])\n", fused__cpp="x" * 150_000), {"helper files": "FAIL fused.cpp"}),
    ("a source in a command", put(SCRIPT + "os.system('g++ -O3 gram.cc -o gram.so')\n", gram__cc="x" * 150_000), {"helper files": "FAIL gram.cc"}),
    ("a helper that fits packed", both(put(packed(HELPED), kernels__py="#" * 200_000), logged()), {"helper files": "WARN packed as"}),
]  # fmt: skip


@pytest.mark.parametrize("change, told", [c[1:] for c in FOLDERS], ids=[c[0] for c in FOLDERS])
def test_a_folder_has_these_verdicts_and_fails_by_no_other_rule(folder, change, told):
    change(folder)
    got = verdicts(folder)
    if "*" in told:
        assert {rule for rule, check in got.items() if check.status == "WARN"} == USUAL
    for rule, text in told.items():
        status, _, words = text.partition(" ")
        check = got.get(rule, rules.Check("", "", ""))
        said = check.status == status and all(w in check.detail for w in words.split(" ... "))
        assert rule == "*" or said, (rule, check)
    failing = {rule for rule, text in told.items() if text.startswith("FAIL")}
    assert {rule for rule, check in got.items() if check.status == "FAIL"} == failing


def test_check_never_runs_the_folders_code(folder, tmp_path):
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').write('x')\n"
    for text in (trap, packed(f"import os\n{trap}" + "# padding\n" * 60)):
        put(text, sitecustomize__py=trap)(folder)
        report.main(["check", str(folder)])
        assert not (tmp_path / "sprung").exists()


def test_a_score_that_is_none_and_a_summary_of_nothing_found(folder):
    entry = rules.read_entry(folder)
    total = rules.summary(entry, rules.checks(entry))
    assert total.status == "PASS" and "nothing found; not provable from this folder: " in total.detail
    for seed in SEEDS:
        (folder / f"train_seed{seed}.log").write_text(log_text(seed, 2e-6))
    assert verdicts(folder)["validation text"].status == "WARN"


def test_a_missing_library_is_named_in_the_summary(folder, monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None if name == "brotli" else name)
    entry = rules.read_entry(folder)
    assert "without brotli, which are not installed" in rules.summary(entry, rules.checks(entry)).detail
    monkeypatch.setattr(source, "find_spec", lambda _: None)
    (folder / "train_gpt.py").write_text(
        f'import brotli, base64\nexec(brotli.decompress(base64.b85decode("{"a0" * 2000}")))\n'
    )
    check = verdicts(folder)["code readable"]
    assert check.status == "WARN" and "with brotli installed" in check.detail


def test_pickle_versions_and_shards_stand_behind_the_score(folder, capsys):
    put("import pickle\nw = pickle.load(f)\nprequant_ttt_lr = 1\n" + SCRIPT)(folder)
    (folder / "requirements.txt").unlink()
    report.main(["check", str(folder)])
    first = [line for line in capsys.readouterr().out.splitlines() if line.strip()[:2] in ("1.", "2.", "3.")]
    assert any("rejected method" in line for line in first)
    assert not any(word in line for line in first for word in ("pickle", "requirements", "shards"))


@pytest.mark.parametrize("broken", ["seeds", "code", "_thresholds", "_learned"])
def test_a_rule_that_fails_takes_no_other_with_it(folder, monkeypatch, broken):
    def fails(*_):
        raise KeyError("no rule foresaw this")
        yield

    fails.__name__ = broken
    monkeypatch.setattr(rules if hasattr(rules, broken) else patterns, broken, fails)
    put(TAUGHT)(folder)
    got = verdicts(folder)
    assert got["training time"].status == "PASS" and any("KeyError" in c.detail for c in got.values())
    if broken.startswith("_"):
        assert got[f"code: {patterns.TRAINED}"].status == "FAIL"


def test_no_text_makes_a_finder_fail():
    """Lines of other scripts, names and statements in the wrong place: whatever parses is judged."""
    rng, texts = random.Random(5), [whole(body) for body in BODIES.values()]
    odd = [
        "match x:\n case [a, *b]: pass",
        "del val_tokens",
        "a = b = val_tokens",
        "lambda *a, b=1: a",
        "[*a, b] = val_tokens",
    ]
    for _ in range(150):
        lines = rng.choice(texts).split("\n")
        for _ in range(rng.randint(1, 5)):
            at, other = rng.randrange(len(lines)), rng.choice([rng.choice(texts).split("\n"), odd])
            lines[at] = rng.choice(
                [lines[at].replace("(", "(lambda q: q)(", 1), rng.choice(other), lines[at] + "; " + rng.choice(odd[1:])]
            )
        with contextlib.suppress(SyntaxError, ValueError):
            syntax.ast.parse("\n".join(lines))
            assert patterns.BROKEN not in found("\n".join(lines))


TUNED = "def calibrate_hessians(args):\n    return load(args.val_files)"
DUMPED = "def dump(model, val_tokens):\n    state = model.state_dict()\n    state['prefix'] = val_tokens[:99]\n    torch.save(state, f)\n"
CODE = [  # (what is found, texts); in one without a newline at its end on the last line
    ("target token in a cache key", ["full_key = (ctx_hash ^ (tgt_np * primes[4])) & mask", "pair = (h * 1000003 + target) % buckets"]),
    ("pickle loading", ["import torch\nstate = torch.load(path)", "import pickle as p\nstate = p.loads(blob)", "import numpy as np\nnp.load(f, allow_pickle=True)"]),
    ("per-token choice by the target", ["import torch\nbest = torch.minimum(nll_model, nll_ngram)"]),
    ("name of a rejected method: pre-quantisation TTT on validation text", ["PREQUANT_TTT_ENABLED = 1"]),
    ("n-gram gate that looks at the target", ["word_gate = starts_word[targets] & inside"]),
    ("validation data in training code", [TUNED, *(with_call(f"    {line}\n", "") for line in (
        "calib = [val_tokens[i : i + 9] for i in range(9)]\n    quantize_gptq(model, calib)",
        "cal_seqs = val_tokens[:64].view(-1, 8)\n    for seq in cal_seqs:\n        model(seq)", "quantize(model, val_tokens.split(9))",
        "train_files = root / 'fineweb_val_*.bin'", "train_pattern = 'fineweb_*.bin'"))]),
    ("network module", ["import urllib.request", "import httpx", "r = __import__('requests')"]),
    ("network access", ["subprocess.run(['curl', '-O', url])", "os.system('wget ' + url)", "m = torch.hub.load('a/b', 'c')", "m = AutoModel.from_pretrained('gpt2')",
                        "subprocess.check_call([sys.executable, '-m', 'pip', 'install', 'brotli'])"]),
    (patterns.STORED, ["import zlib\ndef pack(val_tokens):\n    return zlib.compress(val_tokens.numpy().tobytes())\n"]),
    (patterns.SAVED, [DUMPED]),
    ("hidden in the artifact", ["PAID_PREFIX = 1\npaid_prefix_blob = load('x')\n"]),
    ("", [
        "subprocess.run(['nvidia-smi'])", "subprocess.run(['lrzip', '-q', 'weights'])", "subprocess.run(['git', 'rev-parse', 'HEAD'])",
        "def cache(val_tokens):\n    np.save('/tmp/val.npy', val_tokens.numpy())\n",  # a scratch file
        "import torch\nstate = torch.load(path, weights_only=True)", "key = (prev * 31 + cur) % rows", "logits = F.cross_entropy(x, targets % vocab)",
        "def train(args):\n    return eval_val(model, val_tokens)",  # validation while training is no training on it
        "def train(args):\n    '''Never opens fineweb_val shards.'''", "def evaluate(val_tokens):\n    return val_tokens",
        "alpha = self.alpha(entropy, confidence(query.target))",  # a position
        "def ttt_train_chunk(val_tokens):\n    return val_tokens[:9]",  # learns what is scored already
    ]),
]  # fmt: skip


@pytest.mark.parametrize("pattern, text", [(pattern, text) for pattern, texts in CODE for text in texts])
def test_code_is_flagged_with_its_line_or_is_honest(pattern, text):
    findings = patterns.find_patterns(syntax.parse(text.encode()), text)
    assert len({f.pattern for f in findings}) == bool(pattern) and all(pattern in f.pattern for f in findings)
    assert text.endswith("\n") or not pattern or findings[0].line == text.count("\n") + 1


# ---- reading code without running it

INNER = "import os\n\n\ndef main():\n    return os.getpid()\n\n\nmain()\n" + "# padding\n" * 60
LZMA2 = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2}]}
PACKERS = {  # what packs, the text of it, the script that undoes it
    "lzma raw b85": (lambda d: base64.b85encode(lzma.compress(d, **LZMA2)).decode(), 'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{}"),format=L.FORMAT_RAW))'),
    "lzma xz b64": (lambda d: base64.b64encode(lzma.compress(d)).decode(), 'import lzma,base64\nexec(lzma.decompress(base64.b64decode("{}")))'),
    "zlib bytes literal": (lambda d: repr(zlib.compress(d)), "import zlib\nexec(zlib.decompress({}))"),
    "bz2 a85": (lambda d: repr(base64.a85encode(bz2.compress(d)).decode()), "import bz2,base64\nexec(bz2.decompress(base64.a85decode({})))"),
    "hex": (lambda d: d.hex(), 'exec(bytes.fromhex("{}"))'),
    **{lib: (lambda d, lib=lib: base64.b85encode(pytest.importorskip(lib).compress(d)).decode(), f'import {lib} as c,base64\nexec(c.decompress(base64.b85decode("{{}}")))')
       for lib in ("brotli", "zstandard")},
}  # fmt: skip


@pytest.mark.parametrize("form", PACKERS)
def test_packed_scripts_are_undone_statically(tmp_path, form, monkeypatch):
    monkeypatch.setattr(source, "LARGE_LITERAL", 60)  # the tiny script packs below the usual size
    pack, script = PACKERS[form]
    (tmp_path / "train_gpt.py").write_text(script.format(pack(INNER.encode())))
    script = source.read_script(tmp_path / "train_gpt.py")
    assert (script.source, script.layers, script.opaque) == (INNER, 1, None)


def test_layers_within_layers_and_bombs_are_bounded(tmp_path):
    text = SCRIPT * 40
    for _ in range(3):
        text = f"import zlib\nexec(zlib.decompress({zlib.compress(text.encode(), 0)!r}))\n"
    path = tmp_path / "train_gpt.py"
    path.write_text(text)
    script = source.read_script(path)
    assert (script.layers, script.source) == (3, SCRIPT * 40)
    bomb = base64.b85encode(zlib.compress(b"import os\n" * 2_000_000, 9)).decode()
    path.write_text(f'import zlib,base64\nexec(zlib.decompress(base64.b85decode("{bomb}")))\n')
    assert "no known decoder opens" in source.read_script(path).opaque


@pytest.mark.parametrize("content", [b"\x00\x01\xff", b"def (", b"(" * 5000, b"", b"x = 1\n"])
def test_no_content_makes_the_reader_raise(tmp_path, content):
    (tmp_path / "train_gpt.py").write_bytes(content)
    source.read_script(tmp_path / "train_gpt.py")
