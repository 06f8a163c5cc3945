"""The page: its components, and which action answers which event. Needs Gradio."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from scripts.app.examples import Example
from scripts.app.form import MAX_GUIDANCE, MAX_STEPS, size_limits
from scripts.app.handlers import Handlers, random_seed
from scripts.app.sessions import FinishedPicture, Session, Shown
from scripts.app.state import SETTINGS, STRENGTH_SLIDER, PageState, default_state, example_state, saved_state
from scripts.app.uploads import MAX_BYTES, MAX_REFERENCES
from scripts.app.views import attention_note, card, drop_help, header, notice, public_name, recipe_json, sample, summary, title

FOLDER = Path(__file__).resolve().parent
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
FONTS = {"font": ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), "font_mono": ("ui-monospace", "Menlo", "Consolas", "monospace")}
PLACEHOLDER = "Describe the picture, for example: a bird in a meadow"
SMALL_PICTURE = 256  # px; smaller ones are shown with hard pixels


class Page:
    """The page's components. `blocks` is what Gradio serves."""

    def __init__(self, handlers: Handlers, examples: Sequence[Example], device: str) -> None:
        self.handlers, self.examples, self.config = handlers, examples, handlers.config
        self.blocks = gr.Blocks(title="MOSAIC", analytics_enabled=False, delete_cache=(60, 600), fill_width=True)
        with self.blocks:
            self.token, self.saved, self.origin = (gr.Textbox(visible=False) for _ in range(3))
            self.shown = gr.State(())
            model, lora = self.config.model.pretrained, self.config.inference.lora
            is_pocket = Path(model).resolve().match("assets/pocket/flux")
            gr.HTML(header("pocket" if is_pocket else public_name(model), lora and public_name(lora), device, is_pocket))
            with gr.Row(elem_id="m-main", equal_height=False):
                with gr.Column(scale=5, min_width=320):
                    self._references()
                    self._prompt()
                with gr.Column(scale=6, min_width=320):
                    self._results()
            self._examples()
            self._events()

    def _references(self) -> None:
        gr.HTML(title("References", "up to 6, each with one subject on white"))
        self.cards, self.pictures, self.names, self.strengths, self.removes = [], [], [], [], []
        with gr.Row(elem_id="m-cards"):
            for position in range(MAX_REFERENCES):
                with gr.Column(visible=False, min_width=132, elem_classes="m-slot", elem_id=f"m-slot-{position + 1}") as slot:
                    self.pictures.append(gr.HTML(card(position, None)))
                    self.removes.append(gr.Button("✕", size="sm", elem_classes="m-remove", min_width=28))
                    name = {"label": f"Name of reference {position + 1}", "placeholder": "name (optional)", "max_length": 60}
                    self.names.append(gr.Textbox("", max_lines=1, container=False, elem_classes="m-name", **name))
                    self.strengths.append(gr.Slider(0, STRENGTH_SLIDER, 1, step=0.05, label="Strength", elem_classes="m-strength"))
                self.cards.append(slot)
        gr.HTML(drop_help(MAX_BYTES))
        self.drop = gr.File(label="Reference pictures", file_count="multiple", elem_id="m-drop", height=84, show_label=False)
        self.upload_notice = gr.HTML(elem_id="m-upload-notice")

    def _prompt(self) -> None:
        usual = default_state(self.config).settings
        limits = size_limits(self.config, self.handlers.studio.vae_scale_factor)
        gr.HTML(title("Prompt", "write <bag> for the reference named bag"))
        self.prompt = gr.Textbox("", show_label=False, lines=3, max_length=10_000, placeholder=PLACEHOLDER, elem_id="m-prompt")
        with gr.Row(elem_id="m-actions"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="m-generate", scale=3)
            self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="m-cancel", scale=1, min_width=90)
        self.status = gr.HTML(elem_id="m-status")
        with gr.Accordion("Settings", open=False, elem_id="m-settings"):
            with gr.Row():
                self.width = gr.Slider(limits.minimum, limits.maximum, usual["width"], step=limits.step, label="Width", min_width=140)
                self.height = gr.Slider(limits.minimum, limits.maximum, usual["height"], step=limits.step, label="Height", min_width=140)
            with gr.Row():
                given = {"label": "Steps", "min_width": 140}
                self.num_inference_steps = gr.Slider(1, MAX_STEPS, usual["num_inference_steps"], step=1, **given)
                self.seed = gr.Number(usual["seed"], label="Seed", minimum=0, precision=0, min_width=140, elem_id="m-seed")
            with gr.Row():
                info = "brings out the references' looks; other values than 1 take twice the time"
                given = {"label": "Image guidance", "info": info, "min_width": 140}
                self.image_guidance_scale = gr.Slider(0, MAX_GUIDANCE, usual["image_guidance_scale"], step=0.1, **given)
                info = "strength of the prompt; no effect on models without guidance embedding"
                given = {"label": "Guidance", "info": info, "min_width": 140}
                self.guidance_scale = gr.Slider(0, MAX_GUIDANCE, usual["guidance_scale"], step=0.1, **given)
            with gr.Row():
                self.new_seed = gr.Checkbox(False, label="New seed for each picture", min_width=140)
                self.attention = gr.Checkbox(True, label="Attention view", min_width=140)
        parts = {name: getattr(self, name) for name in SETTINGS}
        self.settings = [*parts.values(), *self.names, *self.strengths]

    def _results(self) -> None:
        small = max(self.config.inference.height, self.config.inference.width) < SMALL_PICTURE
        gr.HTML(title("Pictures", "newest first, kept while this page is open"))
        self.gallery = gr.Gallery(
            show_label=False,
            columns=6,
            height=440,
            object_fit="contain",
            preview=True,
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="m-gallery",
            elem_classes="m-pixels" if small else None,
        )
        with gr.Tabs(elem_id="m-tabs"):
            with gr.Tab("Attention"):
                self.attention_note = gr.HTML(attention_note(None), elem_id="m-attention-note")
                self.panel = gr.Image(
                    show_label=False, interactive=False, visible=False, buttons=["download", "fullscreen"], format="png", elem_id="m-panel"
                )
            with gr.Tab("Recipe"):
                self.summary = gr.HTML(summary(None), elem_id="m-summary")
                with gr.Accordion("JSON, as in the picture's metadata", open=False):
                    self.recipe = gr.Code("", language="json", show_label=False, interactive=False, elem_id="m-recipe", max_lines=24)

    def _examples(self) -> None:
        self.dataset = None
        if self.examples:
            gr.HTML(title("Examples", "click one, then Generate"))
            self.dataset = gr.Dataset(
                components=[gr.HTML(visible=False)],
                headers=["Example"],
                samples=[[sample(example)] for example in self.examples],
                type="index",
                samples_per_page=10,
                layout="table",
                show_label=False,
                elem_id="m-examples",
            )

    @property
    def _slots(self) -> list[gr.components.Component]:
        return [self.shown, *self.cards, *self.pictures]

    @property
    def _shown_picture(self) -> list[gr.components.Component]:
        return [self.panel, self.attention_note, self.summary, self.recipe]

    def _events(self) -> None:
        tab, buttons = [self.token, *self.settings], [self.generate, self.cancel]
        self.blocks.load(
            self.restore,
            [self.token, self.saved, self.origin],
            [self.token, *self._slots, *self.settings, self.gallery, *self._shown_picture],
            js="() => window.mosaic.restore()",
            **HIDDEN,
        ).then(None, js="() => window.mosaic.opened()", **HIDDEN)
        self.blocks.unload(self.leave)
        gr.on([part.change for part in self.settings], None, self.settings, js="(...values) => window.mosaic.remember(...values)", **HIDDEN)
        outputs = [self.drop, self.upload_notice, *self._slots]
        self.drop.upload(self.add, [self.token, self.drop, self.shown], outputs, concurrency_limit=4, **HIDDEN)
        for position, button in enumerate(self.removes):
            fields = [*self.names, *self.strengths]
            outputs = [self.upload_notice, *self._slots, *fields]
            button.click(self.remover(position), [self.token, self.shown, *fields], outputs, **HIDDEN)
        if self.dataset is not None:
            outputs = [self.upload_notice, self.status, *self._slots, *self.settings]
            self.dataset.click(self.show_example, [self.token, self.dataset], outputs, **HIDDEN)
        outputs = [self.status, *buttons, self.seed, self.gallery, *self._shown_picture]
        gr.on([self.generate.click, self.prompt.submit], self.draw, [*tab, self.shown], outputs, concurrency_limit=24, **HIDDEN)
        changed = [self.drop.upload, *(button.click for button in self.removes)]
        gr.on(changed, None, js="() => window.mosaic.mended(true)", **HIDDEN)
        gr.on([self.generate.click, self.prompt.submit], None, js="() => window.mosaic.mended(false)", **HIDDEN)
        self.cancel.click(self.stop, None, [self.cancel], **HIDDEN)
        self.gallery.select(self.select, [self.token], self._shown_picture, **HIDDEN)

    @property
    def inputs(self) -> dict[int, list[str]]:
        """Per action, by its number, the kinds of its inputs."""
        return {number: [part.get_block_name() for part in action.inputs] for number, action in self.blocks.fns.items()}

    def restore(self, token: str, saved: str, origin: str) -> list[Any]:
        """Fill a page that was just loaded."""
        session = self.handlers.open(token, origin)
        state = saved_state(saved, self.config)
        return [token, *_slots(session), *_values(state), *_gallery(session), *_picture(session.pictures[0] if session.pictures else None)]

    def leave(self, request: gr.Request) -> None:
        """The page was closed or reloaded."""
        self.handlers.cancel(request.session_hash)

    def add(self, token: str, paths: list[str] | None, shown: Shown) -> list[Any]:
        """Files were dropped, pasted or chosen."""
        try:
            session = self.handlers.sessions.get(token)
        except ValueError as error:
            return [None, notice([str(error)]), *[gr.skip()] * len(self._slots)]
        said = self.handlers.add(session, paths or [], shown)
        return [None, said, *_slots(session)]

    def remover(self, position: int) -> Any:
        """The action of a reference's button."""

        def remove(token: str, shown: Shown, *fields: Any) -> list[Any]:
            try:
                session = self.handlers.sessions.get(token)
                session.remove(position, shown)
            except ValueError as error:
                return [notice([str(error)]), *[gr.skip()] * (len(self._slots) + len(fields))]
            names, strengths = list(fields[:MAX_REFERENCES]), list(fields[MAX_REFERENCES:])
            del names[position], strengths[position]
            return ["", *_slots(session), *names, "", *strengths, 1.0]

        return remove

    def show_example(self, token: str, position: int) -> list[Any]:
        """An example was chosen."""
        try:
            session, example = self.handlers.sessions.get(token), self.examples[position]
        except ValueError as error:
            return [notice([str(error)]), *[gr.skip()] * (1 + len(self._slots) + len(self.settings))]
        session.replace(example.uploads)
        return ["", "", *_slots(session), *_values(example_state(example, self.config))]

    def draw(self, token: str, request: gr.Request, *fields: Any) -> Iterator[dict[Any, Any]]:
        """Generate was clicked."""
        page, handlers = request.session_hash, self.handlers
        *values, shown = fields
        ready = {self.generate: gr.update(interactive=True), self.cancel: gr.update(interactive=False)}
        try:
            session, state = handlers.sessions.get(token), _state(values)
            if state.settings["new_seed"]:
                state.settings["seed"] = random_seed()
            run = handlers.start(page, session, state, shown)
        except ValueError as error:
            yield {self.status: notice([str(error)]), **ready}
            return
        yield {self.generate: gr.update(interactive=False), self.cancel: gr.update(interactive=True), self.seed: state.settings["seed"]}
        for look in handlers.watch(page, session, run):
            answer = {self.status: look.status}
            if look.ended:
                answer |= ready
            if look.picture is not None:
                answer[self.gallery] = _gallery(session)[0]
                answer |= dict(zip(self._shown_picture, _picture(look.picture), strict=True))
            yield answer

    def stop(self, request: gr.Request) -> Any:
        """Cancel was clicked."""
        self.handlers.cancel(request.session_hash)
        return gr.update(interactive=False)

    def select(self, token: str, event: gr.SelectData) -> list[Any]:
        """A picture of the gallery was chosen, which may not show all that the session has by now."""
        image = event.value.get("image") if isinstance(event.value, dict) else None
        return _picture(self.handlers.sessions.get(token).picture(str(image.get("path")) if isinstance(image, dict) else ""))


def _state(values: Sequence[Any]) -> PageState:
    names, strengths = values[len(SETTINGS) : -MAX_REFERENCES], values[-MAX_REFERENCES:]
    return PageState(dict(zip(SETTINGS, values, strict=False)), tuple(names), tuple(strengths))


def _values(state: PageState) -> list[Any]:
    return [*state.settings.values(), *state.names, *state.strengths]


def _slots(session: Session) -> list[Any]:
    uploads = session.references
    slots = [*uploads, *[None] * (MAX_REFERENCES - len(uploads))]
    shown = [gr.update(visible=upload is not None) for upload in slots]
    return [tuple(upload.identity for upload in uploads), *shown, *[card(position, upload) for position, upload in enumerate(slots)]]


def _gallery(session: Session) -> list[Any]:
    value = [(str(picture.path), f"seed {picture.recipe.seed}") for picture in session.pictures]
    return [gr.update(value=value, selected_index=0 if value else None)]


def _picture(picture: FinishedPicture | None) -> list[Any]:
    path = picture and picture.panel_path
    panel = gr.update(value=path and str(path), visible=path is not None)
    return [panel, attention_note(picture), summary(picture), recipe_json(picture)]
