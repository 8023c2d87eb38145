"""What the documents say can be done is done: each command that can run here runs, as it stands there.

The commands run in one folder that looks like a checkout to them: its `recipes/` have the names of the real ones, and
tiny sizes; `runs/` holds finished runs of them; the Hub is one on this machine, with OpenWebText's first documents.
"""

import collections
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.forked_commands import ForkedCommands
from support.hub_fixtures import GPT2, OPENWEBTEXT, english_documents, write_openwebtext
from support.hub_server import HubServer
from support.runs import ROOT

from clm_owt.recipe import FIELDS
from clm_owt.recipe_reader import load_recipe

pytestmark = pytest.mark.xdist_group("documents")  # their commands share a folder

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# What does not run here: (pattern of the command, why).
NOT_RUN = [
    (r"make (quickstart|test)$", "creates .venv and installs into it; `make test` is what runs this"),
    (r"make test-", "takes minutes to half an hour"),
    (r"make reproduce", "trains for minutes; tests/experiments/test_records.py runs a recorded run again"),
    (r"source ", "the environment is that of the tests"),
    (r"pip install", "needs a network"),
    (r"accelerate launch --max_restarts$", "half a command, in a sentence"),
    (r"accelerate config", "asks questions"),
    (r"hf auth|wandb ", "needs an account"),
    (r"tensorboard|trackio", "serves until it is stopped"),
    (r"sbatch", "needs a cluster; test_machines.py runs the script with stand-ins for Slurm's programs"),
    (r".*(single_gpu|multi_gpu|fsdp2|fp8_hopper|mps)\.yaml|.*--calibrate|.*benchmark.py gpu", "needs a GPU"),
    (r".*--tasks", "needs the extra [eval] and data sets from the network; `make test-tasks` runs local tasks"),
    (r"python scripts/benchmark.py data", "collects 90 MB and writes 2 GB of text, which takes many minutes"),
    (r".*s3://", "needs a bucket; tests/faults/test_lost_disks.py has one on this machine"),
    (r".*--branch_from", "trains 4,000 steps; tests/training/test_branch.py runs such branches"),
    (r"python -m pytest", "is part of this suite"),
    (
        r"python scripts/study.py (?!.*--plan_only)",
        "trains for an hour; tests/faults/test_studies.py runs a small one",
    ),
]

# Words that a command begins with, in a line of text or a table.
COMMANDS = r"(?:[A-Z_]+=\w+ )?(?:accelerate (?:launch|config)|python [\w/]+\.py|pip install|make|sbatch|wandb)"


def fenced(document: Path, language: str) -> list[str]:
    """The blocks of a document that are marked as of `language`."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


def commands(document: Path) -> list[str]:
    """The commands of the `bash` blocks, continued lines joined and comments left out, and those in the text."""
    found = []
    for block in fenced(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found.append(" ".join(re.sub(r"(^|\s)#.*$", "", line).split()))
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found += [span for span in re.findall(r"`([^`\n]+)`", text) if re.match(rf"{COMMANDS} \S", span)]
    return list(dict.fromkeys(filter(None, found)))


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN if re.match(pattern, command)), None)


OF_DOCUMENT = {document.name: commands(document) for document in DOCUMENTS}
ALL = list(dict.fromkeys(command for found in OF_DOCUMENT.values() for command in found))
RUNNING = [command for command in ALL if not reason_not_to_run(command)]
SNIPPETS = [snippet for document in DOCUMENTS for snippet in fenced(document, "python")]

TINY = {
    "dataset_name": OPENWEBTEXT,
    "dataset_config_name": "plain_text",
    "tokenizer_name": GPT2,
    "validation_documents": 20,
    "block_size": 256,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "effective_batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "max_steps": 12,
    "logging_steps": 1,
    "eval_steps": 12,
    "save_steps": 12,
    "sample_steps": 12,
    "sample_max_new_tokens": 8,
    "sample_prompts": ["The quick brown fox"],
    "data_cache_dir": "cache",
}


class Checkout:
    """A folder in which the commands of the documents run, and a Hub for them."""

    def __init__(self, folder: Path, hub: HubServer, forked: ForkedCommands, env: dict[str, str]):
        self.folder, self.hub = folder, hub
        self.env = env | {"PATH": f"{forked.path}{os.pathsep}{env['PATH']}"}
        for name in ("README.md", "run_clm_owt.py", "scripts", "accelerate_configs"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "recipes").mkdir()
        for kind in ("sweeps", "studies"):
            (folder / "recipes" / kind).symlink_to(ROOT / "recipes" / kind)
        for recipe in RECIPES:
            (folder / "recipes" / recipe.name).write_text(yaml.safe_dump(TINY))
        (folder / "my").mkdir()
        with gzip.open(folder / "my/documents.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"body": document[:60]}) + "\n" for document in english_documents()[:800])
        texts = pa.table({"text": list(english_documents()[:200])})
        for half in range(2):
            pq.write_table(texts.slice(100 * half, 100), folder / f"my/documents-{half}.parquet")
        (folder / "my/book.txt").write_text("\n\n".join(english_documents()[:100]))
        (folder / "prompts.txt").write_text("The quick brown fox\nOnce upon a time\n")
        self.run("python run_clm_owt.py --recipe recipes/quickstart.yaml")
        shutil.copytree(folder / "runs/quickstart", folder / "finished")

    def finish(self, *names: str) -> None:
        """Let there be finished runs of these names."""
        for name in names:
            if not (self.folder / "runs" / name / "model").exists():
                shutil.copytree(self.folder / "finished", self.folder / "runs" / name, dirs_exist_ok=True)

    def run(self, command: str, **more: str) -> str:
        """What a command printed that ended well."""
        result = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.env | more, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    @property
    def store(self) -> Path:
        [manifest] = self.folder.glob("cache/stores/Skylion007*/manifest.json")
        return manifest.parent


def write_small_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 400 ids in GPT-2's form."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(english_documents()[:100], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": end, "bos_token": end, "unk_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    documents = [document[:300] for document in english_documents()[:600]]
    with HubServer(folder / "hub") as hub:
        hub.add_repository(OPENWEBTEXT, write_openwebtext(folder / "openwebtext", documents), repo_type="dataset")
        hub.add_repository(GPT2, write_small_tokenizer(folder / "gpt2"))
        hub.add_token("hf_mine", user="me", role="write")
        env = hub.env("hf_mine", folder, PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
        with ForkedCommands(folder / "forked", env) as forked:
            (folder / "checkout").mkdir()
            yield Checkout(folder / "checkout", hub, forked, env)


# What must be so before a command can do what its document says.


def forget_run(checkout: Checkout, command: str) -> None:
    """A training is to train, and not to report the run that is there."""
    words = shlex.split(command)
    options = words[words.index("run_clm_owt.py") + 1 :]
    here = Path.cwd()
    os.chdir(checkout.folder)
    try:
        shutil.rmtree(load_recipe(options).output_dir, ignore_errors=True)
    finally:
        os.chdir(here)


def forget_store(checkout: Checkout, command: str) -> None:
    shutil.rmtree(checkout.folder / "cache/stores")


def encode_all_parts(checkout: Checkout, command: str) -> None:
    forget_store(checkout, command)
    checkout.run("python scripts/prepare_data.py --recipe recipes/owt_512.yaml --part 1/1")


def share_store(checkout: Checkout, command: str) -> None:
    checkout.run("python scripts/prepare_data.py --recipe recipes/owt_512.yaml --upload_to me/owt-tokens")
    forget_store(checkout, command)


def share_model(checkout: Checkout, command: str) -> None:
    repository = checkout.hub.add_repository("me/gpt2-owt", checkout.folder / "runs/owt_512/model")
    repository.tags["step-00002000"] = repository.sha


def finish_other_runs(checkout: Checkout, command: str) -> None:
    """A sweep keeps the finished runs that it finds; one run of one sweep is enough."""
    checkout.finish(*(f"quickstart,penalty_weight={weight}" for weight in (0.005, 0.01, 0.02)))
    if "--seeds 2" in command:
        checkout.finish("quickstart,seed=43", "quickstart,penalty_weight=0.05")
        checkout.finish(*(f"quickstart,penalty_weight={weight},seed=43" for weight in (0.005, 0.01, 0.02, 0.05)))
    checkout.finish(*(f"owt_512,penalty_weight={weight}" for weight in (0.005, 0.02, 0.05)))


PREPARATIONS: list[tuple[str, Callable[[Checkout, str], None]]] = [
    (r".*run_clm_owt.py(?!.*--help)", forget_run),
    (r".*prepare_data.py(?!.*parquet).*--(num_workers|part)", forget_store),
    (r".*prepare_data.py.*--merge", encode_all_parts),
    (r".*prepare_data.py.*--download_from", share_store),
    (r".*--revision", share_model),
    (r".*sweep.py recipes/sweeps/lambda_", finish_other_runs),
]

# What a command has done, beside ending well.
EXPECTED = [
    (r".*--plan_only", "12 steps of 2,048 tokens"),
    (r".*run_clm_owt.py(?!.*--(plan_only|help))", r"Finished \S+: 12 steps"),
    (r".*--push_to_hub", "Uploaded step 12 to me/gpt2-owt, revision step-00000012"),
    (r".*--verify", "Verified: "),
    (r".*--part 2/8", "Part 2/8: 1 of 4 files"),
    (r".*--list", "oken stores in "),
    (r".*--prune", "Freed 0 bytes in "),
    (r".*--(num_workers|merge|upload_to|download_from)", "Token store .*"),
    (r".*evaluate_model.py", r"loss \d+\.\d+  perplexity"),
    (r".*sample.py(?!.* > )", "Returns the"),
    (r".*sweep.py(?!.*--dry_run)", "Best: "),
    (r".*study.py", "Plan of the study lambda_owt: 75 runs of 12 steps"),
    (r".*record.py add", "Recorded: "),
    (r".*--dry_run", "run_clm_owt.py --recipe=recipes/owt_512.yaml"),
    (r".*estimate.py(?!.*--parts)", "Memory of each device, estimated"),
    (r".*--parts", "Derived, not measured"),
    (r".*benchmark.py (?!save|logits)", "path .*ours"),
    (r".*benchmark.py logits", "of rounded logits .* gradient of the head"),
    (r".*plot_run.py", "Drawn: "),
    (r".*visualize_lr_schedule.py", r"peak .* at step|never ends"),
    (r".*visualize_lr_schedule.py .*--output", "Drawn in "),
]


@pytest.mark.parametrize("command", RUNNING)
def test_a_command_of_the_documents_works(command, checkout):
    checkout.finish("quickstart", "owt_512", "owt_512,penalty_weight=0.01")
    for pattern, prepare in PREPARATIONS:
        if re.match(pattern, command):
            prepare(checkout, command)
    output = " ".join(checkout.run(command).split())
    for pattern, expected in EXPECTED:
        assert not re.match(pattern, command) or re.search(" ".join(expected.split()), output), output


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_piece_of_python_in_the_documents_works(snippet, checkout):
    (checkout.folder / "snippet.py").write_text(snippet.replace("STORE", str(checkout.store)))
    assert len(checkout.run("python snippet.py")) > 20


def test_how_many_commands_ran_and_why_the_others_did_not(capsys, record_property):
    lines = []
    for name, found in OF_DOCUMENT.items():
        left_out = collections.Counter(filter(None, map(reason_not_to_run, found)))
        lines.append(f"{name}: {len(found) - left_out.total()} of {len(found)} commands run")
        lines += [f"  {number} not: {reason}" for reason, number in left_out.items()]
    record_property("documents", "\n".join(lines))
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert len(RUNNING) > 30


def test_no_reason_is_given_for_a_command_that_is_not_there():
    assert [pattern for pattern, _ in NOT_RUN if not any(re.match(pattern, command) for command in ALL)] == []


@pytest.mark.parametrize("command", ALL)
def test_every_file_and_option_that_a_command_names_exists(command):
    words = shlex.split(command)
    made_by_commands = ("my/", "my_", "runs/", "data/")
    for word in words:
        if re.fullmatch(r"[\w./]+\.(py|yaml|sh|slurm)", word) and not word.startswith(made_by_commands):
            assert (ROOT / word).exists(), f"there is no {word}"
    programs = [word for word in words if re.fullmatch(r"(run_clm_owt|scripts/\w+|tests/[\w/]+)\.(py|slurm)", word)]
    for program in programs[:1]:
        source = (ROOT / program).read_text(encoding="utf-8")
        own = words[words.index(program) + 1 :]
        for name in re.findall(r"--(\w+)", " ".join(own)):
            assert name in FIELDS or name in ("recipe", "plan_only", "help") or f'"--{name}"' in source, name
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


# Files of a run, and of a dataset, that documents name by their names alone.
NOT_IN_THE_REPOSITORY = {
    "plan.json", "recipe.yaml", "samples.md", "metrics.jsonl", "complete.json", "training_curves.png",
    "run_state.json", "tokenizer.json", "tokenizer_config.json", "manifest.json", "best.yaml", "record.yaml",
    "report.md",
}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_file_that_a_document_names_exists(document):
    text = document.read_text(encoding="utf-8")
    names = re.findall(r"`(?!runs/)([\w./]+(?:\.(?:py|yaml|md|slurm|json|png)|/))`", text)
    folders = [ROOT, ROOT / "clm_owt", ROOT / "accelerate_configs"]
    missing = [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert set(missing) <= NOT_IN_THE_REPOSITORY
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, heading = target.partition("#")
        assert (document.parent / name).exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", (document.parent / name).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


def test_the_readme_can_be_read_in_one_go_and_nothing_is_left_open():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
    assert [document.name for document in DOCUMENTS if "TODO" in document.read_text(encoding="utf-8")] == []
