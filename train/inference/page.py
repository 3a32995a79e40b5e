"""The web page of `train.serve`, in Gradio: an image in, its opinion out. Nothing of an image is kept on the disk."""

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.inference.worker import Opinion, Started

NAMES = {
    "akiec": "actinic keratosis or intraepithelial carcinoma",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
"""The seven diagnoses of HAM10000 (Tschandl et al. 2018) in words."""

_PRIORS = {
    "balanced": "as if all seven were equally frequent",
    "training": "as if they were as frequent as among the training images",
}
_STYLE = """
.pair, .alike { display: flex; flex-wrap: wrap; gap: 12px; }
.pair figure { flex: 1 1 240px; margin: 0; } .pair img { width: 100%; }
.alike figure { flex: 0 1 180px; margin: 0; } .alike img { width: 100%; }
figcaption { font-size: 0.9em; } .refused { font-weight: 600; } .small { font-size: 0.8em; opacity: 0.8; }
"""


def class_name(dx: str) -> str:
    """A class for people: its short name and its words."""
    return f"{dx}: {NAMES[dx]}" if dx in NAMES else dx


def build(ask: Callable[[bytes], "Opinion | str"], started: "Started", notice: str) -> Any:
    """The page, a `gradio.Blocks`.

    ask: an image file's bytes → an opinion, or why there is none. It is called for one image at a time.
    """
    import gradio as gr

    with gr.Blocks(title="dermscale", analytics_enabled=False, delete_cache=(60, 60)) as page:
        gr.Markdown(f"# dermscale: {started.model} at {started.resolution_px} px\n\n**{notice}**")
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Drop a dermoscopic image here", elem_id="upload")
                said = gr.HTML(elem_id="said")
                label = gr.Label(label="Probabilities", num_top_classes=len(NAMES), elem_id="probabilities")
            with gr.Column():
                pictures = gr.HTML(elem_id="pictures")
                alike = gr.HTML(elem_id="alike")

        def judged(path: str | None) -> tuple[Any, ...]:
            if path is None:
                return None, "", None, "", ""
            file = Path(path)
            try:
                opinion = ask(file.read_bytes())
            finally:
                file.unlink(missing_ok=True)
            if isinstance(opinion, str):
                refused = f'<p class="refused">{html.escape(file.name)} {html.escape(opinion)}.</p>'
                return None, refused, None, "", ""
            shares = {class_name(dx): share for dx, share in opinion.probabilities.items()}
            return None, _said(file.name, started), shares, _pictures(opinion), _alike(opinion, started)

        outputs = [upload, said, label, pictures, alike]
        upload.upload(judged, upload, outputs, concurrency_limit=1, api_visibility="private", show_progress="minimal")
    return page


def style() -> str:
    """The page's CSS."""
    return _STYLE


def _said(name: str, started: "Started") -> str:
    scaled = "" if started.temperature == 1 else f", temperature-scaled ({started.temperature:.3g})"
    prior = _PRIORS.get(started.prior, started.prior)
    return f"<p><b>{html.escape(name)}</b>, not kept. Probabilities {prior} ({started.prior} prior){scaled}.</p>"


def _figure(kind: str, picture: bytes, alternative: str, caption: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    return f'<figure><img src="{source}" alt="{html.escape(alternative)}"><figcaption>{caption}</figcaption></figure>'


def _pictures(opinion: "Opinion") -> str:
    likeliest = max(opinion.probabilities, key=lambda dx: opinion.probabilities[dx])
    image = _figure("png", opinion.image, "the image", "the image as it is packed")
    if not opinion.overlay:
        return f'<div class="pair">{image}</div><p>{html.escape(opinion.overlay_note)}</p>'
    caption = f"what speaks for <b>{html.escape(class_name(likeliest))}</b>; the model does not see the dark rim"
    overlay = _figure("png", opinion.overlay, "the image with a map of the evidence", caption)
    return f'<div class="pair">{image}{overlay}</div>'


def _alike(opinion: "Opinion", started: "Started") -> str:
    if not opinion.alike:
        return f"<p>{html.escape(opinion.alike_note)}</p>"
    figures = []
    for one in opinion.alike:
        names = html.escape(f"{one.lesion_id}, {one.image_id}")
        caption = f"<b>{html.escape(one.dx)}</b>, similarity {one.cosine:.2f}<br><span class='small'>{names}</span>"
        figures.append(_figure("jpeg", one.picture, f"a training lesion: {one.dx}", caption))
    head = "<h3>Training lesions that look most alike to the model, with their diagnoses</h3>"
    credit = f"<p class='small'>{html.escape(started.credit)}</p>"
    return f'{head}<div class="alike">{"".join(figures)}</div>{credit}'
