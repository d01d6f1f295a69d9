"""Tables and explanations for a terminal.

Text from a corpus is printed literally: nothing in it acts as markup or as a terminal command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gemel_engine.display import cut, excerpt, on_one_line, percent, shares, visible
from gemel_engine.evaluation.judge import Measured
from gemel_engine.evaluation.run import JudgedRun
from gemel_engine.evaluation.spans import JudgedSpans
from gemel_engine.evidence.cards import Card
from gemel_engine.evidence.comparison import Argument
from gemel_engine.evidence.reasons import in_words
from gemel_engine.knowledge_base.store import Entity
from gemel_engine.linker import Explanation, UsedDemonstration, VisualMark
from gemel_engine.linking.plan import RunPlan, format_size
from gemel_engine.types import Candidate, PoolEntity, Prediction


def as_table(judged: JudgedRun) -> Table:
    """Return the evaluation of a run as a table."""
    evaluation = judged.evaluation
    table = Table(title=f"{evaluation.num_mentions} mentions, protocol {evaluation.protocol}")
    for heading in ("", "value", "95% interval", "mentions"):
        table.add_column(heading, justify="left" if not heading else "right")

    def add(name: str, figure: Measured) -> None:
        interval = f"{figure.low:.3f} to {figure.high:.3f}"
        table.add_row(name, f"{figure.value:.3f}", interval, str(figure.num_mentions))

    def add_number(name: str, number: int) -> None:
        if number:
            table.add_row(name, "", "", str(number))

    add("accuracy", evaluation.accuracy)
    add_number("wrong, since they ended in an error", evaluation.num_errors)
    add_number("not judged: no entity of the knowledge base", evaluation.num_nil)
    add_number("not judged: no gold row", evaluation.num_without_gold)
    if evaluation.baseline is not None:
        add("accuracy without a model", evaluation.baseline)
    for kind, figures in evaluation.buckets.items():
        table.add_section()
        for label, figure in figures.items():
            add(f"{kind}: {label}", figure)
    table.add_section()
    add("mean over entities", evaluation.macro_accuracy)
    add("gold among the first 5", evaluation.hits_at_5)
    add("mean reciprocal rank", evaluation.mean_reciprocal_rank)
    if evaluation.pool_recall is not None:
        add("pool recall", evaluation.pool_recall)
    add("search complete", evaluation.certified_share)
    for score, item in judged.confidence.items():
        table.add_section()
        table.add_row(f"{score} score: calibration error", f"{item.expected_calibration_error:.3f}", "", "")
        table.add_row(f"{score} score: Brier", f"{item.brier_score:.3f}", "", "")
        table.add_row(f"{score} score: area under risk and coverage", f"{item.area_under_risk_coverage:.3f}", "", "")
    if judged.comparison is not None:
        table.add_section()
        add("accuracy, less that of the other run", judged.comparison.difference)
        table.add_row(
            "right here alone, right there alone",
            f"{len(judged.comparison.won)}, {len(judged.comparison.lost)}",
            "",
            "",
        )
        table.add_row("McNemar's exact test, p", f"{judged.comparison.p_value:.3f}", "", "")
    return table


def as_tables(plan: RunPlan) -> list[Table]:
    """Return a predicted run as two tables: stages, then clusters."""
    stages = Table(
        title=f"{plan.sample_rows:,} of {plan.num_rows:,} rows linked, in {plan.num_windows} windows",
        caption=f"cache hits {percent(plan.cache_hit_rate)}, {plan.rollouts_per_row:.1f} rollouts a row, "
        f"{sum(plan.errors.values())} errors; start {plan.start_seconds:,.0f} s; "
        f"input {format_size(plan.input_bytes)}, output {format_size(plan.output_bytes)}",
    )
    for heading in ("stage", "seconds a row", "95% interval", "seconds a shard, beside", "memory of an actor"):
        stages.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, per_row in plan.seconds_per_row.items():
        interval = f"{per_row.low:.4f} to {per_row.high:.4f}"
        beside = f"{plan.stage_costs[name].per_shard:.2f}"
        stages.add_row(name, f"{per_row.value:.4f}", interval, beside, format_size(plan.peak_bytes[name]))
    clusters = Table(title=f"the whole corpus, in shards of {plan.rows_per_shard:,} rows")
    for heading in ("generation actors", "hours", "95% interval", "cost", "limited by", "other actors", "rows a shard"):
        clusters.add_column(heading, justify="left" if heading in ("limited by", "other actors") else "right")
    for cluster in plan.clusters:
        hours = cluster.seconds.times(1 / 3600)
        clusters.add_row(
            f"{cluster.actors:,}",
            f"{hours.value:,.2f}",
            f"{hours.low:,.2f} to {hours.high:,.2f}",
            "-" if cluster.cost is None else f"{cluster.cost.value:,.2f}",
            cluster.limited_by,
            ", ".join(f"{name} {number}" for name, number in cluster.pools.items()) or "-",
            f"{cluster.rows_per_shard:,}",
        )
    return [stages, clusters]


_CONTEXT = 200
_DEMONSTRATION_CONTEXT = 40
_MAX_NAME = 60
_MAX_DESCRIPTION = 80
_BAR_WIDTH = 16
_NOTHING = "–"


def spans_table(judged: JudgedSpans) -> Table:
    """Return the comparison of found mentions with gold as a table."""
    table = Table(title=f"{judged.mentions.num_gold} gold mentions, {judged.mentions.num_found} found")
    for heading in ("", "precision", "recall", "F1", "right"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, item in (("place", judged.mentions), ("place and entity", judged.linked)):
        if item is not None:
            table.add_row(name, f"{item.precision:.3f}", f"{item.recall:.3f}", f"{item.f1:.3f}", str(item.num_right))
    return table


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Print answer, rankings with and without the picture, pool, demonstrations and prompt."""
    console.print(_answer(explanation))
    console.print(Rule("candidates", align="left"))
    console.print(_candidates(explanation))
    if explanation.arguments:
        console.print(Rule("why the first beats the second", align="left"))
        console.print(_arguments(explanation.arguments))
    if explanation.prediction.pool:
        console.print(Rule("candidate pool", align="left"))
        console.print(_pool(explanation.prediction.pool, explanation.entities))
    if explanation.demonstrations:
        console.print(Rule("demonstrations and cards, the last right before the question", align="left"))
        console.print(_demonstrations(explanation.demonstrations))
    if explanation.prompt:
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
    """Describe how certain the search is of its answer."""
    if prediction.decided_by == "evidence":
        return (
            f"decided by evidence alone, at probability {percent(prediction.confidence, _NOTHING)}; nothing was asked"
        )
    certificate = (
        f"search complete: the first {prediction.num_certified} are proved to be in their place"
        if prediction.certified
        else "search stopped early: the budget of rollouts was spent first"
    )
    return (
        f"{certificate}; rollouts {prediction.num_rollouts}; margin {_number(prediction.margin)}; "
        f"unexplored mass at most {percent(prediction.unexplored_mass, _NOTHING)}; "
        f"demonstrations left out {prediction.num_demonstrations_dropped}, "
        f"characters of the text {prediction.num_characters_dropped}"
    )


def _candidates(explanation: Explanation) -> Table:
    """Return a table of all candidates of both rankings; each share is a lower bound."""
    prediction, without = explanation.prediction, explanation.without_picture
    entities = {**(without.entities if without else {}), **explanation.entities}
    table = _table("", "entity", "id", "log-prob", "share", "")
    ranked = _ranked(prediction)
    others = {} if without is None else _ranked(without.prediction)
    if without is not None:
        for header in ("without picture", "log-prob", "share"):
            table.add_column(header, justify="right")
    table.add_column("description")
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
            Text(_description(entities.get(entity_id))),
        )
    return table


def _ranked(prediction: Prediction) -> dict[str, tuple[int, Candidate, float]]:
    """Return place, candidate and share of each entity, by entity identifier."""
    candidates = prediction.candidates
    of_names = shares(prediction.probability, [candidate.log_prob for candidate in candidates])
    return {
        candidate.entity_id: (place, candidate, share)
        for place, (candidate, share) in enumerate(zip(candidates, of_names, strict=True), 1)
    }


def _ranking_cells(ranked: tuple[int, Candidate, float] | None) -> list[Text]:
    """Return the cells for place, log-prob and share."""
    if ranked is None:
        return [Text(_NOTHING)] * 3
    place, candidate, share = ranked
    return [Text(str(place)), Text(_number(candidate.log_prob)), Text(percent(share, _NOTHING))]


def _arguments(found: Sequence[Argument]) -> Table:
    table = _table("adds", "because")
    for item in found:
        table.add_row(Text(f"{item.difference:+.2f}"), Text(visible(item.words)))
    table.add_row(Text(f"{sum(item.difference for item in found):+.2f}", "bold"), Text("in all"))
    return table


def _pool(pool: Sequence[PoolEntity], entities: Mapping[str, Entity]) -> Table:
    table = _table("", "entity", "id", "score", "reasons", "description")
    for place, item in enumerate(pool, 1):
        entity = entities.get(item.entity_id)
        table.add_row(
            Text(str(place)),
            Text(_name(None if entity is None else entity.name)),
            Text(_name(item.entity_id), "dim"),
            Text(_number(item.score)),
            Text(visible("; ".join(in_words(item.reasons)))),
            Text(_description(entity)),
        )
    return table


def _demonstrations(used: Sequence[UsedDemonstration]) -> Table:
    table = _table("", "kind", "similarity", "entity", "picture", "text")
    for place, item in enumerate(used, 1):
        demonstration = item.demonstration
        before, surface_form, after = excerpt(demonstration.text, demonstration.mention, None, _DEMONSTRATION_CONTEXT)
        table.add_row(
            Text(str(place)),
            Text("card" if isinstance(demonstration, Card) else "mention"),
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
        table.add_column(
            header, justify="right" if header in ("", "log-prob", "share", "similarity", "score", "adds") else "left"
        )
    return table


def _name(name: str | None) -> str:
    return _NOTHING if name is None else visible(cut(name, _MAX_NAME))


def _description(entity: Entity | None) -> str:
    return visible(on_one_line((entity and entity.description) or "", _MAX_DESCRIPTION))


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"
