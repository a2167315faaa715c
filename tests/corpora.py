"""Texts as files in every format, and the corpora of a run that reads them."""

import gzip
import json
from pathlib import Path

from tidar.config import load_config
from tidar.data import Corpus, data_tokenizer, load_data, load_tokenizer


def load(tmp_path: Path, *options: str):
    """The corpora of a run in a folder of its own."""
    number = len(list(tmp_path.glob("run-*")))
    config = load_config([*options, "--job.dump_folder", str(tmp_path / f"run-{number}")])
    name = config.data.tokenizer
    return config, load_data(config, data_tokenizer(config.data, load_tokenizer(name) if name else None))


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.read(start, end - start)[0].tolist() for start, end in zip(corpus.offsets, corpus.offsets[1:])]


def as_bytes(texts: list[str]) -> list[list[int]]:
    return [[*text.encode(), 256] for text in texts if text]


TEXTS = ["one", "zwei — ü", "三\nlines", "x" * 5000, "", "last"]


def write_texts(folder: Path) -> dict[str, list[str]]:
    """The same texts in every format; what each path holds."""
    folder.mkdir()
    lines = "\r\n\n".join(json.dumps({"text": text, "other": 1}, ensure_ascii=False) for text in TEXTS)
    (folder / "a.jsonl").write_bytes(lines.encode())  # no newline at its end
    with gzip.open(folder / "b.JSONL.GZ", "wt", encoding="utf-8") as file:
        file.write(lines)
    (folder / "plain").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "plain" / f"{number}.txt").write_text(text, encoding="utf-8")
    return {
        "a.jsonl": TEXTS,
        "b.JSONL.GZ": TEXTS,
        "plain": TEXTS,
        "plain/[13].txt": [TEXTS[1], TEXTS[3]],
        "": TEXTS * 3,
    }
