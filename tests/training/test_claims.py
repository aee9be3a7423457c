"""Claims are read strictly, judged by the documented rule, and shown as they were recorded."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from training.errors import UserError
from training.evaluation.claims_file import load_claims
from training.evaluation.launch import judging_seeds, plan
from training.evaluation.reproduce import curves, record_run, spaced, thinned, to_text
from training.evaluation.tables import stale_results, stale_tables, update_tables
from training.evaluation.verdicts import RunOutcome, failures, judge_all, lookup

PAPER: dict[str, Any] = {
    "title": "A fake paper",
    "paper": {"title": "A fake paper, at length", "year": 2024, "arxiv": "2401.00010"},
    "about": "what it is about",
    "runs": {
        "main": {"experiment": "quickstart/stdlib", "seeds": 3},
        "shuffled": {
            "experiment": "quickstart/stdlib",
            "overrides": ["data.shuffle_bytes=true"],
            "scales": {"h200": {"seeds": 2, "overrides": ["loop.steps=7"]}},
        },
    },
    "claims": [
        {
            "id": "beats_order_2",
            "statement": "the model beats an order-2 model",
            "published": {"value": 1.5, "unit": "bits per byte", "source": "Table 1"},
            "run": "main",
            "metric": "eval/bpb",
            "minus": "floors/seen/order_2",
            "direction": "below",
            "threshold": {"cpu": -0.1, "h200": -0.3},
            "chance": 0.0,
            "floors": ["floors/seen/order_2"],
            "ceilings": [{"run": "shuffled", "metric": "eval/bpb"}],
            "controls": [
                {
                    "id": "shuffled_bytes",
                    "statement": "on shuffled bytes it is no better than order 0",
                    "run": "shuffled",
                    "metric": "eval/bpb",
                    "minus": "floors/seen/order_0",
                    "direction": "above",
                    "threshold": {"cpu": -0.05, "h200": -0.05},
                }
            ],
            "reason": "the model is too small",
        }
    ],
}


def write_paper(root: Path, tree: dict[str, Any]) -> Path:
    """A checkout with one paper; returns its experiments folder."""
    folder = root / "experiments" / "fake"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.yaml").write_text(OmegaConf.to_yaml(tree))
    return folder.parent


def changed(**keys: Any) -> dict[str, Any]:
    """PAPER with keys of its claim replaced."""
    tree = copy.deepcopy(PAPER)
    tree["claims"][0] |= keys
    return tree


def results(bpb: float, order_2: float = 3.0, order_0: float = 5.0) -> dict[str, Any]:
    floors = {"seen/order_0": order_0, "seen/order_2": order_2}
    return {"metrics": {"eval/bpb": bpb}, "floors": floors, "sample": "def"}


def verdict(
    root: Path, tree: dict[str, Any], main: list[float], shuffled: float = 5.0, scale: str = "cpu"
) -> dict[str, Any]:
    """The record of the paper's only claim for these bits per byte."""
    claims = load_claims("fake", write_paper(root, tree))
    outcomes = {
        "main": RunOutcome([results(value) for value in main]),
        "shuffled": RunOutcome([results(shuffled)]),
    }
    return judge_all(claims, scale, outcomes)[0]


@pytest.mark.parametrize(
    ("main", "shuffled", "expected", "because"),
    [
        ([2.5, 2.51, 2.49], 5.0, "reproduced", None),
        ([2.5], 5.0, "reproduced", None),
        ([2.95, 2.951, 2.949], 5.0, "direction only", "not below the threshold"),
        ([2.95], 5.0, "not reproduced", "not below the threshold"),
        ([1.0, 3.0, 4.5], 5.0, "not reproduced", "not clear of chance"),
        ([3.4, 3.41, 3.39], 5.0, "not reproduced", "not clear of chance"),
        ([2.5, 2.51, 2.49], 4.0, "not reproduced", "the control does not hold: shuffled_bytes"),
        ([2.5, 2.51, 2.49], math.nan, "not reproduced", "the control does not hold"),
        ([2.5, math.nan, 2.49], 5.0, "not reproduced", "not finite"),
        ([2.5, -math.inf, 2.49], 5.0, "not reproduced", "not finite"),
    ],
)
def test_every_verdict(
    tmp_path: Path, main: list[float], shuffled: float, expected: str, because: str | None
) -> None:
    record = verdict(tmp_path, PAPER, main, shuffled)
    assert record["verdict"] == expected
    assert because in (record["because"] or "") if because else record["because"] is None
    assert failures([record]) == ([] if expected == "reproduced" else ["beats_order_2"])
    assert record["reason"] == (None if expected == "reproduced" else "the model is too small")


def test_without_chance_a_missed_threshold_is_not_reproduced(tmp_path: Path) -> None:
    assert verdict(tmp_path, changed(chance=None), [2.95, 2.951])["verdict"] == "not reproduced"


def test_not_run(tmp_path: Path) -> None:
    """No threshold at the scale is no failure; a run that did not finish is one."""
    claims = load_claims("fake", write_paper(tmp_path, PAPER))
    outcomes = {"main": RunOutcome([results(2.5)]), "shuffled": RunOutcome(failure="out of memory")}
    unjudged = judge_all(claims, "paper", {})
    assert unjudged[0]["verdict"] == "not run"
    assert failures(unjudged) == []
    crashed = judge_all(claims, "cpu", outcomes)
    assert crashed[0]["verdict"] == "not run"
    assert "`shuffled` did not finish: out of memory" in crashed[0]["because"]
    assert failures(crashed) == ["beats_order_2"]


def test_within_is_an_equivalence_claim(tmp_path: Path) -> None:
    tree = changed(direction="within", chance=None, threshold={"cpu": 0.1}, controls=[])
    assert verdict(tmp_path, tree, [3.05, 3.04, 3.06])["verdict"] == "reproduced"
    assert verdict(tmp_path, tree, [2.95, 2.94, 2.96])["verdict"] == "reproduced"
    assert verdict(tmp_path, tree, [2.0, 3.0, 4.0])["verdict"] == "direction only"  # noise
    assert verdict(tmp_path, tree, [3.5, 3.51, 3.49])["verdict"] == "not reproduced"


def test_wins_count_groups_of_the_same_data(tmp_path: Path) -> None:
    ref = {"run": "shuffled", "metric": "groups"}
    tree = changed(
        metric="groups", minus=ref, wins=True, direction="above", chance=0.5,
        threshold={"cpu": 0.9}, floors=[], ceilings=[], controls=[],
    )  # fmt: skip
    claims = load_claims("fake", write_paper(tmp_path, tree))

    def judged(*seeds: list[float]) -> dict[str, Any]:
        main = RunOutcome([{**results(1.0), "groups": values} for values in seeds])
        other = RunOutcome([{**results(1.0), "groups": [2.0] * 10} for _ in seeds])
        return judge_all(claims, "cpu", {"main": main, "shuffled": other})[0]

    record = judged([1.0] * 10, [1.0] * 9 + [3.0], [1.0] * 9 + [2.0])
    assert record["values"] == [1.0, 0.9, 0.9] and record["verdict"] == "reproduced"
    assert judged([1.0] * 4 + [3.0] * 6)["verdict"] == "not reproduced"
    with pytest.raises(UserError, match="3 and 10 groups cannot be paired"):
        judged([1.0] * 3)
    with pytest.raises(UserError, match="no list `groups`"):
        judge_all(claims, "cpu", {name: RunOutcome([results(1.0)]) for name in claims.runs})


def test_runs_are_paired_by_seed(tmp_path: Path) -> None:
    """Noise that both runs share cancels; an unpaired difference would drown."""
    tree = changed(minus={"run": "shuffled", "metric": "eval/bpb"}, controls=[])
    claims = load_claims("fake", write_paper(tmp_path, tree))
    noise = [1.0, 3.0, 8.0, 20.0]
    outcomes = {
        "main": RunOutcome([results(x - 0.2) for x in noise[:3]]),
        "shuffled": RunOutcome([results(x) for x in noise]),
    }
    record = judge_all(claims, "cpu", outcomes)[0]
    assert record["values"] == pytest.approx([-0.2] * 3)
    assert record["verdict"] == "reproduced"
    outcomes["shuffled"].results.reverse()
    assert judge_all(claims, "cpu", outcomes)[0]["verdict"] == "not reproduced"


def test_minus_a_number(tmp_path: Path) -> None:
    tree = changed(minus=2, direction="above", threshold={"cpu": 0.25}, chance=0, controls=[])
    assert verdict(tmp_path, tree, [2.5, 2.51])["values"] == pytest.approx([0.5, 0.51])


def test_lookup() -> None:
    tree = {**results(2.0), "data": {"name": "stdlib", "a/b": {"c": 1}}}
    assert lookup(tree, "eval/bpb") == 2.0
    assert lookup(tree, "metrics/eval/bpb") == 2.0
    assert lookup(tree, "floors/seen/order_2") == 3.0
    assert lookup(tree, "data/a/b/c") == 1
    assert lookup(tree, "floors/seen") is None


def test_a_metric_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"beats_order_2.*`eval/bpp`.*Did you mean eval/bpb"):
        verdict(tmp_path, changed(metric="eval/bpp"), [2.5])
    with pytest.raises(UserError, match="is no number"):
        verdict(tmp_path, changed(metric="sample"), [2.5])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"thresold": 1}, r"claim beats_order_2: there is no key `thresold`.*mean threshold"),
        ({"statement": None}, r"`statement` must be text, not None"),
        ({"published": {"value": 1, "unit": "nats"}}, r"`published`: the key `source` is missing"),
        ({"run": "man"}, r"there is no run `man`. Did you mean main"),
        ({"direction": "belwo"}, r"there is no direction `belwo`. Did you mean below"),
        ({"threshold": {"cpu": "low"}}, r"`threshold.cpu` must be a number, not 'low'"),
        ({"threshold": {"cpu": True}}, r"`threshold.cpu` must be a number, not True"),
        ({"threshold": {"gpu": 1}}, r"`threshold`: there is no scale `gpu`"),
        ({"threshold": {}}, r"`threshold` is empty"),
        ({"threshold": {"cpu": 0.1}}, r"is met by chance itself"),
        ({"threshold": {"paper": -1}}, r"shuffled_bytes: `threshold` lacks the claim's paper"),
        ({"direction": "within"}, r"`threshold.cpu`=-0.1 cannot judge within"),
        ({"floors": [{"run": "main"}]}, r"`floors`: the key `metric` is missing"),
        ({"minus": ["a"]}, r"`minus` must be a mapping"),
        ({"id": "Beats"}, r"`id` must be lower-case"),
        ({"controls": [], "ceilings": []}, r"no claim reads the run `shuffled`"),
        ({"reason": {"cpu": 3}}, r"`reason`.cpu must be text"),
    ],
)
def test_strictness_of_claims(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_claims("fake", write_paper(tmp_path, changed(**keys)))
    assert str(error.value).startswith("experiments/fake/claims.yaml")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("titel", "x", r"claims.yaml: there is no key `titel`. Did you mean title"),
        ("paper.arxiv", 2401.0001, r"`paper`: `arxiv` must be text.*quotes"),
        ("runs.main.seeds", 0, r"run main: `seeds` must be at least 1"),
        ("runs.main.alone", "yes", r"run main: `alone` must be true or false, not 'yes'"),
        ("names", {"gpu": {"trained": 1}}, r"`names`: there is no scale `gpu`"),
        ("names", {"cpu": {"trained": [1]}}, r"names.cpu.trained must be a number or text"),
        ("names", {"cpu": 3}, r"names.cpu must be a mapping"),
        ("shows", ["film"], r"`shows`: `film` must be a run and one of its figures, run/figure"),
        ("shows", ["main/../film"], r"`main/../film` must be a run and one of its figures"),
        ("shows", ["mian/film"], r"there is no run `mian`. Did you mean main"),
        ("runs.main.overrides", ["seed=3"], r"`seed=3`: the protocol sets that key"),
        ("runs.main.overrides", ["loop.steps"], r"expected key=value"),
        ("runs.main.scales", {"gpu": {}}, r"run main: `scales`: there is no scale `gpu`"),
    ],
)
def test_strictness_of_papers(tmp_path: Path, path: str, value: Any, message: str) -> None:
    tree = OmegaConf.create(PAPER)
    OmegaConf.update(tree, path, value, force_add=True)
    with pytest.raises(UserError, match=message):
        load_claims("fake", write_paper(tmp_path, OmegaConf.to_container(tree)))  # type: ignore


def test_a_run_may_begin_from_one_above_it(tmp_path: Path) -> None:
    tree = copy.deepcopy(PAPER)
    tree["runs"] = {
        "world": {"experiment": "quickstart/stdlib", "seeds": 3},
        "main": {"experiment": "quickstart/stdlib", "overrides": ["x=<run:world>"], "seeds": 3},
        "shuffled": {"experiment": "quickstart/stdlib"},
    }
    claims = load_claims("fake", write_paper(tmp_path, tree))
    assert claims.needed("cpu") == ["world", "main", "shuffled"]
    for path, value, says in (
        ("main.overrides", ["x=<run:shuffled>"], r"`<run:shuffled>` must name a run above it"),
        ("main.overrides", ["x=<run:main>"], r"`<run:main>` must name a run above it"),
        ("world.alone", True, r"`<run:world>` is made alone, after all others"),
        ("world.seeds", 2, r"has 3 seeds at cpu, and `<run:world>` only 2"),
    ):
        other = OmegaConf.create(tree)
        OmegaConf.update(other, f"runs.{path}", value, force_add=True)
        with pytest.raises(UserError, match=says):
            load_claims("fake", write_paper(tmp_path, OmegaConf.to_container(other)))  # type: ignore


def test_repeated_ids_and_keys(tmp_path: Path) -> None:
    tree = copy.deepcopy(PAPER)
    tree["claims"] *= 2
    with pytest.raises(UserError, match="`beats_order_2` is given twice"):
        load_claims("fake", write_paper(tmp_path, tree))
    file = write_paper(tmp_path, PAPER) / "fake" / "claims.yaml"
    file.write_text(file.read_text() + "about: again\n")
    with pytest.raises(UserError, match=r"duplicate key about"):
        load_claims("fake", file.parent.parent)
    with pytest.raises(UserError, match=r"no paper `fakee`. Did you mean fake"):
        load_claims("fakee", file.parent.parent)


def test_scales_replace_seeds_and_add_overrides(tmp_path: Path) -> None:
    claims = load_claims("fake", write_paper(tmp_path, PAPER))
    spec = claims.runs["shuffled"]
    assert spec.at("cpu") == (1, ("data.shuffle_bytes=true",))
    assert spec.at("h200") == (2, ("data.shuffle_bytes=true", "loop.steps=7"))
    assert claims.scales() == ["cpu", "h200"]
    assert claims.needed("cpu") == ["main", "shuffled"]
    assert claims.needed("paper") == []


def test_names_stand_for_what_a_scale_says(tmp_path: Path) -> None:
    tree = changed(metric="reading/<trained>/loss", minus="reading/<long>/loss")
    tree["claims"][0]["ceilings"] = [{"run": "shuffled", "metric": "reading/<trained>/loss"}]
    tree["runs"]["shuffled"]["overrides"] = ["data.seq_len=<trained>"]
    tree["names"] = {"cpu": {"trained": 256, "long": 1024}, "h200": {"trained": 8192, "long": "x"}}
    claims = load_claims("fake", write_paper(tmp_path, tree))
    cpu, h200 = claims.at("cpu"), claims.at("h200")
    assert [ref.metric for ref in cpu.claims[0].refs()] == ["reading/256/loss", "reading/1024/loss"]
    assert cpu.claims[0].ceilings[0].metric == "reading/256/loss"
    assert h200.claims[0].refs()[1].metric == "reading/x/loss"
    assert h200.runs["shuffled"].at("h200")[1] == ("data.seq_len=8192", "loop.steps=7")
    assert cpu.claims[0].direction is claims.claims[0].direction
    del tree["names"]["h200"]["long"]
    with pytest.raises(UserError, match=r"names\.h200 has no `long`, which `reading/<long>/loss`"):
        load_claims("fake", write_paper(tmp_path, tree))


def test_judging_seeds_are_fresh_and_fixed() -> None:
    seeds = judging_seeds("quickstart", 200)
    assert len(set(seeds)) == 200
    assert all(1000 <= seed < 2**31 for seed in seeds)  # never a pilot seed, 0..99
    assert judging_seeds("quickstart", 5) == seeds[:5]
    assert not set(seeds) & set(judging_seeds("another", 200))


def test_curves_are_thinned() -> None:
    rows = [{"step": s, "train/loss": 1.0} for s in range(1, 501)]
    rows += [{"step": s, "eval/bpb": 2.0} for s in range(100, 501, 100)]
    kept = thinned(sorted(rows, key=lambda row: row["step"]), 60)
    assert len(kept) <= 60
    assert [row["step"] for row in kept if "eval/bpb" in row] == [100, 200, 300, 400, 500]
    assert kept[-1] == {"step": 500, "train/loss": 1.0, "eval/bpb": 2.0}
    assert spaced([1, 2, 3], 1) == [3]


def test_a_single_measurement_is_final_and_no_curve(tmp_path: Path, monkeypatch) -> None:
    claims = load_claims("fake", write_paper(tmp_path, PAPER))
    runs = [run for run in plan(claims, "cpu") if run.name == "main"]
    rows = [{"step": s, "train/loss": 1.0} for s in (1, 2)] + [{"step": 2, "eval/bpb": 2.5}]
    monkeypatch.setattr("training.evaluation.reproduce.read_rows", lambda path: rows)
    assert all(set(curve) == {"step", "train/loss"} for curve in curves(runs, 60)["main"])
    found = record_run(claims, "cpu", runs, RunOutcome([{"metrics": {"eval/bpb": 2.5}}, {}]))
    assert found["final"] == {"eval/bpb": [2.5, None]}


def test_results_text_is_json_with_flat_lists() -> None:
    value = {"values": [1.5, None, -2e-05], "names": ["a [\n 1\n]", "b"], "none": []}
    text = to_text(value)
    assert json.loads(text) == value
    assert '"values": [1.5, null, -2e-05]' in text


def recorded(root: Path) -> Path:
    """A checkout with READMEs and recorded results; returns the results file."""
    experiments = write_paper(root, PAPER)
    claims = load_claims("fake", experiments)
    outcomes = {
        "main": RunOutcome([results(2.5), results(2.51)]),
        "shuffled": RunOutcome([results(5.0)]),
    }
    runs = {
        name: {
            "experiment": spec.experiment,
            "overrides": list(spec.at("cpu")[1]),
            "commits": ["0123456789abcdef"],
            "parameters": 1_000_000,
        }
        for name, spec in claims.runs.items()
    }
    whole = {
        "paper": "fake",
        "scale": "cpu",
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-01-02T03:04:05Z",
        "hardware": {"cpus": 2, "cpu": "a processor"},
        "versions": {},
        "wall_s": 61.0,
        "seeds": [1, 2],
        "runs": runs,
        "claims": judge_all(claims, "cpu", outcomes),
    }
    file = experiments / "fake" / "results" / "cpu.json"
    file.parent.mkdir()
    file.write_text(to_text(whole))
    (root / "README.md").write_text("a\n<!-- generated:papers -->\n<!-- /generated -->\nb\n")
    readme = experiments / "fake" / "README.md"
    readme.write_text("c\n<!-- generated:results -->old<!-- /generated -->\nd\n")
    return file


def test_tables_are_generated_idempotent_and_guarded(tmp_path: Path) -> None:
    file = recorded(tmp_path)
    readmes = [tmp_path / "README.md", tmp_path / "experiments" / "fake" / "README.md"]
    assert update_tables(tmp_path) == readmes
    assert update_tables(tmp_path) == stale_tables(tmp_path) == []
    top, paper = (readme.read_text() for readme in readmes)
    assert top.startswith("a\n") and top.endswith("<!-- /generated -->\nb\n")
    assert "[A fake paper](experiments/fake/README.md) (2024, [arXiv:2401.00010]" in top
    assert "| 1 reproduced | not run | not run |" in top
    assert "eval/bpb - floors/seen/order_2 = -0.495 [" in paper and "≤ -0.1" in paper
    assert "holds: on shuffled bytes" in paper and "1.5 bits per byte (Table 1)" in paper
    assert "Not run by us." in paper and "1:01 for all runs; 2 x a processor" in paper
    tree = json.loads(file.read_text())
    tree["claims"][0]["mean"] = -0.496
    file.write_text(json.dumps(tree))
    assert stale_tables(tmp_path) == readmes[1:]


def test_an_unclosed_marker_is_an_error(tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "README.md").write_text("<!-- generated:papers -->\n")
    with pytest.raises(UserError, match="is not closed by"):
        update_tables(tmp_path)


def test_changing_a_claim_after_judging_is_noticed(tmp_path: Path) -> None:
    recorded(tmp_path)
    assert stale_results(tmp_path) == []
    for tree in (
        changed(threshold={"cpu": -0.4, "h200": -0.4}),
        changed(statement="another"),
        changed(controls=[]),
        changed(id="renamed"),
    ):
        write_paper(tmp_path, tree)
        assert len(stale_results(tmp_path)) == 1
    tree = copy.deepcopy(PAPER)
    tree["runs"]["main"]["overrides"] = ["loop.steps=3"]
    write_paper(tmp_path, tree)
    assert "(run main)" in stale_results(tmp_path)[0]
