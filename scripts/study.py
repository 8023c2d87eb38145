"""What a sharpness penalty does to a language model: train, measure and compare, with paired seeds.

python scripts/study.py recipes/studies/lambda_quickstart.yaml
python scripts/study.py recipes/studies/lambda_owt.yaml --plan_only        runs, steps, tokens, time and cost
python scripts/study.py recipes/studies/lambda_owt.yaml --gpus 0,1,2,3     one run on each GPU, side by side
python scripts/study.py recipes/studies/lambda_owt.yaml --max_steps 5000   further options go to every run

The file is a grid in W&B's sweep format over penalty_type, penalty_weight (0 among its values) and seed (at least
two). Runs are carried out as scripts/sweep.py does; at λ = 0 one run of each seed stands for every penalty. Then the
models are measured, each beside its control, the model of the same seed at λ = 0 and the temperature of equal entropy;
and the report is written to runs/studies/NAME/: report.html, report.md, CSV files, pictures. docs/penalty.md tells how
to read it.

Started again, the study keeps what is finished and what is measured, also when seeds or weights were added to the
file. A run that failed is left out of the report and tried again the next time; the status is 1 then.
"""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from clm_owt.console import waiting
from clm_owt.errors import InputError
from clm_owt.experiments.execution import Places, interruption
from clm_owt.experiments.local_sweep import LocalSweep
from clm_owt.experiments.measuring import Measuring
from clm_owt.experiments.study import MeasuredRun, Measurement, MeasuringSettings, plan_measurements, plan_study
from clm_owt.experiments.study_plan import plan_lines
from clm_owt.experiments.sweep_file import Sweep, SweptRun, read_sweep
from clm_owt.files import replacing, write_text
from clm_owt.planning.devices import DEVICES, find_device
from clm_owt.program import count, number, run_script
from clm_owt.recipe import at_least, show
from clm_owt.reports.comparison import check_intervals_can_be_computed
from clm_owt.reports.record import read_plan
from clm_owt.reports.study_findings import Findings, ModelMeasures, StudiedRun
from clm_owt.reports.study_report import StudyText, write_report


def main(argv: list[str]) -> int:
    options, extra = read_options(argv)
    if options.measure:
        tasks = json.loads(options.measure.read_text(encoding="utf-8"))
        return measure([Measurement(**task) for task in tasks])
    sweep = read_sweep(options.study)
    runs, notes = plan_study(sweep, extra)
    places = Places(options.gpus)
    if options.plan_only:
        devices = [find_device(name) for name in options.device] if options.device else list(DEVICES)
        print(*plan_lines(sweep.name, runs, notes, devices, options.vocab_size, options.price, len(places)), sep="\n")
        return 0
    check_intervals_can_be_computed()
    folder = Path("runs/studies") / sweep.name
    (folder / "measures").mkdir(parents=True, exist_ok=True)
    write_text(folder / "study.yaml", options.study.read_text(encoding="utf-8"))
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    with interruption() as interrupted:
        trained = LocalSweep(sweep, extra, places, folder, interrupted)
        trained.carry_out_all(runs)
        finished = [run for run in runs if run.status == "finished"]
        measuring = Measuring([sys.executable, __file__, "--measure"], folder / "measures", places, interrupted)
        measured = []
        if not interrupted.is_set():
            with waiting("reading the files of the models"):
                measured = plan_measurements(finished, settings_of(options, runs), folder / "measures")
            measuring.measure_all(measured)
    if interrupted.is_set():
        print("Interrupted; the same command continues.")
        return 128 + signal.SIGINT
    command = shlex.join(["python", "scripts/study.py", *argv])
    report(sweep, command, runs, notes, measured, folder)
    for run in runs:
        if run.status != "finished":
            print(f"failed: {run.label}: see {folder / run.recipe.run_name}.log", file=sys.stderr)
    for measurement in measuring.failed:
        print(f"not measured: {measurement.name}: see {folder}/measures/measuring*.log", file=sys.stderr)
    return 1 if len(finished) < len(runs) or measuring.failed else 0


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own options, and those that go to every run."""
    parser = argparse.ArgumentParser(
        prog="scripts/study.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, nargs="?", help="a grid in W&B's sweep format")
    parser.add_argument("--gpus", default="", help="GPUs to use, one run on each: 0,1,2,3")
    parser.add_argument("--prompts", type=count, default=128, help="texts generated (default: %(default)s)")
    parser.add_argument("--prompt_tokens", type=count, default=32, help="tokens of each prompt, default %(default)s")
    parser.add_argument(
        "--new_tokens", type=number(int, at_least(4)), default=64, help="tokens after each (default: %(default)s)"
    )
    parser.add_argument("--bins", type=count, default=15, help="of the calibration (default: %(default)s)")
    parser.add_argument("--plan_only", action="store_true", help="print what it will take, and stop")
    keys = ", ".join(device.key for device in DEVICES)
    parser.add_argument("--device", nargs="+", metavar="NAME", help=f"in the plan; default: all known ({keys})")
    parser.add_argument(
        "--price", type=number(float, at_least(0)), metavar="AMOUNT", help="in the plan: of an hour of a device"
    )
    parser.add_argument("--vocab_size", type=count, help="in the plan, where the recipe's tokenizer does not tell")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what measures in a process of its own
    options, extra = parser.parse_known_args(argv)
    if options.study is None and options.measure is None:
        parser.error("expected a study's file, such as recipes/studies/lambda_quickstart.yaml")
    if unknown := [name for name in options.device or () if find_device(name) is None]:
        raise InputError(f"--device: {', '.join(unknown)} not known; expected any of {keys}")
    return options, extra


def settings_of(options: argparse.Namespace, runs: Sequence[SweptRun]) -> MeasuringSettings:
    return MeasuringSettings(
        prompts=options.prompts,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        bins=options.bins,
        top_k=runs[0].recipe.penalty_top_k,
    )


def measure(measurements: Sequence[Measurement]) -> int:
    """Make measurements that are not made yet, one after the other, each file in one piece. A model that cannot be
    read is said, and left out; status 1 then."""
    import transformers

    from clm_owt.evaluation.model_measures import RememberedLogits, measure_control, measure_model
    from clm_owt.evaluation.windows import recipe_windows
    from clm_owt.training.trained_model import load_trained

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loaded, windows, status = None, None, 0
    for measurement in measurements:
        if measurement.kept() is not None:
            continue
        try:
            if loaded != measurement.model:
                trained, tokenizer = load_trained(measurement.model)
                model, loaded = RememberedLogits(trained), measurement.model
            if windows is None:  # all runs of a study have the same
                windows = recipe_windows(measurement.recipe, tokenizer, model.config.n_positions, None)
            if measurement.as_sharp_as is None:
                found = measure_model(model, windows, measurement.key)
            else:
                sharp = json.loads(Path(measurement.as_sharp_as).read_text(encoding="utf-8"))
                found = measure_control(model, windows, measurement.key, sharp["values"]["entropy"])
        except (InputError, OSError) as error:
            print(f"error: {measurement.name}: {error}", file=sys.stderr, flush=True)
            status = 1
            continue
        # Aside under a name of its own: a process that a killed study left may be measuring the same.
        with replacing(Path(measurement.output), suffix=f".{os.getpid()}.partial") as aside:
            aside.write_text(json.dumps({"key": measurement.key, **found}, indent=1), encoding="utf-8")
        print(f"{measurement.name}: measured", flush=True)
    return status


def report(
    sweep: Sweep,
    command: str,
    runs: Sequence[SweptRun],
    notes: Sequence[str],
    measured: Sequence[MeasuredRun],
    folder: Path,
) -> None:
    """Write the report, and print what was found."""
    # Imported here, so that a bad study is reported without waiting for torch.
    from clm_owt.evaluation.predictions import PredictionStatistics, predicted_effect

    def predict(values: Mapping[str, float], penalty_type: str, weight: float) -> dict[str, float]:
        at_zero = PredictionStatistics(*(values[name] for name in PredictionStatistics._fields))
        return predicted_effect(at_zero, penalty_type, weight)._asdict()

    findings = Findings(studied_runs(runs, measured), predict)
    if not findings.measures:
        print("No run has finished and was measured: there is nothing to report", flush=True)
        return
    about = about_lines(sweep, runs, notes, measured)
    said = write_report(StudyText(f"The study {sweep.name}", command, about), findings, folder)
    print("", *(line.replace("`", "") for line in said), sep="\n")
    print(f"\nThe report: {folder}/report.{{html,md}}, its tables {folder}/*.csv, its pictures {folder}/*.png")


def studied_runs(runs: Sequence[SweptRun], measured: Sequence[MeasuredRun]) -> list[StudiedRun]:
    """The runs with what was measured of them; and why not."""
    by_name = {found.run.recipe.run_name: found for found in measured}
    studied = []
    for run in runs:
        found = by_name.get(run.recipe.run_name)
        model = found and found.model.kept()
        control = found and found.control and found.control.kept()
        remark = ""
        if found is None:
            remark = f"the run {run.status}"
        elif model is None:
            remark = "its model could not be measured"
        elif run.recipe.penalty_weight and found.control is None:
            remark = "no control, since no run at λ = 0 has its seed"
        elif control and "error" in control:
            remark = f"no control: {control['error']}"
        elif found.control and control is None:
            remark = "its control could not be measured"
        studied.append(
            StudiedRun(
                run.recipe.penalty_type,
                run.recipe.penalty_weight,
                run.recipe.seed,
                ModelMeasures.from_json(model) if model else None,
                ModelMeasures.from_json(control) if control and "error" not in control else None,
                remark,
            )
        )
    return studied


def about_lines(
    sweep: Sweep, runs: Sequence[SweptRun], notes: Sequence[str], measured: Sequence[MeasuredRun]
) -> list[str]:
    """What was done, in words."""
    recipe, key = runs[0].recipe, measured[0].model.key
    seeds = sorted({run.recipe.seed for run in runs})
    fixed = ", ".join(f"`{name}={show(value)}`" for name, value in sweep.fixed.items())
    samplings = ", ".join(f"{name.replace('_', ' ')}" for name in key["samplings"])
    plans = [read_plan(found.run.folder) for found in measured]
    plan = plans[0]
    devices = dict.fromkeys(str(plan.get("device")) for plan in plans)
    commits = dict.fromkeys(f"`{plan.get('environment', {}).get('git_commit')}`" for plan in plans)
    return [
        f"{len(runs)} runs, {len(measured)} of them finished: {fixed}; {recipe.total_steps(plan['train_blocks']):,} "
        f"steps of {recipe.effective_batch_size * recipe.block_size:,} tokens; seeds {', '.join(map(str, seeds))}. At "
        "λ = 0 one run of each seed stands for every penalty." + "".join(f" {note}." for note in notes),
        f"Measured on the {plan['validation_blocks']:,} validation blocks of {recipe.block_size} tokens (token store "
        f"`{plan['store']}`). Generation: {key['prompts']} prompts of {key['prompt_tokens']} tokens cut from them, "
        f"{key['new_tokens']} tokens each, {samplings}. Calibration: {key['bins']} bins. k of `top_k_mass`: "
        f"{key['top_k']}.",
        f"Trained on {', '.join(devices)}, git commit {', '.join(commits)}.",
    ]


if __name__ == "__main__":
    run_script(main)
