"""A model for other people and programs: a folder with its card, ONNX, the Hub, a page."""

import copy
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import train
import urllib3
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from torchmetrics.functional.classification import multiclass_calibration_error

from tutorial import SCRIPTS, results

# ---- The folder ---------------------------------------------------------------------------------

CODE = ("inference.py", "train.py")  # what reads a video as in training
OF_THE_RUN = ("run_record.json", "trainer_state.json")  # name folders of the training machine


def make_folder(trained: results.Trained, folder) -> Path:
    """A folder to give away: the model, the code that asks it, and the packages to install.

    Of the record of the run it holds only how frames are sampled, which inference.py needs: the
    rest names folders and machines of the training.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(trained.folder.iterdir()):
        if file.is_file() and file.name not in OF_THE_RUN:
            shutil.copy(file, folder)
    for name in CODE:
        shutil.copy(Path(SCRIPTS) / name, folder)
    flags = results.run_record(trained).get("arguments", {})
    kept = {name: flags[name] for name in ("sampling", "sampling_rate") if name in flags}
    (folder / "run_record.json").write_text(json.dumps({"arguments": kept}))
    page = [f"gradio=={version('gradio')}", "matplotlib>=3.9", "pandas", "torch>=2.6"]
    text = (Path(SCRIPTS) / "requirements.txt").read_text().rstrip("\n")
    (folder / "requirements.txt").write_text("\n".join([text, *page]) + "\n")
    return folder


# ---- The model card -----------------------------------------------------------------------------

LICENCES = {  # of published weights, by the beginning of their name; from their model cards
    "OpenGVLab/VideoMAE2/": "apache-2.0",
    "OpenGVLab/VideoMAEv2-": "cc-by-nc-4.0",
    "MCG-NJU/videomae-": "cc-by-nc-4.0",
}

CARD = """---
{{ card_data }}
---
# {{ title }}

Fine-tuned from `{{ base }}` for {{ epochs }} epochs at most. The clips: {{ counts }}. The model
learned from those of `train`; those of `validation` chose the epoch. It reads {{ frames }} frames
of a clip, {{ size }} x {{ size }} pixels, and returns a probability for each of
{{ labels | join(", ") }}.

**Data.** {{ data_note or "Not described. Ask whoever trained the model." }}

**Licence of the weights.** `{{ licence }}`; the clips have one of their own.

**Figures**, on the {{ clips }} clips of the split `test`:

| figure | value | 95 % interval | of clips |
| --- | --- | --- | --- |
{% for name, value, low, high, clips in scores %}\
| {{ name }} | {{ "%.2f | %.2f to %.2f" | format(value, low, high) }} | {{ clips }} |
{% endfor %}
With one frame of a clip, repeated, the same model reaches {{ still }} at best, on {{ some }} of
them. Its probabilities are off by {{ ece }} in the mean (expected calibration error, 10 bins).

**Limits**

- The judged clips come from where the training clips come from. Other rooms, cameras, distances,
  clothes and people are not judged; try it on yours before you rely on it.
- It always answers with one of its labels, also for a video that shows none of them.
- It was trained on short clips with one action each. For a longer video use `inference.py`, which
  slides a window over it.
- Whoever films people needs their consent, and for pupils that of their parents. Nobody should be
  graded, or watched, by what this model says.
"""


def base_of(here, trained: results.Trained) -> str:
    """What training started from: a name on the Hub, or the name (not the path) of a folder."""
    asked = (trained.job or {}).get("HyperParameters", {}).get("model_name", "").strip('"')
    asked = asked or here.run.get("choices", {}).get("model_name")
    asked = asked or results.run_record(trained).get("arguments", {}).get("model_name", "unknown")
    return Path(asked).name if Path(asked).is_absolute() or Path(asked).is_dir() else asked


def licence_of(base_model: str) -> str:
    """The licence of published VideoMAE weights, as an SPDX name in lower case; else "unknown"."""
    known = [name for start, name in LICENCES.items() if base_model.startswith(start)]
    return known[0] if known else "unknown"


def model_card(
    here, tested, folder, data_note=None, weights_licence=None, base_model=None, stills=24
) -> ModelCard:
    """Writes README.md into `folder`: what the model is, how good it is, and where it fails.

    `tested`: of results.judge, on the test clips. `data_note`: what the clips show, whose they are,
    and under which licence. `weights_licence`: an SPDX name; None: see licence_of. `base_model`:
    None: see base_of. `stills`: on so many clips the model is judged with one frame only.
    """
    record, labels = results.run_record(tested.trained), list(tested.classifier.labels)
    base_model = base_model or base_of(here, tested.trained)
    epochs = record.get("arguments", {}).get("num_train_epochs")
    scores = results.scores(tested.truth, tested.predicted, labels)
    one_frame = results.one_frame(tested.pixels, tested.truth, tested.classifier, most=stills)
    ece = multiclass_calibration_error(tested.probabilities, tested.truth, len(labels), n_bins=10)
    figures = {"accuracy": scores.value["accuracy"], "macro_f1": scores.value["macro F1"]}
    data = ModelCardData(
        license=weights_licence or licence_of(base_model),
        library_name="transformers",
        pipeline_tag="video-classification",
        model_name=f"Clips: {', '.join(labels[:5])}",
        eval_results=[
            EvalResult(
                "video-classification", "videofolder", "test clips", name, round(float(value), 2)
            )
            for name, value in figures.items()
        ],
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        title=data.model_name,
        licence=data.license,
        base=base_model,
        counts=" + ".join(f"{n} {split}" for split, n in record.get("clips", {}).items()),
        epochs=f"{epochs:g}" if epochs else "an unknown number of",
        frames=tested.classifier.num_frames,
        size=tested.classifier.image_size,
        labels=labels,
        data_note=data_note,
        clips=len(tested.truth),
        some=min(stills, len(tested.truth)),
        scores=list(scores.itertuples()),
        still=f"{max(hits.mean() for hits in one_frame.values()):.2f}",
        ece=f"{ece.item():.2f}",
    )
    card.save(Path(folder) / "README.md")
    return card


# ---- ONNX ---------------------------------------------------------------------------------------


class ClipLogits(torch.nn.Module):
    """uint8 [batch, frames, channels, height, width] -> logits [batch, labels], on the CPU."""

    def __init__(self, classifier):
        super().__init__()
        self.model = copy.deepcopy(classifier.model).cpu()
        self.processor = classifier.processor

    def forward(self, clips):
        return self.model(pixel_values=train.normalised(clips, self.processor)).logits


def export_onnx(classifier, file) -> Path:
    """Writes the model with its normalisation as ONNX, for any number of clips.

    Input "clips": uint8 [batch, frames, channels, height, width], as train.read_clip returns them.
    Output "logits": float32 [batch, labels].
    """
    count, size = classifier.num_frames, classifier.image_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision: not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter about its own code
        program = torch.onnx.export(
            ClipLogits(classifier).eval(),
            (torch.zeros(2, count, 3, size, size, dtype=torch.uint8),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["clips"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    program.save(file)
    print(f"{Path(file).name}: {Path(file).stat().st_size / 1e6:.2f} MB")
    return Path(file)


def check_onnx(file, classifier, clips, most: float = 1e-3) -> float:
    """The largest difference between the logits of the file and of the model, on real clips.

    clips: uint8 [batch, frames, channels, height, width]. Raises RuntimeError above `most`.
    """
    import onnxruntime

    (exported,) = onnxruntime.InferenceSession(file).run(None, {"clips": clips.numpy()})
    with torch.no_grad():
        expected = ClipLogits(classifier).eval()(clips)
    difference = (torch.from_numpy(exported) - expected).abs().max().item()
    shape = f"{len(expected)} clips x {expected.shape[1]} labels"
    print(f"largest difference of {expected.numel()} logits ({shape}): {difference:.1e}")
    if not difference <= most:  # NaN too
        raise RuntimeError(f"the exported model differs by {difference:.1e}: do not use {file}")
    return difference


# ---- The Hub ------------------------------------------------------------------------------------


def push(folder, hub_repo: str | None) -> str | None:
    """Uploads the folder to a private repository of the Hub; returns its address.

    `hub_repo`: such as "you/raising-hand"; None uploads nothing. The token comes from HF_TOKEN or
    from `hf auth login`.
    """
    if not hub_repo:
        print("hub_repo is None: nothing is uploaded")
        return None
    HfApi().create_repo(hub_repo, private=True, exist_ok=True)
    leave = ["__pycache__/*", ".gradio/*", "*.log"]
    return HfApi().upload_folder(repo_id=hub_repo, folder_path=folder, ignore_patterns=leave)


# ---- The page -----------------------------------------------------------------------------------


@contextmanager
def running_page(script, seconds: float = 180):
    """Starts the page of a script on a free port of this computer; yields its address; stops it.

    Prints the command that starts the page in a terminal. Raises RuntimeError, with the end of the
    page's log, if it does not answer within `seconds`; and if it still answers after its end.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", Path(script).with_suffix(".log")
    print("python", os.path.relpath(script))
    with log.open("w") as lines:
        command = [sys.executable, str(script), f"--port={port}"]
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT)
    try:
        limit = time.monotonic() + seconds
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > limit:
                last = "\n".join(log.read_text().splitlines()[-5:])
                raise RuntimeError(f"{script} does not answer; its log ends:\n{last}")
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if _answers(address):
            raise RuntimeError(f"{address} still answers: end the process {process.pid}")
    print("the page is stopped: its address does not answer")


def _answers(address):
    """Whether a web server answers there."""
    try:
        return urllib3.request("GET", address, retries=False, timeout=5).status == 200
    except urllib3.exceptions.HTTPError:
        return False


# ---- The table at the end -----------------------------------------------------------------------


def ways(folder, checks: dict) -> pd.DataFrame:
    """A table of the ways to hand a model on: for whom, for what money, what this run has shown.

    `checks`: {way: what was compared with this computer, or None if the way was not taken}.
    """
    size = sum(file.stat().st_size for file in Path(folder).glob("*") if file.is_file()) / 1e6
    rows = {
        "folder with card": (f"people with Python ({size:.1f} MB)", "free"),
        "Hub": ("you, or your organization, with a token", "free"),
        "ONNX": ("programs without PyTorch", "free"),
        "page": ("colleagues with a browser", "free"),
        "endpoint": ("programs, one video at a time", "by the hour"),
        "batch transform": ("a folder of videos, once", "while it runs"),
    }
    rows = {name: (*row, checks.get(name) or "not run") for name, row in rows.items()}
    return pd.DataFrame.from_dict(rows, "index", columns=["for", "money", "checked in this run"])
