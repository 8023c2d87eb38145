"""The numbers in the recipes' comments are those that follow from the values beside them."""

import functools
import math
import re
from pathlib import Path

import pytest
from support.runs import ROOT

from clm_owt.planning.cautions import TOKEN_LOSS_DEVIATION
from clm_owt.planning.devices import Hardware, find_device
from clm_owt.planning.plan import Data, Plan, make_plan
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import load_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# Blocks of the validation documents, as counted: python-docs, OpenWebText, and about so many of FineWeb-Edu.
VALIDATION_BLOCKS = {"python-docs": 193, "Skylion007/openwebtext": 1101, "HuggingFaceFW/fineweb-edu": 5050}
SECONDS = {"second": 1, "minute": 60}


@functools.cache
def planned(path: Path, hardware: Hardware | None = None) -> tuple[Recipe, Plan]:
    """A recipe and its plan; by default on one A100."""
    recipe = load_recipe(["--recipe", str(path)])
    data = Data(None, None, None, VALIDATION_BLOCKS.get(recipe.dataset_name))
    vocab_size = recipe.train_tokenizer_vocab_size or 50_257
    hardware = hardware or find_device("a100-40gb").hardware()
    return recipe, make_plan(recipe, data, vocab_size=vocab_size, micro_batch=recipe.max_batch_size, hardware=hardware)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def digits(text: str, value: float) -> bool:
    """Whether `value`, rounded to as many decimals, is the number `text`."""
    decimals = len(text.partition(".")[2])
    return round(value, decimals) == number(text)


def nearly(text: str, value: float) -> bool:
    return number(text) == pytest.approx(value, rel=0.1)


def interval(path: Path, key: str, many: str, unit: str, devices: str) -> bool:
    """Whether a number of steps takes that long on A100, as derived, to a third."""
    hardware = find_device("a100-40gb").hardware({"one": 1, "eight": 8}[devices])
    recipe, plan = planned(path, hardware)
    seconds = plan.seconds[0] / plan.total_steps * getattr(recipe, key)
    stated = {"half": 0.5, "": 1.0}.get(many)
    return (stated or float(many)) * SECONDS[unit] == pytest.approx(seconds, rel=1 / 3)


# Of a recipe's comment beside a key (any: any line): what it says, and whether that is so.
CLAIMS = {
    ("any", r"how (\d+) is cut"): lambda r, p, n: digits(n, r.effective_batch_size),
    ("any", r"([\d,]+) blocks of (\d+) tokens a step"): lambda r, p, n, m: (
        digits(n, r.effective_batch_size) and digits(m, r.block_size)
    ),
    ("effective_batch_size", r"([\d,]+) tokens a step"): lambda r, p, n: digits(n, p.tokens_per_step),
    ("any", r"([\d.]+) million tokens a step"): lambda r, p, n: digits(n, p.tokens_per_step / 1e6),
    ("any", r"\((\d+) M\)"): lambda r, p, n: nearly(n, p.parameters / 1e6),
    ("any", r"\((\d\.\d+) B\)"): lambda r, p, n: digits(n, p.parameters / 1e9),
    ("any", r"([\d.]+) million parameters"): lambda r, p, n: digits(n, p.parameters / 1e6),
    ("any", r"at weight ([\d.]+)"): lambda r, p, n: digits(n, r.penalty_weight),
    ("any", r"cross-entropy \+ ([\d.]+) \* penalty"): lambda r, p, n: digits(n, r.penalty_weight),
    ("any", r"([\d.]+) billion tokens(?! do| hardly)"): lambda r, p, n: nearly(n, p.total_tokens / 1e9),
    ("any", r"warm-up of ([\d,]+) of ([\d,]+) steps is ([\d.]+) %"): lambda r, p, n, m, k: (
        digits(n, r.warmup_steps) and digits(m, p.total_steps) and digits(k, 100 * p.warmup_share)
    ),
    ("warmup_steps", r"([\d.]+) % of the run"): lambda r, p, n: digits(n, 100 * p.warmup_share),
    ("warmup_steps", r"([\d.]+) million tokens"): lambda r, p, n: digits(n, r.warmup_steps * p.tokens_per_step / 1e6),
    ("num_train_epochs", r"([\d,]+) steps"): lambda r, p, n: digits(n, p.total_steps),
    ("min_lr_ratio", r"ends at ([\d.e-]+),"): lambda r, p, n: number(n) == pytest.approx(p.learning_rate_floor),
    ("learning_rate", r"square-root \(([\d.e-]+)\)"): lambda r, p, n: nearly(n, p.square_root_scaled_rate),
    ("learning_rate", r"linear \(([\d.e-]+)\)"): lambda r, p, n: nearly(n, p.linear_scaled_rate),
    ("n_head", r"heads of (\d+)"): lambda r, p, n: digits(n, r.n_embd / r.n_head),
    ("validation_documents", r"about ([\d.]+) M tokens"): lambda r, p, n: nearly(
        n, p.validation_blocks * r.block_size / 1e6
    ),
    ("validation_documents", r"about (\d+),000 tokens"): lambda r, p, n: nearly(
        n, p.validation_blocks * r.block_size / 1e3
    ),
    ("validation_documents", r"good to about ([\d.]+) nats"): lambda r, p, n: digits(
        n, TOKEN_LOSS_DEVIATION / math.sqrt(p.validation_blocks * (r.block_size - 1))
    ),
    ("validation_documents", r"a tenth of its ([\d,]+) speeches, for (\d+) %"): lambda r, p, n, m: digits(
        m, 100 * (1 - r.validation_documents / number(n))
    ),
    ("eval_steps", r"(\d+) validations an epoch"): lambda r, p, n: number(n) == p.steps_per_epoch // r.eval_steps,
    ("eval_steps", r"(\d+) validations$"): lambda r, p, n: digits(n, p.evaluations),
    ("eval_steps", r"as many tokens apart as (\d+) steps of owt_512"): lambda r, p, n: digits(
        n, r.eval_steps * r.effective_batch_size / 512
    ),
    ("eval_steps", r"costs as much as (\d+) steps"): lambda r, p, n: digits(
        n, p.validation_blocks / 3 / r.effective_batch_size
    ),
    ("save_total_limit", r"([\d.]+) GB each"): lambda r, p, n: digits(n, p.checkpoint_bytes / 1e9),
}
INTERVAL = r"about every (half |\d+ |)(second|minute)s? on (one|eight) A100"


def comments(path: Path) -> list[tuple[str, str]]:
    """The comments of a recipe, each with the key that it stands beside ("" for a line of its own)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        (line.partition(":")[0] if line[0] != "#" else "", line.partition("# ")[2]) for line in lines if "#" in line
    ]
    return [(key, comment) for key, comment in found if comment]


def checked_claims(path: Path) -> dict[tuple[str, str], bool]:
    """What the comments say and is checked, as (comment, words), and whether it is so."""
    recipe, plan = planned(path)
    found = {}
    for key, comment in comments(path):
        for (where, pattern), holds in CLAIMS.items():
            for match in re.finditer(pattern, comment) if where in ("any", key) else ():
                found[comment, match[0]] = bool(holds(recipe, plan, *match.groups()))
        for match in re.finditer(INTERVAL, comment):
            found[comment, match[0]] = interval(path, key, match[1].strip(), match[2], match[3])
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_comment_says_follows_from_the_recipe(path):
    claims = checked_claims(path)
    assert len(claims) >= 4
    assert [claim for claim, holds in claims.items() if not holds] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_share_or_interval_in_a_comment_is_unchecked(path):
    checked = {(comment, words) for comment, words in checked_claims(path)}
    for _, comment in comments(path):
        for match in re.finditer(r"[\d.]+ %|[\d,]+ steps|A100", comment):
            own = [words for other, words in checked if other == comment and match[0] in words]
            assert own or comment.startswith("Intervals") or "times the steps" in comment, (comment, match[0])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_penalty_is_called_off_where_its_weight_is_zero_and_nowhere_else(path):
    recipe, _ = planned(path)
    [*lines] = [comment for _, comment in comments(path) if comment.startswith("Sharpness penalty:")]
    for line in lines:
        assert line.startswith("Sharpness penalty: off") == (recipe.penalty_weight == 0)
    assert lines or recipe.penalty_weight == 0
