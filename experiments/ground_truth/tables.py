"""From a row for each seed to means with intervals, correlations, and the tables of the page."""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd
from scipy import stats

from experiments.ground_truth.networks import MODELS
from experiments.ground_truth.scoring import BASELINES, ESTIMATORS, SCORES
from experiments.pages import markdown, with_error
from pattern_bench.methods import by_name
from pattern_bench.results.labels import plain

KEYS = ["scenario", "side", "signal", "suppressor", "model"]
WHO = ["estimator", "method"]
PREDICTORS = {
    "rho_first": "ρ of the first layer", "rho_all": "ρ of all layers",
    "rectified_first": "ρ of the first layer, rectified", "rectified_all": "ρ of all layers, rectified",
    "area_mean": "area over the curve, patches' mean", "area_zero": "area over the curve, zero",
}  # fmt: skip
NAMES = {
    "precision": "precision", "closeness": "1 − EMD", "on_suppressors": "share on suppressors", "angle": "angle",
    "angle_of_magnitudes": "angle of magnitudes", "random_map": "random map", "input": "the image itself",
    "sobel": "edges (Sobel)", "laplace": "edges (Laplace)", "linear": "linear", "mlp": "MLP", "cnn": "CNN",
}  # fmt: skip
RIGHT = {"precision": 1, "closeness": 1, "on_suppressors": -1, "angle_of_magnitudes": -1}
"""Scores, and whether more of them is more (1) or less (-1) right."""
REACHED = 0.8
"""The accuracy that a model must have for its explanations to be compared; XAI-TRIS's."""


def half_width(values: pd.Series) -> float:
    """Half of the 95 % interval of the mean over seeds, by Student's t; NaN for a single one."""
    values = values.dropna()
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5)


def summary(raw: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting, model, estimator and method: means over seeds, ``_error`` half of the 95 % interval."""
    measures = [*SCORES, *PREDICTORS, "accuracy"]
    cells = raw.groupby([*KEYS, *WHO], sort=False)
    table = cells[measures].mean().join(cells[measures].agg(half_width), rsuffix="_error")
    order = [name for measure in measures for name in (measure, f"{measure}_error")]
    found = cells.size().to_frame("seeds").join(table[order]).reset_index()
    return found.assign(reached=found.accuracy >= REACHED)


def reached(raw: pd.DataFrame) -> pd.DataFrame:
    """The rows of models whose accuracy, on average over the seeds, is high enough."""
    return raw[raw.groupby(KEYS).accuracy.transform("mean") >= REACHED]


def correlations(raw: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each predictor with how right an explanation is, by model.

    Taken among the explanations of one network, so that easy and hard settings do not count: for ρ among the
    estimators, under PatternNet and PatternAttribution each (``explanations`` tells whether the random direction is
    among them); for areas among all methods but the baselines. Then the mean over settings, and over seeds its 95 %
    interval.
    """
    raw = reached(raw)
    raw = raw[~raw.method.isin(BASELINES)]
    kinds = {"estimators": raw.estimator != "none", "estimators but random": ~raw.estimator.isin(["none", "random"])}
    rows: list[list[Any]] = []
    for predictor in PREDICTORS:
        of_rho = not predictor.startswith("area")
        for explanations, among in kinds.items() if of_rho else [("methods", raw.method != "")]:
            for score, sign in RIGHT.items():
                each = sign * _spearman(raw[among], predictor, score, ["method"] if of_rho else [])
                parts = {"all": each} | {str(name): part for name, part in each.groupby("scenario", sort=False)}
                for (scenario, part), model in product(parts.items(), MODELS):
                    values = part[part.index.get_level_values("model") == model].groupby("seed").mean()
                    if len(values):
                        found = [values.mean(), half_width(values), values.count()]
                        rows.append([predictor, explanations, score, scenario, model, *found])
    columns = ["predictor", "explanations", "score", "scenario", "model", "correlation", "correlation_error", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def _spearman(raw: pd.DataFrame, predictor: str, score: str, apart: list[str]) -> pd.Series:
    """Of the two columns in each network (and ``apart``)."""
    cells = raw.groupby([*KEYS, "seed", *apart], sort=False)[[predictor, score]]
    # Where all values of a column are the same there are no ranks, and the cell is left out.
    return cells.apply(lambda cell: stats.spearmanr(*cell.dropna().T.to_numpy()).statistic)


# --- the page ---


def label(estimator: str, method: str) -> str:
    """How an explanation is written."""
    name = NAMES.get(method, plain(method))
    return name if estimator == "none" else f"{name}, {plain(estimator)}"


def in_order(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Estimators and methods as tables list them: patterns, the other methods, baselines."""
    methods, estimators = [*by_name(), *BASELINES], [*ESTIMATORS, "none"]
    every = table[WHO].drop_duplicates().itertuples(index=False, name=None)
    return sorted(every, key=lambda who: (methods.index(who[1]), estimators.index(who[0])))


def accuracies(table: pd.DataFrame) -> str:
    """Settings × models; what was not reached is in italics."""
    cells = table.drop_duplicates(KEYS)
    rows = []
    for (scenario, side), part in cells.groupby(["scenario", "side"], sort=False):
        own = part.set_index("model")
        found = [with_error(own.accuracy[model], own.accuracy_error[model]) for model in MODELS]
        marked = [text if own.reached[model] else f"*{text}*" for text, model in zip(found, MODELS, strict=True)]
        rows.append([f"{scenario}, {side}×{side}", f"{own.signal.iloc[0]:g}", f"{own.suppressor.iloc[0]:g}", *marked])
    return markdown(pd.DataFrame(rows, columns=["scenario", "α", "β", *(NAMES[model] for model in MODELS)]))


def by_scenario(table: pd.DataFrame, score: str) -> str:
    """Methods × scenarios and models, a table for each size of image; the most right of each column is bold."""
    parts = []
    for side, part in table[table.reached].groupby("side"):
        columns = {NAMES[score]: [label(*who) for who in in_order(part)]}
        for (scenario, model), cell in part.groupby(["scenario", "model"], sort=False):
            own = cell.set_index(WHO)
            best = round(RIGHT[score] * (RIGHT[score] * own[score]).max(), 2)
            columns[f"{scenario}, {NAMES[str(model)]}"] = [
                f"**{text}**" if round(own[score][who], 2) == best else text
                for who in in_order(part)
                for text in [with_error(own[score][who], own[f"{score}_error"][who])]
            ]
        parts.append(f"{side}×{side} pixels:\n\n{markdown(pd.DataFrame(columns))}")
    return "\n\n".join(parts)


def other_scores(raw: pd.DataFrame) -> str:
    """Methods × scores, over all settings and models that were reached."""
    means = reached(raw).groupby([*WHO, "seed"])[list(SCORES)].mean()
    rows = []
    for who in in_order(raw):
        own: pd.DataFrame = means.xs(who, level=WHO)  # type: ignore[assignment]
        cells = [with_error(own[name].mean(), half_width(own[name]), _digits(name)) for name in SCORES]
        rows.append([label(*who), *cells])
    return markdown(pd.DataFrame(rows, columns=["mean of all", *(NAMES[name] for name in SCORES)]))


def _digits(score: str) -> int:
    return 0 if score.startswith("angle") else 2


def predictions(found: pd.DataFrame) -> str:
    """Predictors and what they are compared among × models, for precision and for the share on suppressors; and for
    precision × scenarios and models."""
    chosen = found[found.score.isin(["precision", "on_suppressors"])]
    whats = {"precision": "precision", "on_suppressors": "little on suppressors"}
    first = chosen[chosen.scenario == "all"]
    first = first.assign(column=first.model.map(NAMES), what=first.score.map(whats))
    second = found[(found.scenario != "all") & (found.score == "precision")]
    second = second.assign(column=second.scenario + ", " + second.model.map(NAMES), what="precision")
    return f"{_crossed(first)}\n\nPrecision by scenario:\n\n{_crossed(second)}"


def _crossed(found: pd.DataFrame) -> str:
    """Predictor, among and what × columns."""
    columns = found.column.unique()
    rows = []
    for (predictor, among, what), part in found.groupby(["predictor", "explanations", "what"], sort=False):
        own = part.set_index("column")
        cells = [with_error(own.correlation[name], own.correlation_error[name]) for name in columns]
        rows.append([PREDICTORS[str(predictor)], among, what, *cells])
    return markdown(pd.DataFrame(rows, columns=["predictor", "among", "predicts", *columns]))
