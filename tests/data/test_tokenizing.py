"""Text becomes tokens once, also when it is interrupted, and by one process of many."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from filelock import FileLock

from tikmix_fast.data import text_files, tokenizing
from tikmix_fast.data.tokenizing import BYTES, Tokenizer, tokenize

LETTERS = Tokenizer("letters", lambda text: [ord(letter) - 97 for letter in text if letter.isalpha()], 300, [299, 298])


def texts(folder, documents, files=2):
    """Deal documents to .jsonl files."""
    paths = []
    for number in range(files):
        paths.append(folder / f"{number}.jsonl")
        rows = [json.dumps({"text": document}) for document in documents[number::files]]
        paths[-1].write_text("\n".join(rows))
    return paths


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_tokens_are_those_of_the_documents_in_order_with_separators(tmp_path):
    sources = texts(tmp_path, ["ab", "c", "", "zz"])
    file = tokenize(sources, tmp_path / "cache", LETTERS)
    tokens = np.load(file)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [0, 1, 299, 298, 2, 299, 298, 25, 25, 299, 298]
    assert hidden(tmp_path / "cache") == []
    assert bytes(np.load(tokenize(sources, tmp_path / "cache"))) == b"ab\n\nc\n\nzz\n\n"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_txt_in_pieces_gets_one_separator(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", 2)
    (tmp_path / "a.txt").write_text("ab\ncd\nef")
    assert bytes(np.load(tokenize([tmp_path / "a.txt"], tmp_path / "cache"))) == b"ab\ncd\nef\n\n"


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, "u1"), (257, "u2"), (65_536, "u2"), (65_537, "u4"), (1 << 32, "u4")]
)
def test_the_smallest_dtype_that_holds_the_vocabulary(tmp_path, vocabulary, dtype):
    (tmp_path / "a.txt").write_text("a")
    last = Tokenizer("last", lambda text: [0, vocabulary - 1], vocabulary)
    tokens = np.load(tokenize([tmp_path / "a.txt"], tmp_path / "cache", last))
    assert tokens.tolist() == [0, vocabulary - 1]
    assert tokens.dtype == np.dtype(f"<{dtype}")


@pytest.mark.parametrize("count", [0, 9, 10**6, 10**17])
def test_the_header_is_that_of_numpy_and_of_one_size(count):
    import io

    header = tokenizing._header(np.dtype("<u4"), count)
    assert len(header) == 128
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((count,), False, np.dtype("<u4"))
    assert file.tell() == 128


def test_what_is_there_is_not_tokenized_again_unless_something_changed(tmp_path):
    sources = texts(tmp_path, ["ab", "c"])
    calls = []

    def counted(name="letters", **options):
        return Tokenizer(name, lambda text: calls.append(text) or [1], **{"vocabulary": 300, **options})

    first = tokenize(sources, tmp_path / "cache", counted())
    assert len(calls) == 2
    assert tokenize(sources, tmp_path / "cache", counted()) == first
    assert len(calls) == 2
    others = [
        tokenize(sources[::-1], tmp_path / "cache", counted()),
        tokenize(sources, tmp_path / "cache", counted("other")),
        tokenize(sources, tmp_path / "cache", counted(vocabulary=301)),
        tokenize(sources, tmp_path / "cache", counted(separator=[1])),
    ]
    os.utime(sources[0], (1, 1))
    others.append(tokenize(sources, tmp_path / "cache", counted()))
    assert len({first, *others}) == 6
    assert len(calls) == 12


@pytest.mark.parametrize("checkpoint", [1, 5, 1000])
@pytest.mark.parametrize("stop", [0, 1, 5, 6, 11])
def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, checkpoint, stop):
    monkeypatch.setattr(tokenizing, "_CHECKPOINT", checkpoint)
    sources = texts(tmp_path, [chr(97 + number) * (number % 3 + 1) for number in range(12)], files=3)
    whole = np.load(tokenize(sources, tmp_path / "whole", LETTERS))
    left = stop
    done = []

    def limited(text):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        done.append(text)
        return LETTERS.encode(text)

    interrupted = Tokenizer("letters", limited, 300, [299, 298])
    with pytest.raises(KeyboardInterrupt):
        tokenize(sources, tmp_path / "cache", interrupted)
    assert all(name.startswith(".") for name in os.listdir(tmp_path / "cache"))
    left = 100
    file = tokenize(sources, tmp_path / "cache", interrupted)
    assert np.array_equal(np.load(file), whole)
    assert hidden(tmp_path / "cache") == []
    if checkpoint == 1:
        assert len(done) == 12  # nothing is tokenized twice
    elif checkpoint == 1000:
        assert len(done) == 12 + stop


def test_what_lies_behind_the_last_state_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_CHECKPOINT", 1)
    sources = texts(tmp_path, ["ab", "c", "de"], files=1)
    whole = np.load(tokenize(sources, tmp_path / "whole", LETTERS))
    for damage in (b"half a token that was written", None, "state"):
        left = 2

        def limited(text):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return LETTERS.encode(text)

        with pytest.raises(KeyboardInterrupt):
            tokenize(sources, tmp_path / "cache", Tokenizer("letters", limited, 300, [299, 298]))
        (partial,) = (tmp_path / "cache").glob(".*.partial")
        if damage is None:
            partial.write_bytes(b"")  # shorter than its state says: it begins anew
        elif damage == "state":
            (state,) = (tmp_path / "cache").glob(".*.progress")
            state.write_text(state.read_text().replace('"tokens": ', '"tokens": 1'))  # damaged: so does it then
        else:
            partial.write_bytes(partial.read_bytes() + damage)
        file = tokenize(sources, tmp_path / "cache", LETTERS)
        assert np.array_equal(np.load(file), whole)
        assert file.stat().st_size == 128 + whole.nbytes
        file.unlink()


SLOW = """
import sys, time
from pathlib import Path
from tikmix_fast.data import tokenizing
tokenizing._CHECKPOINT = 100
def slow(text):
    time.sleep(0.005)
    with open(sys.argv[2], "a") as log:
        log.write("x")
    return list(text.encode())
file = tokenizing.tokenize(sorted(Path(sys.argv[1]).glob("*.jsonl")), Path(sys.argv[1]) / "cache",
                           tokenizing.Tokenizer("slow", slow, 256, b"|"))
print(file)
"""


def test_a_killed_run_goes_on_and_of_two_processes_one_works(tmp_path):
    documents = [f"document {number} " * 5 for number in range(200)]
    sources = texts(tmp_path, documents)
    command = [sys.executable, "-c", SLOW, str(tmp_path), str(tmp_path / "calls")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE)
    while not (tmp_path / "calls").exists() or (tmp_path / "calls").stat().st_size < 50:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list((tmp_path / "cache").glob("*.npy"))
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert bytes(np.load(outputs[0])) == b"".join(
        document.encode() + b"|" for source in (0, 1) for document in documents[source::2]
    )
    assert len(sources) == 2
    assert (tmp_path / "calls").stat().st_size < 220  # 200, and what came after the last state


@pytest.mark.parametrize("ends", ["fails", "finishes"])
def test_a_process_that_waited_uses_the_tokens_or_makes_them(tmp_path, ends):
    (tmp_path / "a.txt").write_text("ab")
    expected = tokenize([tmp_path / "a.txt"], tmp_path / "cache")
    content = expected.read_bytes()
    expected.unlink()
    results = []
    with FileLock(tmp_path / "cache" / f".{expected.name}.lock"):
        waiting = threading.Thread(target=lambda: results.append(tokenize([tmp_path / "a.txt"], tmp_path / "cache")))
        waiting.start()
        time.sleep(0.2)
        assert not results
        if ends == "finishes":
            expected.write_bytes(content)
    waiting.join(30)
    assert results == [expected]
    assert expected.read_bytes() == content
    assert hidden(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: [5, 300], r"0.jsonl:2: the tokenizer wrong must give tokens from 0 to 299; got 5 to 300"),
        (lambda text: [-1], "0.jsonl:2: .*got -1 to -1"),
        (lambda text: [0.5], "0.jsonl:2: .*must give a sequence of int; got float64"),
        (lambda text: [[1]], r"0.jsonl:2: .*of shape \(1, 1\)"),
        (lambda text: int(text), "0.jsonl:2: the tokenizer wrong refuses the text"),
    ],
)
def test_a_tokenizer_that_goes_wrong_is_named_with_the_document(tmp_path, encode, message):
    sources = texts(tmp_path, ["good", "bad"], files=1)
    wrong = Tokenizer("wrong", lambda text: [] if text == "good" else encode(text), 300)
    with pytest.raises(ValueError, match=message):
        tokenize(sources, tmp_path / "cache", wrong)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_text_that_is_no_unicode_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:1: the tokenizer bytes refuses the text"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"vocabulary": 0}, "vocabulary must be an int from 1"),
        ({"separator": [256]}, "separator must contain tokens below 256"),
    ],
)
def test_bad_tokenizers(options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(**{"name": "a", "encode": BYTES.encode, "vocabulary": 256, **options})


def test_a_tokenizer_of_transformers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs transformers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    def wrapped(words, **options):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        backend.post_processor = tokenizers.processors.TemplateProcessing("<b> $A", special_tokens=[("<b>", 1)])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=3, **options)
        return Tokenizer.from_transformers(fast)

    words = {"?": 0, "<b>": 1, "<e>": 2, "hello": 3, "world": 4}
    sources = texts(tmp_path, ["hello world hello world", "new world"], files=1)
    tokenizer = wrapped(words, eos_token="<e>")
    assert tokenizer.vocabulary == 5
    assert np.load(tokenize(sources, tmp_path / "cache", tokenizer)).tolist() == [3, 4, 3, 4, 2, 0, 4, 2]
    assert np.load(tokenize(sources, tmp_path / "cache", wrapped(words))).tolist() == [3, 4, 3, 4, 0, 4]
    assert wrapped(words).name == wrapped(words).name != wrapped({**words, "world": 5, "new": 4}).name


@pytest.mark.parametrize("kind", ["txt", pytest.param("parquet", marks=pytest.mark.slow)])
def test_text_is_never_in_memory_as_a_whole(tmp_path, kind):
    """160 MB, of the .parquet in one row group, by a process that may not grow by more than half of that."""
    file = tmp_path / f"a.{kind}"
    if kind == "txt":
        line = b"x" * 99 + b"\n"
        with file.open("wb") as out:
            for _ in range(16):
                out.write(line * 100_000)
    else:
        arrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'data'")
        parquet.write_table(arrow.table({"text": [random.randbytes(5_000).hex() for _ in range(16_000)]}), file)
        assert parquet.ParquetFile(file).num_row_groups == 1
    script = f"""
import resource, sys
import numpy as np
from tikmix_fast.data.tokenizing import tokenize
if {kind == "parquet"}:
    import pyarrow.parquet
def peak():  # MB; ru_maxrss is in kB, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
before = peak()
tokens = tokenize([{str(file)!r}], {str(tmp_path / "cache")!r})
print(len(np.load(tokens, mmap_mode="r")), peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 160_000_000 + 2 * (1 if kind == "txt" else 16_000)
    assert grown < 80
