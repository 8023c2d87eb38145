"""From a YAML file and the options of a command line to a checked `Recipe`, without torch.

Options win over the file: `--penalty_weight 0.01` or `--penalty_weight=0.01`, several values separated by spaces,
`none` for null. All problems are found at once and raised as one `RecipeError`.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import math
import re
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import yaml

from clm_owt.data_files import ENDINGS, matching_files, no_match
from clm_owt.errors import RecipeError
from clm_owt.formatting import format_value
from clm_owt.recipe import (
    FIELDS,
    FILE_FORMATS,
    GROUPS,
    PYTHON_DOCS,
    REMOVED_KEYS,
    TRACKERS,
    TYPES,
    VALIDATION_KEYS,
    Recipe,
    is_url,
    show,
)
from clm_owt.recipe_yaml import StrictLoader
from clm_owt.schedule import schedule_problems

# What other programs (nanoGPT, transformers' Trainer, LitGPT) call the keys.
OTHER_NAMES = {
    "dataset": "dataset_name",
    "tokenizer": "tokenizer_name",
    "seq_len": "block_size",
    "context_length": "block_size",
    "max_seq_length": "block_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "hidden_size": "n_embd",
    "model_name_or_path": "init_from",
    "batch_size": "effective_batch_size",
    "global_batch_size": "effective_batch_size",
    "train_batch_size": "effective_batch_size",
    "gradient_accumulation_steps": "effective_batch_size",
    "micro_batch_size": "max_batch_size",
    "per_device_train_batch_size": "max_batch_size",
    "lr": "learning_rate",
    "max_lr": "learning_rate",
    "min_lr": "min_lr_ratio",
    "lr_scheduler_type": "lr_schedule",
    "warmup": "warmup_steps",
    "warmup_iters": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_iters": "max_steps",
    "max_train_steps": "max_steps",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "grad_clip": "max_grad_norm",
    "optim": "optimizer",
    "compile": "torch_compile",
    "lambda": "penalty_weight",
    "penalty": "penalty_type",
    "eval_interval": "eval_steps",
    "log_interval": "logging_steps",
    "out_dir": "output_dir",
    "output": "output_dir",
    "name": "run_name",
    "resume": "resume_from_checkpoint",
    "wandb": "report_to",
}


def load_recipe(argv: Sequence[str]) -> Recipe:
    """The recipe of a command line such as `["--recipe", "recipes/owt_512.yaml", "--penalty_weight", "0.01"]`.

    Raises RecipeError with everything that is wrong.
    """
    return read_command_line(argv)[0]


def read_command_line(argv: Sequence[str]) -> tuple[Recipe, bool]:
    """The recipe, and whether only its plan is asked for (`--plan_only`). `--help` prints all keys and exits."""
    options, problems = parse_command_line(argv)
    path = Path(options.recipe) if options.recipe else None
    values: dict[str, Any] = {}
    broken: set[str] = set()  # keys that were given, with a value that does not work

    def take(name: str, value: Any, convert_value: Callable[[], Any], where: str) -> None:
        try:
            values[name] = check_rule(name, convert_value())
        except ValueError as error:
            problems.append(f"{where}: {name}: {format_value(value)} does not work; expected {error}")
            broken.add(name)

    if path is not None:
        from_file, file_problems = read_recipe_file(path)
        problems += file_problems
        for name, value in from_file.items():
            take(name, value, functools.partial(convert, TYPES[name], value, from_text=False), str(path))
    file_values = dict(values)
    for name in FIELDS:
        given = getattr(options, name)
        if given is None:
            continue
        problems += given_once(name, given)
        take(name, " ".join(given[-1]), functools.partial(words_to_value, name, given[-1]), "command line")
    problems += combination_problems(values, broken)
    if problems:
        raise RecipeError(problems)
    of_a_run = path is not None and path.name == "recipe.yaml" and (path.parent / "plan.json").exists()
    if of_a_run and options.output_dir is None:  # it goes on where it lies, wherever it began
        values["output_dir"] = str(path.parent)
    if not values.get("run_name"):
        values["run_name"] = default_run_name(path, file_values, values)
    if values.get("validation_share") or values.get("validation_files"):
        values["validation_documents"] = None
    if not values.get("output_dir"):
        values["output_dir"] = str(Path("runs") / values["run_name"])
    return Recipe(**values), options.plan_only


def parse_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="run_clm_owt.py",
        usage="accelerate launch run_clm_owt.py --recipe FILE [--plan_only] [--KEY VALUE ...]",
        description="Pretrain GPT-2 as a recipe says. Each key of a recipe is an option too, and wins over the file.",
        allow_abbrev=False,
        argument_default=None,
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # its own knows no exponent: `-1e-3` would be an option
    parser.add_argument("--recipe", action="append", metavar="FILE", help="the recipe's YAML file")
    parser.add_argument("--plan_only", action="store_true", help="print the plan and stop")
    group: argparse._ActionsContainer = parser
    for name, field in FIELDS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        default = "required" if field.default is dataclasses.MISSING else f"default: {show(field.default)}"
        rule = f"; {field.metadata['rule'].text}" if field.metadata["rule"] else ""
        help_text = f"{field.metadata['help']} ({default}{rule})".replace("%", "%%")
        group.add_argument(f"--{name}", nargs="*", action="append", metavar="VALUE", help=help_text)
    # argparse would stop at the first unknown option; all of them are wanted.
    options, unknown = parser.parse_known_args(argv)
    names = [word.split("=")[0] for word in unknown if word.startswith("-")]  # without the values that follow them
    problems = [unknown_key(name, "command line") for name in names or unknown]
    if options.recipe is not None:
        problems += given_once("recipe", options.recipe)
        options.recipe = options.recipe[-1]
    return options, problems


def given_once(name: str, given: Sequence[Any]) -> list[str]:
    return [f"--{name}: given {len(given)} times; give it once"] if len(given) > 1 else []


def unknown_key(name: str, where: str) -> str:
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain in REMOVED_KEYS:
        return f"{where}: {name} is no longer a key: {REMOVED_KEYS[plain]}; remove it"
    known = (*FIELDS, "plan_only", "recipe")
    close = [OTHER_NAMES[plain]] if plain in OTHER_NAMES else difflib.get_close_matches(plain, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "see run_clm_owt.py --help for the keys"
    return f"{where}: unknown key {name}; {hint}"


def read_recipe_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The known keys of a recipe file, and what is said of the others. Raises RecipeError for a file that cannot be
    read as a recipe, alone: without its keys nothing else is to be judged."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except FileNotFoundError:
        raise RecipeError([no_recipe(path)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"--recipe: {path} cannot be read: {error}"]) from error
    except RecursionError:
        raise RecipeError([f"{path}: nested too deeply; expected lines of the form `key: value`"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError([f"{path}{line}: not valid YAML: {reason}"]) from error
    if not isinstance(content, dict):
        raise RecipeError([f"{path}: expected lines of the form `key: value`, got {type(content).__name__}"])
    content = {name: value for name, value in content.items() if name not in REMOVED_KEYS or value is not None}
    unknown = [unknown_key(str(name), str(path)) for name in content if name not in FIELDS]
    return {name: value for name, value in content.items() if name in FIELDS}, unknown


def no_recipe(path: Path) -> str:
    """Where a recipe was looked for, and what is there."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"--recipe: there is no file {path}, and no folder {folder}"
    there = sorted(file.name for file in folder.glob("*.yaml"))
    close = difflib.get_close_matches(path.name, there, n=1) or [name for name in there if name == f"{path.name}.yaml"]
    hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(there) or 'no .yaml files'}"
    return f"--recipe: there is no file {path.name} in {folder}{hint}"


def check_rule(name: str, value: Any) -> Any:
    rule = FIELDS[name].metadata["rule"]
    if value is not None and rule is not None and not rule.holds(value):
        raise ValueError(rule.text)
    return value


def words_to_value(name: str, words: Sequence[str]) -> Any:
    expected = TYPES[name]
    if is_mapping(expected):
        pairs = [tuple(word.partition("=")[::2]) for word in words]
        return None if [w.lower() for w in words] == ["none"] else losses_by_tokens(pairs, from_text=True)
    if is_tuple(expected):
        return convert(expected, None if [w.lower() for w in words] == ["none"] else list(words), from_text=True)
    if not words and expected is bool:  # a bare --push_to_hub
        return True
    if len(words) != 1:
        raise ValueError(f"one value, got {len(words)}")
    return convert(expected, None if words[0].lower() == "none" else words[0], from_text=True)


def alternatives(expected: Any) -> tuple[Any, ...]:
    return typing.get_args(expected) if typing.get_origin(expected) in (UnionType, typing.Union) else (expected,)


def is_tuple(expected: Any) -> bool:
    return any(typing.get_origin(choice) is tuple for choice in alternatives(expected))


def is_mapping(expected: Any) -> bool:
    return any(typing.get_origin(choice) is Mapping for choice in alternatives(expected))


def convert(expected: Any, value: Any, *, from_text: bool) -> Any:
    """`value` as the type `expected`; ValueError says in words what was expected."""
    choices = alternatives(expected)
    if is_mapping(expected):
        if value is not None and not isinstance(value, dict):
            raise ValueError(LOSSES_BY_TOKENS)
        return None if value is None else losses_by_tokens(value.items(), from_text=from_text)
    if is_tuple(expected):
        if value is None:
            return None if type(None) in choices else ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError("text, or a list of texts")
        return tuple(map(without_nul, items))
    if value is None:
        if type(None) in choices:
            return None
        raise ValueError(f"{expected_types(choices)}, not null")
    if bool in choices:
        if isinstance(value, bool):
            return value
        if from_text and value.lower() in ("true", "false", "1", "0", "yes", "no"):
            return value.lower() in ("true", "1", "yes")
        if str(value) == "auto" and len(choices) > 1 and type(None) not in choices:
            return "auto"
        raise ValueError(expected_types(choices))
    kind = next(choice for choice in choices if choice is not type(None))
    if kind is str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError("text (in quotes where it looks like a number)")
        return without_nul(value)
    if isinstance(value, bool) or (isinstance(value, str) and not from_text):
        raise ValueError(expected_types(choices))
    if kind is int and isinstance(value, float):
        raise ValueError(expected_types(choices))
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(expected_types(choices)) from None
    if kind is int and abs(number) > LARGEST_WHOLE:
        raise ValueError(f"{expected_types(choices)}, up to {LARGEST_WHOLE:,}")
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("text without the character NUL, which no path may hold")
    return text


LARGEST_WHOLE = 10**12  # of steps, blocks and the like: a thousand times what anybody trains

LOSSES_BY_TOKENS = "a loss greater than 0 for each number of tokens, as {5e9: 3.193}, or 5e9=3.193 as an option"


def losses_by_tokens(pairs: Iterable[tuple[Any, Any]], *, from_text: bool) -> dict[int, float] | None:
    """Losses by tokens, ascending; None where there are none. Tokens may be text, as YAML reads some ways to write
    them; a loss in an option (`from_text`) alone."""
    losses: dict[int, float] = {}
    for tokens, loss in pairs:
        count, number = positive(tokens, True), positive(loss, from_text)
        if number is None or count is None or not count.is_integer():
            raise ValueError(f"{LOSSES_BY_TOKENS}, not {tokens}: {loss}")
        if int(count) in losses:
            raise ValueError(f"one loss for each number of tokens, and {tokens} is given twice; keep one")
        losses[int(count)] = number
    return dict(sorted(losses.items())) or None


def positive(value: Any, from_text: bool) -> float | None:
    """A finite number greater than 0, or None where the value is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str) if from_text else (int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def expected_types(choices: Iterable[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number such as 3e-3", str: "text"}
    texts = [names[c] for c in choices if c in names]
    texts += [str(word) for c in choices if typing.get_origin(c) is Literal for word in typing.get_args(c)]
    texts += ["none" for c in choices if c is type(None)]
    return " or ".join(texts)


# Gives the value of a key, its default where it is not set, and None where it has none.
Get = Callable[[str], Any]


def combination_problems(values: dict[str, Any], broken: set[str]) -> list[str]:
    """What is wrong with the settings taken together; nothing is said of `broken` ones, which have been reported."""

    def get(name: str) -> Any:
        default = FIELDS[name].default
        return values.get(name, None if default is dataclasses.MISSING else default)

    missing = [
        f"{name}: missing; expected {field.metadata['help']}"
        for name, field in FIELDS.items()
        if field.default is dataclasses.MISSING and name not in values and name not in broken
    ]
    return [
        *missing,
        *data_problems(get),
        *validation_problems(get, values, broken),
        *tokenizer_problems(get, broken),
        *model_problems(get),
        *optimiser_problems(get),
        *length_problems(get, broken),
        *task_problems(get),
        *output_problems(get),
    ]


def data_problems(get: Get) -> list[str]:
    """Dataset and files."""
    problems = []
    dataset, files = get("dataset_name"), get("data_files")
    if dataset in FILE_FORMATS:
        if not files:
            problems.append(f"data_files: missing; dataset_name {dataset} reads the files that data_files names")
        for name in ("data_files", "validation_files"):
            for pattern in get(name) or ():
                if not is_url(pattern):
                    problems += file_problems(name, pattern, dataset)
    elif file_format := next((name for name, endings in ENDINGS.items() if f".{dataset}" in endings), None):
        problems.append(
            f"dataset_name: {dataset!r} is no format; {dataset} files are read by dataset_name {file_format}"
        )
    elif dataset == PYTHON_DOCS:
        for name in ("data_files", "validation_files", "dataset_config_name", "dataset_revision"):
            if get(name):
                problems.append(
                    f"{name}: {show(get(name))!r} cannot be used with the built-in {PYTHON_DOCS}; remove it"
                )
    elif dataset and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        problems.append(
            f"dataset_name: {dataset!r} is not a Hub id such as Skylion007/openwebtext; "
            f"local files are read by dataset_name {', '.join(FILE_FORMATS)} with data_files"
        )
    column = get("text_column")
    if dataset in ("text", PYTHON_DOCS) and column not in ("text", None):
        problems.append(
            f"text_column: {column!r} means nothing for dataset_name {dataset}, which has no columns; leave it at text"
        )
    if get("text_documents") == "file" and dataset != "text":
        problems.append(f"text_documents: 'file' is for dataset_name text, not for {dataset}; remove it")
    with path_errors(problems, "data_cache_dir", get("data_cache_dir")):
        Path(get("data_cache_dir")).expanduser().exists()
    return problems


def file_problems(key: str, pattern: str, file_format: str) -> list[str]:
    """That the pattern names no file, or one that cannot be read."""
    problems: list[str] = []
    with path_errors(problems, key, pattern):
        files = matching_files(pattern, file_format)
        if not files:
            problems.append(no_match(key, pattern, file_format))
        for file in files:
            check_readable(Path(file))
    return problems


def validation_problems(get: Get, values: dict[str, Any], broken: set[str]) -> list[str]:
    """One way to hold out a validation set."""
    problems = []
    given = [name for name in VALIDATION_KEYS if values.get(name)]
    for name in given[1:]:
        problems.append(
            f"{given[0]}: {show(get(given[0]))!r} excludes {name} {show(get(name))}; set one of them to none"
        )
    if not given and "validation_documents" in values and not broken.intersection(VALIDATION_KEYS):
        problems.append("validation_documents: missing; expected it, validation_share or validation_files")
    for name in ("validation_share", "validation_files"):
        if name in given and get("dataset_name") and get("dataset_name") not in (*FILE_FORMATS, PYTHON_DOCS):
            problems.append(
                f"{name}: {show(get(name))!r} is for files of your own; a dataset on the Hub is read as it comes, and "
                "validation_documents holds out its first ones"
            )
    return problems


def tokenizer_problems(get: Get, broken: set[str]) -> list[str]:
    """One tokenizer, and where it is."""
    problems = []
    tokenizer, trained_size = get("tokenizer_name"), get("train_tokenizer_vocab_size")
    if tokenizer and trained_size:
        problems.append(
            f"tokenizer_name: {tokenizer!r} excludes train_tokenizer_vocab_size {trained_size}; remove one of them"
        )
    if not tokenizer and not trained_size and not {"tokenizer_name", "train_tokenizer_vocab_size"} & broken:
        problems.append(
            "tokenizer_name: missing; expected a Hub id or folder, or train_tokenizer_vocab_size to train one"
        )
    if tokenizer and (tokenizer.startswith((".", "/", "~")) or tokenizer.count("/") > 1):
        with path_errors(problems, "tokenizer_name", tokenizer):
            file = Path(tokenizer).expanduser() / "tokenizer.json"
            if not file.is_file():
                problems.append(f"tokenizer_name: {tokenizer!r} is no folder with a tokenizer.json; save one there")
            else:
                check_readable(file)
    return problems


def model_problems(get: Get) -> list[str]:
    """Dimensions that do not go together."""
    problems = []
    if get("n_embd") and get("n_head") and get("n_embd") % get("n_head"):
        problems.append(f"n_embd: {get('n_embd')} is not a multiple of n_head {get('n_head')}; change one of them")
    return problems


def optimiser_problems(get: Get) -> list[str]:
    """Settings that another one would leave without effect."""
    problems = []
    if get("embedding_learning_rate") and get("optimizer") != "muon":
        problems.append(
            f"embedding_learning_rate: {get('embedding_learning_rate'):g} is read by optimizer muon only; remove it, "
            "or set optimizer: muon"
        )
    if get("decay_share") not in (None, FIELDS["decay_share"].default) and get("lr_schedule") != "wsd":
        problems.append(
            f"decay_share: {get('decay_share'):g} is read by lr_schedule wsd only; remove it, or set lr_schedule: wsd"
        )
    return problems


def length_problems(get: Get, broken: set[str]) -> list[str]:
    """How long to train, and a warm-up that ends in time."""
    problems = []
    epochs, max_steps, batch = get("num_train_epochs"), get("max_steps"), get("effective_batch_size")
    if not epochs and not max_steps and not {"num_train_epochs", "max_steps"} & broken:
        problems.append("max_steps: missing; expected max_steps or num_train_epochs, how long to train")
    steps = max_steps
    if steps is None and epochs and batch and get("expected_train_blocks"):
        steps = int(epochs * get("expected_train_blocks") / batch)
    if steps is not None:
        problems += schedule_problems(steps, get("warmup_steps"), get("learning_rate"), get("allow_incomplete_warmup"))
    return problems


def task_problems(get: Get) -> list[str]:
    """Zero-shot tasks, as far as can be seen without loading them."""
    problems = []
    tasks, folder = get("eval_tasks"), get("eval_task_folder")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        problems.append(
            f"eval_tasks: {show(tasks)} needs lm_eval, which is not installed; pip install 'clm_owt[eval]', or set it "
            "to none"
        )
    for name in ("eval_tasks_steps", "eval_task_folder"):
        if get(name) and not tasks:
            problems.append(f"{name}: {get(name)!r} is read with eval_tasks only; name some, or remove it")
    if folder:
        problems += folder_problems("eval_task_folder", folder, "one with task definitions (YAML)")
    return problems


def output_problems(get: Get) -> list[str]:
    """Trackers, samples, uploads, and what to continue from."""
    problems = []
    for name in get("report_to") or ():
        if name not in TRACKERS:
            spaces = f"; several are separated by spaces: {name.replace(',', ' ')}" if "," in name else ""
            problems.append(f"report_to: {name!r} is unknown; expected any of {', '.join(TRACKERS)}, or none{spaces}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f"report_to: {name} is not installed; pip install {name}, or take it out of report_to")
    if get("sample_steps") and not get("sample_prompts"):
        problems.append(f"sample_steps: {get('sample_steps')} needs sample_prompts; give some, or sample_steps none")
    if get("push_to_hub") and not get("hub_model_id"):
        problems.append("push_to_hub: true needs hub_model_id, the repository to upload to, such as me/gpt2-owt")
    if get("hub_strategy") == "checkpoint" and not get("push_to_hub"):
        problems.append("hub_strategy: 'checkpoint' needs push_to_hub: true; set it, or leave hub_strategy at end")
    if get("checkpoint_mirror"):
        problems += mirror_problems(get("checkpoint_mirror"))
    if get("branch_from"):
        problems += folder_problems("branch_from", get("branch_from"), "a checkpoint of another run")
    resume = get("resume_from_checkpoint")
    if resume not in ("auto", "never", None):
        problems += folder_problems("resume_from_checkpoint", resume, "auto, never or a checkpoint")
    return problems


def folder_problems(key: str, path: str, expected: str) -> list[str]:
    problems: list[str] = []
    with path_errors(problems, key, path):
        if not Path(path).is_dir():
            problems.append(f"{key}: {path!r} is no folder; expected {expected}")
    return problems


@contextlib.contextmanager
def path_errors(problems: list[str], key: str, path: str) -> Iterator[None]:
    """Adds why a path, or a file in it, cannot be read: no permission, a name that is too long, an unknown `~user`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        which = str(getattr(error, "filename", None) or path)
        problems.append(f"{key}: {which!r} cannot be read ({reason}); give a path that can")


def check_readable(file: Path) -> None:
    """Raises OSError where the file is none to be read."""
    file.open("rb").close()


# Of fsspec's protocols: what is gone with the process, and what is only read.
KEEPS_NOTHING = {"memory", "http", "https", "data", "zip", "tar", "libarchive", "git", "github", "gist"}


def mirror_problems(address: str) -> list[str]:
    """What keeps an address of fsspec from being one, as far as that can be seen without asking it."""
    from fsspec.core import split_protocol  # which takes a tenth of a second
    from fsspec.registry import known_implementations as known

    shown = address.rpartition("@")[2]  # without a user and his password
    if ":" in address.partition("/")[0] and not re.match(r"[A-Za-z][\w+.-]+://", address):
        return [
            f"checkpoint_mirror: {shown!r} is no address; expected one with ://, such as s3://bucket/runs/x, or the "
            "path of a folder"
        ]
    protocol, rest = split_protocol(address)
    if protocol and protocol not in known:
        return [f"checkpoint_mirror: {shown!r} is at no address that fsspec knows, such as s3://bucket/runs/x"]
    if protocol in KEEPS_NOTHING:
        return [
            f"checkpoint_mirror: {shown!r}: a run can keep nothing at {protocol}://; give an address that can be "
            "written to and lasts, such as s3://bucket/runs/x"
        ]
    user, _, server = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")
    if protocol and ":" in user:
        return [
            f"checkpoint_mirror: {protocol}://...@{server} holds a password, which would be written to files; give it "
            "to fsspec by its configuration or the environment"
        ]
    package = known[protocol]["class"].partition(".")[0] if protocol else "fsspec"
    if importlib.util.find_spec(package) is None:
        extra = "'clm_owt[mirror]'" if package == "s3fs" else package
        return [f"checkpoint_mirror: {protocol}:// needs {package}; pip install {extra}"]
    return []


def default_run_name(path: Path | None, file_values: dict[str, Any], values: dict[str, Any]) -> str:
    """The recipe's name with every change of the command line that affects the result."""
    base = path.stem if path else "run"
    changes = [
        f"{name}={shorten(show(values[name]))}"
        for name, field in FIELDS.items()
        if field.metadata["shapes_result"]
        and name in values
        and values[name] != file_values.get(name, field.default)
        and path is not None
    ]
    name = re.sub(r"[^\w.,=+-]+", "-", ",".join([base, *changes]))
    return name if len(name) <= 200 else f"{name[:180]}-{zlib.crc32(name.encode()):08x}"


def shorten(text: str) -> str:
    """A value as it stands in a name: of a long one the beginning, and a sum that tells it from others."""
    return text if len(text) <= 40 else f"{text[:24]}-{zlib.crc32(text.encode()):08x}"
