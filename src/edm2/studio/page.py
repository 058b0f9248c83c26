"""The studio's page: sliders over a run's images; needs gradio.

What happens when a slider moves is in `edm2.studio.workbench`; here are its controls and their places.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edm2.extras import needed
from edm2.studio import pictures
from edm2.studio.choices import Choice, number
from edm2.studio.workbench import Workbench

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
with needed("edm2 studio"):
    import gradio as gr

_ERRORS = (ValueError, FileExistsError, FloatingPointError)
_HIGHEST = 80.0  # noise level up to which a guide acts everywhere
_WAITING = 64
_LOOK_SECONDS = 30


def build(bench: Workbench, *, may_save: bool = True, told: str = "") -> Any:
    """Build the page.

    Args:
        bench: The run.
        may_save: Whether visitors may save models into the run's folder.
        told: A line about where the page can be seen from.

    Returns:
        A `gradio.Blocks`; `serve` starts it.
    """
    built = bench.times[-1]
    with gr.Blocks(title=f"edm2 studio: {bench.run.resolve().name}", analytics_enabled=False) as page:
        status = gr.Markdown(_status(bench, told))
        with gr.Row():
            shared = _shared_controls(bench)
        compare = gr.Checkbox(label="Compare with a second setting", elem_id="compare")
        with gr.Row():
            with gr.Column(min_width=320):
                first, shown = _side(bench, "A", shared, may_save=may_save)
            with gr.Column(min_width=320, visible=False) as second:
                other, _ = _side(bench, "B", shared, may_save=may_save, only_if=compare)
        compare.change(lambda on: gr.Column(visible=on), compare, second, show_progress="hidden")
        _more(bench, [*shared, *first], shown, may_save)

        def look() -> list[Any]:
            bench.refresh()
            times = _times(bench)
            return [_status(bench, told), *(gr.Dropdown(choices=times) for _ in range(4))]

        def arrive() -> list[Any]:
            status, first, *rest = look()
            if bench.times[-1] > built:  # training has gone on
                first = gr.Dropdown(choices=_times(bench), value=bench.times[-1])
            return [status, first, *rest]

        seen = [status, *(side[i] for side in (first, other) for i in (1, 4))]
        page.load(arrive, None, seen, show_progress="hidden")
        if not bench.has_ended:
            gr.Timer(_LOOK_SECONDS).tick(look, None, seen, show_progress="hidden")
    return page


def serve(page: Any, *, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> str:
    """Start the page; returns its address. With `wait` it runs until the process is stopped."""
    page.queue(max_size=_WAITING, default_concurrency_limit=1)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[],
        footer_links=[],
        ssr_mode=False,
        theme=theme,
        css=pictures.STYLE,
    )
    if wait:
        page.block_thread()
    return str(address)


def _status(bench: Workbench, told: str) -> str:
    return f"## {bench.run.resolve().name}\n\nThis run is {bench.status}. {told}"


def _times(bench: Workbench) -> list[tuple[str, float]]:
    return [(f"{t:,.0f} images", t) for t in reversed(bench.times)]


def _shared_controls(bench: Workbench) -> list[Any]:
    """Seed, number of images, class, case and dropped picture, for both sides."""
    cases = bench.cases
    free = "each in turn" if cases is None else "the case's"
    names = [(free, -1), *((name, i) for i, name in enumerate(bench.class_names))]
    last, kind = (1, "") if cases is None else (max(1, len(cases) - 1), cases.kind)
    return [
        gr.Number(0, label="First seed", precision=0, minimum=0, elem_id="seed"),
        gr.Slider(1, 64, 16, step=1, label="Images" if cases is None else "Members", elem_id="count"),
        gr.Dropdown(names, value=-1, label="Class", visible=bool(bench.num_classes), elem_id="label"),
        gr.Slider(
            0, last, 0, step=1, label=f"Case of the {kind} data", visible=cases is not None, elem_id="case"
        ),
        gr.Image(
            label="Or drop a picture as the condition",
            type="numpy",
            image_mode="RGB",
            sources=["upload", "clipboard"],
            height=180,
            visible=cases is not None and cases.takes_pictures,
            elem_id="dropped",
        ),
    ]


def _controls(bench: Workbench, side: str) -> list[Any]:
    """Controls of one side, in the order that `_choice` reads them."""
    times, start = _times(bench), bench.first_choice()
    lowest, highest = start.interval
    kinds = (
        ["none", "earlier"]
        + ["without labels"] * bool(bench.num_classes)
        + ["other"] * (bench.other is not None)
    )

    def place(name: str) -> str:
        return f"{name}-{side}"

    length = gr.Slider(0.01, 0.3, start.sigma_rel, step=0.005, label="EMA length", elem_id=place("ema"))
    moment = gr.Dropdown(times, value=start.num_images, label="Point of the run", elem_id=place("moment"))
    guide = gr.Radio(kinds, value=start.guide, label="Guide", elem_id=place("guide"))
    with gr.Group(visible=start.guide != "none") as guided:
        weight = gr.Slider(0, 5, start.guidance, step=0.05, label="Guidance weight", elem_id=place("weight"))
        low = gr.Slider(0, 5, lowest, step=0.05, label="Guide above noise level", elem_id=place("low"))
        high = gr.Slider(
            0.1,
            _HIGHEST,
            min(highest, _HIGHEST),
            step=0.1,
            label="Guide up to noise level",
            elem_id=place("high"),
        )
        with gr.Group(visible=start.guide == "earlier") as earlier:
            guide_moment = gr.Dropdown(
                times,
                value=start.guide_images,
                label="Point of the guide's run",
                elem_id=place("guide-moment"),
            )
            guide_length = gr.Slider(
                0.01,
                0.3,
                start.guide_sigma_rel,
                step=0.005,
                label="EMA length of the guide",
                elem_id=place("guide-ema"),
            )
    steps = gr.Slider(1, 64, start.num_steps, step=1, label="Steps", elem_id=place("steps"))
    sampler = gr.Dropdown(bench.samplers, value=start.sampler, label="Sampler", elem_id=place("sampler"))
    guide.change(
        lambda kind: (gr.Group(visible=kind != "none"), gr.Group(visible=kind == "earlier")),
        guide,
        [guided, earlier],
        show_progress="hidden",
    )
    return [length, moment, guide, weight, guide_moment, guide_length, low, high, steps, sampler]


def _side(
    bench: Workbench, side: str, shared: list[Any], *, may_save: bool, only_if: Any = None
) -> tuple[list[Any], Any]:
    """One setting: its pictures, its controls and its command; with a checkbox, drawn only while that is on."""
    with gr.Row():
        with gr.Column(min_width=300):
            given = gr.HTML(elem_id=f"given-{side}", visible=bench.cases is not None)
            shown = gr.HTML(elem_id=f"images-{side}")
            took = gr.Markdown(elem_id=f"took-{side}")
        with gr.Column(min_width=300):
            controls = _controls(bench, side)
    command = gr.Textbox(
        label="The same images on the command line", lines=2, buttons=["copy"], interactive=False,
        elem_id=f"command-{side}",
    )  # fmt: skip

    def draw(*values: Any) -> Any:
        if only_if is not None:
            *values, is_on = values  # type: ignore[assignment]
            if not is_on:
                return (gr.skip(),) * 4
        start = time.monotonic()
        try:
            choice = read_choice(bench, values)
            with warnings.catch_warnings(record=True) as remarks:
                warnings.simplefilter("always", UserWarning)
                images = bench.images(choice)
            seconds = time.monotonic() - start
            command = bench.command(choice, may_write=may_save)
        except _ERRORS as error:
            return "", pictures.problem(error), "", ""
        expected = bench.model(choice.sigma_rel, choice.num_images).info["expected_error"]
        took = f"{len(images)} images in {seconds:.2f} s; expected error of the average: {expected:.1e}"
        took += "".join(f"\n\nNote: {remark.message}." for remark in remarks)
        shown = pictures.tiles(bench.picture(images), [f"seed {seed}" for seed in choice.seeds])
        return draw_given(bench, choice, images), shown, took, command

    inputs = [*shared, *controls, *([] if only_if is None else [only_if])]
    _on(
        [control.change for control in inputs],
        draw,
        inputs,
        [given, shown, took, command],
        first=only_if is None,
    )
    return controls, shown


def _more(bench: Workbench, inputs: list[Any], shown: Any, may_save: bool) -> None:
    """What lies under the pictures, about the first setting."""
    with gr.Accordion("The first image, step by step", open=True):
        path = gr.HTML(elem_id="path")
    with gr.Accordion("Curves", open=True):
        curves = gr.HTML(elem_id="curves")

    def draw(*values: Any) -> tuple[str, str]:
        try:
            choice = read_choice(bench, values)
            return draw_path(bench, choice), draw_curves(bench, choice)
        except _ERRORS as error:
            return pictures.problem(error), ""

    _on([shown.change], draw, inputs, [path, curves], first=False)
    if not may_save:
        return
    with gr.Row():
        name = gr.Textbox("favourite", label="Save the model with these settings as", elem_id="name")
        button = gr.Button("Save", elem_id="save")
    saved = gr.Markdown(elem_id="saved")

    def save(name: str, *values: Any) -> str:
        try:
            folder = bench.save(read_choice(bench, values), name)
        except _ERRORS as error:
            return f"Not saved: {error}"
        return f"Saved. `edm2 sample {folder} --out samples` uses it with these settings."

    button.click(save, [name, *inputs], saved, api_visibility="private")


def _on(
    triggers: list[Any], draw: Callable[..., Any], inputs: list[Any], outputs: list[Any], *, first: bool
) -> None:
    """Call a function when controls change, only for their latest values, one visitor after the other."""
    options: dict[str, Any] = dict(
        show_progress="hidden", trigger_mode="always_last", concurrency_id="network", concurrency_limit=1,
        api_visibility="private",
    )  # fmt: skip
    gr.on(triggers, draw, inputs, outputs, **options)
    if first:
        gr.on(None, draw, inputs, outputs, **options)


def draw_given(bench: Workbench, choice: Choice, images: np.ndarray) -> str:
    """What a conditional run was given, and what its images have in common; empty for other runs."""
    found = bench.given(choice, images)
    return "".join(pictures.tiles(picture, [name], kind="path given") for name, picture in found)


def draw_path(bench: Workbench, choice: Choice) -> str:
    """What the network takes the first image for, at each step."""
    levels, images = zip(*bench.path(choice), strict=True)
    return pictures.tiles(np.stack(images), [f"σ {level:.3g}" for level in levels], kind="path")


def draw_curves(bench: Workbench, choice: Choice) -> str:
    """The curves of the run, with the chosen setting marked."""
    drawn = [
        (f"Weight of each point of the training; EMA length {choice.sigma_rel:g}", bench.profile(choice))
    ]
    noise = bench.noise(choice)
    if noise is not None:
        drawn.append(("Loss by noise level on training images, and where guidance acts", noise))
    drawn += [(f"Tuning: {name}", figure) for name, figure in bench.tuning(choice)]
    return pictures.figures(drawn)


def read_choice(bench: Workbench, values: Sequence[Any]) -> Choice:
    """A choice from the values of the shared controls and one side's, in their order.

    Raises:
        ValueError: If a number is missing, or the interval is empty.
    """
    seed, count, label, case, dropped, *own = values
    if any(value is None for value in (seed, count, label, case, *own)):
        raise ValueError("a field is empty: fill in a number")
    (
        length,
        moment,
        guide,
        weight,
        guide_moment,
        guide_length,
        low,
        high,
        steps,
        sampler,
    ) = own
    if low >= high:
        raise ValueError(f"guide above {number(low)} and up to {number(high)}: the first must be lower")
    return Choice(
        sigma_rel=float(length),
        num_images=float(moment),
        guide=guide,
        guide_sigma_rel=float(guide_length),
        guide_images=float(guide_moment),
        guidance=float(weight),
        interval=(float(low), math.inf if high >= _HIGHEST else float(high)),
        sampler=sampler,
        num_steps=int(steps),
        first_seed=int(seed),
        count=int(count),
        label=None if label < 0 else int(label),
        case=int(case),
        dropped=None if dropped is None or bench.cases is None else bench.cases.drop(dropped),
    )
