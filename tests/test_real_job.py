"""The command of the README on OpenWebText's form of data, read through the Hub's protocol on the loopback address."""

import json

from support.hub_fixtures import OPENWEBTEXT
from support.runs import ROOT, launcher, run

SMALL = (
    "--n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --effective_batch_size 8 --validation_documents 2 "
    "--warmup_steps 2 --max_steps 6 --eval_steps 3 --sample_max_new_tokens 5 --sample_steps 6 --run_name real"
).split()


def test_the_real_command_trains_on_openwebtext_from_the_hub_to_the_end(owt_hub, tmp_path):
    env = owt_hub.env(home=tmp_path / "hf")
    command = [*launcher(), "--recipe", str(ROOT / "recipes/owt_512.yaml"), *SMALL]
    result = run(command, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs/real"
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["source"]["commit"] == owt_hub.repository(OPENWEBTEXT, "dataset").sha
    assert plan["vocab_size"] == 50257
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validation = [row["loss"] for row in rows if row["split"] == "validation"]
    assert len(validation) == 3
    assert 10.7 < validation[0] < 10.9  # ln 50257 = 10.825
    assert validation[-1] < validation[0]
    assert "warning" not in result.stderr.lower(), result.stderr

    seen = len(owt_hub.log)
    again = run(command, cwd=tmp_path, env=env)
    assert "\nFinished real: 6 steps" in again.stdout and "Plan of" not in again.stdout
    assert len(owt_hub.log) == seen  # a finished run opens no connection
