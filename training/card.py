"""Writes a model's card, ``MODEL_CARD.md``, and the picture of its loss, ``loss_curve.png``.

    python -m training.card --model engine/default_model --run training/default_run --date YYYY-MM-DD

The run's folder holds ``run.json`` and ``log.jsonl`` as ``training.train`` writes them, ``heldout.json`` as
``training.evaluate --json`` does, and ``samples.json``: ``[{"seed": 0, "prompt": "...", "text": "..."}]``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from training.model import ModelConfig

SOURCES = [
    ("tinystories", "TinyStories (Eldan & Li, 2023), 11,307 stories", "CDLA-Sharing-1.0"),
    ("storybooks", "Picture-book texts, 646; credits in `storybooks_attribution.csv`", "CC-BY"),
    ("fairytaleqa", "FairytaleQA, 232 tales of Project Gutenberg", "Apache-2.0"),
    ("children", "Children's books, 2,173 chapters", "public domain"),
    ("classics", "Novels, 2,946 chapters", "public domain"),
]

HEAD = """# Model card: the embedded default model

A Block Transformer (Ho et al., 2024, arXiv 2406.02657) that writes simple English stories. It is small so that the
server works out of the box, on any CPU, with a model whose output can be read and measured. It knows nothing of the
world, follows no instructions, and repeats what its sources contain, including the attitudes of books a hundred years
old. Use it for trying out and testing the server, not for anything that relies on what it says."""

DEFINITION = """A document stands alone, laid out as `[pad x u][tokens][EOS]`. Block 0 is not predicted. Bits are
the sum of -log2 p over all predicted tokens, EOS included; bytes are the UTF-8 bytes of the document's text less those
of the tokens that are not predicted. A document longer than the context is cut into consecutive windows of at most
`max_length - u` tokens, each laid out alone. u = 3 is the evaluation layout, in which every token but the first is
predicted. Computed in fp32 from the stored (rounded) weights. Held-out documents that share 5 % or more of their
10-word n-grams with the training text had been dropped."""

HOW = (
    "Written by the engine (`python -m training.sample --model engine/default_model --out samples.json`), in float32 "
    'on a CPU: temperature 0.8, top_p 0.95, at most 400 tokens. The prompt is "Once upon a time".'
)


def smooth(values: list[float], span: int) -> list[float]:
    """Running mean over the last ``span`` values."""
    return [sum(values[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(values))]


def draw_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Training loss (nats per token) and validation (bits per byte) against the step."""
    steps = [r["step"] for r in records if "loss" in r]
    losses = [r["loss"] for r in records if "loss" in r]
    checks = [r for r in records if "validation" in r]
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(steps, losses, linewidth=0.5, alpha=0.4, label="one batch")
        left.plot(steps, smooth(losses, 8), linewidth=1.5, label="mean of 8 logged batches")
        left.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(min(losses) - 0.2, 5.0))
        left.legend()
        for name in checks[0]["validation"] if checks else []:
            shares = [check["validation"][name] for check in checks]
            right.plot([check["step"] for check in checks], shares, marker=".", label=name)
        right.set(xlabel="step", ylabel="held-back documents (bits per byte)")
        right.set_ylim(top=1.2 * right.get_ylim()[1])
        right.legend(ncols=3, loc="upper center")
        # No date or version in the file: the same log gives the same picture.
        figure.savefig(path, dpi=110, metadata={"Software": None})


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def describe_model(config: dict[str, Any], run: dict[str, Any]) -> str:
    """Sizes of the model."""
    model = ModelConfig.from_json(config)
    tables = model.vocab_size * (model.embedder_size + 2 * model.token_decoder.hidden_size)
    block, token = model.block_decoder, model.token_decoder
    rows = [
        ["block length, prefix length", f"{model.block_length}, {model.prefix_length}"],
        ["embedder", f"lookup, {model.block_length} x {model.embedder_size}, concatenated"],
        *(
            [name, f"{c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads, FFN {c.intermediate_size}"]
            for name, c in (("block decoder", block), ("token decoder", token))
        ),
        ["layers", "GPT-NeoX: parallel residual, rotary 0.25, erf GELU; prefix at positions 0, 1, tokens at 2, 3, 4"],
        ["vocabulary", f"{model.vocab_size}, byte-level BPE, digits apart; id 0 ends a text and pads"],
        ["context", f"{model.max_length} tokens = {model.max_length // model.block_length} blocks"],
        [
            "parameters",
            f"{run['parameters']:,}, of them {run['parameters'] - tables:,} outside token tables and output",
        ],
        ["stored as", f"{config['dtype']} (finer than bfloat16 for weights of this size; any dtype may compute)"],
    ]
    return table(["", ""], rows)


def describe_data(run: dict[str, Any]) -> str:
    """Sources, licences, and how often each was read."""
    options = run["options"]
    rows = []
    for name, text, licence in SOURCES:
        early, late = (options[key].get(name, 0.0) for key in ("early_mix", "late_mix"))
        share = early * (1 - options["late_share"]) + late * options["late_share"]
        size = run["training_tokens_in_files"][name]
        epochs = f"{share * run['tokens'] / size:.0f}"
        rows.append([text, licence, f"{size / 1e6:.1f}M", f"{early:.2f}", f"{late:.2f}", epochs])
    return table(["source", "licence", "tokens", "share early", "share late", "epochs, about"], rows)


def describe_training(run: dict[str, Any], date: str) -> str:
    """Steps, hyper-parameters, machine."""
    o = run["options"]
    last_rate = o["final_learning_rate"] / o["learning_rate"]
    return f"""{o["steps"]:,} steps of {o["batch_tokens"]:,} tokens, {run["tokens"] / 1e6:.0f}M tokens in all.
Trained on {date} on one {run["gpu"]} with torch {run["torch"]}, in bf16 autocast, in {run["seconds"]:.0f} seconds
(compilation included; another run shared the GPU).

- Muon for the layers' matrices (rate {o["learning_rate"] * o["muon_rate"]:g}, momentum 0.95); AdamW for token tables,
  output, norms and biases (rate {o["learning_rate"]:g}, betas 0.9 and {o["beta2"]:g}).
- Warmup of {o["warmup"]} steps, then half a cosine down to {last_rate:.0%} of the rate. Gradient norm at most 1.
- Weight decay {o["weight_decay"]:g} on matrices, dropout {o["dropout"]:g} on embeddings and every layer's output.
- Seed {o["seed"]}.
- {o["short_share"]:.0%} of the steps have windows of {o["short_window"]} tokens, the others of {o["long_window"]}.
- Every document has u pads in front, u uniform in 0..3 and drawn anew each epoch. Most windows of stories begin with a
  document; {o["eos_share"]:.0%} of these have a block of id 0 in front, as a prompt of just `<|endoftext|>` has.
- The mix of sources changes for the last {o["late_share"]:.0%} of the steps.
- The last 1 % of each file's documents were held back, for choosing among runs.

![Loss](loss_curve.png)

Reproduce (same data and seed; arithmetic on a GPU does not repeat to the last bit):

    python -m training.train --corpus DIR --out DIR"""


def describe_heldout(heldout: dict[str, dict[str, float]]) -> str:
    """Bits per byte for each alignment."""
    columns = list(next(iter(heldout.values())))
    rows = [[name, *(f"{figures[column]:.4f}" for column in columns)] for name, figures in heldout.items()]
    return f"""{DEFINITION}

{table(["bits per byte", *columns], rows)}

Reproduce:

    python -m training.evaluate --model engine/default_model --corpus DIR"""


def describe_samples(samples: list[dict[str, Any]], how: str) -> str:
    """All samples as they came; the prompt in bold."""
    parts = [f"All of them, as they came. {how}"]
    for sample in samples:
        text = (sample["prompt"] + sample["text"]).strip().replace("\n", "\n> ")
        parts.append(f"Seed {sample['seed']}:\n\n> {text}")
    return "\n\n".join(parts)


def write_card(model: Path, run_folder: Path, date: str, how: str) -> None:
    """Write the card and the picture into ``model``."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    run, config = read(run_folder / "run.json"), read(model / "config.json")
    lines = (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    draw_loss([json.loads(line) for line in lines], model / "loss_curve.png")
    sections = [
        HEAD.rstrip(),
        "## Model\n\n" + describe_model(config, run),
        "## Data\n\n" + describe_data(run) + "\n\nLicences and credits: `NOTICE.md`.",
        "## Training\n\n" + describe_training(run, date),
        "## Held-out text\n\n" + describe_heldout(read(run_folder / "heldout.json")),
        "## Samples\n\n" + describe_samples(read(run_folder / "samples.json"), how),
    ]
    (model / "MODEL_CARD.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a model's card and loss curve.")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder; the card is written there")
    parser.add_argument("--run", type=Path, required=True, help="run.json, log.jsonl, heldout.json, samples.json")
    parser.add_argument("--date", required=True, help="day of training, YYYY-MM-DD")
    parser.add_argument("--how", default=HOW, help="how the samples were made, in a sentence")
    given = parser.parse_args()
    write_card(given.model, given.run, given.date, given.how)


if __name__ == "__main__":
    main()
