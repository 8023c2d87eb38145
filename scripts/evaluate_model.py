"""Loss and perplexity of a trained model on any text, or on a recipe's validation set; and zero-shot tasks.

python scripts/evaluate_model.py --model runs/quickstart/model --recipe runs/quickstart/recipe.yaml
python scripts/evaluate_model.py --model openai-community/gpt2 --text book.txt --stride 512
python scripts/evaluate_model.py --model runs/owt_512/model --tasks lambada_openai hellaswag wikitext piqa
"""

import argparse
import functools
import json
from pathlib import Path

from clm_owt.program import run_script

MODEL_HELP = "a run's folder, one of its checkpoints, a folder with a model, or a Hub id"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="RUN_OR_HUB_ID", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub, such as step-00002000")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="text files, each one document")
    what.add_argument("--recipe", metavar="FILE", help="the validation set of this recipe (also a run's recipe.yaml)")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness (extra [eval])")
    parser.add_argument("--stride", type=int, help="predict so many tokens of each window, the others are context")
    parser.add_argument("--batch_size", type=int, default=8, help="windows, or requests, at a time")
    parser.add_argument("--task_folder", type=Path, help="task definitions (YAML) of your own, beside the built-in")
    parser.add_argument("--limit", type=int, help="examples of each task; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(argv)
    if options.stride is not None and options.stride < 1:
        parser.error(f"--stride: {options.stride} does not work; expected at least 1")
    result = run(options)
    if options.json:
        print(json.dumps(result))


def run(options: argparse.Namespace) -> dict[str, object]:
    """What was measured, which is also printed unless `--json` is given. Raises InputError for what cannot be done."""
    # Imported here, so that a wrong option is reported without waiting for torch.
    import transformers

    from clm_owt.evaluation import zero_shot
    from clm_owt.evaluation.windows import evaluate_windows, recipe_windows, text_windows
    from clm_owt.training.trained_model import load_trained

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    say = (lambda text: None) if options.json else functools.partial(print, flush=True)
    model, tokenizer = load_trained(options.model, options.revision)
    if options.tasks:
        tasks = zero_shot.ZeroShotTasks(options.tasks, options.task_folder, key="--tasks")
        results = tasks.evaluate(model, tokenizer, batch_size=options.batch_size, limit=options.limit)
        say(zero_shot.results_table(results))
        return results
    if options.recipe:
        windows = recipe_windows(options.recipe, tokenizer, model.config.n_positions, options.stride)
    else:
        windows = text_windows(options.text, tokenizer, model.config.n_positions, options.stride)
    result = evaluate_windows(model, windows, options.batch_size)
    say(f"loss {result['loss']:.6f}  perplexity {result['perplexity']:,.4f}  predicted tokens {result['n_tokens']:,}")
    return result


if __name__ == "__main__":
    run_script(main)
