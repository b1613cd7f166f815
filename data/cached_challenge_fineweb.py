#!/usr/bin/env python3
"""Download published FineWeb shards and their tokenizer.

    python data/cached_challenge_fineweb.py --variant sp1024 --train-shards 80
    python data/cached_challenge_fineweb.py --list
    python data/cached_challenge_fineweb.py --variant sp8192 --repo kevclark/parameter-golf
    python data/cached_challenge_fineweb.py --make-caseops --vocab-size 8192 --train-shards 80

The first line fills data/datasets/fineweb10B_sp1024 and data/tokenizers. The validation split always comes whole, with
its byte counts where an export has them; of the training shards come the first N, in the order of the export.

The last line fetches the documents themselves and makes shards of case-factored text with fused markers from them
(make_shards.py --caseops) on all cores: the first 50,000 documents are validation, as in every export.

What exists is read from the hub, not from a list kept here: EXPORTS only says where to look first. Every file is
compared with the hub's size and hash, and a shard's header with its size, before it gets its name; a good file is not
fetched again, so a run that was stopped is simply started again. Without --repo (or MATCHED_FINEWEB_REPO_ID), exports
known to carry the variant are tried first, then the others. HF_ENDPOINT and HF_TOKEN work as everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import make_shards
import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from make_shards import OFFICIAL_VAL_DOCS
from shards import (
    HEADER_BYTES,
    Failure,
    InputError,
    check_shard,
    locked,
    run_tool,
    sha256_of,
    sync_folder,
    write_synced,
)
from tqdm import tqdm

DEFAULT_TRAIN_SHARDS = 80
DOCUMENTS = "docs_selected.jsonl"
LAYOUTS = {
    "nested": "{root}/datasets/fineweb10B_{variant}",  # the challenge's own: beside it {root}/tokenizers
    "flat": "fineweb_{variant}",
}
ALIASES = {"sp8192_caseops": "sp8192_lossless_caps_caseops_v1_reserved"}


class Export(NamedTuple):
    """A published repository: its layout, and the variants that people were able to use from it."""

    repo: str
    layout: str
    variants: tuple[str, ...]


EXPORTS = (
    Export("willdepueoai/parameter-golf", "nested", ("sp1024",)),
    Export("kevclark/parameter-golf", "nested", ("sp8192", "sp4096")),
    Export("LightSpeedUp/parameter-golf-data", "flat",
           ("sp1024", "sp4096", "sp8192", "sp12288", "sp16384", "byte260", "scylla", "scylla_v2")),
    Export("romeerp/parameter-golf-caseops-v1", "nested", (ALIASES["sp8192_caseops"],)),
)  # fmt: skip


# ---- what a repository holds


class RepositoryError(InputError):
    """The hub answered that this one repository cannot be read; others may be."""


class Remote(NamedTuple):
    """A file on the hub: its digest is "sha256:..." or, for small files kept in git, "git:..."."""

    path: str
    size: int
    digest: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


class Variant(NamedTuple):
    """One tokenisation of the text as a repository holds it, each list in file name order."""

    name: str
    folder: str
    train: list[Remote]
    val: list[Remote]
    tokenizer: list[Remote]


def list_files(hub: HfApi, repo: str) -> list[Remote]:
    """All files of a dataset repository, by path; raises RepositoryError, or Failure if the hub does not answer."""
    try:
        tree = list(hub.list_repo_tree(repo, recursive=True, repo_type="dataset"))
    except Exception as error:  # the hub library's transport errors share no public base across its versions
        kind = Failure if status_of(error) is None else RepositoryError
        raise kind(f"{repo}: {explain(error)}") from None
    files = [item for item in tree if isinstance(item, RepoFile)]
    digests = [f"sha256:{item.lfs.sha256}" if item.lfs else f"git:{item.blob_id}" for item in files]
    return sorted(Remote(item.path, item.size, digest) for item, digest in zip(files, digests, strict=True))


def status_of(error: Exception) -> int | None:
    """HTTP status of a failed call; None if no answer came."""
    return getattr(getattr(error, "response", None), "status_code", None)


NO_HUB = "what answered is no hub but a redirect or a page, as of a network that asks to log in; open a web page first, or check HF_ENDPOINT"


def explain(error: Exception) -> str:
    """One line about a failed call to the hub, with a remedy where there is one."""
    status = status_of(error)
    if status in (401, 403):
        return "not found or not open to you; check the name, or set HF_TOKEN if you have access"
    if status == 404:
        return "no such dataset repository or file"
    causes = (error, error.__cause__)
    strange = any(
        isinstance(e, ValueError) or type(e).__name__ in ("FileMetadataError", "TooManyRedirects") for e in causes
    )
    if strange or (
        status is not None and status < 400
    ):  # no JSON, not the headers of a hub, a redirect that is not followed
        return NO_HUB
    if status is not None:
        return f"the hub answered with status {status}; try again later"
    return f"the hub cannot be reached ({type(error).__name__} {error})".replace("\n", " ")


def layout_pattern(layout: str | None, root: str) -> re.Pattern[str]:
    """Which folders hold a variant: a LAYOUTS name or a template with {variant}; None means any folder."""
    if layout is None:
        return re.compile(r"(?:.*/)?(?:fineweb10B_|fineweb_)?(?P<variant>[^/]+)")
    template = LAYOUTS.get(layout, layout).replace("{root}", root).strip("/")
    if template.count("{variant}") != 1:
        names = ", ".join(LAYOUTS)
        raise InputError(f"--layout {layout}: expected {names}, or a folder such as exports/{{variant}}/shards")
    before, after = template.split("{variant}")
    return re.compile(re.escape(before) + r"(?P<variant>[^/]+)" + re.escape(after))


def find_variants(files: list[Remote], pattern: re.Pattern[str]) -> list[Variant]:
    """The variants whose folder matches `pattern` and holds validation shards, sorted by name."""
    folders: dict[str, list[Remote]] = {}
    for file in files:
        if re.fullmatch(r"fineweb_(train|val|val_bytes)_\d+\.bin", file.name):
            folders.setdefault(file.path.rpartition("/")[0], []).append(file)
    found = []
    for folder, shards in folders.items():
        match = pattern.fullmatch(folder)
        train = [shard for shard in shards if shard.name.startswith("fineweb_train_")]
        val = [shard for shard in shards if shard.name.startswith("fineweb_val_")]
        if match and val:
            name = match["variant"]
            found.append(Variant(name, folder, train, val, tokenizer_files(files, folder, name)))
    return sorted(found)


def tokenizer_files(files: list[Remote], folder: str, variant: str) -> list[Remote]:
    """Tokenizer files of `variant`, by the exports' habits: fineweb_1024_bpe.model, tokenizers/scylla/..."""
    pieces = re.fullmatch(r"sp(\d+)(_.+)?", variant)
    stem = (
        f"fineweb_{pieces[1]}_bpe{pieces[2] or ''}" if pieces else f"fineweb_pure_byte_{variant.removeprefix('byte')}"
    )
    places = rf"(?:.*/)?tokenizers/|{re.escape(folder)}/(?:tokenizers/)?"
    named = re.compile(rf"(?:{places}){re.escape(stem)}\.[a-z]+|(?:.*/)?tokenizers/{re.escape(variant)}/[^/]+")
    first: dict[str, Remote] = {}
    for file in files:
        if named.fullmatch(file.path):
            first.setdefault(file.name, file)  # some exports hold the same tokenizer in two places
    return list(first.values())


def describe(variants: Iterable[Variant]) -> str:
    """A line for each variant: shards, gigabytes, tokenizer."""
    lines = [
        f"  {variant.name}: {len(variant.train)} training and {len(variant.val)} validation shards, "
        f"{sum(shard.size for shard in variant.train + variant.val) / 1e9:.2f} GB in {variant.folder}/, "
        f"tokenizer {', '.join(file.name for file in variant.tokenizer) or 'not there'}"
        for variant in variants
    ]
    return "\n".join(lines) or "  no folder with fineweb_val_*.bin"


# ---- choosing


class Choice(NamedTuple):
    """Where the wanted variant was found."""

    repo: str
    variant: Variant
    files: list[Remote]


def candidates(args: argparse.Namespace, wanted: str) -> list[Export]:
    """The repositories to look into, most promising first."""
    if args.repo:
        known = {export.repo: export.layout for export in EXPORTS}
        layout = args.layout or (None if args.root is None else "nested")
        return [Export(args.repo, layout or known.get(args.repo), ())]
    return sorted(EXPORTS, key=lambda export: wanted not in export.variants)


def read_variants(hub: HfApi, export: Export, args: argparse.Namespace) -> tuple[list[Remote], list[Variant]]:
    """(all files, variants) of one repository."""
    files = list_files(hub, export.repo)
    return files, find_variants(files, layout_pattern(args.layout or export.layout, args.root or "datasets"))


def choose(hub: HfApi, args: argparse.Namespace) -> Choice:
    """Find the variant; if nobody has it, raise InputError with what each repository really holds."""
    wanted = ALIASES.get(args.variant, args.variant)
    seen = []
    for export in candidates(args, wanted):
        try:
            files, variants = read_variants(hub, export, args)
        except RepositoryError as error:
            seen.append(str(error))
            continue
        matches = [variant for variant in variants if variant.name == wanted]
        if len(matches) > 1:
            folders = ", ".join(variant.folder for variant in matches)
            raise InputError(
                f"{export.repo} holds {wanted} in {len(matches)} folders ({folders}); name one by --layout"
            )
        if matches:
            return Choice(export.repo, matches[0], files)
        seen.append(f"{export.repo} holds\n{describe(variants)}")
    raise InputError(f"no variant {args.variant} was found. What is really there:\n" + "\n".join(seen))


def wanted_files(choice: Choice, args: argparse.Namespace) -> dict[str, Remote]:
    """Local path under --out of each file to have, validation first so that a stopped run can already be scored."""
    variant = choice.variant
    count = min(DEFAULT_TRAIN_SHARDS, len(variant.train)) if args.train_shards is None else args.train_shards
    if count > len(variant.train):
        have = len(variant.train)
        raise InputError(
            f"--train-shards {count}: {choice.repo} holds {have} of {variant.name}; ask for {have} or fewer"
        )
    files = {f"tokenizers/{file.name}": file for file in variant.tokenizer}
    for shard in variant.val + variant.train[:count]:
        files[f"datasets/fineweb10B_{variant.name}/{shard.name}"] = shard
    if args.with_docs:
        documents = document_files(choice.files)
        if not documents:
            raise InputError(f"--with-docs: {choice.repo} holds no {DOCUMENTS}")
        files.update(documents)
    return files


def document_files(files: list[Remote]) -> dict[str, Remote]:
    """The untokenised documents of a repository and what describes them, by local path; empty if it has none."""
    found = {file.name: file for file in files if file.name in (DOCUMENTS, "docs_selected.source_manifest.json")}
    return found if DOCUMENTS in found else {}


def choose_documents(hub: HfApi, args: argparse.Namespace) -> tuple[str, dict[str, Remote]]:
    """(repository, files) of the first export that holds the untokenised documents; InputError if none does."""
    seen = []
    for export in candidates(args, args.variant):
        try:
            if files := document_files(list_files(hub, export.repo)):
                return export.repo, files
            seen.append(f"{export.repo} holds none")
        except RepositoryError as error:
            seen.append(str(error))
    raise InputError(f"--make-caseops needs {DOCUMENTS}: {'; '.join(seen)}")


# ---- fetching


def digest_of(path: Path, like: str) -> str:
    """Digest of a local file of the same kind as `like`."""
    if like.startswith("sha256:"):
        return f"sha256:{sha256_of(path)}"
    content = path.read_bytes()
    return f"git:{hashlib.sha1(b'blob %d' % len(content) + bytes(1) + content).hexdigest()}"


class Record:
    """Digests of files that were verified under their final names, so that gigabytes are not hashed at each start.

    Size and header alone would not do: full shards of all exports have the same size. The file is written in `staging`,
    this variant's own, which a killed download leaves and the next one removes.
    """

    def __init__(self, path: Path, staging: Path):
        self.path, self.aside, self.lock = path, staging / "verified.json", threading.Lock()
        try:
            self.digests: dict[str, str] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            self.digests = {}

    def add(self, local: str, digest: str) -> None:
        with self.lock:
            self.digests[local] = digest
            self.aside.parent.mkdir(parents=True, exist_ok=True)
            write_synced(self.aside, json.dumps(self.digests, indent=1).encode())
            os.replace(self.aside, self.path)


def fault(path: Path, remote: Remote) -> str | None:
    """What is wrong with the content of a downloaded file; None if nothing."""
    if path.stat().st_size != remote.size:
        return f"{path.stat().st_size:,} bytes instead of {remote.size:,}"
    if digest_of(path, remote.digest) != remote.digest:
        return f"its {remote.digest.split(':')[0]} hash is not the hub's"
    if path.suffix == ".bin":
        try:
            check_shard(path)
        except InputError as error:
            return str(error)
    return None


def is_good(out: Path, local: str, remote: Remote, record: Record, verify: bool) -> bool:
    """Whether the file is there already; one that no record vouches for is hashed, once."""
    path = out / local
    if not path.is_file() or path.stat().st_size != remote.size:
        return False
    if not verify and record.digests.get(local) == remote.digest:
        return True
    if fault(path, remote):
        return False
    record.add(local, remote.digest)
    return True


def fetch(hub: HfApi, repo: str, remote: Remote, target: Path, staging: Path) -> None:
    """Download one file aside, verify it and give it its name; damaged twice is a Failure."""
    for last in (False, True):
        try:
            got = hub.hf_hub_download(repo, remote.path, repo_type="dataset", local_dir=staging, force_download=last)
        except Exception as error:  # as in list_files
            if isinstance(error, OSError) and error.errno:  # a full disk, which run_tool names
                error.filename = error.filename or str(target)
                raise
            if type(error) is OSError:  # the library's complaint of a file that is longer or shorter than announced
                problem = "its length is not the hub's"
                continue
            raise Failure(f"{repo}: {remote.path}: {explain(error)}; start again to continue") from None
        problem = fault(Path(got), remote)
        if problem is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(got, target)
            sync_folder(target.parent)
            return
    raise Failure(f"{repo}: {remote.path} arrived damaged twice: {problem}")


def check_space(out: Path, missing: dict[str, Remote]) -> None:
    """Refuse before the first byte if the disk cannot hold what is missing."""
    need, free = sum(file.size for file in missing.values()), shutil.disk_usage(out).free
    if need > free:
        raise InputError(
            f"{need / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free in {out}; "
            "use fewer --train-shards, or --out on another disk"
        )


def fetch_all(hub: HfApi, repo: str, name: str, files: dict[str, Remote], args: argparse.Namespace) -> int:
    """Fetch what is missing for variant `name`, several files at a time; returns how many were fetched."""
    datasets = args.out / "datasets"
    staging = datasets / f".{name}.partial"
    with locked(datasets / f"fineweb10B_{name}"):
        record = Record(datasets / ".verified.json", staging)
        checked = tqdm(files.items(), desc="checking files", unit="file", disable=None, leave=False)
        missing = {k: file for k, file in checked if not is_good(args.out, k, file, record, args.verify)}
        check_space(args.out, missing)
        with (
            ThreadPoolExecutor(args.jobs) as pool,
            tqdm(total=len(missing), desc="files", unit="file", disable=None) as bar,
        ):
            tasks = {pool.submit(fetch, hub, repo, file, args.out / k, staging): k for k, file in missing.items()}
            try:
                for task in as_completed(tasks):
                    task.result()
                    record.add(tasks[task], missing[tasks[task]].digest)
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        shutil.rmtree(staging, ignore_errors=True)
    return len(missing)


# ---- the tool


def list_exports(hub: HfApi, args: argparse.Namespace) -> None:
    """Print what the named repository, or each known one, really holds."""
    for export in candidates(args, args.variant):
        try:
            print(f"{export.repo}\n{describe(read_variants(hub, export, args)[1])}")
        except RepositoryError as error:
            if args.repo:
                raise
            print(error)


def validation_documents(shards: list[Path]) -> int:
    """BOS tokens in the validation shards among `shards`: an export with another split leaks validation into training."""
    val = [path for path in shards if re.match(r"fineweb_val_\d", path.name)]
    return sum(int((np.fromfile(path, "<u2", offset=HEADER_BYTES) == 1).sum()) for path in val)


def make_caseops(hub: HfApi, args: argparse.Namespace) -> None:
    """From the published documents to shards of case-factored text; a call that was stopped is simply made again."""
    name = f"sp{args.vocab_size}_caseops_fused"
    folder = args.out / "datasets" / f"fineweb10B_{name}"
    if (folder / "manifest.json").is_file():
        print(f"{folder} is made already; delete it to make it again")
        make_shards.report(json.loads((folder / "manifest.json").read_text()), folder)
        return
    train_shards = DEFAULT_TRAIN_SHARDS if args.train_shards is None else args.train_shards
    words = ["--caseops", "--official-split", "--resume", "--vocab-size", str(args.vocab_size), "--out", str(folder)]
    words += ["--train-shards", str(train_shards), str(args.out / DOCUMENTS)]
    make_shards.parse_args(words)  # a mistake ends here, not after the documents have come
    repo, files = choose_documents(hub, args)
    fetched = fetch_all(hub, repo, name, files, args)
    print(f"{repo}: {fetched} file(s) fetched, {len(files) - fetched} were there and good", flush=True)
    make_shards.main(words)


def report(choice: Choice, files: dict[str, Remote], fetched: int, out: Path) -> None:
    """Say what is there now, with the settings that use it."""
    variant = choice.variant
    folder = out / "datasets" / f"fineweb10B_{variant.name}"
    shards = [out / local for local in files if local.endswith(".bin")]
    tokens = {split: sum(check_shard(path) for path in shards if re.match(rf"fineweb_{split}_\d", path.name))
              for split in ("train", "val")}  # fmt: skip
    print(f"{choice.repo}: {fetched} file(s) fetched, {len(files) - fetched} were there and good")
    print(f"{tokens['train']:,} training tokens, {tokens['val']:,} validation tokens")
    if variant.name.startswith("sp") and (documents := validation_documents(shards)) != OFFICIAL_VAL_DOCS:
        print(f"validation holds {documents:,} documents, the official split {OFFICIAL_VAL_DOCS:,}: scores on it are no challenge scores, "
              "and training shards that go with it may hold official validation text")  # fmt: skip
    extra = len(list(folder.glob("fineweb_train_*.bin"))) - sum("/fineweb_train_" in local for local in files)
    if extra:
        print(f"{extra} more training shard(s) from earlier downloads are in the folder and will be used too")
    models = [local for local in files if local.endswith((".model", ".json", ".vocab")) and "tokenizers/" in local]
    if models:
        pieces = re.match(r"sp(\d+)", variant.name)
        size = f" VOCAB_SIZE={pieces[1]}" if pieces else ""
        print(f"DATA_PATH={folder} TOKENIZER_PATH={out / min(models, key=lambda m: not m.endswith('.model'))}{size}")
    else:
        print(f"DATA_PATH={folder}; {choice.repo} holds no tokenizer of {variant.name}, take it from its author")


def count(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", default="sp1024", help="sp1024, sp4096, sp8192, sp8192_caseops, byte260 ... (sp1024)")
    add("--train-shards", type=count, metavar="N", help="the first N training shards (80, or all if there are fewer)")
    add("--list", action="store_true", help="print what the repositories really hold, and stop")
    add("--repo", default=os.environ.get("MATCHED_FINEWEB_REPO_ID"), metavar="OWNER/NAME", help="look only here")
    add("--root", default=os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"), metavar="FOLDER",
        help="folder of the nested layout (datasets)")  # fmt: skip
    add("--layout", help="nested, flat, or a folder with {variant} in it (known or found by itself)")
    add("--make-caseops", action="store_true", help="shards of case-factored text from the untokenised documents")
    add("--vocab-size", type=make_shards.positive, metavar="N", default=8192, help="with --make-caseops: pieces (8192)")
    add("--with-docs", action="store_true", help="also the untokenised documents, tens of gigabytes")
    add("--out", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
        help="folder that receives datasets/ and tokenizers/ (the folder of this script)")  # fmt: skip
    add("--jobs", type=int, choices=range(1, 33), default=4, metavar="N", help="files fetched at a time (4)")
    add("--verify", action="store_true", help="hash the files that are there, though they were verified before")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, hub: HfApi | None = None) -> None:
    args = parse_args(argv)
    hub = hub or HfApi()
    if args.list:
        list_exports(hub, args)
        return
    if args.make_caseops:
        make_caseops(hub, args)
        return
    choice = choose(hub, args)
    files = wanted_files(choice, args)
    fetched = fetch_all(hub, choice.repo, choice.variant.name, files, args)
    report(choice, files, fetched, args.out)


if __name__ == "__main__":
    sys.exit(run_tool(main))
