"""Pretrain GPT-2: recipe -> data -> model -> plan -> train -> export.

accelerate launch run_clm_owt.py --recipe recipes/owt_512.yaml
"""

import contextlib
import sys
from pathlib import Path

from clm_owt.recipe import InputError, Recipe, exit_with, read_command_line


def run(recipe: Recipe, plan_only: bool) -> None:
    """The whole of a run, or what is left of it. Raises InputError for what cannot work, Stopped after a signal."""
    # Imported here, so that a bad recipe is reported without waiting for torch.
    from clm_owt import batching, checkpoint, loop, machine, modeling, optim, plan, run_folder, tracking
    from clm_owt.data.builder import Builder
    from clm_owt.data.encoding import load_tokenizer
    from clm_owt.data.order import TrainingBlocks
    from clm_owt.data.sources import resolve_source
    from clm_owt.data.token_store import TokenStore

    machine.quiet_libraries()
    accelerator = machine.create_accelerator(recipe)
    processes = machine.Processes(accelerator)
    say = processes.say

    begun = processes.on_main(run_folder.find_begun_run, recipe)
    if begun.finished:
        return say(*run_folder.summarize(Path(recipe.output_dir)))

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(machine.StopRequest().listening())

        # Data: one builder a machine writes the token store, every process reads it.
        source = processes.on_main(resolve_source, begun.pin_data(recipe))
        builder = Builder.start(recipe, source) if accelerator.is_local_main_process else Builder.none()
        stack.enter_context(builder)
        check = machine.WaitingCheck(stop, builder, say)
        store = TokenStore(recipe, source)
        tokenizer = load_tokenizer(store.wait_for_tokenizer(check))
        begun.check_same_data(store.folder.name)

        model = modeling.build_model(recipe, len(tokenizer), tokenizer.eos_token_id).to(accelerator.device)
        optimizer = optim.build_optimizer(model, recipe)

        store.wait_for_validation(check)
        if recipe.total_steps() is None:
            say("The number of steps depends on the number of blocks: reading all of the data first.")
            store.wait_complete(check)
        store.wait_for_rows(recipe.effective_batch_size, check)

        # Plan: fixed when the run begins.
        micro_batch = batching.find_micro_batch(recipe, processes.count)
        data = plan.Data(
            train_documents=store.documents["train"] if store.complete else None,
            validation_documents=store.documents["validation"],
            train_blocks=store.train_blocks,
            validation_blocks=len(store.validation),
        )
        the_plan = plan.make_plan(
            recipe, data, vocab_size=len(tokenizer), processes=processes.count, micro_batch=micro_batch
        )
        say(*plan.describe(the_plan, recipe))
        if plan_only:
            return
        if accelerator.is_main_process:
            run_folder.begin(recipe, the_plan, source=source, store=store.folder.name)

        # Training, from the start or from where it was.
        state = checkpoint.TrainState()
        if begun.checkpoint is not None:
            state = checkpoint.restore(begun.checkpoint, model, optimizer, processes)
            say(*begun.passed_over, f"Continuing after step {state.step:,}, from {begun.checkpoint}")
        state.micro_batch = micro_batch
        modeling.compile_blocks(model, recipe.torch_compile, accelerator.device)
        schedule = optim.build_schedule(
            optimizer, recipe.warmup_steps, the_plan.total_steps, recipe.min_lr_ratio, completed_steps=state.step
        )
        tracker = stack.enter_context(tracking.Tracker(recipe, accelerator, the_plan.total_steps))
        tracker.start(state, config=recipe.to_dict() | the_plan.to_dict())
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
            checkpoints=checkpoint.CheckpointWriter(Path(recipe.output_dir) / "checkpoints", recipe.save_total_limit),
        )
        loop.train(training, state)

        # Export
        run_folder.export(recipe, model, tokenizer, store, state, processes)
        say(*run_folder.summarize(Path(recipe.output_dir)))


def main(argv: list[str]) -> None:
    """Exit statuses: 0 finished, 2 a recipe or input that cannot work, 1 any other error, 128 + n after signal n."""
    try:
        recipe, plan_only = read_command_line(argv)
        run(recipe, plan_only)
    except InputError as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
