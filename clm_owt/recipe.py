"""What a run is: all keys of a recipe, each with its type, default, meaning and the values it may have.

Every key is also an option of the command line (see recipe_reader.py). This module imports no torch.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from clm_owt.formatting import LONGEST_DAYS, read_duration
from clm_owt.optimizers import OPTIMIZERS
from clm_owt.recipe_yaml import RecipeDumper
from clm_owt.schedule import SCHEDULES, Schedule

PENALTY_TYPES = ("non_max_sum", "neg_max_prob", "neg_entropy", "top_k_mass")
FILE_FORMATS = ("text", "json", "csv", "parquet")
PYTHON_DOCS = "python-docs"
TEXT_DOCUMENTS = ("paragraph", "file")
VALIDATION_KEYS = ("validation_share", "validation_files", "validation_documents")  # one of them is set
LOGITS = ("float32", "compute")
TRACKERS = ("wandb", "tensorboard", "trackio")

# The prompts that samples continue unless a recipe names others.
DEFAULT_PROMPTS = ("The quick brown fox", "Once upon a time", "In the beginning")


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beside its type, and how that reads in an error."""

    holds: Callable[[Any], bool]
    text: str


def at_least(bound: float) -> Rule:
    return Rule(lambda value: value >= bound, f"at least {bound}")


def above(bound: float) -> Rule:
    return Rule(lambda value: value > bound, f"greater than {bound}")


EPOCHS = Rule(lambda value: 0 < value <= 1e6, "greater than 0, and at most 1,000,000")


def fraction(low: str, high: str) -> Rule:
    """A number between 0 and 1; `low` and `high` are '[' or '(' and ']' or ')' as in mathematics."""
    return Rule(
        lambda v: (v > 0 or (low == "[" and v == 0)) and (v < 1 or (high == "]" and v == 1)),
        f"in {low}0, 1{high}",
    )


def one_of(*choices: Any) -> Rule:
    names = ", ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices)
    return Rule(lambda value: value in choices, f"one of {names}")


def is_duration(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return read_duration(text) > 0
    return False


SEED = Rule(lambda value: 0 <= value < 2**32, "in [0, 2**32)")
DURATION = Rule(is_duration, f"a duration such as 45s, 30m, 23h30m or 1d2h, up to {LONGEST_DAYS}d")

# Keys that older recipes may have, and what came in their place. Without a value they had no effect, and have none.
REMOVED_KEYS = {"pad_vocab_multiple": "the loss pads the vocabulary by itself where that is faster"}

# What a run that branches off another one may have otherwise: its rates and its length, what its steps are made of,
# and no longer what the checkpoint holds.
FREE_IN_A_BRANCH = frozenset(
    "branch_from init_from learning_rate embedding_learning_rate lr_schedule decay_share min_lr_ratio warmup_steps "
    "num_train_epochs max_steps expected_train_blocks weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "skip_outliers penalty_type penalty_weight penalty_top_k logits_dtype deterministic".split()
)


def key(help: str, default: Any = dataclasses.MISSING, rule: Rule | None = None, shapes_result: bool = False) -> Any:
    """A recipe key. `shapes_result`: the weights of the run depend on it, so a run with another value is another run
    (it is named after the change, and is not resumed from this run's checkpoints)."""
    metadata = {"help": help, "rule": rule, "shapes_result": shapes_result}
    return dataclasses.field(default=default, metadata=metadata)


def result_key(help: str, default: Any = dataclasses.MISSING, rule: Rule | None = None) -> Any:
    return key(help, default, rule, shapes_result=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The resolved settings of one run; see the `help` of each key, or `python run_clm_owt.py --help`."""

    # data
    dataset_name: str = result_key("Hub id, or text, json, csv, parquet (with data_files), or python-docs")
    dataset_config_name: str | None = result_key("the dataset's configuration on the Hub", None)
    dataset_revision: str | None = result_key("branch, tag or commit of the dataset on the Hub", None)
    dataset_split: str = result_key("the dataset's split that is read", "train")
    data_files: tuple[str, ...] | None = result_key("paths, folders, globs or URLs", None)
    text_column: str = result_key("the column that holds the text", "text")
    text_documents: str = result_key("a document of text files", "paragraph", one_of(*TEXT_DOCUMENTS))
    validation_documents: int | None = result_key("held out to validate on: the first documents", 1000, at_least(1))
    validation_share: float | None = result_key("held out instead: the text's last share", None, fraction("(", ")"))
    validation_files: tuple[str, ...] | None = result_key("held out instead: paths, folders, globs or URLs", None)
    expected_train_blocks: int | None = result_key("known size of a dataset still being read", None, at_least(1))
    data_cache_dir: str = key("where token stores and trained tokenizers are kept", "~/.cache/clm_owt")
    # tokenizer
    tokenizer_name: str | None = result_key("Hub id or folder of a tokenizer", None)
    train_tokenizer_vocab_size: int | None = result_key("train a byte-level BPE of this size", None, at_least(257))
    block_size: int = result_key("tokens per training sequence, and the model's context", 1024, at_least(2))
    # model
    n_layer: int = result_key("transformer blocks", 12, at_least(1))
    n_head: int = result_key("attention heads", 12, at_least(1))
    n_embd: int = result_key("width", 768, at_least(1))
    dropout: float = result_key("dropout probability, everywhere in the model", 0.0, fraction("[", ")"))
    init_from: str | None = result_key("weights to continue from (Hub id or folder); none: from scratch", None)
    # optimisation
    optimizer: str = result_key("muon: for the blocks' matrices, AdamW for the rest", "adamw", one_of(*OPTIMIZERS))
    effective_batch_size: int = result_key("blocks per optimizer step, over all processes", rule=at_least(1))
    learning_rate: float = result_key("peak learning rate", rule=above(0))
    embedding_learning_rate: float | None = result_key("muon: AdamW's; none: learning_rate", None, above(0))
    lr_schedule: str = result_key("wsd: constant, then linear over decay_share", "cosine", one_of(*SCHEDULES))
    decay_share: float = result_key("share of all steps in which wsd decays", 0.2, fraction("(", "]"))
    min_lr_ratio: float = result_key("floor of the schedule as a share of the peak", 0.1, fraction("[", "]"))
    warmup_steps: int = result_key("steps of linear warm-up", rule=at_least(0))
    allow_incomplete_warmup: bool = key("run although the warm-up does not end before the run does", False)
    num_train_epochs: float | None = result_key("passes over the training blocks", None, EPOCHS)
    max_steps: int | None = result_key("optimizer steps; wins over num_train_epochs", None, at_least(1))
    weight_decay: float = result_key("AdamW's decay, on matrices and embeddings only", 0.1, at_least(0))
    adam_beta1: float = result_key("AdamW's first decay rate", 0.9, fraction("[", ")"))
    adam_beta2: float = result_key("AdamW's second decay rate", 0.95, fraction("[", ")"))
    adam_epsilon: float = result_key("AdamW's epsilon", 1e-8, above(0))
    max_grad_norm: float = result_key("gradients are clipped to this norm", 1.0, above(0))
    skip_outliers: bool = result_key("skip steps whose loss or gradient norm is an outlier", False)
    # memory
    auto_batch_size: bool = key("search the largest micro-batch that fits", True)
    max_batch_size: int = key("micro-batch, at most (exactly, without auto_batch_size)", 32, at_least(1))
    target_memory_utilization: float = key("share of the device's memory to use", 0.85, fraction("(", "]"))
    gradient_checkpointing: bool = key("recompute activations in the backward pass", False)
    torch_compile: bool | Literal["auto"] = key("auto compiles where it pays", "auto", one_of("auto", True, False))
    logits_dtype: str = result_key("compute: training's logits as its products, bf16", "float32", one_of(*LOGITS))
    # penalty
    penalty_type: str = result_key(
        "penalty; the first two have the same gradient", "non_max_sum", one_of(*PENALTY_TYPES)
    )
    penalty_weight: float = result_key("λ: loss = cross-entropy + λ · penalty", 0.0)
    penalty_top_k: int = result_key("k of top_k_mass", 5, at_least(1))
    # intervals
    logging_steps: int = key("steps between lines of metrics.jsonl", 10, at_least(1))
    eval_steps: int = key("steps between validations", 500, at_least(1))
    save_steps: int = key("steps between checkpoints", 1000, at_least(1))
    sample_steps: int | None = key("steps between samples; none: no samples", None, at_least(1))
    save_total_limit: int = key("checkpoints kept", 2, at_least(1))
    # evaluation
    milestones: Mapping[int, float] | None = key("published validation losses, by tokens trained on", None)
    eval_tasks: tuple[str, ...] = key("zero-shot tasks of lm-evaluation-harness (extra [eval])", ())
    eval_tasks_steps: int | None = key("steps between them; none: eval_steps", None, at_least(1))
    eval_task_folder: str | None = key("task definitions (YAML) of your own, beside the built-in", None)
    # samples
    sample_prompts: tuple[str, ...] = key("prompts to continue", DEFAULT_PROMPTS)
    sample_max_new_tokens: int = key("tokens per sample", 100, at_least(1))
    sample_temperature: float = key("temperature of sampling", 1.0, above(0))
    sample_top_p: float = key("nucleus of sampling", 0.9, fraction("(", "]"))
    # run
    run_name: str = key("name of the run; default: the recipe's name and what the command line changes in it", "")
    output_dir: str = key("the run's folder; default: runs/<run_name>", "")
    branch_from: str | None = result_key("a checkpoint of another run, from which this one goes its own way", None)
    resume_from_checkpoint: str = key("auto, never, or a checkpoint's folder", "auto")
    stop_after: str | None = key("save and stop so long after the start: 45s, 30m, 23h30m, 1d2h", None, DURATION)
    seed: int = result_key("of weights, data order and sampling", 42, SEED)
    deterministic: bool = result_key("only deterministic kernels (slower on a GPU)", False)
    report_to: tuple[str, ...] = key("any of wandb, tensorboard, trackio", ())
    wandb_project: str = key("project of the trackers", "clm_owt")
    push_to_hub: bool = key("upload the model", False)
    hub_model_id: str | None = key("repository to upload to", None)
    hub_private_repo: bool | None = key("create it as private; none: with hub_strategy checkpoint only", None)
    hub_strategy: str = key(
        "checkpoint: every_save, and what another machine goes on from",
        "end",
        one_of("end", "every_save", "checkpoint"),
    )
    checkpoint_mirror: str | None = key("address to go on from elsewhere: s3://me/x, any of fsspec's", None)

    @property
    def validation_key(self) -> str:
        """The key that says which documents are the validation set."""
        return next(name for name in VALIDATION_KEYS if getattr(self, name) is not None)

    @property
    def places_elsewhere(self) -> int:
        """At how many places beside the run's folder its newest checkpoint is kept."""
        return bool(self.checkpoint_mirror) + (self.push_to_hub and self.hub_strategy == "checkpoint")

    def total_steps(self, train_blocks: int | None = None) -> int | None:
        """Optimizer steps of the run: `max_steps`, or floor(epochs · blocks / batch) of the expected or, where none
        is expected, the given count of training blocks. None while that count is unknown."""
        if self.max_steps is not None:
            return self.max_steps
        blocks = self.expected_train_blocks or train_blocks
        return None if blocks is None else int(self.num_train_epochs * blocks / self.effective_batch_size)

    def logits_bytes(self, compute_bytes: int) -> int:
        """Of a logit in training, where products are of a type of `compute_bytes`."""
        return compute_bytes if self.logits_dtype == "compute" else 4

    def schedule(self, total_steps: int) -> Schedule:
        """The learning rate of a run of that length, as a share of `learning_rate`."""
        return Schedule(self.warmup_steps, total_steps, self.min_lr_ratio, self.lr_schedule, self.decay_share)

    def result_settings(self) -> dict[str, Any]:
        """The settings that the weights of the run depend on."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["shapes_result"]}

    def to_dict(self) -> dict[str, Any]:
        """All settings, as YAML and JSON know them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}

# The groups of keys, each with its first one.
GROUPS = {
    "dataset_name": "data",
    "tokenizer_name": "tokenizer",
    "n_layer": "model",
    "optimizer": "optimisation",
    "auto_batch_size": "memory",
    "penalty_type": "sharpness penalty",
    "logging_steps": "intervals",
    "milestones": "evaluation",
    "sample_prompts": "samples",
    "run_name": "run",
}

TYPES = typing.get_type_hints(Recipe)


def default_of(name: str) -> Any:
    """The default of a key, as YAML and JSON know it; None where it has none."""
    default = FIELDS[name].default
    if default is dataclasses.MISSING:
        return None
    return list(default) if isinstance(default, tuple) else default


def show(value: Any) -> str:
    """A setting as the command line would give it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return " ".join(f"{name}={content}" for name, content in value.items())
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def is_compiled(torch_compile: bool | Literal["auto"], device_type: str) -> bool:
    """Whether a run uses torch.compile on such a device. `auto`: on CUDA alone."""
    return torch_compile is True or (torch_compile == "auto" and device_type == "cuda")


def is_url(path: str) -> bool:
    """Whether an entry of `data_files` is a URL, and no path of this machine."""
    return "://" in path
