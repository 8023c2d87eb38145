"""Draw learning rate schedules in the terminal and, with --output, as a picture.

python scripts/visualize_lr_schedule.py --warmup_steps 2000 --total_steps 1760 --max_lr 0.003
python scripts/visualize_lr_schedule.py --recipe recipes/owt_512.yaml recipes/owt_2048.yaml --output schedules.png
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.program import count, number, picture_file, run_script
from clm_owt.recipe import above, at_least, fraction
from clm_owt.recipe_reader import load_recipe
from clm_owt.reports.figures import save_figure
from clm_owt.reports.panels import COLORS
from clm_owt.schedule import SCHEDULES, Schedule

WIDTH, HEIGHT = 72, 12
SIMILAR_LENGTHS = 4  # schedules whose lengths differ by more than this factor have no axis of steps in common


@dataclass(frozen=True)
class Curve(Schedule):
    """A schedule with its peak rate, and the name it is shown by."""

    name: str = ""
    peak: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate after `step` steps."""
        return self.peak * self.factor(step)

    @property
    def last_rate(self) -> float:
        """The rate at the end of the run: the floor, or one of the warm-up that did not end."""
        return self.rate(self.total_steps)

    @property
    def highest_rate(self) -> float:
        """The peak, or the last rate of a warm-up that does not end."""
        return self.peak if self.warmup_ends else self.last_rate

    @property
    def legend(self) -> str:
        """Its name and its numbers, in one line."""
        end = f"{self.last_rate:.3g} after {self.total_steps:,} steps"
        return (
            f"{self.name}: {self.peak:g} at step {self.warmup_steps:,}, {end}"
            if self.warmup_ends
            else f"{self.name}: {end}"
        )

    def summary(self) -> list[str]:
        """Peak, warm-up and floor in words, one or two lines."""
        total = self.total_steps
        if not self.warmup_ends:
            return [
                f"{self.name}: the warm-up of {self.warmup_steps:,} steps never ends: after {total:,} steps the rate "
                f"stops at {self.last_rate:.3g}, {total / self.warmup_steps:.0%} of its peak, and there is no decay.",
                f"  Lower warmup_steps (1-2 % of this run are {max(1, round(0.01 * total)):,} to "
                f"{max(1, round(0.02 * total)):,}) or train longer.",
            ]
        return [
            f"{self.name}: peak {self.peak:g} at step {self.warmup_steps:,} ({self.warmup_steps / total:.1%} of "
            f"{total:,}), floor {self.last_rate:.3g}"
        ]

    def terminal_curve(self) -> list[str]:
        """The rate over the steps as lines of text; `|` marks the end of the warm-up, `.` the floor."""
        steps = [self.total_steps * column // (WIDTH - 1) for column in range(WIDTH)]
        heights = [round(self.rate(step) / self.peak * HEIGHT) for step in steps]
        floor = round(self.min_lr_ratio * HEIGHT) if self.warmup_ends else None
        warm = self.warmup_steps * (WIDTH - 1) // self.total_steps if self.warmup_ends else None
        lines = []
        for level in range(HEIGHT, -1, -1):
            marks = ["|" if column == warm else "." if level == floor else " " for column in range(WIDTH)]
            row = ["*" if height == level else mark for height, mark in zip(heights, marks, strict=True)]
            label = {0: "0", HEIGHT: f"{self.peak:.3g}", floor: f"{self.last_rate:.3g}"}.get(level, "")
            lines.append(f"{label:>9} {''.join(row).rstrip()}")
        end = f"{self.total_steps:,} steps"
        return [*lines, f"{'':>9} 0{end:>{WIDTH - 1}}"]


def draw(schedules: list[Curve]):
    """All schedules as a matplotlib Figure; dots mark where a warm-up ends and where a rate stops. Those of very
    different lengths are drawn over the share of the run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    lengths = [schedule.total_steps for schedule in schedules]
    by_share = max(lengths) > SIMILAR_LENGTHS * min(lengths)
    figure = Figure(figsize=(7, 3.8 + 0.2 * len(schedules)), layout="constrained")
    axes = figure.subplots()
    for color, schedule in zip(COLORS * len(schedules), schedules, strict=False):
        unit = schedule.total_steps if by_share else 1
        steps = {schedule.total_steps * i // 500 for i in range(501)} | {schedule.warmup_steps}
        steps = [step for step in sorted(steps) if step <= schedule.total_steps]
        rates = [schedule.rate(step) for step in steps]
        axes.plot([step / unit for step in steps], rates, color=color, label=schedule.legend)
        marks = [schedule.total_steps, *([schedule.warmup_steps] if schedule.warmup_ends else [])]
        axes.plot([step / unit for step in marks], list(map(schedule.rate, marks)), "o", color=color, markersize=4)
    axes.set(xlabel="share of the run" if by_share else "step")
    axes.set_ylim(0, 1.06 * max(schedule.highest_rate for schedule in schedules))
    axes.set_title("learning rate", loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.xaxis.set_major_formatter(PercentFormatter(1) if by_share else StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", fontsize=9, frameon=False)
    return figure


def read_arguments(argv: list[str]) -> tuple[list[Curve], Path | None]:
    """The schedules to draw, and the picture to draw them in. Raises InputError where something is missing."""
    parser = argparse.ArgumentParser(
        prog="scripts/visualize_lr_schedule.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", nargs="+", default=[], help="recipes whose schedules to draw")
    parser.add_argument("--max_lr", type=number(float, above(0)), help="peak learning rate")
    parser.add_argument("--warmup_steps", type=number(int, at_least(0)))
    parser.add_argument("--total_steps", type=count)
    floor = number(float, fraction("[", "]"))
    parser.add_argument("--min_lr_ratio", type=floor, default=0.1, help="floor as a share of the peak (default: 0.1)")
    parser.add_argument("--lr_schedule", choices=SCHEDULES, default="cosine", help="default: cosine")
    share = number(float, fraction("(", "]"))
    parser.add_argument("--decay_share", type=share, default=0.2, help="of wsd (default: 0.2)")
    parser.add_argument("--output", type=picture_file(".png", ".svg"), help="a picture to draw them in; default: none")
    options = parser.parse_args(argv)
    schedules = [from_recipe(path) for path in options.recipe]
    numbers = {name: getattr(options, name) for name in ("max_lr", "warmup_steps", "total_steps")}
    missing = [f"--{name}" for name, value in numbers.items() if value is None]
    if missing and (len(missing) < len(numbers) or not schedules):
        raise InputError(
            f"{', '.join(missing)}: missing; give --max_lr, --warmup_steps and --total_steps, or --recipe"
        )
    if not missing:
        name = f"{options.max_lr:g}, {options.warmup_steps:,} of {options.total_steps:,} steps"
        schedules.append(
            Curve(
                options.warmup_steps,
                options.total_steps,
                options.min_lr_ratio,
                options.lr_schedule,
                options.decay_share,
                name=name,
                peak=options.max_lr,
            )
        )
    return schedules, options.output


def from_recipe(path: str) -> Curve:
    """The schedule of a recipe file. Raises InputError where its number of steps is not known yet."""
    recipe = load_recipe(["--recipe", path])
    total_steps = recipe.total_steps()
    if total_steps is None:
        raise InputError(
            f"{path}: the number of steps is not known before the data has been read; give its max_steps or "
            "expected_train_blocks"
        )
    return Curve(**asdict(recipe.schedule(total_steps)), name=Path(path).stem, peak=recipe.learning_rate)


def main(argv: list[str]) -> None:
    schedules, output = read_arguments(argv)
    for schedule in schedules:
        print(*schedule.summary(), *schedule.terminal_curve(), "", sep="\n")
    if output:
        save_figure(draw(schedules), output, dpi=150)
        print(f"Drawn in {output}")


if __name__ == "__main__":
    run_script(main)
