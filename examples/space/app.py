"""Draw a digit, and see how models trained by scripts/train_vit.py classify it, side by side.

    python app.py                                                     # the folders model* beside this file
    python app.py outputs/vit-digits outputs/vit-digits-plain         # output folders
    MODELS="YOUR_NAME/vit-digits YOUR_NAME/vit-digits-plain" python app.py    # on the Hub; a variable of the Space

The models are plain transformers models: this needs no hf_gr.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageFilter, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

HERE = Path(__file__).parent
REMEDY = "Give output folders of scripts/train_vit.py trained on the digits, or names of such models on the Hub."

#: Pixels per side of a scan, of the frame in which a drawing is fitted to it, and of the border to thicken strokes in.
SCAN, FRAME, BORDER = 8, 128, 16
#: Darker than this is ink.
INK = 32
#: Nine in ten scans have a share of ink between about these; and the most that one covers of the width.
LEAST_INK, MOST_INK, WIDEST = 0.27, 0.35, 7 / 8

#: Gradio deselects the brush when the pad is cleared.
SELECT_BRUSH = "() => setTimeout(() => document.querySelector('#pad button[aria-label=Brush]')?.click(), 100)"


def as_scan(drawing: Image.Image) -> Image.Image | None:
    """The drawing as one of the 8 x 8 scans that the models were trained on; None if it is blank.

    A model knows only what its training data look like, and a drawing looks different. The scans are bright on dark.
    They were cut out, scaled to the height of the frame, and given strokes of about the same width, whatever the pen:
    nearly a third of each is ink. Each gray level counts the ink in a block of pixels. All this is repeated here.
    Without the strokes' width, thin lines would fade to gray, and most drawings would be misread.
    """
    paper = Image.new("RGBA", drawing.size, "white")
    paper.alpha_composite(drawing.convert("RGBA"))
    ink = ImageOps.invert(paper.convert("L"))
    if ink.getextrema()[1] <= INK:
        return None
    fitted = _fit(ink)
    ink = ImageOps.expand(fitted, BORDER)
    for _ in range(BORDER):
        share = np.asarray(fitted).mean() / 255
        if LEAST_INK <= share <= MOST_INK:
            break
        ink = ink.filter(ImageFilter.MaxFilter(3) if share < LEAST_INK else ImageFilter.MinFilter(3))
        fitted = _fit(ink)
    return fitted.resize((SCAN, SCAN), Image.Resampling.BOX)


def _fit(ink: Image.Image) -> Image.Image:
    """The ink at the full height of a frame, its center of mass in the middle column if there is room."""
    digit = ink.crop(ink.point(lambda value: 255 * (value > INK)).getbbox())
    width = max(1, round(FRAME * min(digit.width / digit.height, WIDEST)))
    digit = digit.resize((width, FRAME), Image.Resampling.BOX)
    center = np.average(np.arange(width) + 0.5, weights=np.asarray(digit).sum(0))
    frame = Image.new("L", (FRAME, FRAME))
    frame.paste(digit, (round(min(max(FRAME / 2 - center, 0), FRAME - width)), 0))
    return frame


@dataclass(frozen=True)
class Run:
    """A trained model, and the folder that the run left."""

    name: str
    folder: Path
    model: PreTrainedModel
    processor: BaseImageProcessor

    @classmethod
    def load(cls, name: str) -> "Run":
        folder = Path(name) if Path(name).is_dir() else _download(name)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name}: there is no model in this folder. {REMEDY}")
        model = AutoModelForImageClassification.from_pretrained(folder)
        if set(model.config.id2label.values()) != set("0123456789"):
            raise ValueError(f"{name}: the classes of this model are not the digits 0 to 9. {REMEDY}")
        return cls(name, folder, model.eval(), AutoImageProcessor.from_pretrained(folder))

    @torch.no_grad()
    def probabilities(self, scan: Image.Image) -> dict[str, float]:
        inputs = self.processor(scan.convert("RGB"), return_tensors="pt")
        shares = self.model(**inputs).logits[0].softmax(-1).tolist()
        return {self.model.config.id2label[i]: share for i, share in enumerate(shares)}

    @property
    def curves(self) -> str | None:
        path = self.folder / "curves.png"
        return str(path) if path.is_file() else None

    def description(self) -> str:
        """What trained the model and how well, in Markdown, as far as the run recorded it."""
        record, results, name = self._read("run.json"), self._read("all_results.json"), Path(self.name).name
        if not record:
            return f"### {name}"
        method, settings = record["method"], record["segments"][-1]["settings"]
        methods = [method["optimizer"]]
        if method["gr"]:
            methods.append(f"gradient regularization, r = {settings['gr_r']:g}")
        if method["ire"]:
            methods.append("IRE")
        facts = [f"trained on {record['data']['train_examples']:,} digits"]
        if noise := settings.get("label_noise"):
            facts[0] += f", **{noise:.0%} of them with wrong labels**"
        facts.append(f"{sum(segment['passes'] for segment in record['segments']):,.0f} passes")
        error = results.get("test_error", results.get("eval_error"))
        if error is not None:
            facts.append(f"**error on {record['publication']['split']}: {error:.1%}**")
        return f"### {' + '.join(methods)}\n`{name}`: {'; '.join(facts)}"

    def _read(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, ignore_patterns=["checkpoint-*"]))
    except (OSError, ValueError) as error:
        problem = f"neither a folder nor a model on the Hub within reach ({type(error).__name__})"
        raise ValueError(f"{name}: {problem}. {REMEDY}") from error


def page(runs: Sequence[Run]):
    """The page: a sketchpad, what the models see of it, and a column for each run."""
    import gradio as gr

    def classify(drawing: dict[str, Any]) -> list:
        scan = as_scan(drawing["composite"]) if drawing["composite"] else None
        if scan is None:
            return [None] * (1 + len(runs))
        return [scan.resize((256, 256), Image.Resampling.NEAREST), *(run.probabilities(scan) for run in runs)]

    paper = Image.new("RGB", (320, 320), "white")
    pad_options = {
        "value": {"background": paper, "layers": [], "composite": None},  # without it, no brush is selected at first
        "type": "pil",
        "canvas_size": paper.size,
        "fixed_canvas": True,
        "height": 400,
        "brush": gr.Brush(default_size=10, colors=["#000000"], color_mode="fixed"),
        "layers": False,
        "transforms": (),
        "buttons": [],
    }
    with gr.Blocks(title="Draw a digit") as blocks:
        gr.Markdown("# Draw a digit\nModels trained on scans of 8 x 8 pixels classify it as you draw.")
        with gr.Row():
            with gr.Column(min_width=300):
                pad = gr.Sketchpad(label="Your digit", elem_id="pad", **pad_options)
                gr.Markdown("What the models see of it:")
                seen = gr.Image(show_label=False, height=200, buttons=[], interactive=False, alt_text="8 x 8 pixels")
            labels = []
            for run in runs:
                with gr.Column(min_width=300):
                    gr.Markdown(run.description())
                    labels.append(gr.Label(label="Probabilities", num_top_classes=4))
                    if run.curves:
                        picture = {"show_label": False, "buttons": ["fullscreen"], "interactive": False}
                        gr.Image(run.curves, alt_text=f"Curves of {run.name}", **picture)
        pad.input(classify, pad, [seen, *labels], show_progress="hidden", trigger_mode="always_last")
        pad.clear(lambda: [None] * (1 + len(runs)), None, [seen, *labels], show_progress="hidden")
        pad.clear(None, js=SELECT_BRUSH)
    return blocks


def main(argv: Sequence[str]) -> None:
    beside = sorted(HERE.glob("model*")) or [HERE / "model"]
    names = argv or os.environ.get("MODELS", "").split() or map(str, beside)
    page([Run.load(name) for name in names]).launch()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
