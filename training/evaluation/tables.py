"""Tables that are generated from claims.yaml and results/<scale>.json, never typed.

    README.md                        between <!-- generated:papers --> and <!-- /generated -->
    experiments/<paper>/README.md    between <!-- generated:results --> and <!-- /generated -->
                                     generated:layers, generated:recall and generated:worlds,
                                     several papers' runs;
                                     generated:memories, a table of one run's memories
    experiments/kernels/README.md    generated:audit, generated:parity, generated:bench, from what
                                     those commands recorded

A test fails when a README differs from what its results say (`stale_tables`), or when results were
judged by other claims than claims.yaml has now (`stale_results`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.evaluation import layer_tables, memory_tables, world_tables
from training.evaluation.claims import ROOT, SCALES, Claim, Direction, PaperClaims, RunSpec
from training.evaluation.claims_file import load_claims, papers
from training.evaluation.markdown import table
from training.evaluation.verdicts import Verdict, described
from training.files import write_atomic
from training.logging import clock, human
from training.run_directory import plain

END = "<!-- /generated -->"
SIGNS = {Direction.below: "≤", Direction.above: "≥", Direction.within: "within ±"}
DESCRIBED = ("id", "statement", "run", "metric", "minus", "direction", "threshold")
Record = Mapping[str, Any]


def update_tables(root: Path = ROOT) -> list[Path]:
    """Regenerate every table below `root`; returns the files that changed."""
    changed = [(file, text) for file, text in rendered(root) if file.read_text() != text]
    for file, text in changed:
        write_atomic(file, text)
    return [file for file, _ in changed]


def stale_tables(root: Path = ROOT) -> list[Path]:
    """READMEs whose tables differ from what the results say."""
    return [file for file, text in rendered(root) if file.read_text() != text]


def rendered(root: Path) -> list[tuple[Path, str]]:
    """Every README that exists, with its text as it should be."""
    experiments = root / "experiments"
    every = [load_claims(paper, experiments) for paper in papers(experiments)]
    writers: list[tuple[Path, str, Callable[[], str]]] = [
        (root / "README.md", "papers", lambda: papers_table(every))
    ]
    for claims in every:
        file = claims.file.parent / "README.md"
        writers.append((file, "results", lambda claims=claims: results_section(claims)))
    found = [
        (file, with_section(file, file.read_text(), kind, write))
        for file, kind, write in writers
        if file.exists()
    ]
    found = [(file, with_layers(file, text)) for file, text in found]
    kernels = experiments / "kernels" / "README.md"
    return [*found, (kernels, kernels_page(kernels))] if kernels.exists() else found


def with_layers(file: Path, text: str) -> str:
    """A paper's README with the tables of layers side by side, where it has their sections."""
    experiments = file.parent.parent
    text = with_section(file, text, "layers", lambda: layer_tables.reading_table(experiments))
    text = with_section(file, text, "recall", lambda: layer_tables.recall_table(experiments))
    text = with_section(file, text, "worlds", lambda: world_tables.world_table(experiments))
    paper = file.parent.name
    return with_section(
        file, text, "memories", lambda: memory_tables.memory_table(experiments, paper, "memories")
    )


def kernels_page(file: Path) -> str:
    """The README of the kernels: what the audit, the parity runs and the benchmark recorded."""
    from kernels.audit import table as audit
    from kernels.bench import table as bench
    from kernels.parity import table as parity

    results = file.parent / "results" / "h200.json"
    text = with_section(file, file.read_text(), "audit", audit.markdown)
    text = with_section(file, text, "parity", parity.markdown)
    return with_section(file, text, "bench", lambda: bench.markdown(results))


def with_section(file: Path, text: str, kind: str, write: Callable[[], str]) -> str:
    """The file's text with its generated section replaced; unchanged if it has none."""
    begin = f"<!-- generated:{kind} -->"
    head, found, rest = text.partition(begin)
    if not found:
        return text
    _, closed, tail = rest.partition(END)
    if not closed:
        raise UserError(f"{file.parent.name}/{file.name}: `{begin}` is not closed by `{END}`")
    return f"{head}{begin}\n\n{write()}\n\n{END}{tail}"


def read_results(claims: PaperClaims) -> dict[str, dict[str, Any]]:
    """Scale -> what results/<scale>.json holds, for those that exist."""
    files = {scale: claims.file.parent / "results" / f"{scale}.json" for scale in SCALES}
    return {scale: json.loads(file.read_text()) for scale, file in files.items() if file.exists()}


def stale_results(root: Path = ROOT) -> list[str]:
    """Results that were judged by other claims than claims.yaml has now, one sentence each."""
    experiments = root / "experiments"
    found = []
    for paper in (load_claims(paper, experiments) for paper in papers(experiments)):
        for scale, results in read_results(paper).items():
            claims = paper.at(scale)
            then = {record["id"]: as_judged(record) for record in results["claims"]}
            now = {claim.id: as_claimed(claim, scale, then) for claim in claims.claims}
            changed = [name for name in {**now, **then} if now.get(name) != then.get(name)]
            changed += [
                f"run {name}"
                for name, run in results["runs"].items()
                if not same_run(claims.runs.get(name), scale, run)
            ]
            if changed:
                found.append(
                    f"experiments/{claims.name}/results/{scale}.json was judged by another "
                    f"claims.yaml ({', '.join(changed)}): afferent reproduce "
                    f"paper={claims.name} scale={scale}"
                )
    return found


def as_claimed(claim: Claim, scale: str, then: Mapping[str, Any]) -> dict[str, Any]:
    """What a claim says at a scale now; without its controls where none were judged."""
    controls = [plain(described(control, scale)) for control in claim.controls]
    judged = "controls" in then.get(claim.id, {})
    return {
        **plain(described(claim, scale)),
        "chance": claim.chance,
        **({"controls": controls} if judged else {}),
    }


def as_judged(record: Record) -> dict[str, Any]:
    """The part of a record that claims.yaml decided."""
    found = {key: record[key] for key in (*DESCRIBED, "chance", "wins") if key in record}
    if record["verdict"] != Verdict.not_run:
        found["controls"] = [
            {key: control[key] for key in (*DESCRIBED, "wins") if key in control}
            for control in record["controls"]
        ]
    return found


def same_run(spec: RunSpec | None, scale: str, run: Record) -> bool:
    """Whether a recorded run is still the one that claims.yaml names."""
    asked = None if spec is None else (spec.experiment, list(spec.at(scale)[1]))
    return asked == (run["experiment"], run["overrides"])


def papers_table(every: Sequence[PaperClaims]) -> str:
    """One row per paper: what it is about, its verdicts at each scale, the command."""
    rows = []
    for claims in every:
        verdicts = verdict_counts(claims)
        rows.append(
            [
                linked(claims) + cited(claims),
                claims.about,
                *verdicts.values(),
                f"`afferent reproduce paper={claims.name}`",
            ]
        )
    return table(["paper", "what", *SCALES, "command"], rows)


def linked(claims: PaperClaims) -> str:
    """The title, as a link to the folder's README where there is one."""
    exists = (claims.file.parent / "README.md").exists()
    return f"[{claims.title}](experiments/{claims.name}/README.md)" if exists else claims.title


def cited(claims: PaperClaims) -> str:
    """Year and arXiv identifier of the paper behind a folder."""
    if claims.paper is None:
        return ""
    arxiv = claims.paper.arxiv
    link = f", [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""
    return f" ({claims.paper.year}{link})"


def verdict_counts(claims: PaperClaims) -> dict[str, str]:
    """Scale -> `3 reproduced, 1 direction only`. A claim without a record counts as not run."""
    recorded, found = read_results(claims), {}
    for scale in SCALES:
        records = {record["id"]: record for record in recorded.get(scale, {}).get("claims", [])}
        given = [records.get(claim.id, {"verdict": "not run"}) for claim in claims.claims]
        counts = Counter(record["verdict"] for record in given)
        parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
        found[scale] = "not run" if set(counts) == {Verdict.not_run} else ", ".join(parts)
    return found


def results_section(claims: PaperClaims) -> str:
    """A paper's results at every scale, as its README shows them."""
    recorded = read_results(claims)
    parts = []
    for scale in SCALES:
        parts.append(f"### Scale {scale}")
        if scale in recorded:
            parts += scale_section(recorded[scale], claims.file.parent)
        elif scale in claims.scales():
            parts.append(f"Not run by us. `afferent reproduce paper={claims.name} scale={scale}`")
        else:
            parts.append("Not run: no claim is judged at this scale.")
    return "\n\n".join(parts)


def scale_section(results: Record, folder: Path) -> list[str]:
    """Table, reasons, provenance and figures of one results file."""
    header = ["claim", "published", "measured", "must be", "floors", "ceilings"]
    parts = [table([*header, "controls", "verdict"], [row(item) for item in results["claims"]])]
    if reasons := [f"- `{c['id']}`: {explained(c)}" for c in results["claims"] if explained(c)]:
        parts.append("\n".join(reasons))
    parts.append(provenance_line(results))
    figures = sorted((folder / "figures").glob(f"{results['scale']}_*.svg"))
    parts += [f"![{caption(figure)}](figures/{figure.name})" for figure in figures]
    return parts


def caption(figure: Path) -> str:
    return figure.stem.partition("_")[2].replace("_", " ")


def explained(record: Record) -> str:
    """Why a claim did not come out: what decided, then what was found out."""
    decided, found = ((record[key] or "").rstrip(".") for key in ("because", "reason"))
    return f"{decided}. {found[0].upper()}{found[1:]}" if decided and found else decided or found


def row(record: Record) -> list[str]:
    """A claim as a line of the results table."""
    published = record["published"]
    return [
        f"`{record['id']}` {record['statement']}",
        f"{number(published['value'])} {published['unit']} ({published['source']})"
        if published
        else "",
        f"{formula(record)} = {spread(record)}" if record["values"] else "",
        limit(record),
        listed(record["floors"]),
        listed(record["ceilings"]),
        "<br>".join(control_text(control) for control in record["controls"]),
        f"**{record['verdict']}**",
    ]


def formula(record: Record) -> str:
    """`metric - minus`, as it was measured."""
    minus = record["minus"]
    if record.get("wins"):
        return f"share of {record['metric']} < {minus}"
    less = number(minus) if isinstance(minus, float) else minus
    return f"{record['metric']} - {less}" if minus is not None else record["metric"]


def spread(record: Record) -> str:
    """`-0.312 [-0.33, -0.29], 3 seeds`."""
    count = len(record["values"])
    interval = record["interval"]
    inside = f" [{number(interval[0])}, {number(interval[1])}]" if interval else ""
    return f"{number(record['mean'])}{inside}, {count} seed{'s' if count > 1 else ''}"


def limit(record: Record) -> str:
    """`≤ -0.1`, or '' where nothing is judged."""
    if record["threshold"] is None:
        return ""
    sign = SIGNS[Direction(record["direction"])]
    return f"{sign}{'' if sign.endswith('±') else ' '}{number(record['threshold'])}"


def control_text(control: Record) -> str:
    state = "holds" if control["holds"] else "**fails**"
    return f"{state}: {control['statement']} ({spread(control)}; {limit(control)})"


def listed(values: Mapping[str, float | None]) -> str:
    return "<br>".join(f"{name} {number(value)}" for name, value in values.items())


def number(value: float | None) -> str:
    """Four significant digits; null in a results file stands for a number that is not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def provenance_line(results: Record) -> str:
    """Where the numbers come from, in one line."""
    hardware = results["hardware"]
    machine = ", ".join(hardware.get("gpus") or [f"{hardware['cpus']} x {hardware['cpu']}"])
    commits = {commit for run in results["runs"].values() for commit in run["commits"]}
    sizes = [run["parameters"] for run in results["runs"].values() if "parameters" in run]
    parts = [
        f"{len(results['seeds'])} seed{'s' if len(results['seeds']) > 1 else ''}",
        "95 % intervals (Student t)",
        f"{clock(results['wall_s'])} for all runs",
        machine,
        f"up to {human(max(sizes))} parameters" if sizes else "",
        f"commit {', '.join(sorted(c[:12] for c in commits or {results['commit']}))}"
        f"{' with changes' if results['dirty'] else ''}",
        results["date"][:10],
    ]
    return f"*{'; '.join(part for part in parts if part)}.*"


def console_table(results: Record) -> str:
    """The verdicts, as `afferent reproduce` prints them."""
    lines = []
    for record in results["claims"]:
        measured = f"{spread(record)}; must be {limit(record)}" if record["values"] else ""
        lines.append((record["verdict"], record["id"], measured))
        lines += [
            (
                "  control " + ("holds" if control["holds"] else "FAILS"),
                f"  {control['id']}",
                f"{spread(control)}; must be {limit(control)}",
            )
            for control in record["controls"]
        ]
        if why := explained(record):
            lines.append(("", "", why))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines)
