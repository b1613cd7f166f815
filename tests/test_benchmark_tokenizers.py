"""benchmarks/tokenizers.py: sets are made once, runs are made once, and validation documents are nowhere in them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SEQ, documents

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "tokenizers.py"
bench = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("benchmark_tokenizers", PATH))
spec.loader.exec_module(bench)  # under a name of its own: "tokenizers" is also a package

TINY = (f"NUM_LAYERS=2 BIGRAM_VOCAB_SIZE=0 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN={SEQ} TRAIN_BATCH_TOKENS={4 * SEQ} ITERATIONS=2 "
        "WARMUP_STEPS=1 EVAL_STRIDE=0 NGRAM_SCORE=off NGRAM_TABLE=none COMPILE=0")  # fmt: skip


def test_one_set_from_documents_to_the_table(tmp_path, capsys):
    texts = ["never used"] * 3 + documents(1, 120)
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = [str(source), "--work", str(tmp_path / "work"), "--skip", "3", "--held-out", "20", "--sets", "fused:300"]
    argv += ["--seconds", "30", "--seeds", "1", "--knobs", TINY]
    assert bench.main(argv) == 0
    assert "never used" not in (tmp_path / "work" / "documents.jsonl").read_text()
    manifest = json.loads((tmp_path / "work" / "fused_300" / "manifest.json").read_text())
    assert manifest["transform"] == "caseops"
    assert manifest["val"]["documents"] == 20
    assert manifest["train"]["documents"] == 100
    log = next((tmp_path / "work" / "logs").glob("*.txt")).read_text()
    assert f"val_bytes:{manifest['val']['bytes']} bytes_from:sidecar" in log  # of the original text
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [cell.strip() for cell in row[1:3]] == ["fused", "300"] and 0 < float(row[7]) < 9
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "logs").iterdir()}
    assert bench.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "logs").iterdir()} == logs
    assert capsys.readouterr().out.splitlines()[-1].split("|") == row
    with pytest.raises(bench.InputError, match="begun with"):
        bench.main([*argv, "--skip", "4"])
    with pytest.raises(bench.InputError, match="begun with"):  # its sets have 20 validation documents
        bench.main([*argv, "--held-out", "19"])


def test_the_transform_s_benchmark_names_a_file_that_is_not_there(tmp_path):
    command = [sys.executable, PATH.with_name("transform.py"), tmp_path / "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.jsonl" in done.stderr


def test_a_set_is_a_form_and_a_number(capsys):
    for word in ("fused", "fused:", "cased:1024", "plain:x"):
        with pytest.raises(SystemExit):
            bench.main(["a.jsonl", "--work", "x", "--sets", word])
        assert f"{word}: expected a set such as fused:2048" in capsys.readouterr().err
