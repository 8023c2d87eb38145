"""Zero-shot tasks of lm-evaluation-harness whose data lie on this machine."""

import json
from pathlib import Path

TASK = """\
task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

# The tasks that GPT-2 is judged by, as lm-evaluation-harness defines them, but for the place of their data.
LOCAL_TASK = """\
include: {definition}
task: local_{task}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files: {{train: {data}, validation: {data}, test: {data}}}
"""
LOCAL_ROWS = {
    "lambada/lambada_openai": {"text": "Returns the sum of the values, and nothing but the sum"},
    "wikitext/wikitext": {"page": " = Title = \n A list of values , each with a name . \n"},
    "hellaswag/hellaswag": {
        "activity_label": "Sorting",
        "ctx_a": "The values are read.",
        "ctx_b": "they",
        "endings": ["are sorted.", "sleep.", "sing.", "are blue."],
        "label": "0",
    },
    "piqa/piqa": {"goal": "Sort a list", "sol1": "call sorted", "sol2": "call the police", "label": 0},
}


def write_rows(path: Path, rows: list[dict]) -> str:
    """As JSON lines; the file's name as YAML takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return json.dumps(str(path))


def write_local_tasks(home: Path) -> tuple[Path, list[str]]:
    """A folder in `home` with the definitions of tasks, and their names: one of its own, and some of the harness."""
    import lm_eval

    folder, names = home / "tasks", ["tiny_choices"]
    folder.mkdir()
    data = write_rows(home / "choices.jsonl", [{"question": f"Is {n} even?", "answer": n % 2} for n in range(8)])
    (folder / "tiny_choices.yaml").write_text(TASK.format(data=data))
    for task, row in LOCAL_ROWS.items():
        definition, task = Path(lm_eval.__file__).parent / f"tasks/{task}.yaml", Path(task).name
        data = write_rows(home / f"{task}.jsonl", [row] * 3)
        (folder / f"local_{task}.yaml").write_text(LOCAL_TASK.format(definition=definition, task=task, data=data))
        names.append(f"local_{task}")
    return folder, names
