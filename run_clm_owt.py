"""Pretrain GPT-2: recipe -> data -> model -> plan -> train -> export.

accelerate launch run_clm_owt.py --recipe recipes/owt_512.yaml
"""

import contextlib
import os
import sys
from pathlib import Path

from clm_owt.console import close_output, print_lines
from clm_owt.errors import InputError, RunFailed, disk_is_full, exit_with
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import read_command_line
from clm_owt.stopping import StopRequest


def run(recipe: Recipe, plan_only: bool, stop: StopRequest) -> None:
    """The whole of a run, or what is left of it. Raises InputError for what cannot work, Stopped after a signal."""
    # Imported here, so that a bad recipe is reported without waiting for torch.
    from clm_owt import hub
    from clm_owt.data.builder import Builder
    from clm_owt.data.encoding import load_tokenizer
    from clm_owt.data.order import TrainingBlocks
    from clm_owt.data.sources import resolve_source
    from clm_owt.data.token_store import TokenStore
    from clm_owt.model import fp8
    from clm_owt.model import gpt2 as modeling
    from clm_owt.planning import devices, plan
    from clm_owt.tracking import run_log as tracking
    from clm_owt.training import (
        checkpoint,
        device_memory,
        optim,
        run_folder,
    )
    from clm_owt.training import (
        micro_batch_search as batching,
    )
    from clm_owt.training import (
        processes as machine,
    )
    from clm_owt.training import (
        trainer as loop,
    )

    machine.quiet_libraries()
    with contextlib.ExitStack() as stack:
        accelerator = machine.create_accelerator(recipe)
        processes = stack.enter_context(machine.Processes(accelerator))
        say = processes.say

        begun = processes.on_main(run_folder.find_existing_run, recipe)
        if begun.finished:
            return say(*processes.on_main(run_folder.summarize, Path(recipe.output_dir)))
        if begun.resumed_after:
            stop.reached = f"after step {begun.resumed_after[-1]}, saved"
        if not plan_only:
            say(*processes.on_main(hub.check_repository, recipe))

        # Data: one builder a machine writes the token store, every process reads it.
        source = processes.on_main(resolve_source, begun.pin_data(recipe))
        builder = Builder.start(recipe, source) if accelerator.is_local_main_process else Builder.none()
        stack.enter_context(builder)
        check = machine.WaitingCheck(stop, builder, say)
        store = TokenStore(recipe, source)
        tokenizer = load_tokenizer(store.wait_for_tokenizer(check))
        begun.check_same_data(store.folder.name)

        model = modeling.build_model(recipe, len(tokenizer), tokenizer.eos_token_id).to(accelerator.device)
        if accelerator.mixed_precision == "fp8":
            say(fp8.convert(model, accelerator))
        modeling.compile_blocks(model, recipe.torch_compile, accelerator.device)

        store.wait_for_validation(check)
        if recipe.total_steps() is None:
            say("The number of steps depends on the number of blocks: reading all of the data first.")
            store.wait_complete(check)
        store.wait_for_rows(recipe.effective_batch_size, check)

        # Plan: fixed when the run begins.
        search = batching.find_micro_batch(
            model, recipe, accelerator, processes, stop, known=begun.micro_batch_search, probing=not plan_only
        )
        say(search.describe())
        data = plan.Data(
            train_documents=store.documents["train"] if store.complete else None,
            validation_documents=store.documents["validation"],
            train_blocks=store.train_blocks,
            validation_blocks=len(store.validation),
        )
        the_plan = plan.make_plan(
            recipe,
            data,
            vocab_size=len(tokenizer),
            processes=processes.count,
            micro_batch=search.micro_batch,
            mixed_precision=accelerator.mixed_precision,
            sharded=processes.sharded,
            device_type=accelerator.device.type,
            device_name=devices.name_of(accelerator.device),
            device_memory=device_memory.total_memory(accelerator.device),
            data_disk=processes.on_main(plan.find_disk, store.folder),
            output_disk=processes.on_main(plan.find_disk, Path(recipe.output_dir)),
        )
        say(*plan.describe(the_plan, recipe))
        if plan_only:
            return
        if accelerator.is_main_process:
            run_folder.begin(
                recipe, the_plan, search, source=source, store=store.folder.name, resumed_after=begun.resumed_after
            )

        # Training, from the start or from where it was.
        processes.shard(model)
        optimizer = optim.build_optimizer(model, recipe)
        state = checkpoint.TrainState()
        if begun.checkpoint is not None:
            state = checkpoint.restore(begun.checkpoint, model, optimizer, processes)
            say(*begun.passed_over, f"Continuing after step {state.step:,}, from {begun.checkpoint}")
            folder = Path(recipe.output_dir) / "checkpoints"
            processes.on_main(checkpoint.set_aside_newer, folder, begun.checkpoint)
        if not (search.from_plan and state.micro_batch):  # on the same machine a step-down later in the run stays
            state.micro_batch = search.micro_batch
        schedule = optim.build_schedule(
            optimizer, recipe.warmup_steps, the_plan.total_steps, recipe.min_lr_ratio, completed_steps=state.step
        )
        tracker = stack.enter_context(tracking.Tracker(recipe, accelerator, the_plan.total_steps))
        tracker.start(state, config=recipe.to_dict() | the_plan.to_dict())
        uploads = hub.HubUploads(recipe, model, tokenizer, the_plan.total_steps, processes, tracker.say)
        training = loop.Run(
            recipe=recipe,
            total_steps=the_plan.total_steps,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            store=store,
            blocks=TrainingBlocks(store, seed=recipe.seed, check=check),
            tokenizer=tokenizer,
            accelerator=accelerator,
            processes=processes,
            stop=stop,
            tracker=tracker,
            throughput=tracking.Throughput.of(the_plan, recipe, accelerator),
            checkpoints=checkpoint.CheckpointWriter(
                Path(recipe.output_dir) / "checkpoints",
                recipe.save_total_limit,
                on_written=uploads.saved,
                say=tracker.say,
            ),
            pass_on_news=check.pass_on_news,
        )
        with stop.between_steps():
            loop.train(training, state)

        # Export
        run_folder.export(recipe, model, tokenizer, store, state, processes)
        tracker.close()
        say(*processes.on_main(run_folder.summarize, Path(recipe.output_dir)))
        uploads.finish(stop)


def main(argv: list[str]) -> None:
    """Exit statuses: 0 finished, 2 a recipe or input that cannot work, 1 any other error, 128 + n after signal n."""
    try:
        recipe, plan_only = read_command_line(argv)
        with StopRequest().listening() as stop:
            run(recipe, plan_only, stop)
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
