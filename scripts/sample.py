"""Continue prompts with a trained model, token by token on the terminal or as JSON.

python scripts/sample.py --model runs/owt_512/model --prompt "The quick brown fox" --count 3
"""

import argparse
import json
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.program import count, number, run_script
from clm_owt.recipe import DEFAULT_PROMPTS, SEED, above, at_least, fraction

MODEL_HELP = "a run's folder, one of its checkpoints, a folder with a model, or a Hub id"


def main(argv: list[str]) -> None:
    sample_all(parse(argv))


def parse(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", required=True, metavar="RUN_OR_HUB_ID", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub, such as step-00002000")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts_file", type=Path, help="a prompt a line")
    parser.add_argument("--count", type=count, default=1, help="continuations of each prompt")
    parser.add_argument("--max_new_tokens", type=count, default=100)
    parser.add_argument("--temperature", type=number(float, above(0)), default=1.0)
    parser.add_argument(
        "--top_p", type=number(float, fraction("(", "]")), default=0.9, help="nucleus; 1 leaves all tokens"
    )
    parser.add_argument(
        "--top_k", type=number(int, at_least(0)), default=0, help="the k likeliest tokens only; 0 leaves all"
    )
    parser.add_argument(
        "--seed", type=number(int, SEED), default=42, help="of the first continuation; the next ones count on"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line: prompt, text, seed")
    return parser.parse_args(argv)


def sample_all(options: argparse.Namespace) -> None:
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts_file: {options.prompts_file} cannot be read: {error}") from error
        if not lines:
            raise InputError(f"--prompts_file: {options.prompts_file} is empty; expected a prompt a line")
        prompts += lines

    # Imported here, so that a wrong option is reported without waiting for torch.
    import transformers
    from transformers import TextStreamer

    from clm_owt.model.sampling import sample
    from clm_owt.training.trained_model import load_trained

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_trained(options.model, options.revision)
    streamer = None if options.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for prompt in prompts or DEFAULT_PROMPTS:
        for seed in range(options.seed, options.seed + options.count):
            if not options.json:
                print(prompt, end="", flush=True)
            (text,) = sample(
                model,
                tokenizer,
                [prompt],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                seed=seed,
                streamer=streamer,
            )
            print(
                json.dumps({"prompt": prompt, "text": text, "seed": seed}, ensure_ascii=False) if options.json else ""
            )


if __name__ == "__main__":
    run_script(main)
