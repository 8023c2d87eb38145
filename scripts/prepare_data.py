"""Build a recipe's token store ahead of its run, check it, share it; list and remove the stores that there are.

python scripts/prepare_data.py --recipe recipes/owt_512.yaml --num_workers 8
python scripts/prepare_data.py --recipe recipes/owt_512.yaml --part 2/8      one of 8 jobs, on any machine
python scripts/prepare_data.py --recipe recipes/owt_512.yaml --merge         when all of them are done
python scripts/prepare_data.py --recipe recipes/owt_512.yaml --verify
python scripts/prepare_data.py --recipe recipes/owt_512.yaml --export nanogpt --export_dir data/openwebtext
python scripts/prepare_data.py --recipe recipes/owt_512.yaml --upload_to me/owt-tokens
python scripts/prepare_data.py --recipe recipes/owt_512.yaml --download_from me/owt-tokens
python scripts/prepare_data.py --list
python scripts/prepare_data.py --prune 30       those that no run has read for 30 days

The store is the same byte for byte in one piece, by several workers or in parts. Interrupted, the same command goes
on. A worker encodes a file of the dataset at a time, so that a dataset of one file gains nothing by workers or parts.
One process encodes on all cores already: workers pay where it waits for a slow source. Parts wait in
`data_cache_dir`/stores/*.parts: a folder that all jobs share, or one into which all their files are copied.
Options that are not the script's own are the recipe's. A run needs none of this: it builds the store as it trains.
"""

import argparse
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Self

# Else `datasets` imports torch when it begins to stream: some 2 s in this process and in each of its workers.
os.environ.setdefault("USE_TORCH", "0")

import numpy as np

from clm_owt.console import print_lines
from clm_owt.data.building import build, encode_parts, find_missing_parts
from clm_owt.data.documents import count_files
from clm_owt.data.kept_stores import KeptStore, kept_stores, prune
from clm_owt.data.shared_store import download_store, upload_store
from clm_owt.data.sources import Source, resolve_source
from clm_owt.data.token_store import TokenStore
from clm_owt.errors import InputError, RecipeError, RunFailed, exit_with
from clm_owt.files import replacing
from clm_owt.formatting import format_bytes, format_duration, text_table
from clm_owt.planning.disks import block_bytes, disk_problems, find_disk
from clm_owt.recipe import Recipe, default_of
from clm_owt.recipe_reader import load_recipe, parse_command_line, path_errors

# On so many cores, workers were not faster than one process for less than a gigabyte of local text (docs/data.md).
FEW_CORES = 2
UNUSED_DAYS = 30
NANOGPT_FILES = {"train": "train.bin", "validation": "val.bin"}


class Progress:
    """Prints every `every` seconds how far the encoding is, and once more at the end. Used in a `with` statement."""

    def __init__(self, store: TokenStore, expected_tokens: int | None, every: float = 10.0):
        self.store, self.expected_tokens, self.every = store, expected_tokens, every
        self.documents = self.tokens = self.text_bytes = 0
        self.before = sum(store.tokens.values()) if store.manifest else 0
        self.began = time.monotonic()
        self.over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        print_lines(self.line())

    def run(self) -> None:
        while not self.over.wait(self.every):
            print_lines(self.line())

    def encoded(self, documents: int, tokens: int, text_bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes

    def line(self) -> str:
        seconds = time.monotonic() - self.began
        self.store.refresh()
        shards = (
            sum(len(self.store.manifest[split]["shards"]) for split in NANOGPT_FILES) if self.store.manifest else 0
        )
        parts = [
            f"{self.documents:,} documents ({self.documents / seconds:,.0f}/s)",
            f"{format_bytes(self.text_bytes)} of text ({self.text_bytes / seconds / 1e6:.1f} MB/s)",
            f"{self.before + self.tokens:,} tokens",
            f"{shards:,} shards",
        ]
        if self.expected_tokens and self.tokens and not self.over.is_set():
            left = max(0, self.expected_tokens - self.before - self.tokens)
            parts.append(f"about {format_duration(left * seconds / self.tokens)} left")
        return ", ".join(parts)


def prepare(options: argparse.Namespace, recipe: Recipe) -> None:
    source = resolve_source(recipe)
    store = TokenStore(recipe, source)
    if options.verify:
        return verify(store)
    if options.download_from:
        download_store(recipe, source, options.download_from)
    elif options.part:
        return encode_part(options, recipe, source, store)
    elif not store.is_complete_on_disk():
        if options.merge and (missing := find_missing_parts(recipe, source)):
            raise InputError(f"--merge: {len(missing)} parts are not there yet, files {show_files(missing)}")
        check_disk(recipe, store)
        workers = useful_workers(options.num_workers, source)
        with Progress(store, expected_tokens(recipe)) as progress:
            build(recipe, source, num_workers=workers, on_encoded=progress.encoded)
    store.refresh()
    print_lines(*summary_lines(store))
    if options.export:
        export_nanogpt(store, options.export_dir)
    if options.upload_to:
        upload_store(store, options.upload_to, options.private)
        print_lines(f"Uploaded to {options.upload_to}; take it with --download_from {options.upload_to}")


def find_cache(recipe_options: list[str]) -> Path:
    """The `data_cache_dir` of these options, with which no recipe need be given."""
    given, problems = parse_command_line(recipe_options)
    if given.recipe:
        return Path(load_recipe(recipe_options).data_cache_dir).expanduser()
    cache = " ".join(given.data_cache_dir[-1]) if given.data_cache_dir else default_of("data_cache_dir")
    with path_errors(problems, "data_cache_dir", cache):
        folder = Path(cache).expanduser()
        folder.exists()
    if problems:
        raise RecipeError(problems)
    return folder


def list_stores(cache: Path) -> None:
    stores = kept_stores(cache)
    if not stores:
        return print_lines(f"There are no token stores in {cache}")
    rows = [
        (
            store.folder.name,
            format_bytes(store.size),
            "in use" if store.in_use() else show_day(store),
            store.describe(),
        )
        for store in stores
    ]
    in_all = format_bytes(sum(store.size for store in stores))
    print_lines(
        f"Token stores in {cache / 'stores'}, {in_all}", text_table(("store", "size", "last used", "holds"), rows)
    )


def prune_stores(cache: Path, days: float) -> None:
    """Remove what was not used for `days` days, and say what became of each store."""
    freed = 0
    for store, outcome in prune(cache, days):
        freed += store.size if outcome == "removed" else 0
        size = format_bytes(store.size)
        print_lines(f"{outcome:<8} {store.folder.name}: {size}, last used {show_day(store)}; {store.describe()}")
    print_lines(f"Freed {format_bytes(freed)} in {cache / 'stores'}")


def show_day(store: KeptStore) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(store.last_used))


def useful_workers(num_workers: int, source: Source) -> int:
    """`num_workers`, or the number of files where that is lower. Prints a line where it is, and where one process
    would do as well."""
    if num_workers == 1:
        return 1
    files = count_files(source)
    if num_workers > files:
        print_lines(f"--num_workers: {files} instead of {num_workers}, since a worker encodes one file at a time")
    elif source.files and (os.cpu_count() or 1) <= FEW_CORES:
        print_lines("--num_workers: one process encodes local files on all cores already; workers gain little here")
    return min(num_workers, files)


def encode_part(options: argparse.Namespace, recipe: Recipe, source: Source, store: TokenStore) -> None:
    """Encode part i of n, as `--part i/n` says, into part files: a run of neighbouring files of the source."""
    number, count = options.part
    if store.is_complete_on_disk():
        return print_lines("The token store is complete already")
    total = count_files(source)
    files = range((number - 1) * total // count, number * total // count)
    if not files:
        return print_lines(f"Part {number}/{count}: nothing to do, the dataset has {total} files")
    share = expected_tokens(recipe)
    with Progress(store, share and share * len(files) // total) as progress:
        parts = encode_parts(recipe, source, files, options.num_workers, progress.encoded)
    print_lines(
        f"Part {number}/{count}: {len(files)} of {total} files, in {parts.folder}; when all parts are there: --merge"
    )


def expected_tokens(recipe: Recipe) -> int | None:
    """How many training tokens the recipe expects; None where it does not say."""
    return recipe.expected_train_blocks and recipe.expected_train_blocks * recipe.block_size


def check_disk(recipe: Recipe, store: TokenStore) -> None:
    """Raises InputError where the expected store does not fit on the disk."""
    if recipe.expected_train_blocks is None:
        return
    folder = store.folder or Path(recipe.data_cache_dir).expanduser()
    vocab_size = store.tokenizer.vocab_size if store.tokenizer else recipe.train_tokenizer_vocab_size or 50_257
    size = recipe.expected_train_blocks * block_bytes(recipe, vocab_size)
    problems = disk_problems([(find_disk(folder), size, "data_cache_dir")])
    if problems:
        raise InputError("\n".join(problems))


def summary_lines(store: TokenStore) -> list[str]:
    """What a complete store holds."""
    documents = store.documents
    return [
        f"Token store {store.folder}",
        f"  training    {documents['train']:>13,} documents {len(store.train):>11,} blocks of {store.block_size}",
        f"  validation  {documents['validation']:>13,} documents {len(store.validation):>11,} blocks",
        f"  left out    {documents['empty']:>13,} empty documents",
    ]


def verify(store: TokenStore) -> None:
    """Raises InputError with every shard that is not as it was written."""
    if not store.complete:
        raise InputError(f"--verify: there is no complete token store of this recipe ({store.folder or 'none begun'})")
    problems = []
    for split in (store.validation, store.train):
        for index in range(len(split.shard_rows)):
            try:
                split.open_shard(index)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    shards = len(store.validation.shard_rows) + len(store.train.shard_rows)
    print_lines(*summary_lines(store), f"Verified: {shards:,} shards are complete and as they were written")


def export_nanogpt(store: TokenStore, folder: Path) -> None:
    """Write `train.bin` and `val.bin` as nanoGPT's loader maps them: uint16 ids end to end, the documents of each
    split without the incomplete last block. Raises InputError for a store of 32-bit ids."""
    if store.manifest["dtype"] != "uint16":
        raise InputError(f"--export nanogpt: its files hold 16-bit ids; this store's are {store.manifest['dtype']}")
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in NANOGPT_FILES.items():
        blocks, file = getattr(store, split), folder / name
        with replacing(file) as aside, open(aside, "wb") as sink:
            for index in range(len(blocks.shard_rows)):
                np.ascontiguousarray(blocks.open_shard(index), "<u2").tofile(sink)
        print_lines(f"{file}: {file.stat().st_size // 2:,} tokens")


def show_files(files: list[int]) -> str:
    return ", ".join(map(str, files[:20])) + (", …" if len(files) > 20 else "")


def parse_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} does not work; expected i/n with i from 1 to n, such as 2/8")
    return int(match[1]), int(match[2])


def parse_positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not work; expected at least 1")
    return int(text)


def parse_days(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} does not work; expected a number of days, such as {UNUSED_DAYS}")
    return float(text)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num_workers", type=parse_positive, default=1, help="processes that encode files side by side"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--part", type=parse_part, metavar="I/N", help="encode one of N parts, and no more")
    what.add_argument("--merge", action="store_true", help="build the store from parts, all of which must be there")
    what.add_argument("--verify", action="store_true", help="read every shard of the store and check it")
    what.add_argument("--download_from", metavar="REPO", help="take the store from this dataset on the Hub")
    what.add_argument("--list", action="store_true", help="list the stores in data_cache_dir; needs no recipe")
    what.add_argument(
        "--prune", type=parse_days, nargs="?", const=UNUSED_DAYS, metavar="DAYS",
        help="remove the stores in data_cache_dir that were not used for so many days (default: "
        f"{UNUSED_DAYS}; 0: all that are not in use); needs no recipe",
    )  # fmt: skip
    parser.add_argument("--export", choices=["nanogpt"], help="write the store as train.bin and val.bin")
    parser.add_argument("--export_dir", type=Path, default=Path("."), help="folder of the exported files")
    parser.add_argument("--upload_to", metavar="REPO", help="upload the store as this dataset on the Hub")
    parser.add_argument("--private", action="store_true", help="create the dataset as private")
    options, recipe_options = parser.parse_known_args(argv)
    try:
        if options.list:
            list_stores(find_cache(recipe_options))
        elif options.prune is not None:
            prune_stores(find_cache(recipe_options), options.prune)
        else:
            prepare(options, load_recipe(recipe_options))
    except InputError as error:
        exit_with(error)
    except RunFailed as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; the same command continues")
    except KeyboardInterrupt:
        print_lines("Interrupted; the same command continues")
        sys.exit(130)


if __name__ == "__main__":
    status = 0
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # a thread that waits for a server would hold an ordinary exit
