"""The corpus: Python files of the running interpreter's standard library and installed packages, and its vocabulary.

The split is by package, from a hash of its name: the corpus is a function of what is installed.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.config import UserError, load_config, print_lines
from tidar.config.files import file_stamp, parse_json, write_atomically
from tidar.data import Corpus, load_tokenizer, make_source, prepare
from tidar.data.dataset import progress_printer
from tidar.data.python_source import SKIPPED_FOLDERS
from tidar.data.source import visible

LARGEST_FILE = 2**20  # bytes; larger ones are tables
VOCABULARY_BYTES = 2**24  # of text from which the vocabulary is made
BYTES_PER_PROCESS = 2**24  # least work for which a process is started that tokenises
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Extent:
    """How much text is taken, and how large the vocabulary is.

    vocabulary: ids of the tokenizer; with the mask token they are one more. held_out: share of the bytes. most_bytes:
    of all packages.
    """

    vocabulary: int = 2**14 - 1
    held_out: float = 0.02
    most_bytes: int = 2**28


@dataclass
class Package:
    name: str
    files: list[Path]
    n_bytes: int

    @property
    def rank(self) -> str:
        """The order of packages: a hash of the name, so that it says nothing about their content."""
        return hashlib.sha256(self.name.encode()).hexdigest()


@dataclass
class Texts:
    """The documents of both parts, and what was skipped, by reason. digest: of names and contents."""

    training: list[dict[str, str]]
    held_out: list[dict[str, str]]
    held_out_packages: list[str]
    skipped: dict[str, int]
    digest: str


def find_packages() -> list[Package]:
    """The top-level modules and packages of the standard library and of site-packages, ordered by `Package.rank`."""
    roots = [(Path(sysconfig.get_paths()["stdlib"]), "stdlib")]
    installed = [*sys.path, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    roots += [(Path(path), "") for path in installed if Path(path).name in ("site-packages", "dist-packages")]
    found: dict[str, Package] = {}
    for root, prefix in dict.fromkeys((root.resolve(), prefix) for root, prefix in roots):
        if not root.is_dir():
            continue
        for entry in visible(os.listdir(root)):
            path = root / entry
            stem = entry.removesuffix(".py")
            if not stem.isidentifier() or entry in SKIPPED_FOLDERS:
                continue
            name = f"{prefix}/{stem}" if prefix else stem
            files = list(_python_files(path))
            if files and name not in found:  # the first on sys.path is the one that is imported
                found[name] = Package(name, files, sum(file.stat().st_size for file in files))
    return sorted(found.values(), key=lambda package: package.rank)


def _python_files(path: Path) -> Iterator[Path]:
    if path.is_file() and path.suffix == ".py":
        yield path
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in visible(subfolders) if name != "__pycache__"]
        for name in visible(names):
            if name.endswith(".py") and (file := Path(folder, name)).is_file():
                yield file


def divide(packages: list[Package], extent: Extent) -> tuple[list[Package], list[Package]]:
    """Packages to train on and packages held out, in the order of the hash of their names.

    Packages are held out until they have the share of the bytes; those that alone are larger than it are trained on.
    Raises UserError where one of the two would be empty.
    """
    taken, total = [], 0
    for package in packages:
        if total + package.n_bytes <= extent.most_bytes:
            taken.append(package)
            total += package.n_bytes
    training, held_out, wanted, held = [], [], extent.held_out * total, 0
    for package in taken:
        if held < wanted and package.n_bytes <= wanted:
            held_out.append(package)
            held += package.n_bytes
        else:
            training.append(package)
    if not training or not held_out:
        raise UserError(
            f"corpus: {len(taken)} packages of this interpreter have Python source; too few to hold any out"
        )
    return training, held_out


def stamp(training: list[Package], held_out: list[Package]) -> str:
    """Equal while no file of the packages has another path, size or time of modification, as make and git assume."""
    parts = [
        [(package.name, str(file), *file_stamp(str(file))) for package in packages for file in package.files]
        for packages in (training, held_out)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_texts(training: list[Package], held_out: list[Package]) -> Texts:
    """Reads all files. Those that are empty, not UTF-8, too large, or that repeat one that came before are skipped.

    Held-out packages come first: what they vendor is not trained on.
    """
    digest, seen = hashlib.sha256(), set()
    skipped = dict.fromkeys(("empty", f"above {LARGEST_FILE:,} bytes", "unreadable", "not UTF-8", "repeated"), 0)
    parts: list[list[dict[str, str]]] = []
    for packages in (held_out, training):
        documents = []
        for package in packages:
            for file in package.files:
                content, reason = _read(file)
                if not reason and hashlib.sha256(content).digest() in seen:
                    reason = "repeated"
                if reason:
                    skipped[reason] += 1
                    continue
                seen.add(hashlib.sha256(content).digest())
                documents.append({"package": package.name, "file": file.name, "text": content.decode()})
                digest.update(f"{package.name} {file.name} {len(content)}\n".encode() + content)
        parts.append(documents)
    names = [package.name for package in held_out]
    return Texts(parts[1], parts[0], names, {k: n for k, n in skipped.items() if n}, digest.hexdigest())


def _read(file: Path) -> tuple[bytes, str]:
    """The content of a file, and why it is skipped, empty if it is not."""
    try:
        size = file.stat().st_size
        if not size or size > LARGEST_FILE:
            return b"", f"above {LARGEST_FILE:,} bytes" if size else "empty"
        content = file.read_bytes()
        content.decode()
    except OSError:
        return b"", "unreadable"
    except UnicodeDecodeError:
        return b"", "not UTF-8"
    return content, ""


def make_corpus(folder: Path, extent: Extent) -> dict[str, Any]:
    """The corpus in `folder`, made if it is not there yet: tokenizer/, data/training/, data/held_out/.

    Returns what corpus.json says of it. Raises UserError where the folder holds another one.
    """
    parts = divide(find_packages(), extent)
    about, now = _recorded(folder), {"vocabulary": extent.vocabulary, "files_stamp": stamp(*parts)}
    if not about or not now.items() <= about.items():
        about = _make_texts(folder, extent, read_texts(*parts), about) | now
        write_atomically(folder / "corpus.json", json.dumps(about, indent=1) + "\n")
    tokens = {}
    for name in ("training", "held_out"):
        tokens[name] = prepare_texts(folder, folder / "texts" / f"{name}.jsonl", folder / "data" / name)
    return about | {"tokens": tokens}


def _make_texts(folder: Path, extent: Extent, texts: Texts, about: dict[str, Any] | None) -> dict[str, Any]:
    """Writes texts and tokenizer, unless they are there: `about` says what the folder holds. Returns the same of them.

    Raises UserError where it holds others.
    """
    if about:
        if (about["digest"], about["vocabulary"]) == (texts.digest, extent.vocabulary):
            return about
        raise UserError(
            f"--output {folder}: holds the results of another corpus, {about['digest'][:12]} with a vocabulary of "
            f"{about['vocabulary']:,}; this interpreter's packages give {texts.digest[:12]} with {extent.vocabulary:,}",
            "choose another folder, or the interpreter and packages that it was made with",
        )
    print_lines(f"corpus: {len(texts.training):,} files to train on, {len(texts.held_out):,} held out")
    for name, documents in (("training", texts.training), ("held_out", texts.held_out)):
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / "texts").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "texts" / f"{name}.jsonl", lines)
    _make_tokenizer(texts.training, extent.vocabulary, folder / "tokenizer")
    return {
        "digest": texts.digest,
        "python": sys.version.split()[0],
        "packages": len({document["package"] for document in texts.training}),
        "held_out_packages": texts.held_out_packages,
        "files": {"training": len(texts.training), "held_out": len(texts.held_out)},
        "skipped": texts.skipped,
    }


def prepare_texts(folder: Path, texts: Path, prepared: Path, end: str = END_OF_TEXT) -> int:
    """Tokenises a file of texts with the corpus's tokenizer, if that is not done yet. Returns the number of tokens.

    end: see `data.end_of_document`.
    """
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    options = ["--data.source", "text", "--data.paths", str(texts), "--data.end_of_document", end]
    source = make_source(load_config(options).data, tokenizer)
    processes = min(os.cpu_count() or 1, max(1, texts.stat().st_size // BYTES_PER_PROCESS))
    prepare(source, make_source, [str(texts)], prepared, processes, progress_printer())
    return int(Corpus.open(prepared, verify=False).meta["tokens"])


def _recorded(folder: Path) -> dict[str, Any] | None:
    try:
        about = parse_json((folder / "corpus.json").read_bytes())
        return about if {"digest", "vocabulary"} <= about.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _make_tokenizer(documents: list[dict[str, str]], vocabulary: int, folder: Path) -> None:
    """A byte-level BPE tokenizer of the first texts in the order of a hash of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # takes seconds

    ranked = sorted(
        (document["text"] for document in documents), key=lambda text: hashlib.sha256(text.encode()).digest()
    )
    chosen, size = [], 0
    for text in ranked:
        if size >= VOCABULARY_BYTES:
            break
        chosen.append(text)
        size += len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chosen, trainer)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
