"""Loss and perplexity of trained models on any text, or on a recipe's validation set; their calibration, and the text
that they write; and zero-shot tasks.

python scripts/evaluate_model.py --model runs/quickstart/model --recipe runs/quickstart/recipe.yaml
python scripts/evaluate_model.py --model runs --recipe runs/quickstart/recipe.yaml --calibration --generation
python scripts/evaluate_model.py --model openai-community/gpt2 --text book.txt --stride 512
python scripts/evaluate_model.py --model runs/owt_512/model --tasks lambada_openai hellaswag wikitext piqa
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm_owt.errors import InputError
from clm_owt.formatting import text_table
from clm_owt.program import count, number, picture_file, run_script
from clm_owt.recipe import SEED, above, fraction
from clm_owt.reports.overview import find_runs
from clm_owt.reports.panels import by_difference
from clm_owt.reports.record import RunRecord

if TYPE_CHECKING:  # torch is imported after the options are read, so that a wrong one is reported at once
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clm_owt.evaluation.windows import Window

MODEL_HELP = "a run's folder, one of its checkpoints, a folder with a model, a Hub id, or a folder of runs"

PREDICTION_COLUMNS = {
    "temperature": "temperature",
    "ce_loss": "loss",
    "entropy": "entropy",
    "max_prob": "max-probability",
    "top_k_mass": "top-5 mass",
}
CALIBRATION_COLUMNS = {
    "top_label_ece": "top-label ECE",
    "top_label_ece_by_chance": "by chance",
    "classwise_ece": "class-wise ECE",
    "classwise_ece_by_chance": "by chance",
}
GENERATION_COLUMNS = {
    "seq_rep_4": "seq-rep-4",
    "distinct_1": "distinct-1",
    "distinct_2": "-2",
    "distinct_3": "-3",
    "distinct_4": "-4",
    "entropy": "entropy of its own text",
    "real_entropy": "of real text",
    "entropy_drift": "drift",
}
TABLES = {"predictions": PREDICTION_COLUMNS, "calibration": CALIBRATION_COLUMNS, "generation": GENERATION_COLUMNS}


def main(argv: list[str]) -> None:
    options = read_options(argv)
    results = run(options)
    if options.json:
        names = list(results)
        alone = len(names) == 1 and names == options.model
        print(json.dumps(results[names[0]] if alone else [{"model": name, **results[name]} for name in names]))


def read_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", metavar="RUN_OR_HUB_ID", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub, such as step-00002000")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="text files, each one document")
    what.add_argument("--recipe", metavar="FILE", help="the validation set of this recipe (also a run's recipe.yaml)")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness (extra [eval])")
    parser.add_argument("--stride", type=count, help="predict so many tokens of each window, the others are context")
    parser.add_argument("--batch_size", type=count, default=8, help="windows, prompts, or requests, at a time")
    parser.add_argument("--json", action="store_true", help="print JSON alone: an object, of several models a list")
    more = parser.add_argument_group("calibration and generation, on --text or --recipe")
    more.add_argument("--calibration", action="store_true", help="expected calibration errors")
    more.add_argument("--output", type=picture_file(".png"), metavar="PNG", help="draw the reliability diagram")
    more.add_argument("--generation", action="store_true", help="entropy and repetition of text that it writes")
    more.add_argument("--prompts", type=count, default=128, help="how many are cut from the text [128]")
    more.add_argument("--prompt_tokens", type=count, default=32, help="tokens of a prompt [32]")
    more.add_argument("--new_tokens", type=count, default=96, help="tokens that are written after it [96]")
    more.add_argument(
        "--top_p", type=number(float, fraction("(", "]")), default=1.0, help="nucleus to sample from [1: all tokens]"
    )
    more.add_argument("--seed", type=number(int, SEED), default=0, help="of sampling [0]")
    control = more.add_mutually_exclusive_group()
    control.add_argument("--temperature", type=number(float, above(0)), help="divide the model's logits by it [1]")
    control.add_argument(
        "--entropy", type=number(float, above(0)), metavar="NATS", help="by what gives this mean entropy on the text"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--task_folder", type=Path, help="task definitions (YAML) of your own, beside the built-in")
    tasks.add_argument("--limit", type=count, help="examples of each task; default: all")
    options = parser.parse_args(argv)
    check_options(options, parser.error)
    return options


def check_options(options: argparse.Namespace, error: Callable[[str], None]) -> None:
    measured = options.calibration or options.generation
    if measured and options.tasks:
        error("--calibration and --generation are of a text; give --recipe or --text instead of --tasks")
    if not measured and (options.temperature is not None or options.entropy is not None):
        error("--temperature and --entropy: nothing depends on them; give --calibration, --generation or both")
    if options.output and not options.calibration:
        error("--output: the diagram is of --calibration, which is not asked for")


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What was measured, by the model's name, which is also printed unless `--json` is given. Raises InputError for
    what cannot be done."""
    import transformers

    from clm_owt.evaluation import zero_shot
    from clm_owt.reports.reliability import save_reliability
    from clm_owt.training.trained_model import load_trained

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    say = (lambda text: None) if options.json else functools.partial(print, flush=True)
    names = [found for name in options.model for found in models_of(name)]
    tasks = None
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        model, tokenizer = load_trained(name, options.revision)
        if len(names) > 1:
            say(name)
        if options.tasks:
            tasks = tasks or zero_shot.ZeroShotTasks(options.tasks, options.task_folder, key="--tasks")
            found = tasks.evaluate(model, tokenizer, batch_size=options.batch_size, limit=options.limit)
            say(zero_shot.results_table(found))
        else:
            found = evaluate_on_text(model, tokenizer, options)
            numbers = f"loss {found['loss']:.6f}  perplexity {found['perplexity']:,.4f}"
            say(f"{numbers}  predicted tokens {found['n_tokens']:,}")
        results[name] = found
    for part, columns in TABLES.items():
        if all(part in found for found in results.values()):
            say(f"\n{part}\n{table_of(part, columns, results)}")
    if options.output:
        bins = [[tuple(bin.values()) for bin in found["calibration"]["bins"]] for found in results.values()]
        save_reliability(dict(zip(labels_of(list(results)), bins, strict=True)), options.output)
        say(f"\nDrawn: {options.output}")
    return results


def models_of(name: str) -> list[str]:
    """The models that a value of `--model` names: the one, or those of the runs in a folder. A run that has none yet
    is left out, with a line. Raises InputError where all are."""
    folder = Path(name)
    runs = list(find_runs(folder)) if folder.is_dir() else []
    if runs in ([], [folder]):
        return [name]
    with_model = [run for run in runs if (run / "model").is_dir() or any((run / "checkpoints").glob("step-*"))]
    for run in runs:
        if run not in with_model:
            print(f"{run} is left out: it has no model and no checkpoint yet", file=sys.stderr)
    if not with_model:
        raise InputError(f"--model {name}: none of its {len(runs)} runs has a model or a checkpoint yet")
    return [str(run) for run in with_model]


def labels_of(names: Sequence[str]) -> list[str]:
    """Names for tables and pictures: of runs the settings in which they differ."""
    if len(names) > 1 and all((Path(name) / "plan.json").is_file() for name in names):
        return [run.name for run in by_difference([RunRecord.read(Path(name)) for name in names])]
    return list(names)


def evaluate_on_text(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", options: argparse.Namespace
) -> dict[str, Any]:
    from clm_owt.evaluation.windows import evaluate_windows, recipe_windows, text_windows

    context = model.config.n_positions
    if options.recipe:
        windows = recipe_windows(options.recipe, tokenizer, context, options.stride)
    else:
        windows = text_windows(options.text, tokenizer, context, options.stride)
    found = evaluate_windows(model, windows, options.batch_size)
    if options.calibration or options.generation:
        found |= measure(model, windows, options)
    return found


def measure(model: "PreTrainedModel", windows: "Sequence[Window]", options: argparse.Namespace) -> dict[str, Any]:
    """The parts of TABLES that are asked for, each as a dictionary of numbers and lists."""
    from clm_owt.evaluation.calibration import calibration
    from clm_owt.evaluation.generation import generation, prompts_from
    from clm_owt.evaluation.predictions import prediction_statistics, temperature_for_entropy

    length = options.prompt_tokens
    if options.generation:  # cut first, so that too short a text is reported before anything is computed
        texts = prompts_from(windows, options.prompts, length + options.new_tokens)
    temperature = options.temperature or 1.0
    if options.entropy is not None:
        try:
            temperature = temperature_for_entropy(model, windows, options.batch_size, options.entropy)
        except InputError as error:
            raise InputError(f"--entropy: {error}") from error
    statistics = prediction_statistics(model, windows, options.batch_size, temperature)
    found: dict[str, Any] = {"predictions": {"temperature": temperature, **statistics._asdict()}}
    if options.calibration:
        errors = calibration(model, windows, options.batch_size, temperature)
        found["calibration"] = errors._asdict() | {"bins": [bin._asdict() for bin in errors.bins]}
    if options.generation:
        written = generation(
            model,
            texts[:, :length],
            texts[:, length:],
            new_tokens=options.new_tokens,
            top_p=options.top_p,
            model_temperature=temperature,
            seed=options.seed,
            batch_size=options.batch_size,
        )
        found["generation"] = written._asdict()
    return found


def table_of(part: str, columns: dict[str, str], results: dict[str, dict[str, Any]]) -> str:
    """One part of what was measured, a line for each model."""
    rows = []
    for label, found in zip(labels_of(list(results)), results.values(), strict=True):
        numbers = found[part]
        if part == "generation":
            means = {name: numbers[f"{name}_by_position"] for name in ("entropy", "real_entropy")}
            numbers = numbers | {name: sum(values) / len(values) for name, values in means.items()}
        rows.append([label, *(f"{numbers[column]:.4g}" for column in columns)])
    return text_table(["model", *columns.values()], rows)


if __name__ == "__main__":
    run_script(main)
