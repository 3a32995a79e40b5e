"""The web page of `train.serve`, in Gradio: it shows the results for one image. Uploads are deleted at once."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.inference.limits import Limits, forget
from train.inference.output import NOTICE, PRIORS, About, named, temperatures

if TYPE_CHECKING:
    from train.inference.worker import Answer

Ask = Callable[[bytes], "Answer | str"]

_WAITING = 20
"""Images that wait for their turn; more are refused."""
_MOST_SHOWN = 7
"""Classes whose probabilities are shown: the most likely ones."""

STYLE = """
.pair, .similar { display: flex; flex-wrap: wrap; gap: 12px; }
.pair figure { flex: 1 1 240px; margin: 0; } .pair img { width: 100%; }
.similar figure { flex: 0 1 180px; margin: 0; } .similar img { width: 100%; }
figcaption { font-size: 0.9em; } .refused { font-weight: 600; } .small { font-size: 0.8em; opacity: 0.8; }
"""
"""The page's CSS."""


def application(ask: Ask, abouts: Sequence[About], credit: str, most_bytes: int) -> Limits:
    """The page as an ASGI application. most_bytes: larger uploads are refused. For the others see `build`."""
    import gradio as gr
    from fastapi import FastAPI

    page = build(ask, abouts, credit)
    page.queue(max_size=_WAITING)
    page.state_session_capacity = _WAITING  # Gradio keeps 50 kB for each visit, for states that this page does not have
    page.has_launched = True  # otherwise Gradio would take any file of this machine for an upload
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        max_file_size=most_bytes,
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        css=STYLE,
    )
    return Limits(app, page, most_bytes)


def build(ask: Ask, abouts: Sequence[About], credit: str) -> Any:
    """The page, a `gradio.Blocks`.

    ask: the bytes of an image file → its results, or the reason why there are none. Called for one image at a time.
    abouts: of the runs that predict together.
    credit: the source of the training images, and their licence.
    """
    import gradio as gr

    about = abouts[0]  # what all share
    with gr.Blocks(title="dermscale", analytics_enabled=False, delete_cache=(60, 600)) as page:
        gr.Markdown(f"# dermscale: {named(abouts)}\n\n**{NOTICE}**")
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Drop a dermoscopic image here", elem_id="upload")
                message = gr.HTML(elem_id="message")
                label = gr.Label(
                    label="Probabilities", num_top_classes=min(len(about.classes), _MOST_SHOWN), elem_id="probabilities"
                )
            with gr.Column():
                pictures = gr.HTML(elem_id="pictures")
                similar = gr.HTML(elem_id="similar")

        def show(uploaded: dict[str, Any] | None) -> tuple[Any, ...]:
            if uploaded is None:
                return None, "", None, "", ""
            file = Path(uploaded["path"])  # Gradio lets no path pass but that of an upload
            try:
                answer = ask(file.read_bytes())
            except FileNotFoundError:
                answer = "was deleted with the results for another drop of the same file; drop it again"
            finally:
                forget(page, file)
            if isinstance(answer, str):
                refused = f'<p class="refused">{html.escape(file.name)} {html.escape(answer)}.</p>'
                return None, refused, None, "", ""
            probabilities = {about.classes.described(dx): p for dx, p in answer.probabilities.items()}
            return None, _message(file.name, abouts), probabilities, _pictures(answer, about), _similar(answer, credit)

        outputs = [upload, message, label, pictures, similar]
        # without preprocess=False, gr.File makes an empty file for each upload, which stays
        options: Any = {"preprocess": False, "concurrency_limit": 1, "api_visibility": "private"}
        upload.upload(show, upload, outputs, show_progress="minimal", **options)
    return page


def _message(name: str, abouts: Sequence[About]) -> str:
    about = abouts[0]
    unscaled = all(one.temperature == 1 for one in abouts)
    scaled = "" if unscaled else f" They are calibrated with {temperatures(abouts)}."
    mean = f" They are the mean of {len(abouts)} networks." if len(abouts) > 1 else ""
    return (
        f"<p><b>{html.escape(name)}</b> (the upload has been deleted). The probabilities assume that "
        f"{PRIORS[about.prior]} ({about.prior} prior).{scaled}{mean}</p>"
    )


def _figure(kind: str, picture: bytes, alternative: str, caption: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    return f'<figure><img src="{source}" alt="{html.escape(alternative)}"><figcaption>{caption}</figcaption></figure>'


def _pictures(answer: "Answer", about: About) -> str:
    likeliest = max(answer.probabilities, key=lambda dx: answer.probabilities[dx])
    image = _figure("png", answer.image, "your image", "Your image.")
    if not answer.overlay:
        return f'<div class="pair">{image}</div><p>{html.escape(answer.overlay_note)}</p>'
    name = html.escape(about.classes.described(likeliest))
    caption = f"Bright places support <b>{name}</b>. The model does not see the dark rim."
    overlay = _figure("png", answer.overlay, "your image with a map of the evidence", caption)
    return f'<div class="pair">{image}{overlay}</div>'


def _similar(answer: "Answer", credit: str) -> str:
    if not answer.similar:
        return f"<p>{html.escape(answer.similar_note)}</p>"
    figures = []
    for one in answer.similar:
        ids = html.escape(f"{one.lesion_id}, {one.image_id}")
        caption = f"<b>{html.escape(one.dx)}</b>, similarity {one.cosine:.2f}<br><span class='small'>{ids}</span>"
        figures.append(_figure("jpeg", one.picture, f"a training lesion: {one.dx}", caption))
    head = "<h3>The most similar training lesions for this model, with their diagnoses</h3>"
    source = f"<p class='small'>{html.escape(credit)}</p>"
    return f'{head}<div class="similar">{"".join(figures)}</div>{source}'
