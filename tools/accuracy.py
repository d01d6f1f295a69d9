"""Tables of results on accuracy."""

from __future__ import annotations

from collections.abc import Iterator

from figures import Results
from tables import Column, Compared, Facts, Table

from gemel_engine.evidence.features import FEATURES

KINDS = (
    ("form seen in training", "form_seen"),
    ("entity seen, form not", "entity_seen_form_unseen"),
    ("neither, name = form", "unseen_name_is_form"),
    ("neither, other name", "unseen_other_name"),
)
CORPORA = (("WikiDiverse", "wikidiverse"), ("emoji", "emoji"), ("gazetteer", "gazetteer"))


def score() -> tuple[Table | Facts, ...]:
    """Return the tables on the score, its cascade, its features and its transfer."""
    kinds = [Column(heading, f"score/wikidiverse.{{row}}.{kind}") for heading, kind in KINDS]
    return (
        Table(
            "Accuracy on WikiDiverse dev, text only, by the weights of the package.",
            (
                Column("all", "score/wikidiverse.{row}"),
                *kinds,
                Column("least sure fifth", "score/wikidiverse.least_sure_{row}"),
            ),
            (("evidence alone", "evidence_alone"), ("language model and evidence", "score")),
        ),
        Facts(
            "The same run, in which evidence decides alone where it is sure enough (`score.risk = 0.03`).",
            "score",
            (
                ("least sure fifth: both, less evidence alone", "wikidiverse.least_sure_difference", "s"),
                ("share decided by evidence", "wikidiverse.decided_by_evidence", ".1%"),
                ("of these wrong", "wikidiverse.risk_of_decided", ".1%"),
                ("of the others certified", "wikidiverse.certified_of_asked", ".1%"),
                ("rollouts of each of the others", "wikidiverse.rollouts_of_asked", ".2f"),
                ("certified answers that brute force has, too", "certified_answers_equal_to_brute_force", "s"),
                ("expected calibration error", "confidence.ece", ".3f"),
                ("area under risk and coverage", "confidence.risk_coverage_area", ".3f"),
            ),
        ),
        Table(
            "The same mentions with what evidence decides alone at a risk of 3%, without, and by the language model "
            "alone; last the cascade's share of what the score takes without it.",
            (
                Column("mentions", "score/{row}compared.mentions", "d"),
                Column("cascade", "score/{row}compared.cascade.accuracy"),
                Column("score", "score/{row}compared.without_cascade.accuracy"),
                Column("model alone", "score/{row}compared.model_alone.accuracy"),
                Column("computed prompt tokens", "score/{row}cascade.tokens_ratio", ".2f"),
                Column("time", "score/{row}cascade.time_ratio", ".2f"),
            ),
            (("a sample of dev", ""), ("a few very common forms", "zipf.")),
        ),
        Facts(
            "Other sets of names: emoji with pictures; WikiDiverse dev among 5.9M titles, of which likely rivals are "
            "embedded.",
            "score",
            (
                ("emoji test: score (200); evidence alone", "emoji.score | emoji.evidence_alone", ".3f"),
                (
                    "emoji, entities never seen in training: score; evidence alone",
                    "emoji.unseen | emoji.unseen_evidence_alone",
                    ".3f",
                ),
                ("5.9M titles: score; evidence alone", "union.score | union.evidence_alone", ".3f"),
                ("5.9M titles: certified of the asked", "union.certified_of_asked", ".1%"),
            ),
        ),
        Table(
            "Emoji with pictures by the score: cards in prompts, the mapper trained without; chosen on dev.",
            (
                Column("dev", "score/emoji dev: {row} (200)/all"),
                Column("entities never seen in training", "score/emoji test_unseen: {row} (179)/all"),
            ),
            (
                ("no cards", "num_cards=0 num_own_cards=0"),
                ("one of the mention's own", "num_cards=0 num_own_cards=1"),
                ("two of its own", "num_cards=0 num_own_cards=2"),
            ),
        ),
        Table(
            "Evidence alone decides, at three risks.",
            (
                Column("decided", "score/cascade.decided_at_{row}", ".1%"),
                Column("of these wrong", "score/cascade.wrong_of_decided_at_{row}", ".1%"),
            ),
            tuple((f"{float(risk):.0%}", risk) for risk in ("0.02", "0.03", "0.05")),
        ),
        Table(
            "Evidence alone, without one feature: accuracy on dev, fitted on train of the same corpus.",
            tuple(Column(heading, f"score/feature.{corpus}.{{row}}") for heading, corpus in CORPORA),
            (
                ("all features", "none_left_out"),
                *((f"without `{name}`", f"without_{name}") for name in FEATURES),
            ),
        ),
        Facts(
            "Evidence alone on a corpus that its weights were not fitted on, but on the two others, beside a lookup of "
            "the form's most frequent entity, else of an equal name. Then by the weights of all three.",
            "score",
            (
                *(
                    (f"{heading}; lookup", f"transfer.{corpus} | transfer.lookup_{corpus}", ".3f")
                    for heading, corpus in CORPORA
                ),
                ("by all three: emoji test; dev", "emoji.evidence_alone | emoji.dev_evidence_alone", ".3f"),
                ("emoji, entities never seen in training", "emoji.unseen_evidence_alone", ".3f"),
                ("gazetteer dev", "gazetteer.evidence_alone", ".3f"),
                (
                    "gold among the best 2; 5; 32 on WikiDiverse",
                    "bound.among_best_2 | bound.among_best_5 | bound.among_best_32",
                    ".3f",
                ),
            ),
        ),
    )


def share(results: Results) -> tuple[Table, ...]:
    """Return the table on what language models add to evidence."""
    place = "model_share/{row}"
    return (
        Table(
            "What small language models add to evidence: accuracy on mentions that evidence is not sure of, by "
            "language model and cards of the prompt; with length: of the name in tokens; with bias: log-prob of the "
            "name after an empty question.",
            (
                Column("mentions", f"{place}/mentions", "d"),
                Column("model alone", f"{place}/model alone"),
                Column("evidence alone", f"{place}/evidence/accuracy"),
                Column("both", f"{place}/evidence, log_prob/accuracy"),
                Column("with length", f"{place}/evidence, log_prob, length/accuracy"),
                Column("with bias", f"{place}/evidence, log_prob, bias/accuracy"),
            ),
            [(row, row) for row in results.read("model_share")],
        ),
    )


def models(results: Results) -> Table:
    """Return the table on other language models."""
    return Table(
        "Several language models on the same mentions, by the settings of the package and of the demo, with a feature "
        "mapper in closed form for each: the model alone, and the score of model and evidence.",
        (
            Column("mentions", "models/{row}/mentions", "d"),
            Column("model alone", "models/{row}/language_model"),
            Column("both", "models/{row}/combined"),
            Column("both, less the model alone", "models/{row}/difference", "s"),
            Column("rollouts, alone", "models/{row}/rollouts_language_model", ".2f"),
            Column("rollouts, both", "models/{row}/rollouts_combined", ".2f"),
        ),
        [(row, row) for row in sorted(results.read("models"), key=lambda row: row.partition(": ")[::-1])],
    )


def cards() -> tuple[Table | Facts, ...]:
    """Return the tables on the cards of prompts."""
    four = "num_demonstrations=4 num_cards=3 num_own_cards="
    of_wikidiverse = (
        ("8 demonstrations, 6 cards, 2 others (sample A)", "num_cards=6 num_own_cards=2 (200)"),
        ("8 demonstrations, entities among them (A)", "8 demonstrations, entities among them by their names (200)"),
        ("4 demonstrations, 3 cards (A)", f"{four}0, cards ask for names (200)"),
        ("the same, then the first of the pool (A)", f"{four}1, cards ask for names, first of the pool (200)"),
        (
            "the same, the first by the weights (B)",
            f"{four}1, cards ask for names, first by the weights (first 200 of 1656)",
        ),
        ("the same, cards ask for the surface form: the default (all of dev)", "zero_shot=0 (1656)"),
        ("the default, without any training mention (all of dev)", "zero_shot=1 (1656)"),
    )
    return (
        Table(
            "WikiDiverse dev, text only, the language model ranks alone. A and B are two samples.",
            (
                Column("mentions", "cards/{row}/mentions", "d"),
                Column("all", "cards/{row}/all"),
                *(Column(heading, f"cards/{{row}}/{kind}") for heading, kind in KINDS),
                Column("rollouts", "cards/{row}/rollouts", ".1f"),
                Column("prompt tokens", "cards/{row}/prompt_tokens", ".0f"),
            ),
            of_wikidiverse,
        ),
        Table(
            "Emoji with pictures, the demo's mapper. Without training mentions the knowledge base stands alone.",
            (
                Column("dev", "cards/emoji dev: {row} (80)/all"),
                Column("never seen in training", "cards/emoji test_unseen: {row} (100)/all"),
            ),
            (
                ("no cards", "num_cards=0 num_own_cards=0"),
                ("3 cards by the form, 1 own", "num_cards=3 num_own_cards=1"),
                ("3 by the form, 1 own; no training mentions", "zero_shot=1 num_cards=3 num_own_cards=1"),
                ("4 own; no training mentions", "zero_shot=1 num_cards=0 num_own_cards=4"),
                ("2 own; no training mentions", "zero_shot=1 num_cards=0 num_own_cards=2"),
            ),
        ),
    )


def ablations(results: Results) -> Iterator[Table]:
    """Return the tables on one change at a time."""
    mean = "ranked by the mean"
    others = {"beam search, 5 beams, mean": mean, f"16 demonstrations, {mean}": mean}
    what = {
        "wikidiverse": "WikiDiverse dev, text only: 8 demonstrations by surface form, the most similar last.",
        "emoji": "Emoji dev, text and picture: 2 demonstrations, one more for its picture, the demo's mapper.",
    }
    for corpus, text in what.items():
        if corpus == "emoji":
            others = others | {"random demonstrations": "none repeated for its picture"}
        yield Table(
            f"{text} `base` searches for the sum of log-probs and ranks by it; each row changes one thing.",
            (
                Column("accuracy", f"ablations/{corpus}/{{row}}/accuracy"),
                Compared("less base, or the row in brackets", f"ablations/{corpus}/{{row}}/right", "base", others),
                Column("certified", f"ablations/{corpus}/{{row}}/certified_share", ".1%"),
                Column("rollouts", f"ablations/{corpus}/{{row}}/rollouts", ".1f"),
                Column("prompt tokens", f"ablations/{corpus}/{{row}}/prompt_tokens", ".0f"),
            ),
            [(row, row) for row in results.read("ablations")[corpus]],
        )


def confidence() -> Table:
    """Return the tables on calibrated confidence and NIL."""
    return Table(
        "Each half of the surface forms of dev, judged by a calibration that was fitted on the other half. NIL: dev "
        "without a fifth of its entities; learnt from labels and a precision of 0.4 asked for where the language "
        "model ranked alone, without labels and 0.6 by evidence.",
        (
            Column("WikiDiverse by evidence", "calibration/wikidiverse_evidence/{row}"),
            Column("emoji by evidence", "calibration/emoji_evidence/{row}"),
            Column("WikiDiverse, the language model alone", "calibration/wikidiverse/{row}"),
            Column("emoji, the language model alone", "calibration/emoji/{row}"),
        ),
        (
            ("calibration error", "expected_calibration_error"),
            ("calibration error of the raw share", "raw_expected_calibration_error"),
            ("Brier score", "brier_score"),
            ("Brier score of the raw share", "raw_brier_score"),
            ("area under risk and coverage", "area_under_risk_coverage"),
            ("area of the raw share", "raw_area_under_risk_coverage"),
            ("NIL: area under the curve", "nil_auc"),
            ("NIL: precision", "nil_precision"),
            ("NIL: recall", "nil_recall"),
        ),
    )


def mapper(results: Results) -> tuple[Table | Facts, ...]:
    """Return the tables on the feature mapper and its training."""
    rows = ["text_only", "shuffled", "closed_form", "trained", "random_init_trained", "random_init_rate_2e-5"]
    splits = {"dev": "dev/", "test": "", "never seen in training": "test_unseen/"}
    return (
        Table(
            "Emoji: accuracy over all names, and among the entities of the surface form. `centroids` is no "
            "language model; `trained` is the mean of three seeds.",
            tuple(
                Column(f"{split}: {heading}", f"emoji_mapper/{place}{{row}}/{key}")
                for split, place in splits.items()
                for heading, key in (("all names", "accuracy_all"), ("form's entities", "accuracy_surface_form"))
            ),
            [(row.replace("_", " "), row) for row in (*rows, "centroids")],
        ),
        Table(
            "One setting of training at a time: 24 steps of 8 mentions, one seed; accuracy over all names on 300 "
            "mentions of dev.",
            (
                Column("accuracy", "mapper_ablation/{row}/accuracy_all"),
                Compared("less base", "mapper_ablation/{row}/right", "base", {}),
                Column("loss", "mapper_ablation/{row}/loss"),
            ),
            [(row, row) for row in results.read("mapper_ablation")],
        ),
        Table(
            "A training step over the plain loop, in mentions a second; bfloat16 on AMX.",
            (
                Column("times faster", "training_speed/{row}/ratio", ".1f"),
                Column("mentions/s", "training_speed/{row}/mentions_per_s", ".2f"),
                Column("share of the matrix-multiply limit", "training_speed/{row}/share_of_matmul_limit", ".0%"),
            ),
            (("2 demonstrations", "emoji"), ("16 demonstrations", "16_demonstrations")),
        ),
    )
