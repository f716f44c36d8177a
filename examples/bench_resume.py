"""Resume runs in fresh processes from the model's and the optimizer's state alone; raw JSON out.

    python examples/bench_resume.py --output docs/results/resume_cpu.json

For every tool and mode, one process trains six steps and saves after three; another one starts
from other weights, loads what the tool saved, and takes the last three. A cell is the largest
difference of any weight between the two, to be 0.0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import AdamW

import memrewrite
from memrewrite import GaLore, VeLoRA

warnings.simplefilter("ignore")
SMALL = GaLore(4, update_every=3, sites="all", gradients="coordinates")  # a refresh comes next
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "velora": {"velora": VeLoRA(8, "all")},
    "velora dense": {"velora": VeLoRA(8, "all", gradients="dense")},
    "velora running mean": {"velora": VeLoRA(8, "all", init="running_mean")},
    "galore dense": {"galore": GaLore(4, update_every=3, sites="all")},
    "galore coordinates": {"galore": SMALL},
    "both": {"velora": VeLoRA(8, ["q", "k"]), "galore": SMALL},
}


class Net(nn.Module):
    """Two linears of one input, and two more."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 32), nn.Linear(24, 32, bias=False)
        self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x))
        return {"loss": self.down(self.up(h).tanh()).square().mean()}


def batch(step: int) -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(step)) + step % 3


def loop(model: Net, folder: Path, resumed: bool) -> None:
    optimizer = AdamW(model.parameters(), lr=1e-2)
    if resumed:
        weights, state = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    for step in range(3 if resumed else 0, 6):
        model(batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            torch.save((model.state_dict(), optimizer.state_dict()), folder / "state.pt")


def trainer(model: Net, folder: Path, resumed: bool) -> None:
    from transformers import Trainer, TrainingArguments

    how: dict[str, Any] = {"output_dir": str(folder), "save_steps": 3, "max_steps": 6}
    how |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    how |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2}
    data = [{"x": batch(i)[0], "labels": torch.zeros(())} for i in range(24)]
    run = Trainer(model, TrainingArguments(**how, remove_unused_columns=False), train_dataset=data)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumed else None)


def accelerate(model: Net, folder: Path, resumed: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-2))
    if resumed:
        accelerator.load_state(str(folder / "state"))
    for step in range(3 if resumed else 0, 6):
        accelerator.backward(prepared(batch(step))["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if step == 2 and not resumed:
            accelerator.save_state(str(folder / "state"))


def lightning(model: Net, folder: Path, resumed: bool) -> None:
    import pytorch_lightning as pl

    class Lit(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.net(x)["loss"]

        def configure_optimizers(self) -> Any:
            return AdamW(self.net.parameters(), lr=1e-2)

    saving = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[saving], **quiet)
    data = torch.utils.data.DataLoader([batch(i) for i in range(3)], batch_size=None)  # type: ignore[var-annotated, arg-type]
    run.fit(Lit(), data, ckpt_path=str(folder / "epoch=0.ckpt") if resumed else None)


def distributed_checkpoint(model: Net, folder: Path, resumed: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    optimizer = AdamW(model.parameters(), lr=1e-2)
    if resumed:
        held: Any = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.load(held, checkpoint_id=folder / "dcp")
        states = {f"{key}_state_dict": value for key, value in held.items()}
        set_state_dict(model, optimizer, **states)
    for step in range(3 if resumed else 0, 6):
        model(batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            held = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
            dcp.save(held, checkpoint_id=folder / "dcp")


TOOLS: dict[str, Callable[[Net, Path, bool], None]] = {
    "plain loop": loop,
    "HF Trainer": trainer,
    "Accelerate": accelerate,
    "Lightning": lightning,
    "torch.distributed.checkpoint": distributed_checkpoint,
}


def run(tool: str, folder: Path, resumed: bool) -> None:
    """One process: all modes of one tool, from one side of the checkpoint."""
    for mode, options in MODES.items():
        torch.manual_seed(int(resumed))
        model = memrewrite.compile(Net(), backend="aot_eager", **options)
        here = folder / mode.replace(" ", "-")
        here.mkdir(exist_ok=True)
        TOOLS[tool](model, here, resumed)
        torch.save(model.state_dict(), here / f"end-{int(resumed)}.pt")
        torch.compiler.reset()


def difference(folder: Path) -> float:
    ours, theirs = (torch.load(folder / f"end-{i}.pt", weights_only=True) for i in (0, 1))
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/resume.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run(args.one[0], Path(args.one[1]), args.one[2] == "resumed")
        return
    found: dict[str, dict[str, float]] = {}
    for tool in TOOLS:
        with tempfile.TemporaryDirectory() as folder:
            for side in ("straight", "resumed"):
                command = [sys.executable, __file__, "--one", tool, folder, side]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found[tool] = {m: difference(Path(folder) / m.replace(" ", "-")) for m in MODES}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "largest difference of a weight": found}
    args.output.write_text(json.dumps(facts, indent=1) + "\n")
    print(tabulate([[t, *row.values()] for t, row in found.items()], ["", *MODES], "github"))


if __name__ == "__main__":
    main()
