"""Upload a run to the Hugging Face Hub: one that was not pushed, or whose upload failed.

python scripts/push.py runs/owt_512 --hub_model_id me/gpt2-owt
"""

import argparse
import sys
from pathlib import Path

from clm_owt.errors import InputError
from clm_owt.hub import explain, push
from clm_owt.program import run_script
from clm_owt.reports.record import read_recipe
from clm_owt.training.run_lock import run_lock


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--hub_model_id", help="repository to upload to (default: the recipe's)")
    parser.add_argument("--private", action="store_const", const=True, help="create the repository as private")
    options = parser.parse_args(argv)
    read_recipe(options.run)  # else a lock would be the first file of a folder
    try:
        with run_lock(options.run, leaving=0.0):  # a run that is running uploads from there itself
            url = push(options.run, options.hub_model_id, options.private)
        print(f"Uploaded {options.run}: {url}")
    except InputError:
        raise
    except Exception as error:
        sys.exit(f"error: {options.run} was not uploaded: {explain(error)}; the same command repeats it")


if __name__ == "__main__":
    run_script(main)
