import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from support.runs import write_json_lines

from clm_owt.data import parts
from clm_owt.data.builder import Builder
from clm_owt.data.building import build, encode_parts, find_missing_parts
from clm_owt.data.corpus import Position
from clm_owt.data.documents import count_files
from clm_owt.data.encoding import Encoder
from clm_owt.data.order import TrainingBlocks
from clm_owt.data.packing import StoreWriter, write_store
from clm_owt.data.parts import Encoded, Parts, encode_documents, groups_of_documents, with_end_of_text
from clm_owt.data.sources import Source, resolve_source
from clm_owt.data.token_store import TokenStore, store_folder
from clm_owt.data.tokenizer_files import TokenizerFolder, load_tokenizer, tokenizer_folder
from clm_owt.errors import InputError
from clm_owt.recipe import Recipe


@pytest.fixture
def recipe_for(tmp_path, byte_tokenizer_folder):
    def make(documents: list[str] | None = None, **settings) -> Recipe:
        if documents is not None:
            file = tmp_path / "documents.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
            settings |= {"dataset_name": "json", "data_files": (str(file),)}
        if "train_tokenizer_vocab_size" not in settings:
            settings = {"tokenizer_name": str(byte_tokenizer_folder)} | settings
        required = {"effective_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 1}
        return Recipe(**required | {"data_cache_dir": str(tmp_path / "cache"), "validation_documents": 1} | settings)

    return make


def words(count: int, seed: int = 0) -> list[str]:
    """`count` documents of 0 to 60 words; every tenth is empty."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(["the", "gradient", "of", "é", "中文", "loss\n"], k=draw.randrange(60) if i % 10 else 0))
        for i in range(count)
    ]


def built(recipe: Recipe) -> TokenStore:
    source = resolve_source(recipe)
    build(recipe, source)
    store = TokenStore(recipe, source)
    assert store.is_complete_on_disk()
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def left_behind(cache: str) -> list[Path]:
    return list(Path(cache).parent.glob("cache*"))


# what is stored


def test_the_blocks_of_a_small_corpus_are_those_computed_by_hand(recipe_for):
    """Validation 'Ab' 'C'; training 'dE', '', 'fghi', 'j<|e': 256 after each, cut every 4 ids."""
    recipe = recipe_for(["Ab", "", "C", "dE", "", "fghi", "j<|e"], validation_documents=2, block_size=4)
    store = built(recipe)
    assert store.validation.read([0]).tolist() == [[65, 98, 256, 67]]  # then 256: an incomplete block, dropped
    assert store.train.read([0, 1, 2]).tolist() == [[100, 69, 256, 102], [103, 104, 105, 256], [106, 60, 124, 101]]
    assert (len(store.validation), store.train_blocks) == (1, 3)
    assert store.documents == {"validation": 2, "train": 3, "empty": 2}
    assert store.tokens == {"validation": 4, "train": 12}
    assert store.train.read([2, 0]).dtype == np.int64


def test_blocks_go_across_documents_batches_and_shards(recipe_for, monkeypatch):
    """Over 30 shards, against the same ids laid end to end in one array."""
    monkeypatch.setattr(parts, "ENCODED_BYTES", 10_000)
    documents = words(6000)
    store = built(recipe_for(documents, validation_documents=300, block_size=3))
    filled = [text for text in documents if text]
    ids = [np.append(np.frombuffer(text.encode(), np.uint8).astype(np.int64), 256) for text in filled]
    for split, of_split in ((store.validation, ids[:300]), (store.train, ids[300:])):
        tokens = np.concatenate(of_split)
        expected = tokens[: len(tokens) // 3 * 3].reshape(-1, 3)
        assert np.array_equal(split.read(np.arange(len(split))), expected)
    assert set(store.train.shard_rows[:-1]) == {8192} and len(store.train.shard_rows) > 30
    assert store.documents["empty"] == len(documents) - len(filled)


def test_ids_are_uint16_or_where_they_do_not_fit_uint32(recipe_for, byte_tokenizer_folder, tmp_path):
    from datasets import Dataset

    small = built(recipe_for(words(50), block_size=8))
    content = json.loads((byte_tokenizer_folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] = content["model"]["vocab"]["<|endoftext|>"] = 70_000
    (tmp_path / "large").mkdir()
    (tmp_path / "large/tokenizer.json").write_text(json.dumps(content))
    large = built(recipe_for(words(50), block_size=8, tokenizer_name=str(tmp_path / "large")))
    for store, dtype in ((small, "uint16"), (large, "uint32")):
        shard = Dataset.from_file(str(store.folder / "train-00000.arrow"))
        assert shard.features["input_ids"].feature.dtype == dtype and shard.features["input_ids"].length == 8
        assert shard[1]["input_ids"] == store.train.read([1])[0].tolist()
    assert np.array_equal(large.train.read([0, 1]) == 70_000, small.train.read([0, 1]) == 256)


def test_end_of_text_follows_every_document():
    tokens = with_end_of_text(np.array([1, 2, 3], np.uint32), np.array([2, 0, 1]), 9, np.dtype(np.uint16))
    assert tokens.tolist() == [1, 2, 9, 9, 3, 9]


def test_documents_are_grouped_by_size_and_none_is_lost(monkeypatch):
    import pyarrow as pa

    monkeypatch.setattr(parts, "ENCODED_BYTES", 10)
    texts = pa.array(["skip", "abc", "", "defgh", "x" * 30, "ij", "", "k" * 10, "l"], pa.large_string()).slice(1)
    groups = [group.to_pylist() for group in groups_of_documents(texts)]
    assert groups == [["abc", "", "defgh"], ["x" * 30], ["ij", ""], ["k" * 10], ["l"]]
    assert groups_of_documents(texts.slice(0, 0)) == []


def test_the_store_depends_on_content_not_on_where_it_lies(recipe_for, tmp_path):
    recipe = recipe_for(words(50), block_size=8)
    first = built(recipe).folder
    elsewhere = shutil.copy(recipe.data_files[0], tmp_path / "copy.jsonl")
    assert built(recipe_for(block_size=8, dataset_name="json", data_files=(str(elsewhere),))).folder == first
    assert built(recipe_for(block_size=9, dataset_name="json", data_files=(str(elsewhere),))).folder != first
    assert built(recipe_for(words(51), block_size=8)).folder != first


def test_every_file_is_flushed_to_disk_before_it_has_its_name(recipe_for, monkeypatch):
    flushed = set()
    fsync = os.fsync

    def watched(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    recipe = recipe_for(words(1000), block_size=8, train_tokenizer_vocab_size=300)
    source = resolve_source(recipe)
    encode_parts(recipe, source, range(0))  # makes the tokenizer
    store = built(recipe)
    (manifest_and_shards, tokenizer) = (list(folder.iterdir()) for folder in (store.folder, store.tokenizer.folder))
    assert {file.suffix for file in manifest_and_shards} == {".json", ".arrow"} and len(tokenizer) == 2
    assert all(file.stat().st_ino in flushed for file in manifest_and_shards + tokenizer)


def test_a_store_of_settings_that_were_always_there_keeps_its_name_and_its_bytes(recipe_for, tmp_path):
    """As the first version wrote it."""
    recipe = recipe_for(words(3000), block_size=8, validation_documents=70)
    folder, digest = built(recipe).folder, hashlib.sha256()
    for name, content in contents(folder).items():
        digest.update(name.encode() + content.replace(str(tmp_path).encode(), b""))
    assert (folder.name, digest.hexdigest()[:16]) == ("json-04bbb1cfa11a69c4", "e0440c1e424e7696")
    trained = dataclasses.replace(recipe, tokenizer_name=None, train_tokenizer_vocab_size=300)
    assert tokenizer_folder(trained, resolve_source(trained)).name == "bpe-300-33dd89426811d2e5"


def split_texts(store: TokenStore) -> tuple[str, str]:
    """What the blocks of both splits say, | for the end of a document."""
    splits = (split.read(range(len(split))).reshape(-1) for split in (store.validation, store.train))
    validation, train = ("".join("|" if token == 256 else chr(token) for token in split) for split in splits)
    return validation, train


BOOK = "".join(f"line {number}\n" for number in range(10, 30))  # 20 lines of 8 bytes


@pytest.mark.parametrize(
    ("share", "first_line"),
    [(0.25, 25), (0.26, 25), (0.24, 26), (0.001, None), (0.046, None), (0.05, 29), (0.99, 11)],
)
def test_a_share_of_one_document_is_its_last_lines(recipe_for, tmp_path, share, first_line):
    """The share is cut to whole lines, never more than it says; where it has none, there is nothing to validate on."""
    file = tmp_path / "book.txt"
    file.write_text(BOOK)
    settings = {"dataset_name": "text", "text_documents": "file", "data_files": (str(file),), "block_size": 2}
    recipe = recipe_for(**settings, validation_documents=None, validation_share=share)
    if first_line is None:
        with pytest.raises(InputError, match="raise validation_share or lower block_size"):
            built(recipe)
        return
    store = built(recipe)
    at = BOOK.index(f"line {first_line}")
    assert split_texts(store) == (BOOK[at:], BOOK[:at])  # and an end-of-text id each, half a block
    assert store.documents == {"validation": 1, "train": 1, "empty": 0}


def test_a_share_of_many_documents_is_the_end_of_the_text(recipe_for, tmp_path):
    """Counted in bytes, over all files, in which the file and the document at the border are cut: 24 of 80 bytes."""
    texts = [
        ["a b c d", "", "efgh ijkl mnop qrst uvwx"],
        ["é" * 10 + " yyyyyyyy z", "", "end of all", "last"],
        ["too!"],
    ]
    for name, of_file in zip("abc", texts, strict=True):
        write_json_lines(tmp_path / f"{name}.jsonl", of_file)
    files = {"dataset_name": "json", "data_files": (str(tmp_path / "*.jsonl"),), "block_size": 1}
    store = built(recipe_for(**files, validation_documents=None, validation_share=0.3))
    validation, train = split_texts(store)
    assert validation == "z|end of all|last|too!|"
    assert train.encode("latin-1").decode() == "a b c d|efgh ijkl mnop qrst uvwx|" + "é" * 10 + " yyyyyyyy |"
    assert store.documents == {"validation": 4, "train": 3, "empty": 2}


def test_validation_files_are_held_out_also_where_data_files_name_them(recipe_for, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n\n{name}2")
    files = {"dataset_name": "text", "data_files": (str(tmp_path / "*.txt"),), "block_size": 3}
    by_files = recipe_for(**files, validation_documents=None, validation_files=(str(tmp_path / "b.txt"),))
    store = built(by_files)
    assert split_texts(store) == ("b1|b2|", "a1|a2|c1|c2|")
    assert built(recipe_for(**files, validation_documents=2)).folder != store.folder
    with pytest.raises(InputError, match="data_files: all of them are validation_files"):
        resolve_source(dataclasses.replace(by_files, validation_files=(str(tmp_path),)))


@pytest.mark.parametrize("key", ["validation_share", "validation_files"])
def test_an_error_behind_the_border_names_the_row_of_the_file(held_out_by, tmp_path, key):
    recipe = held_out_by(key)
    with (tmp_path / "c.jsonl").open("ab") as file:
        file.write(b'{"text": "a\xff"}\n')
    with pytest.raises(InputError, match=r"c\.jsonl: row 900, column 'text': not UTF-8 \(byte 1 is 0xff"):
        built(recipe)


# interruptions


class Interrupted(Exception):
    pass


def test_the_validation_documents_are_counted_before_the_first_training_shard_is_there(recipe_for):
    """Also where they end amid a batch that goes on with training documents."""
    recipe = recipe_for(words(3000), block_size=8, validation_documents=70)
    source = resolve_source(recipe)

    def stop(split):
        raise Interrupted

    with pytest.raises(Interrupted):
        build(recipe, source, stop)
    store = TokenStore(recipe, source)
    store.wait_for_validation(check=lambda what: None)
    assert store.train_blocks_so_far == 0
    assert store.counts()["validation_documents"] == 70
    assert built(recipe).counts()["validation_documents"] == 70


@pytest.fixture
def held_out_by(recipe_for, tmp_path):
    """Recipes whose validation set is the same 900 or so of 4,000 documents at the end of the text, in two files."""

    def make(key: str, **settings) -> Recipe:
        documents = words(4000)
        for name, of_file in (("a", documents[:2500]), ("b", documents[2500:3100]), ("c", documents[3100:])):
            write_json_lines(tmp_path / f"{name}.jsonl", of_file)
        held_out = {
            "validation_documents": 900,
            "validation_share": 0.225,
            "validation_files": (str(tmp_path / "c.jsonl"),),
        }
        ways = {"validation_documents": None, key: held_out[key]}
        files = {"dataset_name": "json", "data_files": (str(tmp_path / "*.jsonl"),)}
        return recipe_for(**files | {"block_size": 8} | ways | settings)

    return make


def write_parts_here(recipe: Recipe, source: Source, files: range) -> None:
    """What `encode_parts` does in other processes."""
    encode_parts(recipe, source, range(0))  # makes the tokenizer
    tokenizer = TokenizerFolder(tokenizer_folder(recipe, source))
    for file in reversed(files):
        encoded = encode_documents(source, Encoder(tokenizer), Position(file), file + 1)
        Parts(store_folder(recipe, source, tokenizer)).write(file, encoded)


@pytest.mark.parametrize(
    ("key", "write_parts"),
    [
        ("validation_documents", write_parts_here),
        ("validation_share", encode_parts),
        ("validation_files", write_parts_here),
    ],
)
def test_parts_are_packed_to_the_same_bytes_whatever_holds_out_the_validation_set(
    held_out_by, tmp_path, key, write_parts
):
    settings = {"train_tokenizer_vocab_size": 300, "tokenizer_name": None}
    whole = built(held_out_by(key, **settings))
    recipe = held_out_by(key, **settings, data_cache_dir=str(tmp_path / "parts"))
    source = resolve_source(recipe)
    write_parts(recipe, source, range(count_files(source)))
    assert find_missing_parts(recipe, source) == []
    assert contents(built(recipe).folder) == contents(whole.folder)
    assert whole.counts()["validation_documents"] in range(790, 901)


@pytest.mark.parametrize("key", ["validation_documents", "validation_share", "validation_files"])
def test_a_build_interrupted_after_any_shard_continues_to_the_same_bytes(held_out_by, tmp_path, monkeypatch, key):
    monkeypatch.setattr(parts, "ENCODED_BYTES", 50_000)
    whole = built(held_out_by(key)).folder
    recipe = held_out_by(key, data_cache_dir=str(tmp_path / "again"))
    source = resolve_source(recipe)

    def stop(split):
        raise Interrupted

    interruptions = 0
    while not TokenStore(recipe, source).is_complete_on_disk():
        try:
            build(recipe, source, stop)
        except Interrupted:
            interruptions += 1
            store = TokenStore(recipe, source)
            store.refresh()
            if not store.complete:  # what a kill amid writing leaves
                (store.folder / f"train-{len(store.train.shard_rows):05d}.arrow.partial").write_bytes(b"torn")
                (store.folder / "manifest.json.partial").write_bytes(b"torn")
    assert interruptions > 8
    assert contents(store.folder) == contents(whole)


def test_a_build_killed_at_random_instants_continues_to_the_same_bytes(recipe_for, tmp_path):
    documents = words(30_000)
    settings = {"block_size": 16, "validation_documents": 500, "train_tokenizer_vocab_size": 300}
    whole = built(recipe_for(documents, **settings)).folder
    recipe = recipe_for(documents, **settings, data_cache_dir=str(tmp_path / "killed"))
    source = resolve_source(recipe)
    draw = random.Random(1)
    for shards in (0, 1, 4):
        builder = Builder.start(recipe, source)
        store = TokenStore(recipe, source)
        while not store.complete and store.train_blocks_so_far < shards * 8192:
            builder.check()
            time.sleep(0.002)
        time.sleep(draw.random() * (2.0 if shards == 0 else 0.05))
        os.killpg(builder.process.pid, signal.SIGKILL)
        builder.process.wait()
        if not store.complete:
            with pytest.raises(RuntimeError, match="SIGKILL"):
                builder.check()
    with Builder.start(recipe, source) as builder:
        TokenStore(recipe, source).wait_complete(builder.check)
    store = TokenStore(recipe, source)
    assert store.complete
    assert contents(store.folder) == contents(whole)
    assert list((tmp_path / "killed/stores").iterdir()) == [store.folder]


def test_a_missing_or_shortened_shard_is_written_anew_and_the_rest_kept(recipe_for):
    recipe = recipe_for(words(4000), block_size=8, validation_documents=50)
    store = built(recipe)
    before = contents(store.folder)
    first_written = (store.folder / "train-00000.arrow").stat().st_mtime_ns
    (store.folder / "train-00002.arrow").unlink()
    assert not TokenStore(recipe, store.source).is_complete_on_disk()
    built(recipe)
    assert contents(store.folder) == before
    assert (store.folder / "train-00000.arrow").stat().st_mtime_ns == first_written


def test_an_altered_shard_is_named_when_it_is_first_opened(recipe_for):
    recipe = recipe_for(words(4000), block_size=8)
    store = built(recipe)
    file = store.folder / "train-00001.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    store.train.read([0])
    with pytest.raises(InputError, match=r"train-00001\.arrow: altered"):
        store.train.read([8192])
    file.unlink()
    with pytest.raises(InputError, match=r"train-00001\.arrow: missing"):
        store.train.read([8192])


def test_two_builders_of_one_store_do_not_disturb_each_other(recipe_for):
    recipe = recipe_for(words(8000), block_size=8)
    source = resolve_source(recipe)
    with Builder.start(recipe, source) as first, Builder.start(recipe, source) as second:
        store = TokenStore(recipe, source)
        store.wait_complete(lambda _: (first.check(), second.check()))
        assert first.process.wait(30) == second.process.wait(30) == 0
    assert built(recipe).is_complete_on_disk()
    assert left_behind(recipe.data_cache_dir) and not (Path(recipe.data_cache_dir) / "locks").exists()


# the builder as a process


def test_no_process_is_started_for_a_complete_store(recipe_for):
    recipe = recipe_for(words(100), block_size=8)
    store = built(recipe)
    assert Builder.start(recipe, store.source).process is None


def test_a_builder_ends_with_its_parent(recipe_for):
    """The parent's end closes the pipe that is the builder's standard input."""
    recipe = recipe_for(words(100), block_size=8)
    source = resolve_source(recipe)
    builder = Builder.start(recipe, source)
    builder.process.stdin.close()
    assert builder.process.wait(30) == 1


def test_training_reads_what_is_there_while_the_rest_is_built(recipe_for, monkeypatch):
    """The blocks of the first positions do not depend on how far the builder is."""
    recipe = recipe_for(words(6000), block_size=8)
    source = resolve_source(recipe)
    may_go_on, began = threading.Semaphore(0), threading.Event()

    def slowly(split):
        began.set()
        may_go_on.acquire(timeout=30)

    building = threading.Thread(target=build, args=(recipe, source, slowly))
    building.start()
    began.wait(30)
    waited_for = []

    def check(what):
        waited_for.append(what)
        may_go_on.release()

    blocks = TrainingBlocks(TokenStore(recipe, source), seed=7, check=check)
    blocks.store.wait_for_tokenizer(check)
    early = blocks.ids(0, 20_000), blocks.read(0, 100)
    assert blocks.store.train_blocks is None and "shard 2 of the training blocks" in waited_for
    assert blocks.seconds_waited > 0
    for _ in range(50):
        may_go_on.release()
    building.join()
    complete = TrainingBlocks(TokenStore(recipe, source), seed=7)
    complete.store.wait_for_tokenizer(check)
    assert np.array_equal(complete.ids(0, 20_000), early[0])
    assert np.array_equal(complete.read(0, 100), early[1])
    past_the_end = complete.store.train_blocks + 5
    assert np.array_equal(blocks.ids(0, past_the_end), complete.ids(0, past_the_end))


# input that cannot work


@pytest.mark.parametrize(
    ("documents", "settings", "message"),
    [
        ([""] * 5, {}, r"no document with text in it \(5 empty ones\)"),
        (["abcdefgh"], {}, "leave none to train on; lower validation_documents"),
        (["abcdefgh", "ab"], {"block_size": 8}, "training documents are 3 tokens, shorter than one block of 8"),
        (["ab", "abcdefgh"], {"block_size": 8}, "validation documents are 3 tokens, shorter than one block of 8"),
        (["abcdefgh"], {"train_tokenizer_vocab_size": 300}, "leave none to train on; lower validation_documents"),
    ],
)
def test_a_corpus_too_small_is_an_error_and_nothing_is_written(recipe_for, documents, settings, message):
    recipe = recipe_for(documents, **{"block_size": 4} | settings)
    with pytest.raises(InputError, match=message) as raised:
        build(recipe, resolve_source(recipe))
    assert len(str(raised.value).splitlines()) <= 3
    assert not left_behind(recipe.data_cache_dir)


def test_bad_input_reaches_the_training_process_with_its_message(recipe_for):
    recipe = recipe_for([""], block_size=4)
    source = resolve_source(recipe)
    with Builder.start(recipe, source) as builder, pytest.raises(InputError, match="no document with text"):
        TokenStore(recipe, source).wait_for_validation(builder.check)
    assert not left_behind(recipe.data_cache_dir)


@pytest.mark.parametrize("way", [{"validation_documents": 20}, {"validation_share": 0.45}])
def test_the_trained_tokenizer_sees_only_training_documents(recipe_for, way):
    documents = ["qqqq qqqq qqqq qqqq"] * 20 + ["zwzw zwzw zwzw zwzw zwzw"] * 20
    documents = documents if "validation_documents" in way else documents[::-1]
    way = {"validation_documents": None} | way
    store = built(recipe_for(documents, **way, train_tokenizer_vocab_size=260, block_size=4))
    vocabulary = load_tokenizer(store.tokenizer.folder).get_vocab()
    assert "zw" in vocabulary and "qq" not in vocabulary


def test_tokens_that_are_in_a_shard_are_let_go(tmp_path):
    """Memory does not grow with the dataset, whichever split the tokens go to."""
    alive: list[weakref.ref] = []

    def encoded(start):
        for row in range(40):
            tokens = np.full(100_000, 5, np.uint16)
            alive.append(weakref.ref(tokens))
            assert sum(array() is not None for array in alive) <= 3
            yield Encoded(Position(0, row), tokens, np.array([len(tokens)]), 0)

    description = {"block_size": 8, "dtype": "uint16", "validation_documents": 2, "source": {"dataset_name": "x"}}
    writer = StoreWriter(tmp_path / "store", description)
    write_store(writer, encoded)
    assert len(alive) == 40 and len(writer.shards("train")) > 50
