"""An explanation on a terminal. What comes from a corpus is printed as it is: nothing in it is markup or a command."""

from __future__ import annotations

from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gemel_engine.display import cut, excerpt, percent, shares, visible
from gemel_engine.explain import Explanation, UsedDemonstration, VisualMark
from gemel_engine.types import Candidate, Prediction

_CONTEXT = 200
_DEMONSTRATION_CONTEXT = 40
_MAX_NAME = 60
_BAR_WIDTH = 16
_NOTHING = "–"


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Print the answer, the ranking with and without the picture, the demonstrations and the prompt."""
    console.print(_answer(explanation))
    console.print(Rule("candidates", align="left"))
    console.print(_candidates(explanation.prediction, explanation.without_picture))
    if explanation.demonstrations:
        console.print(Rule("demonstrations, the last right before the question", align="left"))
        console.print(_demonstrations(explanation.demonstrations))
    console.print(Rule("prompt", align="left"))
    console.print(_prompt(explanation.prompt))


def _answer(explanation: Explanation) -> RenderableType:
    mention, prediction = explanation.mention, explanation.prediction
    before, surface_form, after = excerpt(mention.text, mention.mention, mention.mention_start, _CONTEXT)
    return Group(
        Text.assemble(visible(before), (visible(surface_form), "bold reverse"), visible(after)),
        Text.assemble("→ ", (_name(prediction.entity_name), "bold"), f"  {_name(prediction.entity_id)}"),
        Text(_search(prediction), "dim"),
    )


def _search(prediction: Prediction) -> str:
    """What the search knows of its answer."""
    certificate = (
        f"certified: the first {prediction.num_certified} proved to be in their place"
        if prediction.certified
        else "not certified: the budget of rollouts was spent first"
    )
    return (
        f"{certificate}; rollouts {prediction.num_rollouts}; margin {_number(prediction.margin)}; "
        f"unexplored mass at most {percent(prediction.unexplored_mass, _NOTHING)}; "
        f"demonstrations left out {prediction.num_demonstrations_dropped}"
    )


def _candidates(prediction: Prediction, without: Explanation | None) -> Table:
    """All candidates of both rankings; a share is a lower bound."""
    table = _table("", "entity", "id", "log-prob", "share", "")
    ranked = _ranked(prediction)
    others = {} if without is None else _ranked(without.prediction)
    if without is not None:
        for header in ("without picture", "log-prob", "share"):
            table.add_column(header, justify="right")
    for entity_id in dict.fromkeys([*ranked, *others]):
        candidate = (ranked.get(entity_id) or others[entity_id])[1]
        place, *scores = _ranking_cells(ranked.get(entity_id))
        share = ranked[entity_id][2] if entity_id in ranked else 0.0
        table.add_row(
            place,
            Text(_name(candidate.entity_name), "bold" if candidate.entity_id == prediction.entity_id else ""),
            Text(_name(entity_id), "dim"),
            *scores,
            Bar(1.0, 0.0, share, width=_BAR_WIDTH),
            *(_ranking_cells(others.get(entity_id)) if without is not None else ()),
        )
    return table


def _ranked(prediction: Prediction) -> dict[str, tuple[int, Candidate, float]]:
    """Place, candidate and share of each entity."""
    candidates = prediction.candidates
    of_names = shares(prediction.probability, [candidate.log_prob for candidate in candidates])
    return {
        candidate.entity_id: (place, candidate, share)
        for place, (candidate, share) in enumerate(zip(candidates, of_names, strict=True), 1)
    }


def _ranking_cells(ranked: tuple[int, Candidate, float] | None) -> list[Text]:
    """Place, log-prob and share."""
    if ranked is None:
        return [Text(_NOTHING)] * 3
    place, candidate, share = ranked
    return [Text(str(place)), Text(_number(candidate.log_prob)), Text(percent(share, _NOTHING))]


def _demonstrations(used: Sequence[UsedDemonstration]) -> Table:
    table = _table("", "similarity", "entity", "picture", "text")
    for place, item in enumerate(used, 1):
        demonstration = item.demonstration
        before, surface_form, after = excerpt(demonstration.text, demonstration.mention, None, _DEMONSTRATION_CONTEXT)
        table.add_row(
            Text(str(place)),
            Text(_number(item.similarity)),
            Text(_name(demonstration.name)),
            Text("no" if demonstration.features is None else "yes"),
            Text.assemble(visible(before), (visible(surface_form), "reverse"), visible(after)),
        )
    return table


def _prompt(pieces: Sequence[str | VisualMark]) -> Text:
    prompt = Text()
    for piece in pieces:
        if isinstance(piece, VisualMark):
            prompt.append(f"⟨picture: {piece.num_embeddings} embeddings⟩", "reverse")
        else:
            prompt.append(visible(piece, lines=True))
    return prompt


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for header in headers:
        table.add_column(header, justify="right" if header in ("", "log-prob", "share", "similarity") else "left")
    return table


def _name(name: str | None) -> str:
    return _NOTHING if name is None else visible(cut(name, _MAX_NAME))


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"
