"""lm-eval's local-completions over tasks of ours: loglikelihood, multiple_choice, generate_until.

The figures are its samples: the runner scores the same texts itself.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ITEMS = 50
HEROES = ("Tom", "Sue", "Zoë", "a little dog", "the old 猫")
PLACES = ("the park", "a big house", "the river", "school", "the naïve café 😀")
ENDINGS = (" and played all day.", " but it was closed.")
TASK = """
task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
"""
KINDS = {
    "loglikelihood": "metric_list: [{metric: perplexity}, {metric: acc}]",
    "multiple_choice": 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]',
    "generate_until": 'generation_kwargs: {until: [".", "!"], max_gen_toks: 24}\nmetric_list: [{metric: exact_match}]',
}


def documents() -> list[dict[str, Any]]:
    """Short beginnings of stories, each with an ending among rivals; characters of several bytes at the borders."""
    made = []
    for number, (hero, place, ending) in enumerate(itertools.product(HEROES, PLACES, ENDINGS)):
        choices = [" qua of the x.", " 漢字!"]
        # Not always the same place: constant scores would get all of those right.
        choices.insert(number % 3, ending)
        made.append(
            {"text": f"One day {hero} went to {place}", "target": ending, "choices": choices, "gold": number % 3}
        )
    return made


def write_tasks(folder: Path) -> list[str]:
    """Task files and their documents; returns the names of the tasks."""
    docs = documents()
    assert len(docs) == ITEMS
    names = []
    for kind, rest in KINDS.items():
        data = folder / f"{kind}.jsonl"
        told = [doc | {"target": doc["gold"]} if kind == "multiple_choice" else doc for doc in docs]
        data.write_text("".join(json.dumps(doc) + "\n" for doc in told), encoding="utf-8")
        names.append(f"blockserve_{kind}")
        task = TASK.format(name=names[-1], kind=kind, data=data) + rest + "\n"
        (folder / f"{kind}.yaml").write_text(task, encoding="utf-8")
    return names


def evaluate(url: str, folder: Path, names: list[str]) -> None:
    """Run the command; its samples come to `folder`/out."""
    arguments = {
        "base_url": f"{url}/v1/completions",
        "model": "blockserve-stories",
        "tokenizer_backend": "remote",
        "num_concurrent": 4,
        "max_length": 512,
    }
    command = [
        sys.executable, "-P", "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--batch_size", "4", "--tasks", ",".join(names), "--include_path", str(folder),
        "--output_path", str(folder / "out"), "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def main() -> None:
    """The samples, as the last line."""
    folder = Path.cwd()
    names = write_tasks(folder)
    evaluate(sys.argv[1], folder, names)
    (results,) = (folder / "out").rglob("results_*.json")
    for name, figures in json.loads(results.read_text(encoding="utf-8"))["results"].items():
        told = {key.split(",")[0]: value for key, value in figures.items() if "stderr" not in key}
        print(name, *(f"{key} {value:.6g}" for key, value in told.items() if isinstance(value, float)))
    samples = {}
    for kind in KINDS:
        (file,) = (folder / "out").rglob(f"samples_blockserve_{kind}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == ITEMS
        samples[kind] = [[line["arguments"], line["resps"]] for line in lines]
    print(json.dumps({"samples": samples}))


if __name__ == "__main__":
    main()
