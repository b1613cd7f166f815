"""tools/pack_code.py: the packed script is the same program, and its bytes are those that count."""

import ast
import builtins
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_PACKING, events, packed_code, process_env

import train_gpt as tg
from tools import pack_code

ROOT = Path(tg.__file__).parent
PACKED = packed_code()


class Bare(ast.NodeTransformer):
    """A syntax tree without docstrings, texts of knobs, and annotations of functions, variables and results."""

    def body_of(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node, False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if not isinstance(node, ast.ClassDef):
            node.body = [
                ast.Assign([n.target], n.value, lineno=0) if isinstance(n, ast.AnnAssign) and n.value else n
                for n in node.body
            ]
        return node

    visit_Module = visit_ClassDef = body_of

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.body_of(node)

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "id", "") in ("knob", "Dead"):
            node.args[2 if node.func.id == "knob" else 0] = ast.Constant("")
        return node

    def visit_If(self, node):
        self.generic_visit(node)
        return ast.Pass() if ast.unparse(node.test) == "not PACKED" else node


def test_stripped_source_runs_the_same_statements():
    source = tg.source_text()
    stripped = pack_code.strip_source(source)
    assert pack_code.strip_source(stripped) == stripped
    assert len(stripped) < 0.8 * len(source)
    assert ast.dump(Bare().visit(ast.parse(stripped))) == ast.dump(Bare().visit(ast.parse(source)))


STRIPPED = '''"""Head.

more
"""
x: dict[str, int] = """a # no comment

  b"""  # gone


# ---- kept
class E(Exception):
    """Only this."""


class Fields(NamedTuple):
    """Gone."""

    ä: int  # gone
    b: str = "é"

    def f(self, ö: dict[str, "->"], *rest: int, key: Callable[[int], int] = int, **more) -> tuple[int, str]:
        """Gone."""
        y: list[
            int
        ] = [1]
        z: int
        return y  # gone

@jit
def kernel(BLOCK: constexpr) -> int:
    return BLOCK
'''


def test_what_strip_removes_and_what_it_keeps():
    assert (
        pack_code.strip_source(STRIPPED)
        == '''"""Head.

"""
x="""a # no comment

  b"""
class E(Exception):
 pass
class Fields(NamedTuple):
 ä:int
 b:str="é"
 def f(self,ö,*rest,key=int,**more):
  y=[1]
  z:int
  return y
@jit
def kernel(BLOCK:constexpr)->int:
 return BLOCK
'''
    )


def test_shorter_names_are_the_same_program():
    """Trees differ in names alone: what the script defines has one new name everywhere, one that nothing else has; locals have one
    to one new names in each function, onto names that it does not use."""
    source = pack_code.strip_source(tg.source_text())
    short = pack_code.shorten_names(source)
    assert pack_code.shorten_names(short) == short and len(short) < 0.9 * len(source)
    before, after = ast.parse(source), ast.parse(short)
    defined = (ast.FunctionDef, ast.ClassDef)
    top = {a.name: b.name for a, b in zip(before.body, after.body, strict=True) if isinstance(a, defined)}
    top |= {a.id: b.id for n, m in zip(before.body, after.body, strict=True) if isinstance(n, (ast.Assign, ast.AnnAssign))
            for a, b in zip(ast.walk(n), ast.walk(m), strict=True) if isinstance(a, ast.Name) and isinstance(a.ctx, ast.Store)}  # fmt: skip
    moved = {old: new for old, new in top.items() if old != new}
    used = {getattr(n, "id", getattr(n, "arg", getattr(n, "name", None))) for n in ast.walk(before)}
    assert len(moved) > 300 and len(set(moved.values())) == len(moved) and not used & set(moved.values())
    assert not {"Config", "ConfigError", "main"} & set(moved)
    for old, new in zip(before.body, after.body, strict=True):
        if isinstance(old, defined):
            new.name = old.name
    functions = [f for node in zip(before.body, after.body, strict=True)
                 for f in ([node] if isinstance(node[0], ast.FunctionDef) else zip(*(getattr(n, "body", []) for n in node), strict=True))]  # fmt: skip
    given = {k.arg for n in ast.walk(before) if isinstance(n, ast.Call) for k in n.keywords}
    name_of = lambda n: n.id if isinstance(n, ast.Name) else n.arg  # noqa: E731
    for old, new in functions:
        both = zip(ast.walk(old), ast.walk(new), strict=True)
        pairs = [(a, b) for a, b in both if isinstance(a, (ast.Name, ast.arg))]
        names = {name_of(a): name_of(b) for a, b in pairs}
        assert len(set(names.values())) == len(names) and all(names[name_of(a)] == name_of(b) for a, b in pairs)
        assert all(names[a] == moved[a] for a in names.keys() & moved.keys())
        changed = {a for a, b in names.items() if a != b and a not in moved}
        assert changed <= {name_of(a) for a, _ in pairs if isinstance(a, ast.arg) or isinstance(a.ctx, ast.Store)}
        fixed = given | {*dir(builtins), *vars(tg)}
        assert not changed & fixed and not {names[a] for a in changed} & ({*dir(builtins), *vars(tg)} | names.keys())
        for a, b in pairs:
            setattr(b, "id" if isinstance(a, ast.Name) else "arg", name_of(a))
    back = {new: old for old, new in moved.items()}
    for b in ast.walk(after):
        if isinstance(b, ast.Name):
            b.id = back.get(b.id, b.id)
    assert ast.dump(before) == ast.dump(after)


def test_any_bytes_survive_as_a_literal_of_a_latin_1_file():
    rng = np.random.default_rng(0)
    for data in (bytes(range(256)) * 2, b"\0001\0\r\n\\\"'", b"", rng.bytes(3000)):
        code = b"#coding:latin-1\nx=" + tg.as_literal(data) + b'.encode("latin-1")'
        space: dict = {}
        exec(compile(code, "packed", "exec"), space)
        assert space["x"] == data and len(tg.as_literal(data)) < 1.03 * len(data) + 12


def test_the_checker_reads_the_packed_script_without_running_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(tg.__file__).parent / "records"))
    from check import source

    path = tmp_path / "train_gpt.py"
    path.write_bytes(PACKED)
    script = source.read_script(path)
    assert script.source == pack_code.minify(tg.source_text()) and script.layers == 1 and script.opaque is None
    assert path.stat().st_size <= 79_000


ASK_THE_PACKED = """
import contextlib, inspect, io, json, os, traceback
import train_gpt

def run(*args, **more):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train_gpt.main(list(args), {**os.environ, **more})
    return status, out.getvalue(), err.getvalue()

try:
    train_gpt.main(1, 2)
except TypeError:
    trace = traceback.format_exc()
print(json.dumps({"help": run("--help"), "trace": trace, "bad": run(NUM_HEADS="3", MUON_MOMENTUN="1"),
                  "main": inspect.getsource(train_gpt.main), "text": train_gpt.__source__}))
"""


def run_tool(*args, text=b""):
    return subprocess.run([sys.executable, ROOT / "tools/pack_code.py", *args], input=text, capture_output=True)


def test_packed_script_behaves_like_its_source(tmp_path, script):
    """Help, configuration, error and exit status; tracebacks show real lines."""
    bad, env = {"NUM_HEADS": "3", "MUON_MOMENTUN": "1"}, {"PATH": os.environ["PATH"], "LOG_DIR": str(tmp_path)}
    (tmp_path / "train_gpt.py").write_bytes(PACKED)
    asked = subprocess.run(
        [sys.executable, "-c", ASK_THE_PACKED], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    told = json.loads(asked.stdout)
    assert told["bad"] == [2, "", script({**env, **bad}).err]
    knobs = [[line.split()[0] for line in text.splitlines() if line.startswith(("  ", "["))]
             for text in (script({}, "--help").out, told["help"][1])]  # fmt: skip
    assert knobs[0] == knobs[1] and "[8" in knobs[1]  # the packed form leaves out what each knob does
    quoted = [line.strip() for line in told["trace"].splitlines() if line.startswith("    ") and "^" not in line][-1]
    assert told["text"] == pack_code.minify(tg.source_text()) and quoted in told["text"], "a traceback quotes the line"
    assert told["main"].startswith("def main("), "as Triton and torch.compile ask for a function's source"
    assert "pack_code.py" not in told["text"], "the packed form looks for no tool"


def test_the_tool_writes_what_the_script_counts_and_refuses_what_it_cannot_pack(tmp_path):
    script, out = ROOT / "train_gpt.py", tmp_path / "packed.py"
    assert run_tool(script, "-o", out).returncode == 0 and out.read_bytes() == PACKED
    assert run_tool("-", text=script.read_bytes()).stdout == PACKED
    again = run_tool(script, "-o", out)
    assert again.returncode == 2 and b"--force" in again.stderr
    assert run_tool(script, "-o", out, "--force").returncode == 0
    for text, word in (
        (PACKED, b"not a script"),
        (b"def f(:", b"not a script"),
        (b"\xff\xfe", b"not a script"),
        (b"x = 1", b"as_literal"),
    ):
        done = run_tool("-", text=text)
        assert done.returncode == 2 and word in done.stderr and b"Traceback" not in done.stderr and not done.stdout
    for args in ((tmp_path / "none.py",), (script, "-o", tmp_path / "no" / "x.py"), (tmp_path,)):
        done = run_tool(*args)
        assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["packed.py"]


@pytest.mark.parametrize("form", ["packed", "readable", "alone", "source", "broken"])
def test_what_is_counted(form, tiny, script, tmp_path, monkeypatch):
    """The packed file's own bytes; a readable one's packed form; without the tool its text, compressed; CODE_FORM=source: the file."""
    monkeypatch.setattr(tg, "__source__", tg.source_text(), raising=False)
    for name, real in REAL_PACKING.items():
        monkeypatch.setattr(tg, name, real)
    monkeypatch.setattr(tg, "PACKED", form == "packed")
    monkeypatch.setattr(tg, "SCRIPT", tmp_path / "train_gpt.py")
    tg.SCRIPT.write_bytes(PACKED if form == "packed" else (ROOT / "train_gpt.py").read_bytes())
    (tmp_path / "tools").mkdir()
    if form in ("readable", "source", "packed"):
        shutil.copy(ROOT / "tools/pack_code.py", tmp_path / "tools")
    if form == "broken":
        (tmp_path / "tools/pack_code.py").write_text("raise SystemExit('out of order')")
    tg.script_bytes.cache_clear()
    ran = script({**tiny, "ITERATIONS": "1", "CODE_FORM": "source" if form == "source" else "packed"})
    tg.script_bytes.cache_clear()
    assert tg.Run.packing is None or tg.Run.packing.wait(timeout=30) is not None
    if form == "broken":
        assert ran.status == 2 and "out of order" in ran.err and "CODE_FORM=source" in ran.err
        return
    counted = {"packed": PACKED, "readable": PACKED, "alone": tg.self_extracting(tg.source_text())}
    code = counted.get(form, (ROOT / "train_gpt.py").read_bytes())
    told, pack = events(tiny, "run")[0], events(tiny, "pack")[0]
    assert (told["packed_bytes"], pack["code_bytes"]) == (len(code), len(code)) and ran.status == 0
    assert told["packed_sha256"] == hashlib.sha256(code).hexdigest()
    assert told["source_sha256"] == hashlib.sha256(tg.source_text().encode()).hexdigest()
    assert ("tools/pack_code.py" in ran.out) == (form == "alone")


def test_packed_script_trains_the_same_artifact_to_the_same_score(tiny, script, tmp_path):
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes(PACKED)
    torch.set_num_threads(1)
    ours = {**tiny, "GPTQ_ENABLED": "1", "GPTQ_N_SAMPLES": "4", "CODE_FORM": "packed"}
    theirs = {**ours, "LOG_DIR": str(tmp_path / "packed")}
    first = script(ours)
    command = [sys.executable, packed]
    second = subprocess.run(command, env=process_env(theirs), cwd=tmp_path, capture_output=True, text=True)
    assert (first.status, second.returncode) == (0, 0), second.stderr
    assert re.search(r"^loaded the artifact load_time:\d+\.\d\ds dtype:float32 peak_memory:\d+MiB$", first.out, re.M)
    outcomes = [(Path(env["LOG_DIR"], "tiny.pgz").read_bytes(), re.search(r"^score (.*) train_time", out, re.M)[1],
                 events(env, "run")[0]["packed_sha256"]) for env, out in ((ours, first.out), (theirs, second.stdout))]  # fmt: skip
    assert outcomes[0] == outcomes[1] and outcomes[0][2] == hashlib.sha256(packed.read_bytes()).hexdigest()
