"""What preparing data takes on this machine: `benchmark.py data`.

    python scripts/benchmark.py data --recipe recipes/owt_512.yaml

The text: `--files`, Parquet with the recipe's text column; without them, the distinct Python and documentation files
of this environment, until they are `--megabytes` long. Each way is a process of its own and reads the same files:

    read           only reads the text column
    ours           Parquet -> finished token store
    nanogpt        as nanoGPT prepares OpenWebText: datasets.map with tiktoken, a process a core, a memory-mapped file
    transformers   as the examples of transformers do: datasets.map(tokenize), datasets.map(group_texts)

Each is timed for its first 30 MB of text, and for what comes after them, when encoders have seen most words; imports
are left out of all. The rest of the table is about the store while it is built: memory, disk, the first optimizer
step, the training beside it.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from clm_owt.formatting import markdown_table
from clm_owt.planning.devices import cpu_name
from clm_owt.program import output_file, run_script
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import load_recipe

ROOT = Path(__file__).parent.parent
ENDINGS = (".py", ".pyi", ".rst", ".md", ".txt")
LARGEST_FILE = 1_000_000  # bytes: beyond it files are mostly tables
FIRST_BYTES = 30_000_000
LARGE_BYTES = 2_000_000_000  # for what must not depend on the size
SMALL_BYTES = 50_000_000
OPENWEBTEXT_BYTES = 39.77e9  # of text, as the Hub's card of Skylion007/openwebtext says
SMALL_MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=256", "--effective_batch_size=8"]
RUN = [
    "--max_steps=40",
    "--num_train_epochs=none",
    "--warmup_steps=0",
    "--sample_steps=none",
    "--validation_documents=2",
]
WAYS = ("read", "ours", "nanogpt", "transformers")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmark.py data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", nargs="+", help="Parquet files instead of this environment's own texts")
    parser.add_argument("--megabytes", type=int, default=90, help="of text that is collected (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measured repetitions (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write all measurements there")
    parser.add_argument("--way", choices=[*WAYS, "batches"], help=argparse.SUPPRESS)  # in a process of its own
    options, recipe_options = parser.parse_known_args(argv)
    if options.way:
        answer = WAY[options.way](options.files, recipe_options)
        unit = 1 if sys.platform == "darwin" else 1024
        print(json.dumps({"answer": answer, "peak": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-data-", dir=os.environ.get("TMPDIR")) as folder:
        Benchmark(Path(folder), options, recipe_options).run()


# The ways, each in a process of its own


def parquet(files: list[str]) -> list[str]:
    """Options that have a recipe read these files instead of its dataset."""
    instead = ["--dataset_name=parquet", "--dataset_config_name=none", "--dataset_split=train"]
    return [*instead, "--dataset_revision=none", "--data_files", *files]


def load(files: list[str], recipe_options: list[str]) -> Recipe:
    return load_recipe([*recipe_options, *parquet(files)])


def read_only(files: list[str], recipe_options: list[str]) -> list[tuple[float, int]]:
    column = load(files, recipe_options).text_column
    began, seen, progress = time.perf_counter(), 0, []
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(1000, columns=[column]):
            seen += pa.compute.sum(pa.compute.binary_length(batch.column(0))).as_py()
            progress.append((time.perf_counter() - began, seen))
    return progress


def build_store(files: list[str], recipe_options: list[str]) -> list[tuple[float, int]]:
    import awkward  # noqa: F401 (as datasets, imported where it is needed)
    import datasets  # noqa: F401

    from clm_owt.data.building import build
    from clm_owt.data.sources import resolve_source

    began, seen, progress = time.perf_counter(), 0, []

    def on_encoded(documents: int, tokens: int, text_bytes: int) -> None:
        nonlocal seen
        seen += text_bytes
        progress.append((time.perf_counter() - began, seen))

    recipe = load(files, recipe_options)
    build(recipe, resolve_source(recipe), on_encoded=on_encoded)
    progress.append((time.perf_counter() - began, seen))
    return progress


def prepare_as_nanogpt(files: list[str], recipe_options: list[str]) -> list[tuple[float, int]]:
    import datasets
    import tiktoken

    recipe = load(files, recipe_options)
    datasets.disable_progress_bars()
    content = json.loads((Path(recipe.tokenizer_name) / "tokenizer.json").read_text(encoding="utf-8"))
    ranks = {bytes(map(BYTE_OF.__getitem__, token)): rank for token, rank in content["model"]["vocab"].items()}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<eot>": 50256})

    def process(example: dict) -> dict:
        ids = encoding.encode_ordinary(example[recipe.text_column])
        ids.append(50256)
        return {"ids": ids, "len": len(ids)}

    with tempfile.TemporaryDirectory(dir=recipe.data_cache_dir) as cache:
        began = time.perf_counter()
        data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        data = data.map(process, remove_columns=data.column_names, num_proc=os.cpu_count())
        tokens = np.memmap(f"{cache}/train.bin", np.uint16, "w+", shape=(sum(data["len"]),))
        shards, written = min(1024, len(data)), 0
        for index in range(shards):
            batch = data.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            tokens[written : written + len(ids)] = ids
            written += len(ids)
        tokens.flush()
        return [(time.perf_counter() - began, text_bytes(files, recipe.text_column))]


def prepare_as_transformers(files: list[str], recipe_options: list[str]) -> list[tuple[float, int]]:
    import datasets
    import transformers

    recipe = load(files, recipe_options)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    tokenizer, size = transformers.AutoTokenizer.from_pretrained(recipe.tokenizer_name), recipe.block_size

    def tokenize(examples: dict) -> dict:
        return tokenizer(examples[recipe.text_column])

    def group_texts(examples: dict) -> dict:
        joined = {key: [value for row in rows for value in row] for key, rows in examples.items()}
        total = len(joined["input_ids"]) // size * size
        blocks = {key: [row[i : i + size] for i in range(0, total, size)] for key, row in joined.items()}
        return blocks | {"labels": blocks["input_ids"].copy()}

    with tempfile.TemporaryDirectory(dir=recipe.data_cache_dir) as cache:
        began = time.perf_counter()
        data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        data = data.map(tokenize, batched=True, remove_columns=data.column_names, num_proc=os.cpu_count())
        data.map(group_texts, batched=True, num_proc=os.cpu_count())
        return [(time.perf_counter() - began, text_bytes(files, recipe.text_column))]


def time_batches(files: list[str], recipe_options: list[str]) -> list[float]:
    """Seconds of each of 200 micro-batches of 64 blocks at random places of the finished store."""
    from clm_owt.data.sources import resolve_source
    from clm_owt.data.token_store import TokenStore

    recipe = load(files, recipe_options)
    store = TokenStore(recipe, resolve_source(recipe))
    assert store.is_complete_on_disk()
    draw = np.random.default_rng(0)
    store.train.read(np.arange(0, len(store.train), 1000))  # each shard is verified when it is first opened
    seconds = []
    for _ in range(200):
        rows = draw.integers(0, len(store.train), 64)
        began = time.perf_counter()
        store.train.read(rows)
        seconds.append(time.perf_counter() - began)
    return seconds


WAY = {
    "read": read_only,
    "ours": build_store,
    "nanogpt": prepare_as_nanogpt,
    "transformers": prepare_as_transformers,
    "batches": time_batches,
}

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SHOWN = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTE_OF = {chr(byte): byte for byte in SHOWN} | {chr(256 + index): byte for index, byte in enumerate(HIDDEN)}


# The text


def environment_texts(limit: int) -> Iterator[str]:
    """Distinct files of the standard library and the installed packages, in an order that mixes them."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    files = {file for folder in folders for file in folder.rglob("*") if file.suffix in ENDINGS}
    seen, size = set(), 0
    for file in sorted(files, key=lambda file: hashlib.sha256(str(file).encode()).digest()):
        content = file.read_bytes() if file.is_file() and file.stat().st_size <= LARGEST_FILE else b""
        digest = hashlib.sha256(content).digest()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and digest not in seen:
            seen.add(digest)
            size += len(content)
            yield text
            if size >= limit:
                return


def write_parquet(texts: list[str], file: Path, column: str) -> str:
    pq.write_table(pa.table({column: pa.array(texts, pa.large_string())}), file, row_group_size=1000)
    return str(file)


def text_bytes(files: list[str], column: str) -> int:
    tables = (pq.read_table(file, columns=[column]) for file in files)
    return sum(pa.compute.sum(pa.compute.binary_length(table.column(0))).as_py() for table in tables)


def up_to(texts: list[str], limit: int) -> int:
    """How many of `texts` are `limit` bytes long."""
    return int(np.searchsorted(np.cumsum([len(text.encode()) for text in texts]), limit)) + 1


# The measurements


class Benchmark:
    def __init__(self, folder: Path, options: argparse.Namespace, recipe_options: list[str]):
        self.folder, self.options, self.recipe_options = folder, options, recipe_options
        self.recipe = load_recipe(recipe_options)
        self.rows: list[tuple[str, str]] = []

    def run(self) -> None:
        self.write_corpora()
        measured = {
            "ways": self.measure_ways(),
            "batches": self.measure_batches(),
            "memory": self.measure_memory(),
            "first step": self.measure_first_step(),
            "beside": self.measure_step_beside_builder(),
        }
        self.report(measured)
        if self.options.json:
            self.options.json.write_text(json.dumps(measured, indent=2) + "\n")

    def write_corpora(self) -> None:
        column = self.recipe.text_column
        if self.options.files:
            texts = [t for f in self.options.files for t in pq.read_table(f, columns=[column])[column].to_pylist()]
            self.described = f"{len(texts):,} documents of {len(self.options.files)} files"
        else:
            texts = list(environment_texts(self.options.megabytes * 1_000_000))
            self.described = f"{len(texts):,} Python and documentation files of this environment, all different"
        first = up_to(texts, FIRST_BYTES)
        self.first = self.write_files("first", texts[:first])
        self.whole = self.first + self.write_files("after", texts[first:])
        self.sizes = {"first": text_bytes(self.first, column), "whole": text_bytes(self.whole, column)}
        self.small = [write_parquet(texts[: up_to(texts, SMALL_BYTES)], self.folder / "small.parquet", column)]
        copies = LARGE_BYTES // text_bytes(self.small, column)
        self.large = [shutil.copy(self.small[0], self.folder / f"large-{copy:03d}.parquet") for copy in range(copies)]

    def write_files(self, name: str, texts: list[str], files: int = 3) -> list[str]:
        bounds = [len(texts) * index // files for index in range(files + 1)]
        return [
            write_parquet(texts[start:stop], self.folder / f"{name}-{start}.parquet", self.recipe.text_column)
            for start, stop in itertools.pairwise(bounds)
        ]

    def process(
        self, way: str, files: list[str], cores: set[int] | None = None, cache: Path | None = None
    ) -> subprocess.Popen:
        """A way at work on `files`, in a cache folder of its own."""
        cache = cache or self.folder / f"cache-{time.monotonic_ns()}"
        cache.mkdir(exist_ok=True)
        command = [sys.executable, __file__, "--way", way, "--files", *files]
        process = subprocess.Popen(
            [*command, *self.recipe_options, f"--data_cache_dir={cache}"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "USE_TORCH": "0"},  # as the builder is started
            preexec_fn=cores and functools.partial(os.sched_setaffinity, 0, cores),
        )
        process.cache = cache
        return process

    def answer(self, process: subprocess.Popen) -> tuple[list, int]:
        """What a way's process has measured, and the most memory that it had, in bytes."""
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"error: {' '.join(process.args)} failed with status {process.returncode}")
        said = json.loads(output.splitlines()[-1])
        return said["answer"], said["peak"]

    def measure_ways(self) -> dict[str, dict[str, list[float]]]:
        """MB of text a second, of the first 30 MB and of the rest, for each round."""
        speeds = {way: {"first": [], "after": []} for way in WAYS}
        for _ in range(self.options.rounds):
            for way in WAYS:
                process = self.process(way, self.whole)
                progress, _ = self.answer(process)
                if way == "ours":
                    self.store_cache = process.cache
                if len(progress) == 1:  # says nothing while it works
                    (first, _) = self.answer(self.process(way, self.first))
                    progress = first + progress
                seconds, size = progress[-1]
                first_seconds, first_size = next(mark for mark in progress if mark[1] >= self.sizes["first"])
                speeds[way]["first"].append(first_size / first_seconds / 1e6)
                speeds[way]["after"].append((size - first_size) / (seconds - first_seconds) / 1e6)
        return speeds

    def measure_batches(self) -> list[float]:
        process = self.process("batches", self.whole, cache=self.store_cache)
        return self.answer(process)[0]

    def measure_memory(self) -> dict[str, dict[str, float]]:
        """Peak resident memory of building, and bytes on disk for each token: at the end and, sampled, at most."""
        measured = {}
        for name, files in (("small", self.small), ("large", self.large)):
            process = self.process("ours", files)
            most = 0
            while process.poll() is None:
                most = max(most, folder_bytes(process.cache))
                time.sleep(0.05)
            _, peak = self.answer(process)
            manifest = json.loads(next(process.cache.glob("stores/*/manifest.json")).read_text())
            blocks = sum(shard["rows"] for split in ("train", "validation") for shard in manifest[split]["shards"])
            tokens = blocks * self.recipe.block_size
            end = folder_bytes(process.cache)
            measured[name] = {"peak": peak, "bytes": end / tokens, "most_bytes": max(most, end) / tokens}
            shutil.rmtree(process.cache)
        return measured

    def measure_first_step(self) -> dict[str, list[float]]:
        """Seconds from the start of a run without a store to its first optimizer step."""
        measured = {"small": [], "large": []}
        for _ in range(self.options.rounds):
            for name, files in (("small", self.small), ("large", self.large)):
                home = self.folder / f"run-{time.monotonic_ns()}"
                home.mkdir()
                began = time.perf_counter()
                process = self.training(files, home)
                for line in process.stdout:
                    if line.startswith("step 1/"):
                        measured[name].append(time.perf_counter() - began)
                        break
                process.terminate()
                process.wait()
                shutil.rmtree(home)
        return measured

    def training(self, files: list[str], home: Path) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "run_clm_owt.py"), *self.recipe_options, *parquet(files)]
        folders = [f"--data_cache_dir={home / 'cache'}", f"--output_dir={home / 'run'}"]
        return subprocess.Popen(
            [*command, *folders, *SMALL_MODEL, *RUN, "--logging_steps=1", "--expected_train_blocks=none"],
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure_step_beside_builder(self) -> dict[str, list[float]]:
        """Seconds of optimizer steps on one core, in turns with the builder stopped and at work on another."""
        import torch

        from clm_owt.model.gpt2 import build_model
        from clm_owt.optimizers import OPTIMIZERS

        if len(os.sched_getaffinity(0)) < 2:
            return {"without": [], "beside": []}
        first, second = sorted(os.sched_getaffinity(0))[:2]
        os.sched_setaffinity(0, {first})
        torch.set_num_threads(1)
        recipe = load_recipe([*self.recipe_options, *SMALL_MODEL, *RUN])
        model = build_model(recipe, 50_257, eos_token_id=0)
        optimizer = OPTIMIZERS[recipe.optimizer].build(model, recipe)
        blocks = torch.randint(50_257, (4, recipe.block_size))
        builder = self.process("ours", self.large, cores={second})
        while folder_bytes(builder.cache) < 1_000_000 and builder.poll() is None:
            time.sleep(0.1)
        measured = {"without": [], "beside": []}
        for index in range(80):
            name = "beside" if index % 2 else "without"
            builder.send_signal(signal.SIGCONT if name == "beside" else signal.SIGSTOP)
            if builder.poll() is not None:
                break
            time.sleep(0.05)
            began = time.perf_counter()
            model(input_ids=blocks, labels=blocks).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            measured[name].append(time.perf_counter() - began)
        builder.kill()
        builder.communicate()
        return {name: seconds[2:] for name, seconds in measured.items()}

    def report(self, measured: dict) -> None:
        speeds = measured["ways"]
        size, first = self.sizes["whole"] / 1e6, self.sizes["first"] / 1e6
        print(f"{self.described}: {size:.0f} MB of text; first {first:.0f} MB, and after them")
        print(f"{cpu_name()}, {os.cpu_count()} cores, medians of {self.options.rounds} rounds in turns\n")
        ratio = {
            (way, part): statistics.median(
                ours / theirs for ours, theirs in zip(speeds["ours"][part], speeds[way][part], strict=True)
            )
            for way in WAYS
            for part in ("first", "after")
        }
        rows = [
            [
                way,
                *(f"{statistics.median(speeds[way][part]):,.1f}" for part in ("first", "after")),
                *(f"{ratio[way, part]:.3g}" for part in ("first", "after")),
            ]
            for way in WAYS
        ]
        print(markdown_table(["way", "MB/s, first", "MB/s, after", "ours is, first", "ours is, after"], rows))
        memory, starts, beside = measured["memory"], measured["first step"], measured["beside"]
        small, large = (statistics.median(starts[name]) for name in ("small", "large"))
        batches = [1e3 * seconds for seconds in measured["batches"]]
        rows = [
            ["disk, bytes a token: finished store, and at most while it is built",
             f"{memory['large']['bytes']:.3f}, {memory['large']['most_bytes']:.3f}"],
            ["peak memory of the builder, for 50 MB and for 2 GB of text",
             f"{memory['small']['peak'] / 1e9:.2f} GB, {memory['large']['peak'] / 1e9:.2f} GB"],
            ["cold start to the first optimizer step, for 50 MB and for 2 GB of text",
             f"{small:.1f} s, {large:.1f} s ({large / small:.2f} ×)"],
            [f"64 blocks of {self.recipe.block_size} at random from the store",
             f"{statistics.median(batches):.2f} ms [{min(batches):.2f}, {max(batches):.2f}]"],
        ]  # fmt: skip
        if beside["beside"]:
            without, with_builder = (statistics.median(beside[name]) for name in ("without", "beside"))
            rows.append(
                ["training step on one core beside the builder on another, against one without",
                 f"{with_builder / without:.2f} × ({1e3 * without:.0f} ms, {1e3 * with_builder:.0f} ms)"]
            )  # fmt: skip
        print()
        print(markdown_table(["beside that", "measured"], rows))
        minutes = OPENWEBTEXT_BYTES / 1e6 / statistics.median(speeds["ours"]["after"]) / 60
        print(f"\nderived: all of OpenWebText, {OPENWEBTEXT_BYTES / 1e9:.1f} GB of text, in {minutes:.0f} min")


def folder_bytes(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        try:
            size += file.lstat().st_size if file.is_file() else 0
        except OSError:  # renamed meanwhile
            continue
    return size


if __name__ == "__main__":
    run_script(main)
