"""Tables of results on decoding, speed and sizes."""

from __future__ import annotations

from figures import Results
from sizing import NUMBERS_OF_GPUS
from tables import Column, Facts, Table


def decoding(results: Results) -> tuple[Table | Facts, ...]:
    """Return the tables on the search, by names, rows and budget."""
    names = [("10,000", "10000"), ("100,000", "100000"), ("1 million", "1000000"), ("5.9 million", "all")]
    settings = [key for key in results.read("wikidiverse") if key != "baseline_without_model"]
    return (
        Facts(
            "500 mentions of WikiDiverse dev, float32. The floor is the cost of reading every prompt once.",
            "decode",
            (
                ("accuracy, ranked by the mean", "accuracy", ".3f"),
                ("certified", "certified_share", ".1%"),
                ("rollouts per mention", "rollouts_per_mention", ".2f"),
                ("time over the floor", "time_over_floor", ".2f"),
                (
                    "time of the paper's loop (transformers, 5 beams, batch 1) over ours",
                    "speedup_over_paper_loop",
                    ".1f",
                ),
                (
                    "time of transformers in batches of 8, prompts read once, over ours",
                    "speedup_over_best_transformers",
                    ".1f",
                ),
                (
                    "accuracy on 200 mentions: ours, the paper's loop, batches",
                    "accuracy_ours_paired | accuracy_paper_loop | accuracy_best_transformers",
                    ".3f",
                ),
                ("score of model and evidence, 200 mentions: time over its floor", "score_time_over_floor", ".2f"),
                ("5.9M names, ranked by the sum: time over the floor", "union_time_over_floor", ".2f"),
                ("5.9M names, ranked by the sum: accuracy", "union_accuracy", ".3f"),
                ("5.9M names, ranked by the sum: certified", "union_certified_share", ".1%"),
                ("time of a random order over the sorted one, common surface forms", "zipf_gain_from_ordering", ".2f"),
                (
                    "certified answers that brute force over all names has, too",
                    "certified_answers_equal_to_brute_force",
                    "s",
                ),
                ("bytes per name of a trie of 5.9M names", "trie_bytes_per_name", ".1f"),
                ("seconds to build it", "trie_build_seconds", ".0f"),
                ("milliseconds to open it", "trie_open_milliseconds", ".0f"),
                ("seconds to build its knowledge base", "knowledge_base_build_seconds", ".0f"),
                ("GiB of memory for that", "trie_build_peak_gib", ".1f"),
                ("milliseconds for a mask of 320 rows on a CPU, with log-probs", "trie_mask_milliseconds_320", ".0f"),
            ),
        ),
        Table(
            "The number of names: 60 mentions, `search.ranking` of the mean.",
            (
                Column("time over the floor", "scaling/names_{row}/time_over_floor", ".2f"),
                Column("rollouts", "scaling/names_{row}/rollouts_per_mention", ".1f"),
                Column("certified", "scaling/names_{row}/certified_share", ".1%"),
            ),
            names,
        ),
        Table(
            "The number of rows: a whole job with a tiny model.",
            (
                Column("seconds", "scaling/rows_{row}/seconds", ".0f"),
                Column("seconds of generation", "scaling/rows_{row}/generation_seconds", ".0f"),
                Column("GiB of memory", "scaling/rows_{row}/peak_gib", ".1f"),
            ),
            [("1,000 rows", "1000"), ("5,000 rows", "5000"), ("20,000 rows", "20000")],
        ),
        Table(
            "The budget of the search (`search.max_rollouts`), ranked by the objective.",
            tuple(
                Column(f"{objective}: {heading}", f"decode/budgets_{objective}/{{row}}/{key}", layout)
                for objective in ("sum", "mean")
                for heading, key, layout in (
                    ("accuracy", "accuracy", ".3f"),
                    ("certified", "certified_share", ".1%"),
                    ("rollouts", "rollouts_per_mention", ".2f"),
                )
            ),
            [(str(row["max_rollouts"]), str(i)) for i, row in enumerate(results.look_up("decode/budgets_sum")[0])],
        ),
        Table(
            "Demonstrations and terminator: 300 mentions of WikiDiverse dev, ranked by the sum.",
            (
                Column("accuracy", "wikidiverse/{row}/accuracy"),
                Column("certified", "wikidiverse/{row}/certified_share", ".1%"),
                Column("rollouts", "wikidiverse/{row}/rollouts_per_mention", ".1f"),
                Column("cache hits", "wikidiverse/{row}/prefix_cache_hit_rate", ".1%"),
            ),
            [
                ("no model", "baseline_without_model"),
                *((key.replace("_", " "), key) for key in sorted(settings, key=lambda key: (int(key[0]), key))),
            ],
        ),
    )


def finding() -> tuple[Table, ...]:
    """Return the tables on finding mentions."""
    measures = ("precision", "recall", "F1")
    return (
        Table(
            "Mentions by dictionary, WikiDiverse dev, chosen on train.",
            tuple(Column(name, f"finding/dev/{{row}}/{name.lower()}") for name in measures),
            (
                ("defaults", "defaults"),
                ("without the filter", "no filter"),
                ("names alone, without demonstrations", "names alone"),
                ("forms of demonstrations alone, without names", "training forms alone"),
                ("defaults, and the right entity by a lookup", "defaults, place and entity"),
            ),
        ),
        Table(
            "Captions of WikiDiverse dev, found and linked from end to end with `score.risk = 0.03`.",
            tuple(Column(name, f"finding/linked/{{row}}/{name.lower()}") for name in measures),
            (("right place", "place"), ("right place and right entity", "place and entity")),
        ),
    )


def candidates() -> Facts:
    """Return the tables on the candidate pool."""
    return Facts(
        "The candidate pool of an evidence index.",
        "evidence",
        (
            ("gold in the pool, WikiDiverse dev", "pool_recall", ".3f"),
            ("gold in the pool, beside 5.9M names", "pool_recall_union", ".3f"),
            ("the same without embeddings of entities", "pool_recall_union_without_entity_embeddings", ".3f"),
            ("bytes per entity, names alone", "bytes_per_entity", ".0f"),
            ("milliseconds per mention: median; 99th percentile", "query_ms_median | query_ms_p99", ".2f"),
            ("names embedded per second", "dense.embedding/names_per_s", ",d"),
            ("hours to embed 5.9M names, from that", "dense.embedding/hours_of_all", ".1f"),
            *(
                (heading, f"dense.names/{key} | dense.synthetic/{key}", layout)
                for heading, key, layout in (
                    ("compressed index of 500,000 names; of 5.9M vectors: seconds to build", "build_seconds", ".0f"),
                    ("bytes per vector", "bytes_per_vector", ".0f"),
                    ("milliseconds per query, median", "query_ms_median", ".1f"),
                    ("the nearest vector is among 32 found", "recall_of_nearest", ".3f"),
                    ("the ten nearest are", "recall_of_nearest_10", ".3f"),
                )
            ),
        ),
    )


def speed() -> tuple[Table | Facts, ...]:
    """Return the tables on speed of single parts."""
    return (
        Facts(
            "The host's share of a rollout with a prompt of 840 tokens.",
            "hostcost",
            (
                ("milliseconds, with pictures", "picture_840x4096_ms", ".1f"),
                ("the same before blocks had our own keys", "picture_840x4096_before_ms", ".1f"),
                ("milliseconds, text alone", "text_840_ms", ".1f"),
            ),
        ),
        Facts(
            "The mention encoder: batches that give an embedding the same bits in any company.",
            "encoders",
            (
                ("surface forms a second", "mention_encoder/forms_per_s", ".0f"),
                ("times faster than before", "mention_encoder/ratio", ".2f"),
            ),
        ),
    )


def start(results: Results) -> tuple[Table, ...]:
    """Return the tables on the start of a run and on a steady minute."""
    steps, steady = (results.look_up(f"startup/{name}")[0] for name in ("profile", "steady"))
    return (
        Table(
            "Seconds from the shell until a command has done its work, at an earlier commit and now.",
            (
                Column("before", "startup/{row}/before", ".1f"),
                Column("now", "startup/{row}/after", ".1f"),
                Column("times faster", "startup/{row}/ratio", ".1f"),
            ),
            (
                ("`gemel --help`", "help_s"),
                ("`gemel link --dry-run`, nothing remembered", "dry_run_first_s"),
                ("`gemel link --dry-run`, again", "dry_run_s"),
                ("100 rows of text", "text_100_rows_s"),
                ("100 rows with pictures", "pictures_100_rows_s"),
                ("a finished run again", "rerun_s"),
            ),
        ),
        Table(
            "The 100 rows of text, step by step: seconds since the command.",
            (Column("seconds", "startup/profile/{row}", ".1f"),),
            [(name, name) for name in steps],
        ),
        Table(
            "A steady minute of linking, text only: share of each part.",
            (Column("share", "startup/steady/{row}", ".1%"),),
            [(name, name) for name in steady if name != "seconds"],
        ),
    )


def runs() -> tuple[Table | Facts, ...]:
    """Return the tables on whole runs."""
    return (
        Facts(
            "Runs whose processes are killed at random, compared row by row with an undisturbed one.",
            "chaos",
            (
                ("runs; kills", "runs | kills", "d"),
                ("rows lost; doubled; changed", "rows_lost | rows_twice | rows_different", "d"),
                ("innocent rows called poison", "innocent_poison", "d"),
            ),
        ),
        Facts(
            "The linking job beside a plain Ray Data pipeline of the same stages.",
            "overhead",
            (
                ("192 rows with pictures: time more", "pictures_overhead", "+.1%"),
                ("192 rows without, which are sorted: time more", "no_pictures_overhead", "+.1%"),
                ("seconds of checks before", "pictures_check_seconds", ".0f"),
            ),
        ),
        Table(
            "A finished run of 100 rows carried on with a changed knowledge base (`previous`).",
            (
                Column("rollouts", "relink/{row}/rollouts", "d"),
                Column("in full", "relink/{row}/rollouts_in_full", "d"),
                Column("seconds of generation", "relink/{row}/generation_seconds", ".0f"),
                Column("in full", "relink/{row}/generation_seconds_in_full", ".0f"),
                Column("certified in both", "relink/{row}/certified_in_both", "d"),
                Column("equal of these", "relink/{row}/equal_of_these", "d"),
            ),
            (
                ("one in a hundred retired", "retired"),
                ("one in a hundred added, renamed and retired each", "added_renamed_retired"),
            ),
        ),
        Facts(
            "`gemel plan`: a sample of 99 of 1,000 rows, beside the run.",
            "plan",
            (
                ("seconds predicted; taken", "compared/seconds_predicted | compared/seconds_actual", ",.0f"),
                ("95% interval", "compared/seconds_interval/0 | compared/seconds_interval/1", ",.0f"),
                ("tokens computed, predicted over taken", "compared/computed_tokens_per_row_ratio", ".2f"),
                ("the same from rows drawn singly", "compared/computed_tokens_per_row_ratio_single_rows", ".2f"),
            ),
        ),
    )


def sizing(results: Results) -> tuple[Table | Facts, ...]:
    """Return the tables on sizes on paper."""
    costs = "on_paper/costs/{row}"
    computed, teraflop, mentions, with_evidence = (
        (" | ".join(f"{costs}/{key.format(case)}" for case in ("distinct", "shared")), layout)
        for key, layout in (
            ("tokens_computed_{}", ".0f"),
            ("teraflop_{}", ".1f"),
            ("mentions_per_second_{}", ".0f"),
            ("mentions_per_second_{}_cascade", ".0f"),
        )
    )
    many = (
        ("mentions/s", "mentions_per_second", ",.0f"),
        ("GB/s read", "gigabytes_read_per_second", ".1f"),
        ("cores for pictures", "cores_for_pictures", ".0f"),
        ("hours for 100M, forms shared", "hours_for_100m_shared", ".1f"),
    )
    names = results.look_up("on_paper/costs")[0]
    return (
        Table(
            "On paper: no GPU was used. A GPU is assumed to reach 40% of its vendor's rate. *Distinct*: no surface "
            "form comes twice; *shared*: all forms are common; *with evidence*: it decides as many alone as on "
            "WikiDiverse dev.",
            (
                Column("tokens of a prompt", f"{costs}/prompt_tokens", ".0f"),
                Column("computed, distinct / shared", *computed),
                Column("TFLOP a mention", *teraflop),
                Column("mentions/s a GPU", *mentions),
                Column("the same with evidence", *with_evidence),
                Column("searches/s that one host thread submits", f"{costs}/searches_per_second_host", ".0f"),
                Column("tokens in the cache", f"{costs}/kv_tokens", ",.0f"),
            ),
            [(name, name) for name in names],
        ),
        Table(
            "Many GPUs, forms shared.",
            tuple(Column(heading, f"{costs}/{key}", layout) for heading, key, layout in many),
            [
                (f"{name}, {number} GPUs", f"{name}/many/{place}")
                for name in names
                for place, number in enumerate(NUMBERS_OF_GPUS)
            ],
        ),
        Facts(
            "A pipeline of actors that wait as long as a GPU would take.",
            "sizing",
            (
                ("actors", "pipeline/actors", "d"),
                ("rows/s; possible", "pipeline/rows_per_second | pipeline/possible", ",.0f"),
            ),
        ),
    )
