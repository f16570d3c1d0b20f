"""data.py: text survives tokenization, files are published whole, no mesh changes the order."""

import importlib.util
import multiprocessing
import os
import signal
import sysconfig
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from picotron_lab import corpus, data
from picotron_lab.config import ConfigError
from picotron_lab.corpus import prepare
from picotron_lab.data import IGNORED

REPOSITORY = Path(__file__).resolve().parents[1]
STRANGE = "naïve Größe, 東京 и 🙂\r\n\ttab\x00 <|endoftext|> done  \n\n"


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def tokenizer_json(path: Path, words: dict[str, int], special: tuple[str, ...] = ()) -> str:
    """Save a tokenizer of words which asks to cut, to pad and to begin every text with "?"."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, **words}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(list(special))
    begin = {"single": "? $A", "special_tokens": [("?", 0)]}
    model.post_processor = tokenizers.processors.TemplateProcessing(**begin)
    model.enable_truncation(2)
    model.enable_padding(length=8, pad_token="?")
    return write(path, model.to_str())


def refuses(sentence: str, *arguments: object) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prepare(*arguments)


# ---- tokenizers


def test_bytes_are_their_own_ids() -> None:
    tokenizer = corpus.Tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document) == ("bytes", 257, 256)
    assert tokenizer.encode("Aé").tolist() == [0x41, 0xC3, 0xA9]
    assert tokenizer.decode([72, 256, 105]) == "Hi", "the end of a document gives no text"
    assert tokenizer.decode([72, 0xC3, 105, 300]) == "H\ufffdi", "half a character, unknown id"
    assert tokenizer.decode(tokenizer.encode(STRANGE)) == STRANGE and tokenizer.decode([]) == ""


def test_bpe_round_trip_and_merges(tmp_path: Path) -> None:
    """Text that training never saw survives; text that it saw often becomes short."""
    text, caches = (REPOSITORY / "picotron_lab" / "data.py").read_text("utf-8"), []
    path = write(tmp_path / "text", text)
    for cache in (tmp_path / "first", tmp_path / "second"):
        tokenizer, tokens = prepare(path, "bpe:600", cache)
        caches.append({file.name: file.read_bytes() for file in cache.iterdir()})
    assert caches[0] == caches[1] and len(caches[0]) == 2, "training must be deterministic"
    assert tokenizer.name == "bpe:600" and tokenizer.vocab_size == 600
    for sample in (STRANGE, "", " ", "".join(map(chr, range(1, 0x300)))):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.decode(tokens) == text and len(tokens) < len(text) / 2
    assert tokenizer.end_of_document not in [None, *tokenizer.encode(STRANGE)], "no forgery"
    assert tokenizer.decode([tokenizer.end_of_document]) == ""
    tokenizer, tokens = prepare(path, "bpe:257", tmp_path / "first")
    assert tokenizer.vocab_size == 257 and len(tokens) == len(text.encode("utf-8")), "no merge"


@pytest.mark.parametrize("known", [3, 2, 1, 0])
def test_tokenizer_file(tmp_path: Path, known: int) -> None:
    """Documents stay whole, ids may have holes, the first known name ends a document."""
    names = ("</s>", "<|end_of_text|>", "<|endoftext|>")[:known]
    words = {"a": 1, "b": 2, "c": 70000} | {name: 70001 + i for i, name in enumerate(names)}
    path = tokenizer_json(tmp_path / "tok.json", words, names)
    write(tmp_path / "texts" / "1", "a b c")
    write(tmp_path / "texts" / "2", "c x")
    tokenizer, tokens = prepare(str(tmp_path / "texts"), path, tmp_path / "cache")
    assert tokenizer.end_of_document == (70000 + known if known else None)
    assert tokens.tolist() == [1, 2, 70000, *[70000 + known][: len(names)], 70000, 0]
    assert tokenizer.vocab_size == 70001 + known and tokens.dtype == np.uint32
    assert tokenizer.decode(tokens[[0, 3, 1]]) == ("a b" if known else "a c b")


def test_bad_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = write(tmp_path / "text", "some text"), tmp_path / "cache"
    for option in ("gpt2", "", "bpe", str(tmp_path)):
        refuses(f"--tokenizer {option} is not bytes.*try bytes", text, option, cache)
    for size in ("", "256", "-300", "1e3", "²"):
        refuses(f"bpe:{size} needs an integer >= 257.*bpe:1024", text, f"bpe:{size}", cache)
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": {}}', b"plain"):
        refuses("tok.json is not bytes", text, write(tmp_path / "tok.json", content), cache)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses("bpe:300 needs `pip install tokenizers`.*try bytes", text, "bpe:300", cache)
    assert len(prepare(text, "bytes", cache)[1]) == 9, "bytes needs no package"


# ---- token files


def test_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    """Hidden, empty, undecodable and dangling files are not text, and neither is the cache."""
    folder, cache = tmp_path / "texts", tmp_path / "texts" / "cache"
    for name, content in {"b/1": "B1", "a.md": "A", "c": "C", "b.py": "b", "empty": ""}.items():
        write(folder / name, content)
    for name in (".hidden", ".git/config", "b/.hidden/deep", "b/1.pyc"):
        write(folder / name, b"\xff" if name.endswith("pyc") else "no")
    (folder / "dangling").symlink_to(folder / "nowhere")
    expected = [ord("A"), 256, ord("b"), 256, ord("B"), ord("1"), 256, ord("C")]
    for _ in range(2):  # the second time, the cache has files
        assert prepare(str(folder), "bytes", cache)[1].tolist() == expected
        assert prepare(str(folder), "bpe:257", cache)[0].vocab_size == 257
    assert len(list(cache.iterdir())) == 3, "two token files and one tokenizer, written once"


@pytest.mark.slow  # left to CI
def test_default_corpus_is_the_standard_library(tmp_path: Path) -> None:
    tokenizer, tokens = prepare(None, "bytes", tmp_path)
    assert len(tokens) > 1_000_000 and tokens.dtype == np.uint16
    text, library = tokenizer.decode(tokens), Path(sysconfig.get_paths()["stdlib"])
    assert text.startswith((library / "__future__.py").read_text("utf-8"))
    assert (library / "json" / "decoder.py").read_text("utf-8") in text
    for path in (library / "idlelib" / "run.py", library / "test" / "test_bisect.py"):
        assert not path.exists() or path.read_text("utf-8") not in text
    assert all(isinstance(part, np.memmap) for part in (tokens, *data.split(tokens, 8, 0.1)))
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_any_change_is_seen(tmp_path: Path) -> None:
    """Content, size, time and path of the text, and the tokenizer, each name another file."""
    text, cache, names = tmp_path / "text", tmp_path / "cache", set()
    path = tokenizer_json(tmp_path / "tok.json", {"seven": 1})
    for content, nanoseconds in (("first", 0), ("fifth", 1), ("seven seven", 1)):
        write(text, content)
        os.utime(text, ns=(0, 10**18 + nanoseconds))
        for _ in range(2):
            tokenizer, tokens = prepare(str(text), "bytes", cache)
            assert tokenizer.decode(tokens) == content
            names |= {(file, file.stat().st_ino) for file in cache.iterdir()}
    assert len(names) == 3, "what did not change is not tokenized again"
    assert prepare(str(text), path, cache)[1].tolist() == [1, 1]
    tokenizer_json(tmp_path / "tok.json", {"seven": 12})
    assert prepare(str(text), path, cache)[1].tolist() == [12, 12]
    prepare(str(text.rename(tmp_path / "moved")), "bytes", cache)
    assert len(list(cache.iterdir())) == 6


def test_threads_preparing_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier inside encode makes all four write at the same moment."""
    meeting, encode = threading.Barrier(4, timeout=30), corpus.Tokenizer.encode
    text, cache = write(tmp_path / "text", STRANGE * 1000), tmp_path / "cache"
    meet = lambda self, document: (meeting.wait(), encode(self, document))[1]  # noqa: E731
    monkeypatch.setattr(corpus.Tokenizer, "encode", meet)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: prepare(text, "bytes", cache)[1].tolist(), range(4))
    assert list(map(bytes, results)) == [STRANGE.encode("utf-8") * 1000] * 4
    assert [path.suffix for path in cache.iterdir()] == [".uint16"], "no temporary file remains"
    monkeypatch.setattr(corpus.Tokenizer, "encode", lambda self, document: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(text, "bytes", tmp_path / "failed")
    assert list((tmp_path / "failed").iterdir()) == [], "a failure leaves nothing"


def prepare_or_die(folder: Path, cache: Path) -> None:
    """What a process does; in the cache "killed" it dies after half a document."""

    def die(files: object) -> Iterator[str]:
        yield "half" * 10**5
        os.kill(os.getpid(), signal.SIGKILL)

    corpus._documents = die if cache.name == "killed" else corpus._documents
    prepare(str(folder), "bytes", cache)


def test_processes_at_once_and_one_killed_half_way(tmp_path: Path) -> None:
    """Two processes write at once; a third dies after its first document."""
    folder, cache, killed = tmp_path / "texts", tmp_path / "cache", tmp_path / "killed"
    for number in range(50):
        write(folder / f"{number:02}", f"document {number} " * 2000)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "picotron_lab.comm"])  # as processes.py does
    places = [(folder, cache), (folder, cache), (folder, killed)]
    processes = [context.Process(target=prepare_or_die, args=place) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL]
    assert [file.suffix for file in killed.iterdir() if file.stat().st_size > 0] == [".tmp"]
    (published,) = cache.iterdir()
    ids = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(folder.iterdir())]
    expected = b"\0\1".join(document.astype("<u2").tobytes() for document in ids)
    assert published.read_bytes() == expected, "16 bits a token, 256 between documents"
    assert prepare(str(folder), "bytes", killed)[1].tobytes() == expected


def test_token_file_is_used_as_it_is(tmp_path: Path) -> None:
    path, cache = tmp_path / "ids.npy", tmp_path / "cache"
    np.save(path, np.array([5, 0, 300, 72], dtype=np.int32))
    tokenizer, tokens = prepare(str(path), "bytes", cache)
    assert isinstance(tokens, np.memmap) and tokens.tolist() == [5, 0, 300, 72]
    assert tokenizer.decode(tokens[3:]) == "H" and not cache.exists()
    refuses("bpe:300 needs text to learn from; try bytes", str(path), "bpe:300", cache)
    corpus.check_vocabulary(tokens, 301)
    with pytest.raises(ConfigError, match="--vocab-size 300 .*is 300; try --vocab-size 301"):
        corpus.check_vocabulary(tokens, 300)


def test_bad_token_files(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    for ids in ([], [1], [[1, 2], [3, 4]], 7, [0.5, 1.0], [True, False], [3, -1, 2], [{}, {}]):
        np.save(path, np.array(ids, dtype=None if ids else int), allow_pickle=True)
        refuses(r"--data .*ids\.npy must hold a 1-D array.*but", str(path), "bytes", tmp_path)
    for size in (900, 500, 20, 0):
        np.save(path, np.arange(100))
        os.truncate(path, size)
        refuses("must hold a 1-D array.* cannot be opened", str(path), "bytes", tmp_path)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_missing_and_empty_text(tmp_path: Path, tokenizer: str) -> None:
    cache, text, nowhere = tmp_path / "cache", tmp_path / "text", str(tmp_path / "nowhere")
    refuses(f"--data {nowhere} is neither a file nor a folder; try", nowhere, tokenizer, cache)
    for path in (write(tmp_path / "binary", b"\xff"), str(tmp_path), write(text, "")):
        refuses("(less than 2 tokens of text|needs text).*; try ", path, tokenizer, cache)
    refuses(f"--data {text} holds less than 2 tokens", write(text, "x"), tokenizer, cache)
    assert len(prepare(write(text, "xy"), tokenizer, cache)[1]) == 2


# ---- batches


def test_split_holds_out_the_tail() -> None:
    for fraction, held_out in ((0.0, 0), (0.1, 100), (0.25, 250), (0.001, 9), (0.998, 998)):
        train, validation = data.split(np.arange(1000), 8, fraction)
        assert len(validation) == held_out and [*train, *validation] == list(range(1000))
    assert [len(part) for part in data.split(np.arange(11), 8, 0.1)] == [2, 9]
    with pytest.raises(ConfigError, match="takes 9 of 10 tokens.*try fraction 0"):
        data.split(np.arange(10), 8, 0.1)
    assert len(data.split(np.arange(10), 8, 0)[0]) == 10


@pytest.mark.parametrize("G", [1, 4, 7, 10, 23])
def test_order_is_a_stream_of_permutations(G: int) -> None:
    """Ten windows, G below, at and beyond an epoch: the stream, cut every 10, is permutations."""
    batches = [data.BatchOrder(5, 10, G).rows(step) for step in range(30)]
    assert all(rows.shape == (G,) and rows.dtype == np.int64 for rows in batches)
    epochs = np.concatenate(batches).reshape(-1, 10)
    drawn = [np.random.default_rng([5, epoch]).permutation(10) for epoch in range(len(epochs))]
    assert (epochs == np.stack(drawn)).all() and (np.sort(epochs) == np.arange(10)).all()
    order = data.BatchOrder(5, 10, G)
    for step in np.random.default_rng(0).permutation(np.repeat(np.arange(30), 3)):
        assert (order.rows(int(step)) == batches[step]).all(), "steps may be asked in any order"
    assert len(order._latest) <= 2, "at most two permutations are kept"


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, *range(200, 217)])
def test_one_epoch_predicts_every_token_once(length: int) -> None:
    """Labels of one epoch, in the order of their windows, are the text without its first token."""
    text, T, G = (STRANGE.encode("utf-8") * 4)[:length], 16, 4
    windows = len(range(0, length - 1, T))
    batches = data.Batches(np.frombuffer(text, np.uint8), T, 3, G)
    taken = [batches.micro_batch(step, 0, G) for step in range(windows // G + 1)]
    place = np.argsort(np.random.default_rng([3, 0]).permutation(windows))
    labels = torch.cat([batch.labels_BT for batch in taken])[:windows][place].flatten().tolist()
    tokens = torch.cat([batch.tokens_BT for batch in taken])[:windows][place].flatten().tolist()
    missing = windows * T - (length - 1)
    assert labels == [*text[1:]] + [IGNORED] * missing
    assert tokens == [*text[:-1]] + [0] * missing
    with pytest.raises(ConfigError, match="--sequence-length 0 .*try 128"):
        data.TokenWindows(np.arange(9), 0)


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize(("replicas", "size"), [(1, 1), (1, 3), (2, 4), (3, 1), (4, 2), (4, 3)])
def test_no_mesh_changes_the_global_batch(step: int, replicas: int, size: int) -> None:
    """Ranks with loaders of their own, microbatch by microbatch, read what one device reads."""
    text, G = np.arange(1000, 1150), 24
    whole, pieces = data.Batches(text, 8, 0, G).micro_batch(step, 0, G), []
    for rank in range(replicas):
        batches, share = data.Batches(text, 8, 0, G), G // replicas
        for first in range(rank * share, (rank + 1) * share, size):
            pieces.append(batches.micro_batch(step, first, size))
    for field in ("tokens_BT", "labels_BT", "rows_B"):
        assert torch.equal(torch.cat([getattr(p, field) for p in pieces]), getattr(whole, field))
    assert torch.equal(whole.rows_B, torch.arange(G)) and whole.tokens_BT.shape == (G, 8)
    assert whole.tokens_BT.dtype == whole.labels_BT.dtype == torch.int64
    for first, count in ((-1, 1), (0, 25), (24, 1), (0, 0)):
        with pytest.raises(AssertionError, match="ask for rows 0 to 23"):
            batches.micro_batch(0, first, count)


@pytest.mark.parametrize(("size", "batches"), [(1, 5), (3, 2), (5, 1), (8, 1)])
def test_evaluation_reads_all_in_order_with_constant_shapes(size: int, batches: int) -> None:
    evaluation = data.Evaluation(np.arange(1, 35), 8, size)  # four windows of 8 and one of 1
    assert len(evaluation) == batches
    places = [(index, row) for index in range(batches) for row in range(size)]
    taken = [evaluation.micro_batch(index, row, 1) for index, row in places]
    assert [batch.rows_B.tolist() for batch in taken] == [[row] for _, row in places]
    labels = [label for batch in taken for label in batch.labels_BT[0].tolist()]
    tokens = [token for batch in taken for token in batch.tokens_BT[0].tolist()]
    assert labels == [*range(2, 35)] + [IGNORED] * (batches * size * 8 - 33)
    assert tokens == [*range(1, 34)] + [0] * (batches * size * 8 - 33)
