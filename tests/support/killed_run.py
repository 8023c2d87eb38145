"""The main job, one of whose processes kills itself before its launcher has restarted it:
`killed_run.py RANK STEP OPTION...`, in place of run_clm_owt.py."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import run_clm_owt
from clm_owt.training.trainer import Trainer


class KilledTrainer(Trainer):
    """Is killed in that step of the first round."""

    rank, step = sys.argv[1], int(sys.argv[2])

    def train_step(self):
        doomed = os.environ["RANK"] == self.rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if doomed and self.state.step + 1 == self.step:
            self.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step()


if __name__ == "__main__":
    run_clm_owt.main(sys.argv[3:], trainer_class=KilledTrainer)
