"""One page about a forecast: films of members, mean, spread and truth, and its scores where the truth is known."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from edm2.forecast.files import Forecast
from edm2.metrics.ensemble import EnsembleScores
from edm2.report import Page
from edm2.report.ensemble_figures import (
    crps_figure,
    field_picture,
    field_table,
    ranks_figure,
    reliability_figure,
    spectrum_figure,
    spread_figure,
)

_CASES = 3  # cases in the first film
_MEMBERS = 2  # members beside the truth there
_ALL = 16  # members in the second film
_CHANNELS = 4  # that are shown
_STRIP = 8  # most steps side by side
_WIDTH = 96  # pixels of a field on the screen, at least


def write_forecast_page(
    forecast: Forecast,
    out: Path,
    *,
    scores: EnsembleScores | None = None,
    title: str = "Forecast",
    lead: str = "",
    lines: Mapping[str, Sequence[float]] | None = None,
    facts: Mapping[str, object] | None = None,
    figures: Sequence[tuple[bytes, str, str]] = (),
    settings: Sequence[tuple[str, object]] = (),
    commands: str = "",
) -> Path:
    """Write the page; it plays in any browser, offline and without a script.

    Args:
        forecast: What to show.
        out: The HTML file; an older one is replaced.
        scores: Its scores, where the truth is known.
        title: Title of the page.
        lead: Text under the title.
        lines: Further curves beside the CRPS, as in `edm2.report.ensemble_figures.crps_figure`.
        facts: Headline numbers; default: those of the scores.
        figures: Further pictures after the scores, each with caption and description, as in `Page.figure`.
        settings: Rows of the table of settings.
        commands: Commands that make the same forecast.

    Returns:
        The file.
    """
    page = Page(title, lead=lead)
    if facts or scores is not None:
        page.facts(facts or _headlines(scores))
    for channel in range(min(forecast.members.shape[3], _CHANNELS)):
        _Films(forecast, channel).add_to(page)
    if scores is not None:
        _add_scores(page, scores, lines or {})
    if figures:
        page.section("Training")
    for picture, caption, alt in figures:
        page.figure(picture, caption, alt)
    if commands:
        page.section("The same on the command line")
        page.code(commands)
    if settings:
        page.section("Settings")
        page.table(["setting", "value"], settings)
    return page.write(out)


class _Films:
    """Pictures of one channel on common colours."""

    def __init__(self, forecast: Forecast, channel: int) -> None:
        self.members = forecast.members[:, :, :, channel]
        self.truth = None if forecast.truth is None else forecast.truth[:, :, channel]
        self.start = None if forecast.start is None else forecast.start[:, :, channel]
        self.name = f" of channel {channel}" if forecast.members.shape[3] > 1 else ""
        shown = self.members[:_CASES].astype(np.float64)
        self.low, self.high = np.nanquantile(shown, [0.002, 0.998])
        self.most = max(float(np.nanquantile(shown.std(axis=1), 0.998)), 1e-30)
        self.scale = max(1, round(_WIDTH / self.members.shape[-1]))

    def add_to(self, page: Page) -> None:
        cases, members, steps = self.members.shape[:3]
        page.section(
            f"Forecast{self.name}",
            f"{steps} steps from {'a known start' if self.start is None else 'the last known frame, step 0'}. Mean and "
            f"spread are those of all {members} members. Colours run from {self.low:.3g} (dark) to {self.high:.3g} "
            f"(bright), of the spread from 0 to {self.most:.3g}.",
        )
        shown = range(min(cases, _CASES))
        begin = 0 if self.start is not None else 1
        frames = [
            field_table([self._row(case, step) for case in shown], self._titles(step))
            for step in range(begin, steps + 1)
        ]
        with page.columns():
            page.film(
                frames,
                f"{len(shown)} cases, one in each row",
                f"Film of {len(shown)} forecasts: {', '.join(self._titles(1)[1:])}",
            )
            if members > 1:
                page.film(
                    [self._all(step) for step in range(1, steps + 1)],
                    f"The first {min(members, _ALL)} members of the first case",
                    "Film of the members of one forecast",
                )
        page.image(self._strip(), "The first case, step by step", "Fields of one forecast by step")

    def _titles(self, step: int) -> list[str]:
        names = ["truth"] if self.truth is not None else []
        names += ["mean", "spread"] if self.members.shape[1] > 1 else []
        names += [f"member {m + 1}" for m in range(min(self.members.shape[1], _MEMBERS))]
        return [f"step {step}: {names[0]}", *names[1:]]

    def _row(self, case: int, step: int) -> list[Image | None]:
        fields: list[Image | None] = []
        if self.truth is not None:
            fields.append(self._known(case, step, self.truth))
        if self.members.shape[1] > 1:
            fields += [self._known(case, step, None), self._spread(case, step)]
        count = min(self.members.shape[1], _MEMBERS)
        fields += [self._known(case, step, self.members[:, m]) for m in range(count)]
        return fields

    def _known(self, case: int, step: int, of: np.ndarray | None) -> Image:
        """A field of truth or a member, or with None the mean; at step 0 the last known frame."""
        if step == 0 and self.start is not None:
            return self._draw(self.start[case, -1])
        if of is None:
            return self._draw(self.members[case, :, step - 1].mean(axis=0))
        return self._draw(of[case, step - 1])

    def _spread(self, case: int, step: int) -> Image:
        of = self.members[case, :, max(step - 1, 0)].astype(np.float64)
        spread = np.zeros(of.shape[1:]) if step == 0 else of.std(axis=0, ddof=1)
        return field_picture(spread, 0, self.most, colours="magma", scale=self.scale)

    def _all(self, step: int) -> Image:
        pictures: list[Image | None] = [
            self._draw(self.members[0, m, step - 1]) for m in range(min(self.members.shape[1], _ALL))
        ]
        columns = min(len(pictures), 4)
        rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
        rows[-1] += [None] * (columns - len(rows[-1]))
        return field_table(rows, [f"step {step}", *[""] * (columns - 1)])

    def _strip(self) -> Image:
        total = self.members.shape[2]
        steps = np.unique(np.linspace(1, total, min(total, _STRIP)).round().astype(int))
        if self.start is not None:
            steps = np.array([0, *steps])
        names = ["truth"] * (self.truth is not None) + ["mean", "spread"] * (self.members.shape[1] > 1)
        names += [f"member {m + 1}" for m in range(min(self.members.shape[1], _MEMBERS))]
        columns = [self._row(0, int(step)) for step in steps]
        rows = [[column[r] for column in columns] for r in range(len(names))]
        return field_table(rows, [f"step {step}" for step in steps], names=names)

    def _draw(self, field: np.ndarray) -> Image:
        return field_picture(
            field.astype(np.float64), self.low, self.high, colours="viridis", scale=self.scale
        )


def _headlines(scores: EnsembleScores | None) -> dict[str, object]:
    assert scores is not None
    leads = len(scores.crps.value)
    own = scores.crps_fair if scores.num_members > 1 else scores.crps
    facts: dict[str, object] = {
        "CRPS, first step": f"{own.value[0].mean():.3g}",
        f"CRPS, step {leads}": f"{own.value[-1].mean():.3g}",
    }
    if scores.num_members > 1:
        low, high = np.nanmin(scores.spread_skill.value), np.nanmax(scores.spread_skill.value)
        facts["spread / skill"] = f"{low:.2f} to {high:.2f}"
    for name, base in scores.baselines.items():
        facts[f"below {name}, first step"] = f"{100 * base.skill.value[0].mean():.0f}%"
    return facts


def _add_scores(page: Page, scores: EnsembleScores, lines: Mapping[str, Sequence[float]]) -> None:
    leads, channels = scores.crps.value.shape
    page.section(
        "Scores",
        f"Of {scores.num_cases} cases with {scores.num_members} members; intervals (95%) from resampling the cases.",
    )
    ends = sorted({0, leads - 1})
    for channel in range(min(channels, _CHANNELS)):
        of = f" of channel {channel}" if channels > 1 else ""
        with page.columns():
            page.figure(
                crps_figure(scores, channel, lines), f"CRPS{of}, lower is better", "CRPS by lead time"
            )
            if scores.num_members > 1:
                page.figure(
                    spread_figure(scores, channel),
                    f"Spread over error of the mean{of}: below 1 the ensemble is overconfident",
                    "Spread-skill ratio by lead time",
                )
                page.figure(
                    ranks_figure(scores, channel, ends),
                    f"Rank of the truth{of}: flat for a calibrated ensemble",
                    "Rank histogram",
                )
            if scores.reliability and scores.num_members > 1:
                page.figure(
                    reliability_figure(scores, channel, leads - 1),
                    f"Reliability{of} at step {leads}: on the diagonal for a calibrated ensemble of many members, "
                    "flatter for few",
                    "Observed frequency against forecast probability",
                )
            if scores.spectrum is not None:
                page.figure(
                    spectrum_figure(scores, channel, leads - 1),
                    f"Power{of} at step {leads}: members should match the truth",
                    "Power by wave number",
                )
    page.table(*_table(scores))


def _table(scores: EnsembleScores) -> tuple[list[str], list[list[object]]]:
    own = scores.crps_fair if scores.num_members > 1 else scores.crps
    bases = list(scores.baselines.items())
    head = ["step", "CRPS", "95% interval", "RMSE", "spread / skill", "ranks, p"]
    head += [text for name, _ in bases for text in (f"{name} CRPS", f"below {name}")]
    rows: list[list[object]] = []
    for t, c in np.ndindex(*own.value.shape):
        at = (t, c)
        row: list[object] = [
            t + 1,
            f"{own.value[at]:.4g}",
            f"{own.low[at]:.3g}\u2060\u2013\u2060{own.high[at]:.3g}",
        ]
        row += [f"{scores.rmse.value[at]:.4g}", f"{scores.spread_skill.value[at]:.3f}"]
        row += [f"{scores.ranks_p[at]:.3f}"]
        for _, base in bases:
            row += [f"{base.crps.value[at]:.4g}", f"{100 * base.skill.value[at]:.1f}%"]
        rows.append(row)
    if own.value.shape[1] > 1:
        channels = np.tile(np.arange(own.value.shape[1]), len(own.value))
        head.insert(1, "channel")
        rows = [[row[0], int(c), *row[1:]] for row, c in zip(rows, channels, strict=True)]
    return head, rows
