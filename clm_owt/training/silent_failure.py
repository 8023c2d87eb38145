"""What goes wrong in a training without an error: seen in its first steps, and said once, with what may help."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clm_owt.planning.plan import BASE_BATCH, BASE_RATE
from clm_owt.recipe import Recipe

WATCHED_STEPS = 200
EVERY = 10  # steps between two looks
WINDOW = 20  # steps that a mean is of
UNIGRAM_BLOCKS = 2000  # more of them change the unigram's loss in the third digit

# In nats. A loss hovers that has not fallen by this much within 40 steps ...
LEAST_FALL = 0.05
# ... and it is the unigram's, or above it, from this far below on.
BELOW_UNIGRAM = 0.3
# It has risen that lies so far above its lowest, near the unigram's loss and below; and so many standard errors.
RISE, RISE_BELOW_UNIGRAM = 0.3, 1.0
STANDARD_ERRORS = 4
# Learning has begun where the loss has fallen by so much, or risen, since the first step.
BEGUN = 0.5
# A gradient has collapsed whose norm is this share of that of the first steps.
COLLAPSED = 0.01


@dataclass(frozen=True)
class Symptom:
    """What is seen of a training that fails silently. `kind`: plateau, rise, or gradient."""

    kind: str
    text: str


class SilentFailure:
    """Watches the first WATCHED_STEPS steps. The lists are the run's own and are saved with it: cross-entropies and
    gradient norms of these steps, and the kinds of symptoms that were said."""

    def __init__(self, recipe: Recipe, losses: list[float], grad_norms: list[float], said: list[str]):
        self._recipe, self._losses, self._grad_norms, self._said = recipe, losses, grad_norms, said

    def watch(self, step: int, loss: float, grad_norm: float, unigram: Callable[[], float]) -> str | None:
        """Take in a step; what is to be said of the steps so far, if anything. `unigram` gives the loss of a unigram
        model of the tokens so far; it is asked only where it decides."""
        if step > WATCHED_STEPS:
            return None
        if math.isfinite(loss) and math.isfinite(grad_norm):  # other steps are skipped, and reported as such
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
        symptom = find_symptom(self._losses, self._grad_norms, unigram) if step % EVERY == 0 else None
        if symptom is None or symptom.kind in self._said:
            return None
        self._said += ["plateau", "rise"] if symptom.kind in ("plateau", "rise") else [symptom.kind]
        return f"step {step}: {symptom.text}; {self._what_to_do(symptom.kind)}"

    def _what_to_do(self, kind: str) -> str:
        recipe = self._recipe
        rule = BASE_RATE * math.sqrt(recipe.effective_batch_size / BASE_BATCH)
        batch, rate = recipe.effective_batch_size, f"{recipe.learning_rate:g}"
        high = (
            f"learning_rate {rate} too high for effective_batch_size {batch} (for GPT-2 small the square-root rule "
            f"gives {rule:.2g}) or for a warm-up of {recipe.warmup_steps} steps"
        )
        if kind == "plateau":
            return f"usual causes: {high}, or far too low; or a text whose tokens do not follow from each other"
        return (
            f"usual causes: {high}; where a lower rate changes nothing, wrong kernels: try --torch_compile false, and "
            "mixed_precision: no in the Accelerate configuration"
        )


def find_symptom(losses: Sequence[float], grad_norms: Sequence[float], unigram: Callable[[], float]) -> Symptom | None:
    """What the cross-entropies and gradient norms of a run's first steps show, if anything."""
    if len(losses) < 3 * WINDOW:
        return None
    norm, first_norm = statistics.median(grad_norms[-WINDOW:]), statistics.median(grad_norms[:WINDOW])
    if norm < COLLAPSED * first_norm:
        text = f"the gradient norm has collapsed to {norm:.2g}, from {first_norm:.2g} in the first {WINDOW} steps"
        return Symptom("gradient", text)
    now, before = statistics.fmean(losses[-WINDOW:]), statistics.fmean(losses[-3 * WINDOW : -2 * WINDOW])
    lowest = min(statistics.fmean(losses[i : i + WINDOW // 2]) for i in range(len(losses) - 2 * WINDOW))
    begun = losses[0] - lowest > BEGUN or now - losses[0] > BEGUN
    if now < before - LEAST_FALL or not begun:
        return None
    level = unigram()
    steps = np.diff(losses[-2 * WINDOW :])
    deviation = float(steps.std()) / math.sqrt(2 * (WINDOW // 2))  # of a mean of half a window
    near = now > level - BELOW_UNIGRAM
    beside = f"where a unigram model of the same tokens is at {level:.2f}"
    if now - lowest > max(RISE if near else RISE_BELOW_UNIGRAM, STANDARD_ERRORS * deviation):
        text = f"the training loss fell to {lowest:.2f}, rose, and stays at {now:.2f}, {beside}"
        return Symptom("rise", text)
    if near:
        text = f"the training loss has hovered at {now:.2f} for {2 * WINDOW} steps, {beside}"
        return Symptom("plateau", f"{text}: the model learns how frequent tokens are, and hardly more")
    return None


def unigram_loss(blocks: np.ndarray) -> float:
    """The least loss, in nats per token, that a model of token frequencies alone can have on these tokens: the entropy
    of their counts."""
    counts = np.bincount(blocks.reshape(-1))
    shares = counts[counts > 0] / blocks.size
    return float(-(shares * np.log(shares)).sum())
