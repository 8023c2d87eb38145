"""What the documents say can be done is done: each command is run here or named with the reason why it cannot be, each
error that the program can print is explained."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ROOT, environment

DOCUMENTS = [ROOT / "README.md", ROOT / "docs/guide.md"]

# What is not run by the tests: (pattern of the command, why).
NOT_RUN = [
    (r"make ", "installs everything; `make quickstart` and `make test` are what runs these tests"),
    (r"source ", "the environment is that of the tests"),
    (r"accelerate config$", "asks questions"),
    (r"wandb ", "needs a W&B account and its server; the sweep files are checked against W&B's schema"),
    (r"hf auth", "needs an account"),
    (r"\w+=\w+ accelerate launch .*cpu_2proc", "run by test_sweep.py and test_run.py on a smaller recipe"),
    (r"sbatch ", "needs a cluster"),
    (r"docker ", "needs a daemon"),
    (r".*--calibrate", "needs a GPU"),
    (r".*scripts/estimate.py --recipe", "takes minutes on 2 cores; test_estimate.py runs it on smaller models"),
    (
        r".*scripts/sweep.py(?!.*--dry_run)",
        "trains for hours (lambda_owt) or minutes; test_sweep.py runs smaller sweeps",
    ),
    (
        r"(accelerate launch|python) run_clm_owt.py (?!--help).*",
        "downloads OpenWebText; test_run.py runs smaller recipes",
    ),
    (r".*run_clm_owt.py --recipe recipes/quickstart.yaml", "takes minutes; it is `make quickstart`"),
    (r".*scripts/benchmark.py", "takes minutes; its parts are tested by test_benchmark.py"),
    (r".*scripts/(push|sample|evaluate_model|plot_run|prepare_data|launch).*", "needs a run's folder or the Hub"),
    (r"python tests/faults.py", "takes minutes; test_faults.py runs its short form"),
    (r"python -m pytest ", "is part of this suite"),
    (r"tensorboard|trackio", "serves until it is stopped"),
    (r"pip install", "needs the network"),
]


def commands(document: Path) -> list[str]:
    """The commands of a document's `bash` blocks, continued lines joined, comments left out."""
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*$", "", line).strip()
            if command:
                found.append(" ".join(command.split()))
    return found


ALL = [(document.name, command) for document in DOCUMENTS for command in commands(document)]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN if re.match(pattern, command)), None)


def test_there_are_commands_to_look_at():
    assert len([command for name, command in ALL if name == "guide.md"]) > 10


@pytest.mark.parametrize(("document", "command"), [pair for pair in ALL if not reason_not_to_run(pair[1])])
def test_a_command_of_the_documents_works(document, command, tmp_path):
    words = shlex.split(command)
    assert words[0] == "python", f"{document}: {command}: add it to NOT_RUN with a reason, or make it one that runs"
    if "--output" in words:
        words[words.index("--output") + 1] = str(tmp_path / "picture.png")
    elif "visualize_lr_schedule" in command:
        words += ["--output", str(tmp_path / "picture.png")]
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("document", "command"), ALL)
def test_every_file_and_option_that_a_command_names_exists(document, command):
    from clm_owt.recipe import FIELDS

    for word in shlex.split(command):
        if re.fullmatch(r"[\w./]+\.(py|yaml|sh|slurm)", word) and not word.startswith(("/", "my", "runs/")):
            assert (ROOT / word).exists(), f"{document}: {command}: there is no {word}"
    if "run_clm_owt.py" in command:
        options = command.split("run_clm_owt.py", 1)[1]
        for name in re.findall(r"--(\w+)", options):
            assert name in FIELDS or name in ("recipe", "plan_only", "help"), (
                f"{document}: {command}: no option --{name}"
            )


def test_no_reason_is_given_for_a_command_that_is_not_there():
    expected_later = r"sbatch|docker|tensorboard|hf auth|pip install|make |source |benchmark|push|cpu_2proc|quickstart"
    for pattern, _ in NOT_RUN:
        assert any(re.match(pattern, command) for _, command in ALL) or re.search(expected_later, pattern), pattern


def explained() -> list[list[str]]:
    """What the guide's table of errors quotes, each in its parts around `…`."""
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    table = guide.split("| it says |")[1].split("\n\n")[0]
    quotes = [
        quote
        for row in table.splitlines()[1:]
        if row.startswith("| `")
        for quote in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    return [[part.strip() for part in quote.split("…")] for quote in quotes]


def template(node: ast.expr) -> str:
    """The text of a message, with {} for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(value.value if isinstance(value, ast.Constant) else "{}" for value in values)
        case ast.BinOp(left=left, right=right):
            return template(left) + template(right)
    return ""


def printable_errors() -> list[tuple[str, str]]:
    """Every text in the code that an error is made of."""
    errors = {"InputError", "RecipeError", "RuntimeError", "FloatingPointError"}
    found = []
    for file in [ROOT / "run_clm_owt.py", *(ROOT / "clm_owt").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            function = node.func
            raised = isinstance(function, ast.Name) and function.id in errors
            collected = (
                isinstance(function, ast.Attribute)
                and function.attr == "append"
                and isinstance(function.value, ast.Name)
                and function.value.id == "problems"
            )
            text = " ".join(template(node.args[0]).split())
            if (raised or collected) and re.search(r"[a-z]{3}", text):
                found.append((file.name, text))
    return sorted(set(found))


@pytest.mark.parametrize(("file", "message"), printable_errors())
def test_every_error_that_can_be_printed_is_explained_in_the_guide(file, message):
    assert any(all(part in message for part in parts) for parts in explained()), f"{file}: {message}"
