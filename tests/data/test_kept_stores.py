"""The token stores of a cache: listed, and removed where no process uses them."""

import importlib.util
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support.runs import ROOT

from clm_owt.data.building import build
from clm_owt.data.kept_stores import kept_stores, prune
from clm_owt.data.parts import Parts
from clm_owt.data.sources import resolve_source
from clm_owt.data.token_store import TokenStore
from clm_owt.recipe import Recipe

MONTH = 30 * 86_400


@pytest.fixture
def recipe_for(tmp_path, byte_tokenizer_folder):
    def make(name: str) -> Recipe:
        texts = [f"document {number} of {name}, which is long enough for shards of its own" for number in range(400)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        required = {"effective_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 1}
        settings = {"dataset_name": "json", "data_files": (str(file),), "data_cache_dir": str(tmp_path / "cache")}
        tokenizer = {"tokenizer_name": str(byte_tokenizer_folder), "block_size": 4, "validation_documents": 100}
        return Recipe(**required | settings | tokenizer)

    return make


def built(recipe: Recipe) -> Path:
    source = resolve_source(recipe)
    build(recipe, source)
    store = TokenStore(recipe, source)
    store.find()
    return store.folder


def make_old(folder: Path, seconds: float = MONTH) -> None:
    for file in folder.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def outcomes(cache: Path, days: float) -> dict[str, str]:
    return {store.folder.name: outcome for store, outcome in prune(cache, days)}


def test_a_store_is_listed_with_its_size_what_it_holds_and_when_it_was_read(recipe_for, tmp_path):
    recipes = [recipe_for("one"), recipe_for("two")]
    one, two = map(built, recipes)
    make_old(one)
    make_old(two, MONTH / 2)
    stores = kept_stores(tmp_path / "cache")
    assert [store.folder for store in stores] == [two, one]
    assert stores[0].size == sum(file.stat().st_size for file in two.iterdir())
    one_line = "300 + 100 documents, 4,800 + 1,572 blocks of 4, vocabulary 257"
    assert stores[1].describe() == f"{tmp_path / 'one.jsonl'}: {one_line}"

    TokenStore(recipes[0], resolve_source(recipes[0])).wait_for_validation(lambda what: None)
    stores = kept_stores(tmp_path / "cache")
    assert stores[0].folder == one and time.time() - stores[0].last_used < 60


def test_only_stores_that_were_not_used_for_so_long_are_removed(recipe_for, tmp_path):
    old, new = built(recipe_for("old")), built(recipe_for("new"))
    make_old(old)
    assert outcomes(tmp_path / "cache", 30.5) == {old.name: "kept", new.name: "kept"}
    assert outcomes(tmp_path / "cache", 29.5) == {old.name: "removed", new.name: "kept"}
    assert sorted((tmp_path / "cache/stores").iterdir()) == [new]


def test_a_store_that_a_process_reads_is_not_removed_until_that_process_is_killed(recipe_for, tmp_path):
    recipe = recipe_for("read")
    folder = built(recipe)
    reading, written = os.pipe()
    if (reader := os.fork()) == 0:
        try:
            store = TokenStore(recipe, resolve_source(recipe))
            store.wait_for_validation(lambda what: None)
            os.write(written, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"x"
        make_old(folder)
        assert [store.in_use() for store in kept_stores(tmp_path / "cache")] == [True]
        assert outcomes(tmp_path / "cache", 0) == {folder.name: "in use"}
    finally:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
    assert outcomes(tmp_path / "cache", 0) == {folder.name: "removed"}
    assert built(recipe) == folder


def test_a_store_that_is_being_built_is_not_removed(recipe_for, tmp_path):
    recipe, began, may_go_on = recipe_for("built"), threading.Event(), threading.Event()

    def wait(split: str) -> None:
        began.set()
        assert may_go_on.wait(30)

    building = threading.Thread(target=build, args=(recipe, resolve_source(recipe), wait))
    building.start()
    assert began.wait(30)
    try:
        [store] = kept_stores(tmp_path / "cache")
        make_old(store.folder)
        assert store.describe().endswith("; not complete")
        assert outcomes(tmp_path / "cache", 0) == {store.folder.name: "in use"}
    finally:
        may_go_on.set()
        building.join()
    assert outcomes(tmp_path / "cache", 0) == {store.folder.name: "removed"}


def test_parts_are_listed_and_those_that_are_being_written_are_not_removed(tmp_path):
    parts = Parts(tmp_path / "cache/stores/json-1")
    with parts.in_use():
        parts.write(0, iter([]))
        make_old(parts.folder)
        [kept] = kept_stores(tmp_path / "cache")
        assert kept.describe() == "1 parts for --merge"
        assert outcomes(tmp_path / "cache", 0) == {"json-1.parts": "in use"}
    assert outcomes(tmp_path / "cache", 0) == {"json-1.parts": "removed"}


def test_what_cannot_be_removed_is_kept_with_the_reason_and_the_others_go(recipe_for, tmp_path):
    stuck, other = built(recipe_for("stuck")), built(recipe_for("other"))
    stuck.with_name(stuck.name + ".removed").write_text("a file in the way")
    assert outcomes(tmp_path / "cache", 0) == {stuck.name: "kept (Not a directory)", other.name: "removed"}
    assert (stuck / "manifest.json").exists()


def test_what_an_interrupted_removal_leaves_goes_with_the_next(recipe_for, tmp_path):
    folder = built(recipe_for("half"))
    folder.rename(folder.with_name(folder.name + ".removed"))
    (folder.with_name(folder.name + ".removed") / "train-00000.arrow").unlink()
    assert kept_stores(tmp_path / "cache") == []
    assert list((tmp_path / "cache/stores").iterdir()) == []


def test_the_script_lists_and_prunes_without_a_recipe(recipe_for, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts/prepare_data.py")
    prepare_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare_data)
    cache, folder = tmp_path / "cache", built(recipe_for("mine"))

    def printed(*options: str) -> list[str]:
        prepare_data.main([*options, "--data_cache_dir", str(cache)])
        return capsys.readouterr().out.splitlines()

    title, header, row = printed("--list")
    assert title.startswith(f"Token stores in {cache / 'stores'}, ") and header.split()[:2] == ["store", "size"]
    assert row.startswith(folder.name) and str(tmp_path / "mine.jsonl") in row
    assert printed("--prune")[0].startswith(f"kept     {folder.name}: ")
    removed, freed = printed("--prune", "0")
    assert removed.startswith(f"removed  {folder.name}: ") and freed.endswith(f" in {cache / 'stores'}")
    assert printed("--list") == [f"There are no token stores in {cache}"]
    with pytest.raises(SystemExit, match="2"):
        printed("--prune", "soon")
    assert "'soon' does not work; expected a number of days" in capsys.readouterr().err
