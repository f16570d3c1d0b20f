"""From text to a memory-mapped file of token ids, written once and shared by all ranks.

Idea    A model reads integers. Bytes are the simplest vocabulary (ids 0 to 255, 256 ends a
        document); byte-pair encoding gives frequent sequences of bytes an id of their own, so that
        a text needs fewer tokens. The ids lie in a file that every rank maps into memory: nobody
        holds them all.
Safe    A file is written under another name and renamed: several ranks may prepare the same text at
        once, and a killed one leaves nothing half-written behind.
Read    Tokenizer -> load_tokenizer -> prepare
"""

import hashlib
import importlib.util
import os
import sysconfig
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picotron_lab.config import ConfigError

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__")

# ---- tokenizers


class Tokenizer:
    """Text to ids and back: UTF-8 bytes (ids 0..255, 256 ends a document) or a tokenizer.json.

    `vocab_size` is the largest id + 1; `end_of_document` is an id, or None where there is none.
    """

    def __init__(self, name: str, model: Any = None) -> None:
        self.name, self._model, self.vocab_size, self.end_of_document = name, model, 257, 256
        if model is not None:
            model.no_truncation()  # a file may ask to cut or pad texts, but documents stay whole
            model.no_padding()
            model.encode_special_tokens = True  # "<|endoftext|>" inside a document is plain text
            self.vocab_size = max(model.get_vocab().values()) + 1  # ids may have holes
            ends = [model.token_to_id(token) for token in END_OF_DOCUMENT]
            self.end_of_document = next((token for token in ends if token is not None), None)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, 1-D, without special tokens."""
        if self._model is None:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        return np.array(self._model.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that gives the same ids; bytes need none, and write nothing."""
        if self._model is not None:
            publish(path, [self._model.to_str().encode("utf-8")])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of 1-D `ids`; special ids, and ids that no token has, give no text."""
        ids = np.asarray(ids, dtype=np.int64)
        if self._model is None:
            return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        return self._model.decode(ids.tolist(), skip_special_tokens=True)


def load_tokenizer(option: str, files: Sequence[Path], cache_dir: Path) -> Tokenizer:
    """Return the tokenizer of `--tokenizer bytes|bpe:N|FILE`; ConfigError for any other string.

    `bpe:N` is trained on `files` and kept in `cache_dir`; little text gives fewer than N tokens.
    """
    if option == "bytes":
        return Tokenizer("bytes")
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError(f"--tokenizer {option} needs `pip install tokenizers`; or try bytes.")
    import tokenizers

    path = _train_bpe(option, files, cache_dir) if option.startswith("bpe:") else Path(option)
    try:
        return Tokenizer(option, tokenizers.Tokenizer.from_buffer(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--tokenizer {option} is not bytes, bpe:N or a tokenizer.json ({error}); try bytes."
        ) from error


def _train_bpe(option: str, files: Sequence[Path], cache_dir: Path) -> Path:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes, as in GPT-2."""
    size = option.removeprefix("bpe:")
    if not (size.isascii() and size.isdecimal() and int(size) >= 257):
        raise ConfigError(f"--tokenizer {option} needs an integer >= 257 after bpe:; try bpe:1024.")
    path = cache_dir / f"bpe-{_digest(option, files)}.json"
    if not path.exists():
        if not any(_documents(files)):
            raise ConfigError(f"--tokenizer {option} needs text to learn from; try bytes.")
        from tokenizers import ByteLevelBPETokenizer

        model = ByteLevelBPETokenizer()
        model.train_from_iterator(
            _documents(files), int(size), show_progress=False, special_tokens=[END_OF_DOCUMENT[0]]
        )
        publish(path, [model.to_str().encode("utf-8")])
    return path


# ---- token files


def prepare(data: str | None, tokenizer: str, cache_dir: Path) -> tuple[Tokenizer, np.ndarray]:
    """Return the tokenizer and the tokens of `--data`: a read-only, memory-mapped 1-D array.

    `data`: a text file; a folder, whose visible UTF-8 files are taken in the order of their paths;
    a `.npy` file of token ids, used as it is; None for the standard library of this Python.
    Documents are joined by the end-of-document token and tokenized once, one at a time, into a
    uint16 or uint32 file in `cache_dir`; several processes may do so at once.
    Raises ConfigError for what is missing, too short, or neither text nor token ids.
    """
    files = _find_files(data, cache_dir)
    chosen = load_tokenizer(tokenizer, files, cache_dir)
    if [path.suffix for path in files] == [".npy"]:
        return chosen, _open_token_file(files[0])
    dtype = np.uint16 if chosen.vocab_size <= 2**16 else np.uint32
    vocabulary = [Path(tokenizer)] if Path(tokenizer).is_file() else []
    path = cache_dir / f"tokens-{_digest(tokenizer, vocabulary + files)}.{dtype.__name__}"
    if not path.exists():
        publish(path, (ids.astype(dtype).tobytes() for ids in _token_pieces(chosen, files)))
    if path.stat().st_size < 2 * dtype().itemsize:
        raise ConfigError(f"--data {data} holds less than 2 tokens of text; try a longer one.")
    return chosen, np.memmap(path, dtype, mode="r")


def check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    """Raise ConfigError when 1-D `tokens` hold an id that a model of `vocab_size` cannot embed."""
    largest = int(tokens.max())  # of a memory-mapped file: read through once, never copied
    if largest >= vocab_size:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small for the data, whose largest token id is "
            f"{largest}; try --vocab-size {largest + 1}."
        )


def _open_token_file(path: Path) -> np.ndarray:
    need = f"--data {path} must hold a 1-D array of 2 or more integers >= 0, as np.save writes it"
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{need}, but cannot be opened ({error}).") from error
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.dtype.kind not in "iu" or tokens.min() < 0:
        raise ConfigError(f"{need}, but holds {tokens.dtype} of shape {tokens.shape}.")
    return tokens


def _find_files(data: str | None, cache_dir: Path) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"] if data is None else data)
    skipped, ending = (NOT_LIBRARY, ".py") if data is None else ((), "")
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(f"--data {data} is neither a file nor a folder; try a text file.")
    below = sorted(path.relative_to(root).as_posix() for path in root.rglob(f"*{ending}"))
    shown = [p for p in below if not any(n in skipped or n[0] == "." for n in p.split("/"))]
    files = [root / path for path in shown if (root / path).is_file()]
    return [path for path in files if cache_dir.resolve() not in path.resolve().parents]


def _documents(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except (PermissionError, UnicodeDecodeError):
            continue
        if text:
            yield text


def _token_pieces(tokenizer: Tokenizer, files: Sequence[Path]) -> Iterator[np.ndarray]:
    for number, text in enumerate(_documents(files)):
        if number > 0 and tokenizer.end_of_document is not None:
            yield np.array(tokenizer.end_of_document)
        yield tokenizer.encode(text)


def _digest(tokenizer: str, files: Sequence[Path]) -> str:
    stats = [(str(path.resolve()), path.stat()) for path in files]
    facts = [tokenizer, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def publish(path: Path, pieces: Iterable[bytes]) -> None:
    """Write beside `path` under a name of its own, then rename: readers see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.writelines(pieces)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
