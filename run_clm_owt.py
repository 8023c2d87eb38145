"""Pretrain GPT-2: recipe -> data -> model -> plan -> train -> export.

accelerate launch run_clm_owt.py --recipe recipes/owt_512.yaml
"""

if __name__ == "__main__":
    from clm_owt.program import end_quietly_at_interrupts

    end_quietly_at_interrupts()

import contextlib
import os
import sys
from pathlib import Path

from clm_owt.console import close_output, print_lines, waiting
from clm_owt.errors import InputError, RunFailed, disk_is_full, exit_with
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import read_command_line
from clm_owt.run_state import RunReport, Session, launcher_name, leave_if_ended_for_good
from clm_owt.stopping import Deadline, StopRequest


def run(recipe: Recipe, plan_only: bool, stop: StopRequest, processes_class=None, search=None, trainer_class=None):
    """The whole of a run, or what is left of it. Raises InputError for what cannot work, Stopped after a signal.

    The last three stand in for Processes, find_micro_batch and Trainer: by them a run can be watched and disturbed.
    """
    # Imported here, so that a bad recipe is reported without waiting for torch.
    with waiting("importing torch, transformers and datasets"):
        from clm_owt import hub
        from clm_owt.data import order
        from clm_owt.planning import disks, plan
        from clm_owt.remote import checkpoints as remote
        from clm_owt.tracking.run_log import RunLog
        from clm_owt.training import launch, micro_batch_search, processes, run_folder, task_evaluation, trainer

    folder = Path(recipe.output_dir)
    with contextlib.ExitStack() as stack:
        accelerator = launch.create_accelerator(recipe)
        group = stack.enter_context((processes_class or processes.Processes)(accelerator))
        hardware = launch.find_hardware(accelerator, group)

        locked = group.on_main(run_folder.claim, recipe, plan_only, stack)
        session = Session.of_all_processes(group.gather)
        report = stack.enter_context(RunReport(folder if locked else None, group.is_main, stop, session))
        existing = group.on_main(run_folder.find_existing_run, recipe, remote.fetch_newer if locked else None)
        if existing.finished and not plan_only:
            return group.say(*group.on_main(run_folder.summarize, folder))
        stop.reached = existing.reached
        if plan_only and plan_without_data(recipe, existing, accelerator, group, stop, hardware):
            return
        if not plan_only:
            group.say(*group.on_main(hub.check_repository, recipe), *group.on_main(remote.check_places, recipe))
            tasks = task_evaluation.TaskEvaluation(recipe, group)
            group.say(*tasks.lines)

        source, store, tokenizer, check = open_data(recipe, existing, group, stop, report, stack)
        model = build_model(recipe, tokenizer, accelerator, group, hardware)

        # Plan: fixed when the run begins.
        store.wait_for_first_step(check, group.say)
        found = (search or micro_batch_search.find_micro_batch)(
            model, recipe, accelerator, group, stop, hardware, known=existing.micro_batch_search, probing=not plan_only
        )
        found_disks = group.on_main(disks.find_disks, store.folder, folder)
        data = plan.Data(**store.counts())
        the_plan = plan.make_plan(recipe, data, len(tokenizer), found.micro_batch, hardware, *found_disks)
        group.say(found.summary(), *plan.plan_lines(the_plan, recipe))
        if plan_only:
            return
        group.on_main(run_folder.begin, recipe, the_plan, found, hardware, source, store.folder.name, existing)

        # Training, from the start or from where it was.
        log = stack.enter_context(RunLog(recipe, the_plan.total_steps, group.is_main))
        uploads = hub.HubUploads(recipe, model, tokenizer, the_plan.total_steps, group.is_main, log.say)
        kept = stack.enter_context(remote.RemoteCheckpoints(recipe, group.is_main, log.say))
        blocks = order.TrainingBlocks(store, seed=recipe.seed, check=check)
        training = (trainer_class or trainer.Trainer)(
            recipe, the_plan, model=model, tokenizer=tokenizer, store=store, blocks=blocks, hardware=hardware,
            accelerator=accelerator, processes=group, stop=stop, log=log, report=report, existing=existing,
            found=found, tasks=tasks, on_saved=[kept.saved, uploads.saved], after_row=check.print_new_lines,
        )  # fmt: skip
        report.begin(training.state.step, the_plan.total_steps)
        log.start(training.state, config=recipe.to_dict() | the_plan.to_dict())
        with stop.between_steps():
            training.train()

        training.export()
        report.finish()
        log.close()
        group.say(*group.on_main(run_folder.summarize, folder))
        uploads.finish(stop)


def open_data(recipe: Recipe, existing, group, stop: StopRequest, report: RunReport, stack: contextlib.ExitStack):
    """One builder a machine writes the token store, every process reads it. Gives the source of its documents, the
    store, the tokenizer, and what is to be called while blocks are waited for."""
    from clm_owt.data import builder, sources, token_store, tokenizer_files

    source = group.on_main(sources.resolve_source, existing.pin_data(recipe))
    building = stack.enter_context(builder.Builder.start(recipe, source, group.is_first_of_machine))
    check = builder.WaitingCheck(stop, building, group.say, report.waiting_for_data)
    store = token_store.TokenStore(recipe, source)
    tokenizer = tokenizer_files.load_tokenizer(store.wait_for_tokenizer(check))
    existing.check_same_data(store.folder.name)
    return source, store, tokenizer, check


def build_model(recipe: Recipe, tokenizer, accelerator, group, hardware):
    """On the device, with random weights, in FP8 and compiled where it is to be."""
    from clm_owt.model import fp8, gpt2

    model = gpt2.build_model(recipe, len(tokenizer), tokenizer.eos_token_id).to(accelerator.device)
    if hardware.mixed_precision == "fp8":
        group.say(fp8.convert(model, accelerator))
    group.say(*gpt2.compile_blocks(model, recipe.torch_compile, accelerator.device))
    return model


def plan_without_data(recipe: Recipe, existing, accelerator, group, stop: StopRequest, hardware) -> bool:
    """Print the plan of the recipe alone if neither data nor tokenizer can be read here; whether it was so."""
    from clm_owt.data import reachability, tokenizer_files
    from clm_owt.planning import plan
    from clm_owt.training.micro_batch_search import find_micro_batch

    reason = group.on_main(reachability.find_unreachable, existing.pin_data(recipe))
    if reason is None:
        return False
    known = existing.micro_batch_search
    found = find_micro_batch(None, recipe, accelerator, group, stop, hardware, known=known, probing=False)
    vocab_size = group.on_main(tokenizer_files.known_vocab_size, recipe)
    the_plan = group.on_main(plan.make_plan, recipe, plan.Data(), vocab_size, found.micro_batch, hardware)
    group.say(f"Data and tokenizer are not looked at ({reason}): the plan is of the recipe alone", found.summary())
    group.say(*plan.plan_lines(the_plan, recipe, not_looked_at=True))
    return True


def main(argv: list[str], **stand_ins: object) -> None:
    """Exit statuses: 0 finished, 2 a recipe or input that cannot work, 1 any other error, 128 + n after signal n.
    `stand_ins`: as `run` takes them."""
    try:
        recipe, plan_only = read_command_line(argv)
        if not plan_only:
            leave_if_ended_for_good(Path(recipe.output_dir), launcher_name())
        if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
            print_lines(f"{recipe.run_name}: importing torch, transformers and datasets, some seconds")
        deadline = Deadline.of(recipe.stop_after)
        if deadline is not None and os.environ.get("RANK", "0") == "0":
            print_lines(f"{recipe.run_name}: {deadline}")
        with StopRequest(deadline).listening() as stop:
            run(recipe, plan_only, stop, **stand_ins)
    except InputError as error:
        exit_with(error)
    except RunFailed as error:
        if os.environ.get("RANK", "0") == "0":
            print_lines(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not disk_is_full(error):
            raise
        print_lines(f"error: {error}; make room, and the same command continues", file=sys.stderr)
        sys.exit(1)
    finally:
        close_output()


if __name__ == "__main__":
    main(sys.argv[1:])
