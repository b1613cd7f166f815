"""The file as a file: its map is true, it reads from top to bottom, and it touches the outside only where it says."""

from __future__ import annotations

import ast
import re

from conftest import SCRIPT

import train_gpt as tg

SOURCE = SCRIPT.read_text()
TREE = ast.parse(SOURCE)
BANNERS = [(int(n), name, SOURCE[: m.start()].count("\n") + 1)
           for m in re.finditer(r"^# ==== (\d+) ([A-Z]+) =+$", SOURCE, re.M) for n, name in [m.groups()]]  # fmt: skip


DOORWAY_FIRST = {8, 9}  # the container and the codec read from their doorways down: `pack`, `unpack`, `Codec`


def section_of(line: int) -> int:
    return max((n for n, _, start in BANNERS if start <= line), default=0)


def test_the_table_of_contents_is_the_banners(script):
    listed = re.findall(r"^    (\d+) ([A-Z]+)  +\S", tg.__doc__, re.M)
    assert [(int(n), name) for n, name in listed] == [(n, name) for n, name, _ in BANNERS]
    assert [n for n, _, _ in BANNERS] == list(range(11))
    printed = re.findall(r"^ *(\d+)  (\d+) ([A-Z]+)$", script({}, "--toc").out, re.M)
    assert [(int(n), name, int(line)) for line, n, name in printed] == BANNERS


def uses(node: ast.AST):
    """Names that a definition reads when it runs; annotations are for people."""
    for part, value in ast.iter_fields(node):
        if part in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
                yield child.id
            elif isinstance(child, ast.AST):
                yield from uses(child)


def local_names(node: ast.AST) -> set[str]:
    """Arguments and variables of functions inside a definition."""
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def definitions() -> list[tuple[ast.stmt, set[str]]]:
    """Top-level statements with the names they define."""
    found = []
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node, {node.name}))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.append((node, {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}))
    return found


def test_names_are_used_only_below_their_definition():
    at = {name: node.lineno for node, names in definitions() for name in names}
    ahead = [f"line {node.lineno}: {', '.join(sorted(names))} uses {used}, defined in line {at[used]}"
             for node, names in definitions() for used in sorted(set(uses(node)) - local_names(node))
             if at.get(used, 0) > node.lineno and section_of(node.lineno) not in DOORWAY_FIRST]  # fmt: skip
    assert not ahead, "\n".join(ahead)


def test_the_environment_is_read_only_in_head_config_and_runtime_and_handed_in_by_main():
    reads = [node.lineno for node in ast.walk(TREE)
             if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")]  # fmt: skip
    main_call = next(node.lineno for node in TREE.body if isinstance(node, ast.If))
    outside = [line for line in reads if section_of(line) not in (0, 1, 2) and line <= main_call]
    assert not outside and len([line for line in reads if line > main_call]) == 1


def test_everything_public_says_what_it_is():
    silent = [f"{node.name} (line {node.lineno})" for node in TREE.body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
              and len(node.body) > 1 and not ast.get_docstring(node)]  # fmt: skip
    assert not silent, silent


def test_only_the_modules_of_the_field_are_imported():
    roots = {
        alias.name.split(".")[0] for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {node.module.split(".")[0] for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    known = set(tg.sys.stdlib_module_names) | {"torch", "numpy", "sentencepiece", "zstandard", "constriction"}
    assert roots <= known, roots - known


def test_no_pickle_is_loaded():
    loads = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert loads
    assert all(any(k.arg == "weights_only" and k.value.value is True for k in call.keywords) for call in loads)
    assert "pickle" not in {
        alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names
    }


def test_the_quick_start_is_two_lines_that_install_what_is_there():
    text = (SCRIPT.parent / "README.md").read_text()
    start = text[text.index("## Quick start") :]
    blocks = re.findall(r"^```bash\n(.*?)^```", start[: start.index("\n## ", 1)], re.M | re.S)
    assert len(blocks) == 2 and all(block.count("\n") == 1 for block in blocks)
    assert "python train_gpt.py" in blocks[0] and "pytest" in blocks[1]
    named = re.findall(r"-r (\S+)", text) + re.findall(r"python ((?:data|records|benchmarks|tools)/\S+\.py)", text)
    assert named and all((SCRIPT.parent / name).is_file() for name in named)


def test_every_knob_the_readme_sets_exists():
    text = (SCRIPT.parent / "README.md").read_text()
    knobs = set(re.findall(r"\b([A-Z][A-Z0-9_]{3,})=", text)) - {"HOST", "TORCHELASTIC_SIGNALS_TO_HANDLE"}
    assert len(knobs) > 5 and knobs <= tg.FIELDS.keys(), knobs - tg.FIELDS.keys()


def test_benchmarks_and_tools_speak_of_what_is_there():
    for path in sorted(p for folder in ("benchmarks", "tools") for p in (SCRIPT.parent / folder).glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        ours = {a.asname for n in nodes if isinstance(n, ast.Import) for a in n.names if a.name == "train_gpt"}
        used = {n.attr for n in nodes
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in ours}  # fmt: skip
        assert all(hasattr(tg, name) for name in used), (path.name, [n for n in used if not hasattr(tg, n)])
        keys = [k.value for n in nodes if isinstance(n, ast.Dict) for k in n.keys if isinstance(k, ast.Constant)]
        knobs = {k for k in keys if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", str(k))}
        assert knobs <= tg.FIELDS.keys(), (path.name, knobs - tg.FIELDS.keys())
